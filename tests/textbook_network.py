"""The network of a genotype, and the supernet of PC-DARTS, in the manner of textbook.py."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.textbook import FactorizedReduce, MixedOp, TextbookSupernet, operation, relu_conv_bn


class NetworkCell(nn.Module):
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
    """The network for CIFAR, without auxiliary head and drop path."""

    def __init__(self, genotype, num_classes=10, init_channels=36, num_cells=20):
        super().__init__()
        c = 3 * init_channels
        self.stem = nn.Sequential(nn.Conv2d(3, c, 3, padding=1, bias=False), nn.BatchNorm2d(c))
        c_prev_prev, c_prev, c, reduction_prev = c, c, init_channels, False
        self.cells = nn.ModuleList()
        for k in range(num_cells):
            reduction = k in (num_cells // 3, 2 * num_cells // 3)
            c = 2 * c if reduction else c
            cell = NetworkCell(genotype, c_prev_prev, c_prev, c, reduction, reduction_prev)
            self.cells.append(cell)
            c_prev_prev, c_prev, reduction_prev = c_prev, len(cell.concat) * c, reduction
        self.classifier = nn.Linear(c_prev, num_classes)

    def forward(self, x):
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1)
        return self.classifier(s1.mean((2, 3)))


class PartialMixedOp(MixedOp):
    """Mix operations on 1/K of the channels, and shuffle (PC-DARTS, arXiv 1907.05737, Sec. 3.2)."""

    def __init__(self, c, stride, primitives, partial):
        super().__init__(c // partial, stride, primitives)
        self.stride, self.partial = stride, partial

    def forward(self, x, mix):
        """`mix` is the mixture of the operations, and last the share of the edge (Sec. 3.3)."""
        first = x.size(1) // self.partial
        y, rest = super().forward(x[:, :first], mix[:-1]), x[:, first:]
        if self.stride == 2:
            rest = F.max_pool2d(rest, 2, ceil_mode=True)
        y = torch.cat([y, rest], dim=1)
        n, c, h, w = y.shape
        return mix[-1] * y.view(n, self.partial, first, h, w).transpose(1, 2).reshape(n, c, h, w)


class TextbookPartialSupernet(TextbookSupernet):
    """The supernet of PC-DARTS; `betas` are the weights of the edges, each (edges)."""

    def __init__(self, partial, **sizes):
        super().__init__(**sizes)
        nodes = range(2, 2 + self.num_nodes)
        for cell in self.cells:
            c = cell.preprocess1.op[1].out_channels
            cell._ops = nn.ModuleList(
                PartialMixedOp(c, 2 if cell.reduction and i < 2 else 1, self.primitives, partial)
                for j in nodes
                for i in range(j)
            )
        self.betas = nn.ParameterList(torch.randn(sum(nodes)) for _ in range(2))

    def weights(self):
        return [p for name, p in self.named_parameters() if name[:5] not in ("alpha", "betas")]

    def mixtures(self):
        """Append to the mixture of each edge its share: the softmax of beta over a node's edges."""
        nodes = range(2, 2 + self.num_nodes)
        shares = [torch.cat([b.softmax(0) for b in betas.split([*nodes])]) for betas in self.betas]
        mixes = zip(super().mixtures(), shares, strict=True)
        return [torch.cat([mix, share[:, None]], dim=1) for mix, share in mixes]
