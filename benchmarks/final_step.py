"""Training step and inference of DARTS_V2 against the same network written the plain way.

The plain one (tests/textbook.py) applies its ReLUs edge by edge and is in contiguous memory. Both
run in this process, interleaved, without auxiliary head; random data of CIFAR's shape.

    python -m benchmarks.final_step [--batch-size 32] [--repetitions 5]
"""

import argparse

import torch
from torch.nn import functional as F

from benchmarks.measure import interleaved_seconds
from darts_min import Network
from darts_min.genotypes import PUBLISHED
from tests.textbook import TextbookNetwork


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    genotype = PUBLISHED["DARTS_V2"]
    x, target = torch.randn(args.batch_size, 3, 32, 32), torch.randint(10, (args.batch_size,))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {args.batch_size}")
    for channels, num_cells in ((16, 8), (36, 20)):
        ours = Network(genotype, 10, channels, num_cells, auxiliary=False)
        ours = ours.to(memory_format=torch.channels_last)
        plain = TextbookNetwork(genotype, 10, channels, num_cells)

        def train(model):
            model.train()
            model.zero_grad()
            F.cross_entropy(model(x), target).backward()

        @torch.no_grad()
        def infer(model):
            model.eval()
            model(x)

        for what, run in (("training", train), ("inference", infer)):
            a, b, ratio = interleaved_seconds(
                lambda run=run, model=ours: run(model),
                lambda run=run, model=plain: run(model),
                args.repetitions,
            )
            print(
                f"C={channels} L={num_cells:2d}  {what:<9}  {a:6.3f} s / {b:6.3f} s = {ratio:.3f}"
            )


if __name__ == "__main__":
    main()
