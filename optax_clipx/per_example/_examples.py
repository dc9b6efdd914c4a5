"""Gradients of many examples along axis 0: norms of each, and sums of scaled ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._clipping import scaling
from .._clipping.scaling import Response
from .._devices import mesh
from .._devices.mesh import Axes, Placement
from .._reductions.groups import Packed, ScalarGroups
from .._reductions.norms import Norms, Ord, as_they_are, local_norms
from .._trees.arithmetic import accumulator, times, widened


@dataclass(frozen=True)
class ExampleGroups(ScalarGroups):
    """The groups of one example, for many examples along axis 0.

    Packed values have the shape `(examples,)` for the tree, else `(examples, groups)`.
    A norm is a sum over the devices that share an example, and not over those that
    have other examples: the placements are those of the parameters.
    """

    ndims: tuple[int, ...] = ()  # of each leaf, with the axis of examples
    is_one = False

    def spans(self, leaf: int) -> tuple[int, ...] | None:
        """The axes of one example."""
        return tuple(range(1, self.ndims[leaf]))

    def combine(
        self,
        found: Sequence[jax.Array],
        arrays: Sequence[Any],
        places: Sequence[Placement],
        largest: bool,
    ) -> list[tuple[jax.Array, Axes]]:
        """For each example one value for each group."""
        rows = [x.reshape(x.shape[0]) for x in found]
        return super().combine(rows, arrays, places, largest)

    def mesh_axes(self, arrays: Sequence[Any], places: Sequence[Placement]) -> Axes:
        """The mesh axes over which the parts of one example lie."""
        return tuple(sorted({name for place in places for name in place.axes}))

    def sizes(self, arrays: Sequence[Any], places: Sequence[Placement]) -> Packed:
        """The number of entries of each group of one example, on the whole mesh."""
        one = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in arrays]
        sizes = super().sizes(one, places)
        return sizes if self.count is None else sizes[None]

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
    (norms,) = local_norms(
        (tuple(arrays),), (), groups, ord, tuple(places), as_they_are
    )
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


def in_rows(arrays: list[Any]) -> list[Any]:
    """The arrays, computed once; on CPU an example lies in memory as a row."""
    # XLA would give one consumer of a bfloat16 array digits that another does not see,
    # and on CPU compute an array in two layouts and copy it twice (2.5 times as long).
    if any(map(mesh.is_cut, arrays)):
        return lax.optimization_barrier(arrays)

    def flattened(arrays: list[Any]) -> list[jax.Array]:
        rows = [x.reshape(x.shape[0], x[:1].size) for x in arrays]
        rows = lax.optimization_barrier(rows)
        return [row.reshape(x.shape) for row, x in zip(rows, arrays, strict=True)]

    return lax.platform_dependent(
        arrays, cpu=flattened, default=lax.optimization_barrier
    )


def weighted_sum(
    arrays: list[jax.Array], groups: ExampleGroups, found: Measured, mask: Any
) -> list[jax.Array]:
    """The scaled gradients added up in the accumulator's dtype."""
    dtype = accumulator(arrays)
    finite = all_finite(found.norms)
    keep = finite if mask is None else finite & mask
    parts = (
        [x.astype(widened(x, dtype)) for x in arrays],
        [along(keep, x.ndim) for x in arrays],
        groups.spread(found.coarse),
        groups.spread(found.fine),
    )

    def sums(*parts: Any) -> list[jax.Array]:
        each = zip(*parts, strict=True)
        return [
            jnp.sum(jnp.where(k, times(times(x, c), f), 0), axis=0)
            for x, k, c, f in each
        ]

    # On CPU a sum along the first axis takes up to 80 times as long as a product of a
    # vector and a matrix, but there 0 times NaN is NaN.
    def products(arrays: Any, keeps: Any, coarse: Any, fine: Any) -> list[jax.Array]:
        weights = [jnp.where(k, f, 0) for k, f in zip(keeps, fine, strict=True)]
        usual = jnp.all(finite) & jnp.all(found.coarse == 1)
        arrays = _cleaned(arrays, usual, keeps, coarse)
        return list(map(_product, weights, arrays))

    if any(mesh.is_cut(x) or jnp.iscomplexobj(x) for x in arrays):
        return sums(*parts)
    return lax.platform_dependent(*parts, cpu=products, default=sums)


@jax.custom_jvp
def _cleaned(arrays: Any, usual: jax.Array, keeps: Any, coarse: Any) -> Any:
    """The arrays, and if they are not usual, scaled coarsely and rid of the rest."""

    # A loop of no or one turn changes what it carries where it lies. A cond keeps room
    # for a second copy: 154 MB beside gradients of 77 MB.
    def turn(state: Any) -> Any:
        return state[0] | True, _clean(state[1], keeps, coarse)

    return lax.while_loop(lambda state: ~state[0], turn, (usual, arrays))[1]


@_cleaned.defjvp
def _cleaned_jvp(primals: Any, tangents: Any) -> Any:
    # Loops cannot be differentiated backward. The factors are constants.
    _, _, keeps, coarse = primals
    return _cleaned(*primals), _clean(tangents[0], keeps, coarse)


def _clean(arrays: Any, keeps: Any, coarse: Any) -> list[jax.Array]:
    each = zip(arrays, keeps, coarse, strict=True)
    return [jnp.where(k, times(x, c), 0) for x, k, c in each]


def _product(weights: jax.Array, array: jax.Array) -> jax.Array:
    return jnp.tensordot(weights.reshape(-1), array, 1, precision="highest")
