"""The column of the path KL: against a sum of exact Gaussian KLs of means that are recovered from the latents alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dblightning.backbone import DiffusersBackbone
from dblightning.evaluation import BlendSpec
from dblightning.evaluation.module import BlendEvaluationModule
from dblightning.evaluation.sampler import BlendSampler
from dblightning.evaluation.scores import read_scores
from dblightning.noise import ImageNoise
from dblightning.sampling import StepRecord
from tests.conftest import randomize
from tests.evaluation.test_module import adapters, run  # noqa: F401 (a fixture)
from tests.toy_rewards import Brightness, Redness

STEPS, GUIDANCE = 4, 2.0
BATCH: dict[str, Any] = {
    "prompt": ["a red circle", "a blue star"], "prompt_id": torch.tensor([3, 5]), "seed": torch.tensor([0, 1]),
}  # fmt: skip
BOTH = {"a": 0.3, "b": 0.7}


def sampler(folder: Path, kl: bool = True, eta: float = 1.0) -> BlendSampler:
    backbone = DiffusersBackbone(str(folder))
    for seed, name in enumerate(("a", "b")):
        backbone.adapters.add(name, seed=seed)
        randomize(backbone.adapters, name, seed)
    return BlendSampler(backbone, {"a": Brightness(), "b": Redness()}, STEPS, eta, GUIDANCE, None, 7, kl=kl)


def ddim(alpha: Tensor, before: Tensor, epsilon: Tensor, x: Tensor) -> Normal:
    """DDIM's step at η = 1 from ᾱ = ``alpha`` to ᾱ = ``before``, eqs. (12) and (16) of Song et al. 2021, in float64."""
    x0 = (x - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()
    variance = (1 - before) / (1 - alpha) * (1 - alpha / before)
    mean = before.sqrt() * x0 + (1 - before - variance).sqrt() * epsilon
    return Normal(mean, variance.sqrt().expand_as(mean))


def path_kl(
    found: BlendSampler, spec: BlendSpec, base_step: Callable[[int, StepRecord], Normal], count: int = STEPS
) -> Tensor:
    """Path KL of BATCH's images from their latents and the noise that was drawn, (B,), float64.

    Args:
        base_step: step index and step → the base model's distribution of its next latents.
        count: the first steps, which have noise.
    """
    steps: list[StepRecord] = []
    found.generate(BATCH, spec, steps.append)
    assert len(steps) == STEPS
    noise = ImageNoise.of(7, BATCH["prompt_id"].tolist(), BATCH["seed"].tolist(), stream="evaluation")
    noise((4, 8, 8))  # the first latents
    total = torch.zeros(2, dtype=torch.float64)
    for index, step in enumerate(steps[:count]):
        base = base_step(index, step)
        mean = step.next_latents.double() - base.stddev * noise((4, 8, 8)).double()
        total += kl_divergence(Normal(mean, base.stddev), base).flatten(1).sum(1)
    return total


def from_latents(found: BlendSampler, spec: BlendSpec) -> Tensor:
    """:func:`path_kl` with the plain UNet's steps, (B,)."""
    scheduler = DDIMScheduler.from_config(found.backbone.scheduler_config)
    scheduler.set_timesteps(STEPS)
    alphas = scheduler.alphas_cumprod.double()
    backbone: Any = found.backbone
    conditioning = backbone.encode(BATCH["prompt"])

    def base_step(index: int, step: StepRecord) -> Normal:
        timestep = int(scheduler.timesteps[index])
        earlier = timestep - 1000 // STEPS
        before = alphas[earlier] if earlier >= 0 else scheduler.final_alpha_cumprod.double()
        with torch.no_grad():
            epsilon = backbone.denoise(step.latents, torch.full((2,), timestep), conditioning, GUIDANCE).double()
        return ddim(alphas[timestep], before, epsilon, step.latents.double())

    return path_kl(found, spec, base_step)


SPECS = [
    BlendSpec("single", {"a": 1.0}),
    BlendSpec("db-mpa", BOTH),
    BlendSpec("db-mpa", BOTH, kl_scale=2.0),
    BlendSpec("db-kla", {"b": 1.0}, kl_scale=0.5),
    BlendSpec("db-mpa-ls", BOTH, ls_schedule="iid"),
    BlendSpec("db-mpa-ls", BOTH, ls_schedule="rotation"),
    BlendSpec("db-mpa-ls", BOTH, kl_scale=0.5, ls_schedule="rotation"),
    BlendSpec("db-mpa-ls", BOTH, kl_scale=1.5, ls_schedule="iid"),
    BlendSpec("rewarded-soup", BOTH),
    BlendSpec("rewarded-soup-factors", BOTH),
    BlendSpec("morl", BOTH, adapter="b"),
    BlendSpec("rgg", BOTH, options={"kl_weight": 1e-3, "gamma": 0.5}),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_the_column_is_the_sum_of_exact_kls_along_the_path(sd15_folder: Path, spec: BlendSpec) -> None:
    found = sampler(sd15_folder)
    rows = found.score(BATCH, spec).rows
    kl = torch.tensor([row["kl"] for row in rows], dtype=torch.float64)
    assert (kl > 1e-2).all() and kl[0] != kl[1]
    # means that are latents less noise carry float32's rounding, 1e-7 of some 1, against differences of 0.1
    torch.testing.assert_close(kl, from_latents(found, spec), rtol=1e-5, atol=1e-5)


def cps(sigma: Tensor, following: Tensor, eta: float, velocity: Tensor, x: Tensor) -> Normal:
    """CPS from σ to σ', 2509.05952: mean (1−σ') x̂₀ + √(σ'² − s²) ε̂ and standard deviation s = σ' sin(ηπ/2)."""
    std = following * math.sin(eta * math.pi / 2)
    mean = (1 - following) * (x - sigma * velocity) + (following**2 - std**2).sqrt() * (x + (1 - sigma) * velocity)
    return Normal(mean, std.expand_as(mean))


@pytest.mark.parametrize("eta", [0.8, 1.0])
def test_on_a_flow_the_path_ends_before_the_step_without_noise(sd3_folder: Path, eta: float) -> None:
    found = sampler(sd3_folder, eta=eta)
    spec = BlendSpec("db-mpa", BOTH)
    found.check([spec])
    rows = found.score(BATCH, spec).rows
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(found.backbone.scheduler_config)
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.double()
    conditioning = found.backbone.encode(BATCH["prompt"])

    def base_step(index: int, step: StepRecord) -> Normal:
        with torch.no_grad():
            times = scheduler.timesteps[index].expand(2)
            velocity = found.backbone.denoise(step.latents, times, conditioning, GUIDANCE).double()
        return cps(sigmas[index], sigmas[index + 1], eta, velocity, step.latents.double())

    total = path_kl(found, spec, base_step, STEPS - 1)
    kl = torch.tensor([row["kl"] for row in rows], dtype=torch.float64)
    assert (kl > 1e-3).all() and kl[0] != kl[1]
    # means that are latents less noise carry float32's rounding
    torch.testing.assert_close(kl, total, rtol=1e-4, atol=1e-5)


def test_the_base_has_none_and_a_search_no_known_one(sd15_folder: Path) -> None:
    found = sampler(sd15_folder)
    assert [row["kl"] for row in found.score(BATCH, BlendSpec("base")).rows] == [0.0, 0.0]
    for method in ("code", "best-of-n"):
        spec = BlendSpec(method, BOTH, options={"candidates": 2})
        assert all(math.isnan(row["kl"]) for row in found.score(BATCH, spec).rows)
        assert "chooses among" in str(found.no_kl(spec))


def test_measuring_changes_neither_images_nor_what_a_method_costs(sd15_folder: Path) -> None:
    for spec in (BlendSpec("db-mpa", BOTH), BlendSpec("rgg", BOTH)):
        with_kl, without = (sampler(sd15_folder, kl).score(BATCH, spec) for kl in (True, False))
        assert torch.equal(with_kl.images, without.images)
        one, other = with_kl.rows[0], without.rows[0]
        assert "kl" not in other and one["denoiser_rows"] == other["denoiser_rows"]
        assert {name: one[name] for name in ("reward/a", "reward/b")} == {
            name: other[name] for name in ("reward/a", "reward/b")
        }


def test_it_costs_one_row_per_step_and_nothing_where_the_method_runs_the_base(sd15_folder: Path) -> None:
    found = sampler(sd15_folder)
    for spec, rows in ((BlendSpec("db-mpa", BOTH), 2 + 1), (BlendSpec("base"), 1), (BlendSpec("rgg", BOTH), 1)):
        found.score(BATCH, spec)
        assert found.backbone.rows_run == rows * STEPS * 2


def test_steps_without_noise_are_refused(sd15_folder: Path) -> None:
    with pytest.raises(ValueError, match="kl needs noise in every step, and step 1 of 4 has none"):
        sampler(sd15_folder, eta=0.0).check([BlendSpec("base")])
    sampler(sd15_folder, kl=False, eta=0.0).check([BlendSpec("base")])


def test_a_later_run_adds_the_column_to_rows_that_lack_it(
    sd15_folder: Path,
    tmp_path: Path,
    adapters: dict[str, str],  # noqa: F811
) -> None:
    def evaluated(kl: bool) -> pd.DataFrame:
        settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "out": str(tmp_path / "out")}
        blends = [BlendSpec("base"), BlendSpec("db-mpa", {"size": 0.5, "other": 0.5}), BlendSpec("code", {"size": 1.0})]
        blends[2].options = {"candidates": 2}
        backbone, rewards = DiffusersBackbone(str(sd15_folder)), {"size": Brightness(), "other": Redness()}
        return run(BlendEvaluationModule(backbone, blends, None, adapters, rewards, kl=kl, **settings), tmp_path)  # type: ignore[arg-type]

    before = evaluated(False)
    assert "kl" not in before and "kl" not in read_scores(tmp_path / "out" / "scores.parquet")[0]
    after = evaluated(True)
    same = [name for name in before if name not in ("seconds",)]
    pd.testing.assert_frame_equal(after[same], before[same])
    by = after.groupby("method")["kl"]
    assert by.get_group("base").eq(0).all() and by.get_group("db-mpa").gt(0).all() and by.get_group("code").isna().all()
    record = read_scores(tmp_path / "out" / "scores.parquet")[1]["kl"]
    assert list(record["none"]) == [blend for blend in after["blend"].unique() if blend.startswith("code")]
    assert np.isfinite(pd.read_csv(tmp_path / "out" / "summary.csv").set_index("method").loc["db-mpa", "kl_hi"])
    assert json.loads(json.dumps(record)) == record
    page = (tmp_path / "out" / "report.html").read_text()
    assert "No path KL of CoDe" in page
    rows = len((tmp_path / "out" / "rows").joinpath("00000-001.jsonl").read_text().splitlines())
    assert rows == len(after)
    evaluated(True)
    assert not (tmp_path / "out" / "rows" / "00000-002.jsonl").read_text()
