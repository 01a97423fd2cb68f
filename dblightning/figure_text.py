"""Text in figures: what a prompt, a reward's name or a blend's label says is drawn as it is."""

from __future__ import annotations

import re


def figure_text(text: object) -> str:
    r"""Text that matplotlib draws character by character.

    A dollar sign opens mathtext, which fails on text such as "$\frac{"; control characters are not valid SVG.
    """
    shown = "".join(each if each.isprintable() or each == "\n" else " " for each in str(text))
    return shown.replace("$", r"\$")


def wrapped(text: object, width: int, lines: int | None = None) -> str:
    """:func:`figure_text` in lines of at most ``width`` characters.

    Lines end after a space, an underscore or a hyphen where they can, and at line ends of the text.

    Args:
        text: to draw.
        width: characters in a line.
        lines: at most so many, the rest is cut and marked with an ellipsis.
    """
    found: list[str] = []
    plain = "".join(each if each.isprintable() or each == "\n" else " " for each in str(text))
    for part in plain.split("\n"):
        line = ""
        for piece in re.findall(r"[^\s_-]*[\s_-]|[^\s_-]+", part):
            if line and len(line) + len(piece.rstrip()) > width:
                found.append(line.rstrip())
                line = ""
            line += piece
            while len(line.rstrip()) > width:
                found.append(line[:width])
                line = line[width:]
        found.append(line.rstrip())
    if lines is not None and len(found) > lines:
        found = [*found[: lines - 1], found[lines - 1][: width - 1] + "…"]
    return figure_text("\n".join(found))
