"""From norms and limits to scales, and from scales to clipped leaves.

A scale `s = response(norm, limit)` is about `limit / norm`, and may be too small for a
float: of a norm of 1e38 and a limit of 1e-6 it is 1e-44. Below 2^-100 its root is kept
in its place, with a minus sign, and a leaf is multiplied by it twice. So far above its
limit a response falls as `limit / norm`: `response(norm * low, limit * high)` is
`s * high / low`, and that is in range.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._devices.programs import TracedOnce
from .._reductions.groups import Groups, Packed
from .._reductions.norms import Norms
from .._trees.arithmetic import (
    Number,
    both,
    either,
    equal,
    fraction,
    full_like,
    larger,
    less,
    more,
    product,
    safe_sqrt,
    smaller,
    spread_over,
    times,
    where,
    widened,
)

Response = Callable[[jax.Array, jax.Array], jax.Array]


class _Extremes(NamedTuple):
    """When a scale is extreme, and the factors in which it is in range."""

    extreme: float  # scales below are
    low: float  # the factor of the norm
    high: float  # the factor of the limit
    far: float  # scales below far / raised are too small with these, too
    raised: float
    higher: float  # and take this factor of the limit


_EXTREMES = {
    jnp.dtype("float32"): _Extremes(
        2.0**-100, 2.0**-30, 2.0**22, 2.0**-126, 2.0**52, 2.0**96
    ),
    jnp.dtype("float64"): _Extremes(
        2.0**-900, 2.0**-200, 2.0**300, 2.0**-1022, 2.0**500, 2.0**822
    ),
}


def scales(norms: Norms, limits: Packed, response: Response) -> Packed:
    """What each group is multiplied by, whatever the magnitudes: packed, as above."""

    def one(
        value: jax.Array, root: jax.Array, unit: Number, limit: Number
    ) -> jax.Array:
        return _scale(value, root, unit, limit, response)

    return jax.tree.map(one, *norms, limits)


def _scale(
    value: jax.Array,
    root: jax.Array,
    unit: Number,
    limit: Number,
    response: Response,
) -> jax.Array:
    most, extremes = float(jnp.finfo(value.dtype).max), _EXTREMES[value.dtype]
    # The norm in a unit in which none is too large.
    reduced = product(root, product(unit, extremes.low))
    below = product(reduced, extremes.extreme / extremes.low)
    extreme = both(less(limit, below), more(limit, 0))
    far = less(
        product(limit, extremes.raised), product(reduced, extremes.far / extremes.low)
    )
    large = more(unit, 1)  # the norm itself may be beyond the largest number
    # What takes the place of norm and limit.
    elsewhere, nothing = either(extreme, large), equal(value, 0)
    one, high = full_like(value, 1), value.dtype.type(extremes.high)
    norm = where(elsewhere, reduced, where(more(value, 0), value, one))
    high = where(far, extremes.higher, high)
    factor = where(extreme, high, where(large, extremes.low, one))
    scale = smaller(response(norm, product(limit, factor)), most)
    back = fraction(-(extremes.low**0.5), lax.sqrt(high))
    scale = where(extreme, product(safe_sqrt(scale), back), scale)
    # An infinite limit, like a zero norm, changes nothing.
    return jnp.asarray(where(either(equal(limit, np.inf), nothing), one, scale))


def second_factor(scale: jax.Array) -> jax.Array:
    """By what is multiplied after the scale itself: by an extreme one once more."""
    return where(less(scale, 0), scale, 1)


class Outcome(NamedTuple):
    """What is done to each group; all packed."""

    scales: Packed
    numbers: Packed  # the scales as single numbers: an extreme one may be 0
    norms: Packed  # of what has been multiplied by the scales


def outcome(norms: Norms, limits: Packed, response: Response) -> Outcome:
    """The scales, and what comes of them."""
    found = scales(norms, limits, response)
    seconds = jax.tree.map(second_factor, found)
    clipped = jax.tree.map(_clipped_norm, *norms, found, seconds)
    return Outcome(found, jax.tree.map(product, found, seconds), clipped)


def _clipped_norm(
    value: jax.Array,
    root: jax.Array,
    unit: Number,
    s: jax.Array,
    second: jax.Array,
) -> jax.Array:
    most = float(jnp.finfo(value.dtype).max)
    # In this order no product leaves the range.
    first = where(less(value, most), product(value, s), product(product(root, s), unit))
    # What is saturated stays finite, and an infinite norm stays infinite.
    return smaller(product(first, second), larger(value, most))


def scaled(
    arrays: Sequence[jax.Array],
    groups: Groups,
    scales: Packed,
    zero: jax.Array | None = None,
) -> list[jax.Array]:
    """Leaves times the scales of their groups; zeros where the flag is set."""
    each = zip(arrays, groups.spread(scales), strict=True)
    return times_scale.each([(x, scale, zero) for x, scale in each])


def _times_scale_once(
    array: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
) -> jax.Array:
    if zero is not None:
        array = jnp.where(zero, jnp.zeros_like(array), array)
    wide = lax.convert_element_type(array, widened(array, scale.dtype))
    once = times(wide, scale)
    # An extreme scale is the root, with a minus sign.
    extreme = spread_over(once, less(scale, 0))
    scaled = lax.select(extreme, times(once, scale), once)
    scaled = lax.convert_element_type(scaled, array.dtype)
    # Multiplying by 1 would flush subnormals: what is not clipped is not touched.
    return lax.select(spread_over(scaled, equal(scale, 1)), array, scaled)


times_scale = TracedOnce(_times_scale_once)
