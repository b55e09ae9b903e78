"""Fit darts_min/judge/estimate.json, and check it: how far off, how sure, and is it right?

    python -m benchmarks.estimate --data nasbench301_cells.json [--out FILE]
    python -m benchmarks.estimate --published [--picture FILE]

`--data` holds cells and the accuracy that NAS-Bench-301 predicts: `{"cells": [{"normal": [[op,
predecessor], ...], "reduce": [...], "val_accuracy": %}, ...]}`. Several forms of regression are
compared by repeated cross-validation; the one to ship has the fewest features among those within
one standard error of the best. A minute on one core, the same figures every time.
`--published` compares estimates with the errors that papers report (published_cells.json).
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.plot import scatter
from darts_min.genotypes import PUBLISHED, Genotype, genotype_of, random_genotype
from darts_min.judge.cost import count_parameters
from darts_min.judge.estimate import (
    COEFFICIENTS,
    KINDS,
    NUM_PATH_SUMS,
    OPS,
    bend,
    estimate_accuracy,
    path_sums,
    raw_features,
    source_counts,
)
from darts_min.network import Network

FOLDS, REPEATS = 10, 5
NUM_RANDOM = 20_000
TAIL = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
PERCENTILES = [*TAIL, *range(1, 100), *(100 - p for p in reversed(TAIL))]
CONCAT = (2, 3, 4, 5)

Basis = Callable[[np.ndarray], Callable[[np.ndarray], np.ndarray]]


# ---- Forms: features of a cell, and a basis that adds functions of them ----


def parameters(genotype: Genotype) -> list[float]:
    """Count the parameters of NAS-Bench-301's network, in millions."""
    with torch.device("meta"):
        return [count_parameters(Network(genotype, 10, 32, 8, auxiliary=False)) / 1e6]


def op_counts(genotype: Genotype) -> list[float]:
    """Count each operation in each cell."""
    cells = genotype.normal, genotype.reduce
    return [sum(op == name for op, _ in cell) for cell in cells for name in OPS]


def sources(genotype: Genotype) -> list[float]:
    return [*source_counts(genotype.normal), *source_counts(genotype.reduce)]


def edges(genotype: Genotype) -> list[float]:
    """Say of each cell, node, predecessor and operation whether it is there."""
    found = {
        (kind, 2 + i // 2, j, op)
        for kind in ("normal", "reduce")
        for i, (op, j) in enumerate(getattr(genotype, kind))
    }
    return [
        float((kind, node, j, op) in found)
        for kind in ("normal", "reduce")
        for node in range(2, 6)
        for j in range(node)
        for op in OPS
    ]


def steps(genotype: Genotype) -> list[float]:
    """Count, in the normal cell, each kind of operation that follows each kind at a node."""
    counts, cell = np.zeros((4, 4)), genotype.normal
    for op, j in cell:
        for before, _ in cell[2 * j - 4 : 2 * j - 2] if j >= 2 else ():
            counts[KINDS[before], KINDS[op]] += 1
    return list(counts.ravel())


def paths(genotype: Genotype) -> list[float]:
    return path_sums(genotype.normal)


def reduction_paths(genotype: Genotype) -> list[float]:
    return path_sums(genotype.reduce)


def no_basis(linear: np.ndarray) -> Callable:
    return lambda x: np.empty((len(x), 0))


def products(number: int, groups: int = 1) -> Basis:
    """Multiply the last `number` columns with each other and themselves, and groups before them."""
    first, second = np.triu_indices(number)

    def basis(linear: np.ndarray) -> Callable:
        starts = [-number * (group + 1) for group in range(groups)]
        return lambda x: np.hstack([x[:, first + start] * x[:, second + start] for start in starts])

    return basis


def gaussian_process(number: int, num_inducing: int, width: float = 3) -> Basis:
    """Put a squared-exponential process on the last `number` columns (subset of regressors).

    The inducing cells are spread over the data: each is the farthest from those before it.
    """

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        distances = ((a[:, None] - b) ** 2).mean(axis=2)
        return np.exp(-distances / (2 * width**2))

    def basis(linear: np.ndarray) -> Callable:
        x = linear[:, -number:]
        chosen, distance = [], ((x - x.mean(axis=0)) ** 2).sum(axis=1)
        for _ in range(num_inducing):
            chosen.append(int(distance.argmax()))
            distance = np.minimum(distance, ((x - x[chosen[-1]]) ** 2).sum(axis=1))
        inducing = x[chosen]
        factor = np.linalg.cholesky(kernel(inducing, inducing) + 1e-6 * np.eye(num_inducing))
        whiten = np.linalg.inv(factor).T
        return lambda x: kernel(x[:, -number:], inducing) @ whiten

    return basis


FORMS = {
    "parameters": ([parameters], no_basis),
    "counts of operations": ([op_counts], no_basis),
    "counts, their products": ([op_counts], products(14)),
    "edges (one-hot)": ([edges], no_basis),
    "edges, products of counts": ([edges, op_counts], products(14)),
    "sources": ([sources], no_basis),
    "sources, steps": ([sources, steps], no_basis),
    "sources, paths": ([sources, reduction_paths, paths], no_basis),
    "sources, normal paths, their products": ([sources, paths], products(7)),
    "sources, paths, normal products": ([sources, reduction_paths, paths], products(7)),
    "  with steps": ([sources, steps, reduction_paths, paths], products(7)),
    "sources, paths, products in each cell": ([sources, reduction_paths, paths], products(7, 2)),
    "sources, paths, all products": ([sources, reduction_paths, paths], products(14)),
    "sources, paths, process of 20 cells": (
        [sources, reduction_paths, paths],
        gaussian_process(7, 20),
    ),
    "sources, paths, process of 60 cells": (
        [sources, reduction_paths, paths],
        gaussian_process(7, 60),
    ),
}
SHIPPED = "sources, paths, normal products"


# ---- Bayesian ridge regression ----


def fit(raw: np.ndarray, y: np.ndarray, basis: Basis) -> dict:
    """Fit log(100 - y) = intercept + weights * phi + noise; phi: standardised features and basis.

    Prior: weights ~ N(0, s^2 / decay), those of the basis `ratio` times that variance; decay,
    ratio and the noise's deviation s maximise the evidence.
    """
    mean, scale = moments(raw)
    linear = (raw - mean) / scale
    extend = basis(linear)
    extra = extend(linear)
    extra_mean, extra_scale = moments(extra)
    phi = np.hstack([linear, (extra - extra_mean) / extra_scale])
    target = np.log(100 - y)
    residual, best = target - target.mean(), None
    for ratio in (0.01, 0.03, 0.1, 0.3, 1) if extra.shape[1] else (1,):
        prior = np.ones(phi.shape[1])
        prior[raw.shape[1] :] = np.sqrt(ratio)
        gram = (phi * prior).T @ (phi * prior)
        eigenvalues, vectors = np.linalg.eigh(gram)
        eigenvalues = eigenvalues.clip(0)
        projected = vectors.T @ ((phi * prior).T @ residual)
        for decay in np.geomspace(0.3, 1000, 15):
            shrunk = projected / (eigenvalues + decay)
            variance = (residual @ residual - projected @ shrunk) / len(y)
            evidence = -len(y) * np.log(variance) - np.log1p(eigenvalues / decay).sum()
            if best is None or evidence > best[0]:
                best = evidence, prior, decay, prior * (vectors @ shrunk), np.sqrt(variance), gram
    _, prior, decay, weights, noise, gram = best
    root = np.linalg.inv(np.linalg.cholesky(gram + decay * np.eye(len(gram))))
    return {
        "mean": np.concatenate([mean, extra_mean]),
        "scale": np.concatenate([scale, extra_scale]),
        "intercept": target.mean(),
        "weights": weights,
        "noise": noise,
        "root": noise * root * prior,  # the weights' covariance is root^T root
        "extend": extend,
    }


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = x.std(axis=0)
    return x.mean(axis=0), np.where(scale < 1e-9, 1, scale)


def predict(model: dict, raw: np.ndarray) -> np.ndarray:
    """Return (4, cells), in %: accuracy; its error's parts: noise, spread of the weights, bend."""
    n = raw.shape[1]
    linear = (raw - model["mean"][:n]) / model["scale"][:n]
    extra = (model["extend"](linear) - model["mean"][n:]) / model["scale"][n:]
    phi = np.hstack([linear, extra])
    deviation = phi @ model["weights"]
    error = np.exp(model["intercept"] + deviation)
    spread = np.sqrt(((phi @ model["root"].T) ** 2).sum(axis=1))
    parts = error * model["noise"], error * spread, bend(model["intercept"], deviation)
    return np.stack([100 - error, *parts])


# ---- Cross-validation ----


def kendall_tau(a: np.ndarray, b: np.ndarray) -> float:
    """Return Kendall's tau-a: concordant minus discordant pairs, of all pairs."""
    signs = np.sign(a[:, None] - a) * np.sign(b[:, None] - b)
    return signs.sum() / (len(a) * (len(a) - 1))


def cross_validate(raw: np.ndarray, y: np.ndarray, basis: Basis) -> tuple[np.ndarray, np.ndarray]:
    """Predict each cell from the other folds; return (4, REPEATS, cells) and rms by fold."""
    predictions, fold_rms = np.empty((4, REPEATS, len(y))), np.empty((REPEATS, FOLDS))
    for repeat in range(REPEATS):
        order = np.random.default_rng(repeat).permutation(len(y))
        for fold in range(FOLDS):
            test, train = order[fold::FOLDS], np.delete(order, np.s_[fold::FOLDS])
            predictions[:, repeat, test] = predict(fit(raw[train], y[train], basis), raw[test])
            error = predictions[0, repeat, test] - y[test]
            fold_rms[repeat, fold] = np.sqrt((error**2).mean())
    return predictions, fold_rms


def calibrate(predictions: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return factors of noise and spread that make the held-out errors most likely.

    No regression has exactly the right features, so that an unusual cell is further off than the
    weights' covariance says: the factor of the spread comes out larger than that of the noise.
    """
    accuracy, noise, spread, bent = (part.ravel() for part in predictions)
    squares = (accuracy - np.tile(y, REPEATS)) ** 2
    best = None
    for a in np.geomspace(0.25, 1.5, 61):
        for b in np.geomspace(0.5, 10, 61):
            variance = (a * noise) ** 2 + (b * spread) ** 2 + bent**2
            cost = (np.log(variance) + squares / variance).sum()
            if best is None or cost < best[0]:
                best = cost, a, b
    return best[1:]


def standard_error(predictions: np.ndarray, factors: tuple[float, float]) -> np.ndarray:
    _, noise, spread, bent = predictions
    return np.sqrt((factors[0] * noise) ** 2 + (factors[1] * spread) ** 2 + bent**2)


def summarise(predictions: np.ndarray, fold_rms: np.ndarray, y: np.ndarray) -> dict:
    """Return means over repeats and their standard errors, and each prediction's standard error."""
    factors = calibrate(predictions, y)
    std = standard_error(predictions, factors)
    errors = predictions[0] - y
    by_repeat = {
        "r2": 1 - (errors**2).mean(axis=1) / y.var(),
        "tau": np.array([kendall_tau(row, y) for row in predictions[0]]),
        "rms": np.sqrt((errors**2).mean(axis=1)),
        "covered": 100 * (np.abs(errors) < 1.65 * std).mean(axis=1),
    }
    summary = {
        key: (values.mean(), values.std(ddof=1) / np.sqrt(REPEATS))
        for key, values in by_repeat.items()
    }
    rms_error = (fold_rms.std(axis=1, ddof=1) / np.sqrt(FOLDS)).mean()
    return summary | {"factors": factors, "std": std, "errors": errors, "rms_error": rms_error}


def print_deciles(summary: dict) -> None:
    """Print, by decile of the standard error, what it says and what the errors were."""
    std, errors = summary["std"].ravel(), np.abs(summary["errors"].ravel())
    print("\ndecile of std   std, mean %   error, rms %   within 1.65 std")
    for i, part in enumerate(np.array_split(np.argsort(std), 10)):
        rms, covered = np.sqrt((errors[part] ** 2).mean()), (errors < 1.65 * std)[part].mean()
        print(f"{i + 1:13d}   {std[part].mean():11.3f}   {rms:12.3f}   {100 * covered:13.1f} %")


def print_extrapolation(genotypes: list[Genotype], y: np.ndarray, factors: tuple) -> None:
    """Fit to the 60 % of cells with the least of something, and test on the 10 % with the most."""
    raw = np.array([raw_features(g) for g in genotypes], dtype=float)
    normal = np.array([op_counts(g)[: len(OPS)] for g in genotypes])
    ops = dict(zip(OPS, normal.T, strict=True))
    amounts = {
        "skips": ops["skip_connect"],
        "pools": ops["max_pool_3x3"] + ops["avg_pool_3x3"],
        "separable convolutions": ops["sep_conv_3x3"] + ops["sep_conv_5x5"],
        "dilated convolutions": ops["dil_conv_3x3"] + ops["dil_conv_5x5"],
        "paths": raw[:, -NUM_PATH_SUMS],
    }
    print("\nmost of, normal cell     cells   std, mean %   error, rms %   within 1.65 std")
    for name, amount in amounts.items():
        least = amount <= np.quantile(amount, 0.6)
        most = amount > np.maximum(np.quantile(amount, 0.9), amount[least].max())
        model = fit(raw[least], y[least], products(NUM_PATH_SUMS))
        predictions = predict(model, raw[most])
        std, errors = standard_error(predictions, factors), predictions[0] - y[most]
        rms, covered = np.sqrt((errors**2).mean()), (np.abs(errors) < 1.65 * std).mean()
        print(
            f"{name:22} {most.sum():7d}   {std.mean():11.3f}   {rms:12.3f}   "
            f"{100 * covered:13.1f} %"
        )


def read_cells(path: Path) -> tuple[list[Genotype], np.ndarray]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    genotypes = [
        Genotype(tuple(map(tuple, c["normal"])), CONCAT, tuple(map(tuple, c["reduce"])), CONCAT)
        for c in cells
    ]
    return genotypes, np.array([c["val_accuracy"] for c in cells])


def compare_forms(genotypes: list[Genotype], y: np.ndarray) -> tuple[float, float]:
    """Print the table of forms; return the calibration of the one that is shipped."""
    print(f"{len(y)} cells, {FOLDS}-fold cross-validation, {REPEATS} repeats (± over repeats)")
    print(
        f"{'form':38} features  R^2              Kendall's tau    rms %            ± over folds"
        "  within 1.65 std"
    )
    results = {}
    for name, (features, basis) in FORMS.items():
        raw = np.array([[x for f in features for x in f(g)] for g in genotypes], dtype=float)
        size = len(fit(raw, y, basis)["weights"])
        summary = summarise(*cross_validate(raw, y, basis), y)
        results[name] = size, summary
        figures = (f"{a:.4f} ± {b:.4f}" for a, b in (summary[k] for k in ("r2", "tau", "rms")))
        covered = f"{summary['covered'][0]:.1f} ± {summary['covered'][1]:.1f} %"
        print(f"{name:38} {size:8d}  {'  '.join(figures)}  {summary['rms_error']:12.4f}  {covered}")
    best = min((summary for _, summary in results.values()), key=lambda s: s["rms"][0])
    limit = best["rms"][0] + best["rms_error"]
    within = [name for name, (_, summary) in results.items() if summary["rms"][0] <= limit]
    simplest = min(within, key=lambda name: results[name][0])
    print(f"\nwithin one standard error of the best, rms <= {limit:.4f}: {'; '.join(within)}")
    print(f"fewest features of these: {simplest}; shipped: {SHIPPED}")
    print_deciles(results[SHIPPED][1])
    return results[SHIPPED][1]["factors"]


def write_coefficients(
    genotypes: list[Genotype], y: np.ndarray, factors: tuple[float, float], out: Path
) -> None:
    """Fit the shipped form to all cells, and write it with the quantiles of random cells."""
    raw = np.array([raw_features(g) for g in genotypes], dtype=float)
    model = fit(raw, y, products(NUM_PATH_SUMS))
    drawn = np.array([raw_features(random_genotype(seed)) for seed in range(NUM_RANDOM)])
    estimates = predict(model, drawn)[0]
    arrays = {
        "mean": model["mean"],
        "scale": model["scale"],
        "weights": model["weights"],
        "root": factors[1] * model["root"][np.tril_indices(len(model["weights"]))],
        "percentiles": np.array(PERCENTILES),
        "quantiles": np.percentile(estimates, PERCENTILES),
    }
    fields = {
        "source": f"benchmarks/estimate.py, {len(y)} cells of NAS-Bench-301's surrogate",
        "intercept": round(float(model["intercept"]), 7),
        "noise": round(float(factors[0] * model["noise"]), 7),
    }
    fields |= {key: [float(f"{x:.6g}") for x in values] for key, values in arrays.items()}
    rows = (f'"{key}": {json.dumps(value)}' for key, value in fields.items())
    out.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    print(f"\n{out.name}: {out.stat().st_size / 1000:.0f} KB")


# ---- Published cells ----


def ranks(x: np.ndarray) -> np.ndarray:
    """Return ranks from 0; equal values share their mean rank."""
    return (x[:, None] > x).sum(axis=1) + ((x[:, None] == x).sum(axis=1) - 1) / 2


def spearman(a: np.ndarray, b: np.ndarray, permutations: int = 100_000) -> tuple[float, float]:
    """Return Spearman's rho and its two-sided p-value by random permutations (seed 0)."""
    a, b = (r - r.mean() for r in (ranks(a), ranks(b)))
    norm = np.sqrt((a @ a) * (b @ b))
    rng = np.random.default_rng(0)
    shuffled = rng.permuted(np.tile(b, (permutations, 1)), axis=1) @ a
    as_extreme = (np.abs(shuffled) >= abs(a @ b) - 1e-9).sum()
    return a @ b / norm, (as_extreme + 1) / (permutations + 1)


def read_published() -> list[dict]:
    """Read published_cells.json; `genotype` is that of the name, or parsed from short names."""
    path = Path(__file__).with_name("published_cells.json")
    rows = json.loads(path.read_text(encoding="utf-8"))
    for row in rows:
        if row["name"] in PUBLISHED:
            row["genotype"] = PUBLISHED[row["name"]]
        else:
            row["genotype"] = genotype_of(row["normal"], row["reduce"])
    return rows


def print_published() -> list[dict]:
    """Print estimates beside published errors, and their rank correlation in each group.

    Returns the rows, with estimates.
    """
    rows = read_published()
    print("cell                 error %  parameters M  estimate %   std  percentile  source")
    for row in rows:
        row["estimate"] = estimate_accuracy(row["genotype"])
        e = row["estimate"]
        print(
            f"{row['name']:20} {row['error']:7.2f}  {row['parameters']:12.2f}  {e.accuracy:10.2f}"
            f"  {e.std:.2f}  {e.percentile:10.2f}  {row['source']}"
        )
    rows = [row for row in rows if row["group"] != "other"]  # the error is not this cell's
    for group in ("methods", "SGAS", "all"):
        part = [row for row in rows if group in (row["group"], "all")]
        errors = np.array([row["error"] for row in part])
        for what, values in (
            ("estimate", [row["estimate"].accuracy for row in part]),
            ("parameters", [row["parameters"] for row in part]),
        ):
            rho, p = spearman(np.array(values), errors)
            print(f"{group}, {len(part)} cells: {what} against error, rho {rho:+.2f}, p {p:.3f}")
    return rows


def draw_published(rows: list[dict]) -> Image.Image:
    """Draw published error over estimate."""
    groups = {"a paper's only cell": "methods", "SGAS, ten searches of two kinds": "SGAS"}
    points = {
        name: [(r["estimate"].accuracy, r["error"]) for r in rows if r["group"] == group]
        for name, group in groups.items()
    }
    errors = {error: f"{error:.1f}" for error in (2.2, 2.4, 2.6, 2.8, 3.0, 3.2)}
    title = "Published errors of the cells that papers found"
    accuracies = (93.4, 93.6, 93.8, 94.0, 94.2, 94.4, 94.6, 94.8)
    return scatter(points, title, "estimate (%)", "test error (%)", accuracies, errors)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="cells with predicted accuracies, JSON")
    parser.add_argument("--out", type=Path, default=COEFFICIENTS, help="coefficients to write")
    parser.add_argument("--published", action="store_true", help="compare with published errors")
    parser.add_argument("--picture", type=Path, help="draw the published cells into this file")
    args = parser.parse_args(argv)
    if args.data is None and not args.published:
        parser.error("nothing to do: --data FILE or --published")
    if args.data:
        genotypes, y = read_cells(args.data)
        factors = compare_forms(genotypes, y)
        print_extrapolation(genotypes, y, factors)
        write_coefficients(genotypes, y, factors, args.out)
    if args.published:
        rows = print_published()
        if args.picture:
            draw_published(rows).save(args.picture)


if __name__ == "__main__":
    main()
