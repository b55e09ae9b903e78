"""DARTS (arXiv 1806.09055), differentiable architecture search, in plain PyTorch.

The paper, in reading order:

    architect.py    Eq. 5-8: the gradient of L_val with respect to alpha
    mixed_op.py     Eq. 2, for all edges that leave a state at once
    supernet.py     search cell, supernet, alphas, genotype (Sec. 2.2, 2.4)
    relaxations.py  alphas -> mixture weights, in DARTS and its successors
    spaces.py       which operations an edge may use
    genotypes.py    PRIMITIVES, Genotype, how a cell is chosen, published cells
    operations.py   the candidate operations
    network.py      the network built from a genotype
    kernels.py      the same sums by other calls, where PyTorch's are slow or faulty on the CPU
    draw.py         pictures of cells and alphas

Not needed to understand DARTS:

    data/           datasets, augmentation, batches
    run/            flags, devices, processes, run folders, progress
    convert/        genotypes and weights of all codes, files of networks, export
    judge/          is the cell any good: estimate, signs, cost, random search, selection
"""

__version__ = "0.1.0"

from darts_min.convert import format_genotype, load_network, parse_genotype
from darts_min.genotypes import PRIMITIVES, Genotype
from darts_min.judge.estimate import Estimate, estimate_accuracy
from darts_min.network import Network
from darts_min.supernet import Supernet

__all__ = [
    "PRIMITIVES",
    "Estimate",
    "Genotype",
    "Network",
    "Supernet",
    "estimate_accuracy",
    "format_genotype",
    "load_network",
    "parse_genotype",
]
