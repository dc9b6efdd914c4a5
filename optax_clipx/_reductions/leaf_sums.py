"""Totals over leaves: what is added up on each device, and then over the mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._devices.mesh import (
    Axes,
    Placement,
    can_be_joined,
    max_over,
    sum_over,
    varying,
)
from .._trees.arithmetic import total
from .._trees.sizes import is_known
from .._trees.types import Arrays, Trees
from .groups import Groups, Packed


class Where(NamedTuple):
    """Which entries are totalled together, and how they lie on the mesh."""

    groups: Groups
    places: tuple[Placement, ...]

    def totals(
        self,
        rows: Trees,
        arrays: Arrays,
        largest: bool = False,
    ) -> list[Packed]:
        """Of each row, with a value for each leaf, the totals of the groups.

        All that is summed over the same mesh axes goes into one collective.
        """
        parts = [self.groups.combine(row, arrays, self.places, largest) for row in rows]
        values = [value for part in parts for value, _ in part]
        axes = [names for part in parts for _, names in part]
        summed = iter(_over_devices(values, axes, max_over if largest else sum_over))
        return [self.groups.packed([next(summed) for _ in part]) for part in parts]

    def local(
        self, values: Callable[..., jax.Array], leaf: int, *arrays: jax.Array
    ) -> jax.Array:
        """The sum of the values of one leaf's entries, on this device."""
        return sum_over_axes(values(*arrays), self.groups.spans(leaf))


def sum_over_axes(values: jax.Array, axes: tuple[int, ...] | None) -> jax.Array:
    """The sum over axes that are kept, or over all, to a scalar."""
    return total(values) if axes is None else jnp.sum(values, axes, keepdims=True)


def _over_devices(
    values: list[jax.Array], axes: list[Axes], summed: Callable[..., jax.Array]
) -> list[jax.Array]:
    # What varies alike is concatenated: a concatenation varies as its parts do
    # together, and what is typed as varying cannot be replicated again.
    alike: dict[Any, list[int]] = {}
    for i, (value, names) in enumerate(zip(values, axes, strict=True)):
        if names:
            alike.setdefault((names, varying(value)), []).append(i)
    found = list(values)
    for (names, _), members in alike.items():
        if len(members) == 1:
            found[members[0]] = summed(values[members[0]], names)
            continue
        flat = [values[i].ravel() for i in members]
        together = summed(jnp.concatenate(flat), names)
        pieces = jnp.split(together, np.cumsum([x.size for x in flat])[:-1])
        for i, piece in zip(members, pieces, strict=True):
            found[i] = piece.reshape(values[i].shape)
    return found


def can_go_by_parts(arrays: Arrays) -> bool:
    """Whether like arrays are large, may be cut up, and int32 counts their entries."""
    size = arrays[0].size
    return is_known(size) and 2**18 <= size < 2**31 and can_be_joined(arrays)
