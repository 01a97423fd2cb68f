from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from dblightning.adapters import AdapterBank
from dblightning.backbone import DiffusersBackbone
from dblightning.blending import DBMPA
from dblightning.noise import ImageNoise
from dblightning.pipeline import DiffusionBlendPipeline
from dblightning.sampling import denoise_loop
from dblightning.solvers import make_solver
from dblightning.steering import CoDe
from tests.conftest import randomize
from tests.toy_rewards import Brightness

STEPS = 4
BLEND = {"a": 0.3, "b": 0.7}


@pytest.fixture(scope="module")
def lora_folders(sd15_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    backbone = DiffusersBackbone(str(sd15_folder))
    root = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("a", "b")):
        backbone.adapters.add(name, rank=2 + 2 * seed, seed=seed)
        randomize(backbone.adapters, name, seed)
        backbone.adapters.export(name, root / name, backbone.pipeline)
    return {name: root / name for name in ("a", "b")}


@pytest.fixture(scope="module")
def pipe(sd15_folder: Any, lora_folders: Any) -> DiffusionBlendPipeline:
    made = DiffusionBlendPipeline.from_pretrained(sd15_folder, adapters=lora_folders)
    made.set_progress_bar_config(disable=True)
    return made


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents_of(pipe: Any, prompt: Any = "a red circle", weights: Any = BLEND, **options: Any) -> torch.Tensor:
    settings = {"num_inference_steps": STEPS, "generator": seeded(), "eta": 1.0, "output_type": "latent", **options}
    return pipe(prompt, weights, **settings).images


@pytest.fixture(scope="module")
def plain(sd15_folder: Any) -> Any:
    made = StableDiffusionPipeline.from_pretrained(sd15_folder, safety_checker=None)
    made.set_progress_bar_config(disable=True)
    return made


# ── the same as diffusers ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("generators", ["one", "list"])
def test_the_base_method_is_the_plain_pipeline(pipe: Any, plain: Any, eta: float, generators: str) -> None:
    def fresh() -> Any:
        return seeded() if generators == "one" else [seeded(index) for index in range(4)]

    settings = dict(num_inference_steps=STEPS, guidance_scale=3.0, eta=eta, num_images_per_prompt=2)
    prompts, negatives = ["a red circle", "a blue star"], ["a ring", "a cross"]
    expected = plain(prompts, negative_prompt=negatives, generator=fresh(), output_type="pt", **settings).images
    got = pipe(
        prompts, method="base", negative_prompt=negatives, generator=fresh(), output_type="pt", **settings
    ).images
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)  # float32 over four steps and a decoder


def test_one_adapter_is_the_plain_pipeline_with_that_lora(pipe: Any, sd15_folder: Any, lora_folders: Any) -> None:
    plain = StableDiffusionPipeline.from_pretrained(sd15_folder, safety_checker=None)
    plain.load_lora_weights(lora_folders["b"])
    expected = plain(
        "a red circle", num_inference_steps=STEPS, generator=seeded(), eta=1.0, output_type="latent"
    ).images
    torch.testing.assert_close(latents_of(pipe, weights={"b": 1.0}), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "scheduler",
    [
        (DPMSolverMultistepScheduler, dict(algorithm_type="dpmsolver++")),
        (DPMSolverMultistepScheduler, dict(algorithm_type="sde-dpmsolver++")),
        (EulerAncestralDiscreteScheduler, {}),
        (PNDMScheduler, dict(skip_prk_steps=True)),
    ],
)
def test_another_scheduler_is_the_plain_pipeline_with_it(sd15_folder: Any, plain: Any, scheduler: Any) -> None:
    kind, options = scheduler
    made = kind.from_config(plain.scheduler.config, **options)
    ours = DiffusionBlendPipeline.from_pretrained(sd15_folder, scheduler=made)
    ours.set_progress_bar_config(disable=True)
    theirs = StableDiffusionPipeline(**{**plain.components, "scheduler": kind.from_config(made.config)})
    theirs.set_progress_bar_config(disable=True)
    settings = dict(num_inference_steps=STEPS, generator=seeded(), output_type="latent")
    expected = theirs("a red circle", **settings).images
    got = latents_of(ours, weights=None, method="base", eta=None)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)  # Euler starts at 14.6 times DDIM's size


def test_pil_images_are_the_plain_pipelines(pipe: Any, plain: Any) -> None:
    import numpy as np

    expected = plain("a red circle", num_inference_steps=STEPS, generator=seeded(), eta=1.0).images[0]
    got = pipe("a red circle", method="base", num_inference_steps=STEPS, generator=seeded(), eta=1.0).images[0]
    assert got.size == expected.size and got.mode == expected.mode
    # one level: float noise of 1e-4 can cross a rounding boundary of 1/255
    assert np.abs(np.asarray(got, int) - np.asarray(expected, int)).max() <= 1


def test_sdxl_is_the_plain_xl_pipeline(sdxl_folder: Any) -> None:
    plain = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False)
    settings = dict(num_inference_steps=STEPS, generator=seeded(), guidance_scale=3.0, eta=1.0)
    expected = plain("a red circle", output_type="pt", **settings).images
    ours = DiffusionBlendPipeline.from_pretrained(sdxl_folder)
    settings["generator"] = seeded()
    got = ours("a red circle", method="base", output_type="pt", **settings).images
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(16, 32), (32, 16)])
def test_height_and_width_are_the_plain_pipelines(pipe: Any, plain: Any, size: tuple[int, int]) -> None:
    height, width = size
    settings = dict(num_inference_steps=2, height=height, width=width, eta=1.0, output_type="latent")
    expected = plain("a red circle", generator=seeded(), **settings).images
    got = pipe("a red circle", method="base", generator=seeded(), **settings).images
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


# ── a thin shell ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_makes_what_the_loop_makes(pipe: Any) -> None:
    backbone, prompts = pipe.backbone, ["a red circle", "a blue star"]
    weights = [{"a": 0.3, "b": 0.7}, {"b": 1.0}]
    first = ImageNoise([0, 1])(backbone.latent_shape)
    solver = make_solver(backbone.scheduler_config, STEPS, 0.0)
    with torch.no_grad():
        expected = denoise_loop(
            backbone, backbone.encode(prompts), solver, DBMPA(weights, [1.0, 1.5]), ImageNoise([0, 1]), latents=first
        )
    got = latents_of(pipe, prompts, weights, kl_scale=[1.0, 1.5], latents=first, eta=0.0)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("method", ["db-mpa", "db-mpa-ls", "rewarded-soup"])
def test_every_blend_lies_off_its_endpoints_and_repeats(pipe: Any, method: str) -> None:
    got = latents_of(pipe, method=method)
    assert torch.equal(got, latents_of(pipe, method=method))
    for name in ("a", "b"):
        # 1e-3: ten times what rounding explains
        assert (got - latents_of(pipe, weights={name: 1.0}, method="single")).abs().max() > 1e-3


def test_images_of_one_prompt_stand_side_by_side(pipe: Any) -> None:
    generators = [seeded(index) for index in range(4)]
    images = latents_of(pipe, ["a red circle", "a blue star"], num_images_per_prompt=2, generator=generators)
    alone = latents_of(pipe, "a blue star", generator=[seeded(2)])
    torch.testing.assert_close(images[2:3], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_outputs_have_the_shape_diffusers_gives_them(pipe: Any, output_type: str) -> None:
    images, unsafe = pipe(["x", "y"], BLEND, num_inference_steps=1, output_type=output_type, return_dict=False)
    assert unsafe is None  # StableDiffusionPipeline's second value
    shapes = {"np": (2, 16, 16, 3), "pt": (2, 3, 16, 16), "latent": (2, 4, 8, 8)}
    assert len(images) == 2 if output_type == "pil" else images.shape == shapes[output_type]


def test_code_and_rgg_are_methods(pipe: Any) -> None:
    rewards = {"bright": Brightness()}
    base = latents_of(pipe, weights=None, method="base")
    for method, options in (("code", {"candidates": 3, "block_size": 2}), ("rgg", {"gamma": None, "kl_weight": 1e-3})):
        got = latents_of(pipe, weights={"bright": 1.0}, method=method, rewards=rewards, method_options=options)
        assert (got - base).abs().max() > 1e-3
    steered = latents_of(pipe, steering=CoDe(rewards, candidates=3, block_size=2))
    assert (steered - latents_of(pipe)).abs().max() > 1e-3


# ── behaviour ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_callback_sees_and_replaces_latents_and_may_stop(pipe: Any) -> None:
    seen: list[Any] = []

    def watch(given_pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((given_pipe is pipe, step, int(timestep), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    names = ["latents", "prompt_embeds"]
    final = latents_of(pipe, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names)
    assert not final.any()
    assert [each[:2] for each in seen] == [(True, step) for step in range(STEPS)]
    assert [each[2] for each in seen] == [751, 501, 251, 1] and seen[0][3] == names

    def stop(given_pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        given_pipe._interrupt = step == 1
        seen.append(tensors["latents"])
        return {}

    assert torch.equal(latents_of(pipe, callback_on_step_end=stop), seen[-1])
    assert len(seen) == STEPS + 2
    assert latents_of(pipe).any()  # the next call is not stopped


def test_the_progress_bar_counts_the_steps(pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pipe.set_progress_bar_config(disable=False)
    latents_of(pipe)
    pipe.set_progress_bar_config(disable=True)
    assert f"{STEPS}/{STEPS}" in capsys.readouterr().err


def test_moving_to_half_precision_and_back_is_followed(sd15_folder: Any, lora_folders: Any) -> None:
    made = DiffusionBlendPipeline.from_pretrained(sd15_folder, adapters=lora_folders)
    made.set_progress_bar_config(disable=True)
    first = latents_of(made, method="rewarded-soup")
    made.to(torch.bfloat16)
    half = latents_of(made, method="rewarded-soup")
    assert half.dtype == torch.float32 and half.isfinite().all()  # latents stay float32 between steps
    made.to(torch.float32)
    # bfloat16 keeps 8 bits of the weights: the pictures differ by percents, not wholly
    assert (latents_of(made, method="rewarded-soup") - first).abs().max() < 0.2


def test_model_offload_makes_the_same_images(sd15_folder: Any, lora_folders: Any, pipe: Any) -> None:
    made = DiffusionBlendPipeline.from_pretrained(sd15_folder, adapters=lora_folders)
    made.set_progress_bar_config(disable=True)
    made.enable_model_cpu_offload(device="cpu")  # the hooks alone; no accelerator here
    for method in ("db-mpa", "rewarded-soup"):
        torch.testing.assert_close(latents_of(made, method=method), latents_of(pipe, method=method), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="enable_model_cpu_offload"):
        made.enable_sequential_cpu_offload()


def test_three_lines_blend_the_loras_of_a_plain_pipeline(sd15_folder: Any, lora_folders: Any, pipe: Any) -> None:
    plain = StableDiffusionPipeline.from_pretrained(sd15_folder, safety_checker=None)
    for name, folder in lora_folders.items():
        plain.load_lora_weights(folder, adapter_name=name)
    blend = DiffusionBlendPipeline.from_pipe(plain)
    blend.set_progress_bar_config(disable=True)
    assert blend.adapters.names == ["a", "b"]
    torch.testing.assert_close(latents_of(blend), latents_of(pipe), rtol=0, atol=1e-5)


def test_a_fused_lora_is_refused(sd15_folder: Any, lora_folders: Any) -> None:
    plain = StableDiffusionPipeline.from_pretrained(sd15_folder, safety_checker=None)
    plain.load_lora_weights(lora_folders["a"], adapter_name="a")
    plain.fuse_lora()
    with pytest.raises(ValueError, match="unfuse_lora"):
        DiffusionBlendPipeline.from_pipe(plain)


def test_what_it_lacks_is_the_wrapped_pipelines(pipe: Any) -> None:
    assert pipe.unet is pipe.backbone.unet and pipe.vae_scale_factor == 2
    with pytest.raises(AttributeError):
        pipe.no_such_thing  # noqa: B018


# ── refusals, before the first denoiser call ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(weights={"a": -0.5, "b": 1.5}), r">= 0 and sum to 1|finite and >= 0"),
        (dict(weights={"a": 0.5}), "sum 0.5"),
        (dict(weights={"a": float("nan")}), "nan"),
        (dict(weights={"vila": 1.0}), "weights name 'vila'"),
        (dict(weights=None), "needs weights"),
        (dict(weights=[BLEND] * 3), "weights for 3 images, but the batch has 1"),
        (dict(kl_scale=-1.0), "got -1.0"),
        (dict(kl_scale=[1.0, 2.0]), "kl_scale for 2 images, but the batch has 1"),
        (dict(method="soup"), "method must be one of .* got 'soup'"),
        (dict(method="code"), "needs rewards"),
        (dict(method="code", rewards={"x": Brightness()}), "weights name 'a', but the rewards are"),
        (dict(method="rgg", rewards={"x": Brightness()}, kl_scale=2.0), "has no kl_scale, got 2.0"),
        (dict(method="code", rewards={"x": Brightness()}, method_options={"particles": 2}), "particles"),
        (dict(rewards={"x": Brightness()}), "belong to"),
        (dict(prompt=[]), "non-empty list"),
        (dict(prompt=[1]), r"got \[1\]"),
        (dict(negative_prompt=["x", "y"]), "2 negative prompts for 1 prompts"),
        (dict(generator=[seeded()] * 2), "2 generators for 1 images"),
        (dict(latents=torch.zeros(2, 4, 8, 8)), r"got \(2, 4, 8, 8\)"),
        (dict(output_type="png"), "got 'png'"),
        (dict(num_inference_steps=0), "num_inference_steps must be a whole number from 1 to"),
        (dict(num_images_per_prompt=0), "num_images_per_prompt must be at least 1"),
        (dict(eta=1.5), "eta must lie between 0"),
        (dict(height=17), "multiples of 16 .* got 17"),
        (dict(max_rows=0), "max_rows must be at least 1"),
        (dict(callback_on_step_end_tensor_inputs=["image"]), "got 'image'"),
    ],
)
def test_bad_input_is_refused_with_its_value_before_the_first_denoiser_call(
    pipe: Any, options: dict[str, Any], says: str
) -> None:
    called: list[int] = []
    handle = pipe.unet.register_forward_pre_hook(lambda *args: called.append(1))
    settings = {"prompt": "a red circle", "weights": BLEND, "num_inference_steps": 1, **options}
    try:
        with pytest.raises(ValueError, match=says):
            pipe(**settings)
    finally:
        handle.remove()
    assert not called


def test_an_adapter_of_another_base_is_refused(sd15_folder: Any, sdxl_folder: Any, lora_folders: Any) -> None:
    with pytest.raises(ValueError, match="another"):
        DiffusionBlendPipeline.from_pretrained(sdxl_folder, adapters={"a": lora_folders["a"]})


def test_a_missing_adapter_or_base_is_named(sd15_folder: Any, tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match="no LoRA for adapter 'a'"):
        DiffusionBlendPipeline.from_pretrained(sd15_folder, adapters={"a": tmp_path / "nowhere"})
    with pytest.raises(FileNotFoundError, match="no diffusers pipeline at"):
        DiffusionBlendPipeline.from_pretrained(tmp_path / "nowhere")


def test_the_bank_is_the_backbones(pipe: Any) -> None:
    assert isinstance(pipe.adapters, AdapterBank) and pipe.adapters is pipe.backbone.adapters
