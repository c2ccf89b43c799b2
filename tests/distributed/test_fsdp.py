"""A backbone whose weights are divided over processes trains, is kept, gone on with and read as a whole one."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make, tiny_config
from processes import in_processes
from torch.distributed.fsdp import FSDPModule

import recnb.distributed.rows
from recnb.data.loaders import over
from recnb.deploy import export_model
from recnb.distributed.rows import Rows, is_divided, split
from recnb.models.weights import read_weights
from recnb.recipe.learner import check_divisible
from recnb.recipe.schema import load_config
from recnb.registry import ConfigError
from recnb.runs.experiment import train
from recnb.runs.folder import load_run
from recnb.training.checkpoints import kept, load_model, with_rows
from recnb.training.evaluation import embed

VIT = {
    "Arch.Backbone": {"name": "test_vit", "pretrained": False, "lr_mult_list": [0.5, 1, 1, 1, 1, 1, 2]},
    "Optimizer": {"name": "Momentum", "clip_norm": 0.5, "lr": {"name": "ConstLR", "learning_rate": 0.01}},
    "Global.fully_shard": True,
    "Global.iter_per_epoch": 2,
    "Global.save_interval": 1,
}


def features(learn):
    """Of the gallery, in batches of which the processes have different numbers, as numpy."""
    gallery = learn.loaders.gallery
    return embed(learn.model, over(gallery, gallery.dataset, batch_size=17)).numpy()


def divided(rank, configs, folder):
    """Features before training, the share of the backbone that is here; two trainings (one goes on), and a run."""
    recnb.distributed.rows.JOINED = 8 << 10  # bytes: some tensors are larger, others smaller
    found = []
    for config in configs:
        learn = make(lambda _, config=config: config, folder / config.stem)
        found.append(features(learn))
        learn.fit_config()
    parameters = [*learn.model.backbone.parameters()]
    assert all(map(is_divided, parameters)) and not any(map(is_divided, learn.model.neck.parameters()))
    units = [part for part in learn.model.modules() if isinstance(part, FSDPModule)]
    assert len(units) == 5 + 1  # the last block is in one with its surroundings
    assert {len(p.to_local()) for p in parameters if len(p) == 1} == {1 - rank}  # the first process has the only row
    train(load_config(configs[0]), folder / "run")
    return found[0], sum(p.to_local().numel() for p in parameters) / sum(p.numel() for p in parameters)


@pytest.fixture(scope="module")
def runs(drawn, tmp_path_factory):
    """What two processes have trained and returned, and a learner that trained alone, with batches as large as theirs.

    Of the evaluation's images one process has 27 and the other one 26, in batches of 26.
    """
    folder = tmp_path_factory.mktemp("divided")
    odd = folder / "gallery.txt"
    odd.write_text("".join((drawn / "gallery.txt").read_text().splitlines(keepends=True)[1:]))
    lists = {"DataLoader.Eval.Gallery.dataset.cls_label_path": str(odd)}
    changes = VIT | lists | {f"DataLoader.Eval.{name}.sampler.batch_size": 26 for name in ("Query", "Gallery")}
    first = {"Global.checkpoints": str(folder / "two" / "checkpoints" / "epoch_1.pt")}
    configs = tiny_config(drawn, folder / "two.yaml", changes), tiny_config(drawn, folder / "on.yaml", changes | first)
    returned = in_processes(2, divided, configs, folder)
    double = changes | {"DataLoader.Train.sampler.batch_size": 16}
    alone = make(lambda changes: tiny_config(drawn, folder / "one.yaml", changes), folder / "one", double)
    before = features(alone)
    alone.fit_config()
    return folder, returned, alone, before


def test_two_processes_have_the_figures_of_one(runs):
    folder, ((found, share), (other, rest)), _, before = runs
    for ours in (found, other):
        np.testing.assert_allclose(ours, before, rtol=1e-4, atol=1e-5)
    assert share + rest == 1 and abs(share - rest) < 0.01
    two, one = (pd.read_csv(folder / name / "history.csv") for name in ("two", "one"))
    assert two.columns.tolist() == one.columns.tolist() and len(two) == 2
    np.testing.assert_allclose(two, one, rtol=1e-4)
    two, one = (read_weights(folder / name / "model.safetensors") for name in ("two", "one"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)


def test_a_divided_run_goes_on_to_the_same_bits(runs):
    left, resumed = (read_weights(runs[0] / name / "model.safetensors") for name in ("two", "on"))
    torch.testing.assert_close(resumed, left, rtol=0, atol=0)
    left, resumed = (pd.read_csv(runs[0] / name / "history.csv").drop(columns="train_loss") for name in ("two", "on"))
    assert resumed.equals(left)  # but for the loss smoothed over the steps since the start


def test_one_process_reads_what_two_have_written(runs):
    folder, _, alone, _ = runs
    state, own = (kept(folder / name / "checkpoints" / "latest.pt") for name in ("two", "one"))
    assert {type(value) for value in state["model"].values()} == {Rows, torch.Tensor}
    load_model(alone.model, state["model"])
    torch.testing.assert_close(dict(alone.model.state_dict()), own["model"], rtol=1e-4, atol=1e-6)
    alone.opt.load_state_dict(with_rows(alone.model, alone.opt.opt, state["optimizer"], split))
    found = alone.opt.state_dict()
    torch.testing.assert_close(found["state"], own["optimizer"]["state"], rtol=1e-3, atol=1e-5)
    assert [group["lr"] for group in found["param_groups"]] == [0.005, 0.01, 0.02, 0.01]


def test_a_divided_run_is_opened_exported_and_started_from_by_one_process(runs, drawn):
    run = load_run(runs[0] / "run")
    images = over(runs[2].loaders.query, run.query)
    np.testing.assert_allclose(embed(run.model(), images), run.query_features, rtol=1e-4, atol=1e-5)
    assert (export_model(run, images=20) / "model.onnx").is_file()
    start = VIT | {"Global.fully_shard": False, "Global.pretrained_model": str(run.folder / "model.safetensors")}
    learn = make(lambda changes: tiny_config(drawn, runs[0] / "start.yaml", changes), runs[0] / "start", start)
    np.testing.assert_allclose(embed(learn.model, images), run.query_features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [("EMA", {}), ("AMP", {"dtype": "float16"}), ("Retention", {"distill": 0.5}), ("Global.grad_cache", 4)],
)
def test_what_needs_whole_weights_is_refused(config_file, key, value):
    cfg = load_config(config_file({key: value, "Global.fully_shard": True}))
    with pytest.raises(
        ConfigError, match=rf"^Global\.fully_shard: the backbone cannot be divided with {key}\S* ?\S*; l"
    ):
        check_divisible(cfg)
