"""Pictures of a cell and of the weights it is chosen from. With Pillow alone.

A cell is drawn like a subway map, from left to right. A state has a row of its own, and a column by
its depth. An edge leaves along its source's row, changes rows on a lane of its own in the gap left
of its target, and enters the target at a port of its own, through its label. So an edge never runs
through a box or another label, and two edges meet at right angles if at all.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from .genotypes import Genotype, check_genotype

# Pillow does not antialias: draw at SCALE pixels per unit, then shrink to PIXELS per unit.
SCALE, PIXELS = 4, 2

MARGIN, TITLE, TEXT, LABEL = 24, 22, 20, 14  # units; the last three are font sizes
BOX_HEIGHT, INPUT_WIDTH, NODE_WIDTH, ROW_GAP = 60, 76, 60, 16
PORT, LABEL_HEIGHT, ARROW = 15, 23, 28  # port off the box's middle; line from label to port
LANE, EXIT, CORNER = 13, 9, 8  # between lanes; between the lines that leave a box; radius

# Okabe and Ito's colour-blind safe hues, darkened until they are legible as text on white.
COLORS = {
    "sep": "#0072b2",
    "dil": "#a03c7c",
    "max": "#b84f00",
    "avg": "#b84f00",
    "skip": "#007a59",
    "noise": "#8a6d00",
}
OUTPUT = -1  # the place of the line to the output among the numbers of a cell's edges
INK, GREY, PAPER = "#222222", "#8a8a8a", "#ffffff"
INPUT_FILL, NODE_FILL, OUTPUT_FILL = "#cfeccf", "#cde6f0", "#f1ecc0"  # the hues of the paper
HEAT, BEST = (86, 168, 220), "#d55e00"  # the hottest is still light enough for INK
# Of the shares of operations: grey, pools brown, skips green, separable blue, dilated purple.
SHARES = ("#d8d8d8", "#b84f00", "#e69f00", "#007a59", "#0072b2", "#7cc0ea", "#a03c7c", "#dca6c6")

Point = tuple[float, float]
Color = str | tuple[int, ...]


class Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float


class Edge(NamedTuple):
    """A polyline between two boxes; an edge to the output has no operation and no label."""

    source: str
    target: str
    points: tuple[Point, ...]
    op: str = ""
    label: Box | None = None


class Layout(NamedTuple):
    """Where everything is, in units; `boxes` has the states by name and the output, `c_{k}`."""

    size: tuple[float, float]
    boxes: dict[str, Box]
    edges: tuple[Edge, ...]


def state_name(state: int) -> str:
    return ("c_{k-2}", "c_{k-1}")[state] if state < 2 else str(state - 2)


def layout_cell(genotype: Genotype, kind: str) -> Layout:
    """Place the boxes, edges and labels of one cell."""
    if kind not in ("normal", "reduce"):
        raise ValueError(f"cell kind {kind!r} is not one of normal, reduce")
    check_genotype(genotype)
    cell, concat = getattr(genotype, kind), getattr(genotype, f"{kind}_concat")
    states = range(2 + len(cell) // 2)
    sources, targets = [source for _, source in cell], [2 + i // 2 for i in range(len(cell))]
    depth = [0, 0]
    for node in states[2:]:
        depth.append(1 + max(depth[source] for source in sources[2 * node - 4 : 2 * node - 2]))

    # The inputs are the first and the last row. Of a node's two edges, that from above is above.
    row = {state: i for i, state in enumerate([0, *states[2:], 1])}
    is_lower = [row[sources[i]] + i % 2 / 2 > row[sources[i ^ 1]] for i in range(len(cell))]
    fall = [row[targets[i]] + is_lower[i] / 2 - row[sources[i]] for i in range(len(cell))]

    # The lines that leave a box, from the top: those that turn up, to the output, that turn down;
    # outermost those that turn first. In this order no two of them cross.
    order = {state: [] for state in states}
    for i, source in enumerate(sources):
        side = math.copysign(1, fall[i])
        order[source].append((side, -side * depth[targets[i]], fall[i], i))
    for node in concat:
        order[node].append((0, 0, 0, OUTPUT))

    tops, bottoms, y = {}, {}, MARGIN + TITLE + ROW_GAP
    for state in row:
        tops[state] = y
        bottoms[state] = y + max(BOX_HEIGHT, EXIT * (len(order[state]) + 1))
        y = bottoms[state] + ROW_GAP
    middles = {state: (tops[state] + bottoms[state]) / 2 for state in states}
    exits = {
        (state, line[-1]): middles[state] + EXIT * (n - (len(order[state]) - 1) / 2)
        for state in states
        for n, line in enumerate(sorted(order[state]))
    }

    label_width = max(text_width(op, LABEL) for op, _ in cell) + 16
    lefts, lanes, right = [MARGIN], {}, MARGIN + INPUT_WIDTH
    for column in range(1, max(depth) + 1):
        into = [i for i, target in enumerate(targets) if depth[target] == column]
        into.sort(key=lambda i: -abs(fall[i]))  # the longest is leftmost: fewer crossings
        lanes |= {i: right + LANE * (2 + n) for n, i in enumerate(into)}
        lefts.append(right + LANE * (3 + len(into)) + label_width + ARROW)
        right = lefts[-1] + NODE_WIDTH

    boxes, edges = {}, []
    for state in states:
        left, width = lefts[depth[state]], INPUT_WIDTH if state < 2 else NODE_WIDTH
        boxes[state_name(state)] = Box(left, tops[state], left + width, bottoms[state])
    for i, (op, state) in enumerate(cell):
        source, target = state_name(state), state_name(targets[i])
        out, port = exits[state, i], middles[targets[i]] + (PORT if is_lower[i] else -PORT)
        start, end = boxes[source].right, boxes[target].left
        path = (start, out), (lanes[i], out), (lanes[i], port), (end, port)
        top, bottom = port - LABEL_HEIGHT / 2, port + LABEL_HEIGHT / 2
        label = Box(end - ARROW - label_width, top, end - ARROW, bottom)
        edges.append(Edge(source, target, path, op, label))
    # The output is as tall as the nodes it concatenates, so each reaches it along its own row.
    left = right + ARROW + 2 * LANE
    boxes["c_{k}"] = Box(left, tops[min(concat)], left + NODE_WIDTH, bottoms[max(concat)])
    for node in concat:
        name, out = state_name(node), exits[node, OUTPUT]
        edges.append(Edge(name, "c_{k}", ((boxes[name].right, out), (left, out))))
    return Layout((left + NODE_WIDTH + MARGIN, y - ROW_GAP + MARGIN), boxes, tuple(edges))


def draw_cell(genotype: Genotype, kind: str) -> Image.Image:
    """Draw the `normal` or the `reduce` cell."""
    size, boxes, edges = layout_cell(genotype, kind)
    canvas = Canvas(size)
    title = {"normal": "normal cell", "reduce": "reduction cell"}[kind]
    canvas.text((MARGIN, MARGIN + TITLE / 2), title, TITLE, INK, "left")
    for edge in reversed(edges):  # the output's below the others
        color = COLORS.get(edge.op.split("_")[0], INK) if edge.op else GREY
        canvas.arrow(edge.points, color)
        if edge.label:
            canvas.box(edge.label, PAPER, color, radius=LABEL_HEIGHT / 2)
            canvas.text(_middle(edge.label), edge.op, LABEL, color)
    for name, box in boxes.items():
        fill = OUTPUT_FILL if name == "c_{k}" else INPUT_FILL if name[0] == "c" else NODE_FILL
        canvas.box(box, fill, INK, radius=12)
        canvas.text(_middle(box), name, TEXT, INK)
    return canvas.finish()


def draw_side_by_side(genotypes: Sequence[tuple[str, Genotype]]) -> Image.Image:
    """Draw cells under their captions: a row for each genotype, its normal and reduction cell."""
    font, pad = _font(TEXT * PIXELS / SCALE), MARGIN * PIXELS
    rows = [
        (caption, [draw_cell(genotype, kind) for kind in ("normal", "reduce")])
        for caption, genotype in genotypes
    ]
    widths = [max(cells[i].width for _, cells in rows) for i in range(2)]
    heights = [2 * pad + max(cell.height for cell in cells) for _, cells in rows]
    picture = Image.new("RGB", (sum(widths), sum(heights)), PAPER)
    draw, top = ImageDraw.Draw(picture), 0
    for (caption, cells), height in zip(rows, heights, strict=True):
        draw.text((pad, top + pad // 2), caption, INK, font)
        for left, cell in zip((0, widths[0]), cells, strict=True):
            picture.paste(cell, (left, top + 2 * pad))
        top += height
    return picture


def draw_alphas(
    mix: Sequence[Sequence[float]],
    primitives: Sequence[str],
    title: str,
    kept: Mapping[int, int] | None = None,
) -> Image.Image:
    """Draw the mixture weights of every edge as a heat map; outline each edge's best operation.

    `mix` is (edges, ops), edges in (node, predecessor) order. As in `choose_cell`, `none` cannot be
    best and the first of equals is. `kept` maps the edges of the genotype to the columns of their
    operations, which get the strong outline; then the best operation of another edge gets a grey
    one.
    """
    rows = [[float(weight) for weight in row] for row in mix]
    nodes = [(node, p) for node in range(len(rows)) for p in range(2 + node)][: len(rows)]
    last_node, last_predecessor = nodes[-1] if nodes else (0, 0)
    if last_predecessor != last_node + 1:
        raise ValueError(f"alphas: {len(rows)} edges; a cell has 2, 5, 9, 14, ...")
    for i, row in enumerate(rows):
        if len(row) != len(primitives) or not all(map(math.isfinite, row)):
            raise ValueError(f"alphas, edge {i}: not {len(primitives)} finite weights: {row}")

    candidates = [j for j, op in enumerate(primitives) if op != "none"]
    names = [f"node {node} <- {'node ' * (p > 1)}{state_name(p)}" for node, p in nodes]
    cell_width = max(text_width(name, LABEL) for name in primitives) + 16
    cell_height, node_gap, head = 30, 8, MARGIN + TITLE + ROW_GAP
    left = MARGIN + max(text_width(name, LABEL) for name in names) + 14
    tops = [head + 28 + i * cell_height + node * node_gap for i, (node, _) in enumerate(nodes)]
    width = max(left + cell_width * len(primitives), MARGIN + text_width(title, TITLE))
    canvas = Canvas((width + MARGIN, tops[-1] + cell_height + 36 + MARGIN / 2))
    canvas.text((MARGIN, MARGIN + TITLE / 2), title, TITLE, INK, "left")
    for j, name in enumerate(primitives):
        canvas.text((left + cell_width * (j + 0.5), head + 12), name, LABEL, INK)
    hottest = max(max(row) for row in rows)
    for i, (row, name, top) in enumerate(zip(rows, names, tops, strict=True)):
        canvas.text((MARGIN, top + cell_height / 2), name, LABEL, INK, "left")
        best = max(candidates, key=row.__getitem__, default=None)
        outline = BEST
        if kept is not None:
            best, outline = kept.get(i, best), BEST if i in kept else GREY
        for j, weight in enumerate(row):
            x = left + cell_width * j
            box = Box(x + 1, top + 1, x + cell_width - 1, top + cell_height - 1)
            heat = min(max(weight / hottest, 0), 1) if hottest > 0 else 0
            fill = tuple(round(255 + (hue - 255) * heat) for hue in HEAT)
            canvas.box(box, fill, outline if j == best else fill, radius=4, width=3)
            canvas.text(_middle(box), f"{weight:.3f}", LABEL, INK)
    legend = [("best operation other than none", BEST)]
    if kept is not None:
        legend = [("kept in the cell", BEST), ("best operation of another edge", GREY)]
    x, y = left + 1, tops[-1] + cell_height + 14
    for text, outline in legend:
        canvas.box(Box(x, y, x + 24, y + 16), PAPER, outline, radius=4, width=3)
        canvas.text((x + 32, y + 8), text, LABEL, INK, "left")
        x += 56 + text_width(text, LABEL)
    return canvas.finish()


def draw_history(
    mixtures: Sequence[Sequence[Sequence[float]]], primitives: Sequence[str], title: str
) -> Image.Image:
    """Draw how the mixture weights of every edge went: a strip for each edge, time to the right.

    `mixtures` is (epochs, edges, ops), edges in (node, predecessor) order. In a strip each epoch is
    a column, in which each operation has its share of the edge's weight.
    """
    edges = range(len(mixtures[0]))
    nodes = [(node, p) for node in edges for p in range(2 + node)][: len(edges)]
    names = [f"node {node} <- {'node ' * (p > 1)}{state_name(p)}" for node, p in nodes]
    left = MARGIN + max(text_width(name, LABEL) for name in names) + 14
    step, height, head = max(2, 480 // len(mixtures)), 32, MARGIN + TITLE + ROW_GAP
    right, bottom = left + step * len(mixtures), head + len(edges) * (height + 6)
    legend = right + 24
    width = legend + 32 + max(text_width(name, LABEL) for name in primitives)
    canvas = Canvas((max(width, MARGIN + text_width(title, TITLE)) + MARGIN, bottom + MARGIN))
    canvas.text((MARGIN, MARGIN + TITLE / 2), title, TITLE, INK, "left")
    fills = [SHARES[i % len(SHARES)] for i in range(len(primitives))]
    for edge, name in zip(edges, names, strict=True):
        top = head + edge * (height + 6)
        canvas.text((MARGIN, top + height / 2), name, LABEL, INK, "left")
        for epoch, mix in enumerate(mixtures):
            x, y, total = left + step * epoch, top, sum(mix[edge]) or 1.0
            for weight, fill in zip(mix[edge], fills, strict=True):
                lower = y + height * weight / total
                canvas.box(Box(x, y, x + step, lower), fill, fill, radius=0, width=0)
                y = lower
    for i, (name, fill) in enumerate(zip(primitives, fills, strict=True)):
        y = head + 26 * i
        canvas.box(Box(legend, y, legend + 24, y + 16), fill, fill, radius=0, width=0)
        canvas.text((legend + 32, y + 8), name, LABEL, INK, "left")
    return canvas.finish()


@cache
def _font(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size * SCALE)


def _runs(text: str, size: float) -> Iterable[tuple[str, ImageFont.FreeTypeFont, float]]:
    """Split `c_{k-2}` at its subscripts: (characters, font, units below the base line)."""
    for i, run in enumerate(re.split(r"_\{(.*?)\}", text)):
        yield (run, _font(size * 0.75), size * 0.2) if i % 2 else (run, _font(size), 0)


def text_width(text: str, size: float) -> float:
    return sum(font.getlength(run) for run, font, _ in _runs(text, size)) / SCALE


def _middle(box: Box) -> Point:
    return (box.left + box.right) / 2, (box.top + box.bottom) / 2


def _round_corners(points: Sequence[Point], steps: int = 12) -> list[Point]:
    """Replace each corner of an orthogonal polyline by a curve of radius CORNER."""
    curve = [points[0]]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        (x0, y0), (x2, y2) = _towards(corner, before, CORNER), _towards(corner, after, CORNER)
        for t in (step / steps for step in range(steps + 1)):
            a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t**2
            curve.append((a * x0 + b * corner[0] + c * x2, a * y0 + b * corner[1] + c * y2))
    return [*curve, points[-1]]


def _towards(start: Point, end: Point, length: float) -> Point:
    share = length / math.dist(start, end)
    return start[0] + (end[0] - start[0]) * share, start[1] + (end[1] - start[1]) * share


class Canvas:
    """A white picture drawn in units."""

    def __init__(self, size: Point):
        self.size = tuple(math.ceil(side) for side in size)
        self.image = Image.new("RGB", tuple(side * SCALE for side in self.size), PAPER)
        self.pen = ImageDraw.Draw(self.image)

    def box(self, box: Box, fill: Color, edge: Color, radius: float, width: float = 1.5) -> None:
        corners = [round(side * SCALE) for side in box]
        self.pen.rounded_rectangle(corners, radius * SCALE, fill, edge, round(width * SCALE))

    def line(self, points: Sequence[Point], color: str, width: int = 2) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self.pen.line(scaled, color, width * SCALE, joint="curve")

    def arrow(self, points: Sequence[Point], color: str) -> None:
        """Draw an arrow that ends rightwards; a white rim makes it pass over what it crosses."""
        x, y = points[-1]
        line = _round_corners([*points[:-1], (x - 6, y)])
        self.line(line, PAPER, 6)
        self.line(line, color)
        head = [(x, y), (x - 12, y - 5), (x - 12, y + 5)]
        self.pen.polygon([(a * SCALE, b * SCALE) for a, b in head], color)

    def text(self, at: Point, text: str, size: float, color: str, align: str = "middle") -> None:
        x = at[0] - (text_width(text, size) / 2 if align == "middle" else 0)
        for run, font, drop in _runs(text, size):
            # Capitals are about 0.7 of the size, so this base line centres them.
            base = at[1] + size * 0.35 + drop
            self.pen.text((x * SCALE, base * SCALE), run, color, font, anchor="ls")
            x += font.getlength(run) / SCALE

    def finish(self) -> Image.Image:
        size = tuple(side * PIXELS for side in self.size)
        return self.image.resize(size, Image.Resampling.LANCZOS)
