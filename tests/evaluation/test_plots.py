from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from dblightning.evaluation import plots
from dblightning.evaluation.analysis import Estimates, estimate
from dblightning.figures import before_after_figure, blend_grid_figure
from tests.evaluation.synthetic import blend, evaluation, preference, score_table

NAMES = ["alignment", "aesthetic"]


@pytest.fixture(scope="module")
def estimates() -> Estimates:
    return estimate(evaluation())


def lines(axis) -> dict[str, np.ndarray]:  # type: ignore[no-untyped-def]
    """Colour → (n, 2) points of the lines of an axis."""
    return {str(line.get_color()): np.asarray(line.get_xydata()) for line in axis.get_lines()}


def test_a_point_is_dominated_by_a_blend_that_needed_no_retraining_only() -> None:
    half = preference(0.5, ("a", "b"))
    points = {"base": (0, 0), "db-mpa": (1, 1), "code": (0.5, 0.5), "morl": (2, 2)}
    frame = score_table(
        [
            (blend(method, half if method != "base" else None, method), {"a": a, "b": b})
            for method, (a, b) in points.items()
        ],
        3,
        names=("a", "b"),
    )
    found = plots.plane_points(estimate(frame), ["a", "b"], "a", "b").set_index("blend")
    assert found["dominated"].to_dict() == {"base": True, "db-mpa": False, "code": True, "morl": False}
    assert found.loc["code", ["x", "y"]].tolist() == [0.5, 0.5]
    assert found.loc["base", "label"] == "Base" and found.loc["code", "label"] == "w = 0.5"


def test_the_pareto_figure_joins_a_methods_points_in_order_of_w_ends_included(estimates: Estimates) -> None:
    axis = plots.pareto_figure(estimates, NAMES).axes[0]
    blends = ["single_aesthetic-1", "db-mpa_0.2", "db-mpa_0.5", "db-mpa_0.8", "single_alignment-1"]
    expected = [[estimates.of(each, f"reward/{name}")[0] for name in NAMES] for each in blends]
    colour = plots.variant_styles(estimates)["DB-MPA"][0]
    np.testing.assert_allclose(lines(axis)[colour], expected)
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("alignment", "aesthetic")


def test_the_pareto_figure_names_every_variant_once(estimates: Estimates) -> None:
    figure = plots.pareto_figure(estimates, NAMES)
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(shown) == sorted({*estimates.blends["variant"], "random adapter per image"})


def test_w_stands_beside_the_points_of_the_pareto_figure(estimates: Estimates) -> None:
    axis = plots.pareto_figure(estimates, NAMES).axes[0]
    notes = {(note.get_text(), tuple(np.round(note.xy, 9))) for note in axis.texts}
    for w in (0.2, 0.5, 0.8):
        place = tuple(round(estimates.of(f"db-mpa_{w}", f"reward/{name}")[0], 9) for name in NAMES)
        assert (f"{w:g}", place) in notes
    ends = [tuple(round(estimates.of(f"single_{each}-1", f"reward/{name}")[0], 9) for name in NAMES) for each in NAMES]
    assert {("1", ends[0]), ("0", ends[1])} <= notes


def test_a_dashed_line_between_the_single_adapters_is_where_a_random_adapter_lies(estimates: Estimates) -> None:
    axis = plots.pareto_figure(estimates, NAMES).axes[0]
    (line,) = [line for line in axis.get_lines() if line.get_linestyle() == "--"]
    ends = [[estimates.of(f"single_{each}-1", f"reward/{name}")[0] for name in NAMES] for each in reversed(NAMES)]
    np.testing.assert_allclose(np.asarray(line.get_xydata()), ends)


def test_the_cost_figure_draws_the_gain_against_seconds_at_each_preference(estimates: Estimates) -> None:
    figure = plots.cost_figure(estimates, NAMES)
    assert figure is not None
    assert [axis.get_title() for axis in figure.axes] == ["w = 0.2", "w = 0.5", "w = 0.8"]
    colour = plots.variant_styles(estimates)["CoDe"][0]
    place = lines(figure.axes[1])[colour][0]
    row = estimates.blends["blend"].tolist().index("code_0.5")
    expected = estimates.blends["seconds"].iloc[row], estimates.of("code_0.5", "weighted_gain")[0]
    assert place == pytest.approx(expected)
    assert "best single adapter" in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("text", [r"$\frac{", "$a$ costs $5", "a_b^c", "\x07bell \x00", r"\$"])
def test_any_text_is_drawn_as_it_is(text: str, tmp_path: Path) -> None:
    images = torch.zeros(1, 2, 3, 8, 8)
    grid = blend_grid_figure(images, [text, "b"], [text])
    before = before_after_figure(images[0], images[0], [text] * 2, torch.zeros(2), torch.zeros(2), text)
    half = preference(0.5, (text, "b"))
    settings = [blend("base"), blend("single", {text: 1.0}), blend("db-mpa", half), blend("db-kla", {text: 1.0})]
    frame = score_table([(each, {text: 1.0 + n, "b": 1.0}) for n, each in enumerate(settings)], 2, names=(text, "b"))
    estimates, names = estimate(frame), [text, "b"]
    drawn = [plots.pareto_figure(estimates, names), plots.weighted_figure(estimates, names),
             plots.gain_bars_figure(estimates, names), plots.strength_figure(estimates)]  # fmt: skip
    for number, figure in enumerate([grid, before, *drawn]):
        assert figure is not None
        for file in plots.save_figure(figure, tmp_path / str(number)):  # raised ValueError: no closing brace
            if file.suffix == ".svg":
                ElementTree.parse(file)
    # an escaped dollar is drawn as a dollar; control characters as spaces, of which none ends a line
    assert re.sub(r"\\\$", "$", grid.axes[0].get_title()) == re.sub(r"[^ -~]", " ", text).rstrip()


def test_headings_of_a_grid_stay_within_their_columns() -> None:
    labels = ["db-mpa-ls_aesthetic-0.333333_alignment-0.333333_compressibility-0.333334", "code_" + "x" * 40, "base"]
    figure = blend_grid_figure(torch.zeros(1, 3, 3, 8, 8), labels, ["a prompt"])
    figure.draw_without_rendering()
    boxes = [axis.title.get_window_extent() for axis in figure.axes]
    assert all(left.x1 <= right.x0 for left, right in pairwise(boxes))
    assert all(box.y1 <= figure.bbox.y1 for box in boxes)


def test_gains_are_drawn_with_the_base_at_the_origin(estimates: Estimates) -> None:
    points = plots.plane_points(estimates, NAMES, *NAMES, gains=True).set_index("blend")
    assert points.loc["base", ["x", "x_lo", "x_hi", "y"]].tolist() == [0, 0, 0, 0]
    assert points.loc["db-mpa_0.2", "y"] == estimates.of("db-mpa_0.2", "gain/aesthetic")[0]


def test_three_rewards_make_a_grid_of_their_pairs(estimates: Estimates) -> None:
    figure = plots.pareto_figure(estimates, [*NAMES, "held"])
    assert [(axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes] == [
        ("alignment", "aesthetic"), ("alignment", "held"), ("aesthetic", "held"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="two or more rewards"):
        plots.pareto_figure(estimates, ["alignment"])


def test_the_weight_figure_draws_the_gain_in_weighted_reward_against_w(estimates: Estimates) -> None:
    drawn = lines(plots.weighted_figure(estimates, NAMES).axes[0])[plots.variant_styles(estimates)["CoDe"][0]]
    expected = [[w, estimates.of(f"code_{w}", "weighted_gain")[0]] for w in (0.2, 0.5, 0.8)]
    np.testing.assert_allclose(drawn, expected)
    with pytest.raises(ValueError, match="needs two rewards"):
        plots.weighted_figure(estimates, [*NAMES, "held"])


def test_bars_are_the_gains_of_each_method_at_a_preference(estimates: Estimates) -> None:
    figure = plots.gain_bars_figure(estimates, NAMES, panels=1)
    (axis,) = figure.axes
    assert axis.get_title() == "w = 0.5"  # the one that the most methods have
    bars = {bar.get_label(): [each.get_height() for each in bar] for bar in axis.containers if hasattr(bar, "patches")}
    assert bars["RGG"] == pytest.approx([estimates.of("rgg_0.5", f"gain/{name}")[0] for name in NAMES])


def test_the_strength_figure_draws_gain_against_lambda_from_the_base_on(estimates: Estimates) -> None:
    figure = plots.strength_figure(estimates)
    assert figure is not None
    drawn = lines(figure.axes[0])[plots.COLOURS[0]]
    assert drawn[:, 0].tolist() == [0, 0.5, 1, 2]
    assert drawn[0, 1] == 0 and drawn[3, 1] == estimates.of("db-kla_alignment-1_2.0", "gain/alignment")[0]
    without = score_table([(blend("base"), {"a": 0.0}), (blend("single", {"a": 1.0}), {"a": 1.0})], 2)
    assert plots.strength_figure(estimate(without)) is None


def test_the_same_estimates_are_saved_as_the_same_png_and_svg(estimates: Estimates, tmp_path: Path) -> None:
    saved = []
    for folder in ("one.2", "two"):
        figure = plots.strength_figure(estimates)
        assert figure is not None
        saved.append(plots.save_figure(figure, tmp_path / folder / "kl.5"))
    assert [file.name for file in saved[0]] == ["kl.5.png", "kl.5.svg"]
    first, second = ([file.read_bytes() for file in files] for files in saved)
    assert first[0][1:4] == b"PNG" and b"<svg" in first[1]
    assert first == second


def test_one_prompt_and_one_seed_are_drawn_without_intervals() -> None:
    blends = [
        (blend("base"), {"a": 0.0, "b": 0.0}),
        (blend("db-mpa", preference(0.5, ("a", "b"))), {"a": 1.0, "b": 1.0}),
    ]
    single = estimate(score_table(blends, 1, names=("a", "b")))
    plots.pareto_figure(single, ["a", "b"])
    plots.weighted_figure(single, ["a", "b"])
    plots.gain_bars_figure(single, ["a", "b"])
