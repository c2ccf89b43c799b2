"""What goes wrong while training is said in one sentence, before it spoils anything."""

import os
import signal

import pandas as pd
import pytest
import torch
from conftest import make
from processes import in_processes

from recnb.recipe.data import build_loaders
from recnb.recipe.learner import build_learner
from recnb.recipe.model import build_model
from recnb.recipe.schema import load_config
from recnb.training.adaptor import Callback
from recnb.training.guard import TrainingError


class Spoil(Callback):
    """Makes the loss, or a gradient, infinite in one step."""

    order = 1

    def __init__(self, what, epoch=2, step=3):
        self.what, self.at = what, (epoch, step)

    def due(self):
        return self.training and (self.epoch + 1, self.iter + 1) == self.at

    def after_loss(self):
        if self.what == "loss" and self.due():
            self.learn.loss_grad = self.loss_grad * float("inf")
            self.learn.loss = self.loss_grad.clone()

    def before_step(self):
        if self.what == "gradient" and self.due():
            self.model.head.weight.grad[0, 0] = float("nan")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_before_the_step(config_file, tmp_path, what):
    learn = make(config_file, tmp_path)
    with pytest.raises(
        TrainingError,
        match=rf"^epoch 2 step 3: the {what} is not finite \(CELoss .*, SupCon.*\) at "
        r"learning rate 0\.00\d+, in a batch of the identities \d+, .*checkpoint",
    ):
        learn.add_cb(Spoil(what)).fit_config()
    assert all(p.isfinite().all() for p in learn.model.parameters())
    assert torch.load(tmp_path / "checkpoints" / "latest.pt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_such_a_step_can_be_left_out(config_file, tmp_path, what, capsys):
    learn = make(config_file, tmp_path, {"Global.on_nonfinite": "skip"})
    learn.add_cb(Spoil(what)).fit_config()
    assert f"the {what} is not finite" in (printed := capsys.readouterr().out) and "step left out" in printed
    assert pd.read_csv(tmp_path / "history.csv").train_loss.notna().all()
    assert all(p.isfinite().all() for p in learn.model.parameters())


class Steps(Callback):
    """Counts the steps that are made."""

    count = 0

    def after_step(self):
        self.count += 1


def steps_of(rank, config, folder):
    """(Steps made, number of batches) of a training whose gradient is spoilt once, in the second process's shard."""
    cfg, steps = load_config(config), Steps()
    learn = build_learner(cfg, build_model(cfg), build_loaders(cfg), folder)
    learn.add_cbs([steps, Spoil("gradient", epoch=1) if rank else Callback()]).fit_config()
    return steps.count, len(learn.dls.train)


def test_all_processes_leave_out_a_step_that_one_cannot_make(config_file, tmp_path):
    config = config_file(
        {"Global.on_nonfinite": "skip", "Global.epochs": 1, "Arch.Head.sharded": True, "Loss.Train": [{"CELoss": {}}]}
    )
    (one, batches), other = in_processes(2, steps_of, config, tmp_path)
    assert one == batches - 1 and other == (one, batches)


def test_skipping_does_not_help_a_model_that_is_spoilt(config_file, tmp_path):
    class Break(Callback):
        def before_batch(self):
            if self.training and self.iter == 3:
                self.model.backbone.model.bn1.running_mean.fill_(float("nan"))
                self.model.backbone.model.layer1[0].conv1.weight.data.fill_(float("nan"))

    with pytest.raises(TrainingError, match=r"running_mean is spoilt already, so skipping the step does not help"):
        make(config_file, tmp_path, {"Global.on_nonfinite": "skip"}).add_cb(Break()).fit_config()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    ],
    ids=["GPU", "Python", "CPU"],
)
def test_too_little_memory_says_what_to_lower(config_file, tmp_path, error):
    def fill(*_):
        raise error

    learn = make(config_file, tmp_path)
    learn.model.neck.register_forward_hook(fill)
    with pytest.raises(TrainingError, match=r"memory does not suffice for batches of 8 and images of \(3, 32, 32\):"):
        learn.fit_config()


class Deadly(torch.nn.Module):
    """A transform that ends its process at the first image it sees, as a crashing decoder does."""

    def forward(self, image):
        os.kill(os.getpid(), signal.SIGSEGV)


def test_a_dead_worker_names_the_files_it_was_on(config_file, tmp_path):
    learn = make(config_file, tmp_path, {"DataLoader.Train.loader.num_workers": 1})
    learn.loaders.train.dataset.transform = Deadly()
    with pytest.raises(TrainingError, match=r"a worker process .* has died .* while reading one of .*images.*: memory"):
        learn.fit_config()


def test_other_errors_are_what_they_were(config_file, tmp_path):
    def fail(*_):
        raise RuntimeError("something else")

    learn = make(config_file, tmp_path)
    learn.model.neck.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        learn.fit_config()
