"""Plain programs that fill the same metrics, written by hand for `everyday.py`.

They clip, and write every field of `ClipMetrics`, with the plainest arithmetic: no norm
outside of 1e-19..1e19, no policy, no mesh. What they need beyond optax's program is
what the metrics cost if nothing clever is done.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax import lax

import optax_clipx as clipx

ZERO, LOWEST = np.float32(0), np.float32(-np.inf)


def added(x: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
    """The sum of all entries, or over some axes."""
    return lax.reduce(x, ZERO, lax.add, tuple(range(x.ndim)) if axes is None else axes)


def largest(x: jax.Array) -> jax.Array:
    """The largest entry of a vector."""
    return lax.reduce(x, LOWEST, lax.max, (0,))


def advanced(old: clipx.ClipMetrics, any_clipped: jax.Array, **seen: Any) -> Any:
    """The metrics after a step, with their counts."""

    def count(before: jax.Array, flag: jax.Array | np.bool_) -> jax.Array:
        more = lax.add(before, lax.convert_element_type(flag, np.int32))
        return lax.max(before, more)

    bad = lax.bitwise_not(lax.is_finite(seen["norm"]))
    return old._replace(
        nonfinite=bad,
        steps=count(old.steps, np.bool_(True)),
        num_clipped=count(old.num_clipped, any_clipped),
        num_nonfinite=count(old.num_nonfinite, bad),
        **seen,
    )


def by_hand(
    real: optax.GradientTransformation, step: Callable[..., Any]
) -> optax.GradientTransformation:
    """A transformation with the state of a real one."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        leaves, structure = jax.tree.flatten(updates)
        clipped, metrics = step(leaves, jax.tree.leaves(params), state.metrics)
        return structure.unflatten(clipped), state._replace(metrics=metrics)

    return optax.GradientTransformation(real.init, update)


def clip(limit: float) -> optax.GradientTransformation:
    """`clip` with its metrics: both norms, and how many entries were outside."""
    bound = np.float32(limit)

    def step(leaves: list[Any], params: list[Any], old: Any) -> Any:
        clipped = [lax.clamp(-bound, x, bound) for x in leaves]
        sums = [np.float32(0)] * 3
        for x, y in zip(leaves, clipped, strict=True):
            outside = lax.convert_element_type(lax.ne(x, y), np.float32)
            each = (added(lax.mul(x, x)), added(lax.mul(y, y)), added(outside))
            sums = [lax.add(a, b) for a, b in zip(sums, each, strict=True)]
        norm, after = map(lax.sqrt, sums[:2])
        some = lax.gt(norm, ZERO)
        metrics = advanced(
            old,
            lax.gt(sums[2], ZERO),
            norm=norm,
            clipped_norm=after,
            scale=lax.select(some, lax.div(after, norm), lax.full_like(norm, 1)),
            threshold=bound,
            clipped=lax.div(sums[2], np.float32(sum(x.size for x in leaves))),
        )
        return clipped, metrics

    return by_hand(clipx.clip(limit), step)


def adaptive_grad_clip(clipping: float) -> optax.GradientTransformation:
    """`adaptive_grad_clip` of vectors and matrices, with its metrics."""
    factor, eps = np.float32(clipping), np.float32(1e-3)

    def norms(arrays: list[Any]) -> jax.Array:
        parts = []
        for x in arrays:
            squares = lax.mul(x, x)
            found = added(squares) if x.ndim < 2 else added(squares, (0,))
            parts.append(lax.reshape(lax.sqrt(found), (found.size,)))
        return lax.concatenate(parts, 0)

    def step(leaves: list[Any], params: list[Any], old: Any) -> Any:
        before = norms(leaves)
        limits = lax.mul(factor, lax.max(norms(params), eps))
        over = lax.gt(before, limits)
        one = lax.full_like(before, 1)
        scales = lax.select(over, lax.div(limits, before), one)
        sizes = [1 if x.ndim < 2 else x.shape[1] for x in leaves]
        clipped = []
        for x, part in zip(leaves, lax.split(scales, sizes), strict=True):
            axes = () if x.ndim < 2 else (1,)
            scale = lax.squeeze(part, (0,)) if x.ndim < 2 else part
            clipped.append(lax.mul(x, lax.broadcast_in_dim(scale, x.shape, axes)))
        after, ratio = lax.mul(before, scales), lax.div(before, limits)
        worst, none = lax.ge(ratio, largest(ratio)), lax.full_like(ratio, -np.inf)
        number = added(lax.convert_element_type(over, np.float32))
        metrics = advanced(
            old,
            lax.gt(number, ZERO),
            norm=lax.sqrt(added(lax.mul(before, before))),
            clipped_norm=lax.sqrt(added(lax.mul(after, after))),
            scale=lax.neg(largest(lax.select(worst, lax.neg(scales), none))),
            threshold=largest(lax.select(worst, limits, none)),
            clipped=lax.div(number, np.float32(before.size)),
        )
        return clipped, metrics

    return by_hand(clipx.adaptive_grad_clip(clipping), step)
