"""README and docs against the files that they speak of. Oracle: the repository itself."""

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]


def block_between(marker: str) -> str:
    """Return the code of README's fenced block between `<!-- marker -->` and `<!-- /marker -->`."""
    pattern = rf"<!-- {marker} -->\n```\w+\n(.*?)```\n<!-- /{marker} -->"
    (block,) = re.findall(pattern, README, re.DOTALL)
    return block


def named_in_the_tree() -> set[str]:
    """Return the paths that README's tree names; a folder ends with a slash."""
    (block,) = re.findall(r"```\n(train_search\.py .*?)```", README, re.DOTALL)
    paths = set()
    for line in block.splitlines():
        name = line.split()[0]
        paths.add(f"darts_min/{name}" if line.startswith("  ") else name)
    return paths


def test_readme_is_one_page():
    assert len(README.encode()) <= 10_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_page_of_docs_is_linked_from_readme():
    linked = set(re.findall(r"\]\((docs/[^)#]+\.md)\)", README))
    assert linked == {str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*.md")}


def test_the_tree_names_every_file_and_folder_of_the_package_and_every_script():
    package = [p for p in (ROOT / "darts_min").iterdir() if p.name[0] not in "._"]
    here = {f"darts_min/{p.name}{'/' * p.is_dir()}" for p in package}
    scripts = {p.name for p in ROOT.glob("*.py")}
    assert here | scripts <= named_in_the_tree()


def test_the_tree_names_nothing_that_is_not_there():
    assert [path for path in sorted(named_in_the_tree()) if not (ROOT / path).exists()] == []


def test_the_alternating_step_is_that_of_the_search():
    script = (ROOT / "train_search.py").read_text(encoding="utf-8")
    step = block_between("alg1")
    depths = (textwrap.indent(step, " " * depth) for depth in (0, 4, 8, 12))
    assert any(indented in script for indented in depths)


def test_the_files_to_copy_work_under_another_name_and_without_the_package(tmp_path):
    sentence = README.split("**Copy these files**", 1)[1].split("\n\n", 1)[0]
    (tmp_path / "mine").mkdir()
    for name in re.findall(r"`(\w+\.py)`", sentence):
        shutil.copy(ROOT / "darts_min" / name, tmp_path / "mine")
    before = """\
        import sys
        import torch
        sys.modules["darts_min"] = None  # an import of the package is an error
        torch.set_num_threads(1)
        batch = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
        train_loader = val_loader = [batch, batch]
        """
    program = textwrap.dedent(before) + block_between("copy")
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("Genotype(normal=(")
