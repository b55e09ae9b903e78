"""Entry points of torch.hub: `torch.hub.load(DIR, "darts_v2_c16_l8_cifar10", source="local")`."""

from darts_min import Network, load_network  # noqa: F401  load_network is an entry point too

dependencies = ["numpy", "torch"]


def darts_v2_c16_l8_cifar10(pretrained: bool = True) -> Network:
    """Return DARTS_V2 with 16 channels and 8 cells, trained on CIFAR-10, in evaluation mode.

    `.details` has the classes, and the mean and std that images are normalised with. Without
    `pretrained`, the network has new weights and is in training mode.
    """
    network = load_network("darts_v2_c16_l8_cifar10")
    return network if pretrained else Network(network.genotype, **network.config)


def s2_c16_l8_cifar10(pretrained: bool = True) -> Network:
    """Return the same for the default network, whose cell this project found in the space S2."""
    network = load_network("s2_c16_l8_cifar10")
    return network if pretrained else Network(network.genotype, **network.config)
