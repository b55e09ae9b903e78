"""The supernet (Sec. 2.2): every edge holds all operations, mixed by weights made of alpha."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from darts_min.genotypes import (
    OPERATIONS,
    PRIMITIVES,
    Genotype,
    check_sizes,
    choose_cell_of_few_skips,
)
from darts_min.mixed_op import Chosen, MixedOp, total
from darts_min.operations import (
    BatchStatNorm,
    ConvBN,
    FactorizedReduce,
    concatenate,
    drop_path_probability,
)
from darts_min.relaxations import Softmax


class SearchCell(nn.Module):
    """A cell of mixed ops on two inputs, taken after their ReLU; all its nodes are concatenated.

    With `partial` K > 1 (PC-DARTS, arXiv 1907.05737, Sec. 3.2) the mixed ops see the first 1/K of
    the channels; the others pass by, and a shuffle brings them together.
    """

    def __init__(
        self,
        c_prev_prev: int,
        c_prev: int,
        channels: int,
        reduction: bool,
        reduction_prev: bool,
        num_nodes: int,
        primitives: Sequence[str],
        partial: int = 1,
    ):
        super().__init__()
        self.channels, self.partial = channels // partial, partial
        self.reduction, self.num_nodes = reduction, num_nodes
        preprocess0 = FactorizedReduce if reduction_prev else ConvBN
        self.preprocess0 = preprocess0(c_prev_prev, channels, BatchStatNorm)
        self.preprocess1 = ConvBN(c_prev, channels, BatchStatNorm)
        self.mixed_ops = nn.ModuleList()
        for j, nodes in enumerate(edges_by_state(num_nodes)):
            stride = 2 if reduction and j < 2 else 1
            self.mixed_ops.append(MixedOp(self.channels, stride, len(nodes), primitives))

    def forward(
        self,
        s0: Tensor,
        s1: Tensor,
        mix: Tensor,
        chosen: Chosen = None,
        drop_path_prob: Tensor | None = None,
    ) -> Tensor:
        """Map two states to (N, num_nodes*C, H', W'); mix: (edges, ops), edges by source state."""
        fans = [op.fan for op in self.mixed_ops]
        # BN's weights must be contiguous: on the CPU its backward misreads strided ones (2.14.1).
        scale = mix.t().repeat_interleave(self.channels, 1)
        scales = scale.split([fan * self.channels for fan in fans], dim=1)
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        inputs: list[list[Tensor]] = [[] for _ in range(self.num_nodes)]
        passing: list[list[Tensor]] = [[] for _ in range(self.num_nodes)]
        first = 0
        edges = zip(self.mixed_ops, mix.split(fans), scales, strict=True)
        for j, (mixed_op, mix_j, scale_j) in enumerate(edges):
            if j >= 2:
                states.append(self.node(inputs[j - 2], passing[j - 2], states[0]))
            chosen_j = None if chosen is None else chosen[first : first + mixed_op.fan]
            x = rest = states[j]
            if self.partial > 1:  # not by slices, whose gradients are contiguous
                x, rest = x.split([self.channels, (self.partial - 1) * self.channels], dim=1)
            outputs = mixed_op(x, mix_j, scale_j, chosen_j, drop_path_prob)
            for node, parts in zip(inputs[max(0, j - 1) :], outputs, strict=True):
                node.extend(parts)
            if self.partial > 1:
                if mixed_op.stride == 2:
                    rest = F.max_pool2d(rest, 2, ceil_mode=True)
                # A row of `mix` is the edge's weight (beta) times a softmax, whose sum is 1.
                for node, beta in zip(passing[max(0, j - 1) :], mix_j.sum(1), strict=True):
                    node.append(beta * rest)
            first += mixed_op.fan
        states.append(self.node(inputs[-1], passing[-1], states[0]))
        return concatenate(states[2:])

    def node(self, inputs: list[Tensor], passing: list[Tensor], s0: Tensor) -> Tensor:
        """Add up what comes to a node, zeros if nothing does; `s0`: the cell's first state."""
        if inputs:
            y = total(inputs)
        else:
            stride = 2 if self.reduction else 1
            y = torch.zeros_like(s0[:, : self.channels, ::stride, ::stride])
        if self.partial > 1:
            y = F.channel_shuffle(torch.cat([y, total(passing)], dim=1), self.partial)
        return y


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

    Maps (N, in_channels, H, W) to logits (N, num_classes). `primitives` and `choices` are a search
    space (spaces.py): with `choices`, the alphas are (edges, choices of an edge), and operations
    have weights on all edges, but are computed and trained where they may be chosen only. With
    `partial` K > 1 the cells work on 1/K of their channels, and edges have weights of their own
    (PC-DARTS). Plain attributes: `relaxation`; `drop_path_prob`; `fixed_mixtures`, two tensors
    (edges, ops) that take the place of what the alphas say, where operations of weight 0 are not
    computed; `checkpoint_cells`, with which autograd keeps only what goes from cell to cell, and
    the backward pass computes each cell again: the same bits, less memory, more time. Raises
    ValueError on impossible sizes.
    """

    def __init__(
        self,
        num_classes: int = 10,
        init_channels: int = 16,
        num_cells: int = 8,
        num_nodes: int = 4,
        in_channels: int = 3,
        primitives: Sequence[str] = PRIMITIVES,
        choices: Sequence[Sequence[Sequence[str]]] | None = None,
        partial: int = 1,
    ):
        super().__init__()
        check_sizes(num_classes, init_channels, num_cells, in_channels)
        if num_nodes < 1:
            raise ValueError(f"num_nodes {num_nodes}: must be at least 1")
        unknown = [name for name in primitives if name not in OPERATIONS]
        if unknown or len(set(primitives)) < len(primitives) or not set(primitives) - {"none"}:
            raise ValueError(
                f"primitives {tuple(primitives)}: must be different ones of {OPERATIONS}, "
                "and not only none"
            )
        if partial < 1 or init_channels % partial:
            raise ValueError(f"init_channels {init_channels}: must be a multiple of {partial}")
        edges = sum(edges_by_state(num_nodes), [])
        if choices is not None and any(len(cell) != len(edges) for cell in choices):
            raise ValueError(
                f"num_nodes {num_nodes}: the space has choices for {len(choices[0])} edges, not "
                f"for {len(edges)}"
            )
        self.num_nodes, self.primitives = num_nodes, tuple(primitives)
        self.relaxation, self.drop_path_prob, self.checkpoint_cells = Softmax(), 0.0, False
        self.fixed_mixtures: list[Tensor] | None = None
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
                SearchCell(
                    c_prev_prev,
                    c_prev,
                    c,
                    reduction,
                    reduction_prev,
                    num_nodes,
                    primitives,
                    partial,
                )
            )
            c_prev_prev, c_prev, reduction_prev = c_prev, num_nodes * c, reduction
        self.classifier = nn.Linear(c_prev, num_classes)

        self.register_buffer("edge_order", torch.tensor(edges), persistent=False)
        columns, self.allowed, num_choices = None, (None, None), len(primitives)
        if choices is not None:
            columns = [[[primitives.index(op) for op in edge] for edge in cell] for cell in choices]
            columns, num_choices = torch.tensor(columns), len(choices[0][0])
            self.allowed = [
                [[op in cell[edge] for op in primitives] for edge in edges] for cell in choices
            ]
        self.register_buffer("columns", columns, persistent=False)  # (2, edges, choices)
        # Paper: zeros. Here, as in the original code, small noise.
        self.alphas_normal = nn.Parameter(1e-3 * torch.randn(len(edges), num_choices))
        self.alphas_reduce = nn.Parameter(1e-3 * torch.randn(len(edges), num_choices))
        self.betas_normal = self.betas_reduce = None
        if partial > 1:
            self.betas_normal = nn.Parameter(1e-3 * torch.randn(len(edges)))
            self.betas_reduce = nn.Parameter(1e-3 * torch.randn(len(edges)))

    def alphas(self) -> list[nn.Parameter]:
        """Return `[alphas_normal, alphas_reduce]`, (edges, ops) in (node, predecessor) order.

        With `partial`, also `betas_normal` and `betas_reduce`, (edges).
        """
        alphas = [self.alphas_normal, self.alphas_reduce, self.betas_normal, self.betas_reduce]
        return [alpha for alpha in alphas if alpha is not None]

    def weights(self) -> list[nn.Parameter]:
        """Return w: every parameter that is not an alpha (or beta)."""
        alphas = {id(alpha) for alpha in self.alphas()}
        return [p for p in self.parameters() if id(p) not in alphas]

    def mixtures(self, random: bool = False) -> list[Tensor]:
        """Return the mixture weights of the normal and the reduction cell, each (edges, ops).

        They are `fixed_mixtures` if set, else the relaxation's mean, or its draw in training.
        """
        if self.fixed_mixtures is not None:
            return self.fixed_mixtures
        relax = self.relaxation.draw if random else self.relaxation.mean
        kinds = ((self.alphas_normal, self.betas_normal), (self.alphas_reduce, self.betas_reduce))
        mixes = []
        for kind, (alphas, betas) in enumerate(kinds):
            mix = relax(alphas)
            if betas is not None:  # edge normalisation (PC-DARTS, Sec. 3.3)
                nodes = betas.split([2 + node for node in range(self.num_nodes)])
                mix = torch.cat([F.softmax(node, dim=0) for node in nodes])[:, None] * mix
            mixes.append(mix if self.columns is None else self.spread(mix, kind, 0.0))
        return mixes

    def spread(self, values: Tensor, kind: int, elsewhere: float) -> Tensor:
        """Spread (edges, choices) to (edges, ops), `elsewhere` where there is no choice."""
        everywhere = values.new_full((len(values), len(self.primitives)), elsewhere)
        return everywhere.scatter(1, self.columns[kind], values)

    def forward(self, x: Tensor) -> Tensor:
        mixes = [mix.index_select(0, self.edge_order) for mix in self.mixtures(self.training)]
        chosen = self.allowed
        if self.fixed_mixtures is not None or (self.training and self.relaxation.is_sparse):
            drawn = [mix.detach() != 0 for mix in mixes]
            chosen = [mask.tolist() for mask in drawn]
            # What is not computed has gradient 0: a straight-through estimator alone has others.
            mixes = [mix * mask for mix, mask in zip(mixes, drawn, strict=True)]
        drop_path_prob = drop_path_probability(self.drop_path_prob, self.training, x.device)
        out = self.stem(x)
        s0 = s1 = F.relu(out)
        for cell in self.cells:
            kind = int(cell.reduction)
            inputs = s0, s1, mixes[kind], chosen[kind], drop_path_prob
            if self.checkpoint_cells and torch.is_grad_enabled():
                out = checkpoint(with_parameters_of_now(cell), *inputs, use_reentrant=False)
            else:
                out = cell(*inputs)
            s0, s1 = s1, F.relu(out)
        return self.classifier(out.mean((2, 3)))

    @torch.no_grad()
    def genotype(self, rule: str = "darts", max_skips: int | None = None) -> Genotype:
        """Discretise (Sec. 2.4): two edges a node, one operation an edge, `none` excluded.

        `rule`: "darts" ranks by the mean mixture, ties to the first; "nni" by raw alpha, ties to
        the last. `max_skips` limits the skip connections of the normal cell.
        """
        if rule not in ("darts", "nni"):
            raise ValueError(f"discretisation rule {rule!r} is not one of darts, nni")
        if rule == "darts":
            scores = self.mixtures()
        else:
            scores = [self.alphas_normal, self.alphas_reduce]
            if self.columns is not None:
                scores = [self.spread(raw, kind, -math.inf) for kind, raw in enumerate(scores)]
        ties = "first" if rule == "darts" else "last"
        normal, reduce = (
            choose_cell_of_few_skips(cell.tolist(), self.primitives, ties, limit)
            for cell, limit in zip(scores, (max_skips, None), strict=True)
        )
        concat = tuple(range(2, 2 + self.num_nodes))
        return Genotype(normal, concat, reduce, concat)
