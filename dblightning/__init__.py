"""dblightning: RL fine-tuning of diffusion models for several rewards, blended at inference (Diffusion Blend)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dblightning.module import RewardRLModule as RewardRLModule
    from dblightning.pipeline import DiffusionBlendPipeline as DiffusionBlendPipeline

__version__ = "0.2.0"
__all__ = ["DiffusionBlendPipeline", "RewardRLModule", "__version__"]

_HOMES = {"DiffusionBlendPipeline": "dblightning.pipeline", "RewardRLModule": "dblightning.module"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import dblightning` alone stays light."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dblightning' has no attribute {name!r}")
