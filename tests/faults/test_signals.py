"""SIGINT, SIGTERM, and two processes on one run folder; oracle: an uninterrupted run."""

import errno
import os
import shlex
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from children import (
    EACH_STEP,
    ROOT,
    SCRIPTS,
    assert_same_result,
    before,
    before_save,
    load,
    raise_signal,
    run_script,
)

from darts_min.run import evaluation, run_folder
from darts_min.run.files import load_file
from darts_min.run.run_folder import CHECKPOINTS, RunFolder

INT, TERM = signal.SIGINT, signal.SIGTERM
CODES = {INT: 130, TERM: 143}


def command_in(printed):
    """Return the arguments of the last line's command."""
    last = printed.splitlines()[-1]
    assert last.startswith("stopped by SIG"), printed
    python, script, *arguments = shlex.split(last.partition("continue with: ")[2])
    assert python == "python"
    return script, arguments


def resume(start, printed):
    script, arguments = command_in(printed)
    child = start(run_script, script.removesuffix(".py"), arguments)
    assert child.wait() == 0, child.printed()
    return child


@pytest.mark.parametrize("name, number", [("search", INT), ("final", TERM)])
def test_a_signal_ends_the_run_after_a_save_and_the_printed_command_continues_it(
    start, whole, tmp_path, name, number
):
    script, arguments = SCRIPTS[name]  # at --checkpoint-minutes 10: nothing else saves
    arguments = [*arguments, "--out-dir", str(tmp_path / "run with spaces")]
    child = start(run_script, script, arguments)
    child.wait_for("epoch   1/2")
    child.send(number)
    assert child.wait() == CODES[number]
    assert child.printed().count("stopped by") == 1 and "Traceback" not in child.printed()
    assert "stopped by" in (tmp_path / "run with spaces" / "log.txt").read_text()
    resume(start, child.printed())
    assert_same_result(tmp_path / "run with spaces", whole(name)[0])


@pytest.mark.parametrize("save, place", [(2, (0, 2)), (5, (0, 3)), (10, (1, 0))])
@pytest.mark.slow
def test_a_signal_in_training_evaluation_or_at_the_end_of_an_epoch_loses_no_step(
    run, start, whole, tmp_path, save, place
):
    fault = partial(before_save, save, partial(raise_signal, TERM))
    child = run("search", tmp_path / "run", fault=fault)
    assert child.wait() == 143
    progress = load(tmp_path / "run")["progress"]
    assert (progress["epoch"], progress["step"]) == place
    resumed = resume(start, child.printed())
    assert f"resumed in epoch {place[0] + 1}, after step {place[1]}" in resumed.printed()
    assert_same_result(tmp_path / "run", whole("search")[0])


def long_step(seconds):
    """Make the first batch of the first evaluation take long."""
    wait = partial(time.sleep, seconds)
    before(evaluation.F, "cross_entropy", 4, lambda: (print("now", flush=True), wait()))


@pytest.mark.slow
def test_the_step_is_finished_before_the_run_ends(run, tmp_path):
    child = run("search", tmp_path / "run", fault=partial(long_step, 2))
    child.wait_for("now")
    begun, step = time.monotonic(), load(tmp_path / "run")["progress"]["step"]
    child.send(TERM)
    assert child.wait() == 143
    assert time.monotonic() - begun > 1
    assert load(tmp_path / "run")["progress"]["step"] == step + 1


def test_a_second_signal_ends_the_run_at_once(run, tmp_path):
    child = run("search", tmp_path / "run", fault=partial(long_step, 600))
    child.wait_for("now")
    child.send(INT)
    time.sleep(0.1)
    assert child.process.is_alive()
    child.send(INT)
    assert child.wait(seconds=30) == 130
    assert load_file(tmp_path / "run" / "last.pt")["progress"]["epoch"] == 0


# A save calls fsync for the file and for the folder, and replace for the old file and the new one.
@pytest.mark.parametrize("call, number", [("fsync", 5), ("fsync", 6), ("replace", 5)])
def test_sigterm_in_a_save_lets_the_save_end_first(start, tmp_path, call, number):
    child = start(save_and_be_told_to_stop, tmp_path / "run", call, number, 1)
    assert child.wait() == 143
    for name, step in (("last.pt", 3), ("previous.pt", 2)):
        assert load_file(tmp_path / "run" / name) == {"step": step}
    assert not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.parametrize("call, number", [("fsync", 5), ("fsync", 6), ("replace", 5)])
def test_a_second_sigterm_in_a_save_leaves_a_whole_checkpoint(start, tmp_path, call, number):
    child = start(save_and_be_told_to_stop, tmp_path / "run", call, number, 2)
    assert child.wait() == 143
    found = [tmp_path / "run" / name for name in CHECKPOINTS]
    steps = [load_file(path)["step"] for path in found if path.exists()]
    assert steps and max(steps) in (2, 3)


def save_and_be_told_to_stop(folder, call, number, times):
    """Save after each of five steps; SIGTERM comes in the third save, `times` times."""
    before(os, call, number, lambda: [raise_signal(TERM) for _ in range(times)])
    with RunFolder(folder) as run:
        for step in range(1, 6):
            run.save_checkpoint({"step": step})
            if run.signal is not None:
                run.stop(run.signal)
    raise AssertionError("SIGTERM was ignored")


@pytest.mark.slow
def test_the_printed_command_works_in_a_shell_in_the_folder_the_run_was_started_in(whole, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train_search.py"), *SCRIPTS["search"][1], *EACH_STEP]
    options = {"cwd": tmp_path, "env": environment, "text": True, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **options) as process:
        for line in process.stdout:
            if line.startswith("epoch   1/2"):
                process.send_signal(TERM)
            last = line
    assert process.returncode == 143
    printed = last.partition("continue with: ")[2]
    assert "--out-dir runs/search" in printed
    printed = printed.replace("python", shlex.quote(sys.executable), 1)
    done = subprocess.run(printed, shell=True, stderr=subprocess.STDOUT, **options)
    assert done.returncode == 0, done.stdout
    files = ["genotype.json"]  # the pictures in here are drawn
    for name in files:
        a, b = (folder / name for folder in (tmp_path / "runs" / "search", whole("search")[0]))
        assert a.read_bytes() == b.read_bytes()
    assert_same_result(tmp_path / "runs" / "search", whole("search")[0])


def wait_long():
    print("now", flush=True)
    time.sleep(600)


def test_a_second_process_is_refused_until_the_first_has_died(run, whole, tmp_path):
    folder = tmp_path / "run"
    first = run("search", folder, fault=partial(before_save, 3, wait_long))
    first.wait_for("now")
    before_it = {path: path.read_bytes() for path in folder.iterdir()}
    second = run("search", folder, "--resume")
    assert second.wait() == 2
    (line,) = second.printed().splitlines()
    assert line == f"train_search.py: error: run folder {folder} is in use by another process"
    assert {path: path.read_bytes() for path in folder.iterdir()} == before_it
    first.send(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    third = run("search", folder, "--resume")
    assert third.wait() == 0, third.printed()
    assert_same_result(folder, whole("search")[0])


@pytest.fixture
def from_files(start, pictures, tmp_path):
    """Start a final training whose images are read by two workers."""
    arguments = [*pictures, "--recipe", "imagenet", "--image-size", "32", "--num-workers", "2"]
    arguments += ["--init-channels", "2", "--num-cells", "3", "--epochs", "2", "--device", "cpu"]
    arguments += ["--genotype", "DARTS_V1", "--drop-path-prob", "0.3", *EACH_STEP, "--out-dir"]

    def from_files(folder, *more, fault=None):
        return start(run_script, "train_final", [*arguments, str(folder), *more], fault)

    return from_files


def test_workers_that_outlive_a_killed_run_do_not_keep_its_folder(from_files, tmp_path):
    whole = from_files(tmp_path / "whole")
    child = from_files(tmp_path / "run", fault=partial(before_save, 3, wait_long))
    child.wait_for("now")
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    resumed = from_files(tmp_path / "run", "--resume")
    assert resumed.wait() == 0, resumed.printed()
    assert whole.wait() == 0
    assert_same_result(tmp_path / "run", tmp_path / "whole")


def test_a_file_system_without_locks_is_no_reason_to_refuse_a_run(tmp_path, monkeypatch):
    def unsupported(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_folder.fcntl, "lockf", unsupported)
    run = RunFolder(tmp_path / "run")
    run.save_checkpoint({"step": 1})
    assert load(tmp_path / "run") == {"step": 1}
