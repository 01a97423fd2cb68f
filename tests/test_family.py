"""A family of models from outside the package: its denoiser is called "transformer", its guidance is embedded."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dblightning import DiffusionBlendPipeline, cli
from dblightning.adapters import AdapterBank
from dblightning.backbone import FAMILIES, Conditioning, DiffusersBackbone, Family, StableDiffusion, family_of
from dblightning.blending import Base
from dblightning.module import RewardRLModule
from dblightning.noise import ImageNoise
from dblightning.rewards import JPEGCompressibility
from dblightning.sampling import denoise_loop
from dblightning.solvers import make_solver
from dblightning.training_settings import AdapterSettings
from tests.conftest import randomize

MODULE = '''
"""A pipeline class and its family."""

import torch
from diffusers import DiffusionPipeline

from dblightning.backbone import DiffusersBackbone, Family, register


class TinyPipeline(DiffusionPipeline):
    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, transformer, vae, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.vae_scale_factor = 2

    def __call__(self, prompt):
        raise NotImplementedError


@register("TinyPipeline")
class TinyFamily(Family):
    denoiser_name = lora_prefix = "transformer"
    target_modules = ("to_q", "to_v")
    guidance = "embedded"
    guidance_scale = 3.5
    pooled_dim = 1
    embeds_dtype = torch.float32

    @classmethod
    def load(cls, source, **options):
        return TinyPipeline.from_pretrained(source, **options)

    @classmethod
    def assemble(cls, components):
        return TinyPipeline(**components) if "transformer" in components else None

    def encode(self, texts, device, clip_skip=None):
        lengths = torch.tensor([[float(len(text[0]))] for text in texts], device=device)
        return torch.sin(lengths * torch.arange(1, 17))[:, None], lengths

    def added(self, rows, like, size, **sizes):
        size = size or self.default_size
        return {"area": torch.full((rows, 1), size[0] * size[1] / 256.0)}, None

    def forward(self, latents, timesteps, conditioning, guidance_scale):
        scale = torch.full((len(latents), 4), guidance_scale) * conditioning.added["area"]
        return self.denoiser(
            latents, timesteps, conditioning.prompt_embeds, timestep_cond=scale, return_dict=False
        )[0]


class TinyBackbone(DiffusersBackbone):
    """The backbone that a config names."""

    family_class = TinyFamily
'''


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, importable by the name ``tiny.__name__``, which nothing has imported yet for a config."""
    folder = tmp_path / "path"
    folder.mkdir()
    name = f"tiny_family_{abs(hash(str(tmp_path)))}"  # a module is imported once
    (folder / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module(name)
    FAMILIES.pop("TinyPipeline", None)


@pytest.fixture
def folder(tiny: Any, tmp_path: Path) -> Path:
    """A pipeline of random weights, saved by diffusers: 16×16 images."""
    from diffusers import UNet2DConditionModel

    from dblightning.miniature.pretrain import build_scheduler
    from tests import tiny_pipelines

    torch.manual_seed(0)
    denoiser = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, cross_attention_dim=16,
        attention_head_dim=2, time_cond_proj_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    pipeline = tiny.TinyPipeline(denoiser, tiny_pipelines._vae(), build_scheduler())
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_family_is_found_by_its_pipelines_class_or_a_class_derived_from_it(tiny: Any, folder: Path) -> None:
    assert FAMILIES["TinyPipeline"] is tiny.TinyFamily
    assert family_of(type("MyTinyPipeline", (tiny.TinyPipeline,), {})) is tiny.TinyFamily
    pipeline = tiny.TinyPipeline.from_pretrained(folder)
    assert isinstance(DiffusersBackbone.from_pipeline(pipeline).family, tiny.TinyFamily)
    with pytest.raises(ValueError, match="no family of models is known for a Path; supported are StableDiffusionPip"):
        family_of(Path)


def test_the_families_of_the_package_are_registered(sd15_folder: Path) -> None:
    assert isinstance(DiffusersBackbone(str(sd15_folder)).family, StableDiffusion)
    assert {"StableDiffusionPipeline", "StableDiffusionXLPipeline"} <= FAMILIES.keys()


def test_a_family_of_a_temporary_module_trains_and_samples_from_yaml(tiny: Any, folder: Path, tmp_path: Path) -> None:
    """The config names the backbone beside the family; the adapter has the family's prefix and targets."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    config: dict[str, Any] = {
        "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_progress_bar": False,
                    "logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0,
                    "default_root_dir": str(tmp_path)},
        "model": {"backbone": {"class_path": f"{tiny.__name__}.TinyBackbone",
                               "init_args": {"pretrained": str(folder)}},
                  "num_inference_steps": 2},
        "data": {"class_path": "dblightning.data.PromptFileDataModule",
                 "init_args": {"train_file": str(tmp_path / "prompts.txt"), "batch_size": 2,
                               "rollouts_per_epoch": 1}},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    callbacks = [{"class_path": "dblightning.callbacks.ExportAdapter", "init_args": {"folder": str(tmp_path / "a")}}]
    reward = ["--model.reward", "dblightning.rewards.JPEGCompressibility", "--model.adapter_name", "size"]
    small = ["--model.policy_steps", "1", "--model.gradient_accumulation", "1", "--model.value_batch_size", "4"]
    cli.main(
        ["fit", "--config", str(tmp_path / "run.yaml"), *reward, *small, "--trainer.callbacks", json.dumps(callbacks)]
    )
    written = load_file(tmp_path / "a" / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("transformer.") for key in written)

    blends = [{"method": "base"}, {"method": "single", "weights": {"size": 1.0}}]
    cli.main(
        ["predict", "--config", str(tmp_path / "run.yaml"), "--model.out", str(tmp_path / "images")]
        + ["--model.adapters", json.dumps({"size": str(tmp_path / "a")}), "--model.blends", json.dumps(blends)]
    )
    assert len(list((tmp_path / "images").rglob("*.png"))) == 4


def test_an_adapter_goes_on_the_familys_layers_and_comes_back_from_its_file(
    tiny: Any, folder: Path, tmp_path: Path
) -> None:
    backbone = tiny.TinyBackbone(str(folder))
    backbone.adapters.add("one", rank=2, seed=0)
    randomize(backbone.adapters, "one", 0, 0.3)
    assert backbone.adapters.settings("one")["target_modules"] == ["to_q", "to_v"]
    for form in ("diffusers", "kohya", "peft"):
        file = backbone.adapters.export("one", tmp_path / form, backbone.pipeline, format=form)
        other = tiny.TinyBackbone(str(folder))
        other.adapters.load("one", file, other.pipeline)
        for key, value in backbone.adapters.state_dict("one").items():
            assert torch.equal(value, other.adapters.state_dict("one")[key])
    plain = DiffusersBackbone(str(folder)).adapters  # the registered family is found by the folder's pipeline class
    assert (plain.prefix, plain.target_modules) == ("transformer", ("to_q", "to_v"))


def test_training_adapts_the_familys_layers_unless_others_are_named(tiny: Any, folder: Path) -> None:
    for named, trained in ((None, ["to_q", "to_v"]), (["to_k"], ["to_k"])):
        settings = AdapterSettings(name="one", target_modules=named)
        module = RewardRLModule(tiny.TinyBackbone(str(folder)), JPEGCompressibility(), adapter=settings)
        assert module.backbone.adapters.settings("one")["target_modules"] == trained
        # as a checkpoint of a run that named them has it
        assert list(module.facts()["target_modules"]) == list(module.hparams["adapter"]["target_modules"]) == trained


def test_a_blend_of_an_embedded_guidance_runs_one_row_an_image(tiny: Any, folder: Path) -> None:
    pipe = DiffusionBlendPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    for seed, name in enumerate(("a", "b")):
        pipe.adapters.add(name, seed=seed)
        randomize(pipe.adapters, name, seed, 0.3)
    rows: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))

    def latents(**settings: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe("a star", num_inference_steps=2, output_type="latent", generator=generator, **settings).images

    blended, strong = latents(weights={"a": 0.4, "b": 0.6}), latents(weights={"a": 0.4, "b": 0.6}, guidance_scale=9.0)
    assert rows == [2, 2, 2, 2]  # two adapters, no unconditional pass
    assert not torch.allclose(blended, strong)
    assert torch.equal(blended, latents(weights={"a": 0.4, "b": 0.6}, guidance_scale=3.5))  # the family's default
    assert pipe.get_list_adapters() == {"transformer": ["a", "b"]}
    with pytest.raises(ValueError, match="original_size is not an argument of a TinyPipeline"):
        pipe("a star", method="base", original_size=(16, 16))
    assert isinstance(DiffusionBlendPipeline(**pipe.components).backbone.family, tiny.TinyFamily)


def test_a_size_belongs_to_the_call(tiny: Any, folder: Path) -> None:
    """Two sizes on one backbone: the conditioning carries each, and the backbone's own does not change."""
    backbone = tiny.TinyBackbone(str(folder))
    small, large = backbone.encode(["a star"]), backbone.encode(["a star"], size=(32, 16))
    assert (small.size, large.size) == (None, (32, 16))
    assert backbone.latent_shape == (4, 8, 8) and backbone.latent_shape_of((32, 16)) == (4, 16, 8)
    assert [each.added["area"].item() for each in (small, large)] == [1.0, 2.0]
    solver = make_solver(backbone.scheduler_config, 2, 0.0)
    latents = denoise_loop(backbone, large, solver, Base(), ImageNoise([0]))
    assert backbone.decode(latents).shape == (1, 3, 32, 16)


def test_a_conditioning_carries_a_familys_own_inputs() -> None:
    ones = torch.ones(2, 3)
    own = {"mask": torch.tensor([[1.0], [2.0]])}
    conditioning = Conditioning(ones, ones, -ones, -ones, added=own)
    assert conditioning.rows(torch.tensor([1])).added["mask"].tolist() == [[2.0]]  # type: ignore[index]
    assert conditioning.to(torch.float16).added["mask"].dtype == torch.float16  # type: ignore[index]
    both = conditioning.guided()
    assert both.prompt_embeds[:, 0].tolist() == [-1.0, -1.0, 1.0, 1.0]
    assert both.added["mask"].flatten().tolist() == [1.0, 2.0, 1.0, 2.0]  # type: ignore[index]
    apart = conditioning._replace(negative_added={"mask": torch.zeros(2, 1)}).guided()
    assert apart.added["mask"].flatten().tolist() == [0.0, 0.0, 1.0, 2.0]  # type: ignore[index]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_prediction_is_the_schedulers(sd15_folder: Path, kind: str) -> None:
    backbone = DiffusersBackbone(str(sd15_folder))
    backbone.pipeline.scheduler.register_to_config(prediction_type=kind)
    assert backbone.prediction == backbone.family.prediction == kind


def test_the_first_names_of_the_denoiser_still_serve(sd15_folder: Path) -> None:
    backbone = DiffusersBackbone(str(sd15_folder))
    assert backbone.unet is backbone.denoiser is backbone.pipeline.unet
    bank = AdapterBank(backbone.unet)
    assert bank.unet is bank.denoiser is backbone.denoiser
    backbone.unet = other = type(backbone.unet).from_config(backbone.unet.config)
    assert backbone.pipeline.unet is backbone.denoiser is other


def test_a_family_without_something_says_so(tiny: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match='attention="eager" is not known for a TinyPipeline'):
        tiny.TinyBackbone(str(folder), attention="eager")
    family: Family = tiny.TinyBackbone(str(folder)).family
    with pytest.raises(ValueError, match="embeddings cannot be given to a TinyPipeline here"):
        family.complete({}, {}, {})
