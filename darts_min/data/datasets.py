"""Load datasets: from torchvision, a .npz file, a folder of images, or made up.

A dataset in memory is one uint8 tensor (N, H, W, C) and its labels (N,). Images of a folder may
also stay in their files (`folder.py`).
"""

import operator
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from darts_min.data.folder import (
    GREY,
    IMAGENET_STATISTICS,
    ImageFiles,
    find_files,
    fits_in_memory,
    is_grey,
    memory_of,
    read_image,
)

DATASETS = ("cifar10", "cifar100", "svhn", "fashion-mnist", "folder", "npz", "synthetic")
IN_MEMORY = ("auto", "always", "never")
CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Images:
    """Hold images (N, H, W, C) uint8 and labels (N,) int64 on one device.

    Raises ValueError on another type or shape, and says what was given and what is wanted.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self):
        for name, x, dtype, dims, wanted in (
            ("images", self.images, torch.uint8, 4, "uint8 (N, H, W, C)"),
            ("labels", self.labels, torch.int64, 1, "int64 (N,)"),
        ):
            if not isinstance(x, Tensor):
                raise ValueError(f"{name}: {type(x).__name__}; wanted is a tensor, {wanted}")
            if x.dtype != dtype or x.dim() != dims:
                raise ValueError(f"{name}: {_described(x)}; wanted is {wanted}")
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images, but {len(self.labels)} labels")
        if self.images.device != self.labels.device:
            raise ValueError(f"images on {self.images.device}, labels on {self.labels.device}")

    def to(self, device: torch.device) -> "Images":
        return Images(self.images.to(device), self.labels.to(device))

    def take(self, index: Tensor) -> "Images":
        return Images(self.images[index], self.labels[index])

    @property
    def channels(self) -> int:
        return self.images.size(3)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Hold the training images, the test images and the names of the classes.

    `notes` are sentences that the user should read once. Raises ValueError unless both parts have
    images of the same square shape, and labels in 0..len(classes) - 1.
    """

    train: Images | ImageFiles
    test: Images | ImageFiles
    classes: list[str]
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        if len(self.classes) < 2:
            raise ValueError(f"classes: {len(self.classes)}; wanted are two or more")
        for name, part in (("train", self.train), ("test", self.test)):
            if len(part.labels) == 0:
                raise ValueError(f"{name}: no images")
            low, high = int(part.labels.min()), int(part.labels.max())
            if low < 0 or high >= len(self.classes):
                raise ValueError(
                    f"{name}: labels in {low}..{high}; wanted are 0..{len(self.classes) - 1}, "
                    f"for {len(self.classes)} classes"
                )
        if self.train.channels != self.test.channels:
            raise ValueError(
                f"train: {self.train.channels} channels, test: {self.test.channels}; wanted is one "
                "number"
            )
        parts = [part for part in (self.train, self.test) if isinstance(part, Images)]
        sizes = sorted({tuple(part.images.shape[1:3]) for part in parts})
        if len(sizes) > 1 or any(height != width for height, width in sizes):
            given = " and ".join(f"{width}x{height}" for height, width in sizes)
            raise ValueError(f"images of {given} pixels; wanted is one square size (--image-size)")


def _described(array: Tensor | np.ndarray) -> str:
    """Return type and shape, for example "float32 (8, 3, 32, 32)"."""
    return f"{str(array.dtype).removeprefix('torch.')} {tuple(array.shape)}"


def load_dataset(
    name: str,
    data_dir: str | Path = "data",
    image_size: int | None = None,
    seed: int = 0,
    in_memory: str = "always",
    device: torch.device = CPU,
    crop: bool = False,
    *,
    channels: int | None = None,
) -> Dataset:
    """Load a dataset: its training images, its test images and the names of its classes.

    torchvision downloads its datasets to `data_dir` if they are not there. `folder` reads
    `data_dir/train/<class>/*` and `data_dir/test/<class>/*`. `npz` reads the file `data_dir`: see
    `npz_dataset`. `synthetic` is made from `seed`. Images are resized to squares of `image_size`
    pixels; with None they keep their size, which must be one square for all.

    Only for `folder`: `in_memory` "never" leaves the images in their files. "auto" does so if they
    would take more than a quarter of the memory of the machine or of `device`. "always" raises
    ValueError if they would take more than half. `crop`: see `read_image`. `channels` is 3 (RGB;
    None means 3) or 1 (grey).

    Raises ValueError, one line, on anything that a user can set right.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset {name!r} is not one of {', '.join(DATASETS)}")
    if image_size is not None and image_size < 8:
        raise ValueError(f"image size {image_size}: must be at least 8")
    if channels is not None and name != "folder":
        raise ValueError(f"channels {channels}: only for the dataset folder, not for {name}")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels {channels}: must be 1 (grey) or 3 (RGB)")
    if name == "synthetic":
        return synthetic_dataset(seed, image_size or 32)
    if name == "folder":
        return folder_dataset(Path(data_dir), image_size, in_memory, device, crop, channels)
    if name == "npz":
        return npz_dataset(Path(data_dir), image_size)
    return torchvision_dataset(name, Path(data_dir), image_size)


def split_half(data: Images, generator: torch.Generator) -> tuple[Images, Images]:
    """Split at random 1:1 into the half that trains w and the half that trains alpha (A.1.1)."""
    order = torch.randperm(len(data.labels), generator=generator)
    half = len(order) // 2
    return data.take(order[:half]), data.take(order[half:])


def balanced_subset(
    data: Images | ImageFiles, size: int, generator: torch.Generator
) -> Images | ImageFiles:
    """Take `size` random images, equally many of each class, up to one.

    A class with too few images gives all that it has. Raises ValueError on an impossible `size`.
    """
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

    For images in files they are those of ImageNet. For grey files they are weighted as Pillow
    weights the channels of a picture that becomes grey.
    """
    if isinstance(data, ImageFiles):
        if data.channels == 3:
            return IMAGENET_STATISTICS
        mean, std = (s @ GREY for s in IMAGENET_STATISTICS)
        return mean[None], std[None]
    histogram = torch.stack(
        [torch.bincount(channel.flatten(), minlength=256) for channel in data.images.unbind(3)]
    ).double()
    values = torch.arange(256, dtype=torch.float64, device=histogram.device) / 255
    probability = histogram / histogram.sum(1, keepdim=True)
    mean = probability @ values
    variance = probability @ values.square() - mean.square()
    std = torch.where(variance > 1e-12, variance, 1.0).sqrt()  # of a constant channel: 1
    return mean.float(), std.float()


def images_of(dataset: torch.utils.data.Dataset) -> Images:
    """Read every (picture, label) of a torch dataset once.

    A picture is a PIL image (RGB or L), an array (H, W) or (H, W, C), or a tensor (C, H, W), as in
    torchvision. It is uint8, or it is float32 or float64 with values k / 255, as ToTensor makes
    them; other floats are refused, because the loader normalises by itself. Leave random transforms
    out: the loader crops and flips anew in each epoch. Raises ValueError that names the item.
    """
    images, labels = [], []
    for i in range(len(dataset)):
        item = dataset[i]
        try:
            picture, label = item
            images.append(_bytes_of(picture))
            labels.append(operator.index(label))
        except (TypeError, ValueError) as error:
            raise ValueError(f"item {i} is not a picture and an integer: {error}") from None
        if images[i].shape != images[0].shape:
            shapes = tuple(images[i].shape), tuple(images[0].shape)
            raise ValueError(
                f"item {i} is {shapes[0]}, item 0 is {shapes[1]}: (H, W, C) must agree"
            )
    if not images:
        raise ValueError("the dataset has no items")
    return Images(torch.stack(images), torch.tensor(labels))


def _bytes_of(picture: Image.Image | np.ndarray | Tensor) -> Tensor:
    """Return a picture of `images_of` as (H, W, C) uint8."""
    if isinstance(picture, Image.Image) and picture.mode not in ("L", "RGB"):
        raise ValueError(f"PIL image of mode {picture.mode}; wanted is RGB or L")
    if isinstance(picture, Tensor):
        x = picture.permute(1, 2, 0) if picture.dim() == 3 else picture
    else:
        x = torch.tensor(np.array(picture))
        x = x[..., None] if x.dim() == 2 else x
    if x.dim() != 3 or x.dtype not in (torch.uint8, torch.float32, torch.float64):
        raise ValueError(f"picture of {_described(x)}; wanted is uint8, in three dimensions")
    if x.dtype == torch.uint8:
        return x
    levels = (x * 255).round().clamp(0, 255)
    if not ((levels / 255 - x).abs() < 1e-6).all():  # rounding errors are smaller
        raise ValueError("its floats are not k / 255; leave the normalisation out")
    return levels.to(torch.uint8)


def synthetic_dataset(
    seed: int, image_size: int = 32, train_per_class: int = 400, test_per_class: int = 100
) -> Dataset:
    """Make 10 classes of textures that a small conv net can tell apart, but a linear model cannot.

    A class is a slope and a frequency of stripes. Phase, colour, noise and mirroring are random, so
    that a flip changes no class. Every image comes with its negative, so that the mean image of
    every class is the same grey.
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


def torchvision_dataset(name: str, root: Path, image_size: int | None) -> Dataset:
    """Load a dataset of torchvision from `root`; download it if its files are missing."""
    from torchvision import datasets  # slow to import, and not needed for the other datasets

    make = {
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
        "svhn": datasets.SVHN,
        "fashion-mnist": datasets.FashionMNIST,
    }[name]
    parts, images = [], []
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
    for part in parts:
        array = np.asarray(part.data)
        array = array.transpose(0, 2, 3, 1) if name == "svhn" else array
        labels = part.labels if name == "svhn" else part.targets
        images.append(_images(array, np.asarray(labels), image_size))
    classes = getattr(parts[0], "classes", [str(i) for i in range(10)])
    return Dataset(*images, list(classes))


def npz_dataset(file: Path, image_size: int | None) -> Dataset:
    """Load a .npz file of numpy: x_train, y_train, x_test, y_test and, if present, classes.

    Images are uint8 (N, H, W) or (N, H, W, C), with any number of channels. Labels are integers
    (N,) or (N, 1). `classes` is an array of the names, str (K,). Without it the training labels
    must be 0..K - 1, each at least once. Raises ValueError that names the file and the array.
    """
    arrays = _read_npz(file)

    def require(is_met: bool, name: str, wanted: str) -> None:
        if not is_met:
            raise ValueError(f"npz {file}: {name} is {_described(arrays[name])}; wanted {wanted}")

    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        shapes = "is uint8 (N, H, W) or (N, H, W, C)"
        require(x.dtype == np.uint8 and x.ndim in (3, 4), f"x_{part}", shapes)
        require(x.size > 0 and min(x.shape[1:3]) >= 8, f"x_{part}", f"{shapes}, H and W at least 8")
        is_vector = y.shape in ((len(x),), (len(x), 1))
        require(y.dtype.kind in "iu" and is_vector, f"y_{part}", f"are integers ({len(x)},)")
    if "classes" in arrays:
        classes = arrays["classes"]
        require(classes.dtype.kind == "U" and classes.ndim == 1, "classes", "is str (K,)")
    else:
        classes = np.unique(arrays["y_train"])
        if not np.array_equal(classes, np.arange(len(classes))):
            raise ValueError(
                f"npz {file}: y_train has {len(classes)} labels in {classes[0]}..{classes[-1]}; "
                f"wanted are 0..{len(classes) - 1}, or an array `classes` with the name of each"
            )
    try:
        train, test = (
            _images(arrays[f"x_{part}"], arrays[f"y_{part}"].reshape(-1), image_size)
            for part in ("train", "test")
        )
        return Dataset(train, test, [str(name) for name in classes])
    except ValueError as error:
        raise ValueError(f"npz {file}: {error}") from None


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    if not os.path.isfile(file):  # False, too, where the system refuses the path
        raise ValueError(f"npz {file} is not a file; wanted is --data-dir FILE.npz")
    if not zipfile.is_zipfile(file):
        raise ValueError(f"npz {file} is damaged, or not in the format that numpy.savez writes")
    needed, arrays, name = ("x_train", "y_train", "x_test", "y_test"), {}, "its list of arrays"
    try:
        with np.load(file, allow_pickle=False) as archive:
            for name in (*needed, "classes"):
                if name in archive:
                    arrays[name] = np.asarray(archive[name])
    except Exception as error:  # numpy raises whatever a damaged file leads it to
        reason = str(error).partition("\n")[0]
        raise ValueError(f"npz {file}: {name} cannot be read: {reason}") from None
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise ValueError(f"npz {file}: no {', '.join(missing)}; wanted are {', '.join(needed)}")
    return arrays


def _images(array: np.ndarray, labels: np.ndarray, image_size: int | None) -> Images:
    """Make `Images` of uint8 (N, H, W) or (N, H, W, C), resized to squares of `image_size`."""
    array = array[..., None] if array.ndim == 3 else array
    if image_size is not None and array.shape[1:3] != (image_size, image_size):
        array = np.stack([_resize(image, image_size) for image in array])
    labels = torch.from_numpy(labels.astype(np.int64))
    return Images(torch.from_numpy(np.ascontiguousarray(array)), labels)


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resize each channel of (H, W, C) uint8 to a square of `size` pixels."""
    channels = [Image.fromarray(channel) for channel in np.moveaxis(image, 2, 0)]
    return np.stack([c.resize((size, size), Image.Resampling.BILINEAR) for c in channels], 2)


def folder_dataset(
    root: Path,
    image_size: int | None,
    in_memory: str,
    device: torch.device,
    crop: bool,
    channels: int | None,
) -> Dataset:
    """Load a folder of images into memory, or leave them in their files: see `load_dataset`."""
    train, test, classes, notes = find_files(root, channels or 3)
    first_of_each_class = train.paths[np.unique(train.labels, return_index=True)[1]]
    if channels is None and all(is_grey(path) for path in first_of_each_class):
        notes += ("pictures are grey and were read as RGB; --channels 1 reads one channel",)
    if in_memory == "auto":
        num_images = len(train.labels) + len(test.labels)
        size = image_size or read_image(train.paths[0]).shape[0]
        fits = fits_in_memory(num_images, size, device, train.channels)
        in_memory = "always" if fits else "never"
    if in_memory == "always":
        train, test = (into_memory(part, image_size, device, crop) for part in (train, test))
    elif image_size is None:
        raise ValueError(f"folder {root}: images that are not in memory need --image-size")
    return Dataset(train, test, classes, notes)


def into_memory(
    data: Images | ImageFiles,
    image_size: int | None = None,
    device: torch.device = CPU,
    crop: bool = False,
) -> Images:
    """Read images from their files; return images that are in memory as they are.

    To search on a subset of a folder that is too large for the memory, load the folder with "auto",
    take the subset, then call this function. Raises ValueError if the images take more than half of
    the memory of the machine or of `device` (a split or a subset copies them), if one cannot be
    read, or if they are not squares of one size.
    """
    if isinstance(data, Images):
        return data
    first = read_image(data.paths[0], image_size, crop, data.channels)
    (height, width), memory = first.shape[:2], memory_of(device)
    if height != width:
        raise ValueError(
            f"image {data.paths[0]} is {width}x{height}, not square; give --image-size"
        )
    needed = len(data.labels) * first.size
    if needed > memory // 2:
        raise ValueError(
            f"{len(data.labels)} images of {width}x{height} take {needed / 2**30:.1f} GiB, more "
            f"than half of the memory, {memory / 2**30:.1f} GiB; give a smaller --image-size, a "
            "--subset to the search, or --in-memory never to the other scripts"
        )
    images = np.empty((len(data.labels), *first.shape), np.uint8)
    for i, path in enumerate(data.paths):
        image = read_image(path, image_size, crop, data.channels)
        if image.shape != first.shape:
            raise ValueError(
                f"image {path} is {image.shape[1]}x{image.shape[0]}, others are {width}x{height}; "
                "give --image-size"
            )
        images[i] = image
    return Images(torch.from_numpy(images), data.labels)
