"""Each transform against its definition on pixels, all registered ones by a walk, and the randomness of an item."""
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from recnb.config import ConfigError
from recnb.datasets import ImageList
from recnb.samplers import PKSampler
from recnb.transforms import TRANSFORMS, build_transform, display_image

ARGUMENTS = {"ResizeImage": {"size": 32}, "CropImage": {"size": 32}, "RandCropImage": {"size": 32},
             "ColorJitter": {"brightness": 0.4, "hue": 0.1}, "AugMix": {"prob": 1.0}, "RandFlipImage": {"prob": 1.0},
             "DecodeImage": {"to_rgb": False}, "RandomErasing": {"EPSILON": 1.0}}
AUGMENTING = [{"RandCropImage": {"size": 24}}, {"RandFlipImage": {}}, {"AugMix": {}}, {"NormalizeImage": {}},
              {"RandomErasing": {}}]
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def pixels(height: int = 40, width: int = 48, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)


def build(name: str, **arguments) -> v2.Transform:
    return TRANSFORMS.build({"name": name, **arguments}, name)


def composed(*ops: dict) -> v2.Transform:
    return build_transform({"dataset": {"transform_ops": list(ops)}}, "dataset")


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_in_a_list_of_its_own(name):
    transform = composed({"ResizeImage": {"size": [48, 40]}}, {name: ARGUMENTS.get(name, {})})
    copy = pickle.loads(pickle.dumps(transform))  # as a worker process gets it where processes are not forked
    for image in (pixels(), pixels(90, 60, seed=1), torch.zeros(3, 40, 48, dtype=torch.uint8)):
        before = image.clone()
        for op in (transform, copy):
            result = op(image)
            assert result.dtype == torch.float32 and result.isfinite().all()
            assert result.shape == ((3, 32, 32) if ARGUMENTS.get(name, {}).get("size") else (3, 40, 48))
        assert torch.equal(image, before)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_draws_from_the_seed_alone(name):
    transform = composed({"ResizeImage": {"size": [48, 40]}}, {name: ARGUMENTS.get(name, {})})
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(transform(pixels()))
    assert torch.equal(*results)


# --- One by one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.00392157, "1.0/255.0", "0.00392157", None, 1])
@pytest.mark.parametrize("order", ["", "hwc", "chw"])
def test_normalize_by_its_definition(scale, order):
    factor = {"1.0/255.0": 1 / 255, None: 1 / 255}.get(scale, scale)
    mean, std = (torch.tensor(IMAGENET[key]).view(3, 1, 1) for key in ("mean", "std"))
    expected = (pixels() * float(factor) - mean) / std
    result = build("NormalizeImage", scale=scale, order=order, **IMAGENET)(pixels())
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_normalize_by_default_as_imagenet():
    expected = build("NormalizeImage", scale=1 / 255, **IMAGENET)(pixels())
    assert torch.equal(build("NormalizeImage")(pixels()), expected)


def test_decoding_to_bgr():
    assert torch.equal(build("DecodeImage", to_rgb=False)(pixels()), pixels()[[2, 1, 0]])
    assert torch.equal(build("DecodeImage", to_rgb=True, channel_first=False)(pixels()), pixels())


def test_sizes_are_width_then_height():
    for name in ("ResizeImage", "CropImage", "RandCropImage"):
        assert build(name, size=[20, 10])(pixels()).shape == (3, 10, 20)
        assert build(name, size=16)(pixels()).shape == (3, 16, 16)


def test_resizing_of_the_shorter_side():
    assert build("ResizeImage", resize_short=20)(pixels(40, 80)).shape == (3, 20, 40)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_resizing_keeps_flat_colour(interpolation):
    flat = torch.full((3, 30, 30), 77, dtype=torch.uint8)
    assert (build("ResizeImage", size=17, interpolation=interpolation)(flat) == 77).all()


def test_crops_are_central():
    assert torch.equal(build("CropImage", size=20)(pixels(40, 48)), pixels(40, 48)[:, 10:30, 14:34])


@pytest.mark.parametrize(("flip_code", "axes"), [(1, [2]), (0, [1]), (-1, [1, 2])])
def test_flips(flip_code, axes):
    assert torch.equal(build("RandFlipImage", flip_code=flip_code, prob=1.0)(pixels()), pixels().flip(axes))


def test_half_of_the_images_are_flipped():
    torch.manual_seed(0)
    flip = build("RandFlipImage")
    flipped = sum(torch.equal(flip(pixels()), pixels().flip(2)) for _ in range(400))
    assert 160 < flipped < 240


def test_erasing_writes_its_value_over_a_share_of_the_image():
    torch.manual_seed(0)
    erase = build("RandomErasing", EPSILON=1.0, sl=0.1, sh=0.3, r1=0.5, mean=[1.0, 2.0, 3.0])
    for _ in range(50):
        result = erase(torch.zeros(3, 60, 60))
        gone = result[0] == 1
        assert 0.08 < gone.float().mean() < 0.33
        assert [set(result[c].unique().tolist()) for c in range(3)] == [{0.0, value} for value in (1.0, 2.0, 3.0)]
        height, width = gone.any(1).sum(), gone.any(0).sum()
        assert height * width == gone.sum() and 0.45 < width / height < 2.2


def test_erasing_happens_with_its_probability():
    torch.manual_seed(0)
    erase = build("RandomErasing", EPSILON=0.25, mean=[1.0, 1.0, 1.0])
    assert 70 < sum(bool(erase(torch.zeros(3, 32, 32)).any()) for _ in range(400)) < 130


def test_erasing_with_noise():
    torch.manual_seed(0)
    assert build("RandomErasing", EPSILON=1.0, mode="pixel")(torch.zeros(3, 32, 32)).unique().numel() > 30


def test_augmix():
    assert torch.equal(build("AugMix", prob=0.0)(pixels()), pixels())
    torch.manual_seed(0)
    result = build("AugMix", prob=1.0)(pixels())
    assert result.shape == pixels().shape and result.dtype == torch.uint8
    assert not torch.equal(result, pixels())


def test_colour_changes_with_its_probability():
    assert torch.equal(build("ColorJitter", brightness=0.9, prob=0.0)(pixels()), pixels())
    torch.manual_seed(0)
    assert not torch.equal(build("ColorJitter", brightness=0.9)(pixels()), pixels())


# --- Lists of them ----------------------------------------------------------------------------------------------------


def test_without_normalize_images_are_between_0_and_1():
    torch.testing.assert_close(composed({"ResizeImage": {"size": [48, 40]}})(pixels()), pixels() / 255)


def test_the_order_of_the_list_is_kept():
    erase = {"RandomErasing": {"EPSILON": 1.0, "sl": 0.9, "sh": 1.0, "r1": 0.9, "mean": [9, 9, 9]}}
    resize = {"ResizeImage": {"size": 16}}
    last = composed(resize, {"NormalizeImage": {}}, erase)(pixels())
    first = composed(resize, erase, {"NormalizeImage": {}})(pixels())
    assert last.max() == 9 and first.max() < 3


@pytest.mark.parametrize("ops", [[], [{"NormalizeImage": {}}], [{"NormalizeImage": IMAGENET | {"scale": 1}}]])
def test_display_undoes_the_normalisation(ops):
    transform = composed({"ResizeImage": {"size": [48, 40]}}, *ops)
    shown = display_image(transform(pixels()), transform)
    assert shown.shape == (40, 48, 3)
    torch.testing.assert_close(shown, pixels().permute(1, 2, 0) / 255, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("op", "message"), [
    ({"ResizeImage": {}}, "ResizeImage needs either 'size' or 'resize_short'"),
    ({"ResizeImage": {"size": 8, "resize_short": 8}}, "ResizeImage needs either 'size' or 'resize_short'"),
    ({"ResizeImage": {"size": 8, "interpolation": "cubic"}}, "there is no interpolation 'cubic', only nearest, "),
    ({"CropImage": {"size": [8, 8, 8]}}, r"size is \[8, 8, 8\], neither a number of pixels nor \[width, height\]"),
    ({"NormalizeImage": {"order": "whc"}}, "order is 'whc', only '', 'hwc' and 'chw' exist"),
    ({"RandFlipImage": {"flip_code": 3}}, "flip_code is 3, only 1 "),
    ({"RandomErasing": {"mode": "noise"}}, "mode is 'noise', only 'const' and 'pixel' exist"),
])
def test_arguments_that_mean_nothing(op, message):
    with pytest.raises(ConfigError, match=rf"dataset\.transform_ops\.0\.{next(iter(op))}: {message}"):
        composed(op)


# --- The randomness of an item ----------------------------------------------------------------------------------------


@pytest.fixture
def images(drawn) -> ImageList:
    paths = sorted(map(str, (drawn / "images").rglob("*.jpg")))[:24]
    return ImageList(paths, np.repeat(np.arange(6), 4), transform=composed(*AUGMENTING))


def test_an_item_is_decided_by_its_index_and_seed(images):
    first = images[3, 17][0]
    torch.manual_seed(99)
    assert torch.equal(images[3, 17][0], first)
    assert not torch.equal(images[3, 18][0], first)
    assert not torch.equal(images[4, 17][0], first)


def test_an_item_leaves_the_global_random_state_alone(images):
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    images[3, 17]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_an_item_without_a_seed_draws_on_the_global_random_state(images):
    torch.manual_seed(5)
    first, second = images[3][0], images[3][0]
    torch.manual_seed(5)
    assert torch.equal(images[3][0], first) and not torch.equal(first, second)


def test_batches_do_not_depend_on_the_number_of_workers(images):
    sampler = PKSampler(images.labels, batch_size=8, sample_per_id=2, seed=1)
    alone, shared = (list(DataLoader(images, batch_sampler=sampler, num_workers=n)) for n in (0, 2))
    assert len(alone) == len(shared) == 3
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
