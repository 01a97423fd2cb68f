"""The space a search looks through: method, λ, and weights that may change along the trajectory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dblightning.blending import Blend, resolve_blend
from dblightning.evaluation.specs import BlendSpec
from dblightning.preset import interpolated

#: methods that a search may choose from, and which of them take λ
SEARCHED = {"db-mpa": True, "db-mpa-ls": True, "rewarded-soup": False, "rewarded-soup-factors": False}


@dataclass
class Candidate(BlendSpec):
    """A blend whose weights may change along the trajectory.

    Args:
        knots: weights at points equally far apart from the first step to the last, straight in between; one is
            constant.
        grid: whether it is a point of the fixed grid.
    """

    knots: list[dict[str, float]] = field(default_factory=list)
    grid: bool = False

    @property
    def adapters(self) -> list[str]:
        """The adapters it runs."""
        names = dict.fromkeys(name for knot in self.knots for name in knot)
        return [name for name in names if any(knot.get(name, 0) for knot in self.knots)]

    def blend(self) -> Blend:
        """The blend it names."""
        if not self.knots:
            return super().blend()
        knots = [{name: weight for name, weight in knot.items() if name in self.adapters} for knot in self.knots]
        weights: Any = knots[0] if len(knots) == 1 else interpolated(knots)
        return resolve_blend(self.method, weights, self.kl_scale, ls_schedule=self.ls_schedule)

    @property
    def steers(self) -> bool:
        """Never: nothing here looks at rewards while it samples."""
        return False

    def described(self) -> dict[str, Any]:
        """All that its images depend on, JSON-able."""
        return {
            "method": self.method,
            "kl_scale": self.kl_scale,
            "weights": self.knots,
            "ls_schedule": self.ls_schedule,
        }

    def __str__(self) -> str:
        if not self.knots:
            return self.method
        shown = " → ".join(
            ", ".join(f"{name} {weight:.2f}" for name, weight in knot.items() if weight) for knot in self.knots
        )
        return f"{self.method}: {shown}" + (f", λ {self.kl_scale:.2f}" if self.kl_scale != 1 else "")


@dataclass
class Grid:
    """The fixed grid: every method × weights × λ, evaluated first, and what the search has to beat.

    Args:
        steps: weights are multiples of 1 / steps that sum to 1: 5 gives 0, 0.2, …, 1 for two adapters. 0 leaves the
            grid out.
        kl_scales: values of λ.
    """

    steps: int = 5
    kl_scales: list[float] = field(default_factory=lambda: [1.0])


@dataclass
class Space:
    """What may be chosen, and how Optuna chooses it.

    Args:
        names: adapters.
        methods: names of ``SEARCHED``.
        knots: of w(t), at most: 1 is constant weights, 2 a straight line from the first step to the last.
        kl_scale: the range of λ.
    """

    names: list[str]
    methods: list[str]
    knots: int
    kl_scale: tuple[float, float]

    def __post_init__(self) -> None:
        low, high = self.kl_scale
        unknown = [name for name in self.methods if name not in SEARCHED]
        if unknown or not self.methods:
            raise ValueError(f"methods must be some of {list(SEARCHED)}, got {self.methods}")
        if not self.names:
            raise ValueError("a search needs adapters to weigh")
        if self.knots < 1:
            raise ValueError(f"knots must be at least 1, got {self.knots}")
        if not 0 <= low <= high:
            raise ValueError(
                f"kl_scale must be a range of numbers of at least 0, the lower one first, got {self.kl_scale}"
            )

    def suggest(self, trial: Any) -> Candidate:
        """The candidate that an Optuna trial chooses.

        Every trial chooses the same parameters, as a Gaussian process needs it: knots that agree are constant weights,
        and λ is ignored by a method that has none.
        """
        method = trial.suggest_categorical("method", self.methods)
        scale = 1.0
        if self.kl_scale[0] < self.kl_scale[1]:
            scale = round(trial.suggest_float("kl_scale", *self.kl_scale), 4)
        shares = [
            [trial.suggest_float(f"share_{knot}_{name}", 0, 1) for name in self.names[:-1]]
            for knot in range(self.knots)
        ]
        knots = [self.weights(each) for each in shares]
        constant = all(knot == knots[0] for knot in knots)
        return Candidate(
            method=method, kl_scale=scale if SEARCHED[method] else 1.0, knots=knots[:1] if constant else knots
        )

    def params(self, candidate: Candidate) -> dict[str, Any]:
        """What a trial has to choose to become a candidate of constant weights."""
        found: dict[str, Any] = {"method": candidate.method}
        if self.kl_scale[0] < self.kl_scale[1]:
            found["kl_scale"] = candidate.kl_scale
        shares = self.shares([candidate.knots[0].get(name, 0.0) for name in self.names])
        return found | {
            f"share_{knot}_{name}": share
            for knot in range(self.knots)
            for name, share in zip(self.names[:-1], shares, strict=True)
        }

    def weights(self, shares: Sequence[float]) -> dict[str, float]:
        """Weights of m adapters from m − 1 numbers in [0, 1]; uniform numbers give weights uniform on the simplex.

        A stick is broken: adapter i takes 1 − (1 − uᵢ)^(1 / (m − 1 − i)) of what is left. Four decimals.
        """
        left, found = 1.0, []
        for index, share in enumerate(shares):
            taken = round(left * (1 - (1 - share) ** (1 / (len(shares) - index))), 4)
            found.append(taken)
            left -= taken
        return dict(zip(self.names, [*found, round(max(left, 0.0), 4)], strict=True))

    def shares(self, weights: Sequence[float]) -> list[float]:
        """The numbers that :meth:`weights` turns into these weights."""
        left, found = 1.0, []
        for index, weight in enumerate(weights[:-1]):
            part = min(1.0, weight / left) if left > 1e-12 else 0.0
            found.append(1 - (1 - part) ** (len(weights) - 1 - index))
            left -= weight
        return found

    def points(self, grid: Grid) -> Iterator[Candidate]:
        """The grid's candidates; methods that take no λ once."""
        if grid.steps < 1:
            return
        counts = itertools.product(range(grid.steps + 1), repeat=len(self.names))
        rows = [
            self.weights(self.shares([count / grid.steps for count in each]))
            for each in counts
            if sum(each) == grid.steps
        ]
        for method in self.methods:
            for scale in grid.kl_scales if SEARCHED[method] else [1.0]:
                for weights in rows:
                    yield Candidate(method=method, kl_scale=scale, knots=[dict(weights)], grid=True)
