from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dblightning.evaluation import plots
from dblightning.evaluation.analysis import Estimates, estimate
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
    assert sorted(shown) == sorted(set(estimates.blends["variant"]))


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
