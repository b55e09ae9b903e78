"""Run folders, atomic files, and checkpoints that a run continues from."""

import json
import os
import random
import re
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from darts_min import __version__


class RunFolder:
    """A folder that holds one run: `log.txt`, `last.pt`, `genotype.json`, `result.json`, ...

    Without `resume`, a folder that exists and is not empty is refused; with it, one that holds no
    checkpoint is (ValueError).
    """

    def __init__(self, path: str | Path, resume: bool = False):
        self.path = Path(path)
        if resume and not (self.path / "last.pt").is_file():
            raise ValueError(f"nothing to resume: {self.path / 'last.pt'} does not exist")
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run folder {self.path} is a file")
        if not resume and self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(
                f"run folder {self.path} exists and is not empty; choose another --out-dir, or "
                "continue it with --resume"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"run folder {self.path} cannot be made: {error}") from None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def log(self, line: str) -> None:
        print(line, flush=True)
        with open(self / "log.txt", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        write_atomically(self / "last.pt", lambda file: torch.save(state, file))

    def load_checkpoint(self, device: torch.device) -> dict[str, Any]:
        return load_file(self / "last.pt", device)

    def save_text(self, name: str, text: str) -> None:
        write_atomically(self / name, lambda file: file.write(text.encode()))

    def save_json(self, name: str, content: dict[str, Any]) -> None:
        self.save_text(name, json.dumps(content, indent=2, default=str) + "\n")


def default_folder(path: str | Path, resume: bool = False) -> Path:
    """Return the first of `path`, `path-2`, ... that is free, or the newest one to resume."""
    if resume:
        return newest_folder(path, "last.pt")
    candidates = (Path(path) if n == 1 else Path(f"{path}-{n}") for n in range(1, 10**6))
    return next(candidate for candidate in candidates if not candidate.exists())


def newest_folder(path: str | Path, file: str) -> Path:
    """Return the newest of `path`, `path-2`, ... that holds `file`; ValueError if none does."""
    path = Path(path)
    folders = [f for f in path.parent.glob(f"{path.name}*") if (f / file).is_file()]
    if not folders:
        raise ValueError(f"there is no run folder {path} with a {file}")
    return max(folders, key=lambda folder: (folder / file).stat().st_mtime)


def write_atomically(path: Path, write) -> None:
    """Call `write(file)` on a temporary file, and put it in the place of `path` when complete."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
            raise ValueError(
                f"file {path} is not loaded, because it holds a Python object ({named[1]}), and "
                "loading one can run any code; in the program that made the file, save tensors "
                "only: torch.save(model.state_dict(), FILE)"
            ) from None
        raise ValueError(f"file {path} is damaged, or was not written by torch.save") from None


def random_state() -> dict[str, Any]:
    """Return the state of every global random number generator, in plain values and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
        "numpy": [name, keys.tolist(), position, has_gauss, gauss],
        "python": list(random.getstate()),
    }


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    np.random.set_state(tuple(state["numpy"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def check_same_arguments(now: dict[str, Any], before: dict[str, Any], free: set[str]) -> None:
    """Raise a ValueError that names the arguments of a resumed run that differ, but for `free`."""
    changed = [name for name in before if name not in free and now.get(name) != before[name]]
    if changed:
        listed = ", ".join(f"{name} (was {before[name]}, now {now.get(name)})" for name in changed)
        raise ValueError(f"--resume with other arguments would change the result: {listed}")


def versions() -> dict[str, str]:
    return {
        "darts_min": __version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
