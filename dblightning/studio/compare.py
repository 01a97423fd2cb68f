"""The Compare tab: an evaluation's report from its score table."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dblightning.extras import check_extra

if TYPE_CHECKING:
    import pandas as pd

#: bootstrap draws: enough for a look, a tenth of the report command's
SAMPLES = 1000


class Report(NamedTuple):
    """A report, in parts that a page shows."""

    verdict: str  # Markdown
    table: pd.DataFrame  # one row per blend, each reward with its interval
    picture: str | None  # file of the Pareto picture
    page: Path  # report.html, with everything


def read_report(scores: Path, folder: Path) -> Report:
    """Write the report of a score table into a folder, and return its parts.

    Args:
        scores: a score table.
        folder: where a folder of its own is made; the same table is written once.

    Raises:
        FileNotFoundError, ValueError: not a score table, or one that is not finished. ImportError: no plotly.
    """
    import pandas as pd

    from dblightning.evaluation.analysis import estimate
    from dblightning.evaluation.cells import cell
    from dblightning.evaluation.equal_terms import whole_verdict
    from dblightning.evaluation.merge import read_all
    from dblightning.evaluation.report import PAGE_NEEDS, write_report
    from dblightning.evaluation.scores import preference_sets

    check_extra("the Compare tab", PAGE_NEEDS, "studio")
    if not scores.is_file():
        raise FileNotFoundError(f"no score table {scores}")
    out = folder / hashlib.sha256(scores.read_bytes()).hexdigest()[:12]
    if not (out / "report.html").is_file():
        write_report(scores, out, samples=SAMPLES)
    frame, _ = read_all([scores])
    estimates = estimate(frame, SAMPLES)
    headings = {name: f"reward/{name}" for name in estimates.rewards} | {"gain in r(w)": "weighted_gain"}
    rows = [
        [blend, *(cell(estimates.of(blend, quantity), 3) for quantity in headings.values())]
        for blend in estimates.blends["blend"]
    ]
    verdicts = [whole_verdict(estimates, rewards) for rewards in preference_sets(frame)]
    lines = [
        line for each in verdicts for line in (f"**{each.title}**", "", *(f"- {a}: {b}" for a, b in each.lines), "")
    ]
    picture = out / "pareto.png"
    return Report(
        "\n".join(lines),
        pd.DataFrame(rows, columns=["blend", *headings]),
        str(picture) if picture.is_file() else None,
        out / "report.html",
    )
