"""The scripts from end to end on `synthetic`; oracles: an uninterrupted run, the other form.

A user's mistake must give one line on stderr, exit code 2, and leave existing files alone.
"""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval_pretrained
import train_final
import train_search
from darts_min import load_network
from darts_min.checkpoint import RunFolder
from darts_min.convert import network_to_nni, network_to_quark0
from darts_min.genotypes import format_genotype, parse_genotype

ROOT = Path(train_search.__file__).parent
DATA = ["--dataset", "synthetic", "--image-size", "8", "--subset", "120", "--batch-size", "20"]
SEARCH = [*DATA, "--init-channels", "2", "--num-cells", "3", "--num-nodes", "2"]
FINAL = [*DATA, "--init-channels", "2", "--num-cells", "3", "--cutout", "2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One short run of each script, each on the last one's output."""
    folder = tmp_path_factory.mktemp("runs")
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
    log = (runs[0] / "search" / "log.txt").read_text()
    data = "--dataset synthetic --data-dir data --image-size 8"
    assert f"next: python train_final.py {data} --genotype {runs[1]['out_dir']}\n" in log


def test_drop_path_grows_linearly(runs):
    assert [record["drop_path_prob"] for record in runs[2]["history"]] == [0.0, 0.1]


def test_tensorboard_has_every_curve_and_picture(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = {}
    for name in ("search", "final"):
        events = EventAccumulator(str(runs[0] / name))
        events.Reload()
        tags[name] = events.Tags()
        assert len(events.Scalars("loss/train")) == 2
    mix = [tag for tag in tags["search"]["scalars"] if tag.startswith("mix ")]
    assert len(mix) == 2 * 5 * 8  # two kinds, five edges, eight operations
    for tag in ("entropy of the mixture (nats)/normal", "skips in the cell/reduce"):
        assert tag in tags["search"]["scalars"]
    pictures = {"cell_normal", "cell_reduce"}
    assert set(tags["final"]["images"]) == pictures
    assert set(tags["search"]["images"]) == pictures | {"alphas_normal", "alphas_reduce"}


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


class Killed(BaseException):
    pass


@pytest.mark.parametrize("script", ["search", "search order 2", "final"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch, script):
    main, arguments = train_search.main, [*SEARCH, "--epochs", "2"]
    if script == "search order 2":
        arguments += ["--order", "2"]
    elif script == "final":
        main, arguments = train_final.main, [*FINAL, "--epochs", "2", "--genotype", "DARTS_V1"]
    whole = main([*arguments, "--out-dir", f"{tmp_path}/whole"])

    save = RunFolder.save_checkpoint

    def save_and_die(run, state):
        save(run, state)
        raise Killed

    monkeypatch.setattr(RunFolder, "save_checkpoint", save_and_die)
    with pytest.raises(Killed):
        main([*arguments, "--out-dir", f"{tmp_path}/parts"])
    monkeypatch.setattr(RunFolder, "save_checkpoint", save)
    with pytest.raises(ValueError, match="batch_size .was 20, now 10"):
        main([*arguments, "--out-dir", f"{tmp_path}/parts", "--resume", "--batch-size", "10"])
    parts = main([*arguments, "--out-dir", f"{tmp_path}/parts", "--resume"])

    for a, b in zip(whole["history"], parts["history"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    states = [
        torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts")
    ]
    model = "network" if script == "final" else "model"
    for name, tensor in states[0][model].items():
        assert torch.equal(tensor, states[1][model][name])


def test_alpha_warmup_leaves_the_alphas_alone(tmp_path):
    arguments = [*SEARCH, "--epochs", "1", "--alpha-warmup-epochs", "1", "--out-dir"]
    train_search.main([*arguments, f"{tmp_path}/run"])
    alphas = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]["alphas_normal"]
    assert 0 < alphas.abs().max() < 5e-3  # the initial noise, 1e-3 * N(0, 1)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_amp_trains_in_both_halves_of_the_step(tmp_path, amp):
    arguments = [*SEARCH, "--amp", amp, "--fast-dev-run", "--out-dir", f"{tmp_path}/run"]
    result = train_search.main(arguments)
    assert np.isfinite(result["history"][0]["train_loss"])
    alphas = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]["alphas_normal"]
    assert alphas.isfinite().all()


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
FOLDER = ["--dataset", "folder", "--batch-size", "1", "--data-dir"]
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
    ("train_search", [*SEARCH, "--image-size", "0"], "image size 0"),
    ("train_search", [*SEARCH, "--image-size", "-8"], "image size -8"),
    ("train_search", [*SEARCH, "--num-cells", "2"], "num_cells 2"),
    ("train_search", [*SEARCH, "--num-nodes", "0"], "num_nodes 0"),
    ("train_search", [*SEARCH, "--init-channels", "0"], "init_channels 0"),
    ("train_search", [*SEARCH, "--epochs", "0"], "--epochs 0"),
    ("train_search", [*SEARCH, "--batch-size", "-1"], "--batch-size -1"),
    ("train_search", [*SEARCH, "--batch-size", "61"], "larger than the 60 images"),
    ("train_search", [*SEARCH, "--subset", "0"], "subset 0"),
    ("train_search", [*SEARCH, "--subset", "99999"], "subset 99999"),
    ("train_search", [*SEARCH, "--w-lr", "-1"], "-1"),
    ("train_search", [*SEARCH, "--order", "3"], "3"),
    ("train_search", [*SEARCH, "--seed", "-1"], "--seed -1"),
    ("train_search", [*SEARCH, "--device", "cuda:99"], "cuda:99"),
    ("train_search", [*SEARCH, "--device", "abacus"], "abacus"),
    ("train_search", [*SEARCH, "--out-dir", "DIR/exists"], "exists and is not empty"),
    ("train_search", ["--demo", "--out-dir", "runs/demo-search"], "exists and is not empty"),
    ("train_search", [*SEARCH, "--out-dir", "DIR/exists", "--resume"], "nothing to resume"),
    ("train_search", [*SEARCH, "--out-dir", "DIR/page.pt"], "is a file"),
    ("train_final", FINAL, "--genotype is needed"),
    ("train_final", [*FINAL, "--genotype", "DARTS_V9"], "DARTS_V9"),
    ("train_final", [*FINAL, "--genotype", UNKNOWN_OP], "conv_9x9"),
    (
        "train_final",
        [*FINAL, "--genotype", UNKNOWN_OP.replace("conv_9x9', 0", "skip_connect', 2")],
        "2",
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
    ("eval_pretrained", ["--dataset", "synthetic"], "--weights is needed"),
    ("eval_pretrained", ["--dataset", "synthetic", "--weights", "DIR/none.pt"], "none.pt"),
    ("eval_pretrained", ["--dataset", "synthetic", "--weights", "DIR/page.pt"], "page.pt"),
    ("eval_pretrained", ["--dataset", "synthetic", "--weights", "DIR/state.pt"], "give --genotype"),
    (
        "eval_pretrained",
        ["--dataset", "synthetic", "--weights", "DIR/state.pt", "--genotype", "DARTS_V2"],
        "missing",
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
def test_help_explains_every_flag(capsys, script):
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
    evaluation = eval_pretrained.main(["--demo"])
    assert search["arch_accuracy"] > 0.4  # chance: 0.1
    assert final["test_accuracy"] > 0.7
    assert evaluation["accuracy"] == pytest.approx(final["test_accuracy"])
    assert final["genotype"] == evaluation["genotype"] == search["genotype"]
