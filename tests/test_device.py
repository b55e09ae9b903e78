"""Devices. Oracle for determinism: PyTorch's list of what has no deterministic gradient on CUDA."""

import inspect
import platform
import re
from functools import partial, partialmethod

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import darts_min.run.machine
import train_final
import train_search
from darts_min.architect import architecture_gradient
from darts_min.genotypes import PRIMITIVES, PUBLISHED, Genotype
from darts_min.network import Network
from darts_min.run.machine import Machine, choose_autocast, choose_device, keep_freed_memory
from darts_min.supernet import Supernet

RUN = ["--dataset", "synthetic", "--image-size", "16", "--subset", "80", "--batch-size", "40"]
RUN += ["--init-channels", "4", "--num-cells", "3", "--fast-dev-run", "--device", "cpu"]
# What PyTorch's documentation lists, by operator; the part of a name that is in no other's.
NOT_DETERMINISTIC = {
    "AvgPool3d": "avg_pool3d_backward",
    "AdaptiveAvgPool2d": "adaptive_avg_pool2d_backward",
    "AdaptiveAvgPool3d": "adaptive_avg_pool3d_backward",
    "AdaptiveMaxPool2d": "adaptive_max_pool2d_backward",
    "FractionalMaxPool2d": "fractional_max_pool2d_backward",
    "FractionalMaxPool3d": "fractional_max_pool3d_backward",
    "MaxUnpool1d": "max_unpool",
    "MaxUnpool2d": "max_unpool2d",
    "MaxUnpool3d": "max_unpool3d",
    "interpolate": "upsample_.*(linear|cubic)",
    "ReflectionPad1d": "reflection_pad1d_backward",
    "ReflectionPad2d": "reflection_pad2d_backward",
    "ReflectionPad3d": "reflection_pad3d_backward",
    "NLLLoss": "nll_loss2d",  # of pictures; that of classes is
    "CTCLoss": "ctc_loss",
    "EmbeddingBag": "embedding_bag",
    "put_": "aten::put_",
    "histc": "histc",
    "bincount": "bincount_weights",  # with weights only
    "median": "median",
    "grid_sample": "grid_sampler",
    "scatter_reduce": "scatter_reduce",
    "resize_": "quantized",
    # PyTorch 2.6 lists these, too.
    "MaxPool3d": "max_pool3d_with_indices_backward",
    "ReplicationPad1d": "replication_pad1d_backward",
    "ReplicationPad3d": "replication_pad3d_backward",
    "kthvalue": "kthvalue",
    "cumsum": "cumsum",
}


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if "bincount" in name and args[1:2] not in ((), (None,)):
            name += "_weights"
        self.names.add(name)
        return function(*args, **(kwargs or {}))


def test_the_list_is_complete():
    documentation = inspect.getdoc(torch.use_deterministic_algorithms)
    throws = documentation.split("operations will throw")[1].split("In addition")[0]
    listed = re.findall(r":(?:class|func):`torch\S*?\.?(\w+)`", throws)
    assert len(listed) > 20 and set(listed) <= NOT_DETERMINISTIC.keys() | {"RuntimeError"}


@pytest.mark.parametrize(
    "main, flags",
    [
        *(
            pytest.param(train_search.main, flags, marks=pytest.mark.slow)
            for flags in (
                *(["--relaxation", name] for name in train_search.RELAXATIONS),
                ["--order", "2"],
                ["--space", "S4", "--search-drop-path", "0.2"],
                ["--method", "random", "--candidates", "2", "--search-cutout", "4"],
            )
        ),
        (train_final.main, ["--genotype", "DARTS_V1"]),
        (train_final.main, ["--genotype", "DARTS_V2", "--stem", "imagenet"]),
    ],
)
def test_no_operation_lacks_a_deterministic_form_on_cuda(tmp_path, main, flags):
    with Recorder() as recorder:
        main([*RUN, *flags, "--out-dir", f"{tmp_path}/run"])
    assert "aten::convolution_backward" in recorder.names
    pattern = re.compile("|".join(NOT_DETERMINISTIC.values()))
    assert not [name for name in recorder.names if pattern.search(name)]


@pytest.mark.parametrize(
    "backend, flag",
    [
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cuda.matmul, "allow_tf32"),
        (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
    ],
)
def test_a_gpu_adds_up_in_float32(backend, flag):
    before = getattr(backend, flag)
    try:
        setattr(backend, flag, True)
        choose_device("cpu")
        assert getattr(backend, flag) is False
    finally:
        setattr(backend, flag, before)


@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_tries_its_kernels_unless_deterministic(monkeypatch, deterministic):
    monkeypatch.setattr(darts_min.run.machine, "make_deterministic", lambda: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
    Machine("cpu", deterministic=deterministic)
    assert torch.backends.cudnn.benchmark is not deterministic


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_bf16_where_the_gpu_has_it(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    autocast, is_fp16 = choose_autocast("auto", torch.device("cuda"))
    assert autocast.keywords["enabled"] is native and not is_fp16


@pytest.mark.parametrize("capability, slow", [("AVX2", True), ("AVX512", False)])
def test_bf16_on_a_cpu_without_it_is_warned_of(monkeypatch, recwarn, capability, slow):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    choose_autocast("bf16", torch.device("cpu"))
    choose_autocast("off", torch.device("cpu"))
    assert ["slower" in str(warning.message) for warning in recwarn] == [True] * slow


def compile_and_count(monkeypatch, network, **how):
    """Let `Machine.compile_cells` compile for a backend that counts the graphs; return it."""
    counter, compiles = CompileCounter(), torch.nn.Module.compile
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", partialmethod(compiles, backend=counter, **how))
        Machine("cpu", compile=True).compile_cells(network)
    return counter


@pytest.mark.parametrize(
    "make",
    [
        partial(Network, PUBLISHED["DARTS_V2"], auxiliary=False),
        pytest.param(partial(Supernet, num_nodes=2), marks=pytest.mark.slow),
    ],
)
def test_compiled_cells_are_compiled_once_for_all_drop_path_probabilities(monkeypatch, make):
    network = make(init_channels=2, num_cells=3)
    counter = compile_and_count(monkeypatch, network)
    counts = []
    for network.drop_path_prob in (0.1, 0.2, 0.3):
        network(torch.randn(4, 3, 8, 8)).sum().backward()
        counts.append(counter.frame_count)
    assert counts == [3, 3, 3]


@pytest.mark.parametrize(
    "primitives", [PRIMITIVES[1:4], pytest.param(PRIMITIVES, marks=pytest.mark.slow)]
)
def test_an_alpha_step_takes_one_graph_a_cell(monkeypatch, primitives):
    supernet = Supernet(10, 2, 3, num_nodes=1, primitives=primitives)
    batch = torch.randn(4, 3, 8, 8), torch.arange(4)
    expected = architecture_gradient(supernet, F.cross_entropy, batch, batch, 0.0)
    counter = compile_and_count(monkeypatch, supernet, fullgraph=True)
    found = architecture_gradient(supernet, F.cross_entropy, batch, batch, 0.0)
    assert counter.frame_count == 3
    torch.testing.assert_close(found, expected)


def test_frozen_cells_are_compiled_to_one_graph_each(monkeypatch):
    cell = tuple(("skip_connect", j) for j in (0, 1, 0, 1))
    network = Network(Genotype(cell, (2, 3), cell, (2, 3)), 10, 2, 3, auxiliary=False)
    network.requires_grad_(False).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = network(x)
    counter = compile_and_count(monkeypatch, network, fullgraph=True)
    torch.testing.assert_close(network(x), expected)
    assert counter.frame_count == 3


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_stays_with_the_process():
    resource = pytest.importorskip("resource")

    def pages_mapped():
        torch.ones(1 << 24)  # 16384 pages of 4 KB
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    keep_freed_memory()
    mapped = [pages_mapped() for _ in range(15)]  # glibc takes a few to settle
    assert mapped[-1] - mapped[-5] < 1000
