"""Rules made of rules."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._reductions.groups import Packed
from .._trees.arguments import Limit, check_between, check_count
from .._trees.arithmetic import shaped_like, where
from .._trees.types import Scalar
from .base import Context, Threshold, float32, memory, one_more
from .constant import as_threshold, at


def minimum(*rules: Limit | Threshold) -> Threshold:
    r"""The smallest of several thresholds: :math:`t = \min_j t_j`.

    Each rule keeps its own statistics and receives its own threshold only: an
    absolute threshold does not lower the statistics of an adaptive rule.

    Args:
        rules: threshold rules, numbers, schedules or prefixes.

    Returns:
        A threshold rule; its state is a tuple of theirs.

    Raises:
        ValueError: if there is none.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> rule = clipx.thresholds.minimum(clipx.thresholds.norm_growth(2.0), 3.0)
        >>> state = rule.init(jnp.float32(0))
        >>> context = clipx.thresholds.Context(step=0)
        >>> for norm in (1.0, 9.0, 9.0):
        ...     threshold, state = rule.update(jnp.float32(norm), state, context)
        ...     print(threshold)
        3.0
        2.0
        3.0

    References:
        ZClip's ``max_grad_norm`` is such an absolute threshold: Kumar et al., 2025,
        arXiv 2504.02507.
    """
    if not rules:
        raise ValueError("Expected one rule or more, got none.")
    parts = [as_threshold(rule) for rule in rules]

    def update(norms: Packed, state: PyTree, context: Context) -> tuple[Any, Any]:
        found = [
            rule.update(norms, s, context) for rule, s in zip(parts, state, strict=True)
        ]
        limits, states = zip(*found, strict=True)
        each = [_in_form(t, norms) for t in limits]
        return jax.tree.map(lambda *t: _least(t), *each), states

    return _combined(parts, lambda norms: tuple(r.init(norms) for r in parts), update)


class WarmupState(NamedTuple):
    """How many norms were seen, one number for each, and the states of both rules."""

    seen: Any
    rule: Any
    then: Any


def warmup(
    rule: Limit | Threshold, *, then: Limit | Threshold, steps: Scalar
) -> Threshold:
    r"""One rule for the first steps, then another.

    The second rule sees all norms from the first step on. A step whose norm is zero or
    non-finite does not count as a step of the warm-up.

    Args:
        rule: a threshold rule, number, schedule or prefix for the warm-up.
        then: the same for afterwards.
        steps: how many norms are seen in the warm-up.

    Returns:
        A threshold rule; its state is theirs and a count for each norm.

    Raises:
        ValueError: if ``steps`` is negative or no whole number.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> median = clipx.thresholds.quantile(0.5, window=9)
        >>> rule = clipx.thresholds.warmup(1.0, then=median, steps=2)
        >>> state = rule.init(jnp.float32(0))
        >>> context = clipx.thresholds.Context(step=0)
        >>> for norm in (4.0, 5.0, 6.0):
        ...     threshold, state = rule.update(jnp.float32(norm), state, context)
        ...     print(threshold)
        1.0
        1.0
        5.0

    References:
        AdaGC warms up with a fixed threshold: Wang et al., 2025, arXiv 2502.11034.
    """
    check_count(steps, "steps", 0)
    parts = [as_threshold(rule), as_threshold(then)]

    def init(norms: Packed) -> WarmupState:
        seen = jax.tree.map(lambda n: memory(n, jnp.int32), norms)
        return WarmupState(seen, *[part.init(norms) for part in parts])

    def update(
        norms: Packed, state: WarmupState, context: Context
    ) -> tuple[Any, WarmupState]:
        first, first_state = parts[0].update(norms, state.rule, context)
        second, second_state = parts[1].update(norms, state.then, context)
        limits = jax.tree.map(
            lambda k, a, b: where(k < jnp.asarray(steps, jnp.int32), a, b),
            state.seen,
            _in_form(first, norms),
            _in_form(second, norms),
        )
        seen = jax.tree.map(
            lambda k, n: where(n > 0, one_more(k), k), state.seen, norms
        )
        return limits, WarmupState(seen, first_state, second_state)

    return _combined(parts, init, update)


def scaled(rule: Limit | Threshold, factor: Limit) -> Threshold:
    r"""The threshold of another rule, times a factor: :math:`t = \alpha\, t'`.

    The statistics of the rule see its own threshold and not the product.

    Args:
        rule: a threshold rule, number, schedule or prefix.
        factor: :math:`\alpha`, a number, a scalar array, or a schedule of the number of
            updates so far.

    Returns:
        A threshold rule with the state of the other.

    Raises:
        ValueError: if the factor is negative or NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> median = clipx.thresholds.quantile(0.5, window=9)
        >>> rule = clipx.thresholds.scaled(median, 2.0)
        >>> threshold, _ = rule.update(
        ...     jnp.float32(3.0), rule.init(jnp.float32(0)), clipx.thresholds.Context(0)
        ... )
        >>> print(threshold)
        6.0

    References:
        Many training codes use a multiple of the median norm as the threshold.
    """
    if not callable(factor):
        check_between(factor, "factor", 0, float("inf"))
    inner = as_threshold(rule)

    def update(norms: Packed, state: PyTree, context: Context) -> tuple[Any, Any]:
        limits, state = inner.update(norms, state, context)
        now = float32(at(factor, context.step))
        return jax.tree.map(lambda t: scale(t, now), _in_form(limits, norms)), state

    def scale(limit: jax.Array, now: jax.Array | np.float32) -> jax.Array:
        # An infinite threshold stays infinite, also times zero.
        return where(jnp.isinf(limit), limit, limit * now.astype(limit.dtype))

    combined = _combined([inner], inner.init, update)
    return combined._replace(uses_step=combined.uses_step or callable(factor))


def _combined(
    parts: list[Threshold], init: Callable[..., PyTree], update: Callable[..., PyTree]
) -> Threshold:
    return Threshold(
        init,
        update,
        uses_params=any(rule.uses_params for rule in parts),
        uses_step=any(rule.uses_step for rule in parts),
    )


def _in_form(limits: Packed, norms: Packed) -> Any:
    """The thresholds, one for each norm, where a rule returned a single one."""
    if jax.tree_util.all_leaves([limits]) and not _same_form(limits, norms):
        return shaped_like(limits, norms)
    return jax.tree.map(lambda t, n: jnp.asarray(t).astype(n.dtype), limits, norms)


def _same_form(limits: Packed, norms: Packed) -> bool:
    return not isinstance(norms, tuple) and jnp.shape(limits) == norms.shape


def _least(limits: tuple[jax.Array, ...]) -> jax.Array:
    # A threshold of NaN is unusable, and must stay so.
    return functools.reduce(jnp.minimum, limits)
