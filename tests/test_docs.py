"""What README, docs, configs and notebooks say: commands parse, cheap ones run, links lead somewhere."""

import ast
import html.parser
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import urllib.parse
from functools import cache

import nbformat
import pytest
import typer
import yaml
from conftest import ROOT

from recnb import load_config
from recnb.cli import main, train
from recnb.cli import notebook as notebooks

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

sys.path.insert(0, str(ROOT / "docs"))

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "docs" / "notebooks" / "index.md",
]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
FENCE = re.compile(r"^```(\S*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CLIENTS = {"lancedb", "pgvector", "psycopg", "pyarrow", "pymilvus", "qdrant_client"}


def texts() -> dict[str, str]:
    """The prose of every page and notebook by its place."""
    found = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        found[str(path.relative_to(ROOT))] = "\n\n".join(c.source for c in cells if c.cell_type == "markdown")
    return found


@cache
def commands(inline: bool = True) -> list[tuple[str, str]]:
    """Every (place, command line) in a block of shell, in the code within a sentence, or in the head of a config."""
    found = []
    for place, text in texts().items():
        blocks = [block for language, block in FENCE.findall(text) if language in ("", "bash", "sh", "console")]
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        if inline:
            lines += re.findall(r"`((?:make|pip|python|conda|recnb|\.venv/bin/\S+) [^`]+)`", FENCE.sub("", text))
        found += [(place, line.strip()) for line in lines if line.strip()]
    for path in CONFIGS:
        head = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))[0]
        lines = re.findall(r"^#   (\S.*)$", re.sub(r"\\\n#\s*", " ", head), re.MULTILINE)
        found += [(str(path.relative_to(ROOT)), line.strip()) for line in lines]
    return found


def words_of(line: str) -> list[str]:
    return shlex.split(line, comments=True)


@pytest.mark.parametrize(("place", "line"), commands(), ids=lambda text: text[:60])
def test_each_command_exists_and_parses(place, line):
    if words := words_of(line):
        check(words)


def check(words: list[str]) -> None:
    """Fail unless a command is one of this project's, and what it names exists."""
    program, *rest = words
    if program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in rest if "=" not in word} <= targets
    elif program in ("python", ".venv/bin/python"):
        check_python(rest)
    elif program == "torchrun":
        check_python(rest[rest.index("-m") :])
    elif program == "recnb":
        check_recnb(rest)
    elif program == "pip":
        (package,) = rest[1:]
        assert rest[0] == "install" and package[:6] == "recnb[" and package[6:-1] in extras()
    elif program == "conda":
        assert rest[:3] == ["env", "create", "-f"] and (ROOT / rest[3]).is_file()
    elif program == "source":
        assert rest == [".venv/bin/activate"]
    else:
        assert program == ".venv/bin/pre-commit" and rest == ["install"], f"not a command of this project: {words}"


def extras() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def check_python(words: list[str]) -> None:
    if words[:2] == ["-m", "pytest"]:
        for path in (word for word in words[2:] if word.startswith("tests")):
            assert (ROOT / path).exists()
    elif words[0] == "-m" and words[1] in ("recnb.cli.train", "recnb.cli.embed"):
        check_recnb([words[1].rpartition(".")[2], *words[2:]])
    else:
        assert (ROOT / words[0]).is_file()
        source = (ROOT / words[0]).read_text(encoding="utf-8")
        options = [word for word in words[1:] if word.startswith("-")]
        assert all(f'"{option}"' in source for option in options), f"{words[0]} does not have all of {options}"
        for word in words[1:]:
            if "/" in word and not word.startswith("runs/"):
                assert (ROOT / word).exists(), word


def check_recnb(words: list[str]) -> None:
    """Fail unless `recnb` has this subcommand with these options, and what a notebook or a config is given fits it."""
    if words[0].startswith("--"):
        return
    command, *rest = main.joined(words)
    parser = typer.main.get_command(main.app).commands[command]
    given = parser.make_context(command, rest).params if rest else {}  # none: prose that names the command
    if command == "run" and given.get("notebook", "").islower():
        pairs = [pair.partition("=")[::2] for pair in given["pairs"] or ()]
        written = [(name, value) for name, value in pairs if not value.startswith(("runs/", "data/"))]
        text = yaml.safe_load(given["text"]) or {}
        if "run" in notebooks.known(notebooks.find(given["notebook"])):
            text["run"] = ""  # there need be none
        found = notebooks.parameters_of(notebooks.find(given["notebook"]), written, yaml.safe_dump(text))
        if found.get("config", "auto") != "auto":
            load_config(found["config"], found.get("overrides"))
        assert dict(pairs).keys() <= notebooks.known(notebooks.find(given["notebook"])).keys()
    elif command == "sweep" and given and (ROOT / given["batch"]).is_file():
        batch = yaml.safe_load((ROOT / given["batch"]).read_text(encoding="utf-8"))
        load_config(ROOT / batch["config"], batch.get("overrides"))
    elif str(given.get("config", "")).islower():
        load_config(ROOT / given["config"], train.overrides_of(given["overrides"]))


def lines_of(*places: str) -> list[str]:
    """The different commands in the blocks of some pages, in their order, but for those to be filled in: a FOLDER."""
    return list(
        dict.fromkeys(
            line
            for place, line in commands(inline=False)
            if place in places and line.startswith(("python", "recnb")) and not any(map(str.isupper, words_of(line)))
        )
    )


def run(line: str) -> str:
    """What a command of the documentation prints; it must end without an error."""
    program, *rest = words_of(line)
    words = ["-m", "recnb", *rest] if program == "recnb" else rest
    result = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_cheap_commands_run(tmp_path):
    assert "total" in run("python scripts/size.py")
    printed = run(next(line for _, line in commands() if line.endswith("--print")) + f" --run-dir {tmp_path}")
    assert len(printed.splitlines()) == 6


@pytest.mark.slow
def test_the_commands_of_the_first_pages_run_one_after_the_other():
    for line in lines_of("README.md", "docs/start.md", "docs/images.md", "docs/galleries.md", "docs/deploying.md"):
        run(line)


def test_the_sizes_add_up():
    size = importlib.import_module("size")
    folders, each = size.sizes(), size.sizes(each_module=True)
    assert folders["total"] == each["total"] == sum(v for k, v in each.items() if k != "total")


def test_no_command_calls_papermill():
    assert [(place, line) for place, line in commands() if words_of(line)[:1] == ["papermill"]] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1300


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST write them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_between_the_pages_lead_somewhere():
    made = re.compile(r"docs/(reference|api)/|docs/notebooks/\d\d_")  # by `make docs`; its own test follows their links
    broken = []
    for place, text in texts().items():
        for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
            if re.match(r"https?:|mailto:", target):
                continue
            name, _, anchor = target.partition("#")
            path = (ROOT / place).parent / name if name else ROOT / place
            if made.match(path.resolve().relative_to(ROOT).as_posix()):
                continue
            if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
                broken.append(f"{place}: {target}")
    assert broken == []


def python_blocks() -> list[tuple[str, str]]:
    return [
        (place, block)
        for place, text in texts().items()
        for language, block in FENCE.findall(text)
        if language == "python"
    ]


@pytest.mark.parametrize(("place", "block"), python_blocks(), ids=lambda text: text.splitlines()[0][:60])
def test_blocks_of_python_import_what_there_is(place, block):
    for client in CLIENTS & {*re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE)}:
        pytest.importorskip(client, reason="the client of an engine that an index is handed over to is not installed")
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for place, block in python_blocks() if place == "README.md"])
def test_the_python_of_the_readme_runs(block, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", block],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr


def test_the_reference_has_every_name_with_its_arguments():
    generate = pytest.importorskip("generate")
    pages = "\n".join(generate.reference_pages().values())
    for registry in generate.registries().values():
        for name in registry:
            assert f"### {name}" in pages or f"`{name}`" in pages, name
            for argument, parameter in registry.parameters(name).items():
                assert parameter.kind is parameter.VAR_KEYWORD or f"| `{argument}` |" in pages, f"{name}: {argument}"


class Links(html.parser.HTMLParser):
    """The addresses that a page points to, and the anchors that it has."""

    def __init__(self):
        super().__init__()
        self.targets, self.anchors = [], set()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.targets += [given[key] for key in ("href", "src") if given.get(key)]
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_every_internal_link_leads_somewhere():
    subprocess.run([sys.executable, "docs/build.py"], cwd=ROOT, check=True)
    site, pages, broken = ROOT / "docs" / "_build" / "html", {}, []
    for path in (path for path in site.rglob("*.html") if "_static" not in path.parts):
        pages[path.resolve()] = page = Links()
        page.feed(path.read_text(encoding="utf-8"))
    for path, page in pages.items():
        for target in page.targets:
            parts = urllib.parse.urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            aim = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            aim = aim / "index.html" if aim.is_dir() else aim
            if not aim.exists() or (
                parts.fragment and aim in pages and urllib.parse.unquote(parts.fragment) not in pages[aim].anchors
            ):
                broken.append(f"{path.relative_to(site)}: {target}")
    assert broken == []
