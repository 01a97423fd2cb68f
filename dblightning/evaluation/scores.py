"""The score table, one row per image: its file, its checks, and what its blends are.

Columns: ``order``, ``blend``, ``method``, ``kl_scale``, ``ls_schedule``, ``adapter``, ``options`` (JSON),
``weight/<name>``, ``prompt_id``, ``prompt``, ``seed``, ``seconds``, ``denoiser_rows``, ``kl`` (path KL to the base,
nats; where it was measured), ``reward/<name>`` and ``thumbnail`` (bytes of an 8×8×3 uint8 image). What made the table,
the record, is JSON in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dblightning.whole_files import replacing

REWARD, WEIGHT = "reward/", "weight/"
RECORD_KEY = b"dblightning"
REQUIRED = ("order", "blend", "method", "prompt_id", "seed")
#: columns an evaluation may leave out, with what they then mean
DEFAULTS: dict[str, Any] = {
    "kl_scale": 1.0, "ls_schedule": "iid", "adapter": None, "options": "{}",
    "prompt": "", "seconds": np.nan, "denoiser_rows": np.nan, "thumbnail": None,
}  # fmt: skip
#: columns that earlier versions wrote under another name: the name then → the name now
FORMER_NAMES = {"unet_rows": "denoiser_rows"}
NAMES = {
    "base": "Base",
    "single": "single adapter",
    "db-mpa": "DB-MPA",
    "db-mpa-ls": "DB-MPA-LS",
    "db-kla": "DB-KLA",
    "rewarded-soup": "Rewarded Soup (exact)",
    "rewarded-soup-factors": "Rewarded Soup (factors)",
    "code": "CoDe",
    "rgg": "RGG",
    "best-of-n": "best of N",
    "morl": "MORL (oracle)",
}
#: methods that are the single adapter itself where one weight is 1
INTERPOLATING = frozenset({"db-mpa", "db-mpa-ls", "rewarded-soup", "rewarded-soup-factors", "morl"})
#: weights are compared after rounding: 0.7 + 0.2 + 0.1 is not 1 in floating point
WEIGHT_DECIMALS = 6


# ── the file ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_scores(path: str | Path, frame: pd.DataFrame, record: dict[str, Any]) -> None:
    """Write the table and its record; a reader never sees half a file.

    Args:
        path: the Parquet file; its folder is made.
        frame: one row per image.
        record: settings, versions, adapters and command; anything JSON can hold.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pandas(frame, preserve_index=False)
    meta = {**(table.schema.metadata or {}), RECORD_KEY: json.dumps(record).encode()}
    with replacing(path) as aside:
        pq.write_table(table.replace_schema_metadata(meta), aside, compression="zstd", compression_level=12)


def read_scores(path: str | Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The table of a file and its record (empty where the file holds none).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a Parquet file, a broken one, or columns that every score table has are missing; every message
            names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no score table {path}; an evaluation writes it as scores.parquet")
    try:
        table = pq.read_table(path)
        frame = table.to_pandas()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a Parquet file ({error}); give the scores.parquet of an evaluation") from error
    try:
        record = json.loads((table.schema.metadata or {}).get(RECORD_KEY, b"{}"))
        if not isinstance(record, dict):
            raise ValueError(f"it is {record!r}")
    except ValueError as error:
        raise ValueError(
            f"{path} has a record of its making that is not a JSON object ({error}); run its evaluation again: images "
            "in its rows folder are not made anew"
        ) from error
    try:
        return with_defaults(frame), record
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}; give the scores.parquet of an evaluation") from error


def with_defaults(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with every optional column, rewards and weights as floats, under the names of this version.

    Raises:
        ValueError: a required column or all rewards are missing, or there is no row.
    """
    missing = [name for name in REQUIRED if name not in frame]
    if missing or not reward_names(frame):
        what = ", ".join(missing) or f"{REWARD}<name>"
        raise ValueError(f"not a score table: column {what} is missing, it has {list(frame.columns)}")
    if frame.empty:
        raise ValueError("the score table has no rows: no image was evaluated yet")
    frame = frame.rename(columns={former: name for former, name in FORMER_NAMES.items() if name not in frame})
    frame = frame.assign(**{name: value for name, value in DEFAULTS.items() if name not in frame})
    frame["kl_scale"] = frame["kl_scale"].astype(float).fillna(1.0)
    frame["ls_schedule"] = frame["ls_schedule"].fillna("iid")
    frame["options"] = frame["options"].fillna("{}")
    numbers = {name: float for name in frame if str(name).startswith((REWARD, WEIGHT))}
    return frame.astype(numbers)


# ── what was measured ────────────────────────────────────────────────────────────────────────────────────────────────


def reward_names(frame: pd.DataFrame) -> list[str]:
    """Names of the measured rewards, in column order."""
    return [name.removeprefix(REWARD) for name in frame.columns if name.startswith(REWARD)]


def weight_names(frame: pd.DataFrame) -> list[str]:
    """Names that some blend may weigh, in column order; the first one's weight is the paper's w."""
    return [name.removeprefix(WEIGHT) for name in frame.columns if name.startswith(WEIGHT)]


def preference_rewards(frame: pd.DataFrame) -> list[str]:
    """Measured rewards that some blend weighs, in the order of the weight columns."""
    measured = set(reward_names(frame))
    return [name for name in weight_names(frame) if name in measured and (frame[WEIGHT + name] > 0).any()]


def held_out_rewards(frame: pd.DataFrame) -> list[str]:
    """Measured rewards that no blend weighs: nothing optimised them, so reward hacking shows in them."""
    weighed = preference_rewards(frame)
    return [name for name in reward_names(frame) if name not in weighed]


def blend_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per blend, in evaluation order: its settings, weights (0 where it has none) and ``variant``.

    Raises:
        ValueError: two different blends under one label.
    """
    weights = [WEIGHT + name for name in weight_names(frame)]
    settings = ["order", "blend", "method", "kl_scale", "ls_schedule", "adapter", "options", *weights]
    distinct = frame[settings].drop_duplicates()
    repeated = distinct.loc[distinct["blend"].duplicated(), "blend"]
    if len(repeated):
        raise ValueError(
            f"the label {repeated.iloc[0]!r} stands for blends with different settings; give each blend its own label"
        )
    blends = distinct.sort_values("order", kind="stable", ignore_index=True)
    blends[weights] = blends[weights].fillna(0.0).round(WEIGHT_DECIMALS)
    blends["variant"] = _variants(blends)
    return blends


def _variants(blends: pd.DataFrame) -> list[str]:
    """Readable name of what each blend is a point of: one line of a Pareto plot."""
    options = [json.loads(text or "{}") for text in blends["options"]]
    names = []
    for row, own in zip(blends.itertuples(), options, strict=True):
        peers = [other for method, other in zip(blends["method"], options, strict=True) if method == row.method]
        differ = [key for key in sorted(set().union(*peers)) if any(peer.get(key) != own.get(key) for peer in peers)]
        notes = [str(row.ls_schedule)] if row.method == "db-mpa-ls" and row.ls_schedule != "iid" else []
        notes += [str(row.adapter)] if row.method in ("single", "db-kla") and isinstance(row.adapter, str) else []
        notes += [f"{key}={own[key]}" for key in differ if key in own]
        name = NAMES.get(str(row.method), str(row.method)) + (f" ({', '.join(notes)})" if notes else "")
        scaled = row.method != "base" and (row.kl_scale != 1 or row.method == "db-kla")
        names.append(name + (f" λ={row.kl_scale:g}" if scaled else ""))
    return names


def family(variant: str) -> str:
    """A variant's name without its λ: what varies in λ alone is one method.

    >>> family("DB-MPA λ=1.5")
    'DB-MPA'
    """
    return variant.partition(" λ=")[0]


# ── preferences ──────────────────────────────────────────────────────────────────────────────────────────────────────


def weights_of(blends: pd.DataFrame, rewards: Sequence[str]) -> np.ndarray:
    """Weights of each blend on ``rewards``, (blends, m); 0 where the table has no such weight."""
    zero = np.zeros(len(blends))
    columns = [blends[WEIGHT + name].to_numpy() if WEIGHT + name in blends else zero for name in rewards]
    return np.array(columns, dtype=float).reshape(len(rewards), len(blends)).T


def preferences(blends: pd.DataFrame) -> list[tuple[tuple[float, ...], float]]:
    """The preference each blend serves: its weights on all weighed rewards, and its strength λ."""
    weights = weights_of(blends, weight_names(blends))
    return [(tuple(row), float(scale)) for row, scale in zip(weights, blends["kl_scale"], strict=True)]


def within(blends: pd.DataFrame, rewards: Sequence[str]) -> np.ndarray:
    """Which blends weigh nothing but ``rewards``, bool (blends,); the base, which weighs nothing, is one."""
    others = [name for name in weight_names(blends) if name not in rewards]
    return np.asarray((weights_of(blends, others) == 0).all(axis=1))


def preference_sets(frame: pd.DataFrame) -> list[list[str]]:
    """The sets of two or more measured rewards that some blend weighs together, smaller sets first.

    Where nothing is weighed together (adapters on their own), all weighed rewards are the one set.
    """
    blends, names = blend_table(frame), preference_rewards(frame)
    measured = within(blends, names)
    supports = {tuple(row) for row in (weights_of(blends, names) > 0)[measured] if sum(row) > 1} if names else set()
    sets = [[name for name, used in zip(names, row, strict=True) if used] for row in supports]
    if not sets and len(names) > 1:
        sets = [names]
    return sorted(sets, key=lambda each: (len(each), [names.index(name) for name in each]))


def front(blends: pd.DataFrame, variant: str, rewards: Sequence[str]) -> dict[tuple[float, ...], str]:
    """The points of a variant in the space of some rewards: weights (in the order of ``rewards``) → blend label.

    A method that interpolates adapters equals the single adapter where one weight is 1, so the ``single`` blends
    complete its ends where they were evaluated and it was not. Blends that weigh another reward are left out.

    Args:
        blends: of :func:`blend_table`.
        variant: one of its ``variant``.
        rewards: names.
    """
    inside = blends[within(blends, rewards)]
    own = inside[inside["variant"] == variant]
    points = _by_weights(own, rewards)
    if len(own) and own["method"].iloc[0] in INTERPOLATING and (own["kl_scale"] == 1).all():
        weighed = weights_of(own, rewards).max(axis=0) > 0
        # an adapter under another name than its reward's is not the one these methods interpolate
        ends = (inside["method"] == "single") & (inside["kl_scale"] == 1) & inside["adapter"].isna()
        singles = _by_weights(inside[ends], rewards)
        for key, blend in singles.items():
            if all(used for weight, used in zip(key, weighed, strict=True) if weight):
                points.setdefault(key, blend)
    return dict(sorted(points.items()))


def fronts(blends: pd.DataFrame, rewards: Sequence[str]) -> dict[str, dict[tuple[float, ...], str]]:
    """Every variant that has a front over some rewards: variant → weights → blend label, in evaluation order.

    Left out is what varies one adapter's strength alone: DB-KLA, and other methods with λ ≠ 1 that blend nothing.
    """
    found = {}
    for variant, part in blends.groupby("variant", sort=False):
        points = front(blends, str(variant), rewards)
        mixed = any(sum(weight > 0 for weight in weights) > 1 for weights in points)
        strength = (part["method"] == "db-kla").all() or ((part["kl_scale"] != 1).all() and not mixed)
        if points and not strength:
            found[str(variant)] = points
    return found


def _by_weights(blends: pd.DataFrame, rewards: Sequence[str]) -> dict[tuple[float, ...], str]:
    points: dict[tuple[float, ...], str] = {}
    for weights, blend in zip(weights_of(blends, rewards), blends["blend"], strict=True):
        points.setdefault(tuple(float(weight) for weight in weights), str(blend))
    return points


def weights_label(weights: Sequence[float]) -> str:
    """A preference in short: "0.2" is w of two rewards (the first's weight), "0.5 / 0.3 / 0.2" is all of three."""
    return f"{weights[0]:.3g}" if len(weights) == 2 else " / ".join(f"{weight:.3g}" for weight in weights)
