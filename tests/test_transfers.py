"""Transfers between the host and a GPU, counted on the device "meta" in a GPU's place."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import train_final
import train_search
from benchmarks.measure import transfers
from darts_min.data import Images, Loader
from darts_min.genotypes import PUBLISHED
from darts_min.network import Network
from darts_min.run.evaluation import evaluate
from darts_min.run.machine import Machine
from darts_min.run.progress import Progress
from darts_min.run.step import make_w_step

META = torch.device("meta")
SMALL = ["--dataset", "synthetic", "--device", "cpu", "--init-channels", "4", "--num-cells", "3"]
SEARCH = [*SMALL, "--batch-size", "8", "--num-nodes", "1"]


def loader(**how):
    images = torch.zeros(24, 8, 8, 3, dtype=torch.uint8, device=META)
    labels = torch.zeros(24, dtype=torch.long, device=META)
    return Loader(Images(images, labels), 8, (torch.zeros(3), torch.ones(3)), **how)


def train(train_epoch, model, batches, *more):
    """Train as the scripts do: the sums of the epoch are part of a step."""
    totals = SimpleNamespace(totals=torch.zeros(3, dtype=torch.float64, device=META))
    Progress.add(totals, train_epoch(model, batches, *more))


def of_the_second_step(run):
    """Return the transfers of the second step: in the first one, optimizers make their state."""
    with transfers() as counts:

        def two(batches):
            yield next(batches)
            counts.clear()
            yield next(batches)

        run(two)
    return dict(+counts)


@pytest.fixture
def machine(monkeypatch):
    machine = Machine("cpu")
    machine.device = META
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # not on meta
    return machine


@pytest.mark.parametrize(
    "flags, copies",
    [
        ([], 0),
        (["--order", "2"], 0),
        (["--search-cutout", "4", "--search-drop-path", "0.2", "--grad-accum", "2"], 0),
        (["--relaxation", "partial", "--checkpoint-cells"], 0),
        (["--relaxation", "gumbel"], 2),  # which operations were drawn, for alpha and for w
    ],
)
def test_a_search_step_waits_for_two_losses_only(machine, flags, copies):
    args = train_search.parse_args([*SEARCH, *flags])

    def run(two):
        model = train_search.make_supernet(args, 10, 3, machine)
        both = train_search.make_steps(args, model, machine, 10)
        loaders = [loader(augment=True, cutout=args.search_cutout) for _ in range(2)]
        train_search.schedule(0.5, model, loaders, args.search_drop_path)
        batches = two(zip(*(one.epoch(0) for one in loaders), strict=True))
        xi = 0.1 if args.order == 2 else 0.0
        train(train_search.train_epoch, model, batches, *both, machine, xi, args.grad_accum)

    expected = {"pinned copy": 2, "read": 2} | ({"copy": copies} if copies else {})
    assert of_the_second_step(run) == expected


def test_a_final_step_waits_for_its_loss_only(machine):
    args = train_final.parse_args([*SMALL, "--genotype", "DARTS_V2"])

    def run(two):
        network = Network(PUBLISHED["DARTS_V2"], 10, 4, 3, drop_path_prob=0.1).to(META)
        weights = list(network.parameters())
        step = make_w_step(args, network, weights, machine, 10, averages=False)
        batches = two(loader(augment=True, cutout=4).epoch(0))
        train(train_final.train_epoch, network, batches, step, machine, 1, 0.4)

    assert of_the_second_step(run) == {"pinned copy": 1, "read": 1}


def test_an_evaluation_waits_for_its_end_only(machine):
    network = Network(PUBLISHED["DARTS_V2"], 10, 4, 3).to(META)

    def run(two):
        evaluate(network, two(iter(loader())), 10)

    assert of_the_second_step(run) == {"pinned copy": 1, "copy": 1}  # the sums, at the end


@pytest.mark.parametrize(
    "kind, call",
    [
        ("pinned copy", lambda x: torch.arange(3).pin_memory().to(META, non_blocking=True)),
        ("copy", lambda x: torch.arange(3).to(META, non_blocking=True)),  # not pinned
        ("copy", lambda x: torch.arange(3).pin_memory().to(META)),
        ("copy", lambda x: x.cpu()),
        ("copy", lambda x: x.tolist()),
        ("copy", lambda x: x.copy_(torch.zeros(3))),
        ("copy", lambda x: torch.tensor([1.0], device=META)),
        ("copy", lambda x: x.new_tensor(1)),
        ("copy", lambda x: x[torch.arange(2)]),
        ("read", lambda x: x.sum().item()),
        ("read", lambda x: bool(x.isfinite().all())),
        ("read", lambda x: float(x.sum())),
        ("size", lambda x: x[x > 0]),
        ("size", lambda x: torch.bincount(x.long())),
        ("size", lambda x: x.nonzero()),
    ],
)
def test_each_kind_of_transfer_is_seen(kind, call):
    x = torch.zeros(3, device=META)
    with transfers() as counts:
        try:
            call(x)
        except NotImplementedError:  # "meta" does not know the size
            assert kind == "size"
    assert +counts == {kind: 1}


def test_what_stays_on_its_device_is_no_transfer():
    x = torch.zeros(3, device=META)
    with transfers() as counts:
        torch.full((3,), 1.5, device=META).add_(2).to(torch.float64)[1:2] += x[
            torch.ones_like(x).long()
        ][0]
        torch.tensor([1.0, 2.0]).to(torch.float64).tolist()
    assert not +counts


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_are_those_of_the_cpu():
    images = torch.randint(256, (24, 8, 8, 3), dtype=torch.uint8)
    data, statistics = Images(images, torch.arange(24)), (torch.zeros(3), torch.ones(3))
    how = {"augment": True, "cutout": 4}
    loaders = [Loader(data.to(device), 8, statistics, **how) for device in ("cpu", "cuda")]
    for one in loaders:
        one.cutout_prob = 0.5
    for (x, target), (x_gpu, target_gpu) in zip(*loaders, strict=True):
        torch.testing.assert_close(x_gpu.cpu(), x)
        assert torch.equal(target_gpu.cpu(), target)
