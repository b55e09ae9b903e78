"""Oracles: what was written; files damaged on purpose, each of which must give one clear line."""

import argparse
import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from darts_min import load_network
from darts_min.convert import (
    network_to_nni,
    network_to_quark0,
    save_network,
    supernet_to_quark0,
)
from darts_min.convert.weights import names
from darts_min.genotypes import PUBLISHED, Genotype
from darts_min.network import Network
from darts_min.run.files import load_file
from darts_min.supernet import Supernet

V2 = PUBLISHED["DARTS_V2"]
UNKNOWN = Genotype((("sep_conv_5x5", 0), ("skip_connect", 1)), (2,), V2.reduce[:2], (2,))


def make(genotype=V2, **sizes):
    torch.manual_seed(0)
    network = Network(genotype, **{"init_channels": 4, "num_cells": 3} | sizes)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return network.eval()


@pytest.fixture
def network():
    return make()


@pytest.fixture
def ours(network, tmp_path):
    save_network(network, tmp_path / "network.pt", {"classes": list("abcdefghij")})
    return tmp_path / "network.pt"


def same(a, b):
    x = torch.randn(2, 3, 32, 32)
    return a.config == b.config and a.genotype == b.genotype and torch.equal(a(x), b(x))


def test_a_file_a_run_folder_and_the_network_agree(network, ours):
    for path in (ours, str(ours), ours.parent):
        loaded = load_network(path)
        assert same(loaded, network) and not loaded.training
        assert loaded.details == {"classes": list("abcdefghij")}


def test_half_precision_is_a_half_of_the_file_and_is_loaded_as_float32(network, ours, tmp_path):
    save_network(network, tmp_path / "half.pt", {}, torch.float16)
    loaded = load_network(tmp_path / "half.pt")
    assert (tmp_path / "half.pt").stat().st_size < 0.75 * ours.stat().st_size  # names take room
    for key, tensor in loaded.state_dict().items():
        original = network.state_dict()[key]
        assert tensor.dtype == original.dtype
        assert torch.equal(tensor, original.half().to(original.dtype) if tensor.ndim else original)


def prefixed(*prefixes):
    return lambda content: {
        f"{p}{key}": tensor for p in prefixes for key, tensor in content.items()
    }


def compiled_in_parts(content):
    return {re.sub(r"((?:cells|stages)\.0\.)", r"\1_orig_mod.", k): t for k, t in content.items()}


def counted_by_thop(content):
    counts = ("total_ops", "total_params", "cells.0.total_ops", "stages.0.0.total_params")
    return content | {key: torch.zeros(1, dtype=torch.float64) for key in counts}


WRAPPINGS = {
    "alone": lambda content: content,
    "state_dict": lambda content: {"state_dict": content, "epoch": 3},
    "model": lambda content: {"model": content},
    "net, nested": lambda content: {"net": {"state_dict": content}, "optimizer": {"state": {}}},
    "network": lambda content: {"network": content},
    "weights": lambda content: {"weights": content, "epoch": 3},
    "model_state": lambda content: {"checkpoint": 1, "model_state": content},
    "module.": prefixed("module."),
    "_orig_mod.": prefixed("_orig_mod."),
    "model.": prefixed("model."),
    "_model.": prefixed("_model."),
    "module._orig_mod.": prefixed("module._orig_mod."),
    "my_net.0.body.": prefixed("my_net.0.body."),
    "torch.compile of cells": compiled_in_parts,
    "thop": counted_by_thop,
    "an average of weights": lambda content: (
        prefixed("module.")(content) | {"n_averaged": torch.tensor(3)}
    ),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("write", [network_to_quark0, network_to_nni])
def test_files_of_other_codes_are_recognised(network, tmp_path, write, new_format, wrapping):
    content = WRAPPINGS[wrapping](write(network))
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=new_format)
    assert same(load_network(tmp_path / "w.pt"), network)
    assert load_network(tmp_path / "w.pt").details == {"inferred": "DARTS_V2"}


def test_a_genotype_of_nobodys_list_is_taken_from_the_caller(tmp_path):
    network = make(UNKNOWN)
    torch.save(network_to_quark0(network), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="sep_conv_5x5 .*give --genotype"):
        load_network(tmp_path / "w.pt")
    assert same(load_network(tmp_path / "w.pt", repr(UNKNOWN)), network)


def test_pytorchcvs_network_is_read_by_the_order_of_its_tensors(tmp_path):
    network = make(stem="imagenet", auxiliary=False, num_cells=4)
    content = {}
    for i, (key, tensor) in enumerate(network_to_quark0(network).items()):
        unit = f"stage1.unit{int(key.split('.')[1]) + 1}" if key.startswith("cells.") else "stem"
        content[f"features.{unit}.body.layer{i}.{key.rpartition('.')[2]}"] = tensor
    torch.save(content, tmp_path / "w.pt")
    assert same(load_network(tmp_path / "w.pt"), network)
    with pytest.raises(ValueError, match="w.pt: pytorchcv's network is DARTS_V2; leave --genotype"):
        load_network(tmp_path / "w.pt", "DARTS_V1")
    torch.save(WRAPPINGS["module."](content), tmp_path / "w.pt")
    assert same(load_network(tmp_path / "w.pt"), network)
    torch.save(dict(list(content.items())[:-1]), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="w.pt: state dict: "):
        load_network(tmp_path / "w.pt")


def test_of_many_keys_that_do_not_fit_the_first_are_named(network, tmp_path):
    torch.save(network_to_quark0(network), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r": \d+ keys do not fit: (missing [^;]*; ){6}\d+ more$"):
        load_network(tmp_path / "w.pt", "DARTS_V1")


class Hostile:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def rewritten(change, path="network.pt"):
    """Load our file, change its content, and write it again."""

    def spoil(folder):
        content = torch.load(folder / "network.pt", weights_only=True)
        change(content)
        torch.save(content, folder / path)
        return folder / path

    return spoil


def saved(make_content):
    def spoil(folder):
        torch.save(make_content(folder), folder / "w.pt")
        return folder / "w.pt"

    return spoil


def written(make_bytes):
    def spoil(folder):
        (folder / "w.pt").write_bytes(make_bytes((folder / "network.pt").read_bytes()))
        return folder / "w.pt"

    return spoil


def flipped(content, at):
    content = bytearray(content)
    content[at] ^= 0x10
    return bytes(content)


def zip_of_text(folder):
    with zipfile.ZipFile(folder / "w.pt", "w") as archive:
        archive.writestr("paper/readme.txt", "no weights here")
    return folder / "w.pt"


def torchscript(folder):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(folder / "w.pt"))
    return folder / "w.pt"


def numpy_archive(folder):
    np.savez(folder / "w.npz", a=np.zeros(3))
    return folder / "w.npz"


def quark0(change):
    def make_content(folder):
        content = network_to_quark0(make())
        change(content)
        return content

    return saved(make_content)


DEPTHWISE, POINTWISE = "cells.0._ops.0.op.1.weight", "cells.0._ops.0.op.2.weight"
BAD_FILES = {
    "missing": (lambda folder: folder / "none.pt", "neither a file nor one of"),
    "empty": (written(lambda _: b""), "damaged, or was not written by torch.save"),
    "truncated": (written(lambda b: b[: len(b) // 2]), "damaged, or was not"),
    "without its end": (written(lambda b: b[:-1]), "damaged, or was not"),
    "a flipped bit": (written(lambda b: flipped(b, len(b) // 2)), "damaged, or was not"),
    "a page of HTML": (written(lambda _: b"<!DOCTYPE html><p>404</p>"), "damaged, or was not"),
    "a picture": (written(lambda _: b"\x89PNG\r\n\x1a\n" + bytes(99)), "damaged, or was not"),
    "a zip of something else": (zip_of_text, "damaged, or was not"),
    "an array": (numpy_archive, "damaged, or was not"),
    "TorchScript": (torchscript, "damaged, or was not"),
    "a plain pickle": (written(lambda _: pickle.dumps({"a": 1})), "damaged, or was not"),
    "a pickled module": (saved(lambda _: torch.nn.Linear(2, 2)), r"Linear\).*model.state_dict\(\)"),
    "a pickled network": (saved(lambda _: make()), r"darts_min.network.Network\).*save_network\("),
    "tensors of ours alone": (saved(lambda _: make().state_dict()), "genotype: use save_network"),
    "tensors of ours, compiled": (
        saved(lambda _: prefixed("_orig_mod.")(make().state_dict())),
        "genotype: use save_network",
    ),
    "arguments beside it": (
        saved(lambda _: {"state_dict": {}, "args": argparse.Namespace()}),
        "argparse.Namespace",
    ),
    "code that would run": (saved(lambda f: {"a": Hostile(f / "trace")}), "system.*any code"),
    "a hostile pickle": (written(lambda _: pickle.dumps(Hostile("trace"), 2)), "damaged|any code"),
    "a number": (saved(lambda _: 3), "neither a network file nor a state dict"),
    "nothing in it": (saved(lambda _: {}), "neither a network file nor a state dict"),
    "numbers for tensors": (saved(lambda _: {"a": 1}), "'a' is not a tensor"),
    "another network": (
        saved(lambda _: torch.nn.Linear(2, 2).state_dict()),
        r"nor a state dict of the original code's or NNI's \(the first name is 'weight'\)",
    ),
    "two networks": (
        saved(lambda _: prefixed("model.", "ema.module.")(network_to_quark0(make()))),
        r"several networks, ema\.module\.\*, model\.\*; save the tensors of one",
    ),
    "a network and more": (
        saved(
            lambda _: prefixed("model.")(network_to_quark0(make())) | {"loss.bias": torch.zeros(1)}
        ),
        "unexpected loss.bias",
    ),
    "search weights": (
        saved(lambda _: supernet_to_quark0(Supernet(4, 4, 3, 2))[0]),
        "search weights .*supernet_from_quark0",
    ),
    "a NaN": (quark0(lambda c: c[POINTWISE].view(-1)[3].fill_(torch.nan)), "0.op.2.weight holds"),
    "an infinity in ours": (
        rewritten(lambda c: c["state_dict"]["classifier.bias"].fill_(torch.inf)),
        "classifier.bias holds values that are not finite",
    ),
    "a tensor that is less than it says": (
        quark0(lambda c: c.update({POINTWISE: torch.zeros(1, 1, 1, 1).expand(10**6, 10**6, 1, 1)})),
        "op.2.weight is not an ordinary tensor",
    ),
    "whole numbers": (
        quark0(lambda c: c.update({POINTWISE: torch.zeros(4, 4, 1, 1, dtype=torch.int64)})),
        "not an ordinary tensor of real numbers .torch.int64",
    ),
    "complex numbers": (
        quark0(lambda c: c.update({POINTWISE: torch.zeros(4, 4, 1, 1, dtype=torch.complex64)})),
        "not an ordinary tensor of real numbers .torch.complex64",
    ),
    "bytes that pretend to be numbers": (
        quark0(lambda c: c.update({POINTWISE: torch.zeros(4, 4, 1, 1).to(torch.float8_e5m2)})),
        "not an ordinary tensor of real numbers .torch.float8",
    ),
    "too few class names": (
        rewritten(lambda c: c["details"].update(classes=["a", "b", "c"])),
        "damaged: 3 classes for 10",
    ),
    "a slot far away": (
        quark0(lambda c: c.update({"cells.0._ops.999999999.op.1.weight": torch.zeros(())})),
        "operation 999999999",
    ),
    "a key renamed": (quark0(lambda c: c.update(colour=c.pop(POINTWISE))), f"missing {POINTWISE}"),
    "a wrong size": (
        quark0(lambda c: c.update({POINTWISE: torch.zeros(3, 3, 1, 1)})),
        r"shape \(3, 3, 1, 1\), not \(4, 4, 1, 1\)",
    ),
    "another kernel": (
        quark0(lambda c: c.update({DEPTHWISE: torch.zeros(4, 1, 5, 5)})),
        "no published genotype",
    ),
    "a part of ours missing": (rewritten(lambda c: c.pop("config")), "damaged: 'config'"),
    "a tensor of ours missing": (
        rewritten(lambda c: c["state_dict"].pop("classifier.bias")),
        "damaged: .*classifier.bias",
    ),
    "an unknown size": (rewritten(lambda c: c["config"].update(depth=3)), "damaged: .*depth"),
    "a billion cells": (rewritten(lambda c: c["config"].update(num_cells=10**9)), "1000000000"),
    "a billion channels": (
        rewritten(lambda c: c["config"].update(init_channels=10**9)),
        "damaged: init_channels 1000000000: must be at most",
    ),
    "other channels": (
        rewritten(lambda c: c["config"].update(init_channels=40)),
        "damaged: .*size mismatch",
    ),
    "a bad genotype": (rewritten(lambda c: c.update(genotype="import os")), "damaged: genotype"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_damaged_or_foreign_file_gives_one_clear_line(ours, kind, recwarn):
    spoil, says = BAD_FILES[kind]
    path = spoil(ours.parent)
    recwarn.clear()
    with pytest.raises(ValueError, match=says) as error:
        load_network(path)
    assert "\n" not in str(error.value) and path.name in str(error.value)
    assert "weights_only" not in str(error.value) and not recwarn.list
    assert not (ours.parent / "trace").exists() and not Path("trace").exists()


def test_every_flipped_bit_is_noticed(ours, tmp_path):
    content, original = ours.read_bytes(), load_file(ours)["state_dict"]
    for at in range(0, len(content), len(content) // 97):
        (tmp_path / "w.pt").write_bytes(flipped(content, at))
        try:
            loaded = load_network(tmp_path / "w.pt").state_dict()
        except ValueError:
            continue
        # Some bytes of a zip archive carry no information: names, dates, padding.
        assert all(torch.equal(tensor, original[key]) for key, tensor in loaded.items())


def test_a_file_comes_before_a_shipped_network_of_the_same_name(ours, monkeypatch):
    monkeypatch.chdir(ours.parent)
    ours.rename(names()[0])
    assert load_network(names()[0]).details == {"classes": list("abcdefghij")}
