"""What all methods with a scope share."""

import optax

from .._clipping.clip_by import clip_by
from .._clipping.measures import Measure, leaf_norms, tree_norm
from .._clipping.scaling import Response
from .._thresholds.base import Threshold
from .._thresholds.combine import minimum
from .._thresholds.constant import constant
from .._trees.arguments import AxisNames, Limit, Specs

__all__ = ["AxisNames", "Limit", "Scope", "Specs", "capped", "measure_of", "method"]

Scope = str | Measure  # "tree", "leaf" or what is measured together


def method(
    scope: Scope,
    rule: Threshold | Limit,
    response: Response,
    nonfinite: str,
    axis_name: AxisNames,
    specs: Specs,
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


def measure_of(scope: Scope) -> Measure:
    """The measure that a scope names."""
    if isinstance(scope, Measure):
        return scope
    if isinstance(scope, str) and scope in ("tree", "leaf"):
        return tree_norm() if scope == "tree" else leaf_norms()
    raise ValueError(
        "Expected scope to be 'tree', 'leaf' or a measure such as"
        f" optax_clipx.measures.group_norms(labels), got scope={scope!r}."
    )


def capped(rule: Threshold, max_norm: Limit | None) -> Threshold:
    """The rule, and an absolute threshold that does not enter its statistics."""
    return rule if max_norm is None else minimum(rule, constant(max_norm, "max_norm"))
