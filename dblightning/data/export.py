"""Write the prompt sets as JSONL: ``python -m dblightning.data.export [folder]``, by default into ``data``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dblightning.data import drawbench, geneval
from dblightning.miniature import world


def files() -> dict[str, str]:
    """File name → contents, one JSON object per line."""
    return {
        "drawbench_colors.jsonl": _jsonl(_rows(drawbench.train_prompts())),
        "drawbench_val.jsonl": _jsonl(_rows(drawbench.validation_prompts())),
        "drawbench_test.jsonl": _jsonl(_rows(drawbench.held_out_prompts())),
        "geneval.jsonl": _jsonl(geneval.train_samples()),
        "geneval_val.jsonl": _jsonl(geneval.validation_samples()),
        "geneval_test.jsonl": _jsonl(geneval.held_out_samples()),
        "miniature_train.jsonl": _jsonl(_rows(world.train_prompts())),
        "miniature_val.jsonl": _jsonl(_rows(world.validation_prompts())),
        "miniature_test.jsonl": _jsonl(_rows(world.test_prompts())),
    }


def _rows(prompts: list[str]) -> list[dict[str, Any]]:
    return [{"prompt": prompt} for prompt in prompts]


def _jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def main(folder: str = "data") -> None:
    """Write every file into ``folder``, which is created if need be."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        path = Path(folder) / name
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"{path}: {text.count(chr(10))} prompts")


if __name__ == "__main__":
    main(*sys.argv[1:])
