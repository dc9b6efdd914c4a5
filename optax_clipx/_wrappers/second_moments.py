"""The second moment that an optimizer keeps, and gradients in its unit: RMS_t."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from .._trees.arithmetic import times, widened
from .._trees.leaves import Leaves, Path, flatten
from .._trees.types import Arrays

EPS = 1e-8  # below its square a second moment counts as this much


class Moment(NamedTuple):
    """The second moment of a leaf, and how many steps are in it, if that is known."""

    nu: Any
    count: Any


def second_moments(state: PyTree, leaves: Leaves) -> list[Moment | None]:
    """For each leaf the second moment that an optimizer's state keeps of it."""
    nodes = jax.tree.leaves(state, is_leaf=_has_moment)
    found: dict[Path, Moment] = {}
    for node in filter(_has_moment, nodes):
        moments = flatten(node.nu, updates=False)
        # A tuple without such a field has a method of that name.
        count = node.count if "count" in node._fields else None
        for path, nu in zip(moments.paths, moments.arrays, strict=True):
            found.setdefault(path, Moment(nu, count))
    each = zip(leaves.paths, leaves.arrays, strict=True)
    return [
        found[path] if path in found and found[path].nu.shape == leaf.shape else None
        for path, leaf in each
    ]


def _has_moment(node: PyTree) -> bool:
    """Whether this is the state of optax's Adam, RMSProp or another of their kind."""
    return isinstance(node, tuple) and "nu" in getattr(node, "_fields", ())


def bias(moment: Moment | None, decay: float) -> Any:
    """How much of a second moment is there; -1 where there is none."""
    if moment is None:
        return -jnp.ones((), jnp.float32)
    if moment.count is None:
        return jnp.ones((), jnp.float32)
    count = jnp.asarray(moment.count, jnp.float32)
    share = -jnp.expm1(count * jnp.log(jnp.float32(decay)))
    return jnp.where(count > 0, share, 1)


def in_its_unit(grads: Arrays, moments: Arrays, biases: PyTree) -> list[Any]:
    """Gradients over the root of their second moment; zeros where there is none."""

    def one(g: jax.Array, v: jax.Array, share: jax.Array) -> Any:
        g = g.astype(widened(g, share.dtype))
        floor = jnp.maximum(v.real.astype(share.dtype), share * EPS**2)
        unit = times(g, lax.rsqrt(jnp.where(share > 0, floor / share, 1)))
        return jnp.where(share > 0, unit, jnp.zeros_like(g))

    return [one(*x) for x in zip(grads, moments, biases, strict=True)]
