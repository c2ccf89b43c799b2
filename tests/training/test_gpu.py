"""What a configuration gives on a GPU is what it gives on the CPU: `pytest -m gpu`."""

import json

import pytest
import torch
from conftest import make, tiny_config
from safetensors.torch import load_file

from recnb.deploy import export_model
from recnb.losses.combined import CELoss, CombinedLoss, SupConLoss
from recnb.models.heads import ArcMargin
from recnb.recipe.schema import load_config
from recnb.runs.experiment import train
from recnb.runs.folder import load_run

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]
PLAIN = {"Global.device": "gpu", "Global.epochs": 1}
CHANGES = {  # each with how far its first loss may be from the CPU's, None where it is another by its nature
    "plain": ({}, 1e-4),
    "bfloat16": ({"AMP": {"dtype": "bfloat16", "use_fp16_test": True}}, 0.05),
    "float16": ({"AMP": {"dtype": "float16"}}, 0.01),
    "channels last": ({"Global.channels_last": True}, 1e-4),
    "compiled": ({"Global.compile": True}, 1e-3),
    "chunks": ({"Global.grad_cache": 4}, None),
    "recomputed": ({"Global.grad_checkpointing": True}, 1e-4),
    "accumulated": ({"Global.update_freq": 2}, 1e-4),
    "averaged weights": ({"EMA": {"decay": 0.9}}, 1e-4),
    "workers": ({"DataLoader.Train.loader": {"num_workers": 2}}, 1e-4),
    "sharded head": ({"Arch.Head.sharded": True}, None),
    "memory": ({"Loss.Train": [{"CELoss": {}}, {"ContrastiveLoss_XBM": {"xbm_size": 30, "start_iter": 3}}]}, None),
    "drawn classes": ({"Arch.Head.sample_rate": 0.5, "Optimizer.name": "SGD"}, None),
    "probe": ({"Global.probe": 2, "Arch.freeze": ["backbone"]}, None),
    "re-ranking": ({"Global.re_ranking": True}, 1e-4),
}


@pytest.fixture(autouse=True)
def precise(monkeypatch):
    """Convolutions in float32 proper, as the CPU's are."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def first_loss(drawn, tmp_path_factory):
    """The loss of the first step on the CPU."""
    folder = tmp_path_factory.mktemp("cpu")
    learn = make(lambda changes: tiny_config(drawn, folder / "config.yaml", changes), folder, {"Global.epochs": 1})
    learn.fit_config()
    return learn.recorder.losses[0].item()


def test_tensors_of_two_devices_do_not_mix(gpu):
    ours, others = torch.ones(2, 2, device=gpu), torch.ones(2, 2)
    for mixed in (
        lambda: ours + others,
        lambda: ours @ others,
        lambda: others[ours > 0],
        lambda: torch.cat([ours, others]),
    ):
        with pytest.raises(RuntimeError):
            mixed()
    with pytest.raises(TypeError):
        ours.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(2, device=gpu, generator=torch.Generator())
    assert (ours.cpu() + others).sum() == 8 and ours[others > 0].sum().item() == 4


@pytest.mark.parametrize("changes, tolerance", CHANGES.values(), ids=CHANGES)
def test_it_trains_and_is_evaluated(config_file, tmp_path, changes, tolerance, first_loss, gpu):
    if changes.get("Global.compile") and gpu != "cuda":
        pytest.skip("torch compiles nothing for this device")
    learn = make(config_file, tmp_path, {**PLAIN, **changes})
    learn.fit_config()
    if tolerance:
        assert learn.recorder.losses[0].item() == pytest.approx(first_loss, rel=tolerance)
    assert all(p.device.type == gpu and p.isfinite().all() for p in learn.model.parameters())
    assert all(0 <= value <= 1 for value in learn.evaluate().metrics.values())
    assert learn.tested.judge.device.type == gpu
    kept = load_file(tmp_path / "checkpoints" / "best.safetensors")
    assert kept and all(tensor.isfinite().all() for tensor in kept.values())


@pytest.mark.parametrize("name", ["AdamW", "Adam", "Momentum"])
def test_an_optimizer_updates_everything_in_one_kernel(config_file, tmp_path, name, gpu):
    if gpu != "cuda":
        pytest.skip("this device has no such kernel")
    learn = make(config_file, tmp_path, {**PLAIN, "Optimizer.name": name})
    assert all(group["fused"] for group in learn.opt.opt.param_groups)


def test_what_is_trained_here_is_evaluated_and_exported_elsewhere(config_file, tmp_path):
    run = tmp_path / "gpu"
    train(load_config(config_file(PLAIN)), run)
    kept = load_run(run)
    weights = {"Global.pretrained_model": str(run / "model.safetensors")}
    there = make(config_file, tmp_path / "cpu", weights).evaluate()
    torch.testing.assert_close(there.query, torch.from_numpy(kept.query_features), rtol=1e-3, atol=1e-4)
    assert there.metrics == pytest.approx({name: kept.metrics[name] for name in there.metrics}, abs=0.02)
    parity = json.loads((export_model(kept, images=20) / "parity.json").read_text())
    assert not parity["failures"]


def test_a_step_of_head_and_losses_waits_for_nothing(gpu):
    if gpu != "cuda":
        pytest.skip("nothing waits for this device")
    head, loss = ArcMargin(16, 50).cuda(), CombinedLoss([(1.0, CELoss()), (1.0, SupConLoss(views=2))])
    x = torch.randn(8, 16, device="cuda", requires_grad=True)
    y = torch.arange(8, device="cuda") // 2
    optimizer = torch.optim.AdamW(head.parameters(), fused=True)
    for mode in ("default", "error"):  # the first step makes what later ones use again
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss({"features": x, "logits": head(x, y)}, y).backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
