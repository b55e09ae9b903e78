"""Evaluate a trained network: ours, the original code's or NNI's (see darts_min/convert.py).

    python eval_pretrained.py --demo                         # continues train_final.py --demo
    python eval_pretrained.py --dataset cifar10 --weights runs/final/network.pt
    python eval_pretrained.py --dataset cifar10 --weights cifar10_model.pt --genotype DARTS_V2

Prints accuracy, loss, the error of each class, parameters, multiply-adds and images per second.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch

from darts_min.checkpoint import (
    RunFolder,
    default_folder,
    load_file,
    load_network,
    newest_folder,
    versions,
)
from darts_min.convert import network_from_nni, network_from_quark0
from darts_min.data import DATASETS, Loader, balanced_subset, channel_statistics, load_dataset
from darts_min.device import AMP_CHOICES, choose_autocast, choose_device, choose_memory_format
from darts_min.evaluation import evaluate
from darts_min.genotypes import format_genotype, parse_genotype
from darts_min.network import Network, count_multiply_adds, count_parameters


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Evaluate a trained network on the test images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def error(message: str) -> None:
        raise ValueError(message)

    parser.error = error
    run = parser.add_argument_group("run")
    run.add_argument("--demo", action="store_true", help="offline, after train_final.py --demo")
    run.add_argument("--out-dir", help="run folder (default: runs/eval, or the next free number)")
    run.add_argument("--seed", type=int, default=0, help="of the synthetic data and --subset")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    run.add_argument("--amp", choices=AMP_CHOICES, default="auto", help="auto: bf16 on CUDA")
    run.add_argument("--channels-last", choices=("auto", "on", "off"), default="auto")
    run.add_argument("--fast-dev-run", action="store_true", help="two batches")
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=DATASETS, default="cifar10")
    data.add_argument("--data-dir", default="data", help="downloads, or the folder of images")
    data.add_argument("--image-size", type=int, help="default: that of the network's training")
    data.add_argument("--subset", type=int, help="use this many test images, class-balanced")
    data.add_argument("--batch-size", type=int, default=256)
    net = parser.add_argument_group("network")
    net.add_argument("--weights", help="a network file: ours, or a state dict of quark0's or NNI's")
    net.add_argument("--genotype", help="of a state dict, in any form")
    args = parser.parse_args(argv)
    if args.demo:
        parser.set_defaults(dataset="synthetic")  # an explicit flag still wins
        args = parser.parse_args(argv)
    if args.weights is None:
        if not args.demo:
            raise ValueError("--weights is needed: a network file")
        args.weights = str(newest_folder("runs/demo-final", "network.pt") / "network.pt")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: must be at least 0")
    return args


def read_network(path: str, genotype: str | None) -> Network:
    """Read a network file in whichever form it has."""
    content = load_file(path)
    if isinstance(content, dict) and content.get("format") == "darts_min.network":
        if genotype is not None:
            raise ValueError(f"file {path} has its own genotype; leave --genotype out")
        return load_network(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(torch.is_tensor(v) for v in content.values()):
        raise ValueError(f"file {path} is neither a network file nor a state dict")
    if genotype is None:
        raise ValueError(f"file {path} is a state dict without a genotype; give --genotype")
    is_nni = any(key.startswith("stages.") for key in content)
    convert = network_from_nni if is_nni else network_from_quark0
    network = convert(content, parse_genotype(genotype))
    network.details = {}
    return network


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    device = choose_device(args.device)
    autocast, _ = choose_autocast(args.amp, device)
    memory_format = choose_memory_format(args.channels_last, device)
    network = read_network(args.weights, args.genotype).float()
    details = network.details

    image_size = args.image_size or details.get("image_size")
    dataset = load_dataset(args.dataset, args.data_dir, image_size, args.seed)
    test, num_classes = dataset.test, len(dataset.classes)
    for what, of_data, of_network in (
        ("classes", num_classes, network.config["num_classes"]),
        ("channels", test.images.size(3), network.config["in_channels"]),
    ):
        if of_data != of_network:
            raise ValueError(
                f"dataset {args.dataset} has {of_data} {what}, the network of {args.weights} "
                f"{of_network}"
            )
    if "mean" in details:
        statistics = torch.tensor(details["mean"]), torch.tensor(details["std"])
    else:
        statistics = channel_statistics(dataset.train)  # as the other codes do
    if args.subset is not None:
        generator = torch.Generator().manual_seed(args.seed)
        test = balanced_subset(test, args.subset, generator)
    test = test.to(device)
    loader = Loader(test, args.batch_size, statistics, memory_format=memory_format)
    limit = 2 if args.fast_dev_run else None
    default = "runs/demo-eval" if args.demo else "runs/eval"
    run = RunFolder(args.out_dir or default_folder(default))

    network = network.to(device, memory_format=memory_format)
    started = time.perf_counter()
    evaluation = evaluate(network, itertools.islice(loader, limit), num_classes, autocast)
    seconds = time.perf_counter() - started
    image_size = test.images.size(1)
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
        "parameters_M": count_parameters(network) / 1e6,
        "multiply_adds_M": count_multiply_adds(network, image_size) / 1e6,
        "images_per_second": int(evaluation.class_sizes.sum()) / seconds,
        "genotype": format_genotype(network.genotype, "quark0"),
        "device": str(device),
        "versions": versions(),
        "args": vars(args),
        "out_dir": str(run.path),
    }
    run.log(f"{Path(args.weights)} on the {result['images']} test images of {args.dataset}")
    run.log(f"accuracy           {100 * result['accuracy']:.2f} %")
    run.log(f"loss               {result['loss']:.4f}")
    for name, error in result["class_errors"].items():
        run.log(f"  error of class {name:<12} {100 * error:.1f} %")
    run.log(f"parameters         {result['parameters_M']:.3f} M (without the auxiliary head)")
    run.log(f"multiply-adds      {result['multiply_adds_M']:.1f} M")
    run.log(f"images per second  {result['images_per_second']:.0f} on {device}")
    run.save_text("genotype.json", format_genotype(network.genotype, "json") + "\n")
    run.save_json("result.json", result)
    run.log(f"result: {run / 'result.json'}")
    return result


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"eval_pretrained.py: error: {error}", file=sys.stderr)
        sys.exit(2)
