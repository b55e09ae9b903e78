"""A trained network in the forms that other programs read, each file checked once written."""

import hashlib
import io
import json
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from darts_min.convert.genotype_texts import format_genotype, parse_genotype
from darts_min.convert.state_dicts import (
    network_from_nni,
    network_from_quark0,
    network_to_nni,
    network_to_quark0,
)
from darts_min.network import Network
from darts_min.run.files import load_file, to_bytes, write_atomically
from darts_min.run.run_folder import versions

GENOTYPES = {
    "genotype.json": "json",
    "genotype.quark0.txt": "quark0",
    "genotype.pt.darts.txt": "pt.darts",
    "genotype.nni.json": "nni",
}
STATE_DICTS = {
    "quark0.pt": (network_to_quark0, network_from_quark0),
    "nni.pt": (network_to_nni, network_from_nni),
}
TOLERANCE = 1e-4
CHECKED_BATCHES = (1, 5)  # tracing sees 2

Run = Callable[[Tensor], Tensor]


@torch.no_grad()
def export_network(
    network: Network, folder: str | Path, image_size: int, details: dict[str, Any]
) -> dict[str, Any]:
    """Write `network` into a new or empty folder; return what its `export.json` says.

    `quark0.pt` and `nni.pt` are state dicts under those codes' names, `genotype.*` the forms of the
    genotype. `network.pt2` (torch.export) and `network.onnx` map normalised float32 images
    (N, C, image_size, image_size), N >= 1, to logits (N, num_classes). What is written is a copy of
    the network on the CPU, in float32 and evaluation mode; `network` itself is left as it was.

    `details`, as in `save_network`, become part of `export.json` and should hold `classes`, `mean`
    and `std`. Also there: `files` says of each its size, sha256 and the deviation of its logits,
    `left_out` of each file that could not be written why not.

    Raises ValueError if the folder cannot be made or is not empty, OSError if a file cannot be
    written, RuntimeError if one, read back, deviates from the network: then there is no
    `export.json`, which comes last.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_used = any(folder.iterdir())
    except OSError as error:
        raise ValueError(f"export folder {folder} cannot be made: {error}") from None
    if is_used:
        raise ValueError(f"export folder {folder} exists and is not empty")
    network = deepcopy(network).to("cpu", torch.float32).eval().requires_grad_(False)
    for tensor in (*network.parameters(), *network.buffers()):  # else channels-last goes along
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    genotype, left_out = network.genotype, _left_out(network)
    readers: dict[str, Callable[[Path], Run]] = {}

    for name in (name for name in GENOTYPES if name not in left_out):
        _write_text(folder / name, format_genotype(genotype, GENOTYPES[name]))
        if parse_genotype(folder / name) != genotype:
            raise RuntimeError(f"{folder / name}: not the network's genotype")
    for name in (name for name in STATE_DICTS if name not in left_out):
        to_names, from_names = STATE_DICTS[name]
        has_second_bn = network.config["stem"] == "cifar" or name == "nni.pt"
        if network.config["auxiliary_second_bn"] == has_second_bn:
            written = network
        else:  # that code's auxiliary head, if any, is another one; it can do without
            written = without_auxiliary_head(network)
        write_atomically(folder / name, to_bytes(to_names(written)))
        readers[name] = lambda path, read=from_names: read(load_file(path), genotype)

    if hasattr(network, "auxiliary_head"):
        del network.auxiliary_head  # of training only; its weights need not be in a program
    shape = (network.config["in_channels"], image_size, image_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own
        program = _trace(network, shape)
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        write_atomically(folder / "network.pt2", buffer.getvalue())
        readers["network.pt2"] = _read_program
        if reason := _write_onnx(program, folder / "network.onnx"):
            left_out["network.onnx"] = reason
        else:
            readers["network.onnx"] = _read_onnx
        deviations = {
            name: _deviation(folder / name, read(folder / name), network, shape)
            for name, read in readers.items()
        }

    content = details | {
        "format": "darts_min.convert.export",
        "input": {"name": "images", "shape": ["batch", *shape], "dtype": "float32"},
        "output": {"name": "logits", "shape": ["batch", network.config["num_classes"]]},
        "normalisation": "(pixel / 255 - mean) / std, of each channel",
        "image_size": image_size,
        "genotype": format_genotype(genotype, "quark0"),
        "config": network.config,
        "files": {
            path.name: {
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "deviation": deviations.get(path.name),
            }
            for path in sorted(folder.iterdir())
        },
        "left_out": left_out,
        "largest_deviation": max(deviations.values()),
        "versions": versions(),
    }
    _write_text(folder / "export.json", json.dumps(content, indent=2, default=str))
    return content


def without_auxiliary_head(network: Network) -> Network:
    """Return a copy without the auxiliary head, which only training uses."""
    with torch.device("meta"):
        bare = Network(network.genotype, **network.config | {"auxiliary": False})
    kept = {k: t for k, t in network.state_dict().items() if k in bare.state_dict()}
    bare.load_state_dict(kept, assign=True)
    return bare.eval()


def _left_out(network: Network) -> dict[str, str]:
    """Say of each file of the other codes that cannot be written why not."""
    left_out = {}
    try:
        format_genotype(network.genotype, "nni")
    except ValueError as error:
        left_out |= dict.fromkeys(("genotype.nni.json", "nni.pt"), str(error))
    with torch.device("meta"):
        names = Network(network.genotype, **network.config).state_dict().keys()
    if network.state_dict().keys() != names:
        left_out |= dict.fromkeys(STATE_DICTS, "those codes cannot load a network of folded BN")
    return left_out


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, f"{text}\n".encode())


def _trace(network: Network, shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", max=2**31)  # PyTorch 2.6 refuses to trace without a bound
    program = torch.export.export(
        network, (torch.zeros(2, *shape),), dynamic_shapes=({0: batch},), strict=False
    )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # would name this machine's folders in the files
    return program


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> str | None:
    """Write one file, with the weights in it, or say in one line why that cannot be done."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError:
        return 'needs onnx, onnxscript and onnxruntime: pip install "darts_min[onnx]"'
    try:
        translated = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),  # names what is dynamic in the program already
        )
    except torch.onnx.OnnxExporterError:
        return f"PyTorch {torch.__version__} and this onnxscript fail to translate it: update them"
    write_atomically(path, translated.model_proto.SerializeToString())
    return None


def _read_program(path: Path) -> Run:
    content = io.BytesIO(path.read_bytes())  # PyTorch takes paths in UTF-8 only
    return torch.export.load(content).module()


def _read_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    content = path.read_bytes()  # ONNX Runtime takes paths in UTF-8 only
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _deviation(path: Path, run: Run, network: Network, shape: tuple[int, int, int]) -> float:
    """Return the largest deviation of a file's logits, relative to max(1, largest logit)."""
    generator, deviations = torch.Generator().manual_seed(0), []
    for batch_size in CHECKED_BATCHES:
        images = torch.randn(batch_size, *shape, generator=generator)
        logits = network(images)
        deviation = float((run(images) - logits).abs().max() / logits.abs().max().clamp_min(1))
        if not deviation <= TOLERANCE:  # or nan
            raise RuntimeError(
                f"{path}: its logits for a batch of {batch_size} deviate from the network's by "
                f"{deviation:.2g}, more than {TOLERANCE:g}"
            )
        deviations.append(deviation)
    return max(deviations)
