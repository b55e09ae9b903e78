"""The supernet (Sec. 2.2): every edge holds all operations, mixed by weights made of alpha."""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .genotypes import (
    PRIMITIVES,
    Genotype,
    check_sizes,
    choose_cell_of_few_skips,
    reduction_cells,
)
from .kernels import concatenate, total
from .mixed_op import Chosen, MixedOp
from .operations import (
    OPS,
    BatchStatNorm,
    ConvBN,
    FactorizedReduce,
    add_stem,
    drop_path_probability,
    first_states,
)
from .relaxations import Softmax


class SearchCell(nn.Module):
    """A cell of mixed ops on two inputs, taken after their ReLU; all its nodes are concatenated.

    With `partial` K > 1 (PC-DARTS, arXiv 1907.05737, Sec. 3.2) the mixed ops see the first 1/K of
    the channels. The others pass by, and a shuffle brings both together.
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
        for j, edges in enumerate(edges_by_state(num_nodes)):
            stride = 2 if reduction and j < 2 else 1
            self.mixed_ops.append(MixedOp(self.channels, stride, len(edges), primitives))

    def forward(
        self,
        s0: Tensor,
        s1: Tensor,
        mix: Tensor,
        chosen: Chosen = None,
        drop_path_prob: Tensor | None = None,
        shares: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Map two states to (N, num_nodes*C, H', W').

        mix: (edges, ops), edges by source state; shares (PC-DARTS): for each node, the weights of
        its edges.
        """
        fans = [mixed_op.fan for mixed_op in self.mixed_ops]
        # BN's weights must be contiguous: on the CPU its backward misreads strided ones (2.14.1).
        scale = mix.t().repeat_interleave(self.channels, 1)
        scales = scale.split([fan * self.channels for fan in fans], dim=1)
        edges = zip(self.mixed_ops, mix.split(fans), scales, strict=True)

        states, passing = [self.preprocess0(s0), self.preprocess1(s1)], []
        arriving: list[list[Tensor]] = [[] for _ in range(self.num_nodes)]
        first = 0
        for j, (mixed_op, mix_j, scale_j) in enumerate(edges):
            x = states[j]
            if shares is not None:
                x, rest = self.split(x, mixed_op.stride)
                passing.append(rest)
            chosen_j = None if chosen is None else chosen[first : first + mixed_op.fan]
            first += mixed_op.fan
            outputs = mixed_op(x, mix_j, scale_j, chosen_j, drop_path_prob)
            for node, tensors in zip(arriving[max(0, j - 1) :], outputs, strict=True):
                node.extend(tensors)
            if j > 0:  # node j - 1 has had all its inputs: they come from the states 0 to j
                y = self.node(arriving[j - 1], states[0])
                states.append(y if shares is None else self.merge(y, passing, shares[j - 1]))
        return concatenate(states[2:])

    def node(self, arriving: list[Tensor], s0: Tensor) -> Tensor:
        """Add up what arrives at a node; zeros if nothing does. `s0`: the cell's first state."""
        if arriving:
            return total(arriving)
        stride = 2 if self.reduction else 1
        return torch.zeros_like(s0[:, : self.channels, ::stride, ::stride])

    def split(self, state: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        """Return the channels that the mixed ops see, and those that pass by, at their output size.

        `split` keeps the channels-last format in the backward pass; slices would not.
        """
        x, rest = state.split([self.channels, (self.partial - 1) * self.channels], dim=1)
        return x, rest if stride == 1 else F.max_pool2d(rest, 2, ceil_mode=True)

    def merge(self, y: Tensor, passing: list[Tensor], shares: Tensor) -> Tensor:
        """Bring a node's sum together with what passes by, weighted edge by edge; shuffle."""
        rest = total([share * x for share, x in zip(shares, passing, strict=True)])
        return F.channel_shuffle(torch.cat([y, rest], dim=1), self.partial)


def with_parameters_of_now(module: nn.Module) -> Callable[..., Tensor]:
    """Return a function that calls `module` as it is now.

    The function keeps the parameters of now. Checkpointing needs them in the backward pass, because
    `architecture_gradient` puts other weights into the model for its forward pass only.
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
    space (spaces.py): with `choices`, an edge mixes, computes and trains its own choices only. With
    `partial` K > 1 the cells work on 1/K of their channels, and edges have weights of their own
    (PC-DARTS). `stem` is "cifar", or "imagenet", which shrinks the images to 1/8. Raises ValueError
    on impossible sizes.

    Plain attributes: `relaxation` (relaxations.py); `drop_path_prob`; `fixed_mixtures`, two tensors
    (edges, ops) in place of what the alphas say: operations of weight 0 are not computed;
    `checkpoint_cells`: autograd keeps only what goes from cell to cell, and the backward pass
    computes each cell again: the same bits, less memory, more time.
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
        stem: str = "cifar",
    ):
        super().__init__()
        check_sizes(num_classes, init_channels, num_cells, in_channels)
        if num_nodes < 1:
            raise ValueError(f"num_nodes {num_nodes}: must be at least 1")
        unknown = [name for name in primitives if name not in ("none", *OPS)]
        if unknown or len(set(primitives)) < len(primitives) or not set(primitives) - {"none"}:
            raise ValueError(
                f"primitives {tuple(primitives)}: must be different ones of none, "
                f"{', '.join(OPS)}, and not only none"
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
        norm = functools.partial(nn.BatchNorm2d, track_running_stats=False)  # of the stem: affine
        c_prev_prev, c_prev = add_stem(self, stem, in_channels, init_channels, norm)
        c, reduction_prev = init_channels, stem == "imagenet"
        self.cells = nn.ModuleList()
        for k in range(num_cells):
            reduction = k in reduction_cells(num_cells)
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
        allowed, self.chosen_by_space = None, [None, None]
        if choices is not None:  # (2, edges, ops): what each edge may choose
            allowed = [[[op in edge for op in primitives] for edge in cell] for cell in choices]
            allowed = torch.tensor(allowed)
            self.chosen_by_space = allowed[:, edges].tolist()
        self.register_buffer("allowed", allowed, persistent=False)
        # Paper: zeros. Here, as in the original code, small noise.
        self.alphas_normal = nn.Parameter(1e-3 * torch.randn(len(edges), len(primitives)))
        self.alphas_reduce = nn.Parameter(1e-3 * torch.randn(len(edges), len(primitives)))
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
        mixes = [relax(alphas) for alphas in self.allowed_alphas()]
        if self.betas_normal is not None:  # edge normalisation (PC-DARTS, Sec. 3.3)
            for kind, betas in enumerate((self.betas_normal, self.betas_reduce)):
                nodes = betas.split([2 + node for node in range(self.num_nodes)])
                shares = torch.cat([F.softmax(node, dim=0) for node in nodes])
                mixes[kind] = shares[:, None] * mixes[kind]
        return mixes

    def allowed_alphas(self) -> list[Tensor]:
        """Return both cells' alphas, -inf where the space does not allow an edge the choice."""
        alphas = [self.alphas_normal, self.alphas_reduce]
        if self.allowed is None:
            return alphas
        return [a.masked_fill(~ok, -math.inf) for a, ok in zip(alphas, self.allowed, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        mixes = self.mixtures(self.training)
        shares = [None, None]
        if self.betas_normal is not None:  # an edge's softmax has the sum 1, so this is its share
            sizes = [2 + node for node in range(self.num_nodes)]
            shares = [mix.sum(1).split(sizes) for mix in mixes]
        mixes = [mix.index_select(0, self.edge_order) for mix in mixes]
        chosen = self.chosen_by_space
        if self.fixed_mixtures is not None or (self.training and self.relaxation.is_sparse):
            chosen = (torch.stack(mixes) != 0).tolist()  # in one transfer from a GPU
        drop_path_prob = drop_path_probability(self.drop_path_prob, self.training, x.device)
        s0, s1 = first_states(self, x)
        for cell in self.cells:
            kind = int(cell.reduction)
            inputs = s0, s1, mixes[kind], chosen[kind], drop_path_prob, shares[kind]
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
        scores = self.mixtures() if rule == "darts" else self.allowed_alphas()
        ties = "first" if rule == "darts" else "last"
        normal, reduce = (
            choose_cell_of_few_skips(cell.tolist(), self.primitives, ties, limit)
            for cell, limit in zip(scores, (max_skips, None), strict=True)
        )
        concat = tuple(range(2, 2 + self.num_nodes))
        return Genotype(normal, concat, reduce, concat)
