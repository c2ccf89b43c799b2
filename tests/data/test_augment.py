"""Policies against what their shorthand says, single ops on pixels, mixed batches against the formula."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.distributions import Beta, Dirichlet
from torch.utils.data import default_collate
from torchvision.transforms import v2

from recnb.data.augment import AUGMIX_OPS, BATCH_TRANSFORMS, drawn, layers, rounded
from recnb.data.lists import seeded
from recnb.data.transforms import TRANSFORMS
from recnb.recipe.data import build_batch_transform, build_transform
from recnb.recipe.schema import named_sections
from recnb.registry import ConfigError

POLICIES = {
    "RandAugment": {"num_layers": 2, "magnitude": 9},
    "AutoAugment": {},
    "TrivialAugment": {},
    "AugMix": {"prob": 1.0},
    "TimmAutoAugment": {"prob": 1.0, "config_str": "rand-m9-mstd0.5-inc1", "interpolation": "bicubic", "img_size": 224},
}
BATCH = {
    "MixupOperator": {"alpha": 0.8},
    "CutmixOperator": {"alpha": 1.0},
    "OpSampler": {"MixupOperator": {"alpha": 0.8, "prob": 0.5}, "CutmixOperator": {"prob": 0.3}},
}
CLASSES = 7


def photo(height: int = 40, width: int = 48) -> torch.Tensor:
    """Smooth colours with a disc, since on noise equalising or posterising could hardly be seen."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    disc = ((y - 0.4) ** 2 + (x - 0.6) ** 2 < 0.05).float()
    return (40 + 170 * torch.stack([x, y, 0.3 * x + 0.5 * disc])).to(torch.uint8)


def build(name: str, **arguments) -> v2.Transform:
    return TRANSFORMS.build({"name": name, **arguments}, name)


def mixing(*ops: dict, class_num: int = CLASSES):
    return build_batch_transform({"DataLoader": {"Train": {"dataset": {"batch_transform_ops": list(ops)}}}}, class_num)


# --- Policies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_changes_photographs_and_stays_in_bytes(name):
    torch.manual_seed(0)
    op, results = build(name, **POLICIES[name]), []
    for _ in range(30):
        results.append(op(photo()))
        assert results[-1].shape == (3, 40, 48) and results[-1].dtype == torch.uint8
    assert len({result.numpy().tobytes() for result in results}) >= 10


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("first", ["ToTensor", "NormalizeImage"])
def test_a_policy_refuses_floats(name, first):
    with pytest.raises(ConfigError, match=f"transform_ops: .* {name} works on 8-bit images: put it before ToTensor"):
        build_transform({"d": {"transform_ops": [{"ResizeImage": {"size": 32}}, {first: {}}, {name: {}}]}}, "d")


def test_level_0_of_randaugment_moves_nothing_and_level_10_a_third_of_a_right_angle():
    ops = [build("RandAugment", magnitude=m, num_layers=1).transforms[1].transforms[0] for m in (0, 5, 10)]
    angles = [op._AUGMENTATION_SPACE["Rotate"][0](op.num_magnitude_bins, 40, 48)[op.magnitude].item() for op in ops]
    assert angles == pytest.approx([0, 15, 30])


def test_the_corner_that_a_turn_leaves_empty_has_the_fill_colour():
    torch.manual_seed(0)
    op, seen = build("TimmAutoAugment", config_str="rand-m10-n1-inc1", mean=[0, 0.5, 1]), set()
    white = torch.full((3, 40, 40), 200, dtype=torch.uint8)
    for _ in range(300):
        result = op(white)
        seen |= {tuple(result[:, row, column].tolist()) for row in (0, -1) for column in (0, -1)}
    assert (0, 128, 255) in seen


def test_levels_of_the_shorthand_are_normally_distributed():
    chosen = layers("rand-m9-mstd0.5-inc1", {}, m=9.0, n=3.0, mstd=0.5, inc=1.0)
    assert len(chosen.transforms) == 3 and {op.p for op in chosen.transforms} == {0.5}
    levels = np.array([op.magnitude for op in chosen.transforms[0].transforms[0].transforms]) / 10
    assert levels.mean() == pytest.approx(9, abs=0.05) and levels.std() == pytest.approx(0.5, abs=0.05)
    assert max(op.magnitude for op in layers("", {}, 9.0, 1.0, 3.0, 1.0).transforms[0].transforms[0].transforms) == 100
    fixed = layers("rand-m9-inc1", {}, m=9.0, n=2.0, mstd=0.0, inc=1.0).transforms[0].transforms[0].transforms
    assert [op.magnitude for op in fixed] == [90] and fixed[0].num_magnitude_bins == 101


def test_each_op_of_the_shorthand_is_applied_half_of_the_time():
    torch.manual_seed(0)
    op = build("TimmAutoAugment", config_str="rand-m9-n1-inc1")
    changed = sum(not torch.equal(op(photo()), photo()) for _ in range(400))
    assert 140 < changed < 220  # half, less the one op in fourteen that is the identity and a few without effect
    assert all(torch.equal(build("TimmAutoAugment", prob=0.0)(photo()), photo()) for _ in range(20))


def test_other_policies_of_the_shorthand():
    policy = build("TimmAutoAugment", config_str="augmix-m5-w4-d2-a0.5").transforms[1].transforms[0]
    assert isinstance(policy, v2.AugMix)
    assert (policy.severity, policy.mixture_width, policy.chain_depth, policy.alpha) == (5, 4, 2, 0.5)
    assert build("TimmAutoAugment", config_str="augmix").transforms[1].transforms[0].chain_depth == -1
    policy = build("TimmAutoAugment", config_str="original").transforms[1].transforms[0]
    assert isinstance(policy, v2.AutoAugment) and policy.policy == v2.AutoAugmentPolicy.IMAGENET


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("TimmAutoAugment", {"config_str": "rand-m9-mstd0.5"}, "config_str 'rand-m9-mstd0.5': write inc1, "),
        ("TimmAutoAugment", {"config_str": "rand-m12-inc1"}, "config_str 'rand-m12-inc1': .*a level m from 0 to 10"),
        (
            "TimmAutoAugment",
            {"config_str": "rand-m9-w0-inc1"},
            "'w0' has no meaning here after 'rand'; there is incNUMBER",
        ),
        ("TimmAutoAugment", {"config_str": "augmix-m3-mstd1"}, "'mstd1' has no meaning here after 'augmix'"),
        ("TimmAutoAugment", {"config_str": "rand-inc1-m"}, "'m' has no meaning here after 'rand'"),
        ("TimmAutoAugment", {"config_str": "v0-mstd0.5"}, "begins with 'v0'; there is augmix, original, rand"),
        ("TimmAutoAugment", {"config_str": "augmix-m11"}, "severity must be between"),
        ("TimmAutoAugment", {"mean": [1, 2]}, r"mean is \[1, 2\], neither one number nor three"),
        ("TimmAutoAugment", {"prob": 1.5}, "prob: 1.5 is too large; the most is 1"),
        ("TimmAutoAugment", {"interpolation": "cubic"}, "'cubic' is not supported; did you mean 'bicubic'"),
        ("RandAugment", {"magnitude": 11}, "magnitude: 11 is too large; the most is 10"),
        ("RandAugment", {"num_layers": 0}, "num_layers: 0 is too small; the least is 1"),
        ("RandAugment", {"fillcolor": [128]}, r"fillcolor is \[128\], neither one number nor three"),
        ("TrivialAugment", {"num_magnitude_bins": 1}, "num_magnitude_bins: 1 is too small; the least is 2"),
        ("AugMix", {"aug_prob_coeff": 0}, "aug_prob_coeff: 0 is too small; it has to be above 0"),
        ("AugMix", {"mixture_width": 0}, "mixture_width: 0 is too small; the least is 1"),
        ("AugMix", {"mixture_depth": 0}, "mixture_depth: 0 is too small; the least is 1"),
        ("AugMix", {"aug_severity": 0}, "aug_severity: 0 is too small; the least is 1"),
        ("AugMix", {"aug_severity": 11}, "aug_severity: 11 is too large; the most is 10"),
        ("AugMix", {"prob": 1.1}, "prob: 1.1 is too large; the most is 1"),
        ("Cutout", {"length": 0}, "length: 0 is too small; the least is 1"),
        ("RandomInterpolationAugment", {"prob": -1}, "prob: -1 is too small; the least is 0"),
        ("RandomApply", {"transforms": [{"ColorJiter": {}}]}, "transforms.0.ColorJiter: there is no transform"),
        ("RandomApply", {"transforms": ["ToTensor"]}, "transforms.0: 'ToTensor' is not of the form"),
        ("RandomApply", {"transforms": [{"Cutout": {}}], "p": 2}, "p: 2 is too large; the most is 1"),
    ],
)
def test_arguments_that_mean_nothing(name, arguments, message):
    with pytest.raises(ConfigError, match=f"{name}[.:].*{message}" if name != "RandomApply" else message):
        build(name, **arguments)


# --- AugMix -----------------------------------------------------------------------------------------------------------


def pillow_ops(level: float, sign: int) -> dict:
    """The nine ops on a Pillow image, by the original's strengths at a level of 0.1 to 10."""

    def moved(*matrix):
        return lambda image: image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)

    shear, share = sign * 0.03 * level, level / 30
    return {
        "autocontrast": ImageOps.autocontrast,
        "equalize": ImageOps.equalize,
        "posterize": lambda image: ImageOps.posterize(image, 4 - int(0.4 * level)),
        "rotate": lambda image: image.rotate(sign * int(3 * level), Image.Resampling.BILINEAR),
        "solarize": lambda image: ImageOps.solarize(image, 256 - int(25.6 * level)),
        "shear_x": moved(1, shear, 0, 0, 1, 0),
        "shear_y": moved(1, 0, 0, shear, 1, 0),
        "translate_x": lambda image: moved(1, 0, sign * int(share * image.width), 0, 1, 0)(image),
        "translate_y": lambda image: moved(1, 0, 0, 0, 1, sign * int(share * image.height))(image),
    }


def by_pillow(image: torch.Tensor, name: str, level: float, sign: int) -> torch.Tensor:
    result = pillow_ops(level, sign)[name](Image.fromarray(image.permute(1, 2, 0).numpy()))
    return torch.from_numpy(np.array(result)).permute(2, 0, 1)


def by_torch(image: torch.Tensor, name: str, level: float, sign: int) -> torch.Tensor:
    return rounded(AUGMIX_OPS[name](image, level, sign))


def in_plain_loops(op, image: torch.Tensor, weights: list, chains: list) -> np.ndarray:
    """(3, H, W) float64, not rounded: every chain computed, op by op."""
    mixed = (1 - sum(weights)) * image.double().numpy()
    for weight, chain in zip(weights, chains, strict=True):
        part = image
        for drawn_op in chain:
            part = op(part, *drawn_op)
        mixed += weight * part.double().numpy()
    return mixed


def grained(height: int = 40, width: int = 48) -> torch.Tensor:
    """The photograph with grain, so that a pixel off by one is seen."""
    noise = torch.randint(-30, 31, (3, height, width), generator=torch.Generator().manual_seed(0))
    return (photo(height, width).int() + noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("name", AUGMIX_OPS)
@pytest.mark.parametrize("level", [0.1, 0.9, 4.2, 9.9])
@pytest.mark.parametrize("sign", [-1, 1])
def test_each_op_of_augmix_is_pillows(name, level, sign):
    image = grained()
    assert (by_torch(image, name, level, sign).int() - by_pillow(image, name, level, sign).int()).abs().max() <= 1
    assert torch.equal(image, grained())


def shares(coeff: float, width: int) -> tuple:
    return Beta(coeff, coeff), Dirichlet(torch.full((width,), coeff))


@pytest.mark.parametrize(
    ("coeff", "width", "depth", "severity"),
    [(0.1, 3, 1, 1), (1.0, 4, 1, 10), (0.3, 1, 1, 5), (1.0, 3, -1, 3), (1.0, 2, 3, 1)],
)
@pytest.mark.parametrize("last", [False, True])
def test_augmix_agrees_with_plain_loops_from_the_same_draws(coeff, width, depth, severity, last):
    image = grained()
    image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1) if last else image  # as decoders give it
    op, skipped = (
        build("AugMix", prob=1.0, aug_prob_coeff=coeff, mixture_width=width, mixture_depth=depth, aug_severity=severity)
        .transforms[1]
        .transforms[0],
        0,
    )
    for seed in range(40):
        torch.manual_seed(seed)
        result = op(image)
        torch.manual_seed(seed)
        weights, chains = drawn(*shares(coeff, width), depth, severity)
        # a level that Pillow cuts off could become sixteen where another op of the chain follows
        expected = in_plain_loops(by_pillow if depth == 1 else by_torch, image, weights, chains)
        off = result.numpy() - expected
        assert np.abs(off).max() <= 1.5, (seed, weights, chains)  # 1, and half by rounding
        assert depth == 1 or abs(off.mean()) < 0.3  # rounded, not cut off
        skipped += torch.equal(result, image)
    assert torch.equal(image, grained()) and (skipped > 0 or coeff > 0.1)


@pytest.mark.parametrize(("coeff", "width"), [(0.1, 3), (1.0, 3), (1.0, 5)])
def test_weights_of_augmix_are_of_the_distributions(coeff, width):
    torch.manual_seed(0)
    weights = torch.tensor([drawn(*shares(coeff, width), 1, 1)[0] for _ in range(3000)])
    total = weights.sum(1)
    assert total.mean() == pytest.approx(0.5, abs=0.03)
    assert total.var() == pytest.approx(0.25 / (2 * coeff + 1), rel=0.1)  # Beta's
    share = (weights / total[:, None])[total > 1e-30]
    assert share.mean(0).tolist() == pytest.approx([1 / width] * width, abs=0.03)
    variance = (width - 1) / width**2 / (width * coeff + 1)  # Dirichlet's
    assert share.var(0).tolist() == pytest.approx([variance] * width, rel=0.15)


def test_ops_levels_and_lengths_of_augmix_are_uniform():
    torch.manual_seed(0)
    chains = [chain for _ in range(1500) for chain in drawn(*shares(1.0, 3), -1, 7)[1]]
    lengths = np.bincount([len(chain) for chain in chains])
    names, levels, signs = zip(*(op for chain in chains for op in chain), strict=True)
    assert len(lengths) == 4 and lengths[0] == 0 and lengths[1:].min() > 1350
    assert set(names) == set(AUGMIX_OPS) and min(map(names.count, AUGMIX_OPS)) > 0.9 * len(names) / 9
    assert 0.1 <= min(levels) < 0.15 and 6.95 < max(levels) <= 7 and np.mean(levels) == pytest.approx(3.55, abs=0.1)
    assert set(signs) == {-1, 1} and abs(np.mean(signs)) < 0.05


def test_strengths_of_augmix_grow_with_its_severity():
    means = []
    for severity in (1, 3, 10):
        op = build("AugMix", prob=1.0, aug_prob_coeff=1.0, aug_severity=severity)
        torch.manual_seed(0)
        means.append(np.mean([(op(grained()).int() - grained().int()).abs().float().mean() for _ in range(150)]))
    assert means[0] > 1 and means[1] > 1.2 * means[0] and means[2] > 1.4 * means[1]


def test_augmix_is_the_image_without_probability_and_reproducible_from_a_seed_in_another_process():
    assert all(torch.equal(build("AugMix", prob=0.0)(photo()), photo()) for _ in range(20))
    op, results = build("AugMix", prob=1.0, aug_prob_coeff=1, mixture_depth=-1), []
    for each in (op, pickle.loads(pickle.dumps(op))):
        with seeded(3):
            results.append(each(grained()))
        torch.rand(7)
    assert torch.equal(*results) and not torch.equal(results[0], grained())
    with seeded(4):
        assert not torch.equal(op(grained()), results[0])


# --- Single ops -------------------------------------------------------------------------------------------------------


def test_cutout_by_the_number_and_area_of_its_holes():
    torch.manual_seed(0)
    one, two, areas = build("Cutout", length=8), build("Cutout", n_holes=2, length=8), []
    image = torch.ones(3, 40, 40)
    for _ in range(200):
        hole = (one(image) == 0).any(0)
        height, width = hole.any(1).sum(), hole.any(0).sum()
        assert hole.sum() == height * width and height <= 8 and width <= 8
        areas.append(int(hole.sum()))
    assert max(areas) == 64 and min(areas) >= 16 and areas.count(64) > 100
    both = [int((two(image) == 0).any(0).sum()) for _ in range(200)]
    assert max(both) == 128 and min(both) >= 16 and (image == 1).all()
    assert (build("Cutout", length=200)(image) == 0).all()


def test_a_lower_resolution_keeps_size_and_flat_colour():
    torch.manual_seed(0)
    op, flat = build("RandomInterpolationAugment"), torch.full((3, 33, 21), 77, dtype=torch.uint8)
    for image in (flat, flat.float() / 255):
        for _ in range(30):
            torch.testing.assert_close(op(image), image, rtol=0, atol=1e-6)
    noise = torch.randint(256, (3, 40, 48), dtype=torch.uint8)
    results = [op(noise) for _ in range(30)]
    assert all(result.shape == noise.shape and result.dtype == torch.uint8 for result in results)
    assert np.mean([result.float().std() for result in results]) < 0.95 * noise.float().std()
    assert torch.equal(build("RandomInterpolationAugment", prob=0.0)(noise), noise)


def test_a_list_applied_together():
    grey_flip = build("RandomApply", transforms=[{"RandomGrayscale": {"p": 1.0}}, {"RandFlipImage": {"prob": 1.0}}])
    torch.manual_seed(0)
    both, results = v2.functional.rgb_to_grayscale(photo(), 3).flip(2), [grey_flip(photo()) for _ in range(200)]
    assert {torch.equal(r, both) or torch.equal(r, photo()) for r in results} == {True}
    assert 70 < sum(torch.equal(r, both) for r in results) < 130


# --- Batches ----------------------------------------------------------------------------------------------------------


def batch(rows: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of one value each, which is the row's own, and labels in pairs, as an identity sampler draws them."""
    return torch.arange(1.0, rows + 1).view(-1, 1, 1, 1).expand(-1, 3, 10, 8).clone(), torch.arange(rows) // 2 % CLASSES


@pytest.mark.parametrize("name", BATCH_TRANSFORMS)
def test_every_batch_transform(name):
    mix = mixing({name: BATCH[name]})
    copy = pickle.loads(pickle.dumps(mix))
    results = []
    for other, op in enumerate((mix, copy)):
        random.seed(other)
        np.random.seed(other)
        torch.manual_seed(4)
        images, labels = batch()
        results.append([op(images, labels) for _ in range(4)])
        assert torch.equal(images, batch()[0]) and torch.equal(labels, batch()[1])
    for (images, labels), (again, same) in zip(*results, strict=True):
        assert torch.equal(images, again) and torch.equal(labels, same)
        assert images.shape == (12, 3, 10, 8) and images.dtype == torch.float32 and images.isfinite().all()
        assert labels.shape == (12, CLASSES) and labels.dtype == torch.float32
        torch.testing.assert_close(labels.sum(1), torch.ones(12))


def test_mixup_is_a_convex_combination_of_two_rows_and_their_labels():
    torch.manual_seed(0)
    mix, (images, labels), partners = mixing({"MixupOperator": {"alpha": 1.0}}), batch(), []
    for _ in range(40):
        mixed, soft = mix(images, labels)
        fits = []
        for row in range(12):
            others = [o for o in range(12) if labels[o] != labels[row]]
            weight = soft[row, labels[row]]
            value = [weight * images[row] + (1 - weight) * images[other] for other in others]
            fits += [
                any(
                    torch.allclose(mixed[row], v, atol=1e-4) and soft[row, labels[o]] > 0
                    for v, o in zip(value, others, strict=True)
                )
                or bool(weight > 0.9999)
            ]
            partners.append(bool(weight > 0.9999))
        assert all(fits)
    assert np.mean(partners) < 0.25  # with the row before, half of the partners would share the label


def test_cutmix_replaces_as_large_a_share_of_the_image_as_of_the_label():
    torch.manual_seed(0)
    mix, (images, labels), replaced = mixing({"CutmixOperator": {"alpha": 1.0}}), batch(), []
    for _ in range(40):
        mixed, soft = mix(images, labels)
        for row in range(12):
            values = mixed[row].unique().tolist()
            assert set(values) <= set(images.unique().tolist()) and len(values) <= 2
            other = next((v for v in values if v != row + 1), None)
            share = (mixed[row, 0] == other).float().mean() if other else torch.tensor(0.0)
            if other and labels[int(other) - 1] != labels[row]:
                torch.testing.assert_close(soft[row, labels[int(other) - 1]], share)
                torch.testing.assert_close(soft[row, labels[row]], 1 - share)
                replaced.append(float(share))
            else:
                assert soft[row, labels[row]] == pytest.approx(1)
    assert len(replaced) > 200 and max(replaced) > 0.5


def test_one_of_several_by_their_probabilities():
    torch.manual_seed(0)
    mix = mixing({"OpSampler": {"MixupOperator": {"prob": 0.5}, "CutmixOperator": {"prob": 0.2, "alpha": 20.0}}})
    images, labels = batch()
    kinds = {"mixed": 0, "cut": 0, "neither": 0}
    for _ in range(300):
        mixed, soft = mix(images, labels)
        plain, flat = torch.equal(mixed, images), all(len(row.unique()) == 1 for row in mixed)
        kinds["neither" if plain else "mixed" if flat else "cut"] += 1
        assert not plain or torch.equal(soft, torch.nn.functional.one_hot(labels, CLASSES).float())
    assert kinds == {
        "mixed": pytest.approx(150, abs=30),
        "cut": pytest.approx(60, abs=25),
        "neither": pytest.approx(90, abs=30),
    }


def test_a_batch_of_one_and_no_list():
    images, labels = batch(1)
    mixed, soft = mixing({"MixupOperator": {}})(images, labels)
    torch.testing.assert_close(mixed, images)
    assert soft.tolist() == [[1.0] + [0.0] * (CLASSES - 1)]
    assert mixing() is None and build_batch_transform({"DataLoader": {"Train": {"dataset": {}}}}, 3) is None
    mix = mixing({"CutmixOperator": {"class_num": CLASSES}})
    assert mix(*default_collate([(i, int(y)) for i, y in zip(*batch(), strict=True)]))[1].shape == (12, CLASSES)


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ([{"MixupOperator": {}}, {"CutmixOperator": {}}], ": lists MixupOperator and CutmixOperator, .* one OpSampler"),
        ([{"MixupOperator": {"alpha": 0}}], r"\.0\.MixupOperator\.alpha: 0 is too small; it has to be above 0"),
        ([{"MixupOperator": {"class_num": 5}}], r"\.MixupOperator\.class_num is 5, but the number of training .* is 7"),
        ([{"MixupOperator": {"beta": 1}}], r"\.MixupOperator\.beta: MixupOperator has no such argument"),
        ([{"FmixOperator": {}}], "there is no batch transform 'FmixOperator'; did you mean "),
        ([{"OpSampler": {}}], r"\.OpSampler: the probabilities are \[\], and OpSampler needs at least one"),
        ([{"OpSampler": {"MixupOperator": {}}}], r"\.OpSampler: MixupOperator\.prob is None, not the probability"),
        ([{"OpSampler": {"MixupOperator": {"prob": 0.7}, "CutmixOperator": {"prob": 0.4}}}], "of 1 together at most"),
        ([{"OpSampler": {"CutmixOperator": {"prob": 0.4, "alpha": -1}}}], r"CutmixOperator\.alpha: -1 is too small"),
        ([{"OpSampler": {"CutmixOperator": {"prob": 0.4, "class_num": 3}}}], r"CutmixOperator\.class_num is 3, but"),
        (
            [{"OpSampler": {"FmixOperator": {"prob": 0.4}}}],
            r"\.OpSampler\.FmixOperator: OpSampler has no such argument",
        ),
        ([{"OpSampler": {"MixupOperator": 0.5}}], r"\.OpSampler\.MixupOperator: 0\.5 is a float"),
        (["MixupOperator"], "'MixupOperator' is not of the form"),
    ],
)
def test_batch_transforms_that_mean_nothing(ops, message):
    with pytest.raises(ConfigError, match=rf"^DataLoader\.Train\.dataset\.batch_transform_ops.*{message}"):
        mixing(*ops)


def test_the_place_of_batch_transforms_in_a_file():
    cfg = {"DataLoader": {"Train": {"dataset": {"batch_transform_ops": [{"MixupOperator": {"alpha": 0.2}}]}}}}
    assert [where for where, _, registry in named_sections(cfg) if registry is BATCH_TRANSFORMS] == [
        "DataLoader.Train.dataset.batch_transform_ops.0.MixupOperator"
    ]
