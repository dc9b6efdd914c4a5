"""Bounds of single entries: arrays that broadcast against a leaf."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._devices import mesh
from .._thresholds.constant import at
from .._trees.arguments import Limit, check_limit, is_limit
from .._trees.arithmetic import accumulator
from .._trees.leaves import Leaves, Path, from_prefix, show
from .._trees.types import Scalar


def has_entries(*bounds: Limit) -> bool:
    """Whether any bound is an array with axes, alone or within a pytree prefix."""
    return any(getattr(x, "ndim", 0) for x in jax.tree.leaves(bounds))


def has_schedule(*bounds: Limit) -> bool:
    """Whether any bound depends on the step."""
    return any(map(callable, jax.tree.leaves(bounds)))


def check_bounds(bounds: Limit, name: str, *, signed: bool = False) -> None:
    """Refuses at construction what cannot be a bound, entry by entry."""
    for keys, value in jax.tree_util.tree_leaves_with_path(bounds):
        smallest = value
        if getattr(value, "ndim", 0) and not jnp.iscomplexobj(value):
            # The smallest stands for all; with a NaN among them it is NaN.
            smallest = 0.0 if _is_traced(value) else np.min(value, initial=np.inf)
        check_limit(smallest, name + jax.tree_util.keystr(keys), signed=signed)


def check_order(low: Limit, high: Limit) -> None:
    """Refuses a pair of bounds of which one entry leaves no interval."""
    pair = (low, high)
    if not all(is_limit(x) and not callable(x) and not _is_traced(x) for x in pair):
        return
    if np.any(np.asarray(low) > np.asarray(high)):
        raise ValueError(
            f"Expected min_value <= max_value, got min_value={low} and"
            f" max_value={high}."
        )


def of_leaves(
    bounds: Limit, name: str, leaves: Leaves, step: Scalar
) -> list[jax.Array]:
    """For each leaf an array of bounds, of its shape and cut over the mesh as it is."""
    paths = leaves.paths
    whole = is_limit(bounds)
    given = [bounds] * len(paths) if whole else from_prefix(bounds, paths, name)
    dtype = accumulator(leaves.arrays)
    return [
        _of_leaf(jnp.asarray(at(value, step)).astype(dtype), leaf, path, name)
        for value, leaf, path in zip(given, leaves.arrays, paths, strict=True)
    ]


def _of_leaf(bound: jax.Array, leaf: PyTree, path: Path, name: str) -> jax.Array:
    if not _broadcasts(bound.shape, leaf.shape):
        manual = jax.sharding.get_abstract_mesh().manual_axes
        hint = " In shard_map pass the part of this device, by in_specs." * bool(manual)
        raise ValueError(
            f"Expected {name} to be a number, or an array that broadcasts against the"
            f" shape {leaf.shape} of {show(path)}, got an array of shape {bound.shape}."
            f"{hint}"
        )
    whole = jnp.broadcast_to(bound, leaf.shape)
    if mesh.is_cut(leaf):
        return jax.sharding.reshard(whole, jax.typeof(leaf).sharding)
    return whole


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    pairs = zip(shape[::-1], target[::-1], strict=False)
    return len(shape) <= len(target) and all(n in (1, m) for n, m in pairs)


def _is_traced(value: PyTree) -> bool:
    return isinstance(value, jax.core.Tracer)
