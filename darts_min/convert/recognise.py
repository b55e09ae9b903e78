"""Whose names a state dict has, and which genotype."""

import re

from torch import Tensor

from darts_min.convert.state_dicts import StateDict, count_distinct, unwrapped
from darts_min.genotypes import PUBLISHED, Genotype


def form_of(state_dict: StateDict) -> str | None:
    """Return "quark0", "quark0 search", "nni", "pytorchcv", or None: whose names these are."""
    keys = list(unwrapped(state_dict))
    if any(key.startswith("stages.") for key in keys):
        return "nni"
    if any(key.startswith("features.stage1.unit1.body.") for key in keys):
        return "pytorchcv"
    if any(re.match(r"cells\.\d+\._ops\.\d+\._ops\.", key) for key in keys):
        return "quark0 search"
    is_quark0 = any(re.match(r"cells\.\d+\.(preprocess1\.op|_ops)\.", key) for key in keys)
    return "quark0" if is_quark0 else None


def infer_genotype(state_dict: StateDict) -> Genotype:
    """Return the one published genotype that has the operations of a quark0 or NNI state dict.

    The kernels tell the operations, up to pools and identity skips, which have no weights. Nothing
    tells which states they read, so that a cell of nobody's list cannot be inferred. Raises a
    ValueError with the genotypes that fit if there are several, and with the operations if none
    does.
    """
    cells = _operations(unwrapped(state_dict))
    fitting = [
        name
        for name, genotype in PUBLISHED.items()
        if all(
            len(cell) == len(slots)
            and all(op in ops for (op, _), ops in zip(cell, slots, strict=True))
            for cell, slots in ((genotype.normal, cells[0]), (genotype.reduce, cells[1]))
        )
    ]
    if len(fitting) > 1:
        raise ValueError(f"several genotypes fit: {', '.join(fitting)}")
    if not fitting:
        normal, reduce = (" ".join("|".join(ops) for ops in slots) for slots in cells)
        raise ValueError(
            f"no published genotype has the operations of this state dict (normal: {normal}; "
            f"reduce: {reduce}), and it does not say on which states they are"
        )
    return PUBLISHED[fitting[0]]


def _operations(state_dict: StateDict) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Return the operations that are possible in each slot of the normal and the reduction cell."""
    quark0 = r"cells\.(?P<cell>\d+)\._ops\.(?P<slot>\d+)\.(op\.)?(?P<layer>\w+)\.weight"
    nni = r"stages\.(?P<cell>\d+\.\d+)\.ops\.(?P<node>\d+)\.(?P<slot>\d+)\.(?P<layer>\w+)\.weight"
    num_cells = count_distinct(state_dict, r"cells\.(\d+)\.")
    reductions = {"1.0", "2.0", str(num_cells // 3), str(2 * num_cells // 3)}
    layers: list[dict[int, dict[str, Tensor]]] = [{}, {}]
    for key, tensor in state_dict.items():
        if match := re.match(quark0, key) or re.match(nni, key):
            slot = int(match["slot"]) + 2 * int(match.groupdict().get("node", 0))
            kind = match["cell"] in reductions
            layers[kind].setdefault(slot, {})[match["layer"]] = tensor
    cells = []
    num_slots = max([8, *(slot + 1 for cell in layers for slot in cell)])
    if num_slots > 100:
        raise ValueError(f"state dict: operation {num_slots - 1} of a cell")
    for cell in layers:
        slots = []
        for slot in range(num_slots):
            if slot not in cell:
                slots.append(("max_pool_3x3", "avg_pool_3x3", "skip_connect"))
            elif "1" not in cell[slot]:
                slots.append(("skip_connect",))
            else:
                size = (cell[slot]["1"].shape or (0,))[-1]
                slots.append((f"{'sep' if '5' in cell[slot] else 'dil'}_conv_{size}x{size}",))
        cells.append(slots)
    return cells[0], cells[1]
