"""Files that mean harm, or that nobody meant: each ends in a sentence, quickly, and nothing in them is run."""

import hashlib
import importlib.util
import json
import os
import pickle
import re
import runpy
import signal
import sys
import time
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from processes import start
from safetensors.torch import save_file

from recnb import build_loaders, load_config
from recnb.data.audit import fingerprints
from recnb.data.images import DataError
from recnb.data.layouts import CompCars, ICartoonDataset, LogoDataset
from recnb.data.lists import ImageNetDataset, VeriWild
from recnb.data.prepare import Options, list_files, read_source
from recnb.data.splits import split
from recnb.gallery.curves import map_figure, samples_figure
from recnb.gallery.figure import gallery_figure
from recnb.gallery.page import gallery_html, gallery_static
from recnb.gallery.widget import gallery_widget
from recnb.models.weights import load_weights
from recnb.recipe import starter
from recnb.recipe.model import build_model
from recnb.recipe.reading import LARGEST, as_yaml, parse
from recnb.registry import ConfigError
from recnb.retrieval.lists import rank
from recnb.retrieval.search import Index, sealed, unsealed
from recnb.runs.analysis import of_files
from recnb.runs.folder import load_run
from recnb.storage import resolve

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "DataLoader.Train.dataset"


class Touch:
    """What a pickle does where it is let: here, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# --- Configurations ---------------------------------------------------------------------------------------------------


def tenfold(letters: str, line: str) -> str:
    """Lines in which each letter's anchor holds the one before it ten times."""
    return "".join(line.format(name=b, before=",".join([f"*{a}"] * 10)) for a, b in pairwise(letters))


HOSTILE = {
    "a tag that would call": (
        "a: !!python/object/apply:os.mkdir [touched]\n",
        "line 1: .* would build an object, and only plain values are allowed here",
    ),
    "a tag that would import": ("a: !!python/name:os.system\n", "line 1: .* would build an object"),
    "a tag of a new object": ("Global: !!python/object/new:os.system [x]\n", "line 1: .* would build an object"),
    "aliases that multiply": (
        "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + tenfold("abcdefghij", "{name}: &{name} [{before}]\n"),
        "with its aliases written out, it has more than 100,000 values",
    ),
    "merges that multiply": (
        "a: &a {x: 1}\n" + tenfold("abcdefghij", "{name}: &{name}\n  <<: [{before}]\n"),
        "with its aliases written out, it has more than 100,000 values",
    ),
    "a long text that multiplies": (f"a: &a {'x' * 100_000}\nb: [{','.join(['*a'] * 1000)}]\n", "more than 100,000"),
    "a mapping in itself": ("Global: &a\n  x: *a\n", "line 1: an anchor contains itself"),
    "a list in itself": ("Global: &a [*a]\n", "line 1: an anchor contains itself"),
    "a file in itself": ("&a\nGlobal: *a\n", "line 1: an anchor contains itself"),
    "a key in itself": ("? &a [*a]\n: 1\n", "line 1: an anchor contains itself"),
    "brackets": ("a: " + "[" * 100_000, "more than 50 levels, one in another"),
    "indents": ("".join(" " * i + "a:\n" for i in range(900)), "more than 50 levels, one in another"),
    "levels by aliases": (f"a: &a {'[' * 40}{']' * 40}\nb: {'[' * 40}*a{']' * 40}\n", "more than 50 levels"),
    "a large file": ("#" * (LARGEST + 1), "is larger than 500,000 bytes"),
    "a number of many digits": (f"a: {'9' * 5000}\n", "4300 digits"),
    "a date that is none": ("a: !!timestamp 2001-99-99\n", "month must be in 1..12"),
    "a zero byte": ("a: \0\n", "special characters are not allowed"),
    "half a character": (b"a: \xc3\n", "codec can't decode"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    text, message = HOSTILE[name]
    (tmp_path / "hostile.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    started = time.process_time()
    with pytest.raises(ConfigError, match=f"^{tmp_path}/hostile.yaml.*{message}"):
        load_config(tmp_path / "hostile.yaml")
    assert time.process_time() - started < 5
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.yaml"]


def test_aliases_that_do_not_multiply_are_fine(config_file):
    path = config_file()
    cfg = yaml.safe_load(path.read_text())
    cfg["DataLoader"]["Eval"]["Gallery"]["loader"] = cfg["DataLoader"]["Eval"]["Query"]["loader"]
    path.write_text(yaml.safe_dump(cfg))
    assert "*id001" in path.read_text()
    assert load_config(path)["DataLoader"]["Eval"]["Gallery"]["loader"] == {"num_workers": 0}


def test_a_configuration_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path, message in (
        (tmp_path / "pipe.yaml", "is a pipe or a device"),
        (tmp_path, "Is a directory"),
        ("/dev/zero", "is a pipe or a device"),
    ):
        with pytest.raises(ConfigError, match=f"^{path}: .*{message}"):
            load_config(path)


@pytest.mark.parametrize(("path", "message"), [("x" * 5000, "File name too long"), ("~nobody_/x", "home directory")])
def test_what_cannot_be_a_path(path, message):
    with pytest.raises(ConfigError, match=f"^'{path[:100]}' cannot be a path: .*{message}"):
        resolve(path)


@pytest.mark.parametrize(
    "code",
    [
        "__import__('os').mkdir('touched')",
        "!!python/object/apply:os.mkdir [touched]",
        "${mkdir touched}",
        "$(mkdir touched)",
        "{{ 7 * 7 }}",
        "lambda: 1",
    ],
)
def test_overrides_that_are_code_are_text(config_file, tmp_path, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"^{re.escape(f'Global.epochs: {code!r} is a str, not int')}"):
        load_config(config_file(), {"Global.epochs": code})
    cfg = load_config(config_file(), {"Global.output_dir": code})
    assert cfg["Global"]["output_dir"] == code and not (tmp_path / "touched").exists()
    (tmp_path / "again.yaml").write_text(as_yaml(cfg))
    assert load_config(tmp_path / "again.yaml")["Global"]["output_dir"] == code


@pytest.mark.parametrize("key", ["__class__", "Global.__class__.x", "Global.epochs.__add__", "Arch.Neck.__init__.y"])
def test_overrides_reach_keys_only(config_file, key):
    with pytest.raises(ConfigError, match=re.escape(key.split(".")[-1 if key == "__class__" else 0])):
        load_config(config_file(), {key: 1})


def test_an_override_that_contains_itself(config_file):
    endless = []
    endless.append(endless)
    with pytest.raises(ConfigError, match=r"^override 'Arch\.Head': its value contains itself"):
        load_config(config_file(), {"Arch.Head": endless})


def test_overrides_of_the_command_line_are_plain_too():
    with pytest.raises(ConfigError, match=r"^here line 1: an anchor contains itself"):
        parse("&a [*a]", "here")
    with pytest.raises(ConfigError, match=r"^here line 1: .* would build an object"):
        parse("!!python/name:os.system", "here")


# --- List files -------------------------------------------------------------------------------------------------------

READERS = {
    "VeriWild": (VeriWild, "{path} 0\n"),
    "ImageNetDataset": (ImageNetDataset, "{path} 0\n"),
    "ICartoonDataset": (ICartoonDataset, "{path}\t0\n"),
    "CompCars": (CompCars, "{path} 0\n"),
    "LogoDataset": (LogoDataset, "image_id\tlabel\tname\tpath\n1\t1\tx\t{path}\n"),
}


@pytest.fixture
def tree(tmp_path):
    """A root with an image, an image outside of it, and links below the root to a file and a folder outside."""
    for name in ("top/in.png", "out.png", "other/far.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "top" / "link.png").symlink_to(tmp_path / "out.png")
    (tmp_path / "top" / "folder").symlink_to(tmp_path / "other")
    return tmp_path


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "path",
    [
        "../out.png",
        "a/../../out.png",
        "{0}/out.png",
        "/etc/passwd",
        "folder/../../out.png",
        "./../top2/x.png",
        "..",
        "{0}/topless.png",
    ],
)
def test_paths_that_leave_the_root_are_refused_unless_asked_for(tree, reader, path):
    made, line = READERS[reader]
    path = path.format(tree)
    (tree / "list.txt").write_text(line.format(path=path))
    number = 2 if reader == "LogoDataset" else 1
    message = f"{tree}/list.txt line {number}: '{path}' leaves image_root, {tree}/top; "
    with pytest.raises(DataError, match=f"^{re.escape(message)}.*allow_outside: True"):
        made(str(tree / "top"), str(tree / "list.txt"))
    images = made(str(tree / "top"), str(tree / "list.txt"), allow_outside=True)
    assert images.paths == [os.path.join(tree / "top", path)]  # noqa: PTH118 (dots stay)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("path", ["in.png", "./in.png", "a/../in.png", "{0}/top/in.png", "link.png", "folder/far.png"])
def test_paths_that_stay_below_the_root_are_read(tree, reader, path):
    made, line = READERS[reader]
    (tree / "list.txt").write_text(line.format(path=path.format(tree)))
    assert made(str(tree / "top"), str(tree / "list.txt")).image(0).shape == (3, 4, 4)


def test_dots_behind_a_link_do_not_lead_out(tree):
    (tree / "top" / "out.png").write_bytes((tree / "top" / "in.png").read_bytes())
    (tree / "list.txt").write_text("folder/../out.png 0\n")  # to the system, this is the out.png beside top
    (path,) = VeriWild(str(tree / "top"), str(tree / "list.txt")).paths
    assert path == f"{tree}/top/out.png"


def test_a_relative_root(tree, monkeypatch):
    monkeypatch.chdir(tree / "top")
    for root, path, fine in (
        (".", "in.png", True),
        (".", "../out.png", False),
        ("..", "out.png", True),
        ("..", "../x.png", False),
    ):
        Path("list.txt").write_text(f"{path} 0\n")
        if fine:
            assert VeriWild(root, "list.txt").image(0).shape == (3, 4, 4)
        else:
            with pytest.raises(DataError, match="leaves image_root"):
                VeriWild(root, "list.txt")


def test_the_section_of_a_data_set_asks_for_paths_outside(config_file, drawn, tmp_path):
    lines = [f"{drawn / 'images' / line}" for line in (drawn / "train.txt").read_text().splitlines()]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    changes = {f"{TRAIN}.cls_label_path": str(tmp_path / "list.txt"), f"{TRAIN}.image_root": str(tmp_path)}
    with pytest.raises(DataError, match=f"^{TRAIN}: .* line 1: .* leaves image_root"):
        build_loaders(load_config(config_file(changes)))
    assert len(build_loaders(load_config(config_file({**changes, f"{TRAIN}.allow_outside": True}))).train)


def test_a_zero_byte_in_a_path(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"a.png 0\nb\0.png 0\n")
    with pytest.raises(DataError, match=r"list\.txt line 2: 'b\\x00\.png' is no path"):
        VeriWild(str(tmp_path), str(tmp_path / "list.txt"), allow_outside=True)
    for root, path in (("\0", "list.txt"), ("/images\0", "list.txt"), (str(tmp_path), "\0")):
        with pytest.raises(ConfigError, match=r"\\x00' cannot be a path: it holds a zero byte"):
            VeriWild(root, path)


def test_a_label_that_would_make_too_many_classes(config_file, tmp_path):
    (tmp_path / "list.txt").write_text(f"a.png 0\nb.png {10**15}\n")
    changes = {f"{TRAIN}.cls_label_path": str(tmp_path / "list.txt"), f"{TRAIN}.relabel": False}
    with pytest.raises(DataError, match=rf"list\.txt line 2: label {10**15} would make as many classes"):
        build_loaders(load_config(config_file(changes)))


def test_what_prepare_writes_says_that_it_leads_outside(tmp_path):
    rows = ["path,label"]
    for label in range(4):
        for n in range(4):
            path = tmp_path / ("left" if n % 2 else "right") / f"{label}_{n}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (label * 60, n * 60, 0)).save(path)
            rows.append(f"{path},{label}")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "images.csv").write_text("\n".join(rows))
    splits = split(read_source(tmp_path / "lists" / "images.csv")[0], 0.5)
    for root, outside in ((tmp_path / "left", True), (None, None)):
        folder = tmp_path / f"written {root is None}"
        folder.mkdir()
        start = starter.choose(starter.facts(splits, fingerprints(splits.path)), Options(weights=False))
        cfg = load_config(starter.write(folder, start, splits, root))
        assert cfg["DataLoader"]["Train"]["dataset"].get("allow_outside") is outside
        assert len(build_loaders(cfg).gallery.dataset)


def test_prepare_refuses_names_that_no_list_can_hold(tmp_path):
    for identity in "abcd":
        for n in range(3):
            (tmp_path / identity).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (n * 80, 0, 0)).save(tmp_path / identity / os.fsdecode(b"\xe9%d.png" % n))
    with pytest.raises(DataError, match=r"\\udce9\d\.png: no list can hold this name"):
        list_files(split(read_source(tmp_path)[0], 0.5))


# --- Pickles, weights, indices ----------------------------------------------------------------------------------------


@pytest.fixture
def model(config_file):
    return build_model(load_config(config_file()))


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("kind", ["pickle", "torch", "text", "empty", "length"])
def test_weights_that_are_none(model, tmp_path, name, kind):
    path, evil = tmp_path / name, {"head.weight": Touch(tmp_path / "touched")}
    if kind == "torch":
        torch.save(evil, path)
    else:
        path.write_bytes(
            {
                "pickle": pickle.dumps(evil),
                "text": b"{}",
                "empty": b"",
                "length": (2**62).to_bytes(8, "little") + b"{}",
            }[kind]
        )
    with pytest.raises(ConfigError, match=f"^Global.pretrained_model: {path} "):
        load_weights(model, path)
    assert not (tmp_path / "touched").exists()


def test_safetensors_whose_header_lies(model, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__" and header[name]["shape"])
    for change in ({"data_offsets": [0, 2**62]}, {"shape": [2**40, 2**40]}, {"dtype": "X9"}, {"data_offsets": [9, 3]}):
        text = json.dumps({**header, name: {**header[name], **change}}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])
        with pytest.raises(ConfigError, match="cannot be read as weights"):
            load_weights(model, path)


@pytest.fixture
def index(tmp_path):
    made = Index()
    made.add(np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32), np.arange(9))
    made.save(tmp_path / "index")
    return tmp_path / "index"


def rewritten(index: Path, **changes) -> None:
    """Change what index.json says, with a checksum that is right all the same."""
    state = unsealed(index / "index.json")
    (index / "index.json").write_text(sealed({**state, **changes}))


def test_indices_that_are_damaged_or_pickles(index, tmp_path):
    (vectors,) = index.glob("*.faiss")
    whole, said = vectors.read_bytes(), (index / "index.json").read_text()
    evil = pickle.dumps(Touch(tmp_path / "touched"))
    refused = f"^{index} holds no index that can be read: .*; save the index again$"
    for content in (evil, whole[:50], b"", whole[:-1]):
        vectors.write_bytes(content)
        with pytest.raises(ValueError, match=refused):
            Index.load(index)
    for content in (evil, b"", b"[]", b"{}", said.encode()[:40], b"\xff"):
        (index / "index.json").write_bytes(content)
        with pytest.raises(ValueError, match=refused):
            Index.load(index)
    vectors.write_bytes(whole)
    for changes in (
        {"ids": [1, 2]},
        {"ids": "x"},
        {"dimension": 3},
        {"distance": "none"},
        {"sha256": "../../etc/x"},
        {"ids": [*range(8, -1, -1)]},
        {"columns": None},
        {"columns": {"label": ["a"]}},
        {"info": []},
    ):
        (index / "index.json").write_text(said)
        rewritten(index, **changes)
        with pytest.raises(ValueError, match=refused):
            Index.load(index)
    assert not (tmp_path / "touched").exists()


def test_a_bit_that_turns_over_anywhere_in_an_index_is_noticed(index):
    rng = np.random.default_rng(0)
    for file in index.iterdir():
        whole = file.read_bytes()
        for place in rng.integers(0, 8 * len(whole), 60).tolist():
            damaged = bytearray(whole)
            damaged[place // 8] ^= 1 << place % 8
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=file.name):
                Index.load(index)
        file.write_bytes(whole)


def test_a_faiss_file_that_is_broken_and_signed(index):
    (vectors,) = index.glob("*.faiss")
    content = b"IxMp" + vectors.read_bytes()[4:60] + b"\xff" * 16
    vectors.unlink()
    digest = hashlib.sha256(content).hexdigest()
    (index / f"vectors-{digest[:16]}.faiss").write_bytes(content)
    rewritten(index, sha256=digest)
    with pytest.raises(ValueError, match="holds no index that can be read"):
        Index.load(index)


def test_embeddings_and_results_that_are_damaged_or_pickles(config_file, tmp_path):
    run = tmp_path / "run"
    (run / "embeddings").mkdir(parents=True)
    (run / "config.yaml").write_bytes(config_file().read_bytes())
    good = {"metrics.json": b"{}", "history.csv": b"epoch\n1\n"}
    for name, rows in (("query", 18), ("gallery", 36)):
        np.save(tmp_path / f"{name}.npy", np.zeros((rows, 4), np.float32))
        good[f"embeddings/{name}.npy"] = (tmp_path / f"{name}.npy").read_bytes()
    for name, content in good.items():
        (run / name).write_bytes(content)
    assert load_run(run).query_features.shape == (18, 4)
    evil = pickle.dumps(Touch(tmp_path / "touched"))
    for name, content in good.items():
        for damaged in (evil, b"", content[:1]):
            (run / name).write_bytes(damaged)
            if name != "history.csv" or not damaged.startswith(b"e"):
                with pytest.raises(ConfigError, match=f"^{run}: {name} is damaged"):
                    load_run(run)
        (run / name).write_bytes(content)
    assert not (tmp_path / "touched").exists()


def test_arrays_from_elsewhere_that_are_pickles(tmp_path):
    for content in (pickle.dumps(Touch(tmp_path / "touched")), b"", b"\x93NUMPY\x01\0\xff\xff"):
        (tmp_path / "query.npy").write_bytes(content)
        with pytest.raises(ConfigError, match=r"^embeddings: query: .*query\.npy cannot be read as an array"):
            of_files({"query": str(tmp_path / "query.npy"), "query_labels": str(tmp_path / "query.npy")})
    assert not (tmp_path / "touched").exists()


# --- Galleries --------------------------------------------------------------------------------------------------------

MARKUP = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style><b>",
    "javascript:alert(1)",
    "{script}",
    "</title>",
    "<!-- ",
    "&lt;b&gt;",
    "a_b/c",
    "$\\frac{",
    "caf\udce9",
    "a\0b\n",
]


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text; what breaks a word is left out."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag != "wbr":
            self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    @property
    def shape(self):
        return [(tag, sorted(attrs)) for tag, attrs in self.tags]


@pytest.fixture
def hostile_gallery(tmp_path):
    """gallery(names) -> ranking, paths, names: six images whose labels, cameras and file names are the given texts."""

    def gallery(names: list[str]):
        vectors = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
        labels, cameras = np.array([0, 0, 1, 1, 2, 2]), np.array(names[:3] * 2)
        paths = []
        for i, name in enumerate([*names, *names][:6]):
            path = tmp_path / f"{i}{name}.png".replace("\0", "").replace("/", "_")
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(os.fsencode(path))
            paths.append(path)
        return rank(vectors, vectors, labels, labels, cameras, cameras, exclude_self=True, k=3), paths, names

    return gallery


@pytest.mark.parametrize("start", range(0, len(MARKUP), 3))
def test_markup_in_labels_cameras_and_file_names_is_text(hostile_gallery, tmp_path, start):
    def pages(names):
        ranking, paths, names = hostile_gallery(names)
        widget = gallery_widget(ranking, paths, paths, label_names=names)
        return [
            Page(
                gallery_html(
                    ranking, paths, paths, tmp_path / "page.html", label_names=names, title=names[0], summary=names[1]
                )
            ),
            Page(gallery_static(ranking, paths, paths, range(6), label_names=names).data),
            Page(
                widget.about.value
                + widget.later.value
                + "".join(tile.children[1].value for tile in widget.hits.row.children)
            ),
        ]

    names = (MARKUP * 2)[start : start + 3]
    for page, plain in zip(pages(names), pages(["one", "two", "three"]), strict=True):
        assert page.shape == plain.shape
        for tag, attrs in page.tags:
            assert not any(name.startswith("on") for name in attrs), (tag, attrs)
            for link in (attrs.get("href"), attrs.get("src")):
                assert link is None or link.startswith(("#q", "data:image/"))
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("<script") == 1


def test_a_label_is_shown_as_it_is_written(hostile_gallery):
    ranking, paths, names = hostile_gallery(["<b>&amp;</b>", "x", "y"])
    assert "<b>&amp;</b>" in Page(gallery_html(ranking, paths, paths, label_names=names)).text


def test_labels_that_look_like_formulas_are_drawn(hostile_gallery, tmp_path):
    ranking, paths, names = hostile_gallery(["$\\frac{$", "caf\udce9 $x$", "$"])
    gallery_figure(ranking, paths, paths, range(6), label_names=names, title="$\\frac{$").savefig(tmp_path / "a.png")
    labels = np.array(["$\\frac{$"] * 5 + ["b"] * 5)
    map_figure(np.random.default_rng(0).normal(size=(10, 2)), labels).savefig(tmp_path / "b.png")
    for name in ("$\\frac{$", "b$"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "set" / name / "1.png")
    samples_figure(read_source(tmp_path / "set")[0]).savefig(tmp_path / "c.png")


# --- Whatever else there is -------------------------------------------------------------------------------------------


def run_fuzz(*arguments: str) -> None:
    sys.argv = ["fuzz.py", *arguments]
    runpy.run_path(str(ROOT / "scripts" / "fuzz.py"), run_name="__main__")


def fuzz(log: Path, *arguments: str) -> str:
    process = start(log, run_fuzz, *arguments)
    process.join()
    assert process.exitcode == 0, log.read_text()[-5000:]
    return log.read_text()


def test_mutated_files_end_in_a_sentence(tmp_path):
    printed = fuzz(tmp_path / "log", "--count", "150")
    assert re.search(r"^150 cases in \d+ s, .*: 0 failures$", printed, re.MULTILINE)


@pytest.mark.slow
def test_ten_thousand_mutated_files_end_in_a_sentence(tmp_path):
    printed = fuzz(tmp_path / "log", "--count", "10000")
    assert re.search(r"^10000 cases in \d+ s, .*: 0 failures$", printed, re.MULTILINE)


def test_the_fuzzing_command_finds_errors_and_hangs(monkeypatch):
    spec = importlib.util.spec_from_file_location("fuzz_command", ROOT / "scripts" / "fuzz.py")
    command = importlib.util.module_from_spec(spec)
    with patch.dict(os.environ):
        spec.loader.exec_module(command)

    def outcome(run):
        return command.attempt(SimpleNamespace(run=run), 0, 0)[1]

    def failing(error):
        def run(_):
            raise error

        return run

    monkeypatch.setattr(command, "LIMIT", 0.2)
    before = signal.signal(signal.SIGALRM, command.hang)
    try:
        assert outcome(lambda _: "yaml") == ""
        assert outcome(failing(KeyError("x"))).startswith("KeyError from ")
        assert outcome(failing(BaseException("a panic"))).startswith("BaseException from ")
        assert outcome(lambda _: time.sleep(5)).startswith("Hang from ")
    finally:
        signal.signal(signal.SIGALRM, before)
