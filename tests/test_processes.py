"""Two processes on the CPU (gloo). Oracles: means of the parts, one process, a whole run."""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch.nn import functional as F

import train_final
import train_search
from darts_min.architect import architecture_gradient
from darts_min.data import Loader, channel_statistics, synthetic_dataset
from darts_min.genotypes import PUBLISHED, Genotype, unused_states
from darts_min.network import Network
from darts_min.run.evaluation import evaluate
from darts_min.run.machine import Machine
from darts_min.run.step import FiniteGuard, Step
from darts_min.supernet import Supernet

ROOT = Path(train_search.__file__).parent
DATA = ["--dataset", "synthetic", "--image-size", "8", "--subset", "80", "--batch-size", "10"]
SIZES = ["--init-channels", "2", "--num-cells", "3"]
SEARCH = [*DATA, *SIZES, "--num-nodes", "2", "--hessian-every", "0"]
FINAL = [*DATA, *SIZES, "--cutout", "2", "--genotype", "DARTS_V1"]


def in_process(rank, port, function, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.save(function(rank, folder), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def run_two(function, folder):
    """Run `function(rank, folder)` in two processes; return what each returned."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, function, str(folder))
    torch.multiprocessing.start_processes(in_process, arguments, 2, start_method="fork")
    return [torch.load(f"{folder}/rank{rank}.pt", weights_only=True) for rank in range(2)]


def part(rank):
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(4, 3, 8, 8, generator=generator)
    return x, torch.randint(10, (4,), generator=generator)


def both_gradients(rank):
    torch.manual_seed(0)
    model = Supernet(init_channels=2, num_cells=3, num_nodes=2)
    alpha = architecture_gradient(model, F.cross_entropy, part(rank), part(rank + 2), 0.0)
    x, target = part(rank)
    return alpha, list(torch.autograd.grad(F.cross_entropy(model(x), target), model.weights()))


def averaged_gradients(rank, folder):
    machine = Machine("cpu")
    alpha, w = both_gradients(rank)
    machine.average(alpha)
    machine.average(w)
    return alpha + w


def test_averaged_gradients_are_the_mean_of_the_parts(tmp_path):
    results = run_two(averaged_gradients, tmp_path)
    parts = [sum(both_gradients(rank), []) for rank in range(2)]
    for first, second, a, b in zip(*results, *parts, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, (a + b) / 2, rtol=1e-6, atol=1e-8)


def overflow_in_one(rank, folder):
    torch.manual_seed(0)
    model = Supernet(init_channels=2, num_cells=3, num_nodes=2)
    if rank == 1:
        model.classifier.weight.register_hook(lambda gradient: gradient * math.inf)
    before = [w.detach().clone() for w in model.weights()]
    machine = Machine("cpu", amp="fp16")
    machine.autocast = nullcontext
    optimizer = torch.optim.SGD(model.weights(), 0.1)
    step = Step(optimizer, model, machine, FiniteGuard(skip=False), grad_clip=5.0)
    batches = [(part(rank), part(rank))]
    for _ in train_search.train_epoch(model, batches, step, None, machine):
        pass
    changed = sum(not torch.equal(*pair) for pair in zip(before, model.weights(), strict=True))
    return changed, step.scaler.get_scale()


def test_an_fp16_overflow_in_one_process_skips_the_step_of_all(tmp_path):
    assert run_two(overflow_in_one, tmp_path) == [(0, 2.0**15)] * 2


def wrapped_gradients(rank, folder):
    torch.manual_seed(0)
    network = Network(PUBLISHED["DARTS_V2"], init_channels=2, num_cells=3, auxiliary=False)
    model = Machine("cpu").distribute(network)
    x, target = part(rank)
    F.cross_entropy(model(x), target).backward()
    return [p.grad for p in network.parameters()]


def test_a_wrapped_networks_gradients_are_the_mean_of_the_parts(tmp_path):
    results = run_two(wrapped_gradients, tmp_path)
    parts = []
    for rank in range(2):
        torch.manual_seed(0)
        network = Network(PUBLISHED["DARTS_V2"], init_channels=2, num_cells=3, auxiliary=False)
        x, target = part(rank)
        parts.append(torch.autograd.grad(F.cross_entropy(network(x), target), network.parameters()))
    for first, second, a, b in zip(*results, *parts, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, (a + b) / 2, rtol=1e-5, atol=1e-7)


def steps_of_loose_ends(rank, folder):
    torch.manual_seed(0)
    cell = tuple(("sep_conv_3x3", j) for j in (0, 1, 0, 1))  # the first node goes nowhere
    network = Network(Genotype(cell, [3], cell, [3]), 10, 2, 3, auxiliary=False)
    model = Machine("cpu").distribute(network, any(unused_states(network.genotype).values()))
    x, target = part(rank)
    for _ in range(2):  # DDP fails in the second
        network.zero_grad()
        F.cross_entropy(model(x), target).backward()
    return [p.grad for p in network.parameters()]


def test_a_cell_with_loose_ends_is_trained_by_two_processes(tmp_path):
    first, second = run_two(steps_of_loose_ends, tmp_path)
    assert any(a is None for a in first) and not all(a is None for a in first)
    for a, b in zip(first, second, strict=True):
        assert a is b is None or torch.equal(a, b)


def accumulated_gradients(rank, folder):
    torch.manual_seed(0)
    machine = Machine("cpu")
    model = machine.distribute(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)))
    sent = []
    model.register_comm_hook(None, lambda _, bucket: (sent.append(1), averaged(bucket))[1])
    x, target = part(rank)
    with machine.without_averaging(model):
        (F.cross_entropy(model(x[:2]), target[:2]) / 2).backward()
    assert sent == []
    (F.cross_entropy(model(x[2:]), target[2:]) / 2).backward()
    assert sent == [1]
    return [p.grad for p in model.parameters()]


def averaged(bucket):
    future = torch.distributed.all_reduce(bucket.buffer() / 2, async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def test_gradients_of_parts_of_a_batch_are_sent_once_and_are_the_mean_of_all(tmp_path):
    first, second = run_two(accumulated_gradients, tmp_path)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
    x, target = (torch.cat(both) for both in zip(part(0), part(1), strict=True))
    whole = torch.autograd.grad(F.cross_entropy(network(x), target), network.parameters())
    for a, b, expected in zip(first, second, whole, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, expected, rtol=1e-5, atol=1e-7)


def evaluation(shard, total):
    torch.manual_seed(0)
    network = Network(PUBLISHED["DARTS_V2"], init_channels=2, num_cells=3, auxiliary=False)
    data = synthetic_dataset(0, 8, test_per_class=10).test
    loader = Loader(data, 7, channel_statistics(data), shard=shard)
    result = evaluate(network, loader, 10, total=total)
    return [result.loss, result.accuracy, result.class_sizes, result.class_errors]


def shared_evaluation(rank, folder):
    machine = Machine("cpu")
    return evaluation(machine.shard, machine.sum)


def test_evaluation_counts_every_image_once(tmp_path):
    loss, accuracy, sizes, errors = evaluation((0, 1), lambda tensor: tensor)
    assert sizes.tolist() == [10] * 10
    for shared in run_two(shared_evaluation, tmp_path):
        assert shared[0] == pytest.approx(loss, rel=1e-6) and shared[1] == accuracy
        assert torch.equal(shared[2], sizes) and torch.equal(shared[3], errors)


def kept(module, name):
    """Let `module.name` build its model as before; return the list that it is added to."""
    models, build = [], getattr(module, name)

    def build_and_keep(*args, **sizes):
        models.append(build(*args, **sizes))
        return models[-1]

    setattr(module, name, build_and_keep)
    return models


def whole_search(rank, folder):
    models = kept(train_search, "Supernet")
    train_search.main([*SEARCH, "--epochs", "2", "--out-dir", f"{folder}/search"])
    return models[-1].state_dict()


def whole_training(rank, folder):
    models = kept(train_final, "Network")
    train_final.main([*FINAL, "--epochs", "2", "--out-dir", f"{folder}/final"])
    return models[-1].state_dict()


@pytest.mark.parametrize("script", [whole_search, whole_training])
@pytest.mark.slow
def test_processes_stay_bit_identical_through_a_whole_run(tmp_path, script):
    first, second = run_two(script, tmp_path)
    assert all(torch.equal(first[key], second[key]) for key in first)
    folder = tmp_path / ("search" if script is whole_search else "final")
    saved = torch.load(folder / "last.pt", weights_only=True)
    assert all(torch.equal(first[key], saved["model"][key]) for key in first)
    images = saved["history"][-1]
    assert len(saved["history"]) == 2 and 0 <= images["train_accuracy"] <= 1


def torchrun(arguments, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", *arguments]
    return subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


DIES = """
import os, runpy, signal, sys
from darts_min.run import run_folder
save = run_folder.RunFolder.save_checkpoint
saves = 0
def save_and_die(run, *state):
    global saves
    save(run, *state)
    saves += 1
    if saves == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
run_folder.RunFolder.save_checkpoint = save_and_die
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_search.py", "train_final.py"])
def test_a_process_that_dies_ends_the_others_and_the_run_resumes(tmp_path, script):
    (tmp_path / "dies.py").write_text(DIES)
    arguments = [*(SEARCH if script == "train_search.py" else FINAL), "--epochs", "2"]
    whole = torchrun([script, *arguments, "--out-dir", f"{tmp_path}/whole"])
    assert whole.returncode == 0, whole.stderr
    arguments += ["--out-dir", f"{tmp_path}/parts", "--checkpoint-minutes", "0"]
    started = time.monotonic()
    environment = {"PYTHONPATH": str(ROOT)}
    died = torchrun([f"{tmp_path}/dies.py", script, *arguments], **environment)
    assert died.returncode != 0 and time.monotonic() - started < 60 + 60
    assert f"Signal {int(signal.SIGKILL)}" in died.stderr
    resumed = torchrun([script, *arguments, "--resume"])
    assert resumed.returncode == 0, resumed.stderr
    states = [
        torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts")
    ]
    for a, b in zip(*(state["history"] for state in states), strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name])
    # With another number of processes it goes on as well, if not bit by bit.
    one = subprocess.run(
        [sys.executable, script, *arguments, "--epochs", "3", "--resume"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert one.returncode == 0 and "epoch   3/3" in one.stdout


@pytest.mark.slow
def test_a_signal_to_the_launcher_stops_all_after_the_same_step(tmp_path):
    arguments = [*FINAL, "--epochs", "1000", "--out-dir", f"{tmp_path}/run"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.Popen(
        [*command, "--nproc-per-node", "2", "train_final.py", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("epoch   2/"):
            process.send_signal(signal.SIGTERM)
    process.wait(timeout=100)
    output = "".join(lines)
    assert "stopped by SIGTERM; continue with: " in output and "RuntimeError" not in output
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["progress"]["epoch"] >= 2 and torch.isfinite(saved["totals"]).all()
