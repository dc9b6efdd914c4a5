"""What is the same in every step: settled once, before arrays flow."""

from collections.abc import Sequence
from dataclasses import dataclass

from .._devices.mesh import Placement, placements
from .._trees.arguments import AxisNames, Specs
from .._trees.leaves import Leaves, Path
from .._trees.types import Shaped
from .groups import Groups, Packed, ScalarGroups

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


def make_plan(
    leaves: Leaves,
    groups: Groups,
    ord: Ord = 2.0,
    axis_name: AxisNames = None,
    specs: Specs = None,
) -> Plan:
    """A plan for leaves, from their types and what the caller says of the mesh."""
    places = placements(leaves.arrays, leaves.paths, axis_name, specs)
    return Plan(tuple(leaves.paths), tuple(places), groups, ord)


def of_tree(count: int) -> ScalarGroups:
    """All leaves as one group."""
    return ScalarGroups((0,) * count, None)


def of_leaves(count: int) -> ScalarGroups:
    """Each leaf as a group of its own."""
    return ScalarGroups(tuple(range(count)), count)
