"""Gradients of many examples along axis 0: norms of each, and sums of scaled ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._clipping import scaling
from .._clipping.scaling import Response
from .._devices.examples import weighted_sums
from .._devices.mesh import Axes, Placement
from .._reductions.groups import Packed, ScalarGroups
from .._reductions.norms import Norms, local_norms
from .._reductions.plan import Ord, Plan
from .._trees.arithmetic import accumulator, widened
from .._trees.types import AnyArray, Arrays, Dtype, Shaped


@dataclass(frozen=True)
class ExampleGroups(ScalarGroups):
    """The groups of one example, for many examples along axis 0.

    Packed values have the shape `(examples,)` for the tree, else `(examples, groups)`.
    A norm is a sum over the devices that share an example, and not over those that
    have other examples: the placements are those of the parameters.
    """

    ndims: tuple[int, ...] = ()  # of each leaf, with the axis of examples

    def spans(self, leaf: int) -> tuple[int, ...] | None:
        """The axes of one example."""
        return tuple(range(1, self.ndims[leaf]))

    def combine(
        self,
        found: Sequence[jax.Array],
        arrays: Arrays,
        places: Sequence[Placement],
        largest: bool,
    ) -> list[tuple[jax.Array, Axes]]:
        """For each example one value for each group."""
        rows = [x.reshape(x.shape[0]) for x in found]
        return super().combine(rows, arrays, places, largest)

    def mesh_axes(self, arrays: Arrays, places: Sequence[Placement]) -> Axes:
        """The mesh axes over which the parts of one example lie."""
        return tuple(sorted({name for place in places for name in place.axes}))

    def sizes(self, arrays: Sequence[Shaped], places: Sequence[Placement]) -> Packed:
        """The number of entries of each group of one example, on the whole mesh."""
        one = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in arrays]
        sizes = super().sizes(one, places)
        return sizes if self.count is None else sizes[None]

    def like(self, arrays: Sequence[Shaped], dtype: Dtype) -> PyTree:
        """The shapes of what is packed, of leaves that lie whole on a device."""
        one = super().like(arrays, dtype)
        return jax.ShapeDtypeStruct((arrays[0].shape[0], *one.shape), dtype)

    def spread(self, packed: Packed) -> list[Any]:
        """For each leaf what its group has, of a shape that broadcasts against it."""
        columns = [packed] if self.count is None else list(packed.T)
        each = zip(self.ids, self.ndims, strict=True)
        return [along(columns[group], ndim) for group, ndim in each]


def along(values: jax.Array, ndim: int) -> jax.Array:
    """One value for each example, in the rank of a leaf."""
    return jnp.expand_dims(values, tuple(range(1, ndim)))


class Measured(NamedTuple):
    """The norm of each example along axis 0, and its scale in two factors; packed."""

    norms: jax.Array
    coarse: jax.Array
    fine: jax.Array


def all_finite(norms: jax.Array) -> jax.Array:
    """Whether each example is finite, as a whole."""
    finite = jnp.isfinite(norms)
    return finite if finite.ndim == 1 else jnp.all(finite, axis=1)


def measured(
    arrays: list[jax.Array],
    groups: ExampleGroups,
    limits: jax.Array,
    ord: Ord,
    response: Response,
    places: Sequence[Placement],
) -> Measured:
    """Norms and scales; `limits` is a scalar for the tree, else one for each group."""
    plan = Plan((), tuple(places), groups, ord)
    (norms,) = local_norms(plan, (tuple(arrays),))
    limits = like_norms(limits, norms.value)
    scales = scaling.scales(norms, limits, response)
    return _measured(norms.value, scales)


def scales_of(norms: jax.Array, limits: jax.Array, response: Response) -> Measured:
    """The scales of norms below the largest number, from nothing but the norms."""
    known = Norms(norms, norms, jnp.ones_like(norms))
    return _measured(norms, scaling.scales(known, like_norms(limits, norms), response))


def _measured(norms: jax.Array, scales: jax.Array) -> Measured:
    return Measured(norms, jnp.abs(scaling.second_factor(scales)), jnp.abs(scales))


def like_norms(limits: jax.Array, norms: jax.Array) -> jax.Array:
    """The thresholds of the groups for each example."""
    # Zeros made from the norms, so that thresholds lie on the mesh as they do.
    zeros = (norms != norms).astype(norms.dtype) * 0
    limits = limits.astype(norms.dtype)
    return zeros + (limits if norms.ndim == 1 else limits[None])


def weighted_sum(
    arrays: list[jax.Array],
    groups: ExampleGroups,
    found: Measured,
    mask: AnyArray | None,
) -> list[jax.Array]:
    """The scaled gradients added up in the accumulator's dtype."""
    dtype = accumulator(arrays)
    finite = all_finite(found.norms)
    keep = finite if mask is None else finite & mask
    usual = jnp.all(finite) & jnp.all(found.coarse == 1)
    return weighted_sums(
        [x.astype(widened(x, dtype)) for x in arrays],
        [along(keep, x.ndim) for x in arrays],
        groups.spread(found.coarse),
        groups.spread(found.fine),
        usual,
    )
