"""Is the cell any good? Signs of a search that goes wrong, read from the supernet."""

from collections.abc import Callable, Iterable, Sequence
from copy import copy

import torch
from torch import Tensor
from torch.func import functional_call

from darts_min.genotypes import Genotype, kept_edges
from darts_min.run.machine import Machine
from darts_min.supernet import Supernet

KINDS = ("normal", "reduce")


def signs_of_collapse(model: Supernet, genotype: Genotype) -> dict[str, float]:
    """Return what the alphas and the genotype say, by the names that reports show."""
    disagreements = {"edges on which the rules disagree": rule_disagreements(model)}
    return count_skips(genotype) | mixture_signs(model, genotype) | disagreements


def count_skips(genotype: Genotype) -> dict[str, int]:
    """Count the skip connections; 2 in a normal cell are usual, more a bad sign (DARTS+)."""
    return {
        f"skips in the cell/{kind}": [op for op, _ in getattr(genotype, kind)].count("skip_connect")
        for kind in KINDS
    }


@torch.no_grad()
def mixture_signs(model: Supernet, genotype: Genotype) -> dict[str, float]:
    """Say how decided the mixtures are, for each kind of cell.

    The mean weight of `none` on all edges, the mean entropy of the kept edges, and how far the best
    operation of a kept edge is ahead of the second best one other than `none`: the smallest of
    those leads. Weights are shares of their edge's, which do not add up to 1 in FairDARTS and
    PC-DARTS.
    """
    signs = {}
    for kind, mix in zip(KINDS, model.mixtures(), strict=True):
        nones = [i for i, name in enumerate(model.primitives) if name == "none"]
        others = [i for i, name in enumerate(model.primitives) if name != "none"]
        mix = mix / mix.sum(1, keepdim=True).clamp_min(1e-12)
        kept = mix[kept_edges(getattr(genotype, kind))]
        best = kept[:, others].topk(min(2, len(others))).values
        signs[f"weight of none/{kind}"] = mix[:, nones].sum(1).mean().item()
        entropy = torch.special.entr(kept).sum(1).mean()
        signs[f"entropy of kept edges (nats)/{kind}"] = entropy.item()
        signs[f"smallest lead/{kind}"] = (best[:, 0] - best[:, -1]).min().item()
    return signs


def rule_disagreements(model: Supernet) -> int:
    """Count the edges of both cells that only one of the rules "darts" and "nni" would keep so."""
    darts, nni = model.genotype("darts"), model.genotype("nni")
    count = 0
    for kind in KINDS:
        cells = (getattr(genotype, kind) for genotype in (darts, nni))
        a, b = (set(zip(kept_edges(cell), cell, strict=True)) for cell in cells)
        count += len(a - b)
    return count


@torch.no_grad()
def discretised(model: Supernet, genotype: Genotype) -> Supernet:
    """Return a supernet of the same weights that mixes in the operations of `genotype` alone.

    Each has weight 1, as in the network that will be trained; the others are not computed. The two
    supernets share their parameters.
    """
    discrete = copy(model)
    discrete.fixed_mixtures = []
    for kind, mix in zip(KINDS, model.mixtures(), strict=True):
        cell = getattr(genotype, kind)
        columns = [model.primitives.index(op) for op, _ in cell]
        mix = torch.zeros_like(mix)
        mix[kept_edges(cell), columns] = 1
        discrete.fixed_mixtures.append(mix)
    return discrete


def largest_eigenvalue(
    model: Supernet,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    batch: tuple[Tensor, Tensor],
    average: Callable[[Iterable[Tensor]], None] = lambda tensors: None,
    tolerance: float = 0.01,
    max_products: int = 30,
) -> float:
    """Return the largest eigenvalue of the Hessian of the loss of `batch` in alpha, at these w.

    It grows before a search collapses (RobustDARTS, arXiv 1909.09656, Sec. 4). By Lanczos' method
    with exact Hessian-vector products, until its error is at most `tolerance` of it. `average`
    takes the mean of tensors over the processes that share the batch.
    """
    named = dict(model.named_parameters())
    ids = {id(alpha): i for i, alpha in enumerate(model.alphas())}
    names = sorted((n for n, p in named.items() if id(p) in ids), key=lambda n: ids[id(named[n])])
    alphas = {name: named[name].detach().requires_grad_() for name in names}
    fixed = {name: p.detach() for name, p in named.items() if name not in alphas}
    inputs, target = batch
    training = model.training
    model.eval()  # the mean mixture, where a relaxation draws
    with torch.enable_grad():
        loss = loss_fn(functional_call(model, {**fixed, **alphas}, (inputs,)), target)
        grads = torch.autograd.grad(loss, alphas.values(), create_graph=True)
        gradient = torch.cat([grad.flatten() for grad in grads])
    model.train(training)

    def product(v: Tensor) -> Tensor:
        rows = torch.autograd.grad(gradient, alphas.values(), v.to(gradient), retain_graph=True)
        average(rows)
        return torch.cat([row.flatten() for row in rows]).double()

    # Softmax does not mind a constant: a start in the range of the Hessian has none.
    v = torch.randn(gradient.numel(), generator=torch.Generator().manual_seed(0)).double()
    v = v.to(gradient.device)
    basis, diagonal, beside = [v / v.norm()], [], []
    while True:
        w = product(basis[-1])
        diagonal.append(torch.dot(w, basis[-1]))
        known = torch.stack(basis)
        for _ in range(2):  # twice is enough
            w = w - known.t() @ (known @ w)
        size = w.norm()
        t = torch.diag(torch.stack(diagonal))
        if beside:
            t += torch.diag(torch.stack(beside), 1) + torch.diag(torch.stack(beside), -1)
        values, vectors = torch.linalg.eigh(t)
        error = size * vectors[-1, -1].abs()
        if error <= tolerance * values[-1].abs() or len(basis) == max_products or size == 0:
            return values[-1].item()
        beside.append(size)
        basis.append(w / size)


def eigenvalue_that_fits(
    model: Supernet,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    batch: tuple[Tensor, Tensor],
    images: int,
    machine: Machine,
) -> tuple[float | None, int]:
    """Return the largest eigenvalue of the first `images` of a batch, and their number.

    Where memory ends, half as many are tried, and so on; None if it does not hold two. Of several
    processes, which must compute alike, one that runs out of memory raises the error.
    """
    while images > 1:
        part = batch[0][:images], batch[1][:images]
        try:
            return largest_eigenvalue(model, loss_fn, part, machine.average), images
        except RuntimeError as error:
            if machine.world_size > 1 or not is_out_of_memory(error):
                raise
        images //= 2  # out here, the error no longer holds the tensors
    return None, 0


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether `error` is PyTorch's for a GPU, or for the CPU, without memory."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


# The genotype that early stopping takes is so many eigenvalues older than the newest one.
LOOK_BACK = 6


def should_stop(eigenvalues: Sequence[float | None], every: int = 1) -> bool:
    """Apply the early stopping of RobustDARTS (Sec. 4.3, as in its code) after the newest epoch.

    `eigenvalues` are those of the epochs 0, `every`, 2 * `every`, ...; None where one is missing.
    With e the newest epoch and a mean over five eigenvalues in a row: stop if the mean that ends
    with e is more than 1.3 times the mean that ends four eigenvalues earlier. The genotype to take
    is that of epoch e - `LOOK_BACK` * `every`, in the middle of the earlier five; before that one
    is epoch 10, the search goes on.
    """
    window, delta, factor, first_epoch = 5, 4, 1.3, 10
    newest = len(eigenvalues) - 1
    if (newest - LOOK_BACK) * every < first_epoch:
        return False
    recent = list(eigenvalues)[-window - delta :]
    if len(recent) < window + delta or None in recent:
        return False
    now, before = sum(recent[delta:]) / window, sum(recent[:window]) / window
    return before > 0 and now / before > factor
