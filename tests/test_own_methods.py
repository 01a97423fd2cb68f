"""A blend and a steering from outside the package: one file on the path, its dotted name wherever a method is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from dblightning import DiffusionBlendPipeline, cli
from dblightning.backbone import DiffusersBackbone
from dblightning.evaluation import BlendSpec, BlendSweep
from dblightning.steering import steers
from tests.conftest import randomize
from tests.own_methods import MODULE


@pytest.fixture
def my_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "path"
    folder.mkdir()
    name = f"my_package_{abs(hash(str(tmp_path)))}"  # a module is imported once
    (folder / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(folder))
    return name


@pytest.fixture
def adapter(sd15_folder: Path, tmp_path: Path) -> Path:
    backbone = DiffusersBackbone(str(sd15_folder))
    backbone.adapters.add("size", seed=0)
    randomize(backbone.adapters, "size", 0)
    backbone.adapters.export("size", tmp_path / "size", backbone.pipeline)
    return tmp_path / "size"


def test_one_file_and_one_line_of_yaml_are_enough(
    my_package: str, adapter: Path, sd15_folder: Path, tmp_path: Path
) -> None:
    """Through the command line to the table and the report, beside the built-in methods that they equal."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    share, still = f"{my_package}.Share", f"{my_package}.Still"
    jpeg = "dblightning.rewards.JPEGCompressibility"
    weights = {"size": 1.0}
    config = {
        "trainer": {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
                    "enable_model_summary": False, "default_root_dir": str(tmp_path)},
        "model": {
            "backbone": {"class_path": "dblightning.backbone.DiffusersBackbone",
                         "init_args": {"pretrained": str(sd15_folder)}},
            "num_inference_steps": 2, "guidance_scale": 2.0, "out": str(tmp_path / "out"),
            "adapters": {"size": str(adapter)},
            "rewards": {"size": {"class_path": jpeg, "init_args": {"scale_kb": 0.01, "offset_kb": 1.0}}},
            "blends": [{"method": "base"}, {"method": still, "options": {"factor": 1.0}},
                       {"method": "db-kla", "weights": weights, "kl_scale": 0.25},
                       {"method": share, "weights": weights, "options": {"share": 0.25}}],
            "sweeps": [{"methods": [share], "names": ["size"], "weights": [1], "options": {"share": 1.0}},
                       {"methods": ["single"], "names": ["size"], "weights": [1]}],
        },
        "data": {"class_path": "dblightning.data.PromptFileDataModule",
                 "init_args": {"train_file": str(tmp_path / "prompts.txt"), "eval_batch_size": 2}},
    }  # fmt: skip
    file = tmp_path / "eval.yaml"
    file.write_text(yaml.safe_dump(config))
    cli.main(["test", "--config", str(file)])

    scores = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    by = {key: group["reward/size"].to_numpy() for key, group in scores.groupby(["method", "kl_scale", "options"])}
    base, quarter, whole = by["base", 1.0, "{}"], by["db-kla", 0.25, "{}"], by["single", 1.0, "{}"]
    # 1e-3 of a reward in units of 10 bytes: rows of another batch round differently
    np.testing.assert_allclose(by[still, 1.0, '{"factor": 1.0}'], base, atol=1e-3)
    np.testing.assert_allclose(by[share, 1.0, '{"share": 0.25}'], quarter, atol=1e-3)
    np.testing.assert_allclose(by[share, 1.0, '{"share": 1.0}'], whole, atol=1e-3)
    # at least a byte apart, so that the test tests something
    assert min(np.abs(quarter - base).max(), np.abs(quarter - whole).max()) > 0.05
    assert share in (tmp_path / "out" / "report.html").read_text()
    assert set(pd.read_csv(tmp_path / "out" / "summary.csv")["method"]) == {"base", still, "db-kla", share, "single"}


def test_the_pipeline_takes_an_object_a_class_or_a_dotted_path(
    my_package: str, adapter: Path, sd15_folder: Path
) -> None:
    import importlib

    Share = importlib.import_module(my_package).Share
    pipe = DiffusionBlendPipeline.from_pretrained(sd15_folder, {"size": adapter})

    def latents(**options: Any) -> torch.Tensor:
        settings = {"num_inference_steps": 2, "eta": 1.0, "output_type": "latent"} | options
        return pipe("a red circle", generator=torch.Generator().manual_seed(0), **settings).images

    weights = {"size": 1.0}
    expected = latents(method="db-kla", weights=weights, kl_scale=0.25)
    assert torch.equal(latents(blend=Share(weights, 0.25)), expected)
    assert torch.equal(latents(blend=Share, weights=weights, method_options={"share": 0.25}), expected)
    for place in ("method", "blend"):
        options = {place: f"{my_package}.Share", "weights": weights, "method_options": {"share": 0.25}}
        assert torch.equal(latents(**options), expected)
    base = latents(method="base")
    assert torch.equal(latents(method=f"{my_package}.Still", method_options={"factor": 2.0}), 2 * base)
    with pytest.raises(ValueError, match="weights .* beside a Share, which has its own"):
        latents(blend=Share(weights), weights=weights)


def test_a_sweep_runs_methods_of_ones_own(my_package: str) -> None:
    method = f"{my_package}.Share"
    specs = BlendSweep([method, "db-mpa"], ["a", "b"], [0.2, 1.0], options={}).specs()
    assert [spec.method for spec in specs] == [method, method, "db-mpa", "db-mpa"]
    assert specs[0].adapters == ["a", "b"]
    assert specs[0].label == f"{method}_a-0.2_b-0.8"
    assert json.loads(specs[0].columns()["options"]) == {}
    assert not specs[0].steers
    assert steers(f"{my_package}.Still")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(method="{}.Share"), "Share needs weights"),
        (dict(method="{}.Share", weights={"a": 1.0}, kl_scale=0.5), "Share has no kl_scale, got 0.5"),
        (dict(method="{}.Share", weights={"a": 1.0}, options={"shrae": 1}), r"no option 'shrae'; it has \['share'\]"),
        (dict(method="{}.Share", options={"weights": 1}), "weights is not an option"),
        (dict(method="{}.Share", weights={"a": 1.0}, adapter="x"), "leave adapter out"),
        (dict(method="{}.Nothing"), "must be a Blend or Steering class"),
        (dict(method="{}.Missing"), "cannot be imported: .* has no attribute 'Missing'"),
        (dict(method="nowhere_at_all.Blend"), "cannot be imported: No module named 'nowhere_at_all'"),
        (dict(method="a b.C"), "or the dotted path of a Blend or Steering class, got 'a b.C'"),
    ],
)
def test_what_a_class_lacks_or_needs_is_said_before_anything_runs(
    my_package: str, settings: dict[str, Any], says: str
) -> None:
    spec = BlendSpec(**settings | {"method": settings["method"].format(my_package)})
    with pytest.raises(ValueError, match=says):
        spec.blend()


def test_the_example_of_the_documentation_runs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    source = text.split("```python\n# my_package.py\n")[1].split("```")[0]
    scope: dict[str, Any] = {}
    exec(source, scope)
    plan = scope["LateAdapter"]({"b": 1.0}, start_at=0.5).start(["a", "b"], 3, 4)
    assert [plan(step).gates[0].tolist() for step in (1, 2)] == [[[0.0, 0.0]] * 3, [[0.0, 1.0]] * 3]
    assert all((plan(step).mix == 1).all() for step in range(4))
