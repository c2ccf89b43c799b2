"""Every mistake in a file ends in one sentence that names its place; the lists here name images that do not exist."""

import copy
import re

import pytest
import torch
import yaml
from conftest import tiny_config

from recnb import build_learner, build_loaders, build_model, load_config
from recnb.data.images import DataError
from recnb.recipe.reading import as_yaml, parse, read_yaml
from recnb.recipe.schema import lookup
from recnb.recipe.settings import GLOBAL
from recnb.registry import ConfigError, suggest

TRAIN, QUERY, GALLERY = "DataLoader.Train", "DataLoader.Eval.Query", "DataLoader.Eval.Gallery"


@pytest.fixture
def config(tmp_path):
    """A function from changes to the path of a file whose lists name 12 identities x 4 images, none of them on disk."""
    lists = {"train": (range(12), (0, 1, 2, 2)), "query": (range(20, 24), (0,)), "gallery": (range(20, 24), (1, 2))}
    for name, (ids, cameras) in lists.items():
        lines = [f"{i}/{k}.jpg {i} {camera}\n" for i in ids for k, camera in enumerate(cameras)]
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    return lambda changes=None: tiny_config(tmp_path, tmp_path / "config.yaml", changes)


def refused(path, overrides=None) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


def written(tmp_path, text: str):
    path = tmp_path / "written.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- Reading a file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind"), [("- Global\n- Arch\n", "list"), ("5\n", "int"), ("Arch\n", "str"), ("", "NoneType")]
)
def test_what_is_not_a_mapping(tmp_path, text, kind):
    path = written(tmp_path, text)
    assert refused(path).startswith(f"{path}: holds a {kind}, not a mapping of sections")


def test_a_tag_that_would_build_an_object(tmp_path):
    path = written(tmp_path, f"Global:\n  seed: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    message = refused(path)
    assert message.startswith(f"{path} line 2: ")
    assert "python/object/apply:os.mkdir' would build an object, and only plain values are allowed here" in message
    assert not (tmp_path / "made").exists()


def test_a_key_given_twice(tmp_path):
    path = written(tmp_path, "Global:\n  epochs: 3\n  seed: 1\n  epochs: 4\n")
    assert refused(path) == f"{path} line 4: the key 'epochs' is given twice"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Global: {epochs: 3\nArch: 1\n", " line 2: "),
        ("Global:\n\tepochs: 3\n", " line 2: "),
        ("Global: {[1, 2]: 3}\n", " line 1: found unhashable key"),
    ],
)
def test_broken_yaml_names_the_file(tmp_path, text, message):
    path = written(tmp_path, text)
    assert refused(path).startswith(f"{path}{message}")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "gbk.yaml").write_bytes("Global: {output_dir: 车辆}\n".encode("gbk"))
    assert f"{tmp_path / 'gbk.yaml'}: 'utf-8' codec" in refused(tmp_path / "gbk.yaml")
    assert refused(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"
    assert refused(tmp_path / "gkb.yaml").endswith("gkb.yaml: there is no such file; did you mean 'gbk.yaml'?")


def test_byte_order_mark_comments_and_other_scripts(config, tmp_path):
    text = config({"Global.output_dir": "./输出/"}).read_text(encoding="utf-8")
    path = tmp_path / "marked.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + f"# 全局设置\n{text}".replace("\n", "\r\n").encode())
    assert load_config(path)["Global"]["output_dir"] == "./输出/"


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "0.001", "+1e-3"])
def test_numbers_with_exponents(tmp_path, text):
    assert read_yaml(written(tmp_path, f"rate: {text}\n")) == {"rate": 0.001}


@pytest.mark.parametrize(
    ("text", "value"),
    [("0o17", 15), ("017", 17), ("0x1F", 31), ("-8", -8), (".5", 0.5), ("yes", "yes"), ("off", "off"), ("True", True),
     ("1:30:00", "1:30:00"), ("1_000", "1_000"), ("2024-13-45", "2024-13-45"), ("2024-01-02", "2024-01-02"),
     ("~", None), ("'0o17'", "0o17"), ("'1e3'", "1e3")],
)  # fmt: skip
def test_values_are_those_of_yaml_1_2(tmp_path, text, value):
    read = read_yaml(written(tmp_path, f"key: {text}\n"))["key"]
    assert read == value and type(read) is type(value)
    assert read_yaml(written(tmp_path, as_yaml({"key": value}))) == {"key": value}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[", " line 1: expected the node content"),
        ("*a", " line 1: found undefined alias"),
        ("{a: 1, a: 2}", " line 1: the key 'a' is given twice"),
        ("!!python/name:os.system x", "python/name:os.system' would build an object"),
        ("&a [*a]", " line 1: an anchor contains itself"),
        ("9" * 5000, ": Exceeds the limit"),
    ],
)
def test_a_value_by_itself_ends_in_the_same_sentence(text, problem):
    with pytest.raises(ConfigError, match=r"^-o Global\.epochs") as error:
        parse(text, "-o Global.epochs")
    assert problem in str(error.value) and "\n" not in str(error.value)


def test_an_index_is_written_in_plain_digits(config):
    assert "override 'Loss.Train.\u00b2'" in refused(config(), {"Loss.Train.\u00b2": 1})


def test_merged_keys_are_not_given_twice(tmp_path):
    text = "base: &base {size: 32, seed: 1}\nother: {<<: *base, size: 64}\n"
    assert read_yaml(written(tmp_path, text))["other"] == {"size": 64, "seed": 1}


# --- The checked configuration ----------------------------------------------------------------------------------------


def test_global_is_filled_up(config):
    given = {"device": "cpu", "seed": 0, "epochs": 2, "image_shape": [3, 32, 32], "save_interval": 0}
    assert load_config(config())["Global"] == {**GLOBAL, **given}
    assert (
        load_config(config({"Global": None, "Arch.Head": ..., "Loss": {"Train": [{"SupConLoss": {}}]}}))["Global"]
        == GLOBAL
    )


@pytest.mark.parametrize(
    ("section", "given", "filled"),
    [
        ("AMP", {"level": "O2"}, ("use_amp", True)),
        ("EMA", {}, ("decay", 0.9999)),
        ("Retention", {"pull": 0.1}, ("batch_norm", "trained")),
        ("Ladder", {"folds": 2}, ("minutes", 20.0)),
        ("DataLoader.Validation", {"share": 0.2}, ("seed", 0)),
    ],
)
def test_a_section_that_the_file_has_is_filled_up(config, section, given, filled):
    cfg = lookup(load_config(config({section: given})), section)
    assert cfg[filled[0]] == filled[1] and given.items() <= cfg.items()
    assert lookup(load_config(config()), section) is None


def test_a_configuration_shares_nothing_with_the_defaults(config):
    before = copy.deepcopy(GLOBAL)
    overrides = {"Global.image_shape.1": 64}
    cfg = load_config(config({"Global.image_shape": ...}), overrides)
    assert cfg["Global"]["image_shape"] == [3, 64, 224]
    assert before == GLOBAL


def test_aliases_of_a_file_are_values_of_their_own(config, tmp_path):
    content = yaml.safe_load(config().read_text())
    evaluation = content["DataLoader"]["Eval"]
    evaluation["Gallery"]["dataset"]["transform_ops"] = evaluation["Query"]["dataset"]["transform_ops"]
    path = written(tmp_path, yaml.safe_dump(content))
    assert "*id" in path.read_text()
    cfg = load_config(path, {f"{QUERY}.dataset.transform_ops.ResizeImage.size": 48})
    sizes = [cfg["DataLoader"]["Eval"][part]["dataset"]["transform_ops"][0] for part in ("Query", "Gallery")]
    assert sizes == [{"ResizeImage": {"size": 48}}, {"ResizeImage": {"size": 32}}]


def test_a_written_configuration_loads_to_itself(config, tmp_path):
    cfg = load_config(config())
    assert load_config(written(tmp_path, yaml.safe_dump(cfg))) == cfg


UNKNOWN = [
    ({"Golbal": {}}, "Golbal: there is no such key; did you mean 'Global'?"),
    ({"Global.epoch": 3}, "Global.epoch: there is no such key; did you mean 'epochs'?"),
    ({"DataLoader.Trian": {}}, "DataLoader.Trian: there is no such key; did you mean 'Train'?"),
    ({f"{QUERY}.datasets": {}}, f"{QUERY}.datasets: there is no such key; did you mean 'dataset'?"),
    ({f"{TRAIN}.loader.workers": 2}, f"{TRAIN}.loader.workers: there is no such key; did you mean 'num_workers'?"),
    ({"Arch.Nek": {}}, "Arch.Nek: there is no such key; did you mean 'Neck'?"),
    ({"Loss.Trian": []}, "Loss.Trian: there is no such key; did you mean 'Train'?"),
    ({f"{TRAIN}.dataset.name": "VeriWld"}, f"{TRAIN}.dataset: there is no dataset 'VeriWld'; did you mean 'VeriWild'?"),
    (
        {f"{TRAIN}.sampler.name": "PkSampler"},
        f"{TRAIN}.sampler: there is no sampler 'PkSampler'; did you mean 'PKSampler'?",
    ),
    (
        {f"{TRAIN}.dataset.transform_ops.1": {"RandFlip": {}}},
        f"{TRAIN}.dataset.transform_ops.1.RandFlip: there is no transform 'RandFlip'; did you mean 'RandFlipImage'?",
    ),
    ({"Arch.Neck.name": "VehicleNek"}, "Arch.Neck: there is no neck 'VehicleNek'; did you mean 'VehicleNeck'?"),
    ({"Arch.Head.name": "ArcMargins"}, "Arch.Head: there is no head 'ArcMargins'; did you mean 'ArcMargin'?"),
    (
        {"Loss.Train.1": {"SupconLoss": {}}},
        "Loss.Train.1.SupconLoss: there is no loss 'SupconLoss'; did you mean 'SupConLoss'?",
    ),
    ({"Optimizer.name": "Adamw"}, "Optimizer: there is no optimizer 'Adamw'; did you mean 'AdamW'?"),
    (
        {"Optimizer.lr.name": "Cosin"},
        "Optimizer.lr: there is no learning-rate schedule 'Cosin'; did you mean 'Cosine'?",
    ),
    ({"Metric.Eval.1": {"map": {}}}, "Metric.Eval.1.map: there is no metric 'map'; did you mean 'mAP'?"),
    ({"Arch.Head.margn": 0.3}, "Arch.Head.margn: ArcMargin has no such argument; did you mean 'margin'?"),
    (
        {"Arch.Neck.out_chanels": 8, "Arch.Neck.name": "VehicleNeck", "Arch.Neck.class_num": ...},
        "Arch.Neck.out_chanels: VehicleNeck has no such argument; did you mean 'out_channels'?",
    ),
    (
        {"Loss.Train.1.SupConLoss.temprature": 1},
        "Loss.Train.1.SupConLoss.temprature: SupConLoss has no such argument; did you mean 'temperature'?",
    ),
    (
        {f"{TRAIN}.sampler.sample_per_ids": 2},
        f"{TRAIN}.sampler.sample_per_ids: PKSampler has no such argument; did you mean 'sample_per_id'?",
    ),
    (
        {f"{TRAIN}.dataset.transform_ops.1.RandFlipImage.flipcode": 1},
        f"{TRAIN}.dataset.transform_ops.1.RandFlipImage.flipcode: RandFlipImage has no such argument; "
        "did you mean 'flip_code'?",
    ),
    (
        {"Optimizer.lr.learnin_rate": 1},
        "Optimizer.lr.learnin_rate: Cosine has no such argument; did you mean 'learning_rate'?",
    ),
    (
        {"Optimizer.regularizer": {"name": "L2", "coef": 1}},
        "Optimizer.regularizer.coef: L2 has no such argument; did you mean 'coeff'?",
    ),
]


@pytest.mark.parametrize(("changes", "message"), UNKNOWN, ids=[next(iter(changes)) for changes, _ in UNKNOWN])
def test_unknown_sections_names_and_arguments(config, changes, message):
    assert refused(config(changes)) == message


KINDS = [
    ({"Global.epochs": "ten"}, "Global.epochs: 'ten' is a str, not int"),
    ({"Global.epochs": True}, "Global.epochs: True is a bool, not int"),
    ({"Global.eval_during_train": "yes please"}, "Global.eval_during_train: 'yes please' is a str, not bool"),
    ({"Global.class_num": "15"}, "Global.class_num: '15' is a str, not int | None"),
    ({"Global.eval_interval": 0}, "Global.eval_interval: 0 is too small; the least is 1"),
    ({"Global.seed": -1}, "Global.seed: -1 is too small; the least is 0"),
    ({"Global.device": "gpus"}, "Global.device: 'gpus' is not supported; did you mean 'gpu'?"),
    ({"Global.image_shape": [32, 32]}, "Global.image_shape: [32, 32] is not [3, height, width]"),
    ({"Global.image_shape": [1, 32, 32]}, "Global.image_shape: [1, 32, 32] is not [3, height, width]"),
    ({"Global": [1]}, "Global: holds [1], not a mapping of checkpoints, "),
    ({"Loss": 3}, "Loss: holds 3, not a mapping of Train, Eval"),
    ({"Arch.Head": "ArcMargin"}, "Arch.Head: holds 'ArcMargin', not a mapping with a 'name'"),
    ({"Arch.Head.margin": "wide"}, "Arch.Head.margin: 'wide' is a str, ArcMargin wants float"),
    ({"Arch.Head.easy_margin": 1}, "Arch.Head.easy_margin: 1 is a int, ArcMargin wants bool"),
    ({f"{TRAIN}.sampler.batch_size": 8.5}, f"{TRAIN}.sampler.batch_size: 8.5 is a float, PKSampler wants int"),
    (
        {f"{TRAIN}.dataset.transform_ops.0.ResizeImage.size": "big"},
        f"{TRAIN}.dataset.transform_ops.0.ResizeImage.size: 'big' is a str, ResizeImage wants int | list[int] | None",
    ),
    ({f"{TRAIN}.loader.num_workers": "6"}, f"{TRAIN}.loader.num_workers: '6' is a str, not int | None"),
    ({f"{QUERY}.loader.num_workers": -1}, f"{QUERY}.loader.num_workers: -1 is too small; the least is 0"),
    ({f"{TRAIN}.loader.use_shared_memory": 3}, f"{TRAIN}.loader.use_shared_memory: 3 is a int, not bool"),
    ({"Loss.Train": {"CELoss": {}}}, "Loss.Train: must be a list of '- Name: {arguments}' entries"),
    ({"Loss.Train.0": "CELoss"}, "Loss.Train.0: 'CELoss' is not of the form '- Name: {arguments}'"),
    ({"Loss.Train.0": {"CELoss": 1.0}}, "Loss.Train.0: {'CELoss': 1.0} is not of the form '- Name: {arguments}'"),
    ({"Loss.Train.0": {"CELoss": {}, "SupConLoss": {}}}, "Loss.Train.0: {'CELoss': {}, 'SupConLoss': {}} is not of"),
    ({"Loss.Train.0": {"CELoss": {"name": "SupConLoss"}}}, "Loss.Train.0: {'CELoss': {'name': 'SupConLoss'}} is not"),
]


KINDS += [
    ({"Optimizer": "x"}, "Optimizer: 'x' is a str, not dict | list"),
    (
        {f"{TRAIN}.dataset.transform_ops.1": {"RandCropImage": {"size": 32, "ratio": ["wide", 1.0]}}},
        f"{TRAIN}.dataset.transform_ops.1.RandCropImage.ratio: 'wide' is a str, RandCropImage wants float",
    ),
    ({"Global.image_shape": [3, "wide", 32]}, "Global.image_shape: 'wide' is a str, not int"),
    ({"Global.image_shape": [3, 10**9, 32]}, "Global.image_shape: 1000000000 is too large; the most is 16,384"),
    ({"Global.seed": 10**70}, "Global.seed: the number is too large; the most is"),
    ({"Global.devices": 0}, "Global.devices: 0 is too small; the least is 1"),
    ({"Global.devices": "many"}, "Global.devices: 'many' is not supported; there is auto"),
    ({f"{TRAIN}.loader.num_workers": 100_000}, f"{TRAIN}.loader.num_workers: 100000 is too large; the most is "),
    ({f"{TRAIN}.loader.prefetch_factor": 10**6}, f"{TRAIN}.loader.prefetch_factor: 1000000 is too large; the most is"),
    ({"Arch.BackboneStopLayer.name": ["layer3"]}, "Arch.BackboneStopLayer.name: ['layer3'] is a list, not str | None"),
    ({"Arch.freeze": [3]}, "Arch.freeze: 3 is a int, not str"),
    ({f"{TRAIN}.sampler.batch_size": 0}, f"{TRAIN}.sampler.batch_size: 0 is too small; the least is 1"),
    ({f"{QUERY}.sampler.batch_size": -1}, f"{QUERY}.sampler.batch_size: -1 is too small; the least is 1"),
    (
        {"Arch.Neck.class_num": 10**18},
        "Arch.Neck.class_num: 1000000000000000000 is too large; the most is 1,000,000,000",
    ),
    ({"Arch.Head.class_num": 0}, "Arch.Head.class_num: 0 is too small; the least is 1"),
    ({"Optimizer.lr.learning_rate": float("inf")}, "Optimizer.lr.learning_rate: inf is not a finite number"),
    ({"Optimizer.lr.learning_rate": -0.1}, "Optimizer.lr.learning_rate: -0.1 is too small; the least is 0"),
    (
        {"Loss.Train.1.SupConLoss.temperature": 0},
        "Loss.Train.1.SupConLoss.temperature: 0 is too small; it has to be above",
    ),
    (
        {"Metric.Eval.0": {"Recallk": {"topk": [None]}}},
        "Metric.Eval.0.Recallk.topk: None is a NoneType, Recallk wants int",
    ),
    ({"Metric.Eval.0": {"Recallk": {"topk": [0]}}}, "Metric.Eval.0.Recallk.topk: 0 is too small; the least is 1"),
    (
        {f"{TRAIN}.dataset.transform_ops.1": {"RandCropImage": {"size": 32, "scale": ["big", 1.0]}}},
        f"{TRAIN}.dataset.transform_ops.1.RandCropImage.scale: 'big' is a str, RandCropImage wants float",
    ),
    (
        {f"{TRAIN}.dataset.transform_ops.0": {"ResizeImage": {"size": 0}}},
        f"{TRAIN}.dataset.transform_ops.0.ResizeImage.size: 0 is too small; the least is 1",
    ),
]


@pytest.mark.parametrize(("changes", "message"), KINDS, ids=[str(changes) for changes, _ in KINDS])
def test_values_of_the_wrong_kind(config, changes, message):
    assert refused(config(changes)).startswith(message)


@pytest.mark.parametrize("section", ["DataLoader.Train.dataset", "Arch.Backbone", "Loss.Train", "Optimizer"])
def test_sections_that_cannot_be_left_out(config, section):
    assert re.match(
        rf"{section}(\.name)?: the file has no such section, and nothing can be trained without it",
        refused(config({section: ...})),
    )


@pytest.mark.parametrize(("there", "missing"), [("Query", "Gallery"), ("Gallery", "Query")])
def test_a_list_that_stands_alone_is_query_and_gallery(config, there, missing):
    lists = load_config(config({f"DataLoader.Eval.{missing}": ...}))["DataLoader"]["Eval"]
    assert lists[missing] == lists[there] and lists[missing] is not lists[there]


def test_classification_has_one_list(config):
    assert "DataLoader.Eval.Query: does not belong to Global.eval_mode classification" in refused(
        config({"Global.eval_mode": "classification"})
    )
    alone = {"DataLoader.Eval": {"dataset": {"name": "VeriWild", "image_root": ".", "cls_label_path": "query.txt"}}}
    assert load_config(config(alone))["Global"]["eval_mode"] == "classification"  # it follows from the file
    alone["Global.eval_mode"] = "retrieval"
    assert "DataLoader.Eval.dataset: does not belong to Global.eval_mode retrieval" in refused(config(alone))


def test_what_has_no_counterpart_says_why(config):
    assert refused(config({"UnLabelLoss": {"Train": []}})).startswith("UnLabelLoss: semi-supervised training")
    assert refused(config({"Global.train_mode": "metabin"})).startswith("Global.train_mode: other training loops")
    assert load_config(config({"Slim": {"quant": {"name": "pact"}}, "Global.use_dali": True}))


def test_a_sampler_without_a_name_is_the_plain_one(config):
    cfg = load_config(config({"DataLoader.Train.sampler": {"batch_size": 4, "shuffle": True}}))
    assert cfg["DataLoader"]["Train"]["sampler"]["name"] == "DistributedBatchSampler"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"AMP": {"level": "O3"}}, "AMP.level: 'O3' is not supported; there is O1, O2"),
        ({"AMP": {"scale_loss": "much"}}, "AMP.scale_loss: 'much' is a str, not float"),
        ({"AMP": {"dtype": "float8"}}, "AMP.dtype: 'float8' is not supported; did you mean 'float16'"),
        ({"AMP": {"levle": "O1"}}, "AMP.levle: there is no such key; did you mean 'level'"),
        ({"EMA": {"decay": 1.5}}, "EMA.decay: 1.5 is too large; it has to be below 1"),
        (
            {"Arch.head_feature_from": "head"},
            "Arch.head_feature_from: 'head' is not supported; there is backbone, neck",
        ),
        ({"Arch.name": "RecModle"}, "Arch.name: there is no model 'RecModle'; did you mean 'RecModel'"),
        ({"Arch": {"name": "DistillationModel", "models": []}}, "Arch.models: DistillationModel needs a list"),
        ({"Optimizer": [{"Adam": {"scope": "RecModel"}}]}, "Optimizer.0.Adam.lr: the file has no such section"),
        ({"Optimizer": [{"Adm": {"lr": {"name": "ConstLR", "learning_rate": 0.1}}}]}, "Optimizer.0.Adm: .*mean 'Adam'"),
        ({"Global.feature_binarize": "floor"}, "Global.feature_binarize: 'floor' is not supported"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_the_newer_sections_are_checked(config, changes, message):
    assert re.match(message, refused(config(changes)))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {},
            "DataLoader.Validation: has no images; give a share of the training identities, such as 'share: 0.15', or",
        ),
        ({"share": 1.5}, "DataLoader.Validation.share: 1.5 is too large; it has to be below 1"),
        ({"share": "half"}, "DataLoader.Validation.share: 'half' is a str, not float | None"),
        ({"share": 0.1, "seed": -1}, "DataLoader.Validation.seed: -1 is too small; the least is 0"),
        (
            {"share": 0.1, "Query": {"dataset": {}}},
            "DataLoader.Validation.Query: with a share, the images are those of",
        ),
        ({"shrae": 0.1}, "DataLoader.Validation.shrae: there is no such key; did you mean 'share'?"),
        ({"dataset": {}}, "DataLoader.Validation.dataset: does not belong to Global.eval_mode retrieval"),
    ],
)
def test_validation_lists_that_cannot_be(config, section, message):
    assert message in refused(config({"DataLoader.Validation": section}))


def test_validation_needs_to_know_how_images_are_read(config):
    changes = {"DataLoader.Eval": ..., "Global.eval_during_train": False, "DataLoader.Validation": {"share": 0.2}}
    assert "its images are read as those of DataLoader.Eval.Query, and there is no such" in refused(config(changes))


def test_nothing_to_evaluate_has_to_be_said(config):
    assert "set Global.eval_during_train: False" in refused(config({"DataLoader.Eval": ...}))
    assert load_config(config({"DataLoader.Eval": ..., "Global.eval_during_train": False}))["DataLoader"].keys() == {
        "Train"
    }


def test_a_loss_on_logits_needs_a_head(config):
    assert (
        refused(config({"Arch.Head": ...})) == "Loss.Train.0.CELoss: CELoss needs logits, and Arch.Head, which "
        "makes them, is missing"
    )
    assert "Loss.Eval.0.CELoss" in refused(config({"Arch.Head": ..., "Loss.Train": [{"SupConLoss": {}}]}))


# --- Overrides --------------------------------------------------------------------------------------------------------


def test_overrides_reach_any_place(config):
    cfg = load_config(
        config(),
        {
            "Global.epochs": 7,
            "Loss.Train.SupConLoss.weight": 0.5,
            "Loss.Train.0.CELoss.epsilon": 0.1,
            "Metric.Eval.1": {"mINP": {}},
            f"{TRAIN}.dataset.transform_ops.RandFlipImage": {"flip_code": 0},
            "Optimizer.lr.warmup_epoch": 1,
            "Global.image_shape.2": 64,
        },
    )
    assert cfg["Global"]["epochs"] == 7 and cfg["Global"]["image_shape"] == [3, 32, 64]
    assert cfg["Loss"]["Train"] == [
        {"CELoss": {"weight": 1.0, "epsilon": 0.1}},
        {"SupConLoss": {"weight": 0.5, "views": 2}},
    ]
    assert cfg["Metric"]["Eval"] == [{"Recallk": {"topk": [1, 5]}}, {"mINP": {}}]
    assert cfg["DataLoader"]["Train"]["dataset"]["transform_ops"][1] == {"RandFlipImage": {"flip_code": 0}}
    assert cfg["Optimizer"]["lr"]["warmup_epoch"] == 1


@pytest.mark.parametrize("first", ["Global.recipe", "Ladder.minutes"])
def test_an_override_may_set_how_the_ladder_is_climbed_that_another_asks_for(config, first):
    overrides = {"Global.recipe": "ladder", "Ladder.minutes": 5}
    overrides = {first: overrides[first], **overrides}
    assert load_config(config(), overrides)["Ladder"] == {"minutes": 5, "folds": None, "refit": True}
    assert "there is no 'Ladder'" in refused(config(), {"Ladder.minutes": 5})


def test_overrides_are_not_changed(config):
    overrides = {"Global.image_shape": [3, 32, 32], "Global.image_shape.1": 64, "Arch.Head": {"name": "FC"}}
    before = copy.deepcopy(overrides)
    cfg = load_config(config(), overrides)
    assert cfg["Global"]["image_shape"] == [3, 64, 32]
    cfg["Arch"]["Head"]["class_num"] = 5
    assert overrides == before


def test_a_whole_section_may_be_overridden(config):
    assert load_config(config(), {"Global": {"epochs": 1}})["Global"] == {**GLOBAL, "epochs": 1}


def test_none_removes_a_part(config):
    model = build_model(load_config(config(), {"Arch.Neck": None}))
    assert model.neck is None
    assert model.head.weight.shape == (12, model.backbone.out_channels)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [("Optimizer.lr.learning_rate", "1e-3", 0.001), ("Global.epochs", "3", 3), ("Arch.Head.scale", "30", 30)],
)
def test_numbers_handed_over_as_text(config, key, text, value):
    node = load_config(config(), {key: text})
    for step in key.split("."):
        node = node[step]
    assert node == value and type(node) is type(value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("Golbal.epochs", "override 'Golbal.epochs': there is no 'Golbal'; did you mean 'Global'?"),
        ("Global.epoch", "Global.epoch: there is no such key; did you mean 'epochs'?"),
        ("Arch.Haed.margin", "override 'Arch.Haed.margin': there is no 'Arch.Haed'; did you mean 'Head'?"),
        ("Arch.Head.margn", "Arch.Head.margn: ArcMargin has no such argument; did you mean 'margin'?"),
        (
            "Loss.Train.SupCon.weight",
            "override 'Loss.Train.SupCon.weight': 'Loss.Train' has no entry 'SupCon'; did you mean 'SupConLoss'?",
        ),
        (
            "Loss.Train.2.SupConLoss.weight",
            "override 'Loss.Train.2.SupConLoss.weight': 'Loss.Train' has no entry '2'; there is CELoss, SupConLoss",
        ),
        (
            "Loss.Train.².weight",
            "override 'Loss.Train.².weight': 'Loss.Train' has no entry '²'; there is CELoss, SupConLoss",
        ),
        ("Global.epochs.first", "override 'Global.epochs.first': there is no 'Global.epochs.first'; there is none"),
    ],
)
def test_unknown_overrides(config, key, message):
    assert refused(config(), {key: 1}) == message


def test_an_override_that_could_mean_two_entries(config):
    path = config({"Loss.Train": [{"SupConLoss": {"weight": 1}}, {"SupConLoss": {"weight": 2}}]})
    assert refused(path, {"Loss.Train.SupConLoss.weight": 3}) == (
        "override 'Loss.Train.SupConLoss.weight': 'Loss.Train' has 2 entries 'SupConLoss'; give the number of one, "
        "counted from 0"
    )
    assert load_config(path, {"Loss.Train.1.SupConLoss.weight": 3})["Loss"]["Train"][1] == {"SupConLoss": {"weight": 3}}


def test_overrides_that_are_no_mapping(config):
    assert refused(config(), "Global.epochs=3") == "overrides: 'Global.epochs=3' is a str, not a mapping of dotted keys"


# --- Sizes and counts that contradict each other ----------------------------------------------------------------------


VEHICLE = {
    "Arch.Neck": {"name": "VehicleNeck", "out_channels": 16},
    "Arch.BackboneStopLayer.name": "adaptive_avg_pool2d_0",
}
CONFLICTS = [
    (
        {**VEHICLE, "Arch.Neck.in_channels": 2048},
        "Arch.Neck.in_channels is 2048, but the backbone cut at adaptive_avg_pool2d_0 gives {channels}",
    ),
    (
        {"Arch.Neck.embedding_size": 7},
        "Arch.Neck.embedding_size is 7, but the backbone cut at flatten gives {channels}",
    ),
    ({"Arch.Head.embedding_size": 512}, "Arch.Head.embedding_size is 512, but Arch.Neck gives features of size 16"),
    (
        {"Arch.Neck": None, "Arch.Head.embedding_size": 512},
        "Arch.Head.embedding_size is 512, but Arch.Backbone gives features of size {channels}",
    ),
]


@pytest.mark.parametrize(("changes", "message"), CONFLICTS, ids=range(len(CONFLICTS)))
def test_sizes_that_conflict_name_both_places(config, changes, message):
    channels = build_model(load_config(config())).backbone.out_channels
    with pytest.raises(ConfigError, match=re.escape(message.format(channels=channels))):
        build_model(load_config(config(changes)))


def test_sizes_that_agree_or_are_left_out(config):
    model = build_model(load_config(config()))
    assert model.head.weight.shape == (12, 16)
    with torch.no_grad():
        assert model.eval()(torch.zeros(2, 3, 32, 32))["features"].shape == (2, 16)
    channels = model.backbone.out_channels
    given = {"Arch.Neck.embedding_size": channels, "Arch.Head.embedding_size": 16, "Arch.Head.class_num": 12}
    assert build_model(load_config(config(given))).head.weight.shape == (12, 16)


def test_two_class_numbers(config):
    assert refused(config({"Global.class_num": 30671, "Arch.Head.class_num": 431})).startswith(
        "Global.class_num is 30671, but Arch.Head.class_num is 431: "
    )


@pytest.mark.parametrize("place", ["Global.class_num", "Arch.Head.class_num"])
def test_a_class_number_below_the_lists(config, tmp_path, place):
    message = (
        f"{tmp_path / 'train.txt'} line 45: label 11 is out of range: {place} is 11, the list has 12 identities "
        f"up to 11; correct {place} or leave it out"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        build_loaders(load_config(config({place: 11})))


LOADING = [
    ({f"{TRAIN}.sampler.batch_size": 9}, f"{TRAIN}.sampler: batch_size 9 is not divisible by sample_per_id 2"),
    (
        {f"{TRAIN}.sampler": {"name": "DistributedRandomIdentitySampler", "batch_size": 9, "num_instances": 2}},
        f"{TRAIN}.sampler: batch_size 9 is not divisible by num_instances 2",
    ),
    (
        {f"{TRAIN}.sampler.batch_size": 26},
        f"{TRAIN}.sampler: a batch of 26 needs 13 identities (sample_per_id 2), "
        "the training list has 12; lower batch_size or raise sample_per_id",
    ),
    ({f"{TRAIN}.sampler.batch_size": 0}, f"{TRAIN}.sampler.batch_size: 0 is too small; the least is 1"),
    ({f"{QUERY}.sampler": ...}, f"{QUERY}.sampler: must name a sampler and its batch_size, at least 1"),
    ({f"{TRAIN}.sampler.seed": 4}, f"{TRAIN}.sampler.seed is 4, but Global.seed is 0"),
    ({f"{TRAIN}.sampler.labels": [1, 2]}, f"{TRAIN}.sampler.labels: comes from the data, and the file cannot say"),
    ({f"{TRAIN}.sampler.sample_per_id": ...}, f"{TRAIN}.sampler: PKSampler needs a value for 'sample_per_id'"),
    ({f"{QUERY}.sampler.drop_last": True}, f"{QUERY}.sampler.drop_last: True would leave images out of the evaluation"),
    (
        {f"{GALLERY}.dataset.transform_ops": [{"ResizeImage": {"size": 48}}, {"NormalizeImage": {}}]},
        f"{GALLERY}.dataset.transform_ops make images of (3, 48, 48), and others are of (3, 32, 32)",
    ),
    (
        {f"{QUERY}.dataset.transform_ops": [{"NormalizeImage": {}}]},
        f"{QUERY}.dataset.transform_ops: images of different sizes leave with different sizes",
    ),
    (
        {f"{TRAIN}.dataset.transform_ops.0": {"ResizeImage": {"resize_short": 32}}},
        f"{TRAIN}.dataset.transform_ops: images of different sizes leave with different sizes",
    ),
    (
        {f"{TRAIN}.dataset.transform_ops.0": {"ResizeImage": {"size": [32]}}},
        f"{TRAIN}.dataset.transform_ops.0.ResizeImage: size is [32], neither a number of pixels nor [width, height]",
    ),
    (
        {f"{TRAIN}.dataset.transform_ops.1": {"RandFlipImage": {"flip_code": 2}}},
        f"{TRAIN}.dataset.transform_ops.1.RandFlipImage.flip_code: '2' is not supported; there is",
    ),
    (
        {f"{TRAIN}.dataset.transform_ops.1": {"NormalizeImage": {"scale": "1/0"}}},
        f"{TRAIN}.dataset.transform_ops.1.NormalizeImage: ",
    ),
    (
        {f"{TRAIN}.dataset.transform_ops": [{"ResizeImage": {"size": 32}}, {"NormalizeImage": {"mean": [0.1, 0.2]}}]},
        f"{TRAIN}.dataset.transform_ops.1.NormalizeImage: mean is [0.1, 0.2]",
    ),
]


@pytest.mark.parametrize(("changes", "message"), LOADING, ids=[str(changes) for changes, _ in LOADING])
def test_loaders_are_refused_before_an_image_is_read(config, changes, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        build_loaders(load_config(config(changes)))


def test_otherwise_the_missing_image_is_what_is_wrong(config, tmp_path):
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'train.txt'} line 1: the image ")):
        build_loaders(load_config(config()))


def test_settings_that_need_what_is_not_there(config_file, tmp_path):
    cfg = load_config(config_file({"Global.checkpoints": "absent/latest.pt"}))
    with pytest.raises(ConfigError, match=r"^Global\.checkpoints: there is no file .*absent/latest\.pt$"):
        build_learner(cfg, build_model(cfg), build_loaders(cfg), tmp_path / "run")


def test_suggestions():
    assert suggest("celoss", ["CELoss", "Closs"]) == "did you mean 'CELoss'?"
    assert suggest("qqq", ["b", "a"]) == "there is a, b"
    assert suggest("x", []) == "there is none"
