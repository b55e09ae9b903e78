"""Oracles: RobustDARTS' definitions, softmax over an edge's own choices, made-up accuracies."""

import pytest
import torch

from darts_min.genotypes import PRIMITIVES, kept_edges
from darts_min.judge.random_search import take_best_path
from darts_min.judge.signs import discretised
from darts_min.network import Network
from darts_min.operations import BatchStatNorm, Noise, State
from darts_min.relaxations import SinglePath
from darts_min.spaces import SPACES, parse_space
from darts_min.supernet import Supernet


def make(space, **sizes):
    torch.manual_seed(0)
    sizes = {"init_channels": 4, "num_cells": 3} | sizes
    model = Supernet(3, primitives=space.primitives, choices=space.choices, **sizes)
    for alpha in model.alphas():
        alpha.data.normal_()
    return model


def test_s1_gives_each_edge_two_operations_of_its_own():
    normal, reduce = SPACES["S1"].choices
    assert [len(normal), len(reduce)] == [14, 14]
    assert all(len(set(pair)) == 2 for pair in normal + reduce)
    assert normal[0] == ("skip_connect", "dil_conv_3x3")
    assert normal[13] == ("dil_conv_3x3", "dil_conv_5x5")
    assert reduce[6] == ("max_pool_3x3", "sep_conv_3x3")
    assert set(sum(normal + reduce, ())) == set(SPACES["S1"].primitives)
    assert set(SPACES["nni"].primitives) == set(PRIMITIVES)


def test_in_s1_an_edge_mixes_and_computes_its_own_choices_only():
    space = SPACES["S1"]
    model = make(space)
    for mix, alphas, cell in zip(model.mixtures(), model.alphas(), space.choices, strict=True):
        for row, pair, raw in zip(mix, cell, alphas, strict=True):
            columns = [space.primitives.index(op) for op in pair]
            torch.testing.assert_close(row[columns], raw[columns].softmax(0))
            assert row.count_nonzero() == 2
    x = torch.randn(4, 3, 8, 8)
    logits = model(x)
    logits.sum().backward()
    dense = make(space)
    mixes, dense.chosen_by_space = dense.mixtures(), [None, None]
    dense.mixtures = lambda random: mixes  # all computed, those of weight 0 as well
    torch.testing.assert_close(logits, dense(x))
    for alphas, mix in zip(model.alphas(), mixes, strict=True):
        assert (alphas.grad[mix == 0] == 0).all() and (alphas.grad[mix > 0] != 0).any()
    # Edge 13 leaves state 5 to node 5: the weights of its other operations get no gradient.
    ops = model.cells[0].mixed_ops[4].ops
    trained = {name for name, op in ops.items() if any(p.grad is not None for p in op.parameters())}
    assert trained == {"dil_conv_3x3", "dil_conv_5x5"}
    for rule in ("darts", "nni"):
        genotype = model.genotype(rule)
        for edges, cell in zip((genotype.normal, genotype.reduce), space.choices, strict=True):
            for row, (op, _) in zip(kept_edges(edges), edges, strict=True):
                assert op in cell[row]


@pytest.mark.parametrize("name", SPACES)
def test_every_space_searches_and_trains(name):
    model = make(SPACES[name])
    x = torch.randn(4, 3, 8, 8)
    model(x).sum().backward()
    genotype = model.genotype()
    assert {op for op, _ in genotype.normal + genotype.reduce} <= set(SPACES[name].primitives)
    assert discretised(model, model.genotype()).eval()(x).shape == (4, 3)
    network = Network(genotype, 3, 4, 3, auxiliary=False)
    network(x).sum().backward()


def test_a_space_is_a_name_or_operations():
    assert parse_space("S2").primitives == ("skip_connect", "sep_conv_3x3")
    assert parse_space("noise, skip_connect").primitives == ("noise", "skip_connect")
    with pytest.raises(ValueError, match="'S5' is not known; known are darts, nni"):
        parse_space("S5")
    with pytest.raises(ValueError, match="num_nodes 3: the space has choices for 14 edges"):
        make(SPACES["S1"], num_nodes=3)


def test_noise_ignores_its_input_and_stays_in_evaluation():
    noise, x = Noise(3, 2, BatchStatNorm), State(torch.randn(64, 3, 9, 9))
    torch.manual_seed(0)
    y = noise(x, torch.tensor([1.0, 1, 1, 3, 3, 3]))
    assert y.shape == (64, 6, 5, 5)
    assert y[:, :3].std().item() == pytest.approx(1, rel=0.05)
    assert y[:, 3:].std().item() == pytest.approx(3, rel=0.05)
    assert not torch.equal(noise(x), noise(x))
    noise.eval()
    state = torch.get_rng_state()
    assert torch.equal(noise(x), noise(State(2 * x.x)))
    assert torch.equal(torch.get_rng_state(), state)


def test_random_search_takes_the_best_of_its_candidates():
    model = make(SPACES["darts"])
    model.relaxation = SinglePath(none=0)
    tried = []

    def accuracy(path, on_all):
        """Like many convolutions; on a part of the images, one cell looks better than it is."""
        genotype = path.mixtures(False)
        ones = torch.cat(genotype)
        tried.append((ones, on_all))
        good = ones[:, 4:].sum().item()
        return 100.0 if not on_all and len(tried) == 7 else good

    take_best_path(model, 30, torch.Generator().manual_seed(1), accuracy)
    assert [on_all for _, on_all in tried] == [False] * 30 + [True] * 3
    score = [ones[:, 4:].sum().item() for ones, _ in tried]
    assert torch.equal(tried[30][0], tried[6][0])  # the seventh came first, and lost in the end
    best = max(range(30), key=lambda i: score[i])
    assert torch.equal(torch.cat(model.mixtures()), tried[best][0])
    genotype = model.genotype()
    rows = kept_edges(genotype.normal)
    columns = [PRIMITIVES.index(op) for op, _ in genotype.normal]
    assert (model.alphas_normal[rows, columns] == 1).all() and model.alphas_normal.sum() == 8


def test_random_search_stays_in_a_space_that_differs_by_edge():
    model = make(SPACES["S1"])
    model.relaxation = SinglePath(none=None)
    seen = []

    def accuracy(path, on_all):
        seen.append(torch.stack(path.mixtures(False)))
        return float(len(seen))  # the last one is the best

    take_best_path(model, 20, torch.Generator().manual_seed(0), accuracy)
    drawn = torch.stack(model.mixtures(random=True))
    for mix in (*seen, drawn):
        assert mix.sum() == 16 and (mix[~torch.stack(list(model.allowed))] == 0).all()
    kept = torch.stack(model.mixtures())
    assert torch.equal(kept, seen[-1])
    for kind, cell in enumerate((model.genotype().normal, model.genotype().reduce)):
        columns = [model.primitives.index(op) for op, _ in cell]
        assert (kept[kind][kept_edges(cell), columns] == 1).all()
