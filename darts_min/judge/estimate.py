"""How good a cell is expected to be, in a fraction of a millisecond and without training.

A linear regression of the logarithm of the error on 84 features, fitted to what the surrogate of
NAS-Bench-301 (arXiv 2008.09777) predicts for 1,014 random cells of the DARTS space: the accuracy on
CIFAR-10 of a network of 32 channels and 8 cells after 100 epochs. `python -m benchmarks.estimate`
fits and checks it.
"""

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from darts_min.genotypes import PRIMITIVES, Genotype

OPS = PRIMITIVES[1:]
POOL, SKIP, SEPARABLE, DILATED = range(4)
KINDS = dict(zip(OPS, (POOL, POOL, SKIP, SEPARABLE, SEPARABLE, DILATED, DILATED), strict=True))
COEFFICIENTS = Path(__file__).with_suffix(".json")

Cell = Sequence[tuple[str, int]]


class Estimate(NamedTuple):
    """What a cell is expected to be worth.

    `accuracy` and its standard error `std` are in %; `percentile` is the share of random cells
    with a lower estimate (0 to 100).
    """

    accuracy: float
    std: float
    percentile: float


def estimate_accuracy(genotype: Genotype) -> Estimate | None:
    """Estimate the accuracy that NAS-Bench-301 predicts; None outside the DARTS space.

    The space: four nodes, each with two different predecessors; every operation but `none`; the
    output concatenates all nodes. `std` is the error to expect for this cell against
    NAS-Bench-301, larger where few of the fitted cells are like it. Isomorphic cells have equal
    estimates: the order of a node's edges, and of the nodes, does not matter.
    """
    if not is_in_space(genotype):
        return None
    model = load_model()
    phi = expand(np.array(raw_features(genotype)), model["mean"], model["scale"])
    deviation = float(model["weights"] @ phi)
    error = math.exp(model["intercept"] + deviation)
    relative_std = math.hypot(model["noise"], *(model["root"] @ phi))
    std = math.hypot(error * relative_std, bend(model["intercept"], deviation))
    percentile = np.interp(100 - error, model["quantiles"], model["percentiles"])
    return Estimate(100 - error, std, float(percentile))


def is_in_space(genotype: Genotype) -> bool:
    """Say whether `genotype` is one of the cells that `random_genotype` can draw."""
    for cell, concat in (genotype[:2], genotype[2:]):
        if len(cell) != 8 or sorted(concat) != [2, 3, 4, 5]:
            return False
        for i, (op, predecessor) in enumerate(cell):
            if op not in OPS or predecessor not in range(2 + i // 2):
                return False
        if any(cell[i][1] == cell[i + 1][1] for i in range(0, 8, 2)):
            return False
    return True


def raw_features(genotype: Genotype) -> list[float]:
    """Return 21 source counts of each cell, and 7 path sums: those of the normal cell are last."""
    normal, reduce = genotype.normal, genotype.reduce
    return [
        *source_counts(normal),
        *source_counts(reduce),
        *path_sums(reduce),
        *path_sums(normal),
    ]


def source_counts(cell: Cell) -> list[int]:
    """Count each operation by where it starts: input 0, input 1 or a node."""
    counts = [0] * 3 * len(OPS)
    for op, predecessor in cell:
        counts[3 * OPS.index(op) + min(predecessor, 2)] += 1
    return counts


def path_sums(cell: Cell) -> list[float]:
    """Describe the paths from the inputs to each node by seven numbers; add them up over the nodes.

    They are: how many paths there are; how many of them are skips alone; the most pools on one of
    them; and on a random path (backwards, each node takes either edge with probability 1/2) the
    probability that it starts at input 0, and the mean number of skips, of separable and of dilated
    convolutions.
    """
    states = [(1, 1, 0, 1, 0, 0, 0), (1, 1, 0, 0, 0, 0, 0)]
    for i in range(0, len(cell), 2):
        (kind_a, a), (kind_b, b) = ((KINDS[op], states[j]) for op, j in cell[i : i + 2])
        states.append(
            (
                a[0] + b[0],
                (kind_a == SKIP) * a[1] + (kind_b == SKIP) * b[1],
                max((kind_a == POOL) + a[2], (kind_b == POOL) + b[2]),
                (a[3] + b[3]) / 2,
                *(
                    (a[3 + kind] + b[3 + kind] + (kind_a == kind) + (kind_b == kind)) / 2
                    for kind in (SKIP, SEPARABLE, DILATED)
                ),
            )
        )
    return [sum(values) for values in zip(*states[2:], strict=True)]


NUM_PATH_SUMS = 7
PAIRS = np.triu_indices(NUM_PATH_SUMS)


def expand(raw: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Standardise `raw` (56), and append the products of the normal cell's path sums (28)."""
    n = len(raw)
    linear = (raw - mean[:n]) / scale[:n]
    paths = linear[-NUM_PATH_SUMS:]
    products = (paths[PAIRS[0]] * paths[PAIRS[1]] - mean[n:]) / scale[n:]
    return np.concatenate([linear, products])


def bend(intercept: float, deviation: float | np.ndarray) -> float | np.ndarray:
    """Return half the difference, in %, to what a regression of the error itself would say.

    The data cannot tell whether the features act on the error or on its logarithm: the two agree
    near the mean of the fitted cells, and part beyond the best and the worst of them.
    """
    return math.exp(intercept) * (np.exp(deviation) - 1 - deviation) / 2


@lru_cache(maxsize=1)
def load_model() -> dict:
    """Read the coefficients, once; `root` is a square root of the weights' covariance."""
    model = json.loads(COEFFICIENTS.read_text(encoding="utf-8"))
    size = len(model["weights"])
    root = np.zeros((size, size))
    root[np.tril_indices(size)] = model["root"]
    arrays = {key: np.array(value) for key, value in model.items() if isinstance(value, list)}
    return model | arrays | {"root": root}
