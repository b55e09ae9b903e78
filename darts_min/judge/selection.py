"""The selection among several searches (Sec. 3.2): a ranking, its table and its picture."""

from functools import partial
from typing import Any

from darts_min.convert.genotype_texts import format_genotype, parse_genotype
from darts_min.draw import draw_side_by_side
from darts_min.run.run_folder import RunFolder


def rank(run: RunFolder, results: list[tuple[int, dict, dict]]) -> list[dict[str, Any]]:
    """Rank (seed, result of the search, result of the training), the best first.

    Prints a table, draws all cells in `cells.png`, and makes the best one the genotype of `run`.
    """
    lines = ["| seed | supernet (%) | held-out half (%) | parameters (M) |", "|---|---|---|---|"]
    cells, ranking = [], []
    for seed, found, trained in sorted(results, key=lambda result: -result[2]["test_accuracy"]):
        accuracy, genotype = trained["test_accuracy"], parse_genotype(trained["genotype"])
        lines.append(
            f"| {seed} | {100 * found['arch_accuracy']:.2f} | {100 * accuracy:.2f} | "
            f"{trained['parameters_M']:.3f} |"
        )
        cells.append((f"seed {seed}: {100 * accuracy:.2f} % of the held-out half", genotype))
        ranking.append({"seed": seed, "genotype": trained["genotype"], "accuracy": accuracy})
    run.log("\n".join(lines))
    run.save_text("genotype.json", format_genotype(cells[0][1], "json") + "\n")
    picture = draw_side_by_side(cells)
    run.attempt("cells.png", partial(picture.save, run / "cells.png"))
    return ranking
