"""How one step of the optimizer is made of batches, processes and scales.

A step may use the gradients of several batches (`Accumulate`) and of several processes (`Together`), may need losses
that are scaled while they are followed in half precision (`ScaleLoss`), and moves an average of the weights
(`MovingAverage`). `fit.build_callbacks` says in which order they act.
"""

import torch
from torch import nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from recnb.distributed.gradients import AverageGradients, copy_from_first
from recnb.distributed.processes import ranks
from recnb.distributed.rows import sharded_weights
from recnb.training.adaptor import Callback, CancelBatchException, CancelStepException
from recnb.training.checkpoints import load_model, whole_states


class Together(Callback):
    """Keeps several processes at one: the first one's weights to begin with and its buffers, averaged gradients.

    Gradients travel during the backward pass of the last batch of a step, summed over its `batches`.
    """

    def __init__(self, batches: int = 1):
        self.batches = batches

    def own(self) -> list[nn.Parameter]:
        """Return the parameters that every process holds."""
        shards = {self.model.get_parameter(name) for name in sharded_weights(self.model)}
        both = (*self.model.parameters(), *self.loss_func.parameters())
        return [p for p in both if p.requires_grad and p not in shards]

    def before_fit(self):
        copy_from_first([*self.own(), *self.model.buffers()])
        self.average = AverageGradients()

    def before_backward(self):
        if ends_step(self, self.batches):
            self.average.begin(self.own())

    def before_step(self):
        self.average.finish()

    def after_step(self):
        copy_from_first(self.model.buffers())

    def after_fit(self):
        self.average.close()


def ends_step(callback: Callback, batches: int) -> bool:
    """Return whether the optimizer steps behind this batch; the last batches of an epoch may be fewer."""
    return (callback.iter + 1) % batches == 0 or callback.iter + 1 == callback.n_iter


class Accumulate(Callback):
    """Sums the gradients of several batches, each loss divided by their number, before a step of the optimizer."""

    def __init__(self, batches: int):
        self.batches = batches

    def before_backward(self):
        self.learn.loss_grad = self.loss_grad / self.batches

    def before_step(self):
        if not ends_step(self, self.batches):
            raise CancelBatchException


class ScaleLoss(Callback):
    """Keeps the gradients of float16 from vanishing; a step whose gradients overflow is left out and the scale halved.

    Gradients are scaled back before the optimizer is called, so that its hooks clip and add to true ones. Several
    processes leave out the same steps, also where one alone sees the overflow in its share of a sharded head.
    """

    def __init__(self, device: torch.device):
        kind = ShardedGradScaler if ranks()[1] > 1 else torch.amp.GradScaler
        self.scaler = kind(device.type)

    def before_backward(self):
        self.learn.loss_grad = self.scaler.scale(self.loss_grad)

    def before_step(self):
        # A fused one would be called with gradients that overflow too: its hooks would run and fill its state.
        self.opt.opt._step_supports_amp_scaling = False
        self.scaler.unscale_(self.opt.opt)
        self.scaler.step(self.opt.opt)
        self.scaler.update()
        raise CancelStepException  # it has been done, or had to be left out

    def state_dict(self) -> dict:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.scaler.load_state_dict(state)


class MovingAverage(Callback):
    """An exponential moving average of the weights and buffers, which is what is evaluated and kept as the best.

    `decay` a step; training goes on with the weights themselves.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    def after_step(self):
        self.average.update_parameters(self.learn.model)

    def swap(self):
        ours, averaged = ([*m.parameters(), *m.buffers()] for m in (self.learn.model, self.average.module))
        for own, other in zip(ours, averaged, strict=True):
            held = own.detach().clone()
            own.data.copy_(other)
            other.data.copy_(held)

    before_validate = after_validate = swap

    def state_dict(self) -> dict:
        return {"weights": whole_states(self.average.module)[0], "steps": int(self.average.n_averaged)}

    def load_state_dict(self, state: dict) -> None:
        load_model(self.average.module, state["weights"])
        self.average.n_averaged.fill_(state["steps"])
