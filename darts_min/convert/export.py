"""Export a trained network in the forms that other programs read, and check each file."""

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
CHECKED_BATCHES = (1, 5)  # torch.export sees a batch of 2

Run = Callable[[Tensor], Tensor]  # images -> logits
Readers = dict[str, Callable[[Path], Run]]  # by the name of the file


@torch.no_grad()
def export_network(
    network: Network, folder: str | Path, image_size: int, details: dict[str, Any]
) -> dict[str, Any]:
    """Write `network` into a new or empty folder; return the content of its `export.json`.

    - `quark0.pt`, `nni.pt`: the state dict under the names of the original code and of NNI
    - `genotype.*`: the genotype in each form
    - `network.pt2` (torch.export), `network.onnx`: programs that map normalised float32 images
      (N, C, image_size, image_size), N >= 1, to logits (N, num_classes)
    - `export.json`: `details` (as in `save_network`; `classes`, `mean` and `std` should be there);
      `files` with the size, sha256 and deviation of the logits of each file; `left_out` with the
      reason why a file could not be written

    The files hold a copy of the network, on the CPU, in float32 and in evaluation mode. `network`
    itself does not change.

    Raises ValueError if the folder cannot be made or is not empty, OSError if a file cannot be
    written, and RuntimeError if a file, read back, deviates from the network. `export.json` is
    written last, so that it is missing after an error.
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
    for tensor in (*network.parameters(), *network.buffers()):  # not channels-last
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    left_out = _left_out(network)
    shape = (network.config["in_channels"], image_size, image_size)
    _write_genotypes(network, folder, left_out)
    readers = _write_state_dicts(network, folder, left_out)
    if hasattr(network, "auxiliary_head"):
        del network.auxiliary_head  # only training uses it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporters' own code
        readers |= _write_programs(network, folder, shape, left_out)
        deviations = {
            name: _deviation(folder / name, read(folder / name), network, shape)
            for name, read in readers.items()
        }

    content = details | {
        "format": "darts_min.export",
        "input": {"name": "images", "shape": ["batch", *shape], "dtype": "float32"},
        "output": {"name": "logits", "shape": ["batch", network.config["num_classes"]]},
        "normalisation": "(pixel / 255 - mean) / std, of each channel",
        "image_size": image_size,
        "genotype": format_genotype(network.genotype, "quark0"),
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


def _left_out(network: Network) -> dict[str, str]:
    """Return, for each file of another code that cannot be written, the reason."""
    left_out = {}
    try:
        format_genotype(network.genotype, "nni")
    except ValueError as error:
        left_out |= dict.fromkeys(("genotype.nni.json", "nni.pt"), str(error))
    with torch.device("meta"):
        names = Network(network.genotype, **network.config).state_dict().keys()
    if network.state_dict().keys() != names:
        left_out |= dict.fromkeys(STATE_DICTS, "the codes cannot load a network of folded BN")
    for name, (to_names, _) in STATE_DICTS.items():
        try:
            to_names(network)
        except ValueError as error:
            left_out[name] = str(error)
    return left_out


def _write_genotypes(network: Network, folder: Path, left_out: dict[str, str]) -> None:
    """Write the genotype in each form that is not left out, and read each file back."""
    for name, form in GENOTYPES.items():
        if name not in left_out:
            _write_text(folder / name, format_genotype(network.genotype, form))
            if parse_genotype(folder / name) != network.genotype:
                raise RuntimeError(f"{folder / name}: not the network's genotype")


def _write_state_dicts(network: Network, folder: Path, left_out: dict[str, str]) -> Readers:
    """Write the state dict of each code that is not left out; return how to read the files."""
    readers: Readers = {}
    for name in (name for name in STATE_DICTS if name not in left_out):
        to_names, from_names = STATE_DICTS[name]
        has_second_bn = network.config["stem"] == "cifar" or name == "nni.pt"
        if network.config["auxiliary_second_bn"] == has_second_bn:
            written = network
        else:  # that code has another auxiliary head, but it can load a network without one
            written = _without_auxiliary_head(network)
        write_atomically(folder / name, to_bytes(to_names(written)))
        readers[name] = lambda path, read=from_names: read(load_file(path), network.genotype)
    return readers


def _without_auxiliary_head(network: Network) -> Network:
    """Return a copy without the auxiliary head, which only training uses."""
    with torch.device("meta"):
        bare = Network(network.genotype, **network.config | {"auxiliary": False})
    kept = {k: t for k, t in network.state_dict().items() if k in bare.state_dict()}
    bare.load_state_dict(kept, assign=True)
    return bare.eval()


def _write_programs(
    network: Network, folder: Path, shape: tuple[int, int, int], left_out: dict[str, str]
) -> Readers:
    """Write the programs; return how to read them. An entry of `left_out` says what is missing."""
    program = _trace(network, shape)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    write_atomically(folder / "network.pt2", buffer.getvalue())
    if reason := _write_onnx(program, folder / "network.onnx"):
        left_out["network.onnx"] = reason
        return {"network.pt2": _read_program}
    return {"network.pt2": _read_program, "network.onnx": _read_onnx}


def _write_text(path: Path, text: str) -> None:
    """Write a text and the end of its last line."""
    write_atomically(path, f"{text}\n".encode())


def _trace(network: Network, shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    """Turn the network into a program for images of `shape` and any number of them."""
    batch = torch.export.Dim("batch", max=2**31)  # PyTorch 2.6 refuses to trace without a bound
    program = torch.export.export(
        network, (torch.zeros(2, *shape),), dynamic_shapes=({0: batch},), strict=False
    )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it has the names of this machine's folders
    return program


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> str | None:
    """Write one file that holds the weights too, or return the reason why it cannot be written."""
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
            dynamic_shapes=({0: "batch"},),  # the name of the dynamic dimension
        )
    except torch.onnx.OnnxExporterError:
        return f"PyTorch {torch.__version__} and this onnxscript cannot translate it: update them"
    write_atomically(path, translated.model_proto.SerializeToString())
    return None


def _read_program(path: Path) -> Run:
    """Load a program of torch.export as a function of images."""
    content = io.BytesIO(path.read_bytes())  # PyTorch reads only UTF-8 paths
    return torch.export.load(content).module()


def _read_onnx(path: Path) -> Run:
    """Load an ONNX program as a function of images."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    content = path.read_bytes()  # ONNX Runtime reads only UTF-8 paths
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _deviation(path: Path, run: Run, network: Network, shape: tuple[int, int, int]) -> float:
    """Return the largest deviation of the logits of `run`, relative to max(1, largest logit).

    `run` is what was read from `path`. Raises RuntimeError if the deviation is too large.
    """
    generator, deviations = torch.Generator().manual_seed(0), []
    for batch_size in CHECKED_BATCHES:
        images = torch.randn(batch_size, *shape, generator=generator)
        logits = network(images)
        deviation = float((run(images) - logits).abs().max() / logits.abs().max().clamp_min(1))
        if not deviation <= TOLERANCE:  # also true of nan
            raise RuntimeError(
                f"{path}: its logits for a batch of {batch_size} deviate from the network's by "
                f"{deviation:.2g}, more than {TOLERANCE:g}"
            )
        deviations.append(deviation)
    return max(deviations)
