"""Feeds mutated files to everything that reads files: nothing but a ConfigError or a DataError may come out.

    python scripts/fuzz.py --count 10000            # or --seconds 600; a failure is repeated with --seed S --case N

A case is one of: a configuration with keys deleted, doubled, retyped or moved; bytes of its YAML text changed; a list
file; overrides; weights as .pt and .safetensors; an image (which the check before training and training itself must
judge alike); an index; labels and file names of a gallery, whose page must keep its tags; a bit of any file of a run
folder, which must be told with the file's name; another configuration or list for a finished run, which must be refused
with no byte of its folder changed; rows that a list repeats in other spellings, which must not change a metric; cells
of tables, which no spreadsheet may run. A case that takes longer than 20 seconds is a failure too, and so are more than
2 GB of memory. Exits with 1 where there is any.
"""

import argparse
import copy
import csv
import io
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from html.parser import HTMLParser
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import numpy as np
import pandas as pd
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from recnb import build_loaders, build_model, load_config
from recnb.data.images import DataError, faults
from recnb.data.lists import ImageList, own_index, write_csv
from recnb.gallery.page import gallery_html, gallery_static
from recnb.models.weights import load_weights, read_weights
from recnb.recipe.data import evaluation_images
from recnb.recipe.lint import lint, stop
from recnb.recipe.parts import SLOTS
from recnb.registry import ConfigError
from recnb.retrieval.lists import rank
from recnb.retrieval.metrics import retrieval_metrics
from recnb.retrieval.search import Index
from recnb.runs.experiment import train
from recnb.runs.folder import load_run, open_run
from recnb.training.checkpoints import kept

KINDS = {  # of cases, each with how often it is drawn
    "sections": 30,
    "yaml": 20,
    "lines": 20,
    "overrides": 10,
    "weight": 5,
    "image": 12,
    "search": 2,
    "labels": 1,
    "bits": 10,
    "refused": 5,
    "doubled": 5,
    "cells": 2,
}
LIMIT = 20  # seconds a case may take
MEMORY = 2.0  # GB that the process may have in all
ROOM = 6 * 2**30  # bytes of memory beyond what the process has at its start
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**30,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "0",
    "1e-3",
    "name",
    "a.b",
    "../x",
    "~nobody/x",
    "x" * 5000,
    "\0",
    "\ud800",
    "车",
    "é\u202e",
    "${HOME}",
    "{0}",
    "%s",
    "__import__('os').system('true')",
    "<script>",
    [],
    [[]],
    {},
    {"name": None},
    {"name": "FC"},
    [1, "a", None],
    b"\xff",
    (1, 2),
    {1: 2},
    {None: 1},
    {"": 0},
    2**70,
    -(2**63),
    "1" * 5000,
]
TEXT = [
    "\0",
    "\r\n",
    "\r",
    "\ufeff",
    "\t",
    "  ",
    "&a ",
    "*a",
    "!!python/object:os.system",
    "!!set",
    "<<: *a",
    "? ",
    "- ",
    "[",
    "{",
    "'",
    '"',
    "|",
    ">",
    "%",
    "@",
    "`",
    ": ",
    "#",
    "---",
    "...",
    "\u2028",
    "\ud7ff",
    "9" * 400,
    "../",
    "/",
    "1e9",
]
LABELS = [
    "<script>alert(1)</script>",
    "</style>",
    "</title>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='a()",
    "javascript:alert(1)",
    "&lt;b&gt;",
    "<!--",
    "]]>",
    "{script}",
    "$\\frac{",
    "\0",
    "\udce9",
    "\n\n",
    "a/b_c",
    "😀",
    "x" * 3000,
    "\u202e",
    "%s",
    "<svg/onload=a()>",
    "`",
    "=cmd()",
    "data-q='1'",
]


class Hang(BaseException):
    """A case took too long."""


class Tags(HTMLParser):
    """The tags of a page with the names of their attributes, in order."""

    def __init__(self, page: str):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag != "wbr":
            self.found.append((tag, [name for name, _ in attrs]))


class Fuzz:
    """A folder of valid files, and the cases that change them."""

    def __init__(self, folder: Path):
        self.folder, rng = folder, np.random.default_rng(0)
        for i in range(12):
            noise = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{i}.png")
        self.list = "".join(f"{i}.png {i // 3} {i % 3}\n" for i in range(12))
        (folder / "list.txt").write_text(self.list)
        self.config = config(folder)
        self.text = yaml.safe_dump(self.config, sort_keys=False)
        (folder / "valid.yaml").write_text(self.text)
        cfg = load_config(folder / "valid.yaml")
        self.model = build_model(cfg)
        torch.save(self.model.state_dict(), folder / "weights.pt")
        save_file(self.model.state_dict(), folder / "weights.safetensors")
        self.weights = {kind: (folder / f"weights.{kind}").read_bytes() for kind in ("pt", "safetensors")}
        vectors = rng.normal(size=(6, 4)).astype(np.float32)
        index = Index()
        index.add(vectors, np.arange(6), {"label": list("aabbcc")})
        index.save(folder / "index")
        self.index = {path.name: path.read_bytes() for path in (folder / "index").iterdir()}
        self.ranking = {"query": vectors, "gallery": vectors, "k": 3, "exclude_self": True}
        self.page = None  # of plain labels
        train(load_config(folder / "valid.yaml", {"Global.epochs": 1, "Global.save_interval": 0}), folder / "run")
        self.kept = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
        self.features = rng.normal(size=(12, 8))
        self.images = {kind: saved(kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")}

    def run(self, rng: random.Random) -> str:
        """What kind of case was run; raises whatever comes out of it that should not."""
        kind = rng.choices([*KINDS], [*KINDS.values()])[0]
        try:
            getattr(self, kind)(rng)
        except (ConfigError, DataError) as error:
            assert str(error).strip() and str(error).encode(), "an error without a sentence"
        return kind

    def build(self, path: Path, overrides: dict | None = None) -> None:
        cfg = load_config(path, overrides)
        build_loaders(cfg)
        build_model(cfg)

    def sections(self, rng):
        cfg = copy.deepcopy(self.config)
        for _ in range(rng.choice((1, 1, 2, 5))):
            mutate(cfg, rng)
        path = self.folder / "case.yaml"
        path.write_bytes(yaml.dump(cfg, sort_keys=False, allow_unicode=rng.random() < 0.5).encode("utf-8", "replace"))
        self.build(path)

    def yaml(self, rng):
        path = self.folder / "case.yaml"
        path.write_bytes(scrambled(self.text.encode(), rng))
        self.build(path)

    def lines(self, rng):
        (self.folder / "case.txt").write_bytes(scrambled(self.list.encode(), rng))
        where = rng.choice(("Train", "Eval.Query", "Eval.Gallery"))
        name = rng.choice(("VeriWild", "ImageNetDataset", "LogoDataset", "ICartoonDataset", "CompCars"))
        self.build(
            self.folder / "valid.yaml",
            {
                f"DataLoader.{where}.dataset.cls_label_path": str(self.folder / "case.txt"),
                f"DataLoader.{where}.dataset.name": name,
                f"DataLoader.{where}.dataset.relabel": rng.choice((None, True, False)),
                "Global.on_bad_image": rng.choice(("stop", "drop")),
                "Global.class_num": rng.choice((None, 4, 10**30)),
            },
        )

    def overrides(self, rng):
        keys = [place for place, _ in leaves(self.config)]
        chosen = {
            rng.choice((rng.choice(keys), rng.choice(keys) + ".x", rng.choice(TEXT), "Global.epochs")): copy.deepcopy(
                rng.choice(VALUES)
            )
            for _ in range(rng.randint(1, 3))
        }
        self.build(self.folder / "valid.yaml", chosen)

    def weight(self, rng):
        kind = rng.choice(list(self.weights))
        path = self.folder / f"case.{kind}"
        path.write_bytes(scrambled(self.weights[kind], rng, 400 if rng.random() < 0.7 else None))
        load_weights(self.model, path)

    def image(self, rng):
        path = self.folder / "case.img"
        path.write_bytes(scrambled(self.images[rng.choice(list(self.images))], rng))
        found, table = faults([str(path)]), ImageList([str(path)], np.zeros(1, int))
        try:
            table.image(0)
        except DataError as error:
            assert found, f"found in training only: {error}"
        else:
            assert not found, f"refused before training only: {found}"

    def search(self, rng):
        for name, content in self.index.items():
            (self.folder / "index" / name).write_bytes(scrambled(content, rng) if rng.random() < 0.6 else content)
        try:
            Index.load(self.folder / "index")
        except ValueError as error:
            assert str(error).startswith(str(self.folder)), error

    def bits(self, rng):
        read_back = [path for path in self.kept if self.kept[path] and path.suffix not in (".log", ".html")]
        path = rng.choice(sorted(read_back))
        content = bytearray(self.kept[path])
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            kept(self.folder / "run" / "checkpoints" / "latest.pt")
            read_weights(self.folder / "run" / "checkpoints" / "best.safetensors")
            load_run(self.folder / "run").model()
        except ConfigError as error:
            assert path.name in str(error), f"{path.name} is damaged, and what is said is: {error}"
        else:
            raise AssertionError(f"a bit of {path.name} has changed, and nothing is said")
        finally:
            path.write_bytes(self.kept[path])

    def refused(self, rng):
        lines, cfg = self.list.splitlines(keepends=True), copy.deepcopy(self.config)
        if rng.random() < 0.5:
            (self.folder / "list.txt").write_text("".join(rng.sample(lines, len(lines))))
        else:
            mutate(cfg, rng)
        path, given = self.folder / "case.yaml", {"Global.epochs": 1, "Global.save_interval": 0}
        path.write_bytes(yaml.dump(cfg, sort_keys=False).encode("utf-8", "replace"))
        try:
            cfg = load_config(path, given)
            loaders = build_loaders(cfg)
            stop(lint(cfg, loaders))
            open_run(self.folder / "run", cfg, loaders.classes)
        except (ConfigError, DataError):
            assert {path: path.read_bytes() for path in self.kept} == self.kept, "refused, and yet it has written"
            raise
        finally:
            (self.folder / "list.txt").write_text(self.list)
            for path, content in self.kept.items():
                path.write_bytes(content)

    def doubled(self, rng):
        lines = self.list.splitlines()
        again = [f"{rng.choice(('./', './/', '../' + self.folder.name + '/'))}{rng.choice(lines)}" for _ in range(9)]
        (self.folder / "case.txt").write_text("\n".join([*lines, *again]))
        whole, tables = {f"DataLoader.Eval.{part}.dataset.cls_label_path" for part in ("Query", "Gallery")}, []
        for name in ("list.txt", "case.txt"):
            cfg = load_config(self.folder / "valid.yaml", dict.fromkeys(whole, str(self.folder / name)))
            query, gallery = evaluation_images(cfg)
            rows = [int(Path(path).stem) for path in query.paths]
            values = self.features[rows], self.features[rows], query.labels, gallery.labels
            tables.append(retrieval_metrics(*values, query.cameras, gallery.cameras, own_index(query, gallery)))
        assert tables[0] == tables[1], f"rows that are repeated change the metrics: {tables}"

    def cells(self, rng):
        rows = [["".join(rng.choices(LABELS + TEXT, k=2)) for _ in range(4)] for _ in range(3)]
        table = pd.DataFrame(rows[1:], columns=rows[0], index=["".join(rng.choices(TEXT, k=2)) for _ in rows[1:]])
        write_csv(table, self.folder / "cells.csv", index=True)
        with (self.folder / "cells.csv").open(encoding="utf-8", newline="") as file:
            found = [cell for row in csv.reader(file) for cell in row]
        assert not [cell for cell in found if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]

    def labels(self, rng):
        def texts(names):
            ranking = rank(
                query_labels=labels,
                gallery_labels=labels,
                query_cameras=cameras,
                gallery_cameras=cameras,
                **self.ranking,
            )
            page = gallery_html(
                ranking, paths, paths, self.folder / "page.html", label_names=names, title=names[0], summary=names[1]
            )
            return Tags(page).found, Tags(gallery_static(ranking, paths, paths, [0, 1], label_names=names).data).found

        labels, cameras, plain = np.array([0, 0, 1, 1, 2, 2]), np.array(list("abcabc")), ["a", "b", "c"]
        paths = [self.folder / f"{i}.png" for i in range(6)]
        self.page = self.page or texts(plain)
        names = ["".join(rng.choices(LABELS, k=rng.randint(1, 3))) for _ in plain]
        cameras = np.array(rng.sample(LABELS, 3) * 2)
        odd = self.folder / rng.choice([name for name in LABELS if len(name) < 100 and not {"\0", "/"} & {*name}])
        odd.write_bytes(paths[0].read_bytes())
        paths[0] = odd
        assert texts(names) == self.page, f"the labels {names} and the file {odd} change the page"
        odd.unlink()


def config(folder: Path) -> dict:
    """A small valid configuration with a part of every kind."""

    def split(sampler: dict, *ops: dict) -> dict:
        return {
            "dataset": {
                "name": "VeriWild",
                "image_root": str(folder),
                "cls_label_path": str(folder / "list.txt"),
                "transform_ops": [{"ResizeImage": {"size": 32}}, *ops, {"NormalizeImage": {}}],
            },
            "sampler": sampler,
            "loader": {"num_workers": 0},
        }

    plain = {"name": "DistributedBatchSampler", "batch_size": 4}
    return {
        "Global": {"device": "cpu", "epochs": 2, "image_shape": [3, 32, 32], "class_num": 4},
        "AMP": {"level": "O1"},
        "EMA": {"decay": 0.9},
        "DataLoader": {
            "Train": split(
                {"name": "PKSampler", "batch_size": 4, "sample_per_id": 2},
                {"RandFlipImage": {"flip_code": 1}},
                {"RandomErasing": {"EPSILON": 0.5}},
            ),
            "Eval": {"Query": split(plain), "Gallery": split(dict(plain))},
        },
        "Arch": {
            "name": "RecModel",
            "Backbone": {"name": "test_resnet", "pretrained": False},
            "BackboneStopLayer": {"name": "flatten"},
            "Neck": {"name": "FC", "class_num": 8},
            "Head": {"name": "ArcMargin", "margin": 0.2, "scale": 16},
        },
        "Loss": {
            "Train": [{"CELoss": {"weight": 1.0}}, {"TripletLossV2": {"weight": 1.0, "margin": 0.3}}],
            "Eval": [{"CELoss": {"weight": 1.0}}],
        },
        "Optimizer": {"name": "AdamW", "lr": {"name": "Cosine", "learning_rate": 0.002, "warmup_epoch": 1}},
        "Metric": {"Eval": [{"Recallk": {"topk": [1, 5]}}, {"mAP": {}}]},
    }


def saved(kind: str) -> bytes:
    """A small image in a format."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def leaves(node, place: str = ""):
    """(dotted place, value) of all that a configuration holds."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        yield f"{place}.{key}".lstrip("."), value
        yield from leaves(value, f"{place}.{key}".lstrip("."))


def words(kind: str) -> list[str]:
    """All names of parts that there are, or all names of their arguments."""
    return sorted(
        {
            word
            for registry in SLOTS.values()
            for name in registry
            for word in ([name] if kind == "names" else registry.parameters(name))
        }
    )


def mutate(cfg: dict, rng: random.Random) -> None:
    """None; deletes, retypes, moves, renames or adds one thing of a configuration, in place."""
    nodes = [cfg, *(value for _, value in leaves(cfg) if isinstance(value, dict | list) and value)]
    node, other = rng.choice(nodes), rng.choice(nodes)
    if not len(node) or not len(other):
        return
    key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    taken = copy.deepcopy(rng.choice(list(other.values()) if isinstance(other, dict) else other))
    what = rng.choice(("delete", "retype", "retype", "splice", "rename", "name", "add", "add"))
    if what == "delete":
        del node[key]
    elif what == "retype":
        node[key] = copy.deepcopy(rng.choice(VALUES))
    elif what == "splice":
        node[key] = taken
    elif isinstance(node, list):
        node.insert(rng.randint(0, len(node)), rng.choice((taken, {rng.choice(words("names")): {}})))
    elif what == "rename":
        node[rng.choice((f"{key}x", str(key).upper(), *VALUES[:9], *words("names")))] = node.pop(key)
    elif what == "name":
        node["name"] = rng.choice(words("names"))
    else:
        node[rng.choice(words("arguments"))] = copy.deepcopy(rng.choice((taken, *VALUES)))


def scrambled(data: bytes, rng: random.Random, within: int | None = None) -> bytes:
    """The bytes with a few of the first `within` changed, removed, doubled, moved, cut or replaced by text."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 10))):
        span = min(len(data), within or len(data))
        a, b = sorted((rng.randint(0, span), rng.randint(0, span)))
        b = min(b, a + rng.choice((1, 4, 30, 1000)))
        what = rng.choice(("flip", "text", "remove", "double", "cut", "swap"))
        if what == "flip" and a < len(data):
            data[a] ^= 1 << rng.randrange(8)
        elif what == "text":
            data[a:b] = rng.choice(TEXT).encode("utf-8", "surrogatepass")
        elif what == "remove":
            del data[a:b]
        elif what == "double":
            data[a:a] = data[a:b] * rng.choice((1, 1, 20))
        elif what == "cut" and rng.random() < 0.3:
            del data[a:]
        elif what == "swap":
            lines = data.split(b"\n")
            rng.shuffle(lines)
            data = bytearray(b"\n".join(lines))
    return bytes(data)


def hang(*_) -> None:
    raise Hang(f"longer than {LIMIT} s")


def attempt(fuzz: Fuzz, seed: int, case: int) -> tuple[str, str]:
    """(kind, what came out that should not have, or nothing) of one case."""
    rng = random.Random(f"{seed} {case}")
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return fuzz.run(rng), ""
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "recnb" in frame.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"
        return "failure", f"{type(error).__name__} from {place}: {ascii(str(error))[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000, help="how many cases")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no new case is begun after so long")
    parser.add_argument("--case", type=int, help="this one only")
    given = parser.parse_args()
    signal.signal(signal.SIGALRM, hang)
    torch.set_num_threads(1)
    started, failed, done = time.monotonic(), 0, {}
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, -1))  # what asks for more gets an error, not the machine
        for case in range(given.count) if given.case is None else [given.case]:
            if time.monotonic() - started > given.seconds:
                break
            kind, failure = attempt(fuzz, given.seed, case)
            done[kind] = done.get(kind, 0) + 1
            if failure:
                failed += 1
                print(f"--seed {given.seed} --case {case}: {failure}", flush=True)
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(done.items()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # on Linux it is in KiB
    failed += peak > MEMORY
    print(
        f"{sum(done.values())} cases in {time.monotonic() - started:.0f} s, {peak:.1f} GB at most ({kinds}): "
        f"{failed} failures"
    )
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
