"""What a diagnosis says: sentences that agree with the numbers they are about."""

import numpy as np

import optax_clipx as clipx


def found(run, code):
    """The finding of a code in a run."""
    return next(x for x in clipx.diagnose(run).findings if x.code == code)


def test_a_diverged_loss_never_ends_below_its_best_level():
    """The last loss alone, 8.993, is below the best level by chance."""
    loss = np.r_[np.full(100, 18.0), np.full(149, 60.0), 8.993]
    diverged = found({"loss": loss}, "loss-diverged")
    assert (
        diverged.sentence == "The loss rises from its best level, 18, to 60 at the end."
    )
    assert diverged.evidence["end"] > diverged.evidence["best"]


def test_a_diverged_loss_that_ends_as_nan_says_so():
    loss = np.r_[np.full(100, 1.0), np.full(149, 60.0), np.nan]
    diverged = found({"loss": loss}, "loss-diverged")
    assert (
        diverged.sentence == "The loss rises from its best level, 1, to nan at the end."
    )
