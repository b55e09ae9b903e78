"""Oracles: slow per-pixel loops, the original code's cutout, torchvision, numpy and PIL."""

from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import darts_min.data.loader
from darts_min.data import (
    Dataset,
    Images,
    Loader,
    balanced_subset,
    channel_statistics,
    generator_of,
    images_of,
    load_dataset,
    split_half,
    synthetic_dataset,
)
from darts_min.data.loader import crop_and_flip, cutout_mask

STATISTICS = torch.tensor([0.49, 0.48, 0.45]), torch.tensor([0.25, 0.24, 0.26])
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(n=10, h=8, w=8, c=3, num_classes=3):
    images = torch.randint(256, (n, h, w, c), dtype=torch.uint8, generator=seeded())
    return Images(images, torch.arange(n) % num_classes)


def numbered(n):
    """Images of one grey value each, their number, so that a batch tells what is in it."""
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 8, 8, 3)
    return Images(images.contiguous(), torch.arange(n))


def spy_on(monkeypatch, function, calls):
    """Let the module's `function` note its arguments in `calls`."""

    def spy(*args):
        calls.append(args)
        return function(*args)

    monkeypatch.setattr(darts_min.data.loader, function.__name__, spy)


@pytest.mark.parametrize("h, w, c", [(8, 8, 3), (5, 9, 1), (6, 4, 3)])
def test_crop_and_flip_equals_a_loop_over_pixels(h, w, c):
    images, n = make(6, h, w, c).images, 40
    index = torch.randint(6, (n,), generator=seeded(1))
    top, left = torch.randint(-10, 11, (2, n), generator=seeded(2))
    flip = torch.randint(2, (n,), generator=seeded(3)).bool()
    expected = torch.zeros(n, h, w, c, dtype=torch.uint8)
    for k in range(n):
        for y in range(h):
            for x in range(w):
                y_from, x_from = y + int(top[k]), (w - 1 - x if flip[k] else x) + int(left[k])
                if 0 <= y_from < h and 0 <= x_from < w:
                    expected[k, y, x] = images[index[k], y_from, x_from]
    assert torch.equal(crop_and_flip(images, index, top, left, flip), expected)


@pytest.mark.parametrize("length", [1, 4, 5, 16, 40])
@pytest.mark.parametrize("h, w", [(32, 32), (8, 11)])
def test_cutout_is_that_of_the_original_code(h, w, length):
    centres = torch.cartesian_prod(torch.arange(h), torch.arange(w))
    masks = cutout_mask(*centres.unbind(1), h, w, length)
    for (y, x), mask in zip(centres.tolist(), masks, strict=True):
        expected = np.ones((h, w), np.float32)
        y1, y2 = np.clip(y - length // 2, 0, h), np.clip(y + length // 2, 0, h)
        x1, x2 = np.clip(x - length // 2, 0, w), np.clip(x + length // 2, 0, w)
        expected[y1:y2, x1:x2] = 0.0
        assert np.array_equal(mask[0], expected)


@pytest.mark.parametrize("cutout", [0, 6])
def test_augmented_batches_equal_torchvision_on_the_same_draws(monkeypatch, cutout):
    data, draws, holes = make(20, 12, 12), [], []
    spy_on(monkeypatch, crop_and_flip, draws)
    spy_on(monkeypatch, cutout_mask, holes)
    loader = Loader(data, 10, STATISTICS, augment=True, cutout=cutout)
    for batch, (x, labels) in enumerate(loader):
        _, index, top, left, flip = draws[batch]
        assert torch.equal(labels, data.labels[index])
        for k in range(10):
            image = data.images[index[k]].permute(2, 0, 1)
            image = TF.crop(TF.pad(image, [4] * 4), int(top[k]) + 4, int(left[k]) + 4, 12, 12)
            image = TF.horizontal_flip(image) if flip[k] else image
            image = TF.normalize(image.float() / 255, *(s.tolist() for s in STATISTICS))
            if cutout:
                y, x0 = (int(centre[k]) for centre in holes[batch][:2])
                top_left = max(0, y - 3), max(0, x0 - 3)
                size = min(12, y + 3) - top_left[0], min(12, x0 + 3) - top_left[1]
                image = TF.erase(image, *top_left, *size, torch.zeros(3, 1, 1))
            close(x[k], image)
    assert len(draws) == 2 and len(holes) == (2 if cutout else 0)


def test_cutout_comes_as_often_as_its_probability_says():
    data = make(400, 12, 12)

    def batch(cutout, prob):
        loader = Loader(data, 400, STATISTICS, augment=True, cutout=cutout)
        loader.cutout_prob = prob
        return next(iter(loader))[0]

    plain, cut, sometimes = batch(0, 1.0), batch(6, 1.0), batch(6, 0.3)
    assert torch.equal(batch(6, 0.0), plain)
    is_plain, is_cut = ((sometimes == x).flatten(1).all(1) for x in (plain, cut))
    assert (is_plain | is_cut).all()
    assert 0.2 < (~is_plain).float().mean() < 0.4


def test_draws_cover_all_shifts_both_flips_and_all_centres(monkeypatch):
    data, seen = make(2000), []
    for function in (crop_and_flip, cutout_mask):
        spy_on(monkeypatch, function, seen)
    next(iter(Loader(data, 2000, STATISTICS, augment=True, cutout=4)))
    (_, _, top, left, flip), (cy, cx, *_) = seen
    for shift in (top, left):
        counts = torch.bincount(shift + 4, minlength=9)
        assert len(counts) == 9 and counts.min() > 150 and counts.max() < 300
    assert 900 < flip.sum() < 1100
    for centre in (cy, cx):
        counts = torch.bincount(centre, minlength=8)
        assert len(counts) == 8 and counts.min() > 180 and counts.max() < 330


@pytest.mark.parametrize("channels", [1, 3])
def test_normalise_is_the_formula(channels):
    data = make(c=channels)
    mean, std = (s[:channels] for s in STATISTICS)
    x = Loader(data, 10, (mean, std)).normalise(data.images)
    expected = (data.images.double() / 255 - mean.double()) / std.double()
    close(x, expected.permute(0, 3, 1, 2).float())
    assert x.dtype == torch.float32
    assert channels == 1 or x.is_contiguous(memory_format=torch.channels_last)


def test_channel_statistics_are_those_of_numpy():
    data = make(30, 7, 9)
    mean, std = channel_statistics(data)
    pixels = data.images.numpy().astype(np.float64) / 255
    close(mean.double(), torch.from_numpy(pixels.mean((0, 1, 2))))
    close(std.double(), torch.from_numpy(pixels.std((0, 1, 2))))
    whitened, _ = next(iter(Loader(data, 30, (mean, std))))
    close(whitened.mean((0, 2, 3)), torch.zeros(3))
    close(whitened.std((0, 2, 3), correction=0), torch.ones(3))


def test_images_of_one_colour_have_finite_batches():
    data = Images(torch.full((4, 8, 8, 3), 7, dtype=torch.uint8), torch.arange(4))
    x, _ = next(iter(Loader(data, 4, channel_statistics(data))))
    assert x.isfinite().all() and x.abs().max() < 1


BYTES, LABELS = torch.zeros(8, 8, 8, 3, dtype=torch.uint8), torch.arange(8) % 2


@pytest.mark.parametrize(
    "images, labels, says",
    [
        (
            torch.rand(8, 3, 32, 32),
            LABELS,
            "images: float32 (8, 3, 32, 32); wanted is uint8 (N, H, W, C)",
        ),
        (BYTES[..., 0], LABELS, "images: uint8 (8, 8, 8); wanted is uint8 (N, H, W, C)"),
        (BYTES.numpy(), LABELS, "images: ndarray; wanted is a tensor, uint8 (N, H, W, C)"),
        (BYTES, LABELS.float(), "labels: float32 (8,); wanted is int64 (N,)"),
        (BYTES, LABELS[:, None], "labels: int64 (8, 1); wanted is int64 (N,)"),
        (BYTES, LABELS.tolist(), "labels: list; wanted is a tensor, int64 (N,)"),
        (BYTES, LABELS[:7], "8 images, but 7 labels"),
        (BYTES, LABELS.to("meta"), "images on cpu, labels on meta"),
    ],
)
def test_images_of_another_type_or_shape_are_refused(images, labels, says):
    with pytest.raises(ValueError) as error:
        Images(images, labels)
    assert str(error.value) == says


ONE = make(10, num_classes=3)


@pytest.mark.parametrize(
    "train, test, classes, says",
    [
        (ONE, ONE, ["a"], "classes: 1; wanted are two or more"),
        (ONE, ONE, ["a", "b"], "train: labels in 0..2; wanted are 0..1, for 2 classes"),
        (ONE, Images(ONE.images, ONE.labels - 1), "abc", "test: labels in -1..1; wanted are 0..2"),
        (ONE, ONE.take(torch.arange(0)), "abc", "test: no images"),
        (ONE, make(c=1), "abc", "train: 3 channels, test: 1; wanted is one number"),
        (ONE, make(h=9, w=9), "abc", "images of 8x8 and 9x9 pixels; wanted is one square size"),
        (make(h=3), make(h=3), "abc", "images of 8x3 pixels; wanted is one square size"),
    ],
)
def test_parts_of_a_dataset_that_do_not_fit_together_are_refused(train, test, classes, says):
    with pytest.raises(ValueError) as error:
        Dataset(train, test, classes)
    assert str(error.value).startswith(says)


@pytest.mark.parametrize("n", [10, 11])
def test_split_half_is_disjoint_complete_and_seeded(n):
    data = numbered(n)
    parts = split_half(data, seeded(5))
    assert [len(part.labels) for part in parts] == [n // 2, n - n // 2]
    assert sorted(torch.cat([part.labels for part in parts]).tolist()) == list(range(n))
    for part in parts:
        assert torch.equal(part.images[:, 0, 0, 0].long(), part.labels)
    again, other = split_half(data, seeded(5)), split_half(data, seeded(6))
    assert torch.equal(again[0].labels, parts[0].labels)
    assert not torch.equal(other[0].labels, parts[0].labels)
    assert parts[0].labels.tolist() != list(range(n // 2))


@pytest.mark.parametrize("size", [1, 3, 10, 12, 30])
def test_subset_is_balanced_and_seeded(size):
    data = Images(numbered(30).images, torch.arange(30) % 3)
    subset = balanced_subset(data, size, seeded(1))
    numbers = subset.images[:, 0, 0, 0].long()
    assert len(numbers) == len(set(numbers.tolist())) == size
    assert torch.equal(subset.labels, numbers % 3)
    counts = torch.bincount(subset.labels, minlength=3)
    assert counts.max() - counts.min() <= 1
    again = balanced_subset(data, size, seeded(1))
    assert torch.equal(again.images, subset.images)
    assert not torch.equal(balanced_subset(data, size, seeded(2)).images, subset.images)


def test_subset_of_rare_classes_takes_all_of_them():
    data = Images(numbered(12).images, torch.tensor([0] * 9 + [1] * 2 + [2]))
    subset = balanced_subset(data, 7, seeded())
    assert torch.bincount(subset.labels).tolist() == [4, 2, 1]


@pytest.mark.parametrize("size", [0, -1, 11])
def test_impossible_subsets_are_named(size):
    with pytest.raises(ValueError, match=rf"subset {size}: must be in 1\.\.10"):
        balanced_subset(make(10), size, seeded())


@pytest.mark.parametrize("batch_size", [1, 4, 5, 10, 100])
def test_evaluation_gives_each_image_once_in_order(batch_size):
    data = numbered(10)
    loader = Loader(data, batch_size, (torch.zeros(3), torch.ones(3)))
    batches = list(loader)
    assert len(batches) == len(loader) == -(-10 // batch_size)
    x, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    assert labels.tolist() == list(range(10))
    close(x, data.images.permute(0, 3, 1, 2) / 255)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 10])
def test_training_shuffles_anew_and_drops_the_incomplete_batch(batch_size):
    loader = Loader(numbered(10), batch_size, STATISTICS, augment=True)
    orders = []
    for epoch in range(3):
        batches = [labels for _, labels in loader.epoch(epoch)]
        assert len(batches) == len(loader) == 10 // batch_size
        assert all(len(labels) == batch_size for labels in batches)
        orders.append(tuple(torch.cat(batches).tolist()))
        assert len(set(orders[-1])) == 10 // batch_size * batch_size
    assert len(set(orders)) == 3


@pytest.mark.parametrize("key", [{"seed": 7}, {"seed": 7, "stream": 0}, {"seed": 7, "stream": 1}])
def test_the_order_is_that_of_seed_stream_and_epoch(key):
    labels = [
        labels for _, labels in Loader(numbered(10), 5, STATISTICS, augment=True, **key).epoch(3)
    ]
    order = torch.randperm(10, generator=generator_of(*key.values(), 3, 0))
    assert torch.equal(torch.cat(labels), order)


def test_images_that_are_a_view_of_channels_first_give_the_same_batches():
    data = make(20)
    view = Images(data.images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), data.labels)
    assert not view.images.is_contiguous()
    a, b = (Loader(d, 5, STATISTICS, augment=True, cutout=4) for d in (data, view))
    assert same_batches(a, b)


def same_batches(a, b):
    pairs = list(zip(a, b, strict=True))
    return all(torch.equal(x, x2) and torch.equal(y, y2) for (x, y), (x2, y2) in pairs)


def test_the_seed_fixes_the_batches():
    loaders = [Loader(make(20), 5, STATISTICS, seed=s, augment=True, cutout=4) for s in (0, 0, 1)]
    batches = [list(loader) for loader in loaders]
    assert same_batches(batches[0], batches[1])
    assert not same_batches(batches[0], batches[2])


@pytest.mark.parametrize("shard", [(0, 1), (1, 2)])
def test_an_epoch_goes_on_from_any_batch(shard):
    loader = Loader(make(40), 5, STATISTICS, augment=True, cutout=4, shard=shard)
    first, second = list(loader.epoch(1)), list(loader.epoch(2))
    torch.manual_seed(99)
    for done in range(len(second) + 1):
        assert same_batches(loader.epoch(2, done), second[done:])
    assert not same_batches(first, second)


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_images_of_an_epoch(world_size, augment):
    def labels(shard):
        loader = Loader(numbered(31), 2, STATISTICS, augment=augment, shard=shard)
        batches = [target.tolist() for _, target in loader.epoch(3)]
        assert len(batches) == len(loader)
        return batches

    whole = labels((0, 1))
    parts = [labels((rank, world_size)) for rank in range(world_size)]
    for k, batch in enumerate(whole):
        if augment and k >= len(whole) // world_size * world_size:
            continue  # so that all have equally many
        assert parts[k % world_size][k // world_size] == batch
    assert sum(map(len, parts)) == len(whole) - (len(whole) % world_size if augment else 0)


def test_too_few_images_for_all_processes_are_named():
    with pytest.raises(ValueError, match="batch size 4 of 3 processes is larger than the 10"):
        Loader(make(10), 4, STATISTICS, augment=True, shard=(0, 3))


def test_augmentation_leaves_the_dataset_and_the_global_generator_alone():
    data = make(20)
    images, state = data.images.clone(), torch.get_rng_state()
    list(Loader(data, 5, STATISTICS, augment=True, cutout=4))
    assert torch.equal(data.images, images) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batch_size, augment", [(11, True), (0, True), (0, False), (-3, False)])
def test_impossible_batch_sizes_are_named(batch_size, augment):
    with pytest.raises(ValueError, match=f"batch size {batch_size}"):
        Loader(make(10), batch_size, STATISTICS, augment=augment)


def test_synthetic_images_come_from_the_seed():
    a, b, other = (load_dataset("synthetic", image_size=16, seed=seed) for seed in (3, 3, 4))
    for part in ("train", "test"):
        images = [getattr(dataset, part).images for dataset in (a, b, other)]
        assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
    assert a.train.images.shape == (4000, 16, 16, 3) and a.test.images.shape == (1000, 16, 16, 3)
    assert a.train.images.dtype == torch.uint8
    assert torch.bincount(a.train.labels).tolist() == [400] * 10
    assert torch.bincount(a.test.labels).tolist() == [100] * 10
    assert len(a.classes) == 10


def ridge_accuracy(features, dataset, penalty):
    """Return the test accuracy of the closed-form ridge regression on one-hot labels."""
    train, test = (
        features(part.images.float()).flatten(1) for part in (dataset.train, dataset.test)
    )
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    targets = torch.nn.functional.one_hot(dataset.train.labels, 10).float() - 0.1
    gram = train.T @ train + penalty * torch.eye(train.size(1))
    scores = test @ torch.linalg.solve(gram, train.T @ targets)
    return (scores.argmax(1) == dataset.test.labels).float().mean().item()


def spectrum(images):
    grey = images.mean(3)
    return torch.fft.rfft2(grey - grey.mean((1, 2), keepdim=True)).abs().square().log1p()


@pytest.mark.parametrize("penalty", [1.0, 1e2, 1e3, 1e4, 1e5])
def test_synthetic_classes_are_not_linear_in_the_pixels(penalty):
    assert ridge_accuracy(lambda images: images, synthetic_dataset(0, 16), penalty) < 0.25


def test_synthetic_classes_are_linear_in_the_power_spectrum():
    assert ridge_accuracy(spectrum, synthetic_dataset(0, 16), 1e2) > 0.5


def test_the_mean_colour_of_every_synthetic_class_is_the_same_grey():
    train = synthetic_dataset(0, 16).train
    means = [train.images[train.labels == k].float().mean((0, 1, 2)) for k in range(10)]
    assert (torch.stack(means) - 127.5).abs().max() < 4


def write_images(root, sizes=((10, 10),), classes=("cat", "dog"), modes=("RGB",), per_class=2):
    for part in ("train", "test"):
        for label, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                colour = {"L": 50, "RGBA": (60, 70, 80, 255), "RGB": (100 * label, 7, 9)}
                mode, size = modes[i % len(modes)], sizes[i % len(sizes)]
                Image.new(mode, size, colour[mode]).save(folder / f"{i}.png")


def test_folder_reads_grey_and_transparent_images_as_rgb(tmp_path):
    write_images(tmp_path, modes=("L", "RGBA", "RGB"), per_class=3)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".hidden").mkdir()
    data = load_dataset("folder", tmp_path)
    assert data.classes == ["cat", "dog"]
    for part in (data.train, data.test):
        assert part.images.shape == (6, 10, 10, 3) and part.images.dtype == torch.uint8
        assert part.labels.tolist() == [0, 0, 0, 1, 1, 1] and part.labels.dtype == torch.int64
        pixels = part.images[:, 4, 5].tolist()
        assert pixels[:3] == [[50, 50, 50], [60, 70, 80], [0, 7, 9]]
        assert pixels[5] == [100, 7, 9]


def test_folder_images_of_all_sizes_are_resized(tmp_path):
    write_images(tmp_path, sizes=((10, 10), (31, 17), (12, 12)), per_class=3)
    data = load_dataset("folder", tmp_path, image_size=12)
    assert data.train.images.shape == (6, 12, 12, 3)
    assert (data.test.images[3:] == torch.tensor([100, 7, 9])).all()


def test_folder_files_are_in_the_order_of_their_names(tmp_path):
    write_images(tmp_path)
    for i, name in enumerate(["b.JPG", "a.png", "c.bmp"]):
        Image.new("RGB", (10, 10), (i, i, i)).save(tmp_path / "train" / "dog" / name, format="PNG")
    images = load_dataset("folder", tmp_path).train.images
    assert images[4:, 0, 0, 0].tolist() == [1, 0, 2]


def spoil_part(root):
    for path in sorted((root / "test").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (root / "test").rmdir()


def unlink_all(folder):
    for path in folder.iterdir():
        path.unlink()


SPOILT = {
    "missing part": (spoil_part, ["test", "does not exist"]),
    "empty class": (lambda root: unlink_all(root / "test" / "dog"), ["dog", "no images"]),
    "other classes": (
        lambda root: (root / "test" / "dog").rename(root / "test" / "emu"),
        ["dog", "emu"],
    ),
    "unreadable": (
        lambda root: (root / "train" / "cat" / "0.png").write_bytes(b"no image"),
        ["0.png", "cannot be read"],
    ),
    "truncated": (
        lambda root: (root / "train" / "cat" / "0.png").write_bytes(
            (root / "train" / "cat" / "1.png").read_bytes()[:50]
        ),
        ["0.png", "cannot be read"],
    ),
    "other size": (
        lambda root: Image.new("RGB", (11, 10)).save(root / "test" / "dog" / "1.png"),
        ["1.png", "11x10", "others are 10x10", "--image-size"],
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_bad_folder_is_named_in_one_line(tmp_path, case):
    write_images(tmp_path)
    spoil, says = SPOILT[case]
    spoil(tmp_path)
    with pytest.raises(ValueError) as error:
        load_dataset("folder", tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert all(part in str(error.value) for part in says), error.value


@pytest.mark.parametrize(
    "classes, size, says",
    [
        (("cat",), (10, 10), "one class, 'cat'; two are needed"),
        (("cat", "dog"), (10, 12), "10x12, not square; give --image-size"),
        ((), (10, 10), "does not exist"),
    ],
)
def test_folders_without_two_classes_of_squares_are_refused(tmp_path, classes, size, says):
    write_images(tmp_path, classes=classes, sizes=(size,))
    with pytest.raises(ValueError, match=says):
        load_dataset("folder", tmp_path)


def test_unknown_names_and_small_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'mnist' is not one of cifar10, cifar100, svhn"):
        load_dataset("mnist")
    for channels, name in ((1, "cifar10"), (3, "npz"), (2, "folder"), (0, "folder")):
        with pytest.raises(ValueError, match=f"channels {channels}: "):
            load_dataset(name, tmp_path, channels=channels)
    for name in ("synthetic", "folder", "npz", "cifar10"):
        with pytest.raises(ValueError, match="image size 7: must be at least 8"):
            load_dataset(name, tmp_path, image_size=7)


def npz(path, **changes):
    """Write a .npz file of 6 and 4 images of 9x9 pixels, 3 classes; None leaves an array out."""
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(256, size=(6, 9, 9), dtype=np.uint8),
        "y_train": np.arange(6, dtype=np.uint8) % 3,
        "x_test": rng.integers(256, size=(4, 9, 9), dtype=np.uint8),
        "y_test": np.arange(4, dtype=np.int32)[:, None] % 3,
    } | changes
    arrays = {name: array for name, array in arrays.items() if array is not None}
    np.savez(path, **arrays)
    return arrays


@pytest.mark.parametrize("channels", [None, 1, 2, 3, 5])
def test_an_npz_file_becomes_images_of_any_number_of_channels(tmp_path, channels):
    rng, more = np.random.default_rng(1), {}
    if channels:
        shapes = {"x_train": (6, 9, 9, channels), "x_test": (4, 9, 9, channels)}
        more = {name: rng.integers(256, size=s, dtype=np.uint8) for name, s in shapes.items()}
    arrays = npz(tmp_path / "a.npz", **more)
    data, small = (load_dataset("npz", tmp_path / "a.npz", size) for size in (None, 8))
    assert data.classes == ["0", "1", "2"] and data.notes == ()
    for part in ("train", "test"):
        expected = arrays[f"x_{part}"].reshape(-1, 9, 9, channels or 1)
        assert np.array_equal(getattr(data, part).images, expected)
        assert np.array_equal(getattr(data, part).labels, arrays[f"y_{part}"].reshape(-1))
        for image, resized in zip(expected, getattr(small, part).images, strict=True):
            for c in range(channels or 1):
                picture = Image.fromarray(np.ascontiguousarray(image[..., c]))
                assert np.array_equal(resized[..., c], picture.resize((8, 8), Image.BILINEAR))
    if channels == 3:
        whole = Image.fromarray(arrays["x_test"][0]).resize((8, 8), Image.BILINEAR)
        assert np.array_equal(small.test.images[0], whole)


def test_an_npz_file_names_its_classes_which_need_not_all_have_images(tmp_path):
    npz(tmp_path / "a.npz", classes=np.array(["ant", "bee", "cat", "dog"]))
    data = load_dataset("npz", tmp_path / "a.npz")
    assert data.classes == ["ant", "bee", "cat", "dog"]
    assert all(type(name) is str for name in data.classes)  # json and torch.save know no np.str_


ZEROS = np.zeros((6, 9, 9), np.uint8)
SHAPES = "wanted is uint8 (N, H, W) or (N, H, W, C)"


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"x_test": None}, "no x_test; wanted are x_train, y_train, x_test, y_test"),
        ({"x_train": ZEROS.astype(np.float32)}, f"x_train is float32 (6, 9, 9); {SHAPES}"),
        ({"x_train": ZEROS[0]}, f"x_train is uint8 (9, 9); {SHAPES}"),
        (
            {"x_train": np.zeros((6, 3, 9, 9), np.uint8)},
            f"x_train is uint8 (6, 3, 9, 9); {SHAPES}, H and W at least 8",
        ),
        ({"x_test": ZEROS[:0]}, f"x_test is uint8 (0, 9, 9); {SHAPES}, H and W at least 8"),
        ({"x_train": np.full(6, None)}, "x_train cannot be read: Object arrays cannot be loaded"),
        ({"x_train": ZEROS[:5]}, "y_train is uint8 (6,); wanted are integers (5,)"),
        ({"y_test": np.zeros(4)}, "y_test is float64 (4,); wanted are integers (4,)"),
        ({"y_test": np.zeros((4, 2), int)}, "y_test is int64 (4, 2); wanted are integers (4,)"),
        ({"y_test": np.array([0, 1, 2, 3])}, "test: labels in 0..3; wanted are 0..2, for 3"),
        ({"y_test": np.array([0, 1, 2, -1])}, "test: labels in -1..2; wanted are 0..2, for 3"),
        (
            {"y_train": np.arange(6) % 3 + 1},
            "y_train has 3 labels in 1..3; wanted are 0..2, or an array `classes`",
        ),
        ({"y_train": np.zeros(6, int)}, "classes: 1; wanted are two or more"),
        ({"classes": np.arange(3)}, "classes is int64 (3,); wanted is str (K,)"),
        ({"classes": np.array(["a", "b"])}, "train: labels in 0..2; wanted are 0..1, for 2"),
        ({"x_train": np.zeros((6, 9, 9, 3), np.uint8)}, "train: 3 channels, test: 1"),
        ({"x_train": np.zeros((6, 9, 8), np.uint8)}, "images of 8x9 and 9x9 pixels; wanted is one"),
    ],
)
def test_a_mistake_in_an_npz_file_is_named_in_one_line(tmp_path, changes, says):
    file = tmp_path / "a.npz"
    npz(file, **changes)
    with pytest.raises(ValueError) as error:
        load_dataset("npz", file)
    assert str(error.value).startswith(f"npz {file}: {says}"), error.value
    assert "\n" not in str(error.value)


def test_what_is_no_npz_file_is_named_in_one_line(tmp_path):
    file = tmp_path / "a.npz"
    npz(file)
    whole = file.read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:300])
    (tmp_path / "spoilt.npz").write_bytes(whole[:200] + bytes(200) + whole[400:])
    (tmp_path / "text.npz").write_text("x_train")
    np.save(tmp_path / "array.npy", ZEROS)
    for name, says in (
        ("none.npz", " is not a file"),
        (".", " is not a file"),
        ("cut.npz", " is damaged, or not in the format that numpy.savez writes"),
        ("text.npz", " is damaged, or not in the format that numpy.savez writes"),
        ("array.npy", " is damaged, or not in the format that numpy.savez writes"),
        ("spoilt.npz", ": x_train cannot be read: "),
    ):
        with pytest.raises(ValueError) as error:
            load_dataset("npz", tmp_path / name)
        assert str(error.value).startswith(f"npz {tmp_path / name}{says}"), error.value
        assert "\n" not in str(error.value)


PIXELS = np.random.default_rng(0).integers(256, size=(5, 9, 8, 3), dtype=np.uint8)
PICTURES = [Image.fromarray(image) for image in PIXELS]
to_float = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


@pytest.mark.parametrize(
    "pictures",
    [
        PICTURES,
        list(PIXELS),
        [v2.functional.to_image(picture) for picture in PICTURES],
        [transforms.ToTensor()(picture) for picture in PICTURES],
        [transforms.ToTensor()(picture).double() for picture in PICTURES],
        [to_float(picture) for picture in PICTURES],
    ],
    ids=["PIL", "array", "uint8 tensor", "ToTensor", "float64", "v2.ToDtype"],
)
def test_images_of_a_torch_dataset_are_its_bytes(pictures):
    labels = [0, np.int64(2), torch.tensor(1), np.uint8(1), True]
    data = images_of(list(zip(pictures, labels, strict=True)))
    assert np.array_equal(data.images, PIXELS)
    assert data.labels.tolist() == [0, 2, 1, 1, 1]


def test_all_256_levels_survive_totensor():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for picture in (transforms.ToTensor()(levels), levels / 255, to_float(Image.fromarray(levels))):
        assert np.array_equal(images_of([(picture, 0)]).images[0, ..., 0], levels)


def test_grey_pictures_of_a_torch_dataset_have_one_channel():
    grey = [picture.convert("L") for picture in PICTURES]
    for pictures in (grey, [np.asarray(picture) for picture in grey]):
        images = images_of([(picture, 0) for picture in pictures]).images
        assert np.array_equal(images[..., 0], np.stack([np.asarray(p) for p in grey]))


@pytest.mark.parametrize(
    "item, says",
    [
        ((PICTURES[0].convert("P"), 0), "PIL image of mode P; wanted is RGB or L"),
        ((PIXELS[0].astype(np.int64), 0), "picture of int64 (9, 8, 3); wanted is uint8"),
        ((torch.zeros(9, 8), 0), "picture of float32 (9, 8); wanted is uint8, in three"),
        ((torch.randn(3, 9, 8), 0), "its floats are not k / 255; leave the normalisation out"),
        ((torch.full((3, 9, 8), 2.0), 0), "its floats are not k / 255"),
        ((torch.full((3, 9, 8), torch.nan), 0), "its floats are not k / 255"),
        ((PICTURES[0], 0.5), "'float' object cannot be interpreted as an integer"),
        ((PICTURES[0], 0, 1), "too many values to unpack"),
    ],
)
def test_an_item_of_a_torch_dataset_that_does_not_fit_is_named(item, says):
    with pytest.raises(ValueError) as error:
        images_of([(PICTURES[0], 0), item])
    assert str(error.value).startswith(f"item 1 is not a picture and an integer: {says}")


def test_torch_datasets_of_unlike_pictures_and_empty_ones_are_refused():
    with pytest.raises(
        ValueError, match=r"item 1 is \(8, 8, 3\), item 0 is \(9, 8, 3\): \(H, W, C\)"
    ):
        images_of([(PICTURES[0], 0), (PIXELS[0][:8], 0)])
    with pytest.raises(ValueError, match="the dataset has no items"):
        images_of([])


def fake(name, num_classes):
    """A stand-in with the attributes and layouts of the torchvision class."""

    class Fake:
        def __init__(self, root, download, train=None, split=None):
            assert download and (split in ("train", "test")) == (name == "svhn")
            n = 6 if train or split == "train" else 4
            if name == "fashion-mnist":
                self.data = torch.arange(n * 28 * 28).view(n, 28, 28).to(torch.uint8)
                self.targets = torch.arange(n) % num_classes
            elif name == "svhn":
                self.data = np.arange(n * 3 * 32 * 32).reshape(n, 3, 32, 32).astype(np.uint8)
                self.labels = np.arange(n) % num_classes
            else:
                self.data = np.arange(n * 3 * 32 * 32).reshape(n, 32, 32, 3).astype(np.uint8)
                self.targets = [i % num_classes for i in range(n)]
            if name != "svhn":
                self.classes = [f"class {i}" for i in range(num_classes)]

    return Fake


TORCHVISION = {
    "cifar10": ("CIFAR10", 10, (32, 32, 3)),
    "cifar100": ("CIFAR100", 100, (32, 32, 3)),
    "svhn": ("SVHN", 10, (32, 32, 3)),
    "fashion-mnist": ("FashionMNIST", 10, (28, 28, 1)),
}


@pytest.mark.parametrize("image_size", [None, 16])
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_datasets_become_images_last_channel(monkeypatch, tmp_path, name, image_size):
    attribute, num_classes, shape = TORCHVISION[name]
    make_fake = fake(name, num_classes)
    monkeypatch.setattr(torchvision.datasets, attribute, make_fake)
    data = load_dataset(name, tmp_path, image_size)
    assert len(data.classes) == num_classes
    for part, n in ((data.train, 6), (data.test, 4)):
        size = shape if image_size is None else (image_size, image_size, shape[2])
        assert part.images.shape == (n, *size)
        assert part.images.dtype == torch.uint8 and part.images.is_contiguous()
        assert part.labels.tolist() == list(range(n)) and part.labels.dtype == torch.int64
    if image_size is None:
        select = {"split": "train"} if name == "svhn" else {"train": True}
        raw = np.asarray(make_fake(tmp_path, True, **select).data)
        pixel = raw[2, :, 5, 7] if name == "svhn" else raw[2, 5, 7].reshape(-1)
        assert data.train.images[2, 5, 7].tolist() == pixel.tolist()


def test_a_package_that_a_dataset_needs_is_named(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    monkeypatch.setattr(torchvision.datasets, "SVHN", fail)
    with pytest.raises(ValueError, match="^dataset svhn needs scipy: pip install it$"):
        load_dataset("svhn", tmp_path)


@pytest.mark.parametrize("error", [RuntimeError("no\nnetwork"), OSError("no route"), OSError()])
@pytest.mark.parametrize("name", TORCHVISION)
def test_a_failed_download_names_the_alternatives(monkeypatch, tmp_path, name, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torchvision.datasets, TORCHVISION[name][0], fail)
    with pytest.raises(ValueError) as caught:
        load_dataset(name, tmp_path)
    line = str(caught.value)
    assert "\n" not in line and str(tmp_path) in line and name in line
    assert "--dataset folder" in line and "--dataset synthetic" in line


def test_a_constant_channel_has_the_deviation_one():
    images = torch.randint(256, (20, 8, 8, 4), dtype=torch.uint8)
    images[..., 3] = 255
    mean, std = channel_statistics(Images(images, torch.zeros(20, dtype=torch.long)))
    values = images[..., :3].double() / 255
    assert mean[3] == std[3] == 1
    torch.testing.assert_close(std[:3], values.std((0, 1, 2), correction=0).float())


def test_a_path_that_the_system_refuses_is_no_npz():
    with pytest.raises(ValueError, match="is not a file; wanted is --data-dir FILE.npz"):
        load_dataset("npz", "x" * 300, None, 0)
