"""Compare the batches per second of our augmentation with those of torchvision and kornia.

All crop, flip, normalise and cut out 16 pixels of the same 32x32 images, in batches of 96, on one
core, in turn. torchvision works image by image, kornia on the batch, as we do. kornia is left out
if it is not installed.

    python -m benchmarks.data
"""

import statistics
import time
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from darts_min.data import Loader, channel_statistics, synthetic_dataset

try:
    import kornia.augmentation as kornia
except ImportError:
    kornia = None

BATCH_SIZE, BATCHES, REPETITIONS = 96, 10, 15


def cutout(image: Tensor, length: int = 16) -> Tensor:
    """Zero a square of a normalised image (C, H, W), as a per-image transform."""
    h, w = image.shape[1:]
    y, x = (int(torch.randint(size, ())) for size in (h, w))
    half = length // 2
    image[:, max(0, y - half) : y + half, max(0, x - half) : x + half] = 0
    return image


def torchvision_pipeline(mean: Tensor, std: Tensor) -> Callable[[Tensor], Tensor]:
    """Take uint8 images (N, H, W, 3) one by one."""
    pipeline = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean.tolist(), std.tolist()),
            cutout,
        ]
    )
    return lambda images: torch.stack([pipeline(Image.fromarray(i.numpy())) for i in images])


def kornia_pipeline(mean: Tensor, std: Tensor) -> Callable[[Tensor], Tensor]:
    """Take uint8 images (N, H, W, 3) as a batch; the erased square lies in the image as a whole."""
    quarter, square = (0.25, 0.25), (1.0, 1.0)
    pipeline = kornia.AugmentationSequential(
        kornia.RandomCrop((32, 32), padding=4),
        kornia.RandomHorizontalFlip(),
        kornia.Normalize(mean, std),
        kornia.RandomErasing(quarter, square, p=1.0),
        data_keys=["input"],
    )
    return lambda images: pipeline(images.permute(0, 3, 1, 2) / 255)


def main() -> None:
    torch.set_num_threads(1)
    data = synthetic_dataset(0).train
    mean_std = channel_statistics(data)
    loader = Loader(data, BATCH_SIZE, mean_std, augment=True, cutout=16)

    def ours() -> int:
        return sum(1 for _ in loader)

    def other(pipeline: Callable[[Tensor], Tensor]) -> int:
        for index in torch.randperm(len(data.images)).split(BATCH_SIZE)[:BATCHES]:
            pipeline(data.images[index])
        return BATCHES

    runs = {"ours": ours, "torchvision": lambda: other(torchvision_batch)}
    torchvision_batch = torchvision_pipeline(*mean_std)
    if kornia is not None:
        kornia_batch = kornia_pipeline(*mean_std)
        runs["kornia"] = lambda: other(kornia_batch)
    seconds = {name: [] for name in runs}
    for _ in range(REPETITIONS):
        for name, run in runs.items():
            start = time.perf_counter()
            batches = run()
            seconds[name].append((time.perf_counter() - start) / batches)
    for name, times in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(seconds["ours"], times, strict=True))
        rate = 1 / statistics.median(times)
        print(f"{name:>11}: {rate:8.1f} batches of {BATCH_SIZE} per second; ours is {ratio:.1f} x")


if __name__ == "__main__":
    main()
