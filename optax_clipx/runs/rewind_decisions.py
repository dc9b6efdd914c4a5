"""Where a run goes back to and on with: from what was recorded and decided before."""

from collections.abc import Sequence
from typing import NamedTuple

from .divergence import BadStretch

_MOST_DOUBLINGS = 10  # of the batches that are passed over


class RewindDecision(NamedTuple):
    """A decision to go back, as it is in the account.

    Attributes:
        rewind: its number, from 1.
        step: the step at which it was made.
        onset: the first step of the bad stretch.
        to: the step to go on from, which is that of a checkpoint.
        first_batch: the first batch that is passed over: what step ``to`` had before.
        next_batch: the batch that step ``to`` gets now.
        reason: ``"loss"``, ``"nonfinite"`` or ``"skipped"``.
        loss: the last loss; ``None`` if none was recorded.
        limit: above which a loss was bad; ``None`` if there was no limit yet.
    """

    rewind: int
    step: int
    onset: int
    to: int
    first_batch: int
    next_batch: int
    reason: str
    loss: float | None
    limit: float | None


def decide(
    step: int,
    stretch: BadStretch,
    to: int,
    decisions: Sequence[RewindDecision],
    margin: int,
) -> RewindDecision:
    """The decision to go back to a checkpoint, and past the batches since.

    Each earlier one that was made later in the run than the first bad step says that
    the run has not got past where it broke, and doubles the margin.
    """
    again = sum(earlier.step >= stretch.onset for earlier in decisions)
    ahead = margin * 2 ** min(again, _MOST_DOUBLINGS)
    return RewindDecision(
        rewind=len(decisions) + 1,
        step=step,
        onset=stretch.onset,
        to=to,
        first_batch=batch_of(to, decisions),
        next_batch=batch_of(step, decisions) + 1 + ahead,
        reason=stretch.reason,
        loss=stretch.loss,
        limit=stretch.limit,
    )


def target(
    onset: int, steps: Sequence[int], decisions: Sequence[RewindDecision], margin: int
) -> int | None:
    """The checkpoint to go back to; None if none is from before the bad steps."""
    tried: set[int] = set()
    for decision in decisions:  # what was after its target was made anew since
        tried = {step for step in tried if step < decision.to} | {decision.to}
    early = [x for x in steps if x <= onset - margin and x not in tried]
    before = [x for x in steps if x < onset]
    return max(early) if early else min(before, default=None)


def batch_of(step: int, decisions: Sequence[RewindDecision]) -> int:
    """The batch of a step: the last rewind to it or to a step before it decides."""
    for decision in reversed(decisions):
        if decision.to <= step:
            return decision.next_batch + step - decision.to
    return step


def what(stretch: BadStretch | RewindDecision, step: int) -> str:
    """What is wrong, in words."""
    causes = {
        "nonfinite": "the loss or the gradients are not finite",
        "skipped": "every step is skipped",
        "loss": f"the loss {stretch.loss} is above its limit {stretch.limit}",
    }
    return f"at step {step} {causes[stretch.reason]} since step {stretch.onset}"


def told(decision: RewindDecision) -> str:
    """The decision in words."""
    return (
        f"Rewind {decision.rewind}: {what(decision, decision.step)}; the run goes back"
        f" to step {decision.to}, and on with batch {decision.next_batch}."
    )
