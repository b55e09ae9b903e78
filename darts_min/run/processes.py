"""The processes of a run: torchrun starts several, which train one model on parts of the data."""

import atexit
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Processes:
    """Who this process is, and what all of them do together; alone, every method does nothing.

    torchrun tells by RANK and WORLD_SIZE. Every method must be called by all processes, in the same
    order. `shard` is (rank, number of processes).
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.shard = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.rank, self.number = self.shard
        self.launcher = "python"  # what this process was started with, for the user
        if self.number > 1:
            here = os.environ.get("LOCAL_WORLD_SIZE", str(self.number))
            more = "" if here == str(self.number) else " ..."  # on several machines
            self.launcher = f"torchrun --nproc-per-node {here}{more}"
        if self.number > 1 and not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            # The others wait for the first one to download or read the images.
            dist.init_process_group(backend, timeout=timedelta(hours=1))
            atexit.register(leave)  # else the group's threads may abort the process

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the processes, in one all-reduce."""
        if self.number > 1:
            tensors = list(tensors)
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(flat)
            flat /= self.number
            parts = flat.split([tensor.numel() for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over the processes."""
        if self.number > 1:
            tensor = tensor.to(self.device, copy=True)
            dist.all_reduce(tensor)
        return tensor

    def largest(self, *values: int) -> tuple[int, ...]:
        """Return, for each value, the largest that a process has."""
        if self.number > 1:
            tensor = torch.tensor(values, device=self.device)
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
            values = tuple(tensor.tolist())
        return values

    def from_first(self, value: Any) -> Any:
        """Return what `value` is in process 0: plain values and tensors."""
        if self.number > 1:
            box = [value]
            dist.broadcast_object_list(box, src=0)
            value = box[0]
        return value

    def equalise(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the tensors of process 0."""
        if self.number > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let process 0 through before the others: it downloads, they find the files there."""
        if self.number > 1 and self.rank != 0:
            dist.barrier()
        yield
        if self.number > 1 and self.rank == 0:
            dist.barrier()

    def without_averaging(self, model: nn.Module) -> AbstractContextManager:
        """Return a context whose backward passes leave that to the first one after it."""
        return model.no_sync() if self.number > 1 else nullcontext()

    def wrap(self, network: nn.Module, some_unused: bool = False) -> nn.Module:
        """Return a module that averages the gradients of `network` over the processes.

        `some_unused`: whether some of its weights get none.
        """
        if self.number == 1:
            return network
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            network, device_ids=devices, find_unused_parameters=some_unused
        )


def leave() -> None:
    """Leave the group of processes, if that has not been done."""
    if dist.is_initialized():
        dist.destroy_process_group()
