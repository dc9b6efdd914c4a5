"""Which column is the step, the norm, the loss: by the names that loggers use."""

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .jsonl import ReadError
from .table import MISSING, Columns, present

# What others call the step; the first that is there is taken. Keras counts epochs,
# which are taken only if there are no steps.
STEP_NAMES = (
    "step",
    "_step",
    "global_step",
    "trainer/global_step",
    "steps",
    "iteration",
    "iterations",
    "iter",
    "update",
    "updates",
    "epoch",
)
WHOLE = "track/norm"  # computed from the norms of all leaves
UPDATE = "track/update_norm"  # of the whole update
_OWN_LEAVES = "track_norms/"  # what comes before the names of leaves
# What the norm and the loss are called; the more telling names come first. MaxText's
# grad_norm is that after clipping.
_USUAL: dict[str, tuple[str, ...]] = {
    "norm": (
        "norm",
        "raw_grad_norm",
        "grad_norm",
        "gradient_norm",
        "grad_global_norm",
        "global_norm",
        "gnorm",
        "total_grad_norm",
        "grad_norm_total",
        "total_norm",
        "grad/norm/total",  # Levanter
        "grad_norm/total",
        "grad_norms/total",
        "grad_2.0_norm_total",  # Lightning
        "value",
    ),
    "loss": (
        "loss",
        "train_loss",
        "training_loss",
        "loss_step",  # Lightning's, of single steps
        "train_loss_step",
        "value",
    ),
    "update_norm": ("update_norm", "updates_norm", "update_global_norm"),
    "schedule": ("learning_rate", "lr", "current_learning_rate", "schedule"),
    "target": ("target_clip_rate",),
}


def step_name(path: Any, columns: Iterable[str]) -> str:
    """The column with the steps, as others call it; an exact name comes first.

    Capitals and spaces, as in "Global Step", are no difference otherwise.
    """
    names = list(columns)
    exact = {name: name for name in names}
    alike = {name.lower().replace(" ", "_"): name for name in reversed(names)}
    *steps, epoch = STEP_NAMES
    for known, wanted in ((exact, steps), (alike, steps), (alike, [epoch])):
        for name in wanted:
            if name in known:
                return known[name]
    raise ReadError(no_column(path, STEP_NAMES[0], names, "--step NAME"))


def no_column(path: Any, what: str, columns: Iterable[str], mend: str) -> str:
    """The message for a column that is not there."""
    names = ", ".join(repr(name) for name in columns) or "none"
    return f"{path}: there is no column {what!r}. The columns are: {names}. Use {mend}."


def pick(columns: Columns, what: str, name: str | None = None, source: Any = "") -> str:
    """The name of the column that holds ``"norm"`` or the like.

    Taken is what is named; else ``clip/norm``; else a column of exactly a usual name;
    else one whose last part is such a name, if only one fits.
    """
    source = source or "this run"
    mend = "--norm NAME" if what == "norm" else "--column NAME"
    if name is not None:
        if name not in columns:
            raise ReadError(no_column(source, name, columns, mend))
        return name
    if f"clip/{what}" in columns:
        return f"clip/{what}"
    others = [n for n in columns if not n.startswith(_OWN_LEAVES)]  # "norm" is a leaf
    for kind in _USUAL.get(what, (what,)):
        if kind in columns:
            return kind
        # Clippers in a row come before what is measured around them.
        fitting = [n for n in others if _ends_in(n, kind)]
        fitting = [n for n in fitting if not n.startswith("skip/")] or fitting
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise ReadError(
                f"{source}: several columns may be the {what}: {', '.join(fitting)}."
                f" Choose one with {mend}."
            )
    named = [n for n in others if what == "schedule" and n.startswith("lr-")]
    if len(named) == 1:  # Lightning's, with the name of the optimizer
        return named[0]
    raise ReadError(no_column(source, what, columns, mend))


def like_a_norm(columns: Iterable[str]) -> list[str]:
    """Columns that may hold the norm of the whole gradient, by a part of their name."""
    others = [n for n in columns if not n.startswith((*LEAVES, "track", "skip/"))]
    shown = [n for n in others if "norm" in n.lower() or "grad" in n.lower()]
    return [n for n in shown if not _is_another(n.lower())]


def _is_another(name: str) -> bool:
    """Whether a norm is that of something else: of updates, or after clipping."""
    return any(x in name for x in ("update", "param", "weight", "clipped", "accum"))


def with_whole_norm(columns: Columns) -> Columns:
    """With ``track/norm``, if the norms of all leaves are there and no other norm is.

    ``track_norms`` records the 2-norm of each leaf; the norm of the whole gradient is
    the root of the sum of their squares.
    """
    parts = [x for name, x in columns.items() if name.startswith(_OWN_LEAVES)]
    others = [name for name in columns if not name.startswith(_OWN_LEAVES)]
    if not parts or any(_ends_in(n, kind) for n in others for kind in _USUAL["norm"]):
        return columns
    norms = np.asarray(parts, np.float64)
    whole = np.sqrt(np.sum(np.square(norms), axis=0))
    there = np.all([present(x) for x in norms], axis=0)
    return {**columns, WHOLE: np.where(there, whole, MISSING)}


def with_update_norm(columns: Mapping[str, np.ndarray]) -> Columns:
    """With ``track/update_norm``, if the norm of the updates has another name."""
    found = dict(columns)
    if UPDATE not in found:
        with contextlib.suppress(ReadError):
            found[UPDATE] = found[pick(found, "update_norm")]
    return found


# What comes before the names of leaves: ours, Levanter's, Lightning's, and others'.
LEAVES = (
    _OWN_LEAVES,
    "grad/norm/",
    "grad_2.0_norm/",
    "grad_norms/",
    "grad_norm/",
    "gradients/",
)


def leaves(columns: Iterable[str], norm: str | None) -> dict[str, str]:
    """From the names of leaves to the columns with their norms."""
    for start in LEAVES:
        found = {
            name.removeprefix(start): name
            for name in columns
            if name.startswith(start) and name != norm
        }
        if len(found) > 1:
            return found
    return {}


def _ends_in(name: str, kind: str) -> bool:
    """Whether the last part is so called: train/loss, and W&B's "run 3 - loss"."""
    name = name.lower()
    return name == kind or name.endswith((f"/{kind}", f" - {kind}"))


def limits_beside(columns: Columns, norm: str) -> np.ndarray | None:
    """The thresholds that a column of norms was clipped with, if they were recorded."""
    name = f"{norm.removesuffix('norm')}threshold"
    if not norm.endswith("norm") or name not in columns:
        return None
    limits = np.asarray(columns[name], np.float64)
    return limits if present(limits).any() else None


def norms_of_all_steps(columns: Columns, name: str) -> np.ndarray:
    """The norms of a column; on skipped steps those that the skipper measured.

    There the clipper did not see the gradient, and its norm is that of a step before.
    """
    norms = np.asarray(columns[name], np.float64)
    of_skipper = {"skip/skipped", "skip/norm"}
    of_first = name in ("clip/norm", "clip/0/norm")  # what comes in, as the skipper's
    if not of_first or not of_skipper <= columns.keys():
        return norms
    measured = np.asarray(columns["skip/norm"], np.float64)
    skipped = np.asarray(columns["skip/skipped"], np.float64) > 0
    return np.where(skipped & present(measured), measured, norms)


def counted(number: int, noun: str) -> str:
    """A number of things: 1 step, 2 steps."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
