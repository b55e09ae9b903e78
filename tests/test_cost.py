"""Oracles: layers counted one by one, and clocks that the test sets."""

from functools import partial

import pytest
import torch

from darts_min.genotypes import PUBLISHED
from darts_min.judge import cost
from darts_min.judge.cost import (
    check_cost,
    count_multiply_adds,
    count_parameters,
    duration,
    forecast,
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


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3599, "60 min"), (3600, "1 h 0 min")]
    + [(7199, "2 h 0 min"), (86399, "24 h 0 min"), (86400, "1 d 0 h"), (400000, "4 d 15 h")],
)
def test_durations_are_written_in_the_units_that_matter(seconds, text):
    assert duration(seconds) == text


def test_the_forecast_leaves_the_first_steps_out_and_passes_every_batch_on(monkeypatch):
    clock, lines = [0.0], []
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])
    seen = []
    for i in forecast(range(30), 1000, lines.append, 30):
        seen.append(i)
        clock[0] += 100.0 if i < 3 else 0.5
    assert seen == list(range(30))
    assert lines == ["0.500 s a step (the first: 100.0 s): about 8 min to go"]


@pytest.mark.parametrize("length, lines", [(1, 0), (2, 0), (3, 1), (5, 1), (13, 1), (14, 1)])
def test_a_short_pass_is_timed_on_the_steps_that_it_has(length, lines):
    logged = []
    assert list(forecast(range(length), 1000, logged.append, length)) == list(range(length))
    assert len(logged) == lines
