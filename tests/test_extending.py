"""The examples of docs/extending.md, copied from the page and run."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from dblightning import cli
from dblightning.backbone import FAMILIES, DiffusersBackbone
from tests.conftest import randomize

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")


def blocks(section: str, language: str) -> list[str]:
    """The code blocks of a section of the page."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Puts a section's Python file on the path, under the name of its first line; returns the section's YAML."""
    folder = tmp_path / "path"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    written: list[str] = []

    def write(section: str) -> dict[str, Any]:
        (source,), (line,) = blocks(section, "python"), blocks(section, "yaml")
        name = source.splitlines()[0].removeprefix("# ")
        (folder / name).write_text(source, encoding="utf-8")
        written.append(name.removesuffix(".py"))
        settings: dict[str, Any] = yaml.safe_load(line)
        return settings

    yield write
    for name in written:
        sys.modules.pop(name, None)


def run(folder: Path, command: str, settings: dict[str, Any]) -> None:
    """One command with a configuration file, on one CPU, with nothing logged."""
    trainer = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
               "enable_model_summary": False, "default_root_dir": str(folder)}  # fmt: skip
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle\na blue star\n")
    sizes = {"batch_size": 4, "rollouts_per_epoch": 1, "eval_batch_size": 2}
    source = {"train_file": str(prompts)} | sizes
    data = {"class_path": "dblightning.data.PromptFileDataModule", "init_args": source}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({"trainer": trainer | settings.pop("trainer", {}), "data": data} | settings))
    cli.main([command, "--config", str(file)])


def trained(folder: Path, model: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The state of a fit of one rollout."""
    model = {
        "backbone": {"class_path": "dblightning.backbone.DiffusersBackbone", "init_args": {"pretrained": "miniature"}},
        "num_inference_steps": 2, "policy_steps": 1, "policy_batch_size": 4, "advantage": "prompt",
        "learning_rate": 1e-3, "objective": {"class_path": "PPO", "init_args": {"clip_range": 0.1}},
    } | model  # fmt: skip
    save = {"class_path": "dblightning.checkpointing.RunCheckpoint", "init_args": {"folder": str(folder / "saved")}}
    run(folder, "fit", {"model": model, "trainer": {"max_epochs": 1, "limit_val_batches": 0, "callbacks": [save]}})
    (file,) = (folder / "saved").glob("rollout-*.ckpt")
    return torch.load(file, weights_only=True)


def test_a_reward(outside: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    settings = outside("A reward")
    state = trained(tmp_path, settings["model"])
    assert state["dblightning"]["facts"]["reward"] == "Warmth"
    from my_reward import Warmth  # type: ignore[import-not-found]

    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 1
    assert Warmth(gain=2.0).score(red, ["a red circle"]).tolist() == [2.0]


def test_a_blend(outside: Callable[[str], dict[str, Any]], sd15_folder: Path, tmp_path: Path) -> None:
    settings = outside("A blend")
    backbone = DiffusersBackbone(str(sd15_folder))
    backbone.adapters.add("size", seed=0)
    randomize(backbone.adapters, "size", 0)
    backbone.adapters.export("size", tmp_path / "size", backbone.pipeline)
    jpeg = "dblightning.rewards.JPEGCompressibility"
    (blend,) = settings["model"]["blends"]
    model = {
        "backbone": {"class_path": "dblightning.backbone.DiffusersBackbone",
                     "init_args": {"pretrained": str(sd15_folder)}},
        "adapters": {"size": str(tmp_path / "size")}, "num_inference_steps": 2, "out": str(tmp_path / "out"),
        "rewards": {"size": {"class_path": jpeg, "init_args": {"scale_kb": 0.01, "offset_kb": 1.0}}},
        "blends": [{"method": "base"}, {"method": "single", "weights": {"size": 1.0}},
                   blend, blend | {"options": {"start_at": 1.0}}, blend | {"options": {"start_at": 0.0}}],
    }  # fmt: skip
    run(tmp_path, "test", {"model": model})
    scores = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    by = {key: group["reward/size"].to_numpy() for key, group in scores.groupby(["method", "options"])}
    base, single = by["base", "{}"], by["single", "{}"]
    name = "my_blend.LateAdapter"
    # 1e-3 of a reward in units of 10 bytes: rows of another batch round differently
    assert by[name, '{"start_at": 1.0}'] == pytest.approx(base, abs=1e-3)
    assert by[name, '{"start_at": 0.0}'] == pytest.approx(single, abs=1e-3)
    half = by[name, '{"start_at": 0.5}']
    assert abs(half - base).max() > 0.05 and abs(half - single).max() > 0.05  # half a byte, so that it is another image


def test_an_objective(outside: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    settings = outside("An objective")
    model = settings["model"] | {"reward": {"class_path": "dblightning.rewards.JPEGCompressibility"}}
    state = trained(tmp_path, model)
    wanted = {"class_path": "my_objective.Reinforce", "init_args": {"temperature": 0.5}}
    assert state["hyper_parameters"]["objective"] == wanted
    moved = [tensor for name, tensor in state["state_dict"].items() if "lora_B" in name]
    assert moved and any(bool(tensor.abs().max() > 0) for tensor in moved), "the update moves what starts at zero"


def save_dit(folder: Path) -> None:
    """A DiT of three classes with random weights: 16×16 images."""
    from diffusers import DiTPipeline, DiTTransformer2DModel

    from dblightning.miniature.pretrain import build_scheduler
    from tests import tiny_pipelines

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2, norm_num_groups=4,
        sample_size=8, patch_size=2, num_embeds_ada_norm=3,
    )  # fmt: skip
    DiTPipeline(transformer, tiny_pipelines._vae(), build_scheduler()).save_pretrained(folder)
    index = folder / "model_index.json"  # where the published model has its classes' names
    names = {"0": "a red circle", "1": "a blue star", "2": "a dog, a hound"}
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": names}))


def test_a_family(outside: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    """A run trains the transformer's adapter; the denoiser equals the plain pipeline's, class by class."""
    backbone = outside("A family of models")["model"]["backbone"]
    backbone["init_args"]["pretrained"] = str(tmp_path / "dit")
    save_dit(tmp_path / "dit")
    options = {"scale_kb": 0.01, "offset_kb": 1.0}
    reward = {"class_path": "dblightning.rewards.JPEGCompressibility", "init_args": options}
    state = trained(tmp_path, {"backbone": backbone, "reward": reward})
    assert state["dblightning"]["facts"]["latent_shape"] == [4, 8, 8]

    from my_family import DiTBackbone  # type: ignore[import-not-found]

    built = DiTBackbone(str(tmp_path / "dit"))
    conditioning = built.encode(["a blue star", "a hound", "anything else"])
    assert conditioning.pooled.argmax(-1).tolist() == [1, 2, 3]
    latents, timesteps = torch.randn(3, 4, 8, 8), torch.tensor([500, 20, 300])
    expected = built.pipeline.transformer(latents, timesteps, torch.tensor([1, 2, 3])).sample[:, :4]
    torch.testing.assert_close(built.denoise(latents, timesteps, conditioning), expected)
    FAMILIES.pop("DiTPipeline")
