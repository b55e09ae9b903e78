"""Entry points of torch.hub: `torch.hub.load(DIR, "darts_v2_c16_l8_cifar10", source="local")`."""

from darts_min import Network, load_network  # noqa: F401  also load_network is an entry point

dependencies = ["numpy", "torch"]


def darts_v2_c16_l8_cifar10(pretrained: bool = True) -> Network:
    """Return DARTS_V2, trained (10 classes of CIFAR-10, 32x32), in evaluation mode.

    `.details` has its classes and the mean and std of its images. Without `pretrained`, one of the
    same sizes with new weights, in training mode.
    """
    network = load_network("darts_v2_c16_l8_cifar10")
    return network if pretrained else Network(network.genotype, **network.config)


def s2_c16_l8_cifar10(pretrained: bool = True) -> Network:
    """Return the same for the default network, whose cell this project found in the space S2."""
    network = load_network("s2_c16_l8_cifar10")
    return network if pretrained else Network(network.genotype, **network.config)
