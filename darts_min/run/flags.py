"""Define the flags that scripts share, each once, with its range and its help.

The ranges are argparse types. What else depends on the flags stands here too: which arguments a
resumed run may change, and which ones choose the images.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Collection
from typing import Any

from darts_min.data.datasets import DATASETS, IN_MEMORY
from darts_min.run.machine import AMP_CHOICES

RECIPE_HELP = "preset of defaults; darts: the paper's; plain: NNI's tutorial, without its tricks"
Adder = Callable[..., Any]  # the method `add_argument` of a group
OWN_DATASET = "own"  # the value of --dataset where the caller of main() gives a Dataset
# Arguments that a resumed run may change: they do not change its result, or are meant to.
MAY_CHANGE = {"out_dir", "resume", "device", "data_dir", "num_workers", "epochs"}
MAY_CHANGE |= {"checkpoint_minutes", "checkpoint_cells", "hessian_every", "max_params", "max_madds"}
FOLDER_ONLY = {name: ("dataset", "folder") for name in ("channels", "in_memory", "num_workers")}


def number(kind: type, interval: str) -> Callable[[str], int | float]:
    """Return an argparse type: an int or float inside an interval such as "[1, inf)"."""
    least, most = (float(end) for end in interval[1:-1].split(","))

    def parse(text: str) -> int | float:
        value = kind(text)
        is_inside = least <= value <= most  # nan is not
        is_left_out = value == least and interval[0] == "(" or value == most and interval[-1] == ")"
        if not is_inside or is_left_out:
            raise argparse.ArgumentTypeError(f"{value}: must be in {interval}")
        return value

    parse.__name__ = kind.__name__  # for argparse's message about what is no number at all
    return parse


COUNT, COUNT_OR_0 = number(int, "[1, inf)"), number(int, "[0, inf)")
AMOUNT, POSITIVE = number(float, "[0, inf)"), number(float, "(0, inf)")
SHARE, SEED = number(float, "[0, 1)"), number(int, "[0, 9e18]")


def make_parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )


# fmt: off
def add_run_flags(parser: argparse.ArgumentParser, out_dir: str, demo: str) -> Adder:
    """Add the flags of every script; return how to add more to their group."""
    add = parser.add_argument_group("run").add_argument
    add("--demo", action="store_true", help=demo)
    add("--out-dir",
        help=f"run folder; without it, {out_dir} (--demo: another one) with the next free number")
    add("--seed", type=SEED, default=0, help="seed of all random numbers")
    add("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda, cuda:1, ...")
    add("--amp", choices=AMP_CHOICES, default="auto",
        help="mixed precision; auto: bf16 on a GPU that has it, else off")
    add("--channels-last", choices=("auto", "on", "off"), default="auto",
        help="memory format of images and weights; auto: on if the device is the CPU")
    add("--fast-dev-run", action="store_true",
        help="run one epoch of two batches, and all that follows an epoch")
    return add


def add_training_flags(add: Adder) -> None:
    """Add the flags of both training scripts to the same group."""
    add("--resume", action="store_true",
        help="continue the run in --out-dir, or the newest one with the same arguments")
    add("--checkpoint-minutes", type=AMOUNT, default=10,
        help="minutes between checkpoints inside an epoch; another one follows each epoch")
    add("--compile", action="store_true", help="compile the cells; slow to start, the gain varies")
    add("--deterministic", action="store_true",
        help="compute the same bits in each run on CUDA, too; slower")
    add("--on-nonfinite", choices=("stop", "skip"), default="stop",
        help="at a loss or gradient that is not finite: stop, or skip up to nine batches in a row")


def add_data_flags(
    parser: argparse.ArgumentParser,
    batch_size: int,
    subset: str,
    image_size: str = "their own size",
) -> Adder:
    """Add the flags that choose the images; return how to add more to their group."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="cifar10", help="images and classes to learn")
    add("--data-dir", default="data", help="folder of downloads or of your images; npz: the file")
    add("--image-size", type=number(int, "[8, inf)"),
        help=f"resize images to squares of this side; without it, they have {image_size}")
    add("--channels", type=int, choices=(1, 3),
        help="--dataset folder: read as grey (1) or RGB (3)")
    add("--subset", type=COUNT,
        help=f"use only so many of the {subset} images, equally many of each class")
    add("--batch-size", type=COUNT, default=batch_size, help="images in a batch of each process")
    return add


def add_file_flags(add: Adder) -> None:
    """Add the flags for images that may stay in their files to the same group."""
    add("--in-memory", choices=IN_MEMORY, default="auto",
        help="folder: hold all images in memory; auto: if they take at most a quarter of it")
    add("--num-workers", type=number(int, "[0, 1000]"), default=4,
        help="folder: processes that read the images that are not in memory")


def add_grad_accum_flag(add: Adder) -> None:
    add("--grad-accum", type=COUNT, default=1,
        help="compute a batch in so many equal parts, one at a time; takes less memory")


def add_size_flags(add: Adder, init_channels: int, num_cells: int) -> None:
    """Add the sizes of a network or supernet, which checks them itself."""
    add("--init-channels", type=int, default=init_channels, help="channels of the first cells")
    add("--num-cells", type=int, default=num_cells, help="cells, two of which are reduction cells")
    add("--stem", choices=("cifar", "imagenet"), default="cifar",
        help="layers before the cells; imagenet: they reduce images to 1/8 of their size")


def add_optimizer_flags(parser: argparse.ArgumentParser, epochs: int, w_lr_min: float) -> Adder:
    """Add the flags for training w; return how to add more to their group."""
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=COUNT, default=epochs, help="passes over the training images")
    add("--w-optimizer", choices=("sgd", "adam"), default="sgd", help="optimizer of the weights w")
    add("--w-lr", type=AMOUNT, default=0.025, help="largest learning rate of w (paper: 0.025)")
    add("--w-lr-min", type=AMOUNT, default=w_lr_min,
        help="learning rate of w at the end of the cosine schedule (paper: 0)")
    add("--w-momentum", type=SHARE, default=0.9, help="momentum of SGD")
    add("--w-weight-decay", type=AMOUNT, default=3e-4, help="weight decay of w")
    add("--w-grad-clip", type=AMOUNT, default=5.0,
        help="largest l2 norm of the gradient in w; 0: no clipping")
    return add


def add_watch_flags(parser: argparse.ArgumentParser) -> Adder:
    """Add what a search does about a bad cell (judge/); return how to add more to the group."""
    add = parser.add_argument_group("signs of a bad cell").add_argument
    add("--hessian-every", type=COUNT_OR_0, default=1,
        help="compute the largest eigenvalue of the Hessian of the loss in alpha, a sign of "
        "collapse, each so many epochs; 0: never")
    add("--early-stop", action="store_true",
        help="stop when the eigenvalue grows too fast, and take an earlier genotype (RobustDARTS)")
    add("--adapt-weight-decay", action="store_true",
        help="when the eigenvalue grows too fast, go back and multiply the weight decay of w by 10")
    add("--max-skips", type=number(int, "[0, 8]"),
        help="most skip connections in the normal cell (P-DARTS: 2)")
    return add


def add_selection_flags(parser: argparse.ArgumentParser) -> None:
    """Add the selection among several searches (judge/selection.py)."""
    add = parser.add_argument_group("selection among several searches (Sec. 3.2)").add_argument
    add("--seeds", type=SEED, nargs="+", metavar="SEED",
        help="search with each seed, train each cell on half of the images, keep the best cell")
    add("--select-epochs", type=COUNT, default=100, help="epochs to train each cell found")
    add("--select-channels", type=COUNT, default=36,
        help="initial channels of the networks of these cells")
    add("--select-cells", type=number(int, "[3, inf)"), default=20,
        help="number of cells of these networks")
# fmt: on


def check_watch_flags(args: argparse.Namespace) -> None:
    """Raise a ValueError if the flags of `add_watch_flags` contradict each other."""
    for name in ("early_stop", "adapt_weight_decay"):
        if getattr(args, name) and not args.hessian_every:
            raise ValueError(f"{flag(name)} needs the eigenvalue: --hessian-every 1")
    if args.early_stop and args.adapt_weight_decay:
        raise ValueError("--early-stop and --adapt-weight-decay: one or the other")
    if args.early_stop and args.keep == "best":
        raise ValueError("--early-stop and --keep best: one or the other")


def check_selection_flags(args: argparse.Namespace, given: Collection[str]) -> None:
    """Raise a ValueError if a flag of the selection is given without --seeds, or --seed with it."""
    for name in ("select_epochs", "select_channels", "select_cells"):
        if name in given and args.seeds is None:
            raise ValueError(f"{flag(name)}: only with --seeds")
    if args.seeds and "seed" in given:
        raise ValueError("--seed and --seeds: one or the other")


def parse_flags(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    presets: Callable[[argparse.Namespace], dict[str, Any]],
    only_with: dict[str, tuple[str, ...]],
    has_own_dataset: bool = False,
) -> tuple[argparse.Namespace, set[str]]:
    """Return the arguments, and the names of those that the user gave.

    `presets(args)` returns the defaults that depend on what the user chose; what the user gave
    wins, and `--help` shows the result. `only_with` is that of `refuse_unused`. With
    `has_own_dataset`, flags that choose the images are refused. Raises ValueError instead of ending
    the process.
    """

    def error(message: str) -> None:
        # argparse says "argument --epochs: 0: must be in [1, inf)".
        raise ValueError(re.sub(r"^argument (\S+): (\S+: must be in )", r"\1 \2", message))

    parser.error = error
    argv = sys.argv[1:] if argv is None else argv
    defaults = vars(parser.parse_args([]))
    # argparse sets no default where an attribute is there: what stays None was not given.
    not_given = argparse.Namespace(**dict.fromkeys(defaults))
    given = vars(parser.parse_args([f for f in argv if f not in ("-h", "--help")], not_given))
    given = {name: value for name, value in given.items() if value is not None}
    parser.set_defaults(**presets(argparse.Namespace(**defaults | given)))
    args = parser.parse_args(argv)
    if has_own_dataset:
        for name in sorted(given.keys() & {"dataset", "data_dir", "image_size", *FOLDER_ONLY}):
            raise ValueError(f"{flag(name)}: leave it out, the dataset is the caller's")
        args.dataset = OWN_DATASET
    refuse_unused(args, given, only_with)
    if args.batch_size % getattr(args, "grad_accum", 1):
        raise ValueError(
            f"--grad-accum {args.grad_accum}: must divide --batch-size, {args.batch_size}"
        )
    return args, set(given)


def refuse_unused(
    args: argparse.Namespace, given: Collection[str], only_with: dict[str, tuple[str, ...]]
) -> None:
    """Raise a ValueError that names the first given argument that these `args` do not use.

    `only_with` maps an argument to the one that it belongs to, and to the values that use it.
    """
    for name, (chooser, *values) in only_with.items():
        value = getattr(args, chooser)
        if name in given and value not in values:
            needed = " or ".join(f"{flag(chooser)} {value}" for value in values)
            raise ValueError(f"{flag(name)}: only with {needed}, not with {flag(chooser)} {value}")


def flag(name: str) -> str:
    """Return the flag that sets the argument `name`."""
    return "--" + name.replace("_", "-")


def check_same_arguments(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Raise a ValueError that names the arguments of a resumed run that would change its result."""
    changed = [n for n in before if n not in MAY_CHANGE and now.get(n) != before[n]]
    if changed:
        listed = ", ".join(f"{name} (was {before[name]}, now {now.get(name)})" for name in changed)
        raise ValueError(f"--resume with other arguments would change the result: {listed}")


def data_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments with which another script loads the same dataset."""
    if args.dataset == OWN_DATASET:
        return {}
    names = ("dataset", "data_dir", "image_size", "channels")
    values = {name: getattr(args, name) for name in names}
    return values | ({"seed": args.seed} if args.dataset == "synthetic" else {})


def as_flags(values: dict[str, Any]) -> list[str]:
    """Write arguments as flags; leave out what is None or False."""
    words = []
    for name, value in values.items():
        if value is not None and value is not False:
            words += [flag(name)] if value is True else [flag(name), str(value)]
    return words


def as_command(
    args: argparse.Namespace, script: str, words: list[str], program: str | None = None
) -> str:
    """Write how the user calls a script with `words`: in a shell, or main() with a dataset.

    `program` starts the script in a shell; by default, Python does.
    """
    if args.dataset == OWN_DATASET:
        return f"{script.removesuffix('.py')}.main({words}, dataset=...)"
    return f"{program or f'python {script}'} {shlex.join(words)}"


def run_as_script(name: str, main: Callable[[], Any]) -> None:
    """Call `main()`; tell a user's mistake in one line, and end with exit code 2.

    A training that has diverged ends with exit code 1.
    """
    try:
        main()
    except ValueError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        sys.exit(f"{name}: error: {error}")
