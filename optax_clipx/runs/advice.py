"""What each finding says, what to do about it, and where that is explained."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Advice(NamedTuple):
    """What is said of a fault.

    The sentence has the names of the evidence in braces, or is a function that returns
    such a sentence for some evidence. The line of code may name ``{max_norm}``, a few
    times the usual norm, or 1.0 and a comment if that is not known, and ``{run}``. A
    clipper between ``{chain}`` and ``{end}`` is in a chain unless it replaces another.
    The entry is a title of Troubleshooting.
    """

    sentence: str | Callable[[Mapping[str, Any]], str]
    line: str
    entry: str


# Who starves the other leaves, and what to type then.
MUON = "the leaves that Muon handles"
WITHOUT_MUON = (
    "clipx.excluding(clipx.clip_by_global_norm({max_norm}), clipx.muon_leaves)"
)


_SKIPPED = (
    "{count:# step} {were} skipped because the gradients were not finite. This is"
    " normal while a dynamic loss scale is found."
)
JUMP = (
    "At step {rate_jump:,} the learning rate rises from {rate_before} to {rate_after}"
    " ({rate_factor:.3g} times as high)."
)


def _nonfinite(evidence: Mapping[str, Any]) -> str:
    one = evidence["count"] == 1
    if evidence.get("all_skipped"):
        return _SKIPPED.replace("{were}", "was" if one else "were")
    verb = "is" if one else "are"
    return (
        f"The first {{value}} is in {{first_in}}; {{count:# step}} {verb} not finite."
    )


def _divergence(evidence: Mapping[str, Any]) -> str:
    best = _of_steps("best_steps", evidence)
    said = f"The loss rises from its best level, {{best}} ({best}),"
    if math.isfinite(evidence["end"]):
        return f"{said} to {{end}} at the end ({_of_steps('end_steps', evidence)})."
    if "highest" in evidence:
        said += " to {highest} at step {highest_step:,},"
    return f"{said} and is not finite at the end."


def _of_steps(name: str, evidence: Mapping[str, Any]) -> str:
    """Of which steps a level is."""
    first, last = evidence[name]
    if first == last:
        return f"step {first:,}"
    return f"median of steps {first:,} to {last:,}"


def _updates(evidence: Mapping[str, Any]) -> str:
    if evidence["count"] == 1:
        return "The norm of the updates rises, and the loss rises {lead:# step} later."
    return (
        "At {count} steps the norm of the updates rises, and the loss rises"
        " {lead:# step} later (median)."
    )


def _growth(evidence: Mapping[str, Any]) -> str:
    said = (
        "At step {warned:,} the norm has doubled, and at step {last_step:,} it is"
        " {factor:.3g} times as large as before the growth."
    )
    if "peak_step" in evidence:
        said += (
            " The growth starts where the learning rate reaches its maximum,"
            " {peak_learning_rate}, at step {peak_step:,}."
        )
    return said


def _spikes(evidence: Mapping[str, Any]) -> str:
    count, lost = evidence["count"], evidence["not_recovered"]
    most = "" if count == 1 else "up to "
    said = f"The norm has {{count:# spike}}, of {most}{{factor:.3g}} times its level"
    if lost == "unknown":
        return f"{said}."
    if lost:
        ones = "it" if count == 1 else f"{lost} of them"
        return f"{said}; the loss did not recover from {ones}."
    if evidence.get("all_clipped"):
        said += "; it was clipped" if count == 1 else "; all of them were clipped"
        return f"{said}, and the loss recovered."
    return f"{said}; the loss recovered from {'it' if count == 1 else 'all of them'}."


def _shifts(evidence: Mapping[str, Any]) -> str:
    factors = evidence["factors"]
    if len(factors) > 1:
        return (
            "At each of these steps the norm changes at once, to {factors:.3g} times."
        )
    verb = "falls" if factors[0] < 1 else "rises"
    return (
        f"From one step to the next the norm {verb} to {{factors:.3g}} times its level."
    )


def _always(evidence: Mapping[str, Any]) -> str:
    said = "{clip_rate:.1%} of the steps are clipped"
    if "target" in evidence:
        return f"{said}; the rule's target is {{target:.0%}}."
    return f"{said}."


_LOWER = (
    "{chain}clipx.zclip(max_norm={max_norm}){end}"
    "  # first lower the learning rate, for example to a third"
)
# What to type in place of the usual line.
NO_JUMP = (
    "learning_rate = {rate:.4g}  # load a checkpoint from before step {step}; if you"
    " need a higher rate, raise it slowly, for example over 1,000 steps"
)
AFTER_DIVERGENCE = "# follow the advice for {code}: the run diverges before this step"
FROM_LOSS = (
    'jax.config.update("jax_debug_nans", True)'
    "  # stops at the operation with the first NaN"
)
CLIPPED = "# nothing to change: the clipping does its work"
NOTHING = "# nothing to change while few steps are skipped"
REPLACES = "use this clipper in place of yours in optax.chain"
REMOVES = "if your optimizer contains a clipper already, remove that clipper"
# Around a clipper, if nothing is known of one that the run has.
CHAINED = ("optax.chain(", ", optimizer)")
DIVERGED = ("growing-norms", "loss-diverged")
REPLACING = {  # codes whose line has a clipper that takes the place of one
    "loss-diverged",
    "growing-norms",
    "spikes",
    "level-shift",
    "rises-with-schedule",
    "warmup-spike",
    "dominant-leaf",
    "starved-leaves",
    "exploding-by-depth",
}

# The worse come first among findings of one severity, and causes before what follows.
ADVICE = {
    "update-before-loss": Advice(
        _updates,
        "optax.chain(optimizer, clipx.clip_by_global_norm({max_norm}))",
        "Updates grow before the loss",
    ),
    "loss-diverged": Advice(
        _divergence,
        _LOWER,
        "The loss diverges",
    ),
    "growing-norms": Advice(
        _growth,
        _LOWER,
        "The loss diverges",
    ),
    "nonfinite": Advice(
        _nonfinite,
        'clipx.clip_by_global_norm(1.0, nonfinite="raise")  # names the leaves',
        "Loss is NaN after N steps",
    ),
    "lock-out": Advice(
        "{in_a_row:# step} in a row are skipped.",
        "clipx.skip_spikes(optimizer, patience=20)",
        "Every step is skipped",
    ),
    "spikes": Advice(
        _spikes,
        "{chain}clipx.zclip(){end}",
        "Gradient norm spikes",
    ),
    "periodic-spikes": Advice(
        "The norm has {count:# spike}, one every {period:# step}, of {factor:.3g} times"
        " its level.",
        "for step in {steps}: print(batches[step])  # look at the data of these steps",
        "Spikes at equal distances",
    ),
    "level-shift": Advice(
        _shifts,
        "{chain}clipx.zclip(patience=20){end}",
        "The gradient norm changes at one step",
    ),
    "rises-with-schedule": Advice(
        "The norm rises to {factor:.3g} times its level while the learning rate falls"
        " to {learning_rate_factor:.3g} times its maximum.",
        "clipx.clip_by(clipx.measures.tree_norm(),"
        " clipx.thresholds.follow_schedule({max_norm}, schedule))"
        "  # schedule: the optax schedule of the learning rate",
        "Norms rise as the learning rate falls",
    ),
    "warmup-spike": Advice(
        "A norm of {norm} at the start leaves the threshold at {threshold}, far above"
        " the later norms of {later_norms}, for {blind_steps:# step}.",
        "clipx.zclip(max_norm={max_norm})",
        "An early spike raises the threshold",
    ),
    "always-clipped": Advice(
        _always,
        "clipx.zclip()  # record again with it, or with ten times the threshold",
        "Clip rate is 100%",
    ),
    "never-clipped": Advice(
        "No step is clipped: the largest norm is {closest:.0%} of the threshold of its"
        " step.",
        "clipx.suggest_threshold({run}, clip_rate=0.1).value",
        "Clip rate is 0%",
    ),
    "dominant-leaf": Advice(
        "{leaf} has {share:.1%} of the squared norm of the whole gradient.",
        'clipx.auto_clip(scope="leaf")',
        "One layer dominates the gradient norm",
    ),
    "starved-leaves": Advice(
        "The updates of all other leaves are {factor:.3g} times smaller than they would"
        " be without {starved_by}.",
        'clipx.auto_clip(scope="leaf")',
        "One layer dominates the gradient norm",
    ),
    "dead-leaf": Advice(
        "There is no gradient in {leaves}.",
        "jax.tree.map(jnp.any, grads)  # False: the loss does not depend on it",
        "A layer has no gradient",
    ),
    "vanishing-by-depth": Advice(
        "The norm of {first} is {first_over_last:.3g} times that of {last}.",
        "x = x + layer(norm(x))  # a residual connection and a normalization",
        "Gradients vanish or explode with depth",
    ),
    "exploding-by-depth": Advice(
        "The norm of {first} is {first_over_last:.3g} times that of {last}.",
        'clipx.auto_clip(scope="leaf")',
        "Gradients vanish or explode with depth",
    ),
    "restarts": Advice(
        "The steps go back {count:# time}: {kind}.",
        "clipx.History(path, resume=True)",
        "The steps of a log go back",
    ),
}


def put(code: str) -> str:
    """What to put in place of a threshold that the record does not tell."""
    of_what = " of the updates" if code == "update-before-loss" else ""
    norm = f"the median norm{of_what} of steps that went well"
    return f"in place of 1.0, put three times {norm}"
