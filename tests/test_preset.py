"""Presets: YAML in and out, w(t) through knots, what cannot be, and the pipeline's images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dblightning.preset import Preset, interpolated

FULL = Preset(
    weights={"alignment": 0.25, "aesthetic": 0.75},
    kl_scale=1.5,
    method="db-mpa",
    num_inference_steps=7,
    guidance_scale=3.0,
    eta=0.5,
    seed=11,
    base="miniature",
    adapters={"alignment": "a", "aesthetic": "b"},
    note="tried by hand",
)


@pytest.mark.parametrize(
    "preset",
    [Preset(), FULL, Preset(weights=[{"a": 1}, {"a": 0.5, "b": 0.5}]), Preset(method_options={"candidates": 4})],
)
def test_yaml_out_and_in_is_the_same_preset(preset: Preset) -> None:
    assert Preset.from_yaml(preset.to_yaml()) == preset


def test_what_is_left_out_has_its_default_and_is_not_written() -> None:
    assert Preset.from_yaml("weights: {a: 1}") == Preset(weights={"a": 1.0})
    assert set(Preset().to_dict()) == {"kl_scale", "method", "num_inference_steps", "base"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("weights: {a: 0.5}", "sum to 1"),
        ("weights: {a: -1, b: 2}", ">= 0"),
        ("weights: [0.5, 0.5]", "each knot"),
        ("weights: {}", "empty"),
        ("weights: {c: 1}\nadapters: {a: x}", "weights name 'c'"),
        ("kl_scale: -1", "kl_scale"),
        ("kl_scale: strong", "kl_scale must be a number"),
        ("num_inference_steps: 0", "num_inference_steps"),
        ("num_inference_steps: 2.5", "num_inference_steps"),
        ("eta: 2", "eta"),
        ("guidance_scale: .nan", "guidance_scale"),
        ("seed: -1", "seed"),
        ("steps: 4", "no key 'steps'"),
        ("- a", "must be a mapping"),
        ("a: [", "not YAML"),
        ("method:", "method"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        Preset.from_yaml(text)
    assert "\n" not in str(error.value)


def test_a_file_names_adapters_that_lie_beside_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = FULL.write(tmp_path / "preset.yaml")
    assert Preset.read(path).adapters == {"alignment": str(tmp_path / "a"), "aesthetic": "b"}
    with pytest.raises(FileNotFoundError, match="no preset file"):
        Preset.read(tmp_path / "none.yaml")


def test_knots_are_met_at_both_ends_and_every_step_sums_to_one() -> None:
    knots = [{"a": 0.2, "b": 0.8}, {"a": 1.0}, {"b": 0.5, "c": 0.5}]
    schedule = interpolated(knots)
    steps = [schedule(step, 9) for step in range(9)]
    assert steps[0] == {"a": 0.2, "b": 0.8, "c": 0.0}
    assert steps[4] == {"a": 1.0, "b": 0.0, "c": 0.0}
    assert steps[8] == {"a": 0.0, "b": 0.5, "c": 0.5}
    assert all(sum(each.values()) == pytest.approx(1, abs=1e-12) for each in steps)
    assert schedule(0, 1) == steps[0]  # one step is the first


def test_the_pipelines_image_of_a_preset_is_that_of_its_values() -> None:
    preset = Preset(weights={"alignment": 0.3, "aesthetic": 0.7}, kl_scale=1.2, num_inference_steps=3, seed=5)
    pipe = preset.pipeline()
    pipe.set_progress_bar_config(disable=True)
    made = pipe("A red circle.", **preset.call(), output_type="pt").images
    expected = pipe(
        "A red circle.",
        weights={"alignment": 0.3, "aesthetic": 0.7},
        kl_scale=1.2,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images
    assert torch.equal(made, expected)
    # knots that are all the same are that weight
    same = preset.replaced(weights=[preset.weights, preset.weights])
    assert torch.allclose(pipe("A red circle.", **same.call(), output_type="pt").images, expected, atol=1e-6)
    other = preset.replaced(weights=[{"alignment": 1.0}, {"aesthetic": 1.0}])
    assert not torch.allclose(pipe("A red circle.", **other.call(), output_type="pt").images, expected, atol=1e-2)
