"""Compare the batches per second of our augmentation with those of torchvision's pipeline.

Both crop, flip, normalise and cut out 16 pixels of the same 32x32 images, in batches of 96, on one
core, in turn. The pipeline works image by image.

    python -m benchmarks.data
"""

import statistics
import time

import torch
from PIL import Image
from torchvision import transforms

from darts_min.data import Loader, channel_statistics, synthetic_dataset

BATCH_SIZE, REPETITIONS = 96, 15


def cutout(image: torch.Tensor, length: int = 16) -> torch.Tensor:
    """Zero a square of a normalised image (C, H, W), as a per-image transform."""
    h, w = image.shape[1:]
    y, x = (int(torch.randint(size, ())) for size in (h, w))
    half = length // 2
    image[:, max(0, y - half) : y + half, max(0, x - half) : x + half] = 0
    return image


def main() -> None:
    torch.set_num_threads(1)
    data = synthetic_dataset(0).train
    mean_std = channel_statistics(data)
    loader = Loader(data, BATCH_SIZE, mean_std, augment=True, cutout=16)
    pipeline = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(*(s.tolist() for s in mean_std)),
            cutout,
        ]
    )
    arrays = data.images.numpy()

    def ours() -> int:
        return sum(1 for _ in loader)

    def per_image() -> int:
        order = torch.randperm(len(arrays)).split(BATCH_SIZE)[:10]
        for index in order:
            torch.stack([pipeline(Image.fromarray(arrays[i])) for i in index])
        return len(order)

    seconds = {ours: [], per_image: []}
    for _ in range(REPETITIONS):
        for function, times in seconds.items():
            start = time.perf_counter()
            batches = function()
            times.append((time.perf_counter() - start) / batches)
    medians = {f.__name__: statistics.median(times) for f, times in seconds.items()}
    ratio = statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))
    for name, median in medians.items():
        print(f"{name:>10}: {1 / median:8.1f} batches of {BATCH_SIZE} per second")
    print(f"{'ratio':>10}: {ratio:8.1f} (median of {REPETITIONS} pairs)")


if __name__ == "__main__":
    main()
