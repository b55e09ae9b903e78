"""The searches of the study in STUDY.md: run them, and keep what is needed to judge them.

    python -m benchmarks.study --data-dir DIR [--out-dir runs/study] [--processes 2]

DIR holds CIFAR-10 as `train/<class>/*` and `test/<class>/*`. Started again, it goes on. For each
finished search, `<out-dir>/results/<method>-<seed>.json` holds the genotype, the accuracies and the
signs of every epoch.
"""

import argparse
import functools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import train_search

SEARCH = "--dataset folder --image-size 16 --subset 5000 --init-channels 8 --num-cells 4 "
SEARCH += "--batch-size 32 --epochs 10 --hessian-every 2"
# Method: number of seeds, flags. The learning rate of alpha is 20/3 of each paper's.
METHODS = {
    "softmax": (4, "--alpha-lr 2e-3"),
    "partial": (4, "--relaxation partial --partial 2 --alpha-warmup-epochs 2 --alpha-lr 4e-3"),
    "gumbel": (4, "--relaxation gumbel --alpha-lr 2e-3"),
    "dirichlet": (4, "--relaxation dirichlet --alpha-warmup-epochs 2 --alpha-lr 4e-3"),
    "sigmoid": (4, "--relaxation sigmoid --alpha-lr 2e-2"),
    "random": (4, "--method random --candidates 40"),
    "S2": (4, "--space S2 --alpha-lr 2e-3 --epochs 20 --hessian-every 1"),
    "softmax-order-2": (2, "--alpha-lr 2e-3 --order 2"),
}

load_dataset = functools.cache(train_search.load_dataset)  # read once by each process


def search(method: str, seed: int, data_dir: str, out_dir: Path) -> str:
    """Run one search, unless its result is there; go on if it was begun."""
    name = f"{method}-{seed}"
    folder, result_file = out_dir / name, out_dir / "results" / f"{name}.json"
    if not result_file.exists():
        torch.set_num_threads(1)
        train_search.load_dataset = load_dataset
        flags = f"{SEARCH} {METHODS[method][1]} --seed {seed}"
        resume = ["--resume"] if (folder / "args.json").exists() else []
        argv = [*flags.split(), "--data-dir", data_dir, "--out-dir", str(folder), *resume]
        found = train_search.main(argv)
        kept = ("genotype", "train_accuracy", "arch_accuracy", "signs", "seconds")
        epochs = [{key: record[key] for key in kept} for record in found["history"]]
        result_file.parent.mkdir(exist_ok=True)
        result = {"method": method, "seed": seed, "flags": flags, "epochs": epochs}
        result_file.write_text(json.dumps(result), encoding="utf-8")
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True, help="CIFAR-10 as image files")
    parser.add_argument("--out-dir", type=Path, default=Path("runs/study"), help="of all runs")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        searches = [
            pool.submit(search, method, seed, args.data_dir, args.out_dir)
            for seed in range(max(seeds for seeds, _ in METHODS.values()))
            for method, (seeds, _) in METHODS.items()
            if seed < seeds
        ]
        for done in searches:
            print(done.result(), flush=True)


if __name__ == "__main__":
    main()
