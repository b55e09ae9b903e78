"""One search step of ours against the textbook supernet's (tests/textbook.py).

The textbook evaluates edge by edge, in contiguous memory, and computes all gradients in both halves
of the step, as the original code does. Both run in this process, interleaved. Random data of the
shape of CIFAR; 16 channels, 8 cells.

    python -m benchmarks.search_step [--batch-size 16 64] [--order 1 2] [--repetitions 5]

With `--channels-last` the textbook is in channels-last memory, too: the share of the memory format.
"""

import argparse

import torch
from torch.nn import functional as F

from benchmarks.measure import interleaved_seconds, kept_bytes, operator_calls
from darts_min import Supernet
from darts_min.architect import architecture_gradient
from tests.textbook import TextbookSupernet


def optimizers(model, foreach):
    return (
        torch.optim.SGD(model.weights(), 0.025, 0.9, weight_decay=3e-4, foreach=foreach),
        torch.optim.Adam(model.alphas(), 3e-4, betas=(0.5, 0.999), weight_decay=1e-3),
    )


def w_step(model, w_optimizer, batch):
    x, target = batch
    w_optimizer.zero_grad()
    F.cross_entropy(model(x), target).backward()
    torch.nn.utils.clip_grad_norm_(model.weights(), 5.0)
    w_optimizer.step()


def our_step(model, w_optimizer, alpha_optimizer, train, val, order):
    xi = 0.025 if order == 2 else 0.0
    grads = architecture_gradient(model, F.cross_entropy, train, val, xi, w_optimizer)
    for alpha, grad in zip(model.alphas(), grads, strict=True):
        alpha.grad = grad
    alpha_optimizer.step()
    w_step(model, w_optimizer, train)


def textbook_step(model, w_optimizer, alpha_optimizer, train, val, order):
    """Step as the original does: `backward()` on everything, weights moved and moved back."""
    weights, alphas = model.weights(), model.alphas()

    def backward(batch):
        model.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()

    def add(direction, factor):
        with torch.no_grad():
            for w, d in zip(weights, direction, strict=True):
                w.add_(d, alpha=factor)

    if order == 1:
        backward(val)
    else:
        xi, saved = 0.025, [w.detach().clone() for w in weights]
        backward(train)
        buffers = [w_optimizer.state[w].get("momentum_buffer", 0.0) for w in weights]
        with torch.no_grad():
            for w, buffer in zip(weights, buffers, strict=True):
                w.sub_(xi * (0.9 * buffer + w.grad + 3e-4 * w))
        backward(val)
        alpha_grads = [a.grad.clone() for a in alphas]
        v = [w.grad.clone() for w in weights]
        eps = 0.01 / torch.cat([g.flatten() for g in v]).norm()
        with torch.no_grad():
            for w, s in zip(weights, saved, strict=True):
                w.copy_(s)
        signed = []
        for factor in (eps, -2 * eps):
            add(v, factor)
            backward(train)
            signed.append([a.grad.clone() for a in alphas])
        add(v, eps)
        for alpha, grad, plus, minus in zip(alphas, alpha_grads, *signed, strict=True):
            alpha.grad = grad - xi * (plus - minus) / (2 * eps)
    alpha_optimizer.step()
    w_step(model, w_optimizer, train)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--order", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--channels-last", action="store_true", help="the textbook, too")
    args = parser.parse_args()
    torch.manual_seed(0)
    ours = Supernet().to(memory_format=torch.channels_last)
    textbook = TextbookSupernet()
    if args.channels_last:
        textbook = textbook.to(memory_format=torch.channels_last)
    for alpha in ours.alphas():
        alpha.requires_grad_(False)
    our_optimizers, textbook_optimizers = optimizers(ours, True), optimizers(textbook, None)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ours / textbook = ratio")
    for batch_size in args.batch_size:
        train, val = (
            (torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))) for _ in range(2)
        )

        def loss(model, batch=train):
            return F.cross_entropy(model(batch[0]), batch[1])

        kept = [kept_bytes(model, lambda m=model: loss(m)) for model in (ours, textbook)]
        row("w step keeps (MB)", batch_size, *(k / 1e6 for k in kept))
        for model in (ours, textbook):
            for p in model.weights():
                p.requires_grad_(model is textbook)
            for p in model.alphas():
                p.requires_grad_(True)
        kept = [kept_bytes(model, lambda m=model: loss(m)) for model in (ours, textbook)]
        row("alpha step keeps (MB)", batch_size, *(k / 1e6 for k in kept))
        for p in ours.parameters():
            p.requires_grad_(True)
        for alpha in ours.alphas():
            alpha.requires_grad_(False)
        for order in args.order:

            def our(order=order, batches=(train, val)):
                our_step(ours, *our_optimizers, *batches, order)

            def other(order=order, batches=(train, val)):
                textbook_step(textbook, *textbook_optimizers, *batches, order)

            seconds = interleaved_seconds(our, other, args.repetitions)
            row(f"order {order}: step (s)", batch_size, *seconds)
            calls = zip(operator_calls(our), operator_calls(other), strict=True)
            for name, pair in zip(("operator calls", "  of them computing"), calls, strict=True):
                row(f"order {order}: {name}", batch_size, *pair)


def row(what: str, batch_size: int, ours: float, textbook: float, ratio: float | None = None):
    ratio = ours / textbook if ratio is None else ratio
    print(f"batch {batch_size:3d}  {what:<30} {ours:10.2f} / {textbook:10.2f} = {ratio:.3f}")


if __name__ == "__main__":
    main()
