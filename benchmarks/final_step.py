"""Training step and inference of DARTS_V2 against the same network written the plain way.

The plain one (tests/textbook_network.py) applies its ReLUs edge by edge and is in contiguous
memory. Both run in this process, interleaved, without auxiliary head; random data of CIFAR's shape.
Inference is that of eval_pretrained.py, with BN folded into the convolutions. A few training passes
come first, so that BN's averages are those of the data; the deviation of the logits is relative to
their standard deviation over the images.

    python -m benchmarks.final_step [--batch-size 32] [--eval-batch-size 256] [--repetitions 5]
"""

import argparse
from copy import deepcopy
from functools import partial

import torch
from torch.nn import functional as F

from benchmarks.measure import interleaved_seconds
from darts_min import Network
from darts_min.convert.state_dicts import network_to_quark0
from darts_min.genotypes import PUBLISHED
from darts_min.network import fold_batch_norm
from tests.textbook_network import TextbookNetwork

PASSES = 30  # 0.9 ** 30 = 4 % of BN's averages are still those of its start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--eval-batch-size", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    genotype = PUBLISHED["DARTS_V2"]
    x, target = torch.randn(args.batch_size, 3, 32, 32), torch.randint(10, (args.batch_size,))
    images = torch.randn(args.eval_batch_size, 3, 32, 32)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")

    def train(model):
        model.zero_grad()
        F.cross_entropy(model(x), target).backward()

    @torch.no_grad()
    def infer(model):
        return model(images)

    for channels, num_cells in ((16, 8), (36, 20)):
        ours = Network(genotype, 10, channels, num_cells, auxiliary=False)
        ours = ours.to(memory_format=torch.channels_last)
        with torch.no_grad():
            for _ in range(PASSES):
                ours(x)
        plain = TextbookNetwork(genotype, 10, channels, num_cells)
        plain.load_state_dict(network_to_quark0(ours))
        folded, plain_eval = fold_batch_norm(ours), deepcopy(plain).eval()
        for what, run, models, batch in (
            ("training", train, (ours, plain), x),
            ("inference", infer, (folded, plain_eval), images),
        ):
            a, b, ratio = interleaved_seconds(
                *(partial(run, model) for model in models), args.repetitions
            )
            print(
                f"C={channels} L={num_cells:2d}  {what:<9}  batch {len(batch):3d}  "
                f"{a:6.3f} s / {b:6.3f} s = {ratio:.3f}"
            )
        logits = infer(plain_eval)
        deviation = (infer(folded) - logits).abs().max() / logits.std(0).mean()
        print(f"C={channels} L={num_cells:2d}  largest deviation of a logit: {deviation:.1e} std")


if __name__ == "__main__":
    main()
