"""A soup as one LoRA: what plain diffusers, PEFT and a reader of ComfyUI's keys make of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file

from dblightning import DiffusionBlendPipeline, miniature
from dblightning.adapters import file_digest, read_metadata
from dblightning.adapters.files import read_lora
from dblightning.adapters.lora import LoraFactors, LoraFile
from dblightning.adapters.soup import soup_lora
from dblightning.cli import main
from dblightning.preset import Preset
from dblightning.sharing.export import export_soup

WEIGHTS = {"aesthetic": 0.3, "alignment": 0.5, "compressibility": 0.2}
PROMPTS = ["A red colored circle.", "A blue square and a green star."]
SAMPLING = {"num_inference_steps": 8, "guidance_scale": 3.0, "output_type": "pt"}


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def blended() -> tuple[Any, Any]:
    """The soup's images and the base's, by the pipeline; and its scheduler."""
    pipe = DiffusionBlendPipeline.from_pretrained("miniature", adapters=miniature.adapters("0.1"))
    made = [
        pipe(PROMPTS, generator=generators(), **settings, **SAMPLING).images
        for settings in ({"weights": WEIGHTS, "method": "rewarded-soup"}, {"method": "base"})
    ]
    assert (made[0] - made[1]).abs().max() > 0.1  # the soup does something
    return made[0], pipe.scheduler


def plain(scheduler: Any) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(miniature.path(), safety_checker=None)
    pipe.scheduler = type(scheduler).from_config(scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("format", ["diffusers", "comfyui"])
def test_plain_diffusers_makes_the_soups_images(tmp_path: Path, blended: Any, format: str) -> None:
    path, made = export_soup(miniature.adapters("0.1"), WEIGHTS, tmp_path, format, name="mix")
    assert made.error == 0 and made.rank == 12
    assert path.name == {"diffusers": "pytorch_lora_weights.safetensors", "comfyui": "mix.safetensors"}[format]
    pipe = plain(blended[1])
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    images = pipe(PROMPTS, generator=generators(), **SAMPLING).images
    torch.testing.assert_close(torch.as_tensor(images), blended[0], rtol=0, atol=1e-4)


def test_peft_loads_it(tmp_path: Path, blended: Any) -> None:
    export_soup(miniature.adapters("0.1"), WEIGHTS, tmp_path, "peft")
    pipe = plain(blended[1])
    pipe.unet = PeftModel.from_pretrained(pipe.unet, str(tmp_path)).merge_and_unload()
    images = pipe(PROMPTS, generator=generators(), **SAMPLING).images
    torch.testing.assert_close(torch.as_tensor(images), blended[0], rtol=0, atol=1e-4)


def test_comfyuis_keys_are_the_documented_ones(tmp_path: Path) -> None:
    """``lora_unet_`` + diffusers' module name with underscores, each with down, up and a scalar alpha; nothing else."""
    path, _ = export_soup(miniature.adapters("0.1"), WEIGHTS, tmp_path, "comfyui")
    unet = UNet2DConditionModel.from_pretrained(miniature.path(), subfolder="unet")
    modules = [
        name
        for name, _ in unet.named_modules()
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")) and "attn" in name
    ]
    expected = {
        f"lora_unet_{name.replace('.', '_')}.{part}"
        for name in modules
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    tensors = load_file(path)
    assert set(tensors) == expected
    for name in modules:
        key = f"lora_unet_{name.replace('.', '_')}"
        up, down, alpha = (tensors[f"{key}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        assert alpha.ndim == 0 and alpha.item() == down.shape[0] == up.shape[1] == 12
        assert (up.shape[0], down.shape[1]) == unet.get_submodule(name).weight.shape


def delta(lora: LoraFile, module: str) -> torch.Tensor:
    each = lora.modules["unet"][module]
    return each.alpha / each.rank * (each.up.flatten(1).double() @ each.down.flatten(1).double())


def test_the_cut_is_the_best_of_its_rank_and_its_error_is_what_is_said() -> None:
    parts = {name: read_lora(path) for name, path in miniature.adapters("0.1").items()}
    whole, cut = soup_lora(parts, WEIGHTS), soup_lora(parts, WEIGHTS, rank=4)
    lost = total = 0.0
    for module in whole.lora.modules["unet"]:
        direct = sum(weight * delta(parts[name], module) for name, weight in WEIGHTS.items())
        torch.testing.assert_close(delta(whole.lora, module), direct, rtol=0, atol=1e-7)
        values = torch.linalg.svdvals(direct)  # Eckart and Young: what no LoRA of rank 4 can do better than
        error = (delta(cut.lora, module) - direct).square().sum()
        assert error.item() == pytest.approx(values[4:].square().sum().item(), rel=1e-4)
        lost, total = lost + error.item(), total + direct.square().sum().item()
    assert cut.error == pytest.approx(math.sqrt(lost / total), rel=1e-4)
    assert 0 < cut.error < cut.worst[1] < 1
    assert soup_lora(parts, WEIGHTS, rank=12).error < 1e-6
    assert cut.lora.facts["relative_error"] == cut.error and cut.rank == 4


def test_convolutions_scales_biases_and_modules_of_one_part_alone() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    first = LoraFile({"unet": {"conv": LoraFactors(random(2, 3, 3, 3), random(5, 2, 1, 1), 6.0)}})
    second = LoraFile(
        {
            "unet": {
                "conv": LoraFactors(random(4, 3, 3, 3), random(5, 4, 1, 1), 2.0),
                "linear": LoraFactors(random(1, 7), random(6, 1), 3.0, bias=random(6)),
            }
        }
    )
    weights = {"a": 0.25, "b": 0.75}
    made = soup_lora({"a": first, "b": second}, weights).lora
    direct = 0.25 * delta(first, "conv") + 0.75 * delta(second, "conv")
    torch.testing.assert_close(delta(made, "conv"), direct, rtol=0, atol=1e-5)
    assert made.modules["unet"]["conv"].down.shape == (6, 3, 3, 3)
    torch.testing.assert_close(delta(made, "linear"), 0.75 * delta(second, "linear"), rtol=0, atol=1e-5)
    # PEFT multiplies the bias by the scale: 3 / 1 there, 1 here
    torch.testing.assert_close(made.modules["unet"]["linear"].bias, 0.75 * 3 * second.modules["unet"]["linear"].bias)  # type: ignore[operator]
    assert not made.modules["unet"]["conv"].bias.any()  # type: ignore[union-attr]
    cut = soup_lora({"a": first, "b": second}, weights, rank=3).lora.modules["unet"]["conv"]
    assert cut.down.shape == (3, 3, 3, 3) and cut.up.shape == (5, 3, 1, 1)


def test_half_precision_stays_close(tmp_path: Path, blended: Any) -> None:
    export_soup(miniature.adapters("0.1"), WEIGHTS, tmp_path, dtype="float16")
    pipe = plain(blended[1])
    pipe.load_lora_weights(tmp_path)
    images = pipe(PROMPTS, generator=generators(), **SAMPLING).images
    # fp16 rounds each factor by 5e-4 of itself
    torch.testing.assert_close(torch.as_tensor(images), blended[0], rtol=0, atol=2e-2)


def test_metadata_name_the_parts_by_digest(tmp_path: Path) -> None:
    export_soup(miniature.adapters("0.1"), {"alignment": 0.4, "aesthetic": 0.6}, tmp_path)
    facts = read_metadata(tmp_path)
    assert facts["weights"] == {"alignment": 0.4, "aesthetic": 0.6} and facts["method"] == "rewarded-soup"
    assert set(facts["parts"]) == {"alignment", "aesthetic"}
    for name in facts["parts"]:
        assert facts["parts"][name]["sha256"] == file_digest(miniature.adapters("0.1")[name])
    assert facts["adapter"] == "soup_aesthetic-0.6_alignment-0.4"
    # it loads here as an adapter of the same base
    pipe = DiffusionBlendPipeline.from_pretrained("miniature", adapters={"mix": tmp_path})
    assert pipe.adapters.settings("mix")["rank"] == 8


def test_what_has_no_soup_is_refused_in_a_sentence(tmp_path: Path) -> None:
    adapters = miniature.adapters("0.1")
    with pytest.raises(ValueError, match=r"sum to 1, got .* \(sum 0.9\)"):
        export_soup(adapters, {"alignment": 0.4, "aesthetic": 0.5}, tmp_path)
    with pytest.raises(ValueError, match="weights name 'beauty', but the adapters are"):
        export_soup(adapters, {"beauty": 1.0}, tmp_path)
    parts = {name: read_lora(path) for name, path in adapters.items()}
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        soup_lora(parts, WEIGHTS, rank=0)
    parts["alignment"].facts["base_fingerprint"] = [1.0] * 16
    with pytest.raises(ValueError, match="'aesthetic' and 'alignment' were trained on different base models"):
        soup_lora(parts, WEIGHTS)
    del parts["alignment"].facts["base_fingerprint"]
    module = next(iter(parts["alignment"].modules["unet"].values()))
    module.magnitude = torch.ones(len(module.up))
    with pytest.raises(ValueError, match="'alignment' is a DoRA .* full rank"):
        soup_lora(parts, WEIGHTS)
    assert not list(tmp_path.iterdir())


def test_the_export_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mix.safetensors"
    command = ["export", "--weights", "alignment=0.3,aesthetic=0.7", "--format", "comfyui", "--out", str(out)]
    main([*command, "--rank", "4"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}: cut to rank 4: ‖ΔW − ΔW'‖ / ‖ΔW‖ is 0.")
    with pytest.raises(SystemExit, match="exists; name another file, or pass --overwrite"):
        main(command)
    main([*command, "--overwrite"])
    assert "exact, rank 32" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="alignment=much is not a number"):
        main(["export", "--weights", "alignment=much", "--out", str(out)])
    with pytest.raises(SystemExit, match="brings no adapters; name them"):
        main(["export", "--weights", "alignment=1", "--base", str(tmp_path), "--out", str(out)])


def test_a_preset_is_exported_as_far_as_a_lora_holds_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {"alignment": 0.4, "aesthetic": 0.6}
    file = Preset(weights=weights, method="rewarded-soup").write(tmp_path / "p.yaml")
    main(["export", "--preset", str(file), "--out", str(tmp_path / "a")])
    assert read_metadata(tmp_path / "a")["weights"] == weights
    assert not capsys.readouterr().err
    Preset(weights=weights).write(file)
    main(["export", "--preset", str(file), "--out", str(tmp_path / "b")])
    assert "is of db-mpa, whose images differ from those of this soup" in capsys.readouterr().err
    for preset, message in (
        (Preset(weights=[{"alignment": 1.0}, {"aesthetic": 1.0}]), "weights that change along the trajectory"),
        (Preset(weights=weights, kl_scale=2), "kl_scale 2, which a soup has no place for"),
    ):
        preset.write(file)
        with pytest.raises(SystemExit, match=message):
            main(["export", "--preset", str(file), "--out", str(tmp_path / "c")])
