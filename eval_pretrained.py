"""Use a trained network: the shipped one, ours, the original code's or NNI's.

    python eval_pretrained.py --demo                         # classify a few drawings, offline
    python eval_pretrained.py --image cat.jpg dog.jpg        # the five most likely classes of each
    python eval_pretrained.py                                # the shipped network on CIFAR-10
    python eval_pretrained.py --weights cifar10_model.pt     # another file, whichever form it has
    python eval_pretrained.py --weights runs/final --export exported

On a dataset, prints accuracy, loss, the error of each class, parameters, multiply-adds and images
per second.
"""

import argparse
import itertools
import sys
import time

import numpy as np
import torch
from PIL import Image, ImageDraw

from darts_min.convert.export import export_network
from darts_min.convert.genotype_texts import format_genotype
from darts_min.convert.weights import load_network
from darts_min.data.datasets import (
    DATASETS,
    IN_MEMORY,
    Images,
    Loader,
    balanced_subset,
    channel_statistics,
    load_dataset,
    make_loader,
)
from darts_min.data.folder import read_image
from darts_min.genotypes import name_unused_nodes
from darts_min.judge.cost import count_multiply_adds, count_parameters, forecast
from darts_min.network import Network, fold_batch_norm
from darts_min.run.evaluation import evaluate
from darts_min.run.flags import check_ranges, parse_flags, refuse_unused
from darts_min.run.machine import AMP_CHOICES, choose_autocast, choose_device, choose_memory_format
from darts_min.run.open import free_folder
from darts_min.run.run_folder import Patient, RunFolder, versions

SHIPPED = "s2_c16_l8_cifar10"
PICTURES = {"weights", "genotype", "device", "image_size", "batch_size"}
# The arguments that are used when no dataset is evaluated.
USED_BY = {
    "demo": PICTURES,
    "image": PICTURES,
    "export": {"weights", "genotype", "device", "image_size"},
}
ONLY_WITH = {"in_memory": ("dataset", "folder"), "num_workers": ("dataset", "folder")}
# The images that the other codes train on, by stem.
ORIGINAL = {
    "cifar": {
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "image_size": 32,
        "crop": False,
    },
    "imagenet": {
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "image_size": 224,
        "crop": True,
    },
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Evaluate a trained network on the test images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    run = parser.add_argument_group("run")
    run.add_argument("--demo", action="store_true", help="classify drawings made here; offline")
    run.add_argument("--image", nargs="+", metavar="FILE", help="classify these pictures instead")
    run.add_argument("--export", metavar="DIR", help="write the network in other forms instead")
    run.add_argument("--out-dir", help="run folder (default: runs/eval, or the next free number)")
    run.add_argument("--seed", type=int, default=0, help="of the synthetic data and --subset")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    run.add_argument("--amp", choices=AMP_CHOICES, default="auto", help="auto: bf16 if on the GPU")
    run.add_argument("--channels-last", choices=("auto", "on", "off"), default="auto", help="NHWC")
    run.add_argument("--fast-dev-run", action="store_true", help="two batches")
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=DATASETS, default="cifar10", help="what to learn")
    data.add_argument("--data-dir", default="data", help="downloads, or the folder of images")
    data.add_argument("--image-size", type=int, help="default: that of the network's training")
    data.add_argument("--in-memory", choices=IN_MEMORY, default="auto", help="folder's images")
    data.add_argument("--num-workers", type=int, default=4, help="read images not in memory")
    data.add_argument("--subset", type=int, help="use this many test images, class-balanced")
    data.add_argument("--batch-size", type=int, default=256, help="images")
    net = parser.add_argument_group("network")
    net.add_argument("--weights", default=SHIPPED, help="a name, a network file of any form, a run")
    net.add_argument("--genotype", help="of a state dict, where it is not recognised")
    args, given = parse_flags(parser, argv, lambda args: {})
    check_ranges(vars(args))
    refuse_unused(args, given, ONLY_WITH)
    modes = [name for name in USED_BY if getattr(args, name)]
    if len(modes) > 1:
        raise ValueError(f"{' and '.join(f'--{name}' for name in modes)}: one at a time")
    for mode in modes:
        for name in sorted(given - USED_BY[mode] - {mode}):
            raise ValueError(f"--{name.replace('_', '-')}: not with --{mode}, which ignores it")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    device = choose_device(args.device)
    network = load_network(args.weights, args.genotype)
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
        return classify_pictures(network, args, device)
    return evaluate_on_dataset(network, args, device)


def export(network: Network, args: argparse.Namespace) -> dict:
    """Write the network in every form, checked."""
    details = ORIGINAL[network.config["stem"]] | network.details
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
def classify_pictures(network: Network, args: argparse.Namespace, device: torch.device) -> dict:
    """Print the five most likely classes of each picture; write no file."""
    details = ORIGINAL[network.config["stem"]] | network.details
    size, num_classes = args.image_size or details["image_size"], network.config["num_classes"]
    if network.config["in_channels"] != 3:
        raise ValueError(f"network {args.weights} does not take pictures in colour")
    if args.image:
        pictures = {path: read_image(path, size, details["crop"]) for path in args.image}
    else:
        pictures = {
            name: np.asarray(picture.resize((size, size), Image.Resampling.BOX))
            for name, picture in drawings().items()
        }
    images = torch.from_numpy(np.stack(list(pictures.values()))).to(device)
    statistics = torch.tensor(details["mean"]), torch.tensor(details["std"])
    labels = torch.zeros(len(images), dtype=torch.long, device=device)
    loader = Loader(Images(images, labels), args.batch_size, statistics)
    folded = fold_batch_norm(network).to(device)
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


def drawings() -> dict[str, Image.Image]:
    """Draw a few things that CIFAR-10 has classes for."""
    sky, sea, road, white = (150, 190, 230), (40, 80, 120), (110, 110, 110), (235, 235, 235)
    result = {}

    def canvas(name: str, upper: tuple[int, int, int], lower: tuple[int, int, int], horizon: int):
        image = Image.new("RGB", (256, 256), upper)
        result[f"drawing of {name}"] = image
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, horizon, 256, 256), lower)
        return draw

    draw = canvas("an airplane", sky, sky, 256)
    draw.polygon([(120, 120), (90, 210), (110, 210), (160, 125)], (180, 180, 190))
    draw.polygon([(120, 115), (100, 60), (115, 60), (155, 112)], (190, 190, 200))
    draw.ellipse((30, 100, 226, 138), white)
    draw.polygon([(40, 115), (20, 70), (40, 70), (75, 108)], white)

    draw = canvas("a ship", sky, sea, 160)
    draw.polygon([(30, 140), (226, 140), (200, 190), (55, 190)], (60, 40, 40))
    draw.rectangle((90, 95, 180, 140), white)
    draw.rectangle((120, 60, 145, 95), (200, 60, 50))

    draw = canvas("an automobile", (200, 205, 210), road, 180)
    draw.polygon([(70, 120), (95, 80), (165, 80), (195, 120)], (120, 20, 20))
    draw.rounded_rectangle((25, 115, 235, 180), 18, (190, 30, 30))
    draw.polygon([(85, 115), (102, 90), (128, 90), (128, 115)], (60, 80, 100))
    draw.polygon([(135, 115), (135, 90), (160, 90), (178, 115)], (60, 80, 100))
    for x in (75, 185):
        draw.ellipse((x - 25, 155, x + 25, 205), (20, 20, 20))
        draw.ellipse((x - 10, 170, x + 10, 190), (150, 150, 150))
    return result


def evaluate_on_dataset(network: Network, args: argparse.Namespace, device: torch.device) -> dict:
    autocast, _ = choose_autocast(args.amp, device)
    memory_format = choose_memory_format(args.channels_last, device)
    details = network.details
    if network.config["stem"] == "imagenet":
        details = ORIGINAL["imagenet"] | details
    image_size = args.image_size or details.get("image_size")
    dataset = load_dataset(
        args.dataset,
        args.data_dir,
        image_size,
        args.seed,
        args.in_memory,
        device,
        details.get("crop", False),
    )
    test, num_classes = dataset.test, len(dataset.classes)
    for what, of_data, of_network in (
        ("classes", num_classes, network.config["num_classes"]),
        ("channels", test.channels, network.config["in_channels"]),
    ):
        if of_data != of_network:
            raise ValueError(
                f"dataset {args.dataset} has {of_data} {what}, the network of {args.weights} "
                f"{of_network}"
            )
    for of_data, of_network in zip(dataset.classes, details.get("classes", ()), strict=False):
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
        device=device,
        image_size=image_size,
        num_workers=args.num_workers,
        memory_format=memory_format,
        crop=details.get("crop", False),
    )
    parameters = count_parameters(network) / 1e6
    multiply_adds = count_multiply_adds(network, loader.image_size) / 1e6
    limit = 2 if args.fast_dev_run else None
    run = RunFolder(args.out_dir or free_folder("runs/eval"))

    folded = fold_batch_norm(network).to(device, memory_format=memory_format)
    run.log(
        f"{args.weights}: {parameters:.3f} M parameters (without the auxiliary head), "
        f"{multiply_adds:.1f} M multiply-adds"
    )
    steps = limit or len(loader)
    started = time.perf_counter()
    batches = forecast(itertools.islice(loader, limit), steps, run.log, steps)
    evaluation = evaluate(folded, batches, num_classes, autocast)
    seconds = time.perf_counter() - started
    result = {
        "accuracy": evaluation.accuracy,
        "loss": evaluation.loss,
        "images": int(evaluation.class_sizes.sum()),
        "class_errors": {
            name: int(errors) / max(1, int(size))
            for name, errors, size in zip(
                dataset.classes, evaluation.class_errors, evaluation.class_sizes, strict=True
            )
        },
        "parameters_M": parameters,
        "multiply_adds_M": multiply_adds,
        "images_per_second": int(evaluation.class_sizes.sum()) / seconds,
        "genotype": format_genotype(network.genotype, "quark0"),
        "device": str(device),
        "versions": versions(),
        "args": vars(args),
        "out_dir": str(run.path),
    }
    run.log(f"{result['images']} test images of {args.dataset}:")
    run.log(f"accuracy           {100 * result['accuracy']:.2f} %")
    run.log(f"loss               {result['loss']:.4f}")
    for name, error in result["class_errors"].items():
        run.log(f"  error of class {name:<12} {100 * error:.1f} %")
    run.log(f"images per second  {result['images_per_second']:.0f} on {device}")
    run.save_text("genotype.json", format_genotype(network.genotype, "json") + "\n")
    run.save_json("result.json", result)
    run.log(f"result: {run / 'result.json'}")
    run.check_written()
    return result


if __name__ == "__main__":
    sys.stdout = Patient(sys.stdout)  # `| head` may go away before the last line
    try:
        main()
    except ValueError as error:
        print(f"eval_pretrained.py: error: {error}", file=sys.stderr)
        sys.exit(2)
