"""What is measured together: leaves, groups of them, or the layers that they stack."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._clipping.measures import Measure
from .._clipping.metrics import to_float32
from .._devices import mesh
from .._reductions.groups import Groups, Packed, ScalarGroups, UnitGroups
from .._reductions.norms import Norms
from .._reductions.plan import Plan
from .._trees.leaves import Leaves, show


class Parts(NamedTuple):
    """What is measured together: leaves, groups of them, or the layers in them."""

    names: list[str]
    leaves: Leaves
    plan: Plan

    @property
    def groups(self) -> Groups:
        """Which leaves, or layers, are parts."""
        return self.plan.groups

    def sizes(self) -> Any:
        """The number of entries of each part, as a vector."""
        sizes = self.plan.sizes(self.leaves.arrays)
        if isinstance(self.groups, ScalarGroups):
            return sizes
        return np.repeat(np.array(sizes), self.counts())

    def counts(self) -> list[int]:
        """How many layers each name has; 1 where nothing is stacked."""
        return [math.prod(shape) for shape in self.shapes()]

    def flat(self, found: Norms) -> Norms:
        """Norms as vectors."""
        if isinstance(self.groups, ScalarGroups):
            return found
        return Norms(*[jnp.concatenate([x.ravel() for x in map(_on_each, xs)])
                       for xs in found])  # fmt: skip

    def by_name(
        self, packed: Packed, names: Sequence[str] | None = None
    ) -> dict[str, jax.Array]:
        """Numbers by name, an array for the layers of a stack."""
        chosen = self.names if names is None else names
        if isinstance(self.groups, ScalarGroups):
            numbers = list(packed)
        else:
            each = zip(map(_on_each, packed), self.shapes(), strict=True)
            numbers = [x.reshape(shape) for x, shape in each]
        named = zip(self.names, numbers, strict=True)
        return {name: to_float32(x) for name, x in named if name in chosen}

    def zeros(self, names: Sequence[str]) -> Any:
        """Before the first step."""
        if not self.names:  # as optax.tree.map_params asks: a prefix of any dict
            return jnp.zeros((0,), jnp.float32)
        return {
            name: jnp.zeros(shape, jnp.float32)
            for name, shape in zip(self.names, self.shapes(), strict=True)
            if name in names
        }

    def shapes(self) -> list[tuple[int, ...]]:
        """Of each name the numbers of layers, `()` where nothing is stacked."""
        if isinstance(self.groups, ScalarGroups):
            return [()] * len(self.names)
        return [
            tuple(n for i, n in enumerate(leaf.shape) if i not in axes)
            for leaf, axes in zip(self.leaves.arrays, self.groups.axes, strict=True)
        ]

    def with_moment(self, moments: Sequence[PyTree]) -> list[str]:
        """The names with a leaf of which there is a second moment."""
        there = [i for i, moment in enumerate(moments) if moment is not None]
        if isinstance(self.groups, ScalarGroups):
            there = [self.groups.ids[i] for i in there]
        return [name for i, name in enumerate(self.names) if i in set(there)]

    def sizes_with_moment(self, moments: Sequence[PyTree]) -> Any:
        """The number of entries of each part of which there is a second moment."""
        if isinstance(self.groups, UnitGroups):
            return self.plan.sizes(self.leaves.arrays)
        there = [i for i, moment in enumerate(moments) if moment is not None]
        ids = tuple(self.groups.ids[i] for i in there)
        return ScalarGroups(ids, self.groups.count).sizes(
            [self.leaves.arrays[i] for i in there],
            [self.plan.places[i] for i in there],
        )


def parts_at_init(measure: Measure, leaves: Leaves, *place: PyTree) -> Parts:
    """The parts of parameters, which need not say how they lie on the mesh."""
    groups = measure.groups_at_init(leaves, *place)
    arrays = any(isinstance(x, jax.Array) for x in leaves.arrays)
    if isinstance(groups, UnitGroups) and arrays:
        return parts_of(measure, leaves, measure.plan(leaves, *place))
    return parts_of(measure, leaves, Plan(tuple(leaves.paths), (), groups))


def parts_of(measure: Measure, leaves: Leaves, plan: Plan) -> Parts:
    """The parts of some leaves, each with a name of its own."""
    if measure.scope == "group":
        names = [str(name) for name in measure.names(leaves)]
    else:
        names = ["/".join(path) for path in leaves.paths]
    parts = Parts(names, leaves, plan)
    if isinstance(plan.groups, UnitGroups):
        _refuse_cut_stacks(parts, plan.groups)
    each = zip(names, parts.shapes(), strict=True)
    shown = ["/".join((n, *map(str, i))) for n, s in each for i in np.ndindex(s)]
    twice = sorted(name for name, count in Counter(shown).items() if count > 1)
    if twice:
        raise ValueError(f"Expected a name for each leaf or group, got {twice} twice.")
    return parts


def _refuse_cut_stacks(parts: Parts, groups: UnitGroups) -> None:
    """In manual code a device has some of the layers, and does not know which."""
    leaves = parts.leaves
    if not parts.plan.places:
        return
    places = groups.kept(parts.plan.places)
    for path, place in zip(leaves.paths, places, strict=True):
        if place.axes:
            raise ValueError(
                f"The layers of {show(path)} cannot be measured: in manual code they"
                f" are sharded over the mesh axes {place.axes}. Leave the leaf out of"
                " batch_axes=, or shard another of its axes."
            )


def _on_each(x: jax.Array) -> jax.Array:
    """An array on every device, of which Explicit axes may have cut the layers."""
    return (
        jax.sharding.reshard(x, jax.sharding.PartitionSpec()) if mesh.is_cut(x) else x
    )
