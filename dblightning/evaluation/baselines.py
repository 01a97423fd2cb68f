"""Baselines of any blend: one adapter alone under the same weights, and an adapter drawn at random for each image.

Neither needs a run of its own. Under weights w the single adapter of reward k has r(w) = Σ wᵢ rᵢ of its own images, and
an adapter drawn per image with probability w_k has, in expectation, Σ_k w_k of theirs: the chord between the adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from dblightning.evaluation.scores import INTERPOLATING, WEIGHT, weight_names, weights_of, within

BEST_SINGLE = "best single adapter"
RANDOM = "random adapter per image"
#: method of the rows of a random adapter
RANDOM_METHOD = "random-adapter"


def single_blends(blends: pd.DataFrame) -> dict[str, str]:
    """Reward → the blend that is its adapter alone: ``single``, or an interpolating method where its weight is 1."""
    plain = (blends["kl_scale"] == 1) & blends["adapter"].isna()
    found: dict[str, str] = {}
    for methods in ({"single"}, INTERPOLATING - {"morl"}):
        part = blends[plain & blends["method"].isin(methods)]
        for name in weight_names(blends):
            own = part.loc[part[WEIGHT + name] == 1, "blend"]
            if len(own):
                found.setdefault(name, str(own.iloc[0]))
    return found


def baseline_rows(blends: pd.DataFrame, rewards: Sequence[str]) -> tuple[pd.DataFrame, dict[str, dict[str, float]]]:
    """The baselines of every preference that some blend mixes rewards for, where the adapters alone were evaluated.

    Args:
        blends: of ``scores.blend_table``.
        rewards: measured names.

    Returns:
        Rows like those of ``blends``: each adapter alone under the preference (method ``single``, column
        ``adapter_alone``), then the random adapter; and the parts of each: label → {blend or row before it: share}.
        A preference has each adapter whose ``single`` was run, and the random adapter only with all of them.
    """
    names, singles = weight_names(blends), single_blends(blends)
    mixed = (weights_of(blends, names) > 0).sum(axis=1) > 1
    requested = blends[mixed & within(blends, rewards)].drop_duplicates([WEIGHT + name for name in names])
    rows: list[dict[str, object]] = []
    parts: dict[str, dict[str, float]] = {}
    for weights in sorted({tuple(float(each) for each in row) for row in weights_of(requested, names)}):
        support = {name: weight for name, weight in zip(names, weights, strict=True) if weight}
        ending = "_".join(f"{name}-{weight:g}" for name, weight in support.items())
        alone = {name: f"{singles[name]} under {ending}" for name in support if name in singles}
        for name, label in alone.items():
            parts[label] = {singles[name]: 1.0}
            rows.append(_row(label, "single", f"{name} adapter alone", support, name))
        if len(alone) == len(support):
            label = f"{RANDOM_METHOD} under {ending}"
            parts[label] = {alone[name]: weight for name, weight in support.items()}
            rows.append(_row(label, RANDOM_METHOD, RANDOM, support, None))
    columns = [*blends.columns, "adapter_alone"]
    frame = pd.DataFrame(rows, columns=columns)
    frame[[WEIGHT + name for name in names]] = frame[[WEIGHT + name for name in names]].astype(float).fillna(0.0)
    return frame, parts


def _row(label: str, method: str, variant: str, weights: Mapping[str, float], adapter: str | None) -> dict[str, object]:
    settings = {"blend": label, "method": method, "variant": variant, "kl_scale": 1.0, "ls_schedule": "iid"}
    return {**settings, "options": "{}", "adapter_alone": adapter, **{WEIGHT + k: v for k, v in weights.items()}}
