"""The candidate operations (Sec. 3.1), each able to serve several edges at once.

All edges that leave one state see the same input, so an operation evaluates `fan` of them as one
wide convolution: input and output are (N, fan*C, H, W), edge by edge. How many edges, a call learns
from its weights, so that it may be given those of some edges only. The discrete network uses the
same classes with `fan=1`. The ReLU that every convolution starts with is applied by the caller,
once per state.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

Norm = Callable[[int], nn.Module]


class BatchStatNorm(nn.Module):
    """Normalise by the batch's own statistics, in training and in evaluation; no parameters.

    The search's BN (A.1.1: statistics of the batch, no learnable affine). The output may be scaled
    per channel by `weight`.
    """

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        return F.batch_norm(x, None, None, weight, training=True)


class _DepthwiseOnCPU(torch.autograd.Function):
    """A depthwise convolution whose gradients go around oneDNN's slow kernels; the same sums.

    Its fast kernel for the weight gradient ends at three columns: for a 5x5 kernel two strips take
    0.5 to 0.8 of the time of one call (0.1 in bf16 with stride 2). It also takes no image lower
    than the kernel, unless its rows are padded beforehand (0.05 to 0.15 of the time). The input
    gradient of stride 2 has a fast kernel in float32 only (0.05 to 0.3 of the time in bf16).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding, groups=weight.size(0))

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = (saved.to(grad.dtype) for saved in ctx.saved_tensors)
        stride, p, grad_x, grad_weight = ctx.stride, ctx.padding, None, None

        def gradients(grad, x, weight, padding: list[int], mask: list[bool]):
            strides, groups = [stride, stride], weight.size(0)
            return torch.ops.aten.convolution_backward(
                grad, x, weight, None, strides, padding, [1, 1], False, [0, 0], groups, mask
            )

        if ctx.needs_input_grad[0]:
            dtype = grad.dtype if stride == 1 else torch.promote_types(grad.dtype, torch.float32)
            wide = (t.to(dtype) for t in (grad, x, weight))
            grad_x = gradients(*wide, [p, p], [True, False, False])[0].to(grad.dtype)
        rows = p if x.size(2) < weight.size(2) else 0
        if ctx.needs_input_grad[1] and weight.size(3) <= 3 and not rows:
            grad_weight = gradients(grad, x, weight, [p, p], [False, True, False])[1]
        elif ctx.needs_input_grad[1]:
            strips = []
            for i, strip in enumerate(weight.split(3, dim=3)):
                # Shift x so that kernel column 3i meets the pixel that it met in the whole kernel.
                x_strip = F.pad(x, (p - 3 * i, 3 * i + strip.size(3) - 1 - p, rows, rows))
                padding = [p - rows, 0]
                strips.append(gradients(grad, x_strip, strip, padding, [False, True, False])[1])
            grad_weight = torch.cat(strips, dim=3)
        return grad_x, grad_weight, None, None


class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution that keeps the size (up to the stride)."""

    def __init__(self, channels: int, kernel_size: int, stride: int = 1):
        padding = kernel_size // 2
        super().__init__(
            channels, channels, kernel_size, stride, padding, groups=channels, bias=False
        )

    def forward(self, x: Tensor, dilation: int = 1) -> Tensor:
        stride, padding = self.stride[0], self.padding[0] * dilation
        kernel, (height, width) = self.kernel_size[0], x.shape[2:]
        # A 3x3 kernel of stride 2 is slow in wider images only.
        is_slow = kernel > 3 or height < kernel or (stride > 1 and width >= 8)
        if x.device.type == "cpu" and dilation == 1 and is_slow:
            return _DepthwiseOnCPU.apply(x, self.weight, stride, padding)
        groups = self.weight.size(0)
        return F.conv2d(x, self.weight, None, stride, padding, dilation, groups)


class _Concatenate(torch.autograd.Function):
    # Where no input needs a gradient, Dynamo (2.14.1) leaves ctx out if there are as many inputs as
    # parameters, here two. With `channels` and `memory_format` among the inputs, there are more.
    @staticmethod
    def forward(ctx, *inputs) -> Tensor:
        ctx.channels, ctx.memory_format, *tensors = inputs
        return torch.cat(tensors, dim=1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts = grad.split(ctx.channels, dim=1)
        return None, None, *(part.contiguous(memory_format=ctx.memory_format) for part in parts)


def concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate along the channels; each gradient is dense, in the memory format of the first.

    Those of torch.cat are views of one wide tensor, and the CPU's BN takes 30 times as long for
    them in its backward (73 ms, not 2.6, for (128, 16, 32, 32) in channels-last memory).
    """
    channels = [tensor.size(1) for tensor in tensors]
    return _Concatenate.apply(channels, memory_format_of(tensors[0]), *tensors)


class _Subsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, offsets: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.memory_format, ctx.offsets = x.shape, memory_format_of(x), offsets
        return tuple(x[:, :, i::2, i::2] for i in offsets)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        grad_x = torch.zeros_like(
            grads[0].new_empty(1).expand(ctx.shape), memory_format=ctx.memory_format
        )
        for i, grad in zip(ctx.offsets, grads, strict=True):
            grad_x[:, :, i::2, i::2] = grad
        return grad_x, None


def subsample(x: Tensor, *offsets: int) -> tuple[Tensor, ...]:
    """Return every second pixel of every second row, from each of `offsets` (0, 1) on, as views.

    The gradient is one tensor in the memory format of `x`; slices would make a contiguous one each.
    """
    return _Subsample.apply(x, offsets)


def memory_format_of(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution, in `groups` that each have their own input."""

    def __init__(self, in_channels: int, out_channels: int, groups: int = 1):
        super().__init__(in_channels, out_channels, 1, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        groups = x.size(1) // self.weight.size(1)
        return F.conv2d(x, self.weight, self.bias, groups=groups)


def fold(convs: Sequence[nn.Conv2d], bn: nn.Module) -> nn.Module:
    """Let `convs`, which make the channels of `bn` one after the other, do its work in evaluation.

    Returns what takes its place: nothing for a BatchNorm2d; another module stays.
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


class ConvBN(nn.Module):
    """1x1 convolution, BN: brings a cell's input to the cell's channel count."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm):
        super().__init__()
        self.conv = PointwiseConv(in_channels, out_channels)
        self.bn = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def fold_bn(self) -> None:
        self.bn = fold([self.conv], self.bn)


class SepConv(nn.Module):
    """Depthwise and pointwise convolution, BN, ReLU, and all of it again (without the ReLU).

    `scale` (fan*C), where given, is the weight of the last BN.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int, norm: Norm, fan: int = 1):
        super().__init__()
        wide = fan * channels
        self.depthwise1 = DepthwiseConv(wide, kernel_size, stride)
        self.pointwise1 = PointwiseConv(wide, wide, groups=fan)
        self.bn1 = norm(wide)
        self.depthwise2 = DepthwiseConv(wide, kernel_size)
        self.pointwise2 = PointwiseConv(wide, wide, groups=fan)
        self.bn2 = norm(wide)

    def forward(self, x: Tensor, *scale: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.pointwise1(self.depthwise1(x))), inplace=True)
        return self.bn2(self.pointwise2(self.depthwise2(x)), *scale)

    def fold_bn(self) -> None:
        self.bn1 = fold([self.pointwise1], self.bn1)
        self.bn2 = fold([self.pointwise2], self.bn2)


class DilConv(nn.Module):
    """Depthwise convolution of dilation 2, pointwise convolution, BN, on `to_phases` of the input.

    `dilation` is what `to_phases` left of it: 1 where it rearranged the pixels, else 2.
    """

    def __init__(self, channels: int, kernel_size: int, norm: Norm, fan: int = 1):
        super().__init__()
        wide = fan * channels
        self.depthwise = DepthwiseConv(wide, kernel_size)
        self.pointwise = PointwiseConv(wide, wide, groups=fan)
        self.bn = norm(wide)

    def forward(self, x: Tensor, dilation: int, *scale: Tensor) -> Tensor:
        return self.bn(self.pointwise(self.depthwise(x, dilation)), *scale)

    def fold_bn(self) -> None:
        self.bn = fold([self.pointwise], self.bn)


def to_phases(x: Tensor, stride: int) -> tuple[Tensor, int]:
    """Rearrange `x` so that a convolution of dilation 2 and `stride` becomes an ordinary one.

    Returns the rearranged input and the dilation that is still needed at stride 1. With stride 2
    the taps meet every second pixel only. With stride 1 the four 2x2 phases do not mix and go to
    the batch: (N, C, H, W) -> (4N, C, H/2, W/2), undone by `from_phases`; pointwise convolution and
    BN do not mind the order. Worth it on the CPU, where a dilated depthwise convolution's weight
    gradient is by far the slowest call of a search step; elsewhere, without gradients, and for odd
    sizes, `x` stays.
    """
    if stride == 2:
        return subsample(x, 0)[0], 1
    n, c, h, w = x.shape
    if x.device.type != "cpu" or h % 2 or w % 2 or not torch.is_grad_enabled():
        return x, 2
    pixels = x.permute(0, 2, 3, 1).reshape(n, h // 2, 2, w // 2, 2, c)
    phases = pixels.permute(0, 2, 4, 1, 3, 5).reshape(4 * n, h // 2, w // 2, c)
    return phases.permute(0, 3, 1, 2), 1


def from_phases(y: Tensor, batch_size: int) -> Tensor:
    """Undo `to_phases` on an output for `batch_size` images: (4N, C, H/2, W/2) -> (N, C, H, W)."""
    if y.size(0) == batch_size:
        return y
    n, (c, h, w) = batch_size, y.shape[1:]
    phases = y.permute(0, 2, 3, 1).reshape(n, 2, 2, h, w, c)
    pixels = phases.permute(0, 3, 1, 4, 2, 5).reshape(n, 2 * h, 2 * w, c)
    return pixels.permute(0, 3, 1, 2)


class FactorizedReduce(nn.Module):
    """Halve the size by two 1x1 convolutions of stride 2, the second shifted by one pixel; BN.

    Odd sizes are padded on the right and at the bottom. Takes (N, C_in, H, W), not widened, and
    returns (N, fan*C_out, ceil(H/2), ceil(W/2)); `out_channels` must be even.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: Norm, fan: int = 1):
        super().__init__()
        if out_channels % 2:
            raise ValueError(f"a factorized reduction to {out_channels} channels: must be even")
        self.half = out_channels // 2
        self.conv1 = PointwiseConv(in_channels, fan * self.half)
        self.conv2 = PointwiseConv(in_channels, fan * self.half)
        self.bn = norm(fan * out_channels)

    def forward(self, x: Tensor, *scale: Tensor) -> Tensor:
        h, w = x.shape[2:]
        if h % 2 or w % 2:
            x = F.pad(x, (0, w % 2, 0, h % 2))
        # Not stride=2: with few channels in channels-last memory, the weight gradient of that
        # convolution writes out of bounds on the CPU (PyTorch 2.14.1).
        even, odd = subsample(x, 0, 1)
        first, second = self.conv1(even), self.conv2(odd)
        halves = zip(first.split(self.half, 1), second.split(self.half, 1), strict=True)
        return self.bn(torch.cat([half for edge in halves for half in edge], 1), *scale)

    def fold_bn(self) -> None:
        self.bn = fold([self.conv1, self.conv2], self.bn)


def max_pool(x: Tensor, stride: int) -> Tensor:
    return F.max_pool2d(x, 3, stride, 1)


def avg_pool(x: Tensor, stride: int) -> Tensor:
    return F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)


class Noise(nn.Module):
    """Standard normal noise in place of the input: a harmful operation (S4 of arXiv 1909.09656).

    In evaluation always the same, so that an accuracy can be had again.
    """

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor, *scale: Tensor) -> Tensor:
        """Return (N, fan*C, H', W') for `scale` (fan*C), without it (N, C, H', W')."""
        n, c, h, w = x[:, :, :: self.stride, :: self.stride].shape
        generator = None
        if not self.training and not x.is_meta:
            generator = torch.Generator(x.device).manual_seed(0)
        if scale:
            c = scale[0].numel()
        noise = torch.randn(n, c, h, w, generator=generator, device=x.device, dtype=x.dtype)
        return noise * scale[0][:, None, None] if scale else noise


def drop_path_probability(prob: float, training: bool, device: torch.device) -> Tensor | None:
    """Return what cells take: a tensor, as torch.compile would make a graph for each number."""
    if not training or not prob:
        return None
    return torch.full((), prob, dtype=torch.float64, device=device)
