"""Execute the notebooks in place and keep what they show: ``make notebooks``, or the files to execute as arguments.

Written are text, tables and pictures, and nothing of the machine: no times, no widgets' state, no version of Python.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
#: what a viewer without a kernel shows; the rest of an output's forms repeat it
SHOWN = ("image/png", "text/html", "text/plain")


def executed(file: Path) -> Any:
    """The notebook with the outputs of its cells.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    notebook = nbformat.read(file, as_version=4)
    where = {"metadata": {"path": HERE}}  # where Jupyter starts it
    NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=where, coalesce_streams=True).execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [kept for output in cell.outputs if (kept := _shown(output)) is not None]
    return notebook


def _shown(output: Any) -> Any:
    """An output's richest form and its text; None for what needs a kernel, and for what goes to the error stream."""
    if output.output_type == "stream":
        return output if output.name == "stdout" else None
    if output.output_type in ("execute_result", "display_data"):
        if "application/vnd.jupyter.widget-view+json" in output.data:
            return None
        richest = next(kind for kind in SHOWN if kind in output.data)
        output.data = {kind: output.data[kind] for kind in (richest, "text/plain")}
        output.metadata = {}
    return output


def main(files: list[Path]) -> None:
    for file in files or sorted(HERE.glob("*.ipynb")):
        nbformat.write(executed(file), file)
        print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main([Path(each) for each in sys.argv[1:]])
