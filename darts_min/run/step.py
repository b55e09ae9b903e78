"""Take one optimizer step, with all that surrounds it when several processes or fp16 are used."""

import argparse
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from darts_min.run.machine import Machine
from darts_min.run.schedules import make_scheduler


class FiniteGuard:
    """Decide what happens to a batch whose loss or gradient is not finite.

    Without `skip`, the run stops with a FloatingPointError before the weights are touched. With
    `skip`, the batch is left out and counted in `skipped`, and the tenth one in a row stops the
    run. `place` says in the error where the training is; `Progress` keeps it up to date.
    """

    def __init__(self, skip: bool):
        self.skip, self.skipped, self.place = skip, 0, "here"


class Step:
    """Step an optimizer: average, unscale, refuse what is not finite, clip, step, rescale.

    One object serves w, another one alpha. `model` names the parameters in errors. `grad_clip` is
    the largest l2 norm of the gradient; 0 turns clipping off. `scheduler` goes on after each batch,
    also after one that is left out. With `averages`, the step averages the gradients over the
    processes, and a missing gradient counts as zero; without it, the model is one of
    `Machine.distribute`, which averages them. `can_scale` False says that the gradients are float32
    even where the precision is fp16.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        machine: Machine,
        guard: FiniteGuard,
        *,
        grad_clip: float = 0.0,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        averages: bool = True,
        can_scale: bool = True,
    ):
        self.optimizer, self.machine, self.guard = optimizer, machine, guard
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.grad_clip, self.scheduler, self.averages = grad_clip, scheduler, averages
        self.scaler = machine.scaler(can_scale)
        self.refused_in_a_row = 0
        ids = {id(p) for p in self.parameters}
        self.named = [(name, p) for name, p in model.named_parameters() if id(p) in ids]
        self.buffers = list(model.buffers()) if guard.skip else []
        self.kept: list[tuple[Tensor, Tensor]] = []  # each buffer, and what was in it before

    def state_dict(self) -> dict[str, Any]:
        state = {name: item.state_dict() for name, item in self._stateful().items()}
        return state | {"refused_in_a_row": self.refused_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, item in self._stateful().items():
            item.load_state_dict(state[name])
        self.refused_in_a_row = state["refused_in_a_row"]

    def _stateful(self) -> dict[str, Any]:
        items = {"optimizer": self.optimizer, "scaler": self.scaler}
        return items | ({"scheduler": self.scheduler} if self.scheduler is not None else {})

    def zero_grad(self) -> None:
        """Begin a batch: clear the gradients; keep the statistics of BN in case it is left out."""
        self.optimizer.zero_grad()
        self.kept = [(buffer, buffer.clone()) for buffer in self.buffers]

    def scale(self, loss: Tensor) -> Tensor:
        """Scale a loss before its backward pass, so that fp16 gradients do not underflow."""
        return self.scaler.scale(loss)

    def __call__(
        self, gradients: Sequence[Tensor | None] | None = None, loss: Tensor | None = None
    ) -> bool:
        """Take the step, along `gradients` where given, else along `.grad`; return if it was taken.

        `gradients` are in the order of the optimizer's parameters, and scaled. `loss`, not scaled,
        is averaged over the processes too, and must be finite.
        """
        if gradients is not None:
            for p, gradient in zip(self.parameters, gradients, strict=True):
                p.grad = gradient
        losses = [] if loss is None else [loss]
        if self.averages:
            for p in self.parameters:
                if p.grad is None:  # of an operation that was not drawn
                    p.grad = torch.zeros_like(p)
            self.machine.average([*losses, *(p.grad for p in self.parameters)])
        else:
            self.machine.average(losses)
        self.scaler.unscale_(self.optimizer)
        trained = [p for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        # Scaled gradients overflow now and then, and the scaler leaves out those steps by itself.
        must_be_finite = losses if self.scaler.is_enabled() else [*losses, norm]
        is_taken = self._accepts(must_be_finite)
        if is_taken:
            if self.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(trained, self.grad_clip, norm)
            self.scaler.step(self.optimizer)
        else:
            for buffer, before in self.kept:
                buffer.copy_(before)
        self.scaler.update()
        self._check_scale()
        if self.scheduler is not None:
            self.scheduler.step()
        return is_taken

    def _accepts(self, values: Iterable[Tensor]) -> bool:
        """Return whether all `values` are finite; raise FloatingPointError if the run must stop."""
        if bool(torch.isfinite(sum(values, torch.zeros(())))):
            self.refused_in_a_row = 0
            return True
        self.guard.skipped += 1
        self.refused_in_a_row += 1
        if self.guard.skip and self.refused_in_a_row < 10:
            return False
        sizes = {name: float(p.grad.abs().max()) for name, p in self.named if p.grad is not None}
        # max() would not find a nan, which is neither larger nor smaller than any number.
        name = max(sizes, key=lambda name: math.inf if math.isnan(sizes[name]) else sizes[name])
        skip = self.guard.skip
        advice = "10 batches in a row" if skip else "--on-nonfinite skip leaves such batches out"
        raise FloatingPointError(
            f"{self.guard.place}: loss or gradient is not finite; the largest gradient is "
            f"{sizes[name]:g}, in {name} ({advice})"
        )

    def _check_scale(self) -> None:
        """Raise FloatingPointError if the scaler has found no scale without overflow (fp16)."""
        if self.scaler.is_enabled() and self.scaler.get_scale() < 2**-10:
            raise FloatingPointError(
                f"{self.guard.place}: gradients overflow in fp16 at any scale, down to "
                f"{self.scaler.get_scale():g}; --amp bf16 or off has more range"
            )


def make_w_step(
    args: argparse.Namespace,
    model: nn.Module,
    weights: list[nn.Parameter],
    machine: Machine,
    steps_per_epoch: int,
    *,
    schedule: str = "cosine",
    nesterov: bool = False,
    averages: bool = True,
) -> Step:
    """Make the step of the weights w of `model`, as the arguments `w_*` say."""
    decay = args.w_weight_decay
    if args.w_optimizer == "adam":
        optimizer = torch.optim.Adam(weights, args.w_lr, weight_decay=decay)
    else:
        optimizer = torch.optim.SGD(
            weights,
            args.w_lr,
            args.w_momentum,
            weight_decay=decay,
            nesterov=nesterov,
            foreach=True,  # one call for all tensors, on the CPU too
        )
    lr_decay = args.w_lr_decay if schedule == "exponential" else 1.0
    length = args.epochs, steps_per_epoch
    return Step(
        optimizer,
        model,
        machine,
        FiniteGuard(args.on_nonfinite == "skip"),
        grad_clip=args.w_grad_clip,
        scheduler=make_scheduler(optimizer, schedule, *length, args.w_lr_min, lr_decay),
        averages=averages,
    )
