"""The tables that docs/paper.md shows of the miniature are what the rows in docs/results say."""

from __future__ import annotations

import pytest

from dblightning.evaluation.analysis import estimate
from tests.evaluation.page_tables import (
    ALPHA,
    ROOT,
    chosen_rows,
    preference_rows,
    published,
    several_rows,
    strength_rows,
)

ALIGNED, CALM = ["alignment", "aesthetic"], ["compressibility", "aesthetic"]


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
def test_a_table_by_preference_is_what_its_rows_say(section: str, name: str, rewards: list[str], alpha: float) -> None:
    assert written(section) == preference_rows(estimate(published(name), alpha=alpha), rewards)


def test_the_table_of_each_method_at_its_best_is_what_its_rows_say() -> None:
    seeds = [(published(f"mixing{seed}_val"), published(f"mixing{seed}")) for seed in ("", "_1", "_2")]
    assert written("Each method at its best") == chosen_rows(seeds, ALPHA)


def test_the_table_of_two_to_four_rewards_is_what_its_rows_say() -> None:
    assert written("Two, three and four rewards (Table 6, Fig. 8)") == several_rows(estimate(published("basis")))


def test_the_table_of_strength_against_retraining_is_what_its_rows_say() -> None:
    section = "Strength against retraining (Fig. 6(b))"
    assert written(section) == strength_rows(estimate(published("figure6_one_alpha")))


def test_how_near_ordered_draws_come_in_reward_is_what_the_rows_say() -> None:
    """Recomputed by prompt, without the package's estimates: means, and Student's intervals over 200 prompts."""
    frame, found = published("ordered_ls"), []
    for w in (0.2, 0.5, 0.8):
        suffix = f"aesthetic-{1 - w:.1g}_alignment-{w:g}"
        value = w * frame["reward/alignment"] + (1 - w) * frame["reward/aesthetic"]
        means = [
            value[frame["blend"] == blend].groupby(frame["prompt_id"]).mean()
            for blend in (f"db-mpa-ls_{suffix}_rotation", f"db-mpa_{suffix}")
        ]
        less = means[0] - means[1]
        found.append(f"{less.mean():+.3f} ± {1.972 * less.sem():.3f}".replace("-", "−"))
    text = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
    assert f"{found[0]}, {found[1]} and {found[2]}" in text, found
