"""The thresholds of `skip_spikes`: robust from the first norms on, in a few numbers."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._trees.arithmetic import (
    Number,
    at_least,
    both,
    equal,
    fraction,
    hypotenuse,
    larger,
    less,
    minus,
    more,
    negated,
    plus,
    product,
    smaller,
    where,
)
from .._trees.types import Scalar
from .base import (
    Context,
    Threshold,
    chosen,
    int32,
    memory,
    one_more,
    per_norm,
    put_in_order,
    to_float32,
)

_FIRST = 8  # values before there is a threshold
_LEVEL_MEMORY = 16  # values over which the level is a mean
_SPREAD_MEMORY = 64
_FIRST_SPREAD = 0.4  # at least, while there are few values
_LEAST_SPREAD_OF_LOGARITHMS = 0.1
_LEAST_SPREAD = 0.01  # relative to the level
_QUARTILES = 0.945  # deviations between the third and the sixth of eight normal values


class SpikeState(NamedTuple):
    """What is usual so far; for each norm the same.

    `ordered` holds the first values in ascending order, `level` and `spread` the mean
    and the deviation of all from then on, and `far` how many in a row were far above,
    or, negative, below.
    """

    seen: jax.Array
    ordered: jax.Array
    level: jax.Array
    spread: jax.Array
    far: jax.Array


def spikes_of_norms(patience: Scalar | None) -> Threshold:
    """Five deviations above the mean of the logarithms.

    More than 15 times the level only where three deviations are more. On noise of 10%
    to 150% this is above fewer norms than the mean and six deviations of the norms.
    """

    def above(spread: jax.Array) -> jax.Array:
        return smaller(product(5, spread), larger(math.log(15), product(3, spread)))

    rule = _Spikes(above, patience, of_logarithms=True)

    def update(norm: jax.Array, state: SpikeState, context: Context) -> Any:
        tiny, there = float(jnp.finfo(jnp.float32).tiny), more(norm, 0)
        limit, state = rule.update(lax.log(larger(norm, tiny)), state, there)
        return where(there, lax.exp(limit), np.inf), state

    return per_norm(rule.init, update, takes_zero=True)


def spikes_of_losses(patience: Scalar | None) -> Threshold:
    """Seven deviations above the mean, of values that may be zero or negative."""
    rule = _Spikes(lambda spread: product(7, spread), patience, of_logarithms=False)

    def update(loss: jax.Array, state: SpikeState, context: Context) -> Any:
        return rule.update(loss, jax.tree.map(to_float32, state))

    return Threshold(rule.init, update, False, False)


class _Spikes(NamedTuple):
    above: Any  # by how much a threshold is above the level, from the spread
    patience: Any
    of_logarithms: bool

    def init(self, norms: jax.Array) -> SpikeState:
        return SpikeState(
            seen=memory(norms, jnp.int32),
            ordered=memory(norms, size=_FIRST),
            level=memory(norms),
            spread=memory(norms),
            far=memory(norms, jnp.int32),
        )

    def update(
        self, value: jax.Array, state: SpikeState, there: Number = np.True_
    ) -> tuple[jax.Array, Any]:
        """The threshold; values far above or below the level do not enter it.

        Without a value, all remains as it is.
        """
        active = at_least(state.seen, _FIRST)
        above = self.above(state.spread)
        limit = plus(state.level, above)
        higher = both(active, more(value, limit))
        lower = both(active, less(value, minus(state.level, above)))
        one_higher = plus(larger(state.far, 0), 1)
        one_lower = plus(smaller(state.far, 0), -1)
        far = where(higher, one_higher, where(lower, one_lower, 0))
        # After so many in a row this is the new level, whose spread stays.
        accepted = at_least(lax.abs(far), int32(self.patience))
        far = where(accepted, 0, far)
        level = where(accepted, value, state.level)
        entered = self.entered(value, state._replace(level=level))
        new = chosen(both(there, equal(far, 0)), entered, state)
        new = new._replace(far=where(there, far, state.far))
        return where(both(active, negated(accepted)), limit, np.inf), new

    def entered(self, value: jax.Array, state: SpikeState) -> SpikeState:
        """The state after one more usual value."""
        ordered = put_in_order(state.ordered, state.seen, value)
        seen = one_more(state.seen)
        started = more(seen, _FIRST)
        first_level, first_spread = self.start(ordered)
        level, spread = self.moved(value, state, seen)
        return SpikeState(
            seen=seen,
            ordered=ordered,
            level=where(started, level, first_level),
            spread=where(started, spread, first_spread),
            far=state.far,
        )

    def start(self, ordered: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The median of the first values, and twice what their quartiles tell.

        Two of the eight may be anything.
        """
        # Halves: the sum or the difference of two could overflow.
        axis = ordered.ndim - 1
        ranks = lax.split(product(ordered, 0.5), (2, 1, 1, 1, 1, 2), axis)[1:5]
        lower, middle, above, upper = (lax.squeeze(x, (axis,)) for x in ranks)
        level = plus(middle, above)
        spread = product(minus(upper, lower), 4 / _QUARTILES)
        return level, larger(spread, self.floor(_FIRST_SPREAD, level))

    def moved(
        self, value: jax.Array, state: SpikeState, seen: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Moving averages; plain ones until there are more values than they hold."""
        count = lax.convert_element_type(seen, jnp.float32)
        of_level = fraction(1, smaller(count, _LEVEL_MEMORY))
        of_spread = fraction(1, smaller(count, _SPREAD_MEMORY))
        off = minus(value, state.level)
        level = plus(state.level, product(of_level, off))
        rest = minus(1, of_spread)
        if self.of_logarithms:
            squares = plus(
                product(state.spread, state.spread),
                product(of_spread, product(off, off)),
            )
            least = _LEAST_SPREAD_OF_LOGARITHMS**2
            return level, lax.sqrt(larger(product(rest, squares), least))
        # Of squares the sum could overflow.
        spread = hypotenuse(
            product(lax.sqrt(rest), state.spread),
            product(lax.sqrt(product(of_spread, rest)), lax.abs(off)),
        )
        return level, larger(spread, self.floor(_LEAST_SPREAD, level))

    def floor(self, least: float, level: jax.Array) -> Number:
        """The least spread; a logarithm's is relative as it is."""
        return (
            np.float32(least) if self.of_logarithms else product(least, lax.abs(level))
        )
