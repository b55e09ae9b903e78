"""Scripts in processes of their own, for tests that kill them, or take the disk away.

Importing torch takes seconds, so that these processes are forked from one that has done it.
"""

import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from darts_min import draw
from darts_min.run import run_folder

ROOT = Path(run_folder.__file__).parents[2]
DATA = ["--dataset", "synthetic", "--image-size", "8", "--subset", "120", "--batch-size", "20"]
RUN = [*DATA, "--init-channels", "2", "--num-cells", "3", "--epochs", "2", "--device", "cpu"]
SEARCH = ("train_search", [*RUN, "--num-nodes", "2", "--hessian-every", "0"])
SCRIPTS = {
    "search": SEARCH,
    "search order 2": ("train_search", [*SEARCH[1], "--order", "2"]),
    "final": (
        "train_final",
        [*RUN, "--cutout", "2", "--genotype", "DARTS_V1", "--subset", "240", "--batch-size", "40"],
    ),
}
EACH_STEP = ["--checkpoint-minutes", "0"]
METHOD = multiprocessing.get_start_method()  # that of the DataLoaders in the scripts
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["pytest", "torch", "torch._dynamo", "torch.utils.tensorboard", "torch.utils.flop_counter"]
    + ["torchvision", "PIL.PngImagePlugin", "matplotlib", "tqdm"]
)


class Child:
    """`function(*arguments)` in a process; what it prints goes to the file `output`."""

    def __init__(self, output: Path, function: Callable, *arguments: Any):
        self.output, self.started = output, time.monotonic()
        self.process = FORKS.Process(target=_in_child, args=(METHOD, output, function, *arguments))
        self.process.start()

    def printed(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = 200) -> int:
        """Return the exit code, -n after signal n; the time that it took is in `seconds`."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.end()
            pytest.fail(f"still running after {seconds} s:\n{self.printed()}")
        self.seconds = time.monotonic() - self.started
        return self.process.exitcode

    def wait_until(self, holds: Callable[[], bool], seconds: float = 200) -> bool:
        """Wait until `holds()`; return False if the process or the time ends before that."""
        end = time.monotonic() + seconds
        while not holds():
            if not self.process.is_alive() or time.monotonic() > end:
                return False
            time.sleep(0.0002)
        return True

    def wait_for(self, text: str) -> None:
        assert self.wait_until(lambda: text in self.printed()), self.printed()

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def _in_child(method: str, output: Path, function: Callable, *arguments: Any) -> None:
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    multiprocessing.set_start_method(method, force=True)
    torch.set_num_threads(1)
    function(*arguments)


def run_script(script: str, arguments: Sequence[str], fault: Callable | None = None) -> None:
    """Run a script as `python SCRIPT.py ARGUMENTS` does, after `fault()`; its pictures are empty.

    Drawing would take a third of the time of these short runs.
    """
    draw.draw_cell = draw.draw_alphas = draw.draw_history = lambda *_: Image.new("RGB", (8, 8))
    sys.argv = [f"{script}.py", *arguments]
    if fault is not None:
        fault()
    runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")


def before(owner: Any, name: str, number: int, act: Callable[[], None]) -> None:
    """Let the call number `number` (from 1) of the function `owner.name` begin with `act()`."""
    function, calls = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return function(*args, **kwargs)

    setattr(owner, name, counted)


def before_save(number: int, act: Callable[[], None]) -> None:
    before(run_folder.RunFolder, "save_checkpoint", number, act)


def raise_signal(number: int) -> None:
    os.kill(os.getpid(), number)


def die() -> None:
    raise_signal(signal.SIGKILL)


def load(folder: Path, name: str = "last.pt") -> dict:
    return torch.load(folder / name, map_location="cpu", weights_only=True)


def exact(value: Any) -> Any:
    """Return `value` with its tensors as type, shape and bytes, without what may differ.

    That is times, the arguments, which name the run folder, and generators that nothing uses.
    """
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        left_out = {"seconds", "args", "out_dir", "numpy", "python"}
        return {key: exact(item) for key, item in value.items() if key not in left_out}
    if isinstance(value, (list, tuple)):
        return [exact(item) for item in value]
    return value


def assert_same_result(folder: Path, whole: Path) -> None:
    """Compare genotype.json and network.pt as bytes, everything in last.pt, and the metrics."""
    for name in ("genotype.json", "network.pt"):
        assert (folder / name).exists() == (whole / name).exists()
        if (whole / name).exists():
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    a, b = exact(load(folder)), exact(load(whole))
    assert a.keys() == b.keys()
    for key in a:
        assert a[key] == b[key], key
    results = [exact(json.loads((f / "result.json").read_text())) for f in (folder, whole)]
    assert results[0] == results[1]
