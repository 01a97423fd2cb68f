"""The report of an evaluation: figures, tables and one HTML page that opens offline, from the score table alone.

python -m dblightning report runs/blend/scores.parquet
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dblightning.arguments import CommandParser
from dblightning.evaluation import plots
from dblightning.evaluation.analysis import Estimates, estimate, summary
from dblightning.evaluation.cells import cell
from dblightning.evaluation.comparisons import category_column, category_table
from dblightning.evaluation.equal_terms import whole_verdict
from dblightning.evaluation.intervals import SAMPLES
from dblightning.evaluation.merge import read_all
from dblightning.evaluation.paper_tables import all_tables
from dblightning.evaluation.scores import preference_rewards, preference_sets
from dblightning.evaluation.table_formats import Table, frame_to_csv, pipe_table, to_csv, to_latex, to_markdown
from dblightning.extras import check_extra, has

#: what the page alone needs, from the extra ``report``
PAGE_NEEDS = "plotly"


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

    Without the extra ``report`` everything but the page ``report.html``.

    Args:
        scores: a score table, or several that are merged (:func:`merge.read_all`).
        out: folder to write to; files of the same names are replaced.
        images: folder of ``<blend label>/<prompt_id>-<seed>.png``; None looks in ``images`` beside each score table.
        samples, seed, level: of the bootstrap; see :func:`analysis.estimate`.
        show: also print the summary and the verdict, from the same draws.
        alpha: α of eq. (4), reward per nat; adds E[r(w)] − α·KL to tables and verdict.

    Returns:
        What was written, ``report.html`` first if it was.

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
    written.insert(0, numbers)
    if has(PAGE_NEEDS):
        from dblightning.evaluation.report_page import page

        written.insert(0, out / "report.html")
        content = page(frame, record, estimates, sets, tables, out, list(curves), folders)
        written[0].write_text(content, encoding="utf-8")
    if show:
        print_summary(estimates)
        for each in (whole_verdict(estimates, rewards) for rewards in sets):
            print(
                f"\n{each.title}: differences of r(w), paired",
                *(f"  {what}: {text}" for what, text in each.lines),
                sep="\n",
            )
    return written


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
    print(pipe_table(rows, ["blend", *headings, "s / image"]))


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
        check_extra("the report's page", PAGE_NEEDS, "report")
        written = write_report(
            options.scores, options.out or options.scores[0].parent, options.images, options.samples,
            level=options.level, alpha=options.alpha,
        )  # fmt: skip
    except (ImportError, OSError, ValueError) as error:
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
