"""Run folders, atomic files, and checkpoints that a run continues from."""

import html
import io
import json
import os
import random
import re
import shlex
import signal
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from darts_min import __version__
from darts_min.processes import Processes

try:
    import fcntl
except ImportError:  # Windows: run folders are not locked there
    fcntl = None

CHECKPOINTS = ("last.pt", "previous.pt")
# Arguments that a resumed run may change: they do not change its result, or are meant to.
FREE = {"out_dir", "resume", "device", "data_dir", "num_workers", "epochs"}
FREE |= {"checkpoint_minutes", "checkpoint_cells", "max_params", "max_madds"}
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RunFolder:
    """A folder that holds one run: `log.txt`, `last.pt`, `genotype.json`, `result.json`, ...

    Without `resume`, a folder that exists and is not empty is refused; with it, one that holds no
    checkpoint is; and one that another process has open (ValueError). A file that the disk does not
    take is reported and tried again when it is next due: the run goes on. As a context, it turns
    SIGINT and SIGTERM into a checkpoint after the current step and an exit with 130 or 143;
    `command` is what the user is told to continue with. Of several processes, the first one alone
    prints and writes, and all save and stop after the same step.
    """

    def __init__(
        self,
        path: str | Path,
        resume: bool = False,
        checkpoint_minutes: float = 10,
        command: str = "",
        processes: Processes | None = None,
    ):
        self.path, self.command = Path(path), command
        self.processes = processes or Processes(torch.device("cpu"))
        self.is_first = self.processes.rank == 0
        self.checkpoint_seconds, self.saved_at = 60 * checkpoint_minutes, time.monotonic()
        self.signal: int | None = None
        self.failures: dict[str, str] = {}
        self.writer: SummaryWriter | None = None
        if self.is_first:
            self._open(resume)

    def _open(self, resume: bool) -> None:
        if resume and not any((self.path / name).is_file() for name in CHECKPOINTS):
            raise ValueError(f"nothing to resume: {self.path / 'last.pt'} does not exist")
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run folder {self.path} is a file")
        if not resume and self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(
                f"run folder {self.path} exists and is not empty; choose another --out-dir, or "
                "continue it with --resume"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self / ".lock", "w")  # noqa: SIM115  (held until the process ends)
        except OSError as error:
            raise ValueError(f"run folder {self.path} cannot be made: {error}") from None
        if fcntl is not None:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"run folder {self.path} is in use by another process") from None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __enter__(self) -> "RunFolder":
        def handle(number: int, frame: Any) -> None:
            if self.signal is not None:  # asked twice: now
                raise SystemExit(128 + number)
            self.signal = number

        self.handlers = {number: signal.signal(number, handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.is_first:
            self.lock.close()

    def attempt(self, what: str, write: Callable[[], object]) -> None:
        """Call `write`; if the disk does not take it, say so and go on."""
        if not self.is_first:
            return
        try:
            write()
            self.failures.pop(what, None)
        except OSError as error:
            if what not in self.failures:
                print(f"warning: {what} could not be written: {error}; going on", file=sys.stderr)
            self.failures[what] = str(error)

    def check_written(self) -> None:
        """End the process with an error if something of the run is not on the disk."""
        if self.failures:
            listed = "; ".join(f"{what}: {error}" for what, error in self.failures.items())
            raise SystemExit(f"error: not everything could be written to {self.path}: {listed}")

    def log(self, line: str) -> None:
        if self.is_first:
            print(line, flush=True)

        def append() -> None:
            with open(self / "log.txt", "a", encoding="utf-8") as file:
                file.write(line + "\n")

        self.attempt("log.txt", append)

    def report(self, write: Callable[[SummaryWriter], None], step: int = 0) -> None:
        """Let `write` add to TensorBoard's files; `step` is the first one of this process."""

        def flushed() -> None:
            try:
                if self.writer is None:
                    self.writer = SummaryWriter(str(self.path), purge_step=step)
                write(self.writer)
                self.writer.flush()
            except OSError:
                self.writer = None  # it does not recover; the next report begins a new file
                raise

        self.attempt("TensorBoard's file", flushed)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write `last.pt`, and keep the one before it as `previous.pt`."""
        if not self.is_first:
            return
        content = to_bytes(state)
        last, previous = (self / name for name in CHECKPOINTS)
        self.attempt(
            "the checkpoint (the one before is whole)",
            lambda: write_atomically(last, content, keep_as=previous),
        )
        self.saved_at = time.monotonic()

    def load_checkpoint(self, device: torch.device) -> dict[str, Any]:
        """Load the newest checkpoint that is whole; ValueError if there is none."""
        return self.processes.from_first(self._load(device) if self.is_first else None)

    def _load(self, device: torch.device) -> dict[str, Any]:
        problems = []
        for name in CHECKPOINTS:
            if (self / name).exists():
                try:
                    state = load_file(self / name, device)
                except ValueError as error:
                    problems.append(str(error))
                    continue
                if problems:  # out of the way, or it would take the place of the whole one
                    self.log(f"{problems[0]}; continuing from {name}, the one before it")
                    self.attempt(
                        "damaged.pt", lambda: os.replace(self / "last.pt", self / "damaged.pt")
                    )
                return state
        raise ValueError("; ".join(problems))

    def between_steps(
        self, batches: Iterable, save: Callable[[int], None], step: int = 0
    ) -> Iterator:
        """Pass `batches` on, of which `step` are done; between two, save when it is time.

        `save(step)` is called `checkpoint_seconds` after the last one, and when a signal has come:
        then the process ends.
        """
        self.step = step
        for batch in batches:
            yield batch
            self.step = step = step + 1
            is_time = time.monotonic() - self.saved_at >= self.checkpoint_seconds
            number, is_time = self.processes.largest(self.signal or 0, is_time)
            self.signal = number or None
            if self.signal is not None or is_time:
                save(step)
            if self.signal is not None:
                self.stop()

    def in_evaluation(self, batches: Iterable, save: Callable[[int], None]) -> Iterable:
        """Like `between_steps`; but several processes, which have unlike numbers of batches, go on
        to the end of it."""
        return batches if self.processes.number > 1 else self.between_steps(batches, save)

    def stop_if_asked(self) -> None:
        """End the process if a signal has come; the checkpoint must have been saved."""
        (number,) = self.processes.largest(self.signal or 0)
        self.signal = number or None
        if self.signal is not None:
            self.stop()

    def stop(self) -> None:
        name = signal.Signals(self.signal).name
        self.log(f"stopped by {name}; continue with: {self.command}")
        raise SystemExit(128 + self.signal)

    def save_text(self, name: str, text: str) -> None:
        self.attempt(name, lambda: write_atomically(self / name, text.encode()))

    def save_json(self, name: str, content: dict[str, Any]) -> None:
        self.save_text(name, json.dumps(content, indent=2, default=str) + "\n")


def open_run(
    script: str, flags: list[str], default: str, args: dict[str, Any], processes: Processes
) -> RunFolder:
    """Open the run folder of a script: `--out-dir`, a free one like `default`, or one to resume.

    `flags` are the script's, from which the command to continue with is made.
    """
    path = args["out_dir"]
    if path is None and processes.rank == 0:
        path = resumable_folder(default, args) if args["resume"] else free_folder(default)
    path = processes.from_first(path)
    command = ["python", script, *flags]
    command += [] if args["out_dir"] else ["--out-dir", str(path)]
    command += [] if args["resume"] else ["--resume"]
    command = shlex.join(command)
    return RunFolder(path, args["resume"], args["checkpoint_minutes"], command, processes)


def free_folder(path: str | Path) -> Path:
    """Return the first of `path`, `path-2`, ... that does not exist."""
    candidates = (Path(path) if n == 1 else Path(f"{path}-{n}") for n in range(1, 10**6))
    return next(candidate for candidate in candidates if not candidate.exists())


def resumable_folder(path: str | Path, args: dict[str, Any]) -> Path:
    """Return the newest of `path`, `path-2`, ... that was run with these arguments.

    If none was, the newest with a checkpoint, whose arguments `check_same_arguments` will name;
    ValueError if there is none of those either.
    """
    path = Path(path)
    folders = {f for name in CHECKPOINTS for f in path.parent.glob(f"{path.name}*/{name}")}
    folders = sorted((f.stat().st_mtime, f.parent) for f in folders)[::-1]
    if not folders:
        raise ValueError(f"there is no run folder {path} with a checkpoint to resume")
    for _, folder in folders:
        try:
            before = json.loads((folder / "args.json").read_text())
            check_same_arguments(args, before)
        except (OSError, ValueError):
            continue
        return folder
    return folders[0][1]


def newest_folder(path: str | Path, file: str) -> Path:
    """Return the newest of `path`, `path-2`, ... that holds `file`; ValueError if none does."""
    path = Path(path)
    folders = [f for f in path.parent.glob(f"{path.name}*") if (f / file).is_file()]
    if not folders:
        raise ValueError(f"there is no run folder {path} with a {file}")
    return max(folders, key=lambda folder: (folder / file).stat().st_mtime)


def to_bytes(content: Any) -> bytes:
    """Return what torch.save writes: a zip archive with a checksum of each of its parts."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def write_atomically(path: Path, content: bytes, keep_as: Path | None = None) -> None:
    """Write a file so that at any moment `path` is the old one or the new one, whole.

    `keep_as`: where the old one goes; for a moment it is only there.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            os.replace(path, keep_as)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # else the new name may be lost with the power
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_file(path: str | Path, device: torch.device | str = "cpu") -> Any:
    """Load tensors and plain values; code in the file is never run. ValueError if that fails."""
    try:
        if zipfile.is_zipfile(path):  # torch.load does not check the checksums that it wrote
            with zipfile.ZipFile(path) as archive:
                if (part := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"checksum of {part}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about strange files, which end below
            return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"file {path} does not exist") from None
    except (IsADirectoryError, PermissionError) as error:
        raise ValueError(f"file {path} cannot be read: {error.strerror}") from None
    except Exception as error:  # torch.load raises whatever a damaged file leads it to
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"file {path} is not loaded, because it holds a Python object ({named[1]}), and "
                "loading one can run any code; in the program that made the file, save tensors "
                "only: torch.save(model.state_dict(), FILE)"
            ) from None
        raise ValueError(f"file {path} is damaged, or was not written by torch.save") from None


def random_state() -> dict[str, Any]:
    """Return the state of every global random number generator, in plain values and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
        "numpy": [name, keys.tolist(), position, has_gauss, gauss],
        "python": list(random.getstate()),
    }


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    np.random.set_state(tuple(state["numpy"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def check_same_arguments(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Raise a ValueError that names the arguments of a resumed run that would change its result."""
    changed = [name for name in before if name not in FREE and now.get(name) != before[name]]
    if changed:
        listed = ", ".join(f"{name} (was {before[name]}, now {now.get(name)})" for name in changed)
        raise ValueError(f"--resume with other arguments would change the result: {listed}")


def table(values: dict[str, Any]) -> str:
    """Write `values` as a Markdown table for TensorBoard, in which nothing is markup."""
    rows = [
        (name, html.escape(str(value)).replace("|", "&#124;")) for name, value in values.items()
    ]
    return "\n".join(["| argument | value |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


def versions() -> dict[str, str]:
    return {
        "darts_min": __version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
