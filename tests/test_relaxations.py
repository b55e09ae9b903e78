"""Oracles: the papers' formulas written out, and the moments of the distributions."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from darts_min.architect import architecture_gradient
from darts_min.genotypes import PRIMITIVES
from darts_min.relaxations import Dirichlet, Gumbel, Sigmoid, SinglePath, Softmax
from darts_min.supernet import Supernet


def alphas_of(edges=14, ops=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(edges, ops, generator=generator, dtype=torch.float64).requires_grad_()


def test_gumbel_draws_one_operation_as_often_as_softmax_says():
    alphas, relaxation = alphas_of(2, 4).detach(), Gumbel(tau=0.7)
    torch.manual_seed(0)
    draws = torch.stack([relaxation.draw(alphas) for _ in range(20_000)])
    assert torch.equal((draws != 0).sum(-1), torch.ones(20_000, 2))
    torch.testing.assert_close(draws.sum(-1), torch.ones(20_000, 2, dtype=torch.float64))
    assert (draws.mean(0) - F.softmax(alphas, -1)).abs().max() < 0.015


@pytest.mark.parametrize("tau", [10.0, 0.5])
def test_gumbel_s_gradient_is_that_of_the_soft_sample_at_the_drawn_operation(tau):
    alphas = alphas_of()
    torch.manual_seed(3)
    mix = Gumbel(tau).draw(alphas)
    drawn = mix.detach().argmax(-1)
    outputs = torch.linspace(-1, 1, 14, dtype=torch.float64)
    (mix[range(14), drawn] * outputs).sum().backward()
    torch.manual_seed(3)
    noise = -torch.empty_like(alphas).exponential_().log()  # as Gumbel-max wants it
    for edge in range(14):
        logits = [(alphas[edge, k] + noise[edge, k]).item() / tau for k in range(8)]
        powers = [math.exp(logit) for logit in logits]
        soft = [power / sum(powers) for power in powers]
        k = soft.index(max(soft))
        assert k == drawn[edge]
        for j in range(8):
            slope = soft[k] * ((j == k) - soft[j]) / tau
            assert alphas.grad[edge, j].item() == pytest.approx(slope * outputs[edge].item())


def test_dirichlet_has_its_mean_and_the_mean_s_gradient():
    alphas, relaxation = alphas_of(1, 4), Dirichlet()
    concentration = [1 + (a if a > 0 else math.exp(a) - 1) for a in alphas[0].tolist()]
    total = sum(concentration)
    mean = relaxation.mean(alphas)
    assert mean[0].tolist() == pytest.approx([c / total for c in concentration])
    torch.manual_seed(0)
    draws = relaxation.draw(alphas.expand(40_000, 4))
    torch.testing.assert_close(draws.sum(-1), torch.ones(40_000, dtype=torch.float64))
    assert (draws.mean(0) - mean[0]).abs().max() < 0.01
    for k in range(4):  # the pathwise gradient's mean is the mean's gradient
        (expected,) = torch.autograd.grad(mean[0, k], alphas, retain_graph=True)
        (found,) = torch.autograd.grad(draws.mean(0)[k], alphas, retain_graph=True)
        assert (found - expected).abs().max() < 0.01
    variance = [c * (total - c) / total**2 / (total + 1) for c in concentration]
    assert draws.var(0).tolist() == pytest.approx(variance, rel=0.05)


def test_sigmoid_and_the_zero_one_loss_are_as_written():
    normal, reduce = alphas_of(3, 7), alphas_of(3, 7)
    relaxation = Sigmoid(zero_one_weight=2.0)
    weights = [1 / (1 + math.exp(-a)) for a in normal.flatten().tolist()]
    assert relaxation.draw(normal).flatten().tolist() == pytest.approx(weights)
    penalty = relaxation.penalty([normal, reduce])
    expected = -2.0 * sum((w - 0.5) ** 2 for w in weights) / len(weights)
    assert penalty.item() == pytest.approx(expected)
    penalty.backward()
    slopes = [-2.0 * 2 * (w - 0.5) * w * (1 - w) / (2 * len(weights)) for w in weights]
    assert normal.grad.flatten().tolist() == pytest.approx(slopes)


def test_single_paths_are_uniform_over_edges_and_operations():
    torch.manual_seed(0)
    relaxation, counts = SinglePath(none=0), torch.zeros(14, 8)
    for _ in range(4000):
        mix = relaxation.draw(torch.zeros(14, 8))
        for node in mix.split([2, 3, 4, 5]):
            assert node.sum(1).sort().values.tolist() == [0.0] * (len(node) - 2) + [1.0, 1.0]
        counts += mix
    assert counts[:, 0].sum() == 0
    kept = torch.tensor([2 / n for n in (2, 3, 4, 5) for _ in range(n)])
    expected = 4000 * kept[:, None] / 7
    assert ((counts[:, 1:] - expected).abs() < 5 * expected.sqrt()).all()


@pytest.mark.parametrize("xi", [0.0, 0.1])
def test_a_penalty_is_a_summand_of_the_validation_loss(xi):
    torch.manual_seed(0)
    model = Supernet(3, init_channels=2, num_cells=3, num_nodes=2).double()
    batches = [(torch.randn(4, 3, 8, 8).double(), torch.randint(3, (4,))) for _ in range(2)]
    plain = architecture_gradient(model, F.cross_entropy, *batches, xi)
    grads = architecture_gradient(
        model, F.cross_entropy, *batches, xi, penalty=Sigmoid(3.0).penalty
    )
    extra = torch.autograd.grad(Sigmoid(3.0).penalty(model.alphas()), model.alphas())
    for a, b, e in zip(grads, plain, extra, strict=True):
        torch.testing.assert_close(a, b + e, rtol=1e-10, atol=1e-12)
        assert e.abs().max() > 0


class SmoothNet(nn.Module):
    """Two layers of mixed smooth operations: no kinks to disturb a finite difference."""

    def __init__(self, relaxation):
        super().__init__()
        self.relaxation = relaxation
        self.alphas_all = nn.Parameter(torch.randn(2, 4))
        self.w = nn.Parameter(0.5 * torch.randn(2, 4, 6, 6))

    def alphas(self):
        return [self.alphas_all]

    def forward(self, x):
        for mix, w in zip(self.relaxation.draw(self.alphas_all), self.w, strict=True):
            x = (mix[:, None, None] * torch.tanh(x @ w)).sum(0)
        return x


@pytest.mark.parametrize("xi", [0.0, 0.05])
@pytest.mark.parametrize("relaxation", [Softmax(), Gumbel(1.0), Dirichlet(), Sigmoid()])
def test_alpha_gradients_are_exact_for_the_draw_that_all_passes_share(relaxation, xi):
    torch.manual_seed(0)
    model = SmoothNet(relaxation).double()
    train, val = ((torch.randn(8, 6).double(), torch.randint(6, (8,))) for _ in range(2))
    before = torch.get_rng_state()
    grads = architecture_gradient(model, F.cross_entropy, train, val, xi)
    assert torch.equal(torch.get_rng_state(), before)

    def loss(batch, **parameters):
        torch.set_rng_state(before)
        return F.cross_entropy(functional_call(model, parameters, batch[0]), batch[1])

    (w_grad,) = torch.autograd.grad(loss(train), model.w, create_graph=True)
    expected = torch.autograd.grad(loss(val, w=model.w - xi * w_grad), model.alphas())
    torch.testing.assert_close(grads, list(expected), rtol=1e-4, atol=1e-6)


def test_a_draw_of_nothing_but_none_has_gradient_zero():
    torch.manual_seed(0)
    model = Supernet(3, init_channels=2, num_cells=3, num_nodes=1, primitives=("none", "noise"))
    model.relaxation = Gumbel(1.0)
    for alpha in model.alphas():
        alpha.data[:, 0] = 1000.0
    batch = torch.randn(4, 3, 8, 8), torch.randint(3, (4,))
    for grad in architecture_gradient(model, F.cross_entropy, batch, batch, 0.0):
        assert torch.equal(grad, torch.zeros(2, 2))


def test_in_evaluation_the_mixture_is_the_mean():
    torch.manual_seed(0)
    model = Supernet(3, init_channels=2, num_cells=3, num_nodes=2)
    x = torch.randn(4, 3, 8, 8)
    for relaxation in (Gumbel(1.0), Dirichlet(), Sigmoid()):
        model.relaxation = relaxation
        model.train()
        assert not torch.equal(model(x), model(x)) or isinstance(relaxation, Sigmoid)
        model.eval()
        assert torch.equal(model(x), model(x))
        for mix, alphas in zip(model.mixtures(), model.alphas(), strict=True):
            assert torch.equal(mix, relaxation.mean(alphas))
    assert model.primitives == PRIMITIVES
