"""The score table: one row per image; everything reported is derived from it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

#: two-sided 95 % quantile of the normal distribution
Z95 = 1.959963984540054


def interval(values: pd.Series, groups: pd.Series) -> float:
    """Half width of the 95 % interval of a mean whose images come in groups (one prompt's seeds are not independent).

    The mean of the groups' means is treated as normal; groups are the independent unit.

    Args:
        values: one per image.
        groups: the image's prompt.

    Returns:
        1.96 · standard error; NaN for fewer than two groups.
    """
    means = values.groupby(groups).mean()
    if len(means) < 2:
        return float("nan")
    return Z95 * float(means.std(ddof=1)) / float(np.sqrt(len(means)))


def summarize(scores: pd.DataFrame, rewards: Sequence[str]) -> pd.DataFrame:
    """Mean of each reward per blend, with the half width of its 95 % interval, seconds per image and image count.

    Where the base model is among the blends, also the gain over it, paired image by image (``<reward>_gain``), with the
    half width of its interval.

    Args:
        scores: one row per image: ``order``, ``method``, ``blend``, ``prompt_id``, ``seed``, ``seconds``, rewards.
        rewards: their column names.
    """
    base = scores[scores["method"] == "base"].drop_duplicates(["prompt_id", "seed"])
    base = base.set_index(["prompt_id", "seed"])
    rows = []
    for (order, method, blend), part in scores.groupby(["order", "method", "blend"], sort=True):
        row: dict[str, object] = {"order": order, "method": method, "blend": blend}
        for name in rewards:
            row[name] = part[name].mean()
            row[f"{name}_ci"] = interval(part[name], part["prompt_id"])
            if len(base):
                same = base.loc[pd.MultiIndex.from_frame(part[["prompt_id", "seed"]]), name].to_numpy()
                gain = part[name] - same
                row[f"{name}_gain"], row[f"{name}_gain_ci"] = gain.mean(), interval(gain, part["prompt_id"])
        rows.append(row | {"seconds": part["seconds"].mean(), "images": len(part)})
    return pd.DataFrame(rows)
