"""Oracles: published counts, a scan over every width."""

from functools import partial

import pytest
import torch

from darts_min.genotypes import PUBLISHED
from darts_min.judge.cost import check_cost, count_multiply_adds, count_parameters
from darts_min.network import Network, fold_batch_norm
from darts_min.supernet import Supernet


def make(channels, stem="cifar", auxiliary=True):
    return Network(PUBLISHED["DARTS_V2"], 10, channels, 5, stem=stem, auxiliary=auxiliary)


def test_a_supernets_multiply_adds_are_those_of_its_layers():
    supernet = Supernet(init_channels=2, num_cells=3, num_nodes=1, primitives=("dil_conv_3x3",))
    counted, layers = count_multiply_adds(supernet, 8), 0

    def count(module, inputs, output):
        nonlocal layers
        layers += output.numel() * module.weight[0].numel()

    for module in supernet.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    supernet(torch.randn(1, 3, 8, 8))
    assert counted == layers


def test_folding_bn_leaves_the_multiply_adds_as_they_are():
    network = make(4)
    assert count_multiply_adds(fold_batch_norm(network)) == count_multiply_adds(network)


@pytest.mark.parametrize("stem, step", [("cifar", 1), ("imagenet", 2)])
@pytest.mark.parametrize(
    "limit", ["parameters", pytest.param("multiply-adds", marks=pytest.mark.slow)]
)
def test_the_largest_width_that_fits_is_named(stem, step, limit):
    with torch.device("meta"):
        networks = {c: make(c, stem) for c in range(2, 13, step)}
    costs = {
        c: (count_parameters(n) if limit == "parameters" else count_multiply_adds(n, 64)) / 1e6
        for c, n in networks.items()
    }
    limits = (costs[8], 1e9) if limit == "parameters" else (1e9, costs[8])
    largest = max(c for c, value in costs.items() if value <= costs[8])
    assert largest == 8
    check_cost(partial(make, stem=stem), 8, 64, *limits)
    with pytest.raises(ValueError, match=f"12 .* M {limit}, more than .*; 8 is the largest"):
        check_cost(partial(make, stem=stem), 12, 64, *limits)


def test_limits_that_nothing_meets_are_said_to_be_so():
    with pytest.raises(ValueError, match="no number fits"):
        check_cost(make, 4, 32, 1e-6, None)
