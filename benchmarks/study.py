"""The study of STUDY.md: searches, then the same training for every cell, then the table.

    python -m benchmarks.study --data-dir DIR [--out-dir runs/study] [--processes 2]

DIR holds CIFAR-10 as `train/<class>/*` and `test/<class>/*`. Started again, it goes on.
"""

import argparse
import functools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import correlation, mean, stdev

import torch

import train_final
import train_search
from darts_min.alarms import WINDOW, should_stop

IMAGES = "--dataset folder --image-size 16 --subset 10000"
SEARCH = f"{IMAGES} --init-channels 8 --num-cells 4 --epochs 20 --batch-size 64 --alpha-lr 1e-3"
SEARCHES = {  # the longest first
    "softmax, seed 0": "--seed 0",
    "softmax, seed 1": "--seed 1",
    "S2, seed 0": "--seed 0 --space S2 --epochs 40",
    "S2, seed 1": "--seed 1 --space S2 --epochs 40",
    "partial": "--relaxation partial --partial 2 --alpha-warmup-epochs 4",
    "gumbel": "--relaxation gumbel",
    "random search": "--method random --candidates 40",
}
TRAINING = f"{IMAGES} --recipe quick --num-cells 5 --epochs 10"
OTHERS = {f"random:{seed}": f"random:{seed}" for seed in range(6)} | {"DARTS_V2": "DARTS_V2"}

load_dataset = functools.cache(train_search.load_dataset)  # read once by each process


def run(main, flags: list[str], folder: Path) -> dict:
    """Run a script's `main`, unless its result is there; go on if it was begun."""
    if not (folder / "result.json").exists():
        torch.set_num_threads(1)
        for script in (train_search, train_final):
            script.load_dataset = load_dataset
        begun = ["--resume"] if (folder / "args.json").exists() else []
        main([*flags, "--out-dir", str(folder), *begun])
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def stopped(history: list[dict]) -> str | None:
    """Return the genotype that --early-stop would have ended a search with, None if it goes on."""
    eigenvalues = [record["signs"]["largest eigenvalue"] for record in history]
    for epoch in range(len(history) + 1):
        if should_stop(eigenvalues[:epoch]):
            return history[epoch - 1 - WINDOW]["genotype"]
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out-dir", type=Path, default=Path("runs/study"))
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the trainings; two or more"
    )
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    args = parser.parse_args()
    data = ["--data-dir", args.data_dir]

    def folder(*names: object) -> Path:
        return args.out_dir / "-".join(str(n).replace(", ", "-").replace(" ", "-") for n in names)

    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        searches = {
            name: pool.submit(
                run, train_search.main, SEARCH.split() + flags.split() + data, folder(name)
            )
            for name, flags in SEARCHES.items()
        }
        cells = OTHERS.copy()
        for name, search in searches.items():
            result = search.result()
            cells[name] = result["genotype"]
            if name.startswith("S2") and (genotype := stopped(result["history"])):
                cells[f"{name}, stopped"] = genotype
        trainings = {
            (name, seed): pool.submit(
                run,
                train_final.main,
                [*TRAINING.split(), *data, "--genotype", genotype, "--seed", str(seed)],
                folder("final", name.replace(":", "-"), seed),
            )
            for seed in args.seeds
            for name, genotype in cells.items()
        }
        trained = {name: [trainings[name, seed].result() for seed in args.seeds] for name in cells}

    rows = []
    for name, results in trained.items():
        accuracies = [100 * result["test_accuracy"] for result in results]
        rows.append((mean(accuracies), stdev(accuracies), accuracies, name, results[0]))
    random_means = [row[0] for row in rows if row[3].startswith("random:")]
    print("| cell | test accuracy (%) | by seed | rank among the random | parameters (M) | skips |")
    print("|---|---|---|---|---|---|")
    for average, deviation, accuracies, name, result in sorted(rows, reverse=True):
        rank = 1 + sum(other > average for other in random_means)
        normal, reduce = result["genotype"].split("reduce=")
        print(
            f"| {name} | {average:.2f} +- {deviation:.2f} | "
            + " ".join(f"{accuracy:.2f}" for accuracy in accuracies)
            + f" | {rank} | {result['parameters_M']:.3f} | "
            f"{normal.count('skip_connect')} + {reduce.count('skip_connect')} |"
        )
    r = correlation([row[0] for row in rows], [row[4]["parameters_M"] for row in rows])
    print(f"parameters explain {r**2:.2f} of the variance of the means")


if __name__ == "__main__":
    main()
