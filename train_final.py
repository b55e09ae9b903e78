"""Train the network built from a genotype (DARTS, arXiv 1806.09055, Sec. 3.2 and A.2.1).

    python train_final.py --demo                             # continues train_search.py --demo
    python train_final.py --dataset cifar10 --genotype runs/search
    python train_final.py --dataset cifar10 --genotype DARTS_V2
    python train_final.py --dataset folder --data-dir DIR --genotype DARTS_V2 --recipe imagenet
    python train_final.py --dataset folder --data-dir DIR --init-from darts_v2_c16_l8_cifar10

Expected on CIFAR-10 (paper, not run here): DARTS_V2, 36 channels, 20 cells, 600 epochs, cutout:
2.76 +- 0.09 % test error, 1.5 days on a GTX 1080 Ti. README has what was run here.
"""

import argparse
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from darts_min.convert.genotype_texts import format_genotype, parse_genotype, read_genotype
from darts_min.convert.weights import load_network, save_network
from darts_min.data import (
    Dataset,
    FileLoader,
    ImageFiles,
    Images,
    Loader,
    balanced_subset,
    channel_statistics,
    load_dataset,
    make_loader,
    split_half,
)
from darts_min.draw import draw_cell
from darts_min.genotypes import name_unused_nodes, unused_states
from darts_min.judge.cost import check_cost, count_multiply_adds, count_parameters
from darts_min.judge.estimate import estimate_accuracy
from darts_min.judge.report import MEANING, describe
from darts_min.network import Network
from darts_min.run import flags
from darts_min.run.evaluation import Evaluation, evaluate
from darts_min.run.flags import AMOUNT, COUNT_OR_0, POSITIVE, SHARE, number
from darts_min.run.machine import Machine
from darts_min.run.progress import Progress
from darts_min.run.run_folder import RunFolder, markdown_table, newest_folder, open_run
from darts_min.run.schedules import SCHEDULES
from darts_min.run.step import Step, make_w_step

Statistics = tuple[Tensor, Tensor]  # mean and standard deviation of each channel, (C,)

DEMO = dict(dataset="synthetic", image_size=16, subset=2000, batch_size=32, epochs=6)
DEMO |= dict(init_channels=8, num_cells=3, cutout=4, w_lr=0.05)
NO_TRICKS = dict(cutout=0, auxiliary_weight=0.0, drop_path_prob=0.0)
SMALL = dict(init_channels=16, num_cells=8)
# NNI's tutorial, first run: none of the tricks; 89.69 % with its cell (NNI_PLAIN).
PLAIN = SMALL | NO_TRICKS | dict(epochs=100, w_optimizer="adam", w_lr=1e-3, w_lr_min=1e-3)
PLAIN |= dict(w_weight_decay=1e-4, w_grad_clip=0.0)
# A small network in few epochs. The cards of the shipped networks say what theirs had besides.
QUICK = SMALL | NO_TRICKS | dict(epochs=20, batch_size=128, w_lr=0.1, w_schedule="one-cycle")
# The original code's train_imagenet.py.
IMAGENET = dict(dataset="folder", image_size=224, in_memory="never", stem="imagenet")
IMAGENET |= dict(init_channels=48, num_cells=14, epochs=250, batch_size=128, w_lr=0.1)
IMAGENET |= dict(w_schedule="exponential", w_weight_decay=3e-5, label_smoothing=0.1)
IMAGENET |= dict(cutout=0, drop_path_prob=0.0)
RECIPES = {"darts": {}, "plain": PLAIN, "quick": QUICK, "imagenet": IMAGENET}
SIZES = ("init_channels", "num_cells", "stem")
# Flags that one choice alone uses: the argument that chooses, and its values.
ONLY_WITH = flags.FOLDER_ONLY | {
    "w_lr_min": ("w_schedule", "cosine"),
    "w_lr_decay": ("w_schedule", "exponential"),
    "w_momentum": ("w_optimizer", "sgd"),
}


def parse_args(argv: list[str] | None, has_own_dataset: bool = False) -> argparse.Namespace:
    # fmt: off
    parser = flags.make_parser("Train the network built from a genotype.")
    add = flags.add_run_flags(parser, "runs/final", demo="train the cell of the search's demo")
    flags.add_training_flags(add)
    add("--recipe", choices=RECIPES, default="darts",
        help=flags.RECIPE_HELP + "; quick: one-cycle, 20 epochs; imagenet: the original code's")
    add("--sync-bn", action="store_true", help="compute BN over all processes (CUDA only)")
    add = flags.add_data_flags(parser, batch_size=96, subset="training")
    flags.add_file_flags(add)
    flags.add_grad_accum_flag(add)
    add("--holdout", action="store_true",
        help="train on half of the training images and test on the other half")
    add("--cutout", type=COUNT_OR_0, default=16, help="side of the cutout square in pixels; 0: off")
    add = parser.add_argument_group("network").add_argument
    flags.add_size_flags(add, init_channels=36, num_cells=20)
    add("--genotype", help="cell to train: a published name, a run folder, a file or text")
    add("--init-from", metavar="FILE",
        help="fine-tune this network: a file, a run folder, or the name of one that ships")
    add("--freeze-features", action="store_true", help="train the classifier alone")
    add("--auxiliary-weight", type=AMOUNT, default=0.4,
        help="weight of the auxiliary head's loss; 0: no head")
    add("--drop-path-prob", type=SHARE, default=0.2,
        help="probability of dropping an edge; epoch e of E uses (e - 1) / E of it")
    add("--max-params", type=POSITIVE,
        help="refuse a network of more parameters than this, in millions")
    add("--max-madds", type=POSITIVE,
        help="refuse a network of more multiply-adds than this, in millions")
    add = flags.add_optimizer_flags(parser, epochs=600, w_lr_min=0.0)
    add("--w-schedule", choices=SCHEDULES, default="cosine", help="schedule of the learning rate")
    add("--w-lr-decay", type=number(float, "(0, 1]"), default=0.97,
        help="exponential: factor of the learning rate in each epoch")
    add("--label-smoothing", type=SHARE, default=0.0, help="label smoothing of the training loss")
    # fmt: on

    def presets(args: argparse.Namespace) -> dict:
        result = RECIPES[args.recipe] | (DEMO if args.demo else {})
        if args.init_from is not None:  # the sizes are the file's; a fifth of the learning rate
            for name in ("w_lr", "w_lr_min"):
                result[name] = result.get(name, parser.get_default(name)) / 5
            result |= dict.fromkeys(SIZES)
        if args.freeze_features:
            result |= {"auxiliary_weight": 0.0, "drop_path_prob": 0.0}
        return result

    args, _ = flags.parse_flags(parser, argv, presets, ONLY_WITH, has_own_dataset)
    check_together(args)
    if args.fast_dev_run:
        args.epochs = 1
    if args.genotype is None and args.init_from is None:
        if not args.demo:
            raise ValueError("--genotype is needed: a published name, a run folder, file or text")
        args.genotype = str(newest_folder("runs/demo-search", "genotype.json"))
    return args


def check_together(args: argparse.Namespace) -> None:
    """Raise a ValueError that names arguments which exclude each other."""
    if args.init_from is not None:
        for name in SIZES:
            if (value := getattr(args, name)) is not None:
                raise ValueError(
                    f"{flags.flag(name)} {value}: leave it out, --init-from has its own"
                )
    elif args.freeze_features:
        raise ValueError("--freeze-features needs --init-from: random features would be useless")
    if args.freeze_features and (args.auxiliary_weight or args.drop_path_prob):
        raise ValueError("--freeze-features: --auxiliary-weight and --drop-path-prob must be 0")
    if args.auxiliary_weight and args.batch_size == args.grad_accum:
        raise ValueError(
            f"--batch-size {args.batch_size} --grad-accum {args.grad_accum}: the BN of the "
            "auxiliary head needs two images at a time; --auxiliary-weight 0 leaves the head out"
        )
    if args.w_schedule == "cosine" and args.w_lr_min > args.w_lr:
        raise ValueError(f"--w-lr-min {args.w_lr_min}: must be at most --w-lr, {args.w_lr}")


def train_epoch(
    model: nn.Module,
    batches: Iterable,
    step: Step,
    machine: Machine,
    grad_accum: int = 1,
    auxiliary_weight: float = 0.0,
    label_smoothing: float = 0.0,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Train on `batches`; yield (loss, logits, target), the loss without the auxiliary one."""
    loss_fn = partial(F.cross_entropy, label_smoothing=label_smoothing)
    for batch in batches:
        step.zero_grad()
        mean_objective, outputs = 0.0, []
        parts = list(zip(*(t.chunk(grad_accum) for t in batch), strict=True))
        for i, (x, target) in enumerate(parts):
            is_last = i == len(parts) - 1
            with nullcontext() if is_last else machine.without_averaging(model):
                with machine.autocast():
                    output = model(x)
                    logits, aux_logits = output if auxiliary_weight else (output, None)
                    objective = loss = loss_fn(logits, target)
                    if auxiliary_weight:
                        objective = loss + auxiliary_weight * loss_fn(aux_logits, target)
                step.scale(objective / grad_accum).backward()
            mean_objective = mean_objective + objective.detach() / grad_accum
            outputs.append((loss.detach(), logits.detach(), target))
        if step(loss=mean_objective):
            yield from outputs


def load_images(
    args: argparse.Namespace, dataset: Dataset | None, machine: Machine, base: Network | None
) -> tuple[Dataset, Images | ImageFiles, Statistics, Loader | FileLoader, Loader | FileLoader]:
    """Return the dataset, its training images, their statistics, loaders for training and test.

    The images have the size and the statistics of those that `base` was trained on.
    """
    details = {} if base is None else base.details
    image_size = args.image_size or details.get("image_size")
    if dataset is None:
        where = args.dataset, args.data_dir, image_size, args.seed, args.in_memory, machine.device
        with machine.first_alone():
            dataset = load_dataset(*where, channels=args.channels)
    train, test = dataset.train, dataset.test
    if base is not None and train.channels != base.config["in_channels"]:
        raise ValueError(
            f"--init-from {args.init_from} takes images of {base.config['in_channels']} channels, "
            f"{args.dataset} has {train.channels}"
        )
    if args.subset is not None:
        train = balanced_subset(train, args.subset, torch.Generator().manual_seed(args.seed))
    if args.holdout:  # Sec. 3.2: cells are chosen without a look at the test images
        if isinstance(train, ImageFiles):
            raise ValueError("--holdout: needs the images in memory (--in-memory always)")
        train, test = split_half(train, torch.Generator().manual_seed(args.seed))
    statistics = channel_statistics(train)
    if "mean" in details:
        statistics = torch.tensor(details["mean"]), torch.tensor(details["std"])
    loaders = [
        make_loader(
            part,
            args.batch_size,
            statistics,
            device=machine.device,
            image_size=image_size,
            seed=args.seed,
            augment=part is train,
            cutout=args.cutout,
            num_workers=args.num_workers,
            memory_format=machine.memory_format,
            shard=machine.shard,
        )
        for part in (train, test)
    ]
    return dataset, train, statistics, *loaders


def make_network(
    args: argparse.Namespace,
    base: Network | None,
    train: Images | ImageFiles,
    classes: list[str],
    image_size: int,
) -> tuple[Network, list[str]]:
    """Make the network, with the weights of `base` if given; return it and lines about it.

    Raises ValueError if the network costs more than --max-params or --max-madds allow.
    """
    second_bn = None  # NNI's auxiliary head has one more
    if base is not None and base.config["auxiliary"] and args.auxiliary_weight:
        second_bn = base.config["auxiliary_second_bn"]

    def make(init_channels: int) -> Network:
        return Network(
            parse_genotype(args.genotype),
            len(classes),
            init_channels,
            args.num_cells,
            auxiliary=args.auxiliary_weight > 0,
            in_channels=train.channels,
            stem=args.stem,
            auxiliary_second_bn=second_bn,
        )

    check_cost(make, args.init_channels, image_size, args.max_params, args.max_madds)
    network, lines = make(args.init_channels), []
    if base is not None:
        inferred = base.details.get("inferred")
        lines = [f"genotype {inferred}, inferred from the operations"] if inferred else []
        lines += [f"from {args.init_from}: {initialise(network, base, classes)}"]
    return network, lines


def initialise(network: Network, base: Network, classes: list[str]) -> str:
    """Copy the weights of `base`; return a line that says which.

    The classifiers are copied only if the classes are the same. Where `base` does not name its
    classes, as in other codes' files, their number decides.
    """
    same_classes = len(classes) == base.config["num_classes"]
    same_classes = same_classes and base.details.get("classes", classes) == classes
    own, found = network.state_dict(), base.state_dict()
    fits = [key for key in own if key in found and (same_classes or "classifier." not in key)]
    network.load_state_dict(own | {key: found[key] for key in fits})
    new, unused = (
        sorted({key.rpartition(".")[0] for key in keys if key not in fits}) or ["nothing"]
        for keys in (own, found)
    )
    line = f"loaded {len(fits)} tensors; new: {', '.join(new)}; left out: {', '.join(unused)}"
    if same_classes and "classes" not in base.details:
        line += "; its classes have no names, taken to be these"
    return line


def settle(
    args: argparse.Namespace, base: Network | None, train: Images | ImageFiles
) -> argparse.Namespace:
    """Return the arguments with what was read in place of names and "auto", for --resume."""
    sizes, genotype = {}, base.genotype if base else parse_genotype(args.genotype)
    if base is not None:
        sizes = {name: base.config[name] for name in SIZES}
    read = {
        "genotype": format_genotype(genotype, "quark0"),
        "in_memory": "never" if isinstance(train, ImageFiles) else "always",
    }
    return argparse.Namespace(**vars(args) | sizes | read)


def main(argv: list[str] | None = None, dataset: Dataset | None = None) -> dict:
    """Train as `argv` says; `dataset`, in memory, takes the place of --dataset."""
    args = parse_args(argv, dataset is not None)
    torch.manual_seed(args.seed)
    machine = Machine(args.device, args.amp, args.channels_last, args.deterministic, args.compile)
    if args.sync_bn and machine.device.type != "cuda":
        raise ValueError(f"--sync-bn: PyTorch has it for CUDA only, the device is {machine.device}")
    base = None if args.init_from is None else load_network(args.init_from, args.genotype)
    dataset, train, statistics, train_loader, test_loader = load_images(
        args, dataset, machine, base
    )
    classes, notes = dataset.classes, list(dataset.notes)
    if base is None and (note := read_genotype(args.genotype)[1]):
        notes.append(f"genotype: {note}")
    args = settle(args, base, train)
    network, lines = make_network(args, base, train, classes, train_loader.image_size)
    notes += lines
    network.to(machine.device, memory_format=machine.memory_format)
    if args.freeze_features:
        network.requires_grad_(False).eval()  # also BN keeps its statistics
        network.classifier.requires_grad_(True)
    if args.sync_bn:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    machine.equalise(network.state_dict().values())
    model = machine.distribute(network, any(unused_states(network.genotype).values()))
    machine.compile_cells(network)
    limit = 2 if args.fast_dev_run else None
    steps_per_epoch = min(limit or math.inf, len(train_loader))
    trained = [p for p in network.parameters() if p.requires_grad]
    step = make_w_step(
        args,
        network,
        trained,
        machine,
        steps_per_epoch,
        schedule=args.w_schedule,
        averages=False,  # `model` averages the gradients
    )

    details = {
        "classes": classes,
        "mean": statistics[0].tolist(),
        "std": statistics[1].tolist(),
        "image_size": train_loader.image_size,
        "crop": args.in_memory == "never",
        "dataset": args.dataset,
    }
    default = "runs/demo-final" if args.demo else "runs/final"
    with open_run("train_final.py", argv, default, args, machine, tqdm.write) as run:
        progress = Progress(run, vars(args), network, step, steps_per_epoch)
        if args.resume:
            progress.resume()
        costs = start(args, progress, network, train_loader.image_size, len(train.labels), notes)
        for epoch in progress.epochs():
            network.drop_path_prob = args.drop_path_prob * epoch / args.epochs
            batches = train_loader.epoch(epoch, progress.step)
            batches = progress.training(batches, len(test_loader), tqdm)
            terms = args.grad_accum, args.auxiliary_weight, args.label_smoothing
            progress.add(train_epoch(model, batches, step, machine, *terms))
            machine.equalise(network.buffers())  # the running statistics
            batches = progress.evaluation(itertools.islice(test_loader, limit))
            with machine.uncompiled():
                tested = evaluate(network, batches, len(classes), machine.autocast, machine.sum)
            record = report(args, progress, network, tested)
            save(run, network, details, record)
            progress.finish_epoch(record)
        save(run, network, details, progress.history[-1])  # the run may have ended in between
        return finish(args, progress, costs)


def start(
    args: argparse.Namespace,
    progress: Progress,
    network: Network,
    image_size: int,
    num_images: int,
    notes: list[str],
) -> dict[str, float]:
    """Write what is known before the training; return the costs of the network."""
    run, genotype = progress.run, network.genotype
    costs = {
        "parameters_M": count_parameters(network) / 1e6,
        "multiply_adds_M": count_multiply_adds(network, image_size) / 1e6,
    }
    run.save_json("args.json", vars(args))
    run.log(
        f"training on {args.dataset}: {num_images} images, {network.config['num_classes']} "
        f"classes; network with {costs['parameters_M']:.3f} M parameters, "
        f"{costs['multiply_adds_M']:.1f} M multiply-adds on {progress.machine.device}; run folder "
        f"{run.path}"
    )
    for line in [*notes, *name_unused_nodes(genotype)]:
        run.log(line)
    if (estimate := estimate_accuracy(genotype)) is not None:
        run.log(f"cell: {describe(estimate)} ({MEANING})")
    run.save_text("genotype.json", format_genotype(genotype, "json") + "\n")
    kinds = ("normal", "reduce")
    pictures = run.save_pictures(lambda: {f"cell_{k}": draw_cell(genotype, k) for k in kinds})
    texts = {"arguments": markdown_table(vars(args)), "genotype": f"`{args.genotype}`"}
    run.report(progress.epoch + 1, texts=texts, pictures=pictures)
    return costs


def report(
    args: argparse.Namespace, progress: Progress, network: Network, tested: Evaluation
) -> dict[str, Any]:
    """Write the record of an epoch to the log and to TensorBoard; return it."""
    train_loss, train_accuracy = progress.means()
    skipped = progress.guard.skipped
    record = {
        "epoch": progress.epoch + 1,
        "lr": progress.lr,
        "drop_path_prob": network.drop_path_prob,
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        "test_loss": tested.loss,
        "test_accuracy": tested.accuracy,
        "skipped_batches": skipped,
        "seconds": time.time() - progress.epoch_started,
    }
    progress.run.log(
        f"epoch {record['epoch']:3d}/{args.epochs}  lr {record['lr']:.4f}  "
        f"train: loss {train_loss:.3f}, accuracy {100 * train_accuracy:.2f} %  "
        f"{tested_on(args)}: loss {tested.loss:.3f}, accuracy {100 * tested.accuracy:.2f} %  "
        f"{record['seconds']:.0f} s" + (f"  {skipped} batches skipped so far" if skipped else "")
    )
    names = ("train_loss", "test_loss", "train_accuracy", "test_accuracy", "lr", "drop_path_prob")
    progress.run.report(record["epoch"], {f"progress/{name}": record[name] for name in names})
    return record


def tested_on(args: argparse.Namespace) -> str:
    """Name the images that the network is tested on."""
    return "held-out half" if args.holdout else "test"


def save(run: RunFolder, network: Network, details: dict[str, Any], record: dict[str, Any]) -> None:
    """Write network.pt with what is to be known about the network."""
    details = details | {"test_accuracy": record["test_accuracy"]}
    run.attempt("network.pt", partial(save_network, network, run / "network.pt", details))


def finish(args: argparse.Namespace, progress: Progress, costs: dict[str, float]) -> dict[str, Any]:
    """Write the result of a training, and say what comes next."""
    run, accuracies = progress.run, [record["test_accuracy"] for record in progress.history]
    result = {
        "test_accuracy": accuracies[-1],
        "best_test_accuracy_optimistic": max(accuracies),
        **costs,
        "genotype": args.genotype,
        **progress.result(),
    }
    run.save_json("result.json", result)
    run.log(
        f"{tested_on(args)} accuracy at the last epoch: {100 * accuracies[-1]:.2f} % (the best "
        f"epoch, chosen on the same images, so optimistic: {100 * max(accuracies):.2f} %)"
    )
    run.log(f"network: {run / 'network.pt'}")
    # The network file knows the image size.
    values = flags.data_arguments(args) | {"image_size": None, "weights": run / "network.pt"}
    run.log(f"next: {flags.as_command(args, 'eval_pretrained.py', flags.as_flags(values))}")
    run.check_written()
    return result


if __name__ == "__main__":
    flags.run_as_script("train_final.py", main)
