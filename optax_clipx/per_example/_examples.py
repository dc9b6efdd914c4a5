"""Gradients of many examples along axis 0: norms of each, and sums of scaled ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._clipping import scaling
from .._clipping.scaling import Response
from .._devices import mesh
from .._devices.mesh import Placement, size_of
from .._reductions.groups import Packed, ScalarGroups
from .._reductions.leaf_sums import Operands, Terms, reduced
from .._reductions.norms import Norms, Ord, _norms, as_they_are
from .._trees.arithmetic import accumulator, times, widened


@dataclass(frozen=True)
class ExampleGroups(ScalarGroups):
    """The groups of one example, for many examples along axis 0.

    Packed values have the shape `(examples,)` for the tree, else `(examples, groups)`.
    A norm is a sum over the devices that share an example, and not over those that
    have other examples: the placements are those of the parameters.
    """

    ndims: tuple[int, ...] = ()  # of each leaf, with the axis of examples

    def totals(
        self, leaves: Sequence[Operands], places: Sequence[Placement], terms: Terms
    ) -> list[jax.Array]:
        """For each term its total over each group of each example."""
        each = zip(
            *(reduced(x, terms, tuple(range(1, x[0].ndim))) for x in leaves),
            strict=True,
        )
        columns = jnp.stack([jnp.stack(column) for column in each])
        axes = tuple(sorted({name for place in places for name in place.axes}))
        if axes and terms.total is jnp.sum:
            copies = np.array([size_of(tuple(set(axes) - set(p.axes))) for p in places])
            columns = columns / jnp.asarray(copies, columns.dtype)[None, :, None]
        totals = terms.over(self._combine(columns, terms.total), axes)
        return [total if self.count is None else total.T for total in totals]

    def any_member(self, flags: Sequence[bool]) -> Packed:
        """For each group whether any of its leaves has the flag."""
        found = super().any_member(flags)
        return found if self.count is None else found[None]

    def sizes(self, arrays: Sequence[Any], places: Sequence[Placement]) -> Packed:
        """The number of entries of each group of one example, on the whole mesh."""
        one = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in arrays]
        sizes = super().sizes(one, places)
        return sizes if self.count is None else sizes[None]

    def starts(self) -> tuple[int, ...]:
        """None: entries of examples are cut out as they stand."""
        return ()

    def spread(self, packed: Packed, starts: Sequence[Any] | None = None) -> list[Any]:
        """For each leaf what its group has, of a shape that broadcasts against it."""
        columns = super().spread(packed if self.count is None else packed.T)
        pairs = zip(columns, self.ndims, strict=True)
        return [along(column, ndim) for column, ndim in pairs]


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
    (norms,) = _norms((tuple(arrays),), (), groups, ord, tuple(places), as_they_are)
    limits = like_norms(limits, norms.value)
    scales = scaling.scales(norms, limits, response)
    return Measured(norms.value, scales.coarse, scales.fine)


def scales_of(
    norms: jax.Array, limits: jax.Array, response: Response
) -> scaling.Scales:
    """The scales of norms below the largest number, from nothing but the norms."""
    known = Norms(norms, norms, jnp.ones_like(norms), jnp.square(norms))
    return scaling.scales(known, like_norms(limits, norms), response)


def like_norms(limits: jax.Array, norms: jax.Array) -> jax.Array:
    """The limits of the groups for each example."""
    # Zeros made from the norms, so that limits lie on the mesh as they do.
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
