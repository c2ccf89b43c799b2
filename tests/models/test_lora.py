"""Low-rank adaptation: what is trained, what the products compute, and that nothing of them is left once merged."""

import sys

import pytest
import torch
import torch.nn.functional as F

from recnb.models.backbones import create_backbone, layer_depths
from recnb.models.lora import merge_lora

pytest.importorskip("peft")
SMALL = {"input_size": (3, 32, 32)}


def drawn_at_random(lora: dict):
    torch.manual_seed(0)
    backbone = create_backbone("test_vit", **SMALL, lora=lora)
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return backbone.eval()


def test_the_output_is_the_same_at_first_and_only_the_products_are_trained():
    torch.manual_seed(0)
    plain = create_backbone("test_vit", **SMALL).eval()
    torch.manual_seed(0)
    backbone = create_backbone("test_vit", **SMALL, lora={"rank": 4}).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain(x), backbone(x))
    trained = [name for name, p in backbone.named_parameters() if p.requires_grad]
    assert trained and all(".attn.qkv.lora_" in name for name in trained)
    assert layer_depths(backbone).keys() == dict(backbone.named_parameters()).keys()


def test_a_product_counts_alpha_over_rank_times():
    layer = drawn_at_random({"rank": 4, "alpha": 12, "targets": ["qkv", "fc1"]}).model.blocks[0].mlp.fc1
    x = torch.randn(5, layer.in_features)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight = layer.base_layer.weight + 12 / 4 * b @ a
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.base_layer.bias))


def test_merged_it_is_a_plain_network_that_computes_the_same():
    backbone, x = drawn_at_random({"rank": 4}), torch.randn(2, 3, 32, 32)
    before = backbone(x)
    merge_lora(backbone)
    assert backbone.state_dict().keys() == create_backbone("test_vit", **SMALL).state_dict().keys()
    torch.testing.assert_close(backbone(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "lora", "said"),
    [
        ("test_vit", {"targets": ["kqv"]}, "kqv"),
        ("test_vit", {"targets": "qkv"}, "lora.targets is 'qkv', and not a list of names"),
        ("test_vit", {"rank": 0}, "rank|`r`"),
        ("eva02_tiny_patch14_224", {}, r"lora has no effect on 'blocks.0.attn.qkv.lora_A.*name other targets"),
    ],
)
def test_what_cannot_be_meant(name, lora, said):
    with pytest.raises(ValueError, match=said):
        create_backbone(name, input_size=(3, 112, 112), lora=lora)


def test_without_peft_there_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"lora needs peft: pip install 'recnb\[lora\]'"):
        create_backbone("test_vit", **SMALL, lora={})
