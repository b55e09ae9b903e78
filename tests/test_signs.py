"""Oracles: the whole Hessian, mixtures written out edge by edge, hand-made eigenvalues."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from darts_min.architect import architecture_gradient
from darts_min.genotypes import PRIMITIVES, PUBLISHED
from darts_min.judge import signs
from darts_min.judge import watch as judge_watch
from darts_min.judge.watch import EigenvalueWatch
from darts_min.relaxations import Gumbel, Softmax
from darts_min.supernet import Supernet

GOLDEN = Path(__file__).parent / "golden" / "successors"


def make(num_nodes=2, **options):
    torch.manual_seed(0)
    model = Supernet(init_channels=2, num_cells=3, num_nodes=num_nodes, **options)
    for alpha in model.alphas():
        alpha.data.normal_()
    return model


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_largest_eigenvalue_is_that_of_the_whole_hessian(memory_format):
    model = make(num_nodes=1).double().to(memory_format=memory_format)
    x, target = torch.randn(6, 3, 8, 8).double(), torch.randint(10, (6,))
    batch = x.to(memory_format=memory_format), target
    before = [p.clone() for p in model.parameters()]
    found = signs.largest_eigenvalue(model, F.cross_entropy, batch, tolerance=1e-6)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))

    # Column by column, from differences of gradients: no second derivative is taken.
    def gradient():
        grads = architecture_gradient(model, F.cross_entropy, batch, batch, 0)
        return torch.cat([grad.flatten() for grad in grads])

    columns, eps = [], 1e-4
    for alphas in model.alphas():
        flat = alphas.data.view(-1)
        for i in range(len(flat)):
            flat[i] += eps
            plus = gradient()
            flat[i] -= 2 * eps
            columns.append((plus - gradient()) / (2 * eps))
            flat[i] += eps
    hessian = torch.stack(columns)
    assert (hessian - hessian.t()).abs().max() < 1e-6 * hessian.abs().max()
    largest = torch.linalg.eigvalsh((hessian + hessian.t()) / 2)[-1].item()
    assert found == pytest.approx(largest, rel=1e-5)
    assert found > 0


def test_the_eigenvalue_of_a_relaxation_that_draws_is_that_of_its_mean():
    batch = torch.randn(6, 3, 8, 8), torch.randint(10, (6,))
    found = []
    for relaxation in (Softmax(), Gumbel()):
        model = make(num_nodes=1)
        model.relaxation = relaxation
        found.append(signs.largest_eigenvalue(model, F.cross_entropy, batch))
        assert model.training
    assert found[0] == found[1]


def test_signs_are_those_of_the_mixtures_written_out():
    model = make(num_nodes=3)
    genotype = model.genotype()
    reported = signs.signs_of_collapse(model, genotype)
    for kind, alphas in zip(("normal", "reduce"), model.alphas(), strict=True):
        mixes, nones, entropies, leads = {}, [], [], []
        rows = iter(alphas.tolist())
        for node in range(3):
            for j in range(2 + node):
                powers = [math.exp(a) for a in next(rows)]
                mixes[node, j] = [power / sum(powers) for power in powers]
                nones.append(mixes[node, j][0])
        cell = getattr(genotype, kind)
        for i, (op, j) in enumerate(cell):
            mix = mixes[i // 2, j]
            entropies.append(-sum(p * math.log(p) for p in mix))
            others = [
                p for name, p in zip(PRIMITIVES, mix, strict=True) if name not in (op, "none")
            ]
            leads.append(mix[PRIMITIVES.index(op)] - max(others))
        assert reported[f"weight of none/{kind}"] == pytest.approx(sum(nones) / 9)
        assert reported[f"entropy of kept edges (nats)/{kind}"] == pytest.approx(sum(entropies) / 6)
        assert reported[f"smallest lead/{kind}"] == pytest.approx(min(leads), abs=1e-6)
        assert reported[f"skips in the cell/{kind}"] == sum(op == "skip_connect" for op, _ in cell)
    assert signs.count_skips(PUBLISHED["DARTS_V1"])["skips in the cell/normal"] == 3


def test_signs_of_mixtures_that_do_not_add_up_to_one_are_those_of_the_shares():
    plain, scaled = make(), make()
    mixes = scaled.mixtures()
    scaled.mixtures = lambda: [0.25 * mix for mix in mixes]
    for name, sign in signs.mixture_signs(plain, plain.genotype()).items():
        assert signs.mixture_signs(scaled, scaled.genotype())[name] == pytest.approx(sign, rel=1e-6)


def test_the_rules_disagree_where_none_is_strong():
    model = make()
    for alpha in model.alphas():
        alpha.data.fill_(-2.0)
        alpha.data[:, PRIMITIVES.index("sep_conv_3x3")] = torch.tensor([0.0, 1, 3, 2, 1])
    assert signs.rule_disagreements(model) == 0
    # Node 3 keeps states 0 and 1; much of `none` takes state 0 down in softmax, not in raw alphas.
    model.alphas_normal.data[2, 0] = 9.0
    assert model.genotype("darts").normal[2:] == (("sep_conv_3x3", 1), ("sep_conv_3x3", 2))
    assert model.genotype("nni").normal[2:] == (("sep_conv_3x3", 0), ("sep_conv_3x3", 1))
    assert signs.rule_disagreements(model) == 1


def test_the_discretised_supernet_mixes_one_operation_with_weight_one():
    model = make(num_nodes=3).eval()
    x = torch.randn(4, 3, 8, 8)
    discrete = signs.discretised(model, model.genotype())
    logits = discrete(x)
    genotype = model.genotype()
    # Softmax of these is exactly 0 and 1; an edge that is not kept has `none`.
    for kind, alphas in zip(("normal", "reduce"), model.alphas(), strict=True):
        cell = getattr(genotype, kind)
        kept = {(i // 2, j): op for i, (op, j) in enumerate(cell)}
        edges = [(node, j) for node in range(3) for j in range(2 + node)]
        for row, edge in zip(alphas.data, edges, strict=True):
            row.fill_(-1e4)
            row[PRIMITIVES.index(kept.get(edge, "none"))] = 1e4
    torch.testing.assert_close(logits, model(x))
    assert not torch.equal(logits, make(num_nodes=3).eval()(x))


@pytest.mark.parametrize("every", [1, 2])
def test_early_stopping_stops_where_robustdarts_tracker_does(every):
    golden = torch.load(GOLDEN / "robustdarts_S1.pt", weights_only=True)["stops"]
    stopped = 0
    for case in golden:
        values = case["eigenvalues"][::every]
        newest = [i for i in range(len(values)) if signs.should_stop(values[: i + 1], every)]
        found = [newest[0] * every, (newest[0] - signs.LOOK_BACK) * every] if newest else None
        assert found == case[f"ev_freq_{every}"]
        stopped += found is not None
    assert len(golden) == 40 and 10 < stopped < 40


def test_early_stopping_needs_every_eigenvalue_of_its_two_means():
    values = [1.0] * 13 + [2.0] * 4
    assert signs.should_stop(values)
    for i in range(17):
        missing = [*values[:i], None, *values[i + 1 :]]
        assert signs.should_stop(missing) == (i < 8)
    assert not signs.should_stop(values[1:])  # the genotype would be that of epoch 9
    assert not signs.should_stop([-value for value in values])


@pytest.mark.parametrize("memory, images", [(16, 16), (5, 4), (2, 2), (1, 0)])
def test_the_eigenvalue_is_of_as_many_images_as_memory_holds(monkeypatch, memory, images):
    def compute(model, loss_fn, batch, average):
        assert [len(t) for t in batch] == [len(batch[0])] * 2
        if len(batch[0]) > memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return float(len(batch[0]))

    monkeypatch.setattr(signs, "largest_eigenvalue", compute)
    batch, alone = (
        (torch.zeros(16, 1), torch.zeros(16)),
        SimpleNamespace(world_size=1, average=None),
    )
    found = signs.eigenvalue_that_fits(None, None, batch, 16, alone)
    assert found == (float(images) or None, images)


def test_a_cpu_without_memory_is_told_from_another_error(monkeypatch):
    with pytest.raises(RuntimeError) as full:
        torch.empty(2**60)
    assert signs.is_out_of_memory(full.value) and signs.is_out_of_memory(MemoryError())
    assert signs.is_out_of_memory(RuntimeError("could not create a primitive"))
    with pytest.raises(RuntimeError) as other:
        torch.zeros(2) @ torch.zeros(3)
    assert not signs.is_out_of_memory(other.value)


def test_a_hessian_that_is_not_finite_has_no_eigenvalue():
    model = make(num_nodes=1)
    for p in model.weights():
        p.data.fill_(1e38)
    batch = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
    assert signs.largest_eigenvalue(model, F.cross_entropy, batch) is None


def watch(epoch=0, images_before=(), **args):
    """Return an EigenvalueWatch of a search with two epochs of warm-up, and what it asked for."""
    defaults = dict(hessian_every=2, batch_size=8, grad_accum=1, checkpoint_cells=False)
    defaults |= dict(early_stop=False, adapt_weight_decay=False, alpha_warmup_epochs=2)
    history = [{"eigenvalue_images": images} for images in images_before]
    progress = SimpleNamespace(history=history, epoch=epoch, machine=None, save=lambda: None)
    return EigenvalueWatch(SimpleNamespace(**defaults | args), progress)


def test_the_eigenvalue_is_due_from_the_first_epoch_that_moves_alpha(monkeypatch):
    monkeypatch.setattr(judge_watch, "eigenvalue_that_fits", lambda *args: (1.0, args[3]))
    due = [bool(watch(epoch).measure(None, [None])) for epoch in range(8)]
    assert due == [False, False, True, False, True, False, True, False]


def test_the_eigenvalue_takes_two_images_at_least_and_no_more_than_fitted_before():
    assert watch(grad_accum=8).images == 2
    assert watch(images_before=[8, 4, 4]).images == 4
    assert watch(images_before=[8, 0]).images == 0  # nothing fitted: it is not tried again
