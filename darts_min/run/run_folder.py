"""Open the folder of a run, new or to be resumed, and write into it whatever the disk does."""

import argparse
import errno
import html
import json
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from darts_min import __version__
from darts_min.run.files import is_sealed, load_file, seal, to_bytes, write_atomically
from darts_min.run.flags import as_command, check_same_arguments
from darts_min.run.interrupts import Interrupts
from darts_min.run.machine import Machine

try:
    import fcntl
except ImportError:  # Windows: run folders are not locked there
    fcntl = None

CHECKPOINTS = ("last.pt", "previous.pt")
BEGUN = (*CHECKPOINTS, "args.json")  # one of them is in the folder of a run that may go on


class RunFolder:
    """A folder that holds one run: `log.txt`, `last.pt`, `genotype.json`, `result.json`, ...

    Raises ValueError if another process has the folder open; without `resume`, if the folder exists
    and is not empty; with `resume`, if it holds no run that has begun. A file that the disk does
    not take is reported, and written when it is next due: the run goes on. As a context, the folder
    collects SIGINT and SIGTERM in `signal`, on which the run is to `stop`; the user is then told to
    continue with `command`. Of several processes, the first one alone prints and writes. `write`
    prints a line; tqdm.write leaves progress bars intact.
    """

    def __init__(
        self,
        path: str | Path,
        resume: bool = False,
        command: str = "",
        machine: Machine | None = None,
        write: Callable[..., None] = print,
    ):
        self.path, self.command, self.write = Path(path), command, write
        self.machine = machine or Machine("cpu")
        self.is_first = self.machine.rank == 0
        self.interrupts = Interrupts()
        self.failures: dict[str, str] = {}
        self.writer: SummaryWriter | None = None
        if self.is_first:
            self._open(resume)

    def _open(self, resume: bool) -> None:
        try:
            files = {f.name for f in self.path.iterdir()} if self.path.exists() else set()
        except NotADirectoryError:
            raise ValueError(f"run folder {self.path} is a file") from None
        except OSError as error:
            raise ValueError(f"run folder {self.path} cannot be read: {error.strerror}") from None
        if resume and not files.intersection(BEGUN):
            raise ValueError(f"nothing to resume: {self.path / 'last.pt'} does not exist")
        if not resume and files - {".lock"}:
            raise ValueError(
                f"run folder {self.path} exists and is not empty; choose another --out-dir"
                + (", or continue it with --resume" if self.command else "")
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self / ".lock", "w")  # noqa: SIM115  (held until the process ends)
        except OSError as error:
            raise ValueError(f"run folder {self.path} cannot be made: {error}") from None
        if fcntl is not None:
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not for its children
            except OSError as error:  # a file system may also have no locks
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise ValueError(
                        f"run folder {self.path} is in use by another process"
                    ) from None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __enter__(self) -> "RunFolder":
        self.interrupts.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.interrupts.__exit__(*error)
        if self.is_first:
            self.lock.close()

    @property
    def signal(self) -> int | None:
        return self.interrupts.signal

    def attempt(self, what: str, write: Callable[[], object]) -> None:
        """Call `write`; if the disk does not take it, say so and go on."""
        if not self.is_first:
            return
        try:
            write()
            self.failures.pop(what, None)
        except OSError as error:
            if what not in self.failures:
                line = f"warning: {what} could not be written: {error}; going on"
                self.write(line, file=sys.stderr)
            self.failures[what] = str(error)

    def check_written(self) -> None:
        """End the process with an error if something of the run is not on the disk."""
        if self.failures:
            listed = "; ".join(f"{what}: {error}" for what, error in self.failures.items())
            raise SystemExit(f"error: not everything could be written to {self.path}: {listed}")

    def log(self, line: str) -> None:
        """Add `line` to `log.txt`, then print it."""

        def append() -> None:
            with open(self / "log.txt", "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")

        self.attempt("log.txt", append)
        if self.is_first:
            self.write(line)
            sys.stdout.flush()

    def save_pictures(self, draw: Callable[[], dict[str, Image.Image]]) -> dict[str, Image.Image]:
        """Save each picture that `draw` returns by name, as NAME.png; return them.

        An error in drawing is logged, and the run goes on: a picture is not worth an epoch.
        """
        if not self.is_first:
            return {}
        try:
            pictures = draw()
            for name, picture in pictures.items():
                self.attempt(f"{name}.png", partial(picture.save, self / f"{name}.png"))
            return pictures
        except Exception as error:  # of whatever kind
            self.log(f"warning: drawing failed: {type(error).__name__}: {error}; going on")
            return {}

    def report(
        self,
        epoch: int,
        scalars: dict[str, float] | None = None,
        texts: dict[str, str] | None = None,
        pictures: dict[str, Image.Image] | None = None,
    ) -> None:
        """Add to the files of TensorBoard, from `epoch` on.

        A new file hides what older files have of `epoch` and of later epochs.
        """

        def write() -> None:
            try:
                if self.writer is None:
                    self.writer = SummaryWriter(str(self.path), purge_step=epoch)
                for name, value in (scalars or {}).items():
                    self.writer.add_scalar(name, value, epoch)
                for name, text in (texts or {}).items():
                    self.writer.add_text(name, text, epoch)
                for name, picture in (pictures or {}).items():
                    name = name.replace("_", "/")  # before "/" is the group
                    self.writer.add_image(name, np.asarray(picture), epoch, dataformats="HWC")
                self.writer.flush()
            except OSError:
                self.writer = None  # it does not recover; the next report begins a new file
                raise

        try:
            self.attempt("TensorBoard's file", write)
        except UnicodeEncodeError:
            line = f"no file for TensorBoard, which takes names in UTF-8 only: {self.path}"
            warnings.warn(line, stacklevel=1)  # from here: once for a run

    def save_checkpoint(self, state: dict[str, Any], also_as: str | None = None) -> None:
        """Write `last.pt`, keep the one before as `previous.pt`; first write `also_as`, to stay."""
        if not self.is_first:
            return
        content = seal(to_bytes(state))
        if also_as is not None:
            self.attempt(also_as, lambda: write_atomically(self / also_as, content))
        last, previous = (self / name for name in CHECKPOINTS)
        self.attempt(
            "the checkpoint (the one before is whole)",
            lambda: write_atomically(last, content, keep_as=previous),
        )

    def has_checkpoint(self) -> bool:
        found = self.is_first and any((self / name).exists() for name in CHECKPOINTS)
        return self.machine.from_first(found)

    def load_checkpoint(self, names: Sequence[str] = CHECKPOINTS) -> dict[str, Any]:
        """Load the first checkpoint of `names` that is whole; ValueError if there is none.

        Its tensors are on the CPU: those of a GPU would be on the first one for all processes.
        """
        return self.machine.from_first(self._load(names) if self.is_first else None)

    def _load(self, names: Sequence[str]) -> dict[str, Any]:
        problems = []
        for name in names:
            if (self / name).exists():
                try:
                    state = load_file(self / name, torch.device("cpu"))
                    if not is_sealed((self / name).read_bytes()):
                        raise ValueError(f"file {self / name} is damaged, or is no checkpoint")
                except ValueError as error:
                    problems.append(str(error))
                    continue
                if problems:  # out of the way, or it would take the place of the whole one
                    self.log(f"{problems[0]}; continuing from {name}, the one before it")
                    self.attempt(
                        "damaged.pt", lambda: os.replace(self / "last.pt", self / "damaged.pt")
                    )
                return state
        raise ValueError("; ".join(problems) or f"run folder {self.path} has no {names[0]}")

    def stop(self, number: int) -> None:
        """End the process because of a signal; the checkpoint must have been saved."""
        name = signal.Signals(number).name
        self.log(f"stopped by {name}; continue with: {self.command}")
        raise SystemExit(128 + number)

    def save_text(self, name: str, text: str) -> None:
        self.attempt(name, lambda: write_atomically(self / name, text.encode()))

    def save_json(self, name: str, content: dict[str, Any]) -> None:
        self.save_text(name, json.dumps(content, indent=2, default=str) + "\n")


def open_run(
    script: str,
    argv: list[str] | None,
    default: str,
    args: argparse.Namespace,
    machine: Machine,
    write: Callable[..., None],
) -> RunFolder:
    """Open the run folder of a script: `--out-dir`, a free one like `default`, or one to resume.

    The command to continue with is made of `argv`, or else of the process's own arguments.
    """
    path = args.out_dir
    if path is None and machine.rank == 0:
        path = resumable_folder(default, vars(args)) if args.resume else free_folder(default)
    path = machine.from_first(path)
    program, given = (sys.argv[0], sys.argv[1:]) if argv is None else (script, argv)
    more = [] if args.out_dir else ["--out-dir", str(path)]
    more += [] if "--resume" in given else ["--resume"]
    program = f"{machine.launcher} {shlex.quote(program)}"
    command = as_command(args, script, [*given, *more], program)
    return RunFolder(path, args.resume, command, machine, write)


def free_folder(path: str | Path) -> Path:
    """Return the first of `path`, `path-2`, ... that does not exist."""
    candidates = (Path(path) if n == 1 else Path(f"{path}-{n}") for n in range(1, 10**6))
    return next(candidate for candidate in candidates if not candidate.exists())


def resumable_folder(path: str | Path, args: dict[str, Any]) -> Path:
    """Return the newest of `path`, `path-2`, ... that was run with these arguments.

    If there is none, return the newest folder with a checkpoint: `check_same_arguments` will name
    the arguments that differ. Raises ValueError if no folder has a checkpoint.
    """
    path = Path(path)
    folders = {f for name in CHECKPOINTS for f in path.parent.glob(f"{path.name}*/{name}")}
    folders = sorted((f.stat().st_mtime, f.parent) for f in folders)[::-1]
    if not folders:
        raise ValueError(f"there is no run folder {path} with a checkpoint to resume")
    for _, folder in folders:
        try:
            before = json.loads((folder / "args.json").read_text(encoding="utf-8"))
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


def markdown_table(values: dict[str, Any]) -> str:
    """Write `values` as a Markdown table for TensorBoard, in which nothing is markup."""
    rows = [
        (name, html.escape(str(value)).replace("|", "&#124;")) for name, value in values.items()
    ]
    text = "\n".join(["| argument | value |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])
    return text.encode(errors="backslashreplace").decode()  # a folder's name may be no UTF-8


def versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    return {
        "darts_min": __version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
