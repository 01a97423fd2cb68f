"""The tables that docs/paper.md shows of the miniature are what the rows in docs/results say."""

from __future__ import annotations

from pathlib import Path

import pytest

from dblightning.evaluation.analysis import Estimates, estimate
from dblightning.evaluation.scores import read_scores
from tests.evaluation.page_tables import preference_rows, strength_rows

ROOT = Path(__file__).parent.parent.parent
ALIGNED, CALM = ["alignment", "aesthetic"], ["compressibility", "aesthetic"]
#: reward per nat, at which the adapters of Table 1 are calibrated (test_published_figures.py)
ALPHA = 0.0015


def estimates(name: str, alpha: float | None = None) -> Estimates:
    file = ROOT / "docs" / "results" / f"miniature_{name}.parquet"
    if not file.is_file():
        pytest.skip("docs/results is not part of this copy")
    return estimate(read_scores(file)[0], alpha=alpha)


def written(section: str) -> list[list[str]]:
    """Headings and rows of a section's first table."""
    text = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8").split(f"\n### {section}\n", 1)[1].split("\n##")[0]
    table = text[text.index("\n|") :].lstrip("\n").split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[1] != "-"]


@pytest.mark.parametrize(
    ("section", "name", "rewards", "alpha"),
    [
        ("Alignment against aesthetic (Table 1)", "one_alpha", ALIGNED, ALPHA),
        ("The same with alignment trained on", "one_alpha_long", ALIGNED, ALPHA),
        ("The training prompts (Table 2)", "table2_one_alpha", ALIGNED, ALPHA),
        ("Compressibility against aesthetic (Table 5)", "table5_one_alpha", CALM, 0.005),
    ],
)
def test_a_table_by_preference_is_what_its_rows_say(
    section: str, name: str, rewards: list[str], alpha: float | None
) -> None:
    assert written(section) == preference_rows(estimates(name, alpha), rewards)


def test_the_table_of_strength_against_retraining_is_what_its_rows_say() -> None:
    section = "Strength against retraining (Fig. 6(b))"
    assert written(section) == strength_rows(estimates("figure6_one_alpha"))
