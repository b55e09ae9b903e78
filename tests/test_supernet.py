"""Oracle: the textbook supernet (textbook.py): one module per edge and operation."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from benchmarks.measure import kept_bytes
from darts_min.architect import architecture_gradient
from darts_min.convert.state_dicts import supernet_from_quark0
from darts_min.genotypes import PRIMITIVES
from darts_min.supernet import Supernet, edges_by_state
from tests.textbook import TextbookSupernet
from tests.textbook_network import TextbookPartialSupernet

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def make_textbook(seed=0, **sizes):
    torch.manual_seed(seed)
    make = TextbookPartialSupernet if "partial" in sizes else TextbookSupernet
    textbook = make(**{"num_classes": 7, "init_channels": 4, "num_cells": 4} | sizes)
    for alphas in textbook.alphas():
        alphas.data = torch.randn_like(alphas)
    return textbook.double()


def batch(size, n=3, in_channels=3, num_classes=7):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, in_channels, size, size, dtype=torch.float64, generator=generator)
    return x, torch.randint(num_classes, (n,), generator=generator)


def weight_pairs(ours, textbook):
    """Yield each weight of ours with the textbook's weights that it holds side by side."""
    for part in ("stem", "classifier"):
        pair = (getattr(model, part).parameters() for model in (ours, textbook))
        yield from ((mine, [theirs]) for mine, theirs in zip(*pair, strict=True))
    for cell, textbook_cell in zip(ours.cells, textbook.cells, strict=True):
        for part in ("preprocess0", "preprocess1"):
            pair = (getattr(c, part).parameters() for c in (cell, textbook_cell))
            yield from ((mine, [theirs]) for mine, theirs in zip(*pair, strict=True))
        for j, mixed_op in enumerate(cell.mixed_ops):
            edges = [sum(range(2, node)) + j for node in range(2, 2 + ours.num_nodes) if j < node]
            for name, op in mixed_op.ops.items():
                index = ours.primitives.index(name)
                theirs = [textbook_cell._ops[e]._ops[index].parameters() for e in edges]
                yield from zip(op.parameters(), zip(*theirs, strict=True), strict=True)


def copy_textbook(textbook, **sizes):
    ours = Supernet(**{"num_classes": 7, "init_channels": 4, "num_cells": 4} | sizes).double()
    for mine, theirs in zip(ours.alphas()[:2], textbook.alphas(), strict=True):
        mine.data = theirs.data.clone()
    for mine, theirs in weight_pairs(ours, textbook):
        mine.data = torch.cat([w.data for w in theirs])
    return ours


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [16, 12])
def test_operations_of_weight_zero_are_left_out_without_a_difference(size, layout):
    textbook = make_textbook(num_nodes=3)
    ours = copy_textbook(textbook, num_nodes=3).to(memory_format=LAYOUTS[layout])
    x, target = batch(size)
    generator = torch.Generator().manual_seed(2)
    for density in (0.1, 0.5):
        kinds = []
        for alphas in ours.alphas():
            mix = torch.rand(alphas.shape, generator=generator, dtype=torch.float64)
            kinds.append((mix * (mix < density)).requires_grad_())
        ours.mixtures = lambda random, kinds=kinds: kinds
        ours.chosen = lambda mix, kind: (mix != 0).tolist()
        results = []
        for model, logits in ((ours, ours(x)), (textbook, textbook(x, kinds))):
            loss = F.cross_entropy(logits, target)
            wrt = [*kinds, *model.weights()]
            grads = torch.autograd.grad(loss, wrt, materialize_grads=True)
            for w, grad in zip(model.weights(), grads[2:], strict=True):
                w.grad = grad
            results.append((logits, [g * (mix != 0) for g, mix in zip(grads, kinds, strict=False)]))
        close(*results)
        for mine, theirs in weight_pairs(ours, textbook):
            close(mine.grad, torch.cat([w.grad for w in theirs]))


def test_drop_path_drops_whole_edges_of_samples():
    textbook = make_textbook(num_nodes=2)
    cell, n = copy_textbook(textbook, num_nodes=2).cells[0], 400
    mixed_op = cell.mixed_ops[1]  # two edges
    x = torch.randn(n, 4, 6, 6, dtype=torch.float64)
    mix = torch.rand(2, 8, dtype=torch.float64)
    scale = mix.t().repeat_interleave(4, 1).contiguous()
    whole = [sum(parts) for parts in mixed_op(x, mix, scale, None, None)]
    dropped = [sum(parts) for parts in mixed_op(x, mix, scale, None, 0.25)]
    kept = [(y != 0).flatten(1).any(1) for y in dropped]
    for y, full, keep in zip(dropped, whole, kept, strict=True):
        close(y, full * keep[:, None, None, None] / 0.75)
        assert 0.65 < keep.double().mean() < 0.85
    assert not torch.equal(*kept)


def test_partial_channels_take_odd_sizes():
    """The authors' code crashes there: its pooling rounds down, its convolutions round up."""
    model = Supernet(init_channels=4, num_cells=3, num_nodes=2, partial=2)
    assert model(torch.randn(2, 3, 10, 10)).shape == (2, 10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("partial", "size"), [(2, 16), (4, 12)])
def test_partial_channels_equal_the_textbook(partial, size, layout):
    sizes = {"num_nodes": 3, "init_channels": 8, "partial": partial}
    textbook = make_textbook(**sizes)
    ours = copy_textbook(textbook, **sizes).to(memory_format=LAYOUTS[layout])
    for mine, theirs in zip(ours.alphas()[2:], textbook.betas, strict=True):
        mine.data = theirs.data.clone()
    assert_same(ours, textbook, *batch(size))
    for mine, theirs in zip(ours.alphas()[2:], textbook.betas, strict=True):
        close(mine.grad, theirs.grad)
    # A genotype ranks by the product of both weights.
    first = F.softmax(textbook.betas[0][:2], dim=0)[:, None] * F.softmax(ours.alphas_normal[:2], 1)
    close(ours.mixtures()[0][:2], first)


def assert_same(ours, textbook, x, target):
    for model in (ours, textbook):
        model.zero_grad()
        F.cross_entropy(model(x), target).backward()
    close(ours(x), textbook(x))
    for mine, theirs in zip(ours.alphas()[:2], textbook.alphas(), strict=True):
        close(mine.grad, theirs.grad)
    seen = set()
    for mine, theirs in weight_pairs(ours, textbook):
        close(mine.grad, torch.cat([w.grad for w in theirs]))
        close(mine.grad.norm(), torch.stack([w.grad.norm() for w in theirs]).norm())
        seen.add(id(mine))
    assert seen == {id(w) for w in ours.weights()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [16, 12])
@pytest.mark.parametrize("num_nodes", [2, 3, 4])
def test_supernet_and_its_gradients_equal_the_textbook(num_nodes, size, layout):
    textbook = make_textbook(num_nodes=num_nodes)
    weights = {k: v for k, v in textbook.state_dict().items() if not k.startswith("alphas")}
    ours = supernet_from_quark0(weights, [alphas.detach() for alphas in textbook.alphas()])
    ours.to(memory_format=LAYOUTS[layout])
    x, target = batch(size)
    assert_same(ours, textbook, x.contiguous(memory_format=LAYOUTS[layout]), target)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "primitives",
    [
        PRIMITIVES[::-1],
        ("skip_connect", "sep_conv_3x3"),
        ("none", "max_pool_3x3"),
        ("skip_connect",),
        ("avg_pool_3x3", "skip_connect", "none", "max_pool_3x3"),
        ("dil_conv_5x5", "none"),
        ("sep_conv_5x5", "dil_conv_3x3", "max_pool_3x3"),
    ],
)
def test_any_primitives_in_any_order_equal_the_textbook(primitives, layout):
    sizes = {"num_nodes": 3, "num_cells": 3, "primitives": primitives}
    textbook = make_textbook(**sizes)
    ours = copy_textbook(textbook, **sizes).to(memory_format=LAYOUTS[layout])
    x, target = batch(12)
    assert_same(ours, textbook, x, target)


def test_default_supernet_has_the_parameters_of_the_original():
    model = Supernet()
    assert sum(w.numel() for w in model.weights()) == 1_930_618
    assert [tuple(alphas.shape) for alphas in model.alphas()] == [(14, 8), (14, 8)]
    assert all(alphas.abs().max() < 0.01 and alphas.std() > 5e-4 for alphas in model.alphas())


def test_weights_and_alphas_share_out_all_parameters():
    model = Supernet(init_channels=2, num_cells=3)
    alphas, weights = ({id(p) for p in part} for part in (model.alphas(), model.weights()))
    assert not alphas & weights
    assert alphas | weights == {id(p) for p in model.parameters()}
    assert len(model.weights()) + 2 == len(list(model.parameters()))
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_evaluation_uses_the_statistics_of_the_batch():
    model = Supernet(init_channels=4, num_cells=3, num_nodes=2).double()
    x, _ = batch(8)
    before = model.train()(x)
    assert torch.equal(before, model.eval()(x))
    assert not torch.allclose(before[:2], model(x[:2]))


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 4, 5])
def test_edges_by_state_lists_each_edge_once_at_its_predecessor(num_nodes):
    edges = [(node, j) for node in range(2, 2 + num_nodes) for j in range(node)]
    expected = [
        [e for e, (_, predecessor) in enumerate(edges) if predecessor == j]
        for j in range(num_nodes + 1)
    ]
    assert edges_by_state(num_nodes) == expected


@pytest.mark.parametrize("rule", ["darts", "nni"])
def test_genotype_of_one_hot_alphas_is_that_cell(rule):
    model = Supernet(init_channels=2, num_cells=3, num_nodes=2)
    cells = [
        (("sep_conv_5x5", 1), ("skip_connect", 0), ("dil_conv_3x3", 2), ("max_pool_3x3", 0)),
        (("avg_pool_3x3", 0), ("avg_pool_3x3", 1), ("sep_conv_3x3", 1), ("dil_conv_5x5", 2)),
    ]
    for alphas, cell in zip(model.alphas(), cells, strict=True):
        alphas.data.zero_()
        alphas.data[:, 0] = 9.0  # none, which must not count
        for i, (op, predecessor) in enumerate(cell):
            edge = predecessor + (0 if i < 2 else 2)
            alphas.data[edge, 0] = -9.0
            alphas.data[edge, PRIMITIVES.index(op)] = 5.0 - i % 2
    assert model.genotype(rule) == (cells[0], (2, 3), cells[1], (2, 3))


def test_rules_differ_where_none_takes_a_share():
    model = Supernet(init_channels=2, num_cells=3, num_nodes=1, primitives=("none", "skip_connect"))
    for alphas in model.alphas():
        alphas.data = torch.tensor([[5.0, 1.0], [0.0, 0.5]])
    assert [j for _, j in model.genotype("darts").normal] == [1, 0]
    assert [j for _, j in model.genotype("nni").normal] == [0, 1]


@pytest.mark.parametrize(
    "sizes, says",
    [
        ({"num_cells": 2}, "num_cells 2"),
        ({"init_channels": 0}, "init_channels 0"),
        ({"num_nodes": 0}, "num_nodes 0"),
        ({"num_classes": 1}, "num_classes 1"),
        ({"in_channels": 0}, "in_channels 0"),
        ({"primitives": ("skip_connect", "conv_7x7")}, "conv_7x7"),
        ({"primitives": ("none",)}, "only none"),
        ({"primitives": ()}, "only none"),
        ({"primitives": ("skip_connect", "skip_connect")}, "different"),
    ],
)
def test_impossible_sizes_are_named(sizes, says):
    with pytest.raises(ValueError, match=says):
        Supernet(**sizes)


def test_unknown_rule_is_named():
    with pytest.raises(ValueError, match="'best' is not one of darts, nni"):
        Supernet(init_channels=2, num_cells=3).genotype("best")


@pytest.mark.slow
def test_compiled_in_one_graph_gives_the_same_logits_and_gradients():
    model = Supernet(init_channels=4, num_cells=3, num_nodes=2).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, target = batch(16, num_classes=10)
    results = []
    for forward in (model, compiled):
        logits = forward(x)
        loss = F.cross_entropy(logits, target)
        results.append([logits, *torch.autograd.grad(loss, list(model.parameters()))])
    close(results[1], results[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size, num_classes, in_channels", [(17, 3, 1), (33, 100, 4), (8, 2, 3)])
def test_any_size_classes_and_channels_give_finite_logits(size, num_classes, in_channels, layout):
    model = Supernet(num_classes, 4, 4, 3, in_channels).double().to(memory_format=LAYOUTS[layout])
    x, target = batch(size, 2, in_channels, num_classes)
    logits = model(x)
    assert logits.shape == (2, num_classes) and logits.isfinite().all()
    F.cross_entropy(logits, target).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_odd_images_equal_a_textbook_that_pads_them():
    """The textbook's reduction cannot take odd sizes; padding before it is the same."""
    textbook = make_textbook(num_nodes=2)
    ours = copy_textbook(textbook, num_nodes=2)
    for module in textbook.modules():
        if type(module).__name__ == "FactorizedReduce":
            module.register_forward_pre_hook(
                lambda _, args: F.pad(args[0], (0, args[0].size(3) % 2, 0, args[0].size(2) % 2))
            )
    assert_same(ours, textbook, *batch(17))


def make_channels_last(checkpoint_cells, **sizes):
    torch.manual_seed(0)
    model = Supernet(**sizes).to(memory_format=torch.channels_last)
    model.checkpoint_cells = checkpoint_cells
    for alphas in model.alphas():
        alphas.data.normal_()
    return model


def test_computing_cells_again_gives_the_same_bits_in_both_steps():
    x, target = batch(16, num_classes=10)
    batches = (x.float(), target), (x.float().flip(0), target)
    results = []
    for checkpoint_cells in (False, True):
        model = make_channels_last(checkpoint_cells, init_channels=4, num_cells=4)
        loss = F.cross_entropy(model(batches[0][0]), target)
        parameters = list(model.parameters())
        results.append([loss, *torch.autograd.grad(loss, parameters)])
        for xi in (0.0, 0.025):
            results[-1] += architecture_gradient(model, F.cross_entropy, *batches, xi)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_computing_cells_again_keeps_a_small_part_of_the_textbooks_bytes():
    x, target = torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)
    torch.manual_seed(0)
    textbook = TextbookSupernet()
    kept = []
    for model in (make_channels_last(True), textbook):
        kept.append(kept_bytes(model, lambda model=model: F.cross_entropy(model(x), target)))
    assert kept[0] < 0.0125 * kept[1]
    assert kept[0] > 8 * 2 * 16 * 32 * 32  # the states between the cells, at the least
