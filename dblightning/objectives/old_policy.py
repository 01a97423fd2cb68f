"""The old policy of forward-process objectives: a frozen second adapter that follows the one in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class OldPolicy:
    """A copy of an adapter in the same bank, one gate more: θ_old ← η θ_old + (1 − η) θ after each rollout.

    Args:
        bank: the adapters.
        adapter: name of the one in training.
        options: of ``bank.add``: rank, lora_alpha, target_modules.
        wanted: False makes none, and everything here does nothing.

    Attributes:
        name: of the copy; None where there is none.
    """

    def __init__(self, bank: Any, adapter: str, options: dict[str, Any], wanted: bool = True) -> None:
        self.bank, self.adapter = bank, adapter
        self.name = f"{adapter}-old" if wanted else None
        if self.name is not None:
            bank.add(self.name, seed=0, **options)
            bank.train_only(adapter)
            self.follow(0.0)

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move towards the adapter; ``decay`` η in [0, 1], 0 becomes it."""
        if self.name is None:
            return
        for old, current in zip(self.bank.parameters(self.name), self.bank.parameters(self.adapter), strict=True):
            old.copy_(decay * old + (1 - decay) * current if decay else current)

    def state_dict(self) -> dict[str, Tensor]:
        """The copy's tensors by the bank's keys; empty where there is none."""
        return {} if self.name is None else self.bank.state_dict(self.name)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Resume from a :meth:`state_dict`; from an empty one, of another objective's run, it becomes the adapter."""
        if self.name is not None and state:
            self.bank.load_state_dict(self.name, state)
        else:
            self.follow(0.0)
