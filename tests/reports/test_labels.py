"""Labels of a plot: inside the axes, on no point, on no other label."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sparsify.reports import drawing, labels
from sparsify.reports.labels import Box, Label

INSIDE = Box(0, 0, 660, 560)  # pixels, as the axes of a sweep's plot
SIZE = (80.0, 20.0)


def common(a, b):
    return min(a.right, b.right) > max(a.left, b.left) and min(a.top, b.top) > max(a.bottom, b.bottom)


@given(st.lists(st.tuples(st.floats(20, 640), st.floats(20, 540)), min_size=1, max_size=9))
@settings(deadline=None, max_examples=60)
def test_labels_of_drawn_points_are_apart(points):
    markers = [Box(x - 7, y - 7, x + 7, y + 7) for x, y in points]
    boxes = [box for box, _ in labels.place(points, [SIZE] * len(points), markers, INSIDE, unit=200 / 72)]
    for i, box in enumerate(boxes):
        assert box.left >= 0 and box.bottom >= 0 and box.right <= 660 and box.top <= 560
        assert not any(common(box, other) for other in [*markers, *boxes[:i]])


def test_nine_labels_of_one_point_are_apart_and_the_nearest_is_near():
    placed = labels.place([(330, 280)] * 9, [SIZE] * 9, [Box(323, 273, 337, 287)], INSIDE, unit=200 / 72)
    assert not any(common(a, b) for i, (a, _) in enumerate(placed) for b, _ in placed[:i])
    assert min(away for _, away in placed) == labels.DISTANCES[0]


def test_where_nothing_is_free_the_least_is_covered():
    (box, _), *_ = labels.place([(50, 50)], [SIZE], [INSIDE], INSIDE)
    assert box.right - box.left == pytest.approx(SIZE[0])


def test_a_label_is_drawn_beside_its_point_in_its_colour():
    def picture(names):
        figure = drawing.figure(3, 2, 100)
        axes = figure.subplots()
        axes.plot([1, 2], [1, 2], "o", color="black")
        labels.draw(axes, [Label(1, 1, name, "#ff0000") for name in names])
        pixels = np.asarray(Image.open(io.BytesIO(drawing.png(figure))).convert("RGB")).astype(int)
        return pixels[..., 0] - pixels[..., 1] > 80  # red

    assert picture(["keep 0.1"]).sum() > 20 and not picture([]).any()
