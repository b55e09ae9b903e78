"""Folders of images: their files, and batches of those that do not fit in memory.

Worker processes read the files in each pass. The augmentation is that of the original code,
train_imagenet.py. As in data.py, what is random depends on the seed, the epoch and the batch alone:
it does not depend on the number of workers, and a run may continue with another number.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader

from darts_min.data.batches import Batches

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".gif", ".tif", ".tiff"}
IMAGENET_STATISTICS = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class ImageFiles(NamedTuple):
    """Paths of images (N,) and labels (N,) int64.

    The paths are an array of str: a list of a million would be copied into every worker process,
    because counting references writes to its memory.
    """

    paths: np.ndarray
    labels: Tensor

    def take(self, index: Tensor) -> "ImageFiles":
        return ImageFiles(self.paths[index.numpy()], self.labels[index])

    @property
    def channels(self) -> int:
        return 3


def find_files(root: str | Path) -> tuple[ImageFiles, ImageFiles, list[str]]:
    """List `root/train/<class>/*` and `root/test/<class>/*`, by name; also return the classes.

    Names that begin with a dot are skipped. Raises ValueError on anything a user can set right, and
    on a link that leads out of the folder; only `train` and `test` themselves may be such links.
    """
    root = Path(root)
    classes, test_classes = (_class_names(root / part) for part in ("train", "test"))
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise ValueError(f"folder {root}: classes {odd} are in only one of train and test")
    if len(classes) < 2:
        raise ValueError(f"folder {root / 'train'}: one class, {classes[0]!r}; two are needed")
    parts = []
    for part in (root / "train", root / "test"):
        inside = (root.resolve(), part.resolve())
        paths = [_image_paths(part / name, inside) for name in classes]
        sizes = torch.tensor([len(of_class) for of_class in paths])
        labels = torch.arange(len(classes)).repeat_interleave(sizes)
        parts.append(ImageFiles(np.array([p for of_class in paths for p in of_class]), labels))
    return parts[0], parts[1], classes


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


def _image_paths(folder: Path, inside: tuple[Path, ...]) -> list[str]:
    def refuse_way_out(path: str | Path) -> None:
        if not any(Path(path).resolve().is_relative_to(place) for place in inside):
            raise ValueError(
                f"{path} is a link that leads out of the data folder; put a copy there, or make "
                "all of train or test the link"
            )

    refuse_way_out(folder)
    paths = []
    with os.scandir(folder) as entries:  # knows what is a link without a call for each file
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith(".") or suffix not in IMAGE_SUFFIXES:
                continue
            if entry.is_symlink():
                refuse_way_out(entry.path)
            if not entry.is_file():
                raise ValueError(f"image {entry.path} is not a file")
            paths.append(entry.path)
    if not paths:
        raise ValueError(f"folder {folder}: no images")
    return sorted(paths)


def read_image(path: str | Path, image_size: int | None = None, crop: bool = False) -> np.ndarray:
    """Read an image as RGB, (H, W, 3) uint8, turned as its EXIF tag says.

    To a square of `image_size`, where given, it is squeezed; or with `crop`, as the original code
    does for ImageNet, its middle is cut out, 7/8 of the shorter side. Raises ValueError if it
    cannot be read, is grey of more than 8 bits, or is larger than Pillow's limit against image
    bombs.
    """
    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                raise ValueError(f"mode {image.mode} has more than 8 bits; save it as 8-bit RGB")
            image = ImageOps.exif_transpose(image).convert("RGB")
            if image_size and crop:
                image = middle(image, image_size)
            elif image_size and image.size != (image_size, image_size):
                image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
            return np.asarray(image)
    except Exception as error:  # Pillow raises whatever a damaged file leads it to
        raise ValueError(f"image {path} cannot be read: {error}") from None


def middle(image: Image.Image, image_size: int) -> Image.Image:
    from torchvision.transforms import v2  # slow to import, and not needed for other datasets

    resize, cut_out = v2.Resize(image_size * 256 // 224), v2.CenterCrop(image_size)
    return cut_out(resize(image))


def fits_in_memory(num_images: int, image_size: int, device: torch.device) -> bool:
    """Return whether so many square RGB images may be held on `device` as one uint8 tensor.

    They may take a quarter of this process's share of the machine's memory, and of the GPU's:
    loading takes twice their size for a moment, and the network needs room. It is not what happens
    to be free, so that a run that is resumed decides alike. Where a system does not tell, 8 GiB are
    assumed.
    """
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        memory = 8 * 2**30
    memory //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's, on this machine
    if device.type == "cuda":
        memory = min(memory, torch.cuda.get_device_properties(device).total_memory)
    return num_images * image_size**2 * 3 <= memory // 4


class FileLoader:
    """Batches of normalised images (N, 3, H, W) float32 and labels on `device`, read from files.

    For training (`augment`) the order is shuffled anew in each epoch, incomplete batches are
    dropped, and images are cropped at random, flipped and changed in colour; otherwise every image
    comes once, in order, as `read_image` gives it with `crop`. `key` and `shard` are those of
    `data.Loader`. `num_workers` processes read the files, 0: this one. Raises ValueError where
    not a single batch can be filled, and during an epoch on an image that cannot be read.
    """

    def __init__(
        self,
        files: ImageFiles,
        batch_size: int,
        statistics: tuple[Tensor, Tensor],
        image_size: int,
        device: torch.device,
        key: tuple[int, ...] = (),
        augment: bool = False,
        num_workers: int = 4,
        memory_format: torch.memory_format = torch.channels_last,
        shard: tuple[int, int] = (0, 1),
        crop: bool = True,
    ):
        self.batches = Batches(len(files.labels), batch_size, key, augment, shard)
        if image_size < 8:
            raise ValueError(f"image size {image_size}: must be at least 8")
        self.reader, self.image_size = _Reader(files.paths, image_size, augment, crop), image_size
        self.labels, self.device, self.num_workers = files.labels, device, num_workers
        self.memory_format = memory_format
        mean, std = (s.to(device) for s in statistics)
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def epoch(self, number: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the batches of an epoch, from `first_batch` on."""
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
            target = self.labels[index].to(self.device, non_blocking=True)
            yield x.contiguous(memory_format=self.memory_format), target


class _Reader:
    """Reads and transforms batches; this is what a worker process has of the loader."""

    def __init__(self, paths: np.ndarray, image_size: int, augment: bool, crop: bool):
        self.paths, self.image_size, self.crop, self.transform = paths, image_size, crop, None
        if augment:
            from torchvision.transforms import v2

            self.transform = v2.Compose(
                [
                    v2.RandomResizedCrop(image_size),
                    v2.RandomHorizontalFlip(),
                    v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2),
                ]
            )

    def __getitem__(self, request: tuple[np.ndarray, np.ndarray]) -> Tensor | ValueError:
        """Return the images at `index` (N, H, W, 3) uint8, each transformed under its own seed.

        An error is returned, not raised: raised in a worker, it would arrive as a traceback.
        """
        images = []
        with torch.random.fork_rng(devices=[]):  # with no workers this is the main process
            for path, seed in zip(self.paths[request[0]], request[1], strict=True):
                try:
                    if self.transform is None:
                        images.append(read_image(path, self.image_size, self.crop))
                        continue
                    image = Image.fromarray(read_image(path))
                except ValueError as error:
                    return error
                torch.default_generator.manual_seed(int(seed))  # torch.manual_seed: also the GPU's
                images.append(np.asarray(self.transform(image)))
        return torch.from_numpy(np.stack(images))
