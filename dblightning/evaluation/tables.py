"""The former name of :mod:`dblightning.evaluation.paper_tables`, for code that imports it from here."""

from dblightning.evaluation.paper_tables import *  # noqa: F403
