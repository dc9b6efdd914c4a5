"""Recorded runs: histories, tables, readers, suggestions, sweeps, pictures, pages.

In: numbers by name and step, from memory or from files of any common kind.
Out: tables, suggested thresholds, pictures and pages.
May import: nothing else of this package, and not JAX: only the metrics' names are
known.
"""
