"""Relaxations: how the raw alphas of a cell become the mixture weights of its edges.

Each has `draw`, for a step of training, and `mean`, for evaluation, reports and discretisation;
both map alphas (edges, ops) to weights of the same shape. `penalty(alphas)` is added to the
validation loss. `at(done)` is called before each epoch, `done` going from 0 (the first epoch) to 1
(the last one): what a relaxation anneals, it sets there. With `is_sparse`, an operation of mixture
weight 0 is not computed, and this weight has gradient 0.

A new relaxation is a class here and a row in train_search.py; see docs/extending.md.
"""

import math

import torch
from torch import Tensor
from torch.distributions import Dirichlet as DirichletDistribution
from torch.nn import functional as F


class Softmax:
    """DARTS (arXiv 1806.09055, Eq. 2): all operations, by the softmax of the edge's alphas."""

    is_sparse = False

    def mean(self, alphas: Tensor) -> Tensor:
        return F.softmax(alphas, dim=-1)

    def draw(self, alphas: Tensor) -> Tensor:
        return self.mean(alphas)

    def penalty(self, alphas: list[Tensor]) -> Tensor:
        return 0 * alphas[0].sum()

    def at(self, done: float) -> None:
        pass


class Gumbel(Softmax):
    """GDAS (arXiv 1910.04465, Sec. 3.2): one operation per edge, drawn from the softmax.

    The gradient is that of the Gumbel-softmax of temperature `tau`, in the mixture weight of the
    drawn operation. It reaches the alphas of all operations of the edge, because the softmax
    divides by their sum. An edge that draws `none` gets none. `tau` falls linearly to `tau_end`.
    """

    is_sparse = True

    def __init__(self, tau: float = 10.0, tau_end: float | None = None):
        self.tau = self.tau_start = tau
        self.tau_end = tau if tau_end is None else tau_end

    def at(self, done: float) -> None:
        self.tau = self.tau_start + done * (self.tau_end - self.tau_start)

    def draw(self, alphas: Tensor) -> Tensor:
        return F.gumbel_softmax(alphas, self.tau, hard=True)


class Dirichlet(Softmax):
    """DrNAS (arXiv 2006.10355, Sec. 3.2): weights drawn from Dirichlet(1 + elu(alpha)).

    Weight decay pulls alpha to 0, and the concentration to 1, as in the paper's code.
    """

    def mean(self, alphas: Tensor) -> Tensor:
        concentration = 1 + F.elu(alphas)
        return concentration / concentration.sum(-1, keepdim=True)

    def draw(self, alphas: Tensor) -> Tensor:
        # The validation would make a GPU wait; 1 + elu is positive.
        return DirichletDistribution(1 + F.elu(alphas), validate_args=False).rsample()


class Sigmoid(Softmax):
    """FairDARTS (arXiv 1911.12126, Sec. 3): each operation for itself, by its alpha's sigmoid.

    The zero-one loss, -zero_one_weight * mean((sigmoid(alpha) - 0.5)^2), drives them apart.
    """

    def __init__(self, zero_one_weight: float = 10.0):
        self.zero_one_weight = zero_one_weight

    def mean(self, alphas: Tensor) -> Tensor:
        return torch.sigmoid(alphas)

    def penalty(self, alphas: list[Tensor]) -> Tensor:
        weights = self.mean(torch.cat(alphas))
        return -self.zero_one_weight * ((weights - 0.5) ** 2).mean()


class SinglePath(Softmax):
    """Random search with weight sharing (arXiv 1902.07638, Sec. 3.2): one cell, drawn uniformly.

    Two edges a node, on each any operation but that of column `none` and those whose alpha is -inf.
    The alphas learn nothing; they hold the best cell, as zeros and ones.
    """

    is_sparse = True

    def __init__(self, none: int | None = None):
        self.none = none

    def mean(self, alphas: Tensor) -> Tensor:
        return alphas.clamp_min(0)

    def draw(self, alphas: Tensor, generator: torch.Generator | None = None) -> Tensor:
        allowed = (alphas > -math.inf).tolist()
        mix, first, predecessors = torch.zeros_like(alphas), 0, 2
        while first < len(alphas):
            for j in torch.randperm(predecessors, generator=generator)[:2].tolist():
                columns = [i for i, ok in enumerate(allowed[first + j]) if ok and i != self.none]
                chosen = torch.randint(len(columns), (), generator=generator).item()
                mix[first + j, columns[chosen]] = 1
            first, predecessors = first + predecessors, predecessors + 1
        return mix
