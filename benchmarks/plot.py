"""Draw points in a plane, with Pillow alone: the pictures of the study."""

from collections.abc import Mapping, Sequence

from PIL import Image

from darts_min.draw import GREY, INK, LABEL, MARGIN, PAPER, SHARES, TITLE, Box, Canvas, text_width

PLOT_WIDTH, PLOT_HEIGHT, DOT = 560, 360, 6
HUES = [SHARES[i] for i in (4, 1, 3, 6, 5, 2, 7)]

Points = Sequence[tuple[float, float]]


def scatter(
    groups: Mapping[str, Points],
    title: str,
    x_title: str,
    y_title: str,
    x_ticks: Sequence[float],
    y_ticks: Mapping[float, str],
    lines: Sequence[Points] = (),
) -> Image.Image:
    """Draw each group of points (x, y) in a colour of its own, with a legend.

    The first and the last tick of an axis are its ends; `y_ticks` gives their texts. Grey lines
    join the points of each of `lines`.
    """
    names = list(y_ticks.values())
    left = MARGIN + 14 + max(text_width(name, LABEL) for name in [*names, y_title])
    top = MARGIN + TITLE + 40
    legend = left + PLOT_WIDTH + 28
    width = legend + 24 + max(text_width(name, LABEL) for name in groups) + MARGIN
    canvas = Canvas((max(width, 2 * MARGIN + text_width(title, TITLE)), top + PLOT_HEIGHT + 80))
    canvas.text((MARGIN, MARGIN + TITLE / 2), title, TITLE, INK, "left")
    canvas.text((MARGIN, top - 18), y_title, LABEL, INK, "left")
    canvas.text((left + PLOT_WIDTH / 2, top + PLOT_HEIGHT + 48), x_title, LABEL, INK)

    heights = list(y_ticks)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x, y = point
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - heights[0]) / (heights[-1] - heights[0])
        return left + PLOT_WIDTH * across, top + PLOT_HEIGHT * (1 - up)

    for tick in x_ticks:
        x, _ = place((tick, heights[0]))
        canvas.line([(x, top), (x, top + PLOT_HEIGHT)], SHARES[0])
        canvas.text((x, top + PLOT_HEIGHT + 18), f"{tick:g}", LABEL, INK)
    for tick, name in y_ticks.items():
        _, y = place((x_ticks[0], tick))
        canvas.line([(left, y), (left + PLOT_WIDTH, y)], SHARES[0])
        canvas.text((left - 10 - text_width(name, LABEL), y), name, LABEL, INK, "left")
    for line in lines:
        canvas.line([place(point) for point in line], GREY)
    for i, (name, points) in enumerate(groups.items()):
        fill = HUES[i % len(HUES)]
        label = legend, top + 10 + 24 * i
        canvas.text((label[0] + 18, label[1]), name, LABEL, INK, "left")
        for x, y in [label, *map(place, points)]:
            canvas.box(Box(x - DOT, y - DOT, x + DOT, y + DOT), fill, PAPER, radius=DOT, width=1)
    return canvas.finish()
