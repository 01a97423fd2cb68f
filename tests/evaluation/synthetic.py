"""Score tables made by hand, with known means."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

Rewards = Mapping[str, np.ndarray | float]


def blend(
    method: str, weights: Mapping[str, float] | None = None, label: str | None = None, **settings: Any
) -> dict[str, Any]:
    """Settings of one blend, as the score table has them."""
    weights = dict(weights or {})
    options = settings.pop("options", {})
    parts = [method, *(f"{key}-{value:g}" for key, value in weights.items()), *map(str, settings.values())]
    row = {"blend": label or "_".join(parts), "method": method, "kl_scale": 1.0, "ls_schedule": "iid", "adapter": None}
    return row | settings | {"options": json.dumps(options)} | {f"weight/{key}": v for key, v in weights.items()}


def score_table(
    blends: Sequence[tuple[dict[str, Any], Rewards]],
    prompts: int,
    seeds: int = 1,
    names: Sequence[str] = (),
    thumbnail: Callable[[str, int, int], np.ndarray] | None = None,
) -> pd.DataFrame:
    """One row per image.

    Args:
        blends: settings, and each reward's values: a number, or an array (prompts, seeds).
        prompts, seeds: how many.
        names: order of the weight columns; the others follow.
        thumbnail: blend label, prompt, seed → uint8 (8, 8, 3).
    """
    rows = []
    for order, (settings, rewards) in enumerate(blends):
        values = {name: np.broadcast_to(np.asarray(value, float), (prompts, seeds)) for name, value in rewards.items()}
        for prompt in range(prompts):
            for seed in range(seeds):
                row = {"order": order, **settings, "prompt_id": prompt, "prompt": f"prompt <{prompt}> & more"}
                row |= {"seed": seed, "seconds": 1.0 + order, "denoiser_rows": 10.0 * (1 + order)}
                row |= {f"reward/{name}": value[prompt, seed] for name, value in values.items()}
                if thumbnail is not None:
                    row["thumbnail"] = thumbnail(settings["blend"], prompt, seed).tobytes()
                rows.append(row)
    frame = pd.DataFrame(rows)
    weights = [column for column in frame if column.startswith("weight/")]
    first = [f"weight/{name}" for name in names]
    others = [column for column in frame if column not in weights]
    return frame[[*others, *first, *(column for column in weights if column not in first)]]


def preference(w: float, names: Sequence[str] = ("alignment", "aesthetic")) -> dict[str, float]:
    """w for the first name, 1 − w for the second."""
    return {names[0]: w, names[1]: round(1 - w, 6)}


def evaluation(prompts: int = 12, seeds: int = 2, noise: float = 0.1, seed: int = 0) -> pd.DataFrame:
    """A small evaluation with every kind of method, two preference rewards and one held out.

    Prompt effects are shared by all blends; means follow a concave front for the adapters' methods.
    """
    rng = np.random.default_rng(seed)
    effects = {name: rng.normal(size=(prompts, 1)) for name in ("alignment", "aesthetic", "held")}

    def rewards(alignment: float, aesthetic: float, held: float) -> Rewards:
        means = {"alignment": alignment, "aesthetic": aesthetic, "held": held}
        return {name: means[name] + effects[name] + noise * rng.normal(size=(prompts, seeds)) for name in means}

    blends = [(blend("base"), rewards(0.0, 0.0, 0.0))]
    blends += [(blend("single", {name: 1.0}), rewards(*ends, -0.1)) for name, ends in
               {"alignment": (1.0, -0.2), "aesthetic": (-0.2, 1.0)}.items()]  # fmt: skip
    scales = {"db-mpa": 0.9, "db-mpa-ls": 0.85, "rewarded-soup-factors": 0.4, "code": 0.5, "rgg": 0.3, "morl": 1.0}
    for method, scale in scales.items():
        extra = {"options": {"particles": 4}} if method == "code" else {}
        for w in (0.2, 0.5, 0.8):
            extra |= {"adapter": f"morl_{w}"} if method == "morl" else {}
            point = scale * np.sqrt(w), scale * np.sqrt(1 - w), -0.2
            blends.append((blend(method, preference(w), f"{method}_{w}", **extra), rewards(*point)))
    blends.append((blend("db-mpa-ls", preference(0.5), ls_schedule="systematic"), rewards(0.6, 0.6, -0.2)))
    for scale in (0.5, 2.0):
        blends.append((blend("db-kla", {"alignment": 1.0}, kl_scale=scale), rewards(0.7 * scale, -0.1, 0.0)))
    blends.append((blend("morl", {"alignment": 1.0}, adapter="strong", kl_scale=2.0), rewards(1.5, -0.1, 0.0)))

    def thumbnail(label: str, prompt: int, image: int) -> np.ndarray:
        return np.random.default_rng([len(label), prompt, image]).integers(0, 256, (8, 8, 3)).astype(np.uint8)

    return score_table(blends, prompts, seeds, ("alignment", "aesthetic"), thumbnail)
