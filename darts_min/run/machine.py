"""Set up where and in which precision a script computes, and with how many processes."""

import atexit
import ctypes
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from darts_min.run.graphs import Recorded

AMP_CHOICES = ("auto", "off", "bf16", "fp16")


class Machine:
    """Hold the device, its precision and memory format, and speak with the other processes.

    torchrun starts several processes, which train one model on parts of the data; it tells each
    one its RANK and the WORLD_SIZE. In a single process, the methods that exchange tensors do
    nothing. Otherwise all processes must call each of them, in the same order. `shard` is (rank,
    world size). `autocast()` and `uncompiled()` return contexts that do nothing unless asked for.
    """

    def __init__(
        self,
        device: str = "auto",
        amp: str = "off",
        channels_last: str = "auto",
        deterministic: bool = False,
        compile: bool = False,
        cuda_graphs: bool = False,
    ):
        self.device = choose_device(device)
        self.shard = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.rank, self.world_size = self.shard
        if cuda_graphs and self.world_size > 1:
            raise ValueError("--cuda-graphs: not with several processes (torchrun)")
        self.launcher = "python"  # the command that started this process, as the user typed it
        if self.world_size > 1:
            self._join_processes()
        if deterministic:
            make_deterministic()
        # On CUDA: try the kernels for each new shape, and keep the fastest one.
        torch.backends.cudnn.benchmark = not deterministic
        self.autocast, self.is_fp16 = choose_autocast(amp, self.device)
        on_cpu = self.device.type == "cpu"  # channels-last is far faster there
        is_channels_last = channels_last == "on" or (channels_last == "auto" and on_cpu)
        self.memory_format = torch.channels_last if is_channels_last else torch.contiguous_format
        self.records = cuda_graphs and not on_cpu
        self.compiles, self.uncompiled = compile, nullcontext
        if compile:
            self.uncompiled = partial(torch.compiler.set_stance, "force_eager")

    def _join_processes(self) -> None:
        here = os.environ.get("LOCAL_WORLD_SIZE", str(self.world_size))
        more = "" if here == str(self.world_size) else " ..."  # on several computers
        self.launcher = f"torchrun --nproc-per-node {here}{more}"
        if not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            # The others wait for the first process to download or read the images.
            dist.init_process_group(backend, timeout=timedelta(hours=1))
            atexit.register(leave_processes)  # else the group's threads may abort the process

    def scaler(self, enabled: bool = True) -> torch.amp.GradScaler:
        """Return a scaler of losses, which does nothing unless the precision is fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=enabled and self.is_fp16)

    def compile_cells(self, model: nn.Module) -> None:
        """With `compile`, make one graph per kind of cell when a training step first needs it.

        In the context `uncompiled()` the cells run as they were, for evaluation: its batches of
        other sizes would have to be compiled again. Compiling needs a C++ compiler on the CPU, and
        Triton on CUDA.
        """
        if self.compiles:
            torch._dynamo.config.cache_size_limit = 64  # one forward for all; 2.6 has no other name
            for cell in model.cells:
                cell.compile(dynamic=False)

    def recorded(self, *functions: Callable) -> Sequence[Callable]:
        """Return functions as they are; with `cuda_graphs` on a GPU, as `Recorded` in one pool.

        The graphs and their memory last as long as what is returned.
        """
        if not self.records:
            return functions
        pool = torch.cuda.graph_pool_handle()
        return [Recorded(function, pool) for function in functions]

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the processes, in one all-reduce."""
        if self.world_size > 1:
            tensors = list(tensors)
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(flat)
            flat /= self.world_size
            means = flat.split([tensor.numel() for tensor in tensors])
            means = [mean.view_as(t) for t, mean in zip(tensors, means, strict=True)]
            torch._foreach_copy_(tensors, means)  # one call for all

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over the processes."""
        if self.world_size > 1:
            tensor = tensor.to(self.device, copy=True)
            dist.all_reduce(tensor)
        return tensor

    def maxima(self, *values: int) -> tuple[int, ...]:
        """Return the maximum of each value over the processes."""
        if self.world_size > 1:
            tensor = torch.tensor(values, device=self.device)
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
            values = tuple(tensor.tolist())
        return values

    def from_first(self, value: Any) -> Any:
        """Return the `value` of process 0, made of plain values and tensors."""
        if self.world_size > 1:
            box = [value]
            dist.broadcast_object_list(box, src=0)
            value = box[0]
        return value

    def equalise(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the tensors of process 0."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let process 0 through before the others: it downloads files, which they then find."""
        if self.world_size > 1 and self.rank != 0:
            dist.barrier()
        yield
        if self.world_size > 1 and self.rank == 0:
            dist.barrier()

    def distribute(self, network: nn.Module, some_unused: bool = False) -> nn.Module:
        """Return a module whose backward pass averages the gradients over the processes.

        `some_unused`: some weights of `network` get no gradient.
        """
        if self.world_size == 1:
            return network
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            network, device_ids=devices, find_unused_parameters=some_unused
        )

    def without_averaging(self, model: nn.Module) -> AbstractContextManager:
        """Return a context in which backward passes only add up the gradients of this process.

        The first backward pass after the context averages what has been added up.
        """
        return model.no_sync() if self.world_size > 1 else nullcontext()


def leave_processes() -> None:
    """Leave the group of processes, unless that has been done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """Return the device, where "auto" is CUDA if there is a GPU; ValueError if it is not there.

    "auto" and "cuda" are the GPU of this process where torchrun has started several. A GPU computes
    float32 convolutions and matrix products in float32, not in TF32, and adds up those of bf16 in
    float32. On the CPU, memory that is freed stays with the process (`keep_freed_memory`).
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device {name!r}: must be cpu or cuda, with or without an index")
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device if device.index is not None else 0)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} is not there: {str(error).splitlines()[0]}") from None
    torch.backends.cudnn.allow_tf32 = False  # too coarse for the differences of Eq. 8
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensors; do nothing without glibc.

    By default large blocks go back to the system, and the pages of the next blocks must be mapped
    again. That is up to a fifth of the time of a bf16 training step (batch 128, 16 channels,
    8 cells, 2 cores).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX in malloc.h
        mallopt(trim_threshold, -1)  # never
        mallopt(mmap_max, 0)  # no block of its own


def make_deterministic() -> None:
    """Let a GPU compute the same bits each time, as the CPU does; this is slower.

    An operation that has no deterministic form raises a RuntimeError. The scripts use none that
    PyTorch lists.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)


def choose_autocast(
    amp: str, device: torch.device
) -> tuple[Callable[[], AbstractContextManager], bool]:
    """Return a maker of autocast contexts, and whether losses must be scaled (fp16).

    "auto" is bf16 on GPUs that have it (compute capability 8.0), and off elsewhere. Warns of bf16
    on a CPU without it, whose convolutions in bf16 are slower than those in float32.
    """
    if amp == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "bf16" if has_bf16 else "off"
    if amp == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        warnings.warn("--amp bf16 is slower than off on a CPU without AVX-512", stacklevel=2)
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return partial(torch.autocast, device.type, dtype, enabled=amp != "off"), amp == "fp16"


def cpu_has_bf16() -> bool:
    """Tell whether oneDNN has bf16 convolutions for this CPU: on x86 that takes AVX-512."""
    return torch.backends.cpu.get_cpu_capability() != "AVX2"
