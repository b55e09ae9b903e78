"""Disks that are full, and folders that cannot be written to; oracle: an uninterrupted run.

`Outage` takes the disk away in the process itself, from a save on until another one begins.
"""

import ctypes
import errno
import os
import resource
import signal
import subprocess
from functools import partial

import pytest
from children import (
    SCRIPTS,
    assert_same_result,
    before_save,
    load,
    raise_signal,
    run_script,
)

from darts_min.run import run_folder
from darts_min.run.files import load_file
from darts_min.run.run_folder import RunFolder

WARNING = "warning: the checkpoint (the one before is whole) could not be written: "


class Outage:
    """From the save `first` on the disk is gone, and it is back before the save `last` begins."""

    def __init__(self, first, last, folder=None):
        self.first, self.last, self.folder = first, last, folder

    def __call__(self):
        before_save(self.first, self.begin)
        before_save(self.last, self.end)


class Full(Outage):
    """No file may grow beyond 8 KiB: EFBIG."""

    limit = 2**13

    def begin(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))

    def end(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


class FullFileSystem(Outage):
    """A file fills the file system of the run folder: ENOSPC."""

    def begin(self):
        with open(self.folder.parent / "filler", "wb", buffering=0) as file:
            try:
                while file.write(bytes(2**12)):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC

    def end(self):
        os.remove(self.folder.parent / "filler")


class ReadOnly(Outage):
    """The folder's mode is that of one that is only read: EACCES.

    It does not stop root; so the process gives up the capability to override modes.
    """

    def __call__(self):
        super().__call__()
        if os.geteuid() == 0:
            header = (ctypes.c_uint32 * 2)(0x20080522, 0)
            capabilities = (ctypes.c_uint32 * 6)()
            libc = ctypes.CDLL(None)
            libc.capget(header, capabilities)
            capabilities[0] &= ~(1 << 1)  # CAP_DAC_OVERRIDE, of the effective ones
            libc.capset(header, capabilities)

    def begin(self):
        os.chmod(self.folder, 0o500)
        if os.access(self.folder, os.W_OK, effective_ids=True):
            raise SystemExit(77)

    def end(self):
        os.chmod(self.folder, 0o700)


class Replaced(Outage):
    """A file is in the folder's place: ENOTDIR."""

    def begin(self):
        self.folder.rename(self.folder.with_name("moved"))
        self.folder.write_text("")

    def end(self):
        self.folder.unlink()
        self.folder.with_name("moved").rename(self.folder)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(tmp_path / "disk")]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"only root may mount a file system: {error}")
    yield tmp_path / "disk"
    subprocess.run(["umount", "-l", tmp_path / "disk"], check=True)


def fail_and_recover(run, whole, outage, number):
    child = run("search", outage.folder, fault=outage)
    code = child.wait()
    if code == 77:
        pytest.skip("this process may write to a folder whatever its mode is")
    assert code == 0, child.printed()
    warnings = [line for line in child.printed().splitlines() if line.startswith(WARNING)]
    assert len(warnings) == 1 and f"[Errno {number}]" in warnings[0]
    assert "\nerror:" not in child.printed()
    assert_same_result(outage.folder, whole("search")[0])
    assert len(load(outage.folder, "previous.pt")["history"]) == 1  # it is not that of save 2


@pytest.mark.parametrize(
    "outage, number",
    [
        (Full, errno.EFBIG),
        pytest.param(ReadOnly, errno.EACCES, marks=pytest.mark.slow),
        pytest.param(Replaced, errno.ENOTDIR, marks=pytest.mark.slow),
    ],
)
def test_a_run_outlives_an_outage_of_the_disk_and_ends_as_one_without(
    run, whole, tmp_path, outage, number
):
    fail_and_recover(run, whole, outage(3, 9, tmp_path / "run"), number)


def test_a_run_outlives_a_file_system_that_is_full_for_a_while(run, whole, small_disk):
    fail_and_recover(run, whole, FullFileSystem(3, 9, small_disk / "run"), errno.ENOSPC)


@pytest.mark.slow
def test_on_a_disk_that_stays_full_the_run_ends_with_an_error_and_a_whole_checkpoint(
    run, whole, tmp_path
):
    folder, seen = tmp_path / "run", []
    child = run("search", folder, fault=Full(3, 99))
    assert child.wait() == 1
    printed = child.printed()
    assert printed.count(WARNING) == 1
    assert "epoch   2/2" in printed and "accuracy on the alpha half" in printed
    assert printed.splitlines()[-1].startswith(
        f"error: not everything could be written to {folder}: the checkpoint"
    )
    for name in ("last.pt", "previous.pt"):
        state = load_file(folder / name)
        seen.append((state["progress"]["epoch"], state["progress"]["step"]))
        assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert seen == [(0, 2), (0, 1)]
    assert not list(folder.glob("*.tmp"))
    resumed = run("search", folder, "--resume")
    assert resumed.wait() == 0, resumed.printed()
    assert_same_result(folder, whole("search")[0])


def test_each_later_save_is_tried_while_the_disk_is_full(tmp_path, monkeypatch, capsys):
    run, tried = RunFolder(tmp_path / "run"), []

    def full(path, content, keep_as=None):
        tried.append(content)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_atomically", full)
        for step in range(5):
            run.save_checkpoint({"step": step})
        with pytest.raises(SystemExit, match="not everything could be written"):
            run.check_written()
    assert len(tried) == len(set(tried)) == 5
    assert capsys.readouterr().err.count(WARNING) == 1
    run.save_checkpoint({"step": 5})
    run.check_written()
    assert load(tmp_path / "run") == {"step": 5}


def test_a_full_disk_is_told_in_lines_without_tracebacks(run, tmp_path):
    child = run("search", tmp_path / "run", fault=Full(3, 9))
    child.wait()
    assert "Traceback" not in child.printed()


def make_folder(path):
    path.mkdir()


# What is written once per epoch, and before the last checkpoint: a resumed run is past it.
@pytest.mark.parametrize(
    "name, file",
    [
        ("search", "genotype.json"),
        pytest.param("final", "network.pt", marks=pytest.mark.slow),
    ],
)
def test_a_result_that_could_not_be_written_is_written_by_the_resumed_run(
    run, whole, tmp_path, name, file
):
    folder = tmp_path / "run"
    blocked = folder / f"{file}.tmp"  # a folder of the name that the file has at first
    child = run(name, folder, fault=partial(before_save, 3, partial(make_folder, blocked)))
    assert child.wait() == 1
    assert child.printed().count(f"warning: {file} could not be written") == 1
    blocked.rmdir()
    assert not (folder / file).exists() or name == "search"
    resumed = run(name, folder, "--resume")
    assert resumed.wait() == 0, resumed.printed()
    assert_same_result(folder, whole(name)[0])


def test_sigterm_while_the_disk_is_full_says_what_was_saved_and_the_run_can_go_on(
    run, whole, tmp_path
):
    folder = tmp_path / "run"
    child = run("search", folder, fault=FullThenSigterm(3, 99))
    assert child.wait() == 128 + signal.SIGTERM
    assert child.printed().count(WARNING) == 1
    resumed = run("search", folder, "--resume")
    assert resumed.wait() == 0
    assert "resumed in epoch 1, after step 2" in resumed.printed()
    assert_same_result(folder, whole("search")[0])


class FullThenSigterm(Full):
    def begin(self):
        super().begin()
        raise_signal(signal.SIGTERM)


def test_a_full_disk_that_also_holds_the_output_does_not_end_the_run(run, whole, tmp_path):
    child = run("search", tmp_path / "run", fault=FullForAll(3, 9))
    assert child.wait() == 0, child.printed()
    assert "accuracy on the alpha half" in child.printed()  # after the outage
    assert_same_result(tmp_path / "run", whole("search")[0])


class FullForAll(Full):
    """Not even what the process prints finds room in its file."""

    limit = 1


def test_a_reader_of_the_output_that_goes_away_does_not_end_the_run(start, whole, tmp_path):
    script, arguments = SCRIPTS["search"]
    child = start(run_without_reader, script, arguments, tmp_path / "run")
    assert child.wait() == 0, child.printed()
    assert_same_result(tmp_path / "run", whole("search")[0])


def test_a_reader_of_the_output_that_goes_away_does_not_end_the_evaluation(start, whole, tmp_path):
    weights = whole("final")[0] / "network.pt"
    arguments = ["--dataset", "synthetic", "--weights", str(weights), "--fast-dev-run"]
    arguments += ["--device", "cpu"]
    child = start(run_without_reader, "eval_pretrained", arguments, tmp_path / "run")
    assert child.wait() == 0, child.printed()
    assert not child.printed()
    assert (tmp_path / "run" / "result.json").is_file()


def run_without_reader(script, arguments, folder):
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    os.close(reading)
    run_script(script, [*arguments, "--out-dir", str(folder)])


def test_evaluation_on_a_full_disk_ends_with_an_error(start, whole, tmp_path):
    weights = whole("final")[0] / "network.pt"
    arguments = ["--dataset", "synthetic", "--weights", str(weights), "--fast-dev-run"]
    arguments += ["--out-dir", str(tmp_path / "run"), "--device", "cpu"]
    child = start(run_script, "eval_pretrained", arguments, without_results)
    assert child.wait() == 1
    assert "result.json could not be written" in child.printed()


def without_results():
    write = run_folder.write_atomically

    def full(path, content, keep_as=None):
        if path.name == "result.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content, keep_as)

    run_folder.write_atomically = full
