from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


#: bytes of a notebook with its outputs
LARGEST = 1_500_000
#: "/home/…", "C:\\Users\\…": a path of whoever executed it
MACHINE_PATH = re.compile(r"""(?<![\w.:/<])(/(home|root|Users|tmp|opt|usr|work|mnt|workspace|content)/|[A-Z]:\\)""")


def cells(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["cells"]
    return found


def code(cell: dict[str, Any]) -> str:
    """A cell's Python, without IPython's magics."""
    return "".join(line for line in cell["source"] if not line.startswith("%"))


def shown(cell: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Kind and text of all that a cell's outputs show; pictures are base64."""
    for output in cell["outputs"]:
        yield from ((kind, "".join(text)) for kind, text in output.get("data", {}).items())
        if output["output_type"] == "stream":
            yield output["name"], "".join(output["text"])


#: the tour samples for 20 seconds
RUNS = [pytest.param(file, marks=[pytest.mark.slow] * ("tour" in file.name)) for file in NOTEBOOKS]


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.name)
def test_every_cell_of_a_notebook_runs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("Agg")
    monkeypatch.chdir(file.parent)  # where Jupyter starts it
    namespace: dict[str, Any] = {}
    for index, cell in enumerate(cells(file)):
        if cell["cell_type"] == "code":
            exec(compile(code(cell), f"{file.name}[{index}]", "exec"), namespace)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_a_notebook_holds_what_its_cells_show(file: Path) -> None:
    """`make notebooks` writes it: executed once from the first cell to the last, pictures and text, nothing else."""
    runnable = [cell for cell in cells(file) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in runnable] == list(range(1, len(runnable) + 1)), "run: make notebooks"
    for cell in runnable:
        ends = ast.parse(code(cell)).body[-1]
        if isinstance(ends, ast.Expr) and "interact" not in code(cell):
            assert cell["outputs"], f"no output: {code(cell)}"
        assert {output["output_type"] for output in cell["outputs"]} <= {"stream", "execute_result", "display_data"}
        for kind, text in shown(cell):
            assert kind in ("image/png", "text/html", "text/plain", "stdout")
            assert kind == "image/png" or not MACHINE_PATH.search(text), text
    kinds = {kind for cell in runnable for kind, _ in shown(cell)}
    assert {"image/png", "stdout"} <= kinds
    assert file.stat().st_size < LARGEST


def test_a_path_of_a_machine_is_found_and_one_of_the_repository_is_not() -> None:
    assert (
        MACHINE_PATH.search("in '/home/me/x.py'") and MACHINE_PATH.search("C:\\Users") and MACHINE_PATH.search("/tmp/a")
    )
    assert not MACHINE_PATH.search("docs/results/tmp/x </tmp/> https://x.org/home/ a /b/ and/or")
