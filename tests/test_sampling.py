"""The denoising loop against plain diffusers and PEFT: `set_adapter`, DDIMScheduler and a loop written here."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from dblightning.backbone import DiffusersBackbone
from dblightning.blending import DBKLA, DBMPA, DBMPALS, Base, RewardedSoup, RewardedSoupFactors, Single
from dblightning.noise import GeneratorNoise, ImageNoise
from dblightning.sampling import MERGED_GROUP, Run, StepRecord, arrange, denoise_loop
from dblightning.solvers import DiffusersSolver, make_solver

STEPS = 20  # where plain diffusers is the judge
FEW = 5  # elsewhere
GUIDANCE = 3.0
PROMPTS = ["A red colored circle.", "A blue colored star."]
#: adapters of different rank, alpha and target modules
ADAPTERS: dict[str, dict[str, Any]] = {
    "a": dict(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
    "b": dict(r=2, lora_alpha=6, target_modules=["to_q", "to_v", "ff.net.2"]),
    "c": dict(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The miniature's architecture with random weights and PEFT's own LoRA layers; and its folders on disk."""
    from dblightning.miniature import pretrain

    torch.manual_seed(7)
    tokenizer = pretrain.build_tokenizer()
    pipe = StableDiffusionPipeline(
        vae=pretrain.build_vae(),
        text_encoder=pretrain.build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=pretrain.build_unet(),
        scheduler=pretrain.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("plain")
    pipe.save_pretrained(folder / "base")
    for name, settings in ADAPTERS.items():
        pipe.unet.add_adapter(LoraConfig(**settings), adapter_name=name)
        for key, weight in pipe.unet.named_parameters():
            if f"lora_B.{name}." in key:
                torch.nn.init.normal_(weight, std=0.1)
        layers = get_peft_model_state_dict(pipe.unet, adapter_name=name)
        metadata = pipe.unet.peft_config[name].to_dict()
        pipe.save_lora_weights(folder / name, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    pipe.folder, pipe.models = folder, models_of(pipe, list(ADAPTERS))
    return pipe


@pytest.fixture(scope="module")
def ours(plain: Any) -> DiffusersBackbone:
    backbone = DiffusersBackbone(str(plain.folder / "base"))
    for name in ADAPTERS:
        backbone.adapters.load(name, plain.folder / name, backbone.pipeline)
    return backbone


def embed(pipe: Any, texts: list[str]) -> torch.Tensor:
    ids = pipe.tokenizer(texts, padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="pt")
    return pipe.text_encoder(ids.input_ids)[0]


def models_of(pipe: Any, names: list[str]) -> dict[str | None, Any]:
    """The pipeline's denoiser with each adapter set, and without any (None)."""
    models = {}
    for name in (None, *names):
        models[name] = copy.deepcopy(pipe.unet)
        if name is None:
            models[name].disable_adapters()
        else:
            models[name].set_adapter(name)
    return models


@torch.no_grad()
def diffusers_blend(pipe: Any, coefficients: dict[str | None, float], latents: Any, eta: float, noises: Any) -> Any:
    """ε = Σ coefficient · ε(adapter) one model with one adapter at a time; None is the base model."""
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    texts = embed(pipe, [""] * len(PROMPTS) + PROMPTS)
    for index, timestep in enumerate(scheduler.timesteps):
        blended = torch.zeros_like(latents)
        for name, coefficient in coefficients.items():
            unconditional, conditional = pipe.models[name](torch.cat([latents] * 2), timestep, texts).sample.chunk(2)
            blended += coefficient * (unconditional + GUIDANCE * (conditional - unconditional))
        variance_noise = {"variance_noise": noises[index]} if eta else {}
        latents = scheduler.step(blended, timestep, latents, eta=eta, **variance_noise).prev_sample
    return latents


def our_blend(
    backbone: Any, blend: Any, eta: float, prompts: list[str] = PROMPTS, steps: int = FEW, **options: Any
) -> torch.Tensor:
    solver = make_solver(backbone.scheduler_config, steps, eta)
    noise = options.pop("noise", None) or ImageNoise(list(range(len(prompts))))
    with torch.no_grad():
        return denoise_loop(
            backbone, backbone.encode(prompts), solver, blend, noise, guidance_scale=GUIDANCE, **options
        )


def noises_of(count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The first latents and each step's noise of images 0 … count − 1."""
    noise = ImageNoise(list(range(count)))
    noises = [noise((4, 8, 8)) for _ in range(STEPS + 1)]
    return noises[0], noises[1:]


BLENDS = {
    "base": (Base(), {None: 1.0}),
    "single": (Single("b"), {"b": 1.0}),
    "db-mpa, two": (DBMPA({"a": 0.3, "b": 0.7}), {"a": 0.3, "b": 0.7}),
    "db-mpa, three": (DBMPA({"a": 0.2, "b": 0.5, "c": 0.3}), {"a": 0.2, "b": 0.5, "c": 0.3}),
    "db-kla 0": (DBKLA("a", 0.0), {None: 1.0}),
    "db-kla 0.5": (DBKLA("a", 0.5), {None: 0.5, "a": 0.5}),
    "db-kla 1": (DBKLA("a", 1.0), {"a": 1.0}),
    "db-kla 1.5": (DBKLA("a", 1.5), {None: -0.5, "a": 1.5}),
    "both": (DBMPA({"a": 0.5, "c": 0.5}, 2.0), {None: -1.0, "a": 1.0, "c": 1.0}),
}


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("case", BLENDS)
def test_a_blend_is_what_set_adapter_and_ddim_scheduler_make(plain: Any, ours: Any, case: str, eta: float) -> None:
    blend, coefficients = BLENDS[case]
    first, noises = noises_of(2)
    expected = diffusers_blend(plain, coefficients, first, eta, noises)
    got = our_blend(ours, blend, eta, steps=STEPS)
    # 1e-4: float32 rounding of other batch shapes, over 20 steps of latents of size about 1 to 4
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


#: a blend for fewer rows: its coefficients, and whose turn it is at the twelve of twenty steps that compute one row
FEW_ROWS = {
    "two": (DBMPA({"a": 0.3, "b": 0.7}, full_share=0.4), {"a": 0.3, "b": 0.7}, "babbabbbabba"),
    "two, lambda 2": (
        DBMPA({"a": 0.5, "c": 0.5}, 2.0, full_share=0.4),
        {None: -1.0, "a": 1.0, "c": 1.0},
        "acacacacacac",
    ),
}


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("case", FEW_ROWS)
def test_db_mpa_for_fewer_rows_is_diffusers_with_predictions_kept_by_hand(
    plain: Any, ours: Any, case: str, eta: float
) -> None:
    """ε = εᵢ + Σⱼ cⱼ (εⱼ − εᵢ), the differences of step 7: one prediction is new."""
    blend, coefficients, turns = FEW_ROWS[case]
    first, noises = noises_of(2)
    scheduler = DDIMScheduler.from_config(plain.scheduler.config)
    scheduler.set_timesteps(STEPS)
    texts, latents, kept, turn = embed(plain, [""] * len(PROMPTS) + PROMPTS), first, {}, iter(turns)
    for index, timestep in enumerate(scheduler.timesteps):

        def guided(name: str | None, x: Any = latents, time: Any = timestep) -> Any:
            unconditional, conditional = plain.models[name](torch.cat([x] * 2), time, texts).sample.chunk(2)
            return unconditional + GUIDANCE * (conditional - unconditional)

        with torch.no_grad():
            if index < 8:
                kept = {name: guided(name) for name in coefficients}
                blended = sum(c * kept[name] for name, c in coefficients.items())
            else:
                name = next(turn)
                blended = guided(name) + sum(c * (kept[each] - kept[name]) for each, c in coefficients.items())
        variance_noise = {"variance_noise": noises[index]} if eta else {}
        latents = scheduler.step(blended, timestep, latents, eta=eta, **variance_noise).prev_sample
    ours.rows_run = 0
    got = our_blend(ours, blend, eta, steps=STEPS)
    torch.testing.assert_close(got, latents, rtol=0, atol=2e-4)  # twice the above: λ = 2 doubles the rounding
    assert ours.rows_run == len(PROMPTS) * (8 * len(coefficients) + 12)
    exact = our_blend(ours, DBMPA(blend.weights, blend.kl_scale), eta, steps=STEPS)
    assert (got - exact).abs().max() > 2e-3  # ten times that: the twelve steps approximate


def test_the_adapters_of_this_file_make_a_difference(ours: Any) -> None:
    base = our_blend(ours, Base(), 0.0)
    for name in ADAPTERS:  # a hundred times the tolerance above, or those comparisons would show nothing
        assert (our_blend(ours, Single(name), 0.0) - base).abs().max() > 1e-2


def soup_pipe(plain: Any, delta: Any) -> Any:
    """The base pipeline with ΔW of ``delta(A's, B's, scales)`` added to its own weights; no PEFT layer left."""
    pipe = StableDiffusionPipeline.from_pretrained(plain.folder / "base")
    for path, module in plain.unet.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        parts = {
            name: (module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])
            for name in module.lora_A
        }
        with torch.no_grad():
            pipe.unet.get_submodule(path).weight += delta(parts)
    pipe.models = {None: pipe.unet}
    return pipe


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("execution", ["gated", "merged"])
def test_the_exact_soup_is_a_plain_unet_with_the_averaged_delta(
    plain: Any, ours: Any, eta: float, execution: Any
) -> None:
    weights = {"a": 0.3, "b": 0.5, "c": 0.2}
    pipe = soup_pipe(plain, lambda parts: sum(weights[n] * s * up @ down for n, (down, up, s) in parts.items()))
    first, noises = noises_of(2)
    expected = diffusers_blend(pipe, {None: 1.0}, first, eta, noises)
    got = our_blend(ours, RewardedSoup(weights), eta, steps=STEPS, execution=execution)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("execution", ["gated", "merged"])
def test_the_factor_soup_averages_a_and_b_apart(plain: Any, ours: Any, execution: Any) -> None:
    # a and c have one rank and one scale (1) and the same layers; b has no weight
    weights = {"a": 0.3, "c": 0.7}

    def delta(parts: Any) -> Any:
        used = [(weights[n], down, up) for n, (down, up, _) in parts.items() if n in weights]
        if not used:
            return 0
        return sum(w * up for w, _, up in used) @ sum(w * down for w, down, _ in used)

    backbone = DiffusersBackbone(str(plain.folder / "base"))
    for name in weights:
        backbone.adapters.load(name, plain.folder / name, backbone.pipeline)
    first, noises = noises_of(2)
    expected = diffusers_blend(soup_pipe(plain, delta), {None: 1.0}, first, 0.0, noises)
    got = our_blend(backbone, RewardedSoupFactors(weights), 0.0, steps=STEPS, execution=execution)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


# ── endpoints and mixed batches ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("execution", ["auto", "gated", "merged"])
def test_endpoints_are_bit_identical_to_the_model_alone(ours: Any, execution: Any) -> None:
    alone = our_blend(ours, Single("b"), 1.0, execution=execution)
    for blend in (DBMPA({"b": 1.0, "a": 0.0}), DBKLA("b", 1.0), DBMPALS({"b": 1.0})):
        assert torch.equal(our_blend(ours, blend, 1.0, execution=execution), alone)
    assert torch.equal(our_blend(ours, DBKLA("b", 0.0), 1.0, execution=execution), our_blend(ours, Base(), 1.0))


def test_endpoints_cost_one_row(ours: Any) -> None:
    for blend in (DBMPA({"b": 1.0, "a": 0.0}), DBKLA("b", 1.0), DBKLA("b", 0.0), RewardedSoup({"a": 0.5, "b": 0.5})):
        plan = blend.start(ours.adapters.names, 3, FEW)
        calls = arrange(plan(0), torch.device("cpu")).calls
        assert sum(len(call.rows) for call in calls) == 3


@pytest.mark.parametrize("execution", ["auto", "gated", "merged"])
def test_an_image_in_a_batch_of_mixed_preferences_is_the_image_made_alone(ours: Any, execution: Any) -> None:
    prompts = ["A red colored circle.", "A blue colored star.", "A green colored ring.", "A red colored cross."]
    weights = [{"a": 0.3, "b": 0.7}, {"b": 1.0}, {"a": 0.2, "b": 0.5, "c": 0.3}, {"c": 1.0}]
    scales = [1.0, 1.0, 0.5, 0.0]
    together = our_blend(ours, DBMPA(weights, scales), 1.0, prompts, execution=execution)
    for index in range(4):
        alone = our_blend(
            ours,
            DBMPA(weights[index], scales[index]),
            1.0,
            prompts[index : index + 1],
            noise=ImageNoise([index]),
            execution=execution,
        )
        torch.testing.assert_close(together[index : index + 1], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("execution", ["gated", "merged"])
@pytest.mark.parametrize("blend_of", [DBMPALS, lambda w: DBMPALS(w, "systematic"), RewardedSoup])
def test_per_image_methods_too_do_not_depend_on_the_batch(ours: Any, blend_of: Any, execution: Any) -> None:
    """One row an image: rows of one gate vector are not neighbours, and merged weights run them side by side."""
    weights = [{"a": 0.3, "b": 0.7}, {"a": 0.8, "c": 0.2}, {"a": 0.3, "b": 0.7}]
    prompts = [*PROMPTS, "a green ring"]
    together = our_blend(ours, blend_of(weights), 1.0, prompts, execution=execution)
    for index in range(3):
        alone = our_blend(
            ours,
            blend_of(weights[index]),
            1.0,
            prompts[index : index + 1],
            noise=ImageNoise([index]),
            execution=execution,
        )
        torch.testing.assert_close(together[index : index + 1], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("max_rows", [1, 2, 3])
def test_a_row_limit_changes_nothing_but_the_batch(ours: Any, max_rows: int) -> None:
    blend = DBMPA([{"a": 0.3, "b": 0.7}, {"a": 0.2, "b": 0.5, "c": 0.3}], [1.0, 1.5])
    rows: list[int] = []
    denoise = ours.denoise
    ours.denoise = lambda latents, *args, **options: rows.append(len(latents)) or denoise(latents, *args, **options)
    try:
        limited = our_blend(ours, blend, 0.0, max_rows=max_rows)
    finally:
        del ours.denoise
    assert max(rows) <= max_rows
    torch.testing.assert_close(limited, our_blend(ours, blend, 0.0), rtol=0, atol=1e-4)


def test_a_run_that_is_out_of_memory_halves_its_calls(ours: Any) -> None:
    blend = DBMPA([{"a": 0.3, "b": 0.7}, {"a": 0.2, "b": 0.5, "c": 0.3}])
    sizes: list[int] = []
    denoise = ours.denoise

    def small_device(latents: Any, *args: Any, **options: Any) -> Any:
        if len(latents) > 2:
            raise torch.OutOfMemoryError("five rows do not fit")
        sizes.append(len(latents))
        return denoise(latents, *args, **options)

    ours.denoise = small_device
    try:
        with pytest.warns(UserWarning, match="out of memory on 5 rows: max_rows is now 2"):
            got = our_blend(ours, blend, 0.0)
    finally:
        del ours.denoise
    assert sizes == [2, 2, 1] * FEW
    torch.testing.assert_close(got, our_blend(ours, blend, 0.0), rtol=0, atol=1e-4)


def test_schedules_are_run_as_given(ours: Any) -> None:
    """Adapter a on the first half of the steps, b on the second."""
    blend = DBMPA(lambda step, steps: {"a": 1.0} if step < steps // 2 else {"b": 1.0})
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Any:
        seen[name] = []
        return lambda record: seen[name].append(record.next_latents)

    our_blend(ours, blend, 0.0, on_step=keep("both"))
    our_blend(ours, Single("a"), 0.0, on_step=keep("a"))
    half = FEW // 2
    assert torch.equal(seen["both"][half - 1], seen["a"][half - 1])
    assert not torch.equal(seen["both"][half], seen["a"][half])


class SoupThenFactors(RewardedSoup):
    """The exact soup at the first step, the factor soup at the others: same gates, same mix."""

    def start(self, *args: Any) -> Any:
        exact, factors = RewardedSoup.start(self, *args), RewardedSoupFactors(self.weights).start(*args)
        return lambda step_index: (exact if step_index == 0 else factors)(step_index)


def test_steps_that_differ_in_averaging_factors_alone_are_not_confused(ours: Any) -> None:
    weights = {"a": 0.5, "c": 0.5}
    seen: dict[str, list[torch.Tensor]] = {"both": [], "exact": []}
    with ours.adapters.only(["a", "c"]):  # of one rank
        our_blend(ours, SoupThenFactors(weights), 0.0, on_step=lambda record: seen["both"].append(record.next_latents))
        our_blend(ours, RewardedSoup(weights), 0.0, on_step=lambda record: seen["exact"].append(record.next_latents))
    assert torch.equal(seen["both"][0], seen["exact"][0])
    assert not torch.allclose(seen["both"][1], seen["exact"][1], atol=1e-3)


def test_the_exact_soup_is_db_mpa_to_first_order_in_the_adapters(ours: Any) -> None:
    """Halving ΔW quarters their difference: soup − DB-MPA is of second order."""
    conditioning, weights = ours.encode(PROMPTS), {"a": 0.5, "c": 0.5}
    solver = make_solver(ours.scheduler_config, FEW, 0.0)
    latents, _ = noises_of(2)

    @torch.no_grad()
    def difference(scale: float) -> float:
        for layer in ours.adapters.layers():
            for side in layer.lora_B.values():
                side.weight.mul_(scale)
        predictions = [
            Run(ours, conditioning, solver, blend.start(ours.adapters.names, 2, FEW), ImageNoise([0, 1]), GUIDANCE)
            for blend in (RewardedSoup(weights), DBMPA(weights))
        ]
        soup, blend = (run.predict(latents, 2) for run in predictions)
        for layer in ours.adapters.layers():
            for side in layer.lora_B.values():
                side.weight.div_(scale)
        return float((soup - blend).norm())

    differences = [difference(scale) for scale in (0.25, 0.125, 0.0625)]
    for larger, smaller in itertools.pairwise(differences):
        # 15 %: the third order at these scales, and float32
        assert larger / smaller == pytest.approx(4, rel=0.15)


# ── how it is executed ───────────────────────────────────────────────────────────────────────────────────────────────


def kinds(blend: Any, batch: int, names: list[str], device: str = "cpu", **options: Any) -> list[str]:
    step = blend.start(names, batch, 4)(0)
    calls = arrange(step, torch.device(device), **options).calls
    return [
        f"merged {len(call.gating.segments)}"
        if call.gating.segments
        else "gated"
        if call.gating.merged is None
        else "merged"
        for call in calls
    ]


def test_auto_merges_one_vector_and_gates_mixed_rows() -> None:
    names = ["a", "b"]
    both = DBMPA({"a": 0.5, "b": 0.5})
    assert kinds(Single("a"), 4, names) == ["merged"]
    assert kinds(RewardedSoup({"a": 0.5, "b": 0.5}), 4, names) == ["merged"]
    assert kinds(both, 1, names) == ["gated"]
    for case in ({"batch": MERGED_GROUP}, {"batch": 1, "gated_share": 0.6}):
        assert kinds(both, names=names, **case) == ["merged 2"]  # in one call
        assert kinds(both, names=names, merged_limit=1, **case) == ["gated"]
        assert kinds(both, names=names, device="meta", **case) == ["gated"]


def test_a_call_holds_no_more_vectors_than_merged_copies_are_kept() -> None:
    names = ["a", "b", "c"]
    thirds = DBMPA(dict.fromkeys(names, 1 / 3))
    assert kinds(thirds, 2, names, execution="merged", merged_limit=2) == ["merged 2", "merged"]
    product = DBMPA(dict.fromkeys(names, 1 / 3), 0.5)  # the base's rows need no copy
    assert kinds(product, 2, names, execution="merged", merged_limit=3) == ["merged 4"]


def test_a_soup_whose_weights_change_at_every_step_is_not_merged_anew(ours: Any) -> None:
    blend = RewardedSoup(lambda step, steps: {"a": step / steps, "b": 1 - step / steps})
    ours.adapters.drop_merged()
    our_blend(ours, blend, 0.0)
    assert not any(layer.merged_weights for layer in ours.adapters.layers())


def test_gradients_reach_the_adapters_through_the_blended_prediction(ours: Any) -> None:
    ours.adapters.train_only("a")
    conditioning = ours.encode(PROMPTS)
    solver = make_solver(ours.scheduler_config, FEW, 0.0)
    plan = DBMPA({"a": 0.25, "b": 0.75}).start(ours.adapters.names, 2, FEW)
    run = Run(ours, conditioning, solver, plan, ImageNoise([0, 1]), GUIDANCE)
    half = Run(ours, conditioning, solver, Single("a").start(ours.adapters.names, 2, FEW), run.noise, GUIDANCE)
    latents, _ = noises_of(2)
    weight = ours.adapters.parameters("a")[1]
    try:
        (blended,) = torch.autograd.grad(run.predict(latents, 3).sum(), weight)
        (alone,) = torch.autograd.grad(half.predict(latents, 3).sum(), weight)
    finally:
        ours.adapters.train_only(None)
    # linear in the prediction: a quarter of the adapter's own gradient; 1e-3 of a float32 sum of 512 terms
    torch.testing.assert_close(blended, 0.25 * alone, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(max_rows=0), "max_rows must be at least 1"),
        (dict(execution="fast"), "execution must be auto, gated or merged, got 'fast'"),
    ],
)
def test_unknown_execution_is_refused(ours: Any, options: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        our_blend(ours, Base(), 0.0, **options)


def test_blends_that_do_not_fit_are_refused_before_the_first_denoiser_call(ours: Any) -> None:
    called = []
    handle = ours.unet.register_forward_pre_hook(lambda *args: called.append(1))
    try:
        for blend, says in (
            (DBMPA({"a": 0.5}), "sum to 1"),
            (DBMPA({"vila": 1.0}), "weights name 'vila'"),
            (DBMPA([{"a": 1.0}]), "weights for 1 images, but the batch has 2"),
            (DBKLA("a", -1.0), "got -1.0"),
        ):
            with pytest.raises(ValueError, match=says):
                our_blend(ours, blend, 0.0)
    finally:
        handle.remove()
    assert not called


# ── solvers ──────────────────────────────────────────────────────────────────────────────────────────────────────────

SOLVERS: dict[str, tuple[type, dict[str, Any]]] = {
    "DDIM": (DDIMScheduler, {}),
    "DPM-Solver++ ODE": (DPMSolverMultistepScheduler, dict(algorithm_type="dpmsolver++")),
    "DPM-Solver++ SDE": (DPMSolverMultistepScheduler, dict(algorithm_type="sde-dpmsolver++")),
    "Euler": (EulerDiscreteScheduler, {}),
    "Euler ancestral": (EulerAncestralDiscreteScheduler, {}),
}


@pytest.mark.parametrize("kind", SOLVERS)
def test_every_solver_blends_as_its_diffusers_scheduler_does(plain: Any, ours: Any, kind: str) -> None:
    solver_class, options = SOLVERS[kind]
    scheduler = solver_class.from_config(plain.scheduler.config, **options)
    solver = DiffusersSolver(scheduler, 2 * FEW)
    noise = ImageNoise([0, 1])
    with torch.no_grad():
        got = denoise_loop(
            ours, ours.encode(PROMPTS), solver, DBMPA({"a": 0.3, "b": 0.7}), noise, guidance_scale=GUIDANCE
        )
        again = denoise_loop(
            ours, ours.encode(PROMPTS), solver, DBMPA({"a": 0.3, "b": 0.7}), ImageNoise([0, 1]), guidance_scale=GUIDANCE
        )
        # independently, by hand
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        latents = torch.stack([torch.randn(4, 8, 8, generator=each) for each in generators])
        scheduler.set_timesteps(2 * FEW)
        latents = latents * scheduler.init_noise_sigma
        texts = embed(plain, ["", "", *PROMPTS])
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, timestep)
            blended = torch.zeros_like(latents)
            for name, weight in (("a", 0.3), ("b", 0.7)):
                unconditional, conditional = plain.models[name](torch.cat([scaled] * 2), timestep, texts).sample.chunk(
                    2
                )
                blended += weight * (unconditional + GUIDANCE * (conditional - unconditional))
            extra = {} if kind == "DDIM" else {"generator": generators}
            latents = scheduler.step(blended, timestep, latents, **extra).prev_sample
    # 2e-4: the same rounding, on latents that Euler starts at 14.6 times DDIM's size
    torch.testing.assert_close(got, latents, rtol=0, atol=2e-4)
    assert torch.equal(got, again)  # a solver serves many runs


def test_ddim_through_diffusers_and_ours_agree(ours: Any) -> None:
    scheduler = DDIMScheduler.from_config(ours.scheduler_config)
    with torch.no_grad():
        theirs = denoise_loop(
            ours,
            ours.encode(PROMPTS),
            DiffusersSolver(scheduler, 2 * FEW),
            Base(),
            ImageNoise([0, 1]),
            guidance_scale=GUIDANCE,
        )
    torch.testing.assert_close(
        our_blend(ours, Base(), 0.0, steps=2 * FEW), theirs, rtol=0, atol=1e-5
    )  # the steps' rounding alone


# ── noise ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_generator_noise_is_drawn_as_diffusers_draws_it() -> None:
    one = GeneratorNoise(torch.Generator().manual_seed(5), 3)
    assert torch.equal(one((4, 8, 8)), torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5)))
    many = GeneratorNoise([torch.Generator().manual_seed(seed) for seed in (1, 2)], 2)
    expected = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    assert torch.equal(many((4, 8, 8)), torch.cat(expected))
    torch.manual_seed(9)
    free = GeneratorNoise(None, 2)((4, 8, 8))
    torch.manual_seed(9)
    assert torch.equal(free, torch.randn(2, 4, 8, 8))


def test_generator_noise_draws_for_stochastic_blends_apart_from_the_noise() -> None:
    generator = torch.Generator().manual_seed(5)
    noise = GeneratorNoise(generator, 2)
    first = [torch.rand(3, generator=each) for each in noise.draws]
    assert not torch.equal(*first)
    assert torch.equal(noise((2,)), torch.randn(2, 2, generator=torch.Generator().manual_seed(5)))
    # a later call of the same generator draws anew; the same state draws the same
    assert not torch.equal(torch.rand(3, generator=GeneratorNoise(generator, 2).draws[0]), first[0])
    again = GeneratorNoise(torch.Generator().manual_seed(5), 2)
    assert torch.equal(torch.rand(3, generator=again.draws[0]), first[0])


def test_a_generator_list_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="got 3 generators for 2 images"):
        GeneratorNoise([torch.Generator()] * 3, 2)


def test_copies_of_an_image_get_noise_of_their_own_generator() -> None:
    noise = ImageNoise([1, 2])((4, 8, 8), copies=3)
    alone = ImageNoise([2])((4, 8, 8), copies=3)
    assert noise.shape == (6, 4, 8, 8)
    assert torch.equal(noise[3:], alone)
    assert len({row.sum().item() for row in noise}) == 6
    one = GeneratorNoise(torch.Generator().manual_seed(0), 2)((4, 8, 8), copies=3)
    assert one.shape == (6, 4, 8, 8)


def test_on_step_may_replace_the_latents(ours: Any) -> None:
    def zero_last(record: StepRecord) -> Any:
        assert int(record.timestep) in range(1000)
        return torch.zeros_like(record.next_latents) if record.step_index == FEW - 1 else None

    assert not our_blend(ours, Base(), 0.0, on_step=zero_last).any()


def test_shipped_adapters_blend_as_plain_diffusers_blends_them(ours: Any) -> None:
    """The same on the miniature as shipped."""
    from dblightning import miniature

    folders: dict[str, Path] = miniature.adapters()
    if len(folders) < 2:
        pytest.fail("the miniature ships fewer than two adapters")
    (first_name, first_path), (second_name, second_path) = list(folders.items())[:2]
    pipe = StableDiffusionPipeline.from_pretrained(miniature.path(), torch_dtype=torch.float32)
    backbone = DiffusersBackbone("miniature")
    for name, path in ((first_name, first_path), (second_name, second_path)):
        pipe.load_lora_weights(path, adapter_name=name)
        backbone.adapters.load(name, path, backbone.pipeline)
    pipe.models = models_of(pipe, [first_name, second_name])
    first, noises = noises_of(2)
    weights: dict[str | None, float] = {first_name: 0.4, second_name: 0.6}
    expected = diffusers_blend(pipe, weights, first, 1.0, noises)
    got = our_blend(backbone, DBMPA({first_name: 0.4, second_name: 0.6}), 1.0, steps=STEPS)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
