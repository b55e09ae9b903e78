"""List the images of a folder, read them, and make batches of images that do not fit in memory.

Worker processes read the files anew in each epoch. The augmentation is that of the original code's
train_imagenet.py. Its random numbers depend on the seed, the epoch and the batch alone
(`batches.py`), not on the number of workers, so that a run may resume with another number.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader

from darts_min.data.batches import Batches, to_device

IMAGE_SUFFIXES = {".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".tga"}
IMAGE_SUFFIXES |= {".jpg", ".jpeg", ".jpe", ".jfif", ".ppm", ".pgm", ".pbm", ".pnm"}
GREY = torch.tensor([0.299, 0.587, 0.114])  # shares of red, green and blue in Pillow's grey
IMAGENET_STATISTICS = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class ImageFiles(NamedTuple):
    """Hold paths of images (N,), labels (N,) int64, and the channels to read: 3 (RGB) or 1 (grey).

    The paths are an array of str. Of a list, every worker process would come to own a copy, because
    counting references writes to the memory that the processes share.
    """

    paths: np.ndarray
    labels: Tensor
    channels: int = 3

    def take(self, index: Tensor) -> "ImageFiles":
        return ImageFiles(self.paths[index.numpy()], self.labels[index], self.channels)


def find_files(
    root: str | Path, channels: int = 3
) -> tuple[ImageFiles, ImageFiles, list[str], tuple[str, ...]]:
    """Return the files of `root/train/<class>/*` and `root/test/<class>/*`, the classes, and notes.

    Files and classes are in the order of their names; names that begin with a dot are skipped. A
    note counts the other files that are passed over, by their suffix. Raises ValueError on anything
    that a user can set right, and on a link that leads out of the folder; only `train` and `test`
    themselves may be such links.
    """
    root = Path(root)
    classes, test_classes = (_class_names(root / part) for part in ("train", "test"))
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise ValueError(f"folder {root}: classes {odd} are in only one of train and test")
    if len(classes) < 2:
        raise ValueError(f"folder {root / 'train'}: one class, {classes[0]!r}; two are needed")
    parts, passed_over = [], Counter()
    for part in (root / "train", root / "test"):
        inside = (root.resolve(), part.resolve())
        paths = [_image_paths(part / name, inside, passed_over) for name in classes]
        sizes = torch.tensor([len(of_class) for of_class in paths])
        labels = torch.arange(len(classes)).repeat_interleave(sizes)
        paths = np.array([path for of_class in paths for path in of_class])
        parts.append(ImageFiles(paths, labels, channels))
    notes = ()
    if passed_over:
        found = f"{passed_over.total()} entries of class folders ({_listed(passed_over)})"
        notes = (f"{found} are not read, because their suffix is not that of a picture",)
    return parts[0], parts[1], classes, notes


def _listed(passed_over: Counter[str]) -> str:
    """Return for example "30 .heic, 2 folders", the most frequent kind first."""
    return ", ".join(f"{count} {kind}" for kind, count in passed_over.most_common(10))


def _class_names(folder: Path) -> list[str]:
    if not os.path.isdir(folder):  # unlike folder.is_dir(), also False where one may not look
        raise ValueError(f"folder {folder} does not exist; wanted are DIR/train and DIR/test")
    try:
        names = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    except OSError as error:
        raise ValueError(f"folder {folder} cannot be read: {error.strerror}") from None
    if not names:
        raise ValueError(f"folder {folder} has no class folders")
    for name in names:
        if name.encode(errors="ignore").decode() != name:  # could not be logged
            raise ValueError(f"class folder {str(folder / name)!r}: its name is not UTF-8")
    return names


def _image_paths(folder: Path, inside: tuple[Path, ...], passed_over: Counter[str]) -> list[str]:
    """Return the sorted paths of the pictures in a folder; count the rest in `passed_over`."""

    def refuse_way_out(path: str | Path) -> None:
        try:
            target = Path(path).resolve()
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
            raise ValueError(f"{path} cannot be read: {error}") from None
        if not any(target.is_relative_to(place) for place in inside):
            raise ValueError(
                f"{path} is a link that leads out of the data folder; put a copy there, or make "
                "all of train or test the link"
            )

    refuse_way_out(folder)
    paths, others = [], Counter()
    try:
        entries = os.scandir(folder)  # knows what is a link without a call for each file
    except OSError as error:
        raise ValueError(f"folder {folder} cannot be read: {error.strerror}") from None
    with entries:
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                continue
            if suffix not in IMAGE_SUFFIXES:
                others["folders" if entry.is_dir() else suffix or "without suffix"] += 1
                continue
            if entry.is_symlink():
                refuse_way_out(entry.path)
            if not entry.is_file():
                raise ValueError(f"image {entry.path} is not a file")
            paths.append(entry.path)
    if not paths:
        has = f"; it has {_listed(others)}" if others else ""
        raise ValueError(f"folder {folder}: no images{has}")
    passed_over.update(others)
    return sorted(paths)


def read_image(
    path: str | Path, image_size: int | None = None, crop: bool = False, channels: int = 3
) -> np.ndarray:
    """Read an image as (H, W, C) uint8, RGB or with one channel grey, turned as its EXIF tag says.

    An `image_size` squeezes the image to a square. With `crop` the square is cut out of the middle
    instead, 7/8 of the shorter side, as the original code does for ImageNet. Raises ValueError if
    the file cannot be read, is grey of more than 8 bits, or has more pixels than Pillow's limit.
    """
    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                raise ValueError(f"mode {image.mode} has more than 8 bits; save it with 8")
            image = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
            if image_size and crop:
                image = middle(image, image_size)
            elif image_size and image.size != (image_size, image_size):
                image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
            return _array_of(image)
    except UnidentifiedImageError:  # its message has the path again
        raise ValueError(f"image {path} cannot be read: Pillow knows no such picture") from None
    except Exception as error:  # Pillow raises whatever a damaged file leads it to
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"image {path} cannot be read: {reason}") from None


def _array_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image).reshape(image.height, image.width, -1)  # (H, W, C), also of grey


def is_grey(path: str | Path) -> bool:
    """Return whether a file says that its image is grey; False if it cannot be opened."""
    try:
        with Image.open(path) as image:  # reads no pixels
            return image.mode in ("1", "L", "LA")
    except Exception:  # `read_image` says what is wrong with it
        return False


def middle(image: Image.Image, image_size: int) -> Image.Image:
    """Resize the shorter side to 8/7 of `image_size`, and cut out the square in the middle."""
    from torchvision.transforms import v2  # slow to import, and not needed for other datasets

    resize, cut_out = v2.Resize(image_size * 256 // 224), v2.CenterCrop(image_size)
    return cut_out(resize(image))


def fits_in_memory(
    num_images: int, image_size: int, device: torch.device, channels: int = 3
) -> bool:
    """Return whether square images may be held on `device` as one uint8 tensor.

    The limit is a quarter of the memory of this process, because the network needs room too. It is
    of the total memory, not of the free memory, so that a resumed run decides as before.
    """
    return num_images * image_size**2 * channels <= memory_of(device) // 4


def memory_of(device: torch.device) -> int:
    """Return the bytes of this process's share of the machine's memory, or the GPU's if smaller.

    Where the system does not tell, 8 GiB are assumed.
    """
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        memory = 8 * 2**30
    memory //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's, on this machine
    if device.type == "cuda":
        memory = min(memory, torch.cuda.get_device_properties(device).total_memory)
    return memory


class FileLoader:
    """Yield batches of normalised images (N, C, H, W) float32 and labels on `device`, from files.

    With `augment`, for training, each epoch has a new order and leaves out the incomplete batch.
    Its images are cropped at random, flipped and changed in colour. Without `augment` every image
    comes once, in order, as `read_image` reads it to `image_size`, with or without `crop`.

    `num_workers` processes read the files; 0 means that this process reads them. `statistics` are
    those of `Loader`; `seed` and `shard` are those of `Batches`. Raises ValueError if no
    batch can be filled, and during an epoch on an image that cannot be read.
    """

    def __init__(
        self,
        files: ImageFiles,
        batch_size: int,
        statistics: tuple[Tensor, Tensor],
        *,
        image_size: int,
        device: torch.device,
        seed: int = 0,
        augment: bool = False,
        num_workers: int = 4,
        memory_format: torch.memory_format = torch.channels_last,
        shard: tuple[int, int] = (0, 1),
        crop: bool = True,
    ):
        self.batches = Batches(
            len(files.labels), batch_size, seed=seed, shuffled=augment, shard=shard
        )
        if image_size is None or image_size < 8:
            raise ValueError(f"image size {image_size}: must be at least 8 for images in files")
        self.reader, self.image_size = _Reader(files, image_size, augment, crop), image_size
        self.labels, self.device, self.num_workers = files.labels, device, num_workers
        self.memory_format = memory_format
        mean, std = (s.to(device) for s in statistics)
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def epoch(self, number: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, from `first_batch` on."""
        requests = [
            (index, torch.randint(2**31, index.shape, generator=generator))
            for index, generator in self.batches.epoch(number, first_batch)
        ]
        loader = DataLoader(
            self.reader,
            batch_size=None,  # the reader makes whole batches
            sampler=[(index.numpy(), seed.numpy()) for index, seed in requests],
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # unused, but without one it draws from the global one
        )
        for (index, _), images in zip(requests, loader, strict=True):
            if isinstance(images, ValueError):
                raise images
            # Normalised here, because bytes are a quarter of what the workers would have to send.
            images = images.to(self.device, non_blocking=True).float()
            x = torch.addcmul(self.shift, images, self.scale).permute(0, 3, 1, 2)
            (target,) = to_device([self.labels[index]], self.device)
            yield x.contiguous(memory_format=self.memory_format), target


class _Reader:
    """Read and transform whole batches; a worker process gets this part of the loader only."""

    def __init__(self, files: ImageFiles, image_size: int, augment: bool, crop: bool):
        self.paths, self.channels = files.paths, files.channels
        self.image_size, self.crop, self.transform = image_size, crop, None
        if augment:
            from torchvision.transforms import v2

            self.transform = v2.Compose(
                [
                    v2.RandomResizedCrop(image_size),
                    v2.RandomHorizontalFlip(),
                    # Saturation and hue leave grey images as they are.
                    v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2),
                ]
            )

    def __getitem__(self, request: tuple[np.ndarray, np.ndarray]) -> Tensor | ValueError:
        """Return the images of a request, (index (N,), seeds (N,)), as (N, H, W, C) uint8.

        Each is transformed under its own seed. An error is returned, not raised: what a worker
        raises would arrive as a traceback.
        """
        images = []
        with torch.random.fork_rng(devices=[]):  # with no workers this is the main process
            for path, seed in zip(self.paths[request[0]], request[1], strict=True):
                try:
                    if self.transform is None:
                        images.append(read_image(path, self.image_size, self.crop, self.channels))
                        continue
                    image = read_image(path, channels=self.channels)
                except ValueError as error:
                    return error
                torch.default_generator.manual_seed(int(seed))  # torch.manual_seed: also the GPU's
                image = Image.fromarray(image[..., 0] if self.channels == 1 else image)
                images.append(_array_of(self.transform(image)))
        return torch.from_numpy(np.stack(images))
