"""Keep how far a run is, and all that it needs to go on from there exactly."""

import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from darts_min.run.flags import check_same_arguments
from darts_min.run.run_folder import RunFolder, versions
from darts_min.run.schedules import change_epochs
from darts_min.run.step import Step


class Progress:
    """Keep the epoch, the step, the sums and the records of a run; save and resume all its state.

    The result depends on `model`, `w_step` and, in a search, `alpha_step`. The scheduler of
    `w_step` steps `steps_per_epoch` times an epoch. `settings` are the arguments of the run:
    epochs, checkpoint_minutes, and whatever must be the same when the run is resumed. All processes
    save and stop after the same step.
    """

    def __init__(
        self,
        run: RunFolder,
        settings: dict[str, Any],
        model: nn.Module,
        w_step: Step,
        steps_per_epoch: int,
        alpha_step: Step | None = None,
    ):
        self.run, self.settings, self.steps_per_epoch = run, settings, steps_per_epoch
        self.stateful = {"model": model, "w_step": w_step}
        if alpha_step is not None:
            self.stateful["alpha_step"] = alpha_step
        self.w_step, self.scheduler, self.guard = w_step, w_step.scheduler, w_step.guard
        self.machine = run.machine
        self.epoch = self.step = self.first_epoch = 0
        self.lr = self.scheduler.get_last_lr()[0]  # at the start of the epoch
        self.history: list[dict[str, Any]] = []
        # Of the epoch so far: loss times images, correct answers, images.
        self.totals = torch.zeros(3, dtype=torch.float64, device=self.machine.device)
        self.started, self.saved_at = time.time(), time.monotonic()

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
                "totals": self.machine.sum(self.totals),
                "history": self.history,
                "args": self.settings,
                "random_state": random_state(self.totals.device),
                "seconds": time.time() - self.started,
            },
            also_as,
        )
        self.saved_at = time.monotonic()
        (number,) = self.machine.maxima(self.run.signal or 0)
        if number:
            self.run.stop(number)

    def resume(self) -> None:
        """Go to the state of the newest checkpoint; ValueError if its arguments are others.

        A run that was killed before its first checkpoint begins again.
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
        """Go back to the end of `epoch` (from 1), which `finish_epoch` must have kept."""
        self._load(self.run.load_checkpoint([kept_as(epoch)]))
        self.run.writer = None  # a new file of TensorBoard replaces the epochs since then

    def _load(self, state: dict[str, Any]) -> None:
        for name, item in self.stateful.items():
            item.load_state_dict(state[name])
        set_random_state(state["random_state"], self.totals.device)
        progress, self.history = state["progress"], state["history"]
        self.epoch, self.step, self.lr = (progress[name] for name in ("epoch", "step", "lr"))
        self.guard.skipped = progress["skipped"]
        if self.machine.rank == 0:  # what was saved is the sum over the processes
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
        evaluation_batches: int,
        bar: Callable[..., Iterable],
        is_new_pace: bool = False,
    ) -> Iterator:
        """Pass on the rest of an epoch's batches; save between two batches when it is due.

        In the first epoch, and with `is_new_pace`, which says that a step takes another time from
        this epoch on, log how long the run will take. A batch of the `evaluation_batches` of an
        epoch counts as a third of a step: it has no backward pass. `bar` is tqdm.
        """
        length = self.steps_per_epoch
        left = length - self.step
        batches = itertools.islice(batches, left)
        if is_new_pace or self.epoch == self.first_epoch:
            epochs_left = self.settings["epochs"] - self.epoch
            steps = epochs_left * (length + evaluation_batches / 3)
            batches = forecast(batches, steps, self.run.log, left)
        hidden = None if self.machine.rank == 0 else True  # None: where there is no terminal
        for batch in bar(batches, total=length, initial=self.step, leave=False, disable=hidden):
            (lr,) = self.scheduler.get_last_lr()
            self.guard.place = f"epoch {self.epoch + 1}, step {self.step + 1}, lr {lr:.4g}"
            yield batch
            self.step += 1
            self._save_if_due()

    def evaluation(self, batches: Iterable) -> Iterator:
        """Pass `batches` on, and save when it is due.

        Several processes do not save here: they may have unlike numbers of batches.
        """
        for batch in batches:
            yield batch
            if self.machine.world_size == 1:
                self._save_if_due()

    def _save_if_due(self) -> None:
        is_time = time.monotonic() - self.saved_at >= 60 * self.settings["checkpoint_minutes"]
        is_asked = self.run.signal is not None
        if any(self.machine.maxima(is_asked, is_time)):
            self.save()

    def add(self, outputs: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Add what training steps give, (loss, logits, target), to the sums of the epoch."""
        for loss, logits, target in outputs:
            correct = (logits.argmax(1) == target).sum()
            self.totals[:2] += torch.stack([loss * len(target), correct])
            self.totals[2] += len(target)  # as a tensor it would have to be copied to a GPU

    def result(self) -> dict[str, Any]:
        """Return what every result tells about its run."""
        return {
            "seconds": time.time() - self.started,
            "device": str(self.machine.device),
            "versions": versions(),
            "args": self.settings,
            "history": self.history,
            "out_dir": str(self.run.path),
        }

    def means(self) -> tuple[float, float]:
        """Return loss and accuracy in [0, 1] of the epoch so far, over all processes."""
        loss, correct, count = self.machine.sum(self.totals).tolist()
        return loss / max(1, count), correct / max(1, count)

    def finish_epoch(self, record: dict[str, Any], keep: bool = False) -> None:
        """Go on to the next epoch, and save; `keep` lets `go_back` return to here."""
        self.history.append(record)
        self.epoch, self.step = self.epoch + 1, 0
        self.save(kept_as(self.epoch) if keep else None)


def kept_as(epoch: int) -> str:
    return f"epoch-{epoch}.pt"


def forecast(batches: Iterable, steps: float, log: Callable[[str], None], length: int) -> Iterator:
    """Pass `length` batches on; after a few of them, log how long `steps` of them will take."""
    warmup = 3 if length > 13 else 1
    last = warmup + min(10, length - 1 - warmup)
    times = {}
    for i, batch in enumerate(batches):
        if i in (0, 1, warmup, last):
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            times[i] = time.perf_counter()
        if i == last > warmup:
            seconds, first = (times[last] - times[warmup]) / (last - warmup), times[1] - times[0]
            left = duration(seconds * steps)
            log(f"{seconds:.3f} s a step (the first: {first:.1f} s): about {left} to go")
        yield batch


def duration(seconds: float) -> str:
    """Write a time in the two units that matter."""
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if seconds >= size:
            whole, rest = divmod(round(seconds / part), size // part)
            return f"{whole} {unit} {rest} {smaller}"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of the global random number generators, in plain values and tensors.

    They are the same in all processes, which draw alike from the generators of their devices.
    """
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [name, keys.tolist(), position, has_gauss, gauss],
        "python": list(random.getstate()),
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the global random number generators to what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["device"] is not None:
        torch.cuda.set_rng_state(state["device"], device)
    np.random.set_state(tuple(state["numpy"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
