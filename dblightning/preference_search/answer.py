"""The answer of a search, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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
    """

    preset: Preset
    candidate: Candidate
    grid: Candidate | None
    gains: dict[str, Comparison]
    grid_gains: dict[str, Comparison]
    merit: Comparison | None
    evaluated: int

    def verdict(self) -> str:
        """One sentence: whether the search beat the fixed grid."""
        if self.grid is None:
            return "no fixed grid was evaluated to compare with"
        if self.merit is None:
            return "nothing beats the fixed grid's best, which is the answer"
        difference = f"merit {self.merit} on prompts not searched on"
        if self.merit.low > 0:
            return f"it beats the fixed grid's best: {difference}"
        if self.merit.high < 0:
            return f"it is worse than the fixed grid's best on prompts not searched on: {difference}"
        return f"it does not beat the fixed grid's best measurably: {difference}"


def summary(answer: Answer, rewards: Iterable[str]) -> str:
    """What is printed at the end."""
    lines = [f"answer: {answer.candidate}   ({answer.evaluated} candidates evaluated)"]
    names = list(rewards)
    lines += [f"  gain in {name}, on prompts not searched on: {answer.gains[name]}" for name in names]
    if answer.grid is not None:
        lines.append(f"fixed grid's best: {answer.grid}")
        lines += [f"  gain in {name}: {answer.grid_gains[name]}" for name in names]
    return "\n".join([*lines, f"verdict: {answer.verdict()}"])
