"""A table of text cells, written as Markdown, LaTeX, HTML or CSV."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

#: last row of the table of rewards: one cell per method, not one per reward
SECONDS = "seconds / image"


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
    return f"{escape(table.caption)}\n\n{pipe_table(rows, headings)}\n"


def pipe_table(rows: Sequence[Sequence[object]], headings: Sequence[object]) -> str:
    """Text cells as a Markdown table whose columns are as wide as their widest cells; a cell's line ends are spaces."""
    lines = [[" ".join(str(cell).splitlines()) for cell in line] for line in (headings, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head, *body = (f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)
    return "\n".join([head, f"|{'|'.join(':' + '-' * (width + 1) for width in widths)}|", *body])


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
    """A table element with caption, scoped headings and escaped text, narrow enough for a page.

    Columns of two levels become rows, one per row and group. A table of one
    level with more columns than rows is transposed.
    """
    cells, bold = table.cells, table.bold
    if isinstance(cells.columns, pd.MultiIndex):
        if cells.columns.get_level_values(1).nunique() != 1:
            return _stacked_html(table)
        cells = cells.set_axis(cells.columns.get_level_values(0), axis=1)
    if len(cells.columns) > len(cells):
        return to_html(Table(table.name, table.caption, cells.T.rename_axis("method"), {(j, i) for i, j in bold}))
    headings = "".join(f'<th scope="col">{_escape(heading)}</th>' for heading in cells.columns)
    body = []
    for i, (label, row) in enumerate(zip(cells.index, cells.to_numpy(), strict=True)):
        texts = "".join(_html_cell(text, (i, j) in bold) for j, text in enumerate(row))
        body.append(f'<tr><th scope="row">{_escape(label)}</th>{texts}</tr>')
    head = f'<tr><th scope="col">{_escape(cells.index.name)}</th>{headings}</tr>'
    return _html(table.caption, head, f"<tbody>{''.join(body)}</tbody>")


def _stacked_html(table: Table) -> str:
    """One row per row and group of columns, the rows of one label in a ``tbody`` of their own."""
    levels = [[str(name) for name in table.cells.columns.get_level_values(level)] for level in (0, 1)]
    groups, headings = (list(dict.fromkeys(level)) for level in levels)
    position = {column: index for index, column in enumerate(zip(*levels, strict=True))}
    body = []
    for i, (label, row) in enumerate(zip(table.cells.index, table.cells.to_numpy(), strict=True)):
        lines = []
        for group in groups:
            at = [position.get((group, heading)) for heading in headings]
            texts = ["–" if j is None else str(row[j]) for j in at]
            cells = "".join(_html_cell(text, (i, j) in table.bold) for text, j in zip(texts, at, strict=True))
            if label == SECONDS:
                texts = ["".join(text for text in texts if text != "–")]
                cells = f'<td colspan="{len(headings)}">{_escape(texts[0])}</td>'
            if set(texts) - {"–", ""}:
                lines.append((group, cells))
        for number, (group, cells) in enumerate(lines):
            first = f'<th scope="rowgroup" rowspan="{len(lines)}">{_escape(label)}</th>' if number == 0 else ""
            opening = "<tbody>" if number == 0 else ""
            body.append(f'{opening}<tr>{first}<th scope="row">{_escape(group)}</th>{cells}</tr>')
        body.append("</tbody>" if lines else "")
    names = [table.cells.index.name, "", *headings]
    head = "".join(f'<th scope="col">{_escape(name)}</th>' for name in names)
    return _html(table.caption, f"<tr>{head}</tr>", "".join(body))


def _escape(text: object) -> str:
    return html.escape(str(text))


def _html_cell(text: object, bold: bool) -> str:
    return f"<td><b>{_escape(text)}</b></td>" if bold else f"<td>{_escape(text)}</td>"


def _html(caption: str, head: str, bodies: str) -> str:
    return f"<table><caption>{_escape(caption)}</caption><thead>{head}</thead>{bodies}</table>"


_FORMULA = re.compile(r"[=+\-@\t\r\n]")


def csv_text(text: object) -> object:
    """Text that a spreadsheet does not take for a formula: an apostrophe before =, +, -, @, tab or line end.

    Numbers, with or without their interval, stay as they are. A carriage return, which ends a row for some, is a space.
    """
    if not isinstance(text, str) or not _FORMULA.match(text) or _NUMBER.fullmatch(text):
        return text.replace("\r", " ") if isinstance(text, str) else text
    return "'" + text.replace("\r", " ")


def to_csv(table: Table) -> str:
    """Comma-separated cells without bold; two levels of column names joined by a space; see :func:`csv_text`."""
    return frame_to_csv(table.cells.set_axis(_headings(table), axis=1), index=True)


def frame_to_csv(frame: pd.DataFrame, index: bool = False, **options: Any) -> str:
    """A frame as CSV whose text no spreadsheet takes for a formula; ``options`` are those of ``DataFrame.to_csv``."""
    safe = frame.apply(lambda column: column if pd.api.types.is_numeric_dtype(column) else column.map(csv_text))
    safe = safe.set_axis([csv_text(name) for name in frame.columns], axis=1)
    if index:
        safe = safe.set_axis(
            pd.Index([csv_text(name) for name in frame.index], name=csv_text(frame.index.name)), axis=0
        )
    return str(safe.to_csv(index=index, **options))


def _runs(names: Sequence[str]) -> list[tuple[str, int]]:
    """Equal neighbours with their number."""
    found: list[tuple[str, int]] = []
    for name in names:
        if found and found[-1][0] == name:
            found[-1] = name, found[-1][1] + 1
        else:
            found.append((name, 1))
    return found
