from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dblightning.evaluation.scores import interval, summarize


def test_the_interval_covers_the_true_mean_at_its_stated_rate_with_correlated_seeds() -> None:
    rng = np.random.default_rng(0)
    prompts, seeds, repeats = 60, 4, 600
    covered = 0
    for _ in range(repeats):
        effect = rng.normal(size=(prompts, 1))  # what a prompt's seeds share
        values = 1.0 + effect + 0.5 * rng.normal(size=(prompts, seeds))
        groups = np.repeat(np.arange(prompts), seeds)
        half = interval(pd.Series(values.ravel()), pd.Series(groups))
        covered += abs(values.mean() - 1.0) <= half
    # 95 % less the normal quantile's small-sample loss; binomial error of 600 runs is 0.9 %
    assert covered / repeats == pytest.approx(0.945, abs=0.03)


def test_one_prompt_gives_no_interval() -> None:
    assert np.isnan(interval(pd.Series([1.0, 2.0]), pd.Series([0, 0])))


def test_the_summary_averages_each_blend_on_its_own_and_keeps_their_order() -> None:
    scores = pd.DataFrame(
        {
            "order": [1, 1, 0, 0],
            "method": ["db-mpa", "db-mpa", "base", "base"],
            "blend": ["b", "b", "a", "a"],
            "prompt_id": [0, 1, 0, 1],
            "seed": [0, 0, 0, 0],
            "seconds": [2.0, 4.0, 1.0, 1.0],
            "r": [1.0, 2.0, -1.0, 0.0],
        }
    )
    summary = summarize(scores, ["r"])
    assert summary["blend"].tolist() == ["a", "b"]
    assert summary["r"].tolist() == [-0.5, 1.5]
    assert summary["seconds"].tolist() == [1.0, 3.0]
    assert summary["images"].tolist() == [2, 2]


def test_the_gain_over_the_base_is_paired_image_by_image() -> None:
    """Images of very different reward, each 0.5 better than its own base image: the paired interval is zero."""
    prompts = pd.Series([0, 1, 2, 3])
    base = pd.DataFrame({"order": 0, "method": "base", "blend": "base", "prompt_id": prompts, "seed": 0})
    tuned = base.assign(order=1, method="single", blend="tuned")
    base["r"], tuned["r"] = [0.0, 10.0, 20.0, 30.0], [0.5, 10.5, 20.5, 30.5]
    scores = pd.concat([tuned.sample(frac=1, random_state=0), base], ignore_index=True).assign(seconds=1.0)
    summary = summarize(scores, ["r"]).set_index("blend")
    assert summary.loc["tuned", "r_gain"] == pytest.approx(0.5)
    assert summary.loc["tuned", "r_gain_ci"] == pytest.approx(0.0, abs=1e-9)
    assert summary.loc["tuned", "r_ci"] > 5
    assert summary.loc["base", "r_gain"] == 0
