"""The pipeline against plain diffusers, heading by heading: outputs, loading, components, LoRAs, callbacks, inputs."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.callbacks import SDCFGCutoffCallback, SDXLCFGCutoffCallback
from diffusers.utils import BaseOutput
from peft import LoraConfig
from safetensors.torch import load_file

from dblightning.adapters import WEIGHTS_NAME
from dblightning.backbone import DiffusersBackbone
from dblightning.blending import Blend, BlendPlan, BlendStep
from dblightning.pipeline import DiffusionBlendPipeline
from tests.conftest import randomize

PROMPT = "a red circle"
#: float32 over a few guided steps, the two halves of guidance batched in another order
CLOSE: dict[str, Any] = dict(rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def loras(sd15_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    backbone = DiffusersBackbone(str(sd15_folder))
    root = tmp_path_factory.mktemp("contract_loras")
    for seed, name in enumerate(("a", "b")):
        backbone.adapters.add(name, rank=2, seed=seed)
        randomize(backbone.adapters, name, seed)
        backbone.adapters.export(name, root / name, backbone.pipeline)
    return {name: root / name for name in ("a", "b")}


@pytest.fixture
def plain(sd15_folder: Any) -> Any:
    return quiet(StableDiffusionPipeline.from_pretrained(sd15_folder, safety_checker=None))


@pytest.fixture
def plain_xl(sdxl_folder: Any) -> Any:
    return quiet(StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False))


@pytest.fixture
def ours(sd15_folder: Any) -> Any:
    return quiet(DiffusionBlendPipeline.from_pretrained(sd15_folder))


@pytest.fixture
def ours_xl(sdxl_folder: Any) -> Any:
    return quiet(DiffusionBlendPipeline.from_pretrained(sdxl_folder, add_watermarker=False))


@pytest.fixture
def blended(sd15_folder: Any, loras: Any) -> Any:
    return quiet(DiffusionBlendPipeline.from_pretrained(sd15_folder, adapters=loras))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, prompt: Any = PROMPT, **options: Any) -> torch.Tensor:
    """Latents of two steps."""
    settings = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    return pipe(prompt, **{**settings, **options})[0]


def same(pipe: Any, other: Any, prompt: Any = PROMPT, **options: Any) -> None:
    torch.testing.assert_close(run(pipe, prompt, **options), run(other, prompt, **options), **CLOSE)


def differ(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one - other).abs().max() > 1e-3  # ten times what rounding explains


# ── outputs and defaults ─────────────────────────────────────────────────────────────────────────────────────────────


def test_an_output_is_a_base_output_and_a_tuple_is_the_plain_pipelines(ours: Any, plain: Any) -> None:
    settings = dict(num_inference_steps=1, output_type="pt")
    output = ours(PROMPT, generator=torch.Generator().manual_seed(0), **settings)
    assert isinstance(output, BaseOutput)
    assert output.images is output["images"] and output.images is output[0]
    expected = plain(PROMPT, generator=torch.Generator().manual_seed(0), return_dict=False, **settings)
    got = ours(PROMPT, generator=torch.Generator().manual_seed(0), return_dict=False, **settings)
    assert len(got) == len(expected) and got[1] is expected[1] is None
    torch.testing.assert_close(got[0], expected[0], **CLOSE)


def test_the_defaults_of_a_plain_call_are_diffusers(ours: Any, plain: Any, ours_xl: Any, plain_xl: Any) -> None:
    same(ours, plain)  # eta 0, guidance 7.5
    plain_xl.scheduler = DDIMScheduler.from_config({"clip_sample": False, **plain_xl.scheduler.config})
    same(ours_xl, plain_xl)  # guidance 5


def test_a_method_that_needs_noise_has_it_by_default(blended: Any) -> None:
    weights = {"a": 0.5, "b": 0.5}
    assert torch.equal(run(blended, weights=weights), run(blended, weights=weights, eta=0.0))
    drawn = run(blended, weights=weights, method="db-mpa-ls")
    assert torch.equal(drawn, run(blended, weights=weights, method="db-mpa-ls", eta=1.0))
    differ(drawn, run(blended, weights=weights, method="db-mpa-ls", eta=0.0))


def test_a_blend_object_of_ones_own_is_used(blended: Any) -> None:
    class SecondAdapter(Blend):
        def start(self, adapters: Any, batch: int, num_steps: int, generators: Any = None) -> BlendPlan:
            gates = torch.nn.functional.one_hot(torch.tensor([1]), len(adapters)).float().expand(1, batch, -1)
            return lambda step_index: BlendStep(gates, torch.ones(1, batch, dtype=torch.float64))

    assert torch.equal(run(blended, blend=SecondAdapter()), run(blended, weights={"b": 1.0}, method="single"))
    with pytest.raises(ValueError, match="weights"):
        run(blended, blend=SecondAdapter(), weights={"b": 1.0})


# ── making, saving, copying ──────────────────────────────────────────────────────────────────────────────────────────


def test_it_is_made_of_components(plain: Any, plain_xl: Any) -> None:
    for each in (plain, plain_xl):
        made = quiet(DiffusionBlendPipeline(**each.components))
        assert set(made.components) == set(each.components) and made.unet is each.unet
        same(made, each)


def test_a_scheduler_made_with_defaults_steps_as_in_the_plain_pipeline(plain: Any) -> None:
    """The plain pipeline corrects ``steps_offset``; a copy of the scheduler must not fall back to the default."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False)
    components = {**plain.components, "scheduler": scheduler}
    same(quiet(DiffusionBlendPipeline(**components)), quiet(StableDiffusionPipeline(**components)))


def test_saving_and_loading_keeps_base_adapters_and_scheduler(blended: Any, plain: Any, tmp_path: Any) -> None:
    blended.scheduler = EulerDiscreteScheduler.from_config(plain.scheduler.config)
    base, mixed = run(blended, method="base"), run(blended, weights={"a": 0.3, "b": 0.7})
    blended.save_pretrained(tmp_path)
    loaded = quiet(DiffusionBlendPipeline.from_pretrained(tmp_path))
    assert loaded.adapters.names == ["a", "b"] and type(loaded.scheduler) is EulerDiscreteScheduler
    # Euler's latents start at 14.6 times DDIM's size
    torch.testing.assert_close(run(loaded, weights={"a": 0.3, "b": 0.7}), mixed, rtol=0, atol=1e-3)
    torch.testing.assert_close(run(loaded, method="base"), base, rtol=0, atol=1e-3)
    reread = quiet(StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None))
    torch.testing.assert_close(run(reread), base, rtol=0, atol=1e-3)
    reread.load_lora_weights(tmp_path / "adapters" / "b")
    single = run(blended, weights={"b": 1.0})
    torch.testing.assert_close(run(reread), single, rtol=0, atol=1e-3)


def test_from_pretrained_takes_diffusers_keywords(sd15_folder: Any, plain: Any) -> None:
    vae = copy.deepcopy(plain.vae)
    made = DiffusionBlendPipeline.from_pretrained(
        sd15_folder, dtype=torch.bfloat16, vae=vae, use_safetensors=True, local_files_only=True
    )
    assert made.vae is vae and made.unet.dtype == torch.bfloat16
    mapped = DiffusionBlendPipeline.from_pretrained(
        sd15_folder, dtype={"unet": torch.float16, "default": torch.float32}
    )
    assert mapped.unet.dtype == torch.float16 and mapped.text_encoder.dtype == torch.float32


def test_a_copy_and_a_pickle_make_the_same_images_and_are_apart(blended: Any) -> None:
    weights = {"a": 0.3, "b": 0.7}
    before = run(blended, weights=weights)
    for other in (copy.deepcopy(blended), pickle.loads(pickle.dumps(blended))):
        torch.testing.assert_close(run(other, weights=weights), before, **CLOSE)
        with torch.no_grad():
            other.unet.conv_in.weight.mul_(2)
        differ(run(other, weights=weights), before)
        torch.testing.assert_close(run(blended, weights=weights), before, **CLOSE)


# ── components ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "scheduler"])
@pytest.mark.parametrize("through", ["pipe", "plain"])
def test_an_assigned_component_is_used_by_both_pipelines(plain: Any, name: str, through: str) -> None:
    blend = quiet(DiffusionBlendPipeline.from_pipe(plain))
    before = run(blend, output_type="pt")
    if name == "scheduler":
        other: Any = EulerDiscreteScheduler.from_config(plain.scheduler.config)
    else:
        other = copy.deepcopy(getattr(plain, name))
        with torch.no_grad():
            for weight in other.parameters():
                weight.mul_(1.1)
    setattr(blend if through == "pipe" else plain, name, other)
    assert getattr(blend, name) is getattr(plain, name) is other
    got = run(blend, output_type="pt")
    differ(got, before)
    torch.testing.assert_close(got, run(plain, output_type="pt"), **CLOSE)
    if name != "scheduler":  # what moves, counts and saves modules sees it too
        assert dict(blend.backbone.named_children())[name] is other


def test_another_unet_brings_its_own_adapters(blended: Any, plain: Any, loras: Any) -> None:
    plain.load_lora_weights(loras["b"], adapter_name="mine")
    expected = run(blended, weights={"b": 1.0})
    blended.unet = plain.unet
    assert blended.adapters.names == ["mine"]
    torch.testing.assert_close(run(blended, weights={"mine": 1.0}), expected, **CLOSE)
    with pytest.raises(ValueError, match="'b'"):
        run(blended, weights={"b": 1.0})


def test_a_compiled_unet_keeps_its_adapters(blended: Any) -> None:
    bank = blended.adapters
    blended.unet = torch.compile(blended.unet, backend="eager")
    assert blended.adapters is bank and blended.unet is blended.backbone.unet


# ── LoRAs under diffusers' names ─────────────────────────────────────────────────────────────────────────────────────


def test_active_adapters_are_diffusers_weighted_sum(blended: Any, plain: Any, loras: Any) -> None:
    for name, folder in loras.items():
        plain.load_lora_weights(folder, adapter_name=name)
    base = run(blended, method="base")
    for pipe in (plain, blended):
        pipe.set_adapters(["a", "b"], [0.5, 1.5])
        assert pipe.get_active_adapters() == ["a", "b"] and pipe.get_list_adapters() == {"unet": ["a", "b"]}
    same(blended, plain)
    same(blended, plain, cross_attention_kwargs={"scale": 0.5})
    differ(run(blended), base)
    blended.disable_lora()
    assert torch.equal(run(blended), base)
    blended.enable_lora()
    same(blended, plain)
    assert torch.equal(run(blended, method="base"), base)  # a call that says what it wants gets it


def test_the_scale_of_a_call_scales_what_the_factors_make(blended: Any) -> None:
    options: dict[str, Any] = dict(weights={"a": 0.5, "b": 0.5}, method="rewarded-soup-factors")
    scale = {"scale": 4.0}
    merged, gated = (
        run(blended, **options, cross_attention_kwargs=scale, execution=each) for each in ("merged", "gated")
    )
    torch.testing.assert_close(merged, gated, **CLOSE)
    differ(merged, run(blended, **options))
    # to first order in ΔW, four times the scale is four times the effect
    base, once = run(blended, method="base"), run(blended, **options, cross_attention_kwargs={"scale": 0.01})
    twice = run(blended, **options, cross_attention_kwargs={"scale": 0.02})
    torch.testing.assert_close((twice - base).norm() / (once - base).norm(), torch.tensor(2.0), rtol=0.1, atol=0)


@pytest.mark.parametrize("form", ["folder", "weight_name", "file", "state dict"])
def test_load_lora_weights_loads_and_activates_as_diffusers_does(ours: Any, plain: Any, loras: Any, form: str) -> None:
    file = loras["b"] / WEIGHTS_NAME
    given, options = {
        "folder": (loras["b"], {}),
        "weight_name": (loras["b"], {"weight_name": WEIGHTS_NAME}),
        "file": (file, {}),
        "state dict": (load_file(file), {}),
    }[form]
    for pipe in (ours, plain):
        pipe.load_lora_weights(dict(given) if isinstance(given, dict) else given, **options)
    assert ours.get_active_adapters() == plain.get_active_adapters() == ["default_0"]
    same(ours, plain)


def test_deleted_and_unloaded_adapters_are_gone(blended: Any, plain: Any) -> None:
    blended.set_adapters(["a", "b"])
    blended.delete_adapters("a")
    assert blended.adapters.names == ["b"] and blended.get_active_adapters() == ["b"]
    with pytest.raises(ValueError, match="'a'"):
        run(blended, weights={"a": 1.0})
    with pytest.raises(ValueError, match="no adapter 'a'"):
        blended.delete_adapters(["b", "a"])
    assert blended.adapters.names == ["b"]
    blended.unload_lora_weights()
    assert blended.adapters.names == [] and blended.get_list_adapters() == {}
    with pytest.raises(ValueError, match="'b'"):
        run(blended, weights={"b": 1.0}, method="rewarded-soup")
    same(blended, plain)


@pytest.mark.parametrize("name", ["fuse_lora", "set_lora_device", "enable_lora_hotswap", "load_ip_adapter"])
def test_what_blends_cannot_do_is_refused_by_name_and_nothing_changes(blended: Any, name: str) -> None:
    before = run(blended, method="base"), run(blended, weights={"a": 1.0})
    with pytest.raises(ValueError, match=name):
        getattr(blended, name)()
    assert torch.equal(before[0], run(blended, method="base"))
    assert torch.equal(before[1], run(blended, weights={"a": 1.0}))


def test_fused_projections_and_adapters_exclude_each_other(blended: Any, ours: Any, plain: Any, loras: Any) -> None:
    with pytest.raises(ValueError, match="bypass the adapters"):
        blended.fuse_qkv_projections()
    for pipe in (ours, plain):
        pipe.fuse_qkv_projections()
    same(ours, plain)
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        ours.load_adapter("a", loras["a"])


def test_ip_adapter_images_are_refused(ours: Any) -> None:
    with pytest.raises(ValueError, match="ip_adapter_image"):
        run(ours, ip_adapter_image=object())


# ── callbacks ────────────────────────────────────────────────────────────────────────────────────────────────────────


def both_with_callback(
    pipe: Any, other: Any, make: Any, names: list[str], prompt: Any = PROMPT, **options: Any
) -> None:
    settings = dict(callback_on_step_end_tensor_inputs=names, num_inference_steps=4, guidance_scale=3.0, **options)
    got, expected = (run(each, prompt, callback_on_step_end=make(), **settings) for each in (pipe, other))
    torch.testing.assert_close(got, expected, **CLOSE)
    differ(got, run(pipe, prompt, num_inference_steps=4, guidance_scale=3.0, **options))


def zeroed(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}


def in_place(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    tensors["prompt_embeds"].mul_(0.5)
    return {}


def moved(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"] + 1}


def stronger(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._guidance_scale += 1.5
    return tensors


@pytest.mark.parametrize("callback", [zeroed, in_place, moved, stronger])
def test_what_a_callback_changes_is_used_from_then_on(ours: Any, plain: Any, callback: Any) -> None:
    both_with_callback(ours, plain, lambda: callback, ["latents", "prompt_embeds"], [PROMPT, "a blue star"])


@pytest.mark.parametrize("callback", [in_place, stronger])
def test_callbacks_work_in_inference_mode(ours: Any, callback: Any) -> None:
    options = dict(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    expected = run(ours, num_inference_steps=3, **options)
    with torch.inference_mode():
        got = run(ours, num_inference_steps=3, **options)
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("step", [0, 1])
def test_diffusers_cutoff_callbacks_have_their_effect(
    ours: Any, plain: Any, ours_xl: Any, plain_xl: Any, step: int
) -> None:
    plain_xl.scheduler = DDIMScheduler.from_config({"clip_sample": False, **plain_xl.scheduler.config})
    for one, other, kind in ((ours, plain, SDCFGCutoffCallback), (ours_xl, plain_xl, SDXLCFGCutoffCallback)):
        both_with_callback(one, other, lambda k=kind: k(cutoff_step_ratio=None, cutoff_step_index=step), ["latents"])


def test_a_cutoff_leaves_each_image_of_a_batch_its_own_prompt(ours: Any) -> None:
    def cut() -> Any:
        return SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)

    prompts = [PROMPT, "a blue star"]
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    batch = run(ours, prompts, generator=generators, callback_on_step_end=cut())
    for index, prompt in enumerate(prompts):
        alone = run(ours, prompt, generator=torch.Generator().manual_seed(index), callback_on_step_end=cut())
        torch.testing.assert_close(batch[index : index + 1], alone, **CLOSE)


def test_a_call_s_settings_are_properties(ours: Any) -> None:
    seen: list[Any] = []

    def watch(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((pipe.num_timesteps, pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.guidance_rescale))
        seen.append((pipe.clip_skip, pipe.interrupt, sorted(tensors)))
        pipe._guidance_scale = 1.0
        pipe._interrupt = step == 1
        return tensors

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    run(ours, num_inference_steps=5, guidance_scale=4.0, guidance_rescale=0.3, clip_skip=1,
        callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names)  # fmt: skip
    assert seen == [(5, 4.0, True, 0.3), (1, False, sorted(names)), (5, 1.0, False, 0.3), (1, False, sorted(names))]
    assert ours.guidance_scale == 1.0 and ours.num_timesteps == 5 and ours.interrupt
    assert run(ours).any() and not ours.interrupt


def test_a_callback_cannot_turn_on_guidance_that_has_no_embeddings(ours: Any, plain: Any) -> None:
    embeds, _ = plain.encode_prompt(PROMPT, "cpu", 1, False)

    def turn_on(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 5.0
        return tensors

    with pytest.raises(ValueError, match="no negative_prompt_embeds"):
        run(ours, None, prompt_embeds=embeds, guidance_scale=1.0, callback_on_step_end=turn_on)


# ── inputs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "options",
    [
        dict(guidance_rescale=0.7, guidance_scale=9.0),
        dict(num_images_per_prompt=2, negative_prompt=["a ring", "a cross"]),
        dict(height=32, width=16),
        dict(height=24, width=40),  # 12 and 20 latents, which three halvings do not divide
    ],
)
def test_options_are_the_plain_pipelines(ours: Any, plain: Any, options: Any) -> None:
    same(ours, plain, [PROMPT, "a blue star"], **options)
    differ(
        run(ours, [PROMPT, "a blue star"], **options)[:1, :, :8, :8], run(ours, [PROMPT, "a blue star"])[:1, :, :8, :8]
    )


def test_clip_skip_leaves_out_the_last_layer(ours: Any, plain: Any) -> None:
    """The penultimate layer's output through the final norm; diffusers cannot do it with every transformers."""
    encoder, outputs = plain.text_encoder, []
    inner = getattr(encoder, "text_model", encoder)
    handle = inner.encoder.layers[-2].register_forward_hook(lambda module, args, output: outputs.append(output))
    _, negative = plain.encode_prompt(PROMPT, "cpu", 1, True, "a blue star")
    outputs.clear()
    plain.encode_prompt(PROMPT, "cpu", 1, False)
    handle.remove()
    hidden = outputs[0] if torch.is_tensor(outputs[0]) else outputs[0][0]
    embeds = inner.final_layer_norm(hidden)
    got = run(ours, negative_prompt="a blue star", clip_skip=1)
    torch.testing.assert_close(got, run(plain, None, prompt_embeds=embeds, negative_prompt_embeds=negative), **CLOSE)
    differ(got, run(ours, negative_prompt="a blue star"))


@pytest.mark.parametrize("given", ["both", "prompt_embeds", "negative_prompt_embeds"])
def test_prompt_embeddings_go_in(ours: Any, plain: Any, given: str) -> None:
    embeds, negative = plain.encode_prompt([PROMPT, "a ring"], "cpu", 1, True, ["a blue star"] * 2)
    embeds = embeds * 1.5  # what no text gives
    options: dict[str, Any] = {"num_images_per_prompt": 2}
    prompt = None
    if given == "negative_prompt_embeds":
        prompt = [PROMPT, "a ring"]
    else:
        options["prompt_embeds"] = embeds
    if given != "prompt_embeds":
        options["negative_prompt_embeds"] = negative
    same(ours, plain, prompt, **options)


XL_SIZES = dict(original_size=(40, 24), crops_coords_top_left=(4, 2), target_size=(24, 40))
XL_NEGATIVE = dict(negative_original_size=(8, 8), negative_crops_coords_top_left=(1, 1), negative_target_size=(24, 24))


@pytest.mark.parametrize(
    "options",
    [
        dict(height=16, width=32),
        XL_SIZES,
        {**XL_SIZES, **XL_NEGATIVE},
        dict(prompt_2="a blue star", negative_prompt="a ring", negative_prompt_2="a cross"),
        dict(clip_skip=1),
        dict(denoising_end=0.6, num_inference_steps=5),
    ],
)
def test_xl_options_are_the_plain_pipelines(ours_xl: Any, plain_xl: Any, options: Any) -> None:
    plain_xl.scheduler = DDIMScheduler.from_config({"clip_sample": False, **plain_xl.scheduler.config})
    same(ours_xl, plain_xl, **options)


def test_xl_embeddings_go_in(ours_xl: Any, plain_xl: Any) -> None:
    plain_xl.scheduler = DDIMScheduler.from_config({"clip_sample": False, **plain_xl.scheduler.config})
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    made = plain_xl.encode_prompt([PROMPT, "a ring"], negative_prompt=["a cross", "a star"])
    same(ours_xl, plain_xl, None, **dict(zip(names, made, strict=True)), num_images_per_prompt=2)


def test_an_xl_pipeline_without_text_encoders_runs_on_embeddings(plain_xl: Any) -> None:
    made = plain_xl.encode_prompt(PROMPT)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    expected = run(plain_xl)
    bare = {name: None if "text" in name or "token" in name else part for name, part in plain_xl.components.items()}
    got = run(quiet(DiffusionBlendPipeline(**bare)), None, guidance_scale=5.0, **dict(zip(names, made, strict=True)))
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("custom", [dict(timesteps=[900, 500, 100]), dict(sigmas=[10.0, 3.0, 1.0])])
def test_custom_steps_are_the_plain_pipelines(ours: Any, plain: Any, custom: Any) -> None:
    for pipe in (ours, plain):
        pipe.scheduler = EulerDiscreteScheduler.from_config(plain.scheduler.config)
    got, expected = (run(pipe, num_inference_steps=None, **custom) for pipe in (ours, plain))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)  # Euler starts at 14.6 times DDIM's size


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(prompt_2="x"), "prompt_2 is not an argument of a StableDiffusionPipeline"),
        (dict(original_size=(16, 16)), "original_size is not an argument"),
        (dict(denoising_end=0.5), "denoising_end is not an argument"),
        (dict(timesteps=[900, 100]), "DDIMScheduler takes no custom timesteps"),
        (dict(prompt_embeds=torch.zeros(1, 16, 16)), "prompt"),
        (dict(prompt=None), "got neither"),
        (dict(callback_on_step_end_tensor_inputs=["add_time_ids"]), "got 'add_time_ids'"),
        (dict(method="base", blend="db-mpa"), "not both"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_before_the_first_denoiser_call(ours: Any, options: Any, says: str) -> None:
    called: list[int] = []
    ours.unet.register_forward_pre_hook(lambda *args: called.append(1))
    with pytest.raises(ValueError, match=says):
        ours(**{"prompt": PROMPT, "num_inference_steps": 1, **options})
    assert not called


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_vae_with_means_and_deviations_of_its_own_decodes_as_in_the_plain_pipeline(
    ours_xl: Any, plain_xl: Any
) -> None:
    plain_xl.scheduler = DDIMScheduler.from_config({"clip_sample": False, **plain_xl.scheduler.config})
    before = run(ours_xl, output_type="pt")
    for pipe in (ours_xl, plain_xl):
        pipe.vae.register_to_config(latents_mean=[0.5, -1.0, 2.0, 0.1], latents_std=[1.5, 0.5, 2.0, 1.0])
    same(ours_xl, plain_xl, output_type="pt")
    differ(run(ours_xl, output_type="pt"), before)


def test_a_vae_s_shift_is_added(ours: Any) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scale = ours.vae.config.scaling_factor
    with torch.no_grad():
        expected = (ours.vae.decode(latents / scale + 0.3).sample / 2 + 0.5).clamp(0, 1)
        ours.vae.register_to_config(shift_factor=0.3)
        torch.testing.assert_close(ours.backbone.decode(latents), expected, **CLOSE)


@pytest.mark.parametrize("guidance_scale", [1.0, 8.0])
def test_a_model_that_takes_the_guidance_as_an_input_is_fed_it(plain: Any, guidance_scale: float) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config({**plain.unet.config, "time_cond_proj_dim": 8})
    scheduler = LCMScheduler.from_config(plain.scheduler.config)
    components = {**plain.components, "unet": unet, "scheduler": scheduler}
    one, other = quiet(DiffusionBlendPipeline(**components)), quiet(StableDiffusionPipeline(**components))
    same(one, other, guidance_scale=guidance_scale)
    assert not one.do_classifier_free_guidance
    differ(run(one, guidance_scale=guidance_scale), run(one, guidance_scale=guidance_scale + 1))


def test_a_safety_checker_is_asked(plain: Any) -> None:
    class Checker(torch.nn.Module):
        def forward(self, images: Any, clip_input: Any) -> Any:
            return images, [True, False]

    class Features:
        def __call__(self, images: Any, return_tensors: str) -> Any:
            from transformers import BatchFeature

            return BatchFeature({"pixel_values": torch.zeros(len(images), 3, 2, 2)})

    pipe = quiet(DiffusionBlendPipeline.from_pipe(plain))
    clean = run(pipe, [PROMPT, PROMPT], output_type="pt")
    plain.safety_checker, plain.feature_extractor = Checker(), Features()
    output = pipe([PROMPT, PROMPT], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt")
    assert output.nsfw_content_detected == [True, False] and not output.images[0].any()
    torch.testing.assert_close(output.images[1], clean[1], **CLOSE)


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize("method", ["single", "rewarded-soup"])
def test_layerwise_casting_is_the_plain_pipelines(
    blended: Any, plain: Any, loras: Any, storage: torch.dtype, method: str
) -> None:
    weights = {"a": 1.0} if method == "single" else {"a": 0.5, "b": 0.5}
    uncast = run(blended, weights=weights, method=method)
    for name, folder in loras.items():
        plain.load_lora_weights(folder, adapter_name=name)
    plain.set_adapters(list(weights), list(weights.values()))
    for pipe in (blended, plain):
        pipe.unet.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    got = run(blended, weights=weights, method=method)
    torch.testing.assert_close(got, run(plain), **CLOSE)
    differ(got, uncast)


def test_a_dtype_move_leaves_the_adapters_values(blended: Any) -> None:
    before = {name: blended.adapters.state_dict(name) for name in ("a", "b")}
    blended.to(torch.bfloat16)
    assert blended.unet.conv_in.weight.dtype == torch.bfloat16
    for name, state in before.items():
        after = blended.adapters.state_dict(name)
        assert all(torch.equal(after[key], value) and after[key].dtype == torch.float32 for key, value in state.items())


# ── text encoders ────────────────────────────────────────────────────────────────────────────────────────────────────


def scaled(pipe: Any) -> None:
    with torch.no_grad():
        for weight in pipe.text_encoder.parameters():
            weight.mul_(1.5)


def scaled_behind(pipe: Any) -> None:
    for weight in pipe.text_encoder.parameters():
        weight.data.mul_(1.5)


def replaced(pipe: Any) -> None:
    other = copy.deepcopy(pipe.text_encoder)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    pipe.text_encoder = other


@pytest.mark.parametrize("change", [scaled, scaled_behind, replaced])
def test_a_changed_text_encoder_is_seen(ours: Any, plain: Any, change: Any) -> None:
    before = run(ours)
    for pipe in (ours, plain):
        change(pipe)
    same(ours, plain)
    differ(run(ours), before)


def test_a_lora_put_on_a_text_encoder_later_is_switched_off(ours: Any) -> None:
    before = run(ours)
    torch.manual_seed(0)
    ours.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "extra")
    with pytest.warns(UserWarning, match="switched off"):
        assert torch.equal(run(ours, "a blue star"), run(ours, "a blue star"))
    torch.testing.assert_close(run(ours), before, **CLOSE)


def test_the_prompt_cache_is_bounded_in_bytes(sd15_folder: Any) -> None:
    backbone = DiffusersBackbone(str(sd15_folder), prompt_cache_bytes=5000)
    length, width = 16, 16
    one = 4 * (length * width + width)  # float32 embeddings and the pooled vector
    for count in range(10):
        backbone.encode([f"{count} stars", f"{count} rings"])
    assert len(backbone._prompt_cache) == 5000 // one and backbone._prompt_cache.bytes == 5000 // one * one
    kept = backbone._prompt_cache.bytes
    backbone.encode(["9 rings"])  # the last one is still there, and takes no more room
    assert backbone._prompt_cache.bytes == kept


# ── threads ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_threads_make_the_images_of_one(blended: Any) -> None:
    """Single-adapter weights that differ, merged and gated, sizes that differ: whoever reads another's gates is off."""
    jobs: list[dict[str, Any]] = [
        dict(weights={name: 1.0}, execution=execution, height=height, num_inference_steps=4,
             generator=torch.Generator().manual_seed(seed))
        for seed, (name, execution, height) in enumerate(
            [("a", "gated", 16), ("b", "gated", 16), ("a", "merged", 32), ("b", "merged", 16)] * 2
        )
    ]  # fmt: skip
    states = [job["generator"].get_state() for job in jobs]
    expected = [run(blended, **job) for job in jobs]
    for job, state in zip(jobs, states, strict=True):
        job["generator"].set_state(state)
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda job: run(blended, **job), jobs))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_sizes_of_xl_calls_do_not_mix_between_threads(ours_xl: Any) -> None:
    sizes = [(16, 32), (32, 16), (16, 16), (32, 32)]
    expected = [run(ours_xl, height=height, width=width) for height, width in sizes]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda size: run(ours_xl, height=size[0], width=size[1]), sizes))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_a_callback_s_stop_and_guidance_are_its_own_call_s(blended: Any) -> None:
    together = threading.Barrier(2, timeout=60)
    steps: dict[str, int] = {"stopped": 0, "whole": 0}
    seen: list[float] = []

    def call(name: str) -> torch.Tensor:
        def watch(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            steps[name] += 1
            if step == 0:
                together.wait()  # both calls run now
                if name == "stopped":
                    pipe._interrupt = True
                    pipe._guidance_scale = 1.0
                together.wait()
            if name == "whole":
                seen.append(pipe.guidance_scale)
            return tensors

        return run(blended, method="base", num_inference_steps=3, guidance_scale=4.0, callback_on_step_end=watch)

    expected = run(blended, method="base", num_inference_steps=3, guidance_scale=4.0)
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(steps, pool.map(call, list(steps)), strict=True))
    assert steps == {"stopped": 1, "whole": 3} and seen == [4.0] * 3
    torch.testing.assert_close(results["whole"], expected, **CLOSE)


def test_a_thread_without_a_call_stops_the_call_that_runs(ours: Any) -> None:
    started, stopped = threading.Event(), threading.Event()
    steps: list[int] = []

    def watch(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        started.set()
        assert stopped.wait(60)
        return tensors

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(lambda: run(ours, num_inference_steps=5, callback_on_step_end=watch))
        assert started.wait(60)
        ours._interrupt = True
        stopped.set()
        job.result()
    assert steps == [0]
