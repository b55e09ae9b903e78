"""Choose the best of many random cells by the supernet's weights (arXiv 1902.07638)."""

from collections.abc import Callable

import torch

from darts_min.judge.signs import discretised
from darts_min.supernet import Supernet


@torch.no_grad()
def take_best_path(
    model: Supernet,
    candidates: int,
    generator: torch.Generator,
    accuracy: Callable[[Supernet, bool], float],
) -> None:
    """Draw cells, rank them by their accuracy with the weights of `model`, and keep the best one.

    In the end the alphas of `model` hold the best cell. `accuracy(supernet, on_all)` evaluates one
    cell: first each cell on some of the images (`on_all` False), then the best tenth of the cells
    on all images.
    """
    draw, kinds = model.relaxation.draw, model.allowed_alphas()
    paths = [[draw(alphas, generator) for alphas in kinds] for _ in range(candidates)]

    def take(path: list[torch.Tensor]) -> None:
        for alphas, ones in zip(model.alphas(), path, strict=True):
            alphas.copy_(ones)

    def score(path: list[torch.Tensor], on_all: bool) -> float:
        take(path)
        return accuracy(discretised(model, model.genotype()), on_all)

    paths.sort(key=lambda path: -score(path, on_all=False))
    take(max(paths[: max(1, candidates // 10)], key=lambda path: score(path, on_all=True)))
