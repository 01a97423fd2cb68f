"""What the pages state of the miniature, as the rows in docs/results give it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from dblightning.evaluation.analysis import KL, OBJECTIVE, Estimates
from dblightning.evaluation.cells import cell, preference_points
from dblightning.evaluation.choosing import choose
from dblightning.evaluation.comparisons import paired_table
from dblightning.evaluation.objective_value import paired_objective_table
from dblightning.evaluation.paper_tables import hypervolume_table, kl_points, kl_table, reward_table, share_table
from dblightning.evaluation.scores import blend_table, read_scores

ROOT = Path(__file__).parents[2]
#: reward per nat, at which the two adapters of one α are calibrated (test_published_figures.py)
ALPHA = 0.0015

#: heading of a page → column of the tables
COLUMNS = {
    "better single adapter": "best single adapter",
    "random adapter": "random adapter per image",
    "DB-MPA": "DB-MPA",
    "LS, rotation": "DB-MPA-LS (rotation)",
    "exact soup": "Rewarded Soup (exact)",
    "factor soup": "Rewarded Soup (factors)",
    "best of 2": "best of N",
    "CoDe": "CoDe",
    "RGG": "RGG",
    "MORL": "MORL (oracle)",
}


def published(name: str) -> pd.DataFrame:
    """The score table ``miniature_<name>.parquet`` of docs/results; a test is skipped where the folder is not there."""
    file = ROOT / "docs" / "results" / f"miniature_{name}.parquet"
    if not file.is_file():
        pytest.skip("docs/results is not part of this copy")
    return read_scores(file)[0]


def volumes(estimates: Estimates, names: list[str]) -> dict[str, str]:
    """Column → hypervolume less DB-MPA's, and DB-MPA's own."""
    cells = hypervolume_table(estimates, names).cells
    found = dict(cells["difference to DB-MPA"]) | {"DB-MPA": cells.loc["DB-MPA", "hypervolume"]}
    return found | {"best single adapter": found["single adapter"]}


def preference_rows(estimates: Estimates, names: list[str]) -> list[list[str]]:
    """Headings and rows: r₁ / r₂ / r(w) at three preferences, then what the others have less DB-MPA, and the oracle."""
    rewards = reward_table(estimates, names)
    found = list(rewards.cells.columns)
    shown = {heading: name for heading, name in COLUMNS.items() if (name, "r(w)") in found}
    rows = [["w", *shown]]
    for w in ("0.2", "0.5", "0.8"):
        place = rewards.cells.index.tolist().index(f"w = {w}")

        def cell(name: str, heading: str, place: int = place) -> str:
            at = found.index((name, heading))
            text = str(rewards.cells.iloc[place, at])
            text = text if heading == "r(w)" else text.split(" ± ")[0]
            return f"**{text}**" if (place, at) in rewards.bold else text

        texts = [[cell(name, heading) for heading in (*names, "r(w)")] for name in shown.values()]
        rows.append([w, *("–" if "–" in each else " / ".join(each) for each in texts)])
    differences = {"r(w)": paired_table(estimates, names).cells}
    if OBJECTIVE in estimates.quantities:
        differences["E[r(w)] − α·KL"] = paired_objective_table(estimates, names).cells
    for quantity, cells in differences.items():
        for w in ("0.2", "0.5", "0.8"):
            label = f"{quantity} less DB-MPA's, {w}"
            rows.append([label, *("0" if name == "DB-MPA" else _at(cells, w, name) for name in shown.values())])
    if "MORL" in shown:
        share = share_table(estimates, names).cells
        for w in ("0.2", "0.5", "0.8"):
            rows.append([f"share of MORL's gain, {w}", *(_at(share, w, name) for name in shown.values())])
    volume = volumes(estimates, names)
    label = "hypervolume above the base, less DB-MPA's"
    rows.append([label, *(str(volume.get(name, "–")) for name in shown.values())])
    return minus(rows)


def strength_rows(estimates: Estimates) -> list[list[str]]:
    """Headings and rows: aesthetic reward by strength, DB-KLA against retraining (Fig. 6b), and the path KL of both."""
    rows, points = [], kl_points(estimates)
    for label, cells in kl_table(estimates).cells.iterrows():
        strength = float(str(label).split("λ = ")[1])
        ours, retrained = (points["aesthetic", kind].get(strength) for kind in ("DB-KLA", "MORL (oracle)"))
        kl = [f"{estimates.of(blend, KL)[0]:.0f}" if blend else "–" for blend in (ours, retrained)]
        rows.append([f"{strength:g}", *map(str, cells), *kl])
    return minus([["λ", "DB-KLA", "retrained", "difference", "KL, nats: DB-KLA", "KL: retrained"], *rows])


def _at(cells: pd.DataFrame, w: str, name: str) -> str:
    here = f"w = {w}" in cells.index and name in cells.columns
    return str(cells.loc[f"w = {w}", name]) if here else "–"


def minus(rows: list[list[str]]) -> list[list[str]]:
    """The rows with minus signs before numbers for hyphens."""
    return [[re.sub(r"(?<![\d.])-(?=\d)", "−", text) for text in row] for row in rows]


def as_markdown(rows: list[list[str]]) -> str:
    """A pipe table of the first row as headings."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def chosen_rows(seeds: Sequence[tuple[pd.DataFrame, pd.DataFrame]], alpha: float = 0.0) -> list[list[str]]:
    """Headings and rows: each method at its best for three preferences, chosen on validation prompts; a value per seed.

    Args:
        seeds: validation and test table of each training seed.
        alpha: of the choice.
    """
    rows = []
    preferences = [{"alignment": w, "aesthetic": round(1 - w, 1)} for w in (0.2, 0.5, 0.8)]
    found = [choose(*tables, preferences, alpha) for tables in seeds]
    blends = [blend_table(test).set_index("blend") for _, test in seeds]
    for place, preference in enumerate(preferences):
        for method in dict.fromkeys(each.method for choices in found for each in choices[place]):
            own = [next((each for each in choices[place] if each.method == method), None) for choices in found]
            if method.startswith("MORL"):
                chosen = ["retrained"]
            else:
                chosen = [_point(blends[seed].loc[each.blend]) for seed, each in enumerate(own) if each is not None]
            less = ["–" if each is None else _difference(each.less) for each in own]
            rows.append(
                [
                    f"{preference['alignment']:g}",
                    method,
                    " / ".join(chosen),
                    " / ".join("–" if each is None else f"{each.weighted[0]:.2f}" for each in own),
                    "0" if own[0] is not None and own[0] is found[0][place][0] else " / ".join(less),
                    " / ".join("–" if each is None else f"{each.kl:.0f}" for each in own),
                ]
            )
    value = "E[r(w)] − α·KL" if alpha else "r(w)"
    return minus([["w", "method", "chosen", "r(w)", f"{value} less DB-MPA's", "KL, nats"], *rows])


def _point(blend: pd.Series) -> str:
    """A blend's mixing weight of the first reward, or an adapter and its strength."""
    weights = {name: blend[f"weight/{name}"] for name in ("alignment", "aesthetic")}
    if max(weights.values()) < 1:
        return f"{weights['alignment']:g}"
    return f"{max(weights, key=lambda name: weights[name])} λ {blend['kl_scale']:g}"


def _difference(value: tuple[float, float, float]) -> str:
    text = f"{value[0] + 0.0:+.2f}"
    return text if not value[1] <= 0 <= value[2] else f"{text} n.s."


#: weights in the order of alignment, aesthetic, vividness, compressibility → how the page calls them
SEVERAL = {
    (0.5, 0.5): "½, ½, 0",
    (0.333333, 0.333333, 0.333334): "⅓ each",
    (0.6, 0.2, 0.2): "0.6, 0.2, 0.2",
    (0.2, 0.6, 0.2): "0.2, 0.6, 0.2",
    (0.2, 0.2, 0.6): "0.2, 0.2, 0.6",
    (0.25, 0.25, 0.25, 0.25): "¼ each of four",
}


def several_rows(estimates: Estimates) -> list[list[str]]:
    """Headings and rows: DB-MPA's gains in two to four rewards, and the others' r(w) less its, by preference."""
    others = ["better single adapter", "random adapter", "LS, rotation", "exact soup", "factor soup"]
    rows = [["weights", "DB-MPA", "its gain in r(w)", *others]]
    for weights, name in SEVERAL.items():
        rewards = ["alignment", "aesthetic", "vividness", "compressibility"][: len(weights)]
        points = preference_points(estimates, rewards)
        own = points["DB-MPA"][weights]
        gains = [f"{estimates.of(own, f'gain/{reward}')[0] + 0.0:+.2f}" for reward in rewards]
        cells = []
        for column in others:
            blend = points.get(COLUMNS[column], {}).get(weights)
            cells.append("–" if blend is None else cell(estimates.difference(blend, own, "weighted"), 2, sign=True))
        rows.append([name, " / ".join(gains), cell(estimates.of(own, "weighted_gain"), 2, sign=True), *cells])
    return minus(rows)
