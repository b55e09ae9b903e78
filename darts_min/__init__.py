"""DARTS (arXiv 1806.09055), differentiable architecture search, in plain PyTorch."""

__version__ = "0.1.0"

from darts_min.convert.weights import load_network
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
    "load_network",
]
