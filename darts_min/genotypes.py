"""Genotypes: the discrete cells of DARTS, how they are chosen, written and read. Without torch.

A cell (Sec. 2.1) has two input states, 0 and 1, and intermediate nodes that become the states
2, 3, ... A discrete node adds up two operations, each on an earlier state; the cell's output
concatenates the nodes.
"""

import ast
import json
import math
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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
# `noise` is for the space S4 alone (spaces.py).
OPERATIONS = (*PRIMITIVES, "noise")

FORMS = ("json", "quark0", "pt.darts", "nni")


class Genotype(NamedTuple):
    """A normal and a reduction cell: `(op, predecessor)` twice per node, in node order."""

    normal: tuple[tuple[str, int], ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[tuple[str, int], ...]
    reduce_concat: tuple[int, ...]


# For the tables here and in spaces.py.
SHORT_NAMES = {
    "max": "max_pool_3x3",
    "avg": "avg_pool_3x3",
    "skip": "skip_connect",
    "sep3": "sep_conv_3x3",
    "sep5": "sep_conv_5x5",
    "dil3": "dil_conv_3x3",
    "dil5": "dil_conv_5x5",
}


def _cell(text: str) -> tuple[tuple[str, int], ...]:
    """Expand `sep3-0 skip-1 ...`."""
    edges = (edge.split("-") for edge in text.split())
    return tuple((SHORT_NAMES[op], int(predecessor)) for op, predecessor in edges)


def _published(normal: str, reduce: str) -> Genotype:
    return Genotype(_cell(normal), (2, 3, 4, 5), _cell(reduce), (2, 3, 4, 5))


PUBLISHED = {
    # Paper, first and second order; the genotypes as the original code published them.
    "DARTS_V1": _published(
        "sep3-1 sep3-0 skip-0 sep3-1 skip-0 sep3-1 sep3-0 skip-2",
        "max-0 max-1 skip-2 max-0 max-0 skip-2 skip-2 avg-0",
    ),
    "DARTS_V2": _published(
        "sep3-0 sep3-1 sep3-0 sep3-1 sep3-1 skip-0 skip-0 dil3-2",
        "max-0 max-1 skip-2 max-1 max-0 skip-2 skip-2 max-1",
    ),
    # NNI 3.0's tutorial: 89.69 % with its plain recipe, 97.12 % at the last epoch of its full one.
    "NNI_PLAIN": _published(
        "sep3-1 sep3-0 sep3-1 sep3-2 sep3-1 sep3-0 sep3-1 max-0",
        "sep3-0 sep3-1 dil5-2 sep3-0 dil5-2 sep5-1 sep5-4 dil5-2",
    ),
    "NNI_FULL": _published(
        "sep3-0 sep3-1 sep3-1 skip-0 sep3-0 max-1 sep3-0 sep3-1",
        "max-0 sep5-1 dil5-0 max-1 max-0 sep3-2 max-0 skip-2",
    ),
}


def random_genotype(seed: int, num_nodes: int = 4) -> Genotype:
    """Draw a genotype, uniformly over the space: the baseline of arXiv 1902.07638 and 1902.08142.

    Every node gets two different predecessors, each pair equally likely, and for each an operation
    other than `none`. Raises ValueError on a negative seed.
    """
    if seed < 0:
        raise ValueError(f"seed {seed}: must be at least 0")
    rng = random.Random(seed)

    def cell() -> tuple[tuple[str, int], ...]:
        pairs = [sorted(rng.sample(range(node), 2)) for node in range(2, 2 + num_nodes)]
        return tuple((rng.choice(PRIMITIVES[1:]), j) for pair in pairs for j in pair)

    concat = tuple(range(2, 2 + num_nodes))
    return Genotype(cell(), concat, cell(), concat)


def kept_edges(cell: Sequence[tuple[str, int]]) -> list[int]:
    """Return the rows of alpha, in (node, predecessor) order, that a discrete cell's edges have."""
    nodes = (i // 2 for i in range(len(cell)))
    return [node * (node + 3) // 2 + j for node, (_, j) in zip(nodes, cell, strict=True)]


def choose_cell(
    scores: Sequence[Sequence[float]],
    primitives: Sequence[str],
    ties: str = "first",
    max_skips: int | None = None,
) -> tuple[tuple[str, int], ...]:
    """Keep two edges per node and one operation per edge (Sec. 2.4).

    `scores` is (edges, ops), edges in (node, predecessor) order. An edge scores as its best
    operation other than `none`; a node keeps its two best edges, in descending order. Equal scores
    go to the lower predecessor and the earlier primitive (`ties="first"`, the original code) or to
    the larger predecessor and the later name (`ties="last"`, NNI). With `max_skips`, the weakest of
    more skip connections is ruled out and the cell chosen anew, until so many are left (P-DARTS,
    arXiv 1904.12760, Sec. 3.3). Raises ValueError where there is nothing else to choose.
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
    edges = zip(kept_edges(cell), cell, strict=True)
    rows = [row for row, (op, _) in edges if op == "skip_connect"]
    if max_skips is not None and len(rows) > max_skips:
        skip = primitives.index("skip_connect")
        weakest = min(rows, key=lambda row: scores[row][skip])
        if scores[weakest][skip] == -math.inf:
            raise ValueError(f"max_skips {max_skips}: there are too few other operations")
        ruled_out = [list(row) for row in scores]
        ruled_out[weakest][skip] = -math.inf
        return choose_cell(ruled_out, primitives, ties, max_skips)
    return tuple(cell)


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
            if op not in OPERATIONS or op == "none":
                known = ", ".join(OPERATIONS[1:])
                raise ValueError(f"{where}: unknown operation {op!r}; known are {known}")
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
    """Return, of each cell, the states that do not reach its output: their weights get no gradient.

    The keys are "normal" and "reduce".
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
    """Return a line for each cell with nodes that do not reach its output; inputs may be unused."""
    lines = []
    for kind, states in unused_states(genotype).items():
        if nodes := [str(state) for state in states if state >= 2]:
            named = f"node{'s' * (len(nodes) > 1)} {', '.join(nodes)}"
            lines.append(
                f"warning: genotype, {kind} cell: the output does not depend on {named}: computed "
                "for nothing, not trained"
            )
    return lines


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


def parse_genotype(source: str | Path) -> Genotype:
    """Read a published name, `random:SEED`, a file (or run folder), or text in any of `FORMS`.

    Nothing is evaluated: Python text is parsed to a syntax tree, and only literals and `range(...)`
    are accepted. Raises ValueError that says what is wrong and where.
    """
    if str(source) in PUBLISHED:
        return PUBLISHED[str(source)]
    if match := re.fullmatch(r"random:(\d{1,18})", str(source)):
        return random_genotype(int(match[1]))
    text, where = str(source), "genotype"
    is_path = isinstance(source, Path) or os.path.exists(text)
    if is_path or not any(bracket in text for bracket in "({"):
        path = Path(source)
        is_short = len(text) <= 200 and text.isprintable()
        where = f"genotype {text if is_short else repr(text[:60])}"
        try:
            path = path / "genotype.json" if path.is_dir() else path
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            names = ", ".join(PUBLISHED)
            raise ValueError(f"{where}: neither a file nor one of {names}, random:SEED") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{where}: cannot be read as text: {reason}") from None
    try:
        fields = _read_fields(text)
        if any("/" in key for key in fields):
            return check_genotype(_from_nni(fields))
        return check_genotype(_from_fields(fields))
    except ValueError as error:
        message = str(error).removeprefix("genotype, ").removeprefix("genotype: ")
        raise ValueError(f"{where}: {message}") from None


def format_genotype(genotype: Genotype, form: str = "json") -> str:
    """Write `genotype` as text that `parse_genotype` and the code named by `form` read."""
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


def _read_fields(text: str) -> dict:
    """Return the fields of a JSON object, a Python dict or a `Genotype(...)` call."""
    blank_lines = "\n" * text[: len(text) - len(text.lstrip())].count("\n")  # keep line numbers
    try:
        tree = ast.parse(blank_lines + text.strip())
    except SyntaxError as error:
        place = f"line {error.lineno}, column {error.offset}"
        raise ValueError(f"{error.msg} ({place})") from None
    except (RecursionError, MemoryError):
        raise ValueError("nested too deeply") from None
    statement = tree.body[-1] if len(tree.body) == 1 else None
    node = getattr(statement, "value", None)
    if isinstance(node, ast.Dict):
        keys, values = [_literal(key) for key in node.keys], node.values
    elif isinstance(node, ast.Call) and not node.args and _name(node.func) == "Genotype":
        keys = [keyword.arg for keyword in node.keywords]
        values = [keyword.value for keyword in node.keywords]
    else:
        raise ValueError("neither 'Genotype(normal=..., ...)' nor a JSON object or dict")
    if not all(isinstance(key, str) for key in keys) or len(set(keys)) < len(keys):
        raise ValueError("every key must be a string, and come once")
    return {key: _literal(value) for key, value in zip(keys, values, strict=True)}


def _name(function: ast.AST) -> str | None:
    """Return the last part of a dotted name."""
    return getattr(function, "id", getattr(function, "attr", None))


def _literal(node: ast.AST | None):
    """Evaluate a literal, `range(a, b)` or `list(range(a, b))`; nothing else."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        arguments = [_literal(argument) for argument in node.args]
        small = all(type(a) is int and abs(a) < 1000 for a in arguments)
        if node.func.id == "range" and small and len(arguments) in (1, 2):
            return list(range(*arguments))
        if node.func.id in ("list", "tuple") and len(arguments) == 1:
            return arguments[0]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        line = getattr(node, "lineno", "?")
        raise ValueError(f"only literals and range(...) may stand here (line {line})") from None


def _from_fields(fields: dict) -> Genotype:
    """Build a genotype from quark0's flat lists, pt.darts' list per node, or our JSON."""
    missing = [key for key in Genotype._fields if key not in fields]
    unknown = [key for key in fields if key not in Genotype._fields]
    if missing or unknown:
        raise ValueError(f"missing fields {missing}, unknown fields {unknown}")
    if not all(isinstance(value, list | tuple) for value in fields.values()):
        raise ValueError(f"each of {', '.join(Genotype._fields)} must be a list")
    values = {key: list(value) for key, value in fields.items()}
    for kind in ("normal", "reduce"):
        edges = values[kind]
        if edges and all(_is_list(e) and e and all(map(_is_list, e)) for e in edges):  # pt.darts
            for node, pair in enumerate(edges, start=2):
                if len(pair) != 2:
                    raise ValueError(f"{kind} cell, node {node}: {len(pair)} edges; a node has 2")
            edges = [edge for pair in edges for edge in pair]
        values[kind] = [tuple(edge) if _is_list(edge) else edge for edge in edges]
    return Genotype(**{key: tuple(value) for key, value in values.items()})


def _is_list(value) -> bool:
    return isinstance(value, list | tuple)


def _from_nni(arch: dict) -> Genotype:
    """Build a genotype from NNI's `{'normal/op_2_0': ..., 'normal/input_2_0': [0] or 0, ...}`."""
    cells, left = {}, dict(arch)
    for kind in ("normal", "reduce"):
        edges, node = [], 2
        while f"{kind}/op_{node}_0" in arch or f"{kind}/op_{node}_1" in arch:
            for slot in (0, 1):
                keys = f"{kind}/op_{node}_{slot}", f"{kind}/input_{node}_{slot}"
                if missing := [key for key in keys if key not in arch]:
                    raise ValueError(f"missing key {missing[0]!r}")
                op, predecessor = (left.pop(key) for key in keys)
                if _is_list(predecessor) and len(predecessor) == 1:
                    predecessor = predecessor[0]
                edges.append((op, predecessor))
            node += 1
        cells |= {kind: tuple(edges), f"{kind}_concat": tuple(range(2, node))}
    if left:
        raise ValueError(f"unknown key {next(iter(left))!r}")
    return Genotype(**cells)
