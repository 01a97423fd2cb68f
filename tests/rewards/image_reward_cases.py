"""The image and prompt pairs on which ImageReward and the image-reward package are compared.

Imported by the tests and by ``make_image_reward_fixture.py``, which runs in the package's own environment: numpy only.
"""

from __future__ import annotations

import numpy as np

#: (height, width): square at, above and below the model's 224; odd margins on both axes; up- and downscaling
SIZES = [(224, 224), (512, 512), (96, 96), (299, 224), (224, 301), (427, 640), (200, 333), (257, 255)]

PROMPTS = [
    "a photo of a cat",
    "A painting of two dogs, by the sea; 4k!",
    "",
    # more than 35 tokens: cut
    "a cat and a dog and a bird and a fish and a horse and a house and a tree and a river and the sea and the sky and "
    "the sun and the moon and one more cat",
    # the special token's name in a prompt is that token; so is [MASK]
    "a sign that says [ENC] and [MASK]",
    "zebra 日本 café",  # pieces of words, words outside the vocabulary, an accent
]

#: every prompt with every other size: 24 pairs
PAIRS = [(size, prompt) for size in range(len(SIZES)) for prompt in range(len(PROMPTS)) if (size + prompt) % 2 == 0]

WORDS = "photo painting cat cats dog dogs bird fish horse house tree river sea sky sun moon sign says one two more by"
VOCABULARY = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *".,;!:'-",
    *"abcdefghijklmnopqrstuvwxyz0123456789",
    *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"),
    *("and", "the", "that"),
    *WORDS.split(),
]


def picture(index: int, height: int, width: int) -> np.ndarray:
    """A picture from integer arithmetic alone, the same on every machine: uint8 (height, width, 3).

    Colour gradients, blocks with hard edges, and fine noise in one half, so that resizing matters.
    """
    y, x = np.meshgrid(np.arange(height, dtype=np.uint64), np.arange(width, dtype=np.uint64), indexing="ij")
    noise = (x * np.uint64(2654435761) + y * np.uint64(40503) * (x + np.uint64(index + 1))) >> np.uint64(7)
    channels = []
    for channel in range(3):
        along, length = (x, width) if channel != index % 3 else (y, height)
        gradient = along * np.uint64(255) // np.uint64(length)
        blocks = ((x // np.uint64(17 + index) + y // np.uint64(11 + channel)) % np.uint64(3)) * np.uint64(60)
        grain = np.where(x > y, noise % np.uint64(97 + channel), 0)
        channels.append((gradient + blocks + grain) % np.uint64(256))
    return np.stack(channels, axis=-1).astype(np.uint8)
