"""Search spaces: the operations that each edge chooses from. Without torch."""

from typing import NamedTuple

from .genotypes import PRIMITIVES, SHORT_NAMES
from .operations import OPS


class Space(NamedTuple):
    """Operations, and which of them each edge may use: (normal, reduce), or None where it is all.

    The choices come edge by edge, in (node, predecessor) order.
    """

    primitives: tuple[str, ...]
    choices: tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]] | None = None


def _pairs(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(SHORT_NAMES[op] for op in pair.split("/")) for pair in text.split())


# S1 to S4 are those of RobustDARTS (arXiv 1909.09656, Sec. 3), where plain DARTS fails.
SPACES = {
    "darts": Space(PRIMITIVES),
    "nni": Space((*PRIMITIVES[1:], "none")),  # NNI 1.x and 2.x: `none` is an extra, last column
    "S1": Space(
        PRIMITIVES[1:5] + PRIMITIVES[6:],
        (
            _pairs(
                "skip/dil3 skip/dil5 skip/dil5 skip/sep3 skip/dil3 max/skip skip/sep3 "
                "skip/sep3 skip/dil3 skip/sep3 max/skip skip/dil3 dil3/dil5 dil3/dil5"
            ),
            _pairs(
                "max/avg max/dil3 max/avg max/avg skip/dil5 max/avg max/sep3 "
                "skip/dil3 skip/dil5 max/avg max/avg skip/dil5 skip/dil5 skip/dil5"
            ),
        ),
    ),
    "S2": Space(("skip_connect", "sep_conv_3x3")),
    "S3": Space(("none", "skip_connect", "sep_conv_3x3")),
    "S4": Space(("noise", "sep_conv_3x3")),
}


def parse_space(text: str) -> Space:
    """Return the space of a name in `SPACES`, or of operations separated by commas.

    Raises ValueError on what is neither.
    """
    if text in SPACES:
        return SPACES[text]
    names = tuple(name.strip() for name in text.split(","))
    known = ("none", *OPS)
    unknown = [name for name in names if name not in known]
    if unknown:
        listed = f"{', '.join(SPACES)}, or some of {', '.join(known)} with commas between"
        raise ValueError(f"space {text!r}: {unknown[0]!r} is not known; known are {listed}")
    return Space(names)
