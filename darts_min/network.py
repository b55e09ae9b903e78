"""The network built from a genotype, which is trained and evaluated (Sec. 3.2, A.2.1)."""

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .genotypes import Genotype, check_genotype, check_sizes, reduction_cells
from .kernels import concatenate, from_phases
from .operations import (
    OPS,
    ConvBN,
    FactorizedReduce,
    Skip,
    State,
    add_stem,
    drop_path_masks,
    drop_path_probability,
    first_states,
    fold,
)


class Edge(nn.Module):
    """An operation on an earlier state of its cell."""

    def __init__(self, op: nn.Module, predecessor: int):
        super().__init__()
        self.op, self.predecessor = op, predecessor

    def forward(self, states: list[State], keep: Tensor | None) -> Tensor:
        """Map the states (N, C, H, W) so far to (N, C, H', W'), times `keep` if given."""
        state = states[self.predecessor]
        y = from_phases(self.op(state), state.x.size(0))
        return y if keep is None else y * keep


class Cell(nn.Module):
    """A discrete cell; takes its two inputs after their ReLU."""

    def __init__(
        self,
        genotype: Genotype,
        c_prev_prev: int,
        c_prev: int,
        channels: int,
        reduction: bool,
        reduction_prev: bool,
    ):
        super().__init__()
        edges = genotype.reduce if reduction else genotype.normal
        self.concat = genotype.reduce_concat if reduction else genotype.normal_concat
        preprocess0 = FactorizedReduce if reduction_prev else ConvBN
        self.preprocess0 = preprocess0(c_prev_prev, channels, nn.BatchNorm2d)
        self.preprocess1 = ConvBN(c_prev, channels, nn.BatchNorm2d)
        self.edges = nn.ModuleList()
        for op, j in edges:
            stride = 2 if reduction and j < 2 else 1
            self.edges.append(Edge(OPS[op](channels, stride, nn.BatchNorm2d), j))

    def forward(self, s0: Tensor, s1: Tensor, drop_path_prob: Tensor | None) -> Tensor:
        """Map two states to (N, concatenated nodes * C, H', W')."""
        states = [State(self.preprocess0(s0)), State(self.preprocess1(s1))]
        keep: list[Tensor | None] = [None] * len(self.edges)
        if drop_path_prob is not None:
            dropped = [i for i, edge in enumerate(self.edges) if not isinstance(edge.op, Skip)]
            masks = drop_path_masks(len(dropped), states[0].x, drop_path_prob)
            for i, mask in zip(dropped, masks, strict=True):
                keep[i] = mask
        for i in range(0, len(self.edges), 2):
            first, second = (self.edges[k](states, keep[k]) for k in (i, i + 1))
            states.append(State(first + second))
        return concatenate([states[i].x for i in self.concat])


class AuxiliaryHead(nn.Module):
    """The auxiliary classifier (A.2.1) on the state at two thirds of the depth.

    The original pools 8x8 (CIFAR) or 7x7 (ImageNet) features so that a 2x2 convolution leaves one
    pixel. Here smaller features are enlarged to that, and larger ones averaged in the end.
    """

    def __init__(self, channels: int, num_classes: int, stem: str, second_bn: bool):
        super().__init__()
        self.min_size, self.stride = (8, 3) if stem == "cifar" else (7, 2)
        self.conv1 = nn.Conv2d(channels, 128, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(128)
        self.conv2 = nn.Conv2d(128, 768, 2, bias=False)
        self.bn2 = nn.BatchNorm2d(768) if second_bn else nn.Identity()
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, relu: Tensor) -> Tensor:
        size = [max(self.min_size, n) for n in relu.shape[2:]]
        if list(relu.shape[2:]) != size:
            relu = F.interpolate(relu, size)  # nearest: its gradient is deterministic on CUDA
        x = F.avg_pool2d(relu, 5, self.stride)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.classifier(x.mean((2, 3)))

    def fold_bn(self) -> None:
        self.bn1 = fold([self.conv1], self.bn1)
        self.bn2 = fold([self.conv2], self.bn2)


class Network(nn.Module):
    """Stack `num_cells` cells of a genotype, reduction cells at 1/3 and 2/3 of the depth.

    `stem` is "cifar" (one 3x3 convolution) or "imagenet" (three of stride 2). In training with
    `auxiliary`, returns `(logits, aux_logits)`, otherwise logits, each (N, num_classes).
    `drop_path_prob` is a plain attribute, to be scheduled. `auxiliary_second_bn`: whether the
    auxiliary head has its second BN, by default as in the original code, which has left it out with
    the ImageNet stem; NNI has it always. Raises ValueError on impossible sizes.
    """

    def __init__(
        self,
        genotype: Genotype,
        num_classes: int = 10,
        init_channels: int = 36,
        num_cells: int = 20,
        auxiliary: bool = True,
        drop_path_prob: float = 0.0,
        in_channels: int = 3,
        stem: str = "cifar",
        auxiliary_second_bn: bool | None = None,
    ):
        super().__init__()
        check_genotype(genotype)
        check_sizes(num_classes, init_channels, num_cells, in_channels)
        if auxiliary_second_bn is None:
            auxiliary_second_bn = auxiliary and stem == "cifar"
        self.genotype, self.drop_path_prob = genotype, drop_path_prob
        self.config = {
            "num_classes": num_classes,
            "init_channels": init_channels,
            "num_cells": num_cells,
            "auxiliary": auxiliary,
            "in_channels": in_channels,
            "stem": stem,
            "auxiliary_second_bn": auxiliary_second_bn,
        }
        c_prev_prev, c_prev = add_stem(self, stem, in_channels, init_channels, nn.BatchNorm2d)
        c = init_channels
        reduction_prev = stem == "imagenet"  # its two stems differ in size
        self.aux_cell = reduction_cells(num_cells)[1]
        self.cells = nn.ModuleList()
        for k in range(num_cells):
            reduction = k in reduction_cells(num_cells)
            c = 2 * c if reduction else c
            self.cells.append(Cell(genotype, c_prev_prev, c_prev, c, reduction, reduction_prev))
            concat = genotype.reduce_concat if reduction else genotype.normal_concat
            c_prev_prev, c_prev, reduction_prev = c_prev, len(concat) * c, reduction
            if k == self.aux_cell and auxiliary:
                self.auxiliary_head = AuxiliaryHead(c_prev, num_classes, stem, auxiliary_second_bn)
        self.classifier = nn.Linear(c_prev, num_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        s0, s1 = first_states(self, x)
        use_aux = self.training and self.config["auxiliary"]
        drop_path_prob = drop_path_probability(self.drop_path_prob, self.training, x.device)
        for k, cell in enumerate(self.cells):
            out = cell(s0, s1, drop_path_prob)
            s0, s1 = s1, F.relu(out)
            if k == self.aux_cell and use_aux:
                aux_logits = self.auxiliary_head(s1)
        logits = self.classifier(out.mean((2, 3)))
        return (logits, aux_logits) if use_aux else logits


@torch.no_grad()
def fold_batch_norm(network: Network) -> Network:
    """Return a copy for evaluation, in which each BN has become part of the convolution before it.

    The logits stay the same to rounding error. A module folds its own BN (`fold_bn`), as it knows
    which convolution that is; in an nn.Sequential it is the one before. Raises ValueError on a BN
    that is left.
    """
    network = copy.deepcopy(network).eval()
    for module in network.modules():
        if type(module) is nn.Sequential:
            for i, (conv, bn) in enumerate(pairwise(module)):
                if isinstance(conv, nn.Conv2d):
                    module[i + 1] = fold([conv], bn)
        elif hasattr(module, "fold_bn"):
            module.fold_bn()
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            owner = type(network.get_submodule(name.rpartition(".")[0])).__name__
            raise ValueError(f"{name}: cannot be folded; {owner} needs a method fold_bn")
    return network
