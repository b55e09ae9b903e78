"""Read and write files of networks: ours, the shipped ones, and those of other DARTS codes."""

import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from darts_min.convert.genotype_texts import format_genotype, parse_genotype
from darts_min.convert.state_dicts import (
    BOOKKEEPING,
    StateDict,
    count_distinct,
    network_from_nni,
    network_from_pytorchcv,
    network_from_quark0,
    unwrapped,
)
from darts_min.genotypes import PUBLISHED, Genotype, reduction_cells
from darts_min.network import Network
from darts_min.run.files import load_file, to_bytes, write_atomically

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CHECKPOINT_KEYS = (  # where other codes put the state dict
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "weights",
)
SHIPPED = Path(__file__).parent / "pretrained"


def names() -> list[str]:
    """List the names of the networks that ship with this package."""
    return [path.stem for path in sorted(SHIPPED.glob("*.pt"))]


def load_network(path_or_name: str | Path, genotype: str | None = None) -> Network:
    """Load a network from a file of any form: in evaluation mode, in float32, on the CPU.

    `path_or_name` is a file, one of `names()`, or a run folder of train_final.py. A state dict of
    another code holds no genotype. Give it as `genotype`, in any form that `parse_genotype` reads;
    only a published genotype can be left out, because `infer_genotype` recognises its operations.
    Then `.details["inferred"]` is its name: a warning that a cell with the same operations on other
    states looks the same. For a file of ours, `.details` are what `save_network` was given.

    Code in a file is never run. Raises a ValueError of one line if the file does not exist, is
    damaged, or has no known form.
    """
    path = Path(path_or_name)
    if str(path_or_name) in names() and not os.path.isfile(path):
        path = SHIPPED / f"{path_or_name}.pt"
    elif not os.path.exists(path):  # unlike path.exists(), also False for names too long
        raise ValueError(f"network {path}: neither a file nor one of {', '.join(names())}")
    path = path / "network.pt" if path.is_dir() else path
    content = load_file(path)
    try:
        if isinstance(content, dict) and content.get("format") == "darts_min.network":
            if genotype is not None:
                raise ValueError("the file has its own genotype; leave --genotype out")
            return _from_ours(content)
        return _from_state_dict(content, genotype)
    except ValueError as error:
        first, *keys = str(error).split("; ")
        more = [f"{len(keys) - 5} more"] if len(keys) > 5 else keys[5:]
        raise ValueError(f"file {path}: {'; '.join([first, *keys[:5], *more])}") from None


def save_network(
    network: Network,
    path: Path,
    details: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the file that `load_network` reads, with `details` beside the network.

    `details` are plain values. They should hold what evaluation on other images needs: `classes`,
    `mean`, `std`, `image_size` and `crop` (see `folder.read_image`). `dtype` is the type of the
    stored weights.
    """
    state_dict = {
        key: tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        for key, tensor in network.state_dict().items()
    }
    content = {
        "format": "darts_min.network",
        "genotype": format_genotype(network.genotype, "json"),
        "config": network.config,
        "details": details,
        "state_dict": state_dict,
    }
    write_atomically(path, to_bytes(content))


def _from_ours(content: dict[str, Any]) -> Network:
    """Build the network that `save_network` wrote; any damage gives a ValueError."""
    try:
        config, state_dict = content["config"], content["state_dict"]
        _check_tensors(state_dict)
        # Check the number of cells before a network of that many cells is made.
        in_file = {key.split(".")[1] for key in state_dict if key.startswith("cells.")}
        if config["num_cells"] != len(in_file):
            raise ValueError(f"num_cells {config['num_cells']}, but tensors of {len(in_file)}")
        with torch.device("meta"):
            network = Network(parse_genotype(content["genotype"]), **config)
        state_dict = {k: t.float() if t.is_floating_point() else t for k, t in state_dict.items()}
        network.load_state_dict(state_dict, assign=True)
        network.details = dict(content["details"])
        for key, size in (
            ("classes", config["num_classes"]),
            ("mean", config["in_channels"]),
            ("std", config["in_channels"]),
        ):
            if len(network.details.get(key, range(size))) != size:
                raise ValueError(f"{len(network.details[key])} {key} for {size}")
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"damaged: {' '.join(str(error).split())}") from None
    return network.eval()


def _from_state_dict(content: Any, genotype: str | None) -> Network:
    """Read a state dict of another code, which may be one of the entries of a checkpoint."""
    for _ in range(2):
        inner = [content.get(key) for key in CHECKPOINT_KEYS] if isinstance(content, dict) else []
        content = next((entry for entry in inner if isinstance(entry, dict)), content)
    _check_tensors(content)
    content = unwrapped(content)
    form = form_of(content)
    if form == "quark0 search":
        raise ValueError(
            "search weights of the original code, not a network; read them in Python with "
            "darts_min.convert.supernet_from_quark0"
        )
    if form is None:
        own = any(key.startswith("cells.0.edges.") for key in content)
        raise ValueError(
            "neither a network file nor a state dict of the original code's or NNI's"
            + (
                ", but one of this project's without its genotype: use save_network"
                if own
                else f" (the first name is {next(iter(content), None)!r})"
            )
        )
    details = {}
    if form == "pytorchcv":
        if genotype is not None:
            raise ValueError("pytorchcv's network is DARTS_V2; leave --genotype out")
        network = network_from_pytorchcv(content)
    else:
        try:
            cells = parse_genotype(genotype) if genotype else infer_genotype(content)
        except ValueError as error:
            raise ValueError(f"{error}{'' if genotype else '; give --genotype'}") from None
        if not genotype:
            (details["inferred"],) = (name for name in PUBLISHED if PUBLISHED[name] == cells)
        convert = network_from_nni if form == "nni" else network_from_quark0
        network = convert(content, cells)
    network.details = details
    return network.float()


def form_of(state_dict: StateDict) -> str | None:
    """Tell which code wrote a state dict: "quark0", "quark0 search", "nni", "pytorchcv" or None.

    "quark0" is the original code; "quark0 search" is its supernet.
    """
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
    """Return the published genotype that has the operations of a quark0 or NNI state dict.

    The shapes of the kernels tell the operations, except pools and identity skips, which have no
    weights. Nothing tells the states on which the operations are, so that a genotype outside
    `PUBLISHED` cannot be inferred. Raises a ValueError that names the genotypes if several fit, and
    the operations if none fits.
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
            f"reduce: {reduce}), and a state dict does not say on which states they are"
        )
    return PUBLISHED[fitting[0]]


def _operations(state_dict: StateDict) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Return, for each edge of the normal and the reduction cell, the operations that fit."""
    quark0 = r"cells\.(?P<cell>\d+)\._ops\.(?P<slot>\d+)\.(op\.)?(?P<layer>\w+)\.weight"
    nni = r"stages\.(?P<cell>\d+\.\d+)\.ops\.(?P<node>\d+)\.(?P<slot>\d+)\.(?P<layer>\w+)\.weight"
    num_cells = count_distinct(state_dict, r"cells\.(\d+)\.")
    reductions = {"1.0", "2.0", *map(str, reduction_cells(num_cells))}  # of NNI, of quark0
    slots: list[defaultdict[int, dict[str, Tensor]]] = [defaultdict(dict), defaultdict(dict)]
    for key, tensor in state_dict.items():
        if match := re.match(quark0, key) or re.match(nni, key):
            slot = int(match["slot"]) + 2 * int(match.groupdict().get("node", 0))
            slots[match["cell"] in reductions][slot][match["layer"]] = tensor
    num_slots = max([8, *(slot + 1 for cell in slots for slot in cell)])
    if num_slots > 100:
        raise ValueError(f"state dict: operation {num_slots - 1} of a cell")
    normal, reduce = ([_operations_of(cell[i]) for i in range(num_slots)] for cell in slots)
    return normal, reduce


def _operations_of(layers: dict[str, Tensor]) -> tuple[str, ...]:
    """Return the operations that can have these layers, by the original code's names."""
    if not layers:
        return "max_pool_3x3", "avg_pool_3x3", "skip_connect"
    if "1" not in layers:  # conv_1 and conv_2 of a FactorizedReduce
        return ("skip_connect",)
    size = (layers["1"].shape or (0,))[-1]
    return (f"{'sep' if '5' in layers else 'dil'}_conv_{size}x{size}",)


def _check_tensors(state_dict: Any) -> None:
    """Raise a ValueError unless `state_dict` maps names to tensors of finite numbers."""
    if not isinstance(state_dict, dict) or not state_dict:
        raise ValueError("neither a network file nor a state dict")
    for key, tensor in state_dict.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"neither a network file nor a state dict: {key!r} is not a tensor")
        if key.rpartition(".")[2] in BOOKKEEPING:
            continue
        is_count = key.endswith("num_batches_tracked") and tensor.dtype == torch.int64
        if (
            tensor.layout != torch.strided
            or tensor.device.type == "meta"
            or (tensor.dtype not in FLOATS and not is_count)
            or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()
        ):
            kind = f"{tensor.dtype}, shape {tuple(tensor.shape)}"
            raise ValueError(f"{key} is not an ordinary tensor of real numbers ({kind})")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} holds values that are not finite")
