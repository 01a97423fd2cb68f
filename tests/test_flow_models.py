"""Tiny SD3, SD3.5 and FLUX against plain diffusers and PEFT: one model with one adapter at a time, a loop written here.

Float32, ten steps of the ODE. 1e-4: rounding of ten steps through networks whose sums run in another order.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
)
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from dblightning import DiffusionBlendPipeline, cli
from dblightning.adapters.convert import convert
from dblightning.backbone import DiffusersBackbone, Family, Flux, StableDiffusion3
from dblightning.blending import DBKLA, DBMPA, Base, RewardedSoup, Single
from dblightning.gaussian_step import gaussian_log_prob
from dblightning.noise import ImageNoise
from dblightning.precision import float32_arithmetic
from dblightning.rollout import rollout
from dblightning.sampling import denoise_loop
from dblightning.solvers import DiffusersSolver, FlowSolver, make_solver
from tests import tiny_pipelines
from tests.toy_rewards import Brightness

KINDS = ["sd3", "sd35", "flux"]
PROMPTS = ["a red circle", "two blue stars"]
STEPS = 10
TOKENS = 12  # of T5
GUIDANCE = 3.0
#: the family's own layers; fewer, scaled; and layers no peer adapts
ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "lora_alpha": 8},
    "b": {"r": 4, "lora_alpha": 3, "target_modules": ["attn.to_q", "attn.to_v", "attn.to_out.0"]},
    "c": {"r": 4, "lora_alpha": 4, "target_modules": ["to_k", "proj_out", "ff.net.2"]},
}
BLENDS: dict[str, tuple[Any, dict[str | None, Any]]] = {
    "base": (Base(), {None: 1.0}),
    "single": (Single("b"), {"b": 1.0}),
    "DB-MPA of two": (DBMPA({"a": 0.3, "b": 0.7}), {"a": 0.3, "b": 0.7}),
    "DB-MPA of three": (DBMPA({"a": 0.2, "b": 0.3, "c": 0.5}), {"a": 0.2, "b": 0.3, "c": 0.5}),
    "DB-KLA 0.5": (DBKLA("a", 0.5), {None: 0.5, "a": 0.5}),
    "DB-KLA 1.5": (DBKLA("a", 1.5), {None: -0.5, "a": 1.5}),
    "a batch of all": (
        DBMPA([{"a": 0.3, "b": 0.7, "c": 0.0}, {"a": 0.0, "b": 0.5, "c": 0.5}], kl_scale=[1.0, 0.5]),
        {None: [0.0, 0.5], "a": [0.3, 0.0], "b": [0.7, 0.25], "c": [0.0, 0.25]},
    ),
}


def targets(kind: str) -> list[str]:
    return list((Flux if kind == "flux" else StableDiffusion3).target_modules)


def saved(kind: str, folder: Path) -> Path:
    if kind == "flux":
        return tiny_pipelines.save_flux(folder)
    return tiny_pipelines.save_sd3(folder, dual=kind == "sd35")


def plain_pipeline(folder: Path) -> Any:
    """As a user of plain diffusers loads it."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = {} if index["_class_name"] == "FluxPipeline" or index["text_encoder_3"][0] else {
        "text_encoder_3": None, "tokenizer_3": None
    }  # fmt: skip
    pipe = DiffusionPipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=KINDS)
def plain(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A plain pipeline with PEFT's LoRA layers, whose folders are on disk as diffusers and as PEFT write them."""
    folder = tmp_path_factory.mktemp(request.param)
    pipe = plain_pipeline(saved(request.param, folder / "base"))
    pipe.kind, pipe.folder = request.param, folder
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        config = LoraConfig(**{"target_modules": targets(pipe.kind), **settings})
        # PEFT's own wrapper, as flow_grpo and Flow-Factory save it
        wrapped = get_peft_model(plain_pipeline(folder / "base").transformer, config)
        torch.manual_seed(seed)
        for key, weight in wrapped.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, std=0.3)
        wrapped.save_pretrained(folder / "peft" / name)
        state = get_peft_model_state_dict(wrapped)
        layers = {key.removeprefix("base_model.model."): value for key, value in state.items()}
        metadata = wrapped.peft_config["default"].to_dict()
        type(pipe).save_lora_weights(
            folder / name, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
        )
        pipe.load_lora_weights(folder / name, adapter_name=name)
    return pipe


@pytest.fixture(scope="module")
def ours(plain: Any) -> DiffusersBackbone:
    backbone = DiffusersBackbone(str(plain.folder / "base"), resolution=16, max_sequence_length=TOKENS)
    for name in ADAPTERS:
        backbone.adapters.load(name, plain.folder / name, backbone.pipeline)
    return backbone


def choose(pipe: Any, names: dict[str, float]) -> None:
    """LoRAs by diffusers' own means; none is the base model."""
    if names:
        pipe.enable_lora()
        pipe.set_adapters(list(names), list(names.values()))
    else:
        pipe.disable_lora()


def first_latents(count: int = len(PROMPTS)) -> Tensor:
    noise = ImageNoise(list(range(count)))
    return noise((4, 8, 8))


@torch.no_grad()
def reference(pipe: Any, parts: list[tuple[dict[str, float], Any]], latents: Tensor) -> Tensor:
    """Σ coefficient · velocity over models, each a set of LoRAs; a coefficient may differ per image."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    if pipe.kind == "flux":
        embeds, pooled, text_ids = pipe.encode_prompt(PROMPTS, None, "cpu", max_sequence_length=TOKENS)
        ids = torch.tensor([[0.0, row, column] for row in range(4) for column in range(4)])
        # 16 tokens are where the shift is smallest: μ = base_shift = 0.5
        scheduler.set_timesteps(sigmas=[1 - step / STEPS for step in range(STEPS)], mu=0.5)
        x = latents.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(len(latents), 16, 16)
    else:
        everything = pipe.encode_prompt(PROMPTS, None, None, "cpu", max_sequence_length=TOKENS)
        embeds, negative, pooled, negative_pooled = everything
        embeds, pooled = torch.cat([negative, embeds]), torch.cat([negative_pooled, pooled])
        scheduler.set_timesteps(STEPS)
        x = latents
    for timestep in scheduler.timesteps:
        blended = torch.zeros_like(x)
        for names, coefficient in parts:
            choose(pipe, names)
            if pipe.kind == "flux":
                velocity = pipe.transformer(
                    x, embeds, pooled, timestep.expand(len(x)) / 1000, ids, text_ids, torch.full((len(x),), GUIDANCE)
                ).sample
            else:
                twice = torch.cat([x, x])
                both = pipe.transformer(twice, embeds, pooled, timestep.expand(len(twice))).sample
                unconditional, conditional = both.chunk(2)
                velocity = unconditional + GUIDANCE * (conditional - unconditional)
            scales = torch.tensor(coefficient).view(-1, *[1] * (x.ndim - 1))
            blended += scales * velocity
        x = scheduler.step(blended, timestep, x).prev_sample
    if pipe.kind == "flux":
        x = x.reshape(len(x), 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)
    return x


@torch.no_grad()
def our_latents(backbone: DiffusersBackbone, blend: Any, **options: Any) -> Tensor:
    solver = make_solver(backbone.scheduler_config, STEPS, 0.0, **backbone.schedule_options(STEPS))
    noise = ImageNoise(list(range(len(PROMPTS))))
    return denoise_loop(backbone, backbone.encode(PROMPTS), solver, blend, noise, guidance_scale=GUIDANCE, **options)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", BLENDS)
def test_every_method_is_plain_diffusers_with_one_adapter_at_a_time(
    plain: Any, ours: DiffusersBackbone, name: str
) -> None:
    blend, coefficients = BLENDS[name]
    parts = [({} if adapter is None else {adapter: 1.0}, each) for adapter, each in coefficients.items()]
    got = our_latents(ours, blend)
    close(got, reference(plain, parts, first_latents()))
    if name != "base":
        assert (got - our_latents(ours, Base())).abs().max() > 1e-2  # the adapters do something


def test_the_exact_soup_is_diffusers_weighted_sum_of_loras(plain: Any, ours: DiffusersBackbone) -> None:
    weights = {"a": 0.4, "c": 0.6}
    close(our_latents(ours, RewardedSoup(weights)), reference(plain, [(weights, 1.0)], first_latents()))


@pytest.mark.parametrize("execution", ["gated", "merged"])
def test_gated_and_merged_weights_agree(ours: DiffusersBackbone, execution: Any) -> None:
    blend = DBMPA({"a": 0.3, "b": 0.7})
    close(our_latents(ours, blend, execution=execution), our_latents(ours, blend))


@pytest.mark.parametrize("noise", ["flow_sde", "cps"])
@pytest.mark.parametrize("execution", ["gated", "merged"])
def test_the_on_policy_ratio_is_one(ours: DiffusersBackbone, noise: Any, execution: Any) -> None:
    options = ours.schedule_options(4)
    solver = make_solver(ours.scheduler_config, 4, 0.8, noise=noise, **options)
    conditioning = ours.encode(PROMPTS)
    walk = rollout(ours, conditioning, solver, Single("a"), ImageNoise([0, 1]), GUIDANCE, execution)
    gates = torch.tensor([[1.0, 0.0, 0.0]] * 2)
    assert not walk.log_probs[-1].any()  # the last step has no density
    for index in range(solver.trainable):
        x = walk.latents[index]
        with torch.no_grad():
            output = ours.denoise(x, solver.timesteps[index].expand(2), conditioning, GUIDANCE, gates)
        log_prob = gaussian_log_prob(solver.gaussian(output, x, index), walk.latents[index + 1])
        assert ((log_prob - walk.log_probs[index]).exp() - 1).abs().max() < 1e-5


def test_a_half_precision_model_can_compute_in_float32(plain: Any) -> None:
    """What the KL needs; the query and key norms of SD3.5 and FLUX would round to their weights' precision."""
    half = DiffusersBackbone(str(plain.folder / "base"), dtype="bfloat16", resolution=16, max_sequence_length=TOKENS)
    full = DiffusersBackbone(str(plain.folder / "base"), resolution=16)
    full.denoiser.load_state_dict({key: value.float() for key, value in half.denoiser.state_dict().items()})
    conditioning = half.encode(PROMPTS).to(torch.float32)
    x, timesteps = first_latents(), torch.full((2,), 700.0)
    with torch.no_grad():
        expected = full.denoise(x, timesteps, conditioning, GUIDANCE)
        with float32_arithmetic(torch.device("cpu")):
            got = half.denoise(x, timesteps, conditioning, GUIDANCE)
    close(got, expected, 1e-5)  # bfloat16 would be 1e-2 away


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_loras_of_the_peers_load_and_ours_load_in_plain_diffusers(
    plain: Any, ours: DiffusersBackbone, tmp_path: Path
) -> None:
    """PEFT's own folders (flow_grpo, Flow-Factory), diffusers' files, and back."""
    fresh = DiffusersBackbone(str(plain.folder / "base"), resolution=16)
    for name in ADAPTERS:
        fresh.adapters.load(name, plain.folder / "peft" / name, fresh.pipeline)
        for key, value in ours.adapters.state_dict(name).items():
            assert torch.equal(value, fresh.adapters.state_dict(name)[key])
    for form in ("diffusers", "peft", "kohya"):
        file = ours.adapters.export("b", tmp_path / form, ours.pipeline, format=form)
        other = DiffusersBackbone(str(plain.folder / "base"), resolution=16)
        other.adapters.load("b", file, other.pipeline)
        for key, value in ours.adapters.state_dict("b").items():
            assert torch.equal(value, other.adapters.state_dict("b")[key])
        back = convert(file, tmp_path / f"{form}-again", "diffusers")
        other.adapters.load("again", back, other.pipeline)
        close(our_latents_of(other, "b"), our_latents_of(other, "again"), 0)
    pipe = plain_pipeline(plain.folder / "base")
    pipe.kind = plain.kind
    for name in ("a", "c"):
        pipe.load_lora_weights(ours.adapters.export(name, tmp_path / name, ours.pipeline).parent, adapter_name=name)
        close(reference(pipe, [({name: 1.0}, 1.0)], first_latents()), our_latents(ours, Single(name)))


def our_latents_of(backbone: DiffusersBackbone, name: str) -> Tensor:
    solver = make_solver(backbone.scheduler_config, 2, 0.0, **backbone.schedule_options(2))
    with torch.no_grad():
        return denoise_loop(backbone, backbone.encode(["a star"]), solver, Single(name), ImageNoise([0]))


def test_a_new_adapter_is_on_the_layers_that_the_peers_adapt(plain: Any) -> None:
    backbone = DiffusersBackbone(str(plain.folder / "base"), resolution=16)
    backbone.adapters.add("new", seed=0)
    found = set(backbone.adapters.factors("new"))
    modules = [name for name, module in plain_pipeline(plain.folder / "base").transformer.named_modules()
               if isinstance(module, torch.nn.Linear)]  # fmt: skip
    wanted = {name for name in modules if name.endswith(tuple(f".{each}" for each in targets(plain.kind)))}
    assert found == wanted
    assert not any("attn2" in name for name in found)
    assert any("add_q_proj" in name for name in found)


# ── the pipeline ─────────────────────────────────────────────────────────────────────────────────────────────────────


def call(pipe: Any, prompts: Any = tuple(PROMPTS), **options: Any) -> Any:
    settings = {
        "num_inference_steps": 3,
        "height": 16,
        "width": 16,
        "output_type": "np",
        "guidance_scale": GUIDANCE,
        "max_sequence_length": TOKENS,
        "generator": [torch.Generator().manual_seed(i) for i in range(2)],
    }
    prompt = {} if prompts is None else {"prompt": list(prompts)}
    return torch.as_tensor(pipe(**prompt, **{**settings, **options}).images)


@pytest.fixture(scope="module")
def wrapped(plain: Any) -> DiffusionBlendPipeline:
    adapters = {name: plain.folder / name for name in ADAPTERS}
    pipe = DiffusionBlendPipeline.from_pretrained(plain.folder / "base", adapters)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_folder_chooses_the_family_and_the_base_model_draws_the_plain_images(
    plain: Any, wrapped: DiffusionBlendPipeline
) -> None:
    family = wrapped.backbone.family
    assert isinstance(family, Flux if plain.kind == "flux" else StableDiffusion3)
    assert wrapped.backbone.prediction == "velocity"
    assert isinstance(wrapped.scheduler, FlowMatchEulerDiscreteScheduler)
    choose(plain, {})
    close(call(wrapped, method="base"), call(plain))
    texts: dict[str, Any] = {"prompt_2": ["a green square", "a star"]}
    if plain.kind != "flux":
        texts |= {"prompt_3": "a triangle", "negative_prompt": "blue", "negative_prompt_3": "red", "clip_skip": 1}
        texts["prompt_3"] = ["a triangle"] * 2
        texts["negative_prompt"], texts["negative_prompt_3"] = ["blue"] * 2, ["red"] * 2
    close(call(wrapped, method="base", **texts), call(plain, **texts))
    sigmas = [1.0, 0.6, 0.2]
    close(call(wrapped, method="base", sigmas=sigmas), call(plain, sigmas=sigmas))
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    several = {"num_images_per_prompt": 2, "prompts": PROMPTS[:1]}
    theirs = call(plain, **several, generator=generators)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    close(call(wrapped, method="base", **several, generator=generators), theirs)


def test_embeddings_stand_for_prompts(plain: Any, wrapped: DiffusionBlendPipeline) -> None:
    choose(plain, {})
    expected = call(plain)
    if plain.kind == "flux":
        embeds, pooled, _ = plain.encode_prompt(PROMPTS, None, "cpu", max_sequence_length=TOKENS)
        given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    else:
        made = plain.encode_prompt(PROMPTS, None, None, "cpu", max_sequence_length=TOKENS)
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        given = dict(zip(names, made, strict=True))
    close(call(wrapped, None, method="base", **given), expected)


def test_a_pipeline_with_loras_is_wrapped_and_callbacks_see_its_tensors(plain: Any) -> None:
    pipe = plain_pipeline(plain.folder / "base")
    pipe.load_lora_weights(plain.folder / "b", adapter_name="b")
    expected = call(pipe)
    other = DiffusionBlendPipeline.from_pipe(pipe)
    seen: list[tuple[int, ...]] = []
    names = ["latents", "prompt_embeds", *([] if plain.kind == "flux" else ["pooled_prompt_embeds"])]

    def look(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.extend(tuple(tensors[name].shape) for name in names)
        return {}

    close(
        call(other, weights={"b": 1.0}, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names), expected
    )
    assert seen[0] == (2, 4, 8, 8) and len(seen) == 3 * len(names)
    assert isinstance(DiffusionBlendPipeline(**pipe.components).backbone.family, type(other.backbone.family))


def test_a_saved_blend_pipeline_loads_here_and_in_plain_diffusers(
    plain: Any, wrapped: DiffusionBlendPipeline, tmp_path: Path
) -> None:
    wrapped.save_pretrained(tmp_path / "saved")
    again = DiffusionBlendPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    weights = {"a": 0.3, "b": 0.7}
    close(call(again, weights=weights), call(wrapped, weights=weights), 0)
    choose(plain, {})
    close(call(plain_pipeline(tmp_path / "saved")), call(plain), 0)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "db-mpa-ls", "weights": {"a": 0.5, "b": 0.5}},
        {"method": "rewarded-soup-factors", "weights": {"a": 0.5, "b": 0.5}},
        {"weights": [{"a": 1.0}, {"b": 1.0}], "kl_scale": 1.3, "eta": 0.7, "noise": "flow_sde"},
        {"method": "code", "method_options": {"candidates": 2, "block_size": 2}},
        {"method": "rgg", "method_options": {"gamma": None}},
    ],
    ids=["LS", "factors", "product", "CoDe", "RGG"],
)
def test_every_other_method_samples_from_a_flow(wrapped: DiffusionBlendPipeline, options: Any) -> None:
    rewards = {"rewards": {"light": Brightness()}} if options.get("method") in ("code", "rgg") else {}
    images = call(wrapped, **options, **rewards)
    assert images.isfinite().all()
    assert not torch.equal(images, call(wrapped, method="base"))
    if rewards:
        assert images.mean() > call(wrapped, method="base", eta=1.0).mean()


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_does_not_fit_a_flow_is_refused_in_a_sentence(
    plain: Any, wrapped: DiffusionBlendPipeline, sd15_folder: Path, tmp_path: Path
) -> None:
    unet = DiffusersBackbone(str(sd15_folder))
    unet.adapters.add("one", seed=0)
    for form in ("diffusers", "kohya", "peft"):
        file = unet.adapters.export("one", tmp_path / form, unet.pipeline, format=form)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"holds no denoiser LoRA|another kind of model|does not have") as refusal:
            wrapped.load_adapter("sd15", file, allow_other_base=True)
        assert str(refusal.value).count("\n") == 0
    for source in (plain.folder / "b", plain.folder / "peft" / "b"):
        with pytest.raises(ValueError, match="holds no denoiser LoRA|another kind of model|does not have"):
            unet.adapters.load("flow", source, unet.pipeline, allow_other_base=True)
    ddim = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    with pytest.raises(ValueError, match="predicts velocities and its scheduler .* is not of flow matching"):
        DiffusionBlendPipeline.from_pretrained(plain.folder / "base", {}, scheduler=ddim)
    with pytest.raises(ValueError, match="predicts noise and its scheduler is of flow matching"):
        DiffusionBlendPipeline.from_pretrained(sd15_folder, {}, scheduler=FlowMatchEulerDiscreteScheduler())
    folder = shutil.copytree(plain.folder / "base", tmp_path / "wrong")
    ddim.save_pretrained(folder / "scheduler")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("FlowMatchEulerDiscreteScheduler", "DDIMScheduler"))
    with pytest.raises(ValueError, match="is not of flow matching"):
        _ = DiffusersBackbone(str(folder), resolution=16).scheduler_config
    with pytest.raises(ValueError, match=r"eta of cps must be >= 0 and <= 1 .* got 1.5"):
        call(wrapped, method="base", eta=1.5)
    with pytest.raises(ValueError, match=r"eta of flow_sde must be >= 0 and <= 2 .* got 2.5"):
        call(wrapped, method="base", eta=2.5, noise="flow_sde")
    message = "shift is made for 16 to 256 image tokens" if plain.kind == "flux" else "at most 32 pixels a side"
    with pytest.raises(ValueError, match=message):
        call(wrapped, method="base", height=128, width=128)
    with pytest.raises(ValueError, match="shift is made for|multiples of"):
        call(wrapped, method="base", height=8, width=10 if plain.kind != "flux" else 8)
    small = DiffusionBlendPipeline.from_pretrained(sd15_folder, {})
    small.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="noise 'cps' is of flow matching, and DDIMScheduler is not"):
        small("a star", method="base", num_inference_steps=2, noise="cps")
    small.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="predicts noise and its scheduler is of flow matching"):
        small("a star", method="base", num_inference_steps=2)


def test_other_flow_schedulers_step_by_their_own_rule(wrapped: DiffusionBlendPipeline) -> None:
    from diffusers import UniPCMultistepScheduler

    own = wrapped.scheduler
    try:
        wrapped.scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        solver = wrapped._solver(3, None, None, None, None, None, None, (16, 16))
        assert isinstance(solver, DiffusersSolver)
        assert call(wrapped, method="base").isfinite().all()
        # training and evaluation need a step of known density: ours, with that scheduler's shift
        ours = make_solver(wrapped.backbone.scheduler_config, 3, 0.5)
        assert isinstance(ours, FlowSolver)
        expected = make_solver(dict(FlowMatchEulerDiscreteScheduler(shift=3.0).config), 3, 0.5)
        assert torch.equal(ours.timesteps, expected.timesteps)
    finally:
        wrapped.scheduler = own


# ── guidance that is not affine ──────────────────────────────────────────────────────────────────────────────────────


def test_guidance_that_is_not_affine_is_applied_once_after_the_blend(ours: DiffusersBackbone) -> None:
    """As Qwen-Image's, which rescales the guided prediction to the conditional one's norm."""
    if ours.family.guidance != "classifier-free":
        pytest.skip("an embedded guidance has no second pass")

    class Rescaled(type(ours.family)):  # type: ignore[misc]
        affine_guidance = False

        def guide(self, unconditional: Tensor, conditional: Tensor, scale: float, conditioning: Any) -> Tensor:
            guided = unconditional + scale * (conditional - unconditional)
            return guided * (conditional.norm(dim=1, keepdim=True) / guided.norm(dim=1, keepdim=True))

    family: Family = ours.family
    weights = torch.tensor([0.3, 0.7])
    solver = make_solver(ours.scheduler_config, 1, 0.0)
    x, conditioning, timesteps = first_latents(), ours.encode(PROMPTS), solver.timesteps[:1].expand(2)
    ours.family = Rescaled(ours.pipeline, 16)
    try:
        outputs = [ours.passes(x, timesteps, conditioning, GUIDANCE, torch.eye(3)[i].expand(2, 3)) for i in range(2)]
        mixed = sum(w * each for w, each in zip(weights, outputs, strict=True))
        expected = x - ours.guide(mixed[:, 0], mixed[:, 1], GUIDANCE, conditioning)  # one step from σ = 1 to 0
        with torch.no_grad():
            got = denoise_loop(
                ours, conditioning, solver, DBMPA({"a": 0.3, "b": 0.7}), ImageNoise([0, 1]), guidance_scale=GUIDANCE
            )
        close(got, expected.detach())
        each = [ours.guide(part[:, 0], part[:, 1], GUIDANCE, conditioning) for part in outputs]
        assert (got - (x - sum(w * part for w, part in zip(weights, each, strict=True)))).abs().max() > 1e-3
    finally:
        ours.family = family


# ── training and evaluation from YAML ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("kind", "noise"), [("sd35", "flow_sde"), ("flux", "cps")])
def test_a_flow_trains_is_watched_predicts_and_is_tested_from_yaml(kind: str, noise: str, tmp_path: Path) -> None:
    base = saved(kind, tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    backbone = {"class_path": "dblightning.backbone.DiffusersBackbone",
                "init_args": {"pretrained": str(base), "resolution": 16, "max_sequence_length": TOKENS}}  # fmt: skip
    prompts = {"train_file": str(tmp_path / "prompts.txt"), "batch_size": 2, "rollouts_per_epoch": 1}
    data = {"class_path": "dblightning.data.PromptFileDataModule", "init_args": prompts}
    trainer = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_progress_bar": False, "logger": False,
               "enable_checkpointing": False, "num_sanity_val_steps": 0, "default_root_dir": str(tmp_path)}  # fmt: skip
    sampling = {"num_inference_steps": 4, "eta": 0.7, "noise": noise, "guidance_scale": 2.0}
    config: dict[str, Any] = {
        "trainer": trainer,
        "model": {
            "backbone": backbone,
            "reward": {"class_path": "dblightning.rewards.JPEGCompressibility"},
            "sampling": sampling,
            "adapter": {"name": "size"},
            "optimisation": {"policy_steps": 2, "accumulation": 1, "learning_rate": 1e-3},
            "advantage": {"baseline": "prompt"},
            "replay": {"buffer_size": None},
            "kl": {"form": "eps_mse"},
            **({"window": {"size": 2, "position": "random"}} if kind == "flux" else {}),
        },
        "data": data,
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    blends = [{"method": "base"}, {"method": "single", "weights": {"size": 1.0}}]
    callbacks = [
        {"class_path": "dblightning.callbacks.ExportAdapter", "init_args": {"folder": str(tmp_path / "a")}},
        {
            "class_path": "dblightning.callbacks.BlendSamplingCallback",
            "init_args": {"blends": blends, "every_n_rollouts": 1, "num_prompts": 1, "eta": 0.5,
                          "out": str(tmp_path / "watched"), "max_share": None},
        },
    ]  # fmt: skip
    cli.main(["fit", "--config", str(tmp_path / "fit.yaml"), "--trainer.callbacks", json.dumps(callbacks)])
    assert list((tmp_path / "watched").glob("rollout-*.parquet"))
    pipe = plain_pipeline(base)
    pipe.load_lora_weights(tmp_path / "a")
    wanted = {name.rpartition(".lora_A")[0] for name in pipe.transformer.state_dict() if ".lora_A." in name}
    assert any("add_q_proj" in name for name in wanted)

    del config["model"]
    evaluation = {
        "backbone": backbone, "adapters": {"size": str(tmp_path / "a")}, "blends": blends, "out": str(tmp_path / "out"),
        "num_inference_steps": 3, "eta": 0.5, "noise": noise, "guidance_scale": 2.0,
        "rewards": {"size": {"class_path": "dblightning.rewards.JPEGCompressibility"}},
    }  # fmt: skip
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(config | {"model": evaluation}))
    cli.main(["predict", "--config", str(tmp_path / "eval.yaml")])
    assert len(list((tmp_path / "out").rglob("*.png"))) == 4
    cli.main(["test", "--config", str(tmp_path / "eval.yaml"), "--model.out", str(tmp_path / "scores")])
    assert list((tmp_path / "scores").glob("*.parquet"))


def test_the_tiny_pipelines_are_what_they_say(tmp_path: Path) -> None:
    assert isinstance(plain_pipeline(saved("flux", tmp_path / "flux")), FluxPipeline)
    assert isinstance(plain_pipeline(saved("sd35", tmp_path / "sd35")), StableDiffusion3Pipeline)
