"""Oracle: docs/extending.md. Its operation goes through search, training, folding and drawing."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import eval_pretrained
import train_final
import train_search
from darts_min import Network, Supernet, draw, operations
from darts_min.convert import format_genotype, network_to_quark0
from darts_min.genotypes import Genotype
from darts_min.network import fold_batch_norm
from darts_min.relaxations import Gumbel, Softmax

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")
NAME = "conv_7x1_1x7"
CELL = ((NAME, 0), ("skip_connect", 1), (NAME, 1), (NAME, 2))
GENOTYPE = Genotype(CELL, (2, 3), CELL, (2, 3))
DATA = ["--dataset", "synthetic", "--image-size", "8", "--subset", "60", "--batch-size", "10"]
DATA += ["--init-channels", "2", "--num-cells", "3", "--epochs", "1"]


def code_with(start: str) -> str:
    """Return the one block of code of the page that begins so."""
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if start in b)
    return block


@pytest.fixture
def operation(monkeypatch):
    """Write the page's class and row into operations.py, for the time of a test."""
    names = dict(vars(operations))
    exec(code_with("class Conv1x7"), names)
    row = re.search(r'"conv_7x1_1x7": (\w+),', code_with("OPS: dict"))
    monkeypatch.setitem(operations.OPS, NAME, names[row[1]])


@pytest.mark.parametrize("relaxation", [Softmax(), Gumbel(1.0)])
def test_the_supernet_mixes_the_operation_and_learns_its_weight(operation, relaxation):
    torch.manual_seed(0)
    primitives = ("none", "skip_connect", NAME)
    model = Supernet(3, 4, 3, num_nodes=2, primitives=primitives)
    model.relaxation = relaxation
    model(torch.randn(6, 3, 9, 8)).square().mean().backward()
    for alphas in model.alphas():
        assert (alphas.grad[:, 2] != 0).any()
        alphas.data[:, 2] += 10
    found = model.genotype()
    assert {op for op, _ in found.normal + found.reduce} == {NAME}


def test_the_network_folds_the_bn_of_the_operation(operation):
    torch.manual_seed(0)
    network = Network(GENOTYPE, 3, 4, 3, auxiliary=False)
    network(torch.randn(8, 3, 9, 8))  # statistics for BN
    x = torch.randn(4, 3, 9, 8)
    folded = fold_batch_norm(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(x), network.eval()(x), rtol=1e-4, atol=1e-5)


def test_the_operation_is_drawn_and_no_other_code_has_it(operation):
    assert draw.draw_cell(GENOTYPE, "normal").size > (100, 100)
    with pytest.raises(ValueError, match="operation Conv1x7: the original code does not have it"):
        network_to_quark0(Network(GENOTYPE, 3, 4, 3))


def test_the_scripts_search_train_evaluate_and_export_the_operation(operation, tmp_path):
    space = ["--space", f"none,skip_connect,{NAME}", "--num-nodes", "2"]
    (record,) = train_search.main([*DATA, *space, "--out-dir", f"{tmp_path}/search"])["history"]
    assert record["signs"]["largest eigenvalue"] > 0
    cell = ["--genotype", format_genotype(GENOTYPE), "--auxiliary-weight", "0", "--cutout", "2"]
    train_final.main([*DATA, *cell, "--out-dir", f"{tmp_path}/final"])
    weights = ["--weights", f"{tmp_path}/final"]
    data = ["--dataset", "synthetic", "--subset", "20", "--out-dir", f"{tmp_path}/eval"]
    assert 0 <= eval_pretrained.main([*weights, *data])["accuracy"] <= 1
    exported = eval_pretrained.main([*weights, "--export", f"{tmp_path}/export"])
    assert set(exported["left_out"]) >= {"quark0.pt", "nni.pt"}
    assert "network.pt2" in exported["files"]


def test_the_relaxation_of_the_page_anneals():
    names = {"torch": torch, "Softmax": Softmax, "Tensor": torch.Tensor, "F": nn.functional}
    exec(code_with("class Temperature"), names)
    relaxation, alphas = names["Temperature"](0.1), torch.tensor([[0.0, 1.0]])
    for done, tau in ((0.0, 1.0), (0.5, 0.55), (1.0, 0.1)):
        relaxation.at(done)
        torch.testing.assert_close(relaxation.draw(alphas), torch.softmax(alphas / tau, 1))
