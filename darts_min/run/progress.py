"""How far a run is, and everything that it needs to go on from there exactly."""

import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from darts_min.judge.cost import forecast
from darts_min.run.open import check_same_arguments
from darts_min.run.run_folder import RunFolder
from darts_min.run.schedules import change_epochs
from darts_min.run.step import FiniteGuard


class Progress:
    """Epoch, step, learning rate, sums and records of a run; saves and resumes all its state.

    `stateful` names everything with a state dict that the result depends on, one of them
    "scheduler", which steps `steps_per_epoch` times an epoch. `settings` has epochs,
    checkpoint_minutes, on_nonfinite and whatever else must be the same in a resumed run. Of several
    processes, all save and stop after the same step.
    """

    def __init__(
        self,
        run: RunFolder,
        settings: dict[str, Any],
        stateful: dict[str, Any],
        steps_per_epoch: int,
        device: torch.device,
    ):
        self.run, self.settings, self.stateful = run, settings, stateful
        self.steps_per_epoch = steps_per_epoch
        self.scheduler, self.processes = stateful["scheduler"], run.processes
        self.epoch = self.step = self.first_epoch = 0
        self.lr = self.scheduler.get_last_lr()[0]  # at the start of the epoch
        self.history: list[dict[str, Any]] = []
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)
        self.guard = FiniteGuard(settings["on_nonfinite"] == "skip", self.place)
        self.started, self.saved_at = time.time(), time.monotonic()

    def place(self) -> str:
        (lr,) = self.scheduler.get_last_lr()
        return f"epoch {self.epoch + 1}, step {self.step + 1}, lr {lr:.4g}"

    def save(self, also_as: str | None = None) -> None:
        """Save a checkpoint; if a signal has come, end the process."""
        self.run.save_checkpoint(
            {name: item.state_dict() for name, item in self.stateful.items()}
            | {
                "progress": {
                    "epoch": self.epoch,
                    "step": self.step,
                    "steps_per_epoch": self.steps_per_epoch,
                    "lr": self.lr,
                    "skipped": self.guard.skipped,
                },
                "totals": self.processes.sum(self.totals),
                "history": self.history,
                "args": self.settings,
                "random_state": random_state(self.totals.device),
                "seconds": time.time() - self.started,
            },
            also_as,
        )
        self.saved_at = time.monotonic()
        (number,) = self.processes.largest(self.run.signal or 0)
        if number:
            self.run.stop(number)

    def resume(self) -> None:
        """Go to the state of the newest checkpoint; ValueError if it is of another run.

        A run that was killed before its first one begins again.
        """
        if not self.run.has_checkpoint():
            self.run.log("nothing had been saved: from the start")
            return
        state = self.run.load_checkpoint()
        check_same_arguments(self.settings, state["args"])
        self._load(state)
        steps = state["progress"]["steps_per_epoch"]
        if steps != self.steps_per_epoch:  # another number of processes: the same place by images
            self.step = self.step * self.steps_per_epoch // steps
            self.scheduler.last_epoch = self.epoch * self.steps_per_epoch + self.step - 1
            self.scheduler.step()
        self.first_epoch, self.started = self.epoch, self.started - state["seconds"]
        self.run.log(f"resumed in epoch {self.epoch + 1}, after step {self.step}")
        before, now = state["args"]["epochs"], self.settings["epochs"]
        if now != before:
            self.run.log(change_epochs(self.scheduler, before, now, state["progress"]))
            (self.lr,) = self.scheduler.get_last_lr()

    def go_back(self, epoch: int) -> None:
        """Go to the state at the end of `epoch` (from 1), which `finish_epoch` must have kept."""
        self._load(self.run.load_checkpoint([kept_as(epoch)]))
        self.run.writer = None  # TensorBoard's next file takes the place of the epochs since then

    def _load(self, state: dict[str, Any]) -> None:
        for name, item in self.stateful.items():
            item.load_state_dict(state[name])
        set_random_state(state["random_state"], self.totals.device)
        progress, self.history = state["progress"], state["history"]
        self.epoch, self.step, self.lr = (progress[name] for name in ("epoch", "step", "lr"))
        self.guard.skipped = progress["skipped"]
        if self.processes.rank == 0:  # the sum of all, so far
            self.totals.copy_(state["totals"])

    def epochs(self) -> Iterator[int]:
        """Give the numbers of the epochs to come, from 0."""
        while self.epoch < self.settings["epochs"]:
            self.epoch_started = time.time()
            if self.step == 0:
                (self.lr,) = self.scheduler.get_last_lr()
                self.totals.zero_()
            yield self.epoch

    def training(
        self,
        batches: Iterable,
        evaluation: float,
        bar: Callable[..., Iterable],
        again: bool = False,
    ) -> Iterator:
        """Pass on what is left of an epoch's batches; between two, save when it is due.

        `evaluation` is the work that the evaluation takes, in training steps; `bar` is tqdm.
        The first epoch tells the time that the run will take; `again`: this one, too.
        """
        length = self.steps_per_epoch
        left = length - self.step
        batches = itertools.islice(batches, left)
        if again or self.epoch == self.first_epoch:
            steps = (self.settings["epochs"] - self.epoch) * (length + evaluation)
            batches = forecast(batches, steps, self.run.log, left)
        hidden = None if self.processes.rank == 0 else True
        for batch in bar(batches, total=length, initial=self.step, leave=False, disable=hidden):
            yield batch
            self.step += 1
            self._save_if_due()

    def evaluation(self, batches: Iterable) -> Iterator:
        """Pass `batches` on, and save when it is due.

        Several processes, which have unlike numbers of them, go on to the end.
        """
        for batch in batches:
            yield batch
            if self.processes.number == 1:
                self._save_if_due()

    def _save_if_due(self) -> None:
        is_time = time.monotonic() - self.saved_at >= 60 * self.settings["checkpoint_minutes"]
        is_asked = self.run.signal is not None
        if any(self.processes.largest(is_asked, is_time)):
            self.save()

    def add(self, results: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Add batches, (loss, logits, target), to the sums of loss, correct answers and images."""
        for loss, logits, target in results:
            correct = (logits.detach().argmax(1) == target).sum()
            count = correct.new_tensor(len(target))
            self.totals += torch.stack([loss.detach() * len(target), correct, count])

    def means(self) -> tuple[float, float]:
        """Return loss and accuracy in [0, 1] of the epoch so far, over all processes."""
        loss, correct, count = self.processes.sum(self.totals).tolist()
        return loss / max(1, count), correct / max(1, count)

    def finish_epoch(self, record: dict[str, Any], keep: bool = False) -> None:
        """Go on to the next epoch, and save; `keep`: so that `go_back` can return to here."""
        self.history.append(record)
        self.epoch, self.step = self.epoch + 1, 0
        self.save(kept_as(self.epoch) if keep else None)


def kept_as(epoch: int) -> str:
    return f"epoch-{epoch}.pt"


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of every global random number generator, in plain values and tensors.

    Of several processes, all draw alike from the generators of their devices.
    """
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [name, keys.tolist(), position, has_gauss, gauss],
        "python": list(random.getstate()),
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["device"] is not None:
        torch.cuda.set_rng_state(state["device"], device)
    np.random.set_state(tuple(state["numpy"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
