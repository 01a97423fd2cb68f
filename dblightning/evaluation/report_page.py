"""The report's HTML page, which opens offline; needs the extra ``report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from plotly.offline import get_plotlyjs

from dblightning.evaluation.analysis import Estimates
from dblightning.evaluation.cells import readable_labels
from dblightning.evaluation.comparisons import compare_all
from dblightning.evaluation.equal_terms import has_kl, whole_verdict
from dblightning.evaluation.report_parts import data_uri, image_grids, pareto_plots, record_lines
from dblightning.evaluation.scores import preference_rewards
from dblightning.evaluation.table_formats import Table, to_html


def page(
    frame: pd.DataFrame, record: dict[str, Any], estimates: Estimates, sets: Sequence[Sequence[str]],
    tables: Sequence[Table], out: Path, curves: Sequence[str], folders: Sequence[Path],
) -> str:  # fmt: skip
    """The page as HTML, everything inside: plotly's code, pictures, images.

    Args:
        frame: one row per image.
        record: of the score table.
        estimates: of its blends.
        sets: rewards that are weighed together.
        tables: the report's.
        out: folder with the figures' SVG files.
        curves: names of those that are not fronts.
        folders: where to look for ``<blend label>/<prompt_id>-<seed>.png``.
    """
    names = preference_rewards(frame)
    planes = [(names, False, "pareto")] if len(names) > 1 else []
    planes += [(names, True, "pareto_gains")] if planes and (estimates.blends["method"] == "base").any() else []
    fronts = [
        {
            "plots": pareto_plots(estimates, rewards, gains),
            "picture": _picture(out / f"{file}.svg"),
            "caption": f"{'Gains over the base, paired' if gains else 'Mean rewards'}: {', '.join(rewards)}.",
        }
        for rewards, gains, file in planes
    ]
    prompts, seeds = frame["prompt_id"].nunique(), frame["seed"].nunique()
    shown = sorted(tables, key=lambda table: _first(table.name))
    commands = record.get("commands") or {"": record.get("command", "")}
    facts = [(name, value) for name, value in record_lines(record) if name.split(".")[0] not in ("command", "commands")]
    loader = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return loader.get_template("report.html.j2").render(
        title=f"Evaluation: {', '.join(estimates.rewards)}",
        counts=f"{len(estimates.blends)} blends on {prompts} prompts × {seeds} seeds, {len(frame)} images.",
        plotly_code=get_plotlyjs() if fronts else "",
        commands=[command for command in commands.values() if command],
        facts=facts,
        interval_note=_interval_note(estimates, prompts),
        notes=_missing_notes(estimates) + _kl_notes(estimates, record),
        verdicts=[whole_verdict(estimates, rewards) for rewards in sets],
        chance_note=_chance_note(estimates, sets),
        absent=_absent(frame, estimates, tables),
        fronts=fronts,
        tables=[to_html(table) for table in shown],
        held_out=estimates.held_out,
        curves=[(_picture(out / f"{name}.svg"), _CAPTIONS[name.split("_")[2]]) for name in curves],
        grids=image_grids(frame, estimates, sets, folders),
    )


#: tables that answer "which method?", in the order of the page; the others follow
_LEADING = ("paired", "objective", "equal_kl", "best_by_cost", "win_rates", "weighted", "adapters_alone", "categories")


def _first(name: str) -> int:
    return next((rank for rank, each in enumerate(_LEADING) if name.startswith(each)), len(_LEADING))


#: by the third word of ``gain_by_…``
_CAPTIONS = {
    "weight": "Gain over the base by preference; bands and bars are intervals.",
    "cost": "Gain over the base in weighted reward against the seconds an image takes, by preference.",
    "kl": "Gain over the base in weighted reward against the path KL to it, by preference; lines begin at the base.",
    "strength": "Gain over the base by strength λ of one adapter; bands are intervals.",
}


def _picture(file: Path) -> str:
    return data_uri(file.read_bytes(), "image/svg+xml")


def _interval_note(estimates: Estimates, prompts: int) -> str:
    what = "prompts, a prompt's seeds together" if prompts > 1 else "the seeds, and speak about this one prompt only"
    return (
        f"Intervals are at the {estimates.level:.0%} level, from {len(estimates.draws)} bootstrap samples of {what}. "
        "Every blend has the same prompts, seeds and noise; gains and differences are paired."
    )


def _chance_note(estimates: Estimates, sets: Sequence[Sequence[str]]) -> str:
    count = sum(len(compare_all(estimates, rewards)) for rewards in sets)
    expected = count * (1 - estimates.level)
    return (
        "Numbers are differences of r(w), the reward weighed by w. A method wins or loses where the "
        f"{estimates.level:.0%} interval of the paired difference leaves out 0; of {count} comparisons between equals "
        f"about {expected:.1f} would. The best single adapter is chosen on these prompts."
    )


def _absent(frame: pd.DataFrame, estimates: Estimates, tables: Sequence[Table]) -> list[str]:
    """The parts that the page lacks, and what each needs."""
    names, methods = {table.name.split("_")[0] for table in tables}, set(estimates.blends["method"])
    lines = {
        "diversity": "Diversity: the score table has no thumbnails (or one seed per prompt), from which it is derived.",
        "categories": "Results by category: the score table has no category of the prompts.",
    }
    found = [text for name, text in lines.items() if name not in names]
    found += ["Gains: no base was evaluated; add {method: base}."] if "base" not in methods else []
    if not has_kl(estimates):
        found.append("KL to the base, and methods at equal KL: it was not measured; set --model.kl true.")
    if "morl" not in methods:
        found.append("Share of the oracle's gain: no retrained model (morl) was evaluated.")
    return found


def _kl_notes(estimates: Estimates, record: dict[str, Any]) -> list[str]:
    """One sentence for every reason why blends have no path KL."""
    labels, found = readable_labels(estimates), dict[str, list[str]]()
    for blend, reason in ((record.get("kl") or {}).get("none") or {}).items():
        found.setdefault(reason, []).append(labels.get(blend, blend))
    return [f"No path KL of {', '.join(blends)}: {reason}." for reason, blends in found.items()]


def _missing_notes(estimates: Estimates) -> list[str]:
    """One sentence for every blend with images that a reward could not score."""
    labels = readable_labels(estimates)
    return [
        f"{labels[blend]}: {int(count)} of {images} images have no score of {name}; its means leave them out."
        for name in estimates.rewards
        for blend, images, count in estimates.blends[["blend", "images", f"missing/{name}"]].itertuples(index=False)
        if count
    ]
