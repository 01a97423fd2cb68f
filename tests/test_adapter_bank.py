"""The bank follows, or refuses by name, what other programs do to the model's adapters."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from dblightning.adapters import AdapterBank
from dblightning.backbone import DiffusersBackbone
from dblightning.pipeline import DiffusionBlendPipeline
from tests.test_adapter_files import CLOSE, output, randomize

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture
def pipeline(sd15_folder: Path) -> Any:
    """A plain diffusers pipeline with two LoRAs."""
    plain = StableDiffusionPipeline.from_pretrained(sd15_folder, safety_checker=None)
    plain.set_progress_bar_config(disable=True)
    for seed, name in enumerate(["one", "two"]):
        plain.unet.add_adapter(LoraConfig(r=2 + seed, lora_alpha=4, target_modules=ATTENTION), name)
    randomize(plain.unet)
    return plain


@torch.no_grad()
def gated(bank: AdapterBank, *gate: float, form: str = "gated") -> Tensor:
    """The denoiser's output with one gate vector for both rows; no gate is the base model."""
    gates = torch.tensor([gate] * 2) if gate else None
    with bank.merged(gate) if form == "merged" else bank.gated(gates):
        return output(bank.unet)


def test_a_fused_lora_is_refused_even_for_the_base_model(pipeline: Any) -> None:
    bank = AdapterBank(pipeline.unet)
    before = gated(bank), gated(bank, 1.0, 0.0)
    pipeline.fuse_lora(components=["unet"], adapter_names=["one"])
    for gate in ((), (1.0, 0.0)):
        with pytest.raises(ValueError, match="'one' is fused .*unfuse_lora"):
            gated(bank, *gate)
    with pytest.raises(ValueError, match="'one' is fused"):
        gated(bank, 1.0, 0.0, form="merged")
    pipeline.unfuse_lora(components=["unet"])
    # 1e-5: fusing and unfusing adds and subtracts in float32
    torch.testing.assert_close(gated(bank), before[0], **CLOSE)
    torch.testing.assert_close(gated(bank, 1.0, 0.0), before[1], **CLOSE)


def test_unloaded_adapters_are_gone(pipeline: Any, sd15_folder: Path) -> None:
    bank = AdapterBank(pipeline.unet)
    pipeline.unload_lora_weights()
    assert bank.names == []
    base = output(UNet2DConditionModel.from_pretrained(sd15_folder, subfolder="unet"))
    torch.testing.assert_close(gated(bank), base, rtol=0, atol=0)
    with pytest.raises(ValueError, match="gates are given for 2 adapters"):
        gated(bank, 0.5, 0.5)


def test_a_lora_fused_for_good_is_part_of_the_base(pipeline: Any, sd15_folder: Path, tmp_path: Path) -> None:
    """diffusers' recipe for baking in: fuse, then unload. What was trained on the plain base then has another one."""
    other = DiffusersBackbone(str(sd15_folder))
    other.adapters.add("style")
    other.adapters.export("style", tmp_path, other.pipeline)
    bank = AdapterBank(pipeline.unet)
    expected = gated(bank, 1.0, 0.0)
    pipeline.fuse_lora(components=["unet"], adapter_names=["one"])
    pipeline.unload_lora_weights()
    assert bank.names == []
    torch.testing.assert_close(gated(bank), expected, **CLOSE)
    with pytest.raises(ValueError, match="another base model"):
        bank.load("style", tmp_path, pipeline)


def test_a_deleted_adapter_is_gone_and_the_other_stays(pipeline: Any) -> None:
    bank = AdapterBank(pipeline.unet)
    expected = gated(bank, 0.0, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, that an active adapter was deleted
        pipeline.delete_adapters("one")
    assert bank.names == ["two"]
    for form in ("gated", "merged"):
        torch.testing.assert_close(gated(bank, 1.0, form=form), expected, **CLOSE)


def test_an_adapter_loaded_by_diffusers_itself_is_there(pipeline: Any, tmp_path: Path) -> None:
    bank = AdapterBank(pipeline.unet)
    before = gated(bank, 0.0, 1.0)
    bank.export("two", tmp_path, pipeline)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, that there are several adapters
        pipeline.load_lora_weights(tmp_path, adapter_name="three")
    assert bank.names == ["one", "two", "three"]
    torch.testing.assert_close(gated(bank, 0.0, 0.0, 1.0), before, **CLOSE)


def test_scales_set_before_are_not_baked_in(pipeline: Any) -> None:
    full = gated(AdapterBank(copy.deepcopy(pipeline.unet)), 1.0, 0.0)
    pipeline.set_adapters(["one", "two"], [0.3, 1.0])
    with pytest.warns(UserWarning, match="'one' was at 0.3 and is at full strength"):
        bank = AdapterBank(pipeline.unet)
    for form in ("gated", "merged"):
        torch.testing.assert_close(gated(bank, 1.0, 0.0, form=form), full, **CLOSE)


@pytest.mark.parametrize("form", ["gated", "merged"])
def test_adapters_set_behind_the_banks_back_are_refused(pipeline: Any, form: str) -> None:
    bank = AdapterBank(pipeline.unet)
    before = gated(bank, 1.0, 0.0, form=form)
    base = gated(bank)
    for change, undo, message in (
        (lambda: pipeline.set_adapters(["one", "two"], [0.5, 1.0]), lambda: pipeline.set_adapters(["one", "two"]),
         "'one' was given the scale 0.5 by set_adapters"),
        (lambda: pipeline.set_adapters("two"), lambda: pipeline.set_adapters(["one", "two"]), "has chosen .'two'."),
        (pipeline.disable_lora, pipeline.enable_lora, "switched off by disable_lora"),
        (pipeline.unet.disable_adapters, pipeline.unet.enable_adapters, "switched off by disable_lora"),
    ):  # fmt: skip
        change()
        with pytest.raises(ValueError, match=message):
            gated(bank, 1.0, 0.0, form=form)
        torch.testing.assert_close(gated(bank), base, rtol=0, atol=0)
        undo()
        torch.testing.assert_close(gated(bank, 1.0, 0.0, form=form), before, rtol=0, atol=0)


def test_two_wraps_of_one_denoiser_both_work(pipeline: Any) -> None:
    first, second = AdapterBank(pipeline.unet), AdapterBank(pipeline.unet)
    mixed = gated(second, 0.4, 0.6)
    assert (mixed - gated(second)).abs().max() > 1e-3
    for _ in range(2):
        for bank in (first, second):
            torch.testing.assert_close(gated(bank, 0.4, 0.6), mixed, rtol=0, atol=0)
            torch.testing.assert_close(gated(bank, 0.4, 0.6, form="merged"), mixed, **CLOSE)
    second.remove("one")
    second.add("three", rank=1)
    assert first.names == ["two", "three"]
    torch.testing.assert_close(gated(first, 1.0, 0.0), gated(second, 1.0, 0.0), rtol=0, atol=0)


@pytest.mark.parametrize("form", ["gated", "merged"])
@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.data.mul_(2),
        lambda p: p.data.neg_(),
        lambda p: p.data.copy_(p.data.flip(0)),
        lambda p: p.detach().numpy().__imul__(2),
        lambda p: setattr(p, "data", p.data * 2),
        lambda p: p.data.view(-1)[3].add_(1),
    ],
    ids=["mul", "neg", "flip", "numpy", "assign", "one value"],
)
def test_a_weight_changed_without_a_trace_is_seen(pipeline: Any, form: str, change: Any) -> None:
    bank = AdapterBank(pipeline.unet)
    before = gated(bank, 0.4, 0.6, form=form)
    change(bank.parameters("one")[1])
    fresh = AdapterBank(copy.deepcopy(bank.unet))
    torch.testing.assert_close(gated(bank, 0.4, 0.6, form=form), gated(fresh, 0.4, 0.6), **CLOSE)
    assert (gated(bank, 0.4, 0.6, form=form) - before).abs().max() > 1e-4


def test_merged_copies_follow_the_base_weights(pipeline: Any) -> None:
    bank = AdapterBank(pipeline.unet)
    gated(bank, 0.4, 0.6, form="merged")
    with torch.no_grad():
        for layer in bank.layers():
            layer.get_base_layer().weight.mul_(0.5)
    torch.testing.assert_close(gated(bank, 0.4, 0.6, form="merged"), gated(bank, 0.4, 0.6), **CLOSE)


def test_a_refused_load_leaves_the_model_as_it_was(backbone: Any, tmp_path: Path) -> None:
    """What cannot be gated: attention's group norm, an embedding, another shape, a kernel that is not 1×1."""
    bank = backbone.adapters
    base = gated(bank)
    layers = [(name, type(module)) for name, module in bank.unet.named_modules()]
    v = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v"
    good = {f"{v}.lora_A.weight": torch.eye(2, 16), f"{v}.lora_B.weight": torch.ones(16, 2)}
    bad = [
        ("unet.mid_block.attentions.0.norm", (2, 32), (32, 2), "GroupNorm"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k", (2, 31), (32, 2), "another architecture"),
        ("unet.conv_in", (2, 4, 3, 3), (16, 2, 3, 3), "another architecture"),
        ("unet.nowhere", (2, 4), (4, 2), "does not have"),
    ]
    for module, down, up, message in bad:
        tensors = {f"{module}.lora_A.weight": torch.ones(down), f"{module}.lora_B.weight": torch.ones(up)}
        save_file(good | tensors, tmp_path / "style.safetensors")
        with pytest.raises(ValueError, match=message):
            bank.load("style", tmp_path / "style.safetensors", backbone.pipeline)
        assert bank.names == []
        torch.testing.assert_close(gated(bank), base, rtol=0, atol=0)
    assert [(name, type(module)) for name, module in bank.unet.named_modules()] == layers
    save_file(good, tmp_path / "style.safetensors")
    bank.load("style", tmp_path / "style.safetensors", backbone.pipeline)
    assert (gated(bank, 1.0) - base).abs().max() > 1e-3


def test_a_load_that_fails_half_way_is_undone(backbone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{q}.lora_A.weight": torch.ones(2, 32), f"{q}.lora_B.weight": torch.ones(32, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    bank = backbone.adapters
    base = gated(bank)

    def fail(self: Any, name: str, modules: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AdapterBank, "_check_loaded", fail)
        with pytest.raises(KeyboardInterrupt):
            bank.load("style", tmp_path / "a.safetensors", backbone.pipeline)
    assert bank.names == []
    torch.testing.assert_close(gated(bank), base, rtol=0, atol=0)
    bank.load("style", tmp_path / "a.safetensors", backbone.pipeline)


def test_a_wrap_that_is_refused_changes_nothing(pipeline: Any) -> None:
    pipeline.unet.requires_grad_(True)
    pipeline.fuse_lora(components=["unet"], adapter_names=["one"])
    classes = [type(module) for module in pipeline.unet.modules()]
    with pytest.raises(ValueError, match="unfuse_lora"):
        AdapterBank(pipeline.unet)
    assert [type(module) for module in pipeline.unet.modules()] == classes
    assert all(parameter.requires_grad for parameter in pipeline.unet.parameters())


def test_a_lora_on_the_text_encoder_is_never_part_of_the_base(sd15_folder: Path) -> None:
    plain = StableDiffusionPipeline.from_pretrained(sd15_folder, safety_checker=None)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt", "latents": noise}
    plain.set_progress_bar_config(disable=True)
    expected = plain("a red circle", **settings).images
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    plain.text_encoder.add_adapter(config, "style")
    randomize(plain.text_encoder)
    assert (plain("a red circle", **settings).images - expected).abs().max() > 1e-4
    with pytest.warns(UserWarning, match=r"text_encoder's adapters \['style'\] are switched off"):
        pipe = DiffusionBlendPipeline.from_pipe(plain)
    # 1e-5: diffusers encodes the prompt and the empty text in another batch
    torch.testing.assert_close(pipe("a red circle", method="base", **settings).images, expected, rtol=0, atol=1e-5)
    plain.enable_lora()  # behind our back
    with pytest.warns(UserWarning, match="are switched off"):
        again = pipe("a red circle", method="base", **settings).images
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)
    plain.enable_lora()
    plain.fuse_lora(components=["text_encoder"])
    with pytest.raises(ValueError, match="fused into the text_encoder"):
        pipe("a blue star", method="base", **settings)


@pytest.mark.parametrize("cast", ["to", "half", "pipeline"])
def test_adapters_stay_float32_bit_for_bit(pipeline: Any, cast: str) -> None:
    bank = AdapterBank(pipeline.unet)
    before = bank.state_dict("one")
    if cast == "to":
        pipeline.unet.to(torch.bfloat16)
    elif cast == "half":
        pipeline.unet.half()
    else:
        pipeline.to(torch.bfloat16)
    assert all(layer.get_base_layer().weight.dtype != torch.float32 for layer in bank.layers())
    after = bank.state_dict("one")
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())
    bank.unet.to("meta")
    assert all(parameter.is_meta for parameter in bank.parameters("one"))


def test_a_load_into_a_half_precision_model_keeps_every_bit(pipeline: Any, sd15_folder: Path, tmp_path: Path) -> None:
    first = AdapterBank(pipeline.unet)
    first.export("two", tmp_path, pipeline)
    unet = UNet2DConditionModel.from_pretrained(sd15_folder, subfolder="unet", torch_dtype=torch.bfloat16)
    second = AdapterBank(unet)
    second.load("two", tmp_path, None)
    ours = first.state_dict("two")
    assert all(torch.equal(ours[key], tensor) for key, tensor in second.state_dict("two").items())


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float8_e4m3fn])
def test_layerwise_casting_serves_gated_and_merged(
    pipeline: Any, sd15_folder: Path, storage: torch.dtype, order: str
) -> None:
    """Weights stored in 8 or 16 bits and computed with in float32: a plain model with weights so rounded."""
    rounded = StableDiffusionPipeline.from_pretrained(sd15_folder, safety_checker=None).unet
    rounded.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    state = {key: tensor.float() for key, tensor in rounded.state_dict().items()}
    reference = UNet2DConditionModel.from_pretrained(sd15_folder, subfolder="unet")
    reference.load_state_dict(state)
    other = AdapterBank(reference)
    for name, rank in (("one", 2), ("two", 3)):
        other.add(name, rank=rank, lora_alpha=4)
    if order == "before":
        bank = AdapterBank(pipeline.unet)
        kept = {name: bank.state_dict(name) for name in bank.names}
    else:
        kept = {name: AdapterBank(copy.deepcopy(pipeline.unet)).state_dict(name) for name in ("one", "two")}
    pipeline.unet.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    if order == "after":
        bank = AdapterBank(pipeline.unet)
        for name in kept:  # PEFT's layers were cast with the others
            bank.load_state_dict(name, kept[name])
    for name in kept:
        other.load_state_dict(name, kept[name])
        assert all(torch.equal(kept[name][key], tensor) for key, tensor in bank.state_dict(name).items())
    torch.testing.assert_close(gated(bank), gated(other), **CLOSE)
    for form in ("gated", "merged"):
        torch.testing.assert_close(gated(bank, 0.4, 0.6, form=form), gated(other, 0.4, 0.6), **CLOSE)


def test_dora_gates_interpolate_the_weights(sd15_folder: Path) -> None:
    """Between base and DoRA the weight is (1 − g) W + g W_dora, where PEFT has fused W_dora into a copy."""
    unet = UNet2DConditionModel.from_pretrained(sd15_folder, subfolder="unet")
    unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=[*ATTENTION, "conv1"], use_dora=True), "one")
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_out.0", "proj_in"], lora_bias=True), "two")
    randomize(unet)
    base = UNet2DConditionModel.from_pretrained(sd15_folder, subfolder="unet").state_dict()
    fused = []
    for name in ("one", "two"):
        one = copy.deepcopy(unet)
        one.fuse_lora(adapter_names=[name])
        one.unload_lora()
        fused.append(one.state_dict())
    mean = UNet2DConditionModel.from_pretrained(sd15_folder, subfolder="unet")
    mean.load_state_dict(
        {key: base[key] + 0.3 * (fused[0][key] - base[key]) + 0.5 * (fused[1][key] - base[key]) for key in base}
    )
    bank = AdapterBank(unet)
    for form in ("gated", "merged"):
        torch.testing.assert_close(gated(bank, 0.3, 0.5, form=form), output(mean), **CLOSE)
    with torch.no_grad(), bank.gated(torch.tensor([[0.3, 0.5], [0.0, 0.0]])):
        rows = output(unet)
    plain = UNet2DConditionModel.from_pretrained(sd15_folder, subfolder="unet")
    torch.testing.assert_close(rows, torch.stack([output(mean)[0], output(plain)[1]]), **CLOSE)
    with (
        pytest.raises(ValueError, match="not defined for DoRA adapters such as 'one'"),
        bank.gated(torch.ones(2, 2), factors=True),
    ):
        pass


def test_dora_gradients_are_pefts(sd15_folder: Path) -> None:
    gradients = []
    for ours in (False, True):
        unet = UNet2DConditionModel.from_pretrained(sd15_folder, subfolder="unet")
        unet.requires_grad_(False)
        torch.manual_seed(0)
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_in"], use_dora=True), "one")
        randomize(unet)
        if ours:
            bank = AdapterBank(unet)
            bank.train_only("one")
        generator = torch.Generator().manual_seed(0)
        latents, embeds = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
        if ours:
            with bank.gated(torch.ones(2, 1)):
                unet(latents, 501, encoder_hidden_states=embeds).sample.square().sum().backward()
        else:
            unet(latents, 501, encoder_hidden_states=embeds).sample.square().sum().backward()
        gradients.append({name: each.grad for name, each in unet.named_parameters() if each.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("magnitude" in name for name in gradients[0])
    largest = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        # 1e-6 of the largest: attention over one token makes some gradients pure rounding
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6 * largest)


def test_what_init_adapter_brings_is_recorded(sd15_folder: Path, tmp_path: Path) -> None:
    from dblightning.module import RewardRLModule
    from dblightning.rewards import JPEGCompressibility

    first = DiffusersBackbone(str(sd15_folder))
    first.adapters.add("style", rank=6, lora_alpha=9, target_modules=["to_q", "to_v"])
    first.adapters.export("style", tmp_path / "init", first.pipeline)
    module = RewardRLModule(
        backbone=DiffusersBackbone(str(sd15_folder)), reward=JPEGCompressibility(), init_adapter=str(tmp_path / "init")
    )
    truth = {"rank": 6, "lora_alpha": 9, "target_modules": ["to_q", "to_v"]}
    assert {name: module.hparams["adapter"][name] for name in truth} == truth
    assert {name: module.facts()[name] for name in truth} == truth
