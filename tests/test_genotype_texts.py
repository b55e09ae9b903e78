"""Oracles: formatting undone by parsing, and the texts of other codes, copied."""

import json
import random

import pytest

from darts_min.convert.genotype_texts import FORMS, format_genotype, parse_genotype
from darts_min.genotypes import PRIMITIVES, PUBLISHED, Genotype, random_genotype

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


def test_random_genotypes_are_named_by_their_seed(tmp_path):
    assert parse_genotype("random:7") == random_genotype(7) != random_genotype(8)
    assert random_genotype(7).normal[:2] == (("sep_conv_5x5", 0), ("max_pool_3x3", 1))  # for good
    with pytest.raises(ValueError, match="seed -1"):
        random_genotype(-1)
    for text in ("random:", "random:-1", "random:x"):
        with pytest.raises(ValueError, match=f"genotype {text}: neither a file nor one of .*SEED"):
            parse_genotype(text)
