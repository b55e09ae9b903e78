"""Command lines: presets of defaults, valid ranges, flags that would be ignored."""

import argparse
import sys
from collections.abc import Callable, Collection
from typing import Any

RANGES = {
    "epochs": "[1, inf)",
    "batch_size": "[1, inf)",
    "grad_accum": "[1, inf)",
    "image_size": "[8, inf)",
    "subset": "[1, inf)",
    "seed": "[0, 9e18]",
    "seeds": "[0, 9e18]",
    "select_epochs": "[1, inf)",
    "select_channels": "[1, inf)",
    "select_cells": "[3, inf)",
    "num_workers": "[0, 1000]",
    "checkpoint_minutes": "[0, inf)",
    "alpha_warmup_epochs": "[0, inf)",
    "hessian_every": "[0, inf)",
    "max_skips": "[0, 8]",
    "cutout": "[0, inf)",
    "search_cutout": "[0, inf)",
    "search_drop_path": "[0, 1)",
    "tau": "(0, inf)",
    "zero_one_weight": "[0, inf)",
    "partial": "[2, inf)",
    "candidates": "[1, inf)",
    "max_params": "(0, inf)",
    "max_madds": "(0, inf)",
    "w_lr": "[0, inf)",
    "w_lr_min": "[0, inf)",
    "w_lr_decay": "(0, 1]",
    "w_momentum": "[0, 1)",
    "w_weight_decay": "[0, inf)",
    "w_grad_clip": "[0, inf)",
    "alpha_lr": "[0, inf)",
    "alpha_betas": "[0, 1)",
    "alpha_weight_decay": "[0, inf)",
    "auxiliary_weight": "[0, inf)",
    "drop_path_prob": "[0, 1)",
    "label_smoothing": "[0, 1)",
}


def check_ranges(args: dict[str, Any]) -> None:
    """Raise a ValueError that names the first argument outside of its range; None is in any."""
    for name, text in RANGES.items():
        values = args.get(name)
        least, most = (float(end) for end in text[1:-1].split(","))
        for value in values if isinstance(values, list) else [values]:
            if value is None:
                continue
            is_inside = least <= value <= most  # nan is not
            is_left_out = (value == least and text[0] == "(") or (value == most and text[-1] == ")")
            if not is_inside or is_left_out:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be in {text}")
    if args.get("batch_size", 1) % args.get("grad_accum", 1):
        raise ValueError(
            f"--grad-accum {args['grad_accum']}: must divide --batch-size, {args['batch_size']}"
        )


def parse_flags(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    presets: Callable[[argparse.Namespace], dict[str, Any]],
) -> tuple[argparse.Namespace, set[str]]:
    """Return the arguments, and the names of those that the user gave.

    `presets(args)` returns other defaults, which hang on what the user chose; what the user gave
    wins. `--help` shows the defaults that result. Raises ValueError instead of ending the process.
    """

    def error(message: str) -> None:
        raise ValueError(message)

    parser.error = error
    argv = sys.argv[1:] if argv is None else argv
    defaults = vars(parser.parse_args([]))
    parser.set_defaults(**dict.fromkeys(defaults))  # None: not given
    given = vars(parser.parse_args([flag for flag in argv if flag not in ("-h", "--help")]))
    given = {name: value for name, value in given.items() if value is not None}
    parser.set_defaults(**defaults)
    parser.set_defaults(**presets(argparse.Namespace(**defaults | given)))
    return parser.parse_args(argv), set(given)


def refuse_unused(
    args: argparse.Namespace, given: Collection[str], only_with: dict[str, tuple[str, ...]]
) -> None:
    """Raise a ValueError that names the first given argument that these `args` do not use.

    `only_with` maps an argument to the one that it belongs to, and the values which use it.
    """
    for name, (other, *values) in only_with.items():
        value = getattr(args, other)
        if name in given and value not in values:
            flag, other = (f"--{word.replace('_', '-')}" for word in (name, other))
            needed = " or ".join(f"{other} {value}" for value in values)
            raise ValueError(f"{flag}: only with {needed}, not with {other} {value}")
