"""Run folders: the files of a run, its checkpoints, what it prints, and how it is told to stop."""

import errno
import html
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.utils.tensorboard import SummaryWriter

from darts_min import __version__
from darts_min.run.files import is_sealed, load_file, seal, to_bytes, write_atomically
from darts_min.run.processes import Processes

try:
    import fcntl
except ImportError:  # Windows: run folders are not locked there
    fcntl = None

CHECKPOINTS = ("last.pt", "previous.pt")
BEGUN = (*CHECKPOINTS, "args.json")  # one of them is in the folder of a run that may go on
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Patient:
    """A text stream on which a full disk, or a reader that has gone away, is no error.

    A character that its encoding lacks is written as `\\u732b`; without a stream, nothing is.
    """

    def __init__(self, stream: TextIO | None):  # None: Python found it closed
        self.stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115

    def write(self, text: str) -> None:
        try:
            self._attempt(self.stream.write, text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding
            text = text.encode(encoding, "backslashreplace").decode(encoding)
            self._attempt(self.stream.write, text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, call: Callable, *arguments: str) -> None:
        try:
            call(*arguments)
        except BrokenPipeError:  # for good; else the interpreter would trip over it at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except OSError:
            pass  # what the stream still holds comes with the next line

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class RunFolder:
    """A folder that holds one run: `log.txt`, `last.pt`, `genotype.json`, `result.json`, ...

    Without `resume`, a folder that exists and is not empty is refused; with it, one that holds no
    checkpoint is; and one that another process has open (ValueError). A file that the disk does not
    take is reported and tried again when it is next due: the run goes on. As a context, it turns
    SIGINT and SIGTERM into a number in `signal`, on which the run is to `stop`: `command` is what
    the user is then told to continue with. Of several processes, the first one alone prints and
    writes. `write` prints a line: tqdm.write, where there are bars that it must not hit.
    """

    def __init__(
        self,
        path: str | Path,
        resume: bool = False,
        command: str = "",
        processes: Processes | None = None,
        write: Callable[..., None] = print,
    ):
        self.path, self.command, self.write = Path(path), command, write
        self.processes = processes or Processes(torch.device("cpu"))
        self.is_first = self.processes.rank == 0
        self.signal: int | None = None
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
        def handle(number: int, frame: Any) -> None:
            if self.signal is not None:  # asked twice: now
                raise SystemExit(128 + number)
            self.signal = number

        def report_thread(fault: Any) -> None:
            if type(fault.thread).__name__ != "_AsyncWriterThread":  # TensorBoard's: see `report`
                self.excepthook(fault)

        self.handlers = {number: signal.signal(number, handle) for number in SIGNALS}
        self.excepthook, threading.excepthook = threading.excepthook, report_thread
        self.streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = map(Patient, self.streams)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        threading.excepthook = self.excepthook
        sys.stdout, sys.stderr = self.streams
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

    def report(self, write: Callable[[SummaryWriter], None], step: int) -> None:
        """Let `write` add to TensorBoard's files, from `step` on.

        In a new file, that hides what older ones have of `step` and later ones.
        """

        def flushed() -> None:
            try:
                if self.writer is None:
                    self.writer = SummaryWriter(str(self.path), purge_step=step)
                write(self.writer)
                self.writer.flush()
            except OSError:
                self.writer = None  # it does not recover; the next report begins a new file
                raise

        try:
            self.attempt("TensorBoard's file", flushed)
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
        return self.processes.from_first(found)

    def load_checkpoint(self, names: Sequence[str] = CHECKPOINTS) -> dict[str, Any]:
        """Load the first checkpoint of `names` that is whole; ValueError if there is none.

        Its tensors are on the CPU: those of a GPU would be on the first one for all processes.
        """
        return self.processes.from_first(self._load(names) if self.is_first else None)

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


def table(values: dict[str, Any]) -> str:
    """Write `values` as a Markdown table for TensorBoard, in which nothing is markup."""
    rows = [
        (name, html.escape(str(value)).replace("|", "&#124;")) for name, value in values.items()
    ]
    text = "\n".join(["| argument | value |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])
    return text.encode(errors="backslashreplace").decode()  # a folder's name may be no UTF-8


def versions() -> dict[str, str]:
    return {
        "darts_min": __version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
