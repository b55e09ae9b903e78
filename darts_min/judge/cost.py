"""Count what a network costs: parameters and multiply-adds."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from darts_min.network import Network


def count_parameters(model: nn.Module) -> int:
    """Count the parameters without those of the auxiliary head, which only training uses."""
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if not name.startswith("auxiliary_head."))


@torch.no_grad()
def count_multiply_adds(model: nn.Module, image_size: int | tuple[int, int] = 32) -> int:
    """Count the multiply-adds of convolutions and matrix products in the forward pass of one image.

    `model` is any model that begins with a convolution. It does not change; nothing is computed.
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
    """Raise a ValueError if the network `make(init_channels)` is bigger than a limit.

    Both limits are in millions; None: no limit. The network is made without memory for its tensors.
    """
    with torch.device("meta"):
        network = make(init_channels)
    for what, count, limit in (
        ("parameters", count_parameters(network), max_parameters),
        ("multiply-adds", count_multiply_adds(network, image_size), max_multiply_adds),
    ):
        if limit is not None and count > limit * 1e6:
            raise ValueError(
                f"{init_channels} initial channels give {count / 1e6:.4g} M {what}, "
                f"{count / (limit * 1e6):.3g} times the {limit:g} M allowed"
            )
