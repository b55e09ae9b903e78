"""Oracle: figures that the public codes themselves computed in float64."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from darts_min.architect import architecture_gradient
from darts_min.convert.genotype_texts import parse_genotype
from darts_min.convert.state_dicts import (
    network_from_nni,
    network_from_quark0,
    supernet_from_quark0,
)
from darts_min.genotypes import PRIMITIVES, PUBLISHED
from darts_min.supernet import Supernet

GOLDEN = Path(__file__).parent / "golden"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def load(name):
    return torch.load(GOLDEN / name, weights_only=True)


def double(state_dict):
    return {key: t.double() if t.is_floating_point() else t for key, t in state_dict.items()}


def close(actual, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "order, layout",
    [
        ("first_order", "channels_last"),
        pytest.param("second_order", "channels_last", marks=pytest.mark.slow),
        pytest.param("first_order", "contiguous", marks=pytest.mark.slow),
        pytest.param("second_order", "contiguous", marks=pytest.mark.slow),
    ],
)
def test_search_follows_the_original_code_for_four_steps(order, layout):
    golden = load("quark0_c4_l4_search.pt")
    config = golden["config"]
    alphas = [alpha.double() for alpha in golden["alphas"]]
    model = supernet_from_quark0(double(golden["weights"]), alphas)
    model.to(memory_format=LAYOUTS[layout])
    w_optimizer = torch.optim.SGD(
        model.weights(),
        config["w_lr"],
        momentum=config["w_momentum"],
        weight_decay=config["w_weight_decay"],
    )
    alpha_optimizer = torch.optim.Adam(
        model.alphas(),
        config["alpha_lr"],
        betas=tuple(config["alpha_betas"]),
        weight_decay=config["alpha_weight_decay"],
    )
    xi = config["xi"] if order == "second_order" else 0.0
    for batch, expected in zip(golden["batches"], golden[order], strict=True):
        (x, y), (x_val, y_val) = ((inputs.double(), target) for inputs, target in batch.values())
        close(F.cross_entropy(model(x_val), y_val).detach(), expected["val_loss_before"])
        grads = architecture_gradient(
            model, F.cross_entropy, (x, y), (x_val, y_val), xi, w_optimizer
        )
        close(grads[0], expected["alpha_grads"][0])
        close(grads[1], expected["alpha_grads"][1])
        for alpha, grad in zip(model.alphas(), grads, strict=True):
            alpha.grad = grad
        alpha_optimizer.step()
        close(model.alphas_normal.detach(), expected["alphas_after"][0])
        close(model.alphas_reduce.detach(), expected["alphas_after"][1])

        w_optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.weights(), config["w_grad_clip"])
        w_optimizer.step()
        close(loss.detach(), expected["train_loss"])
        close(norm, expected["weight_grad_norm"])

    norms = golden["weight_norms_after"][order]
    for name in ("stem.0.weight", "classifier.weight", "cells.0.preprocess0.op.1.weight"):
        ours = model.get_parameter(name.replace("op.1", "conv"))
        close(ours.detach().norm(), norms[name])
    # Edges 0, 2, 5, 9 leave state 0; ours keeps them side by side.
    wide = model.get_parameter("cells.2.mixed_ops.0.ops.dil_conv_5x5.depthwise.weight").detach()
    names = [f"cells.2._ops.{edge}._ops.7.op.1.weight" for edge in (0, 2, 5, 9)]
    close(torch.stack([e.norm() for e in wide.chunk(4)]), [norms[name] for name in names])
    assert len(norms) == len(golden["weights"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_final_network_follows_the_original_code(layout):
    golden = load("quark0_c4_l4_final.pt")
    config = golden["config"]
    model = network_from_quark0(double(golden["state_dict"]), PUBLISHED[config["genotype"]])
    model.to(memory_format=LAYOUTS[layout])
    x = golden["input"].double()
    close(model.eval()(x).detach(), golden["eval_logits"])
    optimizer = torch.optim.SGD(
        model.parameters(),
        config["lr"],
        momentum=config["momentum"],
        weight_decay=config["weight_decay"],
    )
    model.train()
    for (inputs, target), expected in zip(
        golden["train_batches"], golden["trajectory"], strict=True
    ):
        optimizer.zero_grad()
        logits, aux_logits = model(inputs.double())
        loss = F.cross_entropy(logits, target)
        loss = loss + config["auxiliary_weight"] * F.cross_entropy(aux_logits, target)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config["grad_clip"])
        optimizer.step()
        close(loss.detach(), expected["loss"])
        close(norm, expected["grad_norm"])
        close(logits.detach(), expected["logits"])
        close(aux_logits.detach(), expected["aux_logits"])
    close(model.eval()(x).detach(), golden["eval_logits_after"])


@pytest.mark.parametrize("file", ["nni_darts_v2_w4_n5.pt", "nni_tutorial_w4_n4_aux_droppath.pt"])
def test_network_gives_the_logits_of_nni(file):
    golden = load(file)
    model = network_from_nni(double(golden["state_dict"]), golden["arch"])
    x = golden["input"].double()
    close(model(x).detach(), golden["eval_logits"])
    model.train()
    output = model(x)
    if golden["train_aux_logits"] is None:
        close(output.detach(), golden["train_logits"])
    else:
        close(output[0].detach(), golden["train_logits"])
        close(output[1].detach(), golden["train_aux_logits"])


@pytest.mark.parametrize("rule, form", [("darts", "quark0"), ("nni", "nni")])
def test_discretisation_agrees_with_both_codes(rule, form):
    pairs = json.loads((GOLDEN / "genotypes.json").read_text())
    model = Supernet(init_channels=2, num_cells=3)
    assert model.primitives == PRIMITIVES
    for pair in pairs:
        for alphas, name in zip(model.alphas(), ("alphas_normal", "alphas_reduce"), strict=True):
            alphas.data = torch.tensor(pair[name], dtype=torch.float64)
        assert model.genotype(rule) == parse_genotype(json.dumps(pair[form]))
    assert len(pairs) == 24


def test_search_trajectory_ends_in_the_original_genotype():
    golden = load("quark0_c4_l4_search.pt")
    model = Supernet(init_channels=2, num_cells=3)
    alphas = golden["second_order"][-1]["alphas_after"]
    model.alphas_normal.data, model.alphas_reduce.data = alphas
    normal, reduce = (tuple(map(tuple, cell)) for cell in golden["genotype"])
    assert model.genotype()[::2] == (normal, reduce)
