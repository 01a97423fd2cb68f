"""Searching a preference: which weights, λ, method or w(t) meet a goal best (extra ``search``)."""

from dblightning.preference_search.answer import Answer
from dblightning.preference_search.goals import Goal, Knee, Liked, Maximise
from dblightning.preference_search.search import PreferenceSearch
from dblightning.preference_search.space import Candidate, Grid

__all__ = ["Answer", "Candidate", "Goal", "Grid", "Knee", "Liked", "Maximise", "PreferenceSearch"]
