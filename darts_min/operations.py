"""The candidate operations (Sec. 3.1) and the table `OPS` that names them.

An operation is a module, called as `operation(state, weight)`. It may serve several edges at once:
all edges that leave a state see the same input, so an operation evaluates `fan` edges as one wide
convolution and returns (N, fan*C, H', W'), edge by edge. `weight` (fan*C) is the mixture weight of
each channel (Eq. 2). The operation multiplies its output by `weight`; its last BN does this at no
cost, as its affine weight. In the discrete network `fan` is 1 and `weight` is None.

A new operation is a class and a row of `OPS`; see docs/extending.md.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .kernels import depthwise_conv, memory_format_of, subsample, to_phases

Norm = Callable[[int], nn.Module]


class State:
    """A state (N, C, H, W), and what its operations share, each made when it is first asked for."""

    def __init__(self, x: Tensor):
        self.x = x
        self.made: dict[Hashable, Tensor | tuple[Tensor, int]] = {}

    def once(self, key: Hashable, make: Callable):
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def relu(self) -> Tensor:
        """Return ReLU(x), (N, C, H, W)."""
        return self.once("relu", lambda: F.relu(self.x))

    def wide(self, fan: int) -> Tensor:
        """Return ReLU(x) for `fan` edges side by side, (N, fan*C, H, W)."""
        return self.once(("wide", fan), lambda: side_by_side(self.relu(), fan))

    def phases(self, fan: int, stride: int) -> tuple[Tensor, int]:
        """Return `wide` rearranged for dilation 2, and the dilation still needed, 1 or 2."""
        phases, dilation = self.once("phases", lambda: to_phases(self.relu(), stride))
        if phases is self.relu():
            return self.wide(fan), dilation
        return self.once(("phases", fan), lambda: side_by_side(phases, fan)), dilation


def side_by_side(x: Tensor, fan: int) -> Tensor:
    """Repeat the channels of `x` for each edge."""
    return x if fan == 1 else torch.cat([x] * fan, dim=1)


class BatchStatNorm(nn.Module):
    """Normalise by the batch's own statistics, in training and in evaluation; no parameters.

    This is the search's BN (A.1.1: statistics of the batch, no learnable affine). `weight` (C)
    scales the channels of the output.
    """

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        return F.batch_norm(x, None, None, weight, training=True)


def normalise(bn: nn.Module, x: Tensor, weight: Tensor | None) -> Tensor:
    """Apply `bn`; in the search, also the mixture weight of each channel."""
    return bn(x) if weight is None else bn(x, weight)


class DepthwiseConv(nn.Conv2d):
    """Convolve each channel with its own kernel; keep the size, up to the stride."""

    def __init__(self, channels: int, kernel_size: int, stride: int = 1):
        padding = kernel_size // 2
        super().__init__(
            channels, channels, kernel_size, stride, padding, groups=channels, bias=False
        )

    def forward(self, x: Tensor, dilation: int = 1) -> Tensor:
        return depthwise_conv(x, self.weight, self.stride[0], dilation)


class PointwiseConv(nn.Conv2d):
    """Convolve with a 1x1 kernel, in `groups` that each have their own input.

    The number of groups is read from the shapes, so that a part of the weights can be put in.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int = 1):
        super().__init__(in_channels, out_channels, 1, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        groups = x.size(1) // self.weight.size(1)
        return F.conv2d(x, self.weight, self.bias, groups=groups)


def fold(convs: Sequence[nn.Conv2d], bn: nn.Module) -> nn.Module:
    """Let `convs`, which make the channels of `bn` one after the other, do its work in evaluation.

    Returns what takes the place of `bn`: nothing for a BatchNorm2d; another module stays.
    """
    if not isinstance(bn, nn.BatchNorm2d):
        return bn
    sizes = [conv.out_channels for conv in convs]
    parts = (t.split(sizes) for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
    for conv, mean, var, weight, bias in zip(convs, *parts, strict=True):
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, mean, var, bn.eps, weight, bias
        )
    return nn.Identity()


class Skip(nn.Module):
    """Pass the state on."""

    is_shared = True

    def forward(self, state: State, weight: None = None) -> Tensor:
        return state.x


class Pool(nn.Module):
    """Pool over 3x3 pixels; in the search, BN follows (in the original code, too, only there)."""

    is_shared = True

    def __init__(self, channels: int, stride: int, norm: Norm, fan: int = 1, *, average: bool):
        super().__init__()
        self.stride, self.average = stride, average
        self.bn = norm(channels) if norm is BatchStatNorm else nn.Identity()

    def forward(self, state: State, weight: None = None) -> Tensor:
        if self.average:
            y = F.avg_pool2d(state.x, 3, self.stride, 1, count_include_pad=False)
        else:
            y = F.max_pool2d(state.x, 3, self.stride, 1)
        return self.bn(y)


class SepConv(nn.Module):
    """ReLU, depthwise and pointwise convolution, BN; and all of it again."""

    def __init__(self, channels: int, stride: int, norm: Norm, fan: int = 1, *, kernel_size: int):
        super().__init__()
        wide = fan * channels
        self.depthwise1 = DepthwiseConv(wide, kernel_size, stride)
        self.pointwise1 = PointwiseConv(wide, wide, groups=fan)
        self.bn1 = norm(wide)
        self.depthwise2 = DepthwiseConv(wide, kernel_size)
        self.pointwise2 = PointwiseConv(wide, wide, groups=fan)
        self.bn2 = norm(wide)

    def forward(self, state: State, weight: Tensor | None = None) -> Tensor:
        x = state.wide(fan_of(self.depthwise1, state))
        x = F.relu(self.bn1(self.pointwise1(self.depthwise1(x))), inplace=True)
        return normalise(self.bn2, self.pointwise2(self.depthwise2(x)), weight)

    def fold_bn(self) -> None:
        self.bn1 = fold([self.pointwise1], self.bn1)
        self.bn2 = fold([self.pointwise2], self.bn2)


class DilConv(nn.Module):
    """ReLU, depthwise convolution of dilation 2, pointwise convolution, BN.

    The output may be in phases (kernels.py): `from_phases` brings it back.
    """

    def __init__(self, channels: int, stride: int, norm: Norm, fan: int = 1, *, kernel_size: int):
        super().__init__()
        self.stride, wide = stride, fan * channels
        self.depthwise = DepthwiseConv(wide, kernel_size)
        self.pointwise = PointwiseConv(wide, wide, groups=fan)
        self.bn = norm(wide)

    def forward(self, state: State, weight: Tensor | None = None) -> Tensor:
        x, dilation = state.phases(fan_of(self.depthwise, state), self.stride)
        return normalise(self.bn, self.pointwise(self.depthwise(x, dilation)), weight)

    def fold_bn(self) -> None:
        self.bn = fold([self.pointwise], self.bn)


def fan_of(depthwise: DepthwiseConv, state: State) -> int:
    """Return how many edges the weights serve; they may be those of some edges only (GDAS)."""
    return depthwise.weight.size(0) // state.x.size(1)


class FactorizedReduce(nn.Module):
    """Halve the size by two 1x1 convolutions of stride 2, the second shifted by one pixel; BN.

    Maps (N, C_in, H, W), after its ReLU, to (N, fan*C_out, ceil(H/2), ceil(W/2)). Odd sizes are
    padded on the right and at the bottom; `out_channels` must be even.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: Norm, fan: int = 1):
        super().__init__()
        if out_channels % 2:
            raise ValueError(f"a factorized reduction to {out_channels} channels: must be even")
        self.half = out_channels // 2
        self.conv1 = PointwiseConv(in_channels, fan * self.half)
        self.conv2 = PointwiseConv(in_channels, fan * self.half)
        self.bn = norm(fan * out_channels)

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        h, w = x.shape[2:]
        if h % 2 or w % 2:
            x = F.pad(x, (0, w % 2, 0, h % 2))
        # Not stride=2: with few channels in channels-last memory, the weight gradient of that
        # convolution writes out of bounds on the CPU (PyTorch 2.14.1).
        even, odd = subsample(x, 0, 1)
        first, second = self.conv1(even), self.conv2(odd)
        halves = zip(first.split(self.half, 1), second.split(self.half, 1), strict=True)
        y = torch.cat([half for edge in halves for half in edge], 1)
        return normalise(self.bn, y, weight)

    def fold_bn(self) -> None:
        self.bn = fold([self.conv1, self.conv2], self.bn)


class StridedSkip(FactorizedReduce):
    """Pass the state on at half the size."""

    def forward(self, state: State, weight: Tensor | None = None) -> Tensor:
        return super().forward(state.relu(), weight)


def skip_connect(channels: int, stride: int, norm: Norm, fan: int = 1) -> nn.Module:
    return Skip() if stride == 1 else StridedSkip(channels, channels, norm, fan)


class Noise(nn.Module):
    """Put standard normal noise in the place of the input: S4's harmful operation (1909.09656).

    In evaluation the noise is always the same, so that an accuracy can be had again.
    """

    def __init__(self, channels: int, stride: int, norm: Norm, fan: int = 1):
        super().__init__()
        self.stride = stride

    def forward(self, state: State, weight: Tensor | None = None) -> Tensor:
        x = state.x
        n, c, h, w = x[:, :, :: self.stride, :: self.stride].shape
        generator = None
        if not self.training and not x.is_meta:
            generator = torch.Generator(x.device).manual_seed(0)
        c = c if weight is None else weight.numel()
        noise = torch.randn(n, c, h, w, generator=generator, device=x.device, dtype=x.dtype)
        noise = noise.contiguous(memory_format=memory_format_of(x))
        return noise if weight is None else noise * weight[:, None, None]


# Makers of the operations: (channels, stride, norm, fan) -> module. `none` needs none: it adds
# nothing, and keeps its share of the mixture. An operation without weights may say `is_shared`: its
# output is the same on all edges that leave a state, and the caller weights it.
OPS: dict[str, Callable[..., nn.Module]] = {
    "max_pool_3x3": partial(Pool, average=False),
    "avg_pool_3x3": partial(Pool, average=True),
    "skip_connect": skip_connect,
    "sep_conv_3x3": partial(SepConv, kernel_size=3),
    "sep_conv_5x5": partial(SepConv, kernel_size=5),
    "dil_conv_3x3": partial(DilConv, kernel_size=3),
    "dil_conv_5x5": partial(DilConv, kernel_size=5),
    "noise": Noise,  # for the space S4 alone
}


class ConvBN(nn.Module):
    """1x1 convolution, BN: brings a cell's input, after its ReLU, to the cell's channel count."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm):
        super().__init__()
        self.conv = PointwiseConv(in_channels, out_channels)
        self.bn = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def fold_bn(self) -> None:
        self.bn = fold([self.conv], self.bn)


def add_stem(
    model: nn.Module, kind: str, in_channels: int, channels: int, norm: Norm
) -> tuple[int, int]:
    """Give `model` what precedes its cells; return the channels of the two states that it makes.

    "cifar" is one 3x3 convolution, "imagenet" three of stride 2, so that the first cell's inputs
    differ in size.
    """

    def conv_bn(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        return nn.Sequential(conv, norm(c_out))

    if kind not in ("cifar", "imagenet"):
        raise ValueError(f"stem {kind!r} is not one of cifar, imagenet")
    if kind == "cifar":
        model.stem = conv_bn(in_channels, 3 * channels)
        return 3 * channels, 3 * channels
    half = channels // 2
    if channels % 2:
        raise ValueError(f"init_channels {channels}: must be even with the imagenet stem")
    model.stem0 = nn.Sequential(
        *conv_bn(in_channels, half, 2), nn.ReLU(), *conv_bn(half, channels, 2)
    )
    model.stem1 = conv_bn(channels, channels, 2)
    return channels, channels


def first_states(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Map images to the two states that the first cell takes, after their ReLU."""
    if hasattr(model, "stem"):
        s0 = s1 = F.relu(model.stem(x))
    else:
        s0 = F.relu(model.stem0(x))
        s1 = F.relu(model.stem1(s0))
    return s0, s1


def drop_path_probability(prob: float, training: bool, device: torch.device) -> Tensor | None:
    """Return what cells take: a tensor, because torch.compile makes a graph for each number."""
    if not training or not prob:
        return None
    return torch.full((), prob, dtype=torch.float64, device=device)


def drop_path_masks(edges: int, x: Tensor, prob: Tensor) -> Tensor:
    """Draw factors for the samples of `x` (N, C, H, W) on so many edges: (edges, N, 1, 1, 1).

    A factor is 0 with probability `prob`, else 1 / (1 - prob), so that its mean is 1.
    """
    keep = torch.rand(edges, x.size(0), 1, 1, 1, device=x.device) >= prob
    return keep.to(x.dtype) / (1 - prob)
