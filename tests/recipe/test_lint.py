"""What the lint finds, each finding planted and then taken away again; the shipped configurations are free of them."""

import shutil

import pytest
from conftest import tiny_config

from recnb import build_loaders, load_config
from recnb.recipe.lint import lint, stop
from recnb.registry import ConfigError

PLANTED = [
    ("DataLoader.Train.sampler", {"name": "DistributedBatchSampler", "batch_size": 8}, "take PKSampler"),
    ("Loss.Train.1.SupConLoss.views", 3, "write views: 2"),
    ("Loss.Train", [{"CELoss": {"weight": 0.5}}], "write weight: 1.0 for the original's behaviour"),
    ("Arch.infer_add_softmax", True, "write infer_add_softmax: False"),
    ("Optimizer.lr.warmup_epoch", 2, "lower it or raise Global.epochs"),
    ("Loss.Train", [{"CELoss": {"weight": 0}}, {"SupConLoss": {"weight": 0, "views": 2}}], "give one loss a weight"),
    ("Arch.infer_add_softmax", "false", "write False"),
    (
        "Loss.Train",
        [{"CELoss": {"weight": 1.0}}, {"MSMLoss": {"weight": 0.5, "margin": 0.1}}],
        "coming from there, write weight: 1.0 for the same pull",
    ),
    ("Global.use_dali", True, "leave it out"),
    ("Global.devices", 2, "multiply learning_rate by their number (Adam: by its root), or divide batch_size by it"),
    ("Slim", {"prune": {"name": "fpgm"}}, "leave the section out"),
    ("Metric.Train", [{"TopkAcc": {"topk": [1]}}], "leave it out"),
    (
        "DataLoader.Eval.Query.dataset.transform_ops",
        [{"RandFlipImage": {}}, {"ResizeImage": {"size": 32}}],
        "leave it out there",
    ),
]


def mends(config) -> list[str]:
    return [finding.mend for finding in lint(load_config(config))]


def test_an_ordinary_configuration_has_no_finding(config_file):
    assert mends(config_file()) == []


@pytest.mark.parametrize(("key", "value", "mend"), PLANTED)
def test_each_finding_names_what_would_mend_it(config_file, key, value, mend):
    assert mends(config_file({key: value})) == [mend]


@pytest.mark.parametrize(
    ("ops", "mend"),
    [
        ([{"RandomErasing": {}}, {"NormalizeImage": {}}], "move it after NormalizeImage"),
        ([{"NormalizeImage": {}}, {"RandomErasing": {"mean": [0.5, 0.5, 0.5]}}], "write mean: [0., 0., 0.]"),
        ([{"NormalizeImage": {}}, {"RandomErasing": {}}], None),
    ],
)
def test_erasing_belongs_after_the_normalisation(config_file, ops, mend):
    found = mends(config_file({"DataLoader.Train.dataset.transform_ops": [{"ResizeImage": {"size": 32}}, *ops]}))
    assert found == ([mend] if mend else [])


def test_test_identities_that_are_trained_on_are_counted(config_file, drawn):
    cfg = load_config(config_file())
    assert lint(cfg, build_loaders(cfg)) == []
    cfg = load_config(config_file({"DataLoader.Train.dataset.cls_label_path": str(drawn / "gallery.txt")}))
    assert "9 of 9 identities" in lint(cfg, build_loaders(cfg))[0].what


def test_validation_identities_that_are_trained_or_tested_on_are_counted(config_file):
    lists = load_config(config_file())["DataLoader"]
    for part, where in (("Train", "training"), ("Eval", "Eval")):
        given = lists["Eval"] if part == "Eval" else {"Query": lists["Train"]}
        cfg = load_config(config_file({"DataLoader.Validation": given}))
        found = [finding for finding in lint(cfg, build_loaders(cfg)) if finding.place == "DataLoader.Validation"]
        assert [finding.what.split(" of ")[1] for finding in found] == [
            f"{9 if part == 'Eval' else 15} identities are in {where} too"
        ]
    cfg = load_config(config_file({"DataLoader.Validation": {"share": 0.2}}))
    assert lint(cfg, build_loaders(cfg)) == []


@pytest.mark.parametrize(
    ("name", "ops", "strict"),
    [
        ("test_resnet", {"auto": True}, None),
        ("test_resnet", {}, True),  # trained with 0.5, the default is ImageNet's
        ("test_resnet", {"mean": [0.5] * 3, "std": [0.5] * 3}, None),
        ("test_resnet", {"mean": [127.5] * 3, "std": [127.5] * 3, "scale": 1}, None),
        ("ResNet18", {}, None),
        ("ResNet18", {"auto": True}, None),
        ("mobilenetv2_100", {"mean": [0.5] * 3, "std": [0.5] * 3}, True),
    ],
)
def test_other_colours_than_the_weights_were_trained_on(config_file, name, ops, strict):
    transforms = [{"ResizeImage": {"size": 32}}, {"NormalizeImage": ops}]
    changes = {"Arch.Backbone.name": name, "DataLoader.Train.dataset.transform_ops": transforms}
    cfg = load_config(config_file(changes))
    loaders = build_loaders(cfg)
    assert lint(cfg, loaders) == [], "weights that are not pretrained take any"
    cfg["Arch"]["Backbone"]["pretrained"] = True
    assert [finding.strict for finding in lint(cfg, loaders)] == ([strict] if strict else [])
    cfg["Arch"]["Backbone"]["pretrained"] = "own.pth"
    assert [finding.strict for finding in lint(cfg, loaders)] == ([False] if strict else [])


def test_ops_of_chance_do_not_pass_for_another_normalisation(config_file):
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
    transforms = [
        {"ResizeImage": {"size": 32}},
        {"ColorJitter": jitter},
        {"AutoAugment": {}},
        {"NormalizeImage": {"auto": True}},
        {"RandomErasing": {"EPSILON": 1.0}},
    ]
    changes = {"Arch.Backbone.name": "ResNet18", "DataLoader.Train.dataset.transform_ops": transforms}
    cfg = load_config(config_file(changes))
    loaders = build_loaders(cfg)
    cfg["Arch"]["Backbone"]["pretrained"] = True
    assert lint(cfg, loaders) == []


def test_auto_is_written_out(config_file):
    transforms = [{"ResizeImage": {"size": 32}}, {"NormalizeImage": {"auto": True}}]
    cfg = load_config(config_file({"DataLoader.Train.dataset.transform_ops": transforms}))
    ops = cfg["DataLoader"]["Train"]["dataset"]["transform_ops"]
    assert ops[1] == {"NormalizeImage": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    transforms[1]["NormalizeImage"]["mean"] = [0.5] * 3
    with pytest.raises(ConfigError, match=r"ops\.1\.NormalizeImage\.mean: comes from the backbone with auto: True"):
        load_config(config_file({"DataLoader.Train.dataset.transform_ops": transforms}))


def test_weights_of_one_size(config_file):
    cfg = load_config(config_file({"Arch.Backbone.name": "vit_tiny_patch16_224"}))
    cfg["Arch"]["Backbone"]["pretrained"] = "own.pth"
    found = [finding for finding in lint(cfg, build_loaders(cfg)) if finding.place == "Global.image_shape"]
    assert "[3, 32, 32], but the weights of Arch.Backbone were trained with [3, 224, 224]" in found[0].what


@pytest.mark.parametrize("name", ["demo", "grocery", "omniglot"])
def test_the_shipped_configurations_have_no_finding(name):
    assert mends(f"configs/{name}.yaml") == []


def test_training_images_of_another_size_are_found(config_file):
    cfg = load_config(config_file({"DataLoader.Train.dataset.transform_ops": [{"ResizeImage": {"size": [24, 32]}}]}))
    (finding,) = lint(cfg, build_loaders(cfg))
    assert finding.what == "images of [3, 32, 24], Global.image_shape is [3, 32, 32]"


@pytest.mark.parametrize(("backbone", "strict"), [("resnet18", False), ("vit_tiny_patch16_224", True)])
def test_an_image_shape_that_the_images_do_not_have_is_found(config_file, backbone, strict):
    cfg = load_config(config_file({"Global.image_shape": [3, 48, 32], "Arch.Backbone.name": backbone}))
    (finding,) = lint(cfg, build_loaders(cfg))
    assert finding.what == "[3, 48, 32], but the evaluation's transform_ops make images of [3, 32, 32]"
    assert (finding.mend, finding.strict) == ("write image_shape: [3, 32, 32]", strict)


def test_strict_findings_stop_the_run(config_file):
    stop(lint(load_config(config_file({"Global.use_dali": True}))))
    with pytest.raises(ConfigError, match=r"Loss\.Train: every weight is 0: no gradient comes of it"):
        stop(lint(load_config(config_file({"Loss.Train": [{"CELoss": {"weight": 0}}, {"CELoss": {"weight": 0}}]}))))


def test_doubled_rows_count_once_and_copies_under_another_name_are_found(drawn, tmp_path, capsys):
    data = shutil.copytree(drawn, tmp_path / "data")
    lines = (data / "gallery.txt").read_text().splitlines()
    first = lines[0].split()
    shutil.copy(data / "images" / first[0], data / "images" / "copy.png")
    (data / "gallery.txt").write_text("\n".join([*lines, *lines, "copy.png " + " ".join(first[1:])]) + "\n")
    cfg = load_config(tiny_config(data, tmp_path / "config.yaml"))
    loaders = build_loaders(cfg)
    assert len(loaders.gallery.dataset) == len(lines) + 1
    assert f"{len(lines)} rows name an image that the list has already" in capsys.readouterr().out
    found = [finding for finding in lint(cfg, loaders) if "exact copies" in finding.what]
    assert [finding.what.split(" (")[0] for finding in found] == ["1 images are exact copies of others"]
    stop(found)
    cfg["Global"]["on_finding"] = "stop"
    with pytest.raises(ConfigError, match=r"1 images are exact copies of others .*keep one of each in the lists"):
        stop(lint(cfg, loaders))
    assert not [
        finding for finding in lint(load_config(tiny_config(drawn, tmp_path / "b.yaml"))) if "cop" in finding.what
    ]
