"""The supernet and the search step of DARTS (arXiv 1806.09055), written as plainly as possible.

Every edge of every cell is a module of its own and computes all its operations, as in the original
code, whose names for the modules are kept. Nothing here is made for speed. The supernet of
`darts_min` computes the same, for all edges that leave a state at once (darts_min/mixed_op.py); the
tests hold it against this one. Shapes: N images, C channels, H x W pixels.

    python -m tests.textbook    # ten steps on made-up images: a few seconds
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from darts_min.genotypes import PRIMITIVES, Genotype


class MixedOp(nn.Module):
    """Mix all candidate operations on one edge (Sec. 2.2).

    Eq. 2:  o_mixed(x) = sum_o mix_o * o(x),  mix_o = exp(alpha_o) / sum_o' exp(alpha_o')
    """

    def __init__(self, channels: int, stride: int, primitives: Sequence[str]):
        super().__init__()
        self._ops = nn.ModuleList()
        for name in primitives:
            op = operation(name, channels, stride, search_bn)
            # Not in the paper: the original code normalises what a pooling returns.
            self._ops.append(nn.Sequential(op, search_bn(channels)) if "pool" in name else op)

    def forward(self, x: Tensor, mix: Tensor) -> Tensor:
        """Map x, (N, C, H, W), to (N, C, H / stride, W / stride); mix: (ops)."""
        return sum(mix_o * op(x) for mix_o, op in zip(mix, self._ops, strict=True))


class Cell(nn.Module):
    """A directed acyclic graph of two input states and `num_nodes` nodes (Sec. 2.1).

    Eq. 1:  x_j = sum_{i < j} o_ij(x_i)

    The edges (i, j) are in the order 0 -> 2, 1 -> 2, 0 -> 3, 1 -> 3, 2 -> 3, ...
    """

    def __init__(
        self,
        num_nodes: int,
        primitives: Sequence[str],
        c_prev_prev: int,
        c_prev: int,
        channels: int,
        reduction: bool,
        reduction_prev: bool,
    ):
        super().__init__()
        self.num_nodes, self.reduction = num_nodes, reduction
        # After a reduction cell, the output of the cell before it is twice as high and wide.
        preprocess0 = FactorizedReduce if reduction_prev else relu_conv_bn
        self.preprocess0 = preprocess0(c_prev_prev, channels)
        self.preprocess1 = relu_conv_bn(c_prev, channels)
        self._ops = nn.ModuleList(
            # In a reduction cell, the edges from the two inputs have stride 2 (Sec. 3.1.1).
            MixedOp(channels, 2 if reduction and i < 2 else 1, primitives)
            for j in range(2, 2 + num_nodes)
            for i in range(j)
        )

    def forward(self, s0: Tensor, s1: Tensor, mix: Tensor) -> Tensor:
        """Map the outputs of two cells to (N, num_nodes * C, H', W'); mix: (edges, ops)."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        edge = 0
        for _ in range(self.num_nodes):
            arriving = []
            for x in states:
                arriving.append(self._ops[edge](x, mix[edge]))
                edge += 1
            states.append(sum(arriving))  # Eq. 1
        return torch.cat(states[2:], dim=1)


class TextbookSupernet(nn.Module):
    """Stack cells that share alpha by kind: normal and reduction cells (Sec. 2.2, Sec. 3.1.1)."""

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
        self.num_nodes, self.primitives = num_nodes, primitives
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
            self.cells.append(Cell(num_nodes, primitives, *widths, reduction, reduction_prev))
            c_prev_prev, c_prev, reduction_prev = c_prev, num_nodes * c, reduction
        self.classifier = nn.Linear(c_prev, num_classes)
        # Paper: zeros. Here, as in the original code, small noise.
        shape = (sum(range(2, 2 + num_nodes)), len(primitives))  # (edges, ops)
        self.alphas_normal = nn.Parameter(1e-3 * torch.randn(shape))
        self.alphas_reduce = nn.Parameter(1e-3 * torch.randn(shape))

    def alphas(self) -> list[nn.Parameter]:
        return [self.alphas_normal, self.alphas_reduce]

    def weights(self) -> list[nn.Parameter]:
        """Return w: all parameters but alpha."""
        return [p for name, p in self.named_parameters() if not name.startswith("alphas")]

    def mixtures(self) -> list[Tensor]:
        """Return the mixture weights of Eq. 2 for both kinds of cell, each (edges, ops)."""
        return [F.softmax(alphas, dim=-1) for alphas in self.alphas()]

    def forward(self, images: Tensor, mixes: Sequence[Tensor] | None = None) -> Tensor:
        """Map images, (N, in_channels, H, W), to logits, (N, num_classes).

        `mixes` takes the place of `mixtures()` in tests.
        """
        mixes = self.mixtures() if mixes is None else mixes
        s0 = s1 = self.stem(images)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, mixes[1 if cell.reduction else 0])
        return self.classifier(s1.mean((2, 3)))

    def genotype(self) -> Genotype:
        """Derive the discrete cells (Sec. 2.4).

        An edge keeps its strongest operation other than `none`, and is as strong as this operation.
        A node keeps its two strongest edges.
        """
        cells = []
        for mix in self.mixtures():
            cell, edge = [], 0
            for j in range(2, 2 + self.num_nodes):
                arriving = []
                for i in range(j):
                    candidates = zip(mix[edge].tolist(), self.primitives, strict=True)
                    strength, op = max((m, op) for m, op in candidates if op != "none")
                    arriving.append((strength, op, i))
                    edge += 1
                strongest = sorted(arriving, reverse=True)[:2]
                cell += [(op, i) for _, op, i in strongest]
            cells.append(tuple(cell))
        concat = tuple(range(2, 2 + self.num_nodes))
        return Genotype(cells[0], concat, cells[1], concat)


Batch = tuple[Tensor, Tensor]  # images, labels


def search_step(
    model: TextbookSupernet,
    w_optimizer: torch.optim.Optimizer,
    alpha_optimizer: torch.optim.Optimizer,
    train_batch: Batch,
    val_batch: Batch,
) -> tuple[float, float]:
    """Take a step of Alg. 1 in the first order, xi = 0; return L_train and L_val."""
    # Alg. 1, line 1: update alpha by descending grad_alpha L_val(w, alpha).
    images, labels = val_batch
    val_loss = F.cross_entropy(model(images), labels)
    alpha_optimizer.zero_grad()
    val_loss.backward()
    alpha_optimizer.step()
    # Alg. 1, line 2: update w by descending grad_w L_train(w, alpha).
    images, labels = train_batch
    train_loss = F.cross_entropy(model(images), labels)
    w_optimizer.zero_grad()
    train_loss.backward()
    nn.utils.clip_grad_norm_(model.weights(), 5.0)  # as in the original code
    w_optimizer.step()
    return train_loss.item(), val_loss.item()


# The candidate operations (Sec. 3.1.1): ReLU, convolution, BN, in this order.
Norm = Callable[[int], nn.Module]  # channels -> BN


def search_bn(channels: int) -> nn.Module:
    """Make the BN of a search: statistics of the batch, no affine parameters (A.1.1)."""
    return nn.BatchNorm2d(channels, affine=False, track_running_stats=False)


def operation(name: str, channels: int, stride: int, bn: Norm) -> nn.Module:
    """Make the operation called `name`, which maps (N, C, H, W) to (N, C, H', W')."""
    if name == "none":
        return Zero(stride)
    if name == "max_pool_3x3":
        return nn.MaxPool2d(3, stride, padding=1)
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, bn)
    kernel = int(name[-1])
    if name.startswith("sep_conv"):  # a separable convolution is applied twice
        twice = [*separable(channels, kernel, stride, bn), *separable(channels, kernel, 1, bn)]
        return Branch(*twice)
    return Branch(*separable(channels, kernel, stride, bn, dilation=2))


def separable(c: int, kernel: int, stride: int, bn: Norm, dilation: int = 1) -> list[nn.Module]:
    """List the layers of a depthwise separable convolution."""
    padding = dilation * (kernel // 2)
    depthwise = nn.Conv2d(c, c, kernel, stride, padding, dilation, groups=c, bias=False)
    return [nn.ReLU(), depthwise, nn.Conv2d(c, c, 1, bias=False), bn(c)]


def relu_conv_bn(c_in: int, c_out: int, bn: Norm = search_bn) -> nn.Module:
    return Branch(nn.ReLU(), nn.Conv2d(c_in, c_out, 1, bias=False), bn(c_out))


class Branch(nn.Module):
    """A chain of layers under the name `op`, as in the original code."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.op = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Zero(nn.Module):
    """The operation `none`: a lack of connection."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


class FactorizedReduce(nn.Module):
    """The skip connection of stride 2: two convolutions, the second one shifted by a pixel."""

    def __init__(self, c_in: int, c_out: int, bn: Norm = search_bn):
        super().__init__()
        self.conv_1 = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.bn = bn(c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1))


def main() -> None:
    """Search a few steps on made-up images: each class is a pattern, hidden in noise."""
    torch.manual_seed(0)
    labels = torch.arange(640) % 10
    images = torch.randn(10, 3, 16, 16)[labels] + torch.randn(640, 3, 16, 16)
    batches = list(zip(images.split(32), labels.split(32), strict=True))
    model = TextbookSupernet(init_channels=4, num_cells=3)
    # The optimizers of A.1.1.
    w_optimizer = torch.optim.SGD(model.weights(), 0.025, momentum=0.9, weight_decay=3e-4)
    alpha_optimizer = torch.optim.Adam(model.alphas(), 3e-4, (0.5, 0.999), weight_decay=1e-3)
    halves = zip(batches[:10], batches[10:], strict=True)  # for w, for alpha
    for step, (train_batch, val_batch) in enumerate(halves):
        losses = search_step(model, w_optimizer, alpha_optimizer, train_batch, val_batch)
        print("step {}: L_train {:.3f}, L_val {:.3f}".format(step, *losses))
    print(model.genotype())


if __name__ == "__main__":
    main()
