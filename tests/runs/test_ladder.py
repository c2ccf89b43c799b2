"""The ladder on drawn images: what is kept, what is left alone, and that a climb that was interrupted ends the same."""

import random

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import flipped
from safetensors.torch import load_file

from recnb.recipe import ladder as rungs
from recnb.recipe.data import build_loaders
from recnb.recipe.model import build_model
from recnb.recipe.schema import load_config
from recnb.recipe.splits import split_lists
from recnb.registry import ConfigError
from recnb.runs import ladder
from recnb.runs.experiment import train
from recnb.runs.folder import load_run
from recnb.runs.rungs import Rung, best
from recnb.storage import seal
from recnb.training.checkpoints import numbered


@pytest.fixture
def pretrained(config_file, tmp_path, monkeypatch):
    """Weights of the tiny backbone to begin with, and the changes that make its configuration a (short) ladder's."""
    for name, value in (("POWERS", (0.5, 1.0)), ("ALPHAS", (0.5,)), ("PROBE_STEPS", 20), ("VIEWS", 2)):
        monkeypatch.setattr(rungs, name, value)
    cfg = load_config(config_file())
    torch.save(build_model(cfg).backbone.model.state_dict(), tmp_path / "weights.pth")
    workers = {f"DataLoader.{part}.loader.num_workers": 0 for part in ("Train", "Eval.Query", "Eval.Gallery")}
    return workers | {
        "Global.recipe": "ladder",
        "Global.probe_cache": str(tmp_path / "features"),
        "Arch.Backbone.pretrained": str(tmp_path / "weights.pth"),
    }


HURTING = {"name": "AdamW", "weight_decay": 15.0, "lr": {"name": "Constant", "learning_rate": 0.05}}  # all weights go


def climbed(cfg: dict, run) -> tuple[dict, pd.DataFrame]:
    return train(cfg, run), pd.read_csv(run / "ladder.csv", index_col="rung")


def test_a_climb_that_is_interrupted_in_any_rung_keeps_the_same_rung_and_bits(
    config_file, tmp_path, pretrained, monkeypatch, capsys
):
    cfg = load_config(config_file(pretrained | {"Optimizer": HURTING, "Ladder": {"minutes": 60.0, "folds": 2}}))
    result, table = climbed(cfg, tmp_path / "run")
    assert list(table.index) == [*rungs.RUNGS]
    assert table.kept.sum() == 1 and not table.kept["finetune"] and table.gain["finetune"] < 0 == table.gain["start"]
    assert table["images"].eq(table["images"].iloc[0]).all()  # of all folds together
    kept = table.index[table.kept][0]
    assert f"kept: {kept}, " in capsys.readouterr().out
    run = load_run(tmp_path / "run")
    assert {key: run.metrics[key] for key in ("recall1", "mAP")} == {key: result[key] for key in ("recall1", "mAP")}
    assert run.model().state_dict().keys() == load_file(tmp_path / "run" / "model.safetensors").keys()
    assert run.cfg["Global"]["recipe"] is None and "Validation" not in run.cfg["DataLoader"]

    real_end = ladder.Deadline.after_epoch
    with monkeypatch.context() as late:
        late.setattr(ladder.Deadline, "after_epoch", lambda self: (setattr(self, "at", 0.0), real_end(self)))
        again = climbed(cfg, tmp_path / "again")[1]
    assert "the 60 minutes ended before the ladder did" in capsys.readouterr().out
    assert list(again.index) == ["start", "whiten"], "the probe has ended behind its first epoch"
    waiting = {"whiten-1", "probe", "finetune", "interpolate-0.5", "average"}
    real = ladder.finish

    def killed(folder, *rest):
        if folder.parent.name in waiting:
            waiting.remove(folder.parent.name)
            raise KeyboardInterrupt
        real(folder, *rest)

    monkeypatch.setattr(ladder, "finish", killed)
    for folder in tmp_path.glob("again/rungs/whiten-1/*/metrics.json"):
        folder.unlink()
    for _ in [*waiting]:
        with pytest.raises(KeyboardInterrupt):
            train(cfg, tmp_path / "again")
    train(cfg, tmp_path / "again")
    assert not waiting
    for name in ("model.safetensors", "queries.csv", "metrics.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name

    monkeypatch.setattr("recnb.runs.rungs.best", lambda climbed, metric: climbed[-1])
    table = climbed(cfg, tmp_path / "again")[1]
    assert table.kept["average"], "and it is trained again on all images"
    assert table.what["interpolate"] == "between the start and the fine-tuned weights, 0.5 of the way"
    first, second = numbered(tmp_path / "again" / "rungs" / "average-refit" / "checkpoints")
    states = [torch.load(path, weights_only=True)["model"] for path in (first, second)]
    for key, value in load_file(tmp_path / "again" / "model.safetensors").items():
        mean = (states[0][key] + states[1][key]) / 2 if value.is_floating_point() else states[1][key]
        assert torch.allclose(value, mean, rtol=1e-5, atol=1e-7), key


def test_the_average_is_that_of_the_last_third_of_the_epochs(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "history.csv").write_text("epoch\n" + "".join(f"{epoch}\n" for epoch in range(1, 13)))
    for epoch in range(1, 13):
        state = {"w": torch.tensor([float(epoch**2)]), "batches": torch.tensor(epoch)}
        path = tmp_path / "checkpoints" / f"epoch_{epoch}.pt"
        torch.save({"model": state, "config": "{}", "contents": "{}"}, path)
        seal(path)
    made = ladder.weights_of(rung("average", [0.0], [0.0]), {}, tmp_path)
    assert made["w"].item() == pytest.approx((81 + 100 + 121 + 144) / 4) and made["batches"] == 12
    assert [rungs.last_epochs(epochs) for epochs in (1, 2, 5, 20)] == [2, 2, 2, 7]
    kept = rung("average", [0.0], [0.0])
    assert ladder.epochs_of(kept, [tmp_path / "history.csv"]) == 12


def test_without_time_the_start_is_kept(config_file, tmp_path, pretrained, capsys):
    file = config_file(pretrained | {"Ladder": {"minutes": 0.0}, "DataLoader.Validation": {"share": 0.4}})
    changes = {"Optimizer.weight_decay": 1.0, "Global.recipe": None, "Ladder.folds": 3}
    cfg, *others = [load_config(file), *(load_config(file, {key: value}) for key, value in changes.items())]
    result, table = climbed(cfg, tmp_path)
    assert "the 0 minutes ended before the ladder did; run again with more" in capsys.readouterr().out
    assert list(table.index) == ["start"] and result["mAP"] == result["before"]["mAP"]
    rng = random.Random(0)
    with flipped(tmp_path / "ladder.csv", rng), pytest.raises(ConfigError, match=r"ladder\.csv"):
        load_run(tmp_path)

    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for key, other in zip(changes, others, strict=True):
        with pytest.raises(ConfigError, match=rf"ladder\.yaml belongs to another configuration \({key}: "):
            train(other, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "ladder.yaml").unlink()  # as in a folder of an earlier version
    with pytest.raises(ConfigError, match=r"rungs/start belongs to another configuration \(Global.seed: 0 -> 1\)"):
        train(cfg | {"Global": cfg["Global"] | {"seed": 1}}, tmp_path)
    apart = {".lock", "output.txt", "model.safetensors"}  # which are not read again
    files = [path for path in (tmp_path / "rungs" / "start").rglob("*") if path.is_file() and path.name not in apart]
    assert {"queries.csv", "config.yaml", "query.npy", "SHA256SUMS"} <= {path.name for path in files}
    for path in files:
        with flipped(path, rng), pytest.raises(ConfigError, match=path.name):
            train(cfg, tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"Arch.Backbone.pretrained": False}, "a ladder begins with pretrained weights"),
        ({"Global.devices": 2}, "a ladder is climbed in one process; set Global.devices: 1"),
        ({"Ladder": {"folds": 1.5}}, "Ladder.folds: 1.5 is a float, not int"),
        ({"Ladder": {"minute": 3}}, "Ladder.minute: there is no such key; did you mean 'minutes'"),
        ({"Global.recipe": "leiter"}, "Global.recipe: 'leiter' is not supported"),
    ],
)
def test_what_cannot_be_climbed(config_file, tmp_path, pretrained, changes, said):
    with pytest.raises(ConfigError, match=said):
        train(load_config(config_file(pretrained | changes)), tmp_path)


def test_too_few_identities_to_hold_any_out(config_file, tmp_path, pretrained, drawn):
    lines = (drawn / "train.txt").read_text().splitlines()
    (tmp_path / "few.txt").write_text("\n".join(lines[: 7 * 6]))
    cfg = load_config(config_file(pretrained | {"DataLoader.Train.dataset.cls_label_path": str(tmp_path / "few.txt")}))
    with pytest.raises(ConfigError, match=r"a ladder needs 8 identities with two images.* and there are 7; take more"):
        split_lists(cfg, tmp_path)


def rung(name: str, before: list[float], after: list[float]) -> Rung:
    labels = [f"id {i // 2}" for i in range(len(before))]
    return Rung(name, {}, pd.DataFrame({"label": labels, "mAP_before": before, "mAP_after": after}))


@pytest.mark.parametrize("folds, fewest", [(1, 11), (2, 7), (4, 11)])
def test_batches_are_as_large_as_every_split_allows(config_file, tmp_path, pretrained, capsys, folds, fewest):
    sizes = {"DataLoader.Train.sampler.batch_size": 30, "Ladder": {"folds": folds}}  # all 15 identities
    cfg = load_config(config_file(pretrained | sizes))
    splits = split_lists(cfg, tmp_path / "lists")
    assert min(split.identities for split in splits) == fewest
    smaller = rungs.in_splits(cfg, fewest)
    said = f"batches of {2 * fewest} images, not 30: {fewest} identities are left to train on"
    assert said in capsys.readouterr().out and cfg["DataLoader"]["Train"]["sampler"]["batch_size"] == 30
    for split in splits:
        train = build_loaders(ladder.on_split(smaller, split)).train
        assert len(np.unique(train.dataset.labels)) == split.identities
        assert len(next(iter(train.batch_sampler))) == 2 * fewest
    plain = {"DataLoader.Train.sampler": {"name": "DistributedBatchSampler", "batch_size": 30}}
    cfg = load_config(config_file(pretrained | plain))
    assert rungs.in_splits(cfg, fewest) == cfg and not capsys.readouterr().out
    assert rungs.probe(cfg, 8, 0.5, 90, fewest)["DataLoader"]["Train"]["sampler"]["batch_size"] == 30


def test_a_gain_that_the_images_cannot_show_is_not_kept():
    values = [0.1 * (i % 7) + 0.2 for i in range(40)]
    start = rung("start", values, values)
    surely = rung("whiten", values, [v + 0.05 for v in values])
    chance = rung("probe", values, [v + (2.1 if i == 3 else 0.0) for i, v in enumerate(values)])
    worse = rung("finetune", values, [v - 0.05 for v in values])
    assert best([start, chance, worse], "mAP") is start
    assert best([start, surely, chance, worse], "mAP") is surely
