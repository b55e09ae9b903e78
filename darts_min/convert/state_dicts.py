"""Convert the state dicts of other DARTS codes to networks and supernets of ours, and back.

"quark0" is the original code, "nni" NNI 3.0. Their networks differ from ours in the names of the
tensors only. In the supernet, one tensor of ours also holds, side by side, what belongs to all the
edges that leave a state. Reading takes off what others put around the names (`unwrapped`). Files
written before PyTorch 0.4.1 lack `num_batches_tracked`, which becomes 0.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from darts_min.convert.genotype_texts import parse_genotype
from darts_min.genotypes import PRIMITIVES, PUBLISHED, Genotype, reduction_cells
from darts_min.network import Network
from darts_min.operations import (
    BatchStatNorm,
    ConvBN,
    DilConv,
    FactorizedReduce,
    Pool,
    SepConv,
    Skip,
    StridedSkip,
)
from darts_min.supernet import Supernet, edges_by_state

StateDict = Mapping[str, Tensor]

# Entries that count: of thop (operations, parameters) and of torch.optim.swa_utils.
BOOKKEEPING = ("total_ops", "total_params", "n_averaged")

# For each class of operation: the names of its layers here -> in the original code.
LAYERS = {
    SepConv: {
        "depthwise1": "1",
        "pointwise1": "2",
        "bn1": "3",
        "depthwise2": "5",
        "pointwise2": "6",
        "bn2": "7",
    },
    DilConv: {"depthwise": "1", "pointwise": "2", "bn": "3"},
    ConvBN: {"conv": "1", "bn": "2"},
    FactorizedReduce: {"conv1": "conv_1", "conv2": "conv_2", "bn": "bn"},
    Pool: {},
    Skip: {},
}
LAYERS[StridedSkip] = LAYERS[FactorizedReduce]
AUXILIARY_HEAD = {
    "conv1": "features.2",
    "bn1": "features.3",
    "conv2": "features.5",
    "bn2": "features.6",
    "classifier": "classifier",
}  # ours -> theirs


def supernet_from_quark0(state_dict: StateDict, alphas: list[Tensor]) -> Supernet:
    """Build our supernet from the original's search weights and `[alphas_normal, alphas_reduce]`.

    The sizes follow from the shapes. Raises one ValueError that lists every missing, unexpected or
    misshapen key.
    """
    state_dict = unwrapped(state_dict)
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
        num_cells=count_distinct(state_dict, r"cells\.(\d+)\."),
        num_nodes=num_nodes,
        in_channels=stem[1],
    ).to(state_dict["stem.0.weight"])

    ours, sources, problems = supernet.state_dict(), defaultdict(list), []
    for theirs, name in _supernet_modules(supernet):
        for leaf in ("weight", "bias"):
            if f"{name}.{leaf}" in ours:
                sources[f"{name}.{leaf}"].append(f"{theirs}.{leaf}")
    for name, keys in sources.items():
        rows, *rest = ours[name].shape
        shape = (rows // len(keys), *rest)
        misfits = [misfit for key in keys if (misfit := _misfit(state_dict, key, shape))]
        problems += misfits
        if not misfits:
            ours[name] = torch.cat([state_dict[key] for key in keys])
    wanted = {key for keys in sources.values() for key in keys}
    ignored = re.compile(r".*\.(running_mean|running_var|num_batches_tracked)$")
    problems += [f"unexpected {k}" for k in state_dict if k not in wanted and not ignored.match(k)]
    _raise(problems)
    ours |= {"alphas_normal": alphas[0], "alphas_reduce": alphas[1]}
    supernet.load_state_dict(ours)
    return supernet


def supernet_to_quark0(supernet: Supernet) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return the state dict of the original's search network, and `[alphas_normal, alphas_reduce]`.

    Names, order and shapes are the original's. The state dict has BN's running statistics too,
    although no search uses them: they are 0 and 1, as in a new network. Raises a ValueError if the
    original code has no such supernet.
    """
    if supernet.primitives != PRIMITIVES:
        raise ValueError(f"operations {supernet.primitives}: the original code has {PRIMITIVES}")
    if len(supernet.alphas()) > 2:
        raise ValueError(
            "a supernet on parts of its channels (PC-DARTS): the original code has none"
        )
    modules = list(_supernet_modules(supernet))
    edges = Counter(name for _, name in modules)
    ours, chunks, state_dict = supernet.state_dict(), {}, {}
    for theirs, name in modules:
        for leaf in ("weight", "bias"):
            key = f"{name}.{leaf}"
            if key in ours:
                parts = chunks.setdefault(key, iter(ours[key].chunk(edges[name])))
                state_dict[f"{theirs}.{leaf}"] = next(parts).clone()
        module = supernet.get_submodule(name)
        if isinstance(module, BatchStatNorm | nn.BatchNorm2d):
            channels = module.num_features
            if isinstance(module, BatchStatNorm):  # of several edges
                channels = supernet.cells[int(name.split(".")[1])].channels
            zeros = supernet.alphas_normal.new_zeros(channels)
            state_dict[f"{theirs}.running_mean"] = zeros
            state_dict[f"{theirs}.running_var"] = zeros + 1
            state_dict[f"{theirs}.num_batches_tracked"] = torch.tensor(0)
    return state_dict, [alpha.detach().clone() for alpha in supernet.alphas()]


def _supernet_modules(supernet: Supernet) -> Iterator[tuple[str, str]]:
    """Yield the names of the original's modules, in its order, each with the name of ours.

    A module of ours stands for several of theirs: it holds the weights of all the edges that leave
    a state, in the order of the edges.
    """
    yield from (("stem.0", "stem.0"), ("stem.1", "stem.1"))
    states = edges_by_state(supernet.num_nodes)
    places = sorted((edge, j) for j, edges in enumerate(states) for edge in edges)
    for k, cell in enumerate(supernet.cells):
        for i, preprocess in enumerate((cell.preprocess0, cell.preprocess1)):
            for ours, theirs in _layers(preprocess, "quark0"):
                yield f"cells.{k}.preprocess{i}.{theirs}", f"cells.{k}.preprocess{i}.{ours}"
        for edge, j in places:
            for index, op in enumerate(PRIMITIVES):
                prefix = f"cells.{k}._ops.{edge}._ops.{index}"
                if "pool" in op:
                    yield f"{prefix}.1", f"cells.{k}.mixed_ops.{j}.ops.{op}.bn"
                elif op in cell.mixed_ops[j].ops:
                    for ours, theirs in _layers(cell.mixed_ops[j].ops[op], "quark0"):
                        yield f"{prefix}.{theirs}", f"cells.{k}.mixed_ops.{j}.ops.{op}.{ours}"
    yield "classifier", "classifier"


def _layers(operation: nn.Module, form: str) -> Iterator[tuple[str, str]]:
    """Yield the name of each layer of an operation here, and its name in `form`."""
    if type(operation) not in LAYERS:
        code = "the original code" if form == "quark0" else "NNI"
        raise ValueError(f"operation {type(operation).__name__}: {code} does not have it")
    in_sequence = form == "quark0" and not isinstance(operation, FactorizedReduce)
    for ours, theirs in LAYERS[type(operation)].items():
        yield ours, f"op.{theirs}" if in_sequence else theirs


def network_from_quark0(state_dict: StateDict, genotype: Genotype) -> Network:
    """Build our network from the state dict of the original's CIFAR or ImageNet network.

    The sizes follow from the shapes. Raises one ValueError that lists every missing, unexpected or
    misshapen key.
    """
    state_dict = unwrapped(state_dict)
    num_cells = count_distinct(state_dict, r"cells\.(\d+)\.")
    return _from_names(state_dict, genotype, num_cells, "quark0")


def network_from_nni(state_dict: StateDict, arch: dict | Genotype) -> Network:
    """Build our network from the state dict of NNI's DARTS space and its architecture dict.

    Raises the same errors as `network_from_quark0`.
    """
    genotype = arch if isinstance(arch, Genotype) else parse_genotype(repr(arch))
    state_dict = unwrapped(state_dict)
    blocks = {match[0] for key in state_dict if (match := re.match(r"stages\.\d+\.\d+\.", key))}
    return _from_names(state_dict, genotype, len(blocks), "nni")


def network_from_pytorchcv(state_dict: StateDict) -> Network:
    """Build our network from the state dict of pytorchcv's `darts`: DARTS_V2 for ImageNet.

    That network is the original's without the auxiliary head. Its tensors have other names, but the
    same order.
    """
    genotype, state_dict = PUBLISHED["DARTS_V2"], unwrapped(state_dict)
    values = [t for key, t in state_dict.items() if not key.endswith("num_batches_tracked")]
    if len(values) < 2 or values[0].dim() != 4 or values[-1].dim() != 1:
        raise ValueError("state dict: does not go from a convolution to a bias")
    with torch.device("meta"):
        network = Network(
            genotype,
            num_classes=len(values[-1]),
            init_channels=2 * len(values[0]),
            num_cells=count_distinct(state_dict, r"features\.(stage\d+\.unit\d+)\."),
            auxiliary=False,
            in_channels=values[0].size(1),
            stem="imagenet",
        )
    keys = [key for key in _keys(network, "quark0") if not key.endswith("num_batches_tracked")]
    if len(keys) != len(values):
        raise ValueError(f"state dict: {len(values)} tensors, not the {len(keys)} of DARTS_V2")
    return network_from_quark0(dict(zip(keys, values, strict=True)), genotype)


def network_to_quark0(network: Network) -> dict[str, Tensor]:
    """Return the network's state dict under the original code's names, in its order.

    The original's auxiliary head for ImageNet has no second BN. If `network` has that BN, its name
    is NNI's. Raises a ValueError that names an operation that the original code does not have.
    """
    return _to_names(network, "quark0")


def network_to_nni(network: Network) -> dict[str, Tensor]:
    """Return the network's state dict under NNI's names, without the wrapping of its drop path.

    NNI's auxiliary head always has a second BN, which is missing here if `network` has none. Raises
    a ValueError that names an operation that NNI does not have.
    """
    return _to_names(network, "nni")


def _modules(network: Network, form: str) -> Iterator[tuple[str, str]]:
    """Yield the name of each module that holds tensors, and its name in `form`, in their order."""
    if network.config["stem"] == "cifar":
        yield from (("stem.0", "stem.0"), ("stem.1", "stem.1"))
    else:
        yield from ((f"stem0.{i}", f"stem0.{i}") for i in (0, 1, 3, 4))
        yield from (("stem1.0", "stem1.1"), ("stem1.1", "stem1.2"))
    starts = (0, *reduction_cells(len(network.cells)))  # of NNI's three stages
    for k, cell in enumerate(network.cells):
        stage = max(s for s, start in enumerate(starts) if start <= k)
        prefix = f"cells.{k}" if form == "quark0" else f"stages.{stage}.{k - starts[stage]}"
        for i, preprocess in enumerate((cell.preprocess0, cell.preprocess1)):
            name = f"preprocess{i}" if form == "quark0" else f"preprocessor.pre{i}"
            for ours, theirs in _layers(preprocess, form):
                yield f"cells.{k}.preprocess{i}.{ours}", f"{prefix}.{name}.{theirs}"
        for i, edge in enumerate(cell.edges):
            name = f"_ops.{i}" if form == "quark0" else f"ops.{i // 2}.{i % 2}"
            for ours, theirs in _layers(edge.op, form):
                yield f"cells.{k}.edges.{i}.op.{ours}", f"{prefix}.{name}.{theirs}"
    if network.config["auxiliary"]:
        for ours, theirs in AUXILIARY_HEAD.items():
            if not isinstance(getattr(network.auxiliary_head, ours), nn.Identity):
                yield f"auxiliary_head.{ours}", f"auxiliary_head.{theirs}"
    yield "classifier", "classifier"


def _keys(network: Network, form: str) -> dict[str, str]:
    """Map the keys of `form` to ours, in the order of `form`."""
    keys = {}
    for ours, theirs in _modules(network, form):
        for leaf in network.get_submodule(ours).state_dict():
            keys[f"{theirs}.{leaf}"] = f"{ours}.{leaf}"
    return keys


def _to_names(network: Network, form: str) -> dict[str, Tensor]:
    """Return the state dict of `network` under the names of `form`."""
    state_dict = network.state_dict()
    return {theirs: state_dict[ours] for theirs, ours in _keys(network, form).items()}


def _from_names(state_dict: StateDict, genotype: Genotype, num_cells: int, form: str) -> Network:
    """Build a network from a state dict under the names of `form`."""
    stem = "cifar" if "stem.0.weight" in state_dict else "imagenet"
    first, classifier = _sizes(state_dict, f"stem{'' if stem == 'cifar' else '0'}.0.weight")
    with torch.device("meta"):  # wrong sizes in a file then cost no memory
        network = Network(
            genotype,
            num_classes=classifier[0],
            init_channels=first[0] // 3 if stem == "cifar" else 2 * first[0],
            num_cells=num_cells,
            auxiliary="auxiliary_head.classifier.bias" in state_dict,
            in_channels=first[1],
            stem=stem,
            auxiliary_second_bn="auxiliary_head.features.6.weight" in state_dict,
        )
    shapes, ours, problems = network.state_dict(), {}, []
    keys = _keys(network, form)
    for theirs, name in keys.items():
        if theirs.endswith("num_batches_tracked") and theirs not in state_dict:
            ours[name] = torch.tensor(0)
        elif misfit := _misfit(state_dict, theirs, tuple(shapes[name].shape)):
            problems.append(misfit)
        else:
            ours[name] = state_dict[theirs].clone()
    problems += [f"unexpected {key}" for key in state_dict if key not in keys]
    _raise(problems)
    network.load_state_dict(ours, assign=True)
    return network.eval()


def unwrapped(state_dict: StateDict) -> dict[str, Tensor]:
    """Return the state dict under the names that the network itself gives its tensors.

    Takes off what stands before all names (`module.`, `model.`, ...), what torch.compile and NNI's
    drop path insert, and the entries that only count. Raises ValueError if there are several
    networks.
    """
    names = {
        key: key.replace("_orig_mod.", "")
        for key in state_dict
        if key.rpartition(".")[2] not in BOOKKEEPING
    }
    prefixes = _prefixes(names.values())
    if len(prefixes) > 1:
        listed = ", ".join(prefix + "*" for prefix in prefixes)
        raise ValueError(f"state dict: several networks, {listed}; save the tensors of one")
    prefix = prefixes[0] if prefixes else ""
    wrapping = re.compile(r"(stages\.\d+\.\d+\.ops\.\d+\.\d+)\.0\.(?=\d+\.|conv_|bn\.)")
    return {
        wrapping.sub(r"\1.", name.removeprefix(prefix)): state_dict[key]
        for key, name in names.items()
    }


def _prefixes(names: Iterable[str]) -> list[str]:
    """Return what stands before the names of a network's first parts, each prefix once.

    The first parts are pytorchcv's `features.stage1`, or the stem, or the cells.
    """
    for part in (r"features\.stage1\.", r"stem0?\.", r"(cells|stages)\.\d"):
        found = (re.match(rf"((?:\w+\.)*?){part}", name) for name in names)
        if prefixes := sorted({match[1] for match in found if match}):
            return prefixes
    return []


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
    """Say what is wrong with the tensor at `key`; None: nothing."""
    if key not in state_dict:
        return f"missing {key}"
    found = tuple(state_dict[key].shape)
    return None if found == shape else f"{key}: shape {found}, not {shape}"


def count_distinct(state_dict: StateDict, pattern: str) -> int:
    """Count the different texts that the group of `pattern` matches in the keys."""
    return len({match[1] for key in state_dict if (match := re.match(pattern, key))})


def _raise(problems: list[str]) -> None:
    """Raise a ValueError that lists the problems, if there are any."""
    if problems:
        raise ValueError(f"state dict: {len(problems)} keys do not fit: " + "; ".join(problems))
