"""DB-MPA for fewer rows: which rows run when, and runs that keep outputs; test_sampling.py holds them to diffusers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dblightning import DiffusionBlendPipeline, few_rows, miniature
from dblightning.backbone import DiffusersBackbone
from dblightning.blending import DBMPA, Base, BlendStep, PartialStep, make_blend, resolve_blend
from dblightning.data import MiniatureDataModule
from dblightning.evaluation.sampler import BlendSampler
from dblightning.evaluation.specs import BlendSpec
from dblightning.noise import ImageNoise
from dblightning.per_image import PerImage
from dblightning.sampling import Change, StepRecord, denoise_loop
from dblightning.search import BestOfN
from dblightning.solvers import make_solver, solver_of

NAMES = ["aesthetic", "alignment", "compressibility"]
PROMPTS = ["A red colored circle.", "A blue colored star."]
HALVES = {"alignment": 0.5, "aesthetic": 0.5}
STEPS = 8
#: of eight steps the first three compute every row
FEW = {"full_share": 0.4}


@pytest.fixture(scope="module", params=["miniature", "miniature-flow"])
def backbone(request: pytest.FixtureRequest) -> DiffusersBackbone:
    """A base that predicts noise, and one that predicts velocities."""
    return loaded(request.param)


def loaded(base: str) -> DiffusersBackbone:
    made = DiffusersBackbone(base)
    for name, folder in miniature.EMBEDDED[base].adapters().items():
        made.adapters.load(name, folder, made.pipeline)
    assert made.adapters.names == NAMES
    return made


def run(backbone: DiffusersBackbone, blend: Any, seeds: tuple[int, ...] = (0, 1), **options: Any) -> Tensor:
    conditioning = backbone.encode([PROMPTS[seed] for seed in seeds])
    solver = solver_of(backbone, STEPS, 1.0)
    with torch.no_grad():
        return denoise_loop(
            backbone, conditioning, solver, blend, ImageNoise(list(seeds)), guidance_scale=3.0, **options
        )


@torch.no_grad()
def by_hand(backbone: DiffusersBackbone, seed: int, mix: list[float], full: str, turns: str) -> Tensor:
    """One image: rows are the base and the three adapters; '1' in ``full`` computes all, else the turn's digit."""
    conditioning, noise = backbone.encode([PROMPTS[seed]]), ImageNoise([seed])
    solver, turn = solver_of(backbone, STEPS, 1.0), iter(turns)
    x = solver.initial(noise(backbone.latent_shape))
    gates, kept = torch.cat([torch.zeros(1, 3), torch.eye(3)]), torch.zeros(4, *x.shape)
    for step in range(STEPS):

        def row(index: int, step: int = step, x: Tensor = x) -> Tensor:
            timesteps = solver.timesteps[step].expand(1)
            return backbone.denoise(solver.scale(x, step), timesteps, conditioning, 3.0, gates[index : index + 1])

        if full[step] == "1":
            kept = torch.stack([row(index) for index in range(4)])
            output = sum(c * each for c, each in zip(mix, kept, strict=True))
        else:
            one = int(next(turn))
            output = row(one) + sum(c * (each - kept[one]) for c, each in zip(mix, kept, strict=True))
        x = solver.step(output, x, step, noise)
    return x


def test_the_full_steps_are_the_first_share() -> None:
    def digits(*given: Any) -> str:
        return "".join(str(int(each)) for each in few_rows.full_steps(*given))

    assert digits(20, 0.25) == "11111000000000000000"
    assert digits(8, 0.4) == "11100000"
    assert digits(8, 0.0) == "10000000"  # the differences must come from somewhere
    assert digits(4, 1.0) == "1111"


@pytest.mark.parametrize("weights", [{"a": 0.5, "b": 0.5}, {"a": 0.2, "b": 0.5, "c": 0.3}, {"b": 1.0}])
@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0, 2.5])
def test_what_is_computed_and_what_is_kept_add_up_to_db_mpa(weights: dict[str, float], scale: float) -> None:
    names = ["a", "b", "c"]
    plan, exact = (DBMPA(weights, scale, **each).start(names, 2, 20) for each in (FEW, {}))
    for step in range(20):
        got, want = plan(step), exact(step)
        assert isinstance(got, PartialStep) and isinstance(want, BlendStep)
        assert torch.equal(got.gates, want.gates) and torch.equal(got.mix, want.mix)
        torch.testing.assert_close(got.now.sum(0), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)
        full = step < 8
        assert torch.equal(got.now, got.mix) if full else sorted(got.now[:, 0].tolist()) == [0, 0, 0, 1]
        assert (got.now[got.mix <= 0] == 0).all() or full  # the turn is never a row that the mix leaves out


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.3, 0.7], [0.2, 0.3, 0.5], [0.25] * 4])
def test_each_row_has_its_share_of_the_turns(shares: list[float]) -> None:
    mixes = torch.tensor(shares, dtype=torch.float64)[None, :, None].expand(60, -1, 1)
    full = few_rows.full_steps(60, 0.25)
    cheap = few_rows.in_turn(mixes, [f"r{index}" for index in range(len(shares))], full)[~full]
    # the bound of draws in rotation: within 1 + log₂ of the number of rows
    assert (cheap.sum(0)[:, 0] - len(cheap) * mixes[0, :, 0]).abs().max() <= 1 + len(shares).bit_length()


def test_the_turns_do_not_depend_on_the_order_of_the_adapters() -> None:
    weights = {"a": 0.2, "b": 0.5, "c": 0.3}
    for order in itertools.permutations(weights):
        plan = DBMPA(weights, **FEW).start(order, 1, 20)
        turns = [plan(step).now[1 + order.index(name), 0].item() for step in range(20) for name in "abc"]
        assert turns == [
            DBMPA(weights, **FEW).start(list("abc"), 1, 20)(step).now[1 + "abc".index(name), 0].item()
            for step in range(20)
            for name in "abc"
        ]


def test_a_run_is_a_loop_that_keeps_outputs_by_hand(backbone: DiffusersBackbone) -> None:
    backbone.rows_run = 0
    got = run(backbone, DBMPA(HALVES, **FEW))
    assert backbone.rows_run == 2 * (3 * 2 + 5)
    for seed in range(2):
        expected = by_hand(backbone, seed, [0, 0.5, 0.5, 0], "11100000", "12121")
        torch.testing.assert_close(got[seed : seed + 1], expected, rtol=0, atol=1e-4)  # float32, other batch shapes
    assert (got - run(backbone, DBMPA(HALVES))).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{"execution": "gated"}, {"execution": "merged"}, {"max_rows": 1}])
def test_however_a_step_is_executed_the_result_is_the_same(backbone: DiffusersBackbone, options: Any) -> None:
    blend = DBMPA(HALVES, **FEW)
    torch.testing.assert_close(run(backbone, blend, **options), run(backbone, blend), rtol=0, atol=1e-4)


def test_each_image_has_weights_lambda_and_method_of_its_own() -> None:
    backbone = loaded("miniature")
    thirds = dict.fromkeys(NAMES, 1 / 3)
    many = DBMPA([HALVES, thirds], [1.0, 0.5], **FEW)
    alone = [DBMPA(HALVES, **FEW), DBMPA(thirds, 0.5, **FEW)]
    together = run(backbone, many)
    for seed, blend in enumerate(alone):
        torch.testing.assert_close(together[seed : seed + 1], run(backbone, blend, (seed,)), rtol=0, atol=1e-4)
    blends = [DBMPA(thirds), DBMPA(HALVES, full_share=0.5), Base()]
    backbone.rows_run = 0
    seeds = (0, 1, 0)
    mixed = run(backbone, PerImage(blends), seeds)
    assert backbone.rows_run == 8 * 3 + (4 * 2 + 4) + 8
    for index, (seed, blend) in enumerate(zip(seeds, blends, strict=True)):
        torch.testing.assert_close(mixed[index : index + 1], run(backbone, blend, (seed,)), rtol=0, atol=1e-4)


def test_an_adapter_that_enters_between_full_steps_is_computed_with_the_others() -> None:
    """Of w(t) the third adapter has no kept output at step 3, so that step computes all rows, and the next does not."""
    backbone, counts = loaded("miniature"), []

    def weights(step: int, steps: int) -> dict[str, float]:
        return HALVES if step < 3 else {**dict.fromkeys(HALVES, 0.4), "compressibility": 0.2}

    def count(step: StepRecord) -> None:
        counts.append(backbone.rows_run)
        backbone.rows_run = 0

    backbone.rows_run = 0
    run(backbone, DBMPA(weights, full_share=0.25), (0,), on_step=count)
    assert counts == [2, 2, 1, 3, 1, 1, 1, 1]


@pytest.mark.parametrize("changed", ["guidance_scale", "conditioning"])
def test_outputs_of_other_prompts_or_guidance_are_forgotten(changed: str) -> None:
    backbone, counts = loaded("miniature"), []
    value = {"guidance_scale": 1.5, "conditioning": backbone.encode([PROMPTS[1]])}[changed]

    def change(step: StepRecord) -> Change | None:
        counts.append(backbone.rows_run)
        backbone.rows_run = 0
        return Change(**{changed: value}) if step.step_index == 3 else None

    backbone.rows_run = 0
    run(backbone, DBMPA(HALVES, full_share=0.25), (0,), on_step=change)
    assert counts == [2, 2, 1, 1, 2, 1, 1, 1]


def test_guidance_that_is_not_affine_follows_the_kept_passes() -> None:
    """Both passes are kept, and guided once after the mix."""
    backbone = loaded("miniature-flow")

    class Rescaled(type(backbone.family)):  # type: ignore[misc]
        affine_guidance = False

        def guide(self, unconditional: Tensor, conditional: Tensor, scale: float, conditioning: Any) -> Tensor:
            guided = unconditional + scale * (conditional - unconditional)
            return guided * (conditional.norm(dim=1, keepdim=True) / guided.norm(dim=1, keepdim=True))

    backbone.family = Rescaled(backbone.pipeline, None)
    outputs: list[Tensor] = []
    steps: list[StepRecord] = []
    run(backbone, DBMPA(HALVES, full_share=0.25), (0,), on_step=steps.append)
    conditioning, solver = backbone.encode([PROMPTS[0]]), solver_of(backbone, STEPS, 1.0)
    gates = torch.eye(3)[[NAMES.index("aesthetic"), NAMES.index("alignment")]]
    for record in steps[1:3]:
        scaled = solver.scale(record.latents, record.step_index)
        rows = [
            backbone.passes(scaled, solver.timesteps[record.step_index][None], conditioning, 3.0, gate[None])
            for gate in gates
        ]
        outputs.append(torch.stack(rows).detach())
    last_full, cheap = outputs
    mixed = cheap[0] + 0.5 * (last_full[1] - last_full[0])
    expected = backbone.guide(mixed[:, 0], mixed[:, 1], 3.0, conditioning)
    torch.testing.assert_close(steps[2].output, expected, rtol=0, atol=1e-5)


def test_the_pipeline_and_an_evaluation_take_it_as_options_and_count_its_rows() -> None:
    pipe = DiffusionBlendPipeline.from_pretrained("miniature")
    given = dict(num_inference_steps=STEPS, guidance_scale=3.0, eta=1.0, output_type="latent")
    generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
    made = pipe(PROMPTS, weights=HALVES, method_options=FEW, generator=generator, **given).images
    torch.testing.assert_close(made, run(loaded("miniature"), DBMPA(HALVES, **FEW)), rtol=0, atol=1e-4)
    batch = {"prompt": PROMPTS, "prompt_id": torch.tensor([0, 1]), "seed": torch.tensor([0, 0])}
    sampler = BlendSampler(pipe.backbone, {}, STEPS, 1.0, 3.0, None, seed=0, kl=True)
    few, whole = BlendSpec(weights=HALVES, options=dict(FEW)), BlendSpec(weights=HALVES)
    assert few.key != whole.key
    rows = [sampler.score(batch, spec).rows for spec in (few, whole)]
    assert [each[0]["denoiser_rows"] for each in rows] == [3 * 2 + 5, 8 * 2]
    assert all(row["kl"] > 0 for row in rows[0])


def test_steering_is_refused_for_its_candidates_have_kept_nothing() -> None:
    class Nothing:
        differentiable = False

        def score(self, images: Tensor, prompts: Any) -> Tensor:
            return images.mean((1, 2, 3))

    with pytest.raises(ValueError, match="DBMPA takes outputs of earlier steps, which a BestOfN cannot follow"):
        run(loaded("miniature"), DBMPA(HALVES, **FEW), steering=BestOfN({"r": Nothing()}), prompts=PROMPTS)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"full_share": 1.2}, "full_share"),
        ({"full_share": -0.1}, "full_share"),
        ({"full_share": "half"}, "full_share"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        resolve_blend("db-mpa", HALVES, options=options)


def test_without_the_option_nothing_is_kept() -> None:
    step = make_blend("db-mpa", HALVES).start(NAMES, 1, 4)(2)
    assert type(step) is BlendStep


@pytest.mark.slow
def test_the_miniatures_error_is_a_fraction_of_the_soups() -> None:
    """docs/methods.md: two adapters, w = ½, twenty steps; here 24 of its prompts."""
    backbone = loaded("miniature")
    prompts = MiniatureDataModule(limit_test_prompts=24).test_prompts
    solver = make_solver(backbone.scheduler_config, 20, 1.0)

    def final(blend: Any) -> Tensor:
        noise = ImageNoise.of(0, list(range(24)), [0] * 24, backbone.device, stream="evaluation")
        with torch.no_grad():
            return denoise_loop(backbone, backbone.encode(prompts), solver, blend, noise, guidance_scale=3.0)

    exact = final(DBMPA(HALVES))

    def error(blend: Any) -> float:
        return float((final(blend) - exact).flatten(1).norm(dim=1).mean())

    soup = error(make_blend("rewarded-soup", HALVES))
    assert error(DBMPA(HALVES, full_share=0.4)) < 0.35 * soup
