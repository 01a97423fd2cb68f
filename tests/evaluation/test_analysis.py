from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from dblightning.evaluation.analysis import bootstrap, compare, diversity, estimate, held_out_rewards, summary
from dblightning.evaluation.fronts import (
    default_reference,
    drawn_hypervolumes,
    hypervolume,
    hypervolume_orders,
    hypervolumes,
    pareto,
)
from dblightning.evaluation.intervals import interval
from dblightning.evaluation.scores import RECORD_KEY, blend_table, front, preference_sets, read_scores, write_scores
from tests.evaluation.synthetic import blend, evaluation, preference, score_table

# ── intervals ────────────────────────────────────────────────────────────────────────────────────────────────────────


def coverage(skewed: bool, clustered: bool = True, repeats: int = 400) -> float:
    """Share of intervals that hold the true mean 1, for prompts with an effect that their four seeds share."""
    rng, prompts, seeds, hits = np.random.default_rng(1), 50, 4, 0
    frame = score_table([(blend("base"), {"r": 0.0})], prompts, seeds)
    if not clustered:
        frame["prompt_id"] = np.arange(len(frame))
    for number in range(repeats):
        effect = rng.exponential(size=(prompts, 1)) if skewed else 1 + rng.normal(size=(prompts, 1))
        values = effect + 0.5 * rng.normal(size=(prompts, seeds))
        result = bootstrap(frame.assign(**{"reward/r": values.ravel()}), ["r"], samples=400, seed=number)
        low, high = interval(result.draws[:, 0, 0], result.units)
        hits += bool(low <= 1 <= high)
    return hits / repeats


# three binomial standard errors of 400 repetitions at 95 %: 3 · √(0.95 · 0.05 / 400) = 3.3 %
def test_the_interval_covers_the_true_mean_at_its_stated_rate_when_seeds_share_their_prompts_effect() -> None:
    assert coverage(skewed=False) == pytest.approx(0.95, abs=0.033)


@pytest.mark.slow
def test_the_interval_covers_the_mean_of_a_skewed_reward() -> None:
    assert coverage(skewed=True) == pytest.approx(0.95, abs=0.033)


def test_taking_a_prompts_seeds_as_independent_would_cover_far_less() -> None:
    """Four seeds at correlation 0.8: the mean's deviation is √(1 + 3 · 0.8) = 1.84 times that of independent images."""
    # so 95 % shrinks to P(|z| < 1.96 / 1.84) = 71 %; three standard errors of 150 repetitions are 11 %
    assert coverage(skewed=False, clustered=False, repeats=150) == pytest.approx(0.71, abs=0.11)


def test_the_interval_of_many_normal_prompts_is_the_t_interval() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(200, 1))
    result = bootstrap(score_table([(blend("base"), {"r": values})], 200), ["r"], samples=20000)
    low, high = interval(result.draws[:, 0, 0], result.units)
    half = stats.t.ppf(0.975, 199) * values.std(ddof=1) / np.sqrt(200)
    # 20 000 draws place a 2.5 % quantile to about 2 % of the half width
    assert (high - low) / 2 == pytest.approx(half, rel=0.04)


def test_few_prompts_take_quantiles_further_out_than_the_plain_percentile_interval() -> None:
    draws = np.random.default_rng(0).normal(size=100_000)
    low, high = interval(draws, units=10)
    # the expanded interval's end, from its definition: √(10/9) · t_{0.975, 9} standard deviations of the draws
    end = np.sqrt(10 / 9) * stats.t.ppf(0.975, 9)
    assert high == pytest.approx(end, abs=0.05) and low == pytest.approx(-end, abs=0.05)
    assert np.isnan(interval(draws, units=1)).all()
    with pytest.raises(ValueError, match="level must be in"):
        interval(draws, 10, level=95)


def test_bootstrap_means_have_the_sampling_variance_of_a_mean_over_prompts() -> None:
    values = np.random.default_rng(3).normal(size=(80, 3))
    result = bootstrap(score_table([(blend("base"), {"r": values})], 80, 3), ["r"], samples=20000)
    assert result.estimate[0, 0] == pytest.approx(values.mean())
    # the bootstrap's variance is the plug-in one; 20 000 draws give a standard deviation to 0.5 %
    assert result.draws.std() == pytest.approx(values.mean(axis=1).std(ddof=0) / np.sqrt(80), rel=0.03)


def test_every_blend_is_measured_on_the_same_resampled_prompts() -> None:
    values = np.random.default_rng(0).normal(size=(20, 2))
    blends = [(blend("base"), {"r": values}), (blend("single", {"r": 1.0}), {"r": values + 0.5})]
    result = bootstrap(score_table(blends, 20, 2), ["r"])
    np.testing.assert_allclose(result.draws[:, 1, 0] - result.draws[:, 0, 0], 0.5, atol=1e-12)


def test_one_prompt_alone_has_intervals_over_its_seeds() -> None:
    values = np.random.default_rng(0).normal(size=(1, 100))
    result = bootstrap(score_table([(blend("base"), {"r": values})], 1, 100), ["r"], samples=5000)
    assert result.units == 100
    assert result.draws.std() == pytest.approx(values.std() / 10, rel=0.05)


# ── gains, weighted rewards, shares ──────────────────────────────────────────────────────────────────────────────────


def two_rewards() -> pd.DataFrame:
    """Base (0, 0), blend (0.3, 0.6) and its oracle (0.5, 0.9) at w = 0.25, above prompt effects that all share."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 2)), rng.normal(size=(30, 2))
    weights = preference(0.25, ("a", "b"))
    blends = [
        (blend("base"), {"a": a, "b": b}),
        (blend("db-mpa", weights), {"a": a + 0.3, "b": b + 0.6}),
        (blend("morl", weights, adapter="oracle"), {"a": a + 0.5, "b": b + 0.9}),
    ]
    return score_table(blends, 30, 2, ("a", "b"))


def test_gain_weighted_reward_and_share_of_the_oracle_are_what_the_definitions_give() -> None:
    frame = two_rewards()
    table = summary(frame).set_index("method")
    assert table.loc["db-mpa", "gain/a"] == pytest.approx(0.3)
    assert table.loc["db-mpa", "gain/b"] == pytest.approx(0.6)
    means = frame[frame["method"] == "db-mpa"][["reward/a", "reward/b"]].mean()
    assert table.loc["db-mpa", "weighted"] == pytest.approx(0.25 * means.iloc[0] + 0.75 * means.iloc[1])
    assert table.loc["db-mpa", "weighted_gain"] == pytest.approx(0.25 * 0.3 + 0.75 * 0.6)
    share = (0.25 * 0.3 + 0.75 * 0.6) / (0.25 * 0.5 + 0.75 * 0.9)
    ends = ["share_of_oracle", "share_of_oracle_lo", "share_of_oracle_hi"]
    # gains are the same for every prompt, so the intervals are points
    assert table.loc["db-mpa", ends].to_numpy(float) == pytest.approx([share] * 3)
    assert table.loc["db-mpa", ["gain/a_lo", "gain/a_hi"]].to_numpy(float) == pytest.approx([0.3, 0.3])
    assert table.loc["morl", ends].to_numpy(float) == pytest.approx([1.0] * 3)
    assert np.isnan(table.loc["base", "weighted"]) and np.isnan(table.loc["base", "share_of_oracle"])
    assert table["images"].tolist() == [60] * 3


def test_a_share_of_an_oracle_that_gains_nothing_sure_is_not_a_number() -> None:
    frame = two_rewards()
    oracle = frame["method"] == "morl"
    noise = np.random.default_rng(1).normal(size=(oracle.sum(), 2))
    frame.loc[oracle, ["reward/a", "reward/b"]] = noise
    assert summary(frame)["share_of_oracle"].isna().all()


def test_a_share_is_taken_of_the_oracle_with_the_same_weights_and_strength() -> None:
    frame = two_rewards()
    frame.loc[frame["method"] == "morl", "kl_scale"] = 2.0
    assert np.isnan(summary(frame).set_index("method").loc["db-mpa", "share_of_oracle"])


def test_a_weight_on_something_not_measured_gives_no_weighted_reward() -> None:
    frame = two_rewards().drop(columns="reward/b")
    assert summary(frame)["weighted"].isna().all()
    assert summary(frame).set_index("method").loc["db-mpa", "gain/a"] == pytest.approx(0.3)


def test_seconds_are_the_median_and_denoiser_rows_the_mean_over_images() -> None:
    frame = score_table([(blend("base"), {"r": 0.0})], 3)
    frame["seconds"], frame["denoiser_rows"] = [100.0, 1.0, 2.0], [10.0, 20.0, 60.0]
    assert summary(frame).loc[0, ["seconds", "denoiser_rows"]].tolist() == [2.0, 30.0]


def test_paired_differences_have_shorter_intervals_than_the_means_they_come_from() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(100, 1))
    values = [shared + 0.1 * rng.normal(size=(100, 2)) for _ in range(2)]
    frame = score_table(
        [(blend("base"), {"r": values[0]}), (blend("code", {"r": 1.0}), {"r": values[1] + 0.2})], 100, 2
    )
    difference = compare(frame, "code_r-1", "base").loc["r"]
    assert difference["difference"] == pytest.approx((values[1] + 0.2 - values[0]).mean())
    per_prompt = (values[1] - values[0]).mean(axis=1)
    # the half width that the paired t-test gives; 1000 draws place a quantile to about 7 %
    half = stats.t.ppf(0.975, 99) * per_prompt.std(ddof=1) / 10
    assert (difference["hi"] - difference["lo"]) / 2 == pytest.approx(half, rel=0.2)
    table = summary(frame)
    unpaired = np.hypot(*(table["reward/r_hi"] - table["reward/r_lo"])) / 2
    # theory: √(2 · (1 + 0.01/2)) / √(2 · 0.01/2) = 14
    assert unpaired > 5 * half
    assert compare(frame, "base", "code_r-1").loc["r", "difference"] == pytest.approx(-difference["difference"])
    with pytest.raises(ValueError, match="there is no blend 'other'"):
        compare(frame, "base", "other")


# ── missing rows and scores ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_blend_that_lacks_images_is_named_with_the_first_missing_one() -> None:
    frame = two_rewards()
    gone = (frame["method"] == "db-mpa") & (frame["prompt_id"] == 7) & (frame["seed"] == 1)
    with pytest.raises(ValueError, match="evaluation not finished: blend 'db-mpa_a-0.25_b-0.75' has 59 of 60") as error:
        summary(frame[~gone])
    assert "prompt_id 7, seed 1" in str(error.value)


def test_a_blend_that_has_an_image_twice_is_refused() -> None:
    frame = two_rewards()
    with pytest.raises(ValueError, match="more than once"):
        summary(pd.concat([frame, frame.head(1)]))


def test_one_label_for_two_blends_is_refused() -> None:
    frame = two_rewards()
    frame.loc[frame["method"] == "morl", "blend"] = "base"
    with pytest.raises(ValueError, match="'base' stands for blends with different settings"):
        summary(frame)


def test_a_missing_score_is_left_out_and_counted_for_its_blend_and_reward_alone() -> None:
    frame = two_rewards()
    own = frame["method"] == "db-mpa"
    lost = own & (frame["prompt_id"] == 3)
    frame.loc[lost & (frame["seed"] == 0), "reward/a"] = np.nan
    frame.loc[own & (frame["prompt_id"] == 5), "reward/a"] = np.inf
    table = summary(frame).set_index("method")
    assert table["missing/a"].to_dict() == {"base": 0, "db-mpa": 3, "morl": 0}
    assert table["missing/b"].sum() == 0
    scored = frame[own & np.isfinite(frame["reward/a"])]
    # every prompt counts the same, so prompt 3 counts by its one image and prompt 5 not at all
    assert table.loc["db-mpa", "reward/a"] == pytest.approx(scored.groupby("prompt_id")["reward/a"].mean().mean())
    # pairs with a missing half do not count: the constant gain is found exactly
    assert table.loc["db-mpa", "gain/a"] == pytest.approx(0.3)
    assert table.loc["db-mpa", "weighted_gain"] == pytest.approx(0.25 * 0.3 + 0.75 * 0.6)
    assert compare(frame, "db-mpa_a-0.25_b-0.75", "base")["images"].tolist() == [57, 60]


def test_rewards_that_no_blend_weighs_are_held_out() -> None:
    frame = evaluation(prompts=3)
    assert held_out_rewards(frame) == ["held"]
    assert summary(frame).attrs["held_out_rewards"] == ["held"]


# ── diversity ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_diversity_is_the_mean_root_mean_square_distance_between_a_prompts_seeds() -> None:
    """Grey levels 0, 51 and 255 of 255: the three pairs are 0.2, 0.8 and 1 apart; another prompt's are 0."""

    def thumbnail(_: str, prompt: int, seed: int) -> np.ndarray:
        return np.full((8, 8, 3), [0, 51, 255][seed] if prompt == 0 else 7, dtype=np.uint8)

    frame = score_table([(blend("base"), {"r": 0.0})], 2, 3, thumbnail=thumbnail)
    assert diversity(frame).loc[0, "diversity"] == pytest.approx(np.mean([0.2, 0.8, 1.0]) / 2)


def test_half_the_pixels_at_full_distance_are_the_root_of_a_half_apart() -> None:
    def thumbnail(_: str, prompt: int, seed: int) -> np.ndarray:
        image = np.zeros((8, 8, 3), dtype=np.uint8)
        image[: 4 * seed] = 255
        return image

    frame = score_table([(blend("base"), {"r": 0.0})], 2, 2, thumbnail=thumbnail)
    assert diversity(frame).loc[0, "diversity"] == pytest.approx(np.sqrt(0.5))


@pytest.mark.parametrize("seeds", [1, 2])
def test_diversity_without_a_second_seed_or_without_thumbnails_is_not_a_number(seeds: int) -> None:
    frame = score_table([(blend("base"), {"r": 0.0})], 2, seeds)
    if seeds == 1:
        frame["thumbnail"] = [bytes(192)] * 2
    assert diversity(frame)[["diversity", "diversity_lo", "diversity_hi"]].isna().all(axis=None)


# ── fronts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def inclusion_exclusion(points: np.ndarray, reference: np.ndarray) -> float:
    """Volume of the union of the boxes [reference, point], by inclusion and exclusion over all subsets."""
    boxes = [point for point in points if (point > reference).all()]
    total = 0.0
    for size in range(1, len(boxes) + 1):
        for subset in combinations(boxes, size):
            total += (-1) ** (size + 1) * np.prod(np.min(subset, axis=0) - reference)
    return total


@pytest.mark.parametrize("rewards", [2, 3])
def test_the_hypervolume_is_the_volume_of_the_union_of_boxes(rewards: int) -> None:
    rng = np.random.default_rng(rewards)
    for _ in range(20):
        points, reference = rng.normal(size=(8, rewards)), rng.normal(size=rewards) - 0.7
        # both sum a few hundred terms of order 1 in double precision
        assert hypervolume(points, reference) == pytest.approx(inclusion_exclusion(points, reference), abs=1e-9)


def test_pareto_flags_agree_with_comparing_every_pair() -> None:
    rng = np.random.default_rng(0)
    for rewards in (2, 3, 4):
        points = rng.integers(0, 6, size=(60, rewards)).astype(float)  # a coarse grid, so ties and equal points occur
        expected = [not any((q >= p).all() and (q > p).any() for q in points) for p in points]
        assert pareto(points).tolist() == expected


def test_a_point_with_a_missing_reward_is_not_on_the_front() -> None:
    assert pareto(np.array([[1.0, np.nan], [0.0, 0.0]])).tolist() == [False, True]
    with pytest.raises(ValueError, match="two or more rewards"):
        pareto(np.zeros((3, 1)))
    with pytest.raises(ValueError, match="finite"):
        hypervolume(np.array([[1.0, np.nan]]), [0, 0])


def exact_front() -> pd.DataFrame:
    """Prompt effects that all share; ends (0, 2), (2, 0); DB-MPA also at (1.5, 1.5), CoDe at (1, 1) alone."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(20, 1)), rng.normal(size=(20, 1))
    a, b = a - a.mean(), b - b.mean()
    half = preference(0.5, ("a", "b"))
    points = [
        (blend("base"), 0, 0),
        (blend("single", {"a": 1.0}), 2, 0),
        (blend("single", {"b": 1.0}), 0, 2),
        (blend("db-mpa", half), 1.5, 1.5),
        (blend("code", half), 1, 1),
        (blend("db-kla", {"a": 1.0}, kl_scale=2.0), 3, 0),
    ]
    return score_table([(settings, {"a": a + x, "b": b + y}) for settings, x, y in points], 20, names=("a", "b"))


def test_a_variants_hypervolume_takes_the_single_adapters_as_the_ends_of_methods_that_interpolate_them() -> None:
    table = hypervolumes(exact_front(), ["a", "b"], reference=[-1, -1]).set_index("variant")
    ends = np.array([[2.0, 0.0], [0.0, 2.0]])
    assert table.loc["DB-MPA", "hypervolume"] == pytest.approx(
        inclusion_exclusion(np.vstack([ends, [1.5, 1.5]]), np.array([-1.0, -1.0]))
    )
    assert table.loc["CoDe", "hypervolume"] == pytest.approx(4)  # (1 + 1)²: no ends
    assert table.loc["Base", "hypervolume"] == pytest.approx(1)
    assert table["points"].to_dict() == {"Base": 1, "single adapter": 2, "DB-MPA": 3, "CoDe": 1}
    assert table.loc["CoDe", "difference"] == pytest.approx(4 - table.loc["DB-MPA", "hypervolume"])
    assert table.loc["DB-MPA", ["difference", "difference_lo", "difference_hi"]].tolist() == [0, 0, 0]


def test_the_default_reference_is_the_base_and_a_level_that_all_share_adds_no_uncertainty() -> None:
    table = hypervolumes(exact_front(), ["a", "b"])
    reference = table.attrs["reference"]
    assert reference == pytest.approx({"a": 0, "b": 0}, abs=1e-12)
    assert table.attrs["reference_is"] == "the base"
    # the staircase (0, 2), (1.5, 1.5), (2, 0) above the base: the ends, which gain in one reward alone, enclose nothing
    volumes = table.set_index("variant")["hypervolume"]
    assert volumes["DB-MPA"] == pytest.approx(1.5**2) and volumes["single adapter"] == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(table["lo"], table["hypervolume"], atol=1e-12)
    np.testing.assert_allclose(table["hi"], table["hypervolume"], atol=1e-12)
    fixed = hypervolumes(exact_front(), ["a", "b"], reference=list(reference.values())).set_index("variant")
    assert (fixed.loc[["DB-MPA", "CoDe"], "hi"] - fixed.loc[["DB-MPA", "CoDe"], "lo"] > 0.1).all()


def test_without_a_base_the_reference_is_the_lowest_mean_of_each_reward() -> None:
    frame = exact_front()
    table = hypervolumes(frame[frame["method"] != "base"], ["a", "b"])
    assert table.attrs["reference"] == pytest.approx({"a": 0, "b": 0}, abs=1e-12)
    assert table.attrs["reference_is"] == "the lowest means"


@pytest.mark.parametrize(("rewards", "count"), [(2, 9), (3, 9), (3, 40), (4, 9), (5, 6)])
def test_hypervolumes_of_many_samples_at_once_are_moocores_of_each_alone(rewards: int, count: int) -> None:
    rng = np.random.default_rng(rewards)
    points, reference = rng.normal(size=(20, count, rewards)), rng.normal(size=rewards) - 0.7
    points[:, 1] = points[:, 0]  # ties
    moocore = pytest.importorskip("moocore", reason="needs the extra dev")
    expected = [moocore.hypervolume(each, reference, maximise=True) for each in points]
    # sums of some dozen products of order 1 in double precision
    np.testing.assert_allclose(drawn_hypervolumes(points, reference), expected, atol=1e-12)


def test_the_order_of_hypervolumes_is_stated_for_two_reference_points() -> None:
    """CoDe (0.5, 0.5) and RGG (0.2, 4) gain in both rewards, DB-MPA (40, −0.0001) in one alone."""
    half = preference(0.5, ("a", "b"))
    points = {"base": (0, 0), "code": (0.5, 0.5), "rgg": (0.2, 4), "db-mpa": (40, -0.0001)}
    blends = [(blend(each, half if each != "base" else None), {"a": a, "b": b}) for each, (a, b) in points.items()]
    # above the base: 0.25, 0.8 and 0; above (−4, −0.4): 4.5 · 0.9 = 4.05, 4.2 · 4.4 = 18.5 and 44 · 0.4 = 17.6
    assert hypervolume_orders(estimate(score_table(blends, 3, names=("a", "b"))), ["a", "b"]) == {
        "the base": ["RGG", "CoDe", "DB-MPA"],
        "a tenth of the range below the lowest means": ["RGG", "DB-MPA", "CoDe"],
    }


def test_the_default_reference_lies_a_tenth_of_the_range_below_the_lowest_mean() -> None:
    assert default_reference(np.array([[0.0, 5.0], [10.0, 5.0]])) == pytest.approx([-1.0, 5.0])


def test_a_front_over_unknown_or_single_rewards_is_refused() -> None:
    for names in (["a"], ["a", "other"]):
        with pytest.raises(ValueError, match="two or more measured rewards"):
            hypervolumes(exact_front(), names)


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_variants_have_the_papers_names_and_tell_settings_apart() -> None:
    half = preference(0.5)
    blends = [
        (blend("base"), {}),
        (blend("single", {"alignment": 1.0}), {}),
        (blend("db-mpa", half), {}),
        (blend("db-mpa", half, kl_scale=0.5), {}),
        (blend("db-mpa-ls", half), {}),
        (blend("db-mpa-ls", half, ls_schedule="systematic"), {}),
        (blend("rewarded-soup", half), {}),
        (blend("rewarded-soup-factors", half), {}),
        (blend("db-kla", {"alignment": 1.0}, kl_scale=1.0), {}),
        (blend("code", half, "c4", options={"particles": 4}), {}),
        (blend("code", half, "c8", options={"particles": 8}), {}),
        (blend("rgg", half, options={"scale": 1}), {}),
        (blend("morl", half, adapter="m"), {}),
    ]
    frame = score_table([(settings, {"r": 0.0}) for settings, _ in blends], 1)
    assert blend_table(frame)["variant"].tolist() == [
        "Base", "single adapter", "DB-MPA", "DB-MPA λ=0.5", "DB-MPA-LS", "DB-MPA-LS (systematic)",
        "Rewarded Soup (exact)", "Rewarded Soup (factors)", "DB-KLA λ=1", "CoDe (particles=4)", "CoDe (particles=8)",
        "RGG", "MORL (oracle)",
    ]  # fmt: skip


def test_a_front_keeps_a_methods_own_end_before_the_single_adapters() -> None:
    half = preference(0.5)
    blends = [blend("single", {"alignment": 1.0}), blend("single", {"aesthetic": 1.0}), blend("db-mpa", half),
              blend("db-mpa", {"alignment": 1.0})]  # fmt: skip
    frame = score_table([(each, {"alignment": 0.0, "aesthetic": 0.0}) for each in blends], 1, names=list(half))
    assert list(front(blend_table(frame), "DB-MPA", list(half)).items()) == [
        ((0.0, 1.0), "single_aesthetic-1"),
        ((0.5, 0.5), "db-mpa_alignment-0.5_aesthetic-0.5"),
        ((1.0, 0.0), "db-mpa_alignment-1"),
    ]


def test_preference_sets_are_the_rewards_weighed_together_smaller_first() -> None:
    weights = [{"a": 0.5, "b": 0.5}, {"a": 0.2, "b": 0.3, "c": 0.5}, {"a": 1.0}, {"a": 0.5, "unmeasured": 0.5}]
    blends = [(blend("db-mpa", each), {name: 0.0 for name in "abc"}) for each in weights]
    assert preference_sets(score_table(blends, 1, names=("a", "b", "c"))) == [["a", "b"], ["a", "b", "c"]]


def test_a_score_table_comes_back_as_it_was_written_with_its_record(tmp_path: Path) -> None:
    frame, path = evaluation(prompts=2), tmp_path / "deep" / "scores.parquet"
    write_scores(path, frame, {"base": "miniature", "eta": 1.0})
    again, record = read_scores(path)
    assert record == {"base": "miniature", "eta": 1.0}
    pd.testing.assert_frame_equal(again, frame, check_dtype=False)
    assert [each.name for each in path.parent.iterdir()] == ["scores.parquet"]


def test_a_column_that_an_earlier_version_named_otherwise_is_read_under_todays_name(tmp_path: Path) -> None:
    frame, path = evaluation(prompts=2), tmp_path / "scores.parquet"
    write_scores(path, frame.rename(columns={"denoiser_rows": "unet_rows"}), {})
    pd.testing.assert_frame_equal(read_scores(path)[0], frame, check_dtype=False)


def test_files_that_are_no_score_table_are_refused_with_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    with pytest.raises(FileNotFoundError, match="no score table"):
        read_scores(path)
    for content in (b"text", b"", b"PAR1" + bytes(100) + b"PAR1"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="scores.parquet is not a Parquet file"):
            read_scores(path)
    two_rewards().drop(columns="seed").to_parquet(path)
    with pytest.raises(ValueError, match="scores.parquet: .*column seed is missing"):
        read_scores(path)
    two_rewards().head(0).to_parquet(path)
    with pytest.raises(ValueError, match="scores.parquet: .*no rows"):
        read_scores(path)
    frame = two_rewards()
    frame.assign(**{name: "high" for name in frame if name.startswith("reward/")}).to_parquet(path)
    with pytest.raises(ValueError, match="scores.parquet: could not convert"):
        read_scores(path)
    for record in (b"{", b"[1]"):
        table = pa.Table.from_pandas(frame).replace_schema_metadata({RECORD_KEY: record})
        pq.write_table(table, path)
        with pytest.raises(ValueError, match="scores.parquet has a record of its making that is not a JSON object"):
            read_scores(path)


def test_estimates_do_not_depend_on_the_order_of_the_rows() -> None:
    frame = evaluation(prompts=5)
    first, second = estimate(frame), estimate(frame.sample(frac=1, random_state=0))
    np.testing.assert_array_equal(first.draws, second.draws)
    assert first.blends["blend"].tolist() == second.blends["blend"].tolist()
