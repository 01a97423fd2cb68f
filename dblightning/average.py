"""An exponential moving average of adapters' weights, which is evaluated and exported in their place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class AdapterAverage:
    """θ̄ ← decay · θ̄ + (1 − decay) · θ after each step, from θ̄ = θ at the start, of each adapter.

    Args:
        bank: the adapters.
        names: those that are averaged.
        decay: per step, in (0, 1); None keeps no average, and everything here does nothing.
    """

    def __init__(self, bank: Any, names: Sequence[str], decay: float | None) -> None:
        self.bank = bank
        self.decay = decay
        self.names = [] if decay is None else list(names)
        self.means: dict[str, list[Tensor]] = {}
        self.begin()

    def begin(self) -> None:
        """Start from the adapters as they are."""
        self.means = {name: self._copy(name) for name in self.names}

    @torch.no_grad()
    def update(self, names: Sequence[str] | None = None) -> None:
        """Take in the adapters after a step; ``names``: of those alone."""
        for name in self.names if names is None else [name for name in names if name in self.names]:
            own = self.bank.parameters(name)
            self.means[name] = [mean.to(each.device) for mean, each in zip(self.means[name], own, strict=True)]
            for mean, each in zip(self.means[name], own, strict=True):
                mean.lerp_(each, 1 - self._decay())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The adapters are their averages inside."""
        kept = {name: self._copy(name) for name in self.names}
        try:
            for name, means in self.means.items():
                self._put(name, means)
            yield
        finally:
            for name, weights in kept.items():
                self._put(name, weights)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by "<adapter>.<key of the bank's state>"."""
        with self.applied():
            return {f"{name}.{key}": each for name in self.names for key, each in self.bank.state_dict(name).items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Resume from a :meth:`state_dict`; an adapter that it has no average of begins from what the adapter is.

        Raises:
            ValueError: an average of another shape of adapter.
        """
        self.begin()
        for name in self.names:
            own = {key.removeprefix(f"{name}."): each for key, each in state.items() if key.startswith(f"{name}.")}
            if own:
                kept = self._copy(name)
                self.bank.load_state_dict(name, own)
                self.means[name] = self._copy(name)
                self._put(name, kept)

    def snapshot(self) -> dict[str, list[Tensor]]:
        """A copy of the averages, for :meth:`restore`."""
        return {name: [mean.clone() for mean in means] for name, means in self.means.items()}

    def restore(self, means: dict[str, list[Tensor]]) -> None:
        """Go back to a :meth:`snapshot`."""
        self.means = means

    def _decay(self) -> float:
        assert self.decay is not None
        return self.decay

    def _copy(self, name: str) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.bank.parameters(name)]

    @torch.no_grad()
    def _put(self, name: str, weights: Sequence[Tensor]) -> None:
        for parameter, weight in zip(self.bank.parameters(name), weights, strict=True):
            parameter.copy_(weight)
