"""Weights of the original: files of Paddle in tests/models/data, hostile ones, and where each tensor goes.

The files come from `scripts/paddle_parity.py fixtures`, which also compares whole networks with Paddle's.
"""

import copy
import itertools
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import alexnet

from recnb import build_model, load_config
from recnb.cli.main import main
from recnb.models import DistillationModel, RecModel, create_backbone
from recnb.models.heads import HEADS
from recnb.models.necks import NECKS
from recnb.models.paddle import converted, read_pdparams
from recnb.models.weights import load_weights, local
from recnb.recipe.resolved import portable
from recnb.registry import ConfigError

DATA = Path(__file__).parent / "data"
STATISTICS = ("weight", "bias", "_mean", "_variance")


def numbers(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def layer(name, out, channels, size=1, groups=1):
    """The arrays of a convolution without a bias and of its batch norm."""
    statistics = {f"{name}.bn.{key}": abs(numbers(out)) + 0.1 for key in STATISTICS}
    return {f"{name}.conv.weight": numbers(out, channels // groups, size, size), **statistics}


def conv(name, out, channels):
    return {f"{name}.weight": numbers(out, channels, 1, 1), f"{name}.bias": numbers(out)}


def linear(name, size, out):
    return {f"{name}.weight": numbers(size, out), f"{name}.bias": numbers(out)}


def resnet(vd, classes=1000):
    stem = [(32, 3, 3), (32, 32, 3), (64, 32, 3)] if vd else [(64, 3, 7)]
    found = {key: value for i, sizes in enumerate(stem) for key, value in layer(f"stem.{i}", *sizes).items()}
    block, channels = 0, 64
    for width, depth in zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True):
        for i in range(depth):
            found |= layer(f"blocks.{block}.conv0", width, channels)
            found |= layer(f"blocks.{block}.conv1", width, width, 3)
            found |= layer(f"blocks.{block}.conv2", 4 * width, width)
            found |= {} if i else layer(f"blocks.{block}.short", 4 * width, channels)
            block, channels = block + 1, 4 * width
    return found | linear("fc", 2048, classes)


def pplcnet():  # of a quarter's width
    found, channels = layer("conv1", 8, 3, 3), 8
    for stage, widths in {2: [8], 3: [16] * 2, 4: [32] * 2, 5: [64] * 6, 6: [128] * 2}.items():
        for i, width in enumerate(widths):
            size = 5 if stage == 6 or (stage == 5 and i) else 3
            found |= layer(f"blocks{stage}.{i}.dw_conv", channels, channels, size, channels)
            if stage == 6:
                found |= conv(f"blocks6.{i}.se.conv1", channels // 4, channels)
                found |= conv(f"blocks6.{i}.se.conv2", channels, channels // 4)
            found |= layer(f"blocks{stage}.{i}.pw_conv", width, channels)
            channels = width
    return found | {"last_conv.weight": numbers(1280, 128, 1, 1)} | linear("fc", 1280, 1000)


def pplcnetv2():
    found = layer("stem.0", 32, 3, 3) | layer("stem.1.dw_conv", 32, 32, 3, 32) | layer("stem.1.pw_conv", 64, 32)
    for stage, (width, depth) in enumerate(zip((64, 128, 256, 512), (2, 2, 6, 2), strict=True)):
        for i in range(depth):
            block, channels = f"stages.{stage}.{i}", 2 * width if i else width
            for branch, size in enumerate((5, 3, 1)[: 3 if i else 2] if stage > 1 else ()):
                found |= layer(f"{block}.dw_conv_list.{branch}", channels, channels, size, channels)
            if stage > 1:  # what the branches come to, kept beside them
                found |= {
                    f"{block}.dw_conv.weight": numbers(channels, 1, 5, 5),
                    f"{block}.dw_conv.bias": numbers(channels),
                }
            else:
                found |= layer(f"{block}.dw_conv", channels, channels, 3, channels)
            if stage == 2:
                found |= conv(f"{block}.se.conv1", channels // 4, channels)
                found |= conv(f"{block}.se.conv2", channels, channels // 4)
                found |= layer(f"{block}.pw_conv_1", width, channels) | layer(f"{block}.pw_conv_2", 2 * width, width)
            else:
                found |= layer(f"{block}.pw_conv", 2 * width, channels)
    return found | {"last_conv.weight": numbers(1280, 1024, 1, 1)} | linear("fc", 1280, 1000)


def mobilenetv3_small():
    rows = [(3, 16, 16, 4), (3, 72, 24, 0), (3, 88, 24, 0), (5, 96, 40, 24), *[(5, 240, 40, 60)] * 2]
    rows += [(5, 120, 48, 30), (5, 144, 48, 36), (5, 288, 96, 72), *[(5, 576, 96, 144)] * 2]
    found, channels = layer("conv", 16, 3, 3), 16
    for i, (size, middle, out, squeezed) in enumerate(rows):
        found |= layer(f"blocks.{i}.expand_conv", middle, channels)
        found |= layer(f"blocks.{i}.bottleneck_conv", middle, middle, size, middle)
        if squeezed:
            found |= conv(f"blocks.{i}.mid_se.conv1", squeezed, middle)
            found |= conv(f"blocks.{i}.mid_se.conv2", middle, squeezed)
        found |= layer(f"blocks.{i}.linear_conv", out, middle)
        channels = out
    found |= layer("last_second_conv", 576, 96) | {"last_conv.weight": numbers(1280, 576, 1, 1)}
    return found | linear("fc", 1280, 1000)


def mobilenetv1():
    found, widths = layer("conv", 32, 3, 3), [32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
    for i, (channels, width) in enumerate(itertools.pairwise(widths)):
        found |= layer(f"blocks.{i}.depthwise_conv", channels, channels, 3, channels)
        found |= layer(f"blocks.{i}.pointwise_conv", width, channels)
    return found | linear("fc", 1024, 1000)


NETWORKS = {
    "ResNet50": lambda: resnet(vd=False),
    "ResNet50_vd": lambda: resnet(vd=True),
    "PPLCNet_x0_25": pplcnet,
    "PPLCNetV2_base": pplcnetv2,
    "MobileNetV3_small_x1_0": mobilenetv3_small,
    "MobileNetV1": mobilenetv1,
}


def whole(name, **options):
    """The network, not cut."""
    return create_backbone(name, class_num=1000, input_size=(3, 64, 64), **options).model


def written(path, arrays):
    path.write_bytes(pickle.dumps(arrays, 4))
    return path


@pytest.mark.parametrize("name", ["arrays", "pairs", "protocol2"])
def test_every_layout_that_paddle_writes_is_read(name):
    arrays = read_pdparams(DATA / f"{name}.pdparams")
    assert list(arrays) == [
        "backbone.0.conv.weight",
        *(f"backbone.0.bn.{key}" for key in STATISTICS),
        *(f"neck.feat_bn.{key}" for key in STATISTICS),
        "head.weight",
        "head.bias",
    ]
    assert arrays["backbone.0.conv.weight"].shape == (4, 3, 3, 3) and arrays["head.weight"].shape == (4, 5)
    first = read_pdparams(DATA / "arrays.pdparams")
    assert all(array.dtype == np.float32 and np.array_equal(array, first[key]) for key, array in arrays.items())


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HOSTILE = {
    "a command": (Calls(os.system, "touch touched"), "system, which is neither an array nor a container"),
    "eval": ({"w": Calls(eval, "open('touched', 'w')")}, "builtins.eval, which"),
    "an import": (Calls(__import__, "this"), "builtins.__import__, which"),
    "getattr": (Calls(getattr, "", "join"), "builtins.getattr, which"),
    "objects": ({"w": np.array([Calls(os.system, "touch touched")])}, "neither an array"),
    "an array of objects": ({"w": np.array([None])}, "an array of '.O8?' is not one of numbers"),
    "texts": ({"w": np.array(["a"])}, "is not one of numbers"),
    "a number": ({"w": 3}, "'w' is a int, no array"),
    "a list": ([np.ones(3)], "it holds a list, no arrays by their names"),
    "nothing": ({}, "it holds a dict, no arrays"),
}


@pytest.mark.parametrize(("content", "words"), HOSTILE.values(), ids=HOSTILE)
def test_nothing_in_a_file_is_run(content, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"hostile.pdparams' cannot be read as weights of Paddle: .*{words}") as error:
        read_pdparams(written(tmp_path / "hostile.pdparams", content))
    assert "\n" not in str(error.value) and not (tmp_path / "touched").exists()
    with pytest.raises(ConfigError, match=r"^Global\.pretrained_model: .*hostile"):
        load_weights(torch.nn.Linear(1, 1), tmp_path / "hostile.pdparams")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        (DATA / "arrays.pdparams").read_bytes()[:-300],
        b"\x80\x04cnumpy\nndarray\n}\x8c\x0c__setstate__Nsb.",  # writes to what stands for an array
        b"\x80\x04c_codecs\nencode\nN}\x8c\x08__code__Ns\x86b.",  # and to a function
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(K\x01K\x05\x85cnumpy\ndtype\n"
        b"X\x02\0\0\0f4\x85R\x89C\x01atb.",
    ],
)
def test_a_damaged_file_is_one_sentence(content, tmp_path):
    (tmp_path / "damaged.pdparams").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged.pdparams' cannot be read as weights of Paddle: .") as error:
        read_pdparams(tmp_path / "damaged.pdparams")
    assert "\n" not in str(error.value)
    assert read_pdparams(DATA / "arrays.pdparams")["head.bias"].shape == (5,)


def test_arrays_of_another_byte_order_and_by_columns_keep_their_values(tmp_path):
    given = {"big": np.arange(6, dtype=">f4").reshape(2, 3), "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3))}
    arrays = read_pdparams(written(tmp_path / "x.pdparams", given))
    assert all(np.array_equal(arrays[name], given[name]) and arrays[name].dtype.isnative for name in given)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_tensor_of_a_network_has_its_place(name):
    own = {key: value for key, value in whole(name).state_dict().items() if not key.endswith("num_batches_tracked")}
    arrays = NETWORKS[name]()
    found = converted(arrays, whole(name))
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in own.items()}
    share = 0.8 if ("classifier.weight" in found and name != "MobileNetV1") or name.startswith("PPLCNetV2") else 1
    last = next(found[key] for key in ("fc.weight", "classifier.weight") if key in found)
    torch.testing.assert_close(last, share * torch.from_numpy(arrays["fc.weight"]).T)


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("ResNet50", "blocks.7.conv1.bn._variance", "layer3.0.bn2.running_var"),
        ("ResNet50_vd", "blocks.13.short.conv.weight", "layer4.0.downsample.1.weight"),
        ("ResNet50_vd", "stem.2.bn._mean", "bn1.running_mean"),
        ("PPLCNet_x0_25", "blocks5.2.pw_conv.bn.bias", "blocks.4.0.bn2.bias"),
        ("MobileNetV3_small_x1_0", "last_second_conv.bn._mean", "blocks.5.0.bn1.running_mean"),
        ("MobileNetV3_small_x1_0", "blocks.10.mid_se.conv2.weight", "blocks.4.2.se.conv_expand.weight"),
        ("MobileNetV1", "blocks.12.pointwise_conv.conv.weight", "blocks.4.1.conv_pw.weight"),
        ("PPLCNetV2_base", "stages.2.5.pw_conv_2.conv.weight", "stages.2.5.pw_conv.1.conv.weight"),
    ],
)
def test_blocks_are_matched_in_their_order(name, theirs, ours):
    arrays = NETWORKS[name]()
    arrays[theirs] = arrays[theirs] + 5
    assert torch.equal(converted(arrays, whole(name))[ours], torch.from_numpy(arrays[theirs]))


def transposed(state):
    return {
        key: value.numpy().T if value.dim() == 2 and key.endswith("weight") else value.numpy()
        for key, value in state.items()
    }


def test_transformers():
    clip = create_backbone("CLIP_vit_base_patch16_224", return_embed=True, input_size=(3, 32, 32), depth=1).model
    arrays = transposed(clip.state_dict())
    arrays |= {"proj": arrays.pop("head.weight"), "patch_embed.proj.bias": numbers(768)}
    del arrays["head.bias"]
    for key in ("weight", "bias"):
        arrays[f"ln_pre.{key}"] = arrays.pop(f"norm_pre.{key}")
    found = converted(arrays, clip)
    assert found.keys() == clip.state_dict().keys() and torch.equal(found["head.weight"], clip.head.weight)
    moved = found["pos_embed"] - clip.pos_embed
    assert not moved[:, 0].any()
    torch.testing.assert_close(moved[0, 3], torch.from_numpy(numbers(768)))
    swin = whole("SwinTransformer_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24)
    own = {key: value for key, value in swin.state_dict().items() if not key.startswith("head")}
    arrays = transposed(own) | linear("head", 192, 1000)
    for i in (1, 2, 3):
        for key in [key for key in arrays if key.startswith(f"layers.{i}.downsample")]:
            arrays[key.replace(f"layers.{i}", f"layers.{i - 1}.", 1).replace("..", ".")] = arrays.pop(key)
    arrays["layers.0.blocks.0.attn.relative_position_index"] = np.zeros((49, 49), int)
    found = converted(arrays, swin)
    assert found.keys() == swin.state_dict().keys() and all(torch.equal(found[key], own[key]) for key in own)


def narrow_alexnet():
    """AlexNet with linear layers of 8 in place of 4,096, and the original's arrays for it."""
    with torch.device("meta"):
        model = alexnet()
    for place, sizes in ((1, (9216, 8)), (4, (8, 8)), (6, (8, 5))):
        model.classifier[place] = torch.nn.Linear(*sizes)
    model.default_cfg = {"architecture": "alexnet", "classifier": "classifier.6"}
    shapes = [own.shape for name, own in model.state_dict().items() if name.startswith("features") and own.dim() == 4]
    arrays = {}
    for i, (out, channels, size, _) in enumerate(shapes, 1):
        name = f"_conv{i}" if i in (3, 4) else f"_conv{i}._conv"
        arrays |= {f"{name}.weight": numbers(out, channels, size, size), f"{name}.bias": numbers(out)}
    return model, arrays | linear("_fc6", 9216, 8) | linear("_fc7", 8, 8) | linear("_fc8", 8, 5)


def narrow_vgg():
    """VGG19Sigmoid with 40 in place of 4,096 behind its maps, and the original's arrays for it."""
    options = {"class_num": 5, "mlp_ratio": 0.01, "input_size": (3, 32, 32)}
    model, arrays = create_backbone("VGG19Sigmoid", **options).model, {}
    for block, (width, depth) in enumerate(zip((64, 128, 256, 512, 512), (2, 2, 4, 4, 4), strict=True), 1):
        for i in range(1, depth + 1):
            channels = width if i > 1 else (3, 64, 128, 256, 512)[block - 1]
            arrays[f"conv_block_{block}.conv{i}.weight"] = numbers(width, channels, 3, 3)
    layers = linear("fc1", 25088, 40) | linear("fc2", 40, 4096) | linear("fc3.origin_layer", 4096, 5)
    return model, arrays | layers


@pytest.mark.parametrize(
    ("make", "shares", "maps"),
    [
        (narrow_alexnet, {"_fc6": 0.5, "_fc7": 0.5, "_fc8": 1.0}, (2, 256, 6, 6)),
        (narrow_vgg, {"fc1": 1.0, "fc2": 0.5, "fc3.origin_layer": 0.5}, (2, 512, 7, 7)),
    ],
)
def test_linear_layers_read_what_a_dropout_made_smaller_in_the_original(make, shares, maps):
    model, arrays = make()
    own, found = model.state_dict(), converted(arrays, model)
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in own.items()}
    model.load_state_dict(found, assign=True)
    theirs = [array for name, array in arrays.items() if "conv" in name and name.endswith("weight")]
    ours = [layer for layer in model.features if isinstance(layer, torch.nn.Conv2d)]
    for layer, array in zip(ours, theirs, strict=True):
        assert torch.equal(layer.weight, torch.from_numpy(array)) and layer.bias.any() == (make is narrow_alexnet)
    given = torch.from_numpy(numbers(*maps))
    x = given.flatten(1)
    for name, share in shares.items():
        x = share * x @ torch.from_numpy(arrays[f"{name}.weight"]) + torch.from_numpy(arrays[f"{name}.bias"])
        x = x if name == [*shares][-1] else x.relu()
    model.eval()
    if make is narrow_vgg:
        model.head.fc = model.head.fc[0]  # without the sigmoid
    outputs = model.classifier(given.flatten(1)) if make is narrow_alexnet else model.head(model.pre_logits(given))
    torch.testing.assert_close(outputs, x, rtol=1e-3, atol=1e-2)


def test_neck_and_head_of_a_whole_model_read_features_that_were_smaller_in_the_original():
    model = RecModel(
        create_backbone("PPLCNet_x0_25", stop="flatten", input_size=(3, 32, 32)),
        NECKS.build({"name": "BNNeck", "num_features": 1280}, "neck"),
        HEADS.build({"name": "AdaMargin", "embedding_size": 1280, "class_num": 5}, "head"),
    ).eval()
    arrays = {f"backbone.{name}": array for name, array in pplcnet().items() if not name.startswith("fc.")}
    arrays |= {f"neck.feat_bn.{key}": abs(numbers(1280)) + 0.1 for key in STATISTICS}
    arrays |= {
        "head.kernel": numbers(1280, 5),
        **{f"head.{key}": numbers(1) for key in ("t", "batch_mean", "batch_std")},
    }
    found = converted(arrays, model)
    assert {key for key in model.state_dict() if not key.endswith("num_batches_tracked")} == found.keys()
    model.load_state_dict(found, strict=False)
    x = torch.randn(3, 1280)
    mean, variance = (torch.from_numpy(arrays[f"neck.feat_bn.{key}"]) for key in ("_mean", "_variance"))
    normed = (0.8 * x - mean) / (variance + 1e-5).sqrt()
    torch.testing.assert_close(model.neck(x), normed * model.neck.bn.weight + model.neck.bn.bias)
    assert torch.equal(model.head.weight, torch.from_numpy(arrays["head.kernel"].T))


def test_models_that_are_distilled_together_take_each_its_own():
    student = RecModel(create_backbone("PPLCNet_x0_25", stop="flatten", input_size=(3, 32, 32)))
    model = DistillationModel({"Teacher": copy.deepcopy(student), "Student": student}, "Student")
    arrays = {f"backbone.{name}": array for name, array in pplcnet().items() if not name.startswith("fc.")}
    both = {
        f"{part}.{name}": array * factor
        for part, factor in (("Teacher", 1), ("Student", 2))
        for name, array in arrays.items()
    }
    found = converted(both | {"other.weight": numbers(3)}, model)
    places = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    assert found.keys() - places == {"other.weight"} and places <= found.keys()
    pair = [found[f"models.{part}.backbone.model.bn1.weight"] for part in ("Teacher", "Student")]
    assert torch.equal(2 * pair[0], pair[1])


def test_what_does_not_fit_is_named_unless_it_may(tmp_path):
    arrays = resnet(vd=False, classes=7)
    path = written(tmp_path / "r.pdparams", arrays)
    create_backbone("ResNet50_last_stage_stride1", pretrained=path, stop="flatten", input_size=(3, 32, 32))
    renamed = {name.replace("blocks.3.short.conv", "blocks.3.shirt"): array for name, array in arrays.items()}
    written(path, renamed)
    words = (
        r"1 are missing \('layer2.0.downsample.0.weight'\), 1 are unexpected \('layer2.0.shirt.weight'\); strict: False"
    )
    with pytest.raises(ValueError, match=words):
        create_backbone("ResNet50", pretrained=path, input_size=(3, 32, 32))
    create_backbone("ResNet50", pretrained=path, input_size=(3, 32, 32), strict=False, stop="flatten")
    with pytest.raises(ValueError, match="not known for densenet121"):
        create_backbone("DenseNet121", pretrained=path, class_num=5, input_size=(3, 32, 32))


def test_weights_behind_a_url_are_downloaded_or_a_sentence_says_why_not(tmp_path, monkeypatch):
    url = "https://example.org/dygraph/ResNet50_pretrained.pdparams"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda source, path, progress: Path(path).write_text(source))
    assert local(url) == tmp_path / "checkpoints" / "ResNet50_pretrained.pdparams" and local(url).read_text() == url

    def offline(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(
        ConfigError, match=r"the weights https://example\.org/x\.pdparams cannot be downloaded \(no route\)"
    ):
        local("https://example.org/x.pdparams")


def test_a_url_stays_one_in_what_a_run_keeps(config_file, monkeypatch):
    url = "https://example.org/dygraph/ResNet50_pretrained.pdparams"
    cfg = load_config(config_file({"Arch.Backbone.pretrained": url, "Global.pretrained_model": url}))
    kept = portable(cfg)
    assert kept["Arch"]["Backbone"]["pretrained"] == kept["Global"]["pretrained_model"] == url
    asked = []
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda source, *args, **kwargs: asked.append(source) or 1 / 0
    )
    with pytest.raises(
        ConfigError, match=r"the weights https://example\.org/dygraph/ResNet50_pretrained\.pdparams cannot"
    ):
        build_model(cfg)
    assert asked == [url]


def test_a_file_is_converted_and_serves_as_pretrained_model(config_file, tmp_path, capsys):
    arch = {
        "name": "RecModel",
        "Backbone": {"name": "PPLCNet_x0_25"},
        "BackboneStopLayer": {"name": "flatten"},
        "Neck": {"name": "FC", "class_num": 8},
        "Head": {"name": "ArcMargin"},
    }
    config = config_file({"Arch": arch})
    arrays = {f"backbone.{name}": array for name, array in pplcnet().items() if not name.startswith("fc.")}
    arrays |= linear("neck.fc", 1280, 8) | {"head.weight": numbers(8, 15)}
    source, out = written(tmp_path / "model.pdparams", arrays), tmp_path / "model.safetensors"
    assert main(["convert", str(source), str(out), "--config", str(config)]) == 0
    assert "give it as Global.pretrained_model" in capsys.readouterr().out
    direct = build_model(load_config(config, {"Global.pretrained_model": str(source)}))
    first = build_model(load_config(config, {"Global.pretrained_model": str(out)}))
    assert all(torch.equal(value, first.state_dict()[key]) for key, value in direct.state_dict().items())
    torch.testing.assert_close(first.neck.fc.weight, 0.8 * torch.from_numpy(arrays["neck.fc.weight"]).T)
    del arrays["neck.fc.bias"]
    written(source, arrays)
    assert main(["convert", str(source), str(out), "--config", str(config)]) == 2
    assert "does not fit this model in 1 tensors ('neck.fc.bias')" in capsys.readouterr().err
    assert main(["convert", str(source), str(out), "--config", str(config), "--no-strict"]) == 0
    bare = written(tmp_path / "backbone.pdparams", pplcnet())
    assert main(["convert", str(bare), str(out), "--config", str(config)]) == 0
    created = create_backbone("PPLCNet_x0_25", pretrained=out, stop="flatten", input_size=(3, 32, 32))
    assert torch.equal(created.model.conv_stem.weight, torch.from_numpy(arrays["backbone.conv1.conv.weight"]))
