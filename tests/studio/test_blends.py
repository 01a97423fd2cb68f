"""What the studio shows, without the page and without the extra."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from dblightning.arguments import studio_parser
from dblightning.cli import main
from dblightning.miniature.rewards import ShapeAesthetic
from dblightning.preset import Preset
from dblightning.studio.blends import Blends, places, read_prompts
from dblightning.studio.command import make_studio, password
from dblightning.studio.take_away import diffusers_lines, merged_lora

PROMPTS = ["A red circle.", "A blue square."]
PRESET = Preset(weights={"alignment": 0.3, "aesthetic": 0.7}, num_inference_steps=6, guidance_scale=3.0, seed=4)


def test_a_look_is_the_pipelines_images_beside_the_bases_from_the_same_noise(blends: Blends) -> None:
    look = blends.look(PROMPTS, PRESET)
    pipe = blends.shared.pipe
    expected = pipe(PROMPTS, **PRESET.call(2), output_type="pt").images
    assert torch.allclose(torch.stack(look.images), expected, atol=1e-4)
    noise = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    base = pipe(
        PROMPTS, method="base", num_inference_steps=6, guidance_scale=3.0, generator=noise, output_type="pt"
    ).images
    assert torch.allclose(torch.stack(look.base), base, atol=1e-4)
    assert look.scores["aesthetic"] == pytest.approx(ShapeAesthetic().score(expected, PROMPTS).tolist(), abs=1e-3)
    assert set(look.scores) == set(look.base_scores) == {"aesthetic", "alignment", "compressibility"}
    assert look.notes == []


def test_the_bases_images_are_made_once(blends: Blends) -> None:
    counted: list[int] = []
    make = blends.shared.make

    def counting(jobs: Any) -> Any:
        counted.append(len(jobs))
        return make(jobs)

    with contextlib.ExitStack() as stack:
        blends.shared.make = counting  # type: ignore[method-assign]
        stack.callback(lambda: blends.shared.__dict__.pop("make"))
        for w in (0.1, 0.2, 0.3):
            blends.look(["A green ring."], PRESET.replaced(weights={"alignment": w, "aesthetic": 1 - w}, seed=77))
    assert counted == [2, 1, 1]


def test_a_prompt_that_a_reward_cannot_score_is_a_note_and_the_image_is_made(blends: Blends) -> None:
    look = blends.look(["A sentence about nothing."], PRESET)
    assert len(look.images) == 1
    assert "alignment" not in look.scores and "aesthetic" in look.scores
    assert len(look.notes) == 1 and look.notes[0].startswith("alignment has no score here")


def test_a_survey_visits_the_places_with_the_looks_own_images(blends: Blends) -> None:
    marks = blends.survey(PROMPTS, PRESET, ["alignment", "aesthetic"])
    assert [mark.weights["alignment"] for mark in marks] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for mark in marks[::2]:
        look = blends.look(PROMPTS, PRESET.replaced(weights=mark.weights))
        assert torch.allclose(mark.image, look.images[0], atol=1e-4)
        assert mark.scores["aesthetic"] == pytest.approx(sum(look.scores["aesthetic"]) / 2, abs=1e-3)


def test_every_places_weights_sum_to_one() -> None:
    for names in (["a"], ["a", "b"], ["a", "b", "c"], list("abcd")):
        assert all(sum(place.values()) == pytest.approx(1) for place in places(names))


def test_prompts_are_read_line_by_line_and_refused_in_one_sentence() -> None:
    assert read_prompts(" A red circle. \n\nA blue square.") == PROMPTS
    for text, sentence in (("", "empty"), (" \n ", "empty"), ("a\n" * 9, "at most 8"), ("a" * 501, "at most 500")):
        with pytest.raises(ValueError, match=sentence):
            read_prompts(text)


def test_a_moved_slider_costs_the_blends_rows_alone(blends: Blends) -> None:
    preset = PRESET.replaced(num_inference_steps=20)
    blends.look(["A red circle."], preset)
    backbone = blends.shared.pipe.backbone
    backbone.rows_run = 0
    blends.look(["A red circle."], preset.replaced(weights={"alignment": 0.2, "aesthetic": 0.8}))
    assert backbone.rows_run == 20 * 2  # two adapters at each step; what that takes: benchmarks/studio.py


def test_the_three_lines_and_the_merged_lora_make_the_soups_image_in_plain_diffusers(
    blends: Blends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = PRESET.replaced(kl_scale=1.4)
    file = merged_lora(blends.shared, preset, tmp_path)
    monkeypatch.chdir(file.parent)
    lines = diffusers_lines(blends.shared.pipe, preset, PROMPTS[0])
    assert len([line for line in lines.splitlines() if line and "import" not in line]) == 3
    made: dict[str, Any] = {}
    exec(lines.replace("generator=", "output_type='pt', generator="), made)
    # the soup with λ: W + λ Σ wᵢ ΔWᵢ
    pipe = blends.shared.pipe
    with blends.shared.alone():
        pipe.set_adapters(["alignment", "aesthetic"], [1.4 * 0.3, 1.4 * 0.7])
        expected = pipe(
            PROMPTS[0],
            num_inference_steps=6,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(4),
            output_type="pt",
        ).images[0]
        pipe.disable_lora()
    image = made["image"]
    assert torch.allclose(torch.as_tensor(image), expected, atol=1e-4)
    plain = blends.look(PROMPTS[:1], preset).base[0]
    assert not torch.allclose(expected, plain, atol=5e-2)  # the adapters do something


def test_what_is_no_single_lora_is_refused(blends: Blends, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapter"):
        merged_lora(blends.shared, PRESET.replaced(weights=None, method="base"), tmp_path)
    with pytest.raises(ValueError, match="change over the steps"):
        merged_lora(blends.shared, PRESET.replaced(weights=[{"alignment": 1.0}, {"aesthetic": 1.0}]), tmp_path)


def test_beyond_this_machine_the_page_has_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DBLIGHTNING_TOKEN", raising=False)
    assert password(studio_parser().parse_args([])) is None
    assert password(studio_parser().parse_args(["--host", "0.0.0.0", "--no-token"])) is None
    with pytest.raises(ValueError, match="needs a password"):
        password(studio_parser().parse_args(["--host", "0.0.0.0"]))
    monkeypatch.setenv("DBLIGHTNING_TOKEN", "secret")
    assert password(studio_parser().parse_args(["--host", "0.0.0.0"])) == ("studio", "secret")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--scores", "/nowhere.parquet"], "--scores"),
        (["--reward", "x=nothing"], "unknown reward"),
        (["--adapter", "x=/nowhere/at/all"], "no file or folder"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises((ValueError, OSError), match=sentence):
        make_studio(studio_parser().parse_args(arguments))


def test_without_the_extra_the_command_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "dblightning.studio.page", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'dblightning\[studio\]'"):
        main(["studio"])
