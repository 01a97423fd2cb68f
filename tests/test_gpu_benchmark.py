"""``make gpu``: its plan, its runner with stand-ins for parts, and the dry run."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_models import MODELS, denoiser_of

SCRIPT = str(Path(gpu.__file__))


def run(folder: Path, runner: Any, **changed: Any) -> dict[str, Any]:
    """A run with ``runner`` in place of the parts' processes."""
    options = argparse.Namespace(**{"budget": 1000.0, "dry_run": True, "json": folder / "gpu.json", **changed})
    record = changed.pop(
        "record", {"device": "dry run", "dry_run": True, "machine": gpu.machine.describe(), "parts": {}}
    )
    gpu.measure(options, record, lambda: None, runner)
    return record


def test_the_plan_fits_its_budget_and_covers_every_kind_and_model() -> None:
    parts = gpu.plan()
    assert sum(part.planned_s() for part in parts) <= gpu.BUDGET_S <= 25 * 60
    assert {part.kind for part in parts} == set(gpu.KINDS)
    for kind in gpu.KINDS.keys() - {"ranks"}:
        assert {part.model for part in parts if part.kind == kind} == set(MODELS)
    assert len({part.name for part in parts}) == len(parts)


def test_the_planned_methods_are_those_of_the_inference_benchmark() -> None:
    named = gpu.inference_methods()
    assert set(gpu.COST) == set(named)
    assert set(gpu.FEW) <= set(named)


@pytest.mark.parametrize("name", MODELS)
def test_full_width_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        denoiser = denoiser_of(name)
    assert sum(weight.numel() for weight in denoiser.parameters()) == MODELS[name].parameters


def test_a_crash_is_a_line_and_the_parts_after_it_run(tmp_path: Path) -> None:
    def runner(part: gpu.Part, file: Path, dry: bool, limit_s: float) -> str:
        file.write_text(json.dumps([{"kl": "none", "images_per_second": 2.0}]))
        return "failed with exit code -9: killed" if part.name == "training sdxl" else "done"

    record = run(tmp_path, runner)
    statuses = {name: part["status"] for name, part in record["parts"].items()}
    assert statuses.pop("training sdxl") == "failed with exit code -9: killed"
    assert set(statuses.values()) == {"done"}
    page = gpu.markdown(record)
    assert "| training sdxl | failed with exit code -9: killed |" in page
    assert "## SDXL: training" in page  # what it had measured before it died


def test_a_second_run_measures_only_what_is_not_done(tmp_path: Path) -> None:
    ran: list[str] = []

    def runner(part: gpu.Part, file: Path, dry: bool, limit_s: float) -> str:
        ran.append(part.name)
        return "done" if len(ran) != 3 else "stopped after its limit of 9 s"

    record = run(tmp_path, runner)
    third = ran[2]
    ran.clear()
    ran += ["", "", ""]
    run(tmp_path, runner, record=record)
    assert ran == ["", "", "", third]


def test_no_part_begins_after_the_budget_or_may_run_beyond_it(tmp_path: Path) -> None:
    limits: list[float] = []

    def runner(part: gpu.Part, file: Path, dry: bool, limit_s: float) -> str:
        limits.append(limit_s)
        time.sleep(0.06)
        return "done"

    record = run(tmp_path, runner, budget=0.1)
    assert len(limits) == 2
    assert limits[0] <= 0.1 and limits[1] <= 0.05
    assert sum("no time was left" in part["status"] for part in record["parts"].values()) == len(gpu.plan()) - 2


def test_ratios_are_to_the_base_of_the_same_batch() -> None:
    rows = [
        {"method": "base", "batch": 1, "seconds_per_image": 2.0},
        {"method": "base", "batch": 4, "seconds_per_image": 1.0},
        {"method": "DB-KLA", "batch": 4, "seconds_per_image": 3.0},
        {"method": "RGG", "batch": 4, "error": "OutOfMemoryError: a | b"},
    ]
    lines = gpu.table("inference", rows)
    assert lines[-2] == "| DB-KLA | 4 | 3 | 3 |  |"
    assert lines[-1] == "| RGG | 4 |  |  | OutOfMemoryError: a / b |"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_fails() -> None:
    with pytest.raises(SystemExit, match="torch finds no CUDA device") as stop:
        gpu.main([])
    assert stop.value.code not in (0, None)


@pytest.mark.slow
def test_the_dry_run_measures_every_part(tmp_path: Path) -> None:
    file = tmp_path / "gpu_dry.json"
    subprocess.run([sys.executable, SCRIPT, "--dry-run", "--json", str(file)], check=True, timeout=600)
    record = json.loads(file.read_text(encoding="utf-8"))
    assert list(record["parts"]) == [part.name for part in gpu.plan()]
    for name, part in record["parts"].items():
        assert part["status"] == "done", (name, part["status"])
        assert part["rows"], name
        assert not [row for row in part["rows"] if "error" in row], name
    for row in record["parts"]["inference sd35m"]["rows"]:
        assert row.get("finite", True)
    for name in ("training sd15", "training sdxl", "training sd35m", "ranks sd15"):
        assert all(row["largest_change"] > 0 for row in record["parts"][name]["rows"])
    (ranks,) = record["parts"]["ranks sd15"]["rows"]
    assert ranks["backend"] == "gloo"
    page = file.with_suffix(".md").read_text(encoding="utf-8")
    assert "no number here means anything" in page
