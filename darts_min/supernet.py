"""The continuous relaxation (Sec. 2.2): every edge holds all operations, mixed by softmax(alpha).

The usual code evaluates the 14 edges of a cell one by one. Here the edges that leave one state are
evaluated together (`MixedOp`): the mathematics of Eq. 2, in a few wide tensors.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from darts_min.genotypes import PRIMITIVES, Genotype, check_sizes, choose_cell
from darts_min.operations import (
    BatchStatNorm,
    ConvBN,
    DilConv,
    FactorizedReduce,
    SepConv,
    avg_pool,
    from_phases,
    max_pool,
    to_phases,
)


class MixedOp(nn.Module):
    """All candidate operations on the `fan` edges that leave one state (Eq. 2).

    What has weights runs on all edges side by side, in one convolution of `fan * C` channels; the
    mixture weight is the affine weight of the last BN there, so that weighting costs nothing. What
    has none (pools with BN, the skip of stride 1) is computed once, and a matrix product weights it
    for every edge. `none` adds nothing: it only keeps its share of the softmax.
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

    def forward(self, x: Tensor, mix: Tensor, scale: Tensor) -> list[list[Tensor]]:
        """Return, for each edge, one or two tensors (N, C, H', W') that add up to its output.

        x: the state (N, C, H, W); mix: the edges' mixture weights (fan, ops); scale: the same per
        channel (ops, fan*C).
        """
        parts = []
        if self.ops:
            parts.append(self.wide(x, scale).chunk(self.fan, dim=1))
        if self.shared:
            parts.append(self.narrow(x, mix).chunk(self.fan))
        return [list(edge) for edge in zip(*parts, strict=True)]

    def wide(self, x: Tensor, scale: Tensor) -> Tensor:
        """Add up the operations with weights: (N, fan*C, H', W'), edge by edge."""
        scales = dict(zip(self.primitives, scale, strict=True))
        n, x = x.size(0), F.relu(x)
        x_wide = torch.cat([x] * self.fan, dim=1)
        x_phases, dilation = to_phases(x, self.stride)
        x_phases = x_wide if dilation == 2 else torch.cat([x_phases] * self.fan, dim=1)
        outputs, phases = [], []
        for name, op in self.ops.items():
            if isinstance(op, SepConv):
                outputs.append(op(x_wide, scales[name]))
            elif isinstance(op, DilConv):
                phases.append(op(x_phases, dilation, scales[name]))
            else:
                outputs.append(op(x, scales[name]))
        if phases:
            outputs.append(from_phases(total(phases), n))
        return total(outputs)

    def narrow(self, x: Tensor, mix: Tensor) -> Tensor:
        """Weight the operations that all edges share: (fan*N, C, H', W')."""
        outputs = []
        for name in self.shared:
            if name == "max_pool_3x3":
                outputs.append(self.bn(max_pool(x, self.stride)))
            elif name == "avg_pool_3x3":
                outputs.append(self.bn(avg_pool(x, self.stride)))
            else:
                outputs.append(x)
        n, c, h, w = outputs[0].shape
        y = torch.cat(outputs).permute(0, 2, 3, 1).reshape(len(outputs), n * h * w * c)
        mixed = mix.index_select(1, self.shared_columns) @ y
        return mixed.view(self.fan * n, h, w, c).permute(0, 3, 1, 2)


def total(tensors: Sequence[Tensor]) -> Tensor:
    """Add up tensors; one new tensor in all."""
    if len(tensors) == 1:
        return tensors[0]
    result = tensors[0] + tensors[1]
    for tensor in tensors[2:]:
        result += tensor
    return result


class SearchCell(nn.Module):
    """A cell of mixed ops on two inputs, taken after their ReLU; all its nodes are concatenated."""

    def __init__(
        self,
        c_prev_prev: int,
        c_prev: int,
        channels: int,
        reduction: bool,
        reduction_prev: bool,
        num_nodes: int,
        primitives: Sequence[str],
    ):
        super().__init__()
        self.channels, self.reduction, self.num_nodes = channels, reduction, num_nodes
        preprocess0 = FactorizedReduce if reduction_prev else ConvBN
        self.preprocess0 = preprocess0(c_prev_prev, channels, BatchStatNorm)
        self.preprocess1 = ConvBN(c_prev, channels, BatchStatNorm)
        self.mixed_ops = nn.ModuleList()
        for j, nodes in enumerate(edges_by_state(num_nodes)):
            stride = 2 if reduction and j < 2 else 1
            self.mixed_ops.append(MixedOp(channels, stride, len(nodes), primitives))

    def forward(self, s0: Tensor, s1: Tensor, mix: Tensor) -> Tensor:
        """Map two states to (N, num_nodes*C, H', W'); mix: (edges, ops), edges by source state."""
        fans = [op.fan for op in self.mixed_ops]
        # BN's weights must be contiguous: on the CPU its backward misreads strided ones (2.14.1).
        scale = mix.t().repeat_interleave(self.channels, 1)
        scales = scale.split([fan * self.channels for fan in fans], dim=1)
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        inputs: list[list[Tensor]] = [[] for _ in range(self.num_nodes)]
        edges = zip(self.mixed_ops, mix.split(fans), scales, strict=True)
        for j, (mixed_op, mix_j, scale_j) in enumerate(edges):
            if j >= 2:
                states.append(total(inputs[j - 2]))
            outputs = mixed_op(states[j], mix_j, scale_j)
            for node, parts in zip(inputs[max(0, j - 1) :], outputs, strict=True):
                node.extend(parts)
        states.append(total(inputs[-1]))
        return torch.cat(states[2:], dim=1)


def with_parameters_of_now(module: nn.Module) -> Callable[..., Tensor]:
    """Return a function that calls `module` as it is now.

    To compute it again in the backward pass: `architecture_gradient` puts other weights into the
    model for its forward pass only.
    """
    parameters = dict(module.named_parameters())
    return lambda *inputs: functional_call(module, parameters, inputs)


def edges_by_state(num_nodes: int) -> list[list[int]]:
    """List the edges that leave each state; edges count in (node, predecessor) order."""
    first_edge = [node * (node + 3) // 2 for node in range(num_nodes)]
    return [
        [first_edge[node] + j for node in range(max(0, j - 1), num_nodes)]
        for j in range(num_nodes + 1)
    ]


class Supernet(nn.Module):
    """The network that is searched: `num_cells` cells of mixed ops that share their alphas by kind.

    Maps (N, in_channels, H, W) to logits (N, num_classes). With `checkpoint_cells` (an attribute)
    autograd keeps only what goes from cell to cell, and the backward pass computes each cell again:
    the same bits, less memory, more time. Raises ValueError on impossible sizes.
    """

    def __init__(
        self,
        num_classes: int = 10,
        init_channels: int = 16,
        num_cells: int = 8,
        num_nodes: int = 4,
        in_channels: int = 3,
        primitives: Sequence[str] = PRIMITIVES,
    ):
        super().__init__()
        check_sizes(num_classes, init_channels, num_cells, in_channels)
        if num_nodes < 1:
            raise ValueError(f"num_nodes {num_nodes}: must be at least 1")
        unknown = [name for name in primitives if name not in PRIMITIVES]
        if unknown or len(set(primitives)) < len(primitives) or not set(primitives) - {"none"}:
            raise ValueError(
                f"primitives {tuple(primitives)}: must be different ones of {PRIMITIVES}, "
                "and not only none"
            )
        self.num_nodes, self.primitives = num_nodes, tuple(primitives)
        self.checkpoint_cells = False
        c_prev_prev = c_prev = 3 * init_channels
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, c_prev, 3, padding=1, bias=False),
            nn.BatchNorm2d(c_prev, track_running_stats=False),
        )
        c, reduction_prev = init_channels, False
        self.cells = nn.ModuleList()
        for k in range(num_cells):
            reduction = k in (num_cells // 3, 2 * num_cells // 3)
            c = 2 * c if reduction else c
            self.cells.append(
                SearchCell(c_prev_prev, c_prev, c, reduction, reduction_prev, num_nodes, primitives)
            )
            c_prev_prev, c_prev, reduction_prev = c_prev, num_nodes * c, reduction
        self.classifier = nn.Linear(c_prev, num_classes)

        edges = sum(edges_by_state(num_nodes), [])
        self.register_buffer("edge_order", torch.tensor(edges), persistent=False)
        # Paper: zeros. Here, as in the original code, small noise.
        self.alphas_normal = nn.Parameter(1e-3 * torch.randn(len(edges), len(primitives)))
        self.alphas_reduce = nn.Parameter(1e-3 * torch.randn(len(edges), len(primitives)))

    def alphas(self) -> list[nn.Parameter]:
        """Return `[alphas_normal, alphas_reduce]`, (edges, ops) in (node, predecessor) order."""
        return [self.alphas_normal, self.alphas_reduce]

    def weights(self) -> list[nn.Parameter]:
        """Return w: every parameter that is not an alpha."""
        return [p for name, p in self.named_parameters() if not name.startswith("alphas_")]

    def mixture(self, alphas: Tensor) -> Tensor:
        """Return the mixture weights (edges, ops) of raw `alphas` (Eq. 2)."""
        return F.softmax(alphas, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        mix_normal, mix_reduce = (
            self.mixture(alphas).index_select(0, self.edge_order) for alphas in self.alphas()
        )
        out = self.stem(x)
        s0 = s1 = F.relu(out)
        for cell in self.cells:
            inputs = s0, s1, mix_reduce if cell.reduction else mix_normal
            if self.checkpoint_cells and torch.is_grad_enabled():
                out = checkpoint(with_parameters_of_now(cell), *inputs, use_reentrant=False)
            else:
                out = cell(*inputs)
            s0, s1 = s1, F.relu(out)
        return self.classifier(out.mean((2, 3)))

    @torch.no_grad()
    def genotype(self, rule: str = "darts", max_skips: int | None = None) -> Genotype:
        """Discretise (Sec. 2.4): two edges a node, one operation an edge, `none` excluded.

        `rule`: "darts" ranks by softmax, ties to the first; "nni" by raw alpha, ties to the last.
        `max_skips` limits the skip connections of the normal cell.
        """
        if rule not in ("darts", "nni"):
            raise ValueError(f"discretisation rule {rule!r} is not one of darts, nni")
        cells = []
        for alphas in self.alphas():
            scores = F.softmax(alphas, dim=-1) if rule == "darts" else alphas
            ties = "first" if rule == "darts" else "last"
            limit = max_skips if alphas is self.alphas_normal else None
            cells.append(choose_cell(scores.tolist(), self.primitives, ties, limit))
        concat = tuple(range(2, 2 + self.num_nodes))
        return Genotype(cells[0], concat, cells[1], concat)
