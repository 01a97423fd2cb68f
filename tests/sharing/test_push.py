"""The folder for the hub and its card; nothing here needs a network."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from dblightning import DiffusionBlendPipeline, miniature
from dblightning.adapters import file_digest, read_metadata
from dblightning.adapters.files import read_lora, write_lora
from dblightning.cli import main
from dblightning.evaluation.scores import write_scores
from dblightning.preset import Preset
from dblightning.sharing.card import gains_of
from dblightning.sharing.export import export_soup
from dblightning.sharing.push import prepare, push

GAINS = {"alignment": 0.5, "aesthetic": -0.25}


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """Two blends and the base on four prompts; the adapter gains what ``GAINS`` says, give or take the prompt."""
    rows = []
    for order, (blend, method, weights) in enumerate(
        [
            ("base", "base", {}),
            ("single_alignment-1", "single", {"alignment": 1.0}),
            ("mix", "db-mpa", {"alignment": 0.5}),
        ]
    ):
        for prompt in range(4):
            for seed in range(2):
                share = weights.get("alignment", 0.0)
                values = {
                    f"reward/{name}": 0.1 * prompt + share * (gain + 0.02 * (prompt - 1.5))
                    for name, gain in GAINS.items()
                }
                row = {"order": order, "blend": blend, "method": method, "prompt_id": prompt, "seed": seed}
                rows.append(
                    {**row, "weight/alignment": share, "weight/aesthetic": 1 - share if weights else 0.0, **values}
                )
    path = tmp_path / "evaluation" / "scores.parquet"
    write_scores(path, pd.DataFrame(rows), {"num_inference_steps": 20, "eta": 1.0, "guidance_scale": 3.0})
    Image.new("RGB", (8, 8)).save(path.parent / "grid.png")
    return path


def test_the_card_says_gains_with_their_intervals(scores: Path) -> None:
    gains = gains_of(scores)
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in gains.table.splitlines()
    }
    value, half = map(float, rows["alignment adapter"][0].split(" ± "))
    assert value == pytest.approx(0.5, abs=1e-3) and 0 < half < 0.1
    assert rows["alignment adapter"][1].startswith("-0.25")
    assert rows["base model, its mean"][0].startswith("0.15")
    assert "4 prompts × 2 seeds, num_inference_steps 20, eta 1.0, guidance_scale 3.0" in gains.where
    with pytest.raises(ValueError, match="has no base to gain over"):
        frame = pd.read_parquet(scores)
        write_scores(scores, frame[frame["method"] != "base"], {})
        gains_of(scores)


def test_a_dry_run_makes_the_folder_and_sends_nothing(
    tmp_path: Path, scores: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", None)  # calling it would fail
    soup = export_soup(miniature.adapters(), {"alignment": 0.5, "aesthetic": 0.5}, tmp_path / "soup", rank=4)[0]
    preset = Preset(weights={"alignment": 0.5, "aesthetic": 0.5}, guidance_scale=3.0).write(tmp_path / "mine.yaml")
    folder = tmp_path / "hub"
    adapters = [f"{name}={path}" for name, path in miniature.adapters().items() if name != "compressibility"]
    main(
        ["push", "someone/shapes", "--base", "miniature", "--adapters", *adapters, "--soup", str(soup), "--scores",
         str(scores), "--preset", str(preset), "--out", str(folder), "--dry-run"]
    )  # fmt: skip
    printed = capsys.readouterr().out
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "README.md", "preset.yaml", "pytorch_lora_weights.safetensors", "images/00-grid.png",
        "adapters/aesthetic/pytorch_lora_weights.safetensors", "adapters/alignment/pytorch_lora_weights.safetensors",
    }  # fmt: skip
    assert all(name in printed for name in files) and "nothing was sent" in printed

    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "diffusers"
    assert card.data.base_model is None and "lora" in card.data.tags
    assert "| alignment adapter" in card.text and "## Use" in card.text
    for name in ("aesthetic", "alignment"):
        assert file_digest(folder / "adapters" / name) in card.text
    assert file_digest(folder / "pytorch_lora_weights.safetensors") in card.text
    assert re.search(r"cut by SVD: ‖ΔW − ΔW'‖ / ‖ΔW‖ is 0\.\d+", card.text)

    shared = Preset.read(folder / "preset.yaml")
    one = shared.pipeline()(
        "A red circle.", **shared.call(generator=False), output_type="pt", latents=torch.ones(1, 4, 8, 8)
    )
    mine = Preset.read(preset)
    two = mine.pipeline()(
        "A red circle.", **mine.call(generator=False), output_type="pt", latents=torch.ones(1, 4, 8, 8)
    )
    # 1e-5: the shipped pipeline has a third adapter, so its sums have another order
    torch.testing.assert_close(one.images, two.images, rtol=0, atol=1e-5)


def test_the_code_in_the_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder = prepare("someone/shapes", "miniature", tmp_path / "hub", miniature.adapters()).folder
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo: str(folder))
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    code = next(block for block in blocks if "snapshot_download" in block)
    found: dict[str, Any] = {}
    exec(code.replace("a prompt", "A red circle."), found)
    assert found["image"].size == (32, 32)
    pipe = DiffusionBlendPipeline.from_pretrained("miniature", adapters={})
    assert 'subfolder="adapters/aesthetic"' in blocks[0]
    pipe.load_lora_weights(folder, subfolder="adapters/aesthetic")


def test_private_facts_stay_at_home(tmp_path: Path) -> None:
    lora = read_lora(miniature.adapters()["alignment"])
    lora.facts |= {
        "command": "python secret.py",
        "hyperparameters": {"init": "/home/me/x", "files": ["/home/me/y", "z"]},
    }
    write_lora(tmp_path / "in" / "a.safetensors", lora)
    made = prepare("a/b", "miniature", tmp_path / "out", {"alignment": tmp_path / "in" / "a.safetensors"})
    facts = read_metadata(made.folder / "adapters" / "alignment")
    assert facts["hyperparameters"] == {"files": ["z"]} and "secret" not in json.dumps(facts)
    assert "/home/me" not in (made.folder / "README.md").read_text()
    assert facts["sha256_source"] == file_digest(tmp_path / "in")


class Hub:
    """What ``push`` calls of ``HfApi``."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))

    def upload_folder(self, **options: Any) -> Any:
        self.calls.append(("upload_folder", options))
        return SimpleNamespace(commit_url="https://hub/commit/1")


def test_a_push_sends_the_prepared_files_alone(tmp_path: Path) -> None:
    made = prepare("someone/shapes", "miniature", tmp_path, {"alignment": miniature.adapters()["alignment"]})
    (tmp_path / "notes.txt").write_text("mine")
    hub = Hub()
    assert push(made, api=hub) == "https://hub/commit/1"
    (_, created), (_, sent) = hub.calls
    assert created == {"repo_id": "someone/shapes", "private": True, "repo_type": "model", "exist_ok": True}
    assert set(sent["allow_patterns"]) == {"README.md", "adapters/alignment/pytorch_lora_weights.safetensors"}
    # the calls are those of the true interface
    import inspect

    from huggingface_hub import HfApi

    inspect.signature(HfApi.create_repo).bind(None, **created)
    inspect.signature(HfApi.upload_folder).bind(None, **sent)


def test_bad_requests_are_refused_in_a_sentence(tmp_path: Path) -> None:
    adapters = miniature.adapters()
    with pytest.raises(ValueError, match="repo must be USER/NAME"):
        prepare("shapes", "miniature", tmp_path / "x", adapters)
    with pytest.raises(ValueError, match="base must be USER/NAME on the hub or miniature"):
        prepare("a/b", "/models/sd15", tmp_path / "x", adapters)
    with pytest.raises(ValueError, match="nothing to share"):
        prepare("a/b", "miniature", tmp_path / "x")
    preset = Preset(weights={"alignment": 0.5, "aesthetic": 0.5}).write(tmp_path / "p.yaml")
    with pytest.raises(ValueError, match="weighs 'aesthetic', which is not among the adapters to share"):
        prepare("a/b", "miniature", tmp_path / "x", {"alignment": adapters["alignment"]}, preset=preset)
    with pytest.raises(FileNotFoundError, match="is no picture"):
        prepare("a/b", "miniature", tmp_path / "x", adapters, pictures=[preset])
    with pytest.raises(SystemExit, match="does not exist"):
        main(["push", "a/b", "--base", "miniature", "--adapters", "a=/nowhere", "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
