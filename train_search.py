"""Search for a cell with DARTS (arXiv 1806.09055, Sec. 2 and 3.1).

    python train_search.py --demo                      # offline, 2 CPU cores: under 2 minutes
    python train_search.py --dataset cifar10           # the paper's search, first order
    python train_search.py --dataset cifar10 --order 2
    python train_search.py --dataset cifar10 --relaxation gumbel   # GDAS; or another successor
    python train_search.py --dataset cifar10 --method random       # the baseline
    python train_search.py --dataset cifar10 --seeds 0 1 2 3 --select-epochs 100    # Sec. 3.2

Expected on CIFAR-10 (paper, not run here): cells that reach 2.8-3.0 % test error after the final
training, being the best of four searches; these take 1.5 (order 1) or 4 (order 2) GPU days on a
GTX 1080 Ti, the choice among them one more. README has what was run here.
"""

import argparse
import itertools
import math
import shlex
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import train_final
from darts_min.architect import architecture_gradient
from darts_min.convert.genotype_texts import format_genotype, parse_genotype
from darts_min.data.batches import generator_of
from darts_min.data.datasets import (
    DATASETS,
    Loader,
    balanced_subset,
    channel_statistics,
    load_dataset,
    split_half,
)
from darts_min.draw import draw_alphas, draw_cell
from darts_min.genotypes import PRIMITIVES
from darts_min.judge.cost import count_multiply_adds, count_parameters
from darts_min.judge.random_search import take_best_path
from darts_min.judge.selection import rank
from darts_min.judge.signs import (
    LOOK_BACK,
    discretised,
    eigenvalue_that_fits,
    should_stop,
    signs_of_collapse,
)
from darts_min.relaxations import Dirichlet, Gumbel, Sigmoid, SinglePath, Softmax
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
from darts_min.run.open import check_same_arguments, open_run
from darts_min.run.processes import Processes
from darts_min.run.progress import Progress
from darts_min.run.run_folder import BEGUN, RunFolder, table, versions
from darts_min.run.schedules import learning_rate_factor
from darts_min.spaces import Space, parse_space
from darts_min.supernet import Supernet

DEMO = {
    "dataset": "synthetic",
    "image_size": 16,
    "subset": 2000,
    "init_channels": 4,
    "num_cells": 3,
    "batch_size": 32,
    "epochs": 6,
    "w_lr": 0.05,
    "alpha_lr": 0.01,
    "alpha_warmup_epochs": 0,
    "select_epochs": 2,
    "select_channels": 8,
    "select_cells": 3,
}
WITHOUT_NONE = ",".join(PRIMITIVES[1:])
# What the scripts of the papers change in the recipe. GDAS also anneals tau (--tau), and
# FairDARTS' alphas start at 0.
RELAXATIONS = {
    "softmax": {},
    "gumbel": {"epochs": 250, "batch_size": 256, "w_weight_decay": 5e-4, "w_nesterov": True},
    "dirichlet": {
        "w_lr": 0.1,
        "w_lr_min": 0.0,
        "alpha_lr": 6e-4,
        "alpha_warmup_epochs": 10,
        "space": WITHOUT_NONE,
    },
    "sigmoid": {
        "w_lr": 0.005,
        "batch_size": 128,
        "alpha_lr": 3e-3,
        "alpha_betas": [0.9, 0.999],
        "space": WITHOUT_NONE,
    },
    "partial": {
        "w_lr": 0.1,
        "w_lr_min": 0.0,
        "batch_size": 256,
        "alpha_lr": 6e-4,
        "alpha_warmup_epochs": 15,
    },
}
# NNI's tutorial, first run: no clipping, schedule or momentum; w by Adam.
PLAIN = {
    "epochs": 10,
    "w_optimizer": "adam",
    "w_lr": 1e-3,
    "w_lr_min": 1e-3,
    "w_weight_decay": 1e-4,
    "w_grad_clip": 0.0,
}
# Flags that one choice alone uses: the argument which chooses, and its values.
LEARNING = ("method", "darts")
ONLY_WITH = {
    "tau": ("relaxation", "gumbel"),
    "zero_one_weight": ("relaxation", "sigmoid"),
    "partial": ("relaxation", "partial"),
    "candidates": ("method", "random"),
    "relaxation": LEARNING,
    "order": LEARNING,
    "alpha_warmup_epochs": LEARNING,
    "alpha_lr": LEARNING,
    "alpha_betas": LEARNING,
    "alpha_weight_decay": LEARNING,
    "early_stop": LEARNING,
    "adapt_weight_decay": LEARNING,
    "max_skips": LEARNING,
    "compile": LEARNING,
    "w_momentum": ("w_optimizer", "sgd"),
    "w_nesterov": ("w_optimizer", "sgd"),
}
ALPHAS = ("alphas_", "betas_")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Search for a cell with DARTS.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    run = parser.add_argument_group("run")
    run.add_argument("--demo", action="store_true", help="offline, small, under 2 minutes")
    run.add_argument("--recipe", choices=("darts", "plain"), default="darts", help="defaults")
    run.add_argument("--out-dir", help="run folder (default: runs/search, or the next free number)")
    run.add_argument("--resume", action="store_true", help="continue --out-dir, or the newest run")
    run.add_argument("--checkpoint-minutes", type=float, default=10, help="also inside epochs")
    run.add_argument("--seed", type=int, default=0, help="of everything random")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    run.add_argument("--amp", choices=AMP_CHOICES, default="auto", help="auto: bf16 if on the GPU")
    run.add_argument("--compile", action="store_true", help="the cells; slow start, gain varies")
    run.add_argument("--deterministic", action="store_true", help="same bits on CUDA too; slower")
    run.add_argument("--channels-last", choices=("auto", "on", "off"), default="auto", help="NHWC")
    run.add_argument("--fast-dev-run", action="store_true", help="two batches of everything")
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=DATASETS, default="cifar10", help="what to learn")
    data.add_argument("--data-dir", default="data", help="downloads, or the folder of images")
    data.add_argument("--image-size", type=int, help="resize to squares of this many pixels")
    data.add_argument("--subset", type=int, help="use this many training images, class-balanced")
    data.add_argument("--batch-size", type=int, default=64, help="images; per process")
    data.add_argument("--search-cutout", type=int, default=0, help="pixels, ever more often")
    data.add_argument("--grad-accum", type=int, default=1, help="parts of a batch, one at a time")
    net = parser.add_argument_group("supernet")
    net.add_argument("--init-channels", type=int, default=16, help="of the first cells")
    net.add_argument("--num-cells", type=int, default=8, help="two of them reductions")
    net.add_argument("--checkpoint-cells", action="store_true", help="less memory, more time")
    net.add_argument("--num-nodes", type=int, default=4, help="intermediate nodes of a cell")
    net.add_argument("--space", default="darts", help="darts, nni, S1, ..., S4, or OP,OP,...")
    net.add_argument("--search-drop-path", type=float, default=0.0, help="probability at the end")
    relax = parser.add_argument_group("method")
    relax.add_argument("--method", choices=("darts", "random"), default="darts", help="or random")
    relax.add_argument(
        "--relaxation", choices=RELAXATIONS, default="softmax", help="brings its defaults"
    )
    relax.add_argument("--tau", type=float, nargs=2, default=[10, 0.1], help="gumbel: start, end")
    relax.add_argument("--zero-one-weight", type=float, default=10.0, help="sigmoid: of that loss")
    relax.add_argument("--partial", type=int, default=4, help="partial: 1/K of the channels")
    relax.add_argument("--candidates", type=int, default=100, help="random: ranked in each epoch")
    opt = parser.add_argument_group("optimisation")
    opt.add_argument("--epochs", type=int, default=50, help="passes over the images")
    opt.add_argument(
        "--order", type=int, choices=(1, 2), default=1, help="of the gradient, Eq. 6-8"
    )
    opt.add_argument("--alpha-warmup-epochs", type=int, default=0, help="epochs that train w alone")
    opt.add_argument("--w-optimizer", choices=("sgd", "adam"), default="sgd", help="of the weights")
    opt.add_argument("--w-lr", type=float, default=0.025, help="at the start (A.1.1)")
    opt.add_argument("--w-lr-min", type=float, default=1e-3, help="cosine ends here (paper: 0)")
    opt.add_argument("--w-momentum", type=float, default=0.9, help="of SGD")
    opt.add_argument(
        "--w-nesterov",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Nesterov's momentum in SGD",
    )
    opt.add_argument("--w-weight-decay", type=float, default=3e-4, help="l2, of the weights")
    opt.add_argument("--w-grad-clip", type=float, default=5.0, help="l2 norm; 0: off")
    opt.add_argument("--on-nonfinite", choices=("stop", "skip"), default="stop", help="loss, grad")
    opt.add_argument("--alpha-lr", type=float, default=3e-4, help="Adam")
    opt.add_argument("--alpha-betas", type=float, nargs=2, default=[0.5, 0.999], help="of Adam")
    opt.add_argument("--alpha-weight-decay", type=float, default=1e-3, help="l2, of alpha")
    signs = parser.add_argument_group("signs of a bad cell")
    signs.add_argument("--hessian-every", type=int, default=1, help="epochs; 0: off")
    signs.add_argument("--early-stop", action="store_true", help="by the eigenvalue (RobustDARTS)")
    signs.add_argument("--adapt-weight-decay", action="store_true", help="go back, decay of w x 10")
    signs.add_argument("--max-skips", type=int, help="in the normal cell (P-DARTS: 2)")
    select = parser.add_argument_group("selection among several searches (Sec. 3.2)")
    select.add_argument("--seeds", type=int, nargs="+", help="search once with each of these")
    select.add_argument("--select-epochs", type=int, default=100, help="to train each cell found")
    select.add_argument("--select-channels", type=int, default=36, help="of its network")
    select.add_argument("--select-cells", type=int, default=20, help="of its network")
    args, given = parse_flags(parser, argv, presets)
    check_ranges(vars(args))
    refuse_unused(args, given, ONLY_WITH)
    if args.seeds is None:
        for name in sorted(given & {"select_epochs", "select_channels", "select_cells"}):
            raise ValueError(f"--{name.replace('_', '-')}: only with --seeds")
    elif "seed" in given:
        raise ValueError("--seed and --seeds: one or the other")
    if args.method == "random" and args.hessian_every:
        raise ValueError("--hessian-every: only 0 with --method random, whose alphas learn nothing")
    for flag in ("early_stop", "adapt_weight_decay"):
        if getattr(args, flag) and not args.hessian_every:
            raise ValueError(f"--{flag.replace('_', '-')} needs the eigenvalue: --hessian-every 1")
    if args.early_stop and args.adapt_weight_decay:
        raise ValueError("--early-stop and --adapt-weight-decay: one or the other")
    if args.relaxation == "gumbel" and args.compile:
        raise ValueError("--compile: not with --relaxation gumbel, each of whose steps differs")
    if args.w_nesterov and not args.w_momentum:
        raise ValueError("--w-nesterov: needs a --w-momentum above 0")
    if args.w_nesterov and args.order == 2:
        raise ValueError("--order 2: its virtual step has no --w-nesterov (--no-w-nesterov)")
    if args.w_lr_min > args.w_lr:
        raise ValueError(f"--w-lr-min {args.w_lr_min}: must be at most --w-lr, {args.w_lr}")
    parse_space(args.space)
    if args.alpha_warmup_epochs >= args.epochs and not args.fast_dev_run:
        raise ValueError(
            f"--alpha-warmup-epochs {args.alpha_warmup_epochs}: must be less than --epochs, "
            f"{args.epochs}"
        )
    if args.fast_dev_run:  # everything that a run does, in its only epoch
        args.epochs, args.alpha_warmup_epochs = 1, 0
        args.hessian_every = min(args.hessian_every, 1)
    return args


def presets(args: argparse.Namespace) -> dict:
    """Return the defaults that hang on the arguments chosen; of two, the later one wins."""
    result = dict(RELAXATIONS[args.relaxation])
    if args.method == "random":
        result["hessian_every"] = 0
    if args.recipe == "plain":
        result |= PLAIN
    if "adam" in (args.w_optimizer, result.get("w_optimizer")) or args.order == 2:
        result["w_nesterov"] = False
    if args.demo:
        result |= DEMO | ({"hessian_every": 3} if args.method == "darts" else {})
    return result


def choose_relaxation(args: argparse.Namespace, space: Space) -> Softmax:
    if args.method == "random":
        return SinglePath(space.primitives.index("none") if "none" in space.primitives else None)
    if args.relaxation == "gumbel":
        return Gumbel(args.tau[0])
    if args.relaxation == "sigmoid":
        return Sigmoid(args.zero_one_weight)
    return Dirichlet() if args.relaxation == "dirichlet" else Softmax()


def schedule(done: float, model: Supernet, loaders: Iterable[Loader], args) -> None:
    """Set what changes linearly from the first epoch (`done` 0) to the last one (1)."""
    model.drop_path_prob = done * args.search_drop_path  # and cutout: arXiv 1909.09656, Sec. 5
    for loader in loaders:
        loader.cutout_prob = done
    if args.relaxation == "gumbel":
        model.relaxation.tau = args.tau[0] + done * (args.tau[1] - args.tau[0])


def train_epoch(
    model,
    batches,
    optimizers,
    scheduler,
    scalers,
    autocast,
    progress,
    xi,
    train_alpha,
    args,
):
    """Train on `batches` by Alg. 1; `progress` gets the losses of the w steps."""
    guard, processes, parts = progress.guard, progress.processes, args.grad_accum
    weights = model.weights()
    w_optimizer, alpha_optimizer = optimizers
    w_scaler, alpha_scaler = scalers

    def scaled_loss(logits, target):
        return alpha_scaler.scale(F.cross_entropy(logits, target))

    def scaled_penalty(alphas):
        return alpha_scaler.scale(model.relaxation.penalty(alphas))

    for train_batch, val_batch in batches:
        # Alg. 1, line 1: update alpha by descending grad_alpha L_val(w - xi grad_w L_train, alpha).
        if train_alpha:
            with autocast():
                alpha_grads = architecture_gradient(
                    model,
                    scaled_loss,
                    train_batch,
                    val_batch,
                    xi,
                    w_optimizer,
                    parts,
                    scaled_penalty,
                )
            processes.average(alpha_grads)
            for alpha, grad in zip(model.alphas(), alpha_grads, strict=True):
                alpha.grad = grad
            norm = torch.nn.utils.get_total_norm(alpha_grads)
            named = ((n, p.grad) for n, p in model.named_parameters() if n.startswith(ALPHAS))
            if alpha_scaler.is_enabled() or not guard.rejects("alpha", norm, named):
                alpha_scaler.step(alpha_optimizer)
                alpha_scaler.update()

        # Alg. 1, line 2: update w by descending grad_w L_train(w, alpha).
        w_optimizer.zero_grad()
        results, mean_loss = [], 0.0
        for x, target in zip(*(t.chunk(parts) for t in train_batch), strict=True):
            with autocast():
                logits = model(x)
                loss = F.cross_entropy(logits, target)
            w_scaler.scale(loss / parts).backward()
            mean_loss = mean_loss + loss.detach() / parts
            results.append((loss.detach(), logits.detach(), target))
        for w in weights:
            if w.grad is None:  # of an operation that was not drawn
                w.grad = torch.zeros_like(w)
        processes.average([mean_loss, *(w.grad for w in weights)])
        w_scaler.unscale_(w_optimizer)
        norm = torch.nn.utils.get_total_norm([w.grad for w in weights])
        total = mean_loss if w_scaler.is_enabled() else mean_loss + norm
        gradients = ((n, p.grad) for n, p in model.named_parameters() if not n.startswith(ALPHAS))
        if not guard.rejects("w", total, gradients):
            torch.nn.utils.clip_grads_with_norm_(weights, args.w_grad_clip or math.inf, norm)
            w_scaler.step(w_optimizer)
            progress.add(results)
        w_scaler.update()
        scheduler.step()


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    return search(args, argv) if args.seeds is None else select(args, argv)


def search(args: argparse.Namespace, argv: list[str] | None) -> dict:
    torch.manual_seed(args.seed)
    device = choose_device(args.device)
    processes = Processes(device)
    if args.deterministic:
        make_deterministic()
    autocast, is_fp16 = choose_autocast(args.amp, device)
    memory_format = choose_memory_format(args.channels_last, device)
    limit = 2 if args.fast_dev_run else None

    generator = torch.Generator().manual_seed(args.seed)
    with processes.first_alone():
        dataset = load_dataset(args.dataset, args.data_dir, args.image_size, args.seed)
    train = dataset.train
    if args.subset is not None:
        train = balanced_subset(train, args.subset, generator)
    statistics = channel_statistics(train)
    w_half, alpha_half = (half.to(device) for half in split_half(train, generator))
    w_loader, alpha_loader = (
        Loader(
            half,
            args.batch_size,
            statistics,
            seed=args.seed,
            stream=stream,
            augment=True,
            cutout=args.search_cutout,
            memory_format=memory_format,
            shard=processes.shard,
        )
        for stream, half in enumerate((w_half, alpha_half))
    )
    eval_loader = Loader(
        alpha_half,
        args.batch_size,
        statistics,
        memory_format=memory_format,
        shard=processes.shard,
    )

    num_classes, space = len(dataset.classes), parse_space(args.space)
    model = Supernet(
        num_classes,
        args.init_channels,
        args.num_cells,
        args.num_nodes,
        train.images.size(3),
        *space,
        partial=args.partial if args.relaxation == "partial" else 1,
    ).to(device, memory_format=memory_format)
    model.relaxation = choose_relaxation(args, space)
    model.checkpoint_cells = args.checkpoint_cells
    uncompiled = compile_cells(model) if args.compile else nullcontext
    processes.equalise(model.parameters())
    for alpha in model.alphas():
        if args.relaxation == "sigmoid":
            alpha.data.zero_()
        alpha.requires_grad_(False)  # in the w step; architecture_gradient sees to its own

    if args.w_optimizer == "sgd":
        w_optimizer = torch.optim.SGD(
            model.weights(),
            args.w_lr,
            args.w_momentum,
            weight_decay=args.w_weight_decay,
            nesterov=args.w_nesterov,
            foreach=True,  # one call for all tensors, on the CPU too
        )
    else:
        w_optimizer = torch.optim.Adam(model.weights(), args.w_lr, weight_decay=args.w_weight_decay)
    alpha_optimizer = torch.optim.Adam(
        model.alphas(), args.alpha_lr, args.alpha_betas, weight_decay=args.alpha_weight_decay
    )
    steps_per_epoch = min(limit or math.inf, len(w_loader))
    last = args.w_lr_min / args.w_lr if args.w_lr else 0.0
    factor = learning_rate_factor("cosine", args.epochs, steps_per_epoch, last)
    scheduler = torch.optim.lr_scheduler.LambdaLR(w_optimizer, factor)
    w_scaler = torch.amp.GradScaler(device.type, enabled=is_fp16)
    # The second order computes in float32 whatever --amp says.
    alpha_scaler = torch.amp.GradScaler(device.type, enabled=is_fp16 and args.order == 1)
    stateful = {
        "model": model,
        "w_optimizer": w_optimizer,
        "alpha_optimizer": alpha_optimizer,
        "scheduler": scheduler,
        "w_scaler": w_scaler,
        "alpha_scaler": alpha_scaler,
    }

    model.genotype(max_skips=args.max_skips)  # a ValueError where nothing else is left to choose
    default = "runs/demo-search" if args.demo else "runs/search"
    with open_run("train_search.py", argv, default, vars(args), processes, tqdm.write) as run:
        progress = Progress(run, vars(args), stateful, steps_per_epoch, device)
        if args.resume:
            progress.resume()
        run.save_json("args.json", vars(args))
        run.log(
            f"search on {args.dataset}: {len(w_half.labels)} images for w, "
            f"{len(alpha_half.labels)} for alpha, {num_classes} classes; supernet with "
            f"{count_parameters(model) / 1e6:.3f} M parameters, "
            f"{count_multiply_adds(model, w_loader.image_size) / 1e6:.1f} M multiply-adds on "
            f"{device}; run folder {run.path}"
        )
        arguments = table(vars(args))
        run.report(lambda writer: writer.add_text("arguments", arguments), progress.epoch + 1)
        genotype = model.genotype(max_skips=args.max_skips)
        part = limit or math.ceil(1000 / args.batch_size)  # batches, to rank random cells on
        evaluation = steps_per_epoch / 6  # a forward pass is a third of a training pass, of two
        if args.method == "random":  # a step has one
            num_batches = min(limit or math.inf, len(eval_loader))
            on_all = max(1, args.candidates // 10) + 1
            evaluation = (args.candidates * part + on_all * num_batches) / 3

        # The Hessian takes several times the memory of a step: fewer images where that is short.
        hessian_images = args.batch_size // args.grad_accum
        hessian_images = max(2, hessian_images // 8) if args.checkpoint_cells else hessian_images
        before = [record["eigenvalue_images"] for record in progress.history]
        hessian_images = min([hessian_images, *filter(None, before)])

        def evaluate_on(number, network):
            batches = progress.evaluation(itertools.islice(eval_loader, number))
            return evaluate(network, batches, num_classes, autocast, processes.sum)

        def grows_too_fast(history) -> bool:
            every = max(1, args.hessian_every)
            records = history[args.alpha_warmup_epochs :]  # of epochs in which alpha moved
            if (len(records) - 1) % every:
                return False
            values = [record["signs"].get("largest eigenvalue") for record in records[::every]]
            return should_stop(values, every)

        def save_picture(name, picture) -> None:
            run.attempt(f"{name}.png", partial(picture.save, run / f"{name}.png"))

        for epoch in progress.epochs():
            if args.early_stop and grows_too_fast(progress.history):
                break
            schedule(epoch / max(1, args.epochs - 1), model, (w_loader, alpha_loader), args)
            batches = zip(  # the alpha half is never the smaller one: it lasts for the epoch
                w_loader.epoch(epoch, progress.step),
                alpha_loader.epoch(epoch, progress.step),
                strict=False,
            )
            again = epoch == args.alpha_warmup_epochs  # from here on, a step takes longer
            batches = progress.training(batches, evaluation, tqdm, again)
            train_epoch(
                model,
                batches,
                (w_optimizer, alpha_optimizer),
                scheduler,
                (w_scaler, alpha_scaler),
                autocast,
                progress,
                xi=progress.lr if args.order == 2 else 0.0,
                train_alpha=args.method == "darts" and epoch >= args.alpha_warmup_epochs,
                args=args,
            )
            for scaler in (w_scaler, alpha_scaler):
                progress.guard.check_scale(scaler)
            with uncompiled():
                if args.method == "random":
                    take_best_path(
                        model,
                        args.candidates,
                        generator_of(args.seed, 2, epoch),
                        lambda path, on_all: evaluate_on(limit if on_all else part, path).accuracy,
                    )
                previous, genotype = genotype, model.genotype(max_skips=args.max_skips)
                val = discrete = evaluate_on(limit, discretised(model, genotype))
                if args.method == "darts":  # a random search's alphas are one cell already
                    val = evaluate_on(limit, model)
                eigenvalue = None
                # In the first epoch that moves alpha, and every so many before and after it.
                since = epoch - args.alpha_warmup_epochs
                if args.hessian_every and since % args.hessian_every == 0 and hessian_images:
                    progress.save()  # before memory is asked for more than the training took
                    tried, batch = hessian_images, next(iter(eval_loader))
                    eigenvalue, hessian_images = eigenvalue_that_fits(
                        model, F.cross_entropy, batch, tried, processes
                    )
                    if hessian_images < tried:
                        report_memory(run, args, tried, hessian_images)

            train_loss, train_accuracy = progress.means()
            skipped = progress.guard.skipped
            signs = signs_of_collapse(model, genotype)
            signs["accuracy lost in discretisation"] = val.accuracy - discrete.accuracy
            if eigenvalue is not None:
                signs["largest eigenvalue"] = eigenvalue
            record = {
                "epoch": epoch + 1,
                "lr": progress.lr,
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "arch_loss": val.loss,
                "arch_accuracy": val.accuracy,
                "skipped_batches": skipped,
                "seconds": time.time() - progress.epoch_started,
                "genotype": format_genotype(genotype, "quark0"),
                "signs": signs,
                "eigenvalue_images": hessian_images,
            }
            run.log(
                f"epoch {epoch + 1:3d}/{args.epochs}  lr {record['lr']:.4f}  "
                f"w half: loss {record['train_loss']:.3f}, "
                f"accuracy {100 * record['train_accuracy']:.2f} %  "
                f"alpha half: loss {val.loss:.3f}, accuracy {100 * val.accuracy:.2f} %  "
                f"{record['seconds']:.0f} s  "
                f"genotype {'unchanged' if genotype == previous else 'changed'}  "
                f"skips {signs['skips in the cell/normal']} + {signs['skips in the cell/reduce']}, "
                f"discretised {100 * discrete.accuracy:.2f} %"
                + ("" if eigenvalue is None else f", eigenvalue {eigenvalue:.3g}")
                + (f"  {skipped} batches skipped so far" if skipped else "")
            )
            pictures = {}
            for kind, mix in zip(("normal", "reduce"), model.mixtures(), strict=True):
                pictures[f"cell_{kind}"] = draw_cell(genotype, kind)
                method = args.relaxation if args.method == "darts" else "random search"
                pictures[f"alphas_{kind}"] = draw_alphas(
                    mix.tolist(), model.primitives, f"{method}, {kind} cell"
                )
            for name, picture in pictures.items():
                save_picture(name, picture)
            run.save_text("genotype.json", format_genotype(genotype, "json") + "\n")
            report_epoch = partial(report, model=model, record=record, pictures=pictures)
            run.report(report_epoch, epoch + 1)
            (group,) = w_optimizer.param_groups
            # Factor and limit of RobustDARTS' script for DARTS-ADA (1e-9: of rounding).
            decay = 10 * group["weight_decay"]
            adapts = args.adapt_weight_decay and 0 < decay <= 0.03 + 1e-9
            if adapts and grows_too_fast([*progress.history, record]):
                progress.go_back(epoch + 1 - LOOK_BACK * args.hessian_every)
                (group,) = w_optimizer.param_groups
                group["weight_decay"] = decay
                run.log(
                    "the largest eigenvalue has grown too fast: back to the end of epoch "
                    f"{progress.epoch}, with weight decay {decay:.3g}"
                )
                progress.save()
            else:
                progress.finish_epoch(record, keep=args.adapt_weight_decay)

        found = progress.history[-1]
        if args.early_stop and grows_too_fast(progress.history):
            back = LOOK_BACK * args.hessian_every
            found = progress.history[-1 - back]
            genotype = parse_genotype(found["genotype"])
            for kind in ("normal", "reduce"):
                save_picture(f"cell_{kind}", draw_cell(genotype, kind))
            run.log(
                f"stopped early, at the genotype of {back} epochs ago: the largest eigenvalue "
                "has grown too fast since then"
            )
        # Again: the run may have ended before it was written.
        run.save_text("genotype.json", format_genotype(genotype, "json") + "\n")
        result = {
            "arch_accuracy": found["arch_accuracy"],
            "genotype": format_genotype(genotype, "quark0"),
            "seconds": time.time() - progress.started,
            "device": str(device),
            "versions": versions(),
            "args": vars(args),
            "history": progress.history,
            "out_dir": str(run.path),
        }
        run.save_json("result.json", result)
        run.log(f"accuracy on the alpha half: {100 * result['arch_accuracy']:.2f} %")
        run.log(f"genotype: {result['genotype']}")
        run.log(f"pictures: {run / 'cell_normal.png'}, {run / 'cell_reduce.png'}")
        run.log(f"next: {next_command(args, str(run.path))}")
        run.check_written()
    return result


def report_memory(run: RunFolder, args: argparse.Namespace, tried: int, fits: int) -> None:
    """Say that the eigenvalue is of fewer images from now on, or left out; ValueError if needed."""
    if fits:
        run.log(
            f"out of memory: the largest eigenvalue of {tried} images does not fit; from here on "
            f"it is that of {fits}"
        )
    elif args.early_stop or args.adapt_weight_decay:
        flag = "--early-stop" if args.early_stop else "--adapt-weight-decay"
        raise ValueError(
            f"{flag} needs the largest eigenvalue, which does not fit into memory, even of two "
            f"images; start anew with fewer --init-channels or without {flag}"
        )
    else:
        run.log(
            "out of memory: the largest eigenvalue does not fit, even of two images; the search "
            "goes on without it, as with --hessian-every 0"
        )


def select(args: argparse.Namespace, argv: list[str] | None) -> dict:
    """Search with each seed, train each cell on half of the images, keep the best on the others.

    Each search and each training has a run folder of its own in that of the selection.
    """
    train_final.parse_args(final_arguments(args, "", False, "DARTS_V2"))  # refuse before, not after
    processes = Processes(choose_device(args.device))
    with open_run("train_search.py", argv, "runs/select", vars(args), processes, tqdm.write) as run:
        if args.resume:
            before = run.load_checkpoint()["args"]
            check_same_arguments(vars(args), before)
            if args.epochs != before["epochs"]:
                raise ValueError(
                    f"--epochs {args.epochs}: the cells of this selection are of searches of "
                    f"{before['epochs']}"
                )
        run.save_checkpoint({"args": vars(args)})
        run.save_json("args.json", vars(args))

        def folder(name: str) -> dict:
            begun = any((run / name / file).exists() for file in BEGUN)
            return {"out_dir": str(run / name), "resume": processes.from_first(begun)}

        results = []
        try:
            for seed in args.seeds:
                settings = {"seed": seed, "seeds": None} | folder(f"search-{seed}")
                found = search(argparse.Namespace(**vars(args) | settings), argv)
                settings = folder(f"final-{seed}") | {"genotype": found["genotype"]}
                results.append((seed, found, train_final.main(final_arguments(args, **settings))))
                if run.signal is not None:  # between a search and a training
                    run.stop(run.signal)
        except SystemExit:
            run.log(f"continue the selection with: {run.command}")
            raise

        ranking = rank(run, results)
        best = ranking[0]["seed"]
        result = {"ranking": ranking, "args": vars(args), "out_dir": str(run.path)}
        run.save_json("result.json", result)
        run.log(f"best: seed {best}; pictures of all cells: {run / 'cells.png'}")
        run.log(f"next: {next_command(args, str(run.path))}")
        run.check_written()
    return result


def final_arguments(
    args: argparse.Namespace, out_dir: str, resume: bool, genotype: str
) -> list[str]:
    """Return the arguments with which train_final.py trains a cell for the selection."""
    values = {
        "genotype": genotype,
        "out_dir": out_dir,
        "epochs": args.select_epochs,
        "init_channels": args.select_channels,
        "num_cells": args.select_cells,
    }
    same = ("dataset", "data_dir", "image_size", "subset", "batch_size", "grad_accum", "seed")
    same += ("device", "amp", "channels_last", "checkpoint_minutes", "on_nonfinite")
    values |= {name: getattr(args, name) for name in same if getattr(args, name) is not None}
    if args.dataset == "folder":
        values |= {"in_memory": "always"}  # as the search has them
    flags = ["holdout"] + ["resume"] * resume
    flags += [
        name for name in ("demo", "fast_dev_run", "compile", "deterministic") if getattr(args, name)
    ]
    pairs = [[f"--{name.replace('_', '-')}", str(value)] for name, value in values.items()]
    return sum(pairs, []) + [f"--{flag.replace('_', '-')}" for flag in flags]


def next_command(args: argparse.Namespace, folder: str) -> str:
    """Return the command that trains the cell of a run folder on the dataset of its search."""
    command = ["python", "train_final.py"]
    if args.demo:
        command += ["--demo"]
    else:
        command += ["--dataset", args.dataset, "--data-dir", args.data_dir]
        command += ["--image-size", str(args.image_size)] if args.image_size else []
    command += ["--seed", str(args.seed)] if args.dataset == "synthetic" else []
    return shlex.join([*command, "--genotype", folder])


def report(writer, model, record, pictures) -> None:
    """Write an epoch to TensorBoard."""
    epoch = record["epoch"]
    for key in ("train_loss", "arch_loss", "train_accuracy", "arch_accuracy"):
        part, quantity = key.split("_")
        writer.add_scalar(f"{quantity}/{part}", record[key], epoch)
    writer.add_scalar("learning rate/w", record["lr"], epoch)
    writer.add_text("genotype", f"`{record['genotype']}`", epoch)
    for name, sign in record["signs"].items():
        writer.add_scalar(name, sign, epoch)
    for kind, mix in zip(("normal", "reduce"), model.mixtures(), strict=True):
        edges = [(node, j) for node in range(model.num_nodes) for j in range(2 + node)]
        for (node, j), row in zip(edges, mix.tolist(), strict=True):
            for op, weight in zip(model.primitives, row, strict=True):
                writer.add_scalar(f"mix {kind}, state {2 + node} from {j}/{op}", weight, epoch)
    for name, picture in pictures.items():
        writer.add_image(name, np.asarray(picture), epoch, dataformats="HWC")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"train_search.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        sys.exit(f"train_search.py: error: {error}")
