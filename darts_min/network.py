"""The network built from a genotype, which is trained and evaluated (Sec. 3.2, A.2.1)."""

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from darts_min.genotypes import Genotype, check_genotype, check_sizes
from darts_min.operations import (
    ConvBN,
    DilConv,
    FactorizedReduce,
    Noise,
    SepConv,
    avg_pool,
    concatenate,
    drop_path_probability,
    fold,
    from_phases,
    max_pool,
    to_phases,
)


class Edge(nn.Module):
    """One operation of a cell, on one earlier state."""

    def __init__(self, op: str, channels: int, stride: int):
        super().__init__()
        self.name, self.stride = op, stride
        if op.startswith("sep_conv"):
            self.op = SepConv(channels, int(op[-1]), stride, nn.BatchNorm2d)
        elif op.startswith("dil_conv"):
            self.op = DilConv(channels, int(op[-1]), nn.BatchNorm2d)
        elif op == "skip_connect" and stride == 2:
            self.op = FactorizedReduce(channels, channels, nn.BatchNorm2d)
        elif op == "noise":
            self.op = Noise(stride)

    def forward(self, x: Tensor, relu: Tensor | None) -> Tensor:
        """Map the state `x`, given with its ReLU, (N, C, H, W) to (N, C, H', W')."""
        if self.name == "max_pool_3x3":
            return max_pool(x, self.stride)
        if self.name == "avg_pool_3x3":
            return avg_pool(x, self.stride)
        if self.is_identity:
            return x
        if isinstance(self.op, DilConv):
            phases, dilation = to_phases(relu, self.stride)
            return from_phases(self.op(phases, dilation), x.size(0))
        return self.op(relu)

    @property
    def is_identity(self) -> bool:
        return self.name == "skip_connect" and self.stride == 1

    @property
    def takes_relu(self) -> bool:
        return hasattr(self, "op")


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
        self.predecessors = [predecessor for _, predecessor in edges]
        preprocess0 = FactorizedReduce if reduction_prev else ConvBN
        self.preprocess0 = preprocess0(c_prev_prev, channels, nn.BatchNorm2d)
        self.preprocess1 = ConvBN(c_prev, channels, nn.BatchNorm2d)
        self.edges = nn.ModuleList(
            Edge(op, channels, 2 if reduction and predecessor < 2 else 1)
            for op, predecessor in edges
        )
        used = {j for edge, j in zip(self.edges, self.predecessors, strict=True) if edge.takes_relu}
        self.relu_used = sorted(used)

    def forward(self, s0: Tensor, s1: Tensor, drop_path_prob: Tensor | None) -> Tensor:
        states: list[Tensor] = []
        relus: list[Tensor | None] = []

        def add_state(state: Tensor) -> None:
            relus.append(F.relu(state) if len(states) in self.relu_used else None)
            states.append(state)

        add_state(self.preprocess0(s0))
        add_state(self.preprocess1(s1))
        for i in range(0, len(self.edges), 2):
            pair = []
            for edge, j in zip(self.edges[i : i + 2], self.predecessors[i : i + 2], strict=True):
                y = edge(states[j], relus[j])
                if drop_path_prob is not None and not edge.is_identity:
                    y = drop_path(y, drop_path_prob)
                pair.append(y)
            add_state(pair[0] + pair[1])
        return concatenate([states[i] for i in self.concat])


def drop_path(x: Tensor, prob: Tensor) -> Tensor:
    """Zero whole samples of `x` (N, C, H, W) with probability `prob`, and scale up the others."""
    keep = torch.rand(x.size(0), 1, 1, 1, device=x.device) >= prob
    return x * keep / (1 - prob)


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
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem {stem!r} is not one of cifar, imagenet")
        if stem == "imagenet" and init_channels % 2:
            raise ValueError(f"init_channels {init_channels}: must be even with the imagenet stem")
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
        c = init_channels
        if stem == "cifar":
            self.stem = conv_bn(in_channels, 3 * c)
            c_prev_prev = c_prev = 3 * c
        else:
            self.stem0 = nn.Sequential(
                *conv_bn(in_channels, c // 2, 2), nn.ReLU(), *conv_bn(c // 2, c, 2)
            )
            self.stem1 = conv_bn(c, c, 2)
            c_prev_prev = c_prev = c

        reduction_prev = stem == "imagenet"  # its two stems differ in size
        self.aux_cell = 2 * num_cells // 3
        self.cells = nn.ModuleList()
        for k in range(num_cells):
            reduction = k in (num_cells // 3, 2 * num_cells // 3)
            c = 2 * c if reduction else c
            self.cells.append(Cell(genotype, c_prev_prev, c_prev, c, reduction, reduction_prev))
            concat = genotype.reduce_concat if reduction else genotype.normal_concat
            c_prev_prev, c_prev, reduction_prev = c_prev, len(concat) * c, reduction
            if k == self.aux_cell and auxiliary:
                self.auxiliary_head = AuxiliaryHead(c_prev, num_classes, stem, auxiliary_second_bn)
        self.classifier = nn.Linear(c_prev, num_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.config["stem"] == "cifar":
            s0 = s1 = F.relu(self.stem(x))
        else:
            s0 = F.relu(self.stem0(x))
            s1 = F.relu(self.stem1(s0))
        use_aux = self.training and self.config["auxiliary"]
        drop_path_prob = drop_path_probability(self.drop_path_prob, self.training, x.device)
        for k, cell in enumerate(self.cells):
            out = cell(s0, s1, drop_path_prob)
            s0, s1 = s1, F.relu(out)
            if k == self.aux_cell and use_aux:
                aux_logits = self.auxiliary_head(s1)
        logits = self.classifier(out.mean((2, 3)))
        return (logits, aux_logits) if use_aux else logits


def conv_bn(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution and BN, as the stems use them."""
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


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
