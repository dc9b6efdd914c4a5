"""Detectors: each judges one kind of fault, alone, from the signals of a run.

In: signals of a run. Out: findings; none where there is no fault.
"""
