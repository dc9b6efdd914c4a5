"""Whether a run diverged, for who wants to use its norms: from where they mean little.

These are the same rules as those of a diagnosis, so that both name the same step.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from .advice import DIVERGED
from .detectors import divergence, leaves, shifts
from .findings import Finding
from .signals import Signals, breaks_at

_MOST = 0.5  # of the leaves, whose gradients become zero at once


class Trouble(NamedTuple):
    """What happened to a run whose norms are to be used.

    Attributes:
        begins: the first step of growing norms or of a divergence, from which on norms
            are not usual; ``None`` if there is none.
        rises: the first step whose loss is high or not finite; ``None`` if none is.
        diverged: the step from which on the run diverged; ``None`` if the loss does not
            show that it did.
        said: a sentence with what shows that it did.
        doubt: a sign of a divergence in a run without a loss. It is empty if there is
            none.
    """

    begins: int | None = None
    rises: int | None = None
    diverged: int | None = None
    said: str = ""
    doubt: str = ""


def first_of(findings: Iterable[Finding]) -> Finding | None:
    """The first that says that norms grow or that the loss rises, if one does."""
    causes = [x for x in findings if x.code in DIVERGED]
    return min(causes, key=lambda x: x.steps[0], default=None)


def trouble(run: Signals) -> Trouble:
    """Whether and where a run diverged."""
    if run.norm is None:
        return Trouble()
    with np.errstate(all="ignore"):  # files may hold any number
        rose = divergence.loss(run) if run.loss is not None else []
        first = first_of([*rose, *divergence.norms(run)])
        begins = None if first is None else first.steps[0]
        if run.loss is None:
            return Trouble(begins, doubt=_doubt(run))
    if rose:
        at, said = rose[0].steps[0], rose[0].symptom.removesuffix(".")
        said = said[0].lower() + said[1:]
    else:
        ends = breaks_at(run.loss)
        if ends is None:
            return Trouble(begins)
        at, said = ends, "the loss is not finite"
    if begins is None or begins >= at:
        return Trouble(at, at, at, f"this run diverged at step {at:,}: {said}")
    grow = f"the norms grow from step {begins:,} on"
    said = f"this run diverged: {grow}, and from step {at:,} on {said}"
    return Trouble(begins, at, begins, said)


def _doubt(run: Signals) -> str:
    """Signs of a divergence in norms alone: what may also have been done on purpose."""
    died = leaves.dead(run) if run.sound_leaves else []
    steps = [x for found in died for x in found.steps if x > run.steps[0]]
    if len(steps) >= _MOST * max(1, len(run.sound_leaves)):
        step = int(np.median(steps))
        return (
            f"From step {step:,} on, {len(steps)} of {len(run.sound_leaves)} leaves"
            f" have no gradient. {_if_diverged(step)}"
        )
    found = shifts.level(run)
    if not found:
        return ""
    factor, step = found[0].evidence["factors"][-1], found[0].steps[-1]
    if factor <= 1:
        return ""
    return (
        f"At step {step:,} the norms rise to {factor:.3g} times their level, and they"
        f" do not come back. {_if_diverged(step)}"
    )


def _if_diverged(step: int) -> str:
    return (
        "If the run diverged there, lower the learning rate, and pass only the norms"
        f" of the steps before step {step:,} to optax_clipx.suggest_threshold. If the"
        " loss is recorded, the output says whether the run diverged."
    )
