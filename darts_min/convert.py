"""Networks written by other DARTS codes <-> ours.

"quark0" is the original code, "nni" NNI 3.0. Their state dicts differ from ours in names only (and
in the supernet, where we keep the edges that leave a state side by side).
"""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from darts_min.genotypes import PRIMITIVES, Genotype, parse_genotype
from darts_min.network import Cell, Network
from darts_min.operations import FactorizedReduce, SepConv
from darts_min.supernet import Supernet

StateDict = Mapping[str, Tensor]

# Our module -> the index in their Sequential, for an operation on one edge.
SEP_CONV = {
    "depthwise1": 1,
    "pointwise1": 2,
    "bn1": 3,
    "depthwise2": 5,
    "pointwise2": 6,
    "bn2": 7,
}
DIL_CONV = {"depthwise": 1, "pointwise": 2, "bn": 3}
CONV_BN = {"conv": 1, "bn": 2}
FACTORIZED_REDUCE = {"conv1": "conv_1", "conv2": "conv_2", "bn": "bn"}
AUXILIARY_HEAD = {
    "conv1": "features.2",
    "bn1": "features.3",
    "conv2": "features.5",
    "bn2": "features.6",
    "classifier": "classifier",
}


def supernet_from_quark0(state_dict: StateDict, alphas: list[Tensor]) -> Supernet:
    """Build our supernet from the original's search weights and `[alphas_normal, alphas_reduce]`.

    Sizes are read from the shapes. Raises one ValueError that lists every missing, unexpected or
    misshapen key.
    """
    stem, classifier = _sizes(state_dict, "stem.0.weight")
    if len(alphas) != 2 or alphas[0].dim() != 2 or alphas[0].shape != alphas[1].shape:
        shapes = [tuple(alpha.shape) for alpha in alphas]
        raise ValueError(f"alphas have shapes {shapes}; must be two of (edges, ops)")
    num_edges, num_ops = alphas[0].shape
    if num_ops != len(PRIMITIVES):
        raise ValueError(f"alphas have {num_ops} operations; must be {len(PRIMITIVES)}")
    num_nodes = next((n for n in range(1, 100) if n * (n + 3) // 2 == num_edges), None)
    if num_nodes is None:
        raise ValueError(f"alphas have {num_edges} rows; n nodes have n * (n + 3) / 2 edges")
    supernet = Supernet(
        num_classes=classifier[0],
        init_channels=stem[0] // 3,
        num_cells=_count(state_dict, r"cells\.(\d+)\."),
        num_nodes=num_nodes,
        in_channels=stem[1],
    ).to(state_dict["stem.0.weight"])

    sources = dict(_supernet_sources(supernet))
    ours, wanted, problems = supernet.state_dict(), set(), []
    for name, theirs in sources.items():
        wanted.update(theirs)
        rows, *rest = ours[name].shape
        shape = (rows // len(theirs), *rest)
        misfits = [misfit for key in theirs if (misfit := _misfit(state_dict, key, shape))]
        problems += misfits
        if not misfits:
            ours[name] = torch.cat([state_dict[key] for key in theirs])
    ignored = re.compile(r".*\.(running_mean|running_var|num_batches_tracked)$")
    problems += [f"unexpected {k}" for k in state_dict if k not in wanted and not ignored.match(k)]
    _raise(problems)
    ours |= {"alphas_normal": alphas[0], "alphas_reduce": alphas[1]}
    supernet.load_state_dict(ours)
    return supernet


def _supernet_sources(supernet: Supernet) -> Iterator[tuple[str, list[str]]]:
    """Yield each of our parameters with the names of the tensors that it is made of."""
    num_nodes = supernet.num_nodes
    first_edge = [node * (node + 3) // 2 for node in range(num_nodes)]
    for name in supernet.state_dict():
        part, *path = name.split(".")
        if part in ("stem", "classifier"):
            yield name, [name]
        elif part == "cells" and path[1].startswith("preprocess"):
            k, preprocess, module, leaf = path
            theirs = FACTORIZED_REDUCE.get(module, f"op.{CONV_BN.get(module)}")
            yield name, [f"cells.{k}.{preprocess}.{theirs}.{leaf}"]
        elif part == "cells":
            k, _, state, _, op, module, leaf = path
            if op == "skip_connect":
                theirs = FACTORIZED_REDUCE[module]
            else:
                theirs = f"op.{(SEP_CONV if op.startswith('sep') else DIL_CONV)[module]}"
            j, index = int(state), PRIMITIVES.index(op)
            edges = [first_edge[node] + j for node in range(max(0, j - 1), num_nodes)]
            yield name, [f"cells.{k}._ops.{e}._ops.{index}.{theirs}.{leaf}" for e in edges]


def network_from_quark0(state_dict: StateDict, genotype: Genotype) -> Network:
    """Build our network from the state dict of the original's CIFAR or ImageNet network.

    Sizes are read from the shapes; a missing `num_batches_tracked` (PyTorch < 0.4.1) counts as 0.
    Raises one ValueError that lists every missing, unexpected or misshapen key.
    """
    num_cells = _count(state_dict, r"cells\.(\d+)\.")
    return _from_names(state_dict, genotype, num_cells, "quark0")


def network_from_nni(state_dict: StateDict, arch: dict | Genotype) -> Network:
    """Build our network from the state dict of NNI's DARTS space and its architecture dict.

    Keys of networks built with drop path (`...NODE.SLOT.0.J`) are recognised. Errors as in
    `network_from_quark0`.
    """
    genotype = arch if isinstance(arch, Genotype) else parse_genotype(repr(arch))
    unwrap = re.compile(r"(stages\.\d+\.\d+\.ops\.\d+\.\d+)\.0\.(?=\d+\.|conv_|bn\.)")
    state_dict = {unwrap.sub(r"\1.", key): tensor for key, tensor in state_dict.items()}
    blocks = {match[0] for key in state_dict if (match := re.match(r"stages\.\d+\.\d+\.", key))}
    return _from_names(state_dict, genotype, len(blocks), "nni")


def network_to_quark0(network: Network) -> dict[str, Tensor]:
    """Return the network's state dict under the original code's names, in its order."""
    return _to_names(network, "quark0")


def network_to_nni(network: Network) -> dict[str, Tensor]:
    """Return the network's state dict under NNI's names (without drop path's wrapping)."""
    return _to_names(network, "nni")


def _modules(network: Network, form: str) -> Iterator[tuple[str, str]]:
    """Yield our modules that hold tensors and their names in `form`, in the order of `form`."""
    if network.config["stem"] == "cifar":
        yield from (("stem.0", "stem.0"), ("stem.1", "stem.1"))
    else:
        yield from ((f"stem0.{i}", f"stem0.{i}") for i in (0, 1, 3, 4))
        yield from (("stem1.0", "stem1.1"), ("stem1.1", "stem1.2"))
    starts = [0, len(network.cells) // 3, 2 * len(network.cells) // 3, len(network.cells)]
    for k, cell in enumerate(network.cells):
        stage = max(s for s in range(3) if starts[s] <= k)
        prefix = f"cells.{k}" if form == "quark0" else f"stages.{stage}.{k - starts[stage]}"
        for i, preprocess in enumerate((cell.preprocess0, cell.preprocess1)):
            theirs = f"preprocess{i}.op" if form == "quark0" else f"preprocessor.pre{i}"
            if isinstance(preprocess, FactorizedReduce):
                names = FACTORIZED_REDUCE
                theirs = theirs.removesuffix(".op")
            else:
                names = CONV_BN
            for ours, other in names.items():
                yield f"cells.{k}.preprocess{i}.{ours}", f"{prefix}.{theirs}.{other}"
        yield from _edges(cell, f"cells.{k}", prefix, form)
    if network.config["auxiliary"]:
        for ours, other in AUXILIARY_HEAD.items():
            if not isinstance(getattr(network.auxiliary_head, ours), nn.Identity):
                yield f"auxiliary_head.{ours}", f"auxiliary_head.{other}"
    yield "classifier", "classifier"


def _edges(cell: Cell, our_prefix: str, prefix: str, form: str) -> Iterator[tuple[str, str]]:
    for i, edge in enumerate(cell.edges):
        if not edge.takes_relu:
            continue  # no weights
        theirs = f"_ops.{i}" if form == "quark0" else f"ops.{i // 2}.{i % 2}"
        if isinstance(edge.op, FactorizedReduce):
            names = FACTORIZED_REDUCE
        else:
            names = SEP_CONV if isinstance(edge.op, SepConv) else DIL_CONV
            theirs += ".op" if form == "quark0" else ""
        for ours, other in names.items():
            yield f"{our_prefix}.edges.{i}.op.{ours}", f"{prefix}.{theirs}.{other}"


def _keys(network: Network, form: str) -> dict[str, str]:
    """Map their keys to ours, in their order."""
    keys = {}
    for ours, theirs in _modules(network, form):
        for leaf in network.get_submodule(ours).state_dict():
            keys[f"{theirs}.{leaf}"] = f"{ours}.{leaf}"
    return keys


def _to_names(network: Network, form: str) -> dict[str, Tensor]:
    state_dict = network.state_dict()
    return {theirs: state_dict[ours] for theirs, ours in _keys(network, form).items()}


def _from_names(state_dict: StateDict, genotype: Genotype, num_cells: int, form: str) -> Network:
    stem = "cifar" if "stem.0.weight" in state_dict else "imagenet"
    first_key = "stem.0.weight" if stem == "cifar" else "stem0.0.weight"
    first, classifier = _sizes(state_dict, first_key)
    network = Network(
        genotype,
        num_classes=classifier[0],
        init_channels=first[0] // 3 if stem == "cifar" else 2 * first[0],
        num_cells=num_cells,
        auxiliary="auxiliary_head.classifier.bias" in state_dict,
        in_channels=first[1],
        stem=stem,
    ).to(state_dict[first_key])

    ours, keys, problems = network.state_dict(), _keys(network, form), []
    for theirs, name in keys.items():
        if theirs.endswith("num_batches_tracked") and theirs not in state_dict:
            continue
        if misfit := _misfit(state_dict, theirs, tuple(ours[name].shape)):
            problems.append(misfit)
        else:
            ours[name] = state_dict[theirs]
    problems += [f"unexpected {key}" for key in state_dict if key not in keys]
    _raise(problems)
    network.load_state_dict(ours)
    return network.eval()


def _sizes(state_dict: StateDict, first_key: str) -> tuple[torch.Size, torch.Size]:
    """Return the shapes of the first convolution's weight and of the classifier's bias."""
    shapes = []
    for key, dimensions in ((first_key, 4), ("classifier.bias", 1)):
        if key not in state_dict:
            raise ValueError(f"state dict: missing {key}")
        shapes.append(state_dict[key].shape)
        if len(shapes[-1]) != dimensions:
            raise ValueError(f"state dict: {key} has shape {tuple(shapes[-1])}")
    return shapes[0], shapes[1]


def _misfit(state_dict: StateDict, key: str, shape: tuple[int, ...]) -> str | None:
    """Say what is wrong with the tensor at `key`, if anything is."""
    if key not in state_dict:
        return f"missing {key}"
    found = tuple(state_dict[key].shape)
    return None if found == shape else f"{key}: shape {found}, not {shape}"


def _count(state_dict: StateDict, pattern: str) -> int:
    return len({match[1] for key in state_dict if (match := re.match(pattern, key))})


def _raise(problems: list[str]) -> None:
    if problems:
        raise ValueError(f"state dict: {len(problems)} keys do not fit: " + "; ".join(problems))
