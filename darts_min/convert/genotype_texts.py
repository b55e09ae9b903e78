"""Genotypes as text: the forms of the original code, pt.darts and NNI, and this project's JSON."""

import ast
import json
import os
import re
from pathlib import Path

from darts_min.genotypes import PUBLISHED, Genotype, check_genotype, random_genotype

FORMS = ("json", "quark0", "pt.darts", "nni")


def parse_genotype(source: str | Path) -> Genotype:
    """Read a genotype from a name, a file, a run folder, or text in any of `FORMS`.

    A name is a published one (`DARTS_V2`) or `random:SEED`. Nothing is evaluated: Python text is
    parsed to a syntax tree, and only literals and `range(...)` are accepted. Raises a ValueError
    that says what is wrong and where.
    """
    if str(source) in PUBLISHED:
        return PUBLISHED[str(source)]
    if match := re.fullmatch(r"random:(\d{1,18})", str(source)):
        return random_genotype(int(match[1]))
    text, where = str(source), "genotype"
    is_path = isinstance(source, Path) or os.path.exists(text)
    if is_path or not any(bracket in text for bracket in "({"):
        is_short = len(text) <= 200 and text.isprintable()
        where = f"genotype {text if is_short else repr(text[:60])}"
        text = _read_file(Path(source), where)
    try:
        fields = _read_fields(text)
        is_nni = any("/" in key for key in fields)
        return check_genotype(_from_nni(fields) if is_nni else _from_fields(fields))
    except ValueError as error:
        message = str(error).removeprefix("genotype, ").removeprefix("genotype: ")
        raise ValueError(f"{where}: {message}") from None


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
    """Return the text of a file, or of `genotype.json` in a folder; errors begin with `where`."""
    try:
        path = path / "genotype.json" if path.is_dir() else path
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        names = ", ".join(PUBLISHED)
        raise ValueError(f"{where}: neither a file nor one of {names}, random:SEED") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{where}: cannot be read as text: {reason}") from None


def _read_fields(text: str) -> dict:
    """Return the fields of a JSON object, a Python dict or a `Genotype(...)` call."""
    blank_lines = "\n" * text[: len(text) - len(text.lstrip())].count("\n")
    try:  # with the blank lines, an error names the line of the file
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
        raise ValueError("each key must be a string and must not be repeated")
    return {key: _literal(value) for key, value in zip(keys, values, strict=True)}


def _name(function: ast.AST) -> str | None:
    """Return the last part of a dotted name."""
    return getattr(function, "id", getattr(function, "attr", None))


def _literal(node: ast.AST | None):
    """Return the value of a literal, of `range(a, b)` or of `list(range(a, b))`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        arguments = [_literal(argument) for argument in node.args]
        are_small = all(type(a) is int and abs(a) < 1000 for a in arguments)
        if node.func.id == "range" and are_small and len(arguments) in (1, 2):
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
