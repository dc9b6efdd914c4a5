"""What all methods with a scope share."""

from typing import Any

import optax

from .._clipping import clip_by
from .._measures import Measure, leaf_norms, tree_norm
from .._scaling import Response
from .._thresholds._base import Threshold
from .._thresholds._combine import minimum
from .._thresholds._constant import constant


def method(
    scope: Any,
    rule: Any,
    response: Response,
    nonfinite: str,
    axis_name: Any,
    specs: Any,
    metrics: bool,
) -> optax.GradientTransformationExtraArgs:
    """`clip_by` with what the scope measures."""
    return clip_by(
        measure_of(scope),
        rule,
        response,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
        metrics=metrics,
    )


def measure_of(scope: Any) -> Measure:
    """The measure that a scope names."""
    if isinstance(scope, Measure):
        return scope
    if isinstance(scope, str) and scope in ("tree", "leaf"):
        return tree_norm() if scope == "tree" else leaf_norms()
    raise ValueError(
        "Expected scope to be 'tree', 'leaf' or a measure such as"
        f" optax_clipx.group_norms(labels), got scope={scope!r}."
    )


def capped(rule: Threshold, cap: Any, name: str = "cap") -> Threshold:
    """A rule with an absolute limit on top, which it does not hear of."""
    return rule if cap is None else minimum(rule, constant(cap, name))
