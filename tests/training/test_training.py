"""The schedule of a configuration: what is written, what is kept, how it goes on, what it says when it cannot."""

import json
import math
import multiprocessing
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import make, tiny_config
from safetensors.torch import load_file

from recnb.data.images import DataError
from recnb.gallery.curves import history_figure
from recnb.recipe.data import build_loaders
from recnb.recipe.learner import build_learner, say_cpu
from recnb.recipe.model import build_model
from recnb.recipe.optimizer import build_schedules
from recnb.recipe.schema import load_config, lookup
from recnb.registry import ConfigError
from recnb.retrieval.metrics import retrieval_metrics
from recnb.runs.compare import load_runs
from recnb.runs.experiment import train
from recnb.runs.folder import embed_picture, load_run, open_run
from recnb.runs.results import save_metrics
from recnb.storage import replacing
from recnb.training import fit as training
from recnb.training import loggers
from recnb.training.adaptor import Callback
from recnb.training.checkpoints import save_weights
from recnb.training.evaluation import embed


def test_a_run_leaves_history_weights_and_checkpoints(config_file, tmp_path):
    learn = make(config_file, tmp_path / "run", {"Global.epochs": 3, "Global.save_interval": 2})
    learn.fit_config()
    history = pd.read_csv(tmp_path / "run" / "history.csv")
    assert list(history) == ["epoch", "lr", "train_loss", "CELoss", "SupConLoss", "recall1", "recall5", "mAP"]
    assert history.epoch.tolist() == [1, 2, 3]
    assert history.train_loss.values == pytest.approx((history.CELoss + history.SupConLoss).values, rel=1e-5)
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"latest.pt", "best.safetensors", "epoch_2.pt"}
    best = history.recall1[::-1].idxmax()
    assert learn.evaluate().metrics["recall1"] == pytest.approx(history.recall1[best])
    kept = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(kept[k], v) for k, v in learn.model.state_dict().items())
    assert len(history_figure(history).axes) == 2


def test_one_epoch_has_one_place_on_the_axis():
    history = pd.DataFrame({"epoch": [1], "lr": [0.1], "train_loss": [0.5], "mAP": [0.25]})
    for ax in history_figure(history).axes:
        low, high = ax.get_xlim()
        assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [1]


def test_where_other_processes_train_an_epoch_is_a_new_row_of_the_history(config_file, tmp_path, monkeypatch):
    learn = make(config_file, tmp_path, {"Global.devices": 2})
    history, seen = tmp_path / "history.csv", []
    history.write_text("epoch\n1\n")  # of the run that goes on

    def launch(*_):
        yield "resuming behind epoch 1 of 2\n"
        yield "epoch 2 step 3: the loss is not finite (CELoss nan): step left out\n"
        with replacing(history) as path:
            path.write_text("epoch\n1\n2\n")
        yield "epoch 2 of 2: train_loss 0.5\n"
        save_weights(learn.model, tmp_path / "model.safetensors")
        yield "the model holds the weights of epoch 2\n"

    monkeypatch.setattr(training, "launch", launch)
    learn.fit_config(on_epoch=lambda: seen.append(history.read_text()))
    assert seen == ["epoch\n1\n2\n"]


def test_steps_follow_the_schedule(config_file, tmp_path):
    changes = {"Optimizer.lr.warmup_epoch": 1}
    learn, rates = make(config_file, tmp_path, changes), []

    class Watch(Callback):
        order = 80

        def before_step(self):
            rates.append(self.opt.hypers[0]["lr"])

    learn.add_cb(Watch())
    learn.fit_config()
    steps = len(learn.dls.train)
    schedule = build_schedules(load_config(config_file(changes)), steps)[0]
    assert rates == [schedule(step) for step in range(2 * steps)]


def test_two_runs_with_one_seed_are_the_same_bytes(config_file, tmp_path):
    for name in ("a", "b"):
        torch.manual_seed(hash(name) % 1000)  # what happened before the run must not matter
        make(config_file, tmp_path / name).fit_config()
    for file in ("history.csv", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    make(config_file, tmp_path / "c", {"Global.seed": 1}).fit_config()
    assert (tmp_path / "a" / "history.csv").read_text() != (tmp_path / "c" / "history.csv").read_text()


def test_pretrained_model_starts_from_a_runs_weights(config_file, tmp_path, capsys):
    learn = make(config_file, tmp_path)
    learn.fit_config()
    model = build_model(load_config(config_file({"Global.pretrained_model": str(tmp_path / "model.safetensors")})))
    assert "tensors loaded" in capsys.readouterr().out
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in learn.model.state_dict().items())


def test_evaluation_between_intervals_is_left_out(config_file, tmp_path):
    make(config_file, tmp_path, {"Global.epochs": 5, "Global.eval_interval": 2}).fit_config()
    history = pd.read_csv(tmp_path / "history.csv")
    assert history.mAP.notna().tolist() == [False, True, False, True, True]


def test_training_ends_where_nothing_gets_better(config_file, tmp_path, capsys):
    still = {"Global.epochs": 9, "Optimizer.lr": {"name": "ConstLR", "learning_rate": 0.0}, "Arch.freeze": ["backbone"]}

    def epochs(patience: int) -> int:
        make(config_file, tmp_path, {**still, "Global.patience": patience}).fit_config()
        return len(pd.read_csv(tmp_path / "history.csv"))

    assert epochs(2) == 3
    assert "stopped behind epoch 3: 2 epochs without a better recall1" in capsys.readouterr().out
    assert epochs(2) == 3 and epochs(3) == 4  # a run that goes on remembers


def test_an_epoch_is_chosen_on_validation_where_there_is_some(config_file, tmp_path, capsys):
    learn = make(config_file, tmp_path / "a", {"DataLoader.Validation.share": 0.3, "Metric.Eval": [{"mAP": {}}]})
    learn.fit_config()
    assert capsys.readouterr().out.count("chosen on validation") == 1
    history, held = pd.read_csv(tmp_path / "a" / "history.csv"), learn.loaders.validation.query
    features, images = embed(learn.model, held), held.dataset
    direct = retrieval_metrics(features, None, images.labels, query_cameras=images.cameras)["mAP"]
    best = history.mAP[::-1].idxmax()
    assert history.mAP[best] == pytest.approx(direct) and learn.validate()[-1] == pytest.approx(direct)
    assert len(learn.evaluate().query) == len(learn.loaders.query.dataset)
    make(config_file, tmp_path / "b").fit_config()
    assert capsys.readouterr().out.count("the choice saw the test lists") == 1


def test_without_evaluation_it_trains_and_keeps_the_last(config_file, tmp_path):
    learn = make(config_file, tmp_path, {"Global.eval_during_train": False, "DataLoader.Eval": ...})
    learn.fit_config()
    assert "mAP" not in pd.read_csv(tmp_path / "history.csv")
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / "checkpoints" / "best.safetensors").exists()


def test_loss_eval_says_once_that_unseen_identities_have_none(config_file, tmp_path, capsys):
    make(config_file, tmp_path).fit_config()
    assert capsys.readouterr().out.count("Loss.Eval has no value") == 1
    assert "valid_loss" not in pd.read_csv(tmp_path / "history.csv")


def test_loss_eval_is_computed_on_training_identities(config_file, tmp_path, drawn):
    train = str(drawn / "train.txt")
    changes = {f"DataLoader.Eval.{part}.dataset.cls_label_path": train for part in ("Query", "Gallery")}
    learn = make(config_file, tmp_path, changes)
    learn.fit_config()
    history = pd.read_csv(tmp_path / "history.csv")
    assert history.valid_loss.between(0, 2 * math.log(15)).all()
    labels = torch.as_tensor(learn.loaders.query.dataset.labels)
    with torch.no_grad():
        features, _ = learn.get_preds()
        expected = torch.nn.functional.cross_entropy(learn.model.head(features, labels), labels)
    assert learn.validate()[0] == pytest.approx(expected.item(), rel=1e-4)


def test_a_pair_loss_needs_no_known_identities(config_file, tmp_path):
    make(config_file, tmp_path, {"Loss.Eval": [{"SupConLoss": {"weight": 1.0}}]}).fit_config()
    assert pd.read_csv(tmp_path / "history.csv").valid_loss.notna().all()


def test_gpu_without_one_becomes_the_cpu_in_one_line(config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    say_cpu.cache_clear()
    for run in ("one", "two"):
        learn = make(config_file, tmp_path / run, {"Global.device": "gpu"})
    assert capsys.readouterr().out.count("running on the CPU") == 1
    assert next(learn.model.parameters()).device.type == "cpu"


def test_visualdl_missing_names_the_extra(config_file, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"Global.use_visualdl: .*recnb\[track\]"):
        make(config_file, tmp_path, {"Global.use_visualdl": True})


@pytest.mark.parametrize("interval, lines", [(5, 2), (500, 1)])
def test_the_log_has_a_line_every_few_steps_and_at_least_one_an_epoch(config_file, tmp_path, interval, lines):
    make(config_file, tmp_path, {"Global.print_batch_step": interval}).fit_config()
    written = (tmp_path / "train.log").read_text().splitlines()
    assert len(written) == 2 * lines and "SupConLoss" in written[0]


def test_tensorboard_gets_every_step_and_every_epoch(config_file, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    learn = make(config_file, tmp_path, {"Global.loggers": ["tensorboard"], "Loss.Train": [{"CELoss": {}}]})
    learn.fit_config()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    history, steps = pd.read_csv(tmp_path / "history.csv"), 2 * len(learn.dls.train)
    assert [event.step for event in events.Scalars("train_CELoss")] == [*range(1, steps + 1)]
    written = [(event.step, event.value) for event in events.Scalars("epoch_mAP")]
    assert written == [(epoch, pytest.approx(value)) for epoch, value in zip(history.epoch, history.mAP, strict=True)]


def test_mlflow_gets_every_epoch(config_file, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    make(config_file, tmp_path, {"Global.loggers": ["mlflow"]}).fit_config()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs(["0"])
    written = [metric.value for metric in client.get_metric_history(run.info.run_id, "epoch_mAP")]
    assert written == pytest.approx(pd.read_csv(tmp_path / "history.csv").mAP.tolist())


def test_wandb_gets_values_over_their_own_numbers(tmp_path, monkeypatch):
    calls = []
    run = SimpleNamespace(
        define_metric=lambda name, step_metric: calls.append((name, step_metric)),
        log=calls.append,
        finish=lambda: calls.append("finished"),
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: calls.append(options) or run))
    with loggers.opened(["wandb"], tmp_path, {"Global": {}}) as (logger,):
        logger.write({"epoch_mAP": 0.5}, "epoch", 3)
    options, *rest = calls
    assert (options["name"], options["config"]) == (tmp_path.name, {"Global": {}})
    assert rest == [("train_*", "step"), ("epoch_*", "epoch"), {"epoch_mAP": 0.5, "epoch": 3}, "finished"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_logger_names_its_extra(config_file, tmp_path, monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"^Global.loggers: {name} is not installed; pip install 'recnb\[{name}\]'"):
        make(config_file, tmp_path, {"Global.loggers": [name]})


def test_a_misspelt_logger_is_refused(config_file):
    with pytest.raises(ConfigError, match=r"Global.loggers: 'tensorbord' is not supported; did you mean 'tensorboard'"):
        load_config(config_file({"Global.loggers": ["tensorbord"]}))


def test_the_resolved_configuration_gives_the_same_run(config_file, tmp_path):
    cfg = load_config(config_file())
    run = open_run(tmp_path / "a", cfg)
    build_learner(cfg, build_model(cfg), build_loaders(cfg), run).fit_config()
    again = load_config(run / "config.yaml")
    assert lookup(again, "Arch.Head.class_num") == 15 and yaml.safe_load((run / "config.yaml").read_text())
    build_learner(again, build_model(again), build_loaders(again), tmp_path / "b").fit_config()
    assert (tmp_path / "a" / "history.csv").read_bytes() == (tmp_path / "b" / "history.csv").read_bytes()


def test_metrics_json_has_before_after_and_gain(tmp_path):
    save_metrics(tmp_path, {"mAP": 0.25}, {"mAP": 0.75})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {
        "mAP": 0.75,
        "before": {"mAP": 0.25},
        "gain": {"mAP": 0.5},
    }


CENTRES = {
    "Loss.Train": [{"CELoss": {}}, {"CenterLoss": {"weight": 0.01, "feature_from": "features"}}],
    "Optimizer": [
        {"Adam": {"scope": "RecModel", "lr": {"name": "Cosine", "learning_rate": 0.002}}},
        {"SGD": {"scope": "CenterLoss", "lr": {"name": "Constant", "learning_rate": 50.0}}},
    ],
}


def test_centres_are_trained_at_their_own_rate(config_file, tmp_path):
    learn = make(config_file, tmp_path, CENTRES)
    centers = learn.loss_func.train_loss.losses[1].centers
    before, model = centers.detach().clone(), {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.fit_config()
    assert (centers - before).abs().max() > 0.01 and not torch.equal(learn.model.head.weight, model["head.weight"])
    assert sorted({group["entry"]: round(group["lr"], 3) for group in learn.opt.opt.param_groups}.items())[1] == (1, 50)


def test_the_moving_average_is_what_is_judged_and_kept(config_file, tmp_path):
    learn = make(config_file, tmp_path, {"EMA": {"decay": 0.5}, "Global.epochs": 1})
    weights = []

    class Watch(Callback):
        order = 100

        def after_step(self):
            weights.append(self.learn.model.head.weight.detach().clone())

    learn.add_cb(Watch()).fit_config()
    average = weights[0]
    for weight in weights[1:]:
        average = average + 0.5 * (weight - average)
    torch.testing.assert_close(load_file(tmp_path / "model.safetensors")["head.weight"], average)


def test_accumulated_gradients_are_those_of_the_whole_batch(config_file, tmp_path):
    plain = {
        "Loss.Train": [{"CELoss": {}}],
        "Optimizer": {"name": "SGD", "lr": {"name": "ConstLR", "learning_rate": 0.1}},
        "DataLoader.Train.sampler": {"batch_size": 45},
        "Global.epochs": 1,
        "Arch.freeze": ["backbone"],
    }
    make(config_file, tmp_path / "whole", plain).fit_config()
    parts = {**plain, "DataLoader.Train.sampler": {"batch_size": 15}, "Global.update_freq": 3}
    make(config_file, tmp_path / "parts", parts).fit_config()
    whole, parts = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "parts"))
    torch.testing.assert_close(whole, parts)


def test_half_precision_computes_in_it_while_training_only(config_file, tmp_path):
    learn, kinds = make(config_file, tmp_path, {"AMP": {}, "Global.epochs": 1}), set()

    class Watch(Callback):
        def after_pred(self):
            kinds.add((self.training, self.pred["features"].dtype, self.model.head.weight.dtype))

    learn.add_cb(Watch()).fit_config()
    assert kinds == {(True, torch.bfloat16, torch.float32), (False, torch.float32, torch.float32)}


def test_a_frozen_backbone_stays_as_it_is(config_file, tmp_path):
    learn = make(config_file, tmp_path, {"Arch.freeze": ["backbone.model.layer[12]", "backbone.model.*1"]})
    before = {key: value.clone() for key, value in learn.model.state_dict().items()}
    learn.fit_config()
    changed = {
        key.split(".")[2]
        for key, value in learn.model.state_dict().items()
        if key.startswith("backbone") and not torch.equal(value, before[key])
    }
    assert changed == {"layer3", "layer4"}  # batch statistics do not move either
    with pytest.raises(ConfigError, match=r"Arch.freeze: no part is called 'backbone.model.layer9'; did you mean"):
        make(config_file, tmp_path, {"Arch.freeze": ["backbone.model.layer9"]})


def known_classes(config_file) -> dict:
    """The changes that judge the training images themselves as a classifier does."""
    train = load_config(config_file())["DataLoader"]["Train"]["dataset"]
    plain = {**train, "transform_ops": [{"ResizeImage": {"size": 32}}, {"NormalizeImage": {}}]}
    return {
        "Global.eval_mode": "classification",
        "Metric.Eval": [{"TopkAcc": {"topk": [1, 3]}}],
        "DataLoader.Eval": {"dataset": plain, "sampler": {"batch_size": 20}, "loader": {"num_workers": 0}},
    }


@torch.inference_mode()
def accuracy(learn, part: str) -> dict[str, float]:
    """Top 1 and top 3 by the cosines of one part's output with the head's weights, image by image."""
    model, images, hits = learn.model.eval(), learn.loaders.query.dataset, []
    for x, label in images:
        maps = model.backbone(x[None])
        feature = (maps if part == "backbone" else model.neck(maps)).flatten()
        cosines = [(feature @ row / feature.norm() / row.norm()).item() for row in model.head.weight]
        hits.append([label in sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k] for k in (1, 3)])
    return dict(zip(("top1", "top3"), np.mean(hits, 0).tolist(), strict=True))


def test_classification_is_judged_by_the_head(config_file, drawn, tmp_path):
    known = {**known_classes(config_file), "Global.epochs": 6}
    learn = make(config_file, tmp_path / "run", known)
    learn.fit_config()
    scores = learn.evaluate().metrics
    assert scores == pytest.approx(accuracy(learn, "neck"))
    assert scores["top1"] > 0.2
    assert (tmp_path / "run" / "labels.csv").read_text().splitlines()[:2] == ["label,name", "0,0"]
    unknown = {
        **known,
        "DataLoader.Eval": {
            **known["DataLoader.Eval"],
            "dataset": {**known["DataLoader.Eval"]["dataset"], "cls_label_path": str(drawn / "query.txt")},
        },
    }
    with pytest.raises(DataError, match="is none of the training classes"):
        make(config_file, tmp_path / "other", unknown)
    with pytest.raises(ConfigError, match=r"Recallk does not belong to Global\.eval_mode classification"):
        make(config_file, tmp_path / "other", {**known, "Metric.Eval": [{"Recallk": {}}]})


@pytest.mark.parametrize(
    "part, changes",
    [
        ("backbone", {"Arch.head_feature_from": "backbone"}),
        ("backbone", {"Arch.head_feature_from": "backbone", "Arch.Neck": {"name": "BNNeck"}}),  # both of one size
        ("neck", {"Global.retrieval_feature_from": "backbone"}),
    ],
)
def test_the_head_is_judged_on_what_it_was_trained_on(config_file, tmp_path, part, changes):
    learn = make(config_file, tmp_path, {**known_classes(config_file), "Global.epochs": 2, **changes})
    learn.fit_config()
    assert learn.evaluate().metrics == pytest.approx(accuracy(learn, part))


def test_the_head_is_judged_with_the_averaged_weights(config_file, tmp_path):
    learn = make(config_file, tmp_path, {**known_classes(config_file), "Global.epochs": 3, "EMA": {"decay": 0.9}})
    learn.fit_config()
    best = pd.read_csv(tmp_path / "history.csv").top1[::-1].idxmax()
    assert pd.read_csv(tmp_path / "history.csv").top1[best] == pytest.approx(accuracy(learn, "neck")["top1"])


@pytest.mark.parametrize(("key", "value"), [("channels_last", True), ("grad_cache", 3)])
def test_memory_layout_and_chunks_change_no_more_than_rounding(config_file, tmp_path, key, value):
    frozen = {"Global.epochs": 1, "Global.channels_last": False, "Arch.freeze": ["backbone"]}
    make(config_file, tmp_path / "plain", frozen).fit_config()
    learn = make(config_file, tmp_path / key, {**frozen, f"Global.{key}": value})
    learn.fit_config()
    plain, other = (load_file(tmp_path / run / "model.safetensors") for run in ("plain", key))
    torch.testing.assert_close(plain, other, rtol=1e-3, atol=1e-4)
    if key == "channels_last":
        weight = learn.model.backbone.model.layer1[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("given", "last"), [(None, True), (False, False)])
def test_on_the_cpu_channels_are_last_unless_the_file_says_otherwise(config_file, tmp_path, given, last):
    learn = make(config_file, tmp_path, {"Global.device": "cpu", "Global.channels_last": given})
    weight = learn.model.backbone.model.layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == last


def test_images_may_be_blended_for_a_plain_classifier(config_file, tmp_path):
    mixed = {"DataLoader.Train.dataset.batch_transform_ops": [{"MixupOperator": {"alpha": 0.5}}]}
    with pytest.raises(ConfigError, match=r"Arch.Head ArcMargin needs one label each; take FC"):
        make(config_file, tmp_path, mixed)
    mixed["Arch.Head"] = {"name": "FC"}
    with pytest.raises(ConfigError, match=r"Loss.Train.1.SupConLoss needs one label each"):
        make(config_file, tmp_path, mixed)
    learn, soft = make(config_file, tmp_path, {**mixed, "Loss.Train": [{"CELoss": {"epsilon": 0.1}}]}), []

    class Watch(Callback):
        def after_loss(self):
            soft.append((self.training, self.yb[0].dim()))

    learn.add_cb(Watch()).fit_config()
    assert set(soft) == {(True, 2), (False, 1)}


class Failing(Callback):
    def after_batch(self):
        raise ValueError("in the first step")


def test_worker_processes_end_with_the_training(config_file, tmp_path):
    before = set(multiprocessing.active_children())
    learn = make(config_file, tmp_path, {"DataLoader.Train.loader.num_workers": 2, "Global.epochs": 1})
    with pytest.raises(ValueError) as held:  # with the frames that have called the workers
        learn.add_cb(Failing()).fit_config()
    assert "in the first step" in str(held.value) and set(multiprocessing.active_children()) <= before
    learn.remove_cb(Failing).fit_config()
    assert set(multiprocessing.active_children()) <= before


def test_a_run_is_opened_where_its_images_and_lists_are_not(drawn, tmp_path):
    data, run = shutil.copytree(drawn, tmp_path / "data"), tmp_path / "run"
    train(load_config(tiny_config(data, tmp_path / "config.yaml", {"Global.epochs": 1})), run)
    picture, names = drawn / load_run(run).query.paths[0].removeprefix(f"{data}/"), load_run(run).query.names.tolist()
    (data / "images").rename(tmp_path / "images")
    opened = load_run(run)
    assert opened.query.names.tolist() == names  # lists without pictures
    with pytest.raises(DataError, match=r"query\.txt line 1: the image .* is not there"):
        opened.query[0]
    data.rename(tmp_path / "gone")
    opened = load_run(run)
    feature = embed_picture(opened, opened.model(), picture)
    np.testing.assert_allclose(feature, opened.query_features[0], rtol=1e-4, atol=1e-5)
    assert opened.class_names == [str(number) for number in range(15)] and "mAP" in opened.metrics
    assert opened.query.names.tolist() == [*map(str, names)] and len(opened.rank().ids) == len(opened.query)
    with pytest.raises(DataError, match="is not there"):
        opened.query[0]
    finished, unusable = load_runs([run])
    assert list(finished) == ["run"] and not unusable
