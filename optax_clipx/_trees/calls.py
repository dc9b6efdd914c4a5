"""Calls whose arguments do not fit: errors that say what to type instead."""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jaxtyping import PyTree

F = TypeVar("F", bound=Callable[..., Any])

_PURE = {  # how one tree is clipped in the same way
    "clip": "clip_by_value(tree, -max_delta, max_delta)",
    "clip_by_value": "clip_by_value(tree, min_value, max_value)",
    "clip_by_leaf_norm": "clip_by_leaf_norm(tree, max_norm)",
    "clip_by_global_norm": "clip_by_global_norm(tree, max_norm)",
    "adaptive_grad_clip": "adaptive_grad_clip(tree, params, clipping)",
}
_TREES = {"parameters", "params", "grads", "gradients", "updates", "tree", "model"}
_LIMITS = {"max_norm", "threshold", "max_delta", "max_grad_norm", "clip_norm"}
_KERAS = "Write optax_clipx.{}, which does the same as in Keras."
_ELSEWHERE = {  # names of other libraries: an argument that replaces it, and advice
    "norm_type": ("ord", "Write ord={}."),
    "error_if_nonfinite": ("nonfinite", 'Write nonfinite="raise".'),
    "foreach": ("", "Leave it out: XLA compiles the operations of all leaves."),
    "clipvalue": ("", _KERAS.format("clip({})")),
    "clipnorm": ("", _KERAS.format("clip_by_leaf_norm({})")),
    "global_clipnorm": ("", _KERAS.format("clip_by_global_norm({})")),
    "lr": ("learning_rate", "Write learning_rate={}."),
    "betas": ("b2", "Write b1=..., b2=...."),
}


def explains_calls(function: F) -> F:
    """Lets a function that makes a transformation say how it is called."""

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> Any:
        try:
            return function(*args, **kwargs)
        except TypeError:
            said = _misfit(function, args, kwargs)
            if not said:
                raise
        raise TypeError(said)

    return cast(F, call)


def _misfit(
    function: Callable[..., object],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> str:
    """What does not fit the arguments of a function; empty if nothing is said of it."""
    name, known = function.__name__, inspect.signature(function).parameters
    places = [x for x, p in known.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    needed = [x for x in places if known[x].default is inspect.Parameter.empty]
    unknown = [x for x in kwargs if x not in known]
    too_many = len(args) > len(places)
    misfit = too_many or unknown or any(x in kwargs for x in places[: len(args)])
    if _TREES.intersection(unknown) or (misfit and any(map(_is_tree, args[:1]))):
        return _for_trees(name, f"{name}({', '.join(needed)})")
    if unknown:
        advice = _advice(unknown[0], kwargs[unknown[0]], list(known), needed)
        return f"{name} has no argument {unknown[0]}. {advice}"
    if not too_many:
        return ""
    others = ", ".join(f"{x}=" for x in known if x not in places)
    return (
        f"{name} got {len(args)} positional argument{'s' * (len(args) > 1)}, but takes"
        f" {' and '.join(places) or 'none'}. Pass others by name: {others}."
    )


def _for_trees(name: str, call: str) -> str:
    said = (
        f"{name} takes no gradients and no parameters: {call} makes a transformation"
        f" for optax.chain({call}, optimizer), whose update clips the gradients."
    )
    if name in _PURE:
        said += f" To clip one tree, call optax_clipx.functional.{_PURE[name]}."
    return said


def _advice(name: str, value: object, known: list[str], needed: list[str]) -> str:
    """What to write in place of an argument that a function does not have."""
    option, advice = _ELSEWHERE.get(name, ("", ""))
    if advice and (not option or option in known):
        shown = repr(value) if isinstance(value, int | float | str) else "..."
        return advice.format(shown)
    near = difflib.get_close_matches(name, known, n=1)
    near = needed[:1] if needed and name in _LIMITS else near
    return f"Did you mean {near[0]}?" if near else f"It has {', '.join(known)}."


def _is_tree(value: PyTree) -> bool:
    """Whether a value is a tree of arrays, and not one number."""
    leaves = jax.tree.leaves(value)
    arrays = all(isinstance(x, jax.Array | np.ndarray) for x in leaves)
    return arrays and any(np.ndim(x) > 0 for x in leaves)
