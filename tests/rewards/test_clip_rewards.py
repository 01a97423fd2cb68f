"""PickScore, HPSv2.1, the aesthetic score and CLIPScore against computations written out here."""

from __future__ import annotations

import html
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from torchvision.transforms import functional as torchvision

from dblightning.rewards import AestheticScore, CLIPScore, HPSv2, PickScore
from dblightning.rewards._convert import open_clip_state
from dblightning.rewards.clip import huggingface_config, huggingface_tokenizer, open_clip_tokenizer
from dblightning.rewards.preprocess import CLIP_MEAN, CLIP_STD, to_uint8
from tests.rewards import tiny

open_clip = pytest.importorskip("open_clip", reason="needs pip install 'dblightning[clip]'")

PROMPTS = [
    "a photo of a cat",
    "A “curly” quote &amp; an entity",
    "",
    "a cat and a dog and " * 30,  # more than 77 tokens
    "a photo of a cat",
]
SHAPES = [(32, 32), (64, 64), (48, 71), (90, 41), (20, 33)]

#: on the published scale, where cosines are multiplied by about 100
TOLERANCE = 1e-4


def pil_images(shape: tuple[int, int]) -> tuple[torch.Tensor, list[Image.Image]]:
    images = tiny.pictures(len(PROMPTS), *shape)
    return images, [Image.fromarray(array) for array in to_uint8(images)]


def published_pixels(pictures: list[Image.Image]) -> torch.Tensor:
    """Pictures as OpenAI's CLIP sees them, by torchvision on Pillow."""
    steps = [Resize(32, InterpolationMode.BICUBIC), CenterCrop(32), ToTensor(), Normalize(CLIP_MEAN, CLIP_STD)]
    return torch.stack([Compose(steps)(picture) for picture in pictures])


@pytest.mark.parametrize("shape", SHAPES)
def test_pickscore_is_transformers_clip_formula_minus_19(clip_folder: Path, shape: tuple[int, int]) -> None:
    from transformers import CLIPImageProcessorPil, CLIPModel

    images, pictures = pil_images(shape)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = processor(pictures, return_tensors="pt").pixel_values
    ids = huggingface_tokenizer()(PROMPTS)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels).logits_per_image.diagonal()
    assert np.ptp(logits.numpy()) > 5
    scores = PickScore(clip_folder).score(images, PROMPTS)
    torch.testing.assert_close(scores, logits - 19, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(PickScore(clip_folder, shift=0.0).score(images, PROMPTS), logits, rtol=0, atol=TOLERANCE)
    cosines = PickScore(clip_folder, shift=0.0, scale=False).score(images, PROMPTS)
    torch.testing.assert_close(cosines * np.exp(4.6), logits, rtol=0, atol=TOLERANCE)


@pytest.mark.weights
def test_the_published_pickscore_is_transformers_clip_formula() -> None:
    from transformers import CLIPImageProcessorPil, CLIPModel

    folder = tiny.published("DBLIGHTNING_PICKSCORE")
    images, pictures = pil_images((300, 411))
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 224})(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        model = CLIPModel.from_pretrained(folder).eval()
        logits = model(input_ids=huggingface_tokenizer()(PROMPTS), pixel_values=pixels).logits_per_image.diagonal()
    scores = PickScore(folder, shift=0.0).score(images, PROMPTS)
    # 32 layers of float32 in two orders; logits are near 20
    torch.testing.assert_close(scores, logits, rtol=0, atol=1e-3)


def test_pickscore_reads_single_files_of_both_formats(tmp_path: Path, clip_folder: Path) -> None:
    """open_clip's file, made here from the reverse of the key map, scores as the folder does."""
    images = tiny.pictures(2)
    expected = PickScore(clip_folder).score(images, ["a", "b"])
    state = PickScore(clip_folder).frozen("clip").state_dict()
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny.OPEN_CLIP_CONFIG}))
    torch.testing.assert_close(PickScore(tmp_path).score(images, ["a", "b"]), expected)


def test_the_published_pickscore_network_maps_onto_vit_h_14_in_full() -> None:
    """Every key and shape of the 986 million parameters, on the meta device."""
    from transformers import CLIPConfig, CLIPModel

    # config.json of yuvalkirstain/PickScore_v1
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = CLIPConfig(
        projection_dim=1024,
        vision_config={**vision, "patch_size": 14, "image_size": 224, "hidden_act": "gelu"},
        text_config={**text, "hidden_act": "gelu"},
    )
    with torch.device("meta"):
        published = CLIPModel(config).state_dict()
        ours = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")).state_dict()
        ours_from_config = open_clip.CLIP(**huggingface_config(config.to_dict(), "config.json")).state_dict()
    mapped = open_clip_state(published, "PickScore")
    assert sum(value.numel() for value in published.values()) == sum(value.numel() for value in mapped.values())
    shapes = {key: value.shape for key, value in mapped.items()}
    assert shapes == {key: value.shape for key, value in ours.items()}
    assert shapes == {key: value.shape for key, value in ours_from_config.items()}


def test_the_offline_tokenizer_cleans_nothing_and_open_clips_does() -> None:
    raw = PROMPTS[1]
    cleaned = html.unescape(raw).replace("“", '"').replace("”", '"')
    published, ours = open_clip_tokenizer(), huggingface_tokenizer()
    assert torch.equal(published([raw]), published([cleaned]))
    assert not torch.equal(ours([raw]), ours([cleaned]))
    # on plain text they agree up to padding
    plain = [PROMPTS[0], "two dogs, 4k!", "don't stop"]
    for ours_ids, theirs in zip(ours(plain), published(plain), strict=True):
        length = int((theirs == 49407).nonzero()[0]) + 1
        assert torch.equal(ours_ids[:length], theirs[:length])
    assert ours([PROMPTS[3]]).shape == (1, 77)
    assert ours([PROMPTS[3]])[0, -1] == 49407  # cut, with its end token


@pytest.mark.parametrize("shape", SHAPES)
def test_hpsv2_is_the_cosine_of_padded_tensors(hps_folder: Path, shape: tuple[int, int]) -> None:
    images, _ = pil_images(shape)
    model = open_clip.CLIP(**tiny.OPEN_CLIP_CONFIG).eval()
    model.load_state_dict(torch.load(hps_folder / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"])
    size = [round(side * 32 / max(shape)) for side in shape]
    resized = images if list(shape) == size else torchvision.resize(images, size, InterpolationMode.BICUBIC)
    below, beside = 32 - size[0], 32 - size[1]
    padded = torchvision.pad(resized, [beside // 2, below // 2, beside - beside // 2, below - below // 2])
    with torch.no_grad():
        seen = model.encode_image(Normalize(CLIP_MEAN, CLIP_STD)(padded))
        read = model.encode_text(open_clip.tokenize(PROMPTS))
    expected = torch.nn.functional.cosine_similarity(seen, read)
    scores = HPSv2(hps_folder, tiny.OPEN_CLIP_CONFIG).score(images, PROMPTS)
    torch.testing.assert_close(scores, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_aesthetic_score_is_one_affine_map_of_quick_gelu_features(
    aesthetic_folder: Path, quick_gelu_folder: Path, shape: tuple[int, int]
) -> None:
    from transformers import CLIPModel

    images, pictures = pil_images(shape)
    model = CLIPModel.from_pretrained(quick_gelu_folder).eval()
    with torch.no_grad():
        features = model.get_image_features(published_pixels(pictures)).pooler_output
    unit = (features / features.norm(dim=-1, keepdim=True)).double().numpy()
    head = torch.load(aesthetic_folder / "sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
    matrix, offset = np.eye(24), np.zeros(24)
    for index in (0, 2, 4, 6, 7):
        weight = head[f"layers.{index}.weight"].double().numpy()
        matrix, offset = weight @ matrix, weight @ offset + head[f"layers.{index}.bias"].double().numpy()
    expected = (unit @ matrix.T + offset)[:, 0]
    assert np.ptp(expected) > 0.01
    scores = AestheticScore(aesthetic_folder, quick_gelu_folder).score(images, PROMPTS)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=TOLERANCE)


def test_the_activation_is_taken_from_the_folders_config(clip_folder: Path, tmp_path: Path) -> None:
    # same weights, other activation: other scores, so a wrong default would show in the tests above
    shutil.copytree(clip_folder, tmp_path / "clip")
    config = json.loads((tmp_path / "clip" / "config.json").read_text())
    config["vision_config"]["hidden_act"] = config["text_config"]["hidden_act"] = "quick_gelu"
    (tmp_path / "clip" / "config.json").write_text(json.dumps(config))
    images = tiny.pictures(2)
    difference = PickScore(clip_folder).score(images, ["a", "b"]) - PickScore(tmp_path / "clip").score(
        images, ["a", "b"]
    )
    assert difference.abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_clip_score_is_two_and_a_half_cosines_above_zero(clip_folder: Path, shape: tuple[int, int]) -> None:
    from transformers import CLIPModel

    images, pictures = pil_images(shape)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        seen = model.get_image_features(published_pixels(pictures)).pooler_output
        read = model.get_text_features(open_clip.tokenize([f"A photo depicts {p}" for p in PROMPTS])).pooler_output
    cosine = torch.nn.functional.cosine_similarity(seen, read)
    reward = CLIPScore(clip_folder, prefix="A photo depicts ")
    torch.testing.assert_close(reward.score(images, PROMPTS), 2.5 * cosine.clamp_min(0), rtol=0, atol=TOLERANCE)
    signed = CLIPScore(clip_folder, prefix="A photo depicts ", scale=100.0, clamp=False)
    torch.testing.assert_close(signed.score(images, PROMPTS), 100 * cosine, rtol=0, atol=TOLERANCE)
    assert signed.value_range == (-100.0, 100.0)


def test_texts_are_encoded_once_and_again_after_a_change_of_precision(clip_folder: Path) -> None:
    reward = PickScore(clip_folder)
    encoded: list[int] = []
    encode = reward.frozen("clip").encode_text
    reward.frozen("clip").encode_text = lambda ids: encoded.append(len(ids)) or encode(ids)
    images = tiny.pictures(4)
    first = reward.score(images, ["a", "b", "a", "a"])
    assert encoded == [2]
    assert torch.equal(reward.score(images, ["a", "b", "a", "a"]), first)
    with torch.inference_mode():
        reward.score(images[:1], ["c"])
    assert encoded == [2, 1]
    # features made in inference mode serve a gradient later
    leaf = images[:1].clone().requires_grad_()
    reward.score(leaf, ["c"]).sum().backward()
    assert leaf.grad.abs().sum() > 0
    assert encoded == [2, 1]
    reward.to(torch.float64)
    reward.score(images[:1], ["a"])
    assert encoded == [2, 1, 1]


def test_the_text_cache_forgets_the_oldest(clip_folder: Path) -> None:
    reward = PickScore(clip_folder)
    reward.text_cache = 2
    images = tiny.pictures(3)
    expected = [PickScore(clip_folder).score(images[i : i + 1], [prompt]).item() for i, prompt in enumerate("abc")]
    assert reward.score(images, ["a", "b", "c"]).tolist() == pytest.approx(expected, abs=1e-4)
    assert list(reward._texts) == ["b", "c"]


def test_wrong_weights_are_named(tmp_path: Path, clip_folder: Path, hps_folder: Path, aesthetic_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"does not fit CLIP: .*have another shape: .*visual"):
        HPSv2(
            hps_folder,
            {**tiny.OPEN_CLIP_CONFIG, "vision_cfg": {**tiny.OPEN_CLIP_CONFIG["vision_cfg"], "patch_size": 16}},
        )
    state = torch.load(hps_folder / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    torch.save(
        {key: value for key, value in state.items() if key != "ln_final.bias"}, tmp_path / "HPS_v2.1_compressed.pt"
    )
    with pytest.raises(ValueError, match=r"1 entries are missing: ln_final\.bias"):
        HPSv2(tmp_path, tiny.OPEN_CLIP_CONFIG)
    with pytest.raises(ValueError, match=r"takes 24 features, the CLIP network gives 16"):
        AestheticScore(aesthetic_folder, _narrow(tmp_path / "narrow"))
    with pytest.raises(ValueError, match="open_clip knows no model 'ViT-Z'"):
        HPSv2(hps_folder, "ViT-Z")
    shutil.copytree(clip_folder, tmp_path / "clip")
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(ValueError, match="describes a 'siglip' model, expected 'clip'"):
        PickScore(tmp_path / "clip")
    broken = tmp_path / "clip" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be read as a weight file"):
        PickScore(tmp_path / "clip")


def _narrow(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPModel

    CLIPModel(CLIPConfig(**{**tiny.CLIP_CONFIG, "projection_dim": 16})).save_pretrained(folder)
    return folder


def test_a_folder_without_tokenizer_files_is_refused(tmp_path: Path, clip_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"knows \d tokens, the network 49408"):
        PickScore(clip_folder, tokenizer=tmp_path)


@pytest.mark.parametrize(
    ("build", "name"),
    [(PickScore, "model.safetensors"), (HPSv2, "HPS_v2.1_compressed.pt"), (AestheticScore, "sac.logos.ava1")],
)
def test_without_a_network_the_error_says_which_file_to_bring(build: type, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"weights=/path/to/{name}"):
        build()


def test_clip_score_by_tag_says_the_same_without_a_network() -> None:
    with pytest.raises(FileNotFoundError, match="could not get ViT-B-32-quickgelu with weights 'openai'"):
        CLIPScore()
