"""The answer of a search, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dblightning.preference_search.measure import Comparison
from dblightning.preference_search.space import Candidate
from dblightning.preset import Preset


@dataclass
class Answer:
    """What a search found.

    Attributes:
        preset: the preference, for studio, service and pipeline.
        candidate, grid: the best of all, and the best of the fixed grid (None without one).
        gains: name → gain over the base on the check prompts.
        grid_gains: the same of the grid's best.
        merit: the goal's merit of the answer less the grid's best, on the check prompts; None without a grid, or where
            the answer is a point of it.
        evaluated: candidates evaluated, the base left out.
        needed: reward → gain that the goal needs.
    """

    preset: Preset
    candidate: Candidate
    grid: Candidate | None
    gains: dict[str, Comparison]
    grid_gains: dict[str, Comparison]
    merit: Comparison | None
    evaluated: int
    needed: Mapping[str, float] = field(default_factory=dict)

    def missed(self) -> list[str]:
        """The goal's needs that the check does not confirm, each in words; the mean alone decides."""
        return [
            f"{name} gains {self.gains[name]} there, and {need:+g} is needed"
            for name, need in self.needed.items()
            if self.gains[name].value < need
        ]

    def verdict(self) -> str:
        """One sentence: whether the search beat the fixed grid, and whether the goal's needs hold on the check."""
        if self.grid is None:
            against = "no fixed grid was evaluated to compare with"
        elif self.merit is None:
            against = "nothing beats the fixed grid's best, which is the answer"
        else:
            difference = f"merit {self.merit} on prompts not searched on"
            if self.merit.low > 0:
                against = f"it beats the fixed grid's best: {difference}"
            elif self.merit.high < 0:
                against = f"it is worse than the fixed grid's best on prompts not searched on: {difference}"
            else:
                against = f"it does not beat the fixed grid's best measurably: {difference}"
        missed = self.missed()
        if not missed:
            return against
        kept = bool(self.grid_gains) and all(self.grid_gains[name].value >= need for name, need in self.needed.items())
        grid = ", where the fixed grid's best meets it" if kept else ""
        return f"the goal is missed on prompts not searched on ({'; '.join(missed)}){grid}; beside that, {against}"


def summary(answer: Answer, rewards: Iterable[str]) -> str:
    """What is printed at the end."""
    lines = [f"answer: {answer.candidate}   ({answer.evaluated} candidates evaluated)"]
    names = list(rewards)
    lines += [f"  gain in {name}, on prompts not searched on: {answer.gains[name]}" for name in names]
    if answer.grid is not None:
        lines.append(f"fixed grid's best: {answer.grid}")
        lines += [f"  gain in {name}: {answer.grid_gains[name]}" for name in names]
    return "\n".join([*lines, f"verdict: {answer.verdict()}"])
