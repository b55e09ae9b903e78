"""Search for a cell with DARTS (arXiv 1806.09055, Sec. 2 and 3.1).

    python train_search.py --demo                      # offline, 2 CPU cores: under 2 minutes
    python train_search.py --dataset cifar10           # the paper's search, first order
    python train_search.py --dataset cifar10 --order 2
    python train_search.py --dataset cifar10 --relaxation gumbel   # GDAS; or another successor
    python train_search.py --dataset cifar10 --method random       # the baseline
    python train_search.py --dataset cifar10 --seeds 0 1 2 3 --select-epochs 100    # Sec. 3.2

Expected on CIFAR-10 (paper, not run here): the best cell of four searches reaches 2.8-3.0 % test
error after the final training. Four searches take 1.5 (order 1) or 4 (order 2) GPU days on a GTX
1080 Ti, the choice among them one more. README has what was run here.
"""

import argparse
import itertools
import math
import time
from argparse import BooleanOptionalAction
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import train_final
from darts_min.architect import architecture_gradient
from darts_min.convert.genotype_texts import format_genotype, parse_genotype
from darts_min.data import (
    Dataset,
    Images,
    Loader,
    balanced_subset,
    channel_statistics,
    generator_of,
    into_memory,
    load_dataset,
    split_half,
)
from darts_min.genotypes import PRIMITIVES, PUBLISHED
from darts_min.judge import selection
from darts_min.judge.cost import count_multiply_adds, count_parameters
from darts_min.judge.estimate import estimate_accuracy
from darts_min.judge.random_search import take_best_path
from darts_min.judge.report import describe, draw_cells, expected_of, report_epoch
from darts_min.judge.signs import discretised, signs_of_collapse
from darts_min.judge.watch import EigenvalueWatch
from darts_min.network import Network
from darts_min.relaxations import Dirichlet, Gumbel, Sigmoid, SinglePath, Softmax
from darts_min.run import flags
from darts_min.run.evaluation import Evaluation, evaluate
from darts_min.run.flags import AMOUNT, COUNT, COUNT_OR_0, POSITIVE, SHARE, number
from darts_min.run.machine import Machine
from darts_min.run.progress import Progress
from darts_min.run.run_folder import markdown_table, open_run
from darts_min.run.step import Step, make_w_step
from darts_min.spaces import parse_space
from darts_min.supernet import Supernet

DEMO = dict(dataset="synthetic", image_size=16, subset=2000, batch_size=32, epochs=6)
DEMO |= dict(init_channels=4, num_cells=3, w_lr=0.05, alpha_lr=0.01, alpha_warmup_epochs=0)
DEMO |= dict(select_epochs=2, select_channels=8, select_cells=3)
# NNI's tutorial, first run: no clipping, schedule or momentum; w by Adam.
PLAIN = dict(epochs=10, w_optimizer="adam", w_lr=1e-3, w_lr_min=1e-3, w_weight_decay=1e-4)
PLAIN |= dict(w_grad_clip=0.0)
GDAS = dict(epochs=250, batch_size=256, w_weight_decay=5e-4, w_nesterov=True)
DRNAS = dict(w_lr=0.1, w_lr_min=0.0, alpha_lr=6e-4, alpha_warmup_epochs=10)
FAIR_DARTS = dict(w_lr=0.005, batch_size=128, alpha_lr=3e-3, alpha_betas=[0.9, 0.999])
PC_DARTS = dict(w_lr=0.1, w_lr_min=0.0, batch_size=256, alpha_lr=6e-4, alpha_warmup_epochs=15)
WITHOUT_NONE = dict(space=",".join(PRIMITIVES[1:]))
# How each relaxation is made, and the defaults that the script of its paper has instead.
RELAXATIONS = {
    "softmax": (lambda args: Softmax(), {}),
    "gumbel": (lambda args: Gumbel(*args.tau), GDAS),
    "dirichlet": (lambda args: Dirichlet(), DRNAS | WITHOUT_NONE),
    "sigmoid": (lambda args: Sigmoid(args.zero_one_weight), FAIR_DARTS | WITHOUT_NONE),
    "partial": (lambda args: Softmax(), PC_DARTS),  # the rest is in the cells
}
# Flags that one choice alone uses: the argument that chooses, and its values.
OF_ALPHA = ("relaxation", "order", "alpha_warmup_epochs", "alpha_lr", "alpha_betas")
OF_ALPHA += ("alpha_weight_decay", "early_stop", "adapt_weight_decay", "max_skips", "compile")
ONLY_WITH = flags.FOLDER_ONLY | {
    "tau": ("relaxation", "gumbel"),
    "zero_one_weight": ("relaxation", "sigmoid"),
    "partial": ("relaxation", "partial"),
    "candidates": ("method", "random"),
    **dict.fromkeys(OF_ALPHA, ("method", "darts")),
    "w_momentum": ("w_optimizer", "sgd"),
    "w_nesterov": ("w_optimizer", "sgd"),
}


def parse_args(argv: list[str] | None, has_own_dataset: bool = False) -> argparse.Namespace:
    # fmt: off
    parser = flags.make_parser("Search for a cell with DARTS.")
    add = flags.add_run_flags(parser, "runs/search", demo="search offline, in under 2 minutes")
    flags.add_training_flags(add)
    add("--recipe", choices=("darts", "plain"), default="darts", help=flags.RECIPE_HELP)
    add = flags.add_data_flags(parser, batch_size=64, subset="training")
    flags.add_grad_accum_flag(add)
    add("--search-cutout", type=COUNT_OR_0, default=0,
        help="side of the cutout square in pixels; its probability grows linearly to 1; 0: off")
    add = parser.add_argument_group("supernet").add_argument
    flags.add_size_flags(add, init_channels=16, num_cells=8)
    add("--num-nodes", type=int, default=4, help="intermediate nodes of a cell")
    add("--space", default="darts",
        help="operations that an edge may use: darts, nni (in NNI's order), RobustDARTS' S1 to S4, "
        "or a list such as none,skip_connect,sep_conv_3x3")
    add("--search-drop-path", type=SHARE, default=0.0,
        help="probability of dropping an edge in the last epoch; grows linearly from 0")
    add("--checkpoint-cells", action="store_true",
        help="compute each cell again in the backward pass: less memory, more time")
    add("--cuda-graphs", action="store_true",
        help="on a GPU, record both halves of a step in each epoch, and replay them (not measured)")
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=("darts", "random"), default="darts",
        help="learn the alphas, or train random cells with shared weights and rank them")
    add("--relaxation", choices=RELAXATIONS, default="softmax",
        help="softmax: DARTS; gumbel: GDAS; dirichlet: DrNAS; sigmoid: FairDARTS; "
        "partial: PC-DARTS; each brings the defaults of its authors' script")
    add("--tau", type=POSITIVE, nargs=2, default=[10, 0.1], metavar=("START", "END"),
        help="--relaxation gumbel: temperature in the first and in the last epoch")
    add("--zero-one-weight", type=AMOUNT, default=10.0,
        help="--relaxation sigmoid: weight of the zero-one loss")
    add("--partial", type=number(int, "[2, inf)"), default=4, metavar="K",
        help="--relaxation partial: mixed operations see 1/K of the channels")
    add("--candidates", type=COUNT, default=100,
        help="--method random: cells ranked after each epoch")
    add = flags.add_optimizer_flags(parser, epochs=50, w_lr_min=1e-3)
    add("--w-nesterov", action=BooleanOptionalAction, default=False,
        help="use Nesterov's momentum in SGD")
    add("--order", type=int, choices=(1, 2), default=1,
        help="order of the gradient in alpha; 1 leaves out the second term of Eq. 7, 2 is slower")
    add("--alpha-warmup-epochs", type=COUNT_OR_0, default=0, help="epochs that train w alone")
    add("--alpha-lr", type=AMOUNT, default=3e-4, help="learning rate of alpha, for Adam")
    add("--alpha-betas", type=SHARE, nargs=2, default=[0.5, 0.999], help="betas of Adam for alpha")
    add("--alpha-weight-decay", type=AMOUNT, default=1e-3, help="weight decay of alpha")
    add = flags.add_watch_flags(parser)
    add("--keep", choices=("last", "best"), default="last",
        help="cell to keep: of the last epoch, or of the epoch with the best accuracy expected on "
        "CIFAR-10; best is not the paper's protocol, because it uses NAS-Bench-301")
    flags.add_selection_flags(parser)
    # fmt: on
    args, given = flags.parse_flags(parser, argv, presets, ONLY_WITH, has_own_dataset)
    check_together(args, given)
    if args.fast_dev_run:  # everything that a run does, in its only epoch
        args.epochs, args.alpha_warmup_epochs = 1, 0
        args.hessian_every = min(args.hessian_every, 1)
    return args


def presets(args: argparse.Namespace) -> dict:
    """Return the defaults that depend on the arguments chosen; of two, the later one wins."""
    _, defaults = RELAXATIONS[args.relaxation]
    result = defaults | ({"hessian_every": 0} if args.method == "random" else {})
    if args.recipe == "plain":
        result |= PLAIN
    if "adam" in (args.w_optimizer, result.get("w_optimizer")) or args.order == 2:
        result |= {"w_nesterov": False}
    if args.demo:
        result |= DEMO | ({"hessian_every": 3} if args.method == "darts" else {})
    return result


def check_together(args: argparse.Namespace, given: set[str]) -> None:
    """Raise a ValueError that names arguments which exclude each other."""
    flags.check_watch_flags(args)
    flags.check_selection_flags(args, given)
    if args.method == "random" and args.hessian_every:
        raise ValueError("--hessian-every: only 0 with --method random, whose alphas learn nothing")
    if args.relaxation == "gumbel" and args.compile:
        raise ValueError("--compile: not with --relaxation gumbel, each of whose steps differs")
    if args.cuda_graphs:
        check_recordable(args)
    if args.w_nesterov and not args.w_momentum:
        raise ValueError("--w-nesterov: needs a --w-momentum above 0")
    if args.w_nesterov and args.order == 2:
        raise ValueError("--order 2: its virtual step has no --w-nesterov (--no-w-nesterov)")
    if args.w_lr_min > args.w_lr:
        raise ValueError(f"--w-lr-min {args.w_lr_min}: must be at most --w-lr, {args.w_lr}")
    if args.alpha_warmup_epochs >= args.epochs and not args.fast_dev_run:
        raise ValueError(
            f"--alpha-warmup-epochs {args.alpha_warmup_epochs}: must be less than --epochs, "
            f"{args.epochs}"
        )
    parse_space(args.space)


def check_recordable(args: argparse.Namespace) -> None:
    """Raise a ValueError that names what a CUDA graph cannot hold, such as random numbers."""
    for flag, is_given in {
        f"--method {args.method}": args.method == "random",
        f"--relaxation {args.relaxation}": args.relaxation in ("gumbel", "dirichlet"),
        f"--space {args.space}": "noise" in parse_space(args.space).primitives,
        f"--search-drop-path {args.search_drop_path}": args.search_drop_path > 0,
        "--checkpoint-cells": args.checkpoint_cells,
        "--compile": args.compile,
    }.items():
        if is_given:
            raise ValueError(f"--cuda-graphs: not with {flag}")


def load_halves(
    args: argparse.Namespace, dataset: Dataset | None, machine: Machine
) -> tuple[Dataset, Images, Loader, Loader, Loader]:
    """Return the dataset, its images to search on, and loaders of the halves for w and for alpha.

    The third loader gives the half for alpha without augmentation.
    """
    if dataset is None:
        where = args.dataset, args.data_dir, args.image_size, args.seed
        with machine.first_alone():
            dataset = load_dataset(*where, "auto", machine.device, channels=args.channels)
    train, generator = dataset.train, torch.Generator().manual_seed(args.seed)
    if args.subset is not None:
        train = balanced_subset(train, args.subset, generator)
    train = into_memory(train, args.image_size, machine.device)
    image_size = train.images.size(1)
    if args.stem == "imagenet" and image_size <= 32:  # BN in the last cells would see one pixel
        raise ValueError(
            f"--stem imagenet: needs --image-size above 32, the images have {image_size}"
        )
    make_loader = partial(
        Loader,
        batch_size=args.batch_size,
        statistics=channel_statistics(train),
        memory_format=machine.memory_format,
        shard=machine.shard,
    )
    halves = [half.to(machine.device) for half in split_half(train, generator)]
    w_loader, alpha_loader = (
        make_loader(half, seed=args.seed, stream=stream, augment=True, cutout=args.search_cutout)
        for stream, half in enumerate(halves)
    )
    return dataset, train, w_loader, alpha_loader, make_loader(halves[1])


def make_supernet(
    args: argparse.Namespace, num_classes: int, in_channels: int, machine: Machine
) -> Supernet:
    """Make the supernet and its relaxation; the alphas need no gradient in the step of w."""
    space = parse_space(args.space)
    model = Supernet(
        num_classes,
        args.init_channels,
        args.num_cells,
        args.num_nodes,
        in_channels,
        *space,
        partial=args.partial if args.relaxation == "partial" else 1,
        stem=args.stem,
    ).to(machine.device, memory_format=machine.memory_format)
    make_relaxation, _ = RELAXATIONS[args.relaxation]
    model.relaxation = make_relaxation(args)
    if args.method == "random":
        none = space.primitives.index("none") if "none" in space.primitives else None
        model.relaxation = SinglePath(none)
    model.checkpoint_cells = args.checkpoint_cells
    machine.compile_cells(model)
    machine.equalise(model.parameters())
    for alpha in model.alphas():
        if args.relaxation == "sigmoid":
            alpha.data.zero_()
        alpha.requires_grad_(False)  # architecture_gradient sees to its own
    return model


def make_steps(
    args: argparse.Namespace, model: Supernet, machine: Machine, steps_per_epoch: int
) -> tuple[Step, Step]:
    """Make the steps of w and of alpha, with their optimizers."""
    weights, nesterov = model.weights(), args.w_nesterov
    w_step = make_w_step(args, model, weights, machine, steps_per_epoch, nesterov=nesterov)
    alpha_optimizer = torch.optim.Adam(
        model.alphas(), args.alpha_lr, args.alpha_betas, weight_decay=args.alpha_weight_decay
    )
    # The second order computes in float32 whatever --amp says.
    can_scale = args.order == 1
    return w_step, Step(alpha_optimizer, model, machine, w_step.guard, can_scale=can_scale)


def schedule(
    done: float, model: Supernet, loaders: Iterable[Loader], drop_path_prob: float
) -> None:
    """Set what changes linearly from the first epoch (`done` 0) to the last one (1)."""
    model.relaxation.at(done)
    model.drop_path_prob = done * drop_path_prob  # and cutout: arXiv 1909.09656, Sec. 5
    for loader in loaders:
        loader.cutout_prob = done


def train_epoch(
    model: Supernet,
    batches: Iterable,
    w_step: Step,
    alpha_step: Step | None,
    machine: Machine,
    xi: float = 0.0,
    grad_accum: int = 1,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Train on `batches` by Alg. 1; yield (loss, logits, target) of the steps of w.

    Without `alpha_step`, only w is trained.
    """

    def loss_fn(logits, target):
        return alpha_step.scale(F.cross_entropy(logits, target))

    def penalty(alphas):
        return alpha_step.scale(model.relaxation.penalty(alphas))

    options = {"grad_accum": grad_accum, "penalty": penalty}
    # The two functions as they are; with --cuda-graphs, recorded anew in each epoch.
    alpha_gradient, w_gradient = machine.recorded(architecture_gradient, forward_backward)
    for train_batch, val_batch in batches:
        # Alg. 1, line 1: update alpha by descending
        # grad_alpha L_val(w - xi grad_w L_train(w, alpha), alpha).
        if alpha_step is not None:
            with machine.autocast():
                alpha_grads = alpha_gradient(
                    model, loss_fn, train_batch, val_batch, xi, w_step.optimizer, **options
                )
            alpha_step(alpha_grads)

        # Alg. 1, line 2: update w by descending grad_w L_train(w, alpha).
        w_step.zero_grad()
        w_grads, loss, outputs = w_gradient(model, train_batch, w_step, machine, grad_accum)
        if w_step(w_grads, loss=loss):
            yield from outputs


def forward_backward(
    model: Supernet, batch: tuple, w_step: Step, machine: Machine, grad_accum: int
) -> tuple[list[Tensor | None], Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """Add up grad_w L_train(w, alpha) in `grad_accum` parts of a batch.

    Return this gradient, the loss of the batch, and (loss, logits, target) of each part.
    """
    mean_loss, outputs = 0.0, []
    for x, target in zip(*(t.chunk(grad_accum) for t in batch), strict=True):
        with machine.autocast():
            logits = model(x)
            loss = F.cross_entropy(logits, target)
        w_step.scale(loss / grad_accum).backward()
        mean_loss = mean_loss + loss.detach() / grad_accum
        outputs.append((loss.detach(), logits.detach(), target))
    return [p.grad for p in w_step.parameters], mean_loss, outputs


def main(argv: list[str] | None = None, dataset: Dataset | None = None) -> dict:
    """Search as `argv` says; `dataset`, in memory, takes the place of --dataset."""
    args = parse_args(argv, dataset is not None)
    return (search if args.seeds is None else select)(args, argv, dataset)


def search(args: argparse.Namespace, argv: list[str] | None, dataset: Dataset | None) -> dict:
    """Search once; write the run folder, and return the result."""
    torch.manual_seed(args.seed)
    how = args.channels_last, args.deterministic, args.compile, args.cuda_graphs
    machine = Machine(args.device, args.amp, *how)
    dataset, train, w_loader, alpha_loader, eval_loader = load_halves(args, dataset, machine)
    num_classes = len(dataset.classes)
    model = make_supernet(args, num_classes, train.channels, machine)
    genotype = model.genotype(max_skips=args.max_skips)  # ValueError if no cell is allowed
    is_estimated = estimate_accuracy(genotype) is not None and "noise" not in model.primitives
    if args.keep == "best" and not is_estimated:
        raise ValueError("--keep best: NAS-Bench-301 has no cells like those of this search")
    steps_per_epoch = min(2 if args.fast_dev_run else math.inf, len(w_loader))
    w_step, alpha_step = make_steps(args, model, machine, steps_per_epoch)

    default = "runs/demo-search" if args.demo else "runs/search"
    with open_run("train_search.py", argv, default, args, machine, tqdm.write) as run:
        progress = Progress(run, vars(args), model, w_step, steps_per_epoch, alpha_step)
        if args.resume:
            progress.resume()
        run.save_json("args.json", vars(args))
        run.report(progress.epoch + 1, texts={"arguments": markdown_table(vars(args))})
        run.log(
            f"search on {args.dataset}: {len(train.labels) // 2} images for w, "
            f"{math.ceil(len(train.labels) / 2)} for alpha, {num_classes} classes; supernet with "
            f"{count_parameters(model) / 1e6:.3f} M parameters, "
            f"{count_multiply_adds(model, w_loader.image_size) / 1e6:.1f} M multiply-adds on "
            f"{machine.device}; run folder {run.path}"
        )
        for note in dataset.notes:
            run.log(note)
        watch = EigenvalueWatch(args, progress)
        for epoch in progress.epochs():
            if watch.stops():
                break
            done = epoch / max(1, args.epochs - 1)
            schedule(done, model, (w_loader, alpha_loader), args.search_drop_path)
            batches = zip(  # the alpha half is never the smaller one: it lasts for the epoch
                w_loader.epoch(epoch, progress.step),
                alpha_loader.epoch(epoch, progress.step),
                strict=False,
            )
            is_new_pace = epoch == args.alpha_warmup_epochs
            evaluation_batches = count_evaluation_batches(args, len(eval_loader))
            batches = progress.training(batches, evaluation_batches, tqdm, is_new_pace)
            trains_alpha = args.method == "darts" and epoch >= args.alpha_warmup_epochs
            xi = progress.lr if args.order == 2 else 0.0
            steps = w_step, alpha_step if trains_alpha else None
            progress.add(train_epoch(model, batches, *steps, machine, xi, args.grad_accum))
            record = measure(args, model, eval_loader, watch)
            report_epoch(args, run, [*progress.history, record], model.primitives)
            if not watch.goes_back(record):
                progress.finish_epoch(record, keep=args.adapt_weight_decay)
        return finish(args, progress, watch)


def count_evaluation_batches(args: argparse.Namespace, num_batches: int) -> int:
    """Return how many batches the evaluation after an epoch takes, for the forecast."""
    if args.method == "darts":
        return num_batches
    return args.candidates * count_ranking_batches(args)


def count_ranking_batches(args: argparse.Namespace) -> int:
    """Return on how many batches random search ranks its cells: of 1000 images or a few more."""
    return 2 if args.fast_dev_run else math.ceil(1000 / args.batch_size)


def measure(
    args: argparse.Namespace, model: Supernet, eval_loader: Loader, watch: EigenvalueWatch
) -> dict:
    """Take the genotype after the training of an epoch; return the record of the epoch."""
    progress, machine = watch.progress, watch.progress.machine
    limit = 2 if args.fast_dev_run else None

    def evaluate_on(network: Supernet, num_batches: int | None) -> Evaluation:
        batches = progress.evaluation(itertools.islice(eval_loader, num_batches))
        num_classes = model.classifier.out_features
        return evaluate(network, batches, num_classes, machine.autocast, machine.sum)

    def accuracy(path: Supernet, on_all: bool) -> float:
        return evaluate_on(path, limit if on_all else count_ranking_batches(args)).accuracy

    with machine.uncompiled():
        if args.method == "random":
            generator = generator_of(args.seed, 2, progress.epoch)
            take_best_path(model, args.candidates, generator, accuracy)
        genotype = model.genotype(max_skips=args.max_skips)
        val = discrete = evaluate_on(discretised(model, genotype), limit)
        if args.method == "darts":  # the alphas of random search are one cell already
            val = evaluate_on(model, limit)
        eigenvalue = watch.measure(model, eval_loader)
    train_loss, train_accuracy = progress.means()
    lost = {"accuracy lost in discretisation": val.accuracy - discrete.accuracy}
    return {
        "epoch": progress.epoch + 1,
        "lr": progress.lr,
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        "arch_loss": val.loss,
        "arch_accuracy": val.accuracy,
        "skipped_batches": progress.guard.skipped,
        "seconds": time.time() - progress.epoch_started,
        "genotype": format_genotype(genotype, "quark0"),
        "expected": expected_of(genotype),
        "signs": signs_of_collapse(model, genotype) | lost | eigenvalue,
        "eigenvalue_images": watch.images,
        "mixtures": [[[round(w, 5) for w in row] for row in m.tolist()] for m in model.mixtures()],
    }


def finish(args: argparse.Namespace, progress: Progress, watch: EigenvalueWatch) -> dict:
    """Write the result of a search, and say what comes next."""
    run, found = progress.run, watch.result()
    if args.keep == "best":
        found = max(progress.history, key=lambda record: record["expected"]["accuracy"])
        run.log(f"kept: the cell of epoch {found['epoch']}, which is expected to be the best")
    genotype = parse_genotype(found["genotype"])
    if found is not progress.history[-1]:
        run.save_pictures(lambda: draw_cells(genotype))
    # Again: the run may have ended before the genotype was written.
    run.save_text("genotype.json", format_genotype(genotype, "json") + "\n")
    names = ("epoch", "arch_accuracy", "genotype", "expected")
    result = {name: found[name] for name in names} | progress.result()
    run.save_json("result.json", result)
    run.log(f"accuracy on the alpha half: {100 * result['arch_accuracy']:.2f} %")
    run.log(f"genotype: {result['genotype']}")
    run.log(describe(estimate_accuracy(genotype)))
    run.log(f"pictures: {run / 'cell_normal.png'}, {run / 'cell_reduce.png'}")
    run.log(f"next: {next_command(args, run.path)}")
    run.check_written()
    return result


def select(args: argparse.Namespace, argv: list[str] | None, dataset: Dataset | None) -> dict:
    """Search with each of --seeds; train each cell on half of the images, test it on the others."""

    def search_cell(settings: dict) -> dict:
        args_of_one = argparse.Namespace(**vars(args) | settings | {"seeds": None})
        return search(args_of_one, argv, dataset)

    def train_cell(settings: dict) -> dict:
        return train_final.main(selection.training_flags(args, settings), dataset)

    # A mistake in the arguments of the trainings is refused before the searches, not after them.
    words = selection.training_flags(args, {"genotype": "DARTS_V2"})
    of_one = train_final.parse_args(words, dataset is not None)
    with torch.device("meta"):
        sizes = of_one.init_channels, of_one.num_cells
        Network(PUBLISHED["DARTS_V2"], 10, *sizes, stem=of_one.stem)
    machine = Machine(args.device)
    with open_run("train_search.py", argv, "runs/select", args, machine, tqdm.write) as run:
        result = selection.select(run, args, search_cell, train_cell)
        run.log(f"next: {next_command(args, run.path)}")
        run.check_written()
    return result


def next_command(args: argparse.Namespace, folder: Path) -> str:
    """Return the command that trains the cell of a run folder on the dataset of its search."""
    values = flags.data_arguments(args) | {"stem": args.stem if args.stem != "cifar" else None}
    if args.demo:
        usual = DEMO | {"data_dir": "data"}
        values = {"demo": True} | {k: v for k, v in values.items() if v != usual.get(k)}
    words = flags.as_flags(values | {"genotype": folder})
    return flags.as_command(args, "train_final.py", words)


if __name__ == "__main__":
    flags.run_as_script("train_search.py", main)
