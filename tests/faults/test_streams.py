"""Standard streams that cannot show a name, or are closed; oracle: the names as given here.

A child's streams are made what Python makes of them under PYTHONIOENCODING, or with `>&-`.
"""

import json
import os
import signal
import sys
from functools import partial

import pytest
from children import before_save, raise_signal, run_script

from darts_min.convert.weights import save_network
from darts_min.genotypes import PUBLISHED
from darts_min.network import Network
from darts_min.run.run_folder import RunFolder

CLASSES = ["Käfer", "cow", "猫"]
CASES = [
    ("ascii", "Bilder 猫", "\\u732b"),
    pytest.param(
        "utf-8",
        os.fsdecode(b"caf\xe9"),
        "caf\\udce9",
        marks=pytest.mark.skipif(sys.platform != "linux", reason="any bytes are Linux's"),
    ),
]


def encode(encoding):
    sys.stdout.reconfigure(encoding=encoding, errors="strict")
    sys.stderr.reconfigure(encoding=encoding, errors="backslashreplace")


def encode_and_stop(encoding):
    encode(encoding)
    before_save(2, partial(raise_signal, signal.SIGTERM))


def close():
    sys.stdout = None


@pytest.fixture
def odd(pictures, tmp_path):
    """Give the flags for `pictures` whose folder and classes have other names."""

    def odd(name):
        for part in ("train", "test"):
            for before, after in (("ant", "Käfer"), ("bee", "猫")):
                (tmp_path / "pictures" / part / before).rename(tmp_path / "pictures" / part / after)
        (tmp_path / "pictures").rename(tmp_path / name)
        return [*pictures, "--data-dir", str(tmp_path / name), "--image-size", "8"]

    return odd


@pytest.fixture
def evaluate(start, tmp_path):
    """Start an evaluation of a network of the classes `CLASSES`."""

    def evaluate(name, fault, *more):
        path = tmp_path / f"{name}.pt"
        details = {"classes": CLASSES, "mean": [0.5] * 3, "std": [0.2] * 3, "image_size": 8}
        save_network(Network(PUBLISHED["DARTS_V1"], 3, 2, 3), path, details)
        arguments = ["--weights", str(path), "--device", "cpu", *more]
        return start(run_script, "eval_pretrained", arguments, fault)

    return evaluate


def logged(folder):
    """Read a log that is UTF-8, beside a result that is whole."""
    assert json.loads((folder / "result.json").read_text(encoding="utf-8"))["versions"]
    return (folder / "log.txt").read_text(encoding="utf-8")


def escaped(path):
    """Write a path as a log in UTF-8 can hold it."""
    return str(path).encode(errors="backslashreplace").decode()


@pytest.mark.parametrize("encoding, name, shown", CASES)
@pytest.mark.parametrize("script", ["search", "final"])
def test_a_training_in_folders_that_cannot_be_shown_stops_resumes_and_ends(
    run, odd, tmp_path, script, encoding, name, shown
):
    folder = tmp_path / f"run {name}"
    flags = [*odd(name), "--subset", "36", "--fast-dev-run"]
    child = run(script, folder, *flags, fault=partial(encode_and_stop, encoding))
    assert child.wait() == 128 + signal.SIGTERM, child.printed()
    resumed = run(script, folder, *flags, "--resume", fault=partial(encode, encoding))
    assert resumed.wait() == 0, resumed.printed()
    assert shown in child.printed().splitlines()[-1] and shown in resumed.printed()
    log = logged(folder)
    assert f"run folder {escaped(folder)}\n" in log and "stopped by SIGTERM" in log
    assert "epoch   1/1" in log
    has_events = any(path.name.startswith("events.") for path in folder.iterdir())
    assert has_events == ("no file for TensorBoard" not in resumed.printed())
    assert has_events == (escaped(folder) == str(folder))


@pytest.mark.parametrize("encoding, name, shown", CASES)
def test_an_evaluation_of_names_that_cannot_be_shown_writes_its_result(
    evaluate, odd, tmp_path, encoding, name, shown
):
    folder = tmp_path / f"run {name}"
    child = evaluate(name, partial(encode, encoding), *odd(name), "--out-dir", str(folder))
    assert child.wait() == 0, child.printed()
    assert shown in child.printed()
    log = logged(folder)
    assert f"result: {escaped(folder)}" in log
    assert "class Käfer" in log and "class 猫" in log


@pytest.mark.parametrize("encoding, name, shown", CASES)
def test_a_network_is_exported_to_a_folder_that_cannot_be_shown(
    evaluate, tmp_path, encoding, name, shown
):
    child = evaluate(name, partial(encode, encoding), "--export", str(tmp_path / name))
    assert child.wait() == 0, child.printed()
    assert child.printed().endswith(f"{shown} and checked\n")


def test_scripts_do_without_a_standard_output(run, evaluate, odd, tmp_path):
    flags = odd("pictures")
    training = run("final", tmp_path / "a", *flags, "--fast-dev-run", "--subset", "36", fault=close)
    evaluation = evaluate("network", close, *flags, "--out-dir", str(tmp_path / "b"))
    assert training.wait() == 0, training.printed()
    assert evaluation.wait() == 0, evaluation.printed()
    assert "network: " in logged(tmp_path / "a") and "accuracy" in logged(tmp_path / "b")


def test_a_line_is_in_the_log_before_it_is_printed(tmp_path):
    def fail(line):
        raise RuntimeError

    run = RunFolder(tmp_path / "run", write=fail)
    with pytest.raises(RuntimeError):
        run.log("猫")
    assert (tmp_path / "run" / "log.txt").read_text(encoding="utf-8") == "猫\n"
