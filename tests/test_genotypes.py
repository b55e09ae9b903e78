"""Oracles: a slow choice that compares all pairs of edges, and counts of many random cells."""

import random
from collections import Counter
from functools import partial
from itertools import combinations, product

import pytest

from darts_min.genotypes import (
    PRIMITIVES,
    Genotype,
    check_genotype,
    check_sizes,
    choose_cell,
    choose_cell_of_few_skips,
    name_unused_nodes,
    random_genotype,
    reduction_cells,
    sort_edges,
    unused_states,
)


def rank(score, predecessor, op, primitives, ties):
    """Larger is better."""
    if ties == "last":
        return score, predecessor, op
    return score, -predecessor, -primitives.index(op)


def brute_force_cell(scores, primitives, ties):
    """Try all pairs of edges of each node with all pairs of operations."""
    cell, start, node = [], 0, 2
    while start < len(scores):
        candidates = [
            (scores[start + j][o], j, op)
            for j, (o, op) in product(range(node), enumerate(primitives))
            if op != "none"
        ]
        pairs = [
            tuple(sorted(pair, key=lambda c: rank(*c, primitives, ties), reverse=True))
            for pair in combinations(candidates, 2)
            if pair[0][1] != pair[1][1]
        ]
        best = max(pairs, key=lambda pair: [rank(*c, primitives, ties) for c in pair])
        cell += [(op, j) for _, j, op in best]
        start, node = start + node, node + 1
    return tuple(cell)


@pytest.mark.parametrize("ties", ["first", "last"])
@pytest.mark.parametrize("levels", [1, 2, 3, 10**6])
@pytest.mark.parametrize("primitives", [PRIMITIVES, PRIMITIVES[::-1], ("skip_connect", "none")])
def test_choice_equals_brute_force_with_and_without_ties(primitives, levels, ties):
    rng = random.Random(levels)
    for num_nodes in (1, 2, 3, 4) * 3:
        num_edges = num_nodes * (num_nodes + 3) // 2
        scores = [[rng.randrange(levels) / 7 for _ in primitives] for _ in range(num_edges)]
        assert choose_cell(scores, primitives, ties) == brute_force_cell(scores, primitives, ties)


def test_scores_must_have_one_column_per_primitive():
    with pytest.raises(ValueError):
        choose_cell([[0.0] * 7] * 2, PRIMITIVES)


@pytest.mark.parametrize(
    "num_cells, places", [(3, (1, 2)), (5, (1, 3)), (8, (2, 5)), (14, (4, 9)), (20, (6, 13))]
)
def test_reduction_cells_are_where_the_original_code_has_them(num_cells, places):
    assert reduction_cells(num_cells) == places


@pytest.mark.parametrize(
    "sizes, name", [((1, 1, 3, 1), "num_classes 1"), ((2, 0, 3, 1), "init_channels 0")]
    + [((2, 1, 2, 1), "num_cells 2"), ((2, 1, 3, 0), "in_channels 0")],
)  # fmt: skip
def test_impossible_sizes_are_named(sizes, name):
    check_sizes(2, 1, 3, 1)
    with pytest.raises(ValueError, match=name):
        check_sizes(*sizes)


def test_random_genotypes_are_uniform_over_the_space():
    edges, pairs, seeds = Counter(), Counter(), 3000
    for seed in range(seeds):
        genotype = check_genotype(random_genotype(seed))
        for kind in ("normal", "reduce"):
            cell = getattr(genotype, kind)
            for i in range(0, 8, 2):
                pairs[kind, i // 2, cell[i][1], cell[i + 1][1]] += 1
            for i, (op, _) in enumerate(cell):
                edges[kind, i, op] += 1
    assert len(edges) == 2 * 8 * 7 and len(pairs) == 2 * (1 + 3 + 6 + 10)
    for (_, node, *_), count in pairs.items():
        p = 2 / ((node + 2) * (node + 1))
        assert abs(count - seeds * p) <= 4.5 * (seeds * p * (1 - p)) ** 0.5
    for count in edges.values():
        assert abs(count - seeds / 7) < 4.5 * (seeds / 7 * 6 / 7) ** 0.5


def test_max_skips_rules_out_the_weakest_skips():
    primitives = ("none", "skip_connect", "sep_conv_3x3", "max_pool_3x3")
    scores = [
        [9, 5.0, 4, 0],  # node 2
        [9, 6.0, 1, 3],
        [9, 2.0, 0, 0],  # node 3
        [9, 7.0, 3, 2],
        [9, 1.0, 2, 0],
    ]
    skip, sep3, max3 = (
        lambda j, op=op: (op, j) for op in ("skip_connect", "sep_conv_3x3", "max_pool_3x3")
    )
    choose = partial(choose_cell_of_few_skips, scores, primitives)
    assert choose_cell(scores, primitives) == (skip(1), skip(0), skip(1), skip(0))
    assert choose() == choose(max_skips=4) == choose_cell(scores, primitives)
    # The 2.0 goes first, and sep3 from state 2 takes its place; then the 5.0, to sep3.
    assert choose(max_skips=3) == (skip(1), skip(0), skip(1), sep3(2))
    assert choose(max_skips=2) == (skip(1), sep3(0), skip(1), sep3(2))
    assert choose(max_skips=0) == (sep3(0), max3(1), sep3(1), sep3(2))
    with pytest.raises(ValueError, match="max_skips 1: there are too few other operations"):
        choose_cell_of_few_skips([[1.0]] * 2, ("skip_connect",), max_skips=1)


def test_nodes_that_reach_no_output_are_named():
    edges = [("sep_conv_3x3", node - 1) for node in range(2, 9) for _ in "ab"]
    chain, star = tuple(edges), tuple((op, 0) for op, _ in edges)
    genotype = Genotype(chain, (2, 3, 4, 5), star, (2, 3, 4, 6, 7, 8))
    assert unused_states(genotype) == {"normal": [0, 6, 7, 8], "reduce": [1, 5]}
    normal, reduce = name_unused_nodes(genotype)
    assert "normal cell: the output does not depend on nodes 6, 7, 8:" in normal
    assert "reduce cell: the output does not depend on node 5:" in reduce
    genotype = Genotype(chain, (8, 2), chain, (8, 2))  # all but the first input, which may be
    assert unused_states(genotype)["normal"] == [0] and name_unused_nodes(genotype) == []


def test_cells_whose_edges_stand_in_another_order_are_sorted_alike():
    a, b, c, d = ("skip_connect", 1), ("sep_conv_3x3", 0), ("dil_conv_3x3", 0), ("skip_connect", 2)
    one = Genotype((a, b, c, d), (2, 3), (b, a, d, c), (2, 3))
    other = Genotype((b, a, d, c), (2, 3), (a, b, c, d), (2, 3))
    assert one != other and sort_edges(one) == sort_edges(other) == sort_edges(sort_edges(one))
    assert sort_edges(one).normal == (b, a, c, d)
