"""Groups of leaves within each example, where all leaves carry the examples first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._grouping import Packed, ScalarGroups, Terms
from ._mesh import Placement, max_over, size_of, sum_over


@dataclass(frozen=True)
class ExampleGroups:
    """The groups of one example, for many examples along axis 0.

    Packed values have the shape `(examples,)` for the tree, else `(examples, groups)`.
    A norm is a sum over the devices that share an example, and not over those that
    have other examples: the placements are those of the parameters.
    """

    of_one: ScalarGroups
    ndims: tuple[int, ...]  # of each leaf, with the axis of examples

    def totals(
        self, terms: Sequence[Terms], places: Sequence[Placement], kind: str
    ) -> list[jax.Array]:
        """For each statistic the sum (or max) over each group of each example."""
        reduce = jnp.sum if kind == "sum" else jnp.max
        columns = [
            jnp.stack([reduce(x, axis=tuple(range(1, x.ndim))) for x in leaf], axis=-1)
            for leaf in terms
        ]
        axes = tuple(sorted({name for place in places for name in place.axes}))
        if axes and kind == "sum":
            copies = np.array([size_of(tuple(set(axes) - set(p.axes))) for p in places])
            columns = [c / jnp.asarray(copies, c.dtype)[None] for c in columns]
        totals = [self._combine(c, reduce) for c in columns]
        over = sum_over if kind == "sum" else max_over
        return list(over(jnp.stack(totals), axes)) if axes else totals

    def _combine(self, columns: jax.Array, reduce: Any) -> jax.Array:
        ids, count = self.of_one.ids, self.of_one.count
        if count is None:
            return reduce(columns, axis=1)
        if ids == tuple(range(count)):
            return columns
        members: list[list[int]] = [[] for _ in range(count)]
        for leaf, group in enumerate(ids):
            members[group].append(leaf)
        return jnp.stack([reduce(columns[:, np.array(m)], axis=1) for m in members], 1)

    def repeated(self, times: int) -> "ExampleGroups":
        """The groups themselves: examples are measured alone."""
        assert times == 1
        return self

    def split(self, packed: Packed, times: int) -> list[Packed]:
        """The packed values of the only tree."""
        return [packed]

    def any_member(self, flags: Sequence[bool]) -> Any:
        """For each group whether any of its leaves has the flag."""
        found = self.of_one.any_member(flags)
        return found if self.of_one.count is None else found[None]

    def sizes(self, arrays: Sequence[Any], places: Sequence[Placement]) -> Any:
        """The number of entries of each group of one example, on the whole mesh."""
        one = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in arrays]
        sizes = self.of_one.sizes(one, places)
        return sizes if self.of_one.count is None else sizes[None]

    def spread(self, packed: Packed) -> list[jax.Array]:
        """For each leaf what its group has, of a shape that broadcasts against it."""
        if self.of_one.count is None:
            return [along(packed, ndim) for ndim in self.ndims]
        return [
            along(packed[:, group], ndim)
            for group, ndim in zip(self.of_one.ids, self.ndims, strict=True)
        ]


def along(values: jax.Array, ndim: int) -> jax.Array:
    """One value for each example, in the rank of a leaf."""
    return jnp.expand_dims(values, tuple(range(1, ndim)))
