"""The networks that ship. Oracles: their files, what is drawn, right answers on 500 images.

The images are those of the model cards; the folder that holds them is `CIFAR10_FOLDER`, or
`data/cifar10`.
"""

import os
import re
from pathlib import Path

import pytest
import torch

import darts_min
import eval_pretrained
from darts_min import load_network
from darts_min.convert.genotype_texts import parse_genotype
from darts_min.convert.weights import names
from darts_min.data import Images, Loader
from darts_min.data.folder import read_image
from darts_min.genotypes import PUBLISHED
from darts_min.judge.cost import count_multiply_adds, count_parameters
from darts_min.judge.estimate import estimate_accuracy
from darts_min.judge.report import describe
from darts_min.run.evaluation import evaluate

ROOT = Path(__file__).parent.parent
FOLDER = Path(os.environ.get("CIFAR10_FOLDER", ROOT / "data" / "cifar10"))
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CARD = ROOT / "darts_min" / "convert" / "pretrained" / "s2_c16_l8_cifar10.md"
S2 = parse_genotype(re.search("`(Genotype.*)`", CARD.read_text(encoding="utf-8"))[1])
# Genotype, parameters, multiply-adds in millions, errors on the 500 images.
SHIPPED = {
    "darts_v2_c16_l8_cifar10": (PUBLISHED["DARTS_V2"], 246_106, 43.4, 54),
    "s2_c16_l8_cifar10": (S2, 403_962, 63.3, 51),
}

pytestmark = pytest.mark.parametrize("name", SHIPPED)


def test_it_is_found_by_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # as after --export
    network = load_network(name)
    genotype, parameters, multiply_adds, _ = SHIPPED[name]
    assert name in names() and network.genotype == genotype
    assert network.config["init_channels"] == 16 and network.config["num_cells"] == 8
    assert network.details["classes"] == CLASSES and network.details["image_size"] == 32
    assert count_parameters(network) == parameters
    assert round(count_multiply_adds(network) / 1e6, 1) == multiply_adds


def test_its_file_is_small_and_its_card_names_the_accuracy(name):
    folder = Path(darts_min.__file__).parent / "convert" / "pretrained"
    assert (folder / f"{name}.pt").stat().st_size < 2_000_000
    accuracy = load_network(name).details["test_accuracy"]
    card = (folder / f"{name}.md").read_text(encoding="utf-8")
    assert f"{100 * accuracy:.2f} %" in card
    assert describe(estimate_accuracy(SHIPPED[name][0])).removeprefix("expected") in card
    assert f"{100 * accuracy:.2f} %" in (ROOT / "README.md").read_text()


def test_torch_hub_gives_the_same_network(name):
    network = torch.hub.load(str(ROOT), name, source="local")
    for key, tensor in load_network(name).state_dict().items():
        assert torch.equal(network.state_dict()[key], tensor)
    new = torch.hub.load(str(ROOT), name, source="local", pretrained=False)
    assert new.config == network.config and new.training
    assert not torch.equal(new.classifier.weight, network.classifier.weight)


def test_it_knows_what_the_demo_draws(name):
    pictures = eval_pretrained.main(["--demo", "--weights", name])
    assert len(pictures) == 3
    for drawing, likely in pictures.items():
        assert drawing.split()[-1] == max(likely, key=likely.get)


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no images of CIFAR-10 in {FOLDER}")
def test_it_knows_500_images(name):
    paths = [sorted((FOLDER / "test" / kind).iterdir())[:50] for kind in CLASSES]
    images = torch.stack([torch.tensor(read_image(p)) for of_class in paths for p in of_class])
    labels = torch.arange(10).repeat_interleave(50)
    network = load_network(name)
    statistics = torch.tensor(network.details["mean"]), torch.tensor(network.details["std"])
    loader = Loader(Images(images, labels), 250, statistics)
    errors = int(evaluate(network, loader, 10).class_errors.sum())
    assert abs(errors - SHIPPED[name][3]) <= 2  # other JPEG decoders may differ in the last bit
