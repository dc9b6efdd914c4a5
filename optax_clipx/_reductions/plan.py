"""What is the same in every step: settled once, before arrays flow."""

from collections.abc import Sequence
from dataclasses import dataclass

from .._devices.mesh import Placement, max_over, placements, sum_over
from .._trees.arguments import AxisNames, Specs
from .._trees.leaves import Leaves, Path
from .._trees.types import Arrays, Shaped, Trees
from .groups import Groups, Packed, ScalarGroups, TreeGroup
from .leaf_sums import over_devices

Ord = float | str  # 1, 2, any p >= 1, inf, or "rms"


@dataclass(frozen=True)
class Plan:
    """What is measured together, by which norm, and how each leaf lies on the mesh.

    For one tree of leaves. Trees that are measured beside it are like it.
    """

    paths: tuple[Path, ...]
    places: tuple[Placement, ...]
    groups: Groups
    ord: Ord = 2.0

    def sizes(self, arrays: Sequence[Shaped]) -> Packed:
        """The number of entries of each group, on the whole mesh."""
        return self.groups.sizes(arrays, self.places)

    def totals(
        self, rows: Trees, arrays: Arrays, largest: bool = False
    ) -> list[Packed]:
        """Of each row, with a value for each leaf, the totals of the groups.

        All that is summed over the same mesh axes goes into one collective.
        """
        parts = [self.groups.combine(row, arrays, self.places, largest) for row in rows]
        values = [value for part in parts for value, _ in part]
        axes = [names for part in parts for _, names in part]
        summed = iter(over_devices(values, axes, max_over if largest else sum_over))
        return [self.groups.packed([next(summed) for _ in part]) for part in parts]


def make_plan(
    leaves: Leaves,
    groups: Groups,
    ord: Ord,
    axis_name: AxisNames = None,
    specs: Specs = None,
) -> Plan:
    """A plan for leaves, from their types and what the caller says of the mesh."""
    places = placements(leaves.arrays, leaves.paths, axis_name, specs)
    return Plan(tuple(leaves.paths), tuple(places), groups, ord)


def of_tree(count: int) -> TreeGroup:
    """All leaves as one group."""
    return TreeGroup((0,) * count)


def of_leaves(count: int) -> ScalarGroups:
    """Each leaf as a group of its own."""
    return ScalarGroups(tuple(range(count)), count)
