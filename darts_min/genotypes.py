"""Genotypes: the discrete cells of DARTS, and how a search chooses them (Sec. 2.4).

A cell (Sec. 2.1) has two input states, 0 and 1, and intermediate nodes, which become the states
2, 3, ... A discrete node is the sum of two operations, each on an earlier state. The cell's output
is the concatenation of its nodes. convert/genotype_texts.py reads and writes genotypes as text.
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from .operations import OPS

PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)


class Genotype(NamedTuple):
    """A normal and a reduction cell: `(op, predecessor)` twice per node, in node order."""

    normal: tuple[tuple[str, int], ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[tuple[str, int], ...]
    reduce_concat: tuple[int, ...]


# The tables below and in spaces.py use these names.
SHORT_NAMES = {
    "max": "max_pool_3x3",
    "avg": "avg_pool_3x3",
    "skip": "skip_connect",
    "sep3": "sep_conv_3x3",
    "sep5": "sep_conv_5x5",
    "dil3": "dil_conv_3x3",
    "dil5": "dil_conv_5x5",
}


def genotype_of(normal: str, reduce: str) -> Genotype:
    """Build a genotype of four nodes from cells in short names, such as `sep3-0 skip-1 ...`."""
    cells = [
        tuple((SHORT_NAMES[op], int(j)) for op, j in (edge.split("-") for edge in cell.split()))
        for cell in (normal, reduce)
    ]
    concat = (2, 3, 4, 5)
    return Genotype(cells[0], concat, cells[1], concat)


PUBLISHED = {
    # The paper's cells of first and second order, as the original code published them.
    "DARTS_V1": genotype_of(
        "sep3-1 sep3-0 skip-0 sep3-1 skip-0 sep3-1 sep3-0 skip-2",
        "max-0 max-1 skip-2 max-0 max-0 skip-2 skip-2 avg-0",
    ),
    "DARTS_V2": genotype_of(
        "sep3-0 sep3-1 sep3-0 sep3-1 sep3-1 skip-0 skip-0 dil3-2",
        "max-0 max-1 skip-2 max-1 max-0 skip-2 skip-2 max-1",
    ),
    # The cells of NNI 3.0's tutorial. Its plain recipe trains the first one to 89.69 %, its full
    # recipe the second one to 97.12 % (last epoch).
    "NNI_PLAIN": genotype_of(
        "sep3-1 sep3-0 sep3-1 sep3-2 sep3-1 sep3-0 sep3-1 max-0",
        "sep3-0 sep3-1 dil5-2 sep3-0 dil5-2 sep5-1 sep5-4 dil5-2",
    ),
    "NNI_FULL": genotype_of(
        "sep3-0 sep3-1 sep3-1 skip-0 sep3-0 max-1 sep3-0 sep3-1",
        "max-0 sep5-1 dil5-0 max-1 max-0 sep3-2 max-0 skip-2",
    ),
    # Later methods; docs/weights.md has their sources, errors and parameters.
    "P_DARTS": genotype_of(
        "skip-0 dil3-1 skip-0 sep3-1 sep3-1 sep3-3 sep3-0 dil5-4",
        "avg-0 sep5-1 sep3-0 dil5-2 max-0 dil3-1 dil3-1 dil5-3",
    ),
    "PC_DARTS": genotype_of(
        "sep3-1 skip-0 sep3-0 dil3-1 sep5-0 sep3-1 avg-0 dil3-1",
        "sep5-1 max-0 sep5-1 sep5-2 sep3-0 sep3-3 sep3-1 sep3-2",
    ),
    "PC_DARTS_IMAGENET": genotype_of(
        "skip-1 sep3-0 sep3-0 skip-1 sep3-1 sep3-3 sep3-1 dil5-4",
        "sep3-0 skip-1 dil5-2 max-1 sep3-2 sep3-1 sep5-0 sep3-3",
    ),
    "GDAS": genotype_of(
        "skip-0 skip-1 skip-0 sep5-2 sep3-3 skip-0 sep5-4 sep3-3",
        "sep5-0 sep3-1 sep5-2 sep5-1 dil5-2 sep3-1 sep5-0 sep5-1",
    ),
    "SNAS": genotype_of(
        "sep3-0 sep3-1 skip-0 dil3-1 skip-1 skip-0 skip-0 sep3-1",
        "max-0 max-1 max-1 skip-2 skip-2 max-1 max-0 dil5-2",
    ),
    "DRNAS": genotype_of(
        "sep3-0 sep5-1 sep3-1 sep3-2 skip-0 sep3-1 sep3-2 dil5-3",
        "max-0 sep5-1 dil5-2 sep5-1 sep5-1 dil5-3 skip-4 sep5-1",
    ),
    "SGAS": genotype_of(
        "sep3-0 dil3-1 sep3-0 sep3-1 sep5-1 sep5-3 skip-0 dil5-2",
        "max-0 dil5-1 sep3-0 skip-2 sep3-1 skip-2 max-0 max-1",
    ),
    "ISTA_NAS": genotype_of(
        "skip-0 dil3-1 sep3-1 dil5-2 avg-3 sep3-1 sep5-1 sep3-2",
        "avg-0 max-1 skip-0 max-1 sep5-1 avg-0 max-0 dil5-2",
    ),
    "DARTS_PT": genotype_of(
        "sep3-0 sep3-1 sep5-0 dil3-1 skip-0 skip-2 skip-0 max-4",
        "sep3-0 avg-1 dil5-1 dil3-2 avg-0 max-2 sep3-2 skip-4",
    ),
    "FAIR_DARTS": genotype_of(
        "sep3-0 sep5-1 dil3-1 max-0 dil3-0 dil3-1 sep3-0 dil5-1",
        "max-0 sep5-1 avg-0 dil5-2 dil3-3 avg-0 avg-0 skip-3",
    ),
    "SDARTS_ADV": genotype_of(
        "sep3-0 sep3-1 sep3-1 skip-0 sep5-0 dil3-3 dil3-4 skip-0",
        "max-0 sep5-1 skip-2 max-0 skip-3 skip-2 skip-2 sep5-4",
    ),
}


def random_genotype(seed: int, num_nodes: int = 4) -> Genotype:
    """Draw a genotype uniformly over the space: the baseline of arXiv 1902.07638 and 1902.08142.

    Every node gets two different predecessors; each pair of them is equally likely. Each edge gets
    an operation other than `none`. Raises ValueError on a negative seed.
    """
    if seed < 0:
        raise ValueError(f"seed {seed}: must be at least 0")
    rng = random.Random(seed)

    def cell() -> tuple[tuple[str, int], ...]:
        pairs = [sorted(rng.sample(range(node), 2)) for node in range(2, 2 + num_nodes)]
        return tuple((rng.choice(PRIMITIVES[1:]), j) for pair in pairs for j in pair)

    concat = tuple(range(2, 2 + num_nodes))
    return Genotype(cell(), concat, cell(), concat)


def sort_edges(genotype: Genotype) -> Genotype:
    """Order the two edges of each node by predecessor, so that equal cells are equal genotypes."""

    def in_order(cell: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
        pairs = (sorted(cell[i : i + 2], key=lambda edge: edge[1]) for i in range(0, len(cell), 2))
        return tuple(edge for pair in pairs for edge in pair)

    return genotype._replace(normal=in_order(genotype.normal), reduce=in_order(genotype.reduce))


def kept_edges(cell: Sequence[tuple[str, int]]) -> list[int]:
    """Return, for each edge of a discrete cell, its row in alpha; rows are in edge order.

    Edge order is (node, predecessor): 0 -> 2, 1 -> 2, 0 -> 3, 1 -> 3, 2 -> 3, ...
    """
    nodes = (i // 2 for i in range(len(cell)))
    return [node * (node + 3) // 2 + j for node, (_, j) in zip(nodes, cell, strict=True)]


def choose_cell(
    scores: Sequence[Sequence[float]], primitives: Sequence[str], ties: str = "first"
) -> tuple[tuple[str, int], ...]:
    """Keep two edges per node and one operation per edge (Sec. 2.4).

    `scores` is (edges, ops), in edge order. The score of an edge is that of its best operation
    other than `none`. A node keeps its two best edges, in descending order. Among equal scores,
    `ties="first"` (the original code) prefers the lower predecessor and the earlier primitive, and
    `ties="last"` (NNI) the larger predecessor and the later name.
    """
    cell, start = [], 0
    while start < len(scores):
        num_predecessors = 2 + len(cell) // 2
        best = []
        for predecessor, row in enumerate(scores[start : start + num_predecessors]):
            ops = [(score, op) for score, op in zip(row, primitives, strict=True) if op != "none"]
            # max() returns the first of equals.
            score, op = max(ops) if ties == "last" else max(ops, key=lambda pair: pair[0])
            best.append((score, predecessor, op))
        if ties == "last":
            best.sort(reverse=True)
        else:
            best.sort(key=lambda edge: -edge[0])  # stable
        cell += [(op, predecessor) for _, predecessor, op in best[:2]]
        start += num_predecessors
    return tuple(cell)


def choose_cell_of_few_skips(
    scores: Sequence[Sequence[float]],
    primitives: Sequence[str],
    ties: str = "first",
    max_skips: int | None = None,
) -> tuple[tuple[str, int], ...]:
    """Choose a cell with at most `max_skips` skip connections; None: no limit.

    While the cell has too many, the weakest of them is ruled out and the cell is chosen anew
    (P-DARTS, arXiv 1904.12760, Sec. 3.3). Raises ValueError if there is nothing else to choose.
    """
    scores = [list(row) for row in scores]
    while True:
        cell = choose_cell(scores, primitives, ties)
        edges = zip(kept_edges(cell), cell, strict=True)
        skips = [row for row, (op, _) in edges if op == "skip_connect"]
        if max_skips is None or len(skips) <= max_skips:
            return cell
        column = primitives.index("skip_connect")
        weakest = min(skips, key=lambda row: scores[row][column])
        if scores[weakest][column] == -math.inf:
            raise ValueError(f"max_skips {max_skips}: there are too few other operations")
        scores[weakest][column] = -math.inf


def check_genotype(genotype: Genotype) -> Genotype:
    """Return `genotype`, or raise a ValueError that names the cell, the node and the rule."""
    for kind in ("normal", "reduce"):
        cell, concat = getattr(genotype, kind), getattr(genotype, f"{kind}_concat")
        if len(cell) < 2 or len(cell) % 2:
            raise ValueError(
                f"genotype, {kind} cell: {len(cell)} edges; a cell has two per node, >= 1 node"
            )
        num_states = 2 + len(cell) // 2
        for i, edge in enumerate(cell):
            node = 2 + i // 2
            where = f"genotype, {kind} cell, node {node}"
            if not (isinstance(edge, tuple) and len(edge) == 2):
                raise ValueError(f"{where}: {edge!r} is not a pair (operation, predecessor)")
            op, predecessor = edge
            if op == "none":
                raise ValueError(f"{where}: a final cell cannot keep the operation 'none'")
            if not isinstance(op, str) or op not in OPS:
                raise ValueError(f"{where}: unknown operation {op!r}; known are {', '.join(OPS)}")
            if type(predecessor) is not int or not 0 <= predecessor < node:
                raise ValueError(f"{where}: predecessor {predecessor!r} is not in 0..{node - 1}")
        if not concat or any(type(i) is not int or not 2 <= i < num_states for i in concat):
            raise ValueError(
                f"genotype, {kind} cell: concat {concat!r} must name nodes in 2..{num_states - 1}"
            )
        if len(set(concat)) != len(concat):
            raise ValueError(f"genotype, {kind} cell: concat {concat!r} names a node twice")
    if len(genotype.normal_concat) != len(genotype.reduce_concat):
        raise ValueError("genotype: normal and reduce cells concatenate different numbers of nodes")
    return genotype


def unused_states(genotype: Genotype) -> dict[str, list[int]]:
    """Return the states that do not reach the output of their cell, by "normal" and "reduce".

    The weights of operations on the way to these states get no gradient.
    """
    unused = {}
    for kind in ("normal", "reduce"):
        cell, reached = getattr(genotype, kind), set(getattr(genotype, f"{kind}_concat"))
        num_states = 2 + len(cell) // 2
        for node in reversed(range(2, num_states)):
            if node in reached:
                edges = cell[2 * (node - 2) : 2 * (node - 1)]
                reached |= {predecessor for op, predecessor in edges if op != "noise"}
        unused[kind] = [state for state in range(num_states) if state not in reached]
    return unused


def name_unused_nodes(genotype: Genotype) -> list[str]:
    """Return a warning for each cell with nodes that do not reach its output.

    Input states that do not reach the output are no reason to warn.
    """
    lines = []
    for kind, states in unused_states(genotype).items():
        if nodes := [str(state) for state in states if state >= 2]:
            named = f"node{'s' * (len(nodes) > 1)} {', '.join(nodes)}"
            lines.append(
                f"warning: genotype, {kind} cell: the output does not depend on {named}: computed "
                "for nothing, not trained"
            )
    return lines


def reduction_cells(num_cells: int) -> tuple[int, int]:
    """Return the places of the two reduction cells, at 1/3 and 2/3 of the depth (Sec. 3.1.1)."""
    return num_cells // 3, 2 * num_cells // 3


def check_sizes(num_classes: int, init_channels: int, num_cells: int, in_channels: int) -> None:
    """Raise a ValueError that names the first size that no network can have."""
    for name, value, least in (
        ("num_classes", num_classes, 2),
        ("init_channels", init_channels, 1),
        ("num_cells", num_cells, 3),
        ("in_channels", in_channels, 1),
    ):
        if not least <= value <= 100_000:
            rule = f"at least {least}" if value < least else "at most 100000"
            raise ValueError(f"{name} {value}: must be {rule}")
