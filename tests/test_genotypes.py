"""Oracles: formatting undone by parsing, and a slow choice that compares all pairs of edges."""

import json
import random
from collections import Counter
from itertools import combinations, product

import pytest

from darts_min.genotypes import (
    FORMS,
    PRIMITIVES,
    PUBLISHED,
    Genotype,
    check_genotype,
    check_sizes,
    choose_cell,
    format_genotype,
    name_unused_nodes,
    parse_genotype,
    random_genotype,
    unused_states,
)

OPS = PRIMITIVES[1:]
ONE_NODE = Genotype(
    (("sep_conv_3x3", 0), ("skip_connect", 1)),
    (2,),
    (("max_pool_3x3", 1), ("avg_pool_3x3", 0)),
    (2,),
)
FIELDS = json.loads(format_genotype(ONE_NODE, "json"))
ARCH = json.loads(format_genotype(ONE_NODE, "nni"))


def any_genotype(seed, num_nodes, subset=False):
    rng = random.Random(seed)

    def cell():
        return tuple((rng.choice(OPS), rng.randrange(2 + i // 2)) for i in range(2 * num_nodes))

    nodes = range(2, 2 + num_nodes)
    size = rng.randint(1, num_nodes) if subset else num_nodes
    concats = [tuple(sorted(rng.sample(nodes, size))) for _ in "nr"]
    return Genotype(cell(), concats[0], cell(), concats[1])


def message(source):
    with pytest.raises(ValueError) as error:
        parse_genotype(source)
    return str(error.value)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_cells_survive_a_round_trip(name, form):
    assert parse_genotype(name) is PUBLISHED[name]
    assert parse_genotype(format_genotype(PUBLISHED[name], form)) == PUBLISHED[name]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_nodes", range(1, 7))
def test_random_genotypes_survive_a_round_trip(num_nodes, form):
    for seed in range(20):
        genotype = any_genotype(seed, num_nodes, subset=form != "nni")
        assert parse_genotype(format_genotype(genotype, form)) == genotype


def test_nni_form_refuses_to_leave_a_node_out():
    genotype = PUBLISHED["DARTS_V2"]._replace(normal_concat=(2, 3, 4), reduce_concat=(3, 4, 5))
    with pytest.raises(ValueError, match="'nni' can only concatenate all nodes"):
        format_genotype(genotype, "nni")


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match="'yaml' is not one of json, quark0, pt.darts, nni"):
        format_genotype(ONE_NODE, "yaml")


QUARK0 = """
DARTS_V2 = Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0),
('sep_conv_3x3', 1), ('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0),
('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5], reduce=[('max_pool_3x3', 0),
('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0),
('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])
"""
PT_DARTS = """Genotype(
normal=[[('sep_conv_3x3', 0), ('sep_conv_3x3', 1)], [('sep_conv_3x3', 0), ('sep_conv_3x3', 1)],
        [('sep_conv_3x3', 1), ('skip_connect', 0)], [('skip_connect', 0), ('dil_conv_3x3', 2)]],
normal_concat=range(2, 6),
reduce=[[('max_pool_3x3', 0), ('max_pool_3x3', 1)], [('skip_connect', 2), ('max_pool_3x3', 1)],
        [('max_pool_3x3', 0), ('skip_connect', 2)], [('skip_connect', 2), ('max_pool_3x3', 1)]],
reduce_concat=range(2, 6))"""


@pytest.mark.parametrize(
    "text",
    [
        QUARK0,
        QUARK0.partition("=")[2],
        QUARK0.replace("[2, 3, 4, 5]", "range(2, 6)"),
        QUARK0.replace("[2, 3, 4, 5]", "list(range(2, 6))"),
        QUARK0.replace("DARTS_V2 =", "# found on a Monday\nDARTS_V2 ="),
        PT_DARTS,
    ],
)
def test_the_texts_of_other_codes_are_darts_v2(text):
    assert parse_genotype(text) == PUBLISHED["DARTS_V2"]


@pytest.mark.parametrize("write", [json.dumps, repr])
@pytest.mark.parametrize("wrap", [True, False])
def test_nni_inputs_may_be_lists_or_numbers(wrap, write):
    arch = {
        key: value if "op" in key or wrap else value[0]
        for key, value in json.loads(format_genotype(PUBLISHED["NNI_FULL"], "nni")).items()
    }
    assert parse_genotype(write(arch)) == PUBLISHED["NNI_FULL"]


def test_json_in_one_line_is_read():
    assert parse_genotype(json.dumps(FIELDS)) == ONE_NODE


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("folder", ["run", "run (1)", "run {a}"])
def test_a_file_and_its_folder_are_read(tmp_path, folder, form):
    path = tmp_path / folder / "genotype.json"
    path.parent.mkdir()
    path.write_text(format_genotype(PUBLISHED["DARTS_V1"], form))
    for source in (path, path.parent, str(path), str(path.parent)):
        assert parse_genotype(source) == PUBLISHED["DARTS_V1"]


@pytest.mark.parametrize(
    "template",
    [
        "{call}",
        "x = {call}",
        "Genotype(normal={call}, normal_concat=[2], reduce=[], reduce_concat=[2])",
        "Genotype(normal=[({call}, 0)], normal_concat=[2], reduce=[], reduce_concat=[2])",
        "Genotype(normal=[], normal_concat=range({call}), reduce=[], reduce_concat=[2])",
        "Genotype(normal=list({call}), normal_concat=[2], reduce=[], reduce_concat=[2])",
        "Genotype(**{call})",
        "{{{call}: 1}}",
        "{{**{call}}}",
        "{{'normal/op_2_0': {call}}}",
    ],
)
def test_nothing_in_the_text_is_evaluated(tmp_path, template):
    trace = tmp_path / "trace"
    text = template.format(call=f"__import__('os').system('touch {trace}')")
    assert "\n" not in message(text)
    assert not trace.exists()


def with_edge(op="skip_connect", predecessor=0):
    return repr(FIELDS | {"normal": [(op, predecessor), ("skip_connect", 1)]})


def without(fields, key):
    return repr({k: v for k, v in fields.items() if k != key})


BAD = {
    "unknown operation": (with_edge("sep_conv_9x9"), ["normal cell, node 2", "'sep_conv_9x9'"]),
    "none operation": (with_edge("none"), ["normal cell, node 2", "'none'"]),
    "number operation": (with_edge(3), ["normal cell, node 2", "3"]),
    "list operation": (with_edge(["skip_connect"]), ["normal cell, node 2", "['skip_connect']"]),
    "predecessor too large": (with_edge(predecessor=2), ["normal cell, node 2", "2", "0..1"]),
    "negative predecessor": (with_edge(predecessor=-1), ["normal cell, node 2", "-1", "0..1"]),
    "bool predecessor": (with_edge(predecessor=True), ["normal cell, node 2", "True"]),
    "text predecessor": (with_edge(predecessor="0"), ["normal cell, node 2", "'0'"]),
    "odd edges": (repr(FIELDS | {"reduce": [("skip_connect", 0)] * 3}), ["reduce cell", "3 edges"]),
    "empty cell": (repr(FIELDS | {"reduce": []}), ["reduce cell", "0 edges"]),
    "edge of three": (repr(FIELDS | {"reduce": [(1, 2, 3), (1, 2)]}), ["reduce", "(1, 2, 3)"]),
    "edge not a pair": (repr(FIELDS | {"reduce": [7, 8]}), ["reduce cell, node 2", "7"]),
    "missing field": (without(FIELDS, "reduce_concat"), ["missing", "reduce_concat"]),
    "unknown field": (repr(FIELDS | {"colour": [1]}), ["unknown", "colour"]),
    "field not a list": (repr(FIELDS | {"normal": 5}), ["normal", "must be a list"]),
    "concat of an input": (repr(FIELDS | {"normal_concat": [1]}), ["normal cell", "(1,)"]),
    "concat out of range": (repr(FIELDS | {"normal_concat": [3]}), ["normal cell", "(3,)"]),
    "empty concat": (repr(FIELDS | {"normal_concat": []}), ["normal cell", "concat ()"]),
    "concat twice": (repr(FIELDS | {"normal_concat": [2, 2]}), ["normal cell", "twice"]),
    "syntax error": ("Genotype(normal=[('a', 0)],\nnormal_concat=[2,\nreduce=)", ["line 3"]),
    "not a dict": ("[(1, 2)]", ["neither"]),
    "positional": ("Genotype([], [2], [], [2])", ["neither"]),
    "two statements": (f"x = {FIELDS}\ny = {FIELDS}", ["neither"]),
    "key not a string": ("{1: 2}", ["string"]),
    "unhashable key": ("{[1]: 2}", ["genotype"]),
    "NNI without an input": (without(ARCH, "normal/input_2_1"), ["'normal/input_2_1'"]),
    "NNI without an op": (without(ARCH, "reduce/op_2_0"), ["'reduce/op_2_0'"]),
    "NNI without a cell": (
        repr({key: value for key, value in ARCH.items() if "reduce" not in key}),
        ["reduce cell", "0 edges"],
    ),
    "NNI with a gap": (repr(ARCH | {"normal/op_4_0": "skip_connect"}), ["'normal/op_4_0'"]),
    "NNI with two inputs": (repr(ARCH | {"normal/input_2_0": [0, 1]}), ["node 2", "[0, 1]"]),
    "NNI none": (repr(ARCH | {"normal/op_2_0": "none"}), ["normal cell, node 2", "'none'"]),
    "pt.darts node of three": (
        repr(FIELDS | {"normal": [[("skip_connect", 0)] * 3]}),
        ["normal cell, node 2", "3 edges"],
    ),
    "deep brackets": ("[" * 100000, ["genotype"]),
    "deep parentheses": ("(" * 100000, ["genotype"]),
    "deep in a field": ("Genotype(normal=" + "[" * 100000, ["genotype"]),
    "empty text": ("", ["genotype"]),
    "unknown name": ("DARTS_V3", ["DARTS_V3", "DARTS_V2"]),
    "lines without brackets": ("normal = 1\nreduce = 2\n", ["genotype"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_text_gives_one_line_that_says_where(case):
    text, parts = BAD[case]
    line = message(text)
    assert line.startswith("genotype") and "\n" not in line and len(line) < 400
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", bytes(range(256)), b"\x00\x00", b"<html>\n</html>", b"PK\x03\x04{("]
)
def test_a_bad_file_is_named(tmp_path, content):
    path = tmp_path / "genotype.json"
    path.write_bytes(content)
    for source in (path, tmp_path):
        line = message(source)
        assert line.startswith(f"genotype {source}: ") and "\n" not in line


def test_missing_files_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "missing.json"):
        line = message(path)
        assert line.startswith(f"genotype {path}: ") and "DARTS_V2" in line and "\n" not in line


def test_a_bad_file_tells_the_line_of_its_error(tmp_path):
    path = tmp_path / "genotype.txt"
    path.write_text("\n\nGenotype(normal=[],\n  reduce=!)\n")
    assert "line 4" in message(path)


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


def test_random_genotypes_are_named_by_their_seed(tmp_path):
    assert parse_genotype("random:7") == random_genotype(7) != random_genotype(8)
    assert random_genotype(7).normal[:2] == (("sep_conv_5x5", 0), ("max_pool_3x3", 1))  # for good
    with pytest.raises(ValueError, match="seed -1"):
        random_genotype(-1)
    for text in ("random:", "random:-1", "random:x"):
        with pytest.raises(ValueError, match=f"genotype {text}: neither a file nor one of .*SEED"):
            parse_genotype(text)


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
    assert choose_cell(scores, primitives) == (skip(1), skip(0), skip(1), skip(0))
    assert choose_cell(scores, primitives, max_skips=4) == choose_cell(scores, primitives)
    # The 2.0 goes first, and sep3 from state 2 takes its place; then the 5.0, to sep3.
    three = (skip(1), skip(0), skip(1), sep3(2))
    assert choose_cell(scores, primitives, max_skips=3) == three
    assert choose_cell(scores, primitives, max_skips=2) == (skip(1), sep3(0), skip(1), sep3(2))
    none = (sep3(0), max3(1), sep3(1), sep3(2))
    assert choose_cell(scores, primitives, max_skips=0) == none
    with pytest.raises(ValueError, match="max_skips 1: there are too few other operations"):
        choose_cell([[1.0]] * 2, ("skip_connect",), max_skips=1)


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
