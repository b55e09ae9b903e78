"""Oracles: writing undone by reading, and the key order of the public codes' own files."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from darts_min.convert import (
    network_from_nni,
    network_from_quark0,
    network_to_nni,
    network_to_quark0,
    parse_genotype,
    supernet_from_quark0,
    supernet_to_quark0,
)
from darts_min.convert.weights import form_of, infer_genotype
from darts_min.genotypes import PUBLISHED, Genotype
from darts_min.network import Network
from darts_min.operations import SepConv
from darts_min.supernet import Supernet
from tests.textbook import TextbookSupernet

GOLDEN = Path(__file__).parent / "golden"
MIXED = Genotype(
    (("dil_conv_5x5", 0), ("skip_connect", 1), ("sep_conv_5x5", 2), ("avg_pool_3x3", 0)),
    (2, 3),
    (("skip_connect", 0), ("dil_conv_3x3", 1), ("sep_conv_3x3", 0), ("skip_connect", 2)),
    (2, 3),
)
WAYS = {
    "quark0": (network_to_quark0, network_from_quark0),
    "nni": (network_to_nni, network_from_nni),
}


def make(genotype=MIXED, **sizes):
    torch.manual_seed(0)
    network = Network(genotype, **{"init_channels": 4, "num_cells": 5} | sizes)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(7)
    return network.eval()


@pytest.mark.parametrize("form", WAYS)
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize("genotype", [MIXED, PUBLISHED["DARTS_V2"]])
def test_reading_undoes_writing(genotype, auxiliary, stem, form):
    sizes = {"auxiliary": auxiliary, "stem": stem, "in_channels": 1, "num_classes": 7}
    network = make(genotype, **sizes)
    write, read = WAYS[form]
    written = write(network)
    assert len(written) == len(network.state_dict())
    copy = read(written, genotype)
    assert copy.config == network.config and copy.genotype == genotype and not copy.training
    ours = network.state_dict()
    assert list(copy.state_dict()) == list(ours)
    assert all(torch.equal(tensor, ours[key]) for key, tensor in copy.state_dict().items())
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(copy(x), network(x))


@pytest.mark.parametrize("form", WAYS)
def test_a_copy_shares_no_memory_and_keeps_the_dtype(form):
    write, read = WAYS[form]
    network = make().double()
    copy = read(write(network), MIXED)
    assert copy.stem[0].weight.dtype == torch.float64
    theirs = {tensor.data_ptr() for tensor in network.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in copy.state_dict().values()}


def test_names_and_order_are_those_of_the_original_code():
    golden = torch.load(GOLDEN / "quark0_c4_l4_final.pt", weights_only=True)
    state_dict, genotype = golden["state_dict"], PUBLISHED[golden["config"]["genotype"]]
    written = network_to_quark0(network_from_quark0(state_dict, genotype))
    keys = [key for key in written if not key.endswith("num_batches_tracked")]
    assert keys == [key for key in state_dict if not key.endswith("num_batches_tracked")]
    assert all(torch.equal(written[key], state_dict[key]) for key in keys)
    assert all(written[key] == 0 for key in set(written) - set(keys) - set(state_dict))


@pytest.mark.parametrize("file", ["nni_darts_v2_w4_n5.pt", "nni_tutorial_w4_n4_aux_droppath.pt"])
def test_names_and_order_are_those_of_nni(file):
    golden = torch.load(GOLDEN / file, weights_only=True)
    wrapping = r"(ops\.\d+\.\d+)\.0" if golden["config"]["drop_path_prob"] else r"($^)"
    state_dict = {re.sub(wrapping, r"\1", k): v for k, v in golden["state_dict"].items()}
    written = network_to_nni(network_from_nni(golden["state_dict"], golden["arch"]))
    assert list(written) == list(state_dict)
    assert all(torch.equal(written[key], tensor) for key, tensor in state_dict.items())


@pytest.mark.parametrize("form", WAYS)
def test_all_keys_that_do_not_fit_are_listed_in_one_error(form):
    write, read = WAYS[form]
    state_dict = write(make())
    prefix = "cells.1." if form == "quark0" else "stages.1.0."
    first, second, *_ = (key for key, t in state_dict.items() if prefix in key and t.ndim == 4)
    del state_dict[first], state_dict["classifier.weight"]
    state_dict |= {second: torch.zeros(2, 3, 1, 1), "colour": torch.zeros(1)}
    with pytest.raises(ValueError) as error:
        read(state_dict, MIXED)
    line = str(error.value)
    assert line.startswith("state dict: 4 keys do not fit: ") and "\n" not in line
    says = f"missing {first}", "missing classifier.weight", "unexpected colour"
    assert all(part in line for part in [*says, f"{second}: shape (2, 3, 1, 1), not "])


@pytest.mark.parametrize("form", WAYS)
@pytest.mark.parametrize("key", ["stem.0.weight", "classifier.bias"])
@pytest.mark.parametrize("fault", ["missing", "scalar"])
def test_keys_that_tell_the_sizes_are_named(fault, key, form):
    write, read = WAYS[form]
    state_dict = write(make())
    if fault == "missing":
        del state_dict[key]
    else:
        state_dict[key] = torch.zeros(())
    with pytest.raises(ValueError, match=key.replace("stem.0", "stem0?.0")):
        read(state_dict, MIXED)


@pytest.mark.parametrize("form", WAYS)
def test_another_genotype_does_not_fit(form):
    write, read = WAYS[form]
    with pytest.raises(ValueError, match="keys do not fit: .*missing .*unexpected"):
        read(write(make()), PUBLISHED["DARTS_V1"])


def textbook_weights(**sizes):
    torch.manual_seed(0)
    textbook = TextbookSupernet(init_channels=2, num_cells=3, num_nodes=2, **sizes)
    weights = textbook.state_dict()
    return weights, [weights.pop("alphas_normal"), weights.pop("alphas_reduce")]


def test_supernet_reads_its_sizes_from_the_shapes():
    weights, alphas = textbook_weights(num_classes=7, in_channels=1)
    supernet = supernet_from_quark0({k: v.double() for k, v in weights.items()}, alphas)
    assert supernet.num_nodes == 2 and len(supernet.cells) == 3
    assert supernet.stem[0].weight.shape == (6, 1, 3, 3)
    assert supernet.classifier.weight.shape == (7, 16)
    assert supernet.stem[0].weight.dtype == torch.float64
    assert all(torch.equal(a, b.double()) for a, b in zip(supernet.alphas(), alphas, strict=True))


def test_supernet_ignores_running_statistics():
    weights, alphas = textbook_weights()
    weights["stem.1.running_mean"] = torch.zeros(6)
    weights["cells.0.preprocess0.op.2.num_batches_tracked"] = torch.tensor(3)
    supernet_from_quark0(weights, alphas)


EDGE = "cells.1._ops.{}._ops.4.op.2.weight"


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda w: w.pop("stem.0.weight"), ["missing stem.0.weight"]),
        (lambda w: w.pop("classifier.bias"), ["missing classifier.bias"]),
        (lambda w: (w.pop(EDGE.format(0)), w.pop("stem.1.bias")), [EDGE.format(0), "stem.1.bias"]),
        (lambda w: w.update(colour=torch.zeros(1)), ["unexpected colour"]),
        (lambda w: w.update({EDGE.format(0): torch.zeros(9, 4, 1, 1)}), [EDGE.format(0)]),
        (lambda w: w.update({EDGE.format(0): torch.zeros(4, 5, 1, 1)}), [EDGE.format(0)]),
        (lambda w: w.update({EDGE.format(2): torch.zeros(4, 5, 1, 1)}), [EDGE.format(2)]),
        (
            lambda w: w.update(
                {EDGE.format(0): torch.zeros(3, 4, 1, 1), EDGE.format(2): torch.zeros(5, 4, 1, 1)}
            ),
            [EDGE.format(0)],
        ),
    ],
)
def test_supernet_names_the_keys_that_do_not_fit(spoil, says):
    weights, alphas = textbook_weights()
    spoil(weights)
    with pytest.raises(ValueError) as error:
        supernet_from_quark0(weights, alphas)
    assert all(part in str(error.value) for part in says)


@pytest.mark.parametrize(
    "shapes, says",
    [
        ([(5, 7), (5, 7)], "7 operations; must be 8"),
        ([(6, 8), (6, 8)], "6 rows"),
        ([(5, 8), (4, 8)], "alphas"),
    ],
)
def test_supernet_names_the_alphas_that_do_not_fit(shapes, says):
    weights, _ = textbook_weights()
    with pytest.raises(ValueError, match=says):
        supernet_from_quark0(weights, [torch.zeros(shape) for shape in shapes])


FILES = ["quark0_c4_l4_final.pt", "nni_darts_v2_w4_n5.pt", "nni_tutorial_w4_n4_aux_droppath.pt"]


@pytest.mark.parametrize("file", FILES)
def test_the_genotype_of_the_public_codes_files_is_inferred(file):
    golden = torch.load(GOLDEN / file, weights_only=True)
    known = golden.get("arch") or golden["config"]["genotype"]
    genotype = parse_genotype(known if isinstance(known, str) else repr(known))
    assert infer_genotype(golden["state_dict"]) == genotype
    assert form_of(golden["state_dict"]) == file.split("_")[0]


@pytest.mark.parametrize("form", WAYS)
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_genotype_is_inferred(name, stem, form):
    with torch.device("meta"):
        network = Network(PUBLISHED[name], init_channels=4, num_cells=6, stem=stem)
    written = {f"module.{key}": tensor for key, tensor in WAYS[form][0](network).items()}
    assert infer_genotype(written) == PUBLISHED[name]
    assert form_of(written) == form


@pytest.mark.parametrize("form", WAYS)
def test_a_genotype_of_nobodys_list_is_refused_with_its_operations(form):
    pool = "max_pool_3x3|avg_pool_3x3|skip_connect"
    with pytest.raises(ValueError) as error:
        infer_genotype(WAYS[form][0](make()))
    normal = f"normal: dil_conv_5x5 {pool} sep_conv_5x5 {pool}"
    reduce = f"reduce: skip_connect dil_conv_3x3 sep_conv_3x3 {pool}"
    assert normal in str(error.value) and reduce in str(error.value)


@pytest.mark.parametrize("form", WAYS)
def test_genotypes_that_differ_in_pools_only_are_all_named(form, monkeypatch):
    network = make(PUBLISHED["DARTS_V2"])
    cells = PUBLISHED["DARTS_V2"]._asdict()
    cells["reduce"] = (("avg_pool_3x3", 0), *cells["reduce"][1:])
    monkeypatch.setitem(PUBLISHED, "MY_CELL", Genotype(**cells))
    with pytest.raises(ValueError, match="several genotypes fit: DARTS_V2, MY_CELL"):
        infer_genotype(WAYS[form][0](network))


@pytest.mark.parametrize("form", WAYS)
def test_prefixes_and_missing_batch_counts_of_old_files_are_read(form):
    write, read = WAYS[form]
    network = make()
    old = {f"module.{k}": t for k, t in write(network).items() if not k.endswith("_tracked")}
    copy = read(old, MIXED)
    for key, tensor in copy.state_dict().items():
        expected = 0 if key.endswith("_tracked") else network.state_dict()[key]
        assert (tensor == expected).all()


def test_nnis_imagenet_auxiliary_head_has_a_second_bn_and_keeps_it():
    network = make(stem="imagenet", auxiliary_second_bn=True)
    written = network_to_nni(network)
    assert "auxiliary_head.features.6.running_var" in written
    copy = network_from_nni(written, MIXED)
    assert copy.config == network.config
    x = torch.randn(2, 3, 64, 64)
    logits, auxiliary = network.train()(x)
    copied = copy.train()(x)
    assert torch.equal(copied[0], logits) and torch.equal(copied[1], auxiliary)


def quark0_search_names(num_cells, num_nodes):
    """The state dict of the original's model_search.Network, written down from its code."""
    statistics = ["running_mean", "running_var", "num_batches_tracked"]

    def conv(*names):
        return [f"{name}.weight" for name in names]

    def bn(name):
        return [f"{name}.{leaf}" for leaf in statistics]

    names = conv("stem.0", "stem.1") + ["stem.1.bias"] + bn("stem.1")
    for k in range(num_cells):
        reduction = k in (num_cells // 3, 2 * num_cells // 3)
        after_reduction = k - 1 in (num_cells // 3, 2 * num_cells // 3)
        cell = f"cells.{k}"
        if after_reduction:
            pre = f"{cell}.preprocess0"
            names += conv(f"{pre}.conv_1", f"{pre}.conv_2") + bn(f"{pre}.bn")
        else:
            names += conv(f"{cell}.preprocess0.op.1") + bn(f"{cell}.preprocess0.op.2")
        names += conv(f"{cell}.preprocess1.op.1") + bn(f"{cell}.preprocess1.op.2")
        edge = 0
        for i in range(num_nodes):
            for j in range(2 + i):
                op = f"{cell}._ops.{edge}._ops"
                edge += 1
                names += bn(f"{op}.1.1") + bn(f"{op}.2.1")
                if reduction and j < 2:
                    names += conv(f"{op}.3.conv_1", f"{op}.3.conv_2") + bn(f"{op}.3.bn")
                for sep in (4, 5):
                    names += conv(f"{op}.{sep}.op.1", f"{op}.{sep}.op.2") + bn(f"{op}.{sep}.op.3")
                    names += conv(f"{op}.{sep}.op.5", f"{op}.{sep}.op.6") + bn(f"{op}.{sep}.op.7")
                for dil in (6, 7):
                    names += conv(f"{op}.{dil}.op.1", f"{op}.{dil}.op.2") + bn(f"{op}.{dil}.op.3")
    return names + ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize("num_cells, num_nodes", [(5, 2), (4, 4)])
def test_a_supernet_goes_to_quark0_and_back(num_cells, num_nodes):
    torch.manual_seed(0)
    supernet = Supernet(7, 4, num_cells, num_nodes, in_channels=1).double()
    written, alphas = supernet_to_quark0(supernet)
    assert list(written) == quark0_search_names(num_cells, num_nodes)
    for key, tensor in written.items():
        if key.endswith(("running_mean", "running_var")):
            k = int(key.split(".")[1])
            reductions = (num_cells // 3, 2 * num_cells // 3)
            doubled = 2 ** sum(k >= reduction for reduction in reductions)
            channels = 12 if key.startswith("stem") else 4 * doubled
            assert tensor.shape == (channels,) and (tensor == ("var" in key)).all()
    copy = supernet_from_quark0({f"module.{k}": t for k, t in written.items()}, alphas)
    assert list(copy.state_dict()) == list(supernet.state_dict())
    for key, tensor in supernet.state_dict().items():
        assert torch.equal(copy.state_dict()[key], tensor)


def test_supernet_names_order_and_shapes_are_those_of_the_original_code():
    golden = torch.load(GOLDEN / "quark0_c4_l4_search.pt", weights_only=True)
    written, alphas = supernet_to_quark0(supernet_from_quark0(golden["weights"], golden["alphas"]))
    parameters = {key: t for key, t in written.items() if key in golden["weights"]}
    assert list(parameters) == list(golden["weights"])
    assert all(torch.equal(t, golden["weights"][key]) for key, t in parameters.items())
    assert all(torch.equal(a, b) for a, b in zip(alphas, golden["alphas"], strict=True))


def test_a_supernet_of_other_operations_is_no_quark0_supernet():
    supernet = Supernet(init_channels=2, num_cells=3, primitives=("none", "skip_connect"))
    with pytest.raises(ValueError, match="skip_connect.*the original code has"):
        supernet_to_quark0(supernet)
    with pytest.raises(ValueError, match="parts of its channels"):
        supernet_to_quark0(Supernet(init_channels=4, num_cells=3, partial=2))


class Mine(SepConv):
    """An operation that no other code has."""


@pytest.mark.parametrize("form", WAYS)
def test_an_operation_that_the_other_codes_do_not_have_is_named(form):
    network = make()
    network.cells[0].edges[2].op = Mine(4, 1, nn.BatchNorm2d, kernel_size=5)
    with pytest.raises(ValueError, match="operation Mine: .* does not have it"):
        WAYS[form][0](network)


def test_noise_is_no_operation_of_the_other_codes():
    noisy = MIXED._replace(normal=(("noise", 0), *MIXED.normal[1:]))
    with pytest.raises(ValueError, match="operation Noise: the original code does not have it"):
        network_to_quark0(make(noisy))


def test_an_operation_of_a_supernet_that_the_original_code_does_not_have_is_named():
    supernet = Supernet(init_channels=2, num_cells=3, num_nodes=1)
    supernet.cells[0].mixed_ops[1].ops["sep_conv_3x3"].__class__ = Mine
    with pytest.raises(ValueError, match="operation Mine: the original code does not have it"):
        supernet_to_quark0(supernet)
