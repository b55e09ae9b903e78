"""Select among several searches (Sec. 3.2): search, train each cell, rank the cells."""

import argparse
from collections.abc import Callable
from typing import Any

from darts_min.convert.genotype_texts import format_genotype, parse_genotype
from darts_min.draw import draw_side_by_side
from darts_min.judge.estimate import estimate_accuracy
from darts_min.judge.report import describe
from darts_min.run.flags import as_flags, check_same_arguments, data_arguments
from darts_min.run.run_folder import BEGUN, RunFolder

# Arguments of a search that hold for its trainings too.
SAME = ("subset", "batch_size", "grad_accum", "stem", "seed", "device", "amp", "channels_last")
SAME += ("checkpoint_minutes", "on_nonfinite", "demo", "fast_dev_run", "compile", "deterministic")


def training_flags(args: argparse.Namespace, settings: dict[str, Any]) -> list[str]:
    """Return the flags with which train_final.py trains a cell for the search arguments `args`."""
    values = {name: getattr(args, name) for name in SAME} | data_arguments(args)
    values |= {"in_memory": "always"} if args.dataset == "folder" else {}  # as the search has them
    values |= {"epochs": args.select_epochs, "init_channels": args.select_channels}
    values |= {"num_cells": args.select_cells, "holdout": True}
    return as_flags(values | settings)


def select(
    run: RunFolder,
    args: argparse.Namespace,
    search: Callable[[dict], dict],
    train: Callable[[dict], dict],
) -> dict[str, Any]:
    """Search with each of `args.seeds`, train each cell found, and keep the best cell (Sec. 3.2).

    `search(settings)` and `train(settings)` return results. The settings are arguments: the seed
    or the genotype, and a run folder in that of the selection, to be resumed if it has begun.
    """
    if args.resume:
        before = run.load_checkpoint()["args"]
        check_same_arguments(vars(args), before)
        if args.epochs != before["epochs"]:
            raise ValueError(
                f"--epochs {args.epochs}: the cells of this selection are of searches of "
                f"{before['epochs']}"
            )
    run.save_checkpoint({"args": vars(args)})
    run.save_json("args.json", vars(args))

    def folder(name: str) -> dict[str, Any]:
        begun = any((run / name / file).exists() for file in BEGUN)
        return {"out_dir": str(run / name), "resume": run.machine.from_first(begun)}

    results = []
    try:
        for seed in args.seeds:
            found = search({"seed": seed, **folder(f"search-{seed}")})
            trained = train({"genotype": found["genotype"], **folder(f"final-{seed}")})
            results.append((seed, found, trained))
            if run.signal is not None:  # between a training and a search
                run.stop(run.signal)
    except SystemExit:
        run.log(f"continue the selection with: {run.command}")
        raise
    result = {"ranking": rank_cells(run, results), "args": vars(args), "out_dir": str(run.path)}
    run.save_json("result.json", result)
    best = result["ranking"][0]["seed"]
    run.log(f"best: seed {best}; pictures of all cells: {run / 'cells.png'}")
    return result


def rank_cells(run: RunFolder, results: list[tuple[int, dict, dict]]) -> list[dict[str, Any]]:
    """Rank (seed, result of the search, result of the training), the best first.

    Print a table, draw all cells in `cells.png`, and make the best cell the genotype of `run`.
    """
    lines = ["| seed | supernet (%) | held-out half (%) | parameters (M) | expected |"]
    lines += ["|---|---|---|---|---|"]
    cells, ranking = [], []
    for seed, found, trained in sorted(results, key=lambda result: -result[2]["test_accuracy"]):
        accuracy, genotype = trained["test_accuracy"], parse_genotype(trained["genotype"])
        lines.append(
            f"| {seed} | {100 * found['arch_accuracy']:.2f} | {100 * accuracy:.2f} | "
            f"{trained['parameters_M']:.3f} | {describe(estimate_accuracy(genotype))} |"
        )
        cells.append((f"seed {seed}: {100 * accuracy:.2f} % of the held-out half", genotype))
        ranking.append({"seed": seed, "genotype": trained["genotype"], "accuracy": accuracy})
    run.log("\n".join(lines))
    run.save_text("genotype.json", format_genotype(cells[0][1], "json") + "\n")
    run.save_pictures(lambda: {"cells": draw_side_by_side(cells)})
    return ranking
