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
import shlex
import sys
import time
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from darts_min.convert.genotype_texts import format_genotype, parse_genotype
from darts_min.convert.weights import load_network, save_network
from darts_min.data.datasets import (
    DATASETS,
    IN_MEMORY,
    balanced_subset,
    channel_statistics,
    load_dataset,
    make_loader,
    split_half,
)
from darts_min.data.folder import ImageFiles
from darts_min.draw import draw_cell
from darts_min.genotypes import name_unused_nodes, unused_states
from darts_min.judge.cost import check_cost, count_multiply_adds, count_parameters
from darts_min.network import Network
from darts_min.run.evaluation import evaluate
from darts_min.run.flags import check_ranges, parse_flags, refuse_unused
from darts_min.run.machine import (
    AMP_CHOICES,
    choose_autocast,
    choose_device,
    choose_memory_format,
    compile_cells,
    make_deterministic,
)
from darts_min.run.open import newest_folder, open_run
from darts_min.run.processes import Processes
from darts_min.run.progress import Progress
from darts_min.run.run_folder import table, versions
from darts_min.run.schedules import SCHEDULES, learning_rate_factor

DEMO = {
    "dataset": "synthetic",
    "image_size": 16,
    "subset": 2000,
    "init_channels": 8,
    "num_cells": 3,
    "batch_size": 32,
    "epochs": 6,
    "cutout": 4,
    "w_lr": 0.05,
}
RECIPES = {
    "darts": {},
    # NNI's tutorial, first run: none of the tricks; 89.69 % with its cell (NNI_PLAIN).
    "plain": {
        "init_channels": 16,
        "num_cells": 8,
        "epochs": 100,
        "w_optimizer": "adam",
        "w_lr": 1e-3,
        "w_lr_min": 1e-3,
        "w_weight_decay": 1e-4,
        "w_grad_clip": 0.0,
        "cutout": 0,
        "auxiliary_weight": 0.0,
        "drop_path_prob": 0.0,
    },
    # A small network in few epochs; the cards in darts_min/pretrained/ say what theirs had besides.
    "quick": {
        "init_channels": 16,
        "num_cells": 8,
        "epochs": 20,
        "batch_size": 128,
        "w_lr": 0.1,
        "w_schedule": "one-cycle",
        "cutout": 0,
        "auxiliary_weight": 0.0,
        "drop_path_prob": 0.0,
    },
    # The original code's train_imagenet.py.
    "imagenet": {
        "dataset": "folder",
        "image_size": 224,
        "in_memory": "never",
        "stem": "imagenet",
        "init_channels": 48,
        "num_cells": 14,
        "epochs": 250,
        "batch_size": 128,
        "w_lr": 0.1,
        "w_schedule": "exponential",
        "w_weight_decay": 3e-5,
        "label_smoothing": 0.1,
        "cutout": 0,
        "drop_path_prob": 0.0,
    },
}
SIZES = ("init_channels", "num_cells", "stem")
LEARNING_RATES = ("w_lr", "w_lr_min")
# Flags that one choice alone uses: the argument which chooses, and its values.
ONLY_WITH = {
    "w_lr_min": ("w_schedule", "cosine"),
    "w_lr_decay": ("w_schedule", "exponential"),
    "w_momentum": ("w_optimizer", "sgd"),
    "in_memory": ("dataset", "folder"),
    "num_workers": ("dataset", "folder"),
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train the network built from a genotype.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    run = parser.add_argument_group("run")
    run.add_argument("--demo", action="store_true", help="offline, small, after the search's demo")
    run.add_argument("--recipe", choices=RECIPES, default="darts", help="defaults")
    run.add_argument("--out-dir", help="run folder (default: runs/final, or the next free number)")
    run.add_argument("--resume", action="store_true", help="continue --out-dir, or the newest run")
    run.add_argument("--checkpoint-minutes", type=float, default=10, help="also inside epochs")
    run.add_argument("--seed", type=int, default=0, help="of everything random")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    run.add_argument("--amp", choices=AMP_CHOICES, default="auto", help="auto: bf16 if on the GPU")
    run.add_argument("--compile", action="store_true", help="the cells; slow start, gain varies")
    run.add_argument("--sync-bn", action="store_true", help="BN over all processes (CUDA)")
    run.add_argument("--deterministic", action="store_true", help="same bits on CUDA too; slower")
    run.add_argument("--channels-last", choices=("auto", "on", "off"), default="auto", help="NHWC")
    run.add_argument("--fast-dev-run", action="store_true", help="two batches of everything")
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=DATASETS, default="cifar10", help="what to learn")
    data.add_argument("--data-dir", default="data", help="downloads, or the folder of images")
    data.add_argument("--image-size", type=int, help="squares of this many pixels")
    data.add_argument("--in-memory", choices=IN_MEMORY, default="auto", help="folder's images")
    data.add_argument("--num-workers", type=int, default=4, help="read images not in memory")
    data.add_argument("--subset", type=int, help="use this many training images, class-balanced")
    data.add_argument("--holdout", action="store_true", help="train on one half, test on the other")
    data.add_argument("--batch-size", type=int, default=96, help="images; per process")
    data.add_argument("--grad-accum", type=int, default=1, help="parts of a batch, one at a time")
    data.add_argument("--cutout", type=int, default=16, help="side of the square in pixels; 0: off")
    net = parser.add_argument_group("network")
    net.add_argument("--genotype", help="published name, run folder, file or text (see README)")
    net.add_argument("--init-from", metavar="FILE", help="fine-tune this network (or a name)")
    net.add_argument("--freeze-features", action="store_true", help="train the classifier alone")
    net.add_argument("--init-channels", type=int, default=36, help="of the first cells")
    net.add_argument("--num-cells", type=int, default=20, help="two of them reductions")
    net.add_argument("--stem", choices=("cifar", "imagenet"), default="cifar", help="imagenet: 1/8")
    net.add_argument("--auxiliary-weight", type=float, default=0.4, help="of its loss; 0: no head")
    net.add_argument("--drop-path-prob", type=float, default=0.2, help="at the end; grows linearly")
    net.add_argument("--max-params", type=float, help="refuse more, in millions")
    net.add_argument("--max-madds", type=float, help="multiply-adds, in millions")
    opt = parser.add_argument_group("optimisation")
    opt.add_argument("--epochs", type=int, default=600, help="passes over the images")
    opt.add_argument("--w-optimizer", choices=("sgd", "adam"), default="sgd", help="of the weights")
    opt.add_argument("--w-lr", type=float, default=0.025, help="at the start; one-cycle: peak")
    opt.add_argument("--w-lr-min", type=float, default=0.0, help="cosine ends here (NNI: 1e-3)")
    opt.add_argument("--w-schedule", choices=SCHEDULES, default="cosine", help="of the rate")
    opt.add_argument("--w-lr-decay", type=float, default=0.97, help="per epoch, if exponential")
    opt.add_argument("--w-momentum", type=float, default=0.9, help="of SGD")
    opt.add_argument("--w-weight-decay", type=float, default=3e-4, help="l2, of the weights")
    opt.add_argument("--w-grad-clip", type=float, default=5.0, help="l2 norm; 0: off")
    opt.add_argument("--on-nonfinite", choices=("stop", "skip"), default="stop", help="loss, grad")
    opt.add_argument("--label-smoothing", type=float, default=0.0, help="of the training loss")

    def presets(args: argparse.Namespace) -> dict:
        result = RECIPES[args.recipe] | (DEMO if args.demo else {})
        if args.init_from is not None:  # the sizes are the file's; a fifth of the learning rate
            rates = {name: result.get(name, parser.get_default(name)) for name in LEARNING_RATES}
            result |= dict.fromkeys(SIZES) | {name: rate / 5 for name, rate in rates.items()}
        if args.freeze_features:
            result |= {"auxiliary_weight": 0.0, "drop_path_prob": 0.0}
        return result

    args, given = parse_flags(parser, argv, presets)
    check_ranges(vars(args))
    refuse_unused(args, given, ONLY_WITH)
    if args.init_from is not None:
        for name in SIZES:
            if getattr(args, name) is not None:
                flag = "--" + name.replace("_", "-")
                value = getattr(args, name)
                raise ValueError(f"{flag} {value}: leave it out, --init-from has its own")
    elif args.freeze_features:
        raise ValueError("--freeze-features needs --init-from: random features would be useless")
    if args.freeze_features and (args.auxiliary_weight or args.drop_path_prob):
        raise ValueError("--freeze-features: --auxiliary-weight and --drop-path-prob must be 0")
    if args.auxiliary_weight and args.batch_size == args.grad_accum:
        raise ValueError(
            f"--batch-size {args.batch_size} --grad-accum {args.grad_accum}: the BN of the "
            "auxiliary head needs two images at a time; --auxiliary-weight 0 leaves the head out"
        )
    if args.fast_dev_run:
        args.epochs = 1
    if args.w_schedule == "cosine" and args.w_lr_min > args.w_lr:
        raise ValueError(f"--w-lr-min {args.w_lr_min}: must be at most --w-lr, {args.w_lr}")
    if args.genotype is None and args.init_from is None:
        if not args.demo:
            raise ValueError("--genotype is needed: a published name, a run folder, file or text")
        args.genotype = str(newest_folder("runs/demo-search", "genotype.json"))
    return args


def train_epoch(model, batches, optimizer, scheduler, scaler, autocast, progress, args):
    """Train on `batches`; the loss that `progress` gets is without the auxiliary one."""
    processes = progress.processes
    loss_fn = partial(F.cross_entropy, label_smoothing=args.label_smoothing)
    for batch in batches:
        optimizer.zero_grad()
        results, total = [], 0.0
        buffers = list(model.buffers()) if progress.guard.skip else []
        statistics = [buffer.clone() for buffer in buffers]  # of BN, before this batch
        parts = zip(*(t.chunk(args.grad_accum) for t in batch), strict=True)
        for i, (x, target) in enumerate(parts):
            is_last = i == args.grad_accum - 1
            with nullcontext() if is_last else processes.without_averaging(model):
                with autocast():
                    output = model(x)
                    logits, aux_logits = output if args.auxiliary_weight else (output, None)
                    objective = loss = loss_fn(logits, target)
                    if aux_logits is not None:
                        objective = loss + args.auxiliary_weight * loss_fn(aux_logits, target)
                scaler.scale(objective / args.grad_accum).backward()
            total = total + objective.detach() / args.grad_accum
            results.append((loss.detach(), logits.detach(), target))
        scaler.unscale_(optimizer)
        trained = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        processes.average([total])
        total = total if scaler.is_enabled() else total + norm
        gradients = ((name, p.grad) for name, p in model.named_parameters())
        if not progress.guard.rejects("w", total, gradients):
            torch.nn.utils.clip_grads_with_norm_(trained, args.w_grad_clip or math.inf, norm)
            scaler.step(optimizer)
            progress.add(results)
        else:
            for buffer, before in zip(buffers, statistics, strict=True):
                buffer.copy_(before)
        scaler.update()
        scheduler.step()


def initialise(network: Network, base: Network, classes: list[str]) -> str:
    """Copy the weights of `base`, a classifier's only if the classes are the same; say which.

    Where `base` does not name its classes, as in other codes' files, their number decides.
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
    report = f"loaded {len(fits)} tensors; new: {', '.join(new)}; left out: {', '.join(unused)}"
    if same_classes and "classes" not in base.details:
        report += "; its classes have no names, taken to be these"
    return report


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    device = choose_device(args.device)
    processes = Processes(device)
    if args.deterministic:
        make_deterministic()
    if args.sync_bn and device.type != "cuda":
        raise ValueError(f"--sync-bn: PyTorch has it for CUDA only, the device is {device}")
    autocast, is_fp16 = choose_autocast(args.amp, device)
    memory_format = choose_memory_format(args.channels_last, device)
    limit = 2 if args.fast_dev_run else None
    base = None if args.init_from is None else load_network(args.init_from, args.genotype)
    if base is None:
        genotype, base_details = parse_genotype(args.genotype), {}
    else:
        genotype, base_details = base.genotype, base.details
        for name in SIZES:
            setattr(args, name, base.config[name])
    args.genotype = format_genotype(genotype, "quark0")  # what was read, for --resume

    image_size = args.image_size or base_details.get("image_size")
    with processes.first_alone():
        dataset = load_dataset(
            args.dataset, args.data_dir, image_size, args.seed, args.in_memory, device
        )
    train, num_classes = dataset.train, len(dataset.classes)
    in_files = isinstance(train, ImageFiles)
    args.in_memory = "never" if in_files else "always"  # what auto has become, for --resume
    if base is not None and train.channels != base.config["in_channels"]:
        raise ValueError(
            f"--init-from {args.init_from} takes images of {base.config['in_channels']} channels, "
            f"{args.dataset} has {train.channels}"
        )
    if args.subset is not None:
        train = balanced_subset(train, args.subset, torch.Generator().manual_seed(args.seed))
    test, tested_on = dataset.test, "test"
    if args.holdout:  # Sec. 3.2: cells are chosen without a look at the test images
        if in_files:
            raise ValueError("--holdout: needs the images in memory (--in-memory always)")
        train, test = split_half(train, torch.Generator().manual_seed(args.seed))
        tested_on = "held-out half"
    if "mean" in base_details:
        statistics = torch.tensor(base_details["mean"]), torch.tensor(base_details["std"])
    else:
        statistics = channel_statistics(train)
    train_loader, test_loader = (
        make_loader(
            part,
            args.batch_size,
            statistics,
            device=device,
            image_size=image_size,
            seed=args.seed,
            augment=part is train,
            cutout=args.cutout,
            num_workers=args.num_workers,
            memory_format=memory_format,
            shard=processes.shard,
        )
        for part in (train, test)
    )
    image_size = train_loader.image_size

    def make_network(init_channels: int) -> Network:
        return Network(
            genotype,
            num_classes,
            init_channels,
            args.num_cells,
            auxiliary=args.auxiliary_weight > 0,
            in_channels=train.channels,
            stem=args.stem,
            auxiliary_second_bn=second_bn,
        )

    second_bn = None
    if base is not None and base.config["auxiliary"] and args.auxiliary_weight:
        second_bn = base.config["auxiliary_second_bn"]
    check_cost(make_network, args.init_channels, image_size, args.max_params, args.max_madds)
    network = make_network(args.init_channels).to(device, memory_format=memory_format)
    if base is not None:
        initialised = initialise(network, base, dataset.classes)
    if args.freeze_features:
        network.requires_grad_(False).eval()  # also BN keeps its statistics
        network.classifier.requires_grad_(True)
    if args.sync_bn:
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    processes.equalise(network.state_dict().values())
    model = processes.wrap(network, any(unused_states(genotype).values()))
    uncompiled = compile_cells(network) if args.compile else nullcontext
    trained = [p for p in network.parameters() if p.requires_grad]
    if args.w_optimizer == "sgd":
        optimizer = torch.optim.SGD(
            trained, args.w_lr, args.w_momentum, weight_decay=args.w_weight_decay
        )
    else:
        optimizer = torch.optim.Adam(trained, args.w_lr, weight_decay=args.w_weight_decay)
    steps_per_epoch = min(limit or math.inf, len(train_loader))
    factor = learning_rate_factor(
        args.w_schedule,
        args.epochs,
        steps_per_epoch,
        last=args.w_lr_min / args.w_lr if args.w_lr else 0.0,
        decay=args.w_lr_decay,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    scaler = torch.amp.GradScaler(device.type, enabled=is_fp16)
    stateful = {
        "network": network,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "scaler": scaler,
    }

    parameters = count_parameters(network) / 1e6
    multiply_adds = count_multiply_adds(network, image_size) / 1e6
    details = {
        "classes": dataset.classes,
        "mean": statistics[0].tolist(),
        "std": statistics[1].tolist(),
        "image_size": image_size,
        "crop": in_files,
        "dataset": args.dataset,
    }
    default = "runs/demo-final" if args.demo else "runs/final"
    with open_run("train_final.py", argv, default, vars(args), processes, tqdm.write) as run:
        progress = Progress(run, vars(args), stateful, steps_per_epoch, device)
        if args.resume:
            progress.resume()
        run.save_json("args.json", vars(args))
        run.log(
            f"training on {args.dataset}: {len(train.labels)} images, {num_classes} classes; "
            f"network with {parameters:.3f} M parameters, {multiply_adds:.1f} M multiply-adds on "
            f"{device}; run folder {run.path}"
        )
        if "inferred" in base_details:
            run.log(f"genotype {base_details['inferred']}, inferred from the operations")
        for line in name_unused_nodes(genotype):
            run.log(line)
        if base is not None:
            run.log(f"from {args.init_from}: {initialised}")
        run.save_text("genotype.json", format_genotype(genotype, "json") + "\n")
        pictures = {f"cell_{kind}": draw_cell(genotype, kind) for kind in ("normal", "reduce")}
        for name, picture in pictures.items():
            run.attempt(f"{name}.png", partial(picture.save, run / f"{name}.png"))
        run.report(
            partial(report_start, args=args, genotype=genotype, pictures=pictures),
            progress.epoch + 1,
        )

        def save_result(record: dict) -> None:
            accuracy = {"test_accuracy": record["test_accuracy"]}
            write = partial(save_network, network, run / "network.pt", details | accuracy)
            run.attempt("network.pt", write)

        for epoch in progress.epochs():
            network.drop_path_prob = args.drop_path_prob * epoch / args.epochs
            batches = train_loader.epoch(epoch, progress.step)
            # A batch of test images costs a forward pass, about a third of a step.
            batches = progress.training(batches, len(test_loader) / 3, tqdm)
            train_epoch(model, batches, optimizer, scheduler, scaler, autocast, progress, args)
            progress.guard.check_scale(scaler)
            processes.equalise(network.buffers())  # the running statistics
            batches = progress.evaluation(itertools.islice(test_loader, limit))
            with uncompiled():
                tested = evaluate(network, batches, num_classes, autocast, processes.sum)

            train_loss, train_accuracy = progress.means()
            skipped = progress.guard.skipped
            record = {
                "epoch": epoch + 1,
                "lr": progress.lr,
                "drop_path_prob": network.drop_path_prob,
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "test_loss": tested.loss,
                "test_accuracy": tested.accuracy,
                "skipped_batches": skipped,
                "seconds": time.time() - progress.epoch_started,
            }
            run.log(
                f"epoch {epoch + 1:3d}/{args.epochs}  lr {record['lr']:.4f}  "
                f"train: loss {record['train_loss']:.3f}, "
                f"accuracy {100 * record['train_accuracy']:.2f} %  "
                f"{tested_on}: loss {tested.loss:.3f}, accuracy {100 * tested.accuracy:.2f} %  "
                f"{record['seconds']:.0f} s"
                + (f"  {skipped} batches skipped so far" if skipped else "")
            )
            run.report(partial(report_epoch, record=record), epoch + 1)
            save_result(record)
            progress.finish_epoch(record)

        save_result(progress.history[-1])  # again: the run may have ended in between
        result = {
            "test_accuracy": progress.history[-1]["test_accuracy"],
            "best_test_accuracy_optimistic": max(r["test_accuracy"] for r in progress.history),
            "parameters_M": parameters,
            "multiply_adds_M": multiply_adds,
            "genotype": format_genotype(genotype, "quark0"),
            "seconds": time.time() - progress.started,
            "device": str(device),
            "versions": versions(),
            "args": vars(args),
            "history": progress.history,
            "out_dir": str(run.path),
        }
        run.save_json("result.json", result)
        run.log(
            f"{tested_on} accuracy at the last epoch: {100 * result['test_accuracy']:.2f} % (the "
            f"best epoch, chosen on the same images, so optimistic: "
            f"{100 * result['best_test_accuracy_optimistic']:.2f} %)"
        )
        run.log(f"network: {run / 'network.pt'}")
        again = ["--dataset", args.dataset, "--data-dir", args.data_dir]
        again += ["--seed", str(args.seed)] if args.dataset == "synthetic" else []
        again += ["--weights", str(run / "network.pt")]
        run.log(f"next: python eval_pretrained.py {shlex.join(again)}")
        run.check_written()
    return result


def report_start(writer, args, genotype, pictures) -> None:
    """Write arguments, genotype and pictures to TensorBoard."""
    writer.add_text("arguments", table(vars(args)))
    writer.add_text("genotype", f"`{format_genotype(genotype, 'quark0')}`")
    for name, picture in pictures.items():
        writer.add_image(name, np.asarray(picture), dataformats="HWC")


def report_epoch(writer, record) -> None:
    """Write an epoch's figures to TensorBoard."""
    for key in ("train_loss", "test_loss", "train_accuracy", "test_accuracy"):
        part, quantity = key.split("_")
        writer.add_scalar(f"{quantity}/{part}", record[key], record["epoch"])
    writer.add_scalar("learning rate/w", record["lr"], record["epoch"])
    writer.add_scalar("drop path probability", record["drop_path_prob"], record["epoch"])


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"train_final.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        sys.exit(f"train_final.py: error: {error}")
