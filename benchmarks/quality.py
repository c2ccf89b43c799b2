"""How good features get, here and by pytorch-metric-learning: same network, photos, sizes, epochs, rates, three seeds.

    python benchmarks/quality.py grocery --weights weights/mobilenetv2_100_imagenetnorm_fp16.pth
    python benchmarks/quality.py omniglot
    python benchmarks/quality.py ablation --weights FILE    the keys of Retention, one by one, on Grocery
    python benchmarks/quality.py report                  the table and the picture of docs/results.md, of what there is

--data is the folder that holds grocery/ and omniglot/ as scripts/unpack.py makes them; --quick tries it all on a few
images in a minute. A run that is stopped goes on where it was. Nothing is chosen on the test identities: what is
trained without validation is judged after its last epoch. Intervals are of 95 %, paired, over identities.
"""

import argparse
import json
import math
import os
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from pytorch_metric_learning.losses import ArcFaceLoss, SupConLoss
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from training import DEVICE, machine

from recnb.data.loaders import Loaders
from recnb.data.prepare import Options
from recnb.gallery.curves import ladder_figure
from recnb.recipe import ladder
from recnb.recipe.data import build_loaders
from recnb.recipe.model import build_backbone
from recnb.recipe.schema import check, items, load_config, lookup, optimizers
from recnb.recipe.starter import Facts, choose
from recnb.runs.folder import load_run
from recnb.runs.ladder import climb, learner_of
from recnb.runs.verdict import verdict
from recnb.storage import ROOT, replacing, write_json, write_text
from recnb.training.evaluation import Evaluation, Judge, embed

METRICS = ("recall1", "mAP")
START, OTHER = "as it comes", "pytorch-metric-learning"
SIZES, EPOCHS = {"grocery": 160, "omniglot": 64}, {"omniglot": 5}
KEYS = {  # what differs from configs/starters/finetune_cnn.yaml, which freezes batch statistics and imprints the head
    "the file": {},
    "batch_norm: trained": {"Retention.batch_norm": "trained"},
    "imprint: False": {"Retention.imprint": False},
    "thaw_epoch: 1": {"Retention.thaw_epoch": 1},
    "pull: 100": {"Retention.pull": 100.0},
    "distill: 1": {"Retention.distill": 1.0},
    "layerwise_decay: 0.9": {"layerwise_decay": 0.9},
}
MARKS = "<!-- quality: written by benchmarks/quality.py report -->", "<!-- /quality -->"


def processor_minutes() -> float:
    """The processor time of this process and of those that it has waited for."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used) / 60


class Figure:
    """One training's place: its values per test query, and what it cost, also where it was stopped and went on."""

    def __init__(self, folder: Path, method: str, seed: int):
        self.method, self.seed = method, seed
        self.path = folder / f"{method.replace(': ', '-').replace(' ', '-')}-{seed}.csv"
        self.run, self.cost = self.path.with_suffix(""), self.path.with_suffix(".json")
        self.before = json.loads(self.cost.read_text())["minutes"] if self.cost.exists() else 0.0
        self.began = processor_minutes()

    def keep_cost(self, *_) -> None:
        minutes = self.before + processor_minutes() - self.began
        write_json(self.cost, {"method": self.method, "seed": self.seed, "minutes": minutes})

    def keep(self, found: Evaluation, loaders: Loaders) -> None:
        """Write the values of each test query, and say their means."""
        images = loaders.query.dataset
        table = pd.DataFrame({"label": [images.name(label) for label in images.labels]})
        with replacing(self.path) as path:
            table.assign(**{name: found.per_query[name] for name in METRICS}).to_csv(path, index=False)
        self.keep_cost()
        said = ", ".join(f"{name} {found.metrics[name]:.4f}" for name in METRICS)
        minutes = json.loads(self.cost.read_text())["minutes"]
        print(f"{self.method}, seed {self.seed}: {said}, {minutes:.2f} minutes of processor time", flush=True)


# ---- what is trained -------------------------------------------------------------------------------------------------


def lists(args: argparse.Namespace, name: str) -> dict[str, Path]:
    """The training and the test list; with --quick a few images of each."""
    found = {part: args.data / name / f"{part}.txt" for part in ("train", "test")}
    for part, path in found.items() if args.quick else ():
        rows = [line.rsplit(" ", 1) for line in path.read_text().splitlines()]
        by_name: dict[str, list] = {}
        for image, label in rows:
            by_name.setdefault(label, []).append(f"{image} {label}")
        few = [line for lines in [*by_name.values()][:12] for line in lines[:6]]
        found[part] = args.out / name / f"{part}.txt"
        write_text(found[part], "\n".join(few) + "\n")
    return found


def configuration(args: argparse.Namespace, name: str, seed: int) -> dict:
    """What `recnb start` would take for these photos, or the config of the drawings, on these lists."""
    files, size = lists(args, name), 64 if args.quick else SIZES[name]
    if name == "grocery":
        labels = [line.rsplit(" ", 1)[1] for line in files["train"].read_text().splitlines()]
        counts = pd.Series(labels).value_counts()
        seen = Facts(len(labels), len(counts), int(counts.median()), size, False)
        options = Options(weights=str(args.weights.absolute()), image_size=size)
        cfg = choose(seen, options, "configs/starters/finetune_cnn.yaml").cfg
    else:
        cfg = load_config(ROOT / "configs" / f"{name}.yaml")
    cfg["Global"] |= {"seed": seed, "eval_during_train": False, "probe_cache": str(args.out / "features")}
    cfg["Global"]["epochs"] = 1 if args.quick else EPOCHS.get(name, cfg["Global"]["epochs"])
    for part, file in (("Train", "train"), ("Eval.Query", "test"), ("Eval.Gallery", "test")):
        section = lookup(cfg, f"DataLoader.{part}.dataset")
        section |= {"image_root": str((args.data / name).absolute()), "cls_label_path": str(files[file].absolute())}
    if args.quick:
        cfg["DataLoader"]["Train"]["sampler"]["batch_size"] = 16
        ladder.PROBE_STEPS, ladder.VIEWS, ladder.ALPHAS, ladder.POWERS = 20, 2, (0.5,), (0.5,)
    check(cfg)
    return cfg


def judged(model: nn.Module, loaders: Loaders) -> Evaluation:
    """What a model's features of the test images retrieve among them."""
    features, images = embed(model, loaders.query, progress=False), loaders.query.dataset
    loaders.stop_workers()  # each holds on to the memory that this process had when it began
    return Judge(METRICS)(features, features, images, images)


def trained(cfg: dict, figure: Figure) -> None:
    """The file without a ladder."""
    learn = learner_of(ladder.plain(cfg), figure.run)
    with learn.no_bar(), learn.no_logging():
        learn.fit_config(on_epoch=figure.keep_cost)
    figure.keep(judged(learn.model, learn.loaders), learn.loaders)


def untrained(cfg: dict, figure: Figure) -> None:
    """The network as it comes."""
    learn = learner_of(ladder.start(cfg), figure.run)
    figure.keep(judged(learn.model, learn.loaders), learn.loaders)


def climbed(cfg: dict, figure: Figure) -> None:
    """The ladder, and each of its rungs as it stands there: trained on three quarters of the identities."""
    cfg["Global"] |= {"recipe": "ladder", "eval_during_train": True}
    cfg["Ladder"] = {"minutes": None, "folds": 1, "refit": True}
    last = processor_minutes()

    def rung(name: str) -> Figure:
        return Figure(figure.path.parent, f"rung {name}", figure.seed)

    def show(found) -> None:
        nonlocal last
        reached = rung(found.rungs[-1].name)
        reached.began, last = last, processor_minutes()
        reached.keep_cost()
        figure.keep_cost()

    learn, _ = climb(cfg, figure.run, show)
    for name in [*ladder.RUNGS][1:]:
        folder = best_folder(figure.run / "rungs", name)
        rung(name).keep(judged(load_run(folder).model(), learn.loaders), learn.loaders)
    figure.keep(judged(learn.model, learn.loaders), learn.loaders)


def best_folder(rungs: Path, name: str) -> Path:
    """The rung's folder, of several the one that the validation images chose."""
    folders = [folder for folder in rungs.glob(f"{name}*") if (folder / "queries.csv").exists()]
    return max(folders, key=lambda folder: pd.read_csv(folder / "queries.csv").mAP_after.mean())


def changed(change: dict, cfg: dict, figure: Figure) -> None:
    """The file, over fewer epochs, with one key of Retention or the decay of rates by depth as `change` has it."""
    cfg["Global"]["epochs"] = min(7, cfg["Global"]["epochs"])  # half of the file's: 18 trainings take an hour of a core
    for key, value in change.items():
        if key == "layerwise_decay":
            [(name, section)] = cfg["Optimizer"][-1].items()
            cfg["Optimizer"][-1] = {f"{name}DL": {**section, key: value, "filter_bias_and_bn": False}}
        else:
            cfg["Retention"][key.removeprefix("Retention.")] = value
    check(cfg)
    trained(cfg, figure)


# ---- the same by another library -------------------------------------------------------------------------------------

OPS = {
    "RandCropImage": lambda size, scale: v2.RandomResizedCrop(size, scale=scale, antialias=True),
    "RandFlipImage": lambda flip_code: v2.RandomHorizontalFlip(),
    "ColorJitter": v2.ColorJitter,
    "NormalizeImage": lambda mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225): v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    ),
    "RandomErasing": lambda EPSILON: v2.RandomErasing(EPSILON),
}


class Photos(Dataset):
    """Photographs as torchvision varies them, and their labels."""

    def __init__(self, paths, labels, transform):
        self.paths, self.labels, self.transform = paths, labels, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB")), self.labels[index]


class Features(nn.Module):
    """A backbone and the layer behind it, as recnb's evaluation reads them."""

    def __init__(self, *parts: nn.Module):
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x):  # (B, 3, H, W) -> (B, D)
        return {"features": self.parts(x).flatten(1)}


def other(cfg: dict, figure: Figure) -> None:
    """ArcFaceLoss and SupConLoss on the batches of an MPerClassSampler, with the file's network, rates and epochs."""
    torch.manual_seed(figure.seed)
    np.random.seed(figure.seed)  # the sampler's
    cfg = ladder.plain(cfg)
    loaders, sampler = build_loaders(cfg), cfg["DataLoader"]["Train"]["sampler"]
    images, batch = loaders.train.dataset, sampler["batch_size"]
    ops = [OPS[name](**args) for _, name, args in items(cfg, "DataLoader.Train.dataset.transform_ops")]
    photos = Photos(images.paths, images.labels.tolist(), v2.Compose(ops))
    steps = len(photos) // batch
    drawn = MPerClassSampler(images.labels, 4, batch, steps * batch)
    loader = DataLoader(photos, batch, sampler=drawn, num_workers=min(8, os.cpu_count() or 1), drop_last=True)
    backbone = build_backbone(cfg, cfg["Arch"], "Arch")
    neck, width = nn.Identity(), backbone.out_shape[0]
    if lookup(cfg, "Arch.Neck.name") == "FC":
        neck, width = nn.Linear(width, cfg["Arch"]["Neck"]["class_num"]), cfg["Arch"]["Neck"]["class_num"]
    model, head = Features(backbone, neck).to(DEVICE), cfg["Arch"]["Head"]
    arcface = ArcFaceLoss(loaders.classes, width, margin=math.degrees(head["margin"]), scale=head["scale"]).to(DEVICE)
    supcon = SupConLoss(temperature=0.1)
    entries = [section for _, section in optimizers(cfg)]
    optimizer = torch.optim.AdamW(
        [
            {"params": part.parameters(), "lr": entry["lr"]["learning_rate"], "weight_decay": entry["weight_decay"]}
            for part, entry in ((arcface, entries[0]), (model, entries[-1]))
        ]
    )
    epochs, warm = cfg["Global"]["epochs"], entries[0]["lr"].get("warmup_epoch", 0) * steps
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (step + 1) / warm if step < warm else cosine((step - warm) / max(1, epochs * steps - warm)),
    )
    for _ in range(epochs):
        model.train()
        for x, y in loader:
            features, y = model(x.to(DEVICE))["features"], y.to(DEVICE)
            (arcface(features, y) + supcon(features, y)).backward()
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
    figure.keep(judged(model, loaders), loaders)


def cosine(share: float) -> float:
    """The rate at a share of the way, of 1 at the start and 0 at the end."""
    return (1 + math.cos(math.pi * share)) / 2


# ---- what is reported ------------------------------------------------------------------------------------------------

METHODS: dict[str, dict[str, Callable]] = {
    "grocery": {START: untrained, "fine-tuned": trained, OTHER: other, "ladder": climbed},
    "omniglot": {"from scratch": trained, OTHER: other},
    "ablation": {name: partial(changed, change) for name, change in KEYS.items()},
}


def summary(folder: Path) -> list[dict]:
    """A row for each method: means over seeds and test queries, intervals, and differences paired by query."""
    costs = [json.loads(path.read_text()) for path in sorted(folder.glob("*-*.json"))]
    done = [cost for cost in costs if Figure(folder, cost["method"], cost["seed"]).path.exists()]
    tables: dict[str, list[pd.DataFrame]] = {}
    for cost in done:
        tables.setdefault(cost["method"], []).append(pd.read_csv(Figure(folder, cost["method"], cost["seed"]).path))
    means = {name: sum(table[[*METRICS]] for table in found) / len(found) for name, found in tables.items()}
    return [row_of(name, tables, means, [c["minutes"] for c in done if c["method"] == name]) for name in tables]


def row_of(name: str, tables: dict, means: dict, minutes: list[float]) -> dict:
    """The row of one method, against each of those that others are compared with."""
    row: dict = {"method": name, "seeds": len(tables[name]), "minutes": float(np.mean(minutes)), "against": {}}
    for base in (START, OTHER, "the file", name):
        if base not in tables or (base == name and "mAP" in row):
            continue
        both = {f"{m}_{when}": means[who][m] for m in METRICS for when, who in (("before", base), ("after", name))}
        found = verdict(tables[name][0][["label"]].astype(str).assign(**both)).rows
        row["against"][base] = found[["difference", "low", "high"]].to_dict("index")
        row |= {metric: found.loc[metric, "after"] for metric in METRICS}
        row |= {f"mAP_{end}": found.loc["mAP", f"after_{end}"] for end in ("low", "high")}
    row["each_seed"] = {metric: [table[metric].mean() for table in tables[name]] for metric in METRICS}
    row["against"].pop(name, None)
    return row


def report(folder: Path, picture: Path) -> str:
    """The tables of all sets that are there, as they stand in docs/results.md, and the picture of the ladder's."""
    parts = []
    for name in METHODS:
        path = folder / f"quality-{name}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        bases = [base for base in (START, OTHER, "the file") if any(base in row["against"] for row in found["rows"])]
        heads = ["recall@1", "mAP (95 %)", *(f"mAP against {base}" for base in bases), "seeds", "processor minutes"]
        lines = [f"| {name} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        rows = sorted(found["rows"], key=lambda row: (row["method"] != START, row["mAP"]))
        for row in rows:
            against = [said(row["against"].get(base, {}).get("mAP")) for base in bases]
            cells = [f"{row['recall1']:.3f}", f"{row['mAP']:.3f} ({row['mAP_low']:.3f} to {row['mAP_high']:.3f})"]
            cells += [*against, f"{row['seeds']}", f"{row['minutes']:.2f}"]
            lines.append(f"| {row['method']} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
        if name == "grocery":
            shown = [{"name": r["method"], "value": r["mAP"], "low": r["mAP_low"], "high": r["mAP_high"]} for r in rows]
            figure = ladder_figure([{**row, "kept": row["name"] == "ladder"} for row in shown])
            figure.axes[0].set_xlabel("mAP of the test identities, 95 % intervals")
            figure.savefig(picture, dpi=150, bbox_inches="tight")
            parts.append(f"![mAP of each way, with its interval, and in bold what the ladder kept]({picture.name})")
    return "\n\n".join(parts)


def write_report(folder: Path, quick: bool) -> None:
    """Put the tables between the marks of docs/results.md and the picture beside it, or show those of --quick."""
    text = report(folder, (folder if quick else ROOT / "docs") / "quality.png")
    if quick:
        print(text)
        return
    page = ROOT / "docs" / "results.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    write_text(page, f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")


def said(difference: dict | None) -> str:
    """A difference with its interval."""
    return "" if difference is None else "{difference:+.3f} ({low:+.3f} to {high:+.3f})".format(**difference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*METHODS, "report"])
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "mobilenetv2_100_imagenetnorm_fp16.pth")
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--out", type=Path, help="where runs and figures stay, by default runs/quality")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", action="append", help="one of the methods, as the figures call it; may be repeated")
    parser.add_argument("--quick", action="store_true", help="a few images, one seed, one epoch; results stay in --out")
    args = parser.parse_args()
    args.out = (args.out or ROOT / "runs" / f"quality{'-quick' * args.quick}").absolute()
    kept = args.out if args.quick else ROOT / "docs" / "benchmarks"
    if args.what == "report":
        write_report(kept, args.quick)
        return
    folder = args.out / args.what
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(1 if args.quick else args.seeds):
        for method, train in METHODS[args.what].items():
            figure = Figure(folder, method, seed)
            wanted = method in (args.only or METHODS[args.what]) and (method != START or seed == 0)
            if wanted and not figure.path.exists():
                train(configuration(args, "grocery" if args.what == "ablation" else args.what, seed), figure)
                write_json(kept / f"quality-{args.what}.json", {**machine(), "rows": summary(folder)})


if __name__ == "__main__":
    main()
