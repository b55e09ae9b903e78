"""Compute the learning rate from the step alone, so that resuming is exact."""

import math
from collections.abc import Callable

import torch

SCHEDULES = ("cosine", "one-cycle", "exponential")


def make_scheduler(
    optimizer: torch.optim.Optimizer,
    schedule: str,
    epochs: int,
    steps_per_epoch: int,
    lr_min: float = 0.0,
    decay: float = 0.97,
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a scheduler of the learning rate, to be stepped after every batch.

    `lr_min` is where "cosine" ends; `decay` is the factor per epoch of "exponential".
    """
    lr = optimizer.defaults["lr"]
    factor = learning_rate_factor(
        schedule, epochs, steps_per_epoch, lr_min / lr if lr else 0, decay
    )
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def learning_rate_factor(
    schedule: str, epochs: int, steps_per_epoch: int, last: float = 0.0, decay: float = 0.97
) -> Callable[[int], float]:
    """Return a function of the step (from 0): the share of the largest learning rate.

    "cosine" falls from 1 to `last`, and "exponential" by the factor `decay`, at the end of each
    epoch, like CosineAnnealingLR and ExponentialLR in torch. "one-cycle" rises from 1/25 to 1 in
    the first fifth of the steps and falls to nearly 0, at every step (arXiv 1708.07120; OneCycleLR
    in torch).
    """
    total = epochs * steps_per_epoch

    def between(start: float, end: float, progress: float) -> float:
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2

    def factor(step: int) -> float:
        epoch = step // steps_per_epoch
        if schedule == "cosine":
            return between(1.0, last, epoch / epochs)
        if schedule == "exponential":
            return decay**epoch
        peak = 0.2 * total - 1
        if step <= peak:
            return between(1 / 25, 1.0, step / peak if peak > 0 else 1.0)
        return between(1.0, 1e-4 / 25, min(1.0, (step - peak) / (total - 1 - peak)))

    return factor


def change_epochs(
    scheduler: torch.optim.lr_scheduler.LambdaLR, before: int, now: int, progress: dict[str, int]
) -> str:
    """Put a resumed scheduler on the schedule for `now` epochs; return a line that says so.

    Raises ValueError if the run has gone further than that.
    """
    if now < progress["epoch"] + (progress["step"] > 0):
        raise ValueError(f"--epochs {now}: the run is in epoch {progress['epoch'] + 1} already")
    (old,) = scheduler.get_last_lr()
    scheduler.last_epoch -= 1
    scheduler.step()
    (new,) = scheduler.get_last_lr()
    return (
        f"epochs {before} -> {now}: from here on the schedule is that of {now} epochs, with "
        f"learning rate {new:.4g} instead of {old:.4g}; a run of {now} from the start would differ"
    )
