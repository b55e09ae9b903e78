"""Which images come in which batch, with which random numbers.

All of it depends on a seed, the epoch and the batch's place in it alone, not on what was drawn
before. So a run may stop and go on at any batch, on any number of workers, and processes that share
an epoch need not speak to each other.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def generator_of(*key: int) -> torch.Generator:
    """Return a generator on the CPU whose numbers depend on `key` alone."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


class Batches:
    """The indices of each batch of an epoch, and the generator of what is random in it.

    Both depend on `key` and the batch's place only. Shuffled ones leave the incomplete batch out;
    the others give every index once, in order. `shard` is (rank, number of processes): the batches
    go round the processes, of shuffled ones equally many to each.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        key: tuple[int, ...],
        shuffled: bool,
        shard: tuple[int, int],
    ):
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size}: must be at least 1")
        if shuffled and batch_size * shard[1] > num_items:
            of = "" if shard[1] == 1 else f" of {shard[1]} processes"
            raise ValueError(
                f"batch size {batch_size}{of} is larger than the {num_items} images it draws on"
            )
        self.num_items, self.batch_size, self.key = num_items, batch_size, key
        self.shuffled, (self.rank, self.world_size) = shuffled, shard

    def __len__(self) -> int:
        if self.shuffled:
            return self.num_items // (self.batch_size * self.world_size)
        batches = -(-self.num_items // self.batch_size)
        return len(range(self.rank, batches, self.world_size))

    def epoch(self, number: int, first_batch: int) -> Iterator[tuple[Tensor, torch.Generator]]:
        order = torch.arange(self.num_items)
        if self.shuffled:
            order = torch.randperm(self.num_items, generator=generator_of(*self.key, number, 0))
        for batch in range(first_batch, len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            index = order[start : start + self.batch_size]
            yield index, generator_of(*self.key, number, 1 + batch, self.rank)
