"""What a search step of each relaxation costs beside plain DARTS: time, kept bytes, operator calls.

First order, the same batches for all; random data of CIFAR's shape; 16 channels, 8 cells. Each is
timed in turn with softmax, in this process; bytes and calls are means over as many draws. PC-DARTS
has 1/4 of the channels in its mixed ops.

    python -m benchmarks.relaxations [--batch-size 64] [--repetitions 5]
"""

import argparse
from functools import partial
from statistics import mean

import torch
from torch.nn import functional as F

from benchmarks.measure import interleaved_seconds, kept_bytes, operator_calls
from benchmarks.search_step import optimizers, our_step
from darts_min import Supernet
from darts_min.relaxations import Dirichlet, Gumbel, Sigmoid, Softmax


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    batches = [
        (torch.randn(args.batch_size, 3, 32, 32), torch.randint(10, (args.batch_size,)))
        for _ in range(2)
    ]

    def make(relaxation: Softmax, channels: int = 1) -> Supernet:
        model = Supernet(partial=channels).to(memory_format=torch.channels_last)
        model.relaxation = relaxation
        for alpha in model.alphas():
            alpha.requires_grad_(False)
        return model

    def step_of(model: Supernet) -> partial:
        return partial(our_step, model, *optimizers(model, True), *batches, order=1)

    def loss(model: Supernet) -> torch.Tensor:
        return F.cross_entropy(model(batches[0][0]), batches[0][1])

    plain = make(Softmax())
    step, kept = step_of(plain), kept_bytes(plain, partial(loss, plain))
    step()  # the first one makes the optimizers' states
    calls = operator_calls(step)[0]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {args.batch_size}")
    print(f"softmax: keeps {kept / 1e6:.1f} MB, {calls} operator calls")
    for name, model in (
        ("gumbel", make(Gumbel())),
        ("dirichlet", make(Dirichlet())),
        ("sigmoid", make(Sigmoid())),
        ("partial, 1/4", make(Softmax(), 4)),
    ):
        other = step_of(model)
        other()
        draws = range(args.repetitions)
        bytes_kept = mean(kept_bytes(model, partial(loss, model)) for _ in draws)
        its_calls = mean(operator_calls(other)[0] for _ in draws)
        a, b, ratio = interleaved_seconds(other, step, args.repetitions)
        print(
            f"{name:<12}  {a:6.3f} s / {b:6.3f} s = {ratio:.3f}  "
            f"kept {bytes_kept / kept:.3f}  calls {its_calls / calls:.3f}"
        )


if __name__ == "__main__":
    main()
