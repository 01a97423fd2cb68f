"""The value function by its former path; it is in ``dblightning.objectives.value``."""

from dblightning.objectives.value import ValueFunction

__all__ = ["ValueFunction"]
