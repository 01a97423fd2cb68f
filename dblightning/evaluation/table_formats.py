"""A table of text cells, written as Markdown, LaTeX, HTML or CSV."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
from tabulate import tabulate


@dataclass
class Table:
    """Text cells with what to make bold.

    Args:
        name: of the file.
        caption: what it shows.
        cells: text; rows and columns named; columns may have two levels.
        bold: (row, column) positions.
    """

    name: str
    caption: str
    cells: pd.DataFrame
    bold: set[tuple[int, int]] = field(default_factory=set)


def _headings(table: Table) -> list[str]:
    columns = table.cells.columns
    return [" ".join(each) for each in columns] if isinstance(columns, pd.MultiIndex) else [str(c) for c in columns]


def to_markdown(table: Table) -> str:
    """A pipe table under its caption; bold cells between two asterisks."""

    def escape(text: object) -> str:
        return re.sub(r"([|*_`<\\])", r"\\\1", str(text))

    def shown(text: object, bold: bool) -> str:
        return f"**{escape(text)}**" if bold else escape(text)

    rows = [
        [escape(label), *(shown(text, (i, j) in table.bold) for j, text in enumerate(row))]
        for i, (label, row) in enumerate(zip(table.cells.index, table.cells.to_numpy(), strict=True))
    ]
    headings = [escape(text) for text in [table.cells.index.name, *_headings(table)]]
    body = tabulate(rows, headings, tablefmt="pipe", disable_numparse=True)
    return f"{escape(table.caption)}\n\n{body}\n"


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "Δ": r"$\Delta$", "λ": r"$\lambda$",
    "α": r"$\alpha$", "–": "--", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?( ± \d+(\.\d+)?)?")


def latex_escape(text: object) -> str:
    """Text with LaTeX's special characters, Greek letters and ± written as commands."""
    return "".join(_LATEX.get(character, character) for character in str(text))


def _latex_cell(text: str, bold: bool) -> str:
    if _NUMBER.fullmatch(text):
        number = text.replace("±", r"\pm")
        return rf"$\mathbf{{{number}}}$" if bold else f"${number}$"
    return rf"\textbf{{{latex_escape(text)}}}" if bold else latex_escape(text)


def to_latex(table: Table) -> str:
    """A ``table`` environment for the booktabs package; numbers in math mode, special characters escaped."""
    columns = table.cells.columns
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{latex_escape(table.caption)}}}"]
    lines += [rf"\begin{{tabular}}{{l{'c' * len(columns)}}}", r"\toprule"]
    if isinstance(columns, pd.MultiIndex):
        groups = _runs([str(group) for group, _ in columns])
        spans = [rf"\multicolumn{{{size}}}{{c}}{{{latex_escape(group)}}}" for group, size in groups]
        lines.append(" & ".join(["", *spans]) + r" \\")
        start = 2
        for _, size in groups:
            lines.append(rf"\cmidrule(lr){{{start}-{start + size - 1}}}")
            start += size
        headings = [str(heading) for _, heading in columns]
    else:
        headings = [str(heading) for heading in columns]
    lines.append(" & ".join(latex_escape(text) for text in [table.cells.index.name, *headings]) + r" \\")
    lines.append(r"\midrule")
    for i, (label, row) in enumerate(zip(table.cells.index, table.cells.to_numpy(), strict=True)):
        cells = [_latex_cell(str(text), (i, j) in table.bold) for j, text in enumerate(row)]
        lines.append(" & ".join([latex_escape(label), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def to_html(table: Table) -> str:
    """A table element with caption, scoped headings and escaped text."""
    columns, escape = table.cells.columns, html.escape
    corner = f'<th scope="col">{escape(str(table.cells.index.name))}</th>'
    if isinstance(columns, pd.MultiIndex):
        corner = corner.replace("<th ", '<th rowspan="2" ')
        groups = _runs([str(group) for group, _ in columns])
        spans = [f'<th colspan="{size}" scope="colgroup">{escape(group)}</th>' for group, size in groups]
        second = "".join(f'<th scope="col">{escape(str(heading))}</th>' for _, heading in columns)
        head = f"<tr>{corner}{''.join(spans)}</tr><tr>{second}</tr>"
    else:
        single = "".join(f'<th scope="col">{escape(str(heading))}</th>' for heading in columns)
        head = f"<tr>{corner}{single}</tr>"
    body = []
    for i, (label, row) in enumerate(zip(table.cells.index, table.cells.to_numpy(), strict=True)):
        texts = [(escape(str(text)), (i, j) in table.bold) for j, text in enumerate(row)]
        cells = "".join(f"<td><b>{text}</b></td>" if bold else f"<td>{text}</td>" for text, bold in texts)
        body.append(f'<tr><th scope="row">{escape(str(label))}</th>{cells}</tr>')
    caption = f"<caption>{escape(table.caption)}</caption>"
    return f"<table>{caption}<thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"


def to_csv(table: Table) -> str:
    """Comma-separated cells without bold; two levels of column names joined by a space."""
    return table.cells.set_axis(_headings(table), axis=1).to_csv()


def _runs(names: Sequence[str]) -> list[tuple[str, int]]:
    """Equal neighbours with their number."""
    found: list[tuple[str, int]] = []
    for name in names:
        if found and found[-1][0] == name:
            found[-1] = name, found[-1][1] + 1
        else:
            found.append((name, 1))
    return found
