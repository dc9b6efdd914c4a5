"""What is measured together, and the two moves between leaves and groups.

Values of groups are *packed*: one array for the scalar scopes, of shape `()` for the
tree and `(groups,)` for labelled groups (sorted by label) and leaves (in flattening
order); for units a tuple, of one keepdims array a leaf, or of one vector a bucket.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._devices.mesh import (
    Axes,
    Placement,
    axes_to_sum,
    cut_sizes,
    explicit_dims,
    knows_shards,
    size_of,
    varying,
)
from .._trees.leaves import Path, show
from .._trees.sizes import as_number, is_known
from .leaf_sums import Operands, Terms, reduced, reduced_together
from .parts import Part, cut

Packed = Any  # a jax.Array, or a tuple of them for units


@dataclass(frozen=True)
class ScalarGroups:
    """Each leaf belongs to one group: the tree, a label's, or its own."""

    ids: tuple[int, ...]  # for each leaf its group
    count: int | None  # how many groups; None is the tree, of shape ()

    def totals(
        self, leaves: Sequence[Operands], places: Sequence[Placement], terms: Terms
    ) -> list[jax.Array]:
        """For each term its total over each group, in one collective."""
        axes = axes_to_sum([leaf[0] for leaf in leaves], places)
        if all(knows_shards(leaf[0]) for leaf in leaves):
            if len(set(self.ids)) not in (1, len(self.ids)):
                terms = terms._replace(in_turn=False)
            rows = reduced_together(leaves, terms, axes)
        else:
            # With Auto axes each would wait for the all-reduce of the one before.
            found = [reduced(leaf, terms) for leaf in leaves]
            rows = [jnp.stack(row) for row in zip(*found, strict=True)]
        columns = _kept_stacked(jnp.stack(rows))
        if axes and terms.total is jnp.sum:
            copies = _copies(places, axes)
            if np.any(copies != 1):
                columns = columns / jnp.asarray(copies, columns.dtype)[None]
        return list(terms.over(self._combine(columns, terms.total), axes))

    def _combine(self, columns: jax.Array, reduce: Callable[..., Any]) -> jax.Array:
        if self.count is None:
            return reduce(columns, axis=1)
        if self.ids == tuple(range(self.count)):
            return columns
        members: list[list[int]] = [[] for _ in range(self.count)]
        for leaf, group in enumerate(self.ids):
            members[group].append(leaf)
        empty = jnp.zeros(columns.shape[:1], columns.dtype)
        return jnp.stack(
            [reduce(columns[:, np.array(m)], axis=1) if m else empty for m in members],
            axis=1,
        )

    def repeated(self, times: int) -> "ScalarGroups":
        """The groups of several like trees, one after the other."""
        if times == 1:
            return self
        count = self.count or 1
        ids = tuple(i + k * count for k in range(times) for i in self.ids)
        return ScalarGroups(ids, times * count)

    def split(self, packed: Packed, times: int) -> list[Packed]:
        """What belongs to each of several like trees."""
        if times == 1:
            return [packed]
        if self.count is None:
            return list(packed)
        return [packed[k * self.count : (k + 1) * self.count] for k in range(times)]

    def any_member(self, flags: Sequence[bool]) -> Packed:
        """For each group whether any of its leaves has the flag."""
        found = np.zeros(self.count or 1, bool)
        for group, flag in zip(self.ids, flags, strict=True):
            found[group] |= flag
        return found[0] if self.count is None else found

    def sizes(self, arrays: Sequence[Any], places: Sequence[Placement]) -> Packed:
        """The number of entries of each group, on the whole mesh."""
        totals = [0] * (self.count or 1)
        for group, array, place in zip(self.ids, arrays, places, strict=True):
            totals[group] += array.size * size_of(place.axes)
        sizes = list(map(as_number, totals))
        if self.count is None:
            return sizes[0]
        return np.array(sizes) if is_known(*totals) else jnp.stack(sizes)

    def starts(self) -> tuple[int, ...]:
        """Where in the vector each group's entry is."""
        return () if self.count is None else tuple(range(self.count))

    def spread(self, packed: Packed, starts: Sequence[Any] | None = None) -> list[Any]:
        """For each leaf what its group has; with `starts` as parts, not cut yet."""
        if self.count is None:
            return [packed] * len(self.ids)
        entries = [Part(packed, i, ()) for i in starts] if starts else list(packed)
        return [entries[group] for group in self.ids]

    def pack(self, values: Sequence[Any]) -> Packed:
        """One value for each group from one for each leaf; the first member's."""
        if self.count is None:
            return values[0]
        first = {group: leaf for leaf, group in reversed(list(enumerate(self.ids)))}
        return jnp.stack([values[first[group]] for group in range(self.count)])


@dataclass(frozen=True)
class Bucket:
    """Leaves that lie alike on the mesh: their units make up one vector."""

    leaves: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]  # of each leaf's units on one device
    explicit: Axes  # the Explicit mesh axes over which the vector is sharded
    parts: int  # on how many devices along them

    def counts(self) -> list[int]:
        """How many units each leaf has on one device."""
        return [math.prod(shape) for shape in self.shapes]

    def starts(self) -> list[int]:
        """Where the units of each leaf begin."""
        return [0, *itertools.accumulate(self.counts()[:-1])]

    def fill(self, values: Sequence[Any]) -> np.ndarray:
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

    def bucketed(
        self, trees: Sequence[Sequence[Any]], places: Sequence[Placement]
    ) -> "UnitGroups":
        """The same units in buckets, where it is known how the trees are sharded.

        With Auto mesh axes it is not: a vector of many leaves would gather them. Nor
        can a size that is a symbol be a place in a vector.
        """
        dims = [list(map(explicit_dims, tree)) for tree in trees]
        known = all(
            knows_shards(x) and is_known(x.size) for tree in trees for x in tree
        )
        if not known or any(other != dims[0] for other in dims):
            return self
        found: dict[Any, list[int]] = {}
        for leaf, (place, axes) in enumerate(zip(places, self.axes, strict=True)):
            explicit = _kept(dims[0][leaf], axes)
            key = (
                self._reduced_mesh_axes(leaf, place.cut_by(dims[0][leaf]), axes),
                _kept(place.dims or (), axes),
                explicit,
                tuple(varying(tree[leaf]) for tree in trees),
            )
            found.setdefault(key, []).append(leaf)
        buckets = tuple(
            Bucket(
                tuple(leaves),
                tuple(self._shape(i, trees[0][i]) for i in leaves),
                key[2],
                _parts_of_units(trees[0][leaves[0]], self.axes[leaves[0]]),
            )
            for key, leaves in found.items()
        )
        return UnitGroups(self.axes, self.paths, buckets)

    def _shape(self, leaf: int, array: Any) -> tuple[int, ...]:
        cuts = zip(array.shape, cut_sizes(array), strict=True)
        return tuple(
            1 if i in self.axes[leaf] else n // cut for i, (n, cut) in enumerate(cuts)
        )

    def totals(
        self, leaves: Sequence[Operands], places: Sequence[Placement], terms: Terms
    ) -> list[tuple[jax.Array, ...]]:
        """For each term the units' totals, one collective for each set of axes."""
        each = zip(leaves, self.axes, strict=True)
        local = [
            list(column)
            for column in zip(
                *(reduced(leaf, terms, axes, True) for leaf, axes in each), strict=True
            )
        ]
        firsts = list(range(len(self.axes)))
        if self.buckets:
            local = [self._joined(leaf) for leaf in local]
            firsts = [bucket.leaves[0] for bucket in self.buckets]
        # What varies alike is concatenated: a concatenation varies as its parts do
        # together, and what is typed as varying cannot be replicated again.
        by_axes: dict[Any, list[int]] = {}
        for i, leaf in enumerate(firsts):
            cut = self._reduced_mesh_axes(leaf, places[leaf], self.axes[leaf])
            if cut:
                by_axes.setdefault((cut, varying(local[0][i])), []).append(i)
        for (cut, _), members in by_axes.items():
            slots = [(k, i) for k in range(len(local)) for i in members]
            flat = [local[k][i].ravel() for k, i in slots]
            summed = terms.over(jnp.concatenate(flat), cut)
            pieces = jnp.split(summed, np.cumsum([x.size for x in flat])[:-1])
            for (k, i), piece in zip(slots, pieces, strict=True):
                local[k][i] = piece.reshape(local[k][i].shape)
        return [tuple(x) for x in local]

    def _reduced_mesh_axes(
        self, leaf: int, place: Placement, axes: tuple[int, ...]
    ) -> tuple[str, ...]:
        if not place.axes:
            return ()
        if place.dims is None:
            raise ValueError(
                f"The units of {show(self.paths[leaf])} cannot be measured: it is"
                f" sharded over the mesh axes {place.axes}, and its type does not say"
                " along which of its dimensions. Pass specs= with a PartitionSpec for"
                " each leaf."
            )
        return tuple(sorted({name for a in axes for name in place.dims[a]}))

    def repeated(self, times: int) -> "UnitGroups":
        """The units of several like trees, one after the other."""
        each = len(self.axes)
        buckets = tuple(
            replace(b, leaves=tuple(i + k * each for i in b.leaves))
            for k in range(times)
            for b in self.buckets
        )
        return UnitGroups(self.axes * times, self.paths * times, buckets)

    def split(self, packed: Packed, times: int) -> list[Packed]:
        """What belongs to each of several like trees."""
        each = len(self.buckets or self.axes)
        return [packed[k * each : (k + 1) * each] for k in range(times)]

    def any_member(self, flags: Sequence[bool]) -> Packed:
        """For each leaf, or each unit in a bucket, whether it has the flag."""
        return tuple(b.fill(flags) for b in self.buckets) or tuple(flags)

    def sizes(self, arrays: Sequence[Any], places: Sequence[Placement]) -> Packed:
        """The number of entries of a unit, on the whole mesh."""
        sizes = tuple(
            as_number(
                math.prod(array.shape[a] for a in axes)
                * size_of(self._reduced_mesh_axes(leaf, place, axes))
            )
            for leaf, (array, place, axes) in enumerate(
                zip(arrays, places, self.axes, strict=True)
            )
        )
        return tuple(b.fill(sizes) for b in self.buckets) or sizes

    def starts(self) -> tuple[int, ...]:
        """Where in its bucket each leaf's units begin, bucket by bucket."""
        return tuple(i for bucket in self.buckets for i in bucket.starts())

    def spread(self, packed: Packed, starts: Sequence[Any] | None = None) -> list[Any]:
        """For each leaf its units' values, which broadcast against it.

        Buckets are of one device's units: on Explicit axes inside of a `map_local`.
        With `starts` they are parts that are not cut yet.
        """
        if not self.buckets:
            return list(packed)
        spread: list[Any] = [None] * len(self.axes)
        begin = iter(starts or self.starts())
        for bucket, vector in zip(self.buckets, packed, strict=True):
            for leaf, shape in zip(bucket.leaves, bucket.shapes, strict=True):
                part = Part(vector, next(begin), shape)
                spread[leaf] = part if starts else cut(part)
        return spread

    def pack(self, values: Sequence[Any]) -> Packed:
        """The packed form from one scalar for each leaf."""
        if not self.buckets:
            return tuple(values)
        return tuple(
            jnp.tile(
                jnp.concatenate(
                    [
                        jnp.broadcast_to(values[i], (n,))
                        for i, n in zip(b.leaves, b.counts(), strict=True)
                    ]
                ),
                b.parts,
            )
            for b in self.buckets
        )

    def kept(self, places: Sequence[Placement]) -> list[Placement]:
        """Where the packed arrays of units lie."""
        left = [p.without(a) for p, a in zip(places, self.axes, strict=True)]
        if not self.buckets:
            return left
        return [Placement(left[b.leaves[0]].axes, None) for b in self.buckets]

    def _joined(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        return [
            jnp.concatenate([leaves[i].ravel() for i in b.leaves]) for b in self.buckets
        ]


Groups = ScalarGroups | UnitGroups


def _kept_stacked(columns: jax.Array) -> jax.Array:
    """Scalars in an array, which XLA for CPU may not take apart again.

    It would add them up one by one in one loop. To put that loop together takes it a
    time that grows with the square of their number.
    """
    return lax.platform_dependent(
        columns, cpu=lax.optimization_barrier, default=lambda columns: columns
    )


def _kept(dims: Sequence[Axes], reduced: Sequence[int]) -> Axes:
    """The mesh axes that cut the dimensions which are not reduced."""
    names = {name for i, cut in enumerate(dims) if i not in reduced for name in cut}
    return tuple(sorted(names))


def _parts_of_units(array: Any, reduced: Sequence[int]) -> int:
    """Over how many devices the units of a leaf are spread by Explicit axes."""
    cuts = enumerate(cut_sizes(array))
    return math.prod(cut for i, cut in cuts if i not in reduced)


def _copies(places: Sequence[Placement], axes: tuple[str, ...]) -> np.ndarray:
    # Over these axes a leaf that is not sharded is counted once a device.
    return np.array(
        [size_of(tuple(n for n in axes if n not in place.axes)) for place in places]
    )
