"""Choose the images of each batch, and make the random numbers of each batch.

Both depend on the seed, the epoch and the place of the batch in its epoch alone. So a run may stop
and resume at any batch, with any number of workers, and processes that share an epoch need not
exchange messages.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


def generator_of(*key: int) -> torch.Generator:
    """Return a generator on the CPU whose numbers depend on `key` alone."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


def to_device(tensors: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Move tensors of whole numbers, each (N,), to `device`; bool may become int64.

    A GPU gets all of them in one copy from pinned memory, so that neither side waits.
    """
    if device.type == "cpu":
        return tensors
    return torch.stack(tensors).pin_memory().to(device, non_blocking=True).unbind()


class Batches:
    """Choose the indices of each batch of an epoch, and make a generator for each batch.

    `shuffled` batches come in a new order in each epoch, without the incomplete batch. Other
    batches give every index once, in order. Loaders that share a `seed` differ in their `stream`.
    `shard` is (rank, number of processes): the processes take turns at the batches, and each gets
    equally many of the shuffled ones. Raises ValueError if no batch can be filled.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        *,
        seed: int = 0,
        stream: int | None = None,
        shuffled: bool = False,
        shard: tuple[int, int] = (0, 1),
    ):
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size}: must be at least 1")
        if shuffled and batch_size * shard[1] > num_items:
            of = "" if shard[1] == 1 else f" of {shard[1]} processes"
            raise ValueError(
                f"batch size {batch_size}{of} is larger than the {num_items} images it draws on"
            )
        self.num_items, self.batch_size = num_items, batch_size
        self.key = (seed,) if stream is None else (seed, stream)
        self.shuffled, (self.rank, self.world_size) = shuffled, shard

    def __len__(self) -> int:
        if self.shuffled:
            return self.num_items // (self.batch_size * self.world_size)
        batches = -(-self.num_items // self.batch_size)
        return len(range(self.rank, batches, self.world_size))

    def epoch(self, number: int, first_batch: int) -> Iterator[tuple[Tensor, torch.Generator]]:
        """Yield the indices (batch_size,) and the generator of each batch from `first_batch` on."""
        order = torch.arange(self.num_items)
        if self.shuffled:
            order = torch.randperm(self.num_items, generator=generator_of(*self.key, number, 0))
        for batch in range(first_batch, len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            index = order[start : start + self.batch_size]
            yield index, generator_of(*self.key, number, 1 + batch, self.rank)
