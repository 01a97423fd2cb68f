"""The README's table of "The paper in miniature" is what the rows in docs/results say."""

from __future__ import annotations

from dblightning.evaluation.analysis import Estimates, estimate
from dblightning.evaluation.comparisons import paired_table
from dblightning.evaluation.objective_value import paired_objective_table
from dblightning.evaluation.paper_tables import share_table, weighted_table
from tests.evaluation.page_tables import ALPHA, ROOT, minus, published, volumes

NAMES = ["alignment", "aesthetic"]
WEIGHTS = ("0.2", "0.5", "0.8")
#: heading → column of the tables
COLUMNS = {
    "best single adapter": "best single adapter",
    "random adapter per image": "random adapter per image",
    "DB-MPA": "DB-MPA",
    "DB-MPA-LS": "DB-MPA-LS (rotation)",
    "exact soup": "Rewarded Soup (exact)",
    "best of 2": "best of N",
    "CoDe": "CoDe",
    "RGG": "RGG",
    "MORL, retrained for w": "MORL (oracle)",
}


def expected_table(estimates: Estimates) -> list[list[str]]:
    """Headings and rows, as the README has them."""
    makers = (weighted_table, share_table, paired_table, paired_objective_table)
    weighted, share, paired, objective = (make(estimates, NAMES) for make in makers)
    columns = [variant for variant, _ in weighted.cells.columns]
    rows = [["w", *COLUMNS]]
    for w in WEIGHTS:
        place = weighted.cells.index.tolist().index(f"w = {w}")
        bold = {columns[column] for row, column in weighted.bold if row == place}
        texts = {
            name: weighted.cells.iloc[place, columns.index(name)] if name in columns else "–"
            for name in COLUMNS.values()
        }
        rows.append([w, *(f"**{text}**" if name in bold else text for name, text in texts.items())])

    def over_weights(table: str, cells: dict[str, list[str]], own: str, missing: str) -> list[str]:
        found = [" / ".join(cells[name]) if name in cells else missing for name in COLUMNS.values()]
        return [table, *(own if name == "DB-MPA" and own else text for name, text in zip(COLUMNS, found, strict=True))]

    def leading(frame, sign: str) -> dict[str, list[str]]:  # type: ignore[no-untyped-def]
        found = {str(name): [number(frame, w, str(name), sign) for w in WEIGHTS] for name in frame.columns}
        return {name: texts for name, texts in found.items() if set(texts) != {"–"}}

    def number(frame, w: str, name: str, sign: str) -> str:  # type: ignore[no-untyped-def]
        text = frame.loc[f"w = {w}", name] if f"w = {w}" in frame.index else "–"
        return "–" if text == "–" else f"{float(text.split(' ± ')[0]):{sign}.2f}"

    rows.append(over_weights("r(w) less DB-MPA's", leading(paired.cells, "+"), "0", "–"))
    rows.append(over_weights("E[r(w)] − α·KL less DB-MPA's", leading(objective.cells, "+"), "0", "–"))
    rows.append(over_weights("share of MORL's gain", leading(share.cells, ""), "", "1"))
    volume = volumes(estimates, NAMES)
    rows.append(["hypervolume above the base, less DB-MPA's", *(volume.get(name, "–") for name in COLUMNS.values())])
    base = estimates.blends.set_index("method").loc["base", "seconds"]
    seconds = []
    for name in COLUMNS.values():
        part = estimates.rows.loc[estimates.rows["variant"] == name.replace("best single", "single"), "seconds"] / base
        low, high = float(part.min()), float(part.max())
        seconds.append(f"{low:.0f} to {high:.0f}" if high > 5 else f"{part.median():.1f}")
    rows.append(["seconds per image, × base", *seconds])
    return minus(rows)


def written_table() -> list[list[str]]:
    """Headings and rows of the README's table, without the line between."""
    section = (
        (ROOT / "README.md").read_text(encoding="utf-8").split("## The paper in miniature", 1)[1].split("\n## ")[0]
    )
    lines = [line for line in section.splitlines() if line.startswith("|") and not line.startswith("|--")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_readmes_table_in_miniature_is_what_its_score_table_says() -> None:
    expected, written = expected_table(estimate(published("one_alpha"), alpha=ALPHA)), written_table()
    assert written[0] == expected[0]
    for row, own in zip(expected[1:], written[1:], strict=True):
        assert own == row
