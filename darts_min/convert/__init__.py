"""Genotypes and networks of other DARTS codes, read and written; and the files of networks."""

from darts_min.convert.genotype_texts import format_genotype, parse_genotype, read_genotype
from darts_min.convert.state_dicts import (
    network_from_nni,
    network_from_pytorchcv,
    network_from_quark0,
    network_to_nni,
    network_to_quark0,
    supernet_from_quark0,
    supernet_to_quark0,
)
from darts_min.convert.weights import load_network, save_network

__all__ = [
    "format_genotype",
    "load_network",
    "network_from_nni",
    "network_from_pytorchcv",
    "network_from_quark0",
    "network_to_nni",
    "network_to_quark0",
    "parse_genotype",
    "read_genotype",
    "save_network",
    "supernet_from_quark0",
    "supernet_to_quark0",
]
