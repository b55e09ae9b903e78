"""CUDA graphs. Oracle: the same steps without them; without a GPU, a replay is another call."""

import argparse
import inspect
import itertools

import pytest
import torch
from torch.utils._pytree import tree_leaves

import eval_pretrained
import train_final
import train_search
from darts_min.data import Images, Loader
from darts_min.run.graphs import Recorded
from darts_min.run.machine import Machine

SMALL = ["--dataset", "synthetic", "--init-channels", "4", "--num-cells", "3", "--num-nodes", "1"]
SMALL += ["--batch-size", "4", "--w-lr", "0.1", "--alpha-lr", "0.1"]


class Simulated(Recorded):
    """Replay by a call whose results are copied to where the recorded call left its own."""

    made = []

    def __init__(self, function, pool):
        super().__init__(function, pool)
        self.replays = 0
        Simulated.made.append(self)

    def call_aside(self, call):
        return call()

    def record(self):
        return self.again()

    def replay(self):
        self.replays += 1
        for parameter in self.args[0].parameters():  # recording computes nothing, .grad included
            parameter.grad = None
        again = tree_leaves(self.again())
        for ours, tensor in zip(tree_leaves(self.outputs), again, strict=True):
            ours.copy_(tensor)


def search(flags, machine, steps=4):
    """Search for some steps; return (loss, logits) of each, and the alphas and weights."""
    args = train_search.parse_args([*SMALL, *flags])
    torch.manual_seed(0)
    model = train_search.make_supernet(args, 10, 3, machine)
    both = train_search.make_steps(args, model, machine, steps)
    images = torch.randint(256, (80, 8, 8, 3), dtype=torch.uint8)
    data = Images(images, torch.arange(80) % 10).to(machine.device)
    how = {"augment": True, "memory_format": machine.memory_format}
    loaders = [Loader(data, 4, (torch.zeros(3), torch.ones(3)), stream=i, **how) for i in (0, 1)]
    batches = itertools.islice(zip(*(loader.epoch(0) for loader in loaders), strict=True), steps)
    xi = 0.1 if args.order == 2 else 0.0
    outputs = train_search.train_epoch(model, batches, *both, machine, xi, args.grad_accum)
    seen = [tensor.clone() for loss, logits, _ in outputs for tensor in (loss, logits)]
    assert len(seen) == 2 * steps * args.grad_accum
    return [*seen, *(parameter.detach() for parameter in model.parameters())]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--order", "2"],
        ["--relaxation", "sigmoid", "--grad-accum", "2"],
        ["--relaxation", "partial", "--on-nonfinite", "skip"],
    ],
)
def test_replayed_steps_have_the_bits_of_steps_without_graphs(monkeypatch, flags):
    expected = search(flags, Machine("cpu"))
    machine = Machine("cpu")
    monkeypatch.setattr(Simulated, "made", [])
    monkeypatch.setattr(
        machine, "recorded", lambda *functions: [Simulated(f, None) for f in functions]
    )
    actual = search(flags, machine)
    assert [(graph.calls, graph.replays) for graph in Simulated.made] == [(4, 3)] * 2
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_functions_stay_as_they_are_without_a_gpu_or_the_flag():
    assert Machine("cpu").recorded(abs, max) == (abs, max)
    assert Machine("cpu", cuda_graphs=True).recorded(abs, max) == (abs, max)


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "random"],
        ["--relaxation", "gumbel"],
        ["--relaxation", "dirichlet"],
        ["--space", "S4"],
        ["--search-drop-path", "0.2"],
        ["--checkpoint-cells"],
        ["--compile"],
    ],
)
def test_what_no_graph_holds_is_refused(flags):
    with pytest.raises(ValueError, match=f"^--cuda-graphs: not with {' '.join(flags)}$"):
        train_search.parse_args(["--cuda-graphs", *flags])


@pytest.mark.parametrize("script", [train_search, train_final, eval_pretrained])
def test_every_flag_of_the_machine_reaches_it(script, monkeypatch):
    signature = inspect.signature(Machine)
    genotype = ["--genotype", "DARTS_V2"] if script is train_final else []
    values = {"device": "cpu", "amp": "bf16", "channels_last": "off", "deterministic": True}
    values |= {"compile": True, "cuda_graphs": True}
    defaults = vars(script.parse_args(["--out-dir", "none"] + genotype))
    values = {name: value for name, value in values.items() if name in defaults}
    seen = {}

    def spy(*args, **kwargs):
        seen.update(signature.bind(*args, **kwargs).arguments)
        raise KeyboardInterrupt

    args = argparse.Namespace(**defaults | values)
    monkeypatch.setattr(script, "Machine", spy)
    monkeypatch.setattr(script, "parse_args", lambda *_: args)
    with pytest.raises(KeyboardInterrupt):
        script.main([])
    assert seen == values


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="^--cuda-graphs: not with several processes"):
        Machine("cpu", cuda_graphs=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("flags", [[], ["--order", "2"], ["--relaxation", "partial"]])
def test_graphs_on_a_gpu_compute_what_it_computes_without_them(monkeypatch, flags, amp):
    machines = [Machine("cuda", amp, cuda_graphs=graphs) for graphs in (True, False)]
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # the same kernels for both
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    tolerance = {"off": 1e-4, "bf16": 3e-2}[amp]
    for one, other in zip(*(search(flags, machine) for machine in machines), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
