"""The thresholds of `skip_spikes`: robust from the first norms on, in a few numbers."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._trees.arithmetic import hypotenuse, where
from .._trees.types import Scalar
from .base import (
    Context,
    Threshold,
    int32,
    memory,
    one_more,
    per_norm,
    put,
    ranked,
)

_FIRST = 8  # values before there is a threshold
_LEVEL_MEMORY = 16  # values over which the level is a mean
_SPREAD_MEMORY = 64
_FIRST_SPREAD = 0.4  # at least, while there are few values
_LEAST_SPREAD = {True: 0.1, False: 0.01}  # of logarithms; relative to the level
_QUARTILES = 0.945  # deviations between the third and the sixth of eight normal values


class SpikeState(NamedTuple):
    """What is usual so far; for each norm the same.

    `first` holds the first values, `level` and `spread` their mean and deviation from
    then on, and `far` how many in a row were far above, or, negative, below.
    """

    seen: jax.Array
    first: jax.Array
    level: jax.Array
    spread: jax.Array
    far: jax.Array


def spikes_of_norms(patience: Scalar | None) -> Threshold:
    """Five deviations above the mean of the logarithms.

    More than 15 times the level only where three deviations are more. On noise of 10%
    to 150% this is above fewer norms than the mean and six deviations of the norms.
    """

    def above(spread: jax.Array) -> jax.Array:
        return jnp.minimum(5 * spread, jnp.maximum(math.log(15), 3 * spread))

    rule = _Spikes(above, patience, of_logarithms=True)

    def update(norm: jax.Array, state: SpikeState, context: Context) -> Any:
        tiny = jnp.finfo(jnp.float32).tiny
        limit, state = rule.update(jnp.log(jnp.maximum(norm, tiny)), state)
        return jnp.exp(limit), state

    return per_norm(rule.init, update)


def spikes_of_losses(patience: Scalar | None) -> Threshold:
    """Seven deviations above the mean, of values that may be zero or negative."""
    rule = _Spikes(lambda spread: 7 * spread, patience, of_logarithms=False)
    return Threshold(
        rule.init, lambda loss, state, context: rule.update(loss, state), False, False
    )


class _Spikes(NamedTuple):
    above: Any  # by how much a threshold is above the level, from the spread
    patience: Any
    of_logarithms: bool

    def init(self, norms: jax.Array) -> SpikeState:
        return SpikeState(
            seen=memory(norms, jnp.int32),
            first=memory(norms, size=_FIRST),
            level=memory(norms),
            spread=memory(norms),
            far=memory(norms, jnp.int32),
        )

    def update(self, value: jax.Array, state: SpikeState) -> tuple[jax.Array, Any]:
        """The threshold; values far above or below the level do not enter it."""
        active = state.seen >= _FIRST
        above = self.above(state.spread)
        limit = state.level + above
        higher, lower = active & (value > limit), active & (value < state.level - above)
        side = higher.astype(jnp.int32) - lower.astype(jnp.int32)
        far = where(side * state.far >= 0, state.far + side, side)
        far = where(side == 0, 0, far)
        # After so many in a row this is the new level, whose spread stays.
        accepted = jnp.abs(far) >= int32(self.patience)
        level = where(accepted, value, state.level)
        entered = self.entered(value, state._replace(level=level))
        stays = (side != 0) & ~accepted
        new = SpikeState(
            seen=where(stays, state.seen, entered.seen),
            first=entered.first,
            level=where(stays, state.level, entered.level),
            spread=where(stays, state.spread, entered.spread),
            far=where(accepted, 0, far),
        )
        return where(active & ~accepted, limit, jnp.inf), new

    def entered(self, value: jax.Array, state: SpikeState) -> SpikeState:
        """The state after one more usual value."""
        first = put(state.first, state.seen, value)
        seen = one_more(state.seen)
        started = seen > _FIRST
        level, spread = self.moved(value, state, seen)
        first_level, first_spread = self.start(first)
        return SpikeState(
            seen=seen,
            first=first,
            level=where(started, level, first_level),
            spread=where(started, spread, first_spread),
            far=state.far,
        )

    def start(self, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The median of the first values, and twice what their quartiles tell.

        Two of the eight may be anything.
        """
        lower, middle, above, upper = ranked(first, 2, 3, 4, 5)
        level = middle / 2 + above / 2
        spread = 2 * (upper / _QUARTILES - lower / _QUARTILES)
        return level, jnp.maximum(spread, self.floor(_FIRST_SPREAD, level))

    def moved(
        self, value: jax.Array, state: SpikeState, seen: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Moving averages; plain ones until there are more values than they hold."""
        of_level, of_spread = (
            1 / jnp.minimum(seen, length).astype(jnp.float32)
            for length in (_LEVEL_MEMORY, _SPREAD_MEMORY)
        )
        off = value - state.level
        level = state.level + of_level * off
        # The deviation is kept, and not its square, which could overflow.
        spread = hypotenuse(
            jnp.sqrt(1 - of_spread) * state.spread,
            jnp.sqrt(of_spread * (1 - of_spread)) * jnp.abs(off),
        )
        least = _LEAST_SPREAD[self.of_logarithms]
        return level, jnp.maximum(spread, self.floor(least, level))

    def floor(self, least: float, level: jax.Array) -> jax.Array:
        """The least spread; a logarithm's is relative as it is."""
        return jnp.asarray(least) if self.of_logarithms else least * jnp.abs(level)
