"""Datasets in memory, and batched augmentation on the device.

A dataset is one uint8 tensor (N, H, W, C) and its labels. A batch is an index and a few tensor
operations: no worker processes, no image objects in the loop, the same code on CPU and GPU.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from darts_min.data.batches import Batches
from darts_min.data.folder import (
    IMAGENET_STATISTICS,
    FileLoader,
    ImageFiles,
    find_files,
    fits_in_memory,
    read_image,
)

DATASETS = ("cifar10", "cifar100", "svhn", "fashion-mnist", "folder", "synthetic")
IN_MEMORY = ("auto", "always", "never")


class Images(NamedTuple):
    """Images (N, H, W, C) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Images":
        return Images(self.images.to(device), self.labels.to(device))

    def take(self, index: Tensor) -> "Images":
        return Images(self.images[index], self.labels[index])

    @property
    def channels(self) -> int:
        return self.images.size(3)


class Dataset(NamedTuple):
    train: Images | ImageFiles
    test: Images | ImageFiles
    classes: list[str]


def load_dataset(
    name: str,
    data_dir: str | Path = "data",
    image_size: int | None = None,
    seed: int = 0,
    in_memory: str = "always",
    device: torch.device = torch.device("cpu"),  # noqa: B008
    crop: bool = False,
) -> Dataset:
    """Load a dataset into memory; the torchvision ones are downloaded to `data_dir` if missing.

    `folder` reads `data_dir/train/<class>/*` and `data_dir/test/<class>/*`. Images are resized to
    `image_size` squares where given; otherwise a folder's images must all have one size. With
    `in_memory` "never", or "auto" where they do not fit in the memory of the machine and of
    `device`, a folder's images stay in their files; `crop`: see `folder.read_image`. `seed` makes
    the `synthetic` one. Raises ValueError on anything a user can set right.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset {name!r} is not one of {', '.join(DATASETS)}")
    if image_size is not None and image_size < 8:
        raise ValueError(f"image size {image_size}: must be at least 8")
    if name == "synthetic":
        return synthetic_dataset(seed, image_size or 32)
    if name == "folder":
        return _folder_dataset(Path(data_dir), image_size, in_memory, device, crop)
    return _torchvision_dataset(name, Path(data_dir), image_size)


def split_half(data: Images, generator: torch.Generator) -> tuple[Images, Images]:
    """Split at random 1:1 into the part that trains w and the part that trains alpha (A.1.1)."""
    order = torch.randperm(len(data.labels), generator=generator)
    half = len(order) // 2
    return data.take(order[:half]), data.take(order[half:])


def balanced_subset(
    data: Images | ImageFiles, size: int, generator: torch.Generator
) -> Images | ImageFiles:
    """Take `size` random images, equally many of each class up to one."""
    if not 0 < size <= len(data.labels):
        raise ValueError(f"subset {size}: must be in 1..{len(data.labels)}, the number of images")
    order = torch.randperm(len(data.labels), generator=generator)
    labels = data.labels[order]
    # The rank of each image within its class; taking the lowest ranks is class-balanced.
    rank = torch.empty_like(labels)
    for label in labels.unique():
        members = labels == label
        rank[members] = torch.arange(int(members.sum()))
    chosen = rank.argsort(stable=True)[:size]
    return data.take(order[chosen])


def channel_statistics(data: Images | ImageFiles) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, (C,), of images scaled to [0, 1].

    For images that are not in memory, those of ImageNet.
    """
    if isinstance(data, ImageFiles):
        return IMAGENET_STATISTICS
    histogram = torch.stack(
        [torch.bincount(channel.flatten(), minlength=256) for channel in data.images.unbind(3)]
    ).double()
    values = torch.arange(256, dtype=torch.float64, device=histogram.device) / 255
    probability = histogram / histogram.sum(1, keepdim=True)
    mean = probability @ values
    variance = probability @ values.square() - mean.square()
    return mean.float(), variance.clamp_min(1e-12).sqrt().float()


def make_loader(
    data: Images | ImageFiles,
    batch_size: int,
    statistics: tuple[Tensor, Tensor],
    device: torch.device,
    image_size: int | None = None,
    key: tuple[int, ...] = (),
    augment: bool = False,
    cutout: int = 0,
    num_workers: int = 0,
    memory_format: torch.memory_format = torch.channels_last,
    shard: tuple[int, int] = (0, 1),
    crop: bool = True,
) -> "Loader | FileLoader":
    """Make the loader for images in memory, which are moved to `device`, or for files."""
    if isinstance(data, Images):
        data = data.to(device)
        return Loader(data, batch_size, statistics, key, augment, 4, cutout, memory_format, shard)
    if augment and cutout:
        raise ValueError(
            f"cutout {cutout}: must be 0 for images that are not in memory (--cutout 0)"
        )
    return FileLoader(
        data,
        batch_size,
        statistics,
        image_size,
        device,
        key,
        augment,
        num_workers,
        memory_format,
        shard,
        crop,
    )


class Loader:
    """Batches of normalised images (N, C, H, W) float32 and labels, made on the data's device.

    For training (`augment`) the order is shuffled anew in each epoch, incomplete batches are
    dropped, and images are cropped from a frame of `padding` zero pixels, flipped, and lose a
    square of side `cutout` (0: none) with probability `cutout_prob` (an attribute, to be
    scheduled), all by random numbers of `key`, a seed; otherwise every image comes once, in order.
    `shard` is (rank, number of processes): each process gets batches of its own. Raises ValueError
    where not a single batch can be filled.
    """

    def __init__(
        self,
        data: Images,
        batch_size: int,
        statistics: tuple[Tensor, Tensor],
        key: tuple[int, ...] = (),
        augment: bool = False,
        padding: int = 4,
        cutout: int = 0,
        memory_format: torch.memory_format = torch.channels_last,
        shard: tuple[int, int] = (0, 1),
    ):
        self.batches = Batches(len(data.labels), batch_size, key, augment, shard)
        self.data = data
        self.image_size = data.images.size(1)
        self.augment, self.padding, self.cutout = augment, padding, cutout
        self.cutout_prob = 1.0
        self.memory_format = memory_format
        # One value per pixel and channel, (H, W, C): broadcasting over three channels is slow.
        mean, std = (s.to(data.images.device).expand(data.images.shape[1:]) for s in statistics)
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def epoch(self, number: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the batches of an epoch, from `first_batch` on."""
        device = self.data.labels.device
        for index, generator in self.batches.epoch(number, first_batch):
            index = index.to(device)
            if self.augment:
                yield self.augmented(index, generator), self.data.labels[index]
            else:
                yield self.normalise(self.data.images[index]), self.data.labels[index]

    def normalise(self, images: Tensor) -> Tensor:
        """Map (N, H, W, C) uint8 to (N, C, H, W) float32."""
        x = torch.addcmul(self.shift, images.float(), self.scale).permute(0, 3, 1, 2)
        return x.contiguous(memory_format=self.memory_format)

    def augmented(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Crop, flip, normalise and cut out the images at `index`: (N, C, H, W) float32."""
        n, (h, w) = len(index), self.data.images.shape[1:3]
        draw, device = {"generator": generator}, index.device
        top, left = (torch.randint(-self.padding, self.padding + 1, (n,), **draw) for _ in "yx")
        flip = torch.randint(2, (n,), **draw).bool()
        shifts = (t.to(device) for t in (top, left, flip))
        x = self.normalise(crop_and_flip(self.data.images, index, *shifts))
        if self.cutout:
            centre = (torch.randint(size, (n,), **draw).to(device) for size in (h, w))
            mask = cutout_mask(*centre, h, w, self.cutout)
            if self.cutout_prob < 1:
                spared = torch.rand(n, **draw) >= self.cutout_prob
                mask = torch.where(spared.to(device)[:, None, None, None], 1, mask)
            x *= mask
        return x


def crop_and_flip(images: Tensor, index: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Return `images[index]`, each moved by (top, left) pixels, then mirrored where `flip`.

    images: (M, H, W, C) uint8; the other arguments (N,); returns (N, H, W, C). Pixels from outside
    an image are 0. One gather of whole pixels: indexing with three tensors takes five times longer.
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
    """Return (N, 1, H, W) masks that are 0 in a square around (cy, cx) (arXiv 1708.04552).

    The square covers [c - length // 2, c + length // 2) and may reach over the border.
    """
    half = length // 2

    def covered(centre: Tensor, size: int) -> Tensor:
        distance = torch.arange(size, device=centre.device) - centre[:, None]
        return (distance >= -half) & (distance < half)

    hole = covered(cy, height)[:, :, None] & covered(cx, width)[:, None, :]
    return (~hole)[:, None].float()


def synthetic_dataset(
    seed: int, image_size: int = 32, train_per_class: int = 400, test_per_class: int = 100
) -> Dataset:
    """Make 10 classes of textures that a linear model cannot tell apart, but a small conv net can.

    A class is a slope and a frequency of stripes, with random phase, colour, noise and mirroring:
    a flip changes no class. Every image comes with its negative, so that the mean image of every
    class is the same grey.
    """
    rng = np.random.default_rng(seed)
    angles = np.repeat(np.arange(5) * np.pi / 8, 2)
    frequencies = np.tile([0.12, 0.25], 5)  # cycles per pixel
    y, x = np.mgrid[:image_size, :image_size].astype(np.float32)

    def make(per_class: int) -> Images:
        labels = np.repeat(np.arange(10), per_class // 2)
        n = len(labels)
        angle = angles[labels] + rng.normal(0, 0.08, n)
        frequency = frequencies[labels] * rng.uniform(0.9, 1.1, n)
        phase = rng.uniform(0, 2 * np.pi, n)
        mirror = rng.choice((-1, 1), n)
        u = (mirror * np.cos(angle))[:, None, None] * x + np.sin(angle)[:, None, None] * y
        stripes = np.sin(2 * np.pi * frequency[:, None, None] * u + phase[:, None, None])
        colour = rng.uniform(-1, 1, (n, 1, 1, 3)) * 0.35
        images = 0.5 + colour * stripes[..., None] + rng.normal(0, 0.15, (n, *x.shape, 3))
        images = np.round(images.clip(0, 1) * 255).astype(np.uint8)
        images, labels = np.concatenate([images, 255 - images]), np.tile(labels, 2)
        return Images(torch.from_numpy(images), torch.from_numpy(labels))

    return Dataset(make(train_per_class), make(test_per_class), [str(i) for i in range(10)])


def _torchvision_dataset(name: str, root: Path, image_size: int | None) -> Dataset:
    from torchvision import datasets  # slow to import, and not needed for the other datasets

    make = {
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
        "svhn": datasets.SVHN,
        "fashion-mnist": datasets.FashionMNIST,
    }[name]
    parts = []
    for train in (True, False):
        select = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
        try:
            parts.append(make(root, download=True, **select))
        except ImportError as error:  # scipy, for svhn
            raise ValueError(f"dataset {name} needs {error.name}: pip install it") from None
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"dataset {name} could not be downloaded to {root} ({reason}); put its files "
                "there, or use --dataset folder --data-dir DIR, or --dataset synthetic"
            ) from None
    images = []
    for part in parts:
        array = np.asarray(part.data)
        array = array.transpose(0, 2, 3, 1) if name == "svhn" else array
        array = array[..., None] if array.ndim == 3 else array
        if image_size is not None and array.shape[1] != image_size:
            array = np.stack([_resize(image, image_size) for image in array])
        labels = part.labels if name == "svhn" else part.targets
        images.append(
            Images(torch.from_numpy(np.ascontiguousarray(array)), torch.as_tensor(labels).long())
        )
    classes = getattr(parts[0], "classes", [str(i) for i in range(10)])
    return Dataset(*images, list(classes))


def _resize(array: np.ndarray, size: int) -> np.ndarray:
    image = Image.fromarray(array.squeeze()).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(size, size, array.shape[2])


def _folder_dataset(
    root: Path, image_size: int | None, in_memory: str, device: torch.device, crop: bool
) -> Dataset:
    train, test, classes = find_files(root)
    num_images = len(train.labels) + len(test.labels)
    if in_memory == "auto":
        size = image_size or read_image(train.paths[0]).shape[0]
        in_memory = "always" if fits_in_memory(num_images, size, device) else "never"
    if in_memory == "never":
        if image_size is None:
            raise ValueError(f"folder {root}: images that are not in memory need --image-size")
        return Dataset(train, test, classes)
    size, parts = None, []
    for files in (train, test):
        images = []
        for path in files.paths:
            image = read_image(path, image_size, crop)
            size = size or image.shape[1::-1]  # (W, H)
            if image.shape[1::-1] != size:
                raise ValueError(
                    f"image {path} is {image.shape[1]}x{image.shape[0]}, others are "
                    f"{size[0]}x{size[1]}; give --image-size"
                )
            images.append(image)
        if size[0] != size[1]:
            raise ValueError(
                f"images of {root} are {size[0]}x{size[1]}, not square; give --image-size"
            )
        parts.append(Images(torch.from_numpy(np.stack(images)), files.labels))
    return Dataset(*parts, classes)
