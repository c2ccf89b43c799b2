"""Each transform against its definition on pixels, all registered ones by a walk, and the randomness of an item."""

import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from recnb.data.lists import ImageList
from recnb.data.pipeline import display_image
from recnb.data.samplers import PKSampler
from recnb.data.transforms import TRANSFORMS
from recnb.recipe.data import build_transform
from recnb.registry import ConfigError

ARGUMENTS = {
    "ResizeImage": {"size": 32},
    "CropImage": {"size": 32},
    "RandCropImage": {"size": 32},
    "RandCropImageV2": {"size": 32},
    "RandomCropImage": {"size": 32},
    "Resize": {"size": [32, 32]},
    "CenterCrop": {"size": 32},
    "RandomCrop": {"size": 32, "padding": 4, "padding_mode": "reflect"},
    "RandomResizedCrop": {"size": 32, "scale": [0.2, 1]},
    "CropWithPadding": {"prob": 0.5},
    "Pad": {"padding": 10, "backend": "cv2"},
    "Pad_paddle_vision": {"padding": [4, 2]},
    "RandomRotation": {"prob": 1.0, "degrees": 90, "interpolation": "bilinear"},
    "ColorJitter": {"brightness": 0.4, "hue": 0.1},
    "AugMix": {"prob": 1.0},
    "RandFlipImage": {"prob": 1.0},
    "DecodeImage": {"to_rgb": False},
    "RandomErasing": {"EPSILON": 1.0},
    "Cutout": {"n_holes": 2, "length": 9},
    "RandomApply": {"transforms": [{"ColorJitter": {"hue": 0.1}}, {"RandomHorizontalFlip": None}]},
}
AFTER = {"Pad": {"ResizeImage": {"size": [48, 40]}}, "Pad_paddle_vision": {"ResizeImage": {"size": [48, 40]}}}
BEFORE = {"Normalize": {"ToTensor": {}}}
AUGMENTING = [
    {"RandCropImage": {"size": 24}},
    {"RandFlipImage": {}},
    {"AugMix": {}},
    {"NormalizeImage": {}},
    {"RandomErasing": {}},
]
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def pixels(height: int = 40, width: int = 48, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)


def build(name: str, **arguments) -> v2.Transform:
    return TRANSFORMS.build({"name": name, **arguments}, name)


def composed(*ops: dict) -> v2.Transform:
    return build_transform({"dataset": {"transform_ops": list(ops)}}, "dataset")


def alone(name: str) -> v2.Transform:
    ops = {"ResizeImage": {"size": [48, 40]}}, BEFORE.get(name), {name: ARGUMENTS.get(name)}, AFTER.get(name)
    return composed(*filter(None, ops))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_in_a_list_of_its_own(name):
    transform = alone(name)
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
    transform = alone(name)
    results = []
    for other in (1, 2):
        random.seed(other)
        np.random.seed(other)
        torch.manual_seed(3)
        results.append([transform(pixels()) for _ in range(4)])
    assert all(map(torch.equal, *results))


# --- One by one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.00392157, "1.0/255.0", "0.00392157", None, 1])
@pytest.mark.parametrize("order", ["", "hwc", "chw"])
def test_normalize_by_its_definition(scale, order):
    factor = {"1.0/255.0": 1 / 255, None: 1 / 255}.get(scale, scale)
    mean, std = (torch.tensor(IMAGENET[key]).view(3, 1, 1) for key in ("mean", "std"))
    expected = (pixels() * float(factor) - mean) / std
    result = build("NormalizeImage", scale=scale, order=order, **IMAGENET)(pixels())
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("mean", "std"), [(list(IMAGENET["mean"]), list(IMAGENET["std"])), (0.5, 0.25)])
def test_normalize_of_paddle_vision_by_its_definition(mean, std):
    per_channel = [torch.tensor(v if isinstance(v, list) else [v] * 3).view(3, 1, 1) for v in (mean, std)]
    expected = (pixels() / 255 - per_channel[0]) / per_channel[1]
    result = build("Normalize", mean=mean, std=std)(build("ToTensor")(pixels()))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    resize, normalize = {"ResizeImage": {"size": [48, 40]}}, {"Normalize": {"mean": mean, "std": std}}
    transform = composed(resize, {"ToTensor": {}}, normalize)
    torch.testing.assert_close(transform(pixels()), expected, rtol=1e-5, atol=1e-5)


def test_values_are_scaled_once():
    scaled = build("ToTensor")(pixels())
    assert scaled.min() == 0 and scaled.max() == 1
    torch.testing.assert_close(scaled, pixels() / 255)
    resize, erase = {"ResizeImage": {"size": [48, 40]}}, {"RandomErasing": {"EPSILON": 0.0}}
    for twice in ([{"ToTensor": {}}, {"ToTensor": {}}], [{"ToTensor": {}}, erase]):
        torch.testing.assert_close(composed(resize, *twice)(pixels()), pixels() / 255)
    both = composed(resize, {"NormalizeImage": {}}, {"ToTensor": {}})(pixels())
    assert torch.equal(both, composed(resize, {"NormalizeImage": {}})(pixels()))


def test_normalize_of_bytes_is_refused():
    with pytest.raises(ConfigError, match=r"transform_ops: cannot be applied in this order: .*float"):
        composed({"ResizeImage": {"size": 32}}, {"Normalize": {"mean": 0.5, "std": 0.5}})


def test_normalize_by_default_as_imagenet():
    expected = build("NormalizeImage", scale=1 / 255, **IMAGENET)(pixels())
    assert torch.equal(build("NormalizeImage")(pixels()), expected)


def test_decoding_to_bgr():
    assert torch.equal(build("DecodeImage", to_rgb=False)(pixels()), pixels()[[2, 1, 0]])
    assert torch.equal(build("DecodeImage", to_rgb=True, channel_first=False)(pixels()), pixels())


@pytest.mark.parametrize(
    ("names", "shape"),
    [
        (("ResizeImage", "CropImage", "RandCropImage", "RandCropImageV2", "RandomCropImage"), (3, 10, 20)),
        (("Resize", "CenterCrop", "RandomCrop", "RandomResizedCrop"), (3, 20, 10)),
    ],
)
def test_sizes_are_width_then_height_but_those_of_paddle_vision_height_then_width(names, shape):
    for name in names:
        assert build(name, size=[20, 10])(pixels()).shape == shape
        assert build(name, size=16)(pixels(50, 50)).shape == (3, 16, 16)


def test_resizing_of_the_shorter_side():
    assert build("ResizeImage", resize_short=20)(pixels(40, 80)).shape == (3, 20, 40)
    assert build("Resize", size=20)(pixels(40, 80)).shape == (3, 20, 40)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_resizing_keeps_flat_colour(interpolation):
    flat = torch.full((3, 30, 30), 77, dtype=torch.uint8)
    assert (build("ResizeImage", size=17, interpolation=interpolation)(flat) == 77).all()


def test_crops_are_central():
    assert torch.equal(build("CropImage", size=20)(pixels(40, 48)), pixels(40, 48)[:, 10:30, 14:34])


def test_random_crops_are_never_a_pixel_short_and_reach_every_place():
    torch.manual_seed(0)
    sizes = itertools.cycle(itertools.product((20, 21, 23, 30), (19, 20, 25)))
    for _, (height, width) in zip(range(1000), sizes, strict=False):
        assert build("RandCropImageV2", size=[19, 20])(torch.zeros(3, height, width)).shape == (3, 20, 19)
    crop, numbered = build("RandCropImageV2", size=3), torch.arange(20).view(1, 4, 5).expand(3, 4, 5)
    assert {int(crop(numbered)[0, 0, 0]) for _ in range(100)} == {0, 1, 2, 5, 6, 7}
    with pytest.raises(ConfigError, match=r"size \(64, 64\) is larger than (padded )?input image size"):
        composed({"ResizeImage": {"size": 63}}, {"RandCropImageV2": {"size": 64}})


def test_a_border_of_one_colour():
    result = build("Pad", padding=[2, 3], fill=[7, 8, 9])(pixels())
    assert result.shape == (3, 46, 52) and torch.equal(result[:, 3:43, 2:50], pixels())
    outside = torch.ones(46, 52, dtype=torch.bool)
    outside[3:43, 2:50] = False
    assert [result[c][outside].unique().tolist() for c in range(3)] == [[7], [8], [9]]


@pytest.mark.parametrize(
    ("mode", "row"),
    [
        ("constant", [5, 5, 0, 1, 2, 3, 5, 5]),
        ("edge", [0, 0, 0, 1, 2, 3, 3, 3]),
        ("reflect", [2, 1, 0, 1, 2, 3, 2, 1]),
        ("symmetric", [1, 0, 0, 1, 2, 3, 3, 2]),
    ],
)
@pytest.mark.parametrize("name", ["Pad", "Pad_paddle_vision"])
def test_a_border_of_the_image_itself(name, mode, row):
    image = torch.arange(4, dtype=torch.uint8).expand(3, 3, 4)
    result = build(name, padding=2, padding_mode=mode, fill=5)(image)
    assert result.shape == (3, 7, 8) and result[1, 3].tolist() == row
    assert build(name, padding=[1, 2, 3, 4])(image).shape == (3, 9, 8)  # left, top, right, bottom


def test_a_crop_that_keeps_its_place():
    torch.manual_seed(0)
    op, image, shares = build("CropWithPadding", padding_num=9, scale=[0.2, 0.5]), pixels() // 2 + 100, []
    for _ in range(50):
        result = op(image)
        kept = (result != 9).any(0)
        height, width = kept.any(1).sum(), kept.any(0).sum()
        assert result.shape == image.shape and height * width == kept.sum()
        assert torch.equal(result[:, kept], image[:, kept]) and (result[:, ~kept] == 9).all()
        shares.append(kept.float().mean())
    assert 0.18 < min(shares) < 0.25 and 0.4 < max(shares) < 0.52
    assert torch.equal(build("CropWithPadding", prob=0.0)(image), image)


def test_a_crop_of_the_padded_image():
    torch.manual_seed(0)
    op = build("RandomCrop", size=40, padding=4, fill=[1, 2, 3])
    seen = torch.stack([op(torch.zeros(3, 40, 40))[:, 0].amax(1) for _ in range(60)])
    assert {tuple(colour) for colour in seen.tolist()} == {(0, 0, 0), (1, 2, 3)}
    assert build("RandomCrop", size=60, pad_if_needed=True)(pixels()).shape == (3, 60, 60)


def test_turning():
    turn = build("RandomRotation", degrees=[90, 90], prob=1.0)
    assert torch.equal(turn(pixels(40, 40)), torch.rot90(pixels(40, 40), 1, (1, 2)))
    torch.manual_seed(0)
    turned = sum(not torch.equal(build("RandomRotation", degrees=90)(pixels()), pixels()) for _ in range(200))
    assert 70 < turned < 130
    corner = build("RandomRotation", degrees=[45, 45], prob=1.0, fill=[1, 2, 3])(pixels())
    assert corner.shape == pixels().shape and corner[:, 0, 0].tolist() == [1, 2, 3]
    assert build("RandomRotation", degrees=[90, 90], prob=1.0, expand=True)(pixels()).shape == (3, 48, 40)
    with pytest.raises(ConfigError, match=r"leave with different sizes .*; add '- ResizeImage"):
        composed({"ResizeImage": {"size": 32}}, {"RandomRotation": {"degrees": 45, "expand": True}})


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


@pytest.mark.parametrize(("log_aspect", "median"), [(None, 1.75), (False, 1.75), (True, 1.0)])
def test_the_aspect_of_an_erased_rectangle_is_drawn_as_asked(log_aspect, median):
    torch.manual_seed(0)
    asked = {} if log_aspect is None else {"use_log_aspect": log_aspect}
    erase = build("RandomErasing", EPSILON=1.0, sl=0.02, sh=0.1, **asked)
    drawn = [erase.make_params([torch.zeros(3, 400, 400)]) for _ in range(2000)]
    assert np.median([box["h"] / box["w"] for box in drawn]) == pytest.approx(median, rel=0.06)


def test_erasing_tries_as_often_as_asked():
    torch.manual_seed(0)
    share = []
    for attempt in (1, 100):
        erase = build("RandomErasing", EPSILON=1.0, sl=0.5, sh=0.9, attempt=attempt)
        share.append(np.mean([erase.make_params([torch.zeros(3, 32, 32)])["v"] is not None for _ in range(200)]))
    assert share[0] < 0.7 < share[1] == 1


@pytest.mark.parametrize(("log_aspect", "median"), [(None, 1.15), (False, 1.15), (True, 0.775)])
def test_the_aspect_of_a_crop_is_drawn_as_asked(log_aspect, median):
    torch.manual_seed(0)
    asked = {} if log_aspect is None else {"use_log_aspect": log_aspect}
    crop = build("RandCropImage", size=8, scale=[0.1, 0.2], ratio=[0.3, 2.0], **asked)
    drawn = [crop.make_params([torch.zeros(3, 400, 400)]) for _ in range(2000)]
    assert np.median([box["width"] / box["height"] for box in drawn]) == pytest.approx(median, rel=0.05)


def test_a_crop_fits_whatever_the_shape():
    torch.manual_seed(0)
    crop = build("RandCropImage", size=8, scale=[0.8, 1.0])
    for shape in ((1, 1), (1, 300), (300, 1), (40, 30)):
        for _ in range(50):
            box = crop.make_params([torch.zeros(3, *shape)])
            assert 0 <= box["top"] <= shape[0] - box["height"] and 0 <= box["left"] <= shape[1] - box["width"]
            assert box["height"] >= 1 <= box["width"]


def test_erasing_with_noise():
    torch.manual_seed(0)
    assert build("RandomErasing", EPSILON=1.0, mode="pixel")(torch.zeros(3, 32, 32)).unique().numel() > 30


def test_erasing_takes_the_arguments_of_the_shipped_files():
    build("RandomErasing", sl=0.02, sh="1.0/3.0", r1=0.3, attempt=10, use_log_aspect=True, mode="pixel")
    build("RandCropImage", size=24, use_log_aspect=True)
    build("ResizeImage", size=[24, 24], return_numpy=False, interpolation="bilinear", backend="cv2")


def test_grey():
    result = build("RandomGrayscale", p=1.0)(pixels())
    assert result.shape == pixels().shape and torch.equal(result[0], result[1]) and torch.equal(result[0], result[2])
    luma = (pixels() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    assert (result[0] - luma).abs().max() < 1.5
    assert torch.equal(build("RandomGrayscale", p=0.0)(pixels()), pixels())


def test_colour_changes_with_its_probability():
    assert torch.equal(build("ColorJitter", brightness=0.9, prob=0.0)(pixels()), pixels())
    torch.manual_seed(0)
    assert not torch.equal(build("ColorJitter", brightness=0.9)(pixels()), pixels())


# --- Lists of them ----------------------------------------------------------------------------------------------------


def test_without_normalize_images_are_between_0_and_1():
    torch.testing.assert_close(composed({"ResizeImage": {"size": [48, 40]}})(pixels()), pixels() / 255)


FLIP, IMAGENET_VALUES = {"RandFlipImage": {"flip_code": 1}}, {"NormalizeImage": {"scale": "1.0/255.0", "order": "hwc"}}
SHIPPED = {  # training lists as the original's files have them, with small sizes
    "re-identification": (
        [24, 48],
        [
            FLIP,
            {"Pad": {"padding": 10}},
            {"RandCropImageV2": {"size": [24, 48]}},
            {"ColorJitter": {"brightness": 0.15, "contrast": 0.15, "saturation": 0.1, "hue": 0.1}},
            {"ToTensor": None},
            {"Normalize": IMAGENET},
            {"RandomErasing": {"EPSILON": 0.5, "sl": 0.02, "sh": 0.4, "r1": 0.3}},
        ],
    ),
    "general recognition": (
        [32, 32],
        [
            FLIP,
            {"Pad": {"padding": 10, "backend": "cv2"}},
            {"RandCropImageV2": {"size": [32, 32]}},
            {"RandomRotation": {"prob": 0.5, "degrees": 90, "interpolation": "bilinear"}},
            {"ResizeImage": {"size": [32, 32], "return_numpy": False, "interpolation": "bilinear", "backend": "cv2"}},
            IMAGENET_VALUES,
        ],
    ),
    "language and image": (
        [32, 32],
        [
            FLIP,
            {"TimmAutoAugment": {"config_str": "rand-m9-mstd0.5-inc1", "interpolation": "bicubic", "img_size": 32}},
            IMAGENET_VALUES,
            {
                "RandomErasing": {
                    "EPSILON": 0.25,
                    "sh": "1.0/3.0",
                    "attempt": 10,
                    "use_log_aspect": True,
                    "mode": "pixel",
                }
            },
        ],
    ),
    "faces": (
        [32, 32],
        [
            {
                "CropWithPadding": {
                    "prob": 0.2,
                    "padding_num": 0,
                    "size": [32, 32],
                    "scale": [0.2, 1.0],
                    "ratio": [0.75, 1.3333333333333333],
                }
            },
            {"RandomInterpolationAugment": {"prob": 0.2}},
            {"ColorJitter": {"prob": 0.2, "brightness": 0.5, "hue": 0}},
            {"RandomHorizontalFlip": None},
            {"ToTensor": None},
            {"Normalize": {"mean": [0.5] * 3, "std": [0.5] * 3}},
        ],
    ),
    "products": (
        [40, 40],
        [
            {"Resize": {"size": 36}},
            {"RandomResizedCrop": {"scale": [0.2, 1], "size": 40}},
            {"RandomHorizontalFlip": {"prob": 0.5}},
            {"ToTensor": None},
            {"Normalize": IMAGENET},
        ],
    ),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_lists_of_shipped_files(name):
    size, ops = SHIPPED[name]
    resize = {"ResizeImage": {"size": size, "return_numpy": False, "interpolation": "bicubic", "backend": "pil"}}
    transform = composed({"DecodeImage": {"to_rgb": True, "channel_first": False}}, resize, *ops)
    torch.manual_seed(0)
    for _ in range(20):
        result = transform(pixels())
        assert result.shape == (3, size[1], size[0]) and result.isfinite().all() and result.abs().max() < 6
        assert display_image(result, transform).shape == (size[1], size[0], 3)


def test_the_order_of_the_list_is_kept():
    erase = {"RandomErasing": {"EPSILON": 1.0, "sl": 0.9, "sh": 1.0, "r1": 0.9, "mean": [9, 9, 9]}}
    resize = {"ResizeImage": {"size": 16}}
    last = composed(resize, {"NormalizeImage": {}}, erase)(pixels())
    first = composed(resize, erase, {"NormalizeImage": {}})(pixels())
    assert last.max() == 9 and first.max() < 3


TENSOR = {"ToTensor": {}}


@pytest.mark.parametrize(
    "ops",
    [
        [],
        [{"NormalizeImage": {}}],
        [{"NormalizeImage": IMAGENET | {"scale": 1}}],
        [{"NormalizeImage": {"scale": "1/127.5"}}],
        [TENSOR],
        [TENSOR, {"Normalize": IMAGENET}],
        [TENSOR, {"Normalize": {"mean": 0.5, "std": 0.5}}],
        [TENSOR, {"NormalizeImage": IMAGENET | {"scale": 1}}],
        [TENSOR, {"Normalize": IMAGENET}, {"Normalize": {"mean": 0.1, "std": 2.0}}],
    ],
)
def test_display_undoes_the_normalisation(ops):
    transform = composed({"ResizeImage": {"size": [48, 40]}}, *ops)
    shown = display_image(transform(pixels()), transform)
    assert shown.shape == (40, 48, 3)
    torch.testing.assert_close(shown, pixels().permute(1, 2, 0) / 255, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("op", "message"),
    [
        ({"ResizeImage": {}}, "ResizeImage needs either 'size' or 'resize_short'"),
        ({"ResizeImage": {"size": 8, "resize_short": 8}}, "ResizeImage needs either 'size' or 'resize_short'"),
        ({"ResizeImage": {"size": 8, "interpolation": "cubic"}}, "'cubic' is not supported; did you mean 'bicubic'"),
        ({"CropImage": {"size": [8, 8, 8]}}, r"size is \[8, 8, 8\], neither a number of pixels nor \[width, height\]"),
        ({"NormalizeImage": {"order": "whc"}}, "'whc' is not supported; did you mean 'hwc'"),
        ({"RandFlipImage": {"flip_code": 3}}, "'3' is not supported; there is -1, 0, 1"),
        ({"RandomErasing": {"mode": "noise"}}, "'noise' is not supported; there is const, pixel"),
        ({"RandomErasing": {"r1": 3}}, "r1 is 3, not the least ratio of two sides"),
        ({"RandomErasing": {"sl": 0.5}}, r"\[sl, sh\] is \[0.5, 0.4\], not two numbers above 0, the smaller one first"),
        ({"RandomErasing": {"mean": [0.5]}}, r"mean is \[0.5\], neither one number nor three, one a channel"),
        ({"ResizeImage": {"size": 8, "interpolation": "box"}}, "'box' is not supported; there is bicubic, "),
        ({"Resize": {"size": [8]}}, r"size is \[8\], neither a number of pixels nor \[height, width\]"),
        ({"RandCropImageV2": {"size": 0}}, "0 is too small; the least is 1"),
        ({"RandCropImage": {"size": 8, "ratio": [2, 1]}}, r"ratio is \[2, 1\], not two numbers above 0"),
        ({"RandomResizedCrop": {"size": 8, "scale": [0.5]}}, r"scale is \[0.5\], not two numbers above 0"),
        ({"CropWithPadding": {"scale": ["a", "b"]}}, "'a' is a str, CropWithPadding wants float"),
        ({"CropWithPadding": {"prob": 2}}, "2 is too large; the most is 1"),
        ({"RandomGrayscale": {"p": 1.1}}, "1.1 is too large; the most is 1"),
        ({"RandFlipImage": {"prob": -0.1}}, "-0.1 is too small; the least is 0"),
        ({"Pad": {"padding": [1, 2, 3]}}, r"padding is \[1, 2, 3\], neither a number of pixels, "),
        ({"Pad": {"padding": 1, "padding_mode": "mirror"}}, "'mirror' is not supported; there is constant, edge"),
        ({"Pad": {"padding": 1, "fill": [1, 2]}}, r"fill is \[1, 2\], neither one number nor three"),
        ({"RandomCrop": {"size": 8, "padding": -1}}, "padding is -1, neither a number of pixels"),
        (
            {"RandomRotation": {"degrees": 9, "interpolation": "cubic"}},
            "'cubic' is not supported; did you mean 'bicubic'",
        ),
        ({"RandomRotation": {"degrees": [1, 2, 3]}}, "degrees should be a sequence of length 2"),
        ({"Normalize": {"mean": [0.5, 0.5]}}, r"mean is \[0.5, 0.5\], neither one number nor three"),
        ({"Normalize": {"std": 0.5, "data_format": "hwc"}}, "'hwc' is not supported; did you mean 'HWC'"),
    ],
)
def test_arguments_that_mean_nothing(op, message):
    with pytest.raises(ConfigError, match=rf"dataset\.transform_ops\.0\.{next(iter(op))}(\.\w+)?: {message}"):
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
