"""The original's own networks: widths, counts and shapes as published, one convolution in place of the branches."""

import copy

import pytest
import timm
import torch
from torch import nn

from recnb.models.architectures import BranchedConv, PPLCNetV2, WideResNet


def images(size=64, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def shaken(model):
    """The model with batch statistics and weights that are not those of a fresh one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_(0, 0.1)
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 2)
    return model


def shapes(model, names, x):
    """What the named layers give for x."""
    found = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: found.update({name: tuple(output.shape[1:])})
        )
    model.eval()(x)
    return [found[name] for name in names]


def test_widths_of_pplcnetv2():
    # NET_CONFIG of the original's pp_lcnet_v2.py: 64, 128, 256 and 512 channels go in, twice as many come out
    names = [*(f"stages.{i}" for i in range(4)), "avg_pool", "last_conv", "flatten", "fc"]
    assert shapes(PPLCNetV2(), names, images(224, 1)) == [
        (128, 56, 56),
        (256, 28, 28),
        (512, 14, 14),
        (1024, 7, 7),
        (1024, 1, 1),
        (1280, 1, 1),
        (1280,),
        (1000,),
    ]
    assert [len(stage) for stage in PPLCNetV2().stages] == [2, 2, 6, 2]


def test_size_of_pplcnetv2_is_the_published_one():
    # docs/zh_CN/models/PP-LCNetV2.md of the original: 6.6 M parameters, those of the re-parameterised network
    model = timm.utils.reparameterize_model(PPLCNetV2())
    assert round(count(model) / 1e6, 1) == 6.6


@pytest.mark.parametrize("shitu", [False, True])
def test_branches_become_one_convolution(shitu):
    torch.manual_seed(0)
    model = shaken(PPLCNetV2(class_num=8, shitu=shitu)).eval()
    merged = timm.utils.reparameterize_model(model)
    branched = [module for module in model.modules() if isinstance(module, BranchedConv)]
    assert [[branch.conv.kernel_size[0] for branch in module.dw_conv_list] for module in branched] == [
        [5, 3],
        *[[5, 3, 1]] * 5,
        [5, 3],
        [5, 3, 1],
    ]
    assert not [name for name, _ in merged.named_parameters() if "dw_conv_list" in name]
    assert count(merged) < count(model)
    torch.testing.assert_close(merged(images()), model(images()), rtol=1e-3, atol=1e-4)
    state = copy.deepcopy(merged.state_dict())
    for module in merged.modules():
        if isinstance(module, BranchedConv):
            module.reparameterize()  # a second time changes nothing
    assert all(torch.equal(value, state[name]) for name, value in merged.state_dict().items())


def test_shitu_keeps_its_maps_and_has_no_last_activation():
    model = PPLCNetV2(class_expand=512, shitu=True)
    assert shapes(model, ["stages.2", "stages.3", "flatten"], images(224, 1)) == [(512, 14, 14), (1024, 14, 14), (512,)]
    model.fc = nn.Identity()
    plain = PPLCNetV2(class_expand=512)
    plain.fc = nn.Identity()
    assert model.eval()(images()).min() < 0 <= plain.eval()(images()).min()
    assert count(model) == count(plain)


def test_pplcnetv2_without_its_last_convolution():
    model = PPLCNetV2(use_last_conv=False, class_num=5)
    assert shapes(model, ["flatten", "fc"], images()) == [(1024,), (5,)]
    assert not any(isinstance(module, nn.Dropout) for module in model.modules())
    assert PPLCNetV2(dropout_prob=0.4).dropout.p == 0.4


@pytest.mark.parametrize(("depth", "widen", "millions"), [(28, 10, 36.5), (16, 8, 11.0), (40, 4, 8.9)])
def test_sizes_of_wide_resnets_are_those_of_the_paper(depth, widen, millions):
    with torch.device("meta"):  # table 3 of https://arxiv.org/abs/1605.07146, CIFAR-10
        assert round(count(WideResNet(depth, widen, 0.0, 10)) / 1e6, 1) == millions


@pytest.mark.parametrize(("widen", "channels"), [(2, 128), (8, 512)])
def test_widths_of_wide_resnets(widen, channels):
    model = WideResNet(28, widen, 0.0, 100)
    assert shapes(model, ["block1", "block2", "block3", "bn1", "flatten", "fc"], images(32)) == [
        (channels // 4, 32, 32),
        (channels // 2, 16, 16),
        (channels, 8, 8),
        (channels, 8, 8),
        (channels,),
        (100,),
    ]
    assert [len(model.get_submodule(f"block{i}")) for i in (1, 2, 3)] == [4, 4, 4]


def test_where_the_channels_change_only_the_first_stage_is_activated_first():
    model, seen = WideResNet(10, 2, 0.0, 10), {}
    for i in (1, 2):
        for part in ("", ".conv1", ".short"):
            model.get_submodule(f"block{i}.0{part}").register_forward_pre_hook(
                lambda module, args, key=(i, part): seen.update({key: args[0].clone()})
            )
    model.eval()(images(32))
    assert torch.equal(seen[2, ""], seen[2, ".conv1"]) and torch.equal(seen[2, ""], seen[2, ".short"])
    assert torch.equal(seen[1, ".conv1"], seen[1, ".short"]) and not torch.equal(seen[1, ""], seen[1, ".conv1"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth": 27}, "depth is 27, and a WideResNet has 6 n"),
        ({"depth": 4}, "depth is 4"),
        ({"proj": True}, "FRFNNeck"),
    ],
)
def test_wide_resnets_that_cannot_be_made(options, words):
    with pytest.raises(ValueError, match=words):
        WideResNet(**options)


@pytest.mark.parametrize("make", [PPLCNetV2, lambda: PPLCNetV2(shitu=True), lambda: WideResNet(10, 2, 0.3, 10)])
def test_every_parameter_learns_and_the_state_comes_back(make):
    torch.manual_seed(0)
    model = make().train()
    model(images(32, 4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    other = make()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(images(32)), model.eval()(images(32)))
