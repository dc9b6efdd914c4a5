"""A threshold that is found from the first norms, with no number to choose."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._trees.arithmetic import (
    at_least,
    equal,
    fraction,
    larger,
    more,
    plus,
    product,
    smaller,
    total,
    where,
)
from .base import (
    Context,
    Threshold,
    for_each,
    memory,
    numbered,
    one_more,
    per_norm,
    put_in_order,
)

_FIRST = 10  # norms; the threshold is in units of their median
_FRACTION = 0.8  # of their median, or of the usual norm times _ABOVE, is the threshold
_ABOVE = 10.0
_START = 0.3  # of the threshold, before the first norm
_STEPS = 100  # until it is all there
_PACE = 0.02  # of the logarithm of the usual norm, after the first steps
_FAR = 30.0  # times the median: so many norms in a row above it are a new level
_IN_A_ROW = 50


class AutoState(NamedTuple):
    """The first norms in ascending order, the usual norm, and two counts.

    `seen` counts the norms since the start, or since the level changed for good; `far`
    those in a row that were far above the median of the first ones.
    """

    ordered: jax.Array
    usual: jax.Array
    seen: jax.Array
    far: jax.Array


def auto() -> Threshold:
    r"""A fraction of the first norms, for :func:`optax_clipx.auto_clip`.

    .. math:: t_k = 0.8 \min(r_k a_k, 10\, m_k), \qquad
              r_k = 0.3 + 0.7 \min(1, k / 100)

    Here :math:`a_k` is the median of the first ten norms (of those so far, up to the
    tenth), and never follows the norms after them. The slow start :math:`r_k` rises
    from 0.3 to 1 in 100 steps. The usual norm :math:`m_k` is a running median of all
    norms before this one:

    .. math:: \log m_{k+1} = \log m_k + \max\!\left(0.02, \tfrac{1}{k + 1}\right)
              \begin{cases} 0.5 & n_k > m_k \\ -0.5 & n_k \le m_k \end{cases}
              \qquad m_1 = n_1

    Norms that fall bring the threshold down once they are below a tenth of the first
    ones. Norms that rise do not raise it, so an explosion does not carry the threshold
    along. There is one exception, so that tiny first gradients do not decide for ever:
    after 50 norms in a row above :math:`30\, a_k` the rule starts again, as if the next
    norm were the first. If all norms are multiplied by a constant, so are the
    thresholds. Norms of zero and non-finite steps change nothing.

    Returns:
        A threshold rule; its state is 13 numbers for each norm.

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
        0.246
        0.251
        0.257
        0.262
        0.268

    References:
        This package's own. The first norms as the unit of a threshold, and what else
        was tried, are in ``benchmarks/autodesign``. A quantile tracked by comparisons
        alone: Andrew et al., Differentially private learning with adaptive clipping,
        2021, arXiv 1905.03871.
    """

    def update(norm: jax.Array, state: AutoState, context: Context) -> Any:
        anew = at_least(state.far, _IN_A_ROW)
        before = where(anew, 0, state.seen)
        seen = one_more(smaller(before, 2**20))
        first = put_in_order(state.ordered, before, norm)
        median = _lower_median(first, seen)
        usual = where(more(before, 0), state.usual, norm)
        is_far = more(norm, product(_FAR, median))
        far = where(is_far, one_more(where(anew, 0, state.far)), 0)
        count = lax.convert_element_type(seen, jnp.float32)
        share = smaller(product(count, 1 / _STEPS), 1)
        grown = plus(_START, product(1 - _START, share))
        least = smaller(product(grown, median), product(_ABOVE, usual))
        pace = fraction(0.5, smaller(plus(count, 1), 1 / _PACE))
        usual = product(usual, lax.exp(where(more(norm, usual), pace, lax.neg(pace))))
        info = jnp.finfo(jnp.float32)
        usual = larger(smaller(usual, float(info.max) / _ABOVE), float(info.tiny))
        return product(_FRACTION, least), AutoState(first, usual, seen, far)

    def init(norms: jax.Array) -> AutoState:
        return AutoState(
            ordered=memory(norms, size=_FIRST),
            usual=memory(norms),
            seen=memory(norms, jnp.int32),
            far=memory(norms, jnp.int32),
        )

    return per_norm(init, update)


def _lower_median(first: jax.Array, seen: jax.Array) -> jax.Array:
    """Of the norms that are there; of an even number, the lower one of the middle."""
    place = lax.div(plus(smaller(seen, _FIRST), -1), np.int32(2))
    here = equal(numbered(_FIRST, seen), for_each(place, first))
    return lax.squeeze(total(where(here, first, 0), (seen.ndim,)), (seen.ndim,))
