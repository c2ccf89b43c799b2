"""What training costs here, as ratios to a bare loop, another pipeline and another library in the same process.

    python benchmarks/training.py               all parts, each in a process of its own; a JSON line for each result
    python benchmarks/training.py step          one part: step, loader, kept, memory, optimizer, or supcon

Run it on an idle machine. notebooks/07_benchmark.ipynb runs the same and keeps the results under docs/benchmarks.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

import numpy as np
import torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import parent_label
from fastai.vision.augment import FlipItem, Resize
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fasttransform import Transform
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from recnb.demo.marks import draw_marks
from recnb.losses.combined import SupConLoss
from recnb.models.backbones import create_backbone
from recnb.models.chunks import recompute_blocks
from recnb.models.heads import unit
from recnb.recipe.data import build_loaders
from recnb.recipe.learner import build_learner
from recnb.recipe.model import build_model
from recnb.recipe.optimizer import build_optimizer
from recnb.recipe.schema import load_config
from recnb.training.adaptor import FastaiLoader
from recnb.training.allocator import keep_freed_memory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODEL = {
    "Arch": {
        "Backbone": {"name": "resnet18"},
        "BackboneStopLayer": {"name": "flatten"},
        "Neck": {"name": "FC", "class_num": 512},
        "Head": {"name": "ArcMargin", "margin": 0.15, "scale": 32},
    },
    "Loss": {"Train": [{"CELoss": {"weight": 1.0}}, {"SupConLoss": {"weight": 1.0, "views": 4}}]},
    "Optimizer": {"name": "AdamW", "lr": {"name": "ConstLR", "learning_rate": 0.0003}},
}
SEED_OPS = [
    {"ResizeImage": {"size": 224}},
    {"RandFlipImage": {}},
    {"AugMix": {"prob": 0.5}},
    {"NormalizeImage": {}},
    {"RandomErasing": {"EPSILON": 0.5}},
]


def machine() -> dict:
    """What the figures belong to."""
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}"
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def now() -> float:
    """The time, with nothing left to do on a GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def gpu_memory() -> float | None:
    """The most memory of the GPU that was held since the last call, in GiB."""
    if DEVICE.type != "cuda":
        return None
    most = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return most


def configuration(folder: Path, images: Path, list_file: Path, batch: int, size: int, ops: list, **changes) -> dict:
    """A checked configuration that trains on one list, with other sections where `changes` has some."""
    train = {
        "dataset": {
            "name": "VeriWild",
            "image_root": str(images),
            "cls_label_path": str(list_file),
            "transform_ops": ops,
        },
        "sampler": {"name": "PKSampler", "batch_size": batch, "sample_per_id": 4},
    }
    (folder / "config.yaml").write_text(
        json.dumps(
            {
                "Global": {
                    "epochs": 1,
                    "eval_during_train": False,
                    "image_shape": [3, size, size],
                    "save_interval": 0,
                    **changes.pop("Global", {}),
                },
                "DataLoader": {"Train": train},
                **MODEL,
                **changes,
            }
        )
    )
    return load_config(folder / "config.yaml")


class Ready(FastaiLoader):
    """Batches that lie on the device already."""

    def __init__(self, loader, batches):
        super().__init__(loader, DEVICE)
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def begin_at(self, batch):
        return iter(self.batches[batch:])


def step(size: int = 128, batch: int = 64, steps: int = 12, rounds: int = 5, name: str = "resnet18", **changes) -> dict:
    """Milliseconds of a training step: in fit_config, with all that it writes down, and in a bare loop.

    Both have the same model, in the precision and the layout that `changes` of the configuration ask for.
    """
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(temporary)
        draw_marks(folder / "marks", identities=max(48, 3 * batch // 4), renderings=8, size=48)
        cfg = configuration(
            folder,
            folder / "marks" / "images",
            folder / "marks" / "train.txt",
            batch,
            size,
            [{"ResizeImage": {"size": size}}, {"NormalizeImage": {}}],
            Arch={**MODEL["Arch"], "Backbone": {"name": name}},
            **changes,
        )
        loaders = build_loaders(cfg)
        draw = torch.Generator().manual_seed(0)
        batches = [
            (torch.randn(batch, 3, size, size, generator=draw).to(DEVICE), torch.arange(batch, device=DEVICE) // 4)
            for _ in range(steps)
        ]
        bare, ours = [], []
        for number in range(rounds + 1):  # alternating, so that other work meets both; the first warms up
            learn = build_learner(cfg, build_model(cfg), loaders, folder / f"run-{number}")
            bare.append(bare_loop(learn.model.train(), learn.loss_func.train(), batches))
            learn.dls.loaders[0] = Ready(loaders.train, batches)
            ends = []
            learn.loss_func.register_forward_pre_hook(lambda *_, ends=ends: ends.append(now()))
            with learn.no_bar(), learn.no_logging():
                learn.fit_config()
            ours += [median(np.diff(ends))]
        bare, ours = median(bare[1:]), median(ours[1:])
    return {
        "part": "step",
        "what": f"{name}, {batch} x {size} px, AdamW, CELoss + SupConLoss",
        "bare_ms": 1e3 * bare,
        "recnb_ms": 1e3 * ours,
        "ratio": ours / bare,
    }


def bare_loop(model, loss, batches) -> float:
    """The median seconds of a step of the plainest loop."""
    optimizer, times = torch.optim.AdamW(model.parameters(), lr=0.0003, fused=True), []
    for x, y in batches:
        times.append(now())
        loss(model(x, y), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return median(np.diff(times))


def draw_photographs(folder: Path, identities: int = 16, images: int = 8) -> Path:
    """JPEG files of 500 x 375 and some 50 kB, a folder for each identity, and their list; its path."""
    draw, lines = np.random.default_rng(0), []
    for i in range(identities * images):
        name = f"{i % identities}/{i}.jpg"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375))
        fine = Image.fromarray(draw.integers(0, 256, (375, 500, 3), dtype=np.uint8)).filter(ImageFilter.BoxBlur(1))
        Image.blend(coarse, fine, 0.3).save(folder / name, quality=90)
        lines.append(f"{name} {i % identities}\n")
    (folder / "list.txt").write_text("".join(lines))
    return folder / "list.txt"


def loader(batch: int = 32, passes: int = 5) -> dict:
    """Milliseconds an image through the original's ops, beside others' pipelines and the bare decoding and resizing.

    All are asked in turn, in one process and without workers. At this severity torchvision's AugMix moves nothing and
    recnb's does: the comparison is in the others' favour.
    """
    torch.set_num_threads(1)  # as in a worker process
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        listed = draw_photographs(folder)
        cfg = configuration(folder, folder, listed, batch, 224, SEED_OPS)
        cfg["DataLoader"]["Train"]["loader"] = {"num_workers": 0}
        ours = build_loaders(cfg).train
        cfg["Global"]["cache_images"] = str(folder / "kept")
        pipelines = {
            "recnb": ours,
            "recnb_kept": build_loaders(cfg).train,
            "fastai": by_fastai(folder, batch),
            "torchvision": by_torchvision(folder, batch, default_loader),
            "torchvision_tensors": by_torchvision(folder, batch, decoded),
            "floor": Floor(sorted(str(path) for path in folder.rglob("*.jpg"))),
        }
        times = {name: [] for name in pipelines}
        for _ in range(passes):
            for name, batches in pipelines.items():
                began, count = time.process_time(), 0  # of one core, whatever else it has to do
                for x, _ in batches:
                    count += len(x)
                times[name].append(1e3 * (time.process_time() - began) / count)
    best = {name: min(values) for name, values in times.items()}
    return {
        "part": "loader",
        "what": "JPEG 500 x 375 to 224 px, flip, AugMix 0.5, normalise, erase; no workers",
        **{f"{name}_ms": value for name, value in best.items()},
        "ratio": best["fastai"] / best["recnb"],
        "ratio_torchvision": min(best["torchvision"], best["torchvision_tensors"]) / best["recnb"],
        "floor_share": best["floor"] / best["recnb"],
    }


def decoded(file: str) -> torch.Tensor:
    """uint8 (3, H, W) of a file, as torchvision decodes it."""
    return decode_image(file, ImageReadMode.RGB)


class Floor:
    """Batches of one image, decoded and resized by torchvision, and nothing else."""

    def __init__(self, files):
        self.files = files

    def __iter__(self):
        return (([v2.functional.resize(decoded(file), [224, 224])], None) for file in self.files)


def by_torchvision(folder: Path, batch: int, read) -> DataLoader:
    """The ops as torchvision.transforms.v2 has them, on what `read` makes of a file."""
    ops = [
        v2.ToImage(),
        v2.Resize((224, 224)),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.AugMix(1, 3, 1, 0.1, all_ops=False)], 0.5),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        v2.RandomErasing(0.5),
    ]
    known = {"is_valid_file": lambda path: path.endswith(".jpg"), "allow_empty": True}
    return DataLoader(ImageFolder(str(folder), v2.Compose(ops), loader=read, **known), batch, shuffle=True)


def by_fastai(folder: Path, batch: int):
    """The ops as fastai has them, and torchvision's AugMix."""
    mix = Transform(v2.RandomApply([v2.AugMix(1, 3, 1, 0.1, all_ops=False)], 0.5))
    mix.order = 2  # behind the resizing: before it, as fastai would sort it, it costs three times as much
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock),
        get_items=lambda path: sorted(path.rglob("*.jpg")),
        get_y=parent_label,
        splitter=lambda items: (list(range(len(items))), [0]),
        item_tfms=[Resize(224, method="squish"), FlipItem(), OfPillow(mix)],
        batch_tfms=[Finish()],
    )
    return block.dataloaders(folder, bs=batch, num_workers=0).train


class OfPillow(Transform):
    """A torchvision transform for fastai's images."""

    order = 2

    def __init__(self, transform):
        super().__init__()
        self.transform = transform

    def encodes(self, image: PILImage):
        return PILImage(self.transform(image))


class Finish(Transform):
    """Normalising and erasing, on the batch."""

    order = 99

    def __init__(self):
        super().__init__()
        self.ops = v2.Compose([v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), v2.RandomErasing(0.5)])

    def encodes(self, x: torch.Tensor):
        return torch.stack([self.ops(image) for image in torch.Tensor(x)]) if x.dim() == 4 else x


def plainly(x: torch.Tensor, y: torch.Tensor, temperature: float = 0.07) -> torch.Tensor:
    """The supervised contrastive loss as the formula stands: differences of all pairs of rows, then masks."""
    similarity = (unit(x)[:, None] * unit(x)[None]).sum(-1) / temperature  # B x B x D numbers
    others = 1 - torch.eye(len(x))
    positive = (y[:, None] == y).float() * others
    log_probability = similarity - (similarity.exp() * others).sum(1, keepdim=True).log()
    return -((positive * log_probability).sum(1) / positive.sum(1)).mean()


def supcon(which: str = "recnb", rows: int = 1024, width: int = 256) -> dict:
    """Milliseconds of SupConLoss, forward and backward, and what the process grew by."""
    x, y = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)), torch.arange(rows) // 4
    loss = {"recnb": lambda x: SupConLoss()({"features": x}, y), "plain": lambda x: plainly(x, y)}
    if which == "pytorch-metric-learning":
        from pytorch_metric_learning.losses import SupConLoss as Theirs

        theirs = Theirs(temperature=0.07)
        loss[which] = lambda x: theirs(x, y)
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(3):
        leaf, began = x.clone().requires_grad_(), time.perf_counter()
        value = loss[which](leaf)
        value.backward()
        times.append(1e3 * (time.perf_counter() - began))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {
        "part": "supcon",
        "what": f"B {rows}, D {width}",
        "by": which,
        "ms": min(times),
        "MB": grown,
        "value": value.item(),
    }


def kept(name: str = "resnet50", pixels: int = 224, batch: int = 4) -> dict:
    """Megabytes an image that a backbone keeps for its backward pass, as it is and with recomputed blocks."""
    model, found = create_backbone(name).train(), []
    x, weights = torch.randn(batch, 3, pixels, pixels), {p.data_ptr() for p in model.parameters()}
    for _ in range(2):
        sizes = {}

        def seen(tensor, sizes=sizes):
            if tensor.data_ptr() not in weights:
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
            model(x).sum()
        found.append(sum(sizes.values()) / batch / 1e6)
        recompute_blocks(model)
    return {"part": "kept", "what": f"{name}, {pixels} px", "MB": found[0], "recomputed_MB": found[1]}


def memory(name: str = "mobilenetv2_100", pixels: int = 160, batch: int = 64, steps: int = 7) -> dict:
    """Milliseconds of a step on the CPU: as glibc gives memory back, with it kept, and with channels last, too."""
    times = []
    for kept_memory, layout in (
        (False, torch.contiguous_format),
        (True, torch.contiguous_format),
        (True, torch.channels_last),
    ):
        if kept_memory:
            keep_freed_memory(torch.device("cpu"))
        model = create_backbone(name).train().to(memory_format=layout)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        x, ends = torch.randn(batch, 3, pixels, pixels), []
        for _ in range(steps):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ends.append(time.perf_counter())
        times.append(1e3 * median(np.diff(ends)))
    return {
        "part": "memory",
        "what": f"{name}, {batch} x {pixels} px, AdamW, on the CPU",
        "given_back_ms": times[0],
        "kept_ms": times[1],
        "kept_channels_last_ms": times[2],
    }


def optimizer(name: str = "AdamW", steps: int = 10) -> dict:
    """Milliseconds of an optimizer's step for the parameters of a ResNet-50, fused and as torch does it by default."""
    torch.set_num_threads(1)
    times = {}
    for made in ("fused", "default"):
        parameters = [*create_backbone("resnet50").parameters()]
        for p in parameters:
            p.grad = torch.randn_like(p)
        by_recnb = build_optimizer({"Optimizer": {"name": name}})(parameters, lr=1e-3)
        if made == "default":
            for group in by_recnb.param_groups:
                group["fused"] = None
        ends = [(by_recnb.step(), time.perf_counter())[1] for _ in range(steps)]
        times[made] = 1e3 * median(np.diff(ends))
    return {
        "part": "optimizer",
        "what": f"{name}, 23.5 million parameters, one thread",
        "fused_ms": times["fused"],
        "default_ms": times["default"],
    }


def all_parts() -> list[dict]:
    """The results of all parts, each measured in a process of its own."""
    sizes = [
        ("recnb", 1024),
        ("pytorch-metric-learning", 1024),
        ("plain", 1024),
        ("recnb", 4096),
        ("pytorch-metric-learning", 4096),
    ]
    words = [
        ["step"],
        ["loader"],
        ["kept", "resnet50"],
        ["kept", "vit_small_patch16_224"],
        ["memory"],
        ["optimizer", "AdamW"],
        ["optimizer", "Momentum"],
        *(["supcon", which, str(rows)] for which, rows in sizes),
    ]
    results = [result for part in words for result in lines(__file__, *part)]
    return results + (lines(Path(__file__).with_name("gpu.py")) if DEVICE.type == "cuda" else [])


def lines(script: str | Path, *words: str) -> list[dict]:
    """The JSON lines that a script prints."""
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    words = sys.argv[1:]
    if not words:
        for result in all_parts():
            print(json.dumps(result))
        return
    parts = {"step": step, "loader": loader, "kept": kept, "memory": memory, "optimizer": optimizer, "supcon": supcon}
    args = [int(word) if word.isdigit() else word for word in words[1:]]
    print(json.dumps({**machine(), **parts[words[0]](*args)}))


if __name__ == "__main__":
    main()
