"""Microbatches of every size of a batch that is sharded over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from numpy.testing import assert_allclose
from versions import MESH_OF_TRACED

import optax_clipx as clipx

EXAMPLES = 16  # over 4 devices; gradients (3, 4) for each but one, which is NaN
SUM = [0.6 * 15, 0.8 * 15]


def loss(params, x):
    return jnp.vdot(params, x)


def on_mesh(kind, value, *spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    return jax.device_put(value, NamedSharding(mesh, P(*spec)))


def batch(kind):
    x = jnp.tile(jnp.array([3.0, 4.0]), (EXAMPLES, 1)).at[5].set(jnp.nan)
    return on_mesh(kind, x, "x")


def clipped(kind, **options):
    grad_fn = jax.jit(clipx.per_example.clipped_grad(loss, 1.0, **options))
    return grad_fn(on_mesh(kind, jnp.zeros(2)), batch(kind))


@MESH_OF_TRACED
@pytest.mark.one_in(2, rest="slow")
@pytest.mark.parametrize("two_pass", [False, True])
@pytest.mark.parametrize("microbatch_size", [None, 4, 8, 16])
def test_sizes_that_divide_over_explicit_axes(microbatch_size, two_pass):
    grads, found = clipped(
        AxisType.Explicit, microbatch_size=microbatch_size, two_pass=two_pass
    )
    assert_allclose(grads, SUM, rtol=1e-6)
    assert int(found.num_nonfinite) == 1


@pytest.mark.one_in(2)
@pytest.mark.parametrize("two_pass", [False, True])
@pytest.mark.parametrize("microbatch_size", [1, 2])
def test_every_size_over_auto_axes(microbatch_size, two_pass):
    grads, _ = clipped(
        AxisType.Auto, microbatch_size=microbatch_size, two_pass=two_pass
    )
    assert_allclose(grads, SUM, rtol=1e-6)


@MESH_OF_TRACED
@pytest.mark.parametrize("two_pass", [False, True])
def test_other_sizes_over_explicit_axes_name_those_that_work(two_pass):
    with pytest.raises(ValueError, match=r"multiple of the 4 devices.*work: 4 and 8"):
        clipped(AxisType.Explicit, microbatch_size=6, two_pass=two_pass)


def test_sizes_that_do_not_divide_name_those_that_do():
    grad_fn = clipx.per_example.clipped_grad(loss, 1.0, microbatch_size=5)
    with pytest.raises(ValueError, match=r"got microbatch_size=5.*work: 4 and 6"):
        grad_fn(jnp.zeros(2), jnp.ones((12, 2)))


@MESH_OF_TRACED
def test_a_mask_on_no_mesh_beside_an_explicit_batch():
    grad_fn = clipx.per_example.clipped_grad(loss, 1.0, two_pass=True)
    grads, found = jax.jit(grad_fn)(
        on_mesh(AxisType.Explicit, jnp.zeros(2)),
        batch(AxisType.Explicit),
        mask=np.arange(EXAMPLES) < 10,
    )
    assert_allclose(grads, [0.6 * 9, 0.8 * 9], rtol=1e-6)
    assert int(found.num_examples) == 10


@MESH_OF_TRACED
def test_random_keys_in_an_explicit_batch():
    def fun(params, key, x):
        return loss(params, x) + 0 * jax.random.uniform(key)

    keys = on_mesh(AxisType.Explicit, jax.random.split(jax.random.key(0), 16), "x")
    grad_fn = clipx.per_example.clipped_grad(
        fun, 1.0, batch_argnums=(1, 2), two_pass=True
    )
    grads, _ = jax.jit(grad_fn)(
        on_mesh(AxisType.Explicit, jnp.zeros(2)), keys, batch(AxisType.Explicit)
    )
    assert_allclose(grads, SUM, rtol=1e-6)


@MESH_OF_TRACED
def test_an_empty_explicit_batch():
    grad_fn = clipx.per_example.clipped_grad(loss, 1.0, two_pass=True)
    explicit = AxisType.Explicit
    grads, _ = jax.jit(grad_fn)(
        on_mesh(explicit, jnp.zeros(2)), on_mesh(explicit, jnp.zeros((0, 2)), "x")
    )
    assert_allclose(grads, [0, 0])
