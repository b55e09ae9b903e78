"""The mixed op (Eq. 2) on all edges that leave one state.

The usual code evaluates the 14 edges of a cell one by one: `MixedOp` in tests/textbook.py is Eq. 2
as the paper writes it. Here the edges that leave one state are evaluated together: the same
mathematics, in a few wide tensors.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .kernels import from_phases, total, weighted_sums
from .operations import OPS, BatchStatNorm, State, drop_path_masks

# (fan, ops): which operations of which edges to compute; None is all.
Chosen = list[list[bool]] | None


class MixedOp(nn.Module):
    """All candidate operations on the `fan` edges that leave one state (Eq. 2).

    An operation with weights runs on all edges side by side, in one convolution of `fan * C`
    channels. One without (pools with BN, the skip of stride 1) is computed once for all edges.
    `none` adds nothing: it only keeps its share of the mixture.
    """

    def __init__(self, channels: int, stride: int, fan: int, primitives: Sequence[str]):
        super().__init__()
        self.stride, self.fan, self.primitives = stride, fan, tuple(primitives)
        self.ops = nn.ModuleDict(
            {n: OPS[n](channels, stride, BatchStatNorm, fan) for n in primitives if n != "none"}
        )
        self.shared = [n for n, op in self.ops.items() if getattr(op, "is_shared", False)]
        self.shared_columns = [primitives.index(n) for n in self.shared]
        self.wide = [n for n in self.ops if n not in self.shared]
        self.wide_columns = [primitives.index(n) for n in self.wide]

    def forward(
        self, x: Tensor, mix: Tensor, scale: Tensor, chosen: Chosen, drop_path_prob: Tensor | None
    ) -> list[list[Tensor]]:
        """Return, for each edge, tensors (N, C, H', W') that add up to its output; maybe none.

        x: the state (N, C, H, W); mix: the edges' mixture weights (fan, ops); scale: the same per
        channel (ops, fan*C).
        """
        keep = None
        if drop_path_prob is not None:  # whole edges, for each sample (arXiv 1909.09656, Sec. 5)
            keep = drop_path_masks(self.fan, x, drop_path_prob)
        if chosen is None:
            outputs = self.all_operations(State(x), mix, scale)
        else:
            outputs = self.chosen_operations(State(x), mix, scale, chosen)
        if keep is not None:
            outputs = [
                [y * keep_e for y in of_edge] for of_edge, keep_e in zip(outputs, keep, strict=True)
            ]
        return outputs

    def all_operations(self, state: State, mix: Tensor, scale: Tensor) -> list[list[Tensor]]:
        """Compute the summands of Eq. 2, sum_o mix_o * o(x), for all edges.

        For each edge they are at most two: the sum over the operations with weights, and the sum
        over those without. `SearchCell.node` adds up both, and the edges that meet there (Eq. 1).
        """
        outputs: list[list[Tensor]] = [[] for _ in range(self.fan)]

        def add(edges: Sequence[Tensor]) -> None:
            for of_edge, y in zip(outputs, edges, strict=True):
                of_edge.append(y)

        # Eq. 2 over the operations with weights. They multiply with mix_o themselves.
        weighted, in_phases = [], []
        if self.wide:
            for name, mix_o in zip(self.wide, take(scale, self.wide_columns), strict=True):
                y = self.ops[name](state, mix_o)
                (weighted if y.size(0) == state.x.size(0) else in_phases).append(y)
            if in_phases:
                weighted.append(from_phases(total(in_phases), state.x.size(0)))
            add(total(weighted).chunk(self.fan, dim=1))
        # Eq. 2 over the others, which edges share: one matrix product with the mix_o of all edges.
        if self.shared:
            shared = [self.ops[name](state) for name in self.shared]
            add(weighted_sums(take(mix, self.shared_columns, dim=1), shared))
        return outputs

    def chosen_operations(
        self, state: State, mix: Tensor, scale: Tensor, chosen: list[list[bool]]
    ) -> list[list[Tensor]]:
        """Compute the summands of Eq. 2 over the chosen operations of each edge.

        An operation that is not chosen sends no gradient to its mixture weight. This holds for the
        straight-through estimator of GDAS, too.
        """
        outputs = [[] for _ in range(self.fan)]
        for column, name in enumerate(self.primitives):
            edges = [edge for edge in range(self.fan) if chosen[edge][column]]
            if not edges or name == "none":
                continue
            if name in self.shared:
                y = self.ops[name](state)
                parts = [mix[edge, column] * y for edge in edges]
            else:
                op = on_edges(self.ops[name], self.fan, edges)
                weight = take(scale[column].unflatten(0, (self.fan, -1)), edges).flatten()
                y = from_phases(op(state, weight), state.x.size(0))
                parts = y.chunk(len(edges), dim=1)
            for edge, part in zip(edges, parts, strict=True):
                outputs[edge].append(part)
        return outputs


def on_edges(op: nn.Module, fan: int, edges: Sequence[int]) -> Callable[..., Tensor]:
    """Return `op`, which serves `fan` edges, with the weights of some edges only."""
    if len(edges) == fan:
        return op
    parameters = {
        name: take(parameter.unflatten(0, (fan, -1)), edges).flatten(0, 1)
        for name, parameter in op.named_parameters()
    }
    return lambda *inputs: functional_call(op, parameters, inputs)


def take(x: Tensor, indices: Sequence[int], dim: int = 0) -> Tensor:
    """Return `x` at ascending `indices`; a view if they are adjacent.

    Indexing with a list would make CUDA wait for the list's copy.
    """
    if indices[-1] - indices[0] == len(indices) - 1:
        return x.narrow(dim, indices[0], len(indices))
    return torch.cat([x.narrow(dim, i, 1) for i in indices], dim)
