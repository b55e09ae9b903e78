"""Write files whole or not at all, and read them without running what is in them."""

import hashlib
import io
import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

DIGEST_SIZE = 64  # of SHA-256, in hexadecimal digits


def to_bytes(content: Any) -> bytes:
    """Return what torch.save writes: a zip archive with a checksum of each of its parts."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def seal(archive: bytes) -> bytes:
    """Append the SHA-256 of a zip archive, as the comment that the zip format has room for.

    The checksums inside the archive do not cover every byte; this one does.
    """
    archive = archive[:-2] + DIGEST_SIZE.to_bytes(2, "little")  # the length of the comment: was 0
    return archive + hashlib.sha256(archive).hexdigest().encode()


def is_sealed(content: bytes) -> bool:
    """Tell whether `content` ends with the SHA-256 of all that is before it."""
    archive, digest = content[:-DIGEST_SIZE], content[-DIGEST_SIZE:]
    return digest == hashlib.sha256(archive).hexdigest().encode()


def write_atomically(path: Path, content: bytes, keep_as: Path | None = None) -> None:
    """Write a file so that at any moment `path` is the old file or the new one, and whole.

    `keep_as`: a path that the old file is moved to; for a moment the old file is only there.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            os.replace(path, keep_as)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # else the new name may be lost with the power
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_file(path: str | Path, device: torch.device | str = "cpu") -> Any:
    """Load tensors and plain values; code in the file is never run. ValueError if that fails."""
    try:
        if zipfile.is_zipfile(path):  # torch.load does not check the checksums that it wrote
            with zipfile.ZipFile(path) as archive:
                if (part := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"checksum of {part}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about strange files, which end below
            return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"file {path} does not exist") from None
    except (IsADirectoryError, PermissionError) as error:
        raise ValueError(f"file {path} cannot be read: {error.strerror}") from None
    except Exception as error:  # torch.load raises whatever a damaged file leads it to
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            save = "torch.save(model.state_dict(), FILE)"
            if named[1].startswith("darts_min."):
                save = "darts_min.convert.weights.save_network(network, FILE, {})"
            raise ValueError(
                f"file {path} is not loaded, because it holds a Python object ({named[1]}), and "
                "loading one can run any code; in the program that made the file, save tensors "
                f"only: {save}"
            ) from None
        raise ValueError(f"file {path} is damaged, or was not written by torch.save") from None
