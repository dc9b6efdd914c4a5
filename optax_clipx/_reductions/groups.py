"""What is measured together, and the two moves between leaves and groups.

Values of groups are *packed*: one array for the scalar scopes, of shape `()` for the
tree and `(groups,)` for labelled groups (sorted by label) and leaves (in flattening
order); for units a tuple, of one keepdims array a leaf or of one vector a bucket.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import PyTree

from .._devices.mesh import (
    Axes,
    Placement,
    axes_to_sum,
    can_be_joined,
    is_cut,
    size_of,
    varying,
)
from .._devices.programs import cut, entries
from .._devices.sums import in_one_vector, total_of
from .._trees.leaves import Path, show
from .._trees.sizes import as_number, is_known
from .._trees.types import Arrays, Dtype, Shaped, Trees

Packed: TypeAlias = PyTree[ArrayLike]  # one array, or for units a tuple of them


@dataclass(frozen=True)
class ScalarGroups:
    """Each leaf belongs to one group: the tree, a label's, or its own."""

    ids: tuple[int, ...]  # for each leaf its group
    count: int | None  # how many groups; None is the tree, of shape ()
    is_one = False  # whether one number is all that is packed

    def spans(self, leaf: int) -> tuple[int, ...] | None:
        """The axes of a leaf that are summed over; None are all, to a scalar."""
        return None

    def combine(
        self,
        found: Arrays,
        arrays: Arrays,
        places: Sequence[Placement],
        largest: bool,
    ) -> list[tuple[jax.Array, Axes]]:
        """One array for all groups, and the mesh axes over which it is a part."""
        axes = self.mesh_axes([*arrays, *found], places)
        if (
            axes and not largest
        ):  # there a leaf that is not cut is counted once a device
            copies = [_copies(place, axes) for place in places]
            found = [x / n if n != 1 else x for x, n in zip(found, copies, strict=True)]
        members: list[list[jax.Array]] = [[] for _ in range(self.count or 1)]
        for group, value in zip(self.ids, found, strict=True):
            members[group].append(value)
        if self.count is None:
            return [(_of_one(members[0], largest), axes)]
        empty = jnp.zeros_like(found[0])
        each = [_of_one(m, largest) if m else empty for m in members]
        return [(jnp.stack(each, axis=-1), axes)]

    def mesh_axes(self, arrays: Arrays, places: Sequence[Placement]) -> Axes:
        """The mesh axes of one sum over all leaves."""
        return axes_to_sum(arrays, places)

    def packed(self, arrays: Arrays) -> Packed:
        """The packed form from what `combine` gives."""
        return arrays[0]

    def sizes(self, arrays: Sequence[Shaped], places: Sequence[Placement]) -> Packed:
        """The number of entries of each group, on the whole mesh."""
        totals = [0] * (self.count or 1)
        for group, array, place in zip(self.ids, arrays, places, strict=True):
            totals[group] += array.size * size_of(place.axes)
        sizes = list(map(as_number, totals))
        if self.count is None:
            return sizes[0]
        return np.array(sizes) if is_known(*totals) else jnp.stack(sizes)

    def like(self, arrays: Sequence[Shaped], dtype: Dtype) -> PyTree:
        """The shapes of what is packed, of leaves that lie whole on a device."""
        return jax.ShapeDtypeStruct(() if self.count is None else (self.count,), dtype)

    def spread(self, packed: Packed) -> list[Any]:
        """For each leaf what its group has."""
        if self.count is None:
            return [packed] * len(self.ids)
        each = entries(packed) if self.count else []
        return [each[group] for group in self.ids]

    def pack(self, values: Sequence[ArrayLike]) -> Packed:
        """One value for each group from one for each leaf; the first member's."""
        if self.count is None:
            return values[0]
        first = {group: leaf for leaf, group in reversed(list(enumerate(self.ids)))}
        return jnp.stack([values[first[group]] for group in range(self.count)])


@dataclass(frozen=True)
class TreeGroup(ScalarGroups):
    """All leaves are one group."""

    count: None = None
    is_one = True


@dataclass(frozen=True)
class Bucket:
    """Leaves that lie alike on the mesh: their units make up one vector."""

    leaves: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]  # of each leaf's units on one device
    summed: Axes  # the mesh axes over which the parts of a unit lie

    def counts(self) -> list[int]:
        """How many units each leaf has on one device."""
        return [math.prod(shape) for shape in self.shapes]

    def fill(self, values: Sequence[ArrayLike]) -> np.ndarray:
        """A vector from one static number for each leaf."""
        return np.repeat([values[i] for i in self.leaves], self.counts())


@dataclass(frozen=True)
class UnitGroups:
    """Each leaf is cut into units; its norms keep the leaf's rank.

    With buckets the units of many leaves are one vector instead, so that what is done
    with them is compiled once and not for each leaf.
    """

    axes: tuple[tuple[int, ...], ...]  # for each leaf the axes that a unit spans
    paths: tuple[Path, ...]
    buckets: tuple[Bucket, ...] = ()
    is_one = False

    def bucketed(self, trees: Trees, places: Sequence[Placement]) -> "UnitGroups":
        """The same units in buckets, where each device has all that it needs of them.

        With mesh axes outside of manual code it has not: a vector of many leaves would
        gather them. Nor can a size that is a symbol be a place in a vector.
        """
        every = [x for tree in trees for x in tree]
        if not can_be_joined(every) or not is_known(*(x.size for x in every)):
            return self
        if any(map(is_cut, every)):
            return self
        found: dict[Any, list[int]] = {}
        for leaf, place in enumerate(places):
            kept = place.without(self.axes[leaf])
            types = tuple(varying(tree[leaf]) for tree in trees)
            key = (self._summed_axes(leaf, place), tuple(sorted(kept.axes)), types)
            found.setdefault(key, []).append(leaf)
        buckets = tuple(
            Bucket(
                tuple(leaves),
                tuple(self._shape(i, trees[0][i]) for i in leaves),
                key[0],
            )
            for key, leaves in found.items()
        )
        return replace(self, buckets=buckets)

    def _shape(self, leaf: int, array: Shaped) -> tuple[int, ...]:
        units = enumerate(array.shape)
        return tuple(1 if i in self.axes[leaf] else n for i, n in units)

    def spans(self, leaf: int) -> tuple[int, ...] | None:
        """The axes of a leaf that are summed over."""
        return self.axes[leaf]

    def combine(
        self,
        found: Arrays,
        arrays: Arrays,
        places: Sequence[Placement],
        largest: bool,
    ) -> list[tuple[jax.Array, Axes]]:
        """An array for each leaf or bucket, and the mesh axes of its parts."""
        if self.buckets:
            return [
                (_vector([found[i] for i in bucket.leaves]), bucket.summed)
                for bucket in self.buckets
            ]
        each = zip(found, places, strict=True)
        return [(x, self._summed_axes(i, place)) for i, (x, place) in enumerate(each)]

    def packed(self, arrays: Arrays) -> Packed:
        """The packed form from what `combine` gives."""
        return tuple(arrays)

    def packed_at_once(self, rows: Sequence[Arrays]) -> list[Packed]:
        """The packed form of each row, of leaves in buckets that lie whole."""
        columns = [
            in_one_vector([[row[i] for i in bucket.leaves] for row in rows])
            for bucket in self.buckets
        ]
        return list(zip(*columns, strict=True))

    def _summed_axes(self, leaf: int, place: Placement) -> Axes:
        if not place.axes:
            return ()
        if place.dims is None:
            raise ValueError(
                f"The units of {show(self.paths[leaf])} cannot be measured: it is"
                f" sharded over the mesh axes {place.axes}, and its type does not say"
                " along which of its dimensions. Pass specs= with a PartitionSpec for"
                " each leaf."
            )
        cut = {name for a in self.axes[leaf] for name in place.dims[a]}
        return tuple(sorted(cut))

    def sizes(self, arrays: Sequence[Shaped], places: Sequence[Placement]) -> Packed:
        """The number of entries of a unit, on the whole mesh."""
        sizes = tuple(
            as_number(
                math.prod(array.shape[a] for a in axes)
                * size_of(self._summed_axes(leaf, place))
            )
            for leaf, (array, place, axes) in enumerate(
                zip(arrays, places, self.axes, strict=True)
            )
        )
        return tuple(b.fill(sizes) for b in self.buckets) or sizes

    def like(self, arrays: Sequence[Shaped], dtype: Dtype) -> PyTree:
        """The shapes of what is packed, of leaves that lie whole on a device."""
        if self.buckets:
            shapes: Any = [(sum(bucket.counts()),) for bucket in self.buckets]
        else:
            shapes = [self._shape(i, x) for i, x in enumerate(arrays)]
        return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)

    def spread(self, packed: Packed) -> list[Any]:
        """For each leaf its units' values, which broadcast against it."""
        if not self.buckets:
            return list(packed)
        spread: list[Any] = [None] * len(self.axes)
        for bucket, vector in zip(self.buckets, packed, strict=True):
            parts = cut(vector, tuple(bucket.counts()))
            for leaf, shape, part in zip(
                bucket.leaves, bucket.shapes, parts, strict=True
            ):
                spread[leaf] = lax.reshape(part, shape)
        return spread

    def pack(self, values: Sequence[ArrayLike]) -> Packed:
        """The packed form from one scalar for each leaf."""
        if not self.buckets:
            return tuple(values)
        return tuple(
            jnp.concatenate(
                [
                    jnp.broadcast_to(values[i], (n,))
                    for i, n in zip(b.leaves, b.counts(), strict=True)
                ]
            )
            for b in self.buckets
        )

    def kept(self, places: Sequence[Placement]) -> list[Placement]:
        """Where the packed arrays of units lie."""
        left = [p.without(a) for p, a in zip(places, self.axes, strict=True)]
        if not self.buckets:
            return left
        return [Placement(left[b.leaves[0]].axes, None) for b in self.buckets]


Groups = ScalarGroups | UnitGroups


def _vector(arrays: Arrays) -> jax.Array:
    return lax.concatenate([lax.reshape(x, (x.size,)) for x in arrays], 0)


def _of_one(values: Arrays, largest: bool) -> jax.Array:
    """The total of one group."""
    return jnp.max(jnp.stack(values), axis=0) if largest else total_of(values)


def _copies(place: Placement, axes: Axes) -> int:
    """On how many devices along the axes each part of a leaf lies."""
    return size_of(tuple(name for name in axes if name not in place.axes))
