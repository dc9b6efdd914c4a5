"""The derivative of a maximum over devices, which the norm of order inf needs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from numpy.testing import assert_allclose
from versions import EXPLICIT

import optax_clipx as clipx

ENTRIES = jnp.arange(8.0)
# x / 7 * 2: by the fourth entry 2/7, and by the largest one -3 * 2 / 49.
WANT = [0, 0, 0, 2 / 7, 0, 0, 0, -6 / 49]


def fourth(x):
    return clipx.clip_by_global_norm(2.0, ord=jnp.inf).update(x)[0][3]


def test_on_one_device():
    assert_allclose(jax.grad(fourth)(ENTRIES), WANT, atol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, EXPLICIT])
def test_under_jit(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    placed = jax.device_put(ENTRIES, NamedSharding(mesh, P("x")))

    def picked(x):
        clipper = clipx.clip_by_global_norm(2.0, ord=jnp.inf)
        return jnp.sum(jnp.where(jnp.arange(8) == 3, clipper.update(x)[0], 0))

    assert_allclose(jax.jit(jax.grad(picked))(placed), WANT, atol=1e-6)


def test_in_shard_map():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    clipper = clipx.clip_by_global_norm(2.0, ord=jnp.inf)
    update = jax.shard_map(
        lambda x: clipper.update(x)[0], mesh=mesh, in_specs=P("x"), out_specs=P("x")
    )
    found = jax.jit(jax.grad(lambda x: update(x)[3]))(ENTRIES)
    assert_allclose(found, WANT, atol=1e-6)
