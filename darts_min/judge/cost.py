"""What a network costs: parameters and multiply-adds."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from darts_min.network import Network


def count_parameters(model: nn.Module) -> int:
    """Count parameters, leaving the auxiliary head out (it is not used after training)."""
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if not name.startswith("auxiliary_head."))


@torch.no_grad()
def count_multiply_adds(model: nn.Module, image_size: int | tuple[int, int] = 32) -> int:
    """Count the multiply-adds of convolutions and matrix products in the forward pass of one image.

    Works on any model that begins with a convolution; nothing is computed, and `model` is left as
    it is.
    """
    model = copy.deepcopy(model).to("meta").eval()
    in_channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, in_channels, *size, device="meta"))
    return counter.get_total_flops() // 2


def check_cost(
    make: Callable[[int], Network],
    init_channels: int,
    image_size: int,
    max_parameters: float | None,
    max_multiply_adds: float | None,
) -> None:
    """Raise a ValueError if `make(init_channels)` is too big, with the largest number that fits.

    Both limits are in millions; None: no limit.
    """

    def excess(channels: int) -> str | None:
        with torch.device("meta"):
            network = make(channels)
        for what, count, limit in (
            ("parameters", count_parameters(network), max_parameters),
            ("multiply-adds", count_multiply_adds(network, image_size), max_multiply_adds),
        ):
            if limit is not None and count > limit * 1e6:
                return f"{count / 1e6:.4g} M {what}, more than the {limit:g} M allowed"
        return None

    if (problem := excess(init_channels)) is None:
        return
    with torch.device("meta"):
        step = 2 if make(init_channels).config["stem"] == "imagenet" else 1
    fits, too_many = 0, init_channels // step
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if excess(step * middle) is None else (fits, middle)
    advice = f"{step * fits} is the largest number that fits" if fits else "no number fits"
    raise ValueError(f"{init_channels} initial channels give {problem}; {advice}")
