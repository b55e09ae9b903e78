"""Oracle: layers counted one by one."""

from functools import partial

import pytest
import torch

from darts_min.genotypes import PUBLISHED
from darts_min.judge.cost import (
    check_cost,
    count_multiply_adds,
    count_parameters,
)
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


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("limit", ["parameters", "multiply-adds"])
def test_a_network_beyond_a_limit_is_refused_with_the_factor(stem, limit):
    with torch.device("meta"):
        networks = make(8, stem), make(12, stem)
    fits, too_big = (
        (count_parameters(n) if limit == "parameters" else count_multiply_adds(n, 64)) / 1e6
        for n in networks
    )
    limits = (fits, 1e9) if limit == "parameters" else (1e9, fits)
    check_cost(partial(make, stem=stem), 8, 64, *limits)
    check_cost(partial(make, stem=stem), 12, 64, None, None)
    message = f"12 initial channels give {too_big:.4g} M {limit}, {too_big / fits:.3g} times the"
    with pytest.raises(ValueError, match=message):
        check_cost(partial(make, stem=stem), 12, 64, *limits)
