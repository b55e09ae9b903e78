"""The scripts from end to end on `synthetic`; oracles: an uninterrupted run, the other form.

A user's mistake must give one line on stderr, exit code 2, and leave existing files alone.
"""

import argparse
import itertools
import json
import math
import os
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import eval_pretrained
import train_final
import train_search
from darts_min import load_network
from darts_min.architect import architecture_gradient
from darts_min.convert.genotype_texts import format_genotype, parse_genotype
from darts_min.convert.state_dicts import network_to_nni, network_to_quark0
from darts_min.data import synthetic_dataset
from darts_min.draw import draw_cell
from darts_min.genotypes import PRIMITIVES, PUBLISHED
from darts_min.judge import report, signs
from darts_min.network import Network
from darts_min.relaxations import Softmax
from darts_min.run.machine import Machine
from darts_min.run.progress import Progress
from darts_min.run.run_folder import RunFolder
from darts_min.run.schedules import learning_rate_factor, make_scheduler
from darts_min.run.step import FiniteGuard, Step
from darts_min.spaces import parse_space

ROOT = Path(train_search.__file__).parent
DATA = ["--dataset", "synthetic", "--image-size", "8", "--subset", "120", "--batch-size", "20"]
SEARCH = [*DATA, "--init-channels", "2", "--num-cells", "3", "--num-nodes", "2"]
NOISY = "noise,max_pool_3x3,avg_pool_3x3,skip_connect,sep_conv_3x3,sep_conv_5x5,dil_conv_3x3,"
NOISY += "dil_conv_5x5"
SEARCH += ["--hessian-every", "0"]  # it takes longer than the rest
FINAL = [*DATA, "--init-channels", "2", "--num-cells", "3", "--cutout", "2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One short run of each script, each on the last one's output."""
    folder = tmp_path_factory.mktemp("all runs")
    search = train_search.main([*SEARCH, "--epochs", "2", "--out-dir", str(folder / "search")])
    final = train_final.main(
        [*FINAL, "--epochs", "2", "--genotype", search["out_dir"], "--out-dir", f"{folder}/final"]
    )
    evaluation = eval_pretrained.main(
        ["--dataset", "synthetic", "--weights", f"{folder}/final/network.pt"]
        + ["--out-dir", f"{folder}/eval"]
    )
    return folder, search, final, evaluation


def test_each_run_folder_holds_what_the_readme_promises(runs):
    folder, search, final, evaluation = runs
    for name, more in (
        ("search", ["last.pt", "cell_normal.png", "alphas_reduce.png"]),
        ("final", ["last.pt", "network.pt", "cell_normal.png"]),
        ("eval", []),
    ):
        for file in ["log.txt", "genotype.json", "result.json", *more]:
            assert (folder / name / file).stat().st_size > 0
        result = json.loads((folder / name / "result.json").read_text())
        assert result["args"]["seed"] == 0
        assert result["versions"]["torch"] == torch.__version__
    assert parse_genotype(folder / "search") == parse_genotype(search["genotype"])
    assert len(search["history"]) == 2
    assert evaluation["accuracy"] == pytest.approx(final["test_accuracy"])
    assert evaluation["images"] == 1000
    errors = evaluation["class_errors"].values()
    assert 1 - sum(errors) / 10 == pytest.approx(evaluation["accuracy"])


def test_cosine_schedules_step_at_the_end_of_an_epoch(runs):
    _, search, final, _ = runs
    assert [record["lr"] for record in search["history"]] == [0.025, pytest.approx(0.013)]
    assert [record["lr"] for record in final["history"]] == [0.025, pytest.approx(0.0125)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.025)
    scheduler = schedule(optimizer, 50, eta_min=1e-3)
    for _ in range(49):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(1.023679e-3, rel=1e-6)


def test_the_next_command_goes_on_with_the_same_data(runs):
    data = ["--dataset", "synthetic", "--data-dir", "data"]
    for name, command in (
        ("search", ["train_final.py", *data, "--image-size", "8", "--seed", "0", "--genotype"]),
        ("final", ["eval_pretrained.py", *data, "--seed", "0", "--weights"]),
    ):
        last = (runs[0] / name / "log.txt").read_text().splitlines()[-1]
        file = runs[0] / name / ("network.pt" if name == "final" else "")
        assert shlex.split(last) == ["next:", "python", *command, str(file)]


def test_drop_path_grows_linearly(runs):
    assert [record["drop_path_prob"] for record in runs[2]["history"]] == [0.0, 0.1]


def tensorboard(folder):
    """Return what TensorBoard shows: all tags, and the epochs of the training loss."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events.Tags(), [event.step for event in events.Scalars("progress/train_loss")]


def test_tensorboard_has_every_curve_and_picture(runs):
    tags = {}
    for name in ("search", "final"):
        tags[name], epochs = tensorboard(runs[0] / name)
        assert epochs == [1, 2]
    groups = {tag.split("/")[0] for tag in tags["search"]["scalars"]}
    assert groups == {"progress", "signs"}  # cells of two nodes have no expected accuracy
    for tag in ("entropy of kept edges (nats), normal", "skips in the cell, reduce"):
        assert f"signs/{tag}" in tags["search"]["scalars"]
    pictures = {"cell/normal", "cell/reduce"}
    assert set(tags["final"]["images"]) == pictures
    pictures |= {"alphas/normal", "alphas/reduce", "mixtures/normal", "mixtures/reduce"}
    assert set(tags["search"]["images"]) == pictures
    for record in runs[1]["history"]:  # the figures behind the pictures
        assert [len(mix) for mix in record["mixtures"]] == [5, 5]
        assert [sum(row) for mix in record["mixtures"] for row in mix] == pytest.approx(
            [1] * 10, abs=1e-4
        )


@pytest.mark.parametrize("form", ["quark0", "nni"])
def test_a_network_of_another_code_scores_the_same(runs, tmp_path, form):
    network = load_network(runs[0] / "final" / "network.pt")
    convert = network_to_quark0 if form == "quark0" else network_to_nni
    torch.save(convert(network), tmp_path / "other.pt")
    arguments = ["--dataset", "synthetic", "--image-size", "8", "--out-dir", f"{tmp_path}/eval"]
    arguments += ["--weights", f"{tmp_path}/other.pt"]
    arguments += ["--genotype", format_genotype(network.genotype, form)]
    result = eval_pretrained.main(arguments)
    # Its file does not say how the training images were normalised; here the subset's statistics
    # and those of all training images differ a little.
    assert result["accuracy"] == pytest.approx(runs[3]["accuracy"], abs=0.03)
    assert result["parameters_M"] == runs[3]["parameters_M"]


def test_nodes_that_reach_no_output_are_named_and_trained_anyway(tmp_path, capsys):
    cell = [["sep_conv_3x3", 0], ["skip_connect", 1]]
    genotype = {"normal": 3 * cell, "normal_concat": [2], "reduce": cell, "reduce_concat": [2]}
    arguments = ["--genotype", json.dumps(genotype), "--out-dir", f"{tmp_path}/run"]
    result = train_final.main([*FINAL, *arguments, "--fast-dev-run"])
    line = "normal cell: the output does not depend on nodes 3, 4:"
    assert (tmp_path / "run" / "log.txt").read_text().count(line) == 1
    assert 0 <= result["test_accuracy"] <= 1
    capsys.readouterr()
    eval_pretrained.main(["--demo", "--weights", f"{tmp_path}/run"])
    assert capsys.readouterr().out.count(line) == 1


class Killed(BaseException):
    pass


REGULARISED = ["--search-drop-path", "0.5", "--search-cutout", "4"]
SCRIPTS = {
    "search gumbel": (
        train_search.main,
        [*SEARCH, "--epochs", "2", "--relaxation", "gumbel", *REGULARISED],
    ),
    "search random": (
        train_search.main,
        [*SEARCH, "--epochs", "2", "--method", "random", "--candidates", "3", "--space", "S4"],
    ),
    "search": (train_search.main, [*SEARCH, "--epochs", "2"]),
    "search order 2": (train_search.main, [*SEARCH, "--epochs", "2", "--order", "2"]),
    "final": (train_final.main, [*FINAL, "--epochs", "2", "--genotype", "DARTS_V1"]),
    "final one-cycle": (
        train_final.main,
        [*FINAL, "--epochs", "2", "--genotype", "DARTS_V1", "--w-schedule", "one-cycle"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", ["search order 2", "search gumbel", "search random", "final one-cycle"]
)
def test_a_run_that_is_killed_at_any_step_ends_as_an_uninterrupted_one(
    tmp_path, monkeypatch, script
):
    main, arguments = SCRIPTS[script]
    whole = main([*arguments, "--out-dir", f"{tmp_path}/whole"])
    arguments = [*arguments, "--out-dir", f"{tmp_path}/parts", "--checkpoint-minutes", "0"]
    save, left = RunFolder.save_checkpoint, 0

    def save_and_die(run, *state):
        nonlocal left
        save(run, *state)
        left -= 1
        if left == 0:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_checkpoint", save_and_die)
        for left in (2, 3, 1, 5):  # training, the end of it, evaluation
            with pytest.raises(Killed):
                main([*arguments, *(["--resume"] if left != 2 else [])])
    parts = main([*arguments, "--resume"])
    for a, b in zip(whole["history"], parts["history"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    states = [
        torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts")
    ]
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name])
    genotypes = [(tmp_path / name / "genotype.json").read_bytes() for name in ("whole", "parts")]
    assert genotypes[0] == genotypes[1]


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path, capsys):
    main, arguments = SCRIPTS["final"]
    arguments = [*arguments, "--out-dir", f"{tmp_path}/run"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    first = main(arguments)
    for name in ("last.pt", "previous.pt", "result.json"):
        (tmp_path / "run" / name).unlink()
    again = main([*arguments, "--resume"])
    assert "nothing had been saved: from the start" in capsys.readouterr().out
    assert again["test_accuracy"] == first["test_accuracy"]


def test_a_run_goes_on_at_the_same_place_with_another_number_of_steps_an_epoch(tmp_path):
    settings = {"epochs": 4, "checkpoint_minutes": 10}

    def make(steps, resume):
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        factor = learning_rate_factor("one-cycle", settings["epochs"], steps)
        scheduler = make_scheduler(optimizer, "one-cycle", settings["epochs"], steps)
        run = RunFolder(tmp_path / "run", resume)
        step = Step(optimizer, model, run.machine, FiniteGuard(skip=False), scheduler=scheduler)
        return Progress(run, settings, model, step, steps), scheduler, factor

    progress, scheduler, _ = make(10, resume=False)
    for _ in range(25):
        progress.w_step.optimizer.step()
        scheduler.step()
    progress.epoch, progress.step = 2, 5
    progress.save()
    progress.run.lock.close()
    progress, scheduler, factor = make(4, resume=True)  # as if by 2.5 times the processes
    progress.resume()
    assert (progress.epoch, progress.step) == (2, 2)
    assert scheduler.get_last_lr() == [factor(10)]
    left = progress.training(itertools.count(), 0, lambda batches, **_: batches)
    assert len(list(left)) == 2
    progress.save()
    progress.run.lock.close()
    settings["epochs"] = 8
    progress, scheduler, _ = make(4, resume=True)
    progress.resume()
    assert [progress.lr] == scheduler.get_last_lr() != [factor(10)]


def test_other_arguments_are_refused_by_name(runs):
    arguments = [*SEARCH, "--epochs", "2", "--out-dir", f"{runs[0]}/search", "--resume"]
    with pytest.raises(ValueError, match="batch_size .was 20, now 10"):
        train_search.main([*arguments, "--batch-size", "10"])


def test_a_training_does_not_go_on_with_another_cell(tmp_path):
    file = tmp_path / "genotype.json"
    file.write_text(format_genotype(PUBLISHED["DARTS_V1"], "json"))
    arguments = [*FINAL, "--fast-dev-run", "--genotype", str(file), "--out-dir", f"{tmp_path}/run"]
    train_final.main(arguments)
    file.write_text(format_genotype(PUBLISHED["DARTS_V2"], "json"))
    before = (tmp_path / "run" / "network.pt").read_bytes()
    with pytest.raises(ValueError, match="would change the result: genotype .was Genotype"):
        train_final.main([*arguments, "--resume"])
    assert (tmp_path / "run" / "network.pt").read_bytes() == before


@pytest.mark.slow
def test_resume_alone_finds_the_newest_run_of_the_same_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main, arguments = SCRIPTS["final"]
    first = main([*arguments, "--seed", "1"])
    main([*arguments, "--seed", "2"])
    again = main([*arguments, "--seed", "1", "--resume"])
    assert again["out_dir"] == first["out_dir"] == "runs/final"
    with pytest.raises(ValueError, match="seed .was 2, now 3"):
        main([*arguments, "--seed", "3", "--resume"])


@pytest.mark.slow
def test_more_epochs_may_be_asked_for_and_the_schedule_is_that_of_all(tmp_path, capsys):
    main, arguments = SCRIPTS["final"]
    arguments = [*arguments, "--out-dir", f"{tmp_path}/run"]
    main(arguments)
    longer = main([*arguments, "--epochs", "4", "--resume"])
    assert tensorboard(longer["out_dir"])[1] == [1, 2, 3, 4]
    lrs = [record["lr"] for record in longer["history"]]
    assert lrs == pytest.approx([0.025, 0.0125, 0.0125, 0.025 * (1 - np.sqrt(0.5)) / 2])
    assert "epochs 2 -> 4: from here on" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--epochs 3: the run is in epoch 5 already"):
        main([*arguments, "--epochs", "3", "--resume"])


def test_the_signs_of_a_bad_cell_are_reported(tmp_path):
    arguments = [*SEARCH, "--epochs", "2", "--hessian-every", "2", "--max-skips", "0"]
    result = train_search.main([*arguments, "--out-dir", f"{tmp_path}/run"])
    first, second = (record["signs"] for record in result["history"])
    assert "largest eigenvalue" not in second and np.isfinite(first["largest eigenvalue"])
    assert set(second) | {"largest eigenvalue"} == set(first)
    assert second["skips in the cell/normal"] == 0
    assert "'skip_connect'" not in result["genotype"].split("reduce=")[0]
    lines = (tmp_path / "run" / "log.txt").read_text().split("epoch   1/2")[1].splitlines()[:2]
    accuracy = result["history"][0]["arch_accuracy"] - first["accuracy lost in discretisation"]
    assert f"discretised {100 * accuracy:.2f} %  " in lines[0]
    assert f", eigenvalue {first['largest eigenvalue']:.3g}, " in lines[1]
    arguments += ["--epochs", "3", "--hessian-every", "0"]  # its memory may be lacking
    again = train_search.main([*arguments, "--out-dir", f"{tmp_path}/run", "--resume"])
    assert len(again["history"]) == 3 and "largest eigenvalue" not in again["history"][2]["signs"]


def test_a_fast_dev_run_takes_every_kind_of_step(tmp_path, monkeypatch):
    steps = []

    def spy(*arguments, **options):
        steps.append(1)
        return architecture_gradient(*arguments, **options)

    monkeypatch.setattr(train_search, "architecture_gradient", spy)
    arguments = [*SEARCH, "--alpha-warmup-epochs", "15", "--hessian-every", "5"]
    result = train_search.main([*arguments, "--fast-dev-run", "--out-dir", f"{tmp_path}/run"])
    assert len(steps) == 2 and "largest eigenvalue" in result["history"][0]["signs"]


def test_the_eigenvalue_sees_as_many_images_as_a_step_at_once(tmp_path, monkeypatch):
    sizes = []

    def spy(model, loss_fn, batch, *_):
        sizes.append([len(t) for t in batch])
        return 1.0

    monkeypatch.setattr(signs, "largest_eigenvalue", spy)
    arguments = [*SEARCH, "--fast-dev-run", "--hessian-every", "1", "--batch-size", "12"]
    train_search.main([*arguments, "--grad-accum", "3", "--out-dir", f"{tmp_path}/run"])
    assert sizes == [[4, 4]]


@pytest.mark.parametrize("flags", [[], ["--early-stop"], ["--adapt-weight-decay"]])
def test_a_search_outlives_an_eigenvalue_that_memory_does_not_hold(tmp_path, monkeypatch, flags):
    def full(*_):
        assert RunFolder(tmp_path / "run", resume=True).has_checkpoint()  # saved before
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(signs, "largest_eigenvalue", full)
    arguments = [*SEARCH, "--fast-dev-run", "--hessian-every", "1", *flags]
    arguments += ["--out-dir", f"{tmp_path}/run"]
    if flags:
        with pytest.raises(ValueError, match=f"{flags[0]} needs the largest eigenvalue"):
            train_search.main(arguments)
    else:
        (record,) = train_search.main(arguments)["history"]
        assert "largest eigenvalue" not in record["signs"]
        assert (tmp_path / "run" / "log.txt").read_text().count("out of memory: the largest") == 1


def test_fewer_images_are_taken_for_the_eigenvalue_from_then_on(tmp_path, monkeypatch):
    sizes = []

    def compute(model, loss_fn, batch, *_):
        sizes.append(len(batch[0]))
        if len(batch[0]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 1.0

    monkeypatch.setattr(signs, "largest_eigenvalue", compute)
    arguments = [*SEARCH, "--hessian-every", "1", "--batch-size", "20", "--out-dir"]
    arguments += [f"{tmp_path}/run", "--epochs"]
    history = train_search.main([*arguments, "2"])["history"]
    assert sizes == [20, 10, 5, 5]
    assert [record["eigenvalue_images"] for record in history] == [5, 5]
    assert "of 20 images does not fit; from here" in (tmp_path / "run" / "log.txt").read_text()
    train_search.main([*arguments, "3", "--resume"])
    assert sizes[4:] == [5]
    cells = [*SEARCH, "--fast-dev-run", "--hessian-every", "1", "--batch-size", "20"]
    train_search.main([*cells, "--checkpoint-cells", "--out-dir", f"{tmp_path}/cells"])
    assert sizes[5:] == [2]


@pytest.mark.slow
def test_early_stopping_takes_the_genotype_from_before(tmp_path, monkeypatch):
    # Two epochs of warm-up without a value; then means of 1 and, in epoch 16 (from 0), 1.32.
    values = iter([1.0] * 13 + [1.4] * 4)

    def parse(*arguments):
        args = parse_args(*arguments)
        args.epochs, args.alpha_warmup_epochs = 20, 2
        return args

    parse_args = train_search.parse_args
    monkeypatch.setattr(train_search, "parse_args", parse)
    monkeypatch.setattr(signs, "largest_eigenvalue", lambda *_: next(values))
    monkeypatch.setattr(report, "draw_epoch", lambda *_: {})
    arguments = [*SEARCH, "--early-stop", "--hessian-every", "1"]
    arguments += ["--alpha-lr", "1", "--fast-dev-run", "--out-dir", f"{tmp_path}/run"]
    result = train_search.main(arguments)
    assert len(result["history"]) == 19
    has_value = ["largest eigenvalue" in record["signs"] for record in result["history"]]
    assert has_value == [False] * 2 + [True] * 17
    genotypes = [record["genotype"] for record in result["history"]]
    assert len(set(genotypes[-7:])) > 1
    assert result["genotype"] == genotypes[12] != genotypes[18]
    assert result["arch_accuracy"] == result["history"][12]["arch_accuracy"]
    assert parse_genotype(tmp_path / "run") == parse_genotype(genotypes[12])
    for kind in ("normal", "reduce"):
        drawn = Image.open(tmp_path / "run" / f"cell_{kind}.png")
        wanted = draw_cell(parse_genotype(genotypes[12]), kind)
        assert np.array_equal(np.asarray(drawn), np.asarray(wanted))
    assert "stopped early" in (tmp_path / "run" / "log.txt").read_text()
    again = train_search.main([*arguments, "--resume"])
    assert again["genotype"] == result["genotype"] and len(again["history"]) == 19


def test_an_alpha_step_gets_what_the_arguments_say(tmp_path, monkeypatch):
    """xi is the rate of w in the second order; FairDARTS has a penalty, and its alphas are 0."""
    steps, largest = [], []

    def spy(model, loss_fn, train_batch, val_batch, xi, w_optimizer, grad_accum, penalty):
        steps.append((xi, float(penalty([torch.full((5, 2), 2.0)] * 2))))
        largest.append(float(model.alphas_normal.abs().max()))
        return [torch.zeros_like(alpha) for alpha in model.alphas()]

    monkeypatch.setattr(train_search, "architecture_gradient", spy)
    arguments = [*SEARCH, "--w-lr", "0.5", "--fast-dev-run", "--out-dir"]
    train_search.main([*arguments, f"{tmp_path}/1"])
    train_search.main([*arguments, f"{tmp_path}/2", "--order", "2"])
    fair = ["--relaxation", "sigmoid", "--zero-one-weight", "7"]
    train_search.main([*arguments, f"{tmp_path}/fair", *fair])
    penalty = pytest.approx(-7 * (1 / (1 + math.exp(-2)) - 0.5) ** 2)
    assert steps[::2] == [(0.0, 0.0), (0.5, 0.0), (0.0, penalty)]
    assert largest[0] > 0 and largest[4] == 0


def test_what_is_scheduled_grows_linearly():
    arguments = ["--relaxation", "gumbel", "--tau", "8", "2", "--search-drop-path", "0.4"]
    args = train_search.parse_args(arguments)
    make_relaxation, _ = train_search.RELAXATIONS["gumbel"]
    for done, tau, drop_path in ((0, 8, 0), (0.5, 5, 0.2), (1, 2, 0.4)):
        model, loader = SimpleNamespace(relaxation=make_relaxation(args)), SimpleNamespace()
        train_search.schedule(done, model, [loader], args.search_drop_path)
        assert (model.relaxation.tau, model.drop_path_prob) == pytest.approx((tau, drop_path))
        assert loader.cutout_prob == done


def test_alpha_warmup_leaves_the_alphas_alone(tmp_path, monkeypatch):
    alphas = []

    def spy(model, *more, **options):
        alphas.append(model.alphas_normal.detach().clone())
        return architecture_gradient(model, *more, **options)

    monkeypatch.setattr(train_search, "architecture_gradient", spy)
    arguments = [*SEARCH, "--epochs", "2", "--alpha-warmup-epochs", "1", "--out-dir"]
    train_search.main([*arguments, f"{tmp_path}/run"])
    assert len(alphas) == 3  # the steps of the second epoch
    assert 0 < alphas[0].abs().max() < 5e-3  # the initial noise, 1e-3 * N(0, 1)
    assert (tmp_path / "run" / "log.txt").read_text().count(" to go\n") == 2  # again in the second


@pytest.mark.parametrize(
    "arguments",
    [
        ["--relaxation", "gumbel", "--tau", "2", "1"],
        pytest.param(
            ["--relaxation", "dirichlet", "--alpha-warmup-epochs", "0"], marks=pytest.mark.slow
        ),
        pytest.param(["--relaxation", "sigmoid", "--batch-size", "20"], marks=pytest.mark.slow),
        pytest.param(
            ["--relaxation", "partial", "--partial", "2", "--batch-size", "20"],
            marks=pytest.mark.slow,
        ),
        ["--space", "S3", "--order", "2", "--relaxation", "gumbel"],
        pytest.param(
            ["--space", "S1", "--num-nodes", "4", "--hessian-every", "1"], marks=pytest.mark.slow
        ),
        ["--space", "skip_connect,noise", "--method", "random", "--candidates", "2"],
    ],
)
def test_every_method_and_space_searches(tmp_path, arguments):
    result = train_search.main(
        [*SEARCH, *arguments, "--fast-dev-run", "--out-dir", f"{tmp_path}/run"]
    )
    space = parse_space(result["args"]["space"])
    used = {op for op, _ in parse_genotype(result["genotype"]).normal}
    assert used <= set(space.primitives)
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    model, alpha_state = state["model"], state["alpha_step"]["optimizer"]["state"]
    for i, name in enumerate(("alphas_normal", "alphas_reduce")):
        assert model[name].isfinite().all()
        assert result["args"]["method"] == "random" or alpha_state[i]["exp_avg"].abs().max() > 0
        if result["args"]["method"] == "random":
            assert set(model[name].flatten().tolist()) == {0.0, 1.0}
    signs = result["history"][0]["signs"]
    assert ("largest eigenvalue" in signs) == (result["args"]["hessian_every"] > 0)


def test_a_dataset_of_ones_own_gives_what_its_name_gives(runs, tmp_path):
    folder, search, final, evaluation = runs
    dataset = synthetic_dataset(0, 8)
    # Without the flags --dataset and --image-size, which come first.
    found = train_search.main(
        [*SEARCH[4:], "--epochs", "2", "--out-dir", f"{tmp_path}/search"], dataset
    )
    trained = train_final.main(
        [*FINAL[4:], "--epochs", "2", "--genotype", found["out_dir"]]
        + ["--out-dir", f"{tmp_path}/final"],
        dataset,
    )
    for one, other in ((found, search), (trained, final)):
        for a, b in zip(one["history"], other["history"], strict=True):
            assert {**a, "seconds": 0} == {**b, "seconds": 0}
    weights = ["--weights", f"{tmp_path}/final/network.pt"]
    evaluated = eval_pretrained.main([*weights, "--out-dir", f"{tmp_path}/eval"], dataset)
    assert evaluated["accuracy"] == evaluation["accuracy"]
    # The next command must not name a dataset in place of the caller's.
    for name, command in (
        ("search", f"train_final.main({['--genotype', found['out_dir']]}, dataset=...)"),
        ("final", f"eval_pretrained.main({weights}, dataset=...)"),
    ):
        last = (tmp_path / name / "log.txt").read_text().splitlines()[-1]
        assert last == f"next: {command}"
    with pytest.raises(ValueError, match="--dataset: leave it out, the dataset is the caller's"):
        train_search.main(SEARCH, dataset)


def test_an_interrupted_search_on_a_dataset_of_ones_own_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "signal", 15)
    with pytest.raises(SystemExit):
        train_search.main([*SEARCH[4:], "--out-dir", f"{tmp_path}/run"], synthetic_dataset(0, 8))
    arguments = [*SEARCH[4:], "--out-dir", f"{tmp_path}/run", "--resume"]
    last = (tmp_path / "run" / "log.txt").read_text().splitlines()[-1]
    assert last.endswith(f"continue with: train_search.main({arguments}, dataset=...)")


@pytest.mark.parametrize("script", [train_search, train_final, eval_pretrained])
def test_channels_reach_the_dataset_and_the_next_command(tmp_path, monkeypatch, script):
    def spy(*arguments, channels):
        raise Killed(channels)

    monkeypatch.setattr(script, "load_dataset", spy)
    arguments = ["--dataset", "folder", "--data-dir", "D", "--channels", "1", "--image-size", "32"]
    more = ["--genotype", "DARTS_V1"] if script is train_final else []
    with pytest.raises(Killed, match="1"):
        script.main([*arguments, *more])
    if script is train_search:
        command = train_search.next_command(train_search.parse_args(arguments), Path("R"))
        flags = "--dataset folder --data-dir D --image-size 32 --channels 1 --genotype R"
        assert command == f"python train_final.py {flags}"


def test_a_search_with_the_stem_for_large_images_is_trained_with_it(tmp_path):
    arguments = [*SEARCH[4:], "--dataset", "synthetic", "--image-size", "33", "--stem", "imagenet"]
    train_search.main([*arguments, "--fast-dev-run", "--out-dir", f"{tmp_path}/run"])
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    strides = sum(name.startswith("stem") and tensor.dim() == 4 for name, tensor in state.items())
    assert strides == 3  # convolutions; the stem for CIFAR has one
    last = (tmp_path / "run" / "log.txt").read_text().splitlines()[-1]
    assert "train_final.py --dataset synthetic" in last and " --stem imagenet " in last


def test_a_picture_that_cannot_be_drawn_costs_no_epoch(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyError("conv_9x9")

    monkeypatch.setattr(report, "draw_cell", fail)
    arguments = [*SEARCH, "--epochs", "2", "--out-dir", f"{tmp_path}/run"]
    assert len(train_search.main(arguments)["history"]) == 2
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("warning: drawing failed: KeyError: 'conv_9x9'; going on\n") == 2


@pytest.mark.slow
def test_the_selection_keeps_the_best_cell_and_resumes(tmp_path, monkeypatch):
    arguments = [*SEARCH, "--epochs", "1", "--seeds", "3", "1", "2", "--select-epochs", "1"]
    arguments += ["--select-channels", "2", "--select-cells", "3", "--out-dir"]
    whole = train_search.main([*arguments, f"{tmp_path}/whole"])
    trained = []

    def until_the_second(*arguments):
        trained.append(arguments)
        if len(trained) == 2:
            raise Killed
        return train_final.main(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_search.train_final, "main", until_the_second)
        with pytest.raises(Killed):
            train_search.main([*arguments, f"{tmp_path}/parts"])
    parts = train_search.main([*arguments, f"{tmp_path}/parts", "--resume"])
    assert parts["ranking"] == whole["ranking"]
    ranking = whole["ranking"]
    assert sorted(row["seed"] for row in ranking) == [1, 2, 3]
    accuracies = [row["accuracy"] for row in ranking]
    assert accuracies == sorted(accuracies, reverse=True)
    assert parse_genotype(tmp_path / "whole") == parse_genotype(ranking[0]["genotype"])
    for row in ranking:
        folder = tmp_path / "whole" / f"search-{row['seed']}"
        assert parse_genotype(folder) == parse_genotype(row["genotype"])
        final = json.loads((folder.with_name(f"final-{row['seed']}") / "result.json").read_text())
        assert final["args"]["holdout"] and final["args"]["seed"] == 0
        assert final["test_accuracy"] == row["accuracy"]
        assert round(60 * row["accuracy"], 6) % 1 == 0  # of half of the 120 images
    assert Image.open(tmp_path / "whole" / "cells.png").size[0] > 1000
    with pytest.raises(ValueError, match="select_epochs .was 1, now 2."):
        again = [*arguments, f"{tmp_path}/whole", "--resume", "--select-epochs", "2"]
        train_search.main(again)
    with pytest.raises(ValueError, match="--epochs 2: the cells of this selection are of searches"):
        train_search.main([*arguments, f"{tmp_path}/whole", "--resume", "--epochs", "2"])


def test_help_shows_the_defaults_of_the_chosen_recipe(capsys):
    with pytest.raises(SystemExit):
        train_search.main(["--relaxation", "partial", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "epochs that train w alone (default: 15)" in text


def test_a_relaxation_s_defaults_are_those_of_its_paper():
    def of(*arguments):
        return vars(train_search.parse_args(["--relaxation", *arguments]))

    assert of("gumbel")["tau"] == [10, 0.1]
    partial = of("partial")
    names = ("partial", "alpha_warmup_epochs", "w_lr", "alpha_lr", "batch_size", "epochs")
    assert [partial[name] for name in names] == [4, 15, 0.1, 6e-4, 256, 50]
    assert partial["w_lr_min"] == 0
    assert of("partial", "--w-lr", "0.2")["w_lr"] == 0.2
    names = ("batch_size", "w_weight_decay", "w_nesterov", "epochs", "w_lr", "w_lr_min")
    gumbel = of("gumbel")
    assert [gumbel[name] for name in names] == [256, 5e-4, True, 250, 0.025, 1e-3]
    for others in (["--w-optimizer", "adam"], ["--order", "2"], ["--recipe", "plain"]):
        assert not of("gumbel", *others)["w_nesterov"]
    assert of("sigmoid")["zero_one_weight"] == 10
    for without_none in ("sigmoid", "dirichlet"):
        assert parse_space(of(without_none)["space"]).primitives == PRIMITIVES[1:]
    assert of("dirichlet")["alpha_lr"] == 6e-4
    assert of("softmax") == vars(train_search.parse_args([]))


class Tiny(torch.nn.Module):
    """A model without BN, for which the parts of a batch make no difference."""

    def __init__(self, auxiliary):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(12, 3) for _ in range(2 + auxiliary))
        self.alpha = torch.nn.Parameter(torch.zeros(2))
        self.auxiliary, self.sizes, self.relaxation = auxiliary, set(), Softmax()

    def alphas(self):
        return [self.alpha]

    def weights(self):
        return list(self.layers.parameters())

    def forward(self, x):
        self.sizes.add(len(x))
        a, b, *c = (layer(x) for layer in self.layers)
        mix = self.alpha.softmax(0)
        logits = mix[0] * a + mix[1] * b.tanh()
        return (logits, *c) if self.auxiliary else logits


@pytest.mark.parametrize("order", ["final", 1, 2])
def test_a_batch_in_parts_trains_like_the_whole(order):
    models, sums = [], []
    for grad_accum in (1, 4):
        model = Tiny(auxiliary=order == "final")
        batches = [(torch.randn(8, 12), torch.randint(3, (8,))) for _ in range(6)]
        machine, guard = Machine("cpu"), FiniteGuard(skip=False)
        optimizer = torch.optim.SGD(model.weights(), 0.1, 0.9)
        w_step = Step(optimizer, model, machine, guard, grad_clip=0.5, averages=order != "final")
        if order == "final":
            more = grad_accum, 0.4, 0.1
            results = train_final.train_epoch(model, batches, w_step, machine, *more)
        else:
            alpha_step = Step(torch.optim.Adam(model.alphas(), 0.1), model, machine, guard)
            halves = zip(batches[:3], batches[3:], strict=True)
            steps, xi = (w_step, alpha_step), 0.1 * (order - 1)
            results = train_search.train_epoch(model, halves, *steps, machine, xi, grad_accum)
        results = list(results)
        assert model.sizes == {8 // grad_accum}
        models.append(model)
        sums.append(sum(loss * len(target) for loss, _, target in results))
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert sums[0] == pytest.approx(sums[1].item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("script", ["search", "search order 2", "final"])
def test_compiled_cells_train_like_uncompiled_ones(tmp_path, script):
    main, arguments = SCRIPTS[script]
    if main is train_search.main:  # the whole space takes minutes to compile
        arguments = [*arguments, "--space", "none,max_pool_3x3,skip_connect,dil_conv_3x3"]
    losses = []
    for i, more in enumerate(([], ["--compile"])):
        result = main([*arguments, *more, "--fast-dev-run", "--out-dir", f"{tmp_path}/run{i}"])
        losses.append([v for key, v in result["history"][0].items() if key.endswith("loss")])
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_amp_trains_in_both_halves_of_the_step(tmp_path, monkeypatch, amp, device):
    dtypes = []  # of the logits: of w and alpha, twice
    loss_fn = F.cross_entropy

    def spy(logits, target, **more):
        dtypes.append(logits.dtype)
        return loss_fn(logits, target, **more)

    monkeypatch.setattr(F, "cross_entropy", spy)
    arguments = [*SEARCH, "--amp", amp, "--fast-dev-run", "--device", device]
    arguments += ["--out-dir", f"{tmp_path}/run"]
    result = train_search.main(arguments)
    assert np.isfinite(result["history"][0]["train_loss"])
    assert dtypes[:4] == [torch.bfloat16 if amp == "bf16" else torch.float16] * 4
    state = torch.load(tmp_path / "run" / "last.pt", map_location="cpu", weights_only=True)
    assert state["model"]["alphas_normal"].isfinite().all()


def test_plain_recipe_is_the_tutorials(tmp_path):
    search = train_search.parse_args(["--recipe", "plain"])
    final = train_final.parse_args(["--recipe", "plain", "--genotype", "NNI_PLAIN"])
    assert (search.epochs, search.w_optimizer, search.w_lr, search.w_grad_clip) == (
        10,
        "adam",
        1e-3,
        0,
    )
    assert (final.epochs, final.init_channels, final.num_cells) == (100, 16, 8)
    assert (final.cutout, final.auxiliary_weight, final.drop_path_prob) == (0, 0, 0)
    assert train_search.parse_args(["--recipe", "plain", "--epochs", "3"]).epochs == 3
    arguments = [*DATA, "--recipe", "plain", "--fast-dev-run", "--genotype", "NNI_PLAIN"]
    arguments += ["--init-channels", "2", "--num-cells", "3", "--out-dir", f"{tmp_path}/run"]
    assert 0 <= train_final.main(arguments)["test_accuracy"] <= 1


@pytest.mark.parametrize(
    "schedule, lrs",
    [
        ("cosine", [0.1, 0.075, 0.025]),
        ("exponential", [0.1, 0.097, 0.097**2 / 0.1]),
        # Before the first, seventh and thirteenth of 18 steps; up for 0.2 of the way.
        (
            "one-cycle",
            [0.1 / 25, *(0.1 * (1 + np.cos(np.pi * (k - 2.6) / 14.4)) / 2 for k in (6, 12))],
        ),
    ],
)
def test_learning_rates_follow_their_schedule(tmp_path, schedule, lrs):
    arguments = [*FINAL, "--genotype", "DARTS_V1", "--w-lr", "0.1", "--w-schedule", schedule]
    arguments += ["--auxiliary-weight", "0", "--epochs", "3", "--out-dir", f"{tmp_path}/run"]
    history = train_final.main(arguments)["history"]
    for record, lr in zip(history, lrs, strict=True):
        assert record["lr"] == pytest.approx(lr, rel=1e-3)


def test_the_imagenet_recipe_is_that_of_the_original_code():
    args = train_final.parse_args(["--recipe", "imagenet", "--genotype", "DARTS_V2"])
    assert (args.init_channels, args.num_cells, args.stem, args.image_size) == (
        48,
        14,
        "imagenet",
        224,
    )
    assert (args.epochs, args.batch_size, args.w_lr, args.w_lr_decay) == (250, 128, 0.1, 0.97)
    assert (args.w_weight_decay, args.label_smoothing, args.w_grad_clip) == (3e-5, 0.1, 5.0)
    assert (args.auxiliary_weight, args.drop_path_prob, args.cutout) == (0.4, 0.0, 0)
    assert (args.w_schedule, args.in_memory) == ("exponential", "never")


@pytest.mark.slow
def test_images_in_files_train_alike_with_any_number_of_workers(tmp_path, pictures):
    arguments = [*pictures, "--recipe", "imagenet", "--image-size", "32", *V2]
    arguments += ["--init-channels", "2", "--num-cells", "3", "--epochs", "1", "--num-workers"]
    results = [
        train_final.main([*arguments, workers, "--out-dir", f"{tmp_path}/run{workers}"])
        for workers in ("0", "2")
    ]
    losses = [[r["history"][0][key] for key in ("train_loss", "test_loss")] for r in results]
    assert losses[0] == losses[1]
    for in_memory in ("never", "always", "auto"):  # its images are cropped in any case
        evaluated = eval_pretrained.main(
            [*pictures, "--weights", f"{tmp_path}/run0", "--in-memory", in_memory]
            + ["--num-workers", "0", "--out-dir", f"{tmp_path}/eval-{in_memory}"]
        )
        assert evaluated["images"] == 12
        assert evaluated["loss"] == pytest.approx(losses[0][1], rel=1e-4)


def test_fine_tuning_makes_a_new_classifier_for_new_classes(runs, tmp_path, pictures):
    base = load_network(runs[0] / "final")
    arguments = [*pictures, "--init-from", f"{runs[0]}/final", "--epochs", "1"]
    result = train_final.main([*arguments, "--out-dir", f"{tmp_path}/run"])
    log = (tmp_path / "run" / "log.txt").read_text()
    total = len(base.state_dict())
    new = "auxiliary_head.classifier, classifier"
    assert f"loaded {total - 4} tensors; new: {new}; left out: {new}\n" in log
    assert result["args"]["w_lr"] == 0.005 and result["args"]["init_channels"] == 2
    network = load_network(tmp_path / "run")
    assert network.details["classes"] == ["ant", "bee", "cow"]
    assert network.details["mean"] == base.details["mean"]
    assert network.details["image_size"] == base.details["image_size"] == 8


def test_fine_tuning_with_other_recipes_takes_smaller_steps():
    for recipe, w_lr, w_lr_min in (("darts", 0.005, 0), ("plain", 2e-4, 2e-4), ("quick", 0.02, 0)):
        args = train_final.parse_args(["--recipe", recipe, "--init-from", "x"])
        assert (args.w_lr, args.w_lr_min) == pytest.approx((w_lr, w_lr_min))


def test_nnis_second_bn_is_kept_in_fine_tuning(tmp_path, pictures):
    torch.manual_seed(0)
    sizes = {"init_channels": 2, "num_cells": 3, "stem": "imagenet", "auxiliary_second_bn": True}
    network = Network(parse_genotype("DARTS_V2"), 3, **sizes)
    torch.save(network_to_nni(network), tmp_path / "nni.pt")
    arguments = [*pictures, "--init-from", f"{tmp_path}/nni.pt", "--epochs", "1"]
    arguments += ["--image-size", "32", "--out-dir", f"{tmp_path}/run"]
    train_final.main(arguments)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "genotype DARTS_V2, inferred from the operations" in log
    assert "new: nothing; left out: nothing; its classes have no names" in log
    assert load_network(tmp_path / "run").config["auxiliary_second_bn"]


def test_a_result_is_strict_json(runs):
    for name in ("search", "final", "eval"):
        text = (runs[0] / name / "result.json").read_text()
        json.loads(text, parse_constant=lambda constant: pytest.fail(constant))


def test_classes_of_other_names_are_refused(runs, tmp_path, pictures):
    arguments = [*pictures, "--init-from", f"{runs[0]}/final", "--epochs", "1"]
    train_final.main([*arguments, "--out-dir", f"{tmp_path}/run"])
    (tmp_path / "pictures" / "train" / "bee").rename(tmp_path / "pictures" / "train" / "bat")
    (tmp_path / "pictures" / "test" / "bee").rename(tmp_path / "pictures" / "test" / "bat")
    with pytest.raises(ValueError, match="class 'bat' where the network of .* has 'bee'"):
        eval_pretrained.main([*pictures, "--weights", f"{tmp_path}/run"])


def test_frozen_features_stay_as_they_were(runs, tmp_path, pictures):
    base = load_network(runs[0] / "final").state_dict()
    arguments = [*pictures, "--init-from", f"{runs[0]}/final", "--epochs", "2"]
    train_final.main([*arguments, "--freeze-features", "--out-dir", f"{tmp_path}/run"])
    tuned = load_network(tmp_path / "run").state_dict()
    assert tuned["classifier.weight"].shape[0] == 3
    assert all(torch.equal(t, base[k]) for k, t in tuned.items() if k[:10] != "classifier")


def test_fine_tuning_on_the_same_classes_goes_on_from_where_it_was(runs, tmp_path):
    arguments = [*DATA, "--init-from", f"{runs[0]}/final", "--w-lr", "0", "--freeze-features"]
    result = train_final.main([*arguments, "--epochs", "1", "--out-dir", f"{tmp_path}/run"])
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "new: nothing; left out: auxiliary_head.bn1, auxiliary_head.bn2, " in log
    assert result["test_accuracy"] == pytest.approx(runs[2]["test_accuracy"])


@pytest.mark.parametrize("script", ["search", "final"])
def test_the_cost_is_told_before_the_run_and_its_time_after_a_few_steps(tmp_path, capsys, script):
    if script == "search":
        train_search.main(
            [*SEARCH, "--batch-size", "4", "--epochs", "1", "--out-dir", f"{tmp_path}/r"]
        )
    else:
        arguments = [*FINAL, *V2, "--batch-size", "8", "--epochs", "1", "--cutout", "0"]
        train_final.main([*arguments, "--out-dir", f"{tmp_path}/r"])
    first, *others = capsys.readouterr().out.splitlines()
    assert "M parameters, " in first and "M multiply-adds" in first
    (forecast,) = (line for line in others if " s a step (the first: " in line)
    assert forecast.endswith(" to go") and others.index(forecast) < 2


def test_pictures_are_classified_by_the_network_and_no_file_is_written(
    runs, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    network = load_network(runs[0] / "final")
    pixels = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("a.png")
    arguments = ["--weights", f"{runs[0]}/final"]
    found = eval_pretrained.main([*arguments, "--image", "a.png"])["a.png"]
    mean, std = (torch.tensor(network.details[key]) for key in ("mean", "std"))
    x = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(2, 0, 1)[None]
    likely, order = network(x).softmax(1)[0].detach().sort(descending=True)
    assert list(found) == [str(i) for i in order[:5].tolist()]
    assert list(found.values()) == pytest.approx(likely[:5].tolist(), abs=1e-4)
    drawn = eval_pretrained.main([*arguments, "--demo"])
    assert len(drawn) == 3 and all(len(classes) == 5 for classes in drawn.values())
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert os.listdir() == ["a.png"]


def picture(path, size=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), 127, np.uint8)).save(path)


@pytest.fixture
def bad_folders(tmp_path):
    """Image folders with one fault each."""
    (tmp_path / "empty").mkdir()
    for part in ("train", "test"):
        picture(tmp_path / "one_class" / part / "cat" / "0.png")
        (tmp_path / "no_images" / part / "cat").mkdir(parents=True)
        picture(tmp_path / "no_images" / part / "dog" / "0.png")
        for i, name in enumerate(("cat", "dog")):
            picture(tmp_path / "sizes" / part / name / "0.png", size=8 + i)
            picture(tmp_path / "unreadable" / part / name / "0.png")
    (tmp_path / "unreadable" / "train" / "dog" / "1.png").write_bytes(b"no image at all")
    picture(tmp_path / "classes_differ" / "train" / "cat" / "0.png")
    picture(tmp_path / "classes_differ" / "test" / "dog" / "0.png")
    (tmp_path / "exists").mkdir()
    (tmp_path / "runs" / "demo-search").mkdir(parents=True)
    (tmp_path / "runs" / "demo-search" / "log.txt").write_text("precious")
    (tmp_path / "exists" / "log.txt").write_text("precious")
    (tmp_path / "page.pt").write_text("<html>404</html>")
    torch.save({"a": torch.zeros(1)}, tmp_path / "state.pt")
    return tmp_path


UNKNOWN_OP = "Genotype(normal=[('conv_9x9', 0), ('skip_connect', 1)], normal_concat=[2], "
UNKNOWN_OP += "reduce=[('skip_connect', 0), ('skip_connect', 1)], reduce_concat=[2])"
FOLDER = ["--dataset", "folder", "--batch-size", "2", "--data-dir"]
WEIGHTS = ["--weights", str(ROOT / "tests/golden/quark0_c4_l4_final.pt")]
V2 = ["--genotype", "DARTS_V2"]
INIT = ["--dataset", "synthetic", "--init-from", WEIGHTS[1]]
MISTAKES = [
    ("train_search", ["--dataset", "imagenet"], "imagenet"),
    ("train_search", ["--epochs", "many"], "many"),
    ("train_search", ["--frobnicate"], "--frobnicate"),
    ("train_search", [*FOLDER, "DIR/nowhere"], "nowhere"),
    ("train_search", [*FOLDER, "DIR/empty"], "does not exist"),
    ("train_search", [*FOLDER, "DIR/one_class"], "one class, 'cat'"),
    ("train_search", [*FOLDER, "DIR/no_images"], "no images"),
    ("train_search", [*FOLDER, "DIR/sizes"], "9x9, others are 8x8"),
    ("train_search", [*FOLDER, "DIR/unreadable"], "1.png cannot be read"),
    ("train_search", [*FOLDER, "DIR/classes_differ"], "only one of train and test"),
    ("train_search", [*SEARCH, "--image-size", "0"], "--image-size 0"),
    ("train_search", [*SEARCH, "--device", "meta"], "device 'meta': must be cpu or cuda"),
    ("train_search", [*SEARCH, "--seeds", "1", "--batch-size", "1"], "--grad-accum 1: the BN"),
    ("train_search", [*SEARCH, "--image-size", "-8"], "--image-size -8"),
    ("train_search", [*SEARCH, "--num-cells", "2"], "num_cells 2"),
    ("train_search", [*SEARCH, "--num-nodes", "0"], "num_nodes 0"),
    ("train_search", [*SEARCH, "--init-channels", "0"], "init_channels 0"),
    ("train_search", [*SEARCH, "--epochs", "0"], "--epochs 0"),
    ("train_search", [*SEARCH, "--batch-size", "-1"], "--batch-size -1"),
    ("train_search", [*SEARCH, "--batch-size", "61"], "larger than the 60 images"),
    ("train_search", [*SEARCH, "--subset", "0"], "--subset 0"),
    ("train_search", [*SEARCH, "--subset", "99999"], "subset 99999"),
    ("train_search", [*SEARCH, "--w-lr", "-1"], "--w-lr -1.0: must be"),
    (
        "train_search",
        [*SEARCH, "--w-lr", "5e-4"],
        "--w-lr-min 0.001: must be at most --w-lr, 0.0005",
    ),
    ("train_search", [*SEARCH, "--seeds", "0", "--select-cells", "2"], "--select-cells 2: must be"),
    ("train_search", [*SEARCH, "--seeds", "0", "--space", "S9"], "S9"),
    ("train_search", [*SEARCH, "--space", "skip_connect", "--max-skips", "0"], "max_skips 0"),
    ("train_search", [*SEARCH, "--order", "3"], "--order: invalid choice: 3"),
    ("train_search", [*SEARCH, "--w-lr", "nan"], "--w-lr nan: must be in [0, inf)"),
    ("train_search", [*SEARCH, "--alpha-lr", "inf"], "--alpha-lr inf: must be in [0, inf)"),
    ("train_search", [*SEARCH, "--w-momentum", "1"], "--w-momentum 1.0: must be in [0, 1)"),
    ("train_search", [*SEARCH, "--w-grad-clip", "-1"], "--w-grad-clip -1"),
    ("train_search", [*SEARCH, "--checkpoint-minutes", "nan"], "--checkpoint-minutes nan"),
    ("train_search", [*SEARCH, "--seed", "9" * 20], "--seed 9999"),
    (
        "train_search",
        [*SEARCH, "--grad-accum", "3"],
        "--grad-accum 3: must divide",
    ),
    ("train_search", [*SEARCH, "--grad-accum", "0"], "--grad-accum 0"),
    ("train_search", [*SEARCH, "--max-skips", "-1"], "--max-skips -1"),
    ("train_search", [*SEARCH, "--early-stop"], "--early-stop needs the eigenvalue"),
    ("train_search", [*SEARCH, "--adapt-weight-decay"], "--adapt-weight-decay needs the "),
    (
        "train_search",
        [*SEARCH, "--hessian-every", "1", "--early-stop", "--adapt-weight-decay"],
        "--early-stop and --adapt-weight-decay: one or the other",
    ),
    ("train_search", [*SEARCH, "--space", "S9"], "space 'S9': 'S9' is not known"),
    ("train_search", [*SEARCH, "--space", "none"], "and not only none"),
    ("train_search", [*SEARCH, "--space", "S1"], "num_nodes 2: the space has choices for 14"),
    ("train_search", [*SEARCH, "--relaxation", "gumbel", "--tau", "10", "0"], "--tau 0.0"),
    ("train_search", [*SEARCH, "--relaxation", "gumbel", "--compile"], "--compile: not with"),
    ("train_search", [*SEARCH, "--relaxation", "partial"], "init_channels 2: must be a multiple"),
    ("train_search", [*SEARCH, "--method", "random", "--max-skips", "2"], "--max-skips: only with"),
    ("train_search", [*SEARCH, "--method", "random", "--relaxation", "gumbel"], "--method random"),
    ("train_search", [*SEARCH, "--method", "random", "--candidates", "0"], "--candidates 0"),
    ("train_search", [*SEARCH, "--tau", "5", "1"], "--tau: only with --relaxation gumbel"),
    ("train_search", [*SEARCH, "--zero-one-weight", "5"], "only with --relaxation sigmoid, not"),
    ("train_search", [*SEARCH, "--partial", "4"], "--partial: only with --relaxation partial, not"),
    ("train_search", [*SEARCH, "--candidates", "9"], "--candidates: only with --method random"),
    ("train_search", [*SEARCH, "--method", "random", "--order", "2"], "--order: only with --met"),
    ("train_search", [*SEARCH, "--method", "random", "--alpha-lr", "1"], "--alpha-lr: only with"),
    ("train_search", [*SEARCH, "--w-optimizer", "adam", "--w-momentum", "0.5"], "-optimizer sgd"),
    ("train_search", [*SEARCH, "--select-epochs", "5"], "--select-epochs: only with --seeds"),
    ("train_search", [*SEARCH, "--seeds", "1", "--seed", "2"], "--seed and --seeds: one or"),
    ("train_search", [*SEARCH, "--stem", "imagenet"], "--image-size above 32, the images have 8"),
    ("train_search", [*SEARCH, "--channels", "1"], "--channels: only with --dataset folder, not"),
    ("train_search", [*SEARCH, "--w-nesterov", "--order", "2"], "--order 2: its virtual step"),
    ("train_search", [*SEARCH, "--w-nesterov", "--w-momentum", "0"], "--w-nesterov: needs a"),
    ("train_final", [*FINAL, *V2, "--w-lr-decay", "0.9"], "only with --w-schedule exponential"),
    ("train_final", [*FINAL, *V2, "--w-schedule", "one-cycle", "--w-lr-min", "0"], "cosine, not"),
    ("train_final", [*FINAL, *V2, "--in-memory", "never"], "--in-memory: only with --dataset fol"),
    ("train_final", [*FINAL, *V2, "--num-workers", "2"], "--num-workers: only with --dataset"),
    ("eval_pretrained", ["--demo", "--dataset", "svhn"], "--dataset: not with --demo"),
    ("eval_pretrained", ["--judge", "DARTS_V2", "DARTS_V9"], "genotype DARTS_V9: neither a file"),
    ("eval_pretrained", ["--judge", "DARTS_V2", "--weights", "x"], "--weights: not with --judge"),
    ("train_search", [*SEARCH, "--keep", "best"], "--keep best: NAS-Bench-301 has no cells like"),
    (
        "train_search",
        # the first cell of this seed has no noise, a later one may
        [*SEARCH, "--num-nodes", "4", "--space", NOISY, "--seed", "13", "--keep", "best"],
        "--keep best: NAS-Bench-301 has no cells like",
    ),
    (
        "train_search",
        [*SEARCH, "--seeds", "0", "1", "--stem", "imagenet", "--select-channels", "35"],
        "init_channels 35: must be even",
    ),
    (
        "train_search",
        [*SEARCH, "--keep", "best", "--early-stop", "--hessian-every", "1"],
        "--early-stop and --keep best: one or the other",
    ),
    ("eval_pretrained", ["--export", "DIR/e", "--out-dir", "DIR/o"], "--out-dir: not with --exp"),
    ("train_search", [*SEARCH, "--seeds", "0", "-1"], "--seeds -1"),
    ("train_search", [*SEARCH, "--seeds", "0", "--out-dir", "DIR/exists"], "is not empty"),
    (
        "train_final",
        [*V2, *FOLDER, "DIR/sizes", "--in-memory", "never", "--image-size", "8"]
        + ["--cutout", "0", "--holdout"],
        "--holdout: needs the images in memory",
    ),
    ("train_search", [*SEARCH, "--alpha-warmup-epochs", "50"], "must be less than --epochs, 50"),
    ("train_search", [*SEARCH, "--search-drop-path", "1"], "--search-drop-path 1.0"),
    ("train_search", [*SEARCH, "--out-dir", "/dev/null/run"], "/dev/null/run cannot be made"),
    ("train_search", [*SEARCH, "--seed", "-1"], "--seed -1"),
    ("train_search", [*SEARCH, "--device", "cuda:99"], "cuda:99"),
    ("train_search", [*SEARCH, "--device", "abacus"], "abacus"),
    ("train_search", [*SEARCH, "--out-dir", "DIR/exists"], "exists and is not empty"),
    ("train_search", ["--demo", "--out-dir", "runs/demo-search"], "exists and is not empty"),
    ("train_search", [*SEARCH, "--out-dir", "DIR/exists", "--resume"], "nothing to resume"),
    ("train_search", [*SEARCH, "--out-dir", "DIR/page.pt"], "is a file"),
    ("train_search", [*SEARCH, "--out-dir", "n" * 300], "cannot be read: File name too long"),
    ("train_search", [*FOLDER, "n" * 300], "does not exist"),
    ("train_final", FINAL, "--genotype is needed"),
    ("train_final", [*FINAL, "--genotype", "DARTS_V9"], "DARTS_V9"),
    ("train_final", [*FINAL, "--genotype", UNKNOWN_OP], "conv_9x9"),
    (
        "train_final",
        [*FINAL, "--genotype", UNKNOWN_OP.replace("conv_9x9', 0", "skip_connect', 2")],
        "predecessor 2",
    ),
    ("train_final", [*FINAL, "--genotype", "DARTS_V2", "--num-cells", "2"], "num_cells 2"),
    (
        "train_final",
        [*FINAL, "--genotype", "DARTS_V2", "--stem", "imagenet", "--init-channels", "3"],
        "init_channels 3",
    ),
    (
        "train_final",
        [*FINAL, "--genotype", "DARTS_V2", "--drop-path-prob", "1"],
        "--drop-path-prob 1",
    ),
    ("train_final", [*FINAL, "--genotype", "DARTS_V2", "--cutout", "-2"], "--cutout -2"),
    ("train_final", [*FINAL, "--genotype", "DARTS_V2", "--out-dir", "DIR/exists"], "not empty"),
    ("eval_pretrained", ["--demo", "--export", "DIR/e"], "--demo and --export: one at a time"),
    ("eval_pretrained", ["--image", "DIR/page.pt", *WEIGHTS], "page.pt cannot be read"),
    ("eval_pretrained", ["--export", "DIR/exists", *WEIGHTS], "exists and is not empty"),
    ("eval_pretrained", ["--dataset", "cifar10", "--weights", "no_such"], "nor one of"),
    ("eval_pretrained", ["--dataset", "synthetic", "--weights", "DIR/none.pt"], "none.pt"),
    ("eval_pretrained", ["--dataset", "synthetic", "--weights", "DIR/page.pt"], "page.pt"),
    ("eval_pretrained", ["--dataset", "synthetic", "--weights", "DIR/state.pt"], "neither a"),
    ("eval_pretrained", [*WEIGHTS, "--genotype", "DARTS_V1", "--demo"], "missing"),
    ("train_final", [*FINAL, *V2, "--max-params", "0.0001"], "times the 0.0001 M allowed"),
    (
        "train_final",
        [*FINAL, *V2, "--max-madds", "0.2", "--init-channels", "16"],
        "times the 0.2 M allowed",
    ),
    ("train_final", [*INIT, "--init-channels", "4"], "--init-channels 4: leave it out"),
    ("train_final", [*INIT, "--num-cells", "8"], "--num-cells 8: leave it out"),
    ("train_final", ["--init-from", "no_such", *DATA], "network no_such: neither a file"),
    ("train_final", [*FINAL, *V2, "--freeze-features"], "--freeze-features needs --init-from"),
    ("train_final", [*INIT, "--freeze-features", "--auxiliary-weight", "0.4"], "must be 0"),
    ("train_final", [*FINAL, *V2, "--batch-size", "1"], "--batch-size 1 --grad-accum 1: the BN"),
    ("train_final", [*FINAL, *V2, "--num-workers", "-1"], "--num-workers -1"),
    ("train_final", [*FINAL, *V2, "--image-size", "0"], "--image-size 0"),
    ("train_final", [*FINAL, *V2, "--auxiliary-weight", "-1"], "--auxiliary-weight -1"),
    ("train_final", [*FINAL, *V2, "--w-lr-decay", "-1"], "--w-lr-decay -1"),
    ("train_final", [*FINAL, *V2, "--w-lr-decay", "0"], "must be in (0, 1]"),
    ("train_final", [*FINAL, *V2, "--label-smoothing", "nan"], "--label-smoothing nan"),
    ("train_final", [*FINAL, *V2, "--w-weight-decay", "-1"], "--w-weight-decay -1"),
    ("train_final", [*FINAL, "--genotype", "/dev/null"], "/dev/null"),
    ("train_final", [*FINAL, *V2, "--max-params", "nan"], "--max-params nan"),
    ("train_final", [*FINAL, *V2, "--w-lr-min", "0.1"], "--w-lr-min 0.1: must be at most"),
    ("train_final", [*FINAL, *V2, "--init-channels", "3000000000"], "at most 100000"),
    ("train_final", [*FINAL, *V2, "--sync-bn"], "--sync-bn"),
    ("eval_pretrained", [*WEIGHTS, "--image-size", "-4", "--export", "DIR/e"], "--image-size -4"),
    ("eval_pretrained", ["--weights", "n" * 300], "neither a file"),
    ("train_final", [*V2, *FOLDER, "DIR/sizes", "--in-memory", "never"], "need --image-size"),
    (
        "train_final",
        [*V2, *FOLDER, "DIR/sizes", "--in-memory", "never", "--image-size", "8"],
        "cutout 16: must be 0",
    ),
]


@pytest.mark.parametrize("script, arguments, names", MISTAKES)
def test_a_mistake_gives_one_line_and_exit_code_2(
    bad_folders, monkeypatch, capsys, script, arguments, names
):
    monkeypatch.chdir(bad_folders)
    arguments = [argument.replace("DIR", str(bad_folders)) for argument in arguments]
    before = sorted(bad_folders.rglob("*"))
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip()
    assert names in message and "\n" not in message
    assert sorted(bad_folders.rglob("*")) == before
    assert (bad_folders / "exists" / "log.txt").read_text() == "precious"


@pytest.mark.parametrize("script", ["train_search", "train_final", "eval_pretrained"])
def test_help_explains_every_flag(capsys, monkeypatch, script):
    def spy(parser, *more):
        assert all(action.help for action in parser._actions)
        return parse_args(parser, *more)

    parse_args = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", spy)
    with pytest.raises(SystemExit) as stopped:
        {
            "train_search": train_search,
            "train_final": train_final,
            "eval_pretrained": eval_pretrained,
        }[script].main(["--help"])
    assert stopped.value.code == 0
    assert "--fast-dev-run" in capsys.readouterr().out


@pytest.mark.slow
def test_the_demos_find_train_and_evaluate_a_cell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    search = train_search.main(["--demo"])
    final = train_final.main(["--demo"])
    evaluation = eval_pretrained.main(["--dataset", "synthetic", "--weights", "runs/demo-final"])
    assert search["arch_accuracy"] > 0.4  # chance: 0.1
    assert final["test_accuracy"] > 0.7
    assert evaluation["accuracy"] == pytest.approx(final["test_accuracy"])
    assert final["genotype"] == evaluation["genotype"] == search["genotype"]


def test_the_next_command_of_a_demo_keeps_what_the_user_chose():
    def following(*words):
        return train_search.next_command(train_search.parse_args(["--demo", *words]), "found")

    assert following() == "python train_final.py --demo --seed 0 --genotype found"
    own = following("--dataset", "npz", "--data-dir", "mine.npz", "--stem", "imagenet")
    expected = "--demo --dataset npz --data-dir mine.npz --stem imagenet --genotype found"
    assert own == f"python train_final.py {expected}"


@pytest.mark.parametrize("channels", [1, 4])
def test_networks_of_another_code_get_statistics_of_their_channels(tmp_path, channels):
    network = Network(PUBLISHED["DARTS_V2"], 10, 2, 3, in_channels=channels)
    torch.save(network_to_quark0(network), tmp_path / "other.pt")
    flags = ["--weights", f"{tmp_path}/other.pt", "--genotype", "DARTS_V2", "--demo"]
    details = eval_pretrained.details_of(load_network(*flags[1:4:2]))
    if channels == 1:
        assert len(eval_pretrained.main(flags)) == 3
        grey = 0.299 * 0.4914 + 0.587 * 0.4822 + 0.114 * 0.4465
        assert details["mean"] == pytest.approx([grey])
    else:
        assert "mean" not in details
