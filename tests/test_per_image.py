"""Batches of different blends: each image is the one it is alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dblightning import miniature
from dblightning.blending import DBKLA, DBMPA, DBMPALS, Base, RewardedSoup, RewardedSoupFactors, Single
from dblightning.per_image import PerImage
from dblightning.preset import Preset
from dblightning.shared_pipeline import Job, SharedPipeline

NAMES = ["a", "b", "c"]


def test_each_images_rows_are_its_own_and_the_rest_is_not_computed() -> None:
    blends = [Base(), DBKLA("b", 1.5), DBMPA({"a": 0.25, "c": 0.75}), RewardedSoup({"a": 0.5, "b": 0.5})]
    step = PerImage(blends).start(NAMES, 4, 10)(3)
    for image, blend in enumerate(blends):
        alone = blend.start(NAMES, 1, 10)(3)
        used = step.mix[:, image] != 0
        expected = alone.mix[:, 0] != 0
        assert torch.equal(step.gates[used, image], alone.gates[expected, 0])
        assert torch.equal(step.mix[used, image], alone.mix[expected, 0])
    assert torch.allclose(step.mix.sum(0), torch.ones(4, dtype=torch.float64))


def test_draws_are_those_of_the_images_own_generator() -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    plan = PerImage([Single("a"), DBMPALS({"a": 0.5, "b": 0.5})]).start(NAMES, 2, 30, generators)
    alone = DBMPALS({"a": 0.5, "b": 0.5}).start(NAMES, 1, 30, [torch.Generator().manual_seed(2)])
    for step in range(30):
        assert torch.equal(plan(step).gates[0, 1], alone(step).gates[0, 0])


def test_what_cannot_share_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="2 blends for 3 images"):
        PerImage([Base(), Base()]).start(NAMES, 3, 5)
    with pytest.raises(ValueError, match="batch of their own"):
        PerImage([Base(), RewardedSoupFactors({"a": 1.0})]).start(NAMES, 2, 5)(0)
    assert PerImage([Base(), DBMPALS({"a": 1.0})]).needs_noise
    assert not PerImage([Base()]).needs_noise


@pytest.fixture(scope="module")
def shared() -> SharedPipeline:
    # of one rank, which averaging factors needs
    return SharedPipeline.load(adapters=miniature.adapters("0.1"), device="cpu")


def preset(**changes: Any) -> Preset:
    given = {
        "weights": {"alignment": 0.5, "aesthetic": 0.5},
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "seed": 1,
    }
    return Preset(**given | changes)


MIXED = [
    Job("A red circle.", preset()),
    Job("A blue square.", preset(weights={"alignment": 0.2, "aesthetic": 0.8}, kl_scale=1.5, seed=2)),
    Job("A green ring.", preset(method="base", weights=None, seed=3)),
    Job("A red star.", preset(method="single", weights={"compressibility": 1.0}, seed=4)),
    Job("A red star.", preset(method="rewarded-soup", seed=5)),
    Job("A red star.", preset(method="rewarded-soup-factors", seed=5)),
    Job("A green ring.", preset(method="db-mpa-ls", seed=6)),
    Job("A blue cross.", preset(method="db-mpa-ls", seed=7, kl_scale=0.5)),
    Job("A red circle.", preset(weights=[{"alignment": 1.0}, {"aesthetic": 1.0}], seed=8)),
    Job("A red circle.", preset(num_inference_steps=6), negative_prompt="A blue square."),
    Job("A red circle.", preset(), negative_prompt="A blue square."),
    Job("A red circle.", preset(eta=1.0, kl_scale=0.0)),
]


def test_every_image_of_a_mixed_batch_equals_the_one_made_alone(shared: SharedPipeline) -> None:
    together = shared.make(MIXED)
    for job, image in zip(MIXED, together, strict=True):
        # 1e-4: a gated row and merged weights add up in another order
        assert torch.allclose(image, shared.make([job])[0], atol=1e-4), job


def test_jobs_of_equal_settings_share_one_call_whatever_their_preference(shared: SharedPipeline) -> None:
    groups = [sorted(each) for each in shared.groups(MIXED).values()]
    assert [0, 1, 2, 3, 4, 8, 10] in groups
    assert [6, 7] in groups  # steps with noise


def test_an_image_is_the_pipelines_own(shared: SharedPipeline) -> None:
    for job in (MIXED[0], MIXED[1], MIXED[7]):
        expected = shared.pipe(job.prompt, **job.preset.call(), output_type="pt").images[0]
        assert torch.allclose(shared.make([job])[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("job", "sentence"),
    [
        (Job(" ", preset()), "prompt is empty"),
        (Job("A red circle.", preset(weights={"nobody": 1.0})), "nobody"),
        (Job("A red circle.", preset(method="magic")), "method must be one of"),
        (Job("A red circle.", preset(method="base")), "has no weights"),
        (Job("A red circle.", preset(seed=None)), "seed"),
    ],
)
def test_a_job_that_cannot_be_made_is_refused_before_the_others_run(
    shared: SharedPipeline, job: Job, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        shared.make([MIXED[0], job])


def test_threads_get_the_images_of_one_thread(shared: SharedPipeline) -> None:
    from concurrent.futures import ThreadPoolExecutor

    expected = [shared.make([job])[0] for job in MIXED[:6]]
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda job: shared.make([job])[0], MIXED[:6]))
    assert all(torch.equal(one, other) for one, other in zip(made, expected, strict=True))
