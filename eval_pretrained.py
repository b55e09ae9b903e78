"""Use a trained network: the shipped one, ours, the original code's or NNI's.

    python eval_pretrained.py --demo                         # classify a few drawings, offline
    python eval_pretrained.py --image cat.jpg dog.jpg        # the five most likely classes of each
    python eval_pretrained.py                                # the shipped network on CIFAR-10
    python eval_pretrained.py --weights cifar10_model.pt     # another file, whichever form it has
    python eval_pretrained.py --weights runs/final --export exported
    python eval_pretrained.py --judge DARTS_V2 runs/search random:0  # cells, without training

On a dataset, prints accuracy, loss, the error of each class, parameters, multiply-adds and images
per second.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import darts_min.convert
from darts_min.convert.export import export_network
from darts_min.convert.genotype_texts import format_genotype, read_genotype
from darts_min.convert.weights import load_network
from darts_min.data import (
    Dataset,
    FileLoader,
    Images,
    Loader,
    balanced_subset,
    channel_statistics,
    load_dataset,
    make_loader,
    read_image,
)
from darts_min.data.folder import GREY
from darts_min.genotypes import name_unused_nodes
from darts_min.judge.cost import count_multiply_adds, count_parameters
from darts_min.judge.estimate import Estimate
from darts_min.judge.report import MEANING, describe, expected_of
from darts_min.network import Network, fold_batch_norm
from darts_min.run import flags
from darts_min.run.evaluation import evaluate
from darts_min.run.interrupts import LenientStream
from darts_min.run.machine import Machine
from darts_min.run.progress import forecast
from darts_min.run.run_folder import RunFolder, free_folder, versions

SHIPPED = "s2_c16_l8_cifar10"
# Three drawings of 256x256 pixels, side by side, for --demo.
DRAWINGS = Path(darts_min.convert.__file__).parent / "pretrained" / "drawings.png"
DRAWN = ("an airplane", "a ship", "an automobile")
PICTURES = {"weights", "genotype", "device", "image_size", "batch_size"}
# The arguments that are used when no dataset is evaluated.
USED_BY = {"demo": PICTURES, "image": PICTURES, "export": PICTURES - {"batch_size"}}
USED_BY |= {"judge": set()}
# The images that the other codes train on, by stem.
CIFAR = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), image_size=32, crop=False)
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), image_size=224, crop=True)
ORIGINAL = {"cifar": CIFAR, "imagenet": IMAGENET}


def parse_args(argv: list[str] | None, has_own_dataset: bool = False) -> argparse.Namespace:
    parser = flags.make_parser("Evaluate a trained network on the test images.")
    demo = "classify three drawings instead of a dataset, offline"
    add = flags.add_run_flags(parser, "runs/eval", demo)
    add("--image", nargs="+", metavar="FILE", help="classify these pictures instead of a dataset")
    add("--export", metavar="DIR", help="write the network in other forms instead of using it")
    add(
        "--judge",
        nargs="+",
        metavar="CELL",
        help="say how good these cells are expected to be: names, random:SEED, files, run folders",
    )
    size = "the size of the network's training images"
    add = flags.add_data_flags(parser, batch_size=256, subset="test", image_size=size)
    flags.add_file_flags(add)
    add = parser.add_argument_group("network").add_argument
    add(
        "--weights",
        default=SHIPPED,
        help="network: the name of one that ships, a file of any form, or a run folder",
    )
    add("--genotype", help="the cell of a state dict from which it cannot be recognised")
    args, given = flags.parse_flags(
        parser, argv, lambda args: {}, flags.FOLDER_ONLY, has_own_dataset
    )
    modes = [name for name in USED_BY if getattr(args, name)]
    if len(modes) > 1:
        raise ValueError(f"{' and '.join(map(flags.flag, modes))}: one at a time")
    for mode in modes:
        for name in sorted(given - USED_BY[mode] - {mode}):
            raise ValueError(f"{flags.flag(name)}: not with --{mode}, which ignores it")
    return args


def main(argv: list[str] | None = None, dataset: Dataset | None = None) -> dict:
    """Evaluate as `argv` says; `dataset`, in memory, takes the place of --dataset."""
    args = parse_args(argv, dataset is not None)
    if args.judge:
        return judge(args.judge)
    machine = Machine(args.device, args.amp, args.channels_last)
    network = load_network(args.weights, args.genotype)
    if args.genotype is not None and (note := read_genotype(args.genotype)[1]):
        print(f"genotype: {note}")
    if "inferred" in network.details:
        print(
            f"genotype {network.details['inferred']}, inferred from the operations; if the cell is "
            "another one, give --genotype"
        )
    for line in name_unused_nodes(network.genotype):
        print(line)
    if args.export is not None:
        return export(network, args)
    if args.demo or args.image:
        return classify_pictures(network, args, machine)
    return evaluate_on_dataset(network, args, machine, dataset)


def judge(sources: list[str]) -> dict:
    """Print how good cells are expected to be, the best first; write no file."""
    read = {source: read_genotype(source) for source in sources}
    genotypes = {source: genotype for source, (genotype, _) in read.items()}
    for source, (_, note) in read.items():
        if note:
            print(f"{source}: {note}")
    result = {source: expected_of(genotype) for source, genotype in genotypes.items()}
    print(MEANING)
    for source in sorted(genotypes, key=lambda s: -(result[s] or {"accuracy": 0})["accuracy"]):
        network = Network(genotypes[source], auxiliary=False)
        estimate = None if result[source] is None else Estimate(**result[source])
        print(
            f"{source:<{max(map(len, sources))}}  {describe(estimate)}; "
            f"{count_parameters(network) / 1e6:.2f} M parameters with 36 channels and 20 cells"
        )
    return result


def details_of(network: Network) -> dict:
    """Return the details of a network, or those of the images that other codes train on.

    Their mean and standard deviation are those of RGB images. A network of one channel gets those
    of grey images, one of other channels gets none.
    """
    original, channels = dict(ORIGINAL[network.config["stem"]]), network.config["in_channels"]
    for name in ("mean", "std"):
        if channels == 1:
            original[name] = [float(torch.tensor(original[name]) @ GREY)]
        elif channels != 3:
            del original[name]
    return original | network.details


def export(network: Network, args: argparse.Namespace) -> dict:
    """Write the network in every form, checked."""
    details = details_of(network)
    image_size = args.image_size or details["image_size"]
    try:
        result = export_network(network, args.export, image_size, details)
    except (OSError, RuntimeError) as error:
        raise SystemExit(
            f"eval_pretrained.py: error: {error}; what is in {args.export} is useless, remove it"
        ) from None
    for name, file in result["files"].items():
        checked = "" if file["deviation"] is None else f"  logits differ by {file['deviation']:.1e}"
        print(f"{name:<22} {file['bytes'] / 1e6:7.3f} MB{checked}")
    for name, reason in result["left_out"].items():
        print(f"{name:<22} left out: {reason}")
    print(f"written to {args.export} and checked")
    return result


@torch.no_grad()
def classify_pictures(network: Network, args: argparse.Namespace, machine: Machine) -> dict:
    """Print the five most likely classes of each picture; write no file."""
    details = details_of(network)
    size, num_classes = args.image_size or details["image_size"], network.config["num_classes"]
    channels = network.config["in_channels"]
    if channels not in (1, 3):
        raise ValueError(f"network {args.weights} takes images of {channels} channels, no pictures")
    if args.image:
        pictures = {path: read_image(path, size, details["crop"], channels) for path in args.image}
    else:
        pictures = {}
        for i, name in enumerate(DRAWN):
            drawing = Image.open(DRAWINGS).crop((256 * i, 0, 256 * (i + 1), 256))
            drawing = drawing.resize((size, size), Image.Resampling.BOX)
            drawing = np.asarray(drawing.convert("RGB" if channels == 3 else "L"))
            pictures[f"drawing of {name}"] = drawing.reshape(size, size, channels)
    images = torch.from_numpy(np.stack(list(pictures.values()))).to(machine.device)
    statistics = torch.tensor(details["mean"]), torch.tensor(details["std"])
    labels = torch.zeros(len(images), dtype=torch.long, device=machine.device)
    loader = Loader(Images(images, labels), args.batch_size, statistics)
    folded = fold_batch_norm(network).to(machine.device)
    probabilities = torch.cat([folded(x).softmax(1) for x, _ in loader])
    classes = details.get("classes") or [f"class {i}" for i in range(num_classes)]
    result = {}
    for name, row in zip(pictures, probabilities, strict=True):
        values, indices = row.topk(min(5, num_classes))
        pairs = zip(indices.tolist(), values.tolist(), strict=True)
        result[name] = {classes[i]: value for i, value in pairs}
        likely = ", ".join(f"{kind} {100 * value:.1f} %" for kind, value in result[name].items())
        print(f"{name}: {likely}")
    return result


def load_test_images(
    network: Network, args: argparse.Namespace, machine: Machine, dataset: Dataset | None
) -> tuple[Dataset, Loader | FileLoader]:
    """Return the dataset, and a loader of its test images as the network was trained on them.

    Raises ValueError if the network has other classes or another number of channels.
    """
    details = network.details
    if network.config["stem"] == "imagenet":
        details = details_of(network)
    image_size, crop = args.image_size or details.get("image_size"), details.get("crop", False)
    if dataset is None:
        where = args.dataset, args.data_dir, image_size, args.seed, args.in_memory, machine.device
        is_grey = args.dataset == "folder" and network.config["in_channels"] == 1
        channels = args.channels or (1 if is_grey else None)
        dataset = load_dataset(*where, crop, channels=channels)
    test, classes = dataset.test, dataset.classes
    for what, of_data, of_network in (
        ("classes", len(classes), network.config["num_classes"]),
        ("channels", test.channels, network.config["in_channels"]),
    ):
        if of_data != of_network:
            raise ValueError(
                f"dataset {args.dataset} has {of_data} {what}, the network of {args.weights} "
                f"{of_network}"
            )
    for of_data, of_network in zip(classes, details.get("classes", ()), strict=False):
        if of_data != of_network:
            raise ValueError(
                f"dataset {args.dataset} has class {of_data!r} where the network of "
                f"{args.weights} has {of_network!r}"
            )
    if "mean" in details:
        statistics = torch.tensor(details["mean"]), torch.tensor(details["std"])
    else:
        statistics = channel_statistics(dataset.train)  # as the other codes do
    if args.subset is not None:
        test = balanced_subset(test, args.subset, torch.Generator().manual_seed(args.seed))
    loader = make_loader(
        test,
        args.batch_size,
        statistics,
        device=machine.device,
        image_size=image_size,
        num_workers=args.num_workers,
        memory_format=machine.memory_format,
        crop=crop,
    )
    return dataset, loader


def evaluate_on_dataset(
    network: Network, args: argparse.Namespace, machine: Machine, dataset: Dataset | None
) -> dict:
    """Evaluate the network on the test images; write a run folder."""
    dataset, loader = load_test_images(network, args, machine, dataset)
    classes = dataset.classes
    parameters = count_parameters(network) / 1e6
    multiply_adds = count_multiply_adds(network, loader.image_size) / 1e6
    limit = 2 if args.fast_dev_run else None
    run = RunFolder(args.out_dir or free_folder("runs/eval"), machine=machine)
    run.log(
        f"{args.weights}: {parameters:.3f} M parameters (without the auxiliary head), "
        f"{multiply_adds:.1f} M multiply-adds"
    )
    for note in dataset.notes:
        run.log(note)
    folded = fold_batch_norm(network).to(machine.device, memory_format=machine.memory_format)
    steps = limit or len(loader)
    started = time.perf_counter()
    batches = forecast(itertools.islice(loader, limit), steps, run.log, steps)
    evaluation = evaluate(folded, batches, len(classes), machine.autocast)
    seconds = time.perf_counter() - started
    sizes, errors = evaluation.class_sizes.tolist(), evaluation.class_errors.tolist()
    result = {
        "accuracy": evaluation.accuracy,
        "loss": evaluation.loss,
        "images": int(sum(sizes)),
        "class_errors": {
            name: wrong / max(1, size)
            for name, wrong, size in zip(classes, errors, sizes, strict=True)
        },
        "parameters_M": parameters,
        "multiply_adds_M": multiply_adds,
        "images_per_second": int(sum(sizes)) / seconds,
        "genotype": format_genotype(network.genotype, "quark0"),
        "device": str(machine.device),
        "versions": versions(),
        "args": vars(args),
        "out_dir": str(run.path),
    }
    run.log(f"{result['images']} test images of {args.dataset}:")
    run.log(f"accuracy           {100 * result['accuracy']:.2f} %")
    run.log(f"loss               {result['loss']:.4f}")
    for name, error in result["class_errors"].items():
        run.log(f"  error of class {name:<12} {100 * error:.1f} %")
    run.log(f"images per second  {result['images_per_second']:.0f} on {machine.device}")
    run.save_text("genotype.json", format_genotype(network.genotype, "json") + "\n")
    run.save_json("result.json", result)
    run.log(f"result: {run / 'result.json'}")
    run.check_written()
    return result


if __name__ == "__main__":
    sys.stdout = LenientStream(sys.stdout)  # `| head` may go away before the last line
    flags.run_as_script("eval_pretrained.py", main)
