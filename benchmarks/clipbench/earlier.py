"""Other designs of `auto_clip`, to compare with: the first one, and a candidate."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_clipx as clipx
from optax_clipx._thresholds.base import memory, per_norm, put
from optax_clipx.thresholds import Context, Threshold

_SHARE = 0.05  # of the norms are below the level
_FACTOR = 2.0  # the threshold divided by the level
_PACE = 0.02  # of the level's logarithm, after the first steps
_DOUBLING = 50  # norms in a row above the level double its pace upward
_MOST_DOUBLINGS = 8
_FIRST = 5  # norms; their median is the most that the level is after them
_POWER = 0.4
_MOST_UNITS = 30.0


class LevelState(NamedTuple):
    """The level, 0 before the first norm, and what moves it."""

    level: jax.Array
    seen: jax.Array
    above: jax.Array
    first: jax.Array


def twice_a_low_quantile() -> Threshold:
    """Twice the 5th percentile of the norms, tracked by comparisons."""

    def update(norm: jax.Array, state: LevelState, context: Context) -> Any:
        level = jnp.where(state.level > 0, state.level, norm)
        higher = norm > level
        above = jnp.where(higher, jnp.minimum(state.above, 2**20) + 1, 0)
        doublings = jnp.minimum(above.astype(jnp.float32) / _DOUBLING, _MOST_DOUBLINGS)
        seen = jnp.minimum(state.seen, 2**20) + 1
        pace = jnp.maximum(_PACE, 1 / (seen.astype(jnp.float32) + 1))
        up = jnp.minimum(pace * _SHARE * jnp.exp2(doublings), 1)
        moved = level * jnp.exp(jnp.where(higher, up, -pace * (1 - _SHARE)))
        first = put(state.first, state.seen, norm)
        median = jnp.sort(first, axis=-1)[..., _FIRST // 2]
        most = jnp.where(seen == _FIRST, median, jnp.inf)
        info = jnp.finfo(jnp.float32)
        moved = jnp.clip(jnp.minimum(moved, most), info.tiny, info.max / _FACTOR)
        return _FACTOR * level, LevelState(moved, seen, above, first)

    def init(norms: jax.Array) -> LevelState:
        return LevelState(
            level=memory(norms),
            seen=memory(norms, jnp.int32),
            above=memory(norms, jnp.int32),
            first=memory(norms, size=_FIRST),
        )

    return per_norm(init, update)


def first_auto_clip(number: Any = None) -> optax.GradientTransformationExtraArgs:
    """Clips norms at this threshold."""
    return clipx.clip_by(
        clipx.measures.tree_norm(), twice_a_low_quantile(), nonfinite="zero"
    )


def power_auto_clip(number: Any = None) -> optax.GradientTransformationExtraArgs:
    """The fourth round's design: `auto_clip` with a power in place of its logarithm."""
    return clipx.clip_by(
        clipx.measures.tree_norm(),
        clipx.thresholds.auto(),
        to_the_power,
        nonfinite="zero",
    )


def to_the_power(norms: Any, limits: Any) -> Any:
    """Above a unit, an eighth of the limit, a norm grows as its power, to 30 units."""
    units = jnp.maximum(8 * norms / limits, 1)
    return jnp.minimum(units**_POWER, _MOST_UNITS) / units
