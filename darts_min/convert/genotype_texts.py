"""Genotypes as text: the forms of all codes, found in files, logs and results; ours written."""

import ast
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from darts_min.genotypes import PUBLISHED, Genotype, check_genotype, random_genotype

FORMS = ("json", "quark0", "pt.darts", "nni")
RUN_FILES = ("genotype.json", "result.json", "log.txt")  # of a run folder; the first one counts
MAX_FILE = 2**30  # bytes
MAX_TEXT = 1_000_000  # characters of a dict
MAX_CALL = 20_000  # characters of one `Genotype(...)`
INNER = ("genotype", "optimized_hyperparamater_config")  # ours; NAS-Bench-301's, spelled like this
NEITHER = "neither 'Genotype(normal=..., ...)' nor a JSON object or dict"

# Katib's names of the operations, and ours.
KATIB = {
    "max_pooling_3x3": "max_pool_3x3",
    "avg_pooling_3x3": "avg_pool_3x3",
    "skip_connection": "skip_connect",
    "separable_convolution_3x3": "sep_conv_3x3",
    "separable_convolution_5x5": "sep_conv_5x5",
    "dilated_convolution_3x3": "dil_conv_3x3",
    "dilated_convolution_5x5": "dil_conv_5x5",
}


def parse_genotype(source: str | Path) -> Genotype:
    """Return the genotype that `read_genotype` finds."""
    return read_genotype(source)[0]


def read_genotype(source: str | Path) -> tuple[Genotype, str | None]:
    """Read a genotype from a name, a file, a run folder or text; also return a note, or None.

    A name is a published one (`DARTS_V2`, `pc-darts`) or `random:SEED`. docs/weights.md shows all
    forms of text. `FILE:NAME` takes `NAME = Genotype(...)` from a file of several names. Of several
    genotypes without names, as in a log, the last one counts, and the note says so.

    Nothing is evaluated: Python text is parsed to a syntax tree, and only literals, `range(...)`
    and numbers wrapped by numpy or torch are accepted. Raises a ValueError that says what is wrong
    and where.
    """
    text, where, name = str(source), "genotype", None
    exists = os.path.exists(text)
    published = text if exists else text.upper().replace("-", "_")  # pc-darts
    if published in PUBLISHED:
        return PUBLISHED[published], None
    if match := re.fullmatch(r"random:(\d{1,18})", text):
        return random_genotype(int(match[1])), None
    is_path = isinstance(source, Path) or exists
    file, _, last = text.rpartition(":")
    if not is_path and last.isidentifier() and os.path.isfile(file):
        source, name, is_path = file, last, True
    if is_path or not re.search(r"[({]|^\s*\[", text):
        is_short = len(text) <= 200 and text.isprintable()
        where = f"genotype {text if is_short else repr(text[:60])}"
        text = _read_file(Path(source), where)
    try:
        fields, count = _find_fields(text, name)
        genotype = check_genotype(_from_any(fields))
    except ValueError as error:
        message = str(error).removeprefix("genotype, ").removeprefix("genotype: ")
        raise ValueError(f"{where}: {message}") from None
    place = source if is_path else "the text"
    return genotype, f"the last of {count} genotypes in {place}" if count > 1 else None


def format_genotype(genotype: Genotype, form: str = "json") -> str:
    """Write `genotype` as text that `parse_genotype` and the code called `form` can read."""
    if form not in FORMS:
        raise ValueError(f"genotype form {form!r} is not one of {', '.join(FORMS)}")
    fields = genotype._asdict()
    if form == "json":
        rows = (f'  "{key}": {json.dumps(value)}' for key, value in fields.items())
        return "{\n" + ",\n".join(rows) + "\n}"
    if form == "nni":
        arch = {}
        for kind in ("normal", "reduce"):
            if fields[f"{kind}_concat"] != tuple(range(2, 2 + len(fields[kind]) // 2)):
                raise ValueError("genotype form 'nni' can only concatenate all nodes")
            for i, (op, predecessor) in enumerate(fields[kind]):
                slot = f"{2 + i // 2}_{i % 2}"
                arch |= {f"{kind}/op_{slot}": op, f"{kind}/input_{slot}": [predecessor]}
        return json.dumps(arch, indent=2)
    for kind in ("normal", "reduce"):
        edges, concat = list(fields[kind]), fields[f"{kind}_concat"]
        if form == "pt.darts":
            edges = [edges[i : i + 2] for i in range(0, len(edges), 2)]
        is_range = concat == tuple(range(concat[0], concat[-1] + 1))
        fields[kind] = edges
        fields[f"{kind}_concat"] = range(concat[0], concat[-1] + 1) if is_range else list(concat)
    return "Genotype(" + ", ".join(f"{key}={value!r}" for key, value in fields.items()) + ")"


def _read_file(path: Path, where: str) -> str:
    """Return the text of a file, or of the first of `RUN_FILES` in a folder.

    Bytes that are not UTF-8 become a sign for that. PowerShell's `>` writes UTF-16. Errors begin
    with `where`.
    """
    try:
        if path.is_dir():
            found = [path / name for name in RUN_FILES if (path / name).is_file()]
            if not found:
                raise ValueError(f"{where}: the folder has none of {', '.join(RUN_FILES)}")
            path = found[0]
        if path.stat().st_size > MAX_FILE:
            raise ValueError(f"{where}: a file of more than 1 GiB")
        content = path.read_bytes()
    except FileNotFoundError:
        names = ", ".join(PUBLISHED)
        raise ValueError(f"{where}: neither a file nor one of {names}, random:SEED") from None
    except OSError as error:
        raise ValueError(f"{where}: cannot be read: {error.strerror or error}") from None
    is_utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    return content.decode("utf-16" if is_utf16 else "utf-8-sig", errors="replace")


def _find_fields(text: str, name: str | None) -> tuple[dict, int]:
    """Return the fields of the genotype in a text, and the number of genotypes that it holds.

    The text is JSON, or has `Genotype(...)` in it, or is a Python dict.
    """
    try:
        content = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict) and isinstance(ranking := content.get("ranking"), list):
        content = ranking[0] if ranking else {}  # of a selection's result.json, the best first
    if isinstance(content, dict) and isinstance(inner := content.get("genotype"), str):
        return _find_fields(inner, name)  # of a result.json
    calls = list(_calls(text))
    if calls:
        return _fields_of_call(text, calls, name)
    if name is not None:
        raise ValueError(f"has no {name} = Genotype(...)")
    if isinstance(content, dict):
        return content, 1
    if re.fullmatch(r"\s*(\w+\s*=)?[\s\d()\[\],]+", text) and re.search(r"\d\s*,\s*\d", text):
        raise ValueError(
            "pairs of numbers, as NASLib writes them, are not read, because two conventions exist: "
            "the numbers of the operations count 'none' or do not; use its Genotype(...)"
        )
    if len(text) > MAX_TEXT or not re.match(r"(\s|#.*\n)*(\w+\s*=\s*)?\{", text):
        raise ValueError(NEITHER)
    tree = _syntax_tree(text.strip(), text[: len(text) - len(text.lstrip())].count("\n"))
    statement = tree.body[-1] if len(tree.body) == 1 else None
    if not isinstance(node := getattr(statement, "value", None), ast.Dict):
        raise ValueError(NEITHER)
    return _literal(node), 1


def _without_repeats(pairs: list[tuple]) -> dict:
    """Make a dict of pairs (key, value), or raise a ValueError: keys are strings, each one once."""
    fields = dict(pairs) if all(isinstance(key, str) for key, _ in pairs) else {}
    if len(fields) < len(pairs):
        raise ValueError("each key must be a string and must not be repeated")
    return fields


def _calls(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the place of each `...Genotype(` outside comments, and the names that it is given."""
    one = r"(\w+)[ \t]*(?::[ \t]*[\w.]+[ \t]*)?=[ \t]*"  # a name, perhaps with its type
    for match in re.finditer(r"Genotype[ \t]*\(", text):
        start = match.start()
        line = text[max(0, start - 200) : start].rpartition("\n")[2]  # no longer names
        is_comment = re.search(r"^\s*#|[)\]][ \t,]*#", line)
        is_class = re.search(r"\bclass[ \t]+\w*$", line)
        if not is_comment and not is_class:
            is_named = re.fullmatch(rf"\s*({one})*[\w.]*", line)
            yield start, re.findall(one, line) if is_named else []


def _fields_of_call(text: str, calls: list[tuple], name: str | None) -> tuple[dict, int]:
    """Return the fields of the call that counts, and how many calls there are to choose from."""
    names = dict.fromkeys(one for _, called in calls for one in called)
    listed = ", ".join([*list(names)[:30], "..."] if len(names) > 30 else names)
    wanted, seen = name, set()
    while wanted is not None and wanted not in names:  # DARTS = DARTS_V2
        alias = re.findall(rf"^\s*{wanted}[ \t]*=[ \t]*(\w+)[ \t]*(?:#.*)?$", text, re.MULTILINE)
        if not alias or wanted in seen:
            raise ValueError(f"has no such name; it has {listed or 'genotypes without names'}")
        seen.add(wanted)
        wanted = alias[-1]
    if wanted is None and len({called[0] for _, called in calls if called}) > 1:
        raise ValueError(f"has several genotypes: {listed}; give FILE:NAME")
    places = [start for start, called in calls if wanted is None or wanted in called]
    count = len(places)
    while count > 1 and _end_of_call(text, places[count - 1]) is None:
        count -= 1  # a run that was killed may have cut off the last one
    start = places[count - 1]
    end = _end_of_call(text, start) or start + MAX_CALL  # Python says what is not closed
    node = _syntax_tree(text[start:end], text.count("\n", 0, start)).body[0].value
    if not isinstance(node, ast.Call):
        raise ValueError(NEITHER)
    values = [*node.args, *(keyword.value for keyword in node.keywords)]
    keys = [*Genotype._fields, *(f"field {i}" for i in range(4, len(node.args)))][: len(node.args)]
    keys += [keyword.arg for keyword in node.keywords]
    fields = _without_repeats(list(zip(keys, map(_literal, values), strict=True)))
    return fields, 1 if name else count


def _end_of_call(text: str, start: int) -> int | None:
    """Return where the call at `start` ends; None: its brackets are not closed."""
    depth = 0
    token = re.compile(r"'[^'\n]*'|\"[^\"\n]*\"|#[^\n]*|[()\[\]{}]")
    for match in token.finditer(text, start, start + MAX_CALL):
        depth += (match[0] in "([{") - (match[0] in ")]}")
        if match[0] in ")]}" and depth == 0:
            return match.end()
    return None


def _syntax_tree(text: str, first_line: int) -> ast.Module:
    """Parse Python; an error names the line of the file, of which `first_line` come before."""
    try:
        return ast.increment_lineno(ast.parse(text), first_line)
    except SyntaxError as error:
        raise ValueError(f"{error.msg} (line {(error.lineno or 1) + first_line})") from None
    except (ValueError, RecursionError, MemoryError):  # ValueError: null bytes
        raise ValueError("nested too deeply, or not text") from None


def _literal(node: ast.AST | None):
    """Return the value of a literal, in which `range(a, b)` and wrapped numbers may stand.

    Numbers are wrapped by numpy or torch: `np.int64(0)`, `tensor(0)`, `array([2, 3])`.
    """
    if isinstance(node, ast.List | ast.Tuple):
        values = [_literal(element) for element in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    if isinstance(node, ast.Dict):
        pairs = zip(map(_literal, node.keys), map(_literal, node.values), strict=True)
        return _without_repeats(list(pairs))
    if isinstance(node, ast.Call):
        function = getattr(node.func, "id", getattr(node.func, "attr", ""))
        arguments = [_literal(argument) for argument in node.args]
        are_small = all(type(a) is int and abs(a) < 1000 for a in arguments)
        if function == "range" and are_small and len(arguments) in (1, 2):
            return list(range(*arguments))
        wraps = re.fullmatch(r"list|tuple|array|tensor|u?int\d*|float\d*|str_", function)
        if wraps and len(arguments) == 1:  # keywords are dtype and device
            return arguments[0]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        line = getattr(node, "lineno", "?")
        raise ValueError(f"only literals and range(...) may stand here (line {line})") from None


def _from_any(fields: dict) -> Genotype:
    """Build a genotype from the fields of any code."""
    fields = next((fields[key] for key in INNER if isinstance(fields.get(key), dict)), fields)
    bench = {}  # by ("edge" or "inputs_node", cell, number)
    for key, value in fields.items():
        match = re.fullmatch(r"(?:.*(?::|_COLON_))?(edge|inputs_node)_(normal|reduce)_(\d+)", key)
        if match and value is not None:
            bench[match[1], match[2], int(match[3])] = value
    if bench:
        return _from_nas_bench_301(bench)
    return _from_nni(fields) if any("/" in key for key in fields) else _from_fields(fields)


def _from_fields(fields: dict) -> Genotype:
    """Build a genotype from quark0's flat lists, pt.darts' list per node, or our JSON.

    Further fields that are None are left out, and so is the weight of (op, input, weight).
    """
    missing = [key for key in Genotype._fields if key not in fields]
    known = set(Genotype._fields)
    unknown = [key for key, value in fields.items() if key not in known and value is not None]
    if missing or unknown:
        raise ValueError(f"missing fields {missing}, unknown fields {unknown}")
    values = {key: fields[key] for key in Genotype._fields}
    if not all(map(_is_list, values.values())):
        raise ValueError(f"each of {', '.join(Genotype._fields)} must be a list")
    for kind in ("normal", "reduce"):
        edges = values[kind]
        if edges and all(_is_list(e) and e and all(map(_is_list, e)) for e in edges):  # pt.darts
            for node, pair in enumerate(edges, start=2):
                if len(pair) != 2:
                    raise ValueError(f"{kind} cell, node {node}: {len(pair)} edges; a node has 2")
            edges = [edge for pair in edges for edge in pair]
        values[kind] = [_edge(edge, kind) for edge in edges]
        _refuse_all_edges(values[kind], values[f"{kind}_concat"], kind)
    return Genotype(**{key: tuple(value) for key, value in values.items()})


def _edge(edge, kind: str):
    """Return (op, predecessor) with our name of the operation; leave what is no edge as it is."""
    if not _is_list(edge):
        return edge
    edge = tuple(edge)
    if len(edge) == 3 and isinstance(edge[0], str):
        if type(edge[1]) is type(edge[2]) is int:
            raise ValueError(
                f"{kind} cell: {edge!r} is FairDARTS' triple (operation, node, input), which is "
                "not supported; write two pairs (operation, input) for each node, in their order"
            )
        edge = edge[:2] if isinstance(edge[2], float) else edge
    if len(edge) == 2 and isinstance(edge[0], str):
        edge = KATIB.get(edge[0], edge[0]), edge[1]
    return edge


def _refuse_all_edges(edges: list, concat: list, kind: str) -> None:
    """Raise a ValueError on a cell that keeps all its edges, which looks like one of more nodes."""
    num_nodes = len(concat)
    if num_nodes > 1 and len(edges) == num_nodes * (num_nodes + 3) // 2:
        predecessors = [(j,) for node in range(num_nodes) for j in range(2 + node)]
        if [edge[1:] for edge in edges if _is_list(edge)] == predecessors:
            raise ValueError(
                f"{kind} cell: {len(edges)} edges for {num_nodes} nodes; only cells with two edges "
                "a node are supported"
            )


def _is_list(value) -> bool:
    return isinstance(value, list | tuple)


def _from_nni(arch: dict) -> Genotype:
    """Build a genotype from NNI's `{'normal/op_2_0': ..., 'normal/input_2_0': [0] or 0, ...}`."""
    cells, unread = {}, dict(arch)
    for kind in ("normal", "reduce"):
        edges, node = [], 2
        while f"{kind}/op_{node}_0" in arch or f"{kind}/op_{node}_1" in arch:
            for slot in (0, 1):
                keys = f"{kind}/op_{node}_{slot}", f"{kind}/input_{node}_{slot}"
                if missing := [key for key in keys if key not in arch]:
                    raise ValueError(f"missing key {missing[0]!r}")
                op, predecessor = (unread.pop(key) for key in keys)
                if _is_list(predecessor) and len(predecessor) == 1:
                    predecessor = predecessor[0]
                edges.append((op, predecessor))
            node += 1
        cells |= {kind: tuple(edges), f"{kind}_concat": tuple(range(2, node))}
    if unread:
        raise ValueError(f"unknown key {next(iter(unread))!r}")
    return Genotype(**cells)


def _from_nas_bench_301(fields: dict[tuple[str, str, int], str]) -> Genotype:
    """Build a genotype from NAS-Bench-301's `edge_normal_3: op` and `inputs_node_normal_4: 0_2`.

    Edges are counted over (node, predecessor). Node 2 has both inputs and names none.
    """
    cells, unread = {}, {("inputs_node", kind, 2): "0_1" for kind in ("normal", "reduce")} | fields
    for kind in ("normal", "reduce"):
        edges = []
        for node in range(2, 6):
            inputs = str(unread.pop(("inputs_node", kind, node), "")).split("_")
            if len(inputs) != 2 or not all(i in "01234" and i for i in inputs):
                raise ValueError(f"inputs_node_{kind}_{node} is not of the form '0_2'")
            for predecessor in map(int, inputs):
                number = (node - 2) * (node + 1) // 2 + predecessor
                if ("edge", kind, number) not in unread:
                    raise ValueError(f"missing key edge_{kind}_{number}")
                edges.append((unread.pop(("edge", kind, number)), predecessor))
        cells |= {kind: tuple(edges), f"{kind}_concat": (2, 3, 4, 5)}
    if unread:
        raise ValueError(f"no node reads {'_'.join(map(str, next(iter(unread))))}")
    return Genotype(**cells)
