"""Analysis of an evaluation, from its score table alone: means, gains, weighted rewards, diversity; all with intervals.

Everything is a pure function of the table. Intervals come from one paired, clustered bootstrap
(:mod:`dblightning.evaluation.intervals`); fronts and hypervolumes are in :mod:`dblightning.evaluation.fronts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from dblightning.evaluation.baselines import RANDOM_METHOD, baseline_rows
from dblightning.evaluation.intervals import (
    SAMPLES,
    Images,
    bootstrap,
    images_of,
    interval,
    resample,
    unit_means,
    weighted_means,
)
from dblightning.evaluation.scores import (
    REWARD,
    blend_table,
    held_out_rewards,
    preferences,
    reward_names,
    weight_names,
    weights_of,
    with_defaults,
    within,
)

__all__ = ["Estimates", "bootstrap", "compare", "diversity", "estimate", "held_out_rewards", "oracle_shares", "summary"]

GAIN, MISSING = "gain/", "missing/"
#: path KL to the base model in nats, a column of the score table and a quantity
KL = "kl"
#: gain in r(w) less α times the path KL: the value of eq. (4) over the base's, whose KL is 0
OBJECTIVE = "objective"


@dataclass(frozen=True)
class Estimates:
    """Every quantity of every blend, with the bootstrap draws behind it.

    Quantities: ``reward/<name>``; ``gain/<name>``, the paired gain over the base; ``weighted``, r(w) = Σ wᵢ rᵢ of the
    blend's own weights; ``weighted_gain``; ``kl``, where it was measured; ``objective``, the gain less α times the KL,
    where α was given; ``diversity``.

    The rows are the evaluated blends, then the baselines of every preference (:mod:`dblightning.evaluation.baselines`).
    """

    #: see scores.blend_table and baselines.baseline_rows; with seconds, denoiser_rows, images, missing/…
    rows: pd.DataFrame
    evaluated: int  # the first so many rows are evaluated blends
    quantities: list[str]
    values: np.ndarray  # (rows, quantities)
    draws: np.ndarray  # (samples, rows, quantities)
    low: np.ndarray  # (rows, quantities)
    high: np.ndarray
    units: int
    level: float
    held_out: list[str]
    parts: Mapping[str, Mapping[str, float]]  # baseline → {blend: share}
    weighted_images: np.ndarray  # r(w) of every image, (rows, images)
    starts: np.ndarray  # first image of each unit, (units,)
    resampled: np.ndarray  # weights of the units in each draw, (samples, units)
    alpha: float | None = None  # of eq. (4), reward per nat, where one was given

    @cached_property
    def blends(self) -> pd.DataFrame:
        """The evaluated blends, without the baselines."""
        return self.rows.iloc[: self.evaluated].drop(columns="adapter_alone").astype({"order": int, "images": int})

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {blend: row for row, blend in enumerate(self.rows["blend"])}

    @property
    def rewards(self) -> list[str]:
        """Names of the measured rewards."""
        return [name.removeprefix(REWARD) for name in self.quantities if name.startswith(REWARD)]

    def row(self, blend: str) -> int:
        """Position of a blend or baseline."""
        return self._positions[blend]

    def methods(self) -> dict[str, str]:
        """Method of every blend and baseline, by label."""
        return dict(zip(self.rows["blend"], self.rows["method"], strict=True))

    def of(self, blend: str, quantity: str) -> tuple[float, float, float]:
        """A blend's value of a quantity and the two ends of its interval; NaN where it has none."""
        at = self.row(blend), self.quantities.index(quantity)
        return float(self.values[at]), float(self.low[at]), float(self.high[at])

    def difference(self, blend: str, other: str, quantity: str) -> tuple[float, float, float]:
        """A blend's value less another's, with the ends of the paired interval."""
        column, first, second = self.quantities.index(quantity), self.row(blend), self.row(other)
        low, high = interval(self.draws[:, first, column] - self.draws[:, second, column], self.units, self.level)
        return float(self.values[first, column] - self.values[second, column]), float(low), float(high)

    def with_interval(self, draws: np.ndarray) -> tuple[float, float, float]:
        """An estimate with the two ends of its interval; ``draws``: itself, then the bootstrap's, (1 + samples,)."""
        low, high = interval(draws[1:], self.units, self.level)
        return float(draws[0]), float(low), float(high)

    def under(self, blend: str, preference: Mapping[str, float], alpha: float = 0.0) -> np.ndarray:
        """E[r(w)] − α·KL of a blend's images under any preference w, its own or not.

        Args:
            blend: label.
            preference: reward → weight.
            alpha: reward per nat of path KL.

        Returns:
            The estimate, then the bootstrap's draws, (1 + samples,).
        """
        row = self.row(blend)
        both = np.concatenate([self.values[row][None], self.draws[:, row]])
        total = sum(weight * both[:, self.quantities.index(REWARD + name)] for name, weight in preference.items())
        return np.asarray(total - alpha * both[:, self.quantities.index(KL)] if alpha else total)

    def win_rate(self, blend: str, other: str) -> tuple[float, float, float]:
        """Share of images whose r(w) is higher with a blend than with another, ties counted half; with its interval.

        Of a random adapter it is the expectation over the draw of the adapter.
        """
        wins = np.zeros(self.weighted_images.shape[1])
        for first, share in self._drawn(blend).items():
            for second, other_share in self._drawn(other).items():
                gap = self.weighted_images[self.row(first)] - self.weighted_images[self.row(second)]
                wins += share * other_share * np.where(np.isnan(gap), np.nan, (np.sign(gap) + 1) / 2)
        means = unit_means(wins[None, :, None], self.starts)
        value = weighted_means(np.full((1, self.units), 1 / self.units), means)[0, 0, 0]
        low, high = interval(weighted_means(self.resampled, means)[:, 0, 0], self.units, self.level)
        return float(value), float(low), float(high)

    def _drawn(self, blend: str) -> Mapping[str, float]:
        return self.parts[blend] if self.methods()[blend] == RANDOM_METHOD else {blend: 1.0}


def estimate(
    frame: pd.DataFrame, samples: int = SAMPLES, seed: int = 0, level: float = 0.95, alpha: float | None = None
) -> Estimates:
    """Estimate every quantity of every blend on the same resampled prompts.

    Args:
        frame: one row per image.
        samples, seed: of the bootstrap.
        level: of the intervals.
        alpha: α of eq. (4), reward per nat, ≥ 0; None leaves the objective out.

    Raises:
        ValueError: an unfinished evaluation, see :func:`intervals.images_of`; α without base or KL, or below 0.
    """
    frame = with_defaults(frame)
    rewards = reward_names(frame)
    images, blends = images_of(frame, rewards), blend_table(frame)
    evaluated = len(blends)
    _check_alpha(alpha, frame, blends)
    baselines, parts = baseline_rows(blends, rewards)
    rows = pd.concat([_with_costs(blends, frame, images).assign(adapter_alone=None), baselines], ignore_index=True)
    positions = {blend: row for row, blend in enumerate(rows["blend"])}
    mixtures = [{positions[blend]: share for blend, share in parts[label].items()} for label in baselines["blend"]]
    scores = _with_mixtures(images.values, mixtures)
    weighted, weighted_base = _weighted(scores, rows, rewards)
    base = _base_row(rows)
    gains = scores - (scores[base] if base is not None else np.nan)
    weighted_gain = (weighted - weighted_base)[..., None]
    of_kl: dict[str, np.ndarray] = {}
    if _has_kl(frame):
        of_kl[KL] = _with_mixtures(frame[KL].to_numpy(dtype=float)[images.rows][..., None], mixtures)
    if alpha is not None:
        of_kl[OBJECTIVE] = weighted_gain - alpha * of_kl[KL]
    columns = [scores, gains, weighted[..., None], weighted_gain, *of_kl.values()]
    means = unit_means(np.concatenate(columns, axis=-1), images.starts)
    one_prompt = len(np.unique(images.prompts)) == 1
    distances = _of_parts(_distances(frame, images), mixtures)
    # one prompt's seeds make one distance: it has no interval and is added after the resampling
    means = np.concatenate([means, np.full((*means.shape[:2], 1), np.nan) if one_prompt else distances], axis=-1)
    units = means.shape[1]
    values = weighted_means(np.full((1, units), 1 / units), means)[0]
    if one_prompt:
        values[:, -1] = distances[:, 0, 0]
    resampled = resample(units, samples, seed)
    draws = weighted_means(resampled, means)
    low, high = interval(draws, units, level)
    quantities = [REWARD + name for name in rewards] + [GAIN + name for name in rewards]
    quantities += ["weighted", "weighted_gain", *of_kl, "diversity"]
    rows[[MISSING + name for name in rewards]] = np.isnan(scores).sum(axis=1)
    seconds = rows["seconds"].to_numpy()[:evaluated, None, None]
    denoiser_rows = rows["denoiser_rows"].to_numpy(dtype=float)[:evaluated, None, None]
    for name, own in (("seconds", seconds), ("denoiser_rows", denoiser_rows)):
        rows[name] = _with_mixtures(own, mixtures)[:, 0, 0]
    return Estimates(
        rows, evaluated, quantities, values, draws, low, high, units, level, held_out_rewards(frame), parts, weighted,
        images.starts, resampled, alpha,
    )  # fmt: skip


def _has_kl(frame: pd.DataFrame) -> bool:
    return KL in frame and bool(np.isfinite(frame[KL].astype(float)).any())


def _check_alpha(alpha: float | None, frame: pd.DataFrame, blends: pd.DataFrame) -> None:
    if alpha is None:
        return
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha must be >= 0 and finite, got {alpha}")
    if not _has_kl(frame):
        raise ValueError("alpha weighs the KL to the base, which this evaluation did not measure: set --model.kl true")
    if _base_row(blends) is None:
        raise ValueError("E[r(w)] - alpha * KL is stated over the base's, which was not evaluated: add {method: base}")


def _with_mixtures(values: np.ndarray, mixtures: Sequence[Mapping[int, float]]) -> np.ndarray:
    """The rows of ``values`` (blends, …), then one row per mixture: the sum of the rows before it by share."""
    rows = list(values)
    for mixture in mixtures:
        rows.append(sum(share * rows[row] for row, share in mixture.items()))
    return np.stack(rows)


def _of_parts(values: np.ndarray, mixtures: Sequence[Mapping[int, float]]) -> np.ndarray:
    """As :func:`_with_mixtures` for what does not add up: a mixture of one row has its values, any other NaN."""
    rows = list(values)
    for mixture in mixtures:
        rows.append(rows[next(iter(mixture))] if len(mixture) == 1 else np.full_like(values[0], np.nan))
    return np.stack(rows)


def _base_row(blends: pd.DataFrame) -> int | None:
    rows = np.flatnonzero(blends["method"] == "base")
    return int(rows[0]) if len(rows) else None


def _weighted(scores: np.ndarray, blends: pd.DataFrame, rewards: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """r(w) of every image and of the base's same image under the same weights, each (rows, images).

    NaN for blends that weigh nothing or weigh something that was not measured.
    """
    weights = weights_of(blends, rewards)[:, None, :]
    known = within(blends, rewards) & (weights_of(blends, weight_names(blends)) > 0).any(axis=1)
    base = _base_row(blends)
    results = []
    for values in (scores, scores[base] if base is not None else np.full(scores.shape[1:], np.nan)):
        # where: a weight of zero must not take in a missing score
        total = np.where(weights > 0, weights * values, 0.0).sum(axis=-1)
        results.append(np.where(known[:, None], total, np.nan))
    return results[0], results[1]


def _with_costs(blends: pd.DataFrame, frame: pd.DataFrame, images: Images) -> pd.DataFrame:
    seconds, rows = (frame[name].to_numpy(dtype=float)[images.rows] for name in ("seconds", "denoiser_rows"))
    # the median: the first images of a run pay for warming up
    return blends.assign(seconds=np.median(seconds, axis=1), denoiser_rows=rows.mean(axis=1), images=seconds.shape[1])


# ── diversity ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _distances(frame: pd.DataFrame, images: Images) -> np.ndarray:
    """Mean distance between the thumbnails of one prompt's seeds, (blends, prompts, 1); NaN where there are none."""
    prompts, position = np.unique(images.prompts, return_inverse=True)
    result = np.full((len(images.blends), len(prompts), 1), np.nan)
    pairs = [
        (first, second)
        for each in range(len(prompts))
        for members in [np.flatnonzero(position == each)]
        for first, second in zip(*(members[half] for half in np.triu_indices(len(members), 1)), strict=True)
    ]
    if not pairs or frame["thumbnail"].isna().any():
        return result
    first, second = np.array(pairs).T
    pictures = np.stack([np.frombuffer(each, dtype=np.uint8) for each in frame["thumbnail"]])
    owner = position[first]
    for blend, rows in enumerate(images.rows):
        pixels = pictures[rows].astype(np.float32) / 255
        distance = np.sqrt(np.mean((pixels[first] - pixels[second]) ** 2, axis=1))
        total, count = np.bincount(owner, distance, len(prompts)), np.bincount(owner, minlength=len(prompts))
        result[blend, :, 0] = np.divide(total, count, out=np.full(len(prompts), np.nan), where=count > 0)
    return result


def diversity(frame: pd.DataFrame, samples: int = SAMPLES, seed: int = 0, level: float = 0.95) -> pd.DataFrame:
    """Difference in looks between the seeds of one prompt, per blend.

    The root mean square pixel difference between two 8×8 thumbnails, in [0, 1], averaged over the pairs of a prompt's
    seeds and then over prompts. A blend that collapses onto one picture per prompt has a small one.

    Returns:
        One row per blend: ``blend``, ``variant``, ``diversity``, ``diversity_lo``, ``diversity_hi``; NaN with one seed
        per prompt or without thumbnails. With one prompt alone there is a value but no interval.
    """
    table = summary(frame, samples, seed, level)
    return table[["blend", "variant", "diversity", "diversity_lo", "diversity_hi"]]


# ── tables of numbers ────────────────────────────────────────────────────────────────────────────────────────────────


def summary(
    frame: pd.DataFrame | Estimates, samples: int = SAMPLES, seed: int = 0, level: float = 0.95
) -> pd.DataFrame:
    """One row per blend with every quantity and its interval.

    Columns: the blend's settings and ``variant``; each quantity of :class:`Estimates` with its interval's ends ``_lo``
    and ``_hi``; ``share_of_oracle`` (see :func:`oracle_shares`); ``seconds`` (median over images) and ``denoiser_rows``
    per image; ``images``; ``missing/<name>``, images without that reward, which its mean leaves out. A weighted reward
    or a gain leaves out an image when either of its parts is missing. ``attrs["held_out_rewards"]`` names the rewards
    that no blend weighs.

    Args:
        frame: one row per image, or estimates made already (the other arguments are then unused).
        samples, seed, level: see :func:`estimate`.
    """
    estimates = frame if isinstance(frame, Estimates) else estimate(frame, samples, seed, level)
    columns, own = {}, slice(estimates.evaluated)
    for index, name in enumerate(estimates.quantities):
        columns[name] = estimates.values[own, index]
        columns[f"{name}_lo"], columns[f"{name}_hi"] = estimates.low[own, index], estimates.high[own, index]
    shares = oracle_shares(estimates).drop(columns="blend")[own]
    table = pd.concat([estimates.blends, pd.DataFrame(columns), shares], axis=1)
    table.attrs["held_out_rewards"] = estimates.held_out
    return table


def oracle_shares(estimates: Estimates) -> pd.DataFrame:
    """Share of the gain of a model retrained for the preference (MORL) that a blend reaches without training.

    (r_w − r_w,base) / (r_w,MORL − r_w,base), against the ``morl`` blend of the same weights and the same λ. 1 is the
    oracle, 0 the base. NaN where there is no such oracle or no base, and where the interval of the oracle's own gain
    reaches down to 0: a share of nothing means nothing.

    Returns:
        One row per blend and baseline: ``blend``, ``share_of_oracle``, ``share_of_oracle_lo``, ``share_of_oracle_hi``.
    """
    blends, column = estimates.rows, estimates.quantities.index("weighted_gain")
    keys = preferences(blends)
    oracles: dict[object, int] = {}
    for row, (key, method) in enumerate(zip(keys, blends["method"], strict=True)):
        if method == "morl" and estimates.low[row, column] > 0:
            oracles.setdefault(key, row)
    rows = []
    for row, key in enumerate(keys):
        share = np.full(3, np.nan)
        if key in oracles:
            oracle = oracles[key]
            share[0] = estimates.values[row, column] / estimates.values[oracle, column]
            ratios = estimates.draws[:, row, column] / estimates.draws[:, oracle, column]
            share[1:] = interval(ratios, estimates.units, estimates.level)
        rows.append((blends["blend"].iloc[row], *share))
    names = ["blend", "share_of_oracle", "share_of_oracle_lo", "share_of_oracle_hi"]
    return pd.DataFrame(rows, columns=names)


def compare(
    frame: pd.DataFrame, blend_a: str, blend_b: str, samples: int = SAMPLES, seed: int = 0, level: float = 0.95
) -> pd.DataFrame:
    """Paired difference of two blends, ``blend_a`` less ``blend_b``, for every reward.

    Returns:
        Indexed by reward: ``difference``, ``lo``, ``hi``, ``images`` (pairs in which both have a score).

    Raises:
        ValueError: a label that is not in the table, or an unfinished evaluation.
    """
    frame = with_defaults(frame)
    labels = frame["blend"].unique().tolist()
    for blend in (blend_a, blend_b):
        if blend not in labels:
            raise ValueError(f"there is no blend {blend!r} in the table; it has {labels}")
    rewards = reward_names(frame)
    images = images_of(frame[frame["blend"].isin([blend_a, blend_b])], rewards)
    first, second = (images.values[images.blends.index(blend)] for blend in (blend_a, blend_b))
    means = unit_means((first - second)[None], images.starts)
    units = means.shape[1]
    low, high = interval(weighted_means(resample(units, samples, seed), means)[:, 0], units, level)
    value = weighted_means(np.full((1, units), 1 / units), means)[0, 0]
    pairs = np.isfinite(first - second).sum(axis=0)
    columns = {"difference": value, "lo": low, "hi": high, "images": pairs}
    return pd.DataFrame(columns, index=pd.Index(rewards, name="reward"))
