"""Blocks computed again: the gradients of a backbone that keeps everything, wherever it is cut, with less in memory."""

import copy

import pytest
import torch
from conftest import make
from safetensors.torch import load_file

from recnb.models.backbones import create_backbone
from recnb.models.chunks import recompute_blocks
from recnb.models.recmodel import RecModel
from recnb.registry import ConfigError
from recnb.training.adaptor import Callback

CASES = [
    ("test_resnet", None, 32, {}),
    ("test_resnet", "layer3", 32, {}),
    ("test_resnet", "layer2.0.conv2", 32, {}),
    ("resnet18", "layer2", 32, {"drop_path_rate": 0.3}),
    ("test_convnext", None, 32, {"drop_path_rate": 0.3}),
    ("test_convnext", "stages.1.blocks.0", 32, {}),
    ("test_vit", None, 160, {"proj_drop_rate": 0.2}),
    ("test_vit", "blocks.1", 160, {}),
    ("test_vit", "blocks.3.mlp.fc1", 160, {}),
    ("swin_tiny_patch4_window7_224", "layers.1", 224, {"embed_dim": 12, "depths": (2, 2, 2, 2)}),
    ("test_efficientnet", None, 32, {"drop_path_rate": 0.3}),
    ("test_efficientnet", "blocks.2", 32, {}),
    ("densenet121", "features.denseblock2", 32, {"drop_rate": 0.2}),
    ("PPLCNetV2_base", "stages[1]", 32, {}),
    ("WideResNet", "flatten", 32, {"depth": 10}),
]


def trained(backbone, x, chunk=None):
    """(gradients, buffers, how many bytes autograd keeps from the forward pass) of a backward pass."""
    torch.manual_seed(3)
    kept = []
    model = RecModel(backbone).train()
    model.grad_cache = chunk
    own = {p.data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = model(x)["backbone"]
    size = sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept if t.data_ptr() not in own}.values()
    )
    out.square().sum().backward()
    return [p.grad for p in model.parameters()], list(model.buffers()), size


@pytest.mark.parametrize(("name", "stop", "size", "options"), CASES, ids=lambda value: str(value)[:40])
def test_gradients_and_statistics_are_those_of_a_backbone_that_keeps_everything(name, stop, size, options):
    plain = create_backbone(name, stop=stop, input_size=(3, size, size), **options).double()
    again, x = copy.deepcopy(plain), torch.randn(2, 3, size, size, dtype=torch.float64)
    recompute_blocks(again)
    copied = copy.deepcopy(again)  # as for a moving average
    for p in copied.parameters():
        p.data.zero_()
    gradients, buffers, all_kept = trained(plain, x)
    found, statistics, kept = trained(again, x)
    assert all(torch.equal(a, b) for a, b in zip(gradients, found, strict=True))
    assert all(map(torch.equal, buffers, statistics))
    assert kept < 0.9 * all_kept, (kept, all_kept)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), again.eval()(x)) and not torch.equal(copied.eval()(x), again(x))


def test_together_with_chunks():
    plain = create_backbone("test_vit", input_size=(3, 160, 160)).double()
    again, x = copy.deepcopy(plain), torch.randn(4, 3, 160, 160, dtype=torch.float64)
    recompute_blocks(again)
    for ours, theirs in zip(trained(plain, x)[0], trained(again, x, chunk=2)[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_together_with_the_compiler():
    plain = create_backbone("test_resnet", input_size=(3, 32, 32)).double()
    again, x = copy.deepcopy(plain), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    recompute_blocks(again)
    again.compile(backend="aot_eager")
    gradients, buffers, all_kept = trained(plain, x)
    found, statistics, kept = trained(again, x)
    torch.testing.assert_close([*gradients, *buffers], [*found, *statistics])
    assert kept < 0.9 * all_kept


def test_the_key_changes_no_bit_of_a_training_and_may_be_set_on_the_way(config_file, tmp_path):
    changes = {"Arch.Backbone.drop_rate": 0.2, "EMA": {"decay": 0.9}}
    make(config_file, tmp_path / "plain", changes).fit_config()
    learn = make(config_file, tmp_path / "again", changes)
    with pytest.raises(RuntimeError, match="stopped"):
        learn.add_cb(Stop()).fit_config()
    learn = make(config_file, tmp_path / "again", {**changes, "Global.grad_checkpointing": True})
    assert "forward" in vars(learn.model.backbone.model.layer1[0])
    learn.fit_config()
    plain, again = (load_file(tmp_path / run / "model.safetensors") for run in ("plain", "again"))
    assert all(torch.equal(plain[key], again[key]) for key in plain)


class Stop(Callback):
    order = 100

    def after_epoch(self):
        raise RuntimeError("stopped")


@pytest.mark.parametrize("name", ["VGG11", "mnasnet0_5"])
def test_a_backbone_without_blocks_is_named(config_file, tmp_path, name):
    with pytest.raises(
        ConfigError,
        match=rf"Global.grad_checkpointing: Arch.Backbone {name} is not made of blocks "
        r"that could be computed again; set it False, and save memory with Global.grad_cache",
    ):
        make(config_file, tmp_path, {"Global.grad_checkpointing": True, "Arch.Backbone": {"name": name}})
    with pytest.raises(ConfigError, match=r"Global\.grad_checkpointing: 1 is a int, not bool"):
        make(config_file, tmp_path, {"Global.grad_checkpointing": 1})
