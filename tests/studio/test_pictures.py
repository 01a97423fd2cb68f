"""The pictures that are clicked on: a click means what was drawn there."""

from __future__ import annotations

import itertools

import pytest
import torch

from dblightning.studio.blends import Mark
from dblightning.studio.pictures import (
    CORNERS,
    FRAME,
    GAP,
    LINE,
    filmstrip,
    frame_at,
    pareto_map,
    place_of,
    shown,
    triangle,
    weights_at,
)


def test_small_images_are_enlarged_by_whole_pixels_and_large_ones_stay() -> None:
    image = torch.rand(3, 32, 32)
    picture = shown(image)
    assert picture.size == (256, 256)
    levels = torch.tensor(list(picture.tobytes())).view(256, 256, 3)[::8, ::8].permute(2, 0, 1)
    assert torch.equal(levels, (image * 255).round().long())
    assert shown(torch.rand(3, 300, 512)).size == (512, 300)


def test_a_click_where_weights_are_drawn_gives_them_back() -> None:
    for a, b in itertools.product(range(11), repeat=2):
        if a + b <= 10:
            weights = (a / 10, b / 10, (10 - a - b) / 10)
            assert weights_at(*place_of(weights)) == pytest.approx(weights, abs=0.011)


def test_a_click_outside_the_triangle_has_no_negative_weight() -> None:
    assert weights_at(CORNERS[0][0], 0) == (1.0, 0.0, 0.0)
    below = weights_at((CORNERS[1][0] + CORNERS[2][0]) / 2, 310)
    assert below == pytest.approx((0, 0.5, 0.5), abs=0.01)
    assert all(sum(weights_at(x, y)) == pytest.approx(1) for x in range(0, 360, 40) for y in range(0, 320, 40))


def test_the_triangles_dot_is_at_the_weights() -> None:
    picture = triangle(["a", "b", "c"], {"a": 0.2, "b": 0.3, "c": 0.5})
    x, y = place_of((0.2, 0.3, 0.5))
    red, _, blue = picture.getpixel((round(x), round(y)))  # type: ignore[misc]
    assert red > 200 and blue < 100


@pytest.mark.parametrize("count", [1, 5, 7])
def test_a_click_on_a_frame_of_the_strip_is_that_frame(count: int) -> None:
    strip = filmstrip([torch.full((3, 8, 8), i / 10) for i in range(count)], ["label"] * count)
    columns = (strip.width - GAP) // (FRAME + GAP)
    for i in range(count):
        x = GAP + i % columns * (FRAME + GAP) + FRAME / 2
        y = GAP + i // columns * (FRAME + GAP + LINE) + FRAME / 2
        assert frame_at(x, y, count) == i
        assert strip.getpixel((round(x), round(y)))[0] == round(255 * i / 10)  # type: ignore[index]
    assert frame_at(-5, 0, count) == 0 and frame_at(10**4, 10**4, count) == count - 1


def test_the_maps_points_are_where_they_are_drawn() -> None:
    marks = [Mark({"a": w, "b": 1 - w}, torch.zeros(3, 8, 8), {"a": w, "b": 1 - w**2}) for w in (0.0, 0.5, 1.0)]
    drawn = pareto_map(marks, ["a", "b"], {"a": -0.5, "b": 0.0}, ["w 0", "", "w 1"])
    for x, y in drawn.points:
        red, _, blue = drawn.picture.getpixel((round(x), round(y)))  # type: ignore[misc]
        assert blue > 180 and red < 120  # the marks are blue
    assert [drawn.nearest(x + 3, y - 3) for x, y in drawn.points] == [0, 1, 2]
    for mark, (x, y) in zip(marks, drawn.points, strict=True):
        red, _, blue = drawn.showing(mark.scores).getpixel((round(x), round(y)))  # type: ignore[misc]
        assert red > 200 and blue < 100  # the star of what is shown
    beyond = drawn.showing({"a": 100.0, "b": -100.0})
    assert beyond.size == drawn.picture.size and beyond.tobytes() != drawn.picture.tobytes()


def test_a_map_without_scores_says_so_and_has_no_points() -> None:
    drawn = pareto_map([], ["a", "b"], {}, [])
    assert drawn.points == [] and drawn.nearest(10, 10) is None
    assert drawn.showing({"a": 1.0, "b": 1.0}) is drawn.picture
