"""Oracles: published counts, and the network written out plainly, edge by edge, in this file."""

import random
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import darts_min.network
from darts_min.convert.weights import load_network, save_network
from darts_min.genotypes import PRIMITIVES, PUBLISHED, Genotype, unused_states
from darts_min.judge.cost import count_multiply_adds, count_parameters
from darts_min.network import Network, fold_batch_norm
from darts_min.operations import OPS, drop_path_masks

V1, V2 = PUBLISHED["DARTS_V1"], PUBLISHED["DARTS_V2"]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def random_genotype(seed, num_nodes=4, concat=None):
    rng = random.Random(seed)
    cells = [
        tuple((rng.choice(PRIMITIVES[1:]), rng.randrange(2 + i // 2)) for i in range(2 * num_nodes))
        for _ in "nr"
    ]
    concat = concat or tuple(range(2, 2 + num_nodes))
    return Genotype(cells[0], concat, cells[1], concat)


def make(genotype=V2, seed=0, **sizes):
    torch.manual_seed(seed)
    network = Network(genotype, **{"init_channels": 4, "num_cells": 4} | sizes).double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.uniform_(-0.5, 0.5)
    return network


def images(size, n=2, channels=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, channels, size, size, dtype=torch.float64, generator=generator)


def plain_norm(x, bn, training):
    mean = x.mean((0, 2, 3)) if training else bn.running_mean
    var = x.var((0, 2, 3), unbiased=False) if training else bn.running_var
    x = (x - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]
    return x * bn.weight[:, None, None] + bn.bias[:, None, None]


def plain_reduce(x, op, training):
    x = F.pad(F.relu(x), (0, x.size(3) % 2, 0, x.size(2) % 2))
    even = F.conv2d(x, op.conv1.weight, stride=2)
    odd = F.conv2d(x[:, :, 1:, 1:], op.conv2.weight, stride=2)
    return plain_norm(torch.cat([even, odd], 1), op.bn, training)


def plain_separable(x, depthwise, pointwise, bn, stride, dilation, training):
    k, c = depthwise.weight.size(3), x.size(1)
    x = F.conv2d(F.relu(x), depthwise.weight, None, stride, dilation * (k // 2), dilation, c)
    return plain_norm(F.conv2d(x, pointwise.weight), bn, training)


def plain_edge(name, edge, x, stride, training):
    if name == "max_pool_3x3":
        return F.max_pool2d(x, 3, stride, 1)
    if name == "avg_pool_3x3":
        return F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)
    if name == "skip_connect":
        return x if stride == 1 else plain_reduce(x, edge.op, training)
    op = edge.op
    if name.startswith("dil_conv"):
        return plain_separable(x, op.depthwise, op.pointwise, op.bn, stride, 2, training)
    x = plain_separable(x, op.depthwise1, op.pointwise1, op.bn1, stride, 1, training)
    return plain_separable(x, op.depthwise2, op.pointwise2, op.bn2, 1, 1, training)


def plain_preprocess(x, op, training):
    if hasattr(op, "conv2"):
        return plain_reduce(x, op, training)
    return plain_norm(F.conv2d(F.relu(x), op.conv.weight), op.bn, training)


def plain_conv_bn(x, conv, bn, stride, training):
    return plain_norm(F.conv2d(x, conv.weight, stride=stride, padding=1), bn, training)


def plain_network(network, x, training):
    """Return logits and the output of the cell at two thirds of the depth."""
    genotype, num_cells = network.genotype, len(network.cells)
    if network.config["stem"] == "cifar":
        s0 = s1 = plain_conv_bn(x, *network.stem, 1, training)
    else:
        x = F.relu(plain_conv_bn(x, *network.stem0[:2], 2, training))
        s0 = plain_conv_bn(x, *network.stem0[3:], 2, training)
        s1 = plain_conv_bn(F.relu(s0), *network.stem1, 2, training)
    for k, cell in enumerate(network.cells):
        reduction = k in (num_cells // 3, 2 * num_cells // 3)
        names = genotype.reduce if reduction else genotype.normal
        concat = genotype.reduce_concat if reduction else genotype.normal_concat
        states = [
            plain_preprocess(s0, cell.preprocess0, training),
            plain_preprocess(s1, cell.preprocess1, training),
        ]
        for i in range(0, len(names), 2):
            total = 0
            for (name, j), edge in zip(names[i : i + 2], cell.edges[i : i + 2], strict=True):
                stride = 2 if reduction and j < 2 else 1
                total = total + plain_edge(name, edge, states[j], stride, training)
            states.append(total)
        s0, s1 = s1, torch.cat([states[i] for i in concat], 1)
        if k == 2 * num_cells // 3:
            at_two_thirds = s1
    logits = s1.mean((2, 3)) @ network.classifier.weight.t() + network.classifier.bias
    return logits, at_two_thirds


def plain_auxiliary_head(x, head, training):
    """The original's CIFAR head on 8x8 features."""
    x = F.avg_pool2d(F.relu(x), 5, stride=3, padding=0, count_include_pad=False)
    x = F.relu(plain_norm(F.conv2d(x, head.conv1.weight), head.bn1, training))
    x = F.relu(plain_norm(F.conv2d(x, head.conv2.weight), head.bn2, training))
    return F.linear(x.flatten(1), head.classifier.weight, head.classifier.bias)


GENOTYPES = {
    "DARTS_V2": V2,
    "NNI_FULL": PUBLISHED["NNI_FULL"],
    "random": random_genotype(3),
    "random, 5 nodes": random_genotype(4, 5),
    "concat subset": random_genotype(5, 4, (3, 5)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", GENOTYPES)
def test_network_equals_the_plain_one(name, training, layout):
    network = make(GENOTYPES[name]).to(memory_format=LAYOUTS[layout]).train(training)
    x = images(32)
    expected, at_two_thirds = plain_network(network, x, training)
    output = network(x)
    if training:
        close(output[0], expected)
        close(output[1], plain_auxiliary_head(at_two_thirds, network.auxiliary_head, training))
    else:
        close(output, expected)


@pytest.mark.parametrize("name", GENOTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stem, size", [("cifar", 17), ("cifar", 8), ("imagenet", 64)])
def test_other_sizes_and_stems_equal_the_plain_network(stem, size, training, name):
    sizes = {"in_channels": 1, "num_classes": 7, "num_cells": 5, "auxiliary": False}
    network = make(GENOTYPES[name], stem=stem, **sizes).train(training)
    x = images(size, 3, 1)
    close(network(x), plain_network(network, x, training)[0])


@pytest.mark.parametrize("name", GENOTYPES)
@pytest.mark.parametrize("stem, size", [("cifar", 17), ("imagenet", 64)])
def test_folding_bn_changes_the_network_by_rounding_only(stem, size, name):
    sizes = {"in_channels": 1, "num_classes": 7, "num_cells": 5, "auxiliary": False}
    network = make(GENOTYPES[name], stem=stem, **sizes).train()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    x = images(size, 3, 1)
    folded = fold_batch_norm(network)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    close(folded(x), plain_network(network, x, False)[0])
    assert network.training and not folded.training
    assert all(torch.equal(t, before[key]) for key, t in network.state_dict().items())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("stem, size", [("cifar", 8), ("imagenet", 64)])
def test_every_operation_and_the_auxiliary_head_fold_their_bn(stem, size, op):
    cell = ((op, 0), (op, 1), (op, 2), (op, 1))
    network = make(Genotype(cell, (2, 3), cell, (2, 3)), stem=stem, num_cells=3).eval()
    folded, x, y = fold_batch_norm(network), images(size), images(8, channels=32)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    close(folded(x), network(x))
    close(folded.auxiliary_head(y), network.auxiliary_head(y))
    close(fold_batch_norm(folded)(x), network(x))


class Excitation(nn.Module):
    """A squeeze and excitation, between a convolution and its BN."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.squeeze = nn.Conv2d(channels, channels, 1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        x = self.conv(x)
        return self.bn(x * self.squeeze(x.mean((2, 3), keepdim=True)).sigmoid())


def test_a_bn_that_nobody_folds_is_refused_by_name():
    network = make()
    network.cells[1].edges[2].op = Excitation(8).double()
    with pytest.raises(ValueError, match=r"cells\.1\.edges\.2\.op\.bn: .* Excitation needs"):
        fold_batch_norm(network)


@pytest.mark.parametrize(
    "genotype, sizes, expected",
    [
        (V1, {}, 3_169_414),
        (V2, {}, 3_349_342),
        (V2, {"init_channels": 16, "num_cells": 8}, 246_106),
        (
            V2,
            {"init_channels": 48, "num_cells": 14, "num_classes": 1000, "stem": "imagenet"},
            4_718_752,
        ),
    ],
)
def test_parameters_are_those_of_the_original(genotype, sizes, expected):
    with torch.device("meta"):
        network = Network(genotype, **sizes)
        bare = Network(genotype, **sizes, auxiliary=False)
    assert count_parameters(network) == count_parameters(bare) == expected
    assert sum(p.numel() for p in bare.parameters()) == expected


def test_auxiliary_head_has_the_parameters_of_the_original():
    with torch.device("meta"):
        head = Network(V2).auxiliary_head
    assert sum(p.numel() for p in head.parameters()) == 476_426


@pytest.mark.parametrize(
    "sizes, millions", [({}, 528.4), ({"init_channels": 16, "num_cells": 8}, 43.4)]
)
def test_multiply_adds_are_those_of_the_original(sizes, millions):
    assert round(count_multiply_adds(Network(V2, **sizes)) / 1e6, 1) == millions


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(12, 12), (9, 13)])
def test_counting_multiply_adds_equals_a_sum_over_layers_and_leaves_no_trace(size, training):
    genotype = Genotype(
        (("dil_conv_3x3", 0), ("skip_connect", 1)), (2,), (("max_pool_3x3", 0),) * 2, (2,)
    )
    network = Network(genotype, init_channels=2, num_cells=3).train(training)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    h, w = size
    stem = 27 * 6 * h * w
    halves = -(-h // 2), -(-w // 2)
    normal = (6 * 2 + 6 * 2 + 9 * 2 + 2 * 2) * h * w
    reduce1 = (6 * 4 + 2 * 4) * h * w
    # The second reduction takes the first cell's output through a factorized reduction.
    reduce2 = (2 * 8 + 4 * 8) * halves[0] * halves[1]
    total = stem + normal + reduce1 + reduce2 + 8 * 10
    assert count_multiply_adds(network, size) == total
    assert network.training == training
    assert not any(module._forward_hooks for module in network.modules())
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[key])


def test_drop_path_zeroes_whole_samples_and_scales_up_the_others():
    torch.manual_seed(0)
    x = torch.rand(2000, 3, 2, 2, dtype=torch.float64) + 0.5
    (mask,) = drop_path_masks(1, x, 0.3)
    y = x * mask
    assert y.dtype == x.dtype
    ratio = (y / x).flatten(1)
    kept = ratio[:, 0] != 0
    close(ratio, (kept.double() / 0.7)[:, None].expand(-1, 12))
    assert kept.double().mean().item() == pytest.approx(0.7, abs=0.04)


def test_drop_path_keeps_the_expectation():
    torch.manual_seed(0)
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    mean = x * drop_path_masks(4000, x, 0.2).mean(0)
    assert ((mean - x).abs() <= 0.04 * x.abs()).all()


@pytest.mark.parametrize("training, prob", [(True, 0.3), (True, 0.0), (False, 0.3)])
def test_drop_path_is_for_training_and_spares_identities(monkeypatch, training, prob):
    network = make(V2, drop_path_prob=0.9).train(training)
    network.drop_path_prob = prob
    seen = []

    def spy(edges, x, p):
        seen.append((edges, p))
        return torch.ones(edges, len(x), 1, 1, 1)

    monkeypatch.setattr(darts_min.network, "drop_path_masks", spy)
    network(images(8))
    # Two normal cells with 6 edges that are no skips; two reduction cells in which no skip starts
    # at an input, so that all 3 of them are identities.
    assert seen == ([(edges, 0.3) for edges in (6, 5, 5, 6)] if training and prob else [])


def test_identities_are_passed_on_although_all_else_is_dropped():
    genotype = Genotype(
        (("sep_conv_3x3", 0), ("skip_connect", 1)), (2,), (("skip_connect", 0),) * 2, (2,)
    )
    network = make(genotype, num_cells=3, drop_path_prob=1 - 1e-9)
    cell, x = network.cells[0], images(8, channels=12)
    state = plain_norm(F.conv2d(x, cell.preprocess1.conv.weight), cell.preprocess1.bn, True)
    close(cell(x, x, 1 - 1e-9), state)
    assert not network.cells[1](images(8, channels=12), images(8, channels=4), 1 - 1e-9).any()


def test_unused_states_are_where_weights_get_no_gradient():
    rng, found = random.Random(0), []
    for _ in range(40):
        cells = [
            tuple(
                (rng.choice(["sep_conv_3x3", "sep_conv_3x3", "noise"][: 1 + 2 * i]), predecessor)
                for node in (2, 3, 4)
                for i, predecessor in enumerate(rng.sample(range(node), 2))
            )
            for _ in "nr"
        ]
        size = rng.choice([2, 3])
        concats = [sorted(rng.sample([2, 3, 4], size)) for _ in "nr"]
        genotype = Genotype(cells[0], concats[0], cells[1], concats[1])
        network = make(genotype, auxiliary=False, init_channels=1, num_cells=3)
        loss = network(torch.randn(2, 3, 8, 8).double()).sum()
        grads = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
        found.append(any(grad is None for grad in grads))
        assert any(unused_states(genotype).values()) == found[-1]
    assert 5 < sum(found) < 35
    assert unused_states(V1) == unused_states(V2) == {"normal": [], "reduce": []}


@pytest.mark.parametrize("auxiliary", [True, False])
def test_auxiliary_logits_come_in_training_only(auxiliary):
    network = make(auxiliary=auxiliary, num_cells=3, num_classes=7)
    output = network.train()(images(16))
    shapes = [tuple(o.shape) for o in (output if auxiliary else [output])]
    assert shapes == [(2, 7)] * (2 if auxiliary else 1)
    assert network.eval()(images(16)).shape == (2, 7)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [8, 17, 33])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("name", ["DARTS_V2", "random", "concat subset"])
def test_any_size_trains_with_finite_gradients(name, stem, size, layout):
    network = make(GENOTYPES[name], stem=stem, in_channels=1, num_classes=7)
    network.to(memory_format=LAYOUTS[layout]).train()
    x = images(size, 4, 1).contiguous(memory_format=LAYOUTS[layout])
    logits, aux_logits = network(x)
    assert logits.shape == aux_logits.shape == (4, 7)
    target = torch.tensor([0, 6, 3, 2])
    (F.cross_entropy(logits, target) + F.cross_entropy(aux_logits, target)).backward()
    unused = [n for n, p in network.named_parameters() if p.grad is None]
    assert all("edges" in n for n in unused) and (name != "DARTS_V2" or not unused)
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "sizes, says",
    [
        ({"num_cells": 2}, "num_cells 2"),
        ({"init_channels": 0}, "init_channels 0"),
        ({"num_classes": 1}, "num_classes 1"),
        ({"in_channels": 0}, "in_channels 0"),
        ({"stem": "resnet"}, "'resnet' is not one of cifar, imagenet"),
        ({"stem": "imagenet", "init_channels": 5}, "init_channels 5"),
        ({"genotype": V2._replace(normal=())}, "normal cell: 0 edges"),
        ({"genotype": V2._replace(reduce=(("none", 0), ("skip_connect", 1)))}, "'none'"),
    ],
)
def test_impossible_sizes_are_named(sizes, says):
    with pytest.raises(ValueError, match=says):
        Network(**{"genotype": V2} | sizes)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_compiled_in_one_graph_gives_the_same_logits_and_gradients(training):
    torch._dynamo.reset()
    network = make(random_genotype(3, 2), num_cells=3).train(training)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    results = []
    for forward in (network, compiled):
        output = forward(images(16))
        loss = sum(o.square().sum() for o in (output if training else [output]))
        grads = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
        results.append([loss, *(g for g in grads if g is not None)])
    close(results[1], results[0])


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_a_saved_network_gives_bit_identical_logits(tmp_path, stem):
    sizes = {"stem": stem, "in_channels": 1, "num_classes": 7, "auxiliary": stem == "cifar"}
    network = make(GENOTYPES["concat subset"], **sizes).float().eval()
    details = {"classes": list("abcdefg"), "mean": [0.5], "image_size": 16}
    save_network(network, tmp_path / "network.pt", details)
    assert [path.name for path in tmp_path.iterdir()] == ["network.pt"]
    loaded = load_network(tmp_path / "network.pt")
    assert not loaded.training and loaded.details == details
    assert loaded.genotype == network.genotype and loaded.config == network.config
    x = images(16, channels=1).float()
    assert torch.equal(loaded(x), network(x))


def truncated(network, path):
    save_network(network, path, {})
    path.write_bytes(path.read_bytes()[:-1000])


def changed(change):
    def write(network, path):
        save_network(network, path, {})
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return write


FOREIGN = {
    "truncated": truncated,
    "pickled module": lambda network, path: torch.save(network, path),
    "html": lambda _, path: path.write_text("<!DOCTYPE html>\n<html>not found</html>"),
    "empty": lambda _, path: path.write_bytes(b""),
    "missing": lambda _, path: None,
    "folder": lambda _, path: path.mkdir(),
    "plain dict": lambda _, path: torch.save({"a": torch.zeros(1)}, path),
    "state dict": lambda network, path: torch.save(network.state_dict(), path),
    "tensor": lambda _, path: torch.save(torch.zeros(2), path),
    "without state": changed(lambda content: content.pop("state_dict")),
    "without a tensor": changed(lambda content: content["state_dict"].popitem()),
    "other sizes": changed(lambda content: content["config"].update(init_channels=6)),
    "unknown size": changed(lambda content: content["config"].update(width=6)),
    "bad genotype": changed(lambda content: content.update(genotype="{}")),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_damaged_or_foreign_file_is_named_in_one_line(tmp_path, case):
    path = tmp_path / "network.pt"
    FOREIGN[case](make(num_cells=3).float(), path)
    with pytest.raises(ValueError) as error:
        load_network(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
