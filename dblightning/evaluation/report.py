"""The report of an evaluation: one HTML page that opens offline, figures and tables, from the score table alone.

python -m dblightning report runs/blend/scores.parquet
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from plotly.offline import get_plotlyjs
from tabulate import tabulate

from dblightning.arguments import CommandParser
from dblightning.evaluation import plots
from dblightning.evaluation.analysis import Estimates, estimate, summary
from dblightning.evaluation.cells import cell, readable_labels
from dblightning.evaluation.comparisons import category_column, category_table, compare_all
from dblightning.evaluation.equal_terms import has_kl, whole_verdict
from dblightning.evaluation.intervals import SAMPLES
from dblightning.evaluation.merge import read_all
from dblightning.evaluation.paper_tables import all_tables
from dblightning.evaluation.report_parts import data_uri, image_grids, pareto_plots, record_lines
from dblightning.evaluation.scores import preference_rewards, preference_sets
from dblightning.evaluation.table_formats import Table, frame_to_csv, to_csv, to_html, to_latex, to_markdown


def write_report(
    scores: str | Path | Sequence[str | Path],
    out: str | Path,
    images: str | Path | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    level: float = 0.95,
    show: bool = False,
    alpha: float | None = None,
) -> list[Path]:
    """Write ``report.html``, ``pareto.png`` and further figures, ``tables/`` and ``summary.csv``.

    Args:
        scores: a score table, or several that are merged (:func:`merge.read_all`).
        out: folder to write to; files of the same names are replaced.
        images: folder of ``<blend label>/<prompt_id>-<seed>.png``; None looks in ``images`` beside each score table.
        samples, seed, level: of the bootstrap; see :func:`analysis.estimate`.
        show: also print the summary and the verdict, from the same draws.
        alpha: α of eq. (4), reward per nat; adds E[r(w)] − α·KL to tables and verdict.

    Returns:
        What was written, ``report.html`` first.

    Raises:
        FileNotFoundError, ValueError: score tables that are missing, unfinished or not comparable; ``out`` that is no
            folder to write to.
    """
    files = [Path(each) for each in ([scores] if isinstance(scores, str | Path) else scores)]
    out = Path(out)
    _check_out(out)
    frame, record = read_all(files)
    estimates = estimate(frame, samples, seed, level, alpha)
    folders = [Path(images)] if images is not None else [file.parent / "images" for file in files]
    sets = preference_sets(frame)
    tables = all_tables(estimates, sets)
    if category_column(frame) is not None:
        tables += [category_table(frame, rewards, samples, level) for rewards in sets[-1:]]
    fronts, curves = _figures(estimates, preference_rewards(frame), sets)
    written = [file for name, figure in (fronts | curves).items() for file in plots.save_figure(figure, out / name)]
    written += _write_tables(tables, out / "tables")
    numbers = out / "summary.csv"
    numbers.write_text(frame_to_csv(summary(estimates), float_format="%.6g"), encoding="utf-8")
    page = out / "report.html"
    content = _page(frame, record, estimates, sets, tables, out, list(curves), folders)
    page.write_text(content, encoding="utf-8")
    if show:
        print_summary(estimates)
        for each in (whole_verdict(estimates, rewards) for rewards in sets):
            print(
                f"\n{each.title}: differences of r(w), paired",
                *(f"  {what}: {text}" for what, text in each.lines),
                sep="\n",
            )
    return [page, numbers, *written]


def _check_out(out: Path) -> None:
    """Refuse what would fail after the work; the nearest folder that is there has to be writable."""
    nearest = next(each for each in (out, *out.absolute().parents) if os.path.lexists(each))
    if not nearest.is_dir():
        raise ValueError(f"--out {out}: {nearest} is not a folder; name a folder to write the report to")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out}: {nearest} is not writable; name another folder")


def print_summary(scores: pd.DataFrame | Estimates) -> None:
    """Print every blend's rewards, gain in weighted reward and seconds, with intervals."""
    estimates = scores if isinstance(scores, Estimates) else estimate(scores)
    headings = {name: f"reward/{name}" for name in estimates.rewards} | {"gain in r(w)": "weighted_gain"}
    rows = [
        [blend, *(cell(estimates.of(blend, quantity), 3) for quantity in headings.values()), f"{seconds:.3g}"]
        for blend, seconds in zip(estimates.blends["blend"], estimates.blends["seconds"], strict=True)
    ]
    print(tabulate(rows, ["blend", *headings, "s / image"], disable_numparse=True))


def report_main(arguments: Sequence[str] | None = None) -> None:
    """The command ``python -m dblightning report``; None takes the process's arguments."""
    parser = CommandParser(prog="dblightning report", description="Write the report of an evaluation.")
    parser.add_argument("scores", nargs="+", type=Path, help="scores.parquet; several are merged")
    parser.add_argument("--out", type=Path, help="folder to write to; default: beside the first score table")
    parser.add_argument("--images", type=Path, help="folder of images; default: images beside each score table")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"bootstrap samples (default {SAMPLES})")
    parser.add_argument("--level", type=float, default=0.95, help="level of the intervals (default 0.95)")
    parser.add_argument("--alpha", type=float, help="α of eq. (4), reward per nat: judge by E[r(w)] − α·KL too")
    options = parser.parse_args(arguments)
    if options.samples < 1 or not 0 < options.level < 1:
        parser.error("--samples must be 1 or more, --level between 0 and 1")
    if options.images is not None and not options.images.is_dir():
        parser.error(f"--images {options.images} is not a folder; name the one with <blend>/<prompt_id>-<seed>.png")
    try:
        written = write_report(
            options.scores, options.out or options.scores[0].parent, options.images, options.samples,
            level=options.level, alpha=options.alpha,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"report: {written[0]}")


# ── parts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _figures(
    estimates: Estimates, names: Sequence[str], sets: Sequence[Sequence[str]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """File name → figure: the fronts, and the curves."""
    has_base = _has_base(estimates)
    fronts: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    if len(names) > 1:
        fronts["pareto"] = plots.pareto_figure(estimates, names)
        if has_base:
            fronts["pareto_gains"] = plots.pareto_figure(estimates, names, gains=True)
    for rewards in sets:
        ending = "_" + "_".join(rewards) if len(sets) > 1 else ""
        if ending and list(rewards) != list(names):
            fronts[f"pareto{ending}"] = plots.pareto_figure(estimates, rewards)
        if has_base:
            draw = plots.weighted_figure if len(rewards) == 2 else plots.gain_bars_figure
            curves[f"gain_by_weight{ending}"] = draw(estimates, rewards)
            cost = plots.cost_figure(estimates, rewards)
            curves |= {f"gain_by_cost{ending}": cost} if cost is not None else {}
            kl = plots.kl_figure(estimates, rewards)
            curves |= {f"gain_by_kl{ending}": kl} if kl is not None else {}
    strength = plots.strength_figure(estimates) if has_base else None
    return fronts, curves | ({"gain_by_strength": strength} if strength is not None else {})


def _has_base(estimates: Estimates) -> bool:
    return bool((estimates.blends["method"] == "base").any())


def _write_tables(tables: Sequence[Table], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for table in tables:
        for ending, write in (("md", to_markdown), ("tex", to_latex), ("csv", to_csv)):
            written.append(folder / f"{table.name}.{ending}")
            written[-1].write_text(write(table), encoding="utf-8")
    return written


def _page(
    frame: pd.DataFrame, record: dict[str, Any], estimates: Estimates, sets: Sequence[Sequence[str]],
    tables: Sequence[Table], out: Path, curves: Sequence[str], folders: Sequence[Path],
) -> str:  # fmt: skip
    names = preference_rewards(frame)
    planes = [(names, False, "pareto")] if len(names) > 1 else []
    planes += [(names, True, "pareto_gains")] if planes and _has_base(estimates) else []
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
