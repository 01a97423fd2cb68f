from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_every_cell_of_a_notebook_runs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("Agg")
    monkeypatch.chdir(file.parent)  # where Jupyter starts it
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    namespace: dict[str, Any] = {}
    for index, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], f"cell {index} of {file.name} is saved with outputs; clear them"
            exec(compile("".join(cell["source"]), f"{file.name}[{index}]", "exec"), namespace)
