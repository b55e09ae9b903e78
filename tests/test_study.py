"""The study's statistics and tables, on results made by hand; figures worked out on paper."""

import json

import numpy as np
import pytest

import train_search
from benchmarks import plot, study, study_tables
from darts_min import draw
from darts_min.genotypes import genotype_of, random_genotype
from darts_min.judge.estimate import estimate_accuracy

SIGNS = ("skips in the cell/normal", "skips in the cell/reduce")


@pytest.mark.parametrize(
    ("values", "tail"),
    [
        ([0.3], 0.7),
        ([0.25, 0.75], 0.5),
        ([0.9, 0.8], 0.3**2 / 2),  # a triangle in the corner of the square
        ([0.5] * 3, 0.5),
        ([0.2] * 3, 1 - 0.6**3 / 6),  # a corner of the cube left out
        ([0.5] * 22, 0.5),
        ([1.0, 1.0], 0.0),
    ],
)
def test_the_tail_of_a_sum_of_uniform_variables(values, tail):
    assert study_tables.uniform_sum_tail(values) == pytest.approx(tail, abs=1e-12)


def test_the_interval_is_students():
    # standard deviation 12.910, its standard error 6.455, times 3.18
    mean, low, high = study_tables.mean_and_interval([10, 20, 30, 40])
    assert (mean, low, high) == pytest.approx((25, 4.47, 45.53), abs=0.01)
    assert study_tables.mean_and_interval([90, 99])[2] == 100
    assert study_tables.mean_and_interval([90]) == (90, 0, 100)


def test_cells_in_short_names_are_read_back():
    genotype = random_genotype(0)
    assert genotype_of(**study.short(genotype)) == genotype


def test_the_trained_cells_span_the_estimates():
    cells = study.cells_to_train()
    assert len(set(cells.values())) == len(cells) == 12
    for (low, high), i in zip(study.TENTHS, (0, 2, 4), strict=True):
        for name in list(cells)[i : i + 2]:
            assert name.startswith("random:")
            assert low <= estimate_accuracy(cells[name]).percentile <= high


@pytest.mark.parametrize("method", study.METHODS)
def test_the_flags_of_each_method_are_accepted(method, tmp_path):
    flags = f"{study.SEARCH} {study.METHODS[method][1]} --seed 0 --data-dir {tmp_path}"
    assert train_search.parse_args(flags.split()).epochs in (10, 20)


def result(method, seed, genotypes, eigenvalues):
    """Return what study.py keeps of a search; all cells have `seed` + 1 and 2 skips."""
    signs = [dict.fromkeys(SIGNS, seed + 1) | {"largest eigenvalue": e} for e in eigenvalues]
    epochs = [study.short(g) | {"signs": s} for g, s in zip(genotypes, signs, strict=True)]
    return {
        "method": method,
        "seed": seed,
        "seconds": [30 + 15 * seed] * (len(epochs) - 1) + [9999],
        "epochs": epochs,
    }


@pytest.fixture
def rows(tmp_path, monkeypatch, capsys):
    """Print the tables of some results; return the cells of each row, by its first cell."""
    monkeypatch.setattr(study_tables, "RESULTS", tmp_path)

    def print_tables(results):
        for r in results:
            name = r.get("method", r.get("cell"))
            (tmp_path / f"{name}-{r.get('seed')}.json").write_text(json.dumps(r))
        monkeypatch.setattr("sys.argv", ["study_tables"])
        study_tables.main()
        tables = capsys.readouterr().out
        lines = [line.strip("| ").split(" | ") for line in tables.splitlines() if line[:1] == "|"]
        found = {}
        for first, *rest in lines:
            found.setdefault(first, []).append(rest)
        return found

    return print_tables


def test_last_cells_best_epochs_and_costs_are_those_of_the_results(rows):
    cells = [random_genotype(seed) for seed in range(6)]
    at = [estimate_accuracy(cell).percentile for cell in cells]
    one = result("softmax", 0, [cells[0], cells[1], cells[2], cells[2]], [1] * 4)
    two = result("softmax", 1, [cells[3], cells[4], cells[5], cells[3]], [1] * 4)
    last, by_epoch, best = rows([one, two])["softmax"]
    assert last[:2] == ["2", f"{at[2]:.0f}, {at[3]:.0f}"]
    assert last[2:4] == ["1 + 1, 2 + 2", f"{(at[2] + at[3]) / 2:.0f}"]
    share = (at[2] + at[3]) / 100
    tail = 1 - share**2 / 2 if share < 1 else (2 - share) ** 2 / 2
    assert last[5:] == [f"{tail:.2g}", "2"]  # the median of 2 and 3 minutes, rounded to even
    expected = [(at[0] + at[3]) / 2, (at[1] + at[4]) / 2, (at[2] + at[5]) / 2, (at[2] + at[3]) / 2]
    assert by_epoch == [" ".join(f"{x:.0f}" for x in expected)]
    peaks = max(at[:3]), max(at[3:])
    falls = peaks[0] - at[2], peaks[1] - at[3]
    assert best[:5] == [
        f"{sum(peaks) / 2:.0f}",
        f"{max(estimate_accuracy(cell).accuracy for cell in cells):.2f}",
        f"{sum(falls) / 2:.0f}",
        f"{sum(fall > 20 for fall in falls)} of 2",
        "3.0",
    ]
    assert best[5] == "75"  # of three random cells the best lies at 3 / 4, on average


def test_early_stopping_takes_the_cell_that_the_rule_names(rows):
    cells = [random_genotype(seed) for seed in range(20)]
    at = [estimate_accuracy(cell).percentile for cell in cells]
    grows = result("S2", 0, cells, [1.0] * 12 + [3.0] * 8)
    flat = result("S2", 1, cells, [1.0] * 20)
    found = rows([grows, flat])
    # RobustDARTS' rule first fires in the 17th epoch, and takes the cell of the 11th.
    assert found["0"][0][:3] == ["17", f"{at[10]:.0f} (1 + 1)", f"{at[19]:.0f} (1 + 1)"]
    assert found["1"][0][:2] == ["never", "-"]


def test_trainings_are_ranked_and_their_gain_is_counted(rows):
    def trained(name, genotype, accuracy):
        fields = {"cell": name, "parameters_M": accuracy[0], "test_accuracy": accuracy}
        return fields | study.short(genotype)

    cells = [random_genotype(seed) for seed in range(3)]
    curves = [[0.1, 0.2, 0.3, 0.4, 0.5], [0.15, 0.3, 0.4, 0.6, 0.7], [0.2, 0.3, 0.4, 0.5, 0.6]]
    found = rows(
        [trained(f"random:{i}", c, a) for i, (c, a) in enumerate(zip(cells, curves, strict=True))]
    )
    names = [name for name in found if name.startswith("random:")]
    assert names == ["random:1", "random:2", "random:0"]
    assert found["random:1"][0][3:] == ["15.00", "70.00", "+10.00"]


def test_points_lie_at_their_places():
    points = {"a": [(0.0, 0.0)], "b": [(1.0, 2.0)]}
    picture = plot.scatter(points, "title", "x", "y", (0, 2, 4), {0: "low", 3: "high"})
    pixels, dots = np.asarray(picture).astype(int), []
    for hue in plot.HUES[:2]:
        rgb = [int(hue[i : i + 2], 16) for i in (1, 3, 5)]
        y, x = np.nonzero((np.abs(pixels - rgb) < 4).all(axis=2))
        dot = x < x.min() + 4 * plot.DOT  # the other one is in the legend
        dots.append((x[dot].mean(), y[dot].mean()))
    (x, y), (other_x, other_y) = dots
    assert other_x - x == pytest.approx(draw.PIXELS * plot.PLOT_WIDTH / 4, abs=1)
    assert y - other_y == pytest.approx(draw.PIXELS * plot.PLOT_HEIGHT * 2 / 3, abs=1)


def searches_of(method, signs_and_cells):
    epochs = [
        {"signs": {"sign": x}, "estimate": estimate_accuracy(cell)} for x, cell in signs_and_cells
    ]
    return {"method": method, "epochs": epochs}


def test_signs_are_compared_within_methods_and_within_searches(capsys):
    """Each search goes against the sign; the level of the sign goes with that of the estimate."""
    cells = sorted((random_genotype(s) for s in range(48)), key=lambda g: estimate_accuracy(g)[0])
    searches = []
    for level in range(2):
        for seed in range(4):
            own = cells[24 * level + 6 * seed :][:6]
            scale = 100.0 ** (level + 1)
            pairs = [(scale * (10 - i - 7 * seed), cell) for i, cell in enumerate(own)]
            searches.append(searches_of(f"method {level}", pairs))
    study_tables.print_signs(searches)
    row = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert row[:3] == ["sign", "8", "-1.00"] and row[4:] == ["-1.00", "0 of 8"]
    # 2 / 4! of the permutations of four are as extreme, in each of the two methods
    assert float(row[3]) == pytest.approx(2 / 24**2, abs=0.005)


def test_a_constant_sign_tells_nothing(capsys):
    pairs = [(0.0, random_genotype(seed)) for seed in range(4)]
    study_tables.print_signs([searches_of("a", pairs), searches_of("a", pairs[::-1])])
    assert "| sign |" in capsys.readouterr().out.splitlines()[-2]  # the head alone
