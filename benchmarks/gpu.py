"""Measure on one GPU, in eight minutes, what docs/speed.md estimates.

    python -m benchmarks.gpu [--seconds 460] [--device cuda] [--out gpu.json]

The sections come in order of worth. Each figure is printed and written to the JSON file at once. A
measurement that fails is recorded, and the next one follows; none begins after the time. With
`--tiny` the sizes are small, so that the benchmark can be tried without a GPU: figures that need
CUDA are null then.
"""

import argparse
import itertools
import json
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import train_final
import train_search
from benchmarks.search_step import optimizers, textbook_step
from darts_min.genotypes import PUBLISHED
from darts_min.judge.signs import discretised, largest_eigenvalue
from darts_min.kernels import grouped_pointwise
from darts_min.network import Network, fold_batch_norm
from darts_min.run.machine import Machine
from darts_min.run.step import make_w_step
from tests.textbook import TextbookSupernet

TINY = ["--init-channels", "4", "--num-cells", "3", "--batch-size", "4"]
NEED_CUDA = ("launches", "device ms", "idle share", "peak GB", "longest kernels (ms)")
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
CHANNELS_LAST = {"NCHW": "off", "NHWC": "on"}
Measurements = Iterator[tuple[str, Callable[[], dict[str, Any]]]]


def significant(value: float) -> float:
    return float(f"{value:.4g}")


class Bench:
    """Make what is measured, in full or tiny sizes, on one device."""

    def __init__(self, device: str, tiny: bool):
        self.device, self.tiny = Machine(device).device, tiny
        self.image_size = 8 if tiny else 32

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, step: Callable[[], object]) -> float:
        self.synchronize()
        start = time.perf_counter()
        step()
        self.synchronize()
        return time.perf_counter() - start

    def figures(self, step: Callable[[], object]) -> dict[str, Any]:
        """Measure `step` after three calls that warm it up, which are timed, too."""
        first = [self.seconds(step) for _ in range(1 if self.tiny else 3)]
        times = []
        while not times or (not self.tiny and len(times) < 30 and sum(times) < 3):
            times.append(self.seconds(step))
        milliseconds = significant(1000 * statistics.median(times))
        first = [significant(value) for value in first]
        result = {"ms": milliseconds, "repetitions": len(times), "first calls (s)": first}
        if self.device.type != "cuda":
            return result | dict.fromkeys(NEED_CUDA) | {"reason": "needs CUDA"}
        torch.cuda.reset_peak_memory_stats()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.seconds(step)
        kernels, launches = Counter(), 0
        for event in profile.events():
            is_label = getattr(event, "is_user_annotation", False) or "#" in event.name
            if event.device_type == torch.autograd.DeviceType.CUDA and not is_label:
                kernels[event.name] += event.time_range.elapsed_us() / 1000
                launches += 1
        busy = kernels.total()
        peak = torch.cuda.max_memory_allocated() / 1e9
        longest = {name[:80]: significant(ms) for name, ms in kernels.most_common(8)}
        idle = significant(1 - busy / milliseconds)
        values = launches, significant(busy), idle, significant(peak), longest
        return result | dict(zip(NEED_CUDA, values, strict=True))

    def batch(self, size: int, machine: Machine | None = None) -> tuple:
        x = torch.randn(size, 3, self.image_size, self.image_size, device=self.device)
        if machine is not None:
            x = x.contiguous(memory_format=machine.memory_format)
        return x, torch.randint(10, (size,), device=self.device)

    def parse(self, script: Any, *flags: str) -> tuple[argparse.Namespace, Machine]:
        tiny = TINY if self.tiny else []
        args = script.parse_args([*tiny, "--device", str(self.device), *flags])
        how = args.amp, args.channels_last, args.deterministic, args.compile
        return args, Machine(args.device, *how, getattr(args, "cuda_graphs", False))

    def search(self, *flags: str) -> tuple[torch.nn.Module, Callable[[], object]]:
        """Return a supernet, and the search step of train_search.py on it."""
        nodes = ["--num-nodes", "1"] if self.tiny else []
        args, machine = self.parse(train_search, *flags, *nodes)
        torch.manual_seed(0)
        model = train_search.make_supernet(args, 10, 3, machine)
        both = train_search.make_steps(args, model, machine, 1000)
        batches = itertools.repeat([self.batch(args.batch_size, machine) for _ in range(2)])
        xi = 0.025 if args.order == 2 else 0.0
        return model, partial(
            next, train_search.train_epoch(model, batches, *both, machine, xi, args.grad_accum)
        )

    def final(self, *flags: str) -> tuple[torch.nn.Module, Callable[[], object], Machine]:
        """Return DARTS_V2, the training step of train_final.py on it, and where it runs."""
        args, machine = self.parse(train_final, "--genotype", "DARTS_V2", *flags)
        sizes = args.init_channels, args.num_cells
        network = Network(PUBLISHED["DARTS_V2"], 10, *sizes, drop_path_prob=0.1)
        network.to(self.device, memory_format=machine.memory_format)
        weights = list(network.parameters())
        step = make_w_step(args, network, weights, machine, 1000, averages=False)
        batches = itertools.repeat(self.batch(args.batch_size, machine))
        more = machine, 1, args.auxiliary_weight
        return (
            network,
            partial(next, train_final.train_epoch(network, batches, step, *more)),
            machine,
        )


def steps(bench: Bench) -> Measurements:
    """Time a search step of ours and of the textbook supernet."""

    def ours(*flags: str, benchmark: bool = True) -> dict[str, Any]:
        _, step = bench.search(*flags)
        torch.backends.cudnn.benchmark = benchmark
        return bench.figures(step)

    def textbook(amp: str) -> dict[str, Any]:
        args, machine = bench.parse(train_search, "--amp", amp)
        model = TextbookSupernet(10, args.init_channels, args.num_cells).to(bench.device)
        how = *optimizers(model, None), *(bench.batch(args.batch_size) for _ in range(2)), 1

        def step():
            with machine.autocast():
                textbook_step(model, *how)

        return bench.figures(step)

    for amp in ("bf16", "off"):
        for name, channels_last in CHANNELS_LAST.items():
            flags = ["--amp", amp, "--channels-last", channels_last]
            yield f"ours, {amp}, {name}", partial(ours, *flags)
        yield f"textbook, {amp}", partial(textbook, amp)
    if bench.device.type == "cuda":  # of no use on a CPU
        for name, channels_last in CHANNELS_LAST.items():
            flags = ["--amp", "fp16", "--channels-last", channels_last]
            yield f"ours, fp16, {name}", partial(ours, *flags)
            flags[1] = "bf16"
            untried = partial(ours, *flags, benchmark=False)
            yield f"ours, bf16, {name}, no cudnn.benchmark", untried
    yield "ours, order 2", partial(ours, "--order", "2", "--channels-last", "off")


def graph(bench: Bench) -> Measurements:
    """Time a search step as two CUDA graphs; compare alpha after five steps with and without."""

    def run(*flags: str) -> dict[str, Any]:
        alphas = []
        for more in ([], ["--cuda-graphs"]):
            model, step = bench.search(*flags, *more)
            for _ in range(5):
                step()
            alphas.append([alpha.detach().clone() for alpha in model.alphas()])
        pairs = zip(*alphas, strict=True)
        deviation = max((a - b).abs().max().item() for a, b in pairs)
        return bench.figures(step) | {"largest deviation of an alpha": deviation}

    amps = ("bf16", "off") if bench.device.type == "cuda" else ("off",)
    for amp, name in itertools.product(amps, FORMATS):
        flags = ["--amp", amp, "--channels-last", CHANNELS_LAST[name]]
        yield f"{amp}, {name}", partial(run, *flags)


def syncs(bench: Bench) -> Measurements:
    """Count, by line of code, where the host waits for the GPU in a step."""

    def count(step: Callable[[], object]) -> dict[str, Any]:
        step()
        if bench.device.type != "cuda":
            return {"waits": None, "reason": "needs CUDA"}
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        places = (f"{Path(w.filename).name}:{w.lineno}" for w in found if "sync" in str(w.message))
        return {"waits": Counter(places)}

    yield "search step", lambda: count(bench.search()[1])
    yield "final step", lambda: count(bench.final()[1])


def evaluation(bench: Bench) -> Measurements:
    """Time the largest eigenvalue of a batch, and a batch of both evaluations after an epoch."""
    args, machine = bench.parse(train_search)
    model = train_search.make_supernet(args, 10, 3, machine)
    x, target = batch = bench.batch(args.batch_size, machine)

    @torch.no_grad()
    def evaluate(model: torch.nn.Module) -> None:
        model.eval()
        with machine.autocast():
            F.cross_entropy(model(x), target)
        model.train()

    eigenvalue = partial(largest_eigenvalue, model, F.cross_entropy, batch)
    yield "eigenvalue", lambda: bench.figures(eigenvalue)
    yield "supernet", lambda: bench.figures(partial(evaluate, model))
    discrete = discretised(model, model.genotype())
    yield "discretised", lambda: bench.figures(partial(evaluate, discrete))


def operations(bench: Bench) -> Measurements:
    """Time the forms of single operations, forward and backward, on four edges."""
    fan = 4

    def grouped(x, weight):
        return F.conv2d(x, weight, groups=fan)

    def depthwise(x, weight, dilation):
        padding = weight.size(-1) // 2 * dilation
        return F.conv2d(x, weight, None, 1, padding, dilation, len(weight))

    def run(operation, shape, dtype, layout, n, channels, size) -> dict[str, Any]:
        x = torch.randn(n, channels, size, size, device=bench.device, dtype=dtype)
        x = x.contiguous(memory_format=FORMATS[layout]).requires_grad_()
        weight = torch.randn(shape, device=bench.device, dtype=dtype)
        weight = weight.contiguous(memory_format=FORMATS[layout]).requires_grad_()
        grad = torch.randn_like(operation(x, weight))
        return bench.figures(lambda: torch.autograd.grad(operation(x, weight), (x, weight), grad))

    sizes = [(4, 4, 8)] if bench.tiny else [(64, 16, 32), (64, 32, 16), (64, 64, 8)]
    for (n, c, size), (amp, dtype) in itertools.product(
        sizes, (("bf16", torch.bfloat16), ("fp32", torch.float32))
    ):
        wide = fan * c
        forms = [
            ("1x1 grouped", grouped, (wide, c, 1, 1), "NCHW"),
            ("1x1 grouped", grouped, (wide, c, 1, 1), "NHWC"),
            ("1x1 bmm", grouped_pointwise, (wide, c, 1, 1), "NCHW"),
            ("1x1 dense", F.conv2d, (wide, wide, 1, 1), "NHWC"),
        ]
        for kernel, dilation, layout in itertools.product((3, 5), (1, 2), FORMATS):
            operation = partial(depthwise, dilation=dilation)
            name = f"depthwise {kernel}, dilation {dilation}"
            forms.append((name, operation, (wide, 1, kernel, kernel), layout))
        for name, operation, shape, layout in forms:
            where = f"{name}, {layout}, {amp}, ({n}, {wide}, {size}, {size})"
            yield where, partial(run, operation, shape, dtype, layout, n, wide, size)


def final(bench: Bench) -> Measurements:
    """Time DARTS_V2 in training and in inference with its BN folded."""

    def train(channels_last: str) -> dict[str, Any]:
        return bench.figures(bench.final("--channels-last", channels_last)[1])

    def infer(channels_last: str) -> dict[str, Any]:
        network, _, machine = bench.final("--channels-last", channels_last)
        folded, (x, _) = fold_batch_norm(network), bench.batch(4 if bench.tiny else 256, machine)

        @torch.no_grad()
        def run():
            with machine.autocast():
                folded(x)

        return bench.figures(run)

    for name, channels_last in CHANNELS_LAST.items():
        yield f"training, {name}", partial(train, channels_last)
        yield f"inference, {name}", partial(infer, channels_last)


def compilation(bench: Bench) -> Measurements:
    """Time one normal cell of the supernet by itself, as it is and compiled."""

    def run(mode: str | None) -> dict[str, Any]:
        if bench.device.type != "cuda":
            return {"ms": None, "reason": "needs CUDA"}
        args, machine = bench.parse(train_search, "--channels-last", "off")
        model = train_search.make_supernet(args, 10, 3, machine)
        cell, c = model.cells[0], 3 * args.init_channels
        s = torch.randn(args.batch_size, c, 32, 32, device=bench.device)
        mix = model.mixtures()[0].detach()[model.edge_order]
        if mode is not None:
            cell.compile(dynamic=False, mode=mode)

        def step():
            with machine.autocast():
                loss = cell(s, s, mix).float().square().mean()
            loss.backward()

        return bench.figures(step)

    for mode in (None, "default", "reduce-overhead"):
        yield f"mode {mode}", partial(run, mode)


SECTIONS = (steps, graph, syncs, evaluation, operations, final, compilation)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=460, help="begin nothing after this time")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="JSON file to write")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the benchmark")
    args = parser.parse_args(argv)
    start, bench = time.monotonic(), Bench(args.device, args.tiny)
    on_cuda = bench.device.type == "cuda"
    results = {
        "card": torch.cuda.get_device_name() if on_cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "tiny": args.tiny,
    }
    print(json.dumps(results))

    def record(section: str, name: str, figures: dict[str, Any]) -> None:
        results.setdefault(section, {})[name] = figures
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"{time.monotonic() - start:5.0f} s  {section}: {name}: {json.dumps(figures)}")

    for section in SECTIONS:
        try:
            for name, measure in section(bench):
                if time.monotonic() - start > args.seconds:
                    record(section.__name__, name, {"reason": "the time was over"})
                    continue
                try:
                    figures = measure()
                except Exception as error:
                    figures = {"error": f"{type(error).__name__}: {error}"}
                record(section.__name__, name, figures)
                if on_cuda:
                    torch.cuda.empty_cache()
        except Exception as error:
            record(section.__name__, "-", {"error": f"{type(error).__name__}: {error}"})
    return results


if __name__ == "__main__":
    main()
