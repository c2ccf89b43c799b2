"""Batches are the same whoever makes them: any number of workers, the last ops run late, images kept in a file."""

import io
import os
import pickle
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

import recnb.data.augment  # noqa: F401  for its part of the registry
from recnb.data import images as decoding
from recnb.data.cache import fixed_ops
from recnb.data.images import read_pixels, read_rgb
from recnb.data.lists import Item
from recnb.data.loaders import ImageLoader, batches_on, images_per_second, over
from recnb.data.pipeline import Pipeline
from recnb.recipe.data import build_loaders, build_transform, machine_options
from recnb.recipe.schema import load_config
from recnb.registry import ConfigError

OPS = [
    {"ResizeImage": {"size": 40}},
    {"RandFlipImage": {}},
    {"RandCropImageV2": {"size": 32}},
    {"AugMix": {}},
    {"NormalizeImage": {}},
    {"RandomErasing": {"EPSILON": 0.7, "mean": [0.1, 0.2, 0.3]}},
]


def pipeline(*ops) -> Pipeline:
    return build_transform({"d": {"transform_ops": list(ops)}}, "d")


def photograph(height: int = 90, width: int = 120) -> Image.Image:
    draw = np.random.default_rng(0)
    return Image.fromarray(draw.integers(0, 256, (height // 8, width // 8, 3), np.uint8)).resize((width, height))


# --- Ops that run late ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ops",
    [
        OPS,
        [
            {"ResizeImage": {"size": 32}},
            {"RandomErasing": {"EPSILON": 1.0}},
            {"NormalizeImage": {}},
            {"RandomErasing": {"EPSILON": 0.5}},
        ],
        [{"ResizeImage": {"size": 32}}, {"ToTensor": {}}, {"Normalize": {"mean": 0.5, "std": 0.25}}],
        [{"ResizeImage": {"size": 32}}, {"NormalizeImage": {}}, {"RandomErasing": {"EPSILON": 1.0, "mode": "pixel"}}],
        [{"NormalizeImage": {}}, {"ResizeImage": {"size": 32}}, {"RandFlipImage": {}}],
    ],
)
def test_a_batch_is_finished_as_each_image_alone(ops):
    transform = pipeline(*ops)
    images = [torch.randint(0, 256, (3, 60, 50 + i), dtype=torch.uint8) for i in range(12)]
    torch.manual_seed(3)
    whole = [transform(image) for image in images]
    torch.manual_seed(3)
    pixels, boxes = zip(*map(transform.before, images), strict=True)
    parts = transform.finish(torch.stack(pixels), torch.stack(boxes))
    assert torch.equal(parts, torch.stack(whole))


def test_what_waits_are_the_ops_behind_the_last_that_needs_one_image():
    def waiting(*ops):
        transform = pipeline(*ops)
        return [type(op).__name__ for op in transform.transforms[transform.later :]]

    assert waiting(*OPS) == ["ToDtype", "Normalize", "Erasing", "ToDtype"]
    noise = {"RandomErasing": {"mode": "pixel"}}
    assert waiting({"ResizeImage": {"size": 32}}, {"NormalizeImage": {}}, noise) == ["ToDtype"]
    assert pipeline(*OPS).before(torch.zeros(3, 50, 50, dtype=torch.uint8))[0].dtype == torch.uint8


# --- Loaders ----------------------------------------------------------------------------------------------------------


def epoch(loader) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = zip(*loader, strict=True)
    return torch.cat(x), torch.cat(y)


@pytest.fixture
def built(config_file):
    return lambda **changes: build_loaders(
        load_config(
            config_file({"DataLoader.Train.dataset.transform_ops": OPS, "Global.image_shape": [3, 32, 32], **changes})
        )
    )


def test_workers_change_no_bit(built):
    alone = epoch(built().train)
    several = epoch(built(**{"DataLoader.Train.loader": {"num_workers": 3, "prefetch_factor": 2}}).train)
    by_item = built().train
    singly = [by_item.dataset[item] for batch in by_item.batch_sampler for item in batch]
    assert torch.equal(alone[0], several[0]) and torch.equal(alone[1], several[1])
    assert torch.equal(alone[0], torch.stack([image for image, _ in singly]))
    assert alone[1].tolist() == [label for _, label in singly]
    assert isinstance(singly[0], Item) and len(singly[0]) == 2 and singly[0][1] == singly[0].label


def test_a_plain_loader_of_torch_gets_whole_images(built):
    images = built().query.dataset
    ours, theirs = epoch(ImageLoader(images, batch_size=5)), epoch(DataLoader(images, 5))
    assert torch.equal(ours[0], theirs[0]) and ours[0].dtype == torch.float32
    moved = epoch(batches_on(DataLoader(images, 5), torch.device("cpu")))
    assert torch.equal(ours[0], moved[0]) and torch.equal(ours[1], moved[1])


def test_workers_send_bytes(built, monkeypatch):
    sent = []
    finish = Pipeline.finish
    monkeypatch.setattr(Pipeline, "finish", lambda self, x, boxes: sent.append(x.dtype) or finish(self, x, boxes))
    loader = built().train
    assert epoch(loader)[0].dtype == torch.float32
    assert sent == [torch.uint8] * len(loader)


def test_lists_with_different_transforms_share_a_loader(built):
    query = built().query.dataset
    other = replace(query, transform=pipeline({"ResizeImage": {"size": 32}}, {"NormalizeImage": {"mean": [0, 0, 0]}}))
    x = epoch(over(built().query, ConcatDataset([query, other])))[0]
    assert torch.equal(x, torch.stack([image for part in (query, other) for image, _ in part]))
    assert not torch.equal(x[: len(query)], x[len(query) :])


def test_workers_by_the_machine_where_the_file_says_nothing(monkeypatch):
    cores = {"count": 16}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores["count"]), raising=False)
    assert machine_options({}) == {"num_workers": 8, "prefetch_factor": 2}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert machine_options({"use_shared_memory": True}) == {"num_workers": 4, "prefetch_factor": 2}
    cores["count"] = 2
    assert machine_options({}) == {"num_workers": 1, "prefetch_factor": 8}
    assert machine_options({"num_workers": 5, "prefetch_factor": 7}) == {"num_workers": 5, "prefetch_factor": 7}
    assert machine_options({"num_workers": 0, "prefetch_factor": 7}) == {"num_workers": 0}


def test_the_rate_of_a_loader_alone_touches_neither_it_nor_the_random_state(built):
    loader, state = built().train, torch.get_rng_state()
    assert images_per_second(loader, seconds=0.1) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert images_per_second(built(**{"Global.iter_per_epoch": 1}).train) > 0
    assert torch.equal(epoch(loader)[0], epoch(built().train)[0])


# --- Decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, subsampling, progressive", [*product(["RGB", "L"], [0, 1, 2], [False, True])])
def test_both_decoders_give_the_same_bytes(tmp_path, mode, subsampling, progressive, monkeypatch):
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        photograph().convert(mode).save(
            tmp_path / "x.jpg", exif=exif, subsampling=subsampling, quality=60 + 4 * turn, progressive=progressive
        )
        for box in (None, [3, 5, 60, 70]):
            quick = read_pixels(str(tmp_path / "x.jpg"), box)
            assert torch.equal(quick, pil_to_tensor(read_rgb(str(tmp_path / "x.jpg"), box)))
            with monkeypatch.context() as patch:
                patch.setattr(decoding, "decode_jpeg", None)
                assert torch.equal(quick, read_pixels(str(tmp_path / "x.jpg"), box))


def test_what_is_no_plain_jpeg_is_left_to_pillow(tmp_path, monkeypatch):
    seen = []
    decode = decoding.decode_jpeg
    monkeypatch.setattr(decoding, "decode_jpeg", lambda *a, **k: seen.append(1) or decode(*a, **k))
    kinds = {"a.jpg": photograph().convert("CMYK"), "b.png": photograph(), "c.webp": photograph()}
    for name, image in kinds.items():
        image.save(tmp_path / name)
        assert torch.equal(read_pixels(str(tmp_path / name)), pil_to_tensor(read_rgb(str(tmp_path / name))))
    assert not seen
    photograph().save(tmp_path / "d.png", "JPEG")  # the content counts
    read_pixels(str(tmp_path / "d.png"))
    assert seen


def test_a_truncated_photograph_is_refused_by_both(tmp_path):
    held = io.BytesIO()
    photograph().save(held, "JPEG")
    (tmp_path / "x.jpg").write_bytes(held.getvalue()[:-200])
    with pytest.raises(OSError, match="truncated"):
        read_pixels(str(tmp_path / "x.jpg"))


# --- Images kept in a file --------------------------------------------------------------------------------------------


def test_kept_images_are_the_same_and_decoded_once(built, tmp_path, monkeypatch):
    decoded = []
    read = decoding.read_pixels
    monkeypatch.setattr("recnb.data.lists.read_pixels", lambda path, box=None: decoded.append(path) or read(path, box))
    wanted = epoch(built().train)
    changes = {"Global.cache_images": str(tmp_path / "kept"), "DataLoader.Train.loader": {"num_workers": 2}}
    first = built(**changes)
    count = len(decoded)
    found = epoch(first.train)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    assert len(list((tmp_path / "kept").iterdir())) == 3
    again = built(**{**changes, "DataLoader.Train.loader": {"num_workers": 0}})
    assert torch.equal(epoch(again.train)[0], wanted[0])
    assert torch.equal(epoch(again.query)[0], epoch(built().query)[0])
    assert len(decoded) == count + len(again.query.dataset)  # those of the last line, which are not kept


def test_kept_images_belong_to_their_files_and_ops(built, tmp_path, drawn):
    built(**{"Global.cache_images": str(tmp_path / "kept")})
    files = set((tmp_path / "kept").iterdir())
    ops = [{"ResizeImage": {"size": 48}}, *OPS[1:]]
    loaders = built(**{"Global.cache_images": str(tmp_path / "kept"), "DataLoader.Train.dataset.transform_ops": ops})
    assert len(set((tmp_path / "kept").iterdir()) - files) == 1
    images = replace(loaders.train.dataset, transform=v2.Identity())
    assert images[0][0].shape == (3, 48, 48) and torch.equal(images[0][0], images.image(0))  # not the kept 48 x 48
    path = Path(loaders.train.dataset.paths[0])
    stamp = path.stat()
    try:
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
        files = set((tmp_path / "kept").iterdir())
        built(**{"Global.cache_images": str(tmp_path / "kept")})
        assert len(set((tmp_path / "kept").iterdir()) - files) == 1
    finally:
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def test_kept_images_go_to_another_process_as_a_path(built, tmp_path):
    images = built(**{"Global.cache_images": str(tmp_path / "kept")}).train.dataset
    first = images[0, 5][0]
    other = pickle.loads(pickle.dumps(images))
    assert torch.equal(other[0, 5][0], first)
    assert len(pickle.dumps(images.kept)) < 20_000


@pytest.mark.parametrize(
    "ops, count",
    [
        (OPS, 1),
        ([{"DecodeImage": {}}, {"ResizeImage": {"resize_short": 48}}, {"CropImage": {"size": 32}}, *OPS[1:2]], 3),
        ([{"RandCropImage": {"size": 32}}], 0),
        ([{"ResizeImage": {"resize_short": 48}}, {"RandCropImageV2": {"size": 32}}], 0),
        ([{"NormalizeImage": {}}, {"ResizeImage": {"size": 32}}], 0),
    ],
)
def test_which_ops_are_kept(ops, count):
    assert fixed_ops(pipeline(*ops)) == count


def test_what_cannot_be_kept_is_said(built, tmp_path, monkeypatch):
    kept = {"Global.cache_images": str(tmp_path / "kept")}
    with pytest.raises(ConfigError, match=r"^DataLoader\.Train\.dataset\.transform_ops: Global\.cache_images keeps"):
        built(**kept, **{"DataLoader.Train.dataset.transform_ops": [{"RandCropImage": {"size": 32}}]})
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(
        ConfigError, match=r"Global.cache_images: .* has 0\.0 GB free, and the images of .*train\.txt take 0\.0 GB"
    ):
        built(**kept)
