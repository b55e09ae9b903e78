"""Run the searches and trainings of the study in STUDY.md.

    python -m benchmarks.study --data-dir DIR [--out-dir runs/study] [--processes 2]

DIR holds CIFAR-10 as `train/<class>/*` and `test/<class>/*`. Started again, it goes on. What a
finished run leaves for the tables is kept in benchmarks/results; study_tables.py prints them.
"""

import argparse
import functools
import json
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import train_final
import train_search
from darts_min.convert.genotype_texts import format_genotype, parse_genotype
from darts_min.genotypes import PUBLISHED, SHORT_NAMES, Genotype, genotype_of, random_genotype
from darts_min.judge.estimate import estimate_accuracy
from darts_min.run.files import write_atomically

RESULTS = Path(__file__).with_name("results")
DATA = "--dataset folder --image-size 16 "
SEARCH = DATA + "--subset 5000 --init-channels 8 --num-cells 4 --batch-size 32 --epochs 10 "
SEARCH += "--hessian-every 2"
# Method: number of seeds, flags. The learning rate of alpha is 20/3 of each paper's.
METHODS = {
    "softmax": (4, "--alpha-lr 2e-3"),
    "partial": (4, "--relaxation partial --partial 2 --alpha-warmup-epochs 2 --alpha-lr 4e-3"),
    "gumbel": (4, "--relaxation gumbel --alpha-lr 2e-3"),
    "dirichlet": (4, "--relaxation dirichlet --alpha-warmup-epochs 2 --alpha-lr 4e-3"),
    "sigmoid": (4, "--relaxation sigmoid --alpha-lr 2e-2"),
    "random": (4, "--method random --candidates 40 --hessian-every 0"),
    "S2": (4, "--space S2 --alpha-lr 2e-3 --epochs 20 --hessian-every 1"),
    "softmax-order-2": (2, "--alpha-lr 2e-3 --order 2"),
}
TRAIN = DATA + "--subset 10000 --recipe quick --init-channels 16 --num-cells 8 --batch-size 64 "
TRAIN += "--epochs 20 --seed 0"
TENTHS = ((0, 10), (45, 55), (90, 100))  # percentiles, of which two random cells each are trained
FOUND = {  # by the first study's searches
    "first study, softmax": genotype_of(
        "dil3-1 dil3-0 sep3-2 sep3-0 dil3-2 dil3-1 sep5-0 sep5-3",
        "skip-1 skip-0 sep3-1 sep3-0 dil3-1 sep3-3 dil5-2 skip-1",
    ),
    "first study, gumbel": genotype_of(
        "dil5-1 dil5-0 sep5-2 dil3-0 dil5-2 dil5-3 sep5-4 sep3-3",
        "dil3-1 avg-0 max-0 sep3-2 max-0 skip-1 sep5-3 avg-1",
    ),
    "first study, random search": genotype_of(
        "dil5-0 skip-1 skip-0 sep5-1 dil3-0 avg-1 dil5-2 dil3-3",
        "sep3-0 sep3-1 dil5-0 max-1 max-0 dil5-3 sep5-1 avg-4",
    ),
}

read_once = functools.cache(train_search.load_dataset)
EPOCH_KEYS = ("train_accuracy", "arch_accuracy", "signs")


def load_dataset(name: str, data_dir: str, size: int | None, seed: int, *rest, **options):
    """Load a dataset once in each process; the seed does not change what is in a folder."""
    return read_once(name, data_dir, size, 0, *rest, **options)


def short(genotype: Genotype) -> dict[str, str]:
    """Write the cells in the short names that `genotype_of` reads."""
    names = {long: name for name, long in SHORT_NAMES.items()}
    cells = {"normal": genotype.normal, "reduce": genotype.reduce}
    return {kind: " ".join(f"{names[op]}-{j}" for op, j in cell) for kind, cell in cells.items()}


def run_once(
    name: str, main: Callable, words: list[str], data_dir: str, out_dir: Path
) -> dict | None:
    """Run a script, or go on with what it began; None if its result is there already."""
    if (RESULTS / f"{name}.json").exists():
        return None
    torch.set_num_threads(1)
    train_search.load_dataset = train_final.load_dataset = load_dataset
    resume = ["--resume"] if (out_dir / name / "args.json").exists() else []
    folders = ["--data-dir", data_dir, "--out-dir", str(out_dir / name)]
    return main([*words, *folders, *resume])


def write(name: str, result: dict) -> str:
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(
        json.loads(json.dumps(result), parse_float=lambda x: float(f"{float(x):.5g}"))
    )
    write_atomically(RESULTS / f"{name}.json", f"{text}\n".encode())
    return name


def search(method: str, seed: int, data_dir: str, out_dir: Path) -> str:
    name, flags = f"{method}-{seed}", f"{SEARCH} {METHODS[method][1]} --seed {seed}"
    found = run_once(name, train_search.main, flags.split(), data_dir, out_dir)
    if found is not None:
        epochs = [
            short(parse_genotype(record["genotype"])) | {key: record[key] for key in EPOCH_KEYS}
            for record in found["history"]
        ]
        seconds = [record["seconds"] for record in found["history"]]
        result = {"method": method, "seed": seed, "flags": flags, "seconds": seconds}
        write(name, result | {"epochs": epochs})
    return name


def cells_to_train() -> dict[str, Genotype]:
    """Return twelve cells: six random ones of three tenths of the estimates, six found ones."""
    cells, draws = {}, [(f"random:{seed}", random_genotype(seed)) for seed in range(200)]
    for low, high in TENTHS:
        tenth = [c for c in draws if low <= estimate_accuracy(c[1]).percentile <= high]
        cells |= dict(tenth[:2])
    return cells | {name: PUBLISHED[name] for name in ("P_DARTS", "DARTS_V2", "DARTS_PT")} | FOUND


def train(cell: str, data_dir: str, out_dir: Path) -> str:
    name = "cell-" + re.sub(r"[:, ]+", "-", cell)
    genotype = cells_to_train()[cell]
    words = [*TRAIN.split(), "--genotype", format_genotype(genotype, "json")]
    found = run_once(name, train_final.main, words, data_dir, out_dir)
    if found is not None:
        result = {"cell": cell, "flags": TRAIN, "parameters_M": found["parameters_M"]}
        keys = ("train_accuracy", "test_accuracy", "seconds")
        curves = {key: [record[key] for record in found["history"]] for key in keys}
        write(name, result | short(genotype) | curves)
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True, help="CIFAR-10 as image files")
    parser.add_argument("--out-dir", type=Path, default=Path("runs/study"), help="of all runs")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        seeds = range(max(seeds for seeds, _ in METHODS.values()))
        tasks = [(train, cell) for cell in cells_to_train()]
        tasks += [(search, m, seed) for seed in seeds for m in METHODS if seed < METHODS[m][0]]
        tasks.sort(key=lambda task: "order" in task[1])  # the longest ones last
        for done in [pool.submit(*task, args.data_dir, args.out_dir) for task in tasks]:
            print(done.result(), flush=True)


if __name__ == "__main__":
    main()
