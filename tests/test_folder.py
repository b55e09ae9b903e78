"""Oracles: the transforms of the original code's train_imagenet.py, slices and sums by hand."""

import os
import random
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from darts_min.data import (
    Dataset,
    FileLoader,
    balanced_subset,
    channel_statistics,
    generator_of,
    into_memory,
    load_dataset,
    make_loader,
)
from darts_min.data.folder import IMAGENET_STATISTICS, find_files, fits_in_memory

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
CPU = torch.device("cpu")
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
workers = pytest.mark.parametrize("num_workers", [0, 2])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def write_images(root, per_class=3, sizes=((240, 224), (224, 250), (231, 227))):
    """JPEG files of noise in blocks, so that no two crops of them are alike."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                blocks = rng.integers(256, size=(28, 28, 3), dtype=np.uint8)
                Image.fromarray(blocks).resize(sizes[i % len(sizes)]).save(folder / f"{i}.jpg")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_images(root)
    return found(root)


def found(root):
    return Dataset(*find_files(root))


def train_loader(files, seed=0, num_workers=0, batch_size=2):
    return file_loader(files, batch_size, seed=seed, augment=True, num_workers=num_workers)


def file_loader(files, batch_size, num_workers=0, image_size=32, **more):
    more = {"device": CPU, "image_size": image_size, "num_workers": num_workers} | more
    return FileLoader(files, batch_size, IMAGENET_STATISTICS, **more)


def same_batches(a, b):
    pairs = list(zip(a, b, strict=True))
    return all(torch.equal(x, x2) and torch.equal(y, y2) for (x, y), (x2, y2) in pairs)


def test_files_are_labelled_by_their_folder_in_the_order_of_their_names(tmp_path):
    write_images(tmp_path, per_class=2, sizes=((8, 8),))
    for name in ("1.png", "B.JPEG", "notes.txt", ".hidden.jpg"):
        (tmp_path / "train" / "dog" / name).write_bytes(b"")
    (tmp_path / "train" / ".cache").mkdir()
    data = found(tmp_path)
    assert data.classes == ["cat", "dog"] and "1 .txt" in data.notes[0]
    names = [path.split(os.sep)[-2:] for path in data.train.paths]
    assert names == [[k, f"{i}.jpg"] for k in ("cat", "dog") for i in range(2)][:3] + [
        ["dog", "1.jpg"],
        ["dog", "1.png"],
        ["dog", "B.JPEG"],
    ]
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1, 1]
    assert data.test.labels.tolist() == [0, 0, 1, 1] and data.test.labels.dtype == torch.int64


def test_a_balanced_subset_of_files_keeps_paths_and_labels_together(files):
    subset = balanced_subset(files.train, 4, seeded())
    assert sorted(subset.labels.tolist()) == [0, 0, 1, 1] and len(set(subset.paths)) == 4
    for path, label in zip(subset.paths, subset.labels, strict=True):
        assert path.split(os.sep)[-2] == files.classes[label]


@workers
@pytest.mark.parametrize("batch_size", [1, 4, 6, 100])
def test_evaluation_gives_every_file_once_in_order(files, batch_size, num_workers):
    loader = file_loader(files.test, batch_size, num_workers)
    transform = transforms.Compose(
        [
            transforms.Resize(36),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    batches = list(loader)
    assert len(batches) == len(loader) == -(-6 // batch_size)
    x, target = (torch.cat(part) for part in zip(*batches, strict=True))
    close(x, torch.stack([transform(Image.open(path)) for path in files.test.paths]))
    assert x.dtype == torch.float32 and target.dtype == torch.int64
    assert target.tolist() == [0, 0, 0, 1, 1, 1]


def test_evaluation_sees_the_middle_of_an_image_that_needs_no_resizing(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(256, 280, 3), dtype=np.uint8)
    write_images(tmp_path, per_class=1, sizes=((8, 8),))
    path = tmp_path / "test" / "cat" / "0.png"
    Image.fromarray(pixels).save(path)
    (tmp_path / "test" / "cat" / "0.jpg").unlink()
    loader = file_loader(found(tmp_path).test, 1, image_size=224)
    middle = torch.from_numpy(pixels[16 : 16 + 224, 28 : 28 + 224]) / 255
    close(next(iter(loader))[0][0], ((middle - MEAN) / STD).permute(2, 0, 1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_one_colour_is_normalised_by_the_statistics_of_imagenet(tmp_path, memory_format):
    write_images(tmp_path, per_class=1)
    for part in ("train", "test"):
        Image.new("RGB", (60, 50), (200, 100, 7)).save(tmp_path / part / "cat" / "0.jpg", "PNG")
    loader = file_loader(found(tmp_path).test, 2, image_size=24, memory_format=memory_format)
    x = next(iter(loader))[0]
    expected = [(200 / 255 - 0.485) / 0.229, (100 / 255 - 0.456) / 0.224, (7 / 255 - 0.406) / 0.225]
    close(x[0], torch.tensor(expected)[:, None, None].expand(3, 24, 24))
    assert x.shape == (2, 3, 24, 24) and x.is_contiguous(memory_format=memory_format)


@workers
def test_training_images_are_those_of_the_original_code(files, num_workers):
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(32),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    order = torch.randperm(6, generator=generator_of(7, 0, 0)).tolist()
    seeds = []
    for batch in range(3):
        seeds += torch.randint(2**31, (2,), generator=generator_of(7, 0, 1 + batch, 0)).tolist()
    expected = []
    for index, seed in zip(order, seeds, strict=True):
        torch.manual_seed(seed)
        expected.append(transform(Image.open(files.train.paths[index])))
    batches = list(train_loader(files.train, 7, num_workers))
    close(torch.cat([x for x, _ in batches]), torch.stack(expected))
    assert torch.equal(torch.cat([y for _, y in batches]), files.train.labels[order])


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_training_shuffles_anew_and_drops_the_incomplete_batch(files, batch_size):
    numbered = files.train._replace(labels=torch.arange(6))
    loader = train_loader(numbered, batch_size=batch_size)
    orders = set()
    for epoch in range(3):
        batches = [target for _, target in loader.epoch(epoch)]
        assert len(batches) == len(loader) == 6 // batch_size
        assert all(len(target) == batch_size for target in batches)
        orders.add(tuple(torch.cat(batches).tolist()))
        assert len(set(torch.cat(batches).tolist())) == 6 // batch_size * batch_size
    assert len(orders) == 3


def test_copies_of_one_image_are_augmented_differently_in_a_batch_and_in_each_pass(files):
    copies = files.train.take(torch.zeros(4, dtype=torch.int64))
    loader = train_loader(copies, batch_size=4)
    images = torch.cat([next(loader.epoch(epoch))[0] for epoch in range(2)]).flatten(1)
    assert (torch.cdist(images, images) + 100 * torch.eye(8)).min() > 5


def test_the_batches_come_from_the_seed_alone(files):
    """Neither the global generators nor the number of workers matter."""
    batches = []
    for seed, num_workers in ((0, 0), (0, 1), (0, 2), (1, 2)):
        torch.manual_seed(99 + num_workers)
        random.seed(num_workers)
        np.random.seed(num_workers)
        batches.append(list(train_loader(files.train, seed, num_workers)))
    assert same_batches(batches[0], batches[1]) and same_batches(batches[0], batches[2])
    assert not same_batches(batches[0], batches[3])


@workers
def test_an_epoch_goes_on_from_any_batch(files, num_workers):
    loader = train_loader(files.train, num_workers=num_workers)
    first, second = list(loader.epoch(1)), list(loader.epoch(2))
    for done in range(4):
        assert same_batches(loader.epoch(2, done), second[done:])
    assert not same_batches(first, second)


def test_processes_share_the_files_of_an_epoch(files):
    seen = []
    for rank in range(2):
        seen.append([x for x, _ in file_loader(files.test, 1, shard=(rank, 2))])
    for k, (x, _) in enumerate(file_loader(files.test, 1)):
        assert torch.equal(seen[k % 2][k // 2], x)
    assert sum(map(len, seen)) == 6


@workers
@pytest.mark.parametrize("augment", [False, True])
def test_the_global_generators_are_left_alone(files, num_workers, augment):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    batches = iter(file_loader(files.train, 2, num_workers, augment=augment))
    next(batches)
    assert torch.equal(torch.get_rng_state(), before[0])
    list(batches)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


@workers
@pytest.mark.parametrize("augment", [False, True])
def test_a_damaged_image_is_named_in_one_line(tmp_path, num_workers, augment):
    write_images(tmp_path, per_class=2)
    path = tmp_path / "train" / "dog" / "0.jpg"
    path.write_bytes(path.read_bytes()[:900])
    files = found(tmp_path).train
    with pytest.raises(ValueError) as error:
        list(file_loader(files, 2, num_workers, augment=augment))
    assert str(error.value).startswith(f"image {path} cannot be read: ")
    assert "\n" not in str(error.value)


def move_and_link(path, target):
    path.rename(target)
    path.symlink_to(target)


@pytest.mark.parametrize("inside", ["test/dog", "test/dog/1.jpg"])
def test_a_link_out_of_the_folder_is_refused_by_name(tmp_path, inside):
    write_images(tmp_path / "data", sizes=((8, 8),))
    move_and_link(tmp_path / "data" / inside, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link that leads out of the data folder") as error:
        found(tmp_path / "data")
    assert str(error.value).startswith(str(tmp_path / "data" / inside))
    assert "\n" not in str(error.value)


def test_links_within_the_folder_and_of_whole_parts_are_followed(tmp_path):
    write_images(tmp_path / "data", sizes=((8, 8),))
    move_and_link(tmp_path / "data" / "train" / "cat" / "1.jpg", tmp_path / "data" / "moved.jpg")
    move_and_link(tmp_path / "data" / "test", tmp_path / "val")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    data = found(tmp_path / "link")
    assert len(data.train.labels) == len(data.test.labels) == 6


def test_what_only_looks_like_an_image_is_refused_by_name(tmp_path):
    write_images(tmp_path, sizes=((8, 8),))
    (tmp_path / "train" / "cat" / "album.jpg").mkdir()
    with pytest.raises(ValueError, match=r"album\.jpg is not a file"):
        found(tmp_path)


@pytest.mark.parametrize(
    "part, old, new, says",
    [
        ("test", ".", "../other", "does not exist"),
        ("test", "dog", "emu", r"classes \['dog', 'emu'\] are in only one of train and test"),
        ("both", "dog", ".dog", "one class, 'cat'; two are needed"),
        ("train", "dog", "../gone", r"classes \['dog'\] are in only one"),
    ],
)
def test_a_bad_folder_is_named_in_one_line(tmp_path, part, old, new, says):
    write_images(tmp_path, sizes=((8, 8),))
    for folder in ("train", "test") if part == "both" else (part,):
        (tmp_path / folder / old).resolve().rename(tmp_path / folder / new)
    with pytest.raises(ValueError, match=says) as error:
        found(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes are Linux's")
def test_a_class_that_could_not_be_logged_is_named(tmp_path):
    write_images(tmp_path, sizes=((8, 8),))
    for part in (b"train", b"test"):
        folder = os.path.join(os.fsencode(tmp_path), part)
        os.rename(os.path.join(folder, b"cat"), os.path.join(folder, b"caf\xe9"))
    with pytest.raises(ValueError, match=r"caf\\udce9': its name is not UTF-8"):
        found(tmp_path)


def test_what_is_passed_over_is_counted_in_one_note(tmp_path):
    write_images(tmp_path, sizes=((8, 8),))
    assert found(tmp_path).notes == ()
    for part, name in (("train", "a.heic"), ("train", "b.HEIC"), ("test", "c.heic"), ("test", "d")):
        (tmp_path / part / "cat" / name).touch()
    (tmp_path / "train" / "dog" / "more").mkdir()
    (tmp_path / "train" / "dog" / ".hidden").touch()
    says = (
        "5 entries of class folders (3 .heic, 1 folders, 1 without suffix) are not read, because "
        "their suffix is not that of a picture"
    )
    assert load_dataset("folder", tmp_path).notes == found(tmp_path).notes == (says,)


@pytest.mark.parametrize(
    "suffix, form",
    [
        (".jfif", "JPEG"),
        (".jpe", "JPEG"),
        (".JPG", "JPEG"),
        (".pgm", "PPM"),
        (".pbm", "PPM"),
        (".pnm", "PPM"),
        (".tga", "TGA"),
        (".tiff", "TIFF"),
        (".webp", "WEBP"),
        (".gif", "GIF"),
        (".bmp", "BMP"),
    ],
)
def test_each_suffix_that_is_listed_is_read(tmp_path, suffix, form):
    write_images(tmp_path, per_class=1, sizes=((16, 16),))
    grey = Image.new("1" if suffix == ".pbm" else "L", (16, 16), 255)
    grey.save(tmp_path / "train" / "cat" / f"new{suffix}", form)
    train = load_dataset("folder", tmp_path).train
    place = found(tmp_path).train.paths.tolist().index(str(tmp_path / f"train/cat/new{suffix}"))
    assert len(train.labels) == 3 and (train.images[place] >= 250).all()


@pytest.mark.parametrize("in_memory", ["always", "never"])
def test_an_unreadable_picture_is_named_once(tmp_path, in_memory):
    write_images(tmp_path, per_class=1, sizes=((16, 16),))
    path = tmp_path / "train" / "cat" / "0.jpg"
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError) as error:
        data = load_dataset("folder", tmp_path, 16, in_memory=in_memory)
        list(file_loader(data.train, 2, image_size=16))
    assert str(error.value) == f"image {path} cannot be read: Pillow knows no such picture"


def test_a_class_without_images_is_named(tmp_path):
    write_images(tmp_path, per_class=1, sizes=((8, 8),))
    (tmp_path / "test" / "dog" / "0.jpg").rename(tmp_path / "test" / "dog" / "0.txt")
    with pytest.raises(ValueError, match="dog: no images; it has 1 .txt"):
        found(tmp_path)


@pytest.mark.parametrize("batch_size, augment", [(7, True), (0, True), (0, False), (-3, False)])
def test_impossible_batch_sizes_are_named(files, batch_size, augment):
    with pytest.raises(ValueError, match=f"batch size {batch_size}"):
        file_loader(files.train, batch_size, augment=augment)


def test_small_image_sizes_are_refused(files):
    for size in (7, None):
        with pytest.raises(ValueError, match=f"image size {size}: must be at least 8"):
            file_loader(files.train, 2, image_size=size)


GIB = 2**30


def write_grey(root, modes=("L", "L"), size=(30, 30)):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name, mode in zip(("cat", "dog"), modes, strict=True):
            (root / part / name).mkdir(parents=True)
            for i in range(2):
                pixels = rng.integers(256, size=(*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(root / part / name / f"{i}.png")


def test_one_channel_is_pillows_grey_in_memory(tmp_path):
    write_grey(tmp_path, modes=("L", "RGB"))
    for size in (None, 12):
        data = load_dataset("folder", tmp_path, size, channels=1)
        files = find_files(tmp_path, channels=1)[0]
        for path, image in zip(files.paths, data.train.images, strict=True):
            picture = Image.open(path).convert("L")
            picture = picture.resize((size, size), Image.BILINEAR) if size else picture
            assert image.shape[2] == 1 and np.array_equal(image[..., 0], picture)


@pytest.mark.parametrize("in_memory", ["always", "never"])
@pytest.mark.parametrize(
    "modes, channels, is_noted",
    [
        (("L", "L"), None, True),
        (("1", "LA"), None, True),
        (("L", "RGB"), None, False),
        (("RGB", "RGB"), None, False),
        (("L", "L"), 1, False),
        (("L", "L"), 3, False),
    ],
)
def test_a_note_says_that_grey_pictures_became_rgb(tmp_path, modes, channels, is_noted, in_memory):
    write_grey(tmp_path, modes)
    data = load_dataset("folder", tmp_path, 16, in_memory=in_memory, channels=channels)
    note = "pictures are grey and were read as RGB; --channels 1 reads one channel"
    assert data.notes == ((note,) if is_noted else ())
    assert data.train.channels == data.test.channels == (channels or 3)


@workers
def test_grey_files_are_evaluated_as_grey(tmp_path, num_workers):
    write_grey(tmp_path, size=(40, 40))
    files = find_files(tmp_path, channels=1)[1]
    statistics = torch.tensor([0.4]), torch.tensor([0.2])
    loader = make_loader(files, 3, statistics, device=CPU, image_size=32, num_workers=num_workers)
    transform = transforms.Compose(
        [
            transforms.Resize(36),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(0.4, 0.2),
        ]
    )
    x = torch.cat([x for x, _ in loader])
    assert x.shape == (4, 1, 32, 32)
    close(x, torch.stack([transform(Image.open(path)) for path in files.paths]))


@workers
def test_grey_files_are_trained_on_with_other_brightness_and_contrast_only(tmp_path, num_workers):
    write_grey(tmp_path)
    files = find_files(tmp_path, channels=1)[0].take(torch.tensor([2]))
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(16),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(brightness=0.4, contrast=0.4),
            transforms.ToTensor(),
        ]
    )
    plain = torch.zeros(1), torch.ones(1)
    options = {"image_size": 16, "seed": 7, "augment": True, "num_workers": num_workers}
    loader = make_loader(files, 1, plain, device=CPU, **options)
    for epoch in range(5):
        seed = torch.randint(2**31, (1,), generator=generator_of(7, epoch, 1, 0))
        torch.manual_seed(int(seed))
        close(next(loader.epoch(epoch))[0][0], transform(Image.open(files.paths[0])))


def test_statistics_of_grey_files_are_those_of_imagenet_as_pillow_weights_them(tmp_path):
    write_grey(tmp_path)
    mean, std = channel_statistics(find_files(tmp_path, channels=1)[0])
    pixel = Image.fromarray((np.array([[[0.485, 0.456, 0.406]]]) * 255).round().astype(np.uint8))
    assert mean.shape == std.shape == (1,)
    assert abs(mean.item() * 255 - np.asarray(pixel.convert("L")).item()) < 1
    close(std.item(), 0.299 * 0.229 + 0.587 * 0.224 + 0.114 * 0.225)


def let_memory_be(monkeypatch, memory):
    sizes = {"SC_PHYS_PAGES": memory, "SC_PAGE_SIZE": 1}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__, raising=False)


def test_images_that_fill_more_than_half_of_the_memory_are_refused_with_advice(
    tmp_path, monkeypatch
):
    write_images(tmp_path)
    needed = 6 * 3 * 224**2
    let_memory_be(monkeypatch, 2 * needed)
    assert load_dataset("folder", tmp_path, 224).train.images.shape == (6, 224, 224, 3)
    let_memory_be(monkeypatch, 2 * needed - 1)
    with pytest.raises(ValueError) as error:
        load_dataset("folder", tmp_path, 224)
    assert str(error.value) == (
        "6 images of 224x224 take 0.0 GiB, more than half of the memory, 0.0 GiB; give a smaller "
        "--image-size, a --subset to the search, or --in-memory never to the other scripts"
    )
    one_channel = load_dataset("folder", tmp_path, 224, channels=1)
    assert one_channel.train.images.shape == (6, 224, 224, 1)


def test_imagenet_does_not_fit_and_the_advice_has_its_numbers(tmp_path, monkeypatch):
    write_images(tmp_path, per_class=1)
    files = find_files(tmp_path)[0].take(torch.zeros(1_281_167, dtype=torch.int64))
    let_memory_be(monkeypatch, 64 * GIB)
    says = "1281167 images of 224x224 take 179.6 GiB, more than half of the memory, 64.0 GiB"
    with pytest.raises(ValueError, match=says):
        into_memory(files, 224)


def test_a_subset_of_a_folder_that_does_not_fit_is_read_into_memory(tmp_path, monkeypatch):
    write_images(tmp_path)
    whole = load_dataset("folder", tmp_path, 32)
    let_memory_be(monkeypatch, 2 * 4 * 3 * 32**2)  # half of it holds four images
    data = load_dataset("folder", tmp_path, 32, in_memory="auto")
    subset = into_memory(balanced_subset(data.train, 4, seeded()), 32)
    expected = balanced_subset(whole.train, 4, seeded())
    assert torch.equal(subset.images, expected.images)
    assert torch.equal(subset.labels, expected.labels)
    assert into_memory(whole.train) is whole.train
    with pytest.raises(ValueError, match="5 images of 32x32 take"):
        into_memory(balanced_subset(data.train, 5, seeded()), 32)


@pytest.mark.parametrize("memory", [4 * GIB, 64 * GIB])
def test_a_quarter_of_the_memory_may_be_filled(monkeypatch, memory):
    sizes = {"SC_PHYS_PAGES": memory // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__, raising=False)
    most = memory // 4 // (3 * 224**2)
    assert fits_in_memory(most, 224, CPU) and not fits_in_memory(most + 1, 224, CPU)
    assert fits_in_memory(memory // 4 // (3 * 32**2), 32, CPU)
    assert fits_in_memory(3 * most, 224, CPU, channels=1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # of torchrun: four processes share it
    assert fits_in_memory(most // 4, 224, CPU) and not fits_in_memory(most // 4 + 1, 224, CPU)


def test_a_smaller_gpu_sets_the_limit(monkeypatch):
    sizes = {"SC_PHYS_PAGES": 16 * GIB // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__, raising=False)
    gpu = SimpleNamespace(total_memory=8 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    most = 2 * GIB // (3 * 224**2)
    cuda = torch.device("cuda")
    assert fits_in_memory(most, 224, cuda) and not fits_in_memory(most + 1, 224, cuda)
    assert fits_in_memory(most + 1, 224, CPU)


def test_two_gib_may_be_filled_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.delattr(os, "sysconf", raising=False)
    most = 2 * GIB // (3 * 64**2)
    assert fits_in_memory(most, 64, CPU) and not fits_in_memory(most + 1, 64, CPU)


def test_links_in_a_circle_are_refused_by_name(tmp_path):
    write_images(tmp_path)
    link = tmp_path / "train" / "cat" / "1.png"
    link.symlink_to(link)
    with pytest.raises(ValueError, match="1.png") as error:
        found(tmp_path)
    assert "\n" not in str(error.value)
