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
            "seconds": [2.0, 4.0, 1.0, 1.0],
            "r": [1.0, 2.0, -1.0, 0.0],
        }
    )
    summary = summarize(scores, ["r"])
    assert summary["blend"].tolist() == ["a", "b"]
    assert summary["r"].tolist() == [-0.5, 1.5]
    assert summary["seconds"].tolist() == [1.0, 3.0]
    assert summary["images"].tolist() == [2, 2]
