"""Each method at its best for a preference: chosen on validation prompts, reported on test prompts.

    python -m dblightning choose runs/val/scores.parquet runs/test/scores.parquet --preference a=0.5 b=0.5

A blend's weights need not be the preference: of DB-MPA's blends the one with the highest r(w) may be at other mixing
weights v ≠ w, as an adapter alone may be best at a strength λ ≠ 1. Here every method is given the same care: of all its
blends that both tables hold it takes the one that is best on the first table, and shows what that has on the second,
whose prompts had no part in the choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from dblightning.arguments import CommandParser, numbers_by_name
from dblightning.evaluation.analysis import KL, Estimates, estimate
from dblightning.evaluation.cells import EMPTY, cell, decimals, readable_labels
from dblightning.evaluation.comparisons import mixed
from dblightning.evaluation.equal_terms import has_kl
from dblightning.evaluation.fronts import REFERENCE_VARIANT
from dblightning.evaluation.merge import check_settings
from dblightning.evaluation.scores import (
    INTERPOLATING,
    blend_table,
    family,
    fronts,
    preference_sets,
    read_scores,
    weights_of,
    within,
)
from dblightning.evaluation.table_formats import Table, to_markdown

#: the adapters alone, at every λ that was run
SINGLE = "single adapter"
#: (value, lower end, upper end)
Value = tuple[float, float, float]


class Choice(NamedTuple):
    """A method's blend that is best for a preference on validation prompts, and what it has on test prompts."""

    method: str
    blend: str
    label: str  # the blend in words
    tried: int  # blends it was chosen among
    on_validation: float  # E[r(w)] − α·KL, the mean that decided
    value: Value  # E[r(w)] − α·KL on test prompts
    weighted: Value  # r(w) there
    less: Value  # `value` less the reference method's, paired
    share: Value  # gain in r(w) over that of the best retrained policy; NaN without one
    kl: float  # nats, NaN where it was not measured
    denoiser_rows: float  # per image


def choose(
    validation: pd.DataFrame,
    test: pd.DataFrame,
    preferences: Sequence[Mapping[str, float]],
    alpha: float = 0.0,
    level: float = 0.95,
) -> list[list[Choice]]:
    """The best blend of every method for each preference.

    A method's blends are those of one variant at any λ and any weights that mix the preference's rewards and no other;
    the adapters alone are one method, at any λ. Of retrained policies (``morl``) the best counts, whichever preference
    it was retrained for: it is the oracle of the shares.

    Args:
        validation: one row per image; decides.
        test: one row per image, of other prompts; reports.
        preferences: each reward → weight w, > 0, sum 1.
        alpha: reward per nat of path KL, ≥ 0; the choice is by E[r(w)] − α·KL.
        level: of the intervals.

    Returns:
        For each preference the reference (DB-MPA, or without it the first method that interpolates adapters), then
        the other methods in the order of the test table.

    Raises:
        ValueError: weights that are no preference, a reward or KL that was not measured, prompts that are in both
            tables, or no method whose blends are in both.
    """
    for preference in preferences:
        _check_preference(preference)
    _check_tables(validation, test, alpha)
    before, after = estimate(validation, samples=1), estimate(test, level=level)
    for estimates, which in ((before, "validation"), (after, "test")):
        if alpha > 0 and not has_kl(estimates):
            raise ValueError(f"alpha weighs the KL, which the {which} table lacks: evaluate with --model.kl true")
        missing = [name for each in preferences for name in each if name not in estimates.rewards]
        if missing:
            raise ValueError(f"reward {missing[0]!r} is not in the {which} table, which has {estimates.rewards}")
    return [_choose(before, after, preference, alpha) for preference in preferences]


def _choose(before: Estimates, after: Estimates, preference: Mapping[str, float], alpha: float) -> list[Choice]:
    chosen = {
        method: best
        for method, blends in _methods(before, after, preference).items()
        for best in [_best(before, blends, preference, alpha)]
        if best is not None
    }
    if not chosen:
        raise ValueError(
            f"no method has a blend of {' and '.join(preference)} in both tables: evaluate the same blends on both"
        )
    labels = readable_labels(after)
    kinds = {method: after.methods()[blend] for method, (blend, _, _) in chosen.items()}
    reference = _reference(kinds)
    of_reference = after.under(chosen[reference][0], preference, alpha)
    oracle = next((chosen[method][0] for method, kind in kinds.items() if kind == "morl"), None)
    choices = []
    for method in [reference, *(method for method in chosen if method != reference)]:
        blend, tried, on_validation = chosen[method]
        draws, weighted = after.under(blend, preference, alpha), after.under(blend, preference, 0.0)
        choices.append(
            Choice(
                method,
                blend,
                labels[blend],
                tried,
                on_validation,
                after.with_interval(draws),
                after.with_interval(weighted),
                after.with_interval(draws - of_reference),
                _share(after, weighted, oracle, preference),
                after.of(blend, KL)[0] if has_kl(after) else np.nan,
                float(after.rows["denoiser_rows"].iloc[after.row(blend)]),
            )
        )
    return choices


def _check_preference(preference: Mapping[str, float]) -> None:
    if not preference or min(preference.values()) <= 0 or abs(sum(preference.values()) - 1) > 1e-6:
        raise ValueError(f"a preference has weights above 0 whose sum is 1, got {dict(preference)}")


def _check_tables(validation: pd.DataFrame, test: pd.DataFrame, alpha: float) -> None:
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha must be >= 0 and finite, got {alpha}")
    both = (set(validation["prompt"]) & set(test["prompt"])) - {""}
    if both:
        raise ValueError(
            f"{len(both)} prompts are in both tables, {min(both)!r} for one: choose on other prompts than you report "
            "on (--data.eval_split val makes a table of the validation prompts)"
        )


def _methods(before: Estimates, after: Estimates, preference: Mapping[str, float]) -> dict[str, list[str]]:
    """Method → its blends that both tables hold, in the order of the second."""
    rewards, known = list(preference), set(before.blends["blend"])
    blends = after.blends[within(after.blends, rewards)]
    found: dict[str, list[str]] = {}
    for row, weights in zip(blends.to_dict("records"), weights_of(blends, rewards), strict=True):
        alone = row["method"] in ("single", "db-kla") and pd.isna(row["adapter"]) and max(weights) == 1
        if (alone or min(weights) > 0) and row["blend"] in known:
            method = SINGLE if alone else family(str(row["variant"]))
            found.setdefault(method, []).append(str(row["blend"]))
    return found


def _best(
    before: Estimates, blends: Sequence[str], preference: Mapping[str, float], alpha: float
) -> tuple[str, int, float] | None:
    """The best blend, how many have a value, and its value; None where none has one."""
    values = {blend: float(before.under(blend, preference, alpha)[0]) for blend in blends}
    values = {blend: value for blend, value in values.items() if np.isfinite(value)}
    if not values:
        return None
    best = max(values, key=lambda blend: values[blend])
    return best, len(values), values[best]


def _reference(kinds: Mapping[str, str]) -> str:
    """DB-MPA, else the first method that interpolates adapters, else the first; ``kinds``: method → its blend's."""
    blending = [name for name, kind in kinds.items() if kind in INTERPOLATING - {"morl"}]
    return REFERENCE_VARIANT if REFERENCE_VARIANT in blending else next(iter([*blending, *kinds]))


def _share(estimates: Estimates, weighted: np.ndarray, oracle: str | None, preference: Mapping[str, float]) -> Value:
    """Share of the oracle's gain in r(w); NaN without oracle or base, or where the oracle's own gain may be 0."""
    bases = estimates.blends.loc[estimates.blends["method"] == "base", "blend"]
    if oracle is None or bases.empty:
        return (np.nan, np.nan, np.nan)
    base = estimates.under(str(bases.iloc[0]), preference, 0.0)
    gain = estimates.under(oracle, preference, 0.0) - base
    if estimates.with_interval(gain)[1] <= 0:
        return (np.nan, np.nan, np.nan)
    return estimates.with_interval((weighted - base) / gain)


def choices_table(choices: Sequence[Choice], preference: Mapping[str, float], alpha: float) -> Table:
    """The choices for one preference as a row per method."""
    value = f"E[r(w)] − {alpha:g}·KL" if alpha else "r(w)"
    digits = decimals([(each.value[2] - each.value[1]) / 2 for each in choices])
    apart = decimals([(each.less[2] - each.less[1]) / 2 for each in choices])
    rows = []
    for each in choices:
        cells = {
            "chosen": each.label,
            "of": str(each.tried),
            "validation": f"{round(each.on_validation, digits) + 0.0:.{digits}f}",
            f"test {value}": cell(each.value, digits),
            f"less {choices[0].method}'s": "0" if each is choices[0] else cell(each.less, apart, sign=True),
        }
        if alpha:
            cells["test r(w)"] = cell(each.weighted, digits)
        cells["share of MORL's gain"] = cell(each.share)
        cells["KL, nats"] = EMPTY if np.isnan(each.kl) else f"{each.kl:.0f}"
        cells["rows / image"] = EMPTY if np.isnan(each.denoiser_rows) else f"{each.denoiser_rows:g}"
        rows.append(cells)
    frame = pd.DataFrame(rows, index=pd.Index([each.method for each in choices], name="method"), dtype=object)
    frame = frame.loc[:, [name for name in frame if (frame[name] != EMPTY).any()]]
    weights = ", ".join(f"{name} {weight:g}" for name, weight in preference.items())
    caption = f"{weights}: each method's best by {value} on validation prompts, and what it has on test prompts"
    return Table("chosen", caption, frame)


def choose_main(arguments: Sequence[str] | None = None) -> None:
    """The command ``python -m dblightning choose``; None takes the process's arguments."""
    parser = CommandParser(
        prog="dblightning choose", description="Each method at its best for a preference, on prompts not chosen on."
    )
    parser.add_argument("validation", type=Path, help="scores.parquet whose prompts decide")
    parser.add_argument("test", type=Path, help="scores.parquet whose prompts report: the same blends, other prompts")
    parser.add_argument(
        "--preference", nargs="+", action="append", default=[], metavar="NAME=W",
        help="weights of the rewards, sum 1; may be repeated [all that a blend of the test table has]",
    )  # fmt: skip
    parser.add_argument("--alpha", type=float, default=0.0, help="choose by E[r(w)] − α·KL, reward per nat [0]")
    parser.add_argument("--level", type=float, default=0.95, help="level of the intervals [0.95]")
    options = parser.parse_args(arguments)
    if not 0 < options.level < 1:
        parser.error("--level must be between 0 and 1")
    try:
        preferences = [numbers_by_name(words) for words in options.preference]
        validation, record = read_scores(options.validation)
        test, other = read_scores(options.test)
        check_settings(record, other, f"{options.validation} and {options.test} are not comparable")
        preferences = preferences or _preferences(test)
        found = choose(validation, test, preferences, options.alpha, options.level)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    tables = [choices_table(*each, options.alpha) for each in zip(found, preferences, strict=True)]
    print("\n".join(map(to_markdown, tables)), end="")


def _preferences(frame: pd.DataFrame) -> list[dict[str, float]]:
    """Every preference that some blend mixes all rewards of a set for."""
    found: list[dict[str, float]] = []
    for rewards in preference_sets(frame):
        points = {weights for each in fronts(blend_table(frame), rewards).values() for weights in mixed(each)}
        found += [dict(zip(rewards, weights, strict=True)) for weights in sorted(points)]
    return found
