"""LoRA files of every form, made by peft's and diffusers' own means or by hand, against PEFT's own forward."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dblightning.adapters import AdapterBank, read_metadata
from dblightning.adapters.convert import convert, convert_main
from dblightning.adapters.files import FORMS, LoraFactors, LoraFile, read_lora, write_lora
from dblightning.adapters.kohya import module_name

# 1e-5: the ranks are multiplied, scaled and summed in another order than PEFT's
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["proj_in", "proj_out", "conv1", "conv_shortcut"]
CONFIGS = {
    "plain": LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION),
    "alpha": LoraConfig(r=4, lora_alpha=7, target_modules=[*ATTENTION, "ff.net.0.proj"]),
    "convolutions": LoraConfig(r=3, lora_alpha=3, target_modules=["to_q", *CONVOLUTIONS]),
    "bias": LoraConfig(r=2, lora_alpha=3, target_modules=["to_out.0", "proj_in"], lora_bias=True),
    "dora": LoraConfig(r=4, lora_alpha=6, target_modules=[*ATTENTION, "proj_in", "conv1"], use_dora=True),
    "patterns": LoraConfig(
        r=4, lora_alpha=4, target_modules=ATTENTION, rank_pattern={"to_q": 2}, alpha_pattern={"attn1.to_k": 9}
    ),
    "rank-stabilised": LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION, use_rslora=True),
}


def randomize(unet: Any, seed: int = 1) -> None:
    """Give a new adapter an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            elif ".lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))


@torch.no_grad()
def output(unet: Any, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(rows, 4, 8, 8, generator=generator)
    embeds = torch.randn(rows, 5, 16, generator=generator)
    return unet(latents, 501, encoder_hidden_states=embeds).sample


class Made:
    """A LoRA made by diffusers and PEFT, and the output they compute with it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.config = CONFIGS[name]
        self.unet = self.plain()
        self.base = output(self.unet)
        self.unet.add_adapter(self.config)
        randomize(self.unet)
        self.state = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(self.unet).items()}
        self.expected = output(self.unet)
        assert (self.expected - self.base).abs().max() > 1e-2

    def plain(self) -> Any:
        return UNet2DConditionModel.from_pretrained(self.folder, subfolder="unet")

    def save(self, form: str, to: Path) -> Path:
        if form == "diffusers":
            StableDiffusionPipeline.save_lora_weights(
                str(to), unet_lora_layers=self.state, unet_lora_adapter_metadata=_listed(self.config.to_dict())
            )
        elif form == "model":  # UNet2DConditionModel's own: keys without a prefix
            self.unet.save_lora_adapter(str(to))
        elif form == "trl":  # its trainers' save hook
            StableDiffusionPipeline.save_lora_weights(
                str(to), unet_lora_layers=convert_state_dict_to_diffusers(self.state)
            )
        elif form == "peft":
            model = get_peft_model(self.plain(), self.config)
            own = dict(model.named_parameters())
            with torch.no_grad():
                for key, tensor in self.state.items():
                    own[_in_model("base_model.model." + key)].copy_(tensor)
            model.save_pretrained(str(to))
        elif form == "kohya":  # diffusers' converter, whose alphas are the rank
            to.mkdir(exist_ok=True)
            save_file(
                convert_state_dict_to_kohya({f"unet.{key}": tensor for key, tensor in self.state.items()}),
                to / "style.safetensors",
            )
        return to


def _listed(config: dict[str, Any]) -> dict[str, Any]:
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def _in_model(key: str) -> str:
    if key.endswith("lora_magnitude_vector"):
        return key + ".default.weight"
    stem, _, leaf = key.rpartition(".")
    return f"{stem}.default.{leaf}"


def by_hand(made: Made) -> dict[str, Tensor]:
    """kohya's keys written from their definition: module with underscores, alpha per module, DoRA's scale (out, 1…)."""
    tensors: dict[str, Tensor] = {}
    for key, tensor in made.state.items():
        module, _, part = key.partition(".lora_")
        name = "lora_unet_" + module.replace(".", "_")
        ending = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}.get(part)
        if part == "magnitude_vector":
            shape = (-1, 1, 1, 1) if tensor.ndim == 4 else (-1, 1)
            tensors[f"{name}.dora_scale"] = tensor.reshape(shape)
        else:
            tensors[f"{name}.{ending}"] = tensor
        tensors[f"{name}.alpha"] = torch.tensor(float(made.config.lora_alpha))
    return tensors


@torch.no_grad()
def ours(bank: AdapterBank, form: str = "gated") -> Tensor:
    use = bank.gated(torch.ones(2, 1)) if form == "gated" else bank.merged([1.0])
    with use:
        return output(bank.unet)


CASES = [
    *[(config, form) for config in CONFIGS for form in ("diffusers", "peft")],
    *[(config, "model") for config in ("alpha", "dora", "bias")],
    ("plain", "trl"),
    ("plain", "kohya"),
]


@pytest.mark.parametrize(("config", "form"), CASES)
def test_a_file_gives_what_diffusers_and_peft_compute(
    sd15_folder: Path, tmp_path: Path, config: str, form: str
) -> None:
    made = Made(sd15_folder, config)
    bank = AdapterBank(made.plain())
    bank.load("style", made.save(form, tmp_path / "lora"), None)
    torch.testing.assert_close(ours(bank), made.expected, **CLOSE)
    torch.testing.assert_close(ours(bank, "merged"), made.expected, **CLOSE)
    with torch.no_grad(), bank.gated(None):
        torch.testing.assert_close(output(bank.unet), made.base, rtol=0, atol=0)
    with torch.no_grad(), bank.gated(torch.tensor([[1.0], [0.0]])):
        both = output(bank.unet)
    torch.testing.assert_close(both, torch.stack([made.expected[0], made.base[1]]), **CLOSE)


@pytest.mark.parametrize("config", ["alpha", "convolutions", "dora"])
def test_kohyas_keys_written_by_hand_load(sd15_folder: Path, tmp_path: Path, config: str) -> None:
    made = Made(sd15_folder, config)
    save_file(by_hand(made), tmp_path / "style.safetensors")
    bank = AdapterBank(made.plain())
    bank.load("style", tmp_path / "style.safetensors", None)
    torch.testing.assert_close(ours(bank), made.expected, **CLOSE)
    torch.testing.assert_close(ours(bank, "merged"), made.expected, **CLOSE)


def test_a_kohya_file_with_a_text_encoder_loads_its_denoiser_part_and_says_so(
    sd15_folder: Path, tmp_path: Path
) -> None:
    made = Made(sd15_folder, "alpha")
    tensors = by_hand(made)
    for layer in (0, 1):
        name = f"lora_te_text_model_encoder_layers_{layer}_self_attn_q_proj"
        tensors |= {f"{name}.lora_down.weight": torch.ones(2, 16), f"{name}.lora_up.weight": torch.ones(16, 2)}
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    file = tmp_path / "style.safetensors"
    save_file(tensors, file)
    bank = AdapterBank(made.plain())
    with pytest.warns(UserWarning, match="2 modules of the text_encoder"):
        bank.load("style", file, None)
    torch.testing.assert_close(ours(bank), made.expected, **CLOSE)
    alone = {key: tensor for key, tensor in tensors.items() if key.startswith("lora_te_")}
    save_file(alone, tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="holds no denoiser LoRA, only 2 modules of the text_encoder"):
        bank.load("text", tmp_path / "text.safetensors", None)
    assert bank.names == ["style"]


def test_matrices_and_1x1_convolutions_are_the_same_thing(sd15_folder: Path, tmp_path: Path) -> None:
    """proj_in is a convolution in SD 1.5 and a linear layer in SDXL; trainers write either as the other."""
    made = Made(sd15_folder, "convolutions")
    tensors = {
        key: (tensor.flatten(1) if key.endswith("weight") and "proj_" in key else tensor)
        for key, tensor in by_hand(made).items()
    }
    save_file(tensors, tmp_path / "style.safetensors")
    bank = AdapterBank(made.plain())
    bank.load("style", tmp_path / "style.safetensors", None)
    torch.testing.assert_close(ours(bank), made.expected, **CLOSE)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        # the original code's name of a module, and diffusers' (github.com/huggingface/diffusers, convert scripts)
        ("input_blocks_0_0", "conv_in"),
        ("input_blocks_1_0_in_layers_2", "down_blocks.0.resnets.0.conv1"),
        ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks_5_1_transformer_blocks_1_attn2_to_out_0",
         "down_blocks.1.attentions.1.transformer_blocks.1.attn2.to_out.0"),
        ("input_blocks_4_0_skip_connection", "down_blocks.1.resnets.0.conv_shortcut"),
        ("middle_block_1_transformer_blocks_9_ff_net_0_proj",
         "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj"),
        ("middle_block_2_out_layers_3", "mid_block.resnets.1.conv2"),
        ("output_blocks_0_1_proj_in", "up_blocks.0.attentions.0.proj_in"),
        ("output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks_8_0_emb_layers_1", "up_blocks.2.resnets.2.time_emb_proj"),
        ("time_embed_2", "time_embedding.linear_2"),
        ("label_emb_0_0", "add_embedding.linear_1"),
        ("out_2", "conv_out"),
        ("text_model_encoder_layers_11_mlp_fc1", "text_model.encoder.layers.11.mlp.fc1"),
    ],
)  # fmt: skip
def test_the_original_codes_names_are_diffusers_modules(name: str, module: str) -> None:
    assert module_name(name) == module


SD15 = {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8, "cross_attention_dim": 768}
SDXL = {
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10), "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "depths", "count"),
    [
        (SD15, {**{f"input_blocks_{i}": 1 for i in (1, 2, 4, 5, 7, 8)}, "middle_block": 1,
                **{f"output_blocks_{i}": 1 for i in range(3, 12)}}, 128),
        (SDXL, {"input_blocks_4": 2, "input_blocks_5": 2, "input_blocks_7": 10, "input_blocks_8": 10,
                "middle_block": 10, **{f"output_blocks_{i}": 10 for i in (0, 1, 2)},
                **{f"output_blocks_{i}": 2 for i in (3, 4, 5)}}, 560),
    ],
    ids=["sd15", "sdxl"],
)  # fmt: skip
def test_a1111_and_comfyui_find_every_attention_module(
    tmp_path: Path, config: dict[str, Any], depths: dict[str, int], count: int
) -> None:
    """Both know ``lora_unet_`` + diffusers' name with underscores; A1111 counts its way to the original code's name."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    modules = [name for name, _ in unet.named_modules() if name.endswith(tuple(ATTENTION))]
    factors = {name: LoraFactors(torch.zeros(1, 1), torch.zeros(1, 1), 1.0) for name in modules}
    file = write_lora(tmp_path / "style.safetensors", LoraFile({"unet": factors}), "kohya")
    keys = {key.partition(".")[0] for key in load_file(file) if key.endswith(".lora_down.weight")}
    found = set()
    for key in keys:
        rule = re.fullmatch(r"lora_unet_(down|mid|up)_blocks?_?(\d*)_attentions_(\d+)_(.+)", key)
        assert rule, key
        side, block, layer, rest = rule[1], int(rule[2] or 0), int(rule[3]), rule[4]
        place = {
            "down": f"input_blocks_{1 + 3 * block + layer}_1",
            "mid": "middle_block_1",
            "up": f"output_blocks_{3 * block + layer}_1",
        }[side]
        found.add(f"{place}_{rest}")
    assert found == {
        f"{place}_1_transformer_blocks_{depth}_attn{attention}_{side}"
        for place, depth_of in depths.items()
        for depth in range(depth_of)
        for attention in (1, 2)
        for side in ("to_q", "to_k", "to_v", "to_out_0")
    }
    assert len(found) == count


@pytest.mark.parametrize("config", ["alpha", "convolutions", "dora", "bias", "patterns"])
@pytest.mark.parametrize("form", FORMS)
def test_others_load_what_we_export(sd15_folder: Path, tmp_path: Path, config: str, form: Any) -> None:
    made = Made(sd15_folder, config)
    plain = StableDiffusionPipeline.from_pretrained(sd15_folder, safety_checker=None)
    bank = AdapterBank(made.plain())
    bank.load("style", made.save("diffusers", tmp_path / "in"), None)
    if (config, form) == ("bias", "kohya"):
        with pytest.raises(ValueError, match="no place for lora_bias"):
            bank.export("style", tmp_path / "out", plain, format=form)
        assert not (tmp_path / "out" / "style.safetensors").exists()
        return
    file = bank.export("style", tmp_path / "out", plain, {"reward": "style"}, form)
    assert read_metadata(tmp_path / "out")["reward"] == "style"
    if form == "peft":
        from peft import PeftModel

        theirs = output(PeftModel.from_pretrained(made.plain(), str(tmp_path / "out")))
    elif (config, form) in (("dora", "kohya"), ("patterns", "kohya")):
        # diffusers drops a kohya file's DoRA and misreads alphas that differ, so PEFT is given the tensors
        lora = load_file(file)
        state = {}
        for key in made.state:
            module, _, part = key.partition(".lora_")
            name = "lora_unet_" + module.replace(".", "_")
            endings = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight", "magnitude_vector": "dora_scale"}
            state[f"unet.{key}"] = lora[f"{name}.{endings[part]}"].reshape(made.state[key].shape)
            assert lora[f"{name}.alpha"] == (
                9 if config == "patterns" and "attn1.to_k" in key else made.config.lora_alpha
            )
            if part == "magnitude_vector":
                assert lora[f"{name}.dora_scale"].shape[0] == made.state[key].numel()  # ComfyUI's sign of "per output"
        unet = made.plain()
        unet.load_lora_adapter(
            state, prefix="unet", metadata={f"unet.{k}": v for k, v in made.config.to_dict().items()}
        )
        theirs = output(unet)
    else:
        plain.load_lora_weights(file.parent, weight_name=file.name)
        theirs = output(plain.unet)
    torch.testing.assert_close(theirs, made.expected, **CLOSE)


def test_the_diffusers_form_is_what_diffusers_itself_writes(sd15_folder: Path, tmp_path: Path) -> None:
    made = Made(sd15_folder, "alpha")
    theirs = made.save("diffusers", tmp_path / "theirs") / "pytorch_lora_weights.safetensors"
    bank = AdapterBank(made.unet)
    mine = bank.export("default", tmp_path / "ours", StableDiffusionPipeline.from_pretrained(sd15_folder))
    tensors = load_file(theirs)
    assert tensors.keys() == load_file(mine).keys()
    assert all(torch.equal(tensors[key], tensor) for key, tensor in load_file(mine).items())
    headers = []
    for file in (theirs, mine):
        with safe_open(file, framework="pt") as opened:
            headers.append(json.loads(opened.metadata()["lora_adapter_metadata"]))
    for header in headers:
        header["unet.target_modules"].sort()
    assert headers[0] == headers[1]


@pytest.mark.parametrize("config", ["alpha", "convolutions", "dora", "patterns"])
def test_conversions_return_the_same_tensors_and_scales(sd15_folder: Path, tmp_path: Path, config: str) -> None:
    made = Made(sd15_folder, config)
    first = made.save("diffusers", tmp_path / "first")
    original = read_lora(first)
    for path in (["kohya", "diffusers"], ["peft", "kohya", "peft", "diffusers"]):
        source: Path = first
        for number, form in enumerate(path):
            source = convert(source, tmp_path / f"{len(path)}-{number}", form)  # type: ignore[arg-type]
        again = read_lora(source)
        assert again.modules.keys() == original.modules.keys()
        for module, factors in original.modules["unet"].items():
            other = again.modules["unet"][module]
            assert other.alpha == factors.alpha
            assert torch.equal(other.down, factors.down)
            assert torch.equal(other.up, factors.up)
            assert (factors.magnitude is None) == (other.magnitude is None)
            assert factors.magnitude is None or torch.equal(other.magnitude, factors.magnitude)  # type: ignore[arg-type]
    unet = made.plain()
    unet.load_lora_adapter(load_file(source), metadata=_header(source), prefix="unet")
    torch.testing.assert_close(output(unet), made.expected, **CLOSE)


def _header(file: Path) -> dict[str, Any]:
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()["lora_adapter_metadata"])


def test_a_conversion_keeps_the_text_encoder(sd15_folder: Path, tmp_path: Path) -> None:
    """There and back through diffusers' form, whose keys are the modules' names."""
    made = Made(sd15_folder, "alpha")
    tensors = by_hand(made)
    name = "lora_te_text_model_encoder_layers_0_self_attn_out_proj"
    tensors |= {f"{name}.lora_down.weight": torch.ones(2, 16), f"{name}.lora_up.weight": torch.ones(16, 2)}
    tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "style.safetensors")
    middle = convert(tmp_path / "style.safetensors", tmp_path / "middle", "diffusers")
    text = {key for key in load_file(middle) if key.startswith("text_encoder.")}
    module = "text_encoder.text_model.encoder.layers.0.self_attn.out_proj"
    assert text == {f"{module}.lora_A.weight", f"{module}.lora_B.weight"}
    back = load_file(convert(middle, tmp_path / "back.safetensors", "kohya"))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())
    with pytest.warns(UserWarning, match="left out: text_encoder"):
        convert(middle, tmp_path / "native", "peft")


def test_the_convert_command(sd15_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Made(sd15_folder, "plain")
    source = made.save("diffusers", tmp_path / "style")
    convert_main([str(source), str(tmp_path / "out"), "--to", "kohya"])
    assert capsys.readouterr().out == f"LoRA written to {tmp_path / 'out' / 'style.safetensors'}\n"
    with pytest.raises(SystemExit, match="error: .*exists; name another file, or pass --overwrite"):
        convert_main([str(source), str(tmp_path / "out"), "--to", "kohya"])
    convert_main([str(source), str(tmp_path / "out"), "--to", "kohya", "--overwrite"])
    with pytest.raises(SystemExit, match="error: .*does not exist"):
        convert_main([str(tmp_path / "nowhere"), str(tmp_path / "out"), "--to", "peft"])
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["style.safetensors"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lora_unet_conv_in.hada_w1_a", "LoHa"),
        ("lora_unet_conv_in.lokr_w1", "LoKr"),
        ("lora_unet_conv_in.lora_mid.weight", "Tucker"),
        ("lora_unet_conv_in.diff", "full weight differences"),
        ("lora_unet_conv_in.unknown", "not part of a LoRA"),
        ("unet.conv_in.weight", "not part of a LoRA"),
    ],
)
def test_what_is_not_lora_is_refused_by_name(tmp_path: Path, key: str, message: str) -> None:
    save_file({key: torch.zeros(2, 2)}, tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path / "style.safetensors")


def test_other_peft_variants_and_dora_per_input_are_refused_by_name(sd15_folder: Path, tmp_path: Path) -> None:
    made = Made(sd15_folder, "plain")
    folder = made.save("peft", tmp_path / "peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, message in (
        ({"peft_type": "LOHA"}, "type LOHA"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            read_lora(folder)
    tensors = {
        "lora_unet_conv_in.lora_down.weight": torch.zeros(2, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.zeros(4, 2, 1, 1),
        "lora_unet_conv_in.dora_scale": torch.zeros(1, 4, 1, 1),
    }
    save_file(tensors, tmp_path / "dora.safetensors")
    with pytest.raises(ValueError, match="one magnitude per output"):
        read_lora(tmp_path / "dora.safetensors")


def test_a_native_file_without_its_config_says_which_scale_is_assumed(sd15_folder: Path, tmp_path: Path) -> None:
    made = Made(sd15_folder, "plain")
    folder = made.save("peft", tmp_path / "peft")
    (folder / "adapter_config.json").unlink()
    bank = AdapterBank(made.plain())
    with pytest.warns(UserWarning, match="alpha is taken to be the rank"):
        bank.load("style", folder, None)
    torch.testing.assert_close(ours(bank), made.expected, **CLOSE)


def test_a_folder_of_several_files_is_not_guessed_at(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="holds 2 safetensors files; name one"):
        read_lora(tmp_path)


def test_adapters_have_the_permissions_of_any_new_file(sd15_folder: Path, tmp_path: Path) -> None:
    plain = StableDiffusionPipeline.from_pretrained(sd15_folder, safety_checker=None)
    bank = AdapterBank(plain.unet)
    bank.add("style", rank=1)
    before = os.umask(0o022)
    try:
        file = bank.export("style", tmp_path, plain)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert [each.name for each in tmp_path.iterdir()] == [file.name]  # no partial file stays
