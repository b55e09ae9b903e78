"""Oracle: the supernet and the architecture gradient of darts_min, which other tests hold."""

import pytest
import torch
from torch.nn import functional as F

from darts_min.architect import architecture_gradient
from darts_min.convert import supernet_from_quark0
from tests.textbook import TextbookSupernet, main, search_step


def make_pair():
    """Return a textbook supernet in float64, and ours with the same weights."""
    torch.manual_seed(0)
    textbook = TextbookSupernet(init_channels=2, num_cells=3, num_nodes=3).double()
    weights = {k: v for k, v in textbook.state_dict().items() if not k.startswith("alphas")}
    return textbook, supernet_from_quark0(weights, [a.detach() for a in textbook.alphas()])


def optimizers(model):
    return torch.optim.SGD(model.weights(), 0.1, 0.9), torch.optim.Adam(model.alphas(), 0.1)


def test_the_search_step_of_the_textbook_is_ours():
    textbook, ours = make_pair()
    their_optimizers, (w_optimizer, alpha_optimizer) = optimizers(textbook), optimizers(ours)
    for _ in range(3):
        train, val = ((torch.randn(4, 3, 8, 8).double(), torch.randint(10, (4,))) for _ in "tv")
        losses = search_step(textbook, *their_optimizers, train, val)
        assert abs(losses[1] - F.cross_entropy(ours(val[0]), val[1]).item()) < 1e-9
        grads = architecture_gradient(ours, F.cross_entropy, train, val, 0.0)
        for alpha, grad in zip(ours.alphas(), grads, strict=True):
            alpha.grad = grad
        alpha_optimizer.step()
        loss = F.cross_entropy(ours(train[0]), train[1])
        assert abs(losses[0] - loss.item()) < 1e-9
        w_optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ours.weights(), 5.0)
        w_optimizer.step()
    for mine, theirs in zip(ours.alphas(), textbook.alphas(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)
    assert textbook.genotype() == ours.genotype()


def test_the_genotype_of_the_textbook_is_ours():
    textbook, ours = make_pair()
    for _ in range(20):
        for mine, theirs in zip(ours.alphas(), textbook.alphas(), strict=True):
            theirs.data.normal_()
            mine.data = theirs.data.clone()
        assert textbook.genotype() == ours.genotype()


@pytest.mark.slow
def test_the_textbook_learns_what_it_searches_on(capsys):
    main()
    *steps, genotype = capsys.readouterr().out.splitlines()
    losses = [float(step.rpartition(" ")[2]) for step in steps]
    assert losses[-1] < losses[0] - 0.2 and genotype.startswith("Genotype(normal=((")
