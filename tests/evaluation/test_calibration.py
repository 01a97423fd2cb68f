from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from dblightning import DiffusionBlendPipeline, miniature
from dblightning.adapters import annotate, read_metadata
from dblightning.cli import main
from dblightning.evaluation.calibration import calibrate, peak, write_strength
from tests.evaluation.synthetic import blend, score_table

PROMPTS = 60
#: E[r](λ) = 2λ·SLOPE and KL(λ) = λ²·SLOPE/ALPHA, as in a Gaussian world: an adapter at αᵢ = ALPHA has λ* = 1 there
SLOPE, ALPHA = 0.5, 0.1


def scores(scales: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0), noise: float = 0.05) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    own = rng.normal(0, noise, (PROMPTS, 1))
    blends: list[Any] = [(blend("base"), {"a": own, "b": -own})]
    for scale in scales:
        settings = blend("single", {"a": 1.0}) if scale == 1 else blend("db-kla", {"a": 1.0}, kl_scale=scale)
        reward = own + 2 * scale * SLOPE + rng.normal(0, noise, (PROMPTS, 1))
        blends.append((settings, {"a": reward, "b": -reward}))
    frame = score_table(blends, PROMPTS)
    scale_of = frame["kl_scale"].where(frame["method"] != "base", 0.0).astype(float)
    return frame.assign(kl=scale_of**2 * SLOPE / ALPHA)


@pytest.mark.parametrize("alpha", [0.1, 0.08, 0.2])
def test_the_strength_is_the_ratio_of_the_alphas_where_the_reward_is_linear(alpha: float) -> None:
    found = calibrate(scores(), "a", alpha)
    assert found.strength == pytest.approx(ALPHA / alpha, rel=0.05)  # noise of 60 prompts
    assert found.low < ALPHA / alpha < found.high
    assert found.calibrated == (alpha == ALPHA)
    assert ("calibrated" in found.sentence) == (alpha == ALPHA)
    of_two = calibrate(scores(), "a", alpha / 2, {"a": 0.75, "b": 0.25})  # r = ½ a
    assert of_two.strength == pytest.approx(found.strength, rel=1e-6)


def test_a_strength_beyond_those_tried_says_so() -> None:
    found = calibrate(scores(), "a", ALPHA / 10)
    assert found.strength == 2.0 and "go on to larger ones" in found.sentence


def test_the_peak_is_a_parabolas_vertex_on_uneven_points() -> None:
    scales = np.array([0.0, 0.3, 1.0, 2.5])
    for top in (0.4, 0.9, 1.7):
        assert peak(scales, -((scales - top) ** 2)[None])[0] == pytest.approx(top)


def test_what_cannot_be_calibrated_is_refused() -> None:
    for frame, arguments, message in (
        (scores().drop(columns="kl"), ("a", 0.1), "no path KL"),
        (scores(), ("a", 0.0), "alpha must be > 0"),
        (scores(), ("a", 0.1, {"c": 1.0}), "'c' was not measured"),
        (scores((1.0,)), ("a", 0.1), r"two λ's or more, and the scores have λ = \[0.0, 1.0\]"),
        (scores(), ("b", 0.1), r"the scores have λ = \[0.0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(frame, *arguments)


def test_the_command_keeps_it_in_the_adapter_whose_blends_then_run_at_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = miniature.adapters("0.1")["aesthetic"]
    copy = tmp_path / "aesthetic"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    scores().to_parquet(tmp_path / "scores.parquet")
    main(["calibrate", str(tmp_path / "scores.parquet"), "--adapter", "a", "--alpha", "0.2", "--write", str(copy)])
    assert "a at α = 0.2: λ* = 0.5" in capsys.readouterr().out
    kept = read_metadata(copy)
    assert kept["calibration"]["strength"] == pytest.approx(0.5, rel=0.05)
    assert {name: value for name, value in kept.items() if name != "calibration"} == read_metadata(source)
    adapters = {"aesthetic": copy, "alignment": miniature.adapters("0.1")["alignment"]}
    pipe = DiffusionBlendPipeline.from_pretrained("miniature", adapters=adapters)
    pipe.set_progress_bar_config(disable=True)

    def image(**options: Any) -> torch.Tensor:
        generator, weights = torch.Generator().manual_seed(0), {"aesthetic": 0.6, "alignment": 0.4}
        return pipe(
            "A red circle.", num_inference_steps=3, weights=weights, generator=generator, output_type="pt", **options
        ).images

    by_hand = image(method_options={"strengths": {"aesthetic": kept["calibration"]["strength"]}})
    assert torch.equal(image(calibrate=True), by_hand)
    assert (image() - by_hand).abs().max() > 0.01


def test_strengths_that_nobody_wrote_are_not_made_up(tmp_path: Path) -> None:
    pipe = DiffusionBlendPipeline.from_pretrained("miniature", adapters=miniature.adapters("0.1"))
    with pytest.raises(ValueError, match="none of .* has one; python -m dblightning calibrate --write"):
        pipe("A red circle.", weights={"aesthetic": 1.0}, calibrate=True)
    with pytest.raises(FileNotFoundError):
        annotate(tmp_path, note=1)
    with pytest.raises(FileNotFoundError):
        write_strength(tmp_path, calibrate(scores(), "a", math.pi))
