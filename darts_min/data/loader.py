"""Make batches of images in memory: crop, flip, normalise and cut out on the device.

A batch is an index and a few tensor operations. There are no worker processes and no image objects
in the loop, and the code is the same on CPU and GPU.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from darts_min.data.batches import Batches, to_device
from darts_min.data.datasets import Images
from darts_min.data.folder import FileLoader, ImageFiles

PADDING = 4  # zero pixels around an image before it is cropped, as in the original code


def make_loader(
    data: Images | ImageFiles,
    batch_size: int,
    statistics: tuple[Tensor, Tensor],
    *,
    device: torch.device,
    image_size: int | None = None,
    seed: int = 0,
    augment: bool = False,
    cutout: int = 0,
    num_workers: int = 0,
    memory_format: torch.memory_format = torch.channels_last,
    shard: tuple[int, int] = (0, 1),
    crop: bool = True,
) -> "Loader | FileLoader":
    """Make the loader of images in memory, which move to `device`, or of images in files.

    Only files need `image_size`, `num_workers` and `crop`. Raises ValueError on `cutout` for files.
    """
    same = {"seed": seed, "augment": augment, "memory_format": memory_format, "shard": shard}
    if isinstance(data, Images):
        return Loader(data.to(device), batch_size, statistics, cutout=cutout, **same)
    if augment and cutout:
        raise ValueError(
            f"cutout {cutout}: must be 0 for images that are not in memory (--cutout 0)"
        )
    files = {"image_size": image_size, "num_workers": num_workers, "crop": crop}
    return FileLoader(data, batch_size, statistics, device=device, **files, **same)


class Loader:
    """Yield batches of normalised images (N, C, H, W) float32 and labels, on the data's device.

    With `augment`, for training, each epoch has a new order and leaves out the incomplete batch.
    Its images are cropped from a frame of `PADDING` zero pixels, are flipped with probability 1/2,
    and lose a square of side `cutout` pixels (0: none) with probability `cutout_prob`, an attribute
    that the caller may change. Without `augment` every image comes once, in order.

    `statistics` are the mean and the standard deviation of each channel, (C,). `seed`, `stream` and
    `shard` are those of `Batches`. Raises ValueError if no batch can be filled.
    """

    def __init__(
        self,
        data: Images,
        batch_size: int,
        statistics: tuple[Tensor, Tensor],
        *,
        seed: int = 0,
        stream: int | None = None,
        augment: bool = False,
        cutout: int = 0,
        memory_format: torch.memory_format = torch.channels_last,
        shard: tuple[int, int] = (0, 1),
    ):
        self.batches = Batches(
            len(data.labels), batch_size, seed=seed, stream=stream, shuffled=augment, shard=shard
        )
        self.images, self.labels = data.images.contiguous(), data.labels
        self.image_size = data.images.size(1)
        self.augment, self.cutout, self.cutout_prob = augment, cutout, 1.0
        self.memory_format = memory_format
        # One value per pixel and channel, (H, W, C): broadcasting over three channels is slow.
        mean, std = (s.to(self.images.device).expand(self.images.shape[1:]) for s in statistics)
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def epoch(self, number: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, from `first_batch` on."""
        for index, generator in self.batches.epoch(number, first_batch):
            draws = self.draw(len(index), generator) if self.augment else []
            index, *draws = to_device([index, *draws], self.labels.device)
            if self.augment:
                yield self.augmented(index, *draws), self.labels[index]
            else:
                yield self.normalise(self.images[index]), self.labels[index]

    def normalise(self, images: Tensor) -> Tensor:
        """Map images (N, H, W, C) uint8 to (N, C, H, W) float32: (images / 255 - mean) / std."""
        x = torch.addcmul(self.shift, images.float(), self.scale).permute(0, 3, 1, 2)
        return x.contiguous(memory_format=self.memory_format)

    def draw(self, n: int, generator: torch.Generator) -> list[Tensor]:
        """Draw what `augmented` takes, each (n,), on the CPU: the same numbers on every device."""

        def below(low: int, high: int) -> Tensor:
            return torch.randint(low, high, (n,), generator=generator)

        moves = [below(-PADDING, PADDING + 1), below(-PADDING, PADDING + 1), below(0, 2)]
        if not self.cutout:
            return moves
        hole = [below(0, size) for size in self.images.shape[1:3]]
        return [*moves, *hole, torch.rand(n, generator=generator) < self.cutout_prob]

    def augmented(
        self, index: Tensor, top: Tensor, left: Tensor, flip: Tensor, *hole: Tensor
    ) -> Tensor:
        """Crop, flip, normalise and cut out the images at `index`: (N, C, H, W) float32.

        All arguments are (N,). `hole`, with cutout: its centre, and whether there is one.
        """
        x = self.normalise(crop_and_flip(self.images, index, top, left, flip.bool()))
        if self.cutout:
            cy, cx, is_cut = hole
            mask = cutout_mask(cy, cx, *self.images.shape[1:3], self.cutout)
            x *= torch.where(is_cut.bool()[:, None, None, None], mask, 1)
        return x


def crop_and_flip(images: Tensor, index: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Return `images[index]`, each moved by (top, left) pixels, then mirrored where `flip`.

    `images` is (M, H, W, C) uint8, contiguous; the other arguments are (N,); the result is
    (N, H, W, C). Pixels from outside an image are 0. One gather takes whole pixels: indexing with
    three tensors takes five times longer.
    """
    h, w, c = images.shape[1:]
    columns = torch.arange(w, device=images.device)
    columns = torch.where(flip[:, None], w - 1 - columns, columns) + left[:, None]
    rows = torch.arange(h, device=images.device) + top[:, None]
    inside = ((rows >= 0) & (rows < h))[:, :, None] & ((columns >= 0) & (columns < w))[:, None, :]
    rows = rows.clamp(0, h - 1) + index[:, None] * h
    pixels = rows[:, :, None] * w + columns.clamp(0, w - 1)[:, None, :]
    cropped = images.view(-1, c).index_select(0, pixels.flatten()).view(-1, h, w, c)
    return cropped * inside[..., None]


def cutout_mask(cy: Tensor, cx: Tensor, height: int, width: int, length: int) -> Tensor:
    """Return masks (N, 1, H, W) that are 0 in a square around (cy, cx) (arXiv 1708.04552).

    The square covers [c - length // 2, c + length // 2) and may reach over the border.
    """
    half = length // 2

    def covered(centre: Tensor, size: int) -> Tensor:
        distance = torch.arange(size, device=centre.device) - centre[:, None]
        return (distance >= -half) & (distance < half)

    hole = covered(cy, height)[:, :, None] & covered(cx, width)[:, None, :]
    return (~hole)[:, None].float()
