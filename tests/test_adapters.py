from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn

from dblightning.adapters import AdapterBank, GatedLayer, Gating, Segment, read_metadata
from dblightning.backbone import DiffusersBackbone
from tests.conftest import randomize

PROMPTS = ["a red circle", "a blue star", "a green ring"]


@pytest.fixture
def pair(backbone: Any) -> Any:
    """A backbone with two adapters of different rank, alpha and targets, both with an effect."""
    backbone.adapters.add("one", rank=4, lora_alpha=8, seed=1)
    backbone.adapters.add("two", rank=2, target_modules=["to_q", "to_v"], seed=2)
    randomize(backbone.adapters, "one", 1)
    randomize(backbone.adapters, "two", 2)
    backbone.adapters.train_only(None)
    return backbone


def inputs(rows: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 4, 8, 8, generator=generator), torch.full((rows,), 501)


@torch.no_grad()
def ours(
    backbone: Any,
    gates: list[list[float]] | None,
    factors: bool = False,
    merged: list[float] | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    latents, timesteps = inputs()
    gating = Gating(None if gates is None else torch.tensor(gates), factors, None if merged is None else tuple(merged))
    return backbone.denoise(latents, timesteps, backbone.encode(PROMPTS), guidance_scale, gating)


@torch.no_grad()
def pefts(backbone: Any, adapters: list[str], scales: list[float] | None = None) -> Tensor:
    """The same forward by diffusers' and PEFT's own means: set_adapters, disable_adapters, PEFT's LoRA forward."""
    latents, timesteps = inputs()
    unet, names = backbone.unet, backbone.adapters.names
    layers = [module for module in unet.modules() if isinstance(module, GatedLayer)]
    states = [layer.gate_state for layer in layers]
    for layer in layers:
        layer.gate_state = None  # PEFT's forward
    if adapters:
        unet.enable_adapters()
        unet.set_adapters(adapters, scales or [1.0] * len(adapters))
    else:
        unet.disable_adapters()
    output = unet(latents, timesteps, encoder_hidden_states=backbone.encode(PROMPTS).prompt_embeds).sample
    unet.enable_adapters()
    unet.set_adapters(names, [1.0] * len(names))
    for layer, state in zip(layers, states, strict=True):
        layer.gate_state = state
    return output


# 1e-5: the ranks of all adapters are summed in one product here and adapter by adapter in PEFT
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("form", ["gated", "merged"])
def test_a_one_hot_gate_is_pefts_set_adapter(pair: Any, form: str) -> None:
    base = pefts(pair, [])
    for index, name in enumerate(["one", "two"]):
        gate = [float(index == 0), float(index == 1)]
        got = ours(pair, [gate] * 3) if form == "gated" else ours(pair, None, merged=gate)
        expected = pefts(pair, [name])
        assert (expected - base).abs().max() > 1e-3  # the adapter does something
        torch.testing.assert_close(got, expected, **CLOSE)


def test_zero_gates_are_the_base_model(pair: Any, sd15_folder: Path) -> None:
    plain = DiffusersBackbone(str(sd15_folder))  # never saw PEFT
    expected = ours(plain, None)
    torch.testing.assert_close(pefts(pair, []), expected, rtol=0, atol=0)
    torch.testing.assert_close(ours(pair, None), expected, rtol=0, atol=0)
    torch.testing.assert_close(ours(pair, [[0.0, 0.0]] * 3), expected, **CLOSE)


@pytest.mark.parametrize("form", ["gated", "merged"])
def test_weighted_gates_are_pefts_weighted_set_adapters(pair: Any, form: str) -> None:
    gate = [0.3, 0.7]
    got = ours(pair, [gate] * 3) if form == "gated" else ours(pair, None, merged=gate)
    torch.testing.assert_close(got, pefts(pair, ["one", "two"], gate), **CLOSE)


def test_each_row_of_a_batch_uses_its_own_gate(pair: Any) -> None:
    got = ours(pair, [[1.0, 0.0], [0.0, 0.0], [0.25, 0.75]])
    rows = [pefts(pair, ["one"]), pefts(pair, []), pefts(pair, ["one", "two"], [0.25, 0.75])]
    for row, expected in enumerate(rows):
        torch.testing.assert_close(got[row], expected[row], **CLOSE)


def test_guidance_is_the_usual_combination_of_two_forwards(pair: Any) -> None:
    latents, timesteps = inputs()
    with torch.no_grad():
        conditional = pair.unet(latents, timesteps, pair.encode(PROMPTS).prompt_embeds).sample
        unconditional = pair.unet(latents, timesteps, pair.encode([""] * 3).prompt_embeds).sample
    expected = unconditional + 5.0 * (conditional - unconditional)
    torch.testing.assert_close(ours(pair, None, guidance_scale=5.0), expected, rtol=1e-4, atol=1e-5)


def test_averaged_factors_are_the_product_of_averages(backbone: Any) -> None:
    bank = backbone.adapters
    for name, seed in [("one", 1), ("two", 2)]:
        bank.add(name, rank=3, seed=seed)
        randomize(bank, name, seed)
    layer = next(bank.layers())
    a, b = ([side[name].weight for name in ("one", "two")] for side in (layer.lora_A, layer.lora_B))
    expected = (0.4 * b[0] + 0.6 * b[1]) @ (0.4 * a[0] + 0.6 * a[1])
    torch.testing.assert_close(layer.delta_weight([0.4, 0.6], factors=True), expected)
    gated = ours(backbone, [[0.4, 0.6]] * 3, factors=True)
    torch.testing.assert_close(gated, ours(backbone, None, merged=[0.4, 0.6], factors=True), **CLOSE)
    assert (gated - ours(backbone, [[0.4, 0.6]] * 3)).abs().max() > 1e-3  # and not the exact soup


def test_averaged_factors_of_different_rank_are_refused(pair: Any) -> None:
    with pytest.raises(ValueError, match="one rank"):
        ours(pair, [[0.5, 0.5]] * 3, factors=True)


def test_merged_weights_follow_an_optimiser_step(pair: Any) -> None:
    before = ours(pair, None, merged=[1.0, 0.0])
    with torch.no_grad():
        for parameter in pair.adapters.parameters("one"):
            parameter.mul_(2.0)
    after = ours(pair, None, merged=[1.0, 0.0])
    torch.testing.assert_close(after, ours(pair, [[1.0, 0.0]] * 3), **CLOSE)
    assert (after - before).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_segments_on_merged_weights_are_gated_rows(pair: Any, guidance_scale: float) -> None:
    pair.adapters.add("three", rank=2, target_modules=["conv1"], seed=3)
    randomize(pair.adapters, "three", 3)
    vectors = [(0.0, 1.0, 0.0), (0.0, 0.0, 0.0), (0.6, 0.0, 0.4)]  # the second's base layers are not adapted
    latents, timesteps = inputs(4)
    conditioning = pair.encode([*PROMPTS, "a red star"])._replace(lora_scale=0.5)
    gates = torch.tensor([vectors[0], vectors[1], vectors[1], vectors[2]])
    segments = tuple(map(Segment, vectors, (1, 2, 1)))
    outputs = [
        pair.denoise(latents, timesteps, conditioning, guidance_scale, gating)
        for gating in (Gating(gates), Gating(segments=segments))
    ]
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)
    torch.testing.assert_close(Gating(segments=segments).vectors(4), gates)
    pair.adapters.merged_limit = 1
    with pytest.raises(ValueError, match="too few copies for 2 gate vectors"):
        pair.denoise(latents, timesteps, conditioning, guidance_scale, Gating(segments=segments))


@torch.no_grad()
def test_merged_weights_outlast_a_change_of_another_adapter(pair: Any) -> None:
    ours(pair, None, merged=[1.0, 0.0])
    layer = next(pair.adapters.layers())
    (before,) = layer.merged_weights.values()
    pair.adapters.parameters("two")[0].mul_(2.0)
    ours(pair, None, merged=[0.0, 1.0])
    ours(pair, None, merged=[1.0, 0.0])
    assert any(each is before for each in layer.merged_weights.values())
    pair.adapters.parameters("one")[0].mul_(2.0)
    ours(pair, None, merged=[1.0, 0.0])
    assert not any(each is before for each in layer.merged_weights.values())


def test_the_gated_share_is_the_factors_size_over_the_layers(backbone: Any) -> None:
    assert backbone.adapters.gated_share == 0
    backbone.adapters.add("one", rank=4, target_modules=["to_q"])
    sizes = [layer.get_base_layer().weight.shape for layer in backbone.adapters.layers()]
    expected = sum(4 * (height + width) for height, width in sizes) / sum(height * width for height, width in sizes)
    assert backbone.adapters.gated_share == pytest.approx(expected)


def test_no_more_merged_copies_are_kept_than_allowed(pair: Any) -> None:
    pair.adapters.merged_limit = 2
    for weight in (0.1, 0.2, 0.3, 0.4):
        ours(pair, None, merged=[weight, 0.0])
    assert max(len(layer.merged_weights) for layer in pair.adapters.layers()) == 2
    pair.adapters.drop_merged()
    assert all(not layer.merged_weights for layer in pair.adapters.layers())


def test_gates_of_the_wrong_number_of_rows_are_refused(pair: Any) -> None:
    with pytest.raises(ValueError, match="2 rows"):
        ours(pair, [[1.0, 0.0]] * 2)


def test_gradients_reach_the_adapter_in_training_and_no_other(pair: Any) -> None:
    pair.adapters.train_only("two")
    latents, timesteps = inputs()
    output = pair.denoise(latents, timesteps, pair.encode(PROMPTS), gates=torch.tensor([[0.5, 0.5]] * 3))
    output.square().sum().backward()
    assert all(parameter.grad is not None for parameter in pair.adapters.parameters("two"))
    others = [each for each in pair.parameters() if each.grad is not None]
    assert len(others) == len(pair.adapters.parameters("two"))


@pytest.mark.parametrize("rank", [2, 4])
def test_plain_diffusers_loads_an_export_and_makes_the_same_image(
    backbone: Any, sd15_folder: Path, tmp_path: Path, rank: int
) -> None:
    backbone.adapters.add("style", rank=rank, lora_alpha=2 * rank, seed=3)
    randomize(backbone.adapters, "style", 3, scale=0.3)
    backbone.adapters.export("style", tmp_path / "lora", backbone.pipeline, {"reward": "style", "images": 7})
    facts = read_metadata(tmp_path / "lora")
    assert (facts["reward"], facts["images"], facts["adapter"]) == ("style", 7, "style")

    plain = StableDiffusionPipeline.from_pretrained(sd15_folder, safety_checker=None)
    plain.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt", "latents": noise}
    before = plain("a red circle", **settings).images
    plain.load_lora_weights(tmp_path / "lora")
    theirs = plain("a red circle", **settings).images

    from dblightning.blending import Single
    from dblightning.noise import ImageNoise
    from dblightning.sampling import denoise_loop
    from dblightning.solvers import make_solver

    solver = make_solver(backbone.scheduler_config, 4, 0.0)
    with torch.no_grad():
        latents = denoise_loop(
            backbone,
            backbone.encode(["a red circle"]),
            solver,
            Single("style"),
            ImageNoise([0]),
            guidance_scale=3.0,
            latents=noise,
        )
        images = backbone.decode(latents)
    assert (theirs - before).abs().max() > 1e-2  # the LoRA shows
    # 1e-4: four guided steps of float32 in another order of operations
    torch.testing.assert_close(images, theirs.float(), rtol=0, atol=1e-4)


def test_an_export_loads_back_bit_identical(backbone: Any, sd15_folder: Path, tmp_path: Path) -> None:
    backbone.adapters.add("style", rank=3, lora_alpha=5, seed=3)
    randomize(backbone.adapters, "style", 3)
    backbone.adapters.export("style", tmp_path, backbone.pipeline)
    fresh = DiffusersBackbone(str(sd15_folder))
    fresh.adapters.load("again", tmp_path, fresh.pipeline)
    torch.testing.assert_close(ours(fresh, [[1.0]] * 3), ours(backbone, [[1.0]] * 3), rtol=0, atol=0)


def test_loras_with_older_key_names_load(backbone: Any, sd15_folder: Path, tmp_path: Path) -> None:
    """The names TRL's trainer writes; diffusers itself turns PEFT's into them."""
    from diffusers.utils import convert_state_dict_to_diffusers

    backbone.adapters.add("style", rank=3, seed=3)
    randomize(backbone.adapters, "style", 3)
    layers = convert_state_dict_to_diffusers(backbone.adapters.state_dict("style"))
    assert all(".lora.up." in key or ".lora.down." in key for key in layers)
    backbone.pipeline.save_lora_weights(str(tmp_path), unet_lora_layers=layers)
    fresh = DiffusersBackbone(str(sd15_folder))
    fresh.adapters.load("again", tmp_path, fresh.pipeline)
    torch.testing.assert_close(ours(fresh, [[1.0]] * 3), ours(backbone, [[1.0]] * 3), rtol=0, atol=0)


def test_an_adapter_of_another_base_model_is_refused(pair: Any, sd15_folder: Path, tmp_path: Path) -> None:
    pair.adapters.export("one", tmp_path, pair.pipeline)
    other = DiffusersBackbone(str(sd15_folder))
    with torch.no_grad():
        for parameter in other.unet.parameters():
            parameter.mul_(1.01)
    bank = AdapterBank(other.unet)
    with pytest.raises(ValueError, match="another base model"):
        bank.load("one", tmp_path, other.pipeline)
    bank.load("one", tmp_path, other.pipeline, allow_other_base=True)


def test_a_half_precision_copy_is_the_same_base_model(pair: Any, sd15_folder: Path, tmp_path: Path) -> None:
    pair.adapters.export("one", tmp_path, pair.pipeline)
    for dtype in ("bfloat16", "float16"):
        half = DiffusersBackbone(str(sd15_folder), dtype=dtype)  # type: ignore[arg-type]
        half.adapters.load("one", tmp_path, half.pipeline)
        assert all(parameter.dtype == torch.float32 for parameter in half.adapters.parameters("one"))


def test_an_adapter_of_another_architecture_is_refused(pair: Any, sdxl_folder: Path, tmp_path: Path) -> None:
    pair.adapters.export("one", tmp_path, pair.pipeline)
    other = DiffusersBackbone(str(sdxl_folder))
    with pytest.raises(ValueError, match="another base model"):
        other.adapters.load("one", tmp_path, other.pipeline)
    with pytest.raises(ValueError, match="which this base model does not have|made for another architecture"):
        other.adapters.load("one", tmp_path, other.pipeline, allow_other_base=True)


def test_a_file_without_a_matching_key_is_an_error_and_not_the_base_model(backbone: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"transformer.x.lora_A.weight": torch.zeros(4, 4)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="starts with 'unet.'"):
        backbone.adapters.load("style", tmp_path, backbone.pipeline)


def test_missing_and_broken_files_are_named(backbone: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        backbone.adapters.load("style", tmp_path / "nowhere", backbone.pipeline)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        backbone.adapters.load("style", tmp_path, backbone.pipeline)


def test_names_are_unique_and_targets_must_exist(pair: Any) -> None:
    with pytest.raises(ValueError, match="loaded already"):
        pair.adapters.add("one")
    with pytest.raises(ValueError, match="no adapter 'three'"):
        pair.adapters.add("three", target_modules=["no_such_layer"])


def test_only_linear_layers_and_2d_convolutions_can_be_adapted() -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        mid_block_type=None, norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    bank = AdapterBank(unet)
    bank.add("conv", target_modules=["conv_in"])
    for module, reason in ((nn.Embedding(3, 4), "only linear layers"), (nn.Conv2d(4, 4, 1, groups=2), "groups")):
        unet.extra = module
        with pytest.raises(ValueError, match=reason):
            bank.add("other", target_modules=["extra"])
        assert unet.extra is module
        assert bank.names == ["conv"]


def test_the_seed_fixes_the_initial_adapter(sd15_folder: Path) -> None:
    states = []
    for seed in (1, 1, 2):
        backbone = DiffusersBackbone(str(sd15_folder))
        backbone.adapters.add("style", seed=seed)
        states.append(backbone.adapters.state_dict("style"))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_our_config_is_pefts(backbone: Any) -> None:
    """The same adapter created by PEFT alone has the same shapes and scale."""
    backbone.adapters.add("style", rank=4, lora_alpha=8)
    layer = next(backbone.adapters.layers())
    linear = nn.Sequential(nn.Linear(16, 16))
    from peft import get_peft_model

    reference = get_peft_model(linear, LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))
    assert layer.scaling["style"] == reference.base_model.model[0].scaling["default"]


def a_layer(bank: AdapterBank) -> tuple[Any, torch.Tensor, list[str]]:
    """One gated layer, two rows of input for it, and the adapters' names."""
    layer = next(iter(bank.layers()))
    return layer, torch.randn(2, layer.in_features), bank.names


def test_adapters_left_out_with_only_cost_nothing_and_come_back(pair: Any) -> None:
    bank = pair.adapters
    layer, x, (first, second) = a_layer(bank)
    with torch.no_grad(), bank.gated(torch.tensor([[0.0, 1.0]] * 2)):
        expected = layer(x)
    with bank.only([second]):
        assert bank.names == [second]
        assert len(layer.arrangement()) == layer.r[second]  # no rank of the other is computed
        with torch.no_grad(), bank.gated(torch.ones(2, 1)):
            torch.testing.assert_close(layer(x), expected)
        with torch.no_grad(), bank.merged([1.0]):
            torch.testing.assert_close(layer(x), expected)
    assert bank.names == [first, second]
    with torch.no_grad(), bank.merged([1.0, 0.0]), bank.only([second]), bank.merged([1.0]):
        torch.testing.assert_close(layer(x), expected)  # and not the first one's copy, whose gate vector reads alike
    with pytest.raises(ValueError, match="no adapter 'third'"), bank.only(["third"]):
        pass


def test_a_removed_adapter_leaves_the_others_as_they_were(pair: Any) -> None:
    bank = pair.adapters
    layer, x, (first, second) = a_layer(bank)
    with torch.no_grad(), bank.gated(torch.tensor([[1.0, 0.0]] * 2)):
        expected = layer(x)
    bank.remove(second)
    assert bank.names == [first]
    with torch.no_grad(), bank.gated(torch.ones(2, 1)):
        torch.testing.assert_close(layer(x), expected)
    bank.add(second, rank=2, seed=9)  # the name is free again
    assert bank.names == [first, second]
