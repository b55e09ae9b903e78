"""Let a run survive signals, full disks and vanished readers until it has saved what it has."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, TextIO

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class LenientStream:
    """Write to a text stream, where a full disk or a reader that has gone away is no error.

    A character that the stream's encoding lacks is written like `\\u732b`. Without a stream,
    nothing is written.
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
        except BrokenPipeError:  # for good; else the interpreter would fail on it at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except OSError:
            pass  # what the stream still holds comes with the next line

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Interrupts:
    """Turn SIGINT and SIGTERM into a number in `signal`, on which the run is to save and stop.

    As a context, it also makes the standard streams lenient, and hides the errors of TensorBoard's
    writing thread, which `RunFolder.report` meets as well. A second signal ends the process at
    once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> "Interrupts":
        def handle(number: int, frame: Any) -> None:
            if self.signal is not None:
                raise SystemExit(128 + number)
            self.signal = number

        def report_thread(fault: Any) -> None:
            if type(fault.thread).__name__ != "_AsyncWriterThread":
                self.excepthook(fault)

        self.handlers = {number: signal.signal(number, handle) for number in SIGNALS}
        self.excepthook, threading.excepthook = threading.excepthook, report_thread
        self.streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = map(LenientStream, self.streams)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        threading.excepthook = self.excepthook
        sys.stdout, sys.stderr = self.streams
