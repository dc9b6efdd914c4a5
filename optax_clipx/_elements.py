"""Clipping entry by entry: the clamp, and other responses to single magnitudes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import _mesh, _policies
from ._grouping import ScalarGroups
from ._leaves import Leaves
from ._metrics import Summary
from ._reductions import accumulator, norms, times, widened
from ._responses import rescale
from ._scaling import Response
from ._thresholds._base import Context, Threshold
from ._thresholds._constant import constant, is_limit
from ._transformation import Options, Step, by_policy, transformation


def clip_by_interval(
    min_value: Any, max_value: Any, options: Options
) -> optax.GradientTransformationExtraArgs:
    """Clamps each entry to an interval."""
    lower = constant(min_value, "min_value", signed=True)
    upper = constant(max_value, "max_value", signed=True)
    if _is_number(min_value) and _is_number(max_value) and min_value > max_value:
        raise ValueError(
            f"Expected min_value <= max_value, got min_value={min_value} and"
            f" max_value={max_value}."
        )
    rule = lower._replace(uses_step=lower.uses_step or upper.uses_step)

    def step(
        leaves: Leaves, params: Any, state: Any, count: Any, extra: Mapping[str, Any]
    ) -> Step:
        low, _ = _limits(lower, leaves, state, count, extra)
        high, _ = _limits(upper, leaves, state, count, extra)
        return _finish(leaves, options, low, high, _clamp, state)

    return transformation(lambda leaves: (), step, rule, options)


def clamp_once(tree: Any, min_value: Any, max_value: Any, nonfinite: str) -> Any:
    """One clamp without state."""
    clipper = clip_by_interval(
        min_value, max_value, Options(nonfinite=nonfinite, metrics=False)
    )
    return clipper.update(tree, optax.EmptyState())[0]


def clip_by_magnitude(
    rule: Threshold, response: Response, options: Options
) -> optax.GradientTransformationExtraArgs:
    """`clip_by` for single entries."""

    def act(array: Any, low: jax.Array, high: jax.Array) -> jax.Array:
        if response is rescale and not jnp.iscomplexobj(array):
            return _clamp(array, low, high)
        return _respond(array, high, response)

    def step(
        leaves: Leaves, params: Any, state: Any, count: Any, extra: Mapping[str, Any]
    ) -> Step:
        if rule.uses_params:
            raise ValueError(
                "Limits relative to the parameters are for norms: measure with"
                " tree_norm(), leaf_norms() or unit_norms()."
            )
        high, new = _limits(rule, leaves, state, count, extra)
        return _finish(leaves, options, [-h for h in high], high, act, new)

    return transformation(lambda leaves: rule.init(_like_leaves(leaves)), step, rule, options)


def _like_leaves(leaves: Leaves) -> jax.Array:
    return jnp.zeros((len(leaves.arrays),), jnp.float32)


def _limits(
    rule: Threshold, leaves: Leaves, state: Any, count: Any, extra: Mapping[str, Any]
) -> tuple[list[jax.Array], Any]:
    groups = ScalarGroups(tuple(range(len(leaves.arrays))), len(leaves.arrays))
    context = Context(count, None, extra, leaves.paths, groups.pack)
    norms = jnp.zeros((len(leaves.arrays),), accumulator(leaves.arrays))
    limits, new = rule.update(norms, state, context)
    return list(jnp.broadcast_to(limits, norms.shape)), new


def _clamp(array: Any, low: jax.Array, high: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(array):
        raise TypeError(
            "Expected real updates for an interval, got complex ones: clip their"
            " magnitudes with optax_clipx.clip(max_delta)."
        )
    return jnp.clip(array, low.astype(array.dtype), high.astype(array.dtype))


def _respond(array: Any, limit: jax.Array, response: Response) -> jax.Array:
    wide = jnp.asarray(array).astype(widened(array, limit.dtype))
    magnitude = jnp.abs(wide)
    zero = magnitude == 0
    scale = response(
        jnp.where(zero, 1, magnitude), jnp.broadcast_to(limit, magnitude.shape)
    )
    scale = jnp.where(zero, 1, scale)
    return jnp.where(scale == 1, array, times(wide, scale).astype(array.dtype))


def _finish(
    leaves: Leaves,
    options: Options,
    low: list[jax.Array],
    high: list[jax.Array],
    act: Callable[..., jax.Array],
    new: Any,
) -> Step:
    arrays = leaves.arrays
    if options.nonfinite == "sanitize":
        arrays = _policies.sanitize(arrays)
    unusable = [~(h >= lo) for lo, h in zip(low, high, strict=True)]
    clipped = []
    for x, lo, h, bad in zip(arrays, low, high, unusable, strict=True):
        clipped.append(jnp.where(bad, jnp.nan, act(x, lo, h)))
    summary = _summarize(leaves, arrays, clipped, low, high, options)
    summary = summary._replace(unusable=jnp.any(jnp.stack(unusable)))
    if options.nonfinite in ("zero", "raise"):
        summary, lost, zero = by_policy(leaves, summary, options.nonfinite)
        clipped = [jnp.where(lost, jnp.nan, x) for x in clipped]
        if zero is not None:
            clipped = [jnp.where(zero, jnp.zeros_like(x), x) for x in clipped]
    return Step(clipped, summary, new)


def _summarize(
    leaves: Leaves,
    arrays: list[Any],
    clipped: list[jax.Array],
    low: list[jax.Array],
    high: list[jax.Array],
    options: Options,
) -> Summary:
    """Both norms and the share of entries outside, in one reduction.

    Where nobody reads it, the compiler removes it.
    """
    axis_name = options.axis_name
    if options.nonfinite in ("propagate", "sanitize") and _mesh.is_unknown(
        axis_name, options.specs
    ):
        axis_name = ()  # The clamp itself needs no collective: these are the shard's.
    # Indicators are 0 and 1, so that the square of their norm is their count.
    outside = [
        _outside(x, lo, h).astype(jnp.float16)
        for x, lo, h in zip(arrays, low, high, strict=True)
    ]
    trees = [arrays, clipped, outside, _policies.indicators(leaves.arrays)]
    groups = ScalarGroups((0,) * len(arrays), None)
    found = norms(
        [x for tree in trees for x in tree],
        groups.repeated(len(trees)),
        2.0,
        leaves.paths * len(trees),
        axis_name,
        options.specs,
    )
    before, after, num_outside, num_bad = found.value
    places = _mesh.placements(arrays, leaves.paths, axis_name, options.specs)
    size = jnp.asarray(groups.sizes(arrays, places), before.dtype)
    share = jnp.square(num_outside) / size
    nonzero = jnp.where(before > 0, before, 1)
    return Summary(
        norm=before,
        clipped_norm=after,
        scale=jnp.where(before > 0, after / nonzero, 1),
        threshold=jnp.max(jnp.stack([jnp.abs(b) for b in low + high])),
        clipped=share,
        any_clipped=num_outside > 0,
        nonfinite=num_bad > 0,
        unusable=jnp.zeros((), jnp.bool_),
    )


def _outside(array: Any, low: jax.Array, high: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(array):
        return jnp.abs(array) > high.astype(jnp.abs(array).dtype)
    return (array < low.astype(array.dtype)) | (array > high.astype(array.dtype))


def _is_number(value: Any) -> bool:
    traced = isinstance(value, jax.core.Tracer)
    return is_limit(value) and not callable(value) and not traced
