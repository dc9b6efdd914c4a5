"""`History`: what happened in each step of a run, in memory and on disk."""

from .runs.history import History as History

__all__ = [
    "History",
]
