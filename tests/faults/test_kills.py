"""Processes that are killed (SIGKILL) and resumed; oracle: a run that nobody interrupted."""

import os
import random
import shutil
import signal
import time
from functools import partial

import pytest
import torch
from children import SCRIPTS, assert_same_result, before, before_save, die
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from darts_min.judge import signs
from darts_min.run import files
from darts_min.run.progress import Progress
from darts_min.run.run_folder import CHECKPOINTS, RunFolder


def slow_disk():
    """Let a save take some 20 ms, or hardly a kill would meet one."""
    fsync = os.fsync
    os.fsync = lambda file: (time.sleep(0.01), fsync(file))


def kill_and_resume(run, name, folder, rng, seconds, kills):
    """Run a script, kill it up to `kills` times; return how many hit a run, how many a save.

    Every second one waits for a save to begin, and comes at a random moment of it. A run without
    a checkpoint has nothing to resume: it begins again, and that kill is not counted.
    """
    hit = in_save = 0
    while True:
        resumes = any((folder / file).exists() for file in CHECKPOINTS)
        if folder.exists() and not resumes:
            shutil.rmtree(folder)
        child = run(name, folder, *(["--resume"] if resumes else []), fault=slow_disk)
        if hit < kills:
            child.process.join(rng.uniform(0, seconds))
            if hit % 2:
                child.wait_until((folder / "last.pt.tmp").exists)
                child.process.join(rng.uniform(0, 0.01))
            child.send(signal.SIGKILL) if child.process.is_alive() else None
        code = child.wait()
        if code == 0:
            return hit, in_save
        assert code == -signal.SIGKILL, child.printed()
        hit += any((folder / file).exists() for file in CHECKPOINTS)
        in_save += (folder / "last.pt.tmp").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name, kills", [*zip(SCRIPTS, (17, 17, 16), strict=True)])
def test_50_kills_at_random_moments_change_nothing(run, whole, tmp_path, name, kills):
    folder, seconds = whole(name)
    rng, done, in_saves, runs = random.Random(kills), 0, 0, 0
    while done < kills:
        path = tmp_path / f"run{runs}"
        hit, in_save = kill_and_resume(run, name, path, rng, seconds, min(5, kills - done))
        assert_same_result(path, folder)
        done, in_saves, runs = done + hit, in_saves + in_save, runs + 1
    assert done == kills
    assert in_saves >= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_deterministic_run_repeats_and_resumes_exactly(run, tmp_path, device, name):
    flags = ["--device", device, "--deterministic"]
    for folder in ("whole", "again"):
        assert run(name, tmp_path / folder, *flags).wait() == 0
    assert_same_result(tmp_path / "again", tmp_path / "whole")
    killed = tmp_path / "killed"
    assert run(name, killed, *flags, fault=partial(before_save, 3, die)).wait() == -signal.SIGKILL
    assert run(name, killed, *flags, "--resume").wait() == 0
    assert_same_result(killed, tmp_path / "whole")


def eigenvalues(*values, dies_at=None):
    """Let the search find these instead of its own, then 1.0; die at the load number `dies_at`."""
    found = iter(values)
    signs.largest_eigenvalue = lambda *_: next(found, 1.0)
    if dies_at is not None:
        before(RunFolder, "load_checkpoint", dies_at, die)


def decay_from(epoch, decay):
    eigenvalues()
    epochs = Progress.epochs

    def changed(self):
        for number in epochs(self):
            if number >= epoch:
                self.w_step.optimizer.param_groups[0]["weight_decay"] = decay
            yield number

    Progress.epochs = changed


@pytest.mark.slow
def test_adapted_weight_decay_is_a_run_with_that_decay_from_the_epoch_gone_back_to(run, tmp_path):
    flags = ["--epochs", "18", "--hessian-every", "1"]
    adapts = [*flags, "--adapt-weight-decay"]
    grows = [1.0] * 13 + [2.0] * 4  # 1.8 / 1 is more than 1.3: at the end of epoch 17, back to 11

    plain = partial(decay_from, 11, 10 * 3e-4)
    assert run("search", tmp_path / "plain", *flags, fault=plain).wait() == 0
    child = run("search", tmp_path / "adapts", *adapts, fault=partial(eigenvalues, *grows))
    assert child.wait() == 0
    assert "back to the end of epoch 11, with weight decay 0.003" in child.printed()
    assert_same_result(tmp_path / "adapts", tmp_path / "plain")
    # Ten times nothing is no way on.
    none = [*adapts, "--w-weight-decay", "0"]
    child = run("search", tmp_path / "none", *none, fault=partial(eigenvalues, *grows))
    assert child.wait() == 0 and "back to" not in child.printed()

    killed = tmp_path / "killed"
    dies = partial(eigenvalues, *grows, dies_at=1)
    assert run("search", killed, *adapts, fault=dies).wait() == -signal.SIGKILL
    resumed = partial(eigenvalues, 2.0)
    assert run("search", killed, *adapts, "--resume", fault=resumed).wait() == 0
    assert_same_result(killed, tmp_path / "plain")
    events = EventAccumulator(str(killed))
    events.Reload()
    assert [event.step for event in events.Scalars("progress/train_loss")] == [*range(1, 19)]


def write_half_and_die(path, mode):
    file = open(path, mode)  # noqa: SIM115
    write = file.write

    class Half:
        __exit__ = file.__exit__

        def __enter__(self):
            return self

        def write(self, content):
            write(content[: len(content) // 2])
            file.flush()
            die()

    return Half()


def save_until_killed(folder, call, number):
    """Save 1, 2, ...; die at the call `number` of os.`call`, or in the writing of a file."""
    if call == "write":
        calls = iter(range(1, 9))
        files.open = lambda path, *mode: (
            write_half_and_die(path, *mode)
            if path.suffix == ".tmp" and next(calls) == number
            else open(path, *mode)  # noqa: SIM115
        )
    else:
        before(os, call, number, die)
    run = RunFolder(folder)
    for step in range(1, 5):
        run.save_checkpoint({"step": step, "w": torch.full((10_000,), float(step))})
        print(step, flush=True)


# A save calls fsync twice (file, folder) and replace twice (the old file, then the new one).
# `open` and `close` are those of the folder, after which all is done.
@pytest.mark.parametrize(
    "call, number, step",
    [
        ("write", 3, 2),
        ("fsync", 5, 2),
        ("replace", 4, 2),  # the first save has no old file
        ("replace", 5, 2),
        ("open", 3, 3),
        ("fsync", 6, 3),
        ("close", 3, 3),
    ],
)
def test_a_kill_in_a_save_leaves_the_checkpoint_before_or_the_new_one(
    start, tmp_path, call, number, step
):
    child = start(save_until_killed, tmp_path / "run", call, number)
    assert child.wait() == -signal.SIGKILL
    assert child.printed().split() == ["1", "2"]
    state = RunFolder(tmp_path / "run", resume=True).load_checkpoint()
    assert state["step"] == step
    assert torch.equal(state["w"], torch.full((10_000,), float(step)))
