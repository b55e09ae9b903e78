"""What the benchmarks measure with: interleaved times, bytes kept, operator calls, transfers."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


@contextmanager
def transfers() -> Iterator[Counter[str]]:
    """Count the calls in which a device and the host exchange values, by kind.

    The device is every one but the CPU; "meta" stands in for a GPU that is not there, and what is
    read from it is 1. The host waits for the device in all kinds but the first:

    - pinned copy: a copy from pinned memory that does not block
    - copy: another copy from one to the other; also a tensor made of Python numbers on the device
    - read: a Python number made of a value on the device, as by `item()` or `bool()`
    - size: an operator whose output's size depends on values on the device
    """
    counts = Counter()
    with _Operators(counts), _TensorsOfNumbers(counts):
        yield counts


class _TensorsOfNumbers(TorchFunctionMode):
    def __init__(self, counts: Counter[str]):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and not result.is_cpu:
            self.counts["copy"] += 1
        return result


class _Operators(TorchDispatchMode):
    SIZED_BY_VALUES = {"bincount", "masked_select", "nonzero", "_unique2"}

    def __init__(self, counts: Counter[str]):
        super().__init__()
        self.counts = counts
        self.pinned: list[Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name == "is_pinned":  # to pin needs a GPU: here, only remember which tensors would be
            return any(args[0] is tensor for tensor in self.pinned)
        if name == "_pin_memory":
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        if all(tensor.is_cpu for tensor in tensors) and "device" not in kwargs:
            return function(*args, **kwargs)
        if name == "_local_scalar_dense":
            self.counts["read"] += 1
            return 1
        if name in self.SIZED_BY_VALUES:
            self.counts["size"] += 1
        if name in ("_to_copy", "copy_"):
            source = tensors[-1]
            target = kwargs.get("device", tensors[0].device)
            if (source.device.type == "cpu") != (target.type == "cpu"):
                is_async = kwargs.get("non_blocking") and any(source is t for t in self.pinned)
                self.counts["pinned copy" if is_async else "copy"] += 1
                if target.type == "cpu" and source.is_meta:
                    return torch.ones_like(source, device="cpu")
        if name in ("index", "index_put_"):  # moves its indices; counts where a mask is true
            self.counts["copy"] += any(tensor.is_cpu and tensor.dim() for tensor in tensors)
            self.counts["size"] += any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
        return function(*args, **kwargs)
