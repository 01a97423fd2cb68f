"""The former name of :mod:`dblightning.evaluation.scores`, for code that imports it from here."""

from dblightning.evaluation.scores import *  # noqa: F403
