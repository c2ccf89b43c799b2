"""Heads: the original's numbers, plain loops, and gradients that stay finite where others give NaN."""

import json
import math
import re
import runpy
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import recnb.losses.distillation
import recnb.losses.hashing  # noqa: F401, so that all losses are known
from recnb.losses.combined import LOSSES, CELoss
from recnb.losses.memories import CenterLoss
from recnb.models.heads import HEADS, ArcMargin, cosine, frequency_margins, unit
from recnb.models.necks import FC

DATA = Path(__file__).parents[1] / "data"
ARRAYS = np.load(DATA / "oracle.npz")
CASES = [case for case in json.loads((DATA / "oracle.json").read_text()) if case["kind"] == "head"]
BRANCHES = [
    {"margin": 0.15, "scale": 32.0},
    {"margin": 0.5, "scale": 80.0},
    {"margin": 0.2, "scale": 30.0, "easy_margin": True},
]


def arrays(*names):
    return [torch.from_numpy(ARRAYS[name]) for name in names]


def arc_margin(weight, **args):
    head = ArcMargin(weight.shape[1], len(weight), **args)
    head.load_state_dict({"weight": weight})
    return head


def problem(seed=0, rows=12, classes=5, size=6):
    """Features, labels and class weights; the first two features lie along and against their class weight."""
    draw = torch.Generator().manual_seed(seed)
    weight, labels = torch.randn(classes, size, generator=draw), torch.arange(rows) % classes
    features = torch.randn(rows, size, generator=draw)
    features[0], features[1] = 3 * weight[labels[0]] + 0.1, -2 * weight[labels[1]] + 0.1
    return features, labels, weight


def plain_logits(features, labels, weight, margin, scale, easy_margin=False):
    logits = np.zeros((len(features), len(weight)))
    for i, x in enumerate(features):
        for j, w in enumerate(weight):
            c = sum(a * b for a, b in zip(x, w, strict=True)) / math.dist(x, 0 * x) / math.dist(w, 0 * w)
            if j == labels[i]:
                phi = c * math.cos(margin) - math.sqrt(1 - c * c + 1e-6) * math.sin(margin)
                if easy_margin:
                    c = phi if c > 0 else c
                else:
                    c = phi if c > math.cos(math.pi - margin) else c - margin * math.sin(math.pi - margin)
            logits[i, j] = scale * c
    return logits


def plain_cross_entropy(features, labels, weight, **args):
    rows = plain_logits(features, labels, weight, **args)
    return sum(np.log(np.exp(row - row[y]).sum()) for row, y in zip(rows, labels, strict=True)) / len(rows)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["key"])
def test_each_margin_head_is_the_original(case, device):
    def arrays(*names):
        return [torch.from_numpy(ARRAYS[name]).to(device) for name in names]

    features, labels, weight = arrays("head/features", "head/labels", "head/weight")
    features.requires_grad_()
    head = HEADS[case["name"]](**case["args"]).to(device)
    head.load_state_dict({"weight": weight.T}, strict=False)
    logits = head(features, labels)
    F.cross_entropy(logits, labels).backward()
    torch.testing.assert_close(logits, *arrays(f"{case['key']}/logits"), rtol=1e-5, atol=2e-4)
    # The original's softmax on a CPU takes whatever is more than 64 below the largest logit for exactly 64 below.
    shifted = (logits - logits.amax(1, keepdim=True)).clamp_min(-64)
    assert F.cross_entropy(shifted, labels).item() == pytest.approx(case["ce"], rel=1e-5)
    torch.testing.assert_close(features.grad, *arrays(f"{case['key']}/grad_features"), rtol=1e-3, atol=1e-4)
    if case["name"] != "AdaMargin":  # the original has no evaluation of it, and its weight is not a leaf
        torch.testing.assert_close(head.weight.grad.T, *arrays(f"{case['key']}/grad_weight"), rtol=1e-3, atol=1e-4)
        wanted = arrays(f"{case['key']}/eval_logits")
        torch.testing.assert_close(head.eval()(features, labels), *wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(HEADS) - {"FC"}))
def test_every_margin_head_is_the_cosine_without_labels_and_safe_at_the_ends(name):
    features, labels, weight = problem()
    features[3] = 0
    features[:2] = torch.stack([weight[labels[0]], -weight[labels[1]]])
    features.requires_grad_()
    head = HEADS[name](6, 5, **({"margin": 0.3, "scale": 16} if name == "CircleMargin" else {}))
    head.load_state_dict({"weight": weight}, strict=False)
    assert torch.equal(head(features), cosine(features, weight))
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(features, labels)
        F.cross_entropy(logits, labels).backward()
    assert logits.dtype == torch.float32 and features.grad[3].eq(0).all()
    assert features.grad.isfinite().all() and head.weight.grad.isfinite().all()
    state = {key: value.clone() for key, value in head.state_dict().items()}
    assert torch.equal(head.eval()(features, labels), cosine(features, weight))
    assert all(torch.equal(value, state[key]) for key, value in head.state_dict().items())


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/python.md"])
def test_the_ten_lines_of_the_docs_pass_what_every_head_does(page, tmp_path):
    from test_model import test_every_head  # here, so that it is not collected twice

    (block,) = re.findall(r"```python\n((?:(?!```).)*@HEADS\.register.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (tmp_path / "head.py").write_text(block)
    with patch.dict(HEADS):
        runpy.run_path(str(tmp_path / "head.py"))
        test_every_margin_head_is_the_cosine_without_labels_and_safe_at_the_ends("NormSoftmax")
        test_every_head("NormSoftmax", tmp_path, "cpu")


def test_cos_and_circle_margin_are_the_plain_loop():
    features, labels, weight = problem()
    for name in ("CosMargin", "CircleMargin"):
        head = HEADS[name](6, 5, margin=0.3, scale=16)
        head.load_state_dict({"weight": weight})
        logits = head(features, labels)
        for i, j in np.ndindex(*logits.shape):
            c, target = F.cosine_similarity(features[i], weight[j], dim=0).item(), labels[i].item() == j
            wanted = c - 0.3 * target
            if name == "CircleMargin":
                wanted = max(1.3 - c, 0) * (c - 0.7) if target else max(c + 0.3, 0) * (c - 0.3)
            assert logits[i, j].item() == pytest.approx(16 * wanted, abs=1e-4)


def test_ada_margin_asks_more_of_long_features():
    features, labels, weight = problem(rows=20)
    features = F.normalize(features) * torch.linspace(1, 40, 20)[:, None]
    head = HEADS["AdaMargin"](6, 5, t_alpha=0.5)
    head.load_state_dict({"weight": weight}, strict=False)
    logits = head(features, labels).detach() / 64
    length = features.norm(dim=1)
    assert head.mean.item() == pytest.approx(0.5 * 20 + 0.5 * length.mean().item(), rel=1e-5)
    assert head.std.item() == pytest.approx(0.5 * 100 + 0.5 * length.std().item(), rel=1e-5)
    for i, j in enumerate(labels.tolist()):
        g = max(-1.0, min(1.0, 0.333 * (length[i].item() - head.mean.item()) / (head.std.item() + 1e-3)))
        theta = math.acos(max(-0.999, min(0.999, cosine(features, weight)[i, j].item())))
        wanted = math.cos(min(max(theta - 0.4 * g, 1e-3), math.pi - 1e-3)) - 0.4 * (1 + g)
        assert logits[i, j].item() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("args", BRANCHES)
def test_arc_margin_is_the_plain_loop(args):
    features, labels, weight = problem()
    logits = arc_margin(weight, **args)(features, labels)
    wanted = plain_logits(features.double().numpy(), labels.numpy(), weight.double().numpy(), **args)
    np.testing.assert_allclose(logits.detach().numpy(), wanted, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("args", BRANCHES)
def test_arc_margin_slopes_as_the_plain_loop(args):
    features, labels, weight = problem(rows=4, classes=3, size=3)
    head = arc_margin(weight, **args)
    features.requires_grad_()
    F.cross_entropy(head(features, labels), labels).backward()
    for given, gradient in ((features, features.grad), (head.weight, head.weight.grad)):
        inputs = {"features": features.detach().double().numpy(), "weight": head.weight.detach().double().numpy()}
        moved = inputs["features" if given is features else "weight"]
        for at in np.ndindex(*moved.shape):
            moved[at] += 1e-6
            above = plain_cross_entropy(**inputs, labels=labels.numpy(), **args)
            moved[at] -= 2e-6
            below = plain_cross_entropy(**inputs, labels=labels.numpy(), **args)
            moved[at] += 1e-6
            assert gradient[at].item() == pytest.approx((above - below) / 2e-6, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("sign", [1, -1], ids=["parallel", "anti-parallel"])
@pytest.mark.parametrize("args", BRANCHES)
def test_gradient_is_finite_along_the_class_weight(args, sign):
    for seed in range(200):
        draw = torch.Generator().manual_seed(seed)
        weight = torch.randn(3, 16, generator=draw)
        steps = torch.tensor([0, 1e-7, 1e-4])[:, None] * torch.randn(3, 16, generator=draw)
        features = (sign * (1 + seed) * (weight[:1] + steps)).requires_grad_()
        head, labels = arc_margin(weight, **args), torch.zeros(3, dtype=torch.long)
        F.cross_entropy(head(features, labels), labels).backward()
        assert features.grad.isfinite().all() and head.weight.grad.isfinite().all(), seed


def test_a_feature_that_is_the_weight_itself():
    weight = torch.eye(4)
    head = arc_margin(weight)
    features = torch.cat([weight, -weight]).requires_grad_()
    labels = torch.arange(8) % 4
    logits = head(features, labels)
    F.cross_entropy(logits, labels).backward()
    assert logits[0, 0].item() / 80 == pytest.approx(math.cos(0.5) - math.sqrt(1e-6) * math.sin(0.5), abs=1e-6)
    assert logits[4, 0].item() / 80 == pytest.approx(-1 - 0.5 * math.sin(0.5), abs=1e-6)
    assert features.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_zero_feature_has_cosine_zero_and_no_gradient():
    features, labels, weight = problem()
    features[3] = 0
    features.requires_grad_()
    head = arc_margin(weight)
    logits = head(features, labels)
    F.cross_entropy(logits, labels).backward()
    assert head(features)[3].eq(0).all() and logits.isfinite().all()
    assert features.grad[3].eq(0).all() and features.grad.isfinite().all() and head.weight.grad.isfinite().all()
    assert features.grad[4].ne(0).any()


def test_unit_keeps_zero_rows():
    rows = unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_meet_a_float32_weight(dtype):
    features, labels, weight = problem()
    head = arc_margin(weight)
    half = features.to(dtype).requires_grad_()
    logits = head(half, labels)
    F.cross_entropy(logits, labels).backward()
    assert logits.dtype == head.weight.dtype == head.weight.grad.dtype == torch.float32
    assert torch.equal(logits, head(half.float(), labels)) and half.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    features, labels, weight = problem()
    head = arc_margin(weight)
    with torch.autocast("cpu", dtype=dtype):
        logits, plain = head(features, labels), head(features)
        F.cross_entropy(logits, labels).backward()
    assert torch.equal(logits, head(features, labels)) and torch.equal(plain, head(features))
    assert head.weight.dtype == head.weight.grad.dtype == logits.dtype == torch.float32


def test_without_labels_or_in_evaluation_it_is_the_cosine():
    features, labels, weight = problem()
    head = arc_margin(weight, margin=0.3, scale=7)
    wanted = torch.tensor(plain_logits(features.numpy(), labels, weight.numpy(), margin=0, scale=1)).float()
    for mode in (True, False):
        torch.testing.assert_close(head.train(mode)(features), F.cosine_similarity(features[:, None], weight, dim=-1))
    assert torch.equal(head(features, labels), cosine(features, weight))
    others = F.one_hot(labels, len(weight)) == 0
    torch.testing.assert_close(cosine(features, weight)[others], wanted[others])
    torch.testing.assert_close(head.train()(features, labels)[others], 7 * wanted[others])


def test_easy_margin_leaves_obtuse_angles_alone():
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    features, labels = torch.tensor([[1.0, 1.0], [-1.0, 1.0]]), torch.tensor([0, 0])
    easy, hard = (arc_margin(weight, margin=0.4, scale=1, easy_margin=easy)(features, labels) for easy in (True, False))
    assert easy[0, 0].item() == pytest.approx(math.cos(math.pi / 4 + 0.4), abs=1e-5)
    assert easy[1, 0].item() == pytest.approx(math.cos(3 * math.pi / 4), abs=1e-6)
    assert hard[1, 0].item() == pytest.approx(math.cos(3 * math.pi / 4 + 0.4), abs=1e-5)


def test_fc_head_is_linear_with_and_without_labels():
    head = FC(6, 4)
    features = torch.randn(3, 6)
    assert torch.equal(head(features, torch.tensor([0, 1, 2])), head(features))
    torch.testing.assert_close(head(features), features @ head.fc.weight.T)
    assert head.fc.bias.eq(0).all() and FC(6, 4, bias_attr=False).fc.bias is None


def test_the_nearest_sub_center_is_the_class():
    features, labels, _ = problem()
    head = ArcMargin(6, 5, margin=0.3, scale=16, sub_centers=3)
    centres = head.weight.detach().view(5, 3, 6)
    for plain in (True, False):
        logits = head(features) if plain else head(features, labels)
        for i, j in np.ndindex(*logits.shape):
            c = max(F.cosine_similarity(features[i], centre, dim=0).item() for centre in centres[j])
            if not plain:
                theta = math.acos(c)
                own = math.cos(theta + 0.3) if theta < math.pi - 0.3 else c - 0.3 * math.sin(0.3)
                c = 16 * (own if j == labels[i] else c)
            assert logits[i, j].item() == pytest.approx(c, abs=1e-3)
    F.cross_entropy(logits, labels).backward()
    moved = head.weight.grad.view(5, 3, 6).abs().sum(2) > 0
    nearest = F.cosine_similarity(features[:, None, None], centres, dim=-1).argmax(2)  # (12, 5)
    assert all(moved[j, k].item() == (k in nearest[:, j]) for j in range(5) for k in range(3))
    with pytest.raises(ValueError, match="sub_centers is 0"):
        ArcMargin(6, 5, sub_centers=0)


def test_rare_classes_get_larger_margins():
    counts, low, high = [1, 16, 81, 10_000], 0.1, 0.4
    margins = frequency_margins(counts, low=low, high=high).tolist()
    wanted = [n**-0.25 for n in counts]  # 1, 1/2, 1/3, 1/10
    assert margins == pytest.approx([low + (high - low) * (w - 0.1) / 0.9 for w in wanted])
    assert frequency_margins([5, 5]).tolist() == pytest.approx([0.05, 0.05])
    features, labels, weight = problem(classes=4)
    by = {"by": "frequency", "low": low, "high": high}
    head = arc_margin(weight, margin=by, class_counts=counts)
    logits = head(features, labels)
    for i, label in enumerate(labels.tolist()):
        alone = arc_margin(weight, margin=margins[label])(features[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(logits[i : i + 1], alone)
    assert list(head.state_dict()) == ["weight"]
    without = arc_margin(weight, margin=by)  # a trained run, opened where its lists are not
    assert torch.equal(without(features), head(features))
    with pytest.raises(ValueError, match="needs class_counts"):
        without(features, labels)
    with pytest.raises(ValueError, match="a margin by 'size' does not exist"):
        arc_margin(weight, margin={"by": "size"})


def test_without_a_margin_it_is_the_normalised_softmax():
    features, labels, weight = problem()
    head = HEADS["CosMargin"](6, 5, margin=0, scale=16)
    head.load_state_dict({"weight": weight})
    wanted = 16 * F.normalize(features) @ F.normalize(weight).T
    torch.testing.assert_close(head(features, labels), wanted)


@pytest.mark.parametrize("label", [5, -1])
def test_a_label_beyond_the_classes_is_one_sentence(label):
    y, features = torch.tensor([0, label]), torch.randn(2, 6)
    out = {"features": features, "logits": torch.randn(2, 5), "a": {"logits": torch.randn(2, 5)}}
    margins = set(HEADS) - {"FC"}
    heads = [HEADS[name](6, 5, **({"margin": 0.3, "scale": 16} if name == "CircleMargin" else {})) for name in margins]
    losses = [CELoss(), CenterLoss(5, 6), LOSSES["DSHSDLoss"](alpha=0.1), LOSSES["DistillationGTCELoss"](["a"])]
    for part in (*(partial(head, features) for head in heads), *(partial(loss, out) for loss in losses)):
        with pytest.raises(ValueError, match=f"a label is {label}, not among the 5 classes of "):
            part(y)
