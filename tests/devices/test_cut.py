"""The parts of a vector, cut at places that XLA for CPU does not know."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_clipx._devices.programs import cut, entries

SIZES = (2, 1, 3)
VECTOR = np.float32([1, 2, 3, 4, 5, 6])


def parts(vector):
    return cut(vector, SIZES)


@pytest.mark.parametrize("around", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("first", [1.0, np.inf, np.nan])
def test_the_parts_lie_one_after_the_other(around, first):
    # On CPU the branch that hides the places looks at the first number.
    found = around(parts)(jnp.asarray(VECTOR).at[0].set(first))
    for part, wanted in zip(found, ([first, 2], [3], [4, 5, 6]), strict=True):
        np.testing.assert_array_equal(part, wanted)


def test_each_vector_of_a_batch_is_cut():
    batch = jnp.stack([jnp.asarray(VECTOR), jnp.asarray(VECTOR * 10)])
    _, _, found = jax.jit(jax.vmap(parts))(batch)
    np.testing.assert_array_equal(found, [[4, 5, 6], [40, 50, 60]])


def test_the_derivative_of_a_part_is_its_place():
    def last_squared(vector):
        return jnp.sum(cut(vector, SIZES)[2] ** 2)

    slope = jax.jit(jax.grad(last_squared))(jnp.asarray(VECTOR))
    np.testing.assert_array_equal(slope, [0, 0, 0, 8, 10, 12])


def test_the_entries_are_scalars():
    found = jax.jit(lambda x: entries(x))(jnp.float32([7, 8]))
    assert [x.shape for x in found] == [(), ()]
    assert list(map(float, found)) == [7, 8]
