"""Losses and gradients that are not finite; oracles: the state before the step, a run without.

The fault is a factor of the gradient of one parameter, at chosen steps (from 1, of all epochs).
"""

import json
import math
from functools import partial

import pytest
import torch
from children import SCRIPTS, assert_same_result, exact, load

import train_final
import train_search
from darts_min.run.run_folder import RunFolder

# The script, its model, a parameter that is not the first, and steps and lr of the second epoch.
CASES = {
    "search": (train_search, "Supernet", "cells.1.preprocess1.conv.weight", 3, "0.013"),
    "final": (train_final, "Network", "classifier.weight", 6, "0.0125"),
}
SEARCH_IS_SLOW = [pytest.param("search", marks=pytest.mark.slow), "final"]


def multiply_gradient(model_class, name, factor, steps):
    """Return a class of models for which the gradient of the parameter `name` is wrong."""

    class Faulty(model_class):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            done = 0

            def hook(gradient):
                nonlocal done
                done += 1
                return gradient * factor if done in steps else gradient

            self.get_parameter(name).register_hook(hook)

    return Faulty


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Run a script with a fault; returns the weights and momenta after each step."""

    def train(case, factor, steps, *more):
        script, model_class, name, *_ = CASES[case]
        faulty = multiply_gradient(getattr(script, model_class), name, factor, steps)
        states, save = [], RunFolder.save_checkpoint

        def keep(run, state, *more):
            names = ("weight", "bias", "running_mean", "running_var")
            weights = {k: v for k, v in state["model"].items() if k.endswith(names)}
            states.append(exact([weights, state["w_step"]["optimizer"]["state"]]))
            save(run, state, *more)

        with monkeypatch.context() as patch:
            patch.setattr(script, model_class, faulty)
            patch.setattr(RunFolder, "save_checkpoint", keep)
            arguments = [*SCRIPTS[case][1], "--out-dir", f"{tmp_path}/run", *more]
            script.main([*arguments, "--checkpoint-minutes", "0"])
        return states

    return train


@pytest.mark.parametrize(
    "factor, word", [(math.nan, "nan"), pytest.param(math.inf, "inf", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("case", CASES)
def test_a_run_stops_before_the_weights_are_damaged_and_can_go_on(
    train, whole, tmp_path, case, factor, word
):
    script, _, name, steps, lr = CASES[case]
    place = f"epoch 2, step 2, lr {lr}: loss or gradient is not finite; "
    with pytest.raises(FloatingPointError, match=place) as error:
        train(case, factor, [steps + 2])
    if word == "nan":  # inf * 0 = nan in the places where the gradient is 0
        assert f"the largest gradient is {word}, in {name} (--on-nonfinite" in str(error.value)
    state = load(tmp_path / "run")
    assert (state["progress"]["epoch"], state["progress"]["step"]) == (1, 1)
    script.main([*SCRIPTS[case][1], "--out-dir", f"{tmp_path}/run", "--resume"])
    assert_same_result(tmp_path / "run", whole(case)[0])


@pytest.mark.parametrize("case", SEARCH_IS_SLOW)
def test_a_batch_that_is_skipped_leaves_weights_and_momenta_as_they_were(train, tmp_path, case):
    states = train(case, math.nan, [2], "--on-nonfinite", "skip")
    assert states[1] == states[0] != states[2]
    history = json.loads((tmp_path / "run" / "result.json").read_text())["history"]
    assert [record["skipped_batches"] for record in history] == [1, 1]
    assert "1 batches skipped so far\n" in (tmp_path / "run" / "log.txt").read_text()
    assert all(math.isfinite(record["train_loss"]) for record in history)


@pytest.mark.parametrize("case", SEARCH_IS_SLOW)
def test_a_run_that_finds_no_scale_for_fp16_ends(monkeypatch, tmp_path, case):
    small = partial(torch.amp.GradScaler, init_scale=2.0**-20)  # as after many overflows
    monkeypatch.setattr(torch.amp, "GradScaler", small)
    script, arguments = CASES[case][0], [*SCRIPTS[case][1], "--out-dir", f"{tmp_path}/run"]
    with pytest.raises(FloatingPointError, match="gradients overflow in fp16 at any scale"):
        script.main([*arguments, "--amp", "fp16", "--fast-dev-run"])


@pytest.mark.parametrize("case", SEARCH_IS_SLOW)
@pytest.mark.slow
def test_a_batch_that_fp16_skips_halves_the_scale(monkeypatch, tmp_path, case):
    script, model_class, *_ = CASES[case]
    forwards = math.inf

    class Faulty(getattr(script, model_class)):
        def forward(self, x):
            nonlocal forwards
            output = super().forward(x)
            forwards -= self.training
            if forwards != 0 or not self.training:
                return output
            return output * math.nan if case == "search" else tuple(y * math.nan for y in output)

    monkeypatch.setattr(script, model_class, Faulty)
    arguments = [*SCRIPTS[case][1], "--amp", "fp16", "--on-nonfinite", "skip", "--out-dir"]
    script.main([*arguments, f"{tmp_path}/whole"])
    forwards = 4 if case == "search" else 2  # the w step of step 2
    history = script.main([*arguments, f"{tmp_path}/run"])["history"]
    assert [record["skipped_batches"] for record in history] == [1, 1]
    assert all(math.isfinite(record["train_loss"]) for record in history)
    scales = [load(tmp_path / name)["w_step"]["scaler"]["scale"] for name in ("whole", "run")]
    assert scales[1] == scales[0] / 2


@pytest.mark.parametrize("case", SEARCH_IS_SLOW)
def test_the_tenth_in_a_row_stops_the_run(train, case):
    steps = CASES[case][3]
    epoch, step = 1 + 10 // steps, 1 + 10 % steps  # steps 2 to 11 are wrong
    with pytest.raises(FloatingPointError, match=rf"epoch {epoch}, step {step}, .*10 batches in"):
        train(case, math.nan, range(2, 100), "--on-nonfinite", "skip", "--epochs", "5")


def test_an_alpha_gradient_that_is_not_finite_is_named(train, monkeypatch):
    true = train_search.architecture_gradient

    def wrong(*arguments, **options):
        normal, reduce = true(*arguments, **options)
        return [normal, reduce * math.nan]

    monkeypatch.setattr(train_search, "architecture_gradient", wrong)
    with pytest.raises(FloatingPointError, match="epoch 1, step 1, .* nan, in alphas_reduce"):
        train("search", 1.0, [])


def test_the_script_ends_with_one_line_and_exit_code_1(run, tmp_path):
    child = run("final", tmp_path / "run", fault=make_logits_nan)
    assert child.wait() == 1
    line = child.printed().splitlines()[-1]
    assert line.startswith("train_final.py: error: epoch 1, step 1, lr 0.025: loss or gradient")
    assert "Traceback" not in child.printed()


def make_logits_nan():
    from darts_min.network import Network

    forward = Network.forward

    def wrong(self, x):
        logits = forward(self, x)
        return logits if not self.training else tuple(part * math.nan for part in logits)

    Network.forward = wrong
