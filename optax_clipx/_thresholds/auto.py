"""A threshold that is found from the norms, with no number to choose."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._trees.arithmetic import where
from .base import Context, Threshold, memory, per_norm, put, ranked

_SHARE = 0.05  # of the norms are below the level
_FACTOR = 2.0  # the threshold divided by the level
_PACE = 0.02  # of the level's logarithm, after the first steps
_DOUBLING = 50  # norms in a row above the level double its pace upward
_MOST_DOUBLINGS = 8
_FIRST = 5  # norms; their median is the most that the level is after them


class AutoState(NamedTuple):
    """The level, 0 before the first norm, and what moves it.

    `seen` counts the norms and `above` those in a row above the level; `first` holds
    the first ones.
    """

    level: jax.Array
    seen: jax.Array
    above: jax.Array
    first: jax.Array


def auto() -> Threshold:
    r"""Twice the 5th percentile of the norms, for :func:`optax_clipx.auto_clip`.

    .. math:: t_k = 2\, m_k, \qquad
              \log m_{k+1} = \log m_k + \max\!\left(0.02, \tfrac{1}{k + 1}\right)
              \begin{cases} 0.05 \cdot 2^{a_k / 50} & n_k > m_k \\
              -0.95 & n_k \le m_k \end{cases} \qquad m_1 = n_1

    Here :math:`n_k` is the norm at step :math:`k`, :math:`m_k` the level, and
    :math:`a_k` the number of norms in a row above the level, this one included, up to
    400. After five norms the level is at most their median, so that a spike at the
    first step has no lasting effect. If all norms are multiplied by a constant, so
    are the thresholds.

    A norm above the level, of any size, raises the threshold by at most the factor
    :math:`e^{0.1 / (k + 1)}` in the first 50 steps and by 0.1% later; a norm below
    lowers it by 1.9%. So an explosion of 50 steps raises the threshold by only 7%. A
    change that lasts is followed faster and faster: a level that is 30 times as high is
    reached in about 260 steps. Norms of zero and non-finite steps change nothing.

    Returns:
        A threshold rule; its state is eight numbers for each norm.

    Raises:
        TypeError: if it is given an argument: it has no number to choose.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> rule = clipx.thresholds.minimum(clipx.thresholds.auto(), 5.0)
        >>> state = rule.init(jnp.float32(0))
        >>> context = clipx.thresholds.Context(step=0)
        >>> for norm in (1.0, 1.1, 0.9, 50.0, 1.0):
        ...     threshold, state = rule.update(jnp.float32(norm), state, context)
        ...     print(f"{threshold:.3f}")
        2.000
        1.244
        1.265
        1.281
        1.295

    References:
        A quantile tracked by comparisons alone: Andrew et al., Differentially private
        learning with adaptive clipping, 2021, arXiv 1905.03871. A low percentile as the
        threshold: Seetharaman et al., AutoClip, 2020, arXiv 2007.14469. The factor, the
        start and the growing rate are this package's own.
    """

    def update(norm: jax.Array, state: AutoState, context: Context) -> Any:
        level = where(state.level > 0, state.level, norm)
        higher = norm > level
        above = where(higher, jnp.minimum(state.above, 2**20) + 1, 0)
        doublings = jnp.minimum(above.astype(jnp.float32) / _DOUBLING, _MOST_DOUBLINGS)
        seen = jnp.minimum(state.seen, 2**20) + 1
        pace = jnp.maximum(_PACE, 1 / (seen.astype(jnp.float32) + 1))
        up = jnp.minimum(pace * _SHARE * jnp.exp2(doublings), 1)
        moved = level * jnp.exp(where(higher, up, -pace * (1 - _SHARE)))
        first = put(state.first, state.seen, norm)
        (median,) = ranked(first, _FIRST // 2)
        most = where(seen == _FIRST, median, jnp.inf)
        info = jnp.finfo(jnp.float32)
        moved = jnp.clip(jnp.minimum(moved, most), info.tiny, info.max / _FACTOR)
        return _FACTOR * level, AutoState(moved, seen, above, first)

    def init(norms: jax.Array) -> AutoState:
        return AutoState(
            level=memory(norms),
            seen=memory(norms, jnp.int32),
            above=memory(norms, jnp.int32),
            first=memory(norms, size=_FIRST),
        )

    return per_norm(init, update)
