"""The cut: equal to the un-cut model to the bit, nothing later stored or run; how backbones are named and loaded."""

import copy
import gc
import io
import itertools
import pickle
import time
import weakref
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from recnb.models import backbones
from recnb.models.backbones import ALIASES, NETWORKS, TORCHVISION, create_backbone, layer_depths, list_backbones, stages
from recnb.models.cutting import Cut, cut

SMALL = (3, 64, 64)
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
SHARED = Path(__file__).parents[3] / "shared"
FAMILIES = """lcnet_100 resnet50 resnet50d mobilenetv3_large_100 efficientnet_b0 convnext_tiny convnextv2_nano
vit_small_patch16_224 deit3_small_patch16_224 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 regnety_040
hgnet_tiny hgnetv2_b0 ghostnet_100 mobilevit_s maxvit_tiny_tf_224 eva02_tiny_patch14_224 beit_base_patch16_224
coatnet_0_rw_224 xcit_nano_12_p16_224 cait_xxs24_224 edgenext_small fastvit_t8 dla34 vgg16 densenet121 inception_v4
tiny_vit_5m_224""".split()


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(0)
    return timm.create_model("resnet18").eval()


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model("test_vit").eval()


def images(size=SMALL, count=3):
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(1))


def uncut(model, layer, x, train=False):
    """What `layer` gives inside the whole model, and the names of the modules that ran up to it."""
    model, kept, ran = copy.deepcopy(model).train(train), [], []

    def note(name):
        return lambda module, args: ran.append(name) if not kept else None

    for name, module in model.named_modules():
        module.register_forward_pre_hook(note(name))
    model.get_submodule(layer).register_forward_hook(lambda module, args, output: kept.append(output.clone()))
    torch.manual_seed(2)
    model(x)
    return kept[0], ran


def run(module, x, train=False):
    module, ran = copy.deepcopy(module).train(train), []
    for name, child in module.model.named_modules():
        child.register_forward_pre_hook(lambda child, args, name=name: ran.append(name))
    torch.manual_seed(2)
    return module(x), ran


def unreached(module, x):
    """Names of the trainable parameters that the output does not depend on, in train mode."""
    module = copy.deepcopy(module).train()
    module(x).sum().backward()
    return [name for name, weight in module.named_parameters() if weight.requires_grad and weight.grad is None]


def check_cut(model, stop, size):
    """Everything that a cut promises, on one model and layer; returns the cut and its unreached parameters."""
    module, x = cut(model, stop, size), images(size)
    whole = model if module.layer else module.model  # 'flatten' is the whole model without its classifier
    for train in (False, True):
        expected, ran = uncut(whole, module.layer, x, train) if module.layer else (run(module, x, train))
        output, ran_cut = run(module, x, train)
        assert torch.equal(output, expected)
        assert ran_cut == ran
        assert output.shape[1:] == module.out_shape
    return module, unreached(module, x)


def called_once(model, x):
    """Names of the modules that `cut` accepts, in the order in which they finish."""
    finished = {}

    def note(name):
        return lambda module, args, output: finished.setdefault(name, []).append(output)

    model = copy.deepcopy(model).eval()
    for name, module in model.named_modules():
        module.register_forward_hook(note(name))
    with torch.no_grad():
        model(x)
    return [
        name
        for name, outputs in finished.items()
        if len(outputs) == 1
        and isinstance(outputs[0], torch.Tensor)
        and outputs[0].shape[:1] == x.shape[:1]
        and 2 <= outputs[0].ndim <= 4
    ]


def sweep(name, points=(0.15, 0.35, 0.5, 0.65, 0.85)):
    """One row per cut of one model: (layer, out_shape, layout, parameters kept, unreached parameters, seconds)."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    size = model.default_cfg["input_size"]
    names = called_once(model, images(size))
    rows = []
    for stop in [names[int(point * len(names))] for point in points] + ["flatten"]:
        start = time.perf_counter()
        module, dead = check_cut(model, stop, size)
        kept = sum(parameter.numel() for parameter in module.parameters())
        rows.append((stop, module.out_shape, module.layout, kept, dead, time.perf_counter() - start))
    return rows


# The cut: what it promises, on real models


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("resnet18", "conv1"),
        ("resnet18", "layer2"),
        ("resnet18", "layer3.1.bn1"),
        ("resnet18", "global_pool"),
        ("resnet18", "flatten"),
        ("test_resnet", "fc"),
        ("test_vit", "patch_embed"),
        ("test_vit", "blocks.2.attn.qkv"),
        ("test_vit", "norm"),
        ("test_efficientnet", "blocks.3.0.conv_dw"),
        ("test_convnext", "stages.2.blocks.0.mlp"),
        ("test_nfnet", "stages.1"),
    ],
)
def test_output_equals_the_uncut_model_and_nothing_later_is_stored_or_run(name, stop):
    torch.manual_seed(0)
    model = timm.create_model(name)
    size = SMALL if name == "resnet18" else model.default_cfg["input_size"]
    _, dead = check_cut(model, stop, size)
    assert not dead


def test_stores_exactly_what_comes_before(resnet18):
    module = cut(resnet18, "layer2", SMALL)
    before = [resnet18.conv1, resnet18.bn1, resnet18.layer1, resnet18.layer2]
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for part in before for p in part.parameters())
    assert len(module.state_dict()) == sum(len(part.state_dict()) for part in before)


def test_drops_parameters_that_belong_to_no_submodule(vit):
    names = [name for name, _ in cut(vit, "patch_embed").named_parameters()]
    assert names == ["model.patch_embed.proj.weight", "model.patch_embed.proj.bias"]


@pytest.mark.parametrize("train", [False, True])
def test_probing_leaves_model_and_random_numbers_alone(train):
    model = timm.create_model("test_resnet").train(train)
    model.bn1.eval()
    model.conv1.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, gpu_seed = torch.get_rng_state(), torch.cuda.initial_seed() if torch.cuda.is_available() else None
    with torch.no_grad():
        module = cut(model, "layer3")
    assert torch.equal(torch.get_rng_state(), state)
    assert gpu_seed is None or torch.cuda.initial_seed() == gpu_seed
    for after in (model, module.model):
        assert after.training == train and after.layer2.training == train and not after.bn1.training
        assert not after.conv1[0].weight.requires_grad and after.layer1[0].conv1.weight.requires_grad
        assert all(parameter.grad is None for parameter in after.parameters())
        assert all(torch.equal(value, before[name]) for name, value in after.state_dict().items())
    assert "fc.weight" in model.state_dict() and not any(module._forward_hooks for module in model.modules())


def test_frozen_weights_are_pruned_all_the_same(vit):
    free, frozen = cut(vit, "blocks.1"), cut(copy.deepcopy(vit).requires_grad_(False), "blocks.1")
    assert frozen.state_dict().keys() == free.state_dict().keys()
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_branch_that_ran_in_vain_is_kept_and_frozen(resnet18):
    # conv1 to bn2 of the block run before its shortcut, whose output does not need them
    module = cut(resnet18, "layer2.0.downsample", SMALL)
    assert not unreached(module, images())
    assert not module.model.layer2[0].conv1.weight.requires_grad


# Small models, each with one of the habits that break a cut


class Habits(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 4, 3), nn.ReLU()
        self.body, self.late, self.drop = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Dropout(0.25)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.late(self.act(self.body(self.act(self.stem(x))))) * self.scale


class ReadsASetting(Habits):
    def forward(self, x):
        x = self.stem(x * (1 - self.drop.p if self.training else 1))
        return self.late(self.body(x))


class ReadsAWeight(Habits):
    def forward(self, x):
        return self.late(self.body(self.stem(x.to(self.late.weight.dtype))))


class FeelsGradMode(Habits):
    def forward(self, x):
        x = x * self.scale
        if torch.is_grad_enabled() and self.scale.requires_grad:  # as an attention kernel is chosen by its bias
            x = x * (1 + 1e-6)
        return self.late(self.body(self.stem(x)))


class CachesInEval(Habits):
    def forward(self, x):
        scale = self.scale if self.training else self.scale.detach()
        return self.late(self.body(self.stem(x) * scale))


class UsesInEval(Habits):
    def forward(self, x):
        x = self.stem(x)
        return self.late(self.body(x if self.training else x * self.scale))


class WritesInPlace(Habits):
    def forward(self, x):
        x = self.stem(x)
        return self.late(self.body(x.add_(1)))


class GivesAPair(Habits):
    def __init__(self):
        super().__init__()
        self.pair = Pair()

    def forward(self, x):
        return self.late(self.pair(self.stem(x))[0])


class SharesALaterLayer(Habits):
    def __init__(self):
        super().__init__()
        self.again = self.late

    def forward(self, x):
        return self.again(self.late(self.stem(x)))


class Pair(nn.Module):
    def forward(self, x):
        return x, x.shape


class FoldsTheBatch(Habits):
    def __init__(self):
        super().__init__()
        self.fold, self.deep = nn.Unflatten(1, (2, 2)), nn.Identity()

    def forward(self, x):
        x = self.stem(x)
        return self.late(self.body(self.fold(x.flatten(0, 1).unsqueeze(1).expand(-1, 4, -1, -1)).flatten(1, 2)))


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        (ReadsASetting, {"stem"}),
        (WritesInPlace, {"stem"}),
        (ReadsAWeight, {"stem", "late"}),
        (SharesALaterLayer, {"stem"}),
        (FeelsGradMode, {"stem", "scale"}),
    ],
)
def test_cut_at_the_stem_of(kind, kept):
    for frozen in (False, True):
        module = cut(kind().requires_grad_(not frozen), "stem", SMALL)
        assert {name.split(".")[1] for name, _ in module.named_parameters()} == kept
    check_cut(kind(), "stem", SMALL)


@pytest.mark.parametrize("kind", [CachesInEval, UsesInEval])
def test_parameter_used_in_one_mode_only_is_kept(kind):
    module = cut(kind(), "body", SMALL)
    assert {name.split(".")[1] for name, _ in module.named_parameters()} == {"stem", "body", "scale"}
    check_cut(kind(), "body", SMALL)


@pytest.mark.parametrize(
    ("kind", "stop", "words"),
    [
        (Habits, "act", "'act' is called 2 times"),
        (Habits, "drop", "'drop' is called 0 times"),
        (GivesAPair, "pair", "'pair' gives a tuple"),
        (FoldsTheBatch, "fold", "'fold' gives .* for 3 images"),
        (Habits, "flatten", "names no classifier"),
        (Habits, "avg_pool", "has no pooling"),
    ],
)
def test_layers_that_cannot_end_a_model(kind, stop, words):
    with pytest.raises(ValueError, match=words) as caught:
        cut(kind(), stop, SMALL)
    assert "\n" not in str(caught.value)


def test_model_that_does_not_say_its_input_size():
    with pytest.raises(ValueError, match="give input_size"):
        cut(Habits(), "stem")
    with pytest.raises(ValueError, match=r"cannot take images of \(1, 64, 64\)"):
        cut(Habits(), "stem", (1, 64, 64))


def test_layer_that_stops_running_is_an_error(resnet18):
    module = cut(resnet18, "layer2", SMALL)
    module.model.layer2 = nn.Identity()
    with pytest.raises(ValueError, match="'layer2' did not run"):
        module(images())


# A cut is an ordinary module


def test_copies_pickles_and_saves(resnet18):
    module, x = cut(resnet18, "layer2.0.conv1", SMALL).eval(), images()
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other = cut(timm.create_model("resnet18"), "layer2.0.conv1", SMALL).eval()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other):
        assert torch.equal(twin(x), module(x))
        assert twin.out_shape == module.out_shape == (128, 8, 8)


def test_cut_of_a_cut(resnet18):
    module = cut(cut(resnet18, "layer3", SMALL), "layer1", SMALL)
    assert module.state_dict().keys() == cut(resnet18, "layer1", SMALL).state_dict().keys()
    assert torch.equal(module.eval()(images()), cut(resnet18, "layer1", SMALL).eval()(images()))


def test_activations_are_freed_without_the_garbage_collector(resnet18):
    module, seen = cut(resnet18, "layer2", SMALL).eval(), []
    module.model.layer1.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
    gc.disable()
    try:
        with torch.no_grad():
            module(images())
        assert seen[0]() is None
    finally:
        gc.enable()


STOPS = [
    "flatten",
    pytest.param(
        "layer2",
        marks=pytest.mark.skipif(
            TORCH < (2, 8), reason="works from torch 2.8 on; the compiler of 2.6 cannot follow an exception of our own"
        ),
    ),
]


@pytest.mark.parametrize("stop", STOPS)
def test_exports_strictly_with_any_batch_size(stop):
    module = cut(timm.create_model("test_resnet"), stop).eval()
    x, batch = images(module.input_size), torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},), strict=True)
    five = images(module.input_size, count=5)
    torch.testing.assert_close(program.module()(five), module(five))


@pytest.mark.parametrize("stop", STOPS[1:])
def test_compiles_as_one_graph(stop):
    module = cut(timm.create_model("test_resnet"), stop).eval()
    x = images(module.input_size)
    expected = module(x)
    module.compile(fullgraph=True, backend="eager")
    assert torch.equal(module(x), expected)
    assert all(name.startswith("model.") for name in module.state_dict())


def test_trains_under_gradient_checkpointing(vit):
    vit = copy.deepcopy(vit)
    vit.set_grad_checkpointing(True)
    module, x = cut(vit, "blocks.2.mlp.fc1").train(), images((3, 160, 160), count=2)
    gradients = []
    for checkpointing in (False, True):
        module.model.set_grad_checkpointing(checkpointing)
        module.zero_grad()
        module(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in module.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("stop", ["layer1", "layer2.0.downsample"])
def test_trains_under_ddp_without_unused_parameters(resnet18, stop, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(cut(resnet18, stop, SMALL).train())
        for _ in range(2):  # the second pass fails where the first left gradients out
            model(images()).sum().backward()
    finally:
        torch.distributed.destroy_process_group()


# Names of layers


@pytest.mark.parametrize(
    ("name", "stop", "shape"),
    [
        ("resnet18", "adaptive_avg_pool2d_0", (512, 1, 1)),
        ("resnet18", "avg_pool", (512, 1, 1)),
        ("resnet18", "flatten_0", (512,)),
        ("resnet18", "flatten", (512,)),
        ("mobilenetv3_small_100", "avg_pool", (576, 1, 1)),
        ("mobilenetv3_small_100", "flatten", (1024,)),
        ("lcnet_050", "avg_pool", (256, 1, 1)),
        ("lcnet_050", "flatten", (1280,)),
        ("test_convnext", "avg_pool", (64, 1, 1)),
        ("test_convnext", "flatten", (64,)),
        ("regnetx_002", "avg_pool", (368, 1, 1)),
        ("hgnetv2_b0", "flatten", (2048,)),
        ("dla46_c", "flatten", (256,)),
        ("densenet121", "avg_pool", (1024, 1, 1)),
        ("resnetv2_50", "flatten", (2048,)),
        ("test_vit", "flatten", (64,)),
    ],
)
def test_the_seeds_names_of_layers(name, stop, shape):
    module = create_backbone(name, stop=stop, input_size=(3, 160, 160) if name == "test_vit" else SMALL)
    assert (module.out_shape, module.stop) == (shape, stop)
    assert module.out_channels == shape[0]


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100", "test_vit", "test_convnext"])
def test_flatten_is_what_the_classifier_reads(name):
    torch.manual_seed(0)
    model, read = timm.create_model(name).eval(), []
    size = model.default_cfg["input_size"]
    model.get_classifier().register_forward_pre_hook(lambda module, args: read.append(args[0]))
    x = images(size)
    model(x)
    module = cut(model, "flatten", size).eval()
    assert torch.equal(module(x), read[0])
    assert len(model.state_dict()) - len(module.state_dict()) == len(model.get_classifier().state_dict()) == 2


SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2)}


@pytest.mark.parametrize(
    ("make", "stop", "words"),
    [
        (lambda: timm.create_model("resnet18"), "layer5", "resnet18 has no layer 'layer5'; the closest are 'layer4', "),
        (lambda: timm.create_model("resnet18"), "blocks[8]", "resnet18 has no layer"),
        (lambda: timm.create_model("resnet18"), "conv1[0]", "resnet18 has no layer"),
        (lambda: timm.create_model("resnet18"), "layer3.2", "'layer3.1'"),
        (lambda: timm.create_model("resnet18"), 3, "resnet18 has no layer '3'"),
        (lambda: timm.create_model("resnet18", num_classes=0, global_pool=""), "avg_pool", r"no \(B, C, 1, 1\) map"),
        (lambda: timm.create_model("resnet18", num_classes=0, global_pool=""), "flatten", r"no .* \(B, 512, 2, 2\)"),
        (lambda: timm.create_model("test_vit", img_size=64), "avg_pool", "no pooling that 'avg_pool' could mean"),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224", **SWIN), "avg_pool", r"its pooling gives \(B, 48\)"),
        (lambda: timm.create_model("test_vit", img_size=64), "blocks.0.attn.attn_drop", "is called 0 times"),
    ],
)
def test_names_that_a_model_does_not_have(make, stop, words):
    with pytest.raises(ValueError, match=words) as caught:
        cut(make(), stop, SMALL)
    assert "\n" not in str(caught.value)


def test_bracket_is_an_index_into_a_list(vit):
    assert cut(vit, "blocks[1]").layer == "blocks.1"
    assert cut(timm.create_model("test_resnet"), "layer2[0].conv1").layer == "layer2.0.conv1"


# Shapes and layouts


@pytest.mark.parametrize(
    ("name", "options", "stop", "size", "shape", "layout", "channels", "prefix"),
    [
        ("resnet18", {}, "layer2", (3, 96, 64), (128, 12, 8), "NCHW", 128, 0),
        ("test_convnext", {}, "stages.1.blocks.0.mlp", (3, 96, 64), (32, ...), "NHWC", 32, 0),
        ("swin_tiny_patch4_window7_224", SWIN, "layers.1", SMALL, (8, 8, 48), "NHWC", 48, 0),
        ("swin_tiny_patch4_window7_224", SWIN, "patch_embed.proj", SMALL, (24, 16, 16), "NCHW", 24, 0),
        ("swin_tiny_patch4_window7_224", SWIN, "flatten", SMALL, (48,), "NC", 48, 0),
        ("test_vit", {"img_size": (64, 96)}, "blocks.1", (3, 64, 96), (25, 64), "NLC", 64, 1),
        ("test_vit", {"img_size": 64, "reg_tokens": 4}, "blocks.1", SMALL, (21, 64), "NLC", 64, 5),
        ("xcit_nano_12_p16_224", {"img_size": 64}, "blocks.3", SMALL, (16, 128), "NLC", 128, 0),
    ],
)
def test_shapes_and_layouts(name, options, stop, size, shape, layout, channels, prefix):
    module = cut(timm.create_model(name, **options), stop, size)
    assert (module.layout, module.out_channels, module.prefix_tokens) == (layout, channels, prefix)
    assert module.out_shape == shape or ... in shape
    assert module.eval()(images(size, count=1)).shape == (1, *module.out_shape)


@pytest.mark.parametrize(("said", "layout"), [("NHWC", "NHWC"), ("NCHW", "NCHW"), ("NLC", "NCHW")])
def test_the_model_says_its_layout_where_the_proportions_do_not_tell(said, layout):
    model = nn.Identity()
    model.output_fmt = said
    assert Cut(model, "", "", (3, 384, 384), (96, 96, 96)).layout == layout


@pytest.mark.parametrize(
    ("tokens", "size", "prefix"),
    [
        (197, (3, 224, 224), 1),
        (196, (3, 224, 224), 0),
        (50, (3, 224, 224), 1),
        (261, (3, 224, 224), 5),
        (129, (3, 256, 128), 1),
        (1, (3, 224, 224), 0),
    ],
)
def test_prefix_tokens(tokens, size, prefix):
    assert Cut(nn.Identity(), "", "", size, (tokens, 192)).prefix_tokens == prefix


# Names of models


def test_every_alias_is_a_model():
    known = {*NETWORKS, *TORCHVISION}
    assert [alias for alias, name in ALIASES.items() if not (timm.is_model(name) or name in known)] == []


def test_backbones_by_name():
    assert create_backbone("ResNet18", input_size=SMALL).out_shape == (512,)
    assert create_backbone("ResNet18", class_num=7, input_size=SMALL).out_shape == (7,)
    assert create_backbone("ResNet18", stop="layer2", class_num=7, input_size=SMALL).out_shape == (128, 8, 8)
    assert create_backbone("resnet18", stop="fc", class_num=7, input_size=SMALL).out_shape == (7,)
    assert create_backbone("resnet18.a1_in1k", input_size=SMALL).out_shape == (512,)
    assert create_backbone("test_vit", input_size=(3, 48, 80)).out_shape == (64,)
    assert create_backbone("resnet18", input_size=(1, 64, 64)).model.conv1.in_channels == 1
    assert create_backbone("mobilenetv2_035", input_size=SMALL, pad_type="same").out_shape == (1280,)


def test_last_stage_stride1_keeps_14x14_without_dilation():
    module = create_backbone("ResNet50_last_stage_stride1", stop="layer4", input_size=SMALL).eval()
    x = images((3, 224, 224), count=1)
    expected = module(x)
    assert expected.shape[1:] == (2048, 14, 14)
    convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    assert all(layer.dilation == (1, 1) for layer in convolutions)
    plain = timm.create_model("resnet50")
    plain.layer4[0].conv2.stride = plain.layer4[0].downsample[0].stride = (1, 1)
    plain.load_state_dict(module.model.state_dict(), strict=False)
    assert torch.equal(plain.eval().forward_features(x), expected)


def test_adaptive_max_pool2d():
    module = create_backbone("ResNet50_adaptive_max_pool2d", stop="flatten", input_size=SMALL).eval()
    x = images()
    assert torch.equal(module(x), module.model.forward_features(x).amax((2, 3)))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("ResNet5O", {}, "no backbone is called 'ResNet5O'; the closest are 'ResNet50', "),
        ("resnet50.nothing", {}, "no backbone is called 'resnet50.nothing'"),
        ("resnet18", {"margn": 1}, "resnet18 takes no argument 'margn'"),
        ("resnet18", {"global_pool": "mean"}, "resnet18 cannot be built"),
        ("resnet200", {"pretrained": True}, "timm has no weights for resnet200: give a local file"),
    ],
)
def test_backbones_that_cannot_be_made(name, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        create_backbone(name, input_size=SMALL, **options)
    assert "\n" not in str(caught.value)


def test_list_backbones():
    assert list_backbones("mobilenetv1*")[:2] == ["MobileNetV1", "mobilenetv1_100"]
    assert {"ResNet50", "resnet50"} < set(list_backbones())


# The original's networks and arguments


WRN = {"depth": 28, "dropout": 0, "low_dim": 64, "proj": False, "proj_after": False}
CLIP = {"return_embed": True, "return_mean_embed": True}

# name, arguments of the original's configuration, stop, size, shape; the comment names the configuration or the source
NETWORK_SHAPES = [
    ("PPLCNet_x2_5", {"use_ssld": True}, "flatten", SMALL, (1280,)),  # GeneralRecognition_PPLCNet_x2_5
    ("PPLCNet_x2_5", {}, "avg_pool", SMALL, (1280, 1, 1)),  # 512 x 2.5 channels
    ("PPLCNet_x2_0", {}, "avg_pool", SMALL, (1024, 1, 1)),
    ("PPLCNet_x0_25", {"class_expand": 96}, "flatten", SMALL, (96,)),
    ("PPLCNet_x2_5_Tanh", {"use_ssld": True, "class_num": 512}, None, SMALL, (512,)),  # ..._binary
    ("PPLCNetV2_base", {}, "flatten", SMALL, (1280,)),
    ("PPLCNetV2_base", {}, "stages[3]", SMALL, (1024, 2, 2)),
    ("PPLCNetV2_base_ShiTu", {"use_ssld": True, "class_expand": 512}, "flatten", SMALL, (512,)),  # ..V2_PPLCNetV2_base
    ("PPLCNetV2_base_ShiTu", {}, "avg_pool", SMALL, (1024, 1, 1)),
    ("PPLCNetV2_base", {}, None, SMALL, (1280,)),
    ("AlexNet", {"class_num": 48}, None, SMALL, (48,)),  # DeepHash/DCH
    ("MobileNetV3_large_x1_0", {"class_num": 512}, None, SMALL, (512,)),  # MV3_Large_1x_Aliproduct_DLBHC
    ("MobileNetV3_large_x1_0", {"class_num": 9, "class_expand": 640}, "flatten", SMALL, (640,)),
    ("MobileNetV3_large_x1_0", {}, "avg_pool", SMALL, (960, 1, 1)),
    ("WideResNet", {**WRN, "widen_factor": 2, "num_classes": 10}, "bn1", (3, 32, 32), (128,)),  # FixMatchCCSSL_cifar10
    ("WideResNet", {**WRN, "depth": 10, "widen_factor": 8, "num_classes": 100}, "bn1", (3, 32, 32), (512,)),
    ("WideResNet", {"depth": 10}, "block2", (3, 32, 32), (64, 16, 16)),
    ("ResNet50_vd", {"stem_act": None}, "blocks[3]", SMALL, (512, 8, 8)),  # 28 x 28 at 224: the first of stage 2
    ("ResNet18", {}, "blocks", SMALL, (512, 2, 2)),
    ("shufflenet_v2_x0_5", {}, "flatten", SMALL, (1024,)),  # in torchvision only
]


@pytest.mark.parametrize(("name", "options", "stop", "size", "shape"), NETWORK_SHAPES)
def test_the_originals_networks(name, options, stop, size, shape):
    torch.manual_seed(0)
    module = create_backbone(name, stop=stop, input_size=size, **options)
    assert module.out_shape == shape and not unreached(module, images(size, 2))
    module.train()(images(size, 4)).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)
    twin = create_backbone(name, stop=stop, input_size=size, **options)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin.eval()(images(size, 1)), module.eval()(images(size, 1)))


def test_vgg_ends_in_a_sigmoid_behind_the_codes():
    torch.manual_seed(0)
    module = create_backbone("VGG19Sigmoid", class_num=48, input_size=SMALL).eval()  # VGG19_CIFAR10_DeepHash
    with torch.no_grad():
        codes = module(images())
        last = module.model.head.fc
        assert codes.shape == (3, 48) and isinstance(last[1], nn.Sigmoid)
        last[0].bias += 30
        assert (module(images()) > 0.99).all()
    assert [m.p for m in module.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]


def test_tanh_ends_at_one():
    module = create_backbone("PPLCNet_x2_5_Tanh", class_num=8, input_size=SMALL).eval()
    module.model.classifier[0].bias.data.copy_(torch.tensor([30.0, -30.0] * 4))
    torch.testing.assert_close(module(images()), torch.tensor([1.0, -1.0] * 4).expand(3, 8))


@pytest.mark.parametrize(("name", "millions"), [("PPLCNet_x2_0", 6.54), ("PPLCNet_x2_5", 9.04)])
def test_sizes_of_pplcnet_are_the_published_ones(name, millions):
    # docs/zh_CN/models/ImageNet1k of the original, which counts batch statistics; timm's last convolution has a bias
    model = create_backbone(name, class_num=1000, input_size=SMALL).model
    statistics = sum(value.numel() for key, value in model.state_dict().items() if "running" in key)
    assert round((sum(p.numel() for p in model.parameters()) + statistics - 1280) / 1e6, 2) == millions
    assert model.drop_rate == 0.2 and create_backbone(name, dropout_prob=0.1, input_size=SMALL).model.drop_rate == 0.1


def test_clip_gives_the_projected_mean_of_the_images_own_tokens():
    torch.manual_seed(0)
    module = create_backbone("CLIP_vit_base_patch16_224", stop="flatten", input_size=SMALL, **CLIP).eval()
    model, x = module.model, images()
    tokens = model.head[0](model.forward_features(x))  # normalised, then projected
    assert module.out_shape == (512,) and tokens.shape == (3, 17, 512)
    torch.testing.assert_close(module(x), tokens[:, 1:].mean(1), rtol=1e-4, atol=1e-5)
    assert "quick" in repr(model.blocks[0].mlp.act).lower()


def test_clip_without_the_mean_and_without_the_projection():
    name = "CLIP_vit_base_patch16_224"
    assert create_backbone(name, return_embed=True, output_dim=64, input_size=SMALL).out_shape == (17, 64)
    assert create_backbone(name, stop="flatten", input_size=SMALL).out_shape == (768,)


def test_mean_of_the_large_clip_has_the_class_token():
    size = (3, 56, 56)
    module = create_backbone("CLIP_vit_large_patch14_224", stop="flatten", input_size=size, depth=2, **CLIP).eval()
    tokens = module.model.head[0](module.model.forward_features(images(size)))
    assert module.out_shape == (512,) and tokens.shape == (3, 17, 512)
    torch.testing.assert_close(module(images(size)), tokens.mean(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "activations"), [("ResNet18", 1), ("ResNet18_vd", 3)])
def test_stem_without_its_activations(name, activations):
    bare, usual = (create_backbone(name, stop="maxpool", stem_act=act, input_size=SMALL) for act in (None, "relu"))
    assert bare.eval()(images()).min() < 0 <= usual.eval()(images()).min()
    assert usual.state_dict().keys() == bare.state_dict().keys()
    in_stem = [
        sum(isinstance(module, nn.ReLU) for name, module in cut.named_modules() if "layer" not in name)
        for cut in (bare, usual)
    ]
    assert in_stem == [0, activations]


def test_blocks_of_a_resnet_are_counted_in_one_row(resnet18):
    assert [cut(resnet18, f"blocks[{i}]", SMALL).layer for i in (0, 3, 7)] == ["layer1.0", "layer2.1", "layer4.1"]
    # MODEL_STAGES_PATTERN of the original's resnet.py: the stages of ResNet50 end with blocks 2, 6, 12 and 15
    deep = timm.create_model("resnet50")
    assert [cut(deep, f"blocks[{i}]", SMALL).layer for i in (2, 6, 12, 15)] == [
        "layer1.2",
        "layer2.3",
        "layer3.5",
        "layer4.2",
    ]


def test_networks_of_torchvision(tmp_path):
    given = torchvision.models.shufflenet_v2_x0_5()
    torch.save(given.state_dict(), tmp_path / "w.pth")
    module = create_backbone("shufflenet_v2_x0_5", pretrained=str(tmp_path / "w.pth"), class_num=7, input_size=SMALL)
    assert module.out_shape == (7,) and torch.equal(module.model.conv1[0].weight, given.conv1[0].weight)
    assert "alexnet" in list_backbones("alex*") and "PPLCNet_x2_5" in list_backbones("pplcnet*")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("AdaFace_IR_18", {}, "AdaFace_IR_18 belongs to the original's AdaFace training"),
        ("ResNet50_metabin", {"bias_lr_factor": 2.0}, "ResNet50_metabin belongs to the original's MetaBIN training"),
        ("ResNet18", {"return_patterns": ["blocks"]}, "return_patterns: several outputs are not supported"),
        ("ResNet18", {"return_stages": True}, "return_stages: several outputs"),
        ("ResNet18", {"freeze_befor": "blocks"}, "freeze_befor: give lr_mult_list with 0"),
        ("ResNet18", {"stem_act": "gelu"}, "stem_act is 'gelu', and the stem of a ResNet has 'relu' or null"),
        ("ResNet18", {"class_expand": 5}, "resnet18 takes no argument 'class_expand'"),
        ("PPLCNetV2_base", {"scale": 2.0}, "PPLCNetV2_base takes no argument 'scale'"),
        ("WideResNet", {"depth": 27}, "WideResNet cannot be built: depth is 27"),
        ("VGG19Sigmoid", {}, "ends in a Sigmoid behind its class_num outputs: give class_num"),
        ("CLIP_vit_base_patch16_224", {"return_mean_embed": True}, "give return_embed: True as well"),
        ("CLIP_vit_base_patch16_224", {"return_embed": True, "class_num": 5}, "give one of them"),
        ("PPLCNet_x2_5", {"pretrained": True}, "timm has no weights for PPLCNet_x2_5: give a local file"),
        ("PPLCNetV2_base", {"stop": "stages.4", "input_size": SMALL}, "no layer 'stages.4'; the closest are 'stages"),
    ],
)
def test_what_the_originals_networks_refuse(name, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        create_backbone(name, **options)
    assert "\n" not in str(caught.value)


def test_use_ssld_says_that_it_has_no_effect(monkeypatch, resnet18, capsys):
    monkeypatch.setattr(backbones, "_build", lambda *args: copy.deepcopy(resnet18))
    create_backbone("ResNet18", pretrained=True, use_ssld=True, input_size=SMALL)
    assert capsys.readouterr().out.startswith("use_ssld has no effect")
    create_backbone("ResNet18", pretrained=True, input_size=SMALL)
    assert capsys.readouterr().out == ""


# Stages and depths


def multipliers(module):
    return {name.removeprefix("model."): p.lr_multiplier for name, p in module.named_parameters()}


def test_multipliers_of_a_resnet():
    module = create_backbone("ResNet18", class_num=5, lr_mult_list=[0, 0.1, 0.2, 0.3, 2], input_size=SMALL)
    found = multipliers(module)
    expected = {"conv1": 0.0, "bn1": 0.0, "layer1": 0.1, "layer2": 0.2, "layer3": 0.3, "layer4": 2.0, "fc": 1.0}
    assert found == {name: expected[name.split(".")[0]] for name in found} and len(found) == 62
    assert all(p.requires_grad == (p.lr_multiplier > 0) for p in module.parameters())
    assert not any(hasattr(p, "lr_multiplier") for p in create_backbone("ResNet18", input_size=SMALL).parameters())


def test_multipliers_survive_the_cut_and_count_the_whole_model():
    module = create_backbone("ResNet18", stop="layer2", lr_mult_list=[1, 2, 3, 4, 5], input_size=SMALL)
    assert set(multipliers(module).values()) == {1.0, 2.0, 3.0}
    # six numbers, as lr_mult_list of the original's pp_lcnet.py: conv1 and blocks2 to blocks6
    module = create_backbone("PPLCNet_x0_25", stop="flatten", lr_mult_list=[1, 2, 3, 4, 5, 6], input_size=SMALL)
    found = multipliers(module)
    assert [found[f"blocks.{i}.0.bn1.weight"] for i in range(6)] == [2, 3, 4, 5, 5, 6]
    assert (found["conv_stem.weight"], found["conv_head.weight"]) == (1, 1)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("ResNet18", [1, 1, 1], "has 3 numbers, resnet18 wants 5: one for each of the stages that begin at 'conv1"),
        ("PPLCNet_x0_25", [1] * 7, "lr_mult_list has 7 numbers, PPLCNet_x0_25 wants 6"),
        ("WideResNet", [1], "WideResNet wants 4: .* at 'conv1.weight', 'block1.0.before.0.weight'"),
        ("AlexNet", [1, 1], "alexnet wants 1: .* at 'features.0.weight'$"),
        ("ResNet18", [1, 1, 1, 1, -1], "not a list of numbers from 0 on"),
        ("ResNet18", 0.5, "lr_mult_list is 0.5, not a list"),
    ],
)
def test_multipliers_that_cannot_be(name, given, words):
    with pytest.raises(ValueError, match=words) as caught:
        create_backbone(name, lr_mult_list=given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "stop", "counts", "deepest"),
    [
        ("ResNet18", "flatten", [3, 12, 15, 15, 15], 8),
        ("ResNet18", "layer2", [3, 12, 15], 4),
        ("PPLCNet_x0_25", None, [3, 6, 12, 12, 36, 20, 2], 14),
        ("test_vit", "norm", [4, 12, 12, 12, 12, 12, 14], 6),
        ("WideResNet", "bn1", [1, 25, 23, 25], 12),
        ("PPLCNetV2_base", "stages", [9, 12, 12, 111, 21], 12),
    ],
)
def test_depths(name, stop, counts, deepest):
    module = create_backbone(name, stop=stop, input_size=(3, 160, 160) if name == "test_vit" else SMALL)
    names = [parameter for parameter, _ in module.named_parameters()]
    depths = layer_depths(module)
    assert [len(stage) for stage in stages(module)] == counts
    assert sorted(itertools.chain(*stages(module))) == sorted(names) == sorted(depths)
    assert (min(depths.values()), max(depths.values())) == (0, deepest)
    assert [depths[name] for stage in stages(module) for name in stage] == sorted(depths.values())
    assert layer_depths(module.model) == {name.removeprefix("model."): depth for name, depth in depths.items()}


def test_depths_of_a_model_that_does_not_say_its_stages():
    assert stages(Habits()) == [
        ["scale", "stem.weight", "stem.bias"],
        ["body.weight", "body.bias"],
        ["late.weight", "late.bias"],
    ]
    assert layer_depths(Habits())["late.bias"] == 2


# Weights


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(3)
    return timm.create_model("test_resnet", num_classes=10).half().float().state_dict()


@pytest.mark.parametrize("wrap", [dict, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
def test_loads_a_local_file_before_cutting(tiny, wrap, tmp_path):
    half = {f"module.{name}": value.half() for name, value in tiny.items() if "num_batches" not in name}
    torch.save(wrap(half), tmp_path / "w.pth")
    module = create_backbone("test_resnet", pretrained=str(tmp_path / "w.pth"), stop="layer3", input_size=SMALL)
    for name, value in module.model.state_dict().items():
        assert value.dtype == tiny[name].dtype and torch.equal(value, tiny[name])


def test_loads_safetensors_with_and_without_its_classifier(tiny, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(tiny, path)
    same = create_backbone("test_resnet", pretrained=path, class_num=10, input_size=SMALL)
    assert torch.equal(same.model.fc.weight, tiny["fc.weight"])
    fresh = create_backbone("test_resnet", pretrained=path, class_num=4, input_size=SMALL)
    pooled = create_backbone("test_resnet", pretrained=path, input_size=SMALL)
    assert torch.equal(fresh.model.conv1[0].weight, tiny["conv1.0.weight"])
    assert torch.equal(pooled.model.conv1[0].weight, tiny["conv1.0.weight"])
    with pytest.raises(ValueError, match=r"needs 'fc.bias', 'fc.weight' when cut at 'fc'"):
        create_backbone("test_resnet", pretrained=path, stop="fc", input_size=SMALL)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda s: {k: v for k, v in s.items() if k != "layer1.0.conv1.weight"},
            "1 are missing .'layer1.0.conv1.weight",
        ),
        (lambda s: {**s, "extra": torch.ones(1)}, "1 are unexpected .'extra'.; strict: False takes the others$"),
        (
            lambda s: {**s, "bn1.weight": torch.ones(1)},
            "of [0-9]+ tensors 1 are of another shape .'bn1.weight'.; strict: False takes the others$",
        ),
        (lambda s: {"epoch": 3, "names": ["a"]}, "holds no state dict"),
        (lambda s: [1, 2], "holds no state dict"),
        (lambda s: {"state_dict": {"a": Path("/")}}, "cannot be read as a file of weights"),
    ],
)
def test_files_that_do_not_fit(tiny, spoil, words, tmp_path):
    torch.save(spoil(tiny), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=words) as caught:
        create_backbone("test_resnet", pretrained=str(tmp_path / "w.pth"), stop="layer1", input_size=SMALL)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_files(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"weights")
    with pytest.raises(ValueError, match="cannot be read as a file of weights"):
        create_backbone("test_resnet", pretrained=str(tmp_path / "w.pth"))
    with pytest.raises(ValueError, match=r"there is no weights file 'none\.pth': give a local file"):
        create_backbone("test_resnet", pretrained="none.pth")


def test_loads_real_weights():
    path = SHARED / "weights" / "mobilenetv2_100_imagenetnorm_fp16.pth"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    options = {"pretrained": str(path), "pad_type": "same", "input_size": SMALL}
    module = create_backbone("MobileNetV2", stop="flatten", **options)
    given = torch.load(path, weights_only=True)
    assert torch.equal(module.model.conv_stem.weight, given["conv_stem.weight"].float())
    assert create_backbone("MobileNetV2", stop="classifier", **options).out_shape == (1000,)


def test_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    def fail():
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.utils.get_session", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    start = time.perf_counter()
    with pytest.raises(ValueError) as caught:
        create_backbone("ResNet18", pretrained=True)
    assert str(caught.value) == (
        "the weights of resnet18 cannot be fetched from timm's hub: "
        "give a local file in Arch.Backbone.pretrained, or False"
    )
    assert time.perf_counter() - start < 20
    assert huggingface_hub.constants.HF_HUB_OFFLINE == offline


# Every family of models


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_sweep_over_families(name):
    dead = [row for row in sweep(name) if row[4]]
    assert not dead


@pytest.mark.parametrize("pool", ["cls", "avg", "cls+avg", "gem"])
@pytest.mark.parametrize(
    "name", ["test_vit", "test_vit2", "test_vit3"]
)  # a class token; a register; that and attention
def test_pool_takes_one_vector_of_the_tokens(name, pool):
    size, prefix = (3, 32, 32), 1
    if "cls" in pool and name != "test_vit":
        with pytest.raises(ValueError, match=f"but {name} has no class token; take 'avg' or 'gem'"):
            create_backbone(name, pool=pool, input_size=size)
        return
    torch.manual_seed(0)
    backbone = create_backbone(name, pool=pool, input_size=size).eval()
    x = torch.randn(2, *size)
    with torch.no_grad():
        tokens = backbone.model.forward_features(x)
        mean = tokens[:, prefix:].mean(1)
        if pool == "gem":
            wanted = backbone.model.fc_norm(tokens)[:, prefix:].clamp_min(1e-6).pow(3).mean(1).pow(1 / 3)
        elif pool == "cls+avg":
            wanted = torch.cat([tokens[:, 0], mean], 1)
        else:
            wanted = backbone.model.fc_norm(tokens[:, 0] if pool == "cls" else mean)
        torch.testing.assert_close(backbone(x), wanted)
    assert backbone.out_shape == wanted.shape[1:] and backbone.layout == "NC"
    assert set(layer_depths(backbone)) == {name for name, _ in backbone.named_parameters()}
    if name == "test_vit2" and pool == "avg":  # what timm pools itself
        plain = create_backbone(name, input_size=size)
        plain.load_state_dict(backbone.state_dict())
        assert torch.equal(plain.eval()(x), backbone(x))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("resnet18", {"pool": "cls"}, "resnet18 has no tokens"),
        ("test_vit", {"pool": "mean"}, "pool is 'mean', and there is 'cls', 'avg', 'cls\\+avg', 'gem'"),
        ("test_vit", {"pool": "cls", "class_num": 5}, "give no class_num, stop layer or return_embed"),
        ("test_vit", {"pool": "cls", "stop": "blocks.1"}, "give no class_num, stop layer or return_embed"),
    ],
)
def test_a_pool_that_cannot_be(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_backbone(name, input_size=(3, 32, 32), **options)
