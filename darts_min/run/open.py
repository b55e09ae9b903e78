"""Which run folder a script opens: a new one, or that of the run to go on with."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from darts_min.run.processes import Processes
from darts_min.run.run_folder import CHECKPOINTS, RunFolder

# Arguments that a resumed run may change: they do not change its result, or are meant to.
FREE = {"out_dir", "resume", "device", "data_dir", "num_workers", "epochs"}
FREE |= {"checkpoint_minutes", "checkpoint_cells", "hessian_every", "max_params", "max_madds"}


def open_run(
    script: str,
    argv: list[str] | None,
    default: str,
    args: dict[str, Any],
    processes: Processes,
    write: Callable[..., None],
) -> RunFolder:
    """Open the run folder of a script: `--out-dir`, a free one like `default`, or one to resume.

    From `argv`, or the process's own arguments, comes the command to continue with.
    """
    path = args["out_dir"]
    if path is None and processes.rank == 0:
        path = resumable_folder(default, args) if args["resume"] else free_folder(default)
    path = processes.from_first(path)
    command = sys.argv if argv is None else [script, *argv]
    more = [] if args["out_dir"] else ["--out-dir", str(path)]
    more += [] if "--resume" in command else ["--resume"]
    command = f"{processes.launcher} {shlex.join([*command, *more])}"
    return RunFolder(path, args["resume"], command, processes, write)


def free_folder(path: str | Path) -> Path:
    """Return the first of `path`, `path-2`, ... that does not exist."""
    candidates = (Path(path) if n == 1 else Path(f"{path}-{n}") for n in range(1, 10**6))
    return next(candidate for candidate in candidates if not candidate.exists())


def resumable_folder(path: str | Path, args: dict[str, Any]) -> Path:
    """Return the newest of `path`, `path-2`, ... that was run with these arguments.

    If none was, the newest with a checkpoint, whose arguments `check_same_arguments` will name;
    ValueError if there is none of those either.
    """
    path = Path(path)
    folders = {f for name in CHECKPOINTS for f in path.parent.glob(f"{path.name}*/{name}")}
    folders = sorted((f.stat().st_mtime, f.parent) for f in folders)[::-1]
    if not folders:
        raise ValueError(f"there is no run folder {path} with a checkpoint to resume")
    for _, folder in folders:
        try:
            before = json.loads((folder / "args.json").read_text(encoding="utf-8"))
            check_same_arguments(args, before)
        except (OSError, ValueError):
            continue
        return folder
    return folders[0][1]


def newest_folder(path: str | Path, file: str) -> Path:
    """Return the newest of `path`, `path-2`, ... that holds `file`; ValueError if none does."""
    path = Path(path)
    folders = [f for f in path.parent.glob(f"{path.name}*") if (f / file).is_file()]
    if not folders:
        raise ValueError(f"there is no run folder {path} with a {file}")
    return max(folders, key=lambda folder: (folder / file).stat().st_mtime)


def check_same_arguments(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Raise a ValueError that names the arguments of a resumed run that would change its result."""
    changed = [name for name in before if name not in FREE and now.get(name) != before[name]]
    if changed:
        listed = ", ".join(f"{name} (was {before[name]}, now {now.get(name)})" for name in changed)
        raise ValueError(f"--resume with other arguments would change the result: {listed}")
