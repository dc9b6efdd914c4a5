"""The likely cause of each fault, and what to do first, in words."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .advice import MUON

# The faults of a run that diverges; the first in time usually causes the others.
CHAIN = {
    "update-before-loss": "the updates grew",
    "growing-norms": "the gradient norms grew",
    "loss-diverged": "the loss diverged",
    "nonfinite": "a number was not finite",
}

# What a run is checked for, in words.
CHECKS = {
    "update-before-loss": "whether the updates grow before the loss",
    "loss-diverged": "whether the loss diverges",
    "growing-norms": "whether the gradient norms grow",
    "nonfinite": "whether a number is not finite",
    "lock-out": "whether many steps in a row are skipped",
    "spikes": "whether the norm has single spikes",
    "periodic-spikes": "whether the norm has spikes at equal distances",
    "level-shift": "whether the norms change their level at one step",
    "rises-with-schedule": "whether the norms rise while the learning rate falls",
    "warmup-spike": "whether an early spike raises the threshold",
    "always-clipped": "whether nearly all steps are clipped",
    "never-clipped": "whether no step is clipped",
    "dominant-leaf": "whether one leaf has nearly the whole gradient norm",
    "starved-leaves": "whether one leaf makes the updates of the others small",
    "dead-leaf": "whether a leaf has no gradient",
    "vanishing-by-depth": "whether gradients vanish with depth",
    "exploding-by-depth": "whether gradients explode with depth",
    "restarts": "whether the steps go back",
}


class Words(NamedTuple):
    """The likely cause of a fault, and what to do first.

    Each has the names of the evidence in braces, and ``{step}``, the first step. It is
    a text, or a function that returns such a text for some evidence.
    """

    cause: str | Callable[[Mapping[str, Any]], str]
    remedy: str | Callable[[Mapping[str, Any]], str]


def likely_cause(code: str, evidence: Mapping[str, Any]) -> str:
    """Why a run has a fault, as far as the record shows."""
    if "follows" in evidence:
        return f"probably because {CHAIN[evidence['follows']]} at step {{follows_step}}"
    if "rate_jump" in evidence:
        return "the learning rate rose suddenly"
    said = WORDS[code].cause
    return said(evidence) if callable(said) else said


def remedy(code: str, evidence: Mapping[str, Any]) -> str:
    """What to do first about a fault."""
    if "follows" in evidence:
        return "First follow the advice for {follows}."
    if "rate_jump" in evidence:
        return (
            "Load a checkpoint from before step {rate_jump}, and set the learning rate"
            " back to {rate_before}. If you need a higher rate, raise it slowly, for"
            " example over 1,000 steps."
        )
    said = WORDS[code].remedy
    return said(evidence) if callable(said) else said


def _unstable(evidence: Mapping[str, Any]) -> str:
    most = "maximum of the " if "peak_step" in evidence else ""
    return f"training is unstable, often because the {most}learning rate is too high"


def _broken(evidence: Mapping[str, Any]) -> str:
    if evidence.get("all_skipped"):
        return "the loss scale was too large in these steps"
    where = "the loss" if evidence["in_loss"] else "the gradients"
    return f"often an overflow, a division by zero or bad data in {where}"


def _stop(evidence: Mapping[str, Any]) -> str:
    if evidence.get("all_skipped"):
        return "You need to change nothing while few steps are skipped."
    if evidence["in_loss"]:
        return "Let JAX stop at the operation that computes the first NaN."
    return "Let the clipper raise an error that names the leaves."


def _batches(evidence: Mapping[str, Any]) -> str:
    one = evidence["count"] == 1
    verb = "one batch has" if one else "a few batches have"
    return f"{verb} much larger gradients than the others"


def _outliers(evidence: Mapping[str, Any]) -> str:
    if evidence.get("all_clipped"):
        return "You need to change nothing: clipping limits these steps."
    return "Clip outliers, and look at the data of these steps."


def _changed(evidence: Mapping[str, Any]) -> str:
    places = "this step" if len(evidence["factors"]) == 1 else "these steps"
    return f"a setting or the data probably changed at {places}"


def _larger(evidence: Mapping[str, Any]) -> str:
    ones = f"{MUON} have" if evidence.get("starved_by") == MUON else "one leaf has"
    return f"{ones} much larger gradients than the others"


def _apart(evidence: Mapping[str, Any]) -> str:
    if evidence.get("starved_by") == MUON:
        return "Keep the leaves that Muon handles out of the clipper."
    return "Clip each leaf by its own norm."


def _independent(evidence: Mapping[str, Any]) -> str:
    leaves = "this leaf" if len(evidence["leaves"]) == 1 else "these leaves"
    return f"the loss does not depend on {leaves}"


def _written_twice(evidence: Mapping[str, Any]) -> str:
    if evidence["kind"] == "resumed":
        return "the run was resumed from an earlier step"
    return "several runs wrote to one file"


_SLOWER = (
    "Load a checkpoint from before step {step}, and lower the learning rate, for"
    " example to a third. Also clip outliers."
)

WORDS = {
    "update-before-loss": Words(
        "the updates of the optimizer are too large",
        "Load a checkpoint from before step {step}, and add a clipper after the"
        " optimizer, which clips the updates at three times their median norm.",
    ),
    "loss-diverged": Words(_unstable, _SLOWER),
    "growing-norms": Words(_unstable, _SLOWER),
    "nonfinite": Words(_broken, _stop),
    "lock-out": Words(
        "the norms or losses rose above the threshold of skip_spikes",
        "Let skip_spikes accept the new level after 20 steps.",
    ),
    "spikes": Words(_batches, _outliers),
    "periodic-spikes": Words(
        "something happens at a fixed interval, such as a bad batch in each epoch",
        "Look at the data of these steps.",
    ),
    "level-shift": Words(
        _changed,
        "Compare the batch size, the loss scale and the data before and after. If the"
        " change is wanted, let the threshold follow it within 20 steps.",
    ),
    "rises-with-schedule": Words(
        "this is usual with weight decay and normalization layers",
        "Let the threshold follow the learning rate. The name schedule stands for the"
        " optax schedule of your learning rate.",
    ),
    "warmup-spike": Words(
        "one of the first norms was very large",
        "Set an upper bound for the threshold.",
    ),
    "always-clipped": Words(
        "the threshold is below nearly all norms",
        "Record the run again with zclip, or with ten times the threshold, and then"
        " choose a threshold.",
    ),
    "never-clipped": Words(
        "the threshold is above all norms",
        "Compute a threshold that clips a tenth of the steps.",
    ),
    "dominant-leaf": Words(_larger, _apart),
    "starved-leaves": Words(_larger, _apart),
    "dead-leaf": Words(
        _independent,
        "Look for leaves that are frozen or not used, and for units that always give"
        " zero. The code gives False for a leaf without a gradient.",
    ),
    "vanishing-by-depth": Words(
        "each layer makes the gradient smaller",
        "Add a residual connection and a normalization to each layer.",
    ),
    "exploding-by-depth": Words(
        "each layer makes the gradient larger",
        "Clip each leaf by its own norm.",
    ),
    "restarts": Words(
        _written_twice,
        "Write each run to its own file, and resume a run with resume=True.",
    ),
}
