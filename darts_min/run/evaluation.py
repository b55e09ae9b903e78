"""Measure the accuracy and the loss of a classifier."""

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
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Evaluation:
    """Evaluate `model` on `batches`, where every image counts once; the model's mode is restored.

    `total` adds up a tensor over the processes that share the images.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums = torch.zeros(1 + 2 * num_classes, dtype=torch.float64, device=device)
    for x, target in batches:
        with autocast():
            logits = model(x)
        loss = F.cross_entropy(logits.float(), target, reduction="sum")
        # Not bincount, for which a GPU would make the host wait in each batch.
        of_class = target[:, None] == torch.arange(num_classes, device=device)
        wrong = of_class & (logits.argmax(1) != target)[:, None]
        sums += torch.cat([loss[None], of_class.sum(0), wrong.sum(0)])
    model.train(training)
    loss, sizes, errors = total(sums).cpu().split([1, num_classes, num_classes])
    images = sizes.sum().item()
    return Evaluation(loss.item() / images, 1 - errors.sum().item() / images, sizes, errors)
