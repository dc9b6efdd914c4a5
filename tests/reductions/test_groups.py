"""The two moves between leaves and groups."""

import jax.numpy as jnp

from optax_clipx._devices.mesh import Placement
from optax_clipx._reductions.groups import ScalarGroups, UnitGroups
from optax_clipx._reductions.plan import of_leaves, of_tree

PLACE = Placement((), ())
LABELS = ScalarGroups((1, 0, 1), 2)
VALUES = [jnp.float32(3), jnp.float32(5), jnp.float32(7)]


def test_a_group_takes_the_value_of_its_first_member():
    assert of_tree(3).pack(VALUES) == 3
    assert of_leaves(3).pack(VALUES).tolist() == [3, 5, 7]
    assert LABELS.pack(VALUES).tolist() == [5, 3]


def test_each_leaf_gets_what_its_group_has():
    assert of_tree(3).spread(9) == [9, 9, 9]
    assert list(map(int, of_leaves(3).spread(jnp.array(VALUES)))) == [3, 5, 7]
    assert list(map(int, LABELS.spread(jnp.array([1.0, 2.0])))) == [2, 1, 2]


def test_sizes_of_groups():
    leaves = [jnp.ones((2, 3)), jnp.ones(4), jnp.ones(())]
    places = [PLACE] * 3
    assert of_tree(3).sizes(leaves, places) == 11
    assert of_leaves(3).sizes(leaves, places).tolist() == [6, 4, 1]
    assert LABELS.sizes(leaves, places).tolist() == [4, 7]


def test_values_of_many_examples_make_a_row_for_each_example():
    each = [jnp.array([1.0, 2.0, 3.0]), jnp.array([9.0, 8.0, 7.0]), jnp.zeros(3)]
    leaves = [jnp.ones((3, 2))] * 3
    ((sums, _),) = LABELS.combine(each, leaves, [PLACE] * 3, largest=False)
    assert sums.tolist() == [[9, 1], [8, 2], [7, 3]]
    ((largest, _),) = of_tree(3).combine(each, leaves, [PLACE] * 3, largest=True)
    assert largest.tolist() == [9, 8, 7]


def test_sizes_of_units():
    units = UnitGroups(((0,), (0, 1), ()), ((), (), ()))
    leaves = [jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones(5)]
    assert list(map(int, units.sizes(leaves, [PLACE] * 3))) == [2, 6, 1]
