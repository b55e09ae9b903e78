"""Oracles: F.conv2d with dilation, one operation per edge, and formulas written out."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from darts_min.genotypes import PUBLISHED
from darts_min.kernels import (
    _DepthwiseOnCPU,
    concatenate,
    from_phases,
    grouped_pointwise,
    subsample,
    to_phases,
    total,
    weighted_sums,
)
from darts_min.network import Network
from darts_min.operations import (
    OPS,
    BatchStatNorm,
    ConvBN,
    DepthwiseConv,
    FactorizedReduce,
    State,
)
from darts_min.run.machine import cpu_has_bf16
from darts_min.supernet import Supernet

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)


def double(*shape, layout="contiguous", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    x = x.contiguous(memory_format=LAYOUTS[layout]) if len(shape) == 4 else x
    return x.requires_grad_()


def gradients(y, *inputs):
    """Differentiate a sum of y that weights each of its elements differently."""
    factors = double(*y.shape, seed=9).detach().to(y.dtype)
    return torch.autograd.grad((y * factors).sum(), inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_concatenate_is_torch_cat_with_dense_gradients(layout):
    tensors = [double(2, channels, 6, 4, layout=layout, seed=channels) for channels in (3, 5, 3)]
    expected = torch.cat(tensors, dim=1)
    close(concatenate(tensors), expected)
    found = gradients(concatenate(tensors), *tensors)
    for ours, theirs in zip(found, gradients(expected, *tensors), strict=True):
        close(ours, theirs)
        assert ours.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("edges, count", [(1, 1), (4, 3), (2, 1)])
def test_weighted_sums_are_sums_of_products(edges, count, layout):
    weights = double(edges, count)
    tensors = [double(2, 3, 4, 6, layout=layout, seed=i) for i in range(count)]
    found = weighted_sums(weights, tensors)
    for e, ours in enumerate(found):
        close(ours, sum(weights[e, k] * tensor for k, tensor in enumerate(tensors)))
        assert ours.is_contiguous(memory_format=LAYOUTS[layout])
    close(total(found), torch.einsum("ek,knchw->nchw", weights, torch.stack(tensors)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offsets", [(0,), (1,), (0, 1)])
def test_subsample_is_slices_with_a_dense_gradient(offsets, layout):
    x = double(2, 3, 6, 5, layout=layout)
    expected = [x[:, :, i::2, i::2] for i in offsets]
    for ours, theirs in zip(subsample(x, *offsets), expected, strict=True):
        close(ours, theirs)
    (ours,) = gradients(sum(y.sum((2, 3)) ** 2 for y in subsample(x, *offsets)), x)
    close(ours, *gradients(sum(y.sum((2, 3)) ** 2 for y in expected), x))
    assert ours.is_contiguous(memory_format=LAYOUTS[layout])
    assert torch.autograd.gradgradcheck(
        lambda x: sum(y.sum((2, 3)) ** 3 for y in subsample(x, *offsets)), x
    )


class Layouts(TorchDispatchMode):
    """Tell, of each call of BN's backward, whether the gradient lies in memory as the input does.

    Only then it takes the fast way on the CPU.
    """

    def __init__(self):
        super().__init__()
        self.alike = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten.native_batch_norm_backward:
            grad, x = args[:2]
            self.alike.append(grad.stride() == x.stride())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "make",
    [Supernet, partial(Supernet, partial=2)]
    + [partial(Network, PUBLISHED[name], auxiliary=False) for name in ("DARTS_V1", "NNI_FULL")],
)
def test_gradients_of_a_training_step_reach_every_bn_in_the_layout_of_its_input(make, layout):
    model = make(init_channels=4, num_cells=4).to(memory_format=LAYOUTS[layout])
    x = double(2, 3, 16, 16, layout=layout).float()
    loss = model(x).sum()
    with Layouts() as layouts:
        loss.backward()
    assert len(layouts.alike) > 20 and all(layouts.alike)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(2, 2), (6, 8), (16, 10)])
def test_from_phases_undoes_to_phases(size, layout):
    x = double(3, 5, *size, layout=layout)
    phases, dilation = to_phases(x, 1)
    assert dilation == 1 and phases.shape == (12, 5, size[0] // 2, size[1] // 2)
    assert torch.equal(from_phases(phases, 3), x)
    for k in range(4):
        assert torch.equal(phases[k::4], x[:, :, k // 2 :: 2, k % 2 :: 2])


def test_without_gradients_nothing_is_rearranged_and_the_result_is_the_same():
    x = double(3, 4, 6, 8)
    op = OPS["dil_conv_3x3"](4, 1, nn.BatchNorm2d).double()
    in_phases = op(State(x))
    assert len(in_phases) == 12
    with torch.no_grad():
        phases, dilation = to_phases(x, 1)
        assert phases is x and dilation == 2
        close(op(State(x)), from_phases(in_phases, 3).detach())


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (9, 9)])
def test_odd_sizes_stay_as_they_are(size):
    x = double(3, 5, *size)
    phases, dilation = to_phases(x, 1)
    assert phases is x and dilation == 2
    assert from_phases(phases, 3) is x


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(8, 8), (16, 20), (7, 7), (9, 16), (16, 9), (3, 3)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_dil_conv_on_phases_is_a_dilated_convolution(kernel, stride, size, layout):
    op = OPS[f"dil_conv_{kernel}x{kernel}"](4, stride, BatchStatNorm).double()
    op.bn = nn.Identity()
    x, weight = double(2, 4, *size, layout=layout), op.depthwise.weight
    ours = from_phases(op(State(x)), len(x))
    expected = F.conv2d(F.relu(x), weight, None, stride, kernel - 1, 2, 4)
    expected = F.conv2d(expected, op.pointwise.weight)
    close(ours, expected)
    wrt = x, weight, op.pointwise.weight
    for our_grad, grad in zip(gradients(ours, *wrt), gradients(expected, *wrt), strict=True):
        close(our_grad, grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", range(4, 18))
@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_depthwise_conv_equals_conv2d(kernel, stride, size, layout):
    op = DepthwiseConv(4, kernel, stride).double()
    x, weight = double(2, 4, size - 3, size, layout=layout), op.weight
    ours, expected = op(x), F.conv2d(x, weight, None, stride, kernel // 2, groups=4)
    close(ours, expected)
    for our_grad, grad in zip(
        gradients(ours, x, weight), gradients(expected, x, weight), strict=True
    ):
        close(our_grad, grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 4])
def test_grouped_pointwise_equals_conv2d(groups, layout):
    x = double(2, groups * 3, 5, 6, layout=layout)
    weight = double(groups * 2, 3, 1, 1, layout=layout, seed=1)
    ours, expected = grouped_pointwise(x, weight), F.conv2d(x, weight, groups=groups)
    close(ours, expected)
    for our_grad, grad in zip(
        gradients(ours, x, weight), gradients(expected, x, weight), strict=True
    ):
        close(our_grad, grad)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_a_depthwise_conv_gives_only_the_gradient_that_is_wanted(frozen):
    op, x = DepthwiseConv(2, 5).double(), double(2, 2, 8, 8)
    (x if frozen == "x" else op.weight).requires_grad_(False)
    wanted = op.weight if frozen == "x" else x
    y, expected = op(x), F.conv2d(x, op.weight, padding=2, groups=2)
    assert "DepthwiseOnCPU" in type(y.grad_fn).__name__
    close(gradients(y, wanted)[0], gradients(expected, wanted)[0])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_a_depthwise_conv_passes_gradcheck_twice(kernel, stride):
    def conv(x, weight):
        return _DepthwiseOnCPU.apply(x, weight, stride, kernel // 2)

    inputs = double(1, 2, 3, 8), double(2, 1, kernel, kernel, seed=1)
    assert torch.autograd.gradcheck(conv, inputs)
    assert torch.autograd.gradgradcheck(conv, inputs)


@pytest.mark.skipif(not cpu_has_bf16(), reason="needs a CPU with bf16; others add up in bf16")
@pytest.mark.parametrize("kernel, stride", [(3, 2), (5, 1), (5, 2)])
def test_a_depthwise_convs_bf16_gradients_are_those_of_float32_rounded(kernel, stride):
    torch.manual_seed(0)
    op = DepthwiseConv(4, kernel, stride)
    x = double(2, 4, 9, 12, layout="channels_last").float().detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = op(x)
    assert y.dtype == torch.bfloat16
    rounded = [t.detach().bfloat16().float().requires_grad_() for t in (x, op.weight)]
    expected = F.conv2d(*rounded, None, stride, kernel // 2, groups=4)
    upstream = torch.randn_like(expected).bfloat16()
    grads = torch.autograd.grad(y, (x, op.weight), upstream)
    for ours, grad in zip(
        grads, torch.autograd.grad(expected, rounded, upstream.float()), strict=True
    ):
        torch.testing.assert_close(ours, grad, rtol=2**-7, atol=2**-7)


def split(weights, op, fan, channels):
    """Give `fan` operations their parts of one that is `fan` wide."""
    parts = [
        dict(zip(weights, part, strict=True))
        for part in zip(*(w.chunk(fan) for w in weights.values()), strict=True)
    ]
    ops = [op(fan=1).double() for _ in range(fan)]
    for single, part in zip(ops, parts, strict=True):
        single.load_state_dict(part)
    return ops


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", [name for name in OPS if name != "noise"])
def test_three_edges_side_by_side_equal_three_operations(name, stride, layout):
    fan, c = 3, 4
    make = partial(OPS[name], c, stride, BatchStatNorm)
    op = make(fan=fan).double()
    if getattr(op, "is_shared", False):
        assert not list(op.parameters())  # what edges share has no weights of an edge
        return
    x, scale = double(2, c, 8, 8, layout=layout), double(fan * c, seed=1)

    def run(op, x, scale):
        return from_phases(op(State(x), scale), len(x))

    ours = run(op, x, scale)
    singles = split(op.state_dict(), make, fan, c)
    scales = scale.chunk(fan)
    expected = torch.cat([run(o, x, s) for o, s in zip(singles, scales, strict=True)], 1)
    close(ours, expected)
    grads = gradients(ours, x, scale, *op.parameters())
    weights = zip(*(single.parameters() for single in singles), strict=True)
    weights = [weight for same in weights for weight in same]
    expected_grads = gradients(expected, x, scale, *weights)
    close(grads[:2], expected_grads[:2])
    for i, grad in enumerate(grads[2:]):
        close(grad, torch.cat(expected_grads[2 + fan * i : 2 + fan * (i + 1)]))


@pytest.mark.parametrize("size", [(7, 7), (7, 8), (8, 7), (1, 1)])
def test_factorized_reduce_pads_odd_sizes_on_the_right_and_bottom(size):
    op = FactorizedReduce(3, 4, BatchStatNorm).double()
    x = double(5, 3, *size)
    h, w = (n + n % 2 for n in size)
    padded = torch.zeros(5, 3, h, w, dtype=torch.float64)
    padded[:, :, : size[0], : size[1]] = x
    close(op(x), op(padded))
    assert op(x).shape == (5, 4, h // 2, w // 2)


def test_factorized_reduce_takes_even_pixels_then_odd_pixels():
    op = FactorizedReduce(3, 4, BatchStatNorm).double()
    op.bn = nn.Identity()
    x = double(2, 3, 6, 8)
    even = torch.einsum("oi,nihw->nohw", op.conv1.weight[:, :, 0, 0], x[:, :, ::2, ::2])
    odd = torch.einsum("oi,nihw->nohw", op.conv2.weight[:, :, 0, 0], x[:, :, 1::2, 1::2])
    close(op(x), torch.cat([even, odd], 1))


def test_factorized_reduce_refuses_odd_channels():
    with pytest.raises(ValueError, match="5 channels"):
        FactorizedReduce(4, 5, BatchStatNorm)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_stat_norm_is_the_formula_in_training_and_evaluation(layout):
    bn, x, weight = BatchStatNorm(4).double(), double(3, 4, 5, 6, layout=layout), double(4)
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = (x - mean).square().mean((0, 2, 3), keepdim=True)
    expected = (x - mean) / (variance + 1e-5).sqrt()
    assert not list(bn.parameters()) and not bn.state_dict()
    for training in (True, False):
        bn.train(training)
        close(bn(x), expected)
        close(bn(x, weight), expected * weight[:, None, None])


def test_conv_bn_is_a_matrix_product_and_a_norm():
    op, x = ConvBN(3, 4, BatchStatNorm).double(), double(5, 3, 2, 2)
    y = torch.einsum("oi,nihw->nohw", op.conv.weight[:, :, 0, 0], x)
    mean, variance = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
    close(op(x), (y - mean[:, None, None]) / (variance + 1e-5).sqrt()[:, None, None])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [5, 6])
def test_pools_leave_the_border_out(size, stride):
    x = double(2, 3, size, size)
    for name, reduce in (("max_pool_3x3", torch.amax), ("avg_pool_3x3", torch.mean)):
        y = OPS[name](3, stride, nn.BatchNorm2d)(State(x))  # without BN outside the search
        normalised = OPS[name](3, stride, BatchStatNorm)(State(x))
        close(normalised, BatchStatNorm(3)(y))
        for i, j in torch.cartesian_prod(*(torch.arange(0, size, stride),) * 2).tolist():
            window = x[:, :, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
            close(y[:, :, i // stride, j // stride], reduce(window, (2, 3)))
        assert y.shape[2:] == (-(-size // stride),) * 2


def test_search_cells_give_batch_norm_contiguous_scales():
    """PyTorch 2.14's batch_norm backward on the CPU misreads strided weights."""
    model = Supernet(init_channels=4, num_cells=3, num_nodes=3)
    scaled = []

    def look(module, args):
        if len(args) == 2:
            assert args[1].is_contiguous()
            scaled.append(module)

    for module in model.modules():
        if isinstance(module, BatchStatNorm):
            module.register_forward_pre_hook(look)
    model(torch.randn(2, 3, 8, 8))
    # Four convolution ops per state and cell, and the skips of stride 2.
    assert len(scaled) == len(set(scaled)) == 4 * 4 * 3 + 2 * 2


@pytest.mark.parametrize("channels", [2, 4, 6, 16])
def test_reduction_with_few_channels_has_the_right_weight_gradient_in_float32(channels):
    """A strided 1x1 convolution in channels-last memory has not (PyTorch 2.14.1, CPU)."""
    op = FactorizedReduce(channels, channels, BatchStatNorm)
    reference = FactorizedReduce(channels, channels, BatchStatNorm).double()
    reference.load_state_dict(op.state_dict())
    for seed in range(5):
        x = double(20, channels, 8, 8, seed=seed).detach()
        y, expected = op(x.float().contiguous(memory_format=torch.channels_last)), reference(x)
        grads = gradients(y, *op.parameters()), gradients(expected, *reference.parameters())
        for grad, exact in zip(*grads, strict=True):
            torch.testing.assert_close(grad.double(), exact, rtol=1e-4, atol=1e-3)
