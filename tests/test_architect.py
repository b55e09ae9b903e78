"""Oracles: the paper's Fig. 2 by hand, exact double backward, and torch.optim.SGD itself."""

import itertools
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from darts_min.architect import architecture_gradient
from darts_min.data import Loader, channel_statistics, synthetic_dataset
from darts_min.supernet import Supernet


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


class Toy(nn.Module):
    """Fig. 2: L_val = alpha*w - 2*alpha + 1, L_train = w^2 - 2*alpha*w + alpha^2."""

    def __init__(self, alpha=2.0, w=-2.0):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(alpha, dtype=torch.float64))
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def alphas(self):
        return [self.alpha]

    def forward(self, x):
        return torch.stack([self.alpha, self.w])


def toy_loss(output, kind):
    a, w = output
    return a * w - 2 * a + 1 if kind == "val" else w**2 - 2 * a * w + a**2


def toy_gradient(xi, optimizer=None, model=None):
    (grad,) = architecture_gradient(
        model or Toy(), toy_loss, (None, "train"), (None, "val"), xi, optimizer
    )
    return grad.item()


@pytest.mark.parametrize("xi, expected, tolerance", [(0, -4, 1e-9), (0.1, -2.8, 5e-6)])
def test_toy_of_figure_2_has_the_gradient_of_the_paper(xi, expected, tolerance):
    assert toy_gradient(xi) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("a, w, xi", [(2, -2, 0.1), (1, 3, 0.2), (-1, 0.5, 0.7)])
def test_toy_gradient_is_the_derivative_written_out(a, w, xi):
    """w' = w - xi*(2w - 2a), so d L_val(w', a) / da = w' - 2 + a * 2*xi."""
    expected = w - xi * (2 * w - 2 * a) - 2 + 2 * xi * a
    assert toy_gradient(xi, model=Toy(float(a), float(w))) == pytest.approx(expected, abs=5e-6)


class TinyNet(nn.Module):
    """tanh layers mixed by softmax(alpha); every loss of it is smooth."""

    def __init__(self, seed=0, alphas_first=True, dropout=0.0, batch_norm=False):
        super().__init__()
        names = ["beta", "alpha", "w1", "w2", "w3"]
        shapes = {"beta": (3,), "alpha": (2,), "w1": (4, 5), "w2": (4, 5), "w3": (5, 3)}
        values = {name: randn(*shapes[name], seed=seed + i) / 2 for i, name in enumerate(names)}
        for name in names if alphas_first else ["w3", "alpha", "w1", "beta", "w2"]:
            self.register_parameter(name, nn.Parameter(values[name]))
        self.bn = nn.BatchNorm1d(5, dtype=torch.float64) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def alphas(self):
        return [self.alpha, self.beta]

    def forward(self, x):
        a, b = self.alpha.softmax(0), self.beta.softmax(0)
        hidden = a[0] * torch.tanh(x @ self.w1) + a[1] * torch.sin(x @ self.w2)
        hidden = self.dropout(self.bn(hidden))
        mixed = b[0] * torch.tanh(hidden) + b[1] * hidden + b[2] * torch.cos(hidden)
        return mixed @ self.w3


def tiny_batches():
    targets = [torch.randint(3, (8,), generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    return [(randn(8, 4, seed=10 + i), target) for i, target in enumerate(targets)]


def weights(model):
    alphas = {id(alpha) for alpha in model.alphas()}
    return [p for p in model.parameters() if id(p) not in alphas]


def sgd(model, momentum=0.9, weight_decay=3e-2, steps=0):
    optimizer = torch.optim.SGD(weights(model), 0.1, momentum, weight_decay=weight_decay)
    for i in range(steps):
        x, target = randn(8, 4, seed=100 + i), torch.arange(8) % 3
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    model.zero_grad()
    return optimizer


def exact_gradient(model, train_batch, val_batch, xi, momentum=0.0, decay=0.0, buffers=None):
    """Differentiate L_val(w'(alpha), alpha) through the step itself (Eq. 5-7)."""
    w_names = [n for n, p in model.named_parameters() if id(p) in map(id, weights(model))]
    w = [model.get_parameter(name) for name in w_names]
    loss = F.cross_entropy(model(train_batch[0]), train_batch[1])
    grads = torch.autograd.grad(loss, w, create_graph=True)
    buffers = buffers or [0.0] * len(w)
    w_prime = {
        name: p - xi * (momentum * buffer + grad + decay * p)
        for name, p, grad, buffer in zip(w_names, w, grads, buffers, strict=True)
    }
    output = torch.func.functional_call(model, w_prime, (val_batch[0],))
    return torch.autograd.grad(F.cross_entropy(output, val_batch[1]), model.alphas())


def assert_relative(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert ((a - e).norm() / e.norm()).item() < tolerance


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("xi, tolerance", [(0, 1e-12), (0.025, 1e-5), (0.2, 5e-5)])
def test_gradient_equals_exact_double_backward(xi, tolerance, seed):
    """What is left is the truncation error of Eq. 8, of the order xi * eps^2."""
    model, batches = TinyNet(seed), tiny_batches()
    ours = architecture_gradient(model, F.cross_entropy, *batches, xi)
    expected = exact_gradient(model, *batches, xi)
    assert_relative(ours, expected, tolerance)
    if xi:
        first_order = exact_gradient(model, *batches, 0)
        assert (expected[0] - first_order[0]).norm() > 1e-3 * xi * expected[0].norm()


@pytest.mark.parametrize("momentum, decay", [(0.9, 0.03), (0.0, 0.03), (0.9, 0.0)])
def test_gradient_with_momentum_and_decay_equals_exact_double_backward(momentum, decay):
    model, batches, xi = TinyNet(), tiny_batches(), 0.3
    optimizer = sgd(model, momentum, decay, steps=3)
    ours = architecture_gradient(model, F.cross_entropy, *batches, xi, optimizer)
    buffers = [optimizer.state[w]["momentum_buffer"] for w in weights(model)] if momentum else None
    expected = exact_gradient(model, *batches, xi, momentum, decay, buffers)
    assert_relative(ours, expected, 1e-5)
    plain = exact_gradient(model, *batches, xi)
    assert (plain[0] - expected[0]).norm() > 1e-3 * expected[0].norm()


class ExposesWeights(nn.Module):
    """Training: a smooth loss. Validation: sum_i alpha_i * w_i, whose first term's gradient is w'.

    The training loss does not contain alpha, so that the second term of Eq. 7 is 0.
    """

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(randn(6))
        self.alpha = nn.Parameter(torch.ones(6, dtype=torch.float64))

    def alphas(self):
        return [self.alpha]

    def forward(self, kind):
        if kind == "val":
            return (self.alpha * self.w).sum()
        return torch.cos(self.w).sum() + self.w.pow(4).sum() + 0 * self.alpha.sum()


@pytest.mark.parametrize("momentum, decay", [(0.9, 0.03), (0.0, 0.0), (0.9, 0.0), (0.0, 0.1)])
@pytest.mark.parametrize("steps", [0, 3])
def test_virtual_step_is_the_step_that_sgd_takes(steps, momentum, decay):
    model, lr = ExposesWeights(), 0.01
    optimizer = torch.optim.SGD([model.w], lr, momentum, weight_decay=decay)

    def real_step():
        optimizer.zero_grad()
        model("train").backward()
        optimizer.step()

    for _ in range(steps):
        real_step()
    before = model.w.detach().clone()
    (w_prime,) = architecture_gradient(
        model, lambda loss, _: loss, ("train", None), ("val", None), lr, optimizer
    )
    assert torch.equal(model.w, before)
    real_step()
    torch.testing.assert_close(w_prime, model.w.detach(), rtol=1e-12, atol=1e-12)


def test_parameter_groups_keep_their_own_decay_and_momentum():
    model, batches, xi = TinyNet(), tiny_batches(), 0.2
    groups = [
        {"params": [model.w1], "weight_decay": 0.5},
        {"params": [model.w2, model.w3], "momentum": 0.5},
    ]
    optimizer = torch.optim.SGD(groups, 0.1, 0.9)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
        optimizer.step()
    ours = architecture_gradient(model, F.cross_entropy, *batches, xi, optimizer)

    stepped = deepcopy(model)
    stepped.zero_grad()
    loss = F.cross_entropy(model(batches[0][0]), batches[0][1])
    grads = torch.autograd.grad(loss, [model.w1, model.w2, model.w3], create_graph=True)
    b1, b2, b3 = (optimizer.state[w]["momentum_buffer"] for w in (model.w1, model.w2, model.w3))
    w_prime = {
        "w1": model.w1 - xi * (0.9 * b1 + grads[0] + 0.5 * model.w1),
        "w2": model.w2 - xi * (0.5 * b2 + grads[1]),
        "w3": model.w3 - xi * (0.5 * b3 + grads[2]),
    }
    output = torch.func.functional_call(model, w_prime, (batches[1][0],))
    expected = torch.autograd.grad(F.cross_entropy(output, batches[1][1]), model.alphas())
    assert_relative(ours, expected, 1e-5)


@pytest.mark.parametrize("xi", [0, 0.1])
def test_gradients_come_in_the_order_of_alphas(xi):
    batches = tiny_batches()
    expected = architecture_gradient(TinyNet(), F.cross_entropy, *batches, xi)
    assert [len(grad) for grad in expected] == [2, 3]
    model = TinyNet(alphas_first=False)
    assert_relative(architecture_gradient(model, F.cross_entropy, *batches, xi), expected, 1e-12)


def snapshot(model, optimizer):
    return {
        "state": deepcopy(model.state_dict()),
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "ids": [id(p) for p in model.parameters()] + [id(b) for b in model.buffers()],
        "training": [module.training for module in model.modules()],
        "optimizer": deepcopy(optimizer.state_dict()),
        "rng": torch.get_rng_state(),
    }


def assert_identical(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_identical(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("xi", [0, 0.1])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("grads", ["none", "some"])
def test_everything_is_left_bit_identical(grads, steps, xi):
    model, batches = TinyNet(dropout=0.5, batch_norm=True), tiny_batches()
    optimizer = sgd(model, steps=steps)
    if grads == "some":
        for i, p in enumerate(model.parameters()):
            p.grad = randn(*p.shape, seed=i) if i % 2 else None
    for alpha in model.alphas():
        alpha.requires_grad_(False)
    before = snapshot(model, optimizer)
    result = architecture_gradient(model, F.cross_entropy, *batches, xi, optimizer)
    assert_identical(snapshot(model, optimizer), before)
    assert all(not grad.requires_grad for grad in result)


def test_dropout_draws_the_same_mask_in_every_pass():
    """Else the finite difference would measure the noise: two masks, divided by 2 * eps."""
    model, batches = TinyNet(dropout=0.5), tiny_batches()
    torch.manual_seed(3)
    ours = architecture_gradient(model, F.cross_entropy, *batches, 0.1)
    torch.manual_seed(3)
    masks = {}

    def same_mask(module, args, output):
        masks.setdefault("mask", (output != 0).double() * 2)
        return args[0] * masks["mask"]

    model.dropout.register_forward_hook(same_mask)
    assert_relative(ours, exact_gradient(model, *batches, 0.1), 1e-5)


def test_works_inside_no_grad():
    model, batches = TinyNet(), tiny_batches()
    expected = architecture_gradient(model, F.cross_entropy, *batches, 0.1)
    with torch.no_grad():
        assert_identical(architecture_gradient(model, F.cross_entropy, *batches, 0.1), expected)


def test_second_order_ignores_autocast():
    model = TinyNet().float()
    batches = [(x.float(), target) for x, target in tiny_batches()]
    expected = architecture_gradient(model, F.cross_entropy, *batches, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = architecture_gradient(model, F.cross_entropy, *batches, 0)
        assert_identical(architecture_gradient(model, F.cross_entropy, *batches, 0.1), expected)
    assert not torch.equal(
        rounded[0], architecture_gradient(model, F.cross_entropy, *batches, 0)[0]
    )


def test_a_vanishing_validation_gradient_in_w_gives_a_finite_result():
    """At w' with grad_w' L_val = 0 the second term of Eq. 7 is 0, whatever eps is."""
    model = Toy(alpha=0.0, w=1.0)
    assert toy_gradient(0.1, model=model) == pytest.approx(1.0 - 0.1 * 2 - 2, abs=1e-9)


@pytest.mark.parametrize("xi", [0, 0.1])
def test_a_batch_in_parts_gives_the_gradient_of_the_whole(xi):
    model, seen = TinyNet(), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    whole = architecture_gradient(model, F.cross_entropy, *tiny_batches(), xi)
    assert set(seen) == {8}
    seen.clear()
    parts = architecture_gradient(model, F.cross_entropy, *tiny_batches(), xi, grad_accum=4)
    assert set(seen) == {2}
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_bf16_changes_the_alpha_gradients_of_a_trained_supernet_by_less_than_5_percent(device):
    torch.manual_seed(0)
    train = synthetic_dataset(0, 16).train.to(device)
    batches = Loader(train, 32, channel_statistics(train), seed=0, augment=True)
    model = Supernet(10, 4, 3).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.weights(), 0.05, 0.9, weight_decay=3e-4)
    losses = []
    for x, target in itertools.islice(batches, 60):
        loss = F.cross_entropy(model(x), target)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.weights(), 5)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    # Rounding averages out over a batch; for 64 of these small images it is 3 to 6 %.
    batches = Loader(train, 256, channel_statistics(train), seed=1, augment=True)
    for batch, _ in zip(batches, range(3), strict=False):
        arguments = (model, F.cross_entropy, batch, batch, 0)
        exact = torch.cat(architecture_gradient(*arguments))
        with torch.autocast(device, torch.bfloat16):
            rounded = torch.cat(architecture_gradient(*arguments))
        assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()
