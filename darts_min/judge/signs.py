"""Read from the supernet the signs of a search that goes wrong, and decide when to stop it."""

from collections.abc import Callable, Iterable, Sequence
from copy import copy

import torch
from torch import Tensor
from torch.func import functional_call

from darts_min.genotypes import Genotype, kept_edges
from darts_min.run.machine import Machine
from darts_min.supernet import Supernet

KINDS = ("normal", "reduce")
MAX_PRODUCTS = 30  # of the Hessian with a vector; about ten are usual
# Early stopping takes the genotype of this many eigenvalues before the newest one.
LOOK_BACK = 6


def signs_of_collapse(model: Supernet, genotype: Genotype) -> dict[str, float]:
    """Return all signs that the alphas and the genotype show, by their names in reports."""
    disagreements = {"edges on which the rules disagree": rule_disagreements(model)}
    return count_skips(genotype) | mixture_signs(model, genotype) | disagreements


def count_skips(genotype: Genotype) -> dict[str, int]:
    """Count the skip connections: more than 2 in a normal cell are a bad sign (DARTS+)."""
    return {
        f"skips in the cell/{kind}": [op for op, _ in getattr(genotype, kind)].count("skip_connect")
        for kind in KINDS
    }


@torch.no_grad()
def mixture_signs(model: Supernet, genotype: Genotype) -> dict[str, float]:
    """Return three signs of how decided the mixtures are, for each kind of cell.

    - weight of none: the mean over all edges
    - entropy of kept edges: the mean over the edges that the genotype keeps
    - smallest lead: on a kept edge, the weight of the best operation minus that of the second best,
      both other than `none`; the smallest over the kept edges

    The weights of an edge are divided by their sum, which is not 1 in FairDARTS and PC-DARTS.
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
    """Count the edges that the rules "darts" and "nni" choose differently, over both cells.

    An edge counts if the rule "darts" keeps it and the rule "nni" does not keep it with the same
    operation.
    """
    count = 0
    for kind in KINDS:
        cells = (getattr(model.genotype(rule), kind) for rule in ("darts", "nni"))
        darts, nni = (set(zip(kept_edges(cell), cell, strict=True)) for cell in cells)
        count += len(darts - nni)
    return count


@torch.no_grad()
def discretised(model: Supernet, genotype: Genotype) -> Supernet:
    """Return a supernet with the same weights that computes the operations of `genotype` alone.

    Each of them has mixture weight 1, as in the network that will be trained. The two supernets
    share their parameters.
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
) -> float | None:
    """Return the largest eigenvalue of the Hessian in alpha of the loss of `batch`, at these w.

    The eigenvalue grows before a search collapses (RobustDARTS, arXiv 1909.09656, Sec. 4). The
    method of Lanczos with exact Hessian-vector products runs until its error is at most `tolerance`
    times the eigenvalue. `average` takes the mean of tensors over the processes that share the
    batch. Returns None if the Hessian is not finite.
    """
    ids, alphas, fixed = {id(alpha) for alpha in model.alphas()}, {}, {}
    for name, p in model.named_parameters():
        if id(p) in ids:
            alphas[name] = p.detach().requires_grad_()
        else:
            fixed[name] = p.detach()
    inputs, target = batch
    training = model.training
    model.eval()  # a relaxation that draws gives its mean mixture
    with torch.enable_grad():
        loss = loss_fn(functional_call(model, {**fixed, **alphas}, (inputs,)), target)
        grads = torch.autograd.grad(loss, alphas.values(), create_graph=True)
        gradient = torch.cat([grad.flatten() for grad in grads])
    model.train(training)

    def product(v: Tensor) -> Tensor:
        rows = torch.autograd.grad(gradient, alphas.values(), v.to(gradient), retain_graph=True)
        average(rows)
        return torch.cat([row.flatten() for row in rows]).double()

    # Lanczos: in the `basis`, the Hessian is a tridiagonal matrix.
    start = torch.randn(gradient.numel(), generator=torch.Generator().manual_seed(0)).double()
    start = start.to(gradient.device)
    basis, diagonal, off_diagonal = [start / start.norm()], [], []
    while True:
        rest = product(basis[-1])
        diagonal.append(torch.dot(rest, basis[-1]))
        known = torch.stack(basis)
        for _ in range(2):  # twice, because of rounding errors
            rest = rest - known.t() @ (known @ rest)
        size = rest.norm()
        tridiagonal = torch.diag(torch.stack(diagonal))
        if off_diagonal:
            beside = torch.stack(off_diagonal)
            tridiagonal += torch.diag(beside, 1) + torch.diag(beside, -1)
        if not tridiagonal.isfinite().all():
            return None
        values, vectors = torch.linalg.eigh(tridiagonal)
        error = size * vectors[-1, -1].abs()
        is_found = error <= tolerance * values[-1].abs() or size == 0
        if is_found or len(basis) == MAX_PRODUCTS:
            return values[-1].item()
        off_diagonal.append(size)
        basis.append(rest / size)


def eigenvalue_that_fits(
    model: Supernet,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    batch: tuple[Tensor, Tensor],
    images: int,
    machine: Machine,
) -> tuple[float | None, int]:
    """Return the largest eigenvalue of the first `images` of a batch, and their number.

    If memory ends, half as many images are tried, and so on; None if it does not hold two images,
    or if the Hessian is not finite.
    Several processes must compute the same, so that there a lack of memory is an error.
    """
    while images > 1:
        part = batch[0][:images], batch[1][:images]
        try:
            return largest_eigenvalue(model, loss_fn, part, machine.average), images
        except (RuntimeError, MemoryError) as error:
            if machine.world_size > 1 or not is_out_of_memory(error):
                raise
        images //= 2  # outside `except`, where the error no longer holds the tensors
    return None, 0


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether PyTorch raised `error` because the GPU or the CPU has no memory left.

    On the CPU, oneDNN then only says that it "could not create" something.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("DefaultCPUAllocator", "bad_alloc", "could not create a")
    return any(sign in str(error) for sign in signs)


def should_stop(eigenvalues: Sequence[float | None], every: int = 1) -> bool:
    """Decide after an epoch whether to stop, by RobustDARTS' rule (Sec. 4.3, as in its code).

    `eigenvalues` are those of the epochs 0, `every`, 2 * `every`, ...; None stands for one that is
    missing. Stop if the mean of the newest five eigenvalues is more than 1.3 times the mean of the
    five that end four eigenvalues earlier. Then take the genotype of `LOOK_BACK` eigenvalues ago,
    in the middle of the earlier five. If that genotype is of an epoch before 10, the search goes
    on.
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
