from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import dblightning

ROOT = Path(__file__).parent.parent


def test_the_public_names_are_there() -> None:
    from dblightning import blending, callbacks, data, rewards

    assert dblightning.RewardRLModule.__module__ == "dblightning.module"
    assert dblightning.DiffusionBlendPipeline.__module__ == "dblightning.pipeline"
    for module, names in {
        blending: "Base Single DBMPA DBKLA DBMPALS RewardedSoup RewardedSoupFactors",
        callbacks: "BeforeAfterGrid BlendSamplingCallback ExportAdapter SampleGrid",
        data: "DrawBenchDataModule GenEvalDataModule PromptFileDataModule MiniatureDataModule",
        rewards: "ImageReward PickScore VILA JPEGCompressibility HPSv2 AestheticScore CLIPScore GenEvalAccuracy "
        "WeightedReward",
    }.items():
        for name in names.split():
            assert hasattr(module, name), f"{module.__name__}.{name}"
    with pytest.raises(AttributeError, match="NoSuchName"):
        _ = dblightning.NoSuchName


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "dblightning.__version__"}


def test_changelog_and_citation_are_of_this_version() -> None:
    released = re.search(
        r"^## \[(\d.*)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE
    )
    assert released is not None
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert (citation["version"], str(citation["date-released"])) == released.groups()
    assert released[1] == dblightning.__version__


def test_importing_the_package_imports_neither_torch_nor_lightning() -> None:
    code = "import sys, dblightning, dblightning.miniature as m; print({'torch', 'lightning'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
