"""Files that hold a network: ours, the shipped one, named downloads, and those of other codes."""

import hashlib
import http.client
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch
from torch import Tensor

from darts_min.convert.genotype_texts import format_genotype, parse_genotype
from darts_min.convert.recognise import form_of, infer_genotype
from darts_min.convert.state_dicts import (
    network_from_nni,
    network_from_pytorchcv,
    network_from_quark0,
)
from darts_min.genotypes import PUBLISHED
from darts_min.network import Network
from darts_min.run.files import load_file, to_bytes, write_atomically

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHIPPED = Path(__file__).parent / "pretrained"


# RuntimeError: an archive with a password.
DOWNLOAD_ERRORS = (OSError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)
DOWNLOAD_ERRORS += (http.client.HTTPException,)


class Download(NamedTuple):
    """A public file of weights: its address, and what is known of its hash.

    `digest` is a sha1 (40 hexadecimal digits) or the beginning of a sha256; of the file, or of the
    one `member` of a zip archive.
    """

    url: str
    digest: str
    member: str | None = None


# No public file is known by its whole sha256; these are the hashes that their publishers give.
DOWNLOADS = {
    # The original's CIFAR-10 network under NNI's names (97.37 %). The address was reported dead in
    # June 2023 (NNI issue 5614); a copy in the cache or given as a file is read.
    "nni_darts_v2_cifar10": Download(
        "https://nni.blob.core.windows.net/nashub/darts-v2-5465b0d2.pth", "5465b0d2"
    ),
    # The original's ImageNet network under pytorchcv's names (26.70 % top-1 error).
    "pytorchcv_darts_v2_imagenet": Download(
        "https://github.com/osmr/imgclsmob/releases/download/v0.0.118/darts-0874-74f0c7b6.pth.zip",
        "74f0c7b690cf8bef9b54cc5afc2cb0f2a2a83630",
        member="darts-0874-74f0c7b6.pth",
    ),
}


def names() -> list[str]:
    """List the names that `load_network` knows: first those that need no download."""
    return [path.stem for path in sorted(SHIPPED.glob("*.pt"))] + list(DOWNLOADS)


def load_network(path_or_name: str | Path, genotype: str | None = None) -> Network:
    """Load a network of any form as a Network in evaluation mode, in float32, on the CPU.

    Takes a file, one of `names()`, or a run folder of train_final.py. A state dict of another code
    needs its `genotype` (in any form that `parse_genotype` reads) unless it is a published one that
    `infer_genotype` recognises; then `.details["inferred"]` is its name, because a cell with the
    same operations on other states cannot be told from it. Otherwise `.details` are what
    `save_network` was given. Code in a file is never run. Raises a ValueError of one line if the
    file is not there, damaged, or of no known form.
    """
    path = Path(path_or_name)
    if str(path_or_name) in names() and not os.path.isfile(path):
        path = _find(str(path_or_name))
    elif not os.path.exists(path):  # unlike path.exists(), also False for names too long
        raise ValueError(f"network {path}: neither a file nor one of {', '.join(names())}")
    path = path / "network.pt" if path.is_dir() else path
    content = load_file(path)
    try:
        if isinstance(content, dict) and content.get("format") == "darts_min.network":
            if genotype is not None:
                raise ValueError("it has its own genotype; leave --genotype out")
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
    """Write the file that `load_network` reads; `details` are plain values kept beside it.

    What evaluation on the training data's kind of images needs belongs there: `classes`, `mean`,
    `std`, `image_size`, `crop` (see `folder.read_image`). `dtype` is that of the stored weights.
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
    try:
        config, state_dict = content["config"], content["state_dict"]
        _check_tensors(state_dict)
        # Sizes that the tensors do not have are an error, not a reason to fill the memory.
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
    """Read a state dict of quark0's or NNI's, alone or under a usual key of a checkpoint."""
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    _check_tensors(content)
    form = form_of(content)
    if form == "quark0 search":
        raise ValueError(
            "search weights of the original code, not a network; read them in Python with "
            "darts_min.convert.state_dicts.supernet_from_quark0"
        )
    if form is None:
        own = any(key.startswith("cells.0.edges.") for key in content)
        raise ValueError(
            "neither a network file nor a state dict of the original code's or NNI's"
            + (", but one of this project's without its genotype: use save_network" if own else "")
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


def _check_tensors(state_dict: Any) -> None:
    """Raise a ValueError unless `state_dict` maps names to tensors of finite numbers."""
    if not isinstance(state_dict, dict) or not state_dict:
        raise ValueError("neither a network file nor a state dict")
    for key, tensor in state_dict.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"neither a network file nor a state dict: {key!r} is not a tensor")
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


def _find(name: str) -> Path:
    """Return the file of a name; download it to torch's hub cache if it is not there yet."""
    if name not in DOWNLOADS:
        return SHIPPED / f"{name}.pt"
    url, digest, member = DOWNLOADS[name]
    archive = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    path = archive.with_name(member or archive.name)
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(archive), progress=False)
            if member is not None:
                with zipfile.ZipFile(archive) as opened:
                    content = opened.read(member)
                write_atomically(path, content)
                archive.unlink()
        except DOWNLOAD_ERRORS as error:
            raise ValueError(
                f"network {name} could not be downloaded from {url} ({error}); if you have the "
                "file, give its path instead of the name"
            ) from None
    found = hashlib.new("sha1" if len(digest) == 40 else "sha256", path.read_bytes()).hexdigest()
    if not found.startswith(digest):
        raise ValueError(
            f"network {name}: {path} is another file, or damaged: its hash begins with "
            f"{found[:8]}, not {digest[:8]}; remove it to download it again"
        )
    return path
