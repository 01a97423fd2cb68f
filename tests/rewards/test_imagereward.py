"""ImageReward against the image-reward package: scores and gradients it computed, stored with the weights it used."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dblightning.rewards import ImageReward
from tests.rewards import tiny
from tests.rewards.image_reward_cases import PAIRS, PROMPTS, SIZES, picture

#: far below what any wrong setting costs (0.09 at least); 2e-6 was measured
PARITY = 1e-4


def package_scores(reward: ImageReward) -> list[float]:
    images = tiny.reference_pictures()
    return [reward.score(images[size], [PROMPTS[prompt]]).item() for size, prompt in PAIRS]


def test_the_pictures_are_those_the_package_scored(image_reward_fixture: dict[str, np.ndarray]) -> None:
    sums = [int(picture(index, *size).astype(np.int64).sum()) for index, size in enumerate(SIZES)]
    assert sums == image_reward_fixture["checksums"].tolist()


def test_scores_are_the_image_reward_packages(
    image_reward_folder: Path, image_reward_fixture: dict[str, np.ndarray]
) -> None:
    expected = image_reward_fixture["scores"]
    assert len(expected) == len(PAIRS) == 24
    assert np.ptp(expected) > 0.5  # far above the tolerance
    scores = package_scores(ImageReward(image_reward_folder))
    np.testing.assert_allclose(scores, expected, rtol=0, atol=PARITY)


def test_prompts_of_several_lengths_at_once_score_as_the_package_scores_them_singly(
    image_reward_folder: Path, image_reward_fixture: dict[str, np.ndarray]
) -> None:
    reward, images = ImageReward(image_reward_folder), tiny.reference_pictures()
    scores = []
    for size, image in enumerate(images):
        prompts = [PROMPTS[prompt] for of, prompt in PAIRS if of == size]
        assert len({len(prompt) for prompt in prompts}) == 3  # so that two are padded, and the padding masked
        scores.append(reward.score(image.expand(3, -1, -1, -1), prompts))
    np.testing.assert_allclose(torch.cat(scores), image_reward_fixture["scores"], rtol=0, atol=PARITY)


def test_token_ids_are_the_packages_also_where_prompts_are_cut(
    image_reward_folder: Path, image_reward_fixture: dict[str, np.ndarray]
) -> None:
    tokenizer = ImageReward(image_reward_folder).tokenizer
    ids = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="np").input_ids
    assert len(tokenizer(PROMPTS[3]).input_ids) > 35
    np.testing.assert_array_equal(ids, image_reward_fixture["token_ids"])


def test_the_gradient_is_the_packages(image_reward_folder: Path, image_reward_fixture: dict[str, np.ndarray]) -> None:
    reward = ImageReward(image_reward_folder)
    from dblightning.rewards.preprocess import CLIP_MEAN, CLIP_STD, normalize, short_side_crop

    pixels = normalize(short_side_crop(tiny.reference_pictures()[1], 224, exact=True), CLIP_MEAN, CLIP_STD)
    pixels.requires_grad_()
    tokens = reward.tokenizer(PROMPTS[1], return_tensors="pt")
    raw = reward.frozen("model")(pixels, tokens.input_ids, tokens.attention_mask)
    (raw / 1.0333394966054072).sum().backward()
    expected = image_reward_fixture["gradient"]
    # kernels add in another order: 1e-4 of the largest entry
    np.testing.assert_allclose(pixels.grad[0, :, ::8, ::8], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_the_differentiable_path_stays_near_the_exact_one(
    image_reward_folder: Path, image_reward_fixture: dict[str, np.ndarray]
) -> None:
    scores = package_scores(ImageReward(image_reward_folder, preprocessing="tensor"))
    # a level of 8 bits in places; stated in docs/rewards.md
    np.testing.assert_allclose(scores, image_reward_fixture["scores"], rtol=0, atol=5e-3)


def test_without_standardizing_it_is_the_heads_own_output(image_reward_folder: Path) -> None:
    images = tiny.pictures(2)
    standard = ImageReward(image_reward_folder).score(images, PROMPTS[:2])
    raw = ImageReward(image_reward_folder, standardize=False).score(images, PROMPTS[:2])
    torch.testing.assert_close(raw, 1.0333394966054072 * standard + 0.16717362830052426)


def test_a_missing_a_foreign_and_a_misshapen_entry_are_named(
    tmp_path: Path, image_reward_fixture: dict[str, np.ndarray]
) -> None:
    folder = tiny.save_image_reward(tmp_path / "model", image_reward_fixture)
    file = folder / "ImageReward.pt"
    state = torch.load(file, weights_only=True)

    torch.save({key: value for key, value in state.items() if key != "mlp.layers.4.bias"}, file)
    with pytest.raises(ValueError, match=re.escape("1 entries are missing: head.layers.4.bias")):
        ImageReward(folder)
    torch.save({**state, "blip.itm_head.weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=re.escape("unexpected entries, is it another model? blip.itm_head.weight")):
        ImageReward(folder)
    torch.save({**state, "mlp.layers.7.bias": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=re.escape("head.layers.7.bias is (3,), expected (1,)")):
        ImageReward(folder)
    torch.save({key: value for key, value in state.items() if "patch_embed" not in key}, file)
    with pytest.raises(ValueError, match=r"lacks vision\.embeddings\.patch_embedding\.weight"):
        ImageReward(folder)


def test_a_truncated_a_corrupted_and_a_foreign_file_are_refused(tmp_path: Path, image_reward_folder: Path) -> None:
    whole = (image_reward_folder / "ImageReward.pt").read_bytes()
    file = tmp_path / "ImageReward.pt"
    for content in (whole[: len(whole) // 2], b"not a checkpoint", b""):
        file.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"ImageReward.pt \({len(content)} bytes\) cannot be read as a weight file"
        ):
            ImageReward(file)
    torch.save([1, 2, 3], file)
    with pytest.raises(ValueError, match="no dictionary of named tensors"):
        ImageReward(file)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (os.system, ("touch " + str(tmp_path / "ran"),))

    torch.save({"weight": Evil()}, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match="cannot be read as a weight file"):
        ImageReward(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_missing_files_are_named_with_the_place_they_belong(tmp_path: Path, image_reward_folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no ImageReward\.pt; put the file there"):
        ImageReward(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"weights=/path/to/ImageReward\.pt"):  # offline
        ImageReward()
    with pytest.raises(FileNotFoundError, match=r"not a file, folder or hub id"):
        ImageReward(tmp_path / "nothing" / "ImageReward.pt")
    with pytest.raises(FileNotFoundError, match=r"tokenizer=, or vocab\.txt beside"):
        ImageReward(image_reward_folder, tokenizer="nobody/nothing")
    (tmp_path / "ImageReward.pt").write_bytes((image_reward_folder / "ImageReward.pt").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"vocab\.txt"):
        ImageReward(tmp_path)
    assert ImageReward(tmp_path, tokenizer=image_reward_folder / "vocab.txt").score(tiny.pictures(1), ["a"]).shape == (
        1,
    )


@pytest.mark.parametrize("change", [lambda words: [*words, "surplus"], lambda words: words[:5]])
def test_a_vocabulary_of_another_size_than_the_models_is_refused(
    tmp_path: Path, image_reward_folder: Path, change: Callable[[list[str]], list[str]]
) -> None:
    words = (image_reward_folder / "vocab.txt").read_text(encoding="utf-8").split()
    (tmp_path / "vocab.txt").write_text("\n".join(change(words)) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer knows \d+ tokens.*bert-base-uncased"):
        ImageReward(image_reward_folder, tokenizer=tmp_path)


@pytest.mark.parity
def test_scores_are_those_the_package_computed_just_now(tmp_path: Path) -> None:
    """``make parity``: DBLIGHTNING_PARITY_FIXTURE is a file that the reference environment wrote with a fresh seed."""
    fixture = dict(np.load(os.environ["DBLIGHTNING_PARITY_FIXTURE"]))
    reward = ImageReward(tiny.save_image_reward(tmp_path / "model", fixture))
    np.testing.assert_allclose(package_scores(reward), fixture["scores"], rtol=0, atol=PARITY)


@pytest.mark.weights
def test_the_published_model_gives_the_published_example_scores() -> None:
    """DBLIGHTNING_IMAGE_REWARD: a folder with ImageReward.pt, vocab.txt and the package's 1.webp … 4.webp."""
    from PIL import Image

    from dblightning.rewards.preprocess import from_uint8

    folder = tiny.published("DBLIGHTNING_IMAGE_REWARD")
    reward = ImageReward(folder)
    prompt = "a painting of an ocean with clouds and birds, day time, low depth field effect"
    images = [from_uint8([np.asarray(Image.open(folder / f"{i}.webp").convert("RGB"))]) for i in range(1, 5)]
    scores = [reward.score(image, [prompt]).item() for image in images]
    published = [0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029569625854492]
    np.testing.assert_allclose(scores, published, rtol=0, atol=1e-2)  # fp16 on a GPU there
