"""Watch the largest eigenvalue of the Hessian in alpha, which grows before a search collapses."""

import argparse
from collections.abc import Iterable

from torch.nn import functional as F

from darts_min.judge.signs import LOOK_BACK, eigenvalue_that_fits, should_stop
from darts_min.run.progress import Progress
from darts_min.supernet import Supernet


class EigenvalueWatch:
    """Compute the eigenvalue after some epochs; stop or change a search where it grows too fast.

    The rules are those of RobustDARTS (arXiv 1909.09656, Sec. 4). The arguments are hessian_every,
    early_stop, adapt_weight_decay, and what says how many images a step computes at once. The
    Hessian takes several times the memory of a step: where that is short (checkpoint_cells), it is
    computed on an eighth of those images, and never on more than fitted before.
    """

    def __init__(self, args: argparse.Namespace, progress: Progress):
        self.args, self.progress = args, progress
        self.every = max(1, args.hessian_every)
        images = max(2, args.batch_size // args.grad_accum)
        images = max(2, images // 8) if args.checkpoint_cells else images
        before = [record["eigenvalue_images"] for record in progress.history]
        self.images = min([images, *(count for count in before if count is not None)])

    def measure(self, model: Supernet, batches: Iterable) -> dict[str, float]:
        """Return the eigenvalue of the first batch under its name in the records, or nothing.

        It is due in the first epoch that moves alpha, and every `hessian_every` epochs from there.
        """
        since = self.progress.epoch - self.args.alpha_warmup_epochs
        is_due = self.args.hessian_every and since >= 0 and since % self.every == 0
        if not is_due or not self.images:
            return {}
        self.progress.save()  # before memory is asked for more than the training took
        tried, machine = self.images, self.progress.machine
        batch = next(iter(batches))
        value, self.images = eigenvalue_that_fits(model, F.cross_entropy, batch, tried, machine)
        if self.images < tried:
            self._tell_memory(tried)
        return {} if value is None else {"largest eigenvalue": value}

    def _tell_memory(self, tried: int) -> None:
        if self.images:
            self.progress.run.log(
                f"out of memory: the largest eigenvalue of {tried} images does not fit; from here "
                f"on it is that of {self.images}"
            )
        elif self.args.early_stop or self.args.adapt_weight_decay:
            flag = "--early-stop" if self.args.early_stop else "--adapt-weight-decay"
            raise ValueError(
                f"{flag} needs the largest eigenvalue, which does not fit into memory, even of two "
                f"images; start anew with fewer --init-channels or without {flag}"
            )
        else:
            self.progress.run.log(
                "out of memory: the largest eigenvalue does not fit, even of two images; the "
                "search goes on without it, as with --hessian-every 0"
            )

    def grows_too_fast(self, history: list[dict]) -> bool:
        """Tell whether the eigenvalue grows too fast at the end of `history`."""
        records = history[self.args.alpha_warmup_epochs :]  # of the epochs in which alpha moved
        if (len(records) - 1) % self.every:
            return False
        values = [record["signs"].get("largest eigenvalue") for record in records[:: self.every]]
        return should_stop(values, self.every)

    def stops(self) -> bool:
        """Tell whether the search ends early."""
        return self.args.early_stop and self.grows_too_fast(self.progress.history)

    def result(self) -> dict:
        """Return the record whose genotype is the result of the search: the last, or an earlier."""
        if not self.stops():
            return self.progress.history[-1]
        back = LOOK_BACK * self.every
        self.progress.run.log(
            f"stopped early, at the genotype of {back} epochs ago: the largest eigenvalue "
            "has grown too fast since then"
        )
        return self.progress.history[-1 - back]

    def goes_back(self, record: dict) -> bool:
        """Go back, with ten times the weight decay of w, if `record` is one too many; tell if so.

        Factor and limit are those of RobustDARTS' script for DARTS-ADA.
        """
        optimizer = self.progress.w_step.optimizer
        decay = 10 * optimizer.param_groups[0]["weight_decay"]
        can_adapt = self.args.adapt_weight_decay and 0 < decay <= 0.03 + 1e-9  # 1e-9: for rounding
        if not (can_adapt and self.grows_too_fast([*self.progress.history, record])):
            return False
        self.progress.go_back(record["epoch"] - LOOK_BACK * self.every)
        optimizer.param_groups[0]["weight_decay"] = decay
        self.progress.run.log(
            "the largest eigenvalue has grown too fast: back to the end of epoch "
            f"{self.progress.epoch}, with weight decay {decay:.3g}"
        )
        self.progress.save()
        return True
