"""Thresholds that are quantiles of the norms so far."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._trees.arguments import check_between, check_static_count
from .._trees.arithmetic import where
from .._trees.types import Scalar
from .base import Context, Threshold, float32, memory, numbered, per_norm

# The sketch: equal bins of the logarithm over 24 decades, 5.7% wide, so that the
# middle of a bin is within 2.8% of all of it. With the count 4,000 bytes a norm.
_LOW, _HIGH, _BINS = math.log(1e-12), math.log(1e12), 999
_WIDTH = (_HIGH - _LOW) / _BINS


class HistoryState(NamedTuple):
    """The last norms, along the last axis."""

    seen: jax.Array
    history: jax.Array


class SketchState(NamedTuple):
    """How many norms fell into each bin, along the last axis; and beyond the ends."""

    counts: jax.Array
    saturated: jax.Array


class TrackerState(NamedTuple):
    """The quantile itself; 0 before the first norm."""

    quantile: jax.Array


def quantile(q: Scalar, *, window: Any = None, max_steps: Any = None) -> Threshold:
    r"""A threshold that is a quantile of the norms so far, this one included.

    .. math:: t_k = \mathrm{quantile}_q(n_1, \ldots, n_k)

    With ``max_steps`` the whole history is kept, with ``window`` the last norms, and
    the quantile is interpolated linearly. A history longer than ``max_steps`` continues
    as a window. Without both, a histogram counts norms in 999 bins of equal ratio from
    1e-12 to 1e12. It takes 4,000 bytes for each norm, and its quantile is within 2.9%
    of the exact one. Norms outside of this range count in the first or last bin, and
    ``saturated`` in the state counts them.

    Norms enter without clipping. A spike is one norm among many, so it moves the
    quantile by one rank only. A new level is followed when it is the fraction
    :math:`1 - q` of the history; a window makes that sooner. Norms of zero and
    non-finite steps do not enter.

    Args:
        q: the quantile, between 0 and 1; may be traced.
        window: use the last ``window`` norms.
        max_steps: use all norms of a run with at most this number of steps.

    Returns:
        A threshold rule.

    Raises:
        ValueError: if ``q`` is out of range, or both ``window`` and ``max_steps`` are
            given.
        TypeError: if ``window`` or ``max_steps`` is traced.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> rule = clipx.thresholds.quantile(0.5, window=3)
        >>> state = rule.init(jnp.float32(0))
        >>> context = clipx.thresholds.Context(step=0)
        >>> for norm in (1.0, 2.0, 9.0, 3.0):
        ...     threshold, state = rule.update(jnp.float32(norm), state, context)
        ...     print(threshold)
        1.0
        1.5
        2.0
        3.0

    References:
        Seetharaman et al., AutoClip: Adaptive gradient clipping for source separation
        networks, 2020, arXiv 2007.14469.
    """
    check_between(q, "q", 0, 1)
    if window is not None and max_steps is not None:
        raise ValueError(
            f"Expected window or max_steps, got both: window={window} and"
            f" max_steps={max_steps}."
        )
    name, size = ("window", window) if max_steps is None else ("max_steps", max_steps)
    if size is None:
        return per_norm(_init_sketch, lambda n, s, c: _update_sketch(n, s, q))
    check_static_count(size, name)

    def init(norms: jax.Array) -> HistoryState:
        return HistoryState(memory(norms, jnp.int32), memory(norms, size=size))

    return per_norm(init, lambda n, s, c: _update_history(n, s, q))


def quantile_tracker(q: Scalar, *, learning_rate: Scalar = 0.02) -> Threshold:
    r"""A threshold that moves by a factor towards a quantile of the norms.

    .. math:: t_{k+1} = t_k \exp\bigl(-\eta (\mathbb{1}[n_k \le t_k] - q)\bigr),
              \qquad t_1 = n_1

    Each norm :math:`n_k` above the threshold raises it by the factor
    :math:`e^{\eta q}`, and each norm below lowers it by :math:`e^{-\eta(1-q)}`. So a
    spike of any size moves it by this factor. With the default rate and
    :math:`q = 0.9`, a level that is 30 times as high is reached in 190 steps. The
    threshold falls more slowly: if the first norm is 25 times the usual norm, it takes
    1,600 steps to come down. The state has one number for each norm. Norms of zero and
    non-finite steps do not move it.

    Args:
        q: the fraction of norms that should be at most the threshold, between 0 and 1.
        learning_rate: :math:`\eta`; 0.01 to 0.05 for one norm a step.

    Returns:
        A threshold rule.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> rule = clipx.thresholds.quantile_tracker(0.5, learning_rate=0.5)
        >>> state = rule.init(jnp.float32(0))
        >>> context = clipx.thresholds.Context(step=0)
        >>> for norm in (4.0, 1.0, 1.0, 1e6):
        ...     threshold, state = rule.update(jnp.float32(norm), state, context)
        ...     print(f"{threshold:.3f}")
        4.000
        3.115
        2.426
        1.889

    References:
        Andrew et al., Differentially private learning with adaptive clipping, 2021,
        arXiv 1905.03871 (here without noise, for the norm of the step).
    """
    check_between(q, "q", 0, 1)
    check_between(learning_rate, "learning_rate", 0, float("inf"))

    def update(norm: jax.Array, state: TrackerState, context: Context) -> Any:
        limit = where(state.quantile > 0, state.quantile, norm)
        below = (norm <= limit).astype(jnp.float32)
        moved = limit * jnp.exp(-float32(learning_rate) * (below - float32(q)))
        info = jnp.finfo(jnp.float32)
        return limit, TrackerState(jnp.clip(moved, info.tiny, info.max))

    return per_norm(lambda norms: TrackerState(memory(norms)), update)


def _update_history(norm: jax.Array, state: HistoryState, q: Scalar) -> Any:
    size = state.history.shape[-1]
    place = numbered(size, norm) == (state.seen % size)[..., None]
    history = where(place, norm[..., None], state.history)
    count = state.seen + 1
    number = jnp.minimum(count, size)
    kept = numbered(size, norm) < number[..., None]
    ordered = jnp.sort(where(kept, history, jnp.inf), axis=-1)
    last = (number - 1).astype(jnp.float32)
    position = float32(q) * last
    below = jnp.floor(position)
    weight = position - below
    low = _entry(ordered, below)
    high = _entry(ordered, jnp.minimum(below + 1, last))
    # The count runs on to know the place; it returns to a full history.
    count = where(count >= 2 * size, size, count)
    return low + weight * (high - low), HistoryState(count, history)


def _entry(ordered: jax.Array, index: jax.Array) -> jax.Array:
    index = index.astype(jnp.int32)[..., None]
    return jnp.take_along_axis(ordered, index, axis=-1)[..., 0]


def _init_sketch(norms: jax.Array) -> SketchState:
    return SketchState(memory(norms, jnp.int32, _BINS), memory(norms, jnp.int32))


def _update_sketch(norm: jax.Array, state: SketchState, q: Scalar) -> Any:
    position = (jnp.log(where(norm > 0, norm, 1)) - _LOW) / _WIDTH
    index = jnp.clip(jnp.floor(position), 0, _BINS - 1).astype(jnp.int32)
    here = numbered(_BINS, norm) == index[..., None]
    # Before the sum of all counts overflows they are halved, which keeps their ratios.
    full = jnp.any(state.counts >= jnp.iinfo(jnp.int32).max // _BINS, axis=-1)
    before = where(full[..., None], state.counts // 2, state.counts)
    counts = before + here.astype(jnp.int32)
    outside = (position < 0) | (position >= _BINS)
    ranks = jnp.cumsum(counts, axis=-1)
    # The smallest bin up to which the fraction q of all norms lies.
    wanted = jnp.maximum(jnp.ceil(float32(q) * ranks[..., -1].astype(jnp.float32)), 1)
    bin_ = jnp.sum((ranks.astype(jnp.float32) < wanted[..., None]), axis=-1)
    limit = jnp.exp(_LOW + (bin_.astype(jnp.float32) + 0.5) * _WIDTH)
    outside &= state.saturated < jnp.iinfo(jnp.int32).max  # stays there, and no wrap
    saturated = state.saturated + outside.astype(jnp.int32)
    return limit, SketchState(counts, saturated)
