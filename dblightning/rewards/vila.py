"""VILA-R (Ke et al. 2023), the aesthetic score of the paper, in two backends.

``tensorflow`` runs the published SavedModel: the reference score, no gradient. ``torch`` is a port with a gradient;
its weights are converted from the SavedModel by ``python -m dblightning convert-vila``.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dblightning.extras import importing
from dblightning.rewards import _convert
from dblightning.rewards.base import RewardMetric
from dblightning.rewards.preprocess import (
    Preprocessing,
    check_preprocessing,
    is_exact,
    one_by_one,
    quantise,
    tf1_resize_crop,
    to_uint8,
)
from dblightning.rewards.vila_model import VilaModel, load_vila


class VILA(RewardMetric):
    """r = scale · v + shift, with v the cosine of the image with the words "good image"; published as in [0, 1].

    Args:
        weights: backend "torch": the file that ``convert-vila`` wrote; "tensorflow": the folder of the SavedModel
            ``google/vila/tensorFlow2/image`` (Kaggle). A ``VilaModel`` is taken as it is.
        backend: "torch" carries a gradient; "tensorflow" is the published graph, one image at a time on the CPU, and
            needs ``pip install dblightning[vila]``.
        scale, shift: the paper uses 4 v − 2.
        preprocessing: "auto": round images to 8 bits as a file would unless a gradient is required; "exact"; "tensor".
        micro_batch_size: most images scored at once.
        kwargs: as of ``torchmetrics.Metric``.

    Raises:
        ImportError: backend "tensorflow" without TensorFlow. FileNotFoundError: the weights are not there.
        ValueError: they are another model's, or damaged.
    """

    needs_prompt = False

    def __init__(
        self,
        weights: str | Path | VilaModel | None = None,
        backend: Literal["torch", "tensorflow"] = "torch",
        scale: float = 4.0,
        shift: float = -2.0,
        preprocessing: Preprocessing = "auto",
        micro_batch_size: int | None = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(micro_batch_size, **kwargs)
        check_preprocessing(preprocessing)
        if backend not in ("torch", "tensorflow"):
            raise ValueError(f"backend must be 'torch' or 'tensorflow', got {backend!r}")
        self.backend = backend
        self.scale = scale
        self.shift = shift
        self.preprocessing = preprocessing
        # a cosine: −1 to 1, though the released model stays within 0 and 1 on photographs
        self.value_range = (shift - abs(scale), shift + abs(scale))
        self._saved_model: SavedModel | None = None
        if backend == "tensorflow":
            if isinstance(weights, VilaModel):
                raise ValueError("backend 'tensorflow' takes the folder of a SavedModel, got a VilaModel")
            self._saved_model = SavedModel(weights)
        elif isinstance(weights, VilaModel):
            self.register_frozen("model", weights)
        else:
            path = _convert.find_file(weights, ("vila.safetensors",), None, "VILA (run `dblightning convert-vila`)")
            self.register_frozen("model", load_vila(path))

    @property
    def differentiable(self) -> bool:
        return self.backend == "torch"

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        if self._saved_model is not None:
            score = self._saved_model.score(images).to(images.device)
        else:
            model: VilaModel = self.frozen("model")
            weight = model.positions
            exact = is_exact(self.preprocessing, images)
            images = images.to(weight.device, torch.promote_types(images.dtype, torch.float32))
            # published: 272 before the crop to 224
            pre_crop = model.image_size * 272 // 224
            pixels = one_by_one(
                lambda image: tf1_resize_crop(quantise(image) if exact else image, pre_crop, model.image_size), images
            )
            score = model(pixels.to(weight.dtype))
        return self.scale * score + self.shift


class SavedModel:
    """The published TensorFlow graph, image bytes → score.

    Raises:
        ImportError: TensorFlow is not installed. FileNotFoundError: no SavedModel at ``path``.
    """

    def __init__(self, path: str | Path | None) -> None:
        if path is None or not (Path(path).expanduser() / "saved_model.pb").is_file():
            raise FileNotFoundError(
                f"VILA's SavedModel was expected as a folder with saved_model.pb, got {path}; download "
                "google/vila/tensorFlow2/image from Kaggle, unpack it and pass its folder"
            )
        or_else = " (1.6 GB), or use backend='torch' with converted weights"
        with importing("VILA(backend='tensorflow')", "vila", or_else):
            import tensorflow as tf
        self.path = str(Path(path).expanduser())
        self._tf = tf
        self._load()

    def _load(self) -> None:
        # the loaded object is kept: its signature alone would lose the variables
        self._model = self._tf.saved_model.load(self.path)
        signatures = self._model.signatures
        if "serving_default" not in signatures:
            raise ValueError(f"{self.path} has no signature serving_default, only {list(signatures)}; another model?")
        self._function = signatures["serving_default"]

    def score(self, images: Tensor) -> Tensor:
        """v of each image (B, 3, H, W) in [0, 1], sent as PNG: float32 (B,) on the CPU."""
        scores = []
        for array in to_uint8(images):
            buffer = io.BytesIO()
            Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
            output = self._function(image_bytes=self._tf.constant(buffer.getvalue()))
            scores.append(float(np.asarray(output["predictions"]).reshape(-1)[0]))
        return torch.tensor(scores, dtype=torch.float32)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        import tensorflow as tf

        self.path, self._tf = state["path"], tf
        self._load()
