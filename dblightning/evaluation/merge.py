"""Put the score tables of several evaluations together where they are comparable."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dblightning.evaluation.record import differences
from dblightning.evaluation.scores import REWARD, WEIGHT, read_scores, reward_names

#: parts of the record that decide an image's noise and sampler: what all tables must share
SHARED = ("base", "num_inference_steps", "eta", "guidance_scale", "negative_prompt", "run_seed", "rewards")
#: parts that tables of earlier versions lack; compared where both have them
LATER = ("made_with",)


def read_all(paths: Sequence[str | Path]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read score tables and put them together.

    A blend that several hold, such as the base, is taken from the first; its scores must agree. The record is the
    first file's, its adapters joined and, for more than one file, ``commands`` naming each one's command.

    Args:
        paths: score tables.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no file, not a score table, or tables made with other prompts, seeds, rewards, adapters or base
            settings.
    """
    if not paths:
        raise ValueError("name at least one score table")
    parts = [(str(path), *read_scores(path)) for path in paths]
    first_path, frame, record = parts[0]
    record = dict(record)
    for path, other, other_record in parts[1:]:
        pair = f"{first_path} and {path} cannot be merged"
        check_settings(record, other_record, pair)
        _check_rows(frame, other, pair)
        repeated = sorted(set(frame["blend"]) & set(other["blend"]))
        other = other[~other["blend"].isin(repeated)]
        frame = pd.concat([frame, other.assign(order=other["order"] + frame["order"].max() + 1)], ignore_index=True)
        record["adapters"] = {**(other_record.get("adapters") or {}), **(record.get("adapters") or {})}
    if len(parts) > 1:
        record["commands"] = {path: each.get("command", "") for path, _, each in parts}
        record.pop("command", None)
    columns = [name for name in frame if not str(name).startswith(REWARD)]
    return frame[[*columns, *(REWARD + name for name in reward_names(frame))]], record


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record.get(name) for name in SHARED + LATER}


def _weights(facts: Any) -> Any:
    """Identity of an adapter beside its name: the hash of the weights, or else all that is known but the path."""
    if not isinstance(facts, dict):
        return facts
    return facts.get("sha256") or {key: value for key, value in facts.items() if key != "path"}


def check_settings(record: dict[str, Any], other: dict[str, Any], pair: str) -> None:
    """Refuse the tables of two records that differ in base settings, rewards or an adapter's weights.

    Args:
        record: of one table.
        other: of the other.
        pair: beginning of the message: which tables, and what cannot be done with them.

    Raises:
        ValueError: what differs.
    """
    first, second = _settings(record), _settings(other)
    for name in SHARED + LATER:
        if name in LATER and (record.get(name) is None or other.get(name) is None):
            continue
        for path, one, two in differences({name: first[name]}, {name: second[name]}):
            raise ValueError(f"{pair}: {path} is {one!r} in one and {two!r} in the other")
    adapters, others = record.get("adapters") or {}, other.get("adapters") or {}
    for name in sorted(set(adapters) & set(others)):
        if _weights(adapters[name]) != _weights(others[name]):
            raise ValueError(f"{pair}: adapter {name!r} is not the same; give one of them another name")


def _check_rows(frame: pd.DataFrame, other: pd.DataFrame, pair: str) -> None:
    if set(reward_names(frame)) != set(reward_names(other)):
        raise ValueError(f"{pair}: one measures {reward_names(frame)}, the other {reward_names(other)}")
    keys = ["prompt_id", "seed"]
    texts = frame[["prompt_id", "prompt"]].drop_duplicates()
    both = texts.merge(other[["prompt_id", "prompt"]].drop_duplicates(), on="prompt_id", suffixes=("", "_other"))
    for edited in both[both["prompt"] != both["prompt_other"]].itertuples():
        raise ValueError(
            f"{pair}: prompt {edited.prompt_id} is {edited.prompt!r} in one and {edited.prompt_other!r} in the other"
        )
    prompts, others = ({tuple(row) for row in each[[*keys, "prompt"]].to_numpy()} for each in (frame, other))
    if prompts != others:
        count = len(prompts ^ others)
        raise ValueError(f"{pair}: {count} images are in one of them only; use the same prompts and seeds")
    columns = [REWARD + name for name in reward_names(frame)]
    for blend in sorted(set(frame["blend"]) & set(other["blend"])):
        first, second = (each[each["blend"] == blend].sort_values(keys)[columns].to_numpy() for each in (frame, other))
        _check_blend(blend, frame, other, pair)
        # one part in a thousand: other batch sizes and devices round differently
        if first.shape != second.shape or not np.allclose(first, second, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ValueError(f"{pair}: blend {blend!r} has other scores in each, so models or rewards are not the same")


def _check_blend(blend: str, frame: pd.DataFrame, other: pd.DataFrame, pair: str) -> None:
    """Refuse one label for two blends, such as an oracle of each of two adapters."""
    names = sorted({name for each in (frame, other) for name in map(str, each) if name.startswith(WEIGHT)})
    defaults: dict[str, Any] = {"adapter": None} | dict.fromkeys(names, 0.0)
    first, second = (each[each["blend"] == blend].iloc[0] for each in (frame, other))
    for name in ("method", "kl_scale", "ls_schedule", "adapter", "options", *names):
        one, two = (each.get(name, defaults.get(name)) for each in (first, second))
        one, two = (defaults.get(name) if pd.isna(each) else _plain(each) for each in (one, two))
        if one != two:
            raise ValueError(f"{pair}: blend {blend!r} has {name} {one!r} in one and {two!r} in the other")


def _plain(value: Any) -> Any:
    """A cell's value as Python prints it, without numpy's type."""
    return value.item() if isinstance(value, np.generic) else value
