"""Necks: the shapes they take, how their weights start, and what their attributes change."""

import math

import pytest
import torch

from recnb.models.necks import FC, INITIALIZERS, NECKS, BNNeck, VehicleNeck, Whitening, initialize
from recnb.registry import ConfigError

WIDE = (96, 64)  # large enough for the spread of random weights to be measured
SPREAD = {  # name: (arguments, the standard deviation for WIDE weights, the largest absolute value)
    "Normal": ({"std": 0.02}, 0.02, None),
    "Constant": ({"value": 0.5}, 0.0, 0.5),
    "KaimingUniform": ({}, math.sqrt(2 / 64), math.sqrt(6 / 64)),
    "KaimingNormal": ({}, math.sqrt(2 / 64), None),
    "XavierNormal": ({}, math.sqrt(2 / (96 + 64)), None),
}


def initialized(section, shape=WIDE):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.full(shape, math.nan))
    initialize(weight, {"initializer": section}, {"name": "Constant"})
    return weight.detach()


def test_vehicle_neck_takes_vectors_and_maps():
    neck = VehicleNeck(8, 5)
    x = torch.randn(3, 8)
    assert neck(x).shape == (3, 5) and torch.equal(neck(x), neck(x[:, :, None, None]))
    maps = torch.randn(3, 8, 4, 2)
    torch.testing.assert_close(neck(maps), neck.conv(maps).reshape(3, -1))
    assert neck(maps).shape == (3, 40) and VehicleNeck(8, 5, kernel_size=3, stride=2, padding=1)(maps).shape == (3, 10)


def test_vehicle_neck_starts_as_the_original():
    torch.manual_seed(0)
    neck = VehicleNeck(64, 128, kernel_size=3)
    assert neck.conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)
    assert abs(neck.conv.weight.mean().item()) < 1e-3 and neck.conv.bias.eq(0).all()


@pytest.mark.parametrize(
    ("bias_attr", "value"),
    [(None, 0), (True, 0), ({}, 0), (False, None), ({"initializer": {"name": "Constant", "value": 2.0}}, 2)],
    ids=str,
)
def test_bias_attributes(bias_attr, value):
    for bias in (VehicleNeck(4, 3, bias_attr=bias_attr).conv.bias, FC(4, 3, bias_attr=bias_attr).fc.bias):
        assert bias is None if value is None else bias.eq(value).all()


def test_fc_is_linear_and_starts_as_xavier():
    torch.manual_seed(0)
    neck = FC(96, 64)
    assert neck.fc.weight.std().item() == pytest.approx(math.sqrt(2 / (96 + 64)), rel=0.03) and neck.fc.bias.eq(0).all()
    x = torch.randn(2, 96)
    assert torch.equal(neck(x), neck(x[:, :, None, None]))
    torch.testing.assert_close(neck(x), x @ neck.fc.weight.T)


def test_bn_neck_normalizes_and_keeps_its_shift_at_zero():
    neck = BNNeck(6)
    y = neck(5 + 3 * torch.randn(64, 6, 1, 1))
    torch.testing.assert_close(y.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(0, unbiased=False), torch.ones(6), atol=1e-3, rtol=0)
    assert neck.bn.weight.requires_grad and not neck.bn.bias.requires_grad
    assert neck.bn.weight.eq(1).all() and neck.bn.bias.eq(0).all()


@pytest.mark.parametrize(
    ("bias_attr", "trained"),
    [
        (None, False),
        (False, False),
        (True, True),
        ({}, True),
        ({"initializer": {"name": "Constant", "value": 1.0}}, True),
    ],
    ids=str,
)
def test_bn_neck_trains_its_shift_when_asked(bias_attr, trained):
    neck = BNNeck(4, bias_attr=bias_attr)
    neck(torch.randn(8, 4)).square().sum().backward()
    assert neck.bn.bias.requires_grad is trained and (neck.bn.bias.grad is not None) is trained


def test_bn_neck_with_global_statistics():
    x = 5 + 3 * torch.randn(16, 4)
    neck = BNNeck(4, use_global_stats=True).train()
    torch.testing.assert_close(neck(x), x / math.sqrt(1 + neck.bn.eps))
    assert neck.bn.running_mean.eq(0).all() and neck.train()(x[:1]).shape == (1, 4)
    usual = BNNeck(4).train()
    usual(x)
    assert usual.bn.running_mean.gt(0).all()


def test_every_initializer_is_measured_here():
    assert set(INITIALIZERS) == set(SPREAD), "add the spread of the new initializer to SPREAD"


@pytest.mark.parametrize("name", SPREAD)
def test_initializers(name):
    args, std, bound = SPREAD[name]
    weight = initialized({"name": name, **args})
    assert weight.std().item() == pytest.approx(std, rel=0.05, abs=1e-7)
    assert bound is None or 0.97 * bound < weight.abs().max() <= bound


def test_initializers_with_a_given_fan_in():
    assert initialized({"name": "KaimingNormal", "fan_in": 8}).std().item() == pytest.approx(0.5, rel=0.05)
    assert initialized({"name": "KaimingUniform", "fan_in": 6}).abs().max().item() == pytest.approx(1, rel=0.01)
    convolution = initialized({"name": "KaimingNormal"}, (64, 16, 3, 3))
    assert convolution.std().item() == pytest.approx(math.sqrt(2 / (9 * 16)), rel=0.05)


@pytest.mark.parametrize("name", ["VehicleNeck", "FC", "BNNeck"])
def test_weight_attributes(name):
    sizes = {
        "VehicleNeck": {"in_channels": 4, "out_channels": 3},
        "FC": {"embedding_size": 4, "class_num": 3},
        "BNNeck": {"num_features": 4},
    }
    neck = NECKS[name](**sizes[name], weight_attr={"initializer": {"name": "Constant", "value": 0.25}})
    assert next(neck.parameters()).eq(0.25).all()


@pytest.mark.parametrize(
    ("attr", "message"),
    [
        ({"initializer": {"name": "KaimingNorml"}}, "no initializer 'KaimingNorml'.*did you mean 'KaimingNormal'"),
        ({"initializer": "Normal"}, "no initializer 'Normal' .written {name: Normal, std: 0.01}"),
        ({"initializer": {"std": 1.0}}, "no initializer 'None'"),
        ({"initializer": {"name": "Normal", "sdt": 1.0}}, "Normal has no argument 'sdt'; did you mean 'std'"),
        ({"trainable": True}, "no key 'trainable', only initializer, learning_rate"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0, not a share"),
        ({"regularizer": {"name": "L1"}}, "no regularizer of a parameter 'L1'"),
    ],
    ids=["name", "no mapping", "no name", "argument", "key", "rate", "regularizer"],
)
def test_unknown_attributes_are_errors(attr, message):
    with pytest.raises(ConfigError, match=f"Arch.Neck: .*{message}"):
        NECKS.build({"name": "FC", "class_num": 3, "weight_attr": attr}, "Arch.Neck", embedding_size=(4, ""))


def test_gem_is_between_the_mean_and_the_maximum():
    maps = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(NECKS["GeM"](3, p=1.0)(maps), maps.mean((2, 3)))
    torch.testing.assert_close(NECKS["GeM"](3, p=200.0)(maps), maps.amax((2, 3)), rtol=0.02, atol=0)
    wanted = [[(sum(v**3 for v in maps[b, c].flatten().tolist()) / 20) ** (1 / 3) for c in range(3)] for b in range(2)]
    torch.testing.assert_close(NECKS["GeM"](3)(maps), torch.tensor(wanted))
    assert not NECKS["GeM"](3, train_p=False).p.requires_grad


def test_gem_of_tokens_leaves_the_others_out():
    tokens = torch.rand(2, 7, 3)
    maps = tokens[:, 1:].transpose(1, 2).reshape(2, 3, 2, 3)
    assert torch.equal(NECKS["GeM"](3, prefix_tokens=1)(tokens), NECKS["GeM"](3)(maps))


def test_gem_refuses_what_is_no_map_of_its_channels():
    with pytest.raises(RuntimeError, match=r"maps \(B, 3, H, W\) .* and got \(2, 4, 4, 3\)"):
        NECKS["GeM"](3)(torch.rand(2, 4, 4, 3))


def test_tokens_take_the_class_token_or_the_mean_of_the_image():
    tokens = torch.arange(24.0).view(1, 6, 4)
    assert NECKS["Tokens"](2)(tokens).tolist() == [[0, 1, 2, 3]]
    assert NECKS["Tokens"](2, pool="mean")(tokens).tolist() == [[14, 15, 16, 17]]
    assert NECKS["Tokens"](2, pool="cls+mean")(tokens).tolist() == [[0, 1, 2, 3, 14, 15, 16, 17]]
    for pool in ("cls", "cls+mean"):
        with pytest.raises(ValueError, match="has 0 tokens before"):
            NECKS["Tokens"](0, pool=pool)


def test_tanh_and_frfn_necks():
    features = torch.randn(4, 8)
    torch.testing.assert_close(NECKS["Tanh"]()(features[:, :, None, None]), features.tanh())
    neck = NECKS["FRFNNeck"](8, 5)
    hidden = features @ neck.layers[0].weight.T + neck.layers[0].bias
    wanted = torch.where(hidden > 0, hidden, 0.1 * hidden) @ neck.layers[2].weight.T + neck.layers[2].bias
    torch.testing.assert_close(neck(features), wanted / wanted.norm(dim=1, keepdim=True))


def test_whitening_turns_to_the_principal_components_and_divides_by_their_deviation():
    vectors = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.tensor([5.0, 3, 2, 1, 1, 1])
    )
    for power, spread in ((0.0, False), (1.0, True)):
        neck = Whitening(6, dimensions=3, power=power)
        neck.fit(vectors)
        out = neck(vectors).detach()
        covariance = out.T @ out / len(out)
        torch.testing.assert_close(covariance, torch.diag(covariance.diag()), atol=1e-4, rtol=0)
        torch.testing.assert_close(covariance.trace(), torch.tensor(1.0), atol=1e-4, rtol=0)
        assert torch.allclose(covariance.diag(), torch.full((3,), 1 / 3), atol=1e-3) == spread
        assert torch.allclose(out, neck(7 * vectors), atol=1e-5)  # of the direction alone
    flat = torch.ones(20, 6)
    neck.fit(flat + 1e-3 * torch.eye(6)[torch.arange(20) % 2])  # fewer dimensions than asked for
    assert neck(flat).isfinite().all()
