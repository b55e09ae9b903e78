"""What the benchmarks measure with: interleaved times, bytes kept for backward, operator calls."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that only make a view, an alias or an uninitialised tensor.
FREE = {
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "as_strided",
    "detach",
    "empty",
    "expand",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
}


def interleaved_seconds(
    ours: Callable[[], object], other: Callable[[], object], repetitions: int
) -> tuple[float, float, float]:
    """Run the two in turn; return the median seconds of each, and the median ratio ours/other."""
    pairs = []
    for repetition in range(repetitions + 1):
        start = time.perf_counter()
        ours()
        middle = time.perf_counter()
        other()
        end = time.perf_counter()
        if repetition:  # the first one warms up
            pairs.append((middle - start, end - middle))
    ratio = statistics.median(a / b for a, b in pairs)
    return *(statistics.median(times) for times in zip(*pairs, strict=True)), ratio


def kept_bytes(model: nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Return the bytes that autograd keeps for the backward of `forward()`, without parameters.

    Storages are counted once, however many views of them are kept.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # keeping an operator's own output would be a reference cycle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(kept.values())


class OperatorCalls(TorchDispatchMode):
    """Count ATen operators as they reach the dispatcher: all, and those that compute."""

    def __init__(self):
        super().__init__()
        self.all = self.computing = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.all += 1
        self.computing += function.overloadpacket.__name__ not in FREE
        return function(*args, **(kwargs or {}))


def operator_calls(step: Callable[[], object]) -> tuple[int, int]:
    with OperatorCalls() as calls:
        step()
    return calls.all, calls.computing
