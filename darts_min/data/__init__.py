"""Images and labels: where they come from, and how they become batches.

datasets.py   load a dataset, hold images in memory, split them, take a subset
loader.py     batches of images in memory: crop, flip, normalise, cutout
folder.py     folders of images: their files, and batches of those that stay in files
batches.py    which images come in which batch, with which random numbers
"""

from darts_min.data.batches import generator_of
from darts_min.data.datasets import (
    DATASETS,
    IN_MEMORY,
    Dataset,
    Images,
    balanced_subset,
    channel_statistics,
    images_of,
    into_memory,
    load_dataset,
    split_half,
    synthetic_dataset,
)
from darts_min.data.folder import FileLoader, ImageFiles, read_image
from darts_min.data.loader import Loader, make_loader

__all__ = [
    "DATASETS",
    "IN_MEMORY",
    "Dataset",
    "FileLoader",
    "ImageFiles",
    "Images",
    "Loader",
    "balanced_subset",
    "channel_statistics",
    "generator_of",
    "images_of",
    "into_memory",
    "load_dataset",
    "make_loader",
    "read_image",
    "split_half",
    "synthetic_dataset",
]
