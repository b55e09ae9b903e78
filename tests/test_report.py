"""Oracles: the estimate itself, made-up histories, the width of a terminal."""

import argparse
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval_pretrained
import train_search
from darts_min import draw, estimate_accuracy, parse_genotype
from darts_min.genotypes import PRIMITIVES, PUBLISHED, random_genotype
from darts_min.judge import report

SEARCH = ["--dataset", "synthetic", "--image-size", "8", "--subset", "120", "--batch-size", "20"]
SEARCH += ["--init-channels", "2", "--num-cells", "3", "--hessian-every", "0", "--alpha-lr", "0.3"]
SIGNS = {"accuracy lost in discretisation": 0.4567, "largest eigenvalue": 0.0001234}
SIGNS |= {"skips in the cell/normal": 8, "skips in the cell/reduce": 8}


def test_an_epoch_takes_two_lines_of_at_most_120_columns():
    record = {"epoch": 600, "lr": 0.025, "seconds": 12345.6, "signs": SIGNS, "skipped_batches": 0}
    record |= {"train_loss": 12.3456, "train_accuracy": 1.0, "arch_loss": 12.3, "arch_accuracy": 1}
    record["expected"] = report.expected_of(PUBLISHED["DARTS_V2"])
    lines = report.epoch_lines(argparse.Namespace(epochs=600), record, False).splitlines()
    assert len(lines) == 2 and max(map(len, lines)) <= 120
    assert "discretised 54.33 %" in lines[0] and "w half: loss 12.346, 100.00 %" in lines[0]
    estimate = estimate_accuracy(PUBLISHED["DARTS_V2"])
    assert f"expected {estimate.accuracy:.1f} % ± {estimate.std:.1f}, better than" in lines[1]


def test_a_search_says_in_each_epoch_what_its_cell_is_expected_to_be_worth(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(report, "draw_epoch", lambda *_: {})
    arguments = [*SEARCH, "--epochs", "3", "--out-dir"]
    result = train_search.main([*arguments, f"{tmp_path}/last"])
    accuracies = []
    for record in result["history"]:
        estimate = estimate_accuracy(parse_genotype(record["genotype"]))
        assert record["expected"] == estimate._asdict()
        accuracies.append(estimate.accuracy)
    assert result["expected"] == result["history"][-1]["expected"] and result["epoch"] == 3
    assert capsys.readouterr().out.count("of random cells") == 4  # epochs, and at the end

    kept = train_search.main([*arguments, f"{tmp_path}/best", "--keep", "best"])
    best = accuracies.index(max(accuracies))
    assert kept["epoch"] == best + 1
    assert kept["genotype"] == result["history"][best]["genotype"]
    assert parse_genotype(tmp_path / "best") == parse_genotype(kept["genotype"])


def test_cells_are_judged_without_training_the_best_first(tmp_path, capsys):
    sources = ["random:0", "DARTS_V2", "random:1"]
    found = eval_pretrained.main(["--judge", *sources])
    for source in sources:
        assert found[source] == estimate_accuracy(parse_genotype(source))._asdict()
    _, *lines = capsys.readouterr().out.splitlines()
    order = sorted(sources, key=lambda source: -found[source]["accuracy"])
    assert [line.split()[0] for line in lines] == order
    assert "3.35 M parameters" in lines[order.index("DARTS_V2")]


def test_a_cell_outside_the_space_has_no_expectation():
    cell = (("sep_conv_3x3", 0), ("skip_connect", 1))
    genotype = PUBLISHED["DARTS_V2"]._replace(normal=cell, normal_concat=(2,))
    assert report.expected_of(genotype) is None
    assert "NAS-Bench-301 has no such cell" in report.describe(None)


def test_the_picture_of_the_alphas_marks_the_kept_edges():
    torch.manual_seed(0)
    mix = torch.rand(14, 8).softmax(1).tolist()
    plain = np.asarray(draw.draw_alphas(mix, PRIMITIVES, "x"))
    strong = tuple(int(draw.BEST[i : i + 2], 16) for i in (1, 3, 5))
    counts = []
    for kept in ({}, {0: 4}, {0: 4, 1: 5, 13: 7}):
        picture = np.asarray(draw.draw_alphas(mix, PRIMITIVES, "x", kept))
        counts.append((picture == strong).all(2).sum())
    assert counts[0] < counts[1] < counts[2] < (plain == strong).all(2).sum()


def test_the_picture_over_time_gives_each_operation_its_share():
    shares = torch.tensor([0.5, 0.0, 0.0, 0.0, 0.25, 0.25, 0.0, 0.0])
    even, odd = (shares.roll(i).expand(14, 8).tolist() for i in (0, 1))
    picture = np.asarray(draw.draw_history([even, odd], PRIMITIVES, "x"))
    counts = []
    for color in draw.SHARES:
        rgb = tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
        counts.append((picture == rgb).all(2).sum())
    strips = np.array(counts) - min(counts)  # without the legend
    expected = np.array([0.5, 0.5, 0, 0, 0.25, 0.5, 0.25, 0])
    assert strips / strips.sum() == pytest.approx(expected / expected.sum(), abs=0.03)


def test_an_unusual_space_is_drawn_too():
    mixtures = [[[0.3, 0.7]] * 5] * 3
    assert draw.draw_history(mixtures, ("noise", "sep_conv_3x3"), "S4").size[0] > 100
    assert report.draw_cells(random_genotype(0)).keys() == {"cell_normal", "cell_reduce"}


def test_a_cell_whose_edges_change_places_is_unchanged(tmp_path, monkeypatch):
    lines, cell = [], "[('skip_connect', 1), ('sep_conv_3x3', 0)]"
    swapped = "[('sep_conv_3x3', 0), ('skip_connect', 1)]"
    other = "[('sep_conv_3x3', 0), ('skip_connect', 0)]"
    monkeypatch.setattr(report, "epoch_lines", lambda args, record, is_changed: is_changed)
    run = SimpleNamespace(
        log=lines.append, save_text=print, save_pictures=lambda draw: {}, report=lambda *_: None
    )
    history = []
    for edges in (cell, swapped, other):
        text = f"Genotype(normal={edges}, normal_concat=[2], reduce={edges}, reduce_concat=[2])"
        history.append({"epoch": 1, "genotype": text, "expected": None, "signs": {}})
        history[-1] |= dict.fromkeys(("train_loss", "arch_loss", "lr"), 0.0)
        history[-1] |= dict.fromkeys(("train_accuracy", "arch_accuracy"), 0.0)
        report.report_epoch(None, run, history, ())
    assert lines == [False, False, True]
