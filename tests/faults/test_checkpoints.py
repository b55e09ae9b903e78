"""Damaged and hostile checkpoints; oracles: the checkpoint before it, an uninterrupted run."""

import io
import os
import pickle
import random
import shutil
import tarfile
import zipfile
from functools import partial

import pytest
import torch
from children import assert_same_result, before_save, die, exact, load

from darts_min.run.files import load_file
from darts_min.run.run_folder import CHECKPOINTS, RunFolder

CPU = torch.device("cpu")
FLIPS, CUTS = 40, 20


def flip(content, rng):
    place = rng.randrange(8 * len(content))
    content = bytearray(content)
    content[place // 8] ^= 1 << place % 8
    return bytes(content)


def cut(content, rng):
    return content[: rng.randrange(len(content))]


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of a whole run, whose previous.pt is the end of its first epoch."""
    for name in (*CHECKPOINTS, "args.json"):
        (tmp_path / "run").mkdir(exist_ok=True)
        shutil.copy(whole("search")[0] / name, tmp_path / "run" / name)
    return tmp_path / "run"


@pytest.mark.parametrize("damage, times", [(flip, FLIPS), (cut, CUTS)])
def test_no_damaged_checkpoint_is_loaded(folder, capsys, damage, times):
    rng, silent = random.Random(0), []
    last, previous = ((folder / name).read_bytes() for name in CHECKPOINTS)
    expected = exact(load(folder, "previous.pt"))
    for i in range(times):
        (folder / "last.pt").write_bytes(damage(last, rng))
        (folder / "previous.pt").write_bytes(previous)
        with RunFolder(folder, resume=True) as run:
            state = exact(run.load_checkpoint())
        printed = capsys.readouterr().out
        if state != expected or not (
            f"{folder / 'last.pt'} is damaged" in printed
            and "continuing from previous.pt, the one before it" in printed
        ):
            silent.append(i)
    assert silent == []


def test_no_flipped_bit_ever_changes_what_is_loaded(tmp_path):
    whole = {"w": torch.arange(64.0), "n": [1, 2.5, "three"], "m": {"v": torch.ones(3)}}
    path, rng = tmp_path / "state.pt", random.Random(1)
    torch.save(whole, path)
    content = path.read_bytes()
    for _ in range(400):
        path.write_bytes(flip(content, rng))
        try:
            assert exact(load_file(path)) == exact(whole)
        except ValueError as error:
            assert str(path) in str(error) and "damaged" in str(error)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(run, whole, folder):
    last = folder / "last.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    child = run("search", folder, "--resume")
    assert child.wait() == 0
    assert child.printed().count("continuing from previous.pt, the one before it") == 1
    assert "resumed in epoch 2, after step 0" in child.printed()
    assert_same_result(folder, whole("search")[0])


def test_a_damaged_checkpoint_takes_the_place_of_no_whole_one(run, folder):
    (folder / "last.pt").write_bytes(b"")
    for save in (1, 2, 3):
        child = run("search", folder, "--resume", fault=partial(before_save, save, die))
        assert child.wait() == -9
        found = [folder / name for name in CHECKPOINTS if (folder / name).exists()]
        assert [load_file(path)["progress"]["epoch"] for path in found] == [1] * len(found)
        assert len(found) == (1 if save == 1 else 2)


def test_with_both_damaged_both_are_named_and_none_is_touched(run, folder):
    contents = {name: cut((folder / name).read_bytes(), random.Random(2)) for name in CHECKPOINTS}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    child = run("search", folder, "--resume")
    assert child.wait() == 2
    (line,) = child.printed().splitlines()
    assert all(f"{folder / name} is damaged" in line for name in CHECKPOINTS)
    assert all((folder / name).read_bytes() == content for name, content in contents.items())


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def in_a_checkpoint(path, hostile):
    torch.save({**torch.load(path, weights_only=True), "more": {"deep": [hostile]}}, path)


def in_the_old_format(path, hostile):
    torch.save({"model": hostile}, path, _use_new_zipfile_serialization=False)


def as_a_pickle(path, hostile):
    path.write_bytes(pickle.dumps(hostile))


def as_torchscript(path, hostile):
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code.pkl"):
            archive.writestr(f"archive/{name}", pickle.dumps(hostile))
        archive.writestr("archive/version", "3\n")


def as_a_tar(path, hostile):
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            entry = tarfile.TarInfo(name)
            content = pickle.dumps(hostile)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize(
    "write", [in_a_checkpoint, in_the_old_format, as_a_pickle, as_torchscript, as_a_tar]
)
def test_a_hostile_pickle_leaves_no_trace_of_having_run(folder, tmp_path, capsys, write):
    trace = tmp_path / "trace"
    expected = exact(load(folder, "previous.pt"))
    write(folder / "last.pt", Hostile(trace))
    with RunFolder(folder, resume=True) as run:
        assert exact(run.load_checkpoint()) == expected
    assert f"{folder / 'last.pt'} is " in capsys.readouterr().out
    assert not trace.exists()
    pickle.loads(pickle.dumps(Hostile(trace)))
    assert trace.exists()  # it would have


def test_a_run_tells_of_a_hostile_pickle_and_goes_on_from_the_one_before(run, whole, folder):
    trace = folder.parent / "trace"
    in_a_checkpoint(folder / "last.pt", Hostile(trace))
    child = run("search", folder, "--resume")
    assert child.wait() == 0
    assert "holds a Python object" in child.printed() and "mkdir" in child.printed()
    assert not trace.exists()
    assert_same_result(folder, whole("search")[0])


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2]])
def test_a_whole_file_that_is_no_checkpoint_gives_one_line(run, folder, content):
    for name in CHECKPOINTS:
        torch.save(content, folder / name)
    child = run("search", folder, "--resume")
    assert child.wait() == 2
    (line,) = child.printed().splitlines()
    assert str(folder / "last.pt") in line
