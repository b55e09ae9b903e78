"""The same sums by other calls, where PyTorch's own are slow or faulty on the CPU (2.14.1).

Nothing here is needed to understand DARTS. Each function has a plain twin, which its docstring
names and the tests hold it against.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def depthwise_conv(x: Tensor, weight: Tensor, stride: int, dilation: int = 1) -> Tensor:
    """Convolve each channel with its own kernel and keep the size, up to the stride.

    Plain twin: F.conv2d(x, weight, None, stride, padding, dilation, groups=C). x: (N, C, H, W);
    weight: (C, 1, K, K).
    """
    kernel, (height, width) = weight.size(3), x.shape[2:]
    padding = kernel // 2 * dilation
    # A 3x3 kernel of stride 2 is slow in wider images only.
    is_slow = kernel > 3 or height < kernel or (stride > 1 and width >= 8)
    if x.device.type == "cpu" and dilation == 1 and is_slow:
        return _DepthwiseOnCPU.apply(x, weight, stride, padding)
    return F.conv2d(x, weight, None, stride, padding, dilation, groups=weight.size(0))


class _DepthwiseOnCPU(torch.autograd.Function):
    """A depthwise convolution whose gradients go around oneDNN's slow kernels.

    The fast kernel for the weight gradient ends at three columns: for a 5x5 kernel, two strips take
    0.5 to 0.8 of the time of one call (0.1 in bf16 with stride 2). It takes no image with
    fewer rows than the filter; rows padded beforehand bring the time to 0.05 to 0.15. The input
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


def grouped_pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve groups of channels, each with its own 1x1 kernel, by one batched matrix product.

    Plain twin: F.conv2d(x, weight, groups=G). x: (N, G*C, H, W); weight: (G*K, C, 1, 1); the result
    is (N, G*K, H, W), contiguous. Nothing calls it yet: on a GPU it may be faster than cuDNN's
    grouped convolution, which `python -m benchmarks.gpu` measures.
    """
    n, c, (height, width) = len(x), weight.size(1), x.shape[2:]
    groups = x.size(1) // c
    y = weight.view(groups, -1, c) @ x.reshape(n, groups, c, height * width)
    return y.view(n, -1, height, width)


def to_phases(x: Tensor, stride: int) -> tuple[Tensor, int]:
    """Rearrange `x` so that a convolution of dilation 2 and `stride` becomes an ordinary one.

    Returns the rearranged tensor, and the dilation that the convolution still needs (of stride 1).
    With stride 2, the kernel's taps meet every second pixel only. With stride 1, the four 2x2
    phases do not mix and go to the batch: (N, C, H, W) -> (4N, C, H/2, W/2), undone by
    `from_phases`; pointwise convolution and BN do not mind the order. This pays on the CPU, where
    the weight gradient of a dilated depthwise convolution is by far the slowest call of a search
    step. On other devices, without gradients, and for odd sizes, `x` stays as it is.
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
    """Undo `to_phases` on an output for `batch_size` images: (4N, C, H/2, W/2) -> (N, C, H, W).

    An output that is not in phases stays as it is.
    """
    if y.size(0) == batch_size:
        return y
    n, (c, h, w) = batch_size, y.shape[1:]
    phases = y.permute(0, 2, 3, 1).reshape(n, 2, 2, h, w, c)
    pixels = phases.permute(0, 3, 1, 4, 2, 5).reshape(n, 2 * h, 2 * w, c)
    return pixels.permute(0, 3, 1, 2)


def weighted_sums(weights: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return sum_k weights[e, k] * tensors[k] for each row e of `weights`, by one matrix product.

    weights: (E, K); tensors: K of (N, C, H, W). Plain twin: torch.einsum over a stack.
    """
    y = torch.cat(list(tensors))
    channels_last = y.is_contiguous(memory_format=torch.channels_last)
    y = y.permute(0, 2, 3, 1) if channels_last else y  # as it lies in memory
    n = len(y) // len(tensors)
    sums = (weights @ y.reshape(len(tensors), -1)).view(len(weights) * n, *y.shape[1:])
    return (sums.permute(0, 3, 1, 2) if channels_last else sums).chunk(len(weights))


def total(tensors: Sequence[Tensor]) -> Tensor:
    """Add up tensors. Plain twin: sum(tensors); this makes one new tensor in all."""
    if len(tensors) == 1:
        return tensors[0]
    result = tensors[0] + tensors[1]
    for tensor in tensors[2:]:
        result += tensor
    return result


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

    Plain twin: torch.cat(tensors, 1). Its gradients are views of one wide tensor, for which BN's
    backward takes 30 times as long (73 ms, not 2.6, for (128, 16, 32, 32) in channels-last memory).
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
    """Return every second pixel of every second row as views, one from each of `offsets` (0, 1) on.

    Plain twin: x[:, :, i::2, i::2] for each offset i. The gradient here is one tensor in the memory
    format of `x`; slices would make a contiguous one each.
    """
    return _Subsample.apply(x, offsets)


def memory_format_of(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
