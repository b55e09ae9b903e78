"""A guard against losses and gradients that are not finite."""

from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class FiniteGuard:
    """Refuse a step on a loss or gradient that is not finite, before it reaches the weights.

    Without `skip` that raises FloatingPointError. With it, the batch is to be left out; it is
    counted in `skipped`, and the tenth in a row raises. `place()` is where the training is, for the
    message.
    """

    def __init__(self, skip: bool, place: Callable[[], str] = lambda: "here"):
        self.skip, self.skipped, self.in_a_row = skip, 0, Counter()
        self.place = place

    def check_scale(self, scaler: torch.amp.GradScaler) -> None:
        """Raise FloatingPointError if `scaler` has found no scale without overflow (fp16)."""
        if scaler.is_enabled() and scaler.get_scale() < 2**-10:
            raise FloatingPointError(
                f"{self.place()}: gradients overflow in fp16 at any scale, down to "
                f"{scaler.get_scale():g}; --amp bf16 or off has more range"
            )

    def rejects(
        self, of: str, total: Tensor, gradients: Iterable[tuple[str, Tensor | None]]
    ) -> bool:
        """Return whether the step `of` w, or of alpha, must be left out.

        `total` is finite if all is well: the sum of the loss and the norm of the gradients. With
        scaled losses (fp16) it is the loss: their gradients overflow as a matter of course, and the
        scaler leaves those steps out.
        """
        if bool(torch.isfinite(total)):
            self.in_a_row[of] = 0
            return False
        self.skipped += 1
        self.in_a_row[of] += 1
        if self.skip and self.in_a_row[of] < 10:
            return True
        sizes = {name: grad.detach().abs().max() for name, grad in gradients if grad is not None}
        # nan is larger than all numbers: nan_to_num makes it so.
        name = max(sizes, key=lambda name: float(sizes[name].nan_to_num(float("inf"))))
        advice = "10 batches in a row" if self.skip else "--on-nonfinite skip leaves such out"
        raise FloatingPointError(
            f"{self.place()}: loss or gradient is not finite; the largest gradient is "
            f"{float(sizes[name]):g}, in {name} ({advice})"
        )
