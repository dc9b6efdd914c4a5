"""A step of clipping as an optax transformation: state, policies, empty trees."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._devices.mesh import mesh_of
from .._thresholds.base import Threshold
from .._trees.leaves import Leaves, flatten
from . import metrics as _metrics, policies, summary as _summary
from .metrics import ClipState
from .summary import Summary


class Options(NamedTuple):
    """What every clipper takes."""

    nonfinite: str = "propagate"
    axis_name: Any = None
    specs: Any = None
    metrics: bool = True
    norm_arg: str = "norm"


class Step(NamedTuple):
    """One step of a clipper, before its state is put together."""

    arrays: list[Any]
    summary: Summary
    rule: Any
    norms: Any = None  # Norms, where groups are measured
    settled: bool = False  # whether the rule has seen to steps that are not finite


def transformation(
    init_rule: Callable[[Leaves], Any],
    step: Callable[..., Step],
    rule: Threshold,
    options: Options,
) -> optax.GradientTransformationExtraArgs:
    """A step as an optax transformation: state, policies, leaves that pass through."""
    policies.check_policy(options.nonfinite)

    def init_fn(params: Any) -> Any:
        leaves = flatten(params, updates=False)
        with mesh_of(leaves.arrays, auto=True):
            rule_state = init_rule(leaves)
            if not options.metrics and not rule.uses_step and not arrays_in(rule_state):
                return optax.EmptyState()
            return ClipState(_metrics.fresh(options.metrics), rule_state)

    def update_fn(
        updates: Any, state: Any = None, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        leaves = flatten(updates)
        if state is None:
            state = init_fn(updates)
            if arrays_in(getattr(state, "rule", ())):
                raise ValueError(
                    "Expected the state of an adaptive clipper, got None. Call"
                    " init(params) first and pass its state on."
                )
        if not isinstance(state, ClipState | optax.EmptyState):
            raise TypeError(f"Expected a state made by init, got {state!r}.")
        if isinstance(state, optax.EmptyState) and (options.metrics or rule.uses_step):
            raise TypeError(
                "Expected a ClipState made by init, got an EmptyState, as optax's own"
                " clipping or metrics=False has it. Take the state from init(params)."
            )
        kept = isinstance(state, ClipState)
        steps = state.metrics.steps if kept else jnp.zeros((), jnp.int32)
        rule_state = state.rule if kept else ()
        if not leaves.arrays:
            if not isinstance(state, ClipState):
                return updates, state
            new_metrics = _metrics.advance(state.metrics, _summary.nothing())
            return updates, ClipState(new_metrics, rule_state)
        with mesh_of(leaves.arrays):
            found = step(leaves, params, rule_state, steps, extra)
            if not isinstance(state, ClipState):
                return leaves.rebuild(found.arrays), state
            new_rule = found.rule
            if not found.settled:
                new_rule = _unless(found.summary.nonfinite, new_rule, rule_state)
            new_metrics = _metrics.advance(state.metrics, found.summary)
        return leaves.rebuild(found.arrays), ClipState(new_metrics, new_rule)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def by_policy(
    leaves: Leaves, summary: Summary, options: Options
) -> tuple[Summary, jax.Array, jax.Array]:
    """The summary, whether every leaf becomes NaN, and whether zero.

    First match wins: an unusable limit, then entries that are not finite.
    """
    nonfinite, policy = summary.nonfinite, options.nonfinite
    zero = jnp.zeros_like(nonfinite)
    if policy == "raise":
        policies.raise_if_nonfinite(leaves, nonfinite, options.axis_name, options.specs)
    lost = summary.unusable
    if policy in ("propagate", "raise"):
        lost = lost | nonfinite
    if policy == "zero":
        zero = nonfinite & ~lost

    def after(value: jax.Array) -> jax.Array:
        value = jnp.where(lost, jnp.nan, value)
        return jnp.where(zero, 0, value)

    summary = summary._replace(
        nonfinite=nonfinite,
        clipped_norm=after(summary.clipped_norm),
        scale=after(summary.scale),
        clipped=jnp.where(lost | zero, 0, summary.clipped),
        any_clipped=summary.any_clipped & ~(lost | zero),
    )
    return summary, lost, zero


def arrays_in(rule_state: Any) -> list[Any]:
    """What a rule remembers."""
    return jax.tree.leaves(rule_state)


def _unless(nonfinite: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(
        lambda n, o: jnp.where(nonfinite, o, jnp.asarray(n).astype(o.dtype)), new, old
    )
