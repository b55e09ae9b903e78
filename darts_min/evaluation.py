"""Accuracy and loss of a classifier."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Evaluation(NamedTuple):
    """Mean cross-entropy, accuracy in [0, 1], and per class the images and the errors (K,)."""

    loss: float
    accuracy: float
    class_sizes: Tensor
    class_errors: Tensor


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Evaluation:
    """Evaluate `model` on `batches`, each image counted once; the model's mode is restored."""
    training = model.training
    model.eval()
    loss, sizes, errors = 0.0, torch.zeros(num_classes), torch.zeros(num_classes)
    for x, target in batches:
        with autocast():
            logits = model(x)
        loss += F.cross_entropy(logits.float(), target, reduction="sum").double()
        wrong = target[logits.argmax(1) != target]
        sizes += torch.bincount(target, minlength=num_classes).cpu()
        errors += torch.bincount(wrong, minlength=num_classes).cpu()
    model.train(training)
    total = sizes.sum().item()
    return Evaluation(float(loss) / total, 1 - errors.sum().item() / total, sizes, errors)
