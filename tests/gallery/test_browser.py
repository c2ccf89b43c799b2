"""The galleries in a real browser: the page, a saved notebook without kernel or network, the widget in JupyterLab.

`make test-browser` runs them. Where Chromium or playwright is missing they are skipped, but with CI=true they fail.
Screenshots go to the folder of RECNB_SCREENSHOTS, `screenshots/` without it.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from urllib.request import urlopen

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from recnb.gallery.page import gallery_html
from recnb.retrieval.lists import rank

pytestmark = pytest.mark.browser

SCREENSHOTS = Path(os.environ.get("RECNB_SCREENSHOTS") or ROOT / "screenshots")
WIDTHS = (1280, 400)
LOOKS = list(product(WIDTHS, ("light", "dark")))
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LOCAL = ("file:", "data:", "blob:")
# The alternative texts of the visible images that show nothing, be the picture their source or their background.
UNSEEN = """async images => {
  const broken = [];
  for (const image of images.filter(image => image.checkVisibility())) {
    const behind = getComputedStyle(image).backgroundImage.match(/url\\("(.*)"\\)/), probe = new Image();
    probe.src = behind ? behind[1] : image.src;
    await probe.decode().catch(() => null);
    if (!image.complete || !image.naturalWidth || probe.naturalWidth < 2) broken.push(image.alt);
  }
  return broken;
}"""
TEXTS = (
    ".recnb :is(.recnb-note b, .recnb-note small, .widget-label, select, button, h2, h3, dt, dd, figcaption):visible"
)
# The texts whose contrast with what is behind them is below 4.5, as WCAG asks for.
FAINT = """nodes => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = rgb => rgb.slice(0, 3).map(v => v / 255).map(v => v <= .04 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  return nodes.filter(node => {
    let share = 1, behind = node;
    for (; behind.parentElement; behind = behind.parentElement) {
      share *= getComputedStyle(behind).opacity;
      if ((parts(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 1) break;
    }
    const back = parts(getComputedStyle(behind).backgroundColor);
    const own = parts(getComputedStyle(node).color).map((v, i) => share * v + (1 - share) * back[i]);
    const [dark, bright] = [light(own), light(back)].sort((a, b) => a - b);
    return node.textContent.trim() && (bright + .05) / (dark + .05) < 4.5;
  }).map(node => node.textContent);
}"""
LOAD = """
import numpy as np
from recnb import gallery, retrieval
data = np.load("drawn.npz")
paths, labels, cameras = data["paths"].tolist(), data["labels"], data["cameras"]
names = {label: f"Some_landwirtschaftliche Erzeugnisse {label}" for label in labels.tolist()}
ranking = retrieval.rank(data["features"], data["features"], labels, labels, cameras, cameras, exclude_self=True, k=12)
"""


def missing(what: str):
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"{what}, which CI must have: see `make test-browser`")
    pytest.skip(f"{what}: see `make test-browser`")


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        missing("Chromium is not installed")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser, url: str, width: int = 1280, scheme: str = "light", allowed=LOCAL, strict: bool = True):
    """A page that reaches only what is allowed; strict: it does not try to reach more either, and reports no error."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    context.route(lambda address: not address.startswith(allowed), lambda route: route.abort())
    page, asked, errors = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    try:
        page.goto(url)
        yield page
        if strict:
            assert [address for address in asked if not address.startswith(allowed)] == []
            assert errors == []
    finally:
        context.close()


def screenshot(page, name: str, top=None) -> None:
    """The window, scrolled until `top` is its first line where that is given."""
    if top is not None:
        top.evaluate("node => node.scrollIntoView()")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def clipped(page) -> list[str]:
    """The captions of the widget's tiles that are cut, or that reach out of their tile."""
    return page.locator(".recnb-note:visible").evaluate_all(
        """notes => notes.filter(note => {
          const tile = note.closest(".recnb-tile").getBoundingClientRect(), box = note.getBoundingClientRect();
          const cut = note.scrollHeight > note.clientHeight + 1 || note.scrollWidth > note.clientWidth + 1;
          return cut || box.height < 10 || box.bottom > tile.bottom + 1 || box.right > tile.right + 1;
        }).map(note => note.textContent)"""
    )


def unseen(where) -> list[str]:
    images = where.locator("img")
    assert images.count() > 0
    return images.evaluate_all(UNSEEN)


@pytest.fixture(scope="module")
def items(drawn):
    """Every drawn test picture as a query and as a gallery item: paths, labels, cameras, coarse colours as features."""
    lines = [line.split() for name in ("query", "gallery") for line in (drawn / f"{name}.txt").read_text().splitlines()]
    paths = [str(drawn / "images" / path) for path, _, _ in lines]
    small = [np.asarray(Image.open(path).convert("RGB").resize((6, 6)), np.float32) for path in paths]
    colours = [((x - x.mean((0, 1))) / x.std((0, 1))).ravel() for x in small]
    return {
        "paths": paths,
        "labels": np.array([int(label) for _, label, _ in lines]),
        "cameras": np.array([int(camera) for _, _, camera in lines]),
        "features": np.stack(colours),
    }


@pytest.fixture(scope="module")
def ranking(items):
    features, labels, cameras = items["features"], items["labels"], items["cameras"]
    return rank(features, features, labels, labels, cameras, cameras, exclude_self=True, k=12)


# ---- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page_url(ranking, items, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "gallery.html"
    gallery_html(ranking, items["paths"], items["paths"], path, title="Drawn marks")
    return path.as_uri()


@pytest.mark.parametrize("width,scheme", LOOKS)
def test_the_page_shows_every_picture_and_pages_by_key(browser, page_url, ranking, width, scheme):
    with opened(browser, page_url, width, scheme) as page:
        captions = []
        assert page.evaluate("scrollY") == 0  # the controls are what a reader sees first
        for step in range(6):
            now = page.locator("article.now")
            assert now.count() == 1 and unseen(now) == []
            assert page.locator("#count").text_content() == f"{step + 1} of {len(ranking)}"
            captions.append(now.get_attribute("aria-label"))
            page.keyboard.press("ArrowRight")
        assert len(set(captions)) == 6
        assert unseen(page) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        screenshot(page, f"page-{width}-{scheme}")


def test_the_page_filters_and_searches(browser, page_url, ranking, items):
    with opened(browser, page_url) as page:
        entries = page.locator("nav li:visible")
        page.get_by_label("failures only").check()
        assert entries.count() == ranking.failed.sum() < len(ranking)
        assert page.locator("#count").text_content() == f"1 of {ranking.failed.sum()}"
        page.get_by_label("failures only").uncheck()
        label = items["labels"][0]
        page.get_by_label("Find").fill(f"id {label}")
        assert entries.count() == (items["labels"] == label).sum()
        assert page.locator("article.now h2").text_content() == f"id {label}"
        page.get_by_label("Find").fill("nothing of this name")
        assert entries.count() == 0 and page.locator("#count").text_content() == "none"


def test_a_hit_of_the_page_leads_to_its_own_query(browser, page_url):
    with opened(browser, page_url) as page:
        first, link = page.locator("article.now").get_attribute("id"), page.locator("article.now .found a").nth(2)
        target = link.get_attribute("href").removeprefix("#")
        link.click()
        assert page.locator("article.now").get_attribute("id") == target != first
        page.go_back()
        assert page.locator("article.now").get_attribute("id") == first


# ---- a saved notebook ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(items, tmp_path_factory):
    """Where the notebooks below run: the drawn set as arrays."""
    folder = tmp_path_factory.mktemp("notebook")
    np.savez(folder / "drawn.npz", **items)
    return folder


def write_notebook(path: Path, *cells: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in (LOAD, *cells)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


@pytest.fixture(scope="module")
def executed(folder):
    """A notebook of the figure, the static gallery twice, run; its path."""
    path = write_notebook(
        folder / "saved.ipynb",
        "gallery.gallery_figure(ranking, paths, paths, k=5)",
        "from recnb.gallery.page import gallery_static\ngallery_static(ranking, paths, paths)",
        "gallery_static(ranking, paths, paths, rows=[3, 1])",
    )
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    subprocess.run(
        [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", path],
        check=True,
        capture_output=True,
        timeout=180,
        env=environment,
    )
    return path


def converted(notebook: Path, name: str, *options: str) -> str:
    """The address of the HTML page that nbconvert makes of the notebook."""
    subprocess.run(
        [sys.executable, "-m", "nbconvert", "--to", "html", "--output", name, *options, notebook],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return (notebook.parent / f"{name}.html").as_uri()


@pytest.fixture(scope="module")
def saved_url(executed):
    """A function from a theme to the address of the page as nbconvert makes it by default, but for that theme."""
    made = {scheme: converted(executed, scheme, f"--HTMLExporter.theme={scheme}") for scheme in ("light", "dark")}
    return made.get


@pytest.mark.parametrize("width,scheme", LOOKS)
def test_the_saved_gallery_shows_and_pages_without_kernel_and_network(browser, saved_url, width, scheme):
    with opened(browser, saved_url(scheme), width, scheme, strict=False) as page:
        gallery = page.locator(".recnb.pages").first
        articles, choices = gallery.locator("article:visible"), gallery.locator("label")
        captions = [articles.get_attribute("aria-label")]
        choices.nth(2).click()
        captions.append(articles.get_attribute("aria-label"))
        for _ in range(3):
            page.keyboard.press("ArrowRight")
            assert articles.count() == 1 and unseen(gallery) == []
            captions.append(articles.get_attribute("aria-label"))
        assert len(set(captions)) == 5
        screenshot(page, f"saved-{width}-{scheme}", gallery)


def test_the_saved_galleries_do_not_turn_each_others_pages(browser, saved_url):
    with opened(browser, saved_url("light"), strict=False) as page:
        first, second = page.locator(".recnb.pages").all()
        before = first.locator("article:visible").get_attribute("aria-label")
        assert second.locator("article:visible").get_attribute("aria-label").startswith("query 3,")
        second.locator("label").nth(1).click()
        assert second.locator("article:visible").get_attribute("aria-label").startswith("query 1,")
        assert first.locator("article:visible").get_attribute("aria-label") == before
        figure = page.locator('img[src^="data:image/png"]')
        assert figure.count() == 1 and figure.evaluate("image => image.naturalWidth") > 500
        ids = page.locator("[id]").evaluate_all("nodes => nodes.map(node => node.id)")
        assert len(set(ids)) == len(ids)


# ---- the widget in JupyterLab ----------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def lab(folder, tmp_path_factory):
    """The address of a JupyterLab of this test's own, without a token, for this machine alone."""
    state, port = tmp_path_factory.mktemp("jupyter"), free_port()
    names = ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")
    environment = {
        **os.environ,
        **{f"JUPYTER_{name}": str(state / name.lower()) for name in names},
        "JUPYTERLAB_SETTINGS_DIR": str(state / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(state / "workspaces"),
    }
    quiet = state / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    quiet.with_name("themes.jupyterlab-settings").write_text('{"adaptive-theme": true}')  # as the browser's scheme
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={folder}",
        "--LabApp.extension_manager=readonly",
    ]
    with (state / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        yield answering(f"http://127.0.0.1:{port}", server, state / "log")
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def answering(url: str, server: subprocess.Popen, log: Path) -> str:
    """The address once it answers, within a minute."""
    for _ in range(120):
        try:
            with urlopen(f"{url}/api/status", timeout=5) as answer:
                json.load(answer)
                return url
        except OSError:
            pass
        try:
            server.wait(0.5)
            break
        except subprocess.TimeoutExpired:
            continue
    pytest.fail(f"JupyterLab does not answer:\n{log.read_text()[-2000:]}")


@contextmanager
def in_lab(browser, lab: str, notebook: Path, width: int = 1280, scheme: str = "light"):
    """The notebook's page in JupyterLab, its kernel ready."""
    allowed = (*LOCAL, lab, lab.replace("http:", "ws:"))
    with opened(browser, f"{lab}/doc/tree/{notebook.name}?reset", width, scheme, allowed, strict=False) as page:
        page.set_default_timeout(90_000)
        page.get_by_text(re.compile(r"\| Idle$")).wait_for()  # before it, running cells asks for a kernel
        yield page


def run_all(page) -> None:
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    page.locator(".recnb article:visible").wait_for()


def slider(page, name: str):
    return page.locator(".widget-slider", has=page.get_by_text(name, exact=True)).get_by_role("slider")


def changed(page, before: str) -> str:
    """The query shown, once it is another one."""
    page.wait_for_function("id => document.querySelector('.recnb article').id !== id", arg=before)
    return page.locator(".recnb article").get_attribute("id")


@pytest.mark.parametrize("width", WIDTHS)
def test_the_widget_answers_in_jupyterlab(browser, lab, folder, ranking, width):
    notebook = write_notebook(folder / f"live{width}.ipynb", "gallery.gallery_widget(ranking, paths, paths, 5, names)")
    with in_lab(browser, lab, notebook, width) as page:
        run_all(page)
        article, hits = page.locator(".recnb article"), page.locator("button.recnb-hit:visible")
        assert hits.count() == 5 and unseen(page.locator(".recnb")) == [] and clipped(page) == []
        seen = [article.get_attribute("id")]
        for _ in range(3):
            slider(page, "query").press("ArrowRight")
            seen.append(changed(page, seen[-1]))
        assert len(set(seen)) == 4
        page.get_by_text(f"4 of {len(ranking)}", exact=True).wait_for()
        page.get_by_label("failures only").check()
        page.get_by_text(f"of {ranking.failed.sum()}").first.wait_for()
        slider(page, "k").press("ArrowRight")
        hits.nth(5).wait_for()
        assert hits.count() == 6 and clipped(page) == []
        before = article.get_attribute("id")
        page.locator("button[title*=query]:visible").nth(1).click()
        assert changed(page, before) in [f"q{q}" for q in ranking.ids[int(before.removeprefix("q")), :6]]
        assert unseen(page.locator(".recnb")) == []
        screenshot(page, f"lab-{width}", page.locator(".widget-slider").first)


@pytest.mark.parametrize("width,scheme", LOOKS)
def test_widget_and_grid_are_legible_in_either_theme(browser, lab, folder, width, scheme):
    cells = ("gallery.gallery_widget(ranking, paths, paths, 10, names)", "gallery.gallery_grid(ranking, paths, paths)")
    notebook = write_notebook(folder / f"look-{width}-{scheme}.ipynb", *cells)
    with in_lab(browser, lab, notebook, width, scheme) as page:
        run_all(page)
        page.locator(".recnb-tile .g0:visible").wait_for()
        assert page.evaluate("document.body.dataset.jpThemeLight") == str(scheme == "light").lower()
        faint = page.locator(TEXTS).evaluate_all(FAINT)
        assert faint == [] and clipped(page) == []
        arrow = page.locator(".recnb select:visible").first.evaluate("node => getComputedStyle(node).backgroundImage")
        assert ("%23ddd" in arrow) == (scheme == "dark"), "JupyterLab's own is black in both"
        for place, name in ((0, "widget"), (2, "grid")):
            screenshot(page, f"lab-{name}-{width}-{scheme}", page.locator(".recnb .widget-slider").nth(place))


def test_the_gallery_notebook_in_jupyterlab(browser, lab, folder, trained_run):
    notebook = nbformat.read(ROOT / "notebooks" / "04_gallery.ipynb", 4)
    cells = {cell.id: cell for cell in notebook.cells}
    cells["parameters"].source = cells["parameters"].source.replace("runs/demo", str(trained_run))
    notebook.cells = [cells[name] for name in ("parameters", "setup", "browse")]
    nbformat.write(notebook, folder / "gallery.ipynb")
    with in_lab(browser, lab, folder / "gallery.ipynb") as page:
        run_all(page)
        page.locator("select", has_text="re-ranked").last.select_option(index=2)
        page.get_by_text("re-ranked, AP").wait_for()
        assert clipped(page) == [] and page.get_by_text("minus a distance").is_visible()
        page.get_by_role("button", name="filters").click()
        page.locator("select", has_text="fixed by").wait_for()
        screenshot(page, "lab-compare", page.locator(".widget-slider").first)
        page.get_by_role("button", name="where two pictures agree").click()
        heats = page.locator(".recnb-heat img")
        heats.nth(1).wait_for()
        assert heats.count() == 2 and unseen(page.locator(".recnb")) == []
        screenshot(page, "lab-heat", heats.first)


def test_the_static_gallery_pages_in_jupyterlab(browser, lab, folder):
    notebook = write_notebook(
        folder / "static.ipynb",
        "from recnb.gallery.page import gallery_static",
        "gallery_static(ranking, paths, paths)",
    )
    with in_lab(browser, lab, notebook) as page:
        run_all(page)
        gallery = page.locator(".recnb.pages")
        articles = gallery.locator("article:visible")
        captions = [articles.get_attribute("aria-label")]
        gallery.locator("label").nth(2).click()
        captions.append(articles.get_attribute("aria-label"))
        for key in ("ArrowRight", "ArrowDown"):  # JupyterLab's own keys in a notebook
            page.keyboard.press(key)
            assert articles.count() == 1 and unseen(gallery) == []
            captions.append(articles.get_attribute("aria-label"))
        assert len(set(captions)) == 4


def test_an_untrusted_notebook_still_shows_every_picture_of_the_static_gallery(browser, lab, executed):
    with in_lab(browser, lab, executed) as page:  # nobody ran it here: style and buttons are stripped
        gallery = page.locator(".recnb.pages").first
        gallery.wait_for()
        assert gallery.locator("article:visible").count() == gallery.locator("article").count() > 4
        assert unseen(gallery) == []
        screenshot(page, "lab-untrusted", gallery)
