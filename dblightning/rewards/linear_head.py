"""The head that ImageReward and the aesthetic score share: linear layers without activations between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class LinearHead(nn.Module):
    """Linear layers with dropout, but no activation, between them: (B, D) → (B,), a single affine map when scoring.

    Runs in float32 at least, also under autocast: five matrices in a row lose too much in half precision.

    Args:
        widths: (inputs, outputs) of each layer, by its index in the published state dict.
    """

    def __init__(self, widths: dict[int, tuple[int, int]]) -> None:
        super().__init__()
        # dropout's places stay, so that the layers keep their numbers
        modules: list[nn.Module] = [nn.Identity() for _ in range(max(widths) + 1)]
        for index, (inputs, outputs) in widths.items():
            modules[index] = nn.Linear(inputs, outputs)
        self.layers = nn.Sequential(*modules)

    def forward(self, features: Tensor) -> Tensor:
        wide = torch.promote_types(features.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(wide)
            for layer in self.layers:
                if isinstance(layer, nn.Linear):
                    features = functional.linear(features, layer.weight.to(wide), layer.bias.to(wide))
        return features.squeeze(-1)


def head_widths(state: dict[str, Tensor], prefix: str) -> dict[int, tuple[int, int]]:
    """(inputs, outputs) of a linear head's layers, by index, from entries "<prefix><index>.weight"."""
    weights = {key: value for key, value in state.items() if key.startswith(prefix) and key.endswith(".weight")}
    return {
        int(key.removeprefix(prefix).removesuffix(".weight")): (value.shape[1], value.shape[0])
        for key, value in weights.items()
    }
