"""FLUX LoRAs under the original code's names, against plain diffusers and against sums of matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import save_file
from torch import Tensor

from dblightning.adapters.files import read_lora
from dblightning.pipeline import DiffusionBlendPipeline
from tests.tiny_pipelines import save_flux

WIDTH, RANK, ALPHA = 32, 4, 2.0
#: the original code's layers in a double block → (outputs, inputs) in units of the width
LAYERS = {"img_attn.qkv": (3, 1), "img_attn.proj": (1, 1), "img_mlp.0": (4, 1), "img_mlp.2": (1, 4)}
LAYERS |= {name.replace("img", "txt"): sizes for name, sizes in LAYERS.items()}


def factors(width: int = WIDTH) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return {
        name: (
            torch.randn(RANK, inputs * width, generator=generator),
            torch.randn(outputs * width, RANK, generator=generator),
        )
        for name, (outputs, inputs) in LAYERS.items()
    }


def write(file: Path, form: str) -> Path:
    tensors = {}
    for name, (down, up) in factors().items():
        if form == "sd-scripts":
            key, parts = f"lora_unet_double_blocks_0_{name.replace('.', '_')}", ("lora_down", "lora_up")
        else:
            key, parts = f"diffusion_model.double_blocks.0.{name}", ("lora_A", "lora_B")
        tensors |= {f"{key}.{parts[0]}.weight": down, f"{key}.{parts[1]}.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, file)
    return file


@pytest.mark.parametrize("form", ["sd-scripts", "comfyui"])
def test_fused_projections_are_split_into_the_rows_of_their_update(tmp_path: Path, form: str) -> None:
    found = read_lora(write(tmp_path / "lora.safetensors", form), denoiser="transformer").modules["transformer"]
    update = {name: ALPHA / RANK * up @ down for name, (down, up) in factors().items()}
    block = "transformer_blocks.0"
    expected = {f"{block}.attn.to_{part}": update["img_attn.qkv"].chunk(3)[i] for i, part in enumerate("qkv")}
    expected |= {f"{block}.attn.add_{part}_proj": update["txt_attn.qkv"].chunk(3)[i] for i, part in enumerate("qkv")}
    expected |= {f"{block}.attn.to_out.0": update["img_attn.proj"], f"{block}.attn.to_add_out": update["txt_attn.proj"]}
    for stream, ff in (("img", "ff"), ("txt", "ff_context")):
        expected |= {f"{block}.{ff}.net.0.proj": update[f"{stream}_mlp.0"]}
        expected |= {f"{block}.{ff}.net.2": update[f"{stream}_mlp.2"]}
    assert set(found) == set(expected)
    for name, lora in found.items():
        got = lora.alpha / len(lora.down) * lora.up @ lora.down
        torch.testing.assert_close(got, expected[name], rtol=1e-5, atol=1e-5)


def test_a_single_blocks_fused_layer_is_split_at_fluxs_own_widths(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    down, up = torch.randn(1, 3072, generator=generator), torch.randn(3 * 3072 + 12288, 1, generator=generator)
    key = "lora_unet_single_blocks_7_linear1"
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, tmp_path / "lora.safetensors")
    found = read_lora(tmp_path / "lora.safetensors").modules["transformer"]
    names = [f"single_transformer_blocks.7.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    assert set(found) == set(names)
    torch.testing.assert_close(torch.cat([found[name].up for name in names]), up)
    assert all(torch.equal(found[name].down, down) for name in names)


def test_it_draws_what_plain_diffusers_draws_with_it(tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", "sd-scripts")
    folder = save_flux(tmp_path / "base")
    plain = FluxPipeline.from_pretrained(folder)
    plain.load_lora_weights(str(tmp_path), weight_name=file.name)
    ours = DiffusionBlendPipeline.from_pretrained(folder, {"a": file})
    settings: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 16, "max_sequence_length": 16}

    def latents(pipe: Any, **options: Any) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(6)
        made = pipe("a red circle", generator=generator, output_type="latent", **settings, **options).images
        return torch.as_tensor(made).flatten().sort().values  # plain FLUX's are packed

    expected = latents(plain)
    torch.testing.assert_close(latents(ours, weights={"a": 1.0}), expected, rtol=1e-4, atol=1e-4)
    plain.disable_lora()
    assert (latents(plain) - expected).abs().max() > 0.01


def test_a_key_that_the_converter_does_not_know_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", "sd-scripts")
    down, up = factors()["img_attn.proj"]
    odd = "lora_unet_double_blocks_0_img_other"
    save_file({f"{odd}.lora_down.weight": down, f"{odd}.lora_up.weight": up}, file)
    with pytest.raises(ValueError, match=r"diffusers cannot convert .*lora_unet_double_blocks_0_img_other"):
        read_lora(file)
    save_file({"lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a": down}, file)
    with pytest.raises(ValueError, match="which is not LoRA"):
        read_lora(file)
