"""Oracles: formatting undone by parsing, and the texts of other codes, copied."""

import json
import random
import re
import time

import pytest

from darts_min.convert.genotype_texts import (
    FORMS,
    format_genotype,
    parse_genotype,
    read_genotype,
)
from darts_min.genotypes import PRIMITIVES, PUBLISHED, Genotype, random_genotype, sort_edges

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
    assert parse_genotype(name.lower().replace("_", "-")) is PUBLISHED[name]
    assert parse_genotype(format_genotype(PUBLISHED[name], form)) == PUBLISHED[name]


def test_a_file_with_the_name_of_a_cell_in_small_letters_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gdas").write_text(format_genotype(PUBLISHED["SNAS"]), encoding="utf-8")
    assert parse_genotype("gdas") == PUBLISHED["SNAS"]
    assert parse_genotype("GDAS") is PUBLISHED["GDAS"]


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
    "not a dict": ("['a']", ["neither"]),
    "a fifth field": ("Genotype([], [2], [], [2], 5)", ["unknown"]),
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
    for path, part in ((tmp_path, "has none of genotype.json, result"), ("missing", "DARTS_V2")):
        line = message(path)
        assert line.startswith(f"genotype {path}: ") and part in line and "\n" not in line


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


V2 = format_genotype(PUBLISHED["DARTS_V2"], "quark0")
V1 = format_genotype(PUBLISHED["DARTS_V1"], "quark0")
BENCH = "NetworkSelectorDatasetInfo:darts:"


def wrapped(template):
    """DARTS_V2 with each number wrapped by `template`."""
    return re.sub(
        r"\d(?=[),\]])", lambda n: template.format(n[0]), V2.replace("range(2, 6)", "[2]")
    )


def to_nas_bench_301(genotype, base=BENCH):
    """Their `convert_genotype_to_config` (nasbench301/representations.py), in our words."""
    config = {}
    for kind in ("normal", "reduce"):
        cell, start = getattr(genotype, kind), 0
        for node in range(4):
            edges = cell[2 * node : 2 * node + 2]
            config |= {f"{base}edge_{kind}_{start + j}": op for op, j in edges}
            if node:
                inputs = "_".join(str(j) for j in sorted(j for _, j in edges))
                config[f"{base}inputs_node_{kind}_{node + 2}"] = inputs
            start += 2 + node
    return config


DIALECTS = {
    "GDAS": QUARK0.rstrip().removesuffix(")") + ",\n  connectN=None, connects=None,\n)",
    "positional": re.sub(r"\b(normal|reduce)(_concat)?=", "", V2),
    "positional, six fields": re.sub(r"\b(normal|reduce)(_concat)?=", "", V2)[:-1]
    + ", None, None)",
    "confopt": f"DARTS{V2}",
    "a dotted name": f"genotypes.{V2}",
    "weights": re.sub(r"(\d)\)(?=[,\]])", r"\1, 0.13)", V2.replace("range(2, 6)", "[2, 3, 4, 5]")),
    "weights of numpy 2": re.sub(r"(\d)\)(?=, \(|\])", r"\1, np.float32(0.13))", V2),
    "a dict": repr({k: list(v) for k, v in PUBLISHED["DARTS_V2"]._asdict().items()}),
    "Katib": "Best-Genotype="
    + PT_DARTS.replace(" ", "")
    .replace("max_pool", "max_pooling")
    .replace("skip_connect", "skip_connection")
    .replace("sep_conv", "separable_convolution")
    .replace("dil_conv", "dilated_convolution"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_of_other_codes_are_darts_v2(dialect):
    assert parse_genotype(DIALECTS[dialect]) == PUBLISHED["DARTS_V2"]


@pytest.mark.parametrize(
    "template",
    ["np.int64({})", "numpy.int32({})", "tensor({})", "torch.tensor({}, device='cuda:0')"],
)
def test_numbers_may_be_wrapped_by_numpy_and_torch(template):
    expected = PUBLISHED["DARTS_V2"]._replace(normal_concat=(2,), reduce_concat=(2,))
    assert parse_genotype(wrapped(template)) == expected
    text = V2.replace("range(2, 6)", f"{template.split('.')[0]}.array([2, 3, 4, 5])")
    assert parse_genotype(text) == PUBLISHED["DARTS_V2"]
    assert parse_genotype(V2.replace("'skip_connect'", "np.str_('skip_connect')")) is not None


@pytest.mark.parametrize("base", [BENCH, BENCH.replace(":", "_COLON_"), ""])
@pytest.mark.parametrize("write", [json.dumps, repr])
def test_configs_of_nas_bench_301_are_read(base, write):
    for seed in range(20):
        genotype = sort_edges(random_genotype(seed))
        config = to_nas_bench_301(genotype, base) | {"OptimizerSelector:sgd:learning_rate": 0.02}
        assert parse_genotype(write(config)) == genotype
    result = {"optimized_hyperparamater_config": config, "budget": 50}
    assert parse_genotype(write(result)) == genotype


def bench(**changes):
    config = to_nas_bench_301(PUBLISHED["DARTS_V2"], "") | changes
    return repr({key: value for key, value in config.items() if value is not None})


BAD_DIALECTS = {
    "NASLib's pairs": ("[[0, 1], [1, 3], [0, 2]]", "two conventions exist"),
    "NASLib's pairs, named": ("arch = (((0, 1), (1, 3)), ((0, 2), (1, 2)))", "two conventions"),
    "FairDARTS": (
        "Genotype(normal=[('sep_conv_3x3', 2, 0), ('max_pool_3x3', 4, 0)], normal_concat=[2], "
        "reduce=[], reduce_concat=[2])",
        r"\('sep_conv_3x3', 2, 0\) is FairDARTS' triple \(operation, node, input\), which is not",
    ),
    "all edges of a cell": (
        repr(
            {
                "normal": [("skip_connect", j) for node in range(4) for j in range(2 + node)],
                "normal_concat": [2, 3, 4, 5],
                "reduce": [],
                "reduce_concat": [2],
            }
        ),
        "normal cell: 14 edges for 4 nodes; only cells with two edges a node are supported",
    ),
    "none": (with_edge("none"), "node 2: a final cell cannot keep the operation 'none'"),
    "a field that is not None": (V2[:-1] + ", connectN=[1])", r"unknown fields \['connectN'\]"),
    "a wrapped expression": (V2.replace("0)", "np.int64(n))"), "only literals"),
    "a field twice": ("Genotype([], normal=[])", "repeated"),
    "bench: a node of one input": (bench(inputs_node_normal_4="0"), "inputs_node_normal_4 is not"),
    "bench: no input": (bench(inputs_node_reduce_5=None), "inputs_node_reduce_5 is not"),
    "bench: an edge less": (bench(edge_normal_0=None), "missing key edge_normal_0"),
    "bench: an edge too many": (
        bench(edge_normal_13="skip_connect"),
        "no node reads edge_normal_1",
    ),
    "bench: an unknown operation": (bench(edge_reduce_1="sep_conv_9x9"), "'sep_conv_9x9'"),
}


@pytest.mark.parametrize("case", BAD_DIALECTS)
def test_what_is_not_read_of_other_codes_is_said_in_one_line(case):
    text, says = BAD_DIALECTS[case]
    with pytest.raises(ValueError, match=says) as error:
        parse_genotype(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


LOG = (
    "2019-12-31 02:51:20,247 epoch 12 lr 4.322422e-01\n"
    f"2019-12-31 02:51:20,249 genotype = {V1}\n"
    "2019-12-31 02:52:04,109 train 000 6.916040e+00 0.000000 0.585938\n"
    f"2019-12-31 03:16:36,413 genotype = {V2}\n"
)


@pytest.mark.parametrize(
    "text, count",
    [
        (LOG, 2),
        (LOG + "2019-12-31 04:00:00,000 genotype = Genotype(normal=[('sep_co", 2),  # was killed
        (f"epoch 1\nalpha half 55.66 %\ngenotype: {V2}\nnext: python train_final.py\n", 1),
        (f"genotype = {V1}\n" * 16 + f"genotype = {V2}\n", 17),
        (f"# {V1}\n{V2}", 1),
        (json.dumps({"epoch": 1, "genotype": V1}) + "\n" + json.dumps({"genotype": V2}), 2),
        (json.dumps({"genotype": V2, "alphas": [None, True, False, 1e-3]}), 1),
        (json.dumps({"genotype": PUBLISHED["DARTS_V2"]._asdict(), "epoch": 50}), 1),
        (json.dumps({"ranking": [{"genotype": V2}, {"genotype": V1}]}), 1),
        (repr({"genotype": V1, "best": V2, "none": None}), 2),
    ],
)
@pytest.mark.parametrize("name", ["log.txt", "result.json"])
def test_the_last_genotype_of_a_log_or_result_counts_and_a_note_says_so(
    tmp_path, text, count, name
):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    note = f"the last of {count} genotypes in {path}" if count > 1 else None
    assert read_genotype(path) == read_genotype(str(path)) == (PUBLISHED["DARTS_V2"], note)
    assert parse_genotype(tmp_path) == PUBLISHED["DARTS_V2"]  # the run folder
    note = f"the last of {count} genotypes in the text" if count > 1 else None
    assert read_genotype(text) == (PUBLISHED["DARTS_V2"], note)


def test_logs_in_other_encodings_are_read(tmp_path):
    path = tmp_path / "log.txt"
    for content in (
        LOG.encode("utf-16"),
        LOG.encode() + b"\xff\xe9\x00",
        b"\xef\xbb\xbf" + V2.encode(),
    ):
        path.write_bytes(content)
        assert parse_genotype(path) == PUBLISHED["DARTS_V2"]


def test_a_bad_last_genotype_is_refused_with_its_line():
    with pytest.raises(ValueError, match=r"only literals .*\(line 6\)"):
        parse_genotype(LOG + "\nGenotype(normal=gene_normal)")


NAMES = f"""from collections import namedtuple

Genotype = namedtuple('Genotype', 'normal normal_concat reduce reduce_concat')

# Old = {V2}
FIRST = {V1}

SECOND = genotype = Genotype(  # isn't it :)
    normal={PUBLISHED["DARTS_V2"].normal},  # step 1)
    normal_concat=[2, 3, 4, 5], reduce={PUBLISHED["DARTS_V2"].reduce}, reduce_concat=range(2, 6))
DARTS = SECOND  # the default


class DARTSGenotype(Genotype):
    pass
"""


@pytest.mark.parametrize("folder", [".", "C:", "a: b"])
def test_a_file_of_several_names_lists_them_and_one_is_taken_by_its_name(tmp_path, folder):
    path = tmp_path / folder / "genotypes.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(NAMES)
    with pytest.raises(
        ValueError, match="has several genotypes: FIRST, SECOND, genotype; give FILE:NAME"
    ):
        parse_genotype(path)
    for name, published in (("FIRST", "DARTS_V1"), ("SECOND", "DARTS_V2"), ("DARTS", "DARTS_V2")):
        assert read_genotype(f"{path}:{name}") == (PUBLISHED[published], None)
    for name in ("Old", "THIRD"):
        with pytest.raises(ValueError, match="has no such name; it has FIRST, SECOND, genotype$"):
            parse_genotype(f"{path}:{name}")
    with pytest.raises(ValueError, match=r"genotypes.pyc?:FIRST: neither a file nor"):
        parse_genotype(f"{path}c:FIRST")
    path.write_text(json.dumps(FIELDS))
    with pytest.raises(ValueError, match="has no FIRST = Genotype"):
        parse_genotype(f"{path}:FIRST")


def test_a_large_log_is_read_in_seconds(tmp_path):
    path, epochs = tmp_path / "log.txt", 2000
    noise = "2019-12-31 02:57:01,260 train 050 6.911184e+00 0.134038 0.635723 [(0, 1)]\n" * 250
    path.write_text((noise + f"genotype = {V1}\n") * epochs + f"genotype = {V2}\n")  # 38 MB
    start = time.perf_counter()
    assert read_genotype(path)[1] == f"the last of {epochs + 1} genotypes in {path}"
    assert time.perf_counter() - start < 10  # it takes 0.3 s


@pytest.mark.parametrize(
    ("text", "name", "genotype", "count"),
    [
        (f"BEST = {V2}  # before: {V1}", None, "DARTS_V2", 1),
        (V2.replace("reduce=", f"# was {V1}\n  reduce=", 1), None, "DARTS_V2", 1),
        (V2.replace("reduce=", f"  # was {V1}\n  reduce=", 1), None, "DARTS_V2", 1),
        (f"class Cells:\n    A = {V1}\n    B: Genotype = {V2}\n", "A", "DARTS_V1", 1),
        (f"class Cells:\n    A = {V1}\n    B: Genotype = {V2}\n", "B", "DARTS_V2", 1),
        (f"A = DARTS = {V1}\nB = {V2}\n", "DARTS", "DARTS_V1", 1),
        (f"A = {V1}\nB = {V2}\nC = B\nD = C\n", "D", "DARTS_V2", 1),
        (f"A = {V1}\nclass Genotype(NamedTuple):\n    normal: list\n", None, "DARTS_V1", 1),
        (f"epoch #1 genotype = {V1}\nepoch #2 genotype = {V2}\n", None, "DARTS_V2", 2),
    ],
)
def test_comments_classes_and_several_names_are_told_apart(tmp_path, text, name, genotype, count):
    path = tmp_path / "genotypes.py"
    path.write_text(text, encoding="utf-8")
    found, note = read_genotype(f"{path}:{name}" if name else path)
    assert found == PUBLISHED[genotype]
    assert note is None if count == 1 else f"the last of {count} genotypes" in note


def test_names_that_only_name_each_other_are_refused(tmp_path):
    path = tmp_path / "genotypes.py"
    path.write_text(f"A = {V1}\nC = D\nD = C\n", encoding="utf-8")
    assert "has no such name; it has A" in message(f"{path}:C")
