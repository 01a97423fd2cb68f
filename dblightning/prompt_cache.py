"""Text embeddings that are kept as long as the text encoders are what they were when they made them."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

#: entries read of each weight by a thorough look
PROBES = 8


class PromptCache:
    """Embeddings of texts, least recently used first out.

    Args:
        size: how many texts are kept.
        max_bytes: how much memory their embeddings may take.

    One call may hold more than either limit allows: :meth:`trim` is called when its embeddings were read.
    """

    def __init__(self, size: int, max_bytes: int) -> None:
        self.size = size
        self.max_bytes = max_bytes
        self.bytes = 0
        self._entries: OrderedDict[Hashable, tuple[Tensor, Tensor]] = OrderedDict()
        self._made_by: Any = None

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def __getitem__(self, key: Hashable) -> tuple[Tensor, Tensor]:
        self._entries.move_to_end(key)
        return self._entries[key]

    def __setitem__(self, key: Hashable, value: tuple[Tensor, Tensor]) -> None:
        self._entries[key] = value
        self.bytes += sum(part.nbytes for part in value)

    def __reduce__(self) -> tuple[Any, ...]:  # a copy starts empty: its text encoders are other modules
        return PromptCache, (self.size, self.max_bytes)

    def clear(self) -> None:
        """Drop every text."""
        self._entries.clear()
        self.bytes = 0

    def trim(self) -> None:
        """Drop the least recently used texts until both limits hold."""
        while self._entries and (len(self) > self.size or self.bytes > self.max_bytes):
            _, value = self._entries.popitem(last=False)
            self.bytes -= sum(part.nbytes for part in value)

    def made_by(self, state: Any) -> None:
        """Forget everything if the text encoders' state (:func:`text_state`) is another than at the last call."""
        if state != self._made_by:
            self.clear()
            self._made_by = state


def text_state(pipeline: Any, thorough: bool = False) -> tuple[Any, ...]:
    """Dependencies of a pipeline's embeddings: its tokenizers, text encoders, their weights and LoRAs.

    Args:
        pipeline: a diffusers pipeline.
        thorough: also read a few entries of each weight, which sees changes through ``weight.data`` too. It costs a
            transfer from the device, so a training step goes without.
    """
    parts: list[Any] = []
    for suffix in ("", "_2", "_3"):
        tokenizer = getattr(pipeline, f"tokenizer{suffix}", None)
        encoder = getattr(pipeline, f"text_encoder{suffix}", None)
        if tokenizer is not None:
            parts.append((weakref.ref(tokenizer), len(tokenizer)))
        if encoder is not None:
            weights = list(encoder.parameters())
            parts.append((weakref.ref(encoder), str(encoder.device), encoder.dtype, _lora_state(encoder)))
            parts.append(tuple((weight.data_ptr(), version(weight)) for weight in weights))
            if thorough:
                parts.append(_probe(weights))
    return tuple(parts)


def version(tensor: Tensor) -> int:
    """Number of times a tensor was changed in place; -1 where torch does not count (made in inference mode)."""
    return -1 if tensor.is_inference() else tensor._version


def has_lora(module: nn.Module | None) -> bool:
    """Whether PEFT layers sit in a model."""
    return module is not None and any(hasattr(each, "scaling") and hasattr(each, "lora_A") for each in module.modules())


def _lora_state(encoder: nn.Module) -> tuple[Any, ...]:
    layers: list[Any] = [each for each in encoder.modules() if hasattr(each, "scaling") and hasattr(each, "lora_A")]
    return tuple(
        (tuple(each.active_adapters), each.disable_adapters, tuple(each.merged_adapters), tuple(each.scaling.items()))
        for each in layers
    )


def _probe(weights: list[nn.Parameter]) -> bytes:
    """A few entries of each weight, as bytes."""
    samples = [weight.detach().flatten()[:: max(1, weight.numel() // PROBES)].float() for weight in weights]
    return torch.cat(samples).cpu().numpy().tobytes() if samples else b""
