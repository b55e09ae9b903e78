"""README against the files it speaks of."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\S+\.py)` \| (\d+) \|", README, re.MULTILINE)


@pytest.mark.parametrize(("file", "lines"), ROWS)
def test_line_counts_are_right_to_ten_percent(file, lines):
    assert int(lines) == pytest.approx(len((ROOT / file).read_text().splitlines()), rel=0.1)


def test_every_module_and_script_is_in_the_file_map():
    files = [*ROOT.glob("*.py"), *ROOT.glob("darts_min/*.py")]
    names = {str(f.relative_to(ROOT)) for f in files} - {"darts_min/__init__.py"}
    assert {file for file, _ in ROWS} == names


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
