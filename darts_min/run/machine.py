"""Where and in which precision a script computes; set up once, before the loop."""

import ctypes
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import nn

AMP_CHOICES = ("auto", "off", "bf16", "fp16")


def choose_device(name: str) -> torch.device:
    """Return the device, "auto" meaning CUDA where there is one; ValueError if it is not there.

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
    torch.backends.cudnn.allow_tf32 = False  # too coarse for Eq. 8's differences
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Let glibc keep the memory that tensors leave for the next ones; elsewhere, do nothing.

    By default large blocks go back to the system, and the next ones' pages must be mapped again: up
    to a fifth of the time of a bf16 training step (batch 128, 16 channels, 8 cells, 2 cores).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX in malloc.h
        mallopt(trim_threshold, -1)  # never
        mallopt(mmap_max, 0)  # no block of its own


def make_deterministic() -> None:
    """Let a GPU compute the same bits each time, as the CPU does; slower.

    An operation that cannot raises a RuntimeError; the scripts have none that PyTorch lists.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)


def choose_memory_format(name: str, device: torch.device) -> torch.memory_format:
    """Return channels-last for "on", and for "auto" on the CPU, where it is far faster."""
    channels_last = name == "on" or (name == "auto" and device.type == "cpu")
    return torch.channels_last if channels_last else torch.contiguous_format


def choose_autocast(
    amp: str, device: torch.device
) -> tuple[Callable[[], AbstractContextManager], bool]:
    """Return a maker of autocast contexts, and whether losses must be scaled (fp16).

    "auto" is bf16 on GPUs that have it (compute capability 8.0), and off elsewhere. Warns of bf16
    on a CPU without it, where convolutions take the slowest way.
    """
    if amp == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "bf16" if has_bf16 else "off"
    if amp == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        warnings.warn("--amp bf16 is slower than off on a CPU without AVX-512", stacklevel=2)
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return partial(torch.autocast, device.type, dtype, enabled=amp != "off"), amp == "fp16"


def cpu_has_bf16() -> bool:
    """Tell whether oneDNN has bf16 convolutions for this CPU: on x86, with AVX-512."""
    return torch.backends.cpu.get_cpu_capability() != "AVX2"


def compile_cells(model: nn.Module) -> Callable[[], AbstractContextManager]:
    """Let torch.compile make one graph per kind of cell, when a training step first needs it.

    Returns a maker of contexts in which the cells run as they were, for evaluation: its batches of
    other sizes would have to be compiled again. Needs a C++ compiler on the CPU, Triton on CUDA.
    """
    torch._dynamo.config.cache_size_limit = 64  # one forward for all; 2.6 has this name only
    for cell in model.cells:
        cell.compile(dynamic=False)
    return partial(torch.compiler.set_stance, "force_eager")
