"""Make a small ImageReward checkpoint with the image-reward package, and score pictures with the package.

    python tests/rewards/make_image_reward_fixture.py OUT.npz [--seed 0]

Runs in an environment of its own (image_reward_reference.txt; ``make parity`` builds it), never in ours. The package
is unmodified: its transformers, its preprocessing, its tokenizer call and its ``score`` run as installed. Only the
sizes are smaller than published: the vision tower is made by the package's class with other numbers, and the head
takes the narrower text features. Weights are random integers times a power of two, so that the file is small and
every float32 is exact.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
os.environ["HF_HUB_OFFLINE"] = "1"

from image_reward_cases import PAIRS, PROMPTS, SIZES, VOCABULARY, picture

WIDTH = 128  # two heads of 64 in both towers
MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": 160,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "model_type": "bert",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "add_type_embeddings": False,
    "vocab_size": len(VOCABULARY) + 2,
    "encoder_width": WIDTH,
    "add_cross_attention": True,
}


def build(folder: Path):
    """The package's ImageReward at small sizes; the folder holds ``bert-base-uncased/vocab.txt`` and the config."""
    import ImageReward as package
    from ImageReward.models.BLIP import blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer

    (folder / "bert-base-uncased").mkdir()
    (folder / "bert-base-uncased" / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG))
    os.chdir(folder)  # the package asks for "bert-base-uncased": a folder of that name here

    def small_vit(vit, image_size, *_):
        sizes = {"patch_size": 16, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5}
        return VisionTransformer(img_size=image_size, **sizes), WIDTH

    blip_pretrain.create_vit = small_vit
    module = sys.modules["ImageReward.ImageReward"]
    head = module.MLP
    module.MLP = lambda _: head(WIDTH)
    return package.ImageReward("med_config.json")


def randomise(model, seed: int) -> dict[str, np.ndarray]:
    """Fill the model with int8 multiples of powers of two; returns "<key>" → int8 and "<key>/scale" → float32."""
    import torch

    generator = np.random.default_rng(seed)
    stored = {}
    for key, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            stored[key] = tensor.numpy()
            continue
        spread = 0.04
        if key.endswith("norm.weight") or "norm1.weight" in key or "norm2.weight" in key or "LayerNorm.weight" in key:
            spread = 0.25
        elif key.startswith("mlp."):
            spread = 0.12 if key.endswith("weight") else 0.05
        elif "attn.qkv.weight" in key or "self.query.weight" in key or "self.key.weight" in key:
            spread = 0.12  # attention that attends
        scale = np.float32(2.0 ** np.floor(np.log2(spread / 32)))
        whole = np.clip(np.round(generator.normal(0, spread / scale, tensor.shape)), -127, 127).astype(np.int8)
        stored[key], stored[f"{key}/scale"] = whole, scale
        value = torch.from_numpy(whole.astype(np.float32) * scale)
        if spread == 0.25:
            stored[f"{key}/offset"] = np.float32(1)
            value = value + 1
        tensor.copy_(value)
    return stored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out = arguments.out.resolve()

    import torch
    from PIL import Image

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model = build(Path(folder)).eval()
        stored = randomise(model, arguments.seed)
        images = [Image.fromarray(picture(index, *size)) for index, size in enumerate(SIZES)]
        scores = [model.score(PROMPTS[prompt], images[size]) for size, prompt in PAIRS]
        with torch.enable_grad():
            pixels = model.preprocess(images[1]).unsqueeze(0).requires_grad_()
            text = model.blip.tokenizer(
                PROMPTS[1], padding="max_length", truncation=True, max_length=35, return_tensors="pt"
            )
            model.score_gard(text.input_ids, text.attention_mask, pixels).sum().backward()
        ids = [model.blip.tokenizer(p, padding="max_length", truncation=True, max_length=35).input_ids for p in PROMPTS]
        os.chdir("/")
    np.savez_compressed(
        out,
        scores=np.array(scores),
        gradient=pixels.grad[0, :, ::8, ::8].numpy(),  # every eighth pixel is enough to compare
        token_ids=np.array(ids),
        checksums=np.array([int(np.asarray(image).astype(np.int64).sum()) for image in images]),
        **{f"weight/{key}": value for key, value in stored.items()},
    )
    print(f"{out}: {len(scores)} scores from {min(scores):.3f} to {max(scores):.3f}, {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
