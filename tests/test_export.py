"""Oracles: the network's own logits, at batch sizes that the export did not see; parse_genotype."""

import errno
import hashlib
import json
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

import darts_min.convert.export
import eval_pretrained
from darts_min.convert.export import export_network
from darts_min.convert.genotype_texts import parse_genotype
from darts_min.convert.state_dicts import network_from_nni, network_from_quark0
from darts_min.convert.weights import save_network
from darts_min.genotypes import Genotype
from darts_min.network import Network, fold_batch_norm
from darts_min.operations import SepConv
from darts_min.run.files import load_file, write_atomically

# Every operation: strips, phases, both kinds of pooling, skips of both strides.
GENOTYPE = Genotype(
    (("dil_conv_5x5", 0), ("skip_connect", 1), ("sep_conv_5x5", 2), ("avg_pool_3x3", 0)),
    (2, 3),
    (("skip_connect", 0), ("dil_conv_3x3", 1), ("sep_conv_3x3", 2), ("max_pool_3x3", 1)),
    (2, 3),
)
# Quick to translate, for what does not depend on the operations.
SMALL = Genotype(
    (("sep_conv_3x3", 0), ("skip_connect", 1)),
    (2,),
    (("max_pool_3x3", 0), ("skip_connect", 1)),
    (2,),
)
DETAILS = {"classes": list("abcdefg"), "mean": [0.5], "std": [0.25], "image_size": 99}
CASES = {
    "cifar": (16, {"auxiliary": True}),
    "imagenet": (45, {"auxiliary": False, "stem": "imagenet", "in_channels": 1}),
}
FORMS = ["quark0.pt", "nni.pt", "network.pt2", "network.onnx"]
ONNX = ("onnx", "onnxscript", "onnxruntime")


def make(genotype=SMALL, **sizes):
    torch.manual_seed(0)
    network = Network(genotype, **{"num_classes": 7, "init_channels": 4, "num_cells": 3} | sizes)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return network.to(memory_format=torch.channels_last)  # and in training mode


def need_onnx():
    for package in ONNX:
        pytest.importorskip(package, reason='ONNX needs pip install "darts_min[onnx]"')
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):
        pytest.skip("PyTorch 2.6 fails to translate to ONNX with an onnxscript of today")


@pytest.fixture
def no_onnx(monkeypatch):
    """Translating to ONNX takes most of the time."""
    monkeypatch.setitem(sys.modules, "onnxscript", None)


@pytest.fixture(scope="module", params=["cifar", pytest.param("imagenet", marks=pytest.mark.slow)])
def exported(request, tmp_path_factory):
    image_size, sizes = CASES[request.param]
    network = make(GENOTYPE, **sizes)
    folder = tmp_path_factory.mktemp("export") / "new" / request.param
    content = export_network(network, folder, image_size, DETAILS)
    return network, folder, image_size, content


def read(path):
    """Read a file as its users would."""
    if path.name == "quark0.pt":
        return network_from_quark0(load_file(path), GENOTYPE)
    if path.name == "nni.pt":
        return network_from_nni(load_file(path), parse_genotype(path.parent / "genotype.nni.json"))
    if path.name == "network.pt2":
        return torch.export.load(path).module()
    need_onnx()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@pytest.mark.parametrize("form", FORMS)
def test_every_file_computes_the_logits_of_the_network_for_any_batch_size(exported, form):
    network, folder, image_size, _ = exported
    network, run = deepcopy(network).eval(), read(folder / form)
    for batch_size in (1, 3, 7):
        images = torch.randn(batch_size, network.config["in_channels"], image_size, image_size)
        with torch.no_grad():
            torch.testing.assert_close(run(images), network(images), atol=1e-5, rtol=1e-5)


def test_every_genotype_file_parses_to_the_genotype(exported):
    _, folder, _, _ = exported
    files = sorted(folder.glob("genotype.*"))
    names = ["genotype.json", "genotype.nni.json", "genotype.pt.darts.txt", "genotype.quark0.txt"]
    assert [file.name for file in files] == names
    assert all(parse_genotype(file) == GENOTYPE for file in files)


def test_export_json_describes_the_files_and_their_input(exported):
    network, folder, image_size, content = exported
    assert content == json.loads((folder / "export.json").read_text())
    assert content["input"]["shape"] == ["batch", network.config["in_channels"], *[image_size] * 2]
    assert content["classes"] == list("abcdefg") and content["image_size"] == image_size
    assert content["files"].keys() == {f.name for f in folder.iterdir()} - {"export.json"}
    for name, about in content["files"].items():
        data = (folder / name).read_bytes()
        assert about["bytes"] == len(data)
        assert about["sha256"] == hashlib.sha256(data).hexdigest()
        assert (about["deviation"] is None) == name.startswith("genotype")
    assert 0 <= content["largest_deviation"] < 1e-5


def test_a_program_holds_neither_the_auxiliary_head_nor_folders_of_this_machine(exported):
    _, folder, _, _ = exported
    for file in folder.glob("network.*"):
        data = file.read_bytes()
        assert b"auxiliary_head" not in data
        assert str(Path(darts_min.__file__).parent).encode() not in data


def test_onnx_weights_are_in_the_file_and_its_batch_has_a_name(exported):
    need_onnx()
    import onnx

    model = onnx.load(exported[1] / "network.onnx", load_external_data=False)
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.slow
def test_exporting_prints_nothing_and_leaves_the_network_as_it_was(tmp_path, capfd, recwarn):
    network = make().double()
    network.cells[1].eval()  # a mixture of modes
    before = deepcopy(network)
    export_network(network, tmp_path, 8, DETAILS)
    assert capfd.readouterr() == ("", "") and not recwarn.list
    assert [m.training for m in network.modules()] == [m.training for m in before.modules()]
    assert [n for n, _ in network.named_modules()] == [n for n, _ in before.named_modules()]
    tensors, were = network.state_dict(keep_vars=True), before.state_dict(keep_vars=True)
    assert tensors.keys() == were.keys()
    for name, tensor in tensors.items():
        was = were[name]
        assert tensor.dtype == was.dtype and tensor.stride() == was.stride()
        assert tensor.requires_grad == was.requires_grad and torch.equal(tensor, was)


def corrupt(path):
    """Add 0.5 to the first logit of a file."""
    if path.suffix == ".pt":
        state_dict = load_file(path)
        state_dict["classifier.bias"][0] += 0.5
        torch.save(state_dict, path)
    elif path.suffix == ".pt2":
        program = torch.export.load(path)
        program.state_dict["classifier.bias"][0] += 0.5
        torch.export.save(program, path)
    else:
        import onnx

        model = onnx.load(path)
        bias = next(t for t in model.graph.initializer if t.name == "classifier.bias")
        values = onnx.numpy_helper.to_array(bias).copy()
        values[0] += 0.5
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        onnx.save(model, path)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_deviates_is_an_error_that_names_it(form, tmp_path, monkeypatch):
    def write(path, write):
        write_atomically(path, write)
        if path.name == form:
            corrupt(path)

    if form == "network.onnx":
        need_onnx()
    else:
        monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr(darts_min.convert.export, "write_atomically", write)
    network = make()
    with torch.no_grad():
        network.classifier.weight.mul_(1e-3)  # logits below 1, so that the deviation is absolute
    with pytest.raises(RuntimeError, match=rf"{form}: its logits .* by 0\.5, more than 0\.0001"):
        export_network(network, tmp_path, 8, DETAILS)
    assert not (tmp_path / "export.json").exists()


def test_a_full_disk_gives_one_line(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    save_network(make(), tmp_path / "w.pt", {})
    monkeypatch.setattr(darts_min.convert.export, "write_atomically", full)
    with pytest.raises(SystemExit, match="No space left .*genotype.json'; what is in .*/e is us"):
        eval_pretrained.main(["--weights", f"{tmp_path}/w.pt", "--export", f"{tmp_path}/e"])


def test_without_the_onnx_packages_one_line_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    content = export_network(make(), tmp_path, 8, DETAILS)
    assert content["left_out"].keys() == {"network.onnx"}
    reason = content["left_out"]["network.onnx"]
    assert 'pip install "darts_min[onnx]"' in reason and "\n" not in reason
    assert not (tmp_path / "network.onnx").exists()
    assert {f.name for f in tmp_path.iterdir()} > {"quark0.pt", "nni.pt", "network.pt2"}


def test_a_genotype_that_nni_cannot_write_leaves_out_the_files_of_nni(tmp_path, no_onnx):
    genotype = GENOTYPE._replace(normal_concat=(3,), reduce_concat=(2,))
    content = export_network(make(genotype), tmp_path, 8, DETAILS)
    left_out = {"genotype.nni.json", "nni.pt"}
    assert content["left_out"].keys() == left_out | {"network.onnx"}
    assert all("concatenate all nodes" in content["left_out"][name] for name in left_out)
    assert not any((tmp_path / name).exists() for name in left_out)
    assert parse_genotype(tmp_path / "genotype.pt.darts.txt") == genotype


def test_a_network_of_folded_bn_becomes_programs_but_no_state_dicts(tmp_path, no_onnx):
    network = fold_batch_norm(make(GENOTYPE))
    content = export_network(network, tmp_path, 8, DETAILS)
    assert content["left_out"].keys() == {"quark0.pt", "nni.pt", "network.onnx"}
    images = torch.randn(3, 3, 8, 8)
    run = read(tmp_path / "network.pt2")
    torch.testing.assert_close(run(images), network(images).detach(), atol=1e-5, rtol=1e-5)


def test_an_operation_that_the_other_codes_do_not_have_leaves_out_their_state_dicts(
    tmp_path, no_onnx
):
    class Mine(SepConv):
        pass

    network = make()
    network.cells[0].edges[0].op.__class__ = Mine
    content = export_network(network, tmp_path, 8, DETAILS)
    assert content["left_out"].keys() == {"quark0.pt", "nni.pt", "network.onnx"}
    assert content["left_out"]["nni.pt"] == "operation Mine: NNI does not have it"
    assert (tmp_path / "network.pt2").exists() and (tmp_path / "genotype.nni.json").exists()


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path):
    (tmp_path / "network.pt2").write_text("mine")
    for folder, message in (("", "exists and is not empty"), ("network.pt2", "cannot be made")):
        with pytest.raises(ValueError, match=message):
            export_network(make(), tmp_path / folder, 8, DETAILS)
    assert [file.name for file in tmp_path.iterdir()] == ["network.pt2"]
    assert (tmp_path / "network.pt2").read_text() == "mine"


@pytest.mark.parametrize("second_bn", [True, False])
def test_an_auxiliary_head_that_a_code_does_not_know_is_left_out(tmp_path, no_onnx, second_bn):
    network = make(stem="imagenet", auxiliary_second_bn=second_bn)
    export_network(network, tmp_path / "new", 32, DETAILS)
    for name, known in (("quark0.pt", not second_bn), ("nni.pt", second_bn)):
        keys = load_file(tmp_path / "new" / name).keys()
        assert any(key.startswith("auxiliary_head.") for key in keys) == known
        assert any(key.startswith("auxiliary_head.features.6.") for key in keys) == (
            known and second_bn
        )
