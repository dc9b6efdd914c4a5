"""What is measured together, and the two moves between leaves and groups.

Values of groups are *packed*: one array for the scalar scopes, of shape `()` for the
tree and `(groups,)` for labelled groups (sorted by label) and leaves (in flattening
order); a tuple of keepdims arrays, one a leaf, for units.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._leaves import Path, show
from ._mesh import Placement, axes_to_sum, max_over, size_of, sum_over, varying

Packed = Any  # a jax.Array, or a tuple of them for units
Terms = Sequence[jax.Array]  # for each leaf an array of its own shape


@dataclass(frozen=True)
class ScalarGroups:
    """Each leaf belongs to one group: the tree, a label's, or its own."""

    ids: tuple[int, ...]  # for each leaf its group
    count: int | None  # how many groups; None is the tree, of shape ()

    def totals(
        self, terms: Sequence[Terms], places: Sequence[Placement], kind: str
    ) -> list[jax.Array]:
        """For each statistic the sum (or max) over each group, in one collective."""
        reduce = jnp.sum if kind == "sum" else jnp.max
        # Stacked and reduced once: scalars added leaf by leaf would be fused into
        # every leaf's loop, and compile time would grow as the square of the leaves.
        columns = jnp.stack([jnp.stack([reduce(x) for x in leaf]) for leaf in terms])
        axes = axes_to_sum(terms[0], places)
        if axes and kind == "sum":
            copies = _copies(places, axes)
            if np.any(copies != 1):
                columns = columns / jnp.asarray(copies, columns.dtype)[None]
        totals = self._combine(columns, reduce)
        totals = (sum_over if kind == "sum" else max_over)(totals, axes)
        return [totals[k] for k in range(len(terms))]

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
        sizes = np.zeros(self.count or 1)
        for group, array, place in zip(self.ids, arrays, places, strict=True):
            sizes[group] += array.size * size_of(place.axes)
        return float(sizes[0]) if self.count is None else sizes

    def spread(self, packed: Packed) -> list[Any]:
        """For each leaf what its group has."""
        if self.count is None:
            return [packed] * len(self.ids)
        entries = list(packed)
        return [entries[group] for group in self.ids]

    def pack(self, values: Sequence[Any]) -> Packed:
        """One value for each group from one for each leaf; the first member's."""
        if self.count is None:
            return values[0]
        first = {group: leaf for leaf, group in reversed(list(enumerate(self.ids)))}
        return jnp.stack([values[first[group]] for group in range(self.count)])


@dataclass(frozen=True)
class UnitGroups:
    """Each leaf is cut into units; its norms keep the leaf's rank."""

    axes: tuple[tuple[int, ...], ...]  # for each leaf the axes that a unit spans
    paths: tuple[Path, ...]

    def totals(
        self, terms: Sequence[Terms], places: Sequence[Placement], kind: str
    ) -> list[tuple[jax.Array, ...]]:
        """For each statistic the units' sums, one collective for each set of axes."""
        reduce = jnp.sum if kind == "sum" else jnp.max
        local = [
            [
                reduce(x, axis=a, keepdims=True)
                for x, a in zip(leaf, self.axes, strict=True)
            ]
            for leaf in terms
        ]
        # Leaves that vary alike are concatenated: a concatenation varies as its parts
        # do together, and what is typed as varying cannot be replicated again.
        by_axes: dict[Any, list[int]] = {}
        for leaf, (place, axes) in enumerate(zip(places, self.axes, strict=True)):
            cut = self._reduced_mesh_axes(leaf, place, axes)
            if cut:
                by_axes.setdefault((cut, varying(local[0][leaf])), []).append(leaf)
        over = sum_over if kind == "sum" else max_over
        for (cut, _), members in by_axes.items():
            flat = [local[k][i].ravel() for k in range(len(terms)) for i in members]
            summed = over(jnp.concatenate(flat), cut)
            pieces = jnp.split(summed, np.cumsum([x.size for x in flat])[:-1])
            slots = [(k, i) for k in range(len(terms)) for i in members]
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
        return UnitGroups(self.axes * times, self.paths * times)

    def split(self, packed: Packed, times: int) -> list[Packed]:
        """What belongs to each of several like trees."""
        each = len(self.axes)
        return [packed[k * each : (k + 1) * each] for k in range(times)]

    def any_member(self, flags: Sequence[bool]) -> Packed:
        """For each leaf whether it has the flag."""
        return tuple(flags)

    def sizes(self, arrays: Sequence[Any], places: Sequence[Placement]) -> Packed:
        """The number of entries of a unit of each leaf, on the whole mesh."""
        return tuple(
            float(
                math.prod(array.shape[a] for a in axes)
                * size_of(self._reduced_mesh_axes(leaf, place, axes))
            )
            for leaf, (array, place, axes) in enumerate(
                zip(arrays, places, self.axes, strict=True)
            )
        )

    def spread(self, packed: Packed) -> list[Any]:
        """For each leaf its units' values, which broadcast against it."""
        return list(packed)

    def pack(self, values: Sequence[Any]) -> Packed:
        """The values of each leaf's units, as a tuple."""
        return tuple(values)


Groups = ScalarGroups | UnitGroups


def _copies(places: Sequence[Placement], axes: tuple[str, ...]) -> np.ndarray:
    # Over these axes a leaf that is not sharded is counted once a device.
    return np.array(
        [size_of(tuple(n for n in axes if n not in place.axes)) for place in places]
    )
