"""The gradient of the validation loss in alpha, first and second order (Sec. 2.3, Eq. 5-8)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

Parameters = dict[str, Tensor]


def architecture_gradient(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    train_batch: tuple,
    val_batch: tuple,
    xi: float,
    w_optimizer: torch.optim.Optimizer | None = None,
    grad_accum: int = 1,
    penalty: Callable[[list[Tensor]], Tensor] | None = None,
) -> list[Tensor]:
    """Return d L_val(w'(alpha), alpha) / d alpha, one tensor for each of `model.alphas()`.

    With `xi` = 0, w' = w: first order. With `xi` > 0, w' = w - xi * (momentum * buffer +
    grad_w L_train(w, alpha) + weight_decay * w), the step that `w_optimizer` (SGD, not Nesterov's)
    would take with learning rate `xi`, not clipped; without an optimizer, plain gradient descent.
    Then Eq. 7:
    grad_alpha L_val(w', alpha) - xi * grad2_{alpha,w} L_train(w, alpha) grad_w' L_val(w', alpha),
    where the last product is a finite difference (Eq. 8).

    A batch is `(input, target)`, a loss `loss_fn(model(input), target)`. With `grad_accum` > 1
    both are tensors, and the loss is the mean over so many equal parts of the batch, one at a time.
    `penalty(alphas)`, where given, is a summand of L_val. Weights, alphas, their `.grad` and
    `requires_grad`, buffers, optimizer and random state are left as they were: all variants of w
    are separate tensors, and what is random in the model is drawn alike for all of them. What a
    loss does not depend on has gradient 0. The second order ignores autocast, whose rounding would
    drown the finite difference.
    """
    named = dict(model.named_parameters())
    names = {id(p): name for name, p in named.items()}
    alpha = {names[id(a)]: a.detach().requires_grad_() for a in model.alphas()}
    w = {name: p.detach() for name, p in named.items() if name not in alpha}
    device = next(iter(alpha.values())).device

    def gradients(batch: tuple, w: Parameters, wrt: Parameters) -> list[Tensor]:
        """Differentiate the loss of `batch` at (w, alpha) by the tensors of `wrt`."""
        batches = [batch]
        if grad_accum > 1:
            batches = zip(*(t.chunk(grad_accum) for t in batch), strict=True)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        sums: list[Tensor] = []
        with torch.random.fork_rng(_generators(device)), torch.enable_grad():
            for inputs, target in batches:
                output = functional_call(model, {**w, **alpha, **buffers}, (inputs,))
                loss = loss_fn(output, target) / grad_accum
                if loss.requires_grad:
                    grads = torch.autograd.grad(loss, wrt.values(), materialize_grads=True)
                else:  # GDAS can draw `none` everywhere
                    grads = [torch.zeros_like(tensor) for tensor in wrt.values()]
                sums = [a + b for a, b in zip(sums, grads, strict=True)] if sums else list(grads)
        return sums

    def with_penalty(grads: list[Tensor]) -> list[Tensor]:
        """Add the gradient of the penalty to the gradients in alpha."""
        if penalty is None:
            return grads
        with torch.enable_grad():
            value = penalty(list(alpha.values()))
        extra = torch.autograd.grad(value, alpha.values(), materialize_grads=True)
        return [g + e for g, e in zip(grads, extra, strict=True)]

    if xi == 0:  # Eq. 5 and 6 with w' = w
        return with_penalty(gradients(val_batch, w, alpha))

    with torch.autocast(device.type, enabled=False):
        for tensor in w.values():
            tensor.requires_grad_()
        w_grad = dict(zip(w, gradients(train_batch, w, w), strict=True))
        w_prime = _virtual_step(named, w_grad, xi, w_optimizer)  # Eq. 6's w'
        grads = gradients(val_batch, w_prime, {**alpha, **w_prime})
        alpha_grad, v = grads[: len(alpha)], dict(zip(w, grads[len(alpha) :], strict=True))

        # Eq. 8; mind the parentheses around 2 * eps, which a popular port lost.
        norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in v.values()]))
        eps = 0.01 / norm.clamp_min(1e-12)  # v = 0 contributes 0, not NaN
        w_plus = {name: (w[name] + eps * v[name]).detach() for name in w}
        w_minus = {name: (w[name] - eps * v[name]).detach() for name in w}
        plus = gradients(train_batch, w_plus, alpha)
        minus = gradients(train_batch, w_minus, alpha)
        triples = zip(alpha_grad, plus, minus, strict=True)
        return with_penalty([g - xi * (p - m) / (2 * eps) for g, p, m in triples])


def _generators(device: torch.device) -> list[torch.device]:
    """Return the devices, beside the CPU, whose random state must be left as it was.

    While a CUDA graph is recorded, the random state cannot be read, and nothing is random.
    """
    is_random = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    return [device] if is_random else []


def _virtual_step(
    named: Parameters,
    w_grad: Parameters,
    xi: float,
    optimizer: torch.optim.Optimizer | None,
) -> Parameters:
    """Return w' (Eq. 7) as new leaves that require grad."""
    groups = optimizer.param_groups if optimizer else []
    group_of = {id(p): group for group in groups for p in group["params"]}
    w_prime = {}
    for name, grad in w_grad.items():
        p = named[name]
        group = group_of.get(id(p), {})
        buffer = optimizer.state.get(p, {}).get("momentum_buffer") if optimizer else None
        step = grad + group.get("weight_decay", 0.0) * p.detach()
        if buffer is not None:
            step = step + group["momentum"] * buffer
        w_prime[name] = (p.detach() - xi * step).requires_grad_()
    return w_prime
