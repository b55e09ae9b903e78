"""Oracle: docs/weights.md and docs/data.md, each example of which must be read as they say."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from darts_min import load_network, parse_genotype
from darts_min.convert import network_to_quark0, read_genotype
from darts_min.convert.weights import CHECKPOINT_KEYS
from darts_min.data import load_dataset
from darts_min.data.folder import IMAGE_SUFFIXES
from darts_min.genotypes import PUBLISHED, Genotype
from darts_min.network import Network

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "weights.md").read_text()
FILES = PAGE.partition("## Which files")[2].partition("\n## ")[0]
EXAMPLES = PAGE.partition("## Which genotypes")[2].partition("\n## ")[0]
TEXTS = re.findall(r"\n```text\n(.*?)```", EXAMPLES, re.DOTALL)
DATA = (DOCS / "data.md").read_text().partition("## A folder")[2].partition("\n## ")[0]
SMALL = Genotype(
    (("sep_conv_3x3", 0), ("skip_connect", 1)),
    (2,),
    (("max_pool_3x3", 1), ("avg_pool_3x3", 0)),
    (2,),
)


@pytest.mark.parametrize("number", range(11))
def test_each_example_of_a_genotype_is_read_as_text_and_as_a_file(tmp_path, number):
    assert len(TEXTS) == 11
    expected = PUBLISHED["DARTS_V2"] if number == 10 else SMALL
    assert set(parse_genotype(TEXTS[number]).normal) == set(expected.normal)
    (tmp_path / "log.txt").write_text(TEXTS[number])
    genotype, note = read_genotype(tmp_path / "log.txt")
    assert genotype == parse_genotype(tmp_path) == parse_genotype(TEXTS[number])
    assert number == 10 or genotype == SMALL
    assert (note is not None) == ("2019" in TEXTS[number])


def test_the_example_of_several_names_is_read_by_name(tmp_path):
    (text,) = re.findall(r"\n```python\n(.*?)```", EXAMPLES, re.DOTALL)
    path = tmp_path / "genotypes.py"
    path.write_text(text)
    assert parse_genotype(f"{path}:MINE") == parse_genotype(f"{path}:DARTS") == SMALL
    with pytest.raises(ValueError, match="several genotypes: OTHER, MINE"):
        parse_genotype(path)


PREFIXES = re.findall(r"^\| `(\S*)stem\.0\.weight`", FILES, re.MULTILINE)
ENTRIES = re.findall(r'\{"(\w+)": \.\.\.\}', FILES)


def test_the_page_names_all_entries_of_checkpoints():
    assert set(ENTRIES) == set(CHECKPOINT_KEYS) and len(PREFIXES) == 7


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("entry", [None, *ENTRIES])
def test_each_wrapping_of_a_state_dict_is_read(tmp_path, prefix, entry):
    network = Network(SMALL, init_channels=4, num_cells=3, auxiliary=False)
    content = {f"{prefix}{key}": t for key, t in network_to_quark0(network).items()}
    content |= {f"{prefix}total_ops": torch.zeros(1), "n_averaged": torch.tensor(1)}
    for _ in range(2):
        content = {"epoch": 3, entry: content} if entry else content
    torch.save(content, tmp_path / "w.pt")
    loaded = load_network(tmp_path / "w.pt", TEXTS[0]).state_dict()
    assert all(torch.equal(t, loaded[key]) for key, t in network.state_dict().items())


def test_the_page_lists_the_suffixes_that_are_read(tmp_path):
    assert set(re.findall(r"`(\.\w+)`", DATA)) == IMAGE_SUFFIXES
    (example,) = re.findall(r"```text\n(.*?)```", DATA, re.DOTALL)
    for path in example.split():
        path = tmp_path / path
        path.parent.mkdir(parents=True, exist_ok=True)
        form = {".jfif": "JPEG", ".jpg": "JPEG"}.get(path.suffix)
        Image.new("RGB", (8, 8)).save(path, form)
    dataset = load_dataset("folder", tmp_path / "DIR")
    assert dataset.train.labels.tolist() == [0, 0, 1] and dataset.test.labels.tolist() == [0, 1]
