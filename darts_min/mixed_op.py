"""The mixed op (Eq. 2) on all edges that leave one state.

The usual code evaluates the 14 edges of a cell one by one. Here the edges that leave one state are
evaluated together: the same mathematics, in a few wide tensors.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from darts_min.operations import (
    BatchStatNorm,
    DilConv,
    FactorizedReduce,
    Noise,
    SepConv,
    avg_pool,
    from_phases,
    max_pool,
    to_phases,
)

# (fan, ops): which operations of which edges to compute; None is all.
Chosen = list[list[bool]] | None
# Of each operation, the edges that it is computed for.
EdgesOf = dict[str, tuple[int, ...]]
# Some edges, and for each of them a tensor (N, C, H', W').
Outputs = tuple[Sequence[int], Sequence[Tensor]]


class MixedOp(nn.Module):
    """All candidate operations on the `fan` edges that leave one state (Eq. 2).

    What has weights runs on all edges side by side, in one convolution of `fan * C` channels; the
    mixture weight is the affine weight of the last BN there, so that weighting costs nothing. What
    has none (pools with BN, the skip of stride 1) is computed once, and a matrix product weights it
    for every edge. `none` adds nothing: it only keeps its share of the mixture.
    """

    def __init__(self, channels: int, stride: int, fan: int, primitives: Sequence[str]):
        super().__init__()
        self.stride, self.fan, self.primitives = stride, fan, tuple(primitives)
        self.bn = BatchStatNorm(channels)
        shared = ["max_pool_3x3", "avg_pool_3x3"] + ["skip_connect"] * (stride == 1)
        self.shared = [name for name in primitives if name in shared]
        columns = torch.tensor([primitives.index(name) for name in self.shared], dtype=torch.long)
        self.register_buffer("shared_columns", columns, persistent=False)
        self.ops = nn.ModuleDict()
        for name in primitives:
            if name.startswith("sep_conv"):
                self.ops[name] = SepConv(channels, int(name[-1]), stride, BatchStatNorm, fan)
            elif name.startswith("dil_conv"):
                self.ops[name] = DilConv(channels, int(name[-1]), BatchStatNorm, fan)
            elif name == "skip_connect" and stride == 2:
                self.ops[name] = FactorizedReduce(channels, channels, BatchStatNorm, fan)
            elif name == "noise":
                self.ops[name] = Noise(stride)

    def forward(
        self, x: Tensor, mix: Tensor, scale: Tensor, chosen: Chosen, drop_path_prob: Tensor | None
    ) -> list[list[Tensor]]:
        """Return, for each edge, tensors (N, C, H', W') that add up to its output; maybe none.

        x: the state (N, C, H, W); mix: the edges' mixture weights (fan, ops); scale: the same per
        channel (ops, fan*C).
        """
        edges_of = {
            name: tuple(e for e in range(self.fan) if chosen is None or chosen[e][column])
            for column, name in enumerate(self.primitives)
        }
        keep = None
        if drop_path_prob is not None:  # whole edges, for each sample (arXiv 1909.09656, Sec. 5)
            keep = torch.rand(self.fan, x.size(0), 1, 1, 1, device=x.device) >= drop_path_prob
            keep = keep.to(x.dtype) / (1 - drop_path_prob)
        outputs: list[list[Tensor]] = [[] for _ in range(self.fan)]
        for edges, wide in (*self.wide(x, scale, edges_of), *self.narrow(x, mix, edges_of)):
            for edge, y in zip(edges, wide, strict=True):
                outputs[edge].append(y if keep is None else y * keep[edge])
        return outputs

    def wide(self, x: Tensor, scale: Tensor, edges_of: EdgesOf) -> Iterator[Outputs]:
        """Compute the operations with weights, and add up those that are on the same edges."""
        scales = dict(zip(self.primitives, scale, strict=True))
        relu = F.relu(x)
        dilated = [name for name in self.ops if name.startswith("dil_conv") and edges_of[name]]
        relu_phases, dilation = to_phases(relu, self.stride) if dilated else (relu, 2)
        copies: dict[tuple[bool, int], Tensor] = {}
        outputs: dict[tuple[int, ...], list[Tensor]] = {}
        phases: dict[tuple[int, ...], list[Tensor]] = {}
        for name, op in self.ops.items():
            edges, scale_of_edges = edges_of[name], scales[name]
            if not edges:
                continue
            call = op
            if len(edges) < self.fan:
                call = on_edges(op, self.fan, edges)
                scale_of_edges = take(scale_of_edges.unflatten(0, (self.fan, -1)), edges).flatten()
            kind = name in dilated and dilation == 1, len(edges)
            if isinstance(op, SepConv | DilConv) and kind not in copies:
                copies[kind] = torch.cat([relu_phases if kind[0] else relu] * kind[1], dim=1)
            if isinstance(op, SepConv):
                outputs.setdefault(edges, []).append(call(copies[kind], scale_of_edges))
            elif isinstance(op, DilConv):
                phases.setdefault(edges, []).append(call(copies[kind], dilation, scale_of_edges))
            else:
                outputs.setdefault(edges, []).append(call(relu, scale_of_edges))
        for edges, summands in phases.items():
            outputs.setdefault(edges, []).append(from_phases(total(summands), x.size(0)))
        for edges, summands in outputs.items():
            yield edges, total(summands).chunk(len(edges), dim=1)

    def narrow(self, x: Tensor, mix: Tensor, edges_of: EdgesOf) -> Iterator[Outputs]:
        """Compute the operations that edges share, weighted for each edge that has one."""
        names = [name for name in self.shared if edges_of[name]]
        if not names:
            return
        outputs = []
        for name in names:
            if name == "max_pool_3x3":
                outputs.append(self.bn(max_pool(x, self.stride)))
            elif name == "avg_pool_3x3":
                outputs.append(self.bn(avg_pool(x, self.stride)))
            else:
                outputs.append(x)
        edges = sorted({edge for name in names for edge in edges_of[name]})
        y = torch.cat(outputs)
        channels_last = y.is_contiguous(memory_format=torch.channels_last)
        y = y.permute(0, 2, 3, 1) if channels_last else y  # as it lies in memory
        weights = mix.index_select(1, self.shared_columns)
        if len(edges) < self.fan or len(names) < len(self.shared):
            columns = [self.shared.index(name) for name in names]
            weights = take(take(weights, edges), columns, dim=1)
        mixed = (weights @ y.reshape(len(outputs), -1)).view(len(edges) * x.size(0), *y.shape[1:])
        yield edges, (mixed.permute(0, 3, 1, 2) if channels_last else mixed).chunk(len(edges))


def on_edges(op: nn.Module, fan: int, edges: Sequence[int]) -> Callable[..., Tensor]:
    """Return `op`, which serves `fan` edges, as it is on some of them."""
    parameters = {
        name: take(parameter.unflatten(0, (fan, -1)), edges).flatten(0, 1)
        for name, parameter in op.named_parameters()
    }
    return lambda *inputs: functional_call(op, parameters, inputs)


def take(x: Tensor, indices: Sequence[int], dim: int = 0) -> Tensor:
    """Return `x` at `indices`; indexing with a list would make CUDA wait for each one's copy."""
    parts = [x.narrow(dim, i, 1) for i in indices]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def total(tensors: Sequence[Tensor]) -> Tensor:
    """Add up tensors; one new tensor in all."""
    if len(tensors) == 1:
        return tensors[0]
    result = tensors[0] + tensors[1]
    for tensor in tensors[2:]:
        result += tensor
    return result
