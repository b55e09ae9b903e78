"""DARTS (arXiv 1806.09055), differentiable architecture search, in plain PyTorch."""

from darts_min.genotypes import PRIMITIVES, Genotype
from darts_min.network import Network
from darts_min.supernet import Supernet

__version__ = "0.1.0"
__all__ = ["PRIMITIVES", "Genotype", "Network", "Supernet"]
