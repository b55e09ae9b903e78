"""A guard against losses and gradients that are not finite."""

from collections.abc import Iterable

import torch
from torch import Tensor


class FiniteGuard:
    """Refuse a step on a loss or gradient that is not finite, before it reaches the weights.

    Without `skip` that raises FloatingPointError. With it, the batch is to be left out; it is
    counted in `skipped`, and the tenth in a row raises.
    """

    def __init__(self, skip: bool):
        self.skip, self.skipped, self.in_a_row = skip, 0, 0

    def rejects(self, total: Tensor, gradients: Iterable[tuple[str, Tensor | None]]) -> bool:
        """Return whether the step must be left out.

        `total` is finite if all is well: the sum of the loss and the norm of the gradients. With
        scaled losses (fp16) it is the loss: their gradients overflow as a matter of course, and the
        scaler leaves those steps out.
        """
        if bool(torch.isfinite(total)):
            self.in_a_row = 0
            return False
        self.skipped += 1
        self.in_a_row += 1
        if self.skip and self.in_a_row < 10:
            return True
        sizes = {name: grad.abs().max() for name, grad in gradients if grad is not None}
        # nan is larger than all numbers: nan_to_num makes it so.
        name = max(sizes, key=lambda name: float(sizes[name].nan_to_num(float("inf"))))
        advice = "10 batches in a row" if self.skip else "--on-nonfinite skip leaves such out"
        raise FloatingPointError(
            f"loss or gradient is not finite; the largest gradient is {float(sizes[name]):g}, in "
            f"{name} ({advice})"
        )
