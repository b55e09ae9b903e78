"""Supernet and network the textbook way: one module per edge and operation, as in the original."""

import torch
from torch import nn
from torch.nn import functional as F

from darts_min.genotypes import PRIMITIVES


def search_bn(channels):
    return nn.BatchNorm2d(channels, affine=False, track_running_stats=False)


class FactorizedReduce(nn.Module):
    def __init__(self, c_in, c_out, bn=search_bn):
        super().__init__()
        self.conv_1 = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.bn = bn(c_out)

    def forward(self, x):
        x = F.relu(x)
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1))


class Zero(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


class Branch(nn.Module):
    """A chain of layers under the name `op`, as the original code names them."""

    def __init__(self, *layers):
        super().__init__()
        self.op = nn.Sequential(*layers)

    def forward(self, x):
        return self.op(x)


def relu_conv_bn(c_in, c_out, bn=search_bn):
    return Branch(nn.ReLU(), nn.Conv2d(c_in, c_out, 1, bias=False), bn(c_out))


def separable(c, k, stride, bn, dilation=1):
    padding = dilation * (k // 2)
    return [
        nn.ReLU(),
        nn.Conv2d(c, c, k, stride, padding, dilation, groups=c, bias=False),
        nn.Conv2d(c, c, 1, bias=False),
        bn(c),
    ]


def operation(name, c, stride, bn):
    if name == "none":
        return Zero(stride)
    if name == "max_pool_3x3":
        return nn.MaxPool2d(3, stride, padding=1)
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduce(c, c, bn)
    k = int(name[-1])
    if name.startswith("sep_conv"):
        return Branch(*separable(c, k, stride, bn), *separable(c, k, 1, bn))
    return Branch(*separable(c, k, stride, bn, dilation=2))


class MixedOp(nn.Module):
    """Eq. 2 on one edge; with `partial` K > 1, on 1/K of the channels, as in PC-DARTS."""

    def __init__(self, c, stride, primitives, partial=1):
        super().__init__()
        self.stride, self.partial = stride, partial
        self._ops = nn.ModuleList()
        for name in primitives:
            op = operation(name, c // partial, stride, search_bn)
            norm = search_bn(c // partial)
            self._ops.append(nn.Sequential(op, norm) if "pool" in name else op)

    def forward(self, x, weights):
        first = x.size(1) // self.partial
        y = sum(w * op(x[:, :first]) for w, op in zip(weights, self._ops, strict=True))
        if self.partial == 1:
            return y
        rest = x[:, first:]
        if self.stride == 2:
            rest = F.max_pool2d(rest, 2, ceil_mode=True)
        y = torch.cat([y, rest], dim=1)
        n, c, h, w = y.shape
        return y.view(n, self.partial, first, h, w).transpose(1, 2).reshape(n, c, h, w)


class Cell(nn.Module):
    def __init__(
        self, num_nodes, primitives, partial, c_prev_prev, c_prev, c, reduction, reduction_prev
    ):
        super().__init__()
        self.reduction, self.num_nodes = reduction, num_nodes
        preprocess0 = FactorizedReduce if reduction_prev else relu_conv_bn
        self.preprocess0 = preprocess0(c_prev_prev, c)
        self.preprocess1 = relu_conv_bn(c_prev, c)
        self._ops = nn.ModuleList(
            MixedOp(c, 2 if reduction and j < 2 else 1, primitives, partial)
            for i in range(num_nodes)
            for j in range(2 + i)
        )

    def forward(self, s0, s1, weights, betas):
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        offset = 0
        for _ in range(self.num_nodes):
            edges = range(offset, offset + len(states))
            offset += len(states)
            outputs = [self._ops[e](h, weights[e]) for e, h in zip(edges, states, strict=True)]
            if betas is not None:
                shares = F.softmax(betas[edges.start : edges.stop], dim=0)
                outputs = [share * y for share, y in zip(shares, outputs, strict=True)]
            states.append(sum(outputs))
        return torch.cat(states[2:], dim=1)


class TextbookSupernet(nn.Module):
    def __init__(
        self,
        num_classes=10,
        init_channels=16,
        num_cells=8,
        num_nodes=4,
        in_channels=3,
        primitives=PRIMITIVES,
        partial=1,
    ):
        super().__init__()
        c = 3 * init_channels
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, c, 3, padding=1, bias=False),
            nn.BatchNorm2d(c, track_running_stats=False),
        )
        c_prev_prev, c_prev, c, reduction_prev = c, c, init_channels, False
        self.cells = nn.ModuleList()
        for k in range(num_cells):
            reduction = k in (num_cells // 3, 2 * num_cells // 3)
            c = 2 * c if reduction else c
            widths = c_prev_prev, c_prev, c
            self.cells.append(
                Cell(num_nodes, primitives, partial, *widths, reduction, reduction_prev)
            )
            c_prev_prev, c_prev, reduction_prev = c_prev, num_nodes * c, reduction
        self.classifier = nn.Linear(c_prev, num_classes)
        shape = (sum(2 + i for i in range(num_nodes)), len(primitives))
        self.alphas_normal = nn.Parameter(1e-3 * torch.randn(shape))
        self.alphas_reduce = nn.Parameter(1e-3 * torch.randn(shape))
        self.betas = [None, None]
        if partial > 1:
            self.betas = nn.ParameterList(torch.randn(shape[0]) for _ in range(2))

    def alphas(self):
        return [self.alphas_normal, self.alphas_reduce]

    def weights(self):
        architecture = ("alphas", "betas")
        return [p for name, p in self.named_parameters() if not name.startswith(architecture)]

    def forward(self, x, mixes=None):
        """`mixes`: the mixture weights of both cells, instead of the softmax of alpha."""
        if mixes is None:
            mixes = [F.softmax(alphas, dim=-1) for alphas in self.alphas()]
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            kind = int(cell.reduction)
            s0, s1 = s1, cell(s0, s1, mixes[kind], self.betas[kind])
        return self.classifier(s1.mean((2, 3)))


class FinalCell(nn.Module):
    def __init__(self, genotype, c_prev_prev, c_prev, c, reduction, reduction_prev):
        super().__init__()
        self.edges = genotype.reduce if reduction else genotype.normal
        self.concat = genotype.reduce_concat if reduction else genotype.normal_concat
        preprocess0 = FactorizedReduce if reduction_prev else relu_conv_bn
        self.preprocess0 = preprocess0(c_prev_prev, c, nn.BatchNorm2d)
        self.preprocess1 = relu_conv_bn(c_prev, c, nn.BatchNorm2d)
        self._ops = nn.ModuleList(
            operation(name, c, 2 if reduction and j < 2 else 1, nn.BatchNorm2d)
            for name, j in self.edges
        )

    def forward(self, s0, s1):
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for i in range(0, len(self.edges), 2):
            (_, j1), (_, j2) = self.edges[i : i + 2]
            states.append(self._ops[i](states[j1]) + self._ops[i + 1](states[j2]))
        return torch.cat([states[i] for i in self.concat], dim=1)


class TextbookNetwork(nn.Module):
    """The discrete CIFAR network without auxiliary head and drop path."""

    def __init__(self, genotype, num_classes=10, init_channels=36, num_cells=20):
        super().__init__()
        c = 3 * init_channels
        self.stem = nn.Sequential(nn.Conv2d(3, c, 3, padding=1, bias=False), nn.BatchNorm2d(c))
        c_prev_prev, c_prev, c, reduction_prev = c, c, init_channels, False
        self.cells = nn.ModuleList()
        for k in range(num_cells):
            reduction = k in (num_cells // 3, 2 * num_cells // 3)
            c = 2 * c if reduction else c
            cell = FinalCell(genotype, c_prev_prev, c_prev, c, reduction, reduction_prev)
            self.cells.append(cell)
            c_prev_prev, c_prev, reduction_prev = c_prev, len(cell.concat) * c, reduction
        self.classifier = nn.Linear(c_prev, num_classes)

    def forward(self, x):
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1)
        return self.classifier(s1.mean((2, 3)))
