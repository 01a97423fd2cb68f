"""State of the random generators that a process shares with everything it runs."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """State of the global generators of torch, NumPy and Python: this package draws from none, but a reward may."""
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    _, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002  # the generator a reward shares with us
    version, internal, gauss_next = random.getstate()
    return {
        "cpu": torch.get_rng_state(),
        **cuda,
        # as tensors and plain numbers: a checkpoint is read with weights_only=True
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": [version, torch.tensor(internal, dtype=torch.long), gauss_next],
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Resume from a :func:`random_state`; one of an earlier version holds torch's alone."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    if "numpy" in state:
        keys, position, has_gauss, gauss = state["numpy"]
        np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    if "python" in state:
        version, internal, gauss_next = state["python"]
        random.setstate((version, tuple(internal.tolist()), gauss_next))
