"""Print the tables of the study in STUDY.md, from benchmarks/results.

    python -m benchmarks.study_tables [--pictures docs]

`--pictures` also draws them into a folder.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.estimate import ranks, spearman
from benchmarks.plot import scatter
from benchmarks.study import FOUND, METHODS, RESULTS
from darts_min.genotypes import genotype_of, sort_edges
from darts_min.judge.estimate import estimate_accuracy
from darts_min.judge.signs import LOOK_BACK, should_stop

BY_ALPHA = [name for name in METHODS if name not in ("random", "S2")]
T_QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36)  # 97.5 % of Student's t, from 1 degree on


def uniform_sum_tail(values: Sequence[float]) -> float:
    """Return the probability that so many uniform variables sum up to at least `sum(values)`.

    Exact, by the distribution of Irwin and Hall.
    """
    n, total = len(values), sum(map(Fraction, values))
    terms = ((-1) ** k * math.comb(n, k) * (total - k) ** n for k in range(n + 1) if k < total)
    return float(1 - sum(terms, Fraction(0)) / math.factorial(n))


def mean_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and its 95 % interval by Student's t, cut to 0 to 100."""
    n, mean = len(values), statistics.mean(values)
    if n == 1:
        return mean, 0.0, 100.0
    quantiles = dict(enumerate(T_QUANTILES, 2))
    t = quantiles.get(n, 1.96 + 2.37 / (n - 1) + 2.8 / (n - 1) ** 2)
    half = t * statistics.stdev(values) / math.sqrt(n)
    return mean, max(0.0, mean - half), min(100.0, mean + half)


def read(kind: str) -> list[dict]:
    """Read the results of searches ("method") or trainings ("cell")."""
    files = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(RESULTS.glob("*.json"))]
    results = [result for result in files if kind in result]
    for result in results:
        for part in result.get("epochs", [result]):
            part["sorted"] = sort_edges(genotype_of(part["normal"], part["reduce"]))
            part["estimate"] = estimate_accuracy(part["sorted"])
    return results


def percentiles(search: dict) -> list[float]:
    return [epoch["estimate"].percentile for epoch in search["epochs"]]


def skips_of(epoch: dict) -> str:
    """Write the skips of the normal and of the reduction cell."""
    signs = epoch["signs"]
    return f"{signs['skips in the cell/normal']} + {signs['skips in the cell/reduce']}"


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of Markdown."""
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def print_percentiles(searches: dict[str, list[dict]]) -> None:
    """Print where the last cells lie among random cells, and how it went with the epochs."""
    groups = searches | {"all by alpha": [s for name in BY_ALPHA for s in searches.get(name, [])]}
    groups = {name: group for name, group in groups.items() if group}
    rows, by_epoch, kept_best = [], [], []
    for name, group in groups.items():
        last = [percentiles(search)[-1] for search in group]
        mean, low, high = mean_and_interval(last)
        p = "-" if name == "S2" else f"{uniform_sum_tail([x / 100 for x in last]):.2g}"
        each = ", ".join(f"{x:.0f}" for x in last) if name in METHODS else ""
        skips = ", ".join(skips_of(search["epochs"][-1]) for search in group if name in METHODS)
        # An epoch in which the machine paused must not count.
        costs = [len(s["seconds"]) * statistics.median(s["seconds"]) / 60 for s in group]
        rows.append(
            [
                name,
                str(len(last)),
                each,
                skips,
                f"{mean:.0f}",
                f"{low:.0f} to {high:.0f}",
                p,
                f"{statistics.mean(costs):.0f}",
            ]
        )
        best = [max(percentiles(search)) for search in group]
        falls = [b - x for b, x in zip(best, last, strict=True)]
        counts = [len({epoch["sorted"] for epoch in search["epochs"]}) for search in group]
        # The best of m random cells has the percentile 100 u ** (1 / m), with u uniform.
        as_uniform = [(b / 100) ** m for b, m in zip(best, counts, strict=True)]
        kept_best.append(
            [
                name,
                f"{statistics.mean(best):.0f}",
                f"{max(e['estimate'].accuracy for s in group for e in s['epochs']):.2f}",
                f"{statistics.mean(falls):.0f}",
                f"{sum(fall > 20 for fall in falls)} of {len(falls)}",
                f"{statistics.mean(counts):.1f}",
                f"{statistics.mean(100 * m / (m + 1) for m in counts):.0f}",
                "-" if name == "S2" else f"{uniform_sum_tail(as_uniform):.2g}",
            ]
        )
        if name in METHODS:
            curves = zip(*(percentiles(search) for search in group), strict=True)
            by_epoch.append([name, " ".join(f"{statistics.mean(x):.0f}" for x in curves)])
    head = ["method", "searches", "percentile of the last cell, each seed", "its skips"]
    head += ["mean", "95 % interval", "p, one-sided", "minutes a search"]
    table("Last cells", head, rows)
    table("By epoch", ["method", "mean percentile after each epoch"], by_epoch)
    head = ["method", "best percentile", "highest estimate (%)", "fall to the last"]
    head += ["falls of more than 20", "different cells"]
    head += ["expected of the best of as many random cells", "p, one-sided"]
    table("The best epoch", head, kept_best)


def print_early_stopping(searches: Sequence[dict]) -> None:
    rows = []
    for search in searches:
        epochs, at = search["epochs"], percentiles(search)
        values = [epoch["signs"].get("largest eigenvalue") for epoch in epochs]
        stop = next((n for n in range(1, len(values) + 1) if should_stop(values[:n])), None)
        skips = [skips_of(epoch) for epoch in epochs]
        kept = None if stop is None else stop - 1 - LOOK_BACK
        rows.append(
            [
                str(search["seed"]),
                "never" if stop is None else str(stop),
                "-" if kept is None else f"{at[kept]:.0f} ({skips[kept]})",
                f"{at[-1]:.0f} ({skips[-1]})",
                f"{max(at):.0f}",
            ]
        )
    head = ["seed", "stops after epoch", "percentile (skips) then", "at the end", "best epoch"]
    table("S2: early stopping", head, rows)


def print_signs(searches: Sequence[dict]) -> None:
    """Correlate each sign with the estimate: over the searches of a method, over a search's epochs.

    Methods have other levels and scales of a sign, and searches, too. So ranks are taken within a
    method (its searches, each at its last epoch that has the sign) or within a search (its epochs).
    """
    rows = []
    for sign in sorted({key for s in searches for e in s["epochs"] for key in e["signs"]}):
        by_method, within = {}, []
        for search in searches:
            epochs = [e for e in search["epochs"] if e["signs"].get(sign) is not None]
            pairs = np.array([(e["signs"][sign], e["estimate"].accuracy) for e in epochs])
            if epochs:
                by_method.setdefault(search["method"], []).append(pairs[-1])
            if len(epochs) > 2 and np.ptp(pairs, axis=0).all():
                within.append(spearman(*pairs.T, permutations=1)[0])
        groups = [np.array(pairs) for pairs in by_method.values() if len(pairs) > 1]
        groups = [pairs for pairs in groups if np.ptp(pairs, axis=0).all()]
        if groups and within:
            r, p = correlation_within(groups)
            count = sum(map(len, groups))
            mean, signs = statistics.mean(within), f"{sum(x > 0 for x in within)} of {len(within)}"
            rows.append([sign, str(count), f"{r:+.2f}", f"{p:.2f}", f"{mean:+.2f}", signs])
    head = ["sign", "searches", "correlation of ranks within methods", "p"]
    head += ["mean rank correlation over the epochs of a search", "positive in"]
    table("Signs and the estimate", head, rows)


def correlation_within(
    groups: Sequence[np.ndarray], permutations: int = 10_000
) -> tuple[float, float]:
    """Correlate ranks within groups of pairs; return r and its p-value, two-sided.

    Permutations within the groups give the p-value (seed 0).
    """
    centred = [np.array([ranks(x) - (len(x) - 1) / 2 for x in pairs.T]) for pairs in groups]
    x, y = np.concatenate(centred, axis=1)
    rng = np.random.default_rng(0)
    shuffled = [rng.permuted(np.tile(b, (permutations, 1)), axis=1) @ a for a, b in centred]
    as_extreme = (np.abs(sum(shuffled)) >= abs(x @ y) - 1e-9).sum()
    return x @ y / math.sqrt((x @ x) * (y @ y)), (as_extreme + 1) / (permutations + 1)


def print_trainings(trainings: Sequence[dict]) -> None:
    rows = []
    trainings = sorted(trainings, key=lambda t: -t["test_accuracy"][-1])
    for result in trainings:
        accuracy, estimate = result["test_accuracy"], result["estimate"]
        result["early"] = accuracy[len(accuracy) // 3 - 1]
        rows.append(
            [
                result["cell"],
                f"{estimate.accuracy:.2f} ± {estimate.std:.2f}",
                f"{estimate.percentile:.1f}",
                f"{result['parameters_M']:.3f}",
                f"{100 * result['early']:.2f}",
                f"{100 * accuracy[-1]:.2f}",
                f"{100 * (accuracy[-1] - accuracy[-1 - len(accuracy) // 5]):+.2f}",
            ]
        )
    head = [
        "cell",
        "estimate (%)",
        "percentile",
        "parameters (M)",
        "after a third of the epochs (%)",
    ]
    table("Trainings", [*head, "test accuracy (%)", "gain in the last fifth"], rows)
    columns = {
        "estimate": [t["estimate"].accuracy for t in trainings],
        "parameters": [t["parameters_M"] for t in trainings],
        "accuracy after a third": [t["early"] for t in trainings],
    }
    final = np.array([t["test_accuracy"][-1] for t in trainings])
    for what, values in columns.items():
        rho, p = spearman(np.array(values), final)
        print(f"\n{what} against test accuracy, {len(final)} cells: rho {rho:+.2f}, p {p:.3f}")


def draw_searches(searches: dict[str, list[dict]]) -> Image.Image:
    """Draw the best and the last percentile of each search, in a row for each method."""
    rows = dict(enumerate(reversed(searches)))
    groups, lines = {"best epoch": [], "last epoch": []}, []
    for y, name in rows.items():
        for i, search in enumerate(searches[name]):
            height = y + 0.15 * (i - (len(searches[name]) - 1) / 2)
            at = percentiles(search)
            line = [(max(at), height), (at[-1], height)]
            lines.append(line)
            for group, point in zip(groups.values(), line, strict=True):
                group.append(point)
    return scatter(
        groups,
        "The cells of each search among random cells",
        "percentile of the estimate",
        "method",
        range(0, 101, 20),
        {-0.5: "", **rows, len(rows) - 0.5: ""},
        lines,
    )


def draw_trainings(trainings: Sequence[dict]) -> Image.Image:
    """Draw test accuracy over estimate."""
    kinds = {"random": [], "published": [], "found here": []}
    for result in trainings:
        point = result["estimate"].accuracy, 100 * result["test_accuracy"][-1]
        cell = result["cell"]
        kind = "random" if ":" in cell else "found here" if cell in FOUND else "published"
        kinds[kind].append(point)
    x, y = zip(*(point for points in kinds.values() for point in points), strict=True)
    return scatter(
        kinds,
        "Estimate and test accuracy of trained cells",
        "estimate (%)",
        "test accuracy (%)",
        np.arange(math.floor(2 * min(x)) / 2, max(x) + 0.5, 0.5),
        {tick: str(tick) for tick in range(math.floor(min(y)), math.ceil(max(y)) + 1)},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, help="draw the pictures into this folder")
    args = parser.parse_args()
    searches, trainings = {}, read("cell")
    for result in read("method"):
        searches.setdefault(result["method"], []).append(result)
    searches = {name: searches[name] for name in METHODS if name in searches}
    print_percentiles(searches)
    print_early_stopping(searches.get("S2", []))
    print_signs([search for name in BY_ALPHA for search in searches.get(name, [])])
    if trainings:
        print_trainings(trainings)
    if args.pictures:
        draw_searches(searches).save(args.pictures / "study_searches.png")
        if trainings:
            draw_trainings(trainings).save(args.pictures / "study_trainings.png")


if __name__ == "__main__":
    main()
