"""Tell a person how an epoch of a search went: log lines, curves and pictures for TensorBoard."""

import argparse
from typing import Any

from PIL import Image

from darts_min.convert.genotype_texts import format_genotype, parse_genotype
from darts_min.draw import draw_alphas, draw_cell, draw_history
from darts_min.genotypes import Genotype, kept_edges, sort_edges
from darts_min.judge.estimate import Estimate, estimate_accuracy
from darts_min.run.run_folder import RunFolder

KINDS = ("normal", "reduce")
# Said once, where the first estimate is shown.
MEANING = (
    "expected: what NAS-Bench-301 would predict for the cell on CIFAR-10 (32 channels, 8 cells, "
    "100 epochs), and the standard error of that; it knows nothing of the data here"
)


def describe(estimate: Estimate | None) -> str:
    """Say in words what a cell is expected to be worth."""
    if estimate is None:
        return "no expectation (NAS-Bench-301 has no such cell)"
    percentile = estimate.percentile
    better_than = f"{percentile:.0f}" if percentile < 99 else f"{min(percentile, 99.9):.1f}"
    return (
        f"expected {estimate.accuracy:.1f} % ± {estimate.std:.1f}, better than {better_than} % of "
        "random cells"
    )


def expected_of(genotype: Genotype) -> dict[str, float] | None:
    """Return the estimate of a cell as a record holds it."""
    estimate = estimate_accuracy(genotype)
    return None if estimate is None else estimate._asdict()


def epoch_lines(args: argparse.Namespace, record: dict[str, Any], is_changed: bool) -> str:
    """Return two lines of at most 120 columns: one about the supernet, one about its cell."""
    signs, skipped, expected = record["signs"], record["skipped_batches"], record["expected"]
    discrete = record["arch_accuracy"] - signs["accuracy lost in discretisation"]
    eigenvalue = signs.get("largest eigenvalue")
    return (
        f"epoch {record['epoch']:3d}/{args.epochs}  lr {record['lr']:.4f}  "
        f"w half: loss {record['train_loss']:.3f}, {100 * record['train_accuracy']:.2f} %  "
        f"alpha half: loss {record['arch_loss']:.3f}, {100 * record['arch_accuracy']:.2f} %, "
        f"discretised {100 * discrete:.2f} %  {record['seconds']:.0f} s\n"
        f"    cell {'changed' if is_changed else 'unchanged' if record['epoch'] > 1 else 'found'}, "
        f"skips {signs['skips in the cell/normal']} + {signs['skips in the cell/reduce']}"
        + ("" if eigenvalue is None else f", eigenvalue {eigenvalue:.3g}")
        + f", {describe(None if expected is None else Estimate(**expected))}"
        + (f", {skipped} batches skipped so far" if skipped else "")
    )


def curves(record: dict[str, Any]) -> dict[str, float]:
    """Return TensorBoard's curves of an epoch, grouped by what a person looks for."""
    names = ("train_loss", "arch_loss", "train_accuracy", "arch_accuracy", "lr")
    scalars = {f"progress/{name}": record[name] for name in names}
    for name, value in (record["expected"] or {}).items():
        scalars[f"expected accuracy/{name}"] = value
    for name, value in record["signs"].items():
        scalars[f"signs/{name.replace('/', ', ')}"] = value
    return scalars


def draw_cells(genotype: Genotype) -> dict[str, Image.Image]:
    return {f"cell_{kind}": draw_cell(genotype, kind) for kind in KINDS}


def draw_epoch(
    args: argparse.Namespace, history: list[dict], primitives: tuple[str, ...]
) -> dict[str, Image.Image]:
    """Draw the cells of the last record, its mixtures, and the mixtures of all epochs."""
    record, genotype = history[-1], parse_genotype(history[-1]["genotype"])
    pictures = draw_cells(genotype)
    method = args.relaxation if args.method == "darts" else "random search"
    for i, kind in enumerate(KINDS):
        cell, title = getattr(genotype, kind), f"{method}, {kind} cell"
        columns = [primitives.index(op) for op, _ in cell]
        kept = dict(zip(kept_edges(cell), columns, strict=True))
        pictures[f"alphas_{kind}"] = draw_alphas(record["mixtures"][i], primitives, title, kept)
        over_time = [r["mixtures"][i] for r in history]
        pictures[f"mixtures_{kind}"] = draw_history(over_time, primitives, f"{title}, by epoch")
    return pictures


def report_epoch(
    args: argparse.Namespace, run: RunFolder, history: list[dict], primitives: tuple[str, ...]
) -> None:
    """Write the last record of `history` to the log, to files and to TensorBoard."""
    record, *before = history[::-1]
    if not before and record["expected"] is not None:
        run.log(MEANING)
    cells = [sort_edges(parse_genotype(r["genotype"])) for r in history[-2:]]
    is_changed = cells[0] != cells[-1]
    run.log(epoch_lines(args, record, is_changed))
    genotype = parse_genotype(record["genotype"])
    run.save_text("genotype.json", format_genotype(genotype, "json") + "\n")
    pictures = run.save_pictures(lambda: draw_epoch(args, history, primitives))
    texts = {"genotype": f"`{record['genotype']}`"}
    run.report(record["epoch"], curves(record), texts, pictures)
