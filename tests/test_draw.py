"""Drawings, judged by plane geometry on the layout that is drawn, and by pixels of the image."""

import random
from itertools import combinations, pairwise

import pytest
from PIL import ImageChops, ImageColor, ImageStat

from darts_min.draw import (
    BEST,
    COLORS,
    INK,
    LABEL,
    draw_alphas,
    draw_cell,
    layout_cell,
    state_name,
    text_width,
)
from darts_min.genotypes import PRIMITIVES, PUBLISHED, Genotype
from darts_min.operations import OPS


def random_cell(rng: random.Random, num_nodes: int) -> tuple:
    """Draw a cell in which about half of the nodes list the same predecessor twice."""
    cell = []
    for node in range(2, 2 + num_nodes):
        first, second = rng.randrange(node), rng.randrange(node)
        second = first if rng.random() < 0.5 else second
        cell += [(rng.choice(PRIMITIVES[1:]), first), (rng.choice(PRIMITIVES[1:]), second)]
    return tuple(cell)


def random_genotype(rng: random.Random, num_nodes: int) -> Genotype:
    size = rng.randint(1, num_nodes)
    concats = [tuple(rng.sample(range(2, 2 + num_nodes), size)) for _ in range(2)]
    cells = [random_cell(rng, num_nodes) for _ in range(2)]
    return Genotype(cells[0], concats[0], cells[1], concats[1])


def extreme(num_nodes: int) -> Genotype:
    """The deepest cell, a chain of doubled edges; and the widest, all of them from one input."""
    chain = [(op, 1 + i) for i in range(num_nodes) for op in ("max_pool_3x3", "skip_connect")]
    star = [(op, 0) for _ in range(num_nodes) for op in ("dil_conv_5x5", "sep_conv_5x5")]
    concat = tuple(range(2, 2 + num_nodes))
    return Genotype(tuple(chain), concat, tuple(star), concat)


def all_cells() -> list[tuple[Genotype, str]]:
    rng = random.Random(0)
    genotypes = list(PUBLISHED.values()) + [extreme(n) for n in range(1, 9)]
    genotypes += [random_genotype(rng, n) for n in range(1, 9) for _ in range(12)]
    return [(genotype, kind) for genotype in genotypes for kind in ("normal", "reduce")]


CELLS = all_cells()
LAYOUTS = [layout_cell(genotype, kind) for genotype, kind in CELLS]
LABELS = [[edge.label for edge in layout.edges if edge.label] for layout in LAYOUTS]


def touch(a, b, gap: float = 0) -> bool:
    """Say whether two rectangles come closer to each other than `gap`, or share a point."""
    return a[0] <= b[2] + gap and b[0] <= a[2] + gap and a[1] <= b[3] + gap and b[1] <= a[3] + gap


def segments(edge) -> list[tuple[float, float, float, float]]:
    """List an edge's pieces as flat rectangles; every piece is horizontal or vertical."""
    pieces = []
    for (x0, y0), (x1, y1) in pairwise(edge.points):
        assert x0 == x1 or y0 == y1
        pieces.append((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)))
    return pieces


def is_vertical(piece) -> bool:
    return piece[0] == piece[2]


def test_edges_and_labels_are_those_of_the_genotype():
    for (genotype, kind), layout in zip(CELLS, LAYOUTS, strict=True):
        expected = [
            (state_name(source), state_name(2 + i // 2), op)
            for i, (op, source) in enumerate(getattr(genotype, kind))
        ]
        concat = getattr(genotype, f"{kind}_concat")
        expected += [(state_name(node), "c_{k}", "") for node in concat]
        assert [(edge.source, edge.target, edge.op) for edge in layout.edges] == expected
        assert [edge.label is None for edge in layout.edges] == [not op for *_, op in expected]


def test_boxes_and_labels_never_overlap():
    for layout, labels in zip(LAYOUTS, LABELS, strict=True):
        for a, b in combinations([*layout.boxes.values(), *labels], 2):
            assert not touch(a, b, gap=4)


def test_everything_is_inside_the_picture():
    for layout, labels in zip(LAYOUTS, LABELS, strict=True):
        pieces = [piece for edge in layout.edges for piece in segments(edge)]
        for left, top, right, bottom in [*layout.boxes.values(), *labels, *pieces]:
            assert 0 < left <= right < layout.size[0]
            assert 0 < top <= bottom < layout.size[1]


def test_a_label_fits_its_rectangle():
    for layout in LAYOUTS:
        for edge in layout.edges:
            if edge.label:
                assert text_width(edge.op, LABEL) + 8 < edge.label.right - edge.label.left
                assert edge.label.bottom - edge.label.top > LABEL * 1.4


def test_an_edge_touches_no_box_but_its_two_ends():
    for layout in LAYOUTS:
        for edge in layout.edges:
            first, last = segments(edge)[0], segments(edge)[-1]
            start, end = layout.boxes[edge.source], layout.boxes[edge.target]
            assert first[0] == start.right and start.top < first[1] < start.bottom
            assert last[2] == end.left and end.top < last[1] < end.bottom
            for name, box in layout.boxes.items():
                touching = [piece for piece in segments(edge) if touch(piece, box)]
                expected = [first] * (name == edge.source) + [last] * (name == edge.target)
                assert touching == expected


def test_an_edge_runs_through_its_own_label_and_no_other():
    for layout in LAYOUTS:
        for edge in layout.edges:
            for other in layout.edges:
                touching = [p for p in segments(edge) if other.label and touch(p, other.label)]
                assert touching == ([segments(edge)[-1]] if other is edge and edge.op else [])
            if edge.label:
                x, y = edge.points[-1]
                assert edge.points[-2][0] < edge.label.left and edge.label.right < x
                assert y == (edge.label.top + edge.label.bottom) / 2


def test_two_edges_meet_only_where_they_cross_at_right_angles():
    for layout in LAYOUTS:
        for a, b in combinations(layout.edges, 2):
            for p in segments(a):
                for q in segments(b):
                    if is_vertical(p) == is_vertical(q):
                        assert not touch(p, q, gap=4)
                    elif touch(p, q):
                        x, y = (p[0], q[1]) if is_vertical(p) else (q[0], p[1])
                        assert (x, y) not in a.points + b.points


def test_edges_that_leave_one_box_do_not_cross():
    for layout in LAYOUTS:
        for a, b in combinations(layout.edges, 2):
            if a.source == b.source:
                assert not any(touch(p, q) for p in segments(a) for q in segments(b))


def test_two_edges_into_a_node_have_ports_of_their_own():
    for layout in LAYOUTS:
        for a, b in combinations(layout.edges, 2):
            if a.target == b.target:
                assert abs(a.points[-1][1] - b.points[-1][1]) >= 16


def test_the_picture_shows_every_box_label_and_arrow_of_the_layout():
    genotype = random_genotype(random.Random(1), 4)
    layout = layout_cell(genotype, "reduce")
    image = draw_cell(genotype, "reduce")
    scale = round(image.width / layout.size[0])
    assert scale >= 1 and image.mode == "RGB"
    for box in layout.boxes.values():  # left of the text, right of the outline
        x, y = box.left + 4, (box.top + box.bottom) / 2
        assert min(image.getpixel((int(x * scale), int(y * scale)))) < 250
    for edge in layout.edges:
        if edge.label:
            color = ImageColor.getrgb(COLORS[edge.op.split("_")[0]])
            x, y = edge.points[-1]
            assert image.getpixel((int((x - 8) * scale), int(y * scale))) == color
            inside = image.crop([int(side * scale) for side in edge.label])
            assert color in {found for _, found in inside.getcolors(10**6)}


def test_every_operation_has_a_color_legible_on_white():
    def luminance(color: str) -> float:
        parts = [part / 255 for part in ImageColor.getrgb(color)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    for op in PRIMITIVES[1:]:
        assert 1.05 / (luminance(COLORS[op.split("_")[0]]) + 0.05) >= 4.5  # WCAG 2 AA


def test_an_operation_without_a_color_is_drawn_in_ink(monkeypatch):
    op = "conv_7x1_1x7"
    monkeypatch.setitem(OPS, op, OPS["sep_conv_3x3"])
    cell, ink = ((op, 0), (op, 1)), ImageColor.getrgb(INK)
    genotype = Genotype(cell, (2,), cell, (2,))
    image, layout = draw_cell(genotype, "normal"), layout_cell(genotype, "normal")
    scale = round(image.width / layout.size[0])
    for edge in layout.edges[:2]:
        x, y = edge.points[-1]
        assert image.getpixel((int((x - 8) * scale), int(y * scale))) == ink
    assert draw_alphas([[0.5, 0.5]] * 2, ["none", op], "title").mode == "RGB"


def test_pictures_are_deterministic():
    genotype = PUBLISHED["DARTS_V2"]
    assert draw_cell(genotype, "normal").tobytes() == draw_cell(genotype, "normal").tobytes()
    mix = [[0.25, 0.75], [0.5, 0.5]]
    first, second = (draw_alphas(mix, ["none", "skip_connect"], "title") for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_unknown_kind_and_broken_genotype_raise():
    genotype = PUBLISHED["DARTS_V2"]
    with pytest.raises(ValueError, match="'reduction' is not one of normal, reduce"):
        draw_cell(genotype, "reduction")
    with pytest.raises(ValueError, match="normal cell: 7 edges"):
        draw_cell(genotype._replace(normal=genotype.normal[:-1]), "normal")


def test_the_table_marks_the_first_best_operation_other_than_none():
    ops = ["none", "skip_connect", "max_pool_3x3", "sep_conv_3x3"]
    best = [1, 2, 3, 1, 3]
    rows = [[0.7, *(0.2 if j == winner else 0.05 for j in (1, 2, 3))] for winner in best]
    rows[3] = [0.1, 0.3, 0.3, 0.3]
    image = draw_alphas(rows, ops, "title")
    mark, lefts, above = ImageColor.getrgb(BEST), [], False
    for y in range(image.height):
        line = [image.getpixel((x, y)) == mark for x in range(image.width)]
        if any(line) and not above:
            lefts.append(line.index(True))
        above = any(line)
    *marks, legend = lefts  # the legend is below the first column
    width = (image.width - legend) / len(ops)
    columns = [round((left - legend) / width) for left in marks]
    assert columns == best


def test_a_larger_weight_is_drawn_darker():
    rows = [[0.1, 0.9], [0.6, 0.4]]
    image = draw_alphas(rows, ["skip_connect", "max_pool_3x3"], "title").convert("L")
    swapped = draw_alphas(rows[::-1], ["skip_connect", "max_pool_3x3"], "title").convert("L")
    left, top, right, bottom = ImageChops.difference(image, swapped).getbbox()
    x, y = (left + right) // 2, (top + bottom) // 2  # where the four cells meet
    boxes = (left, top, x, y), (x, top, right, y), (left, y, x, bottom), (x, y, right, bottom)
    light = [ImageStat.Stat(image.crop(box)).mean[0] for box in boxes]
    assert light[0] > light[3] > light[2] > light[1]


def test_the_table_accepts_any_number_of_nodes_and_only_none():
    for num_nodes in range(1, 5):
        rows = [[1 / 8] * 8] * (num_nodes * (num_nodes + 3) // 2)
        assert draw_alphas(rows, PRIMITIVES, "title").mode == "RGB"
    assert draw_alphas([[0.0]] * 2, ["none"], "a title wider than the table").mode == "RGB"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0.5, 0.5]] * 3, "3 edges; a cell has 2, 5, 9"),
        ([], "0 edges"),
        ([[0.5, 0.5], [1.0]], "edge 1: not 2 finite weights"),
        ([[0.5, 0.5], [float("nan"), 1.0]], "edge 1: not 2 finite weights"),
    ],
)
def test_a_table_of_the_wrong_shape_raises(rows, message):
    with pytest.raises(ValueError, match=message):
        draw_alphas(rows, ["none", "skip_connect"], "title")
