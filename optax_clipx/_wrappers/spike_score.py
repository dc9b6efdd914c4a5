"""The spike score: how many of the last norms stood far above those before them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

STEPS = 1000  # how many steps are remembered
DEVIATIONS = 7.0  # how many standard deviations above the mean a spike is
AT_LEAST = 50  # how many norms are needed to judge the next one


class Window(NamedTuple):
    """The last finite norms, and which of them were spikes, each in a ring.

    ``place`` counts the norms up to two rings and then stays in the second one.
    """

    norms: Float[Array, "..."]
    spikes: Bool[Array, "..."]
    place: Int[Array, "..."]


def no_norms() -> Window:
    """Before the first step."""
    return Window(
        jnp.zeros(STEPS, jnp.float32), jnp.zeros(STEPS, jnp.bool_), jnp.int32(0)
    )


@jax.jit
def after_norm(norm: jax.Array, window: Window) -> tuple[jax.Array, Window]:
    """The spike score and the window after one more norm.

    A norm that is not finite is no number to compare: it is left out.
    """
    norms, spikes, place = window
    finite = jnp.isfinite(norm)
    index = jnp.arange(STEPS)
    known = index < place
    number = jnp.minimum(place, STEPS)
    # In the unit of the largest norm, so that no square leaves the range.
    unit = jnp.maximum(jnp.max(jnp.where(known, norms, 0)), jnp.finfo(norms.dtype).tiny)
    size = jnp.maximum(number, 1).astype(norms.dtype)
    relative = jnp.where(known, norms / unit, 0)
    mean = jnp.sum(relative) / size
    spread = jnp.sqrt(jnp.sum(jnp.where(known, (relative - mean) ** 2, 0)) / size)
    spread = jnp.maximum(spread, 1e-6 * mean)  # of equal norms there is rounding alone
    above = norm / unit > mean + DEVIATIONS * spread
    here = (index == place % STEPS) & finite
    norms = jnp.where(here, norm, norms)
    spikes = jnp.where(here, above & (number >= AT_LEAST), spikes)
    following = jnp.where(place == 2 * STEPS - 1, STEPS, place + 1)
    place = jnp.where(finite, following, place)
    count = jnp.sum(spikes.astype(norms.dtype))
    score = count / jnp.maximum(jnp.minimum(place, STEPS), 1).astype(norms.dtype)
    return score, Window(norms, spikes, place)
