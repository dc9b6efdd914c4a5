"""What is summed over a mesh: each value over its axes, in one collective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec as P

from optax_clipx._devices.mesh import sum_over
from optax_clipx._reductions.leaf_sums import can_go_by_parts, over_devices


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_value_is_summed(count):
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    shapes = [(2,), (2, 3), (2, 1, 2)][:count]
    given = [jnp.arange(np.prod(s), dtype=jnp.float32).reshape(s) for s in shapes]

    def on_each(*values):
        return over_devices(list(values), [("x",)] * count, sum_over)

    found = jax.shard_map(
        on_each, mesh=mesh, in_specs=(P("x"),) * count, out_specs=[P()] * count
    )(*given)
    for x, whole in zip(given, found, strict=True):
        np.testing.assert_array_equal(whole, x.sum(axis=0, keepdims=True))


def test_what_varies_over_nothing_stays():
    value = jnp.ones(3)
    assert over_devices([value], [()], sum_over)[0] is value


@pytest.mark.parametrize(
    ("size", "by_parts"), [(2**18 - 1, False), (2**18, True), (2**31, False)]
)
def test_only_large_leaves_that_int32_counts_go_by_parts(size, by_parts):
    leaf = jax.ShapeDtypeStruct((size,), jnp.float32)
    found = []
    jax.eval_shape(lambda x: found.append(can_go_by_parts([x])), leaf)
    assert found == [by_parts]
