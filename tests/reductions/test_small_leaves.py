"""Small leaves are put together for the norm of the tree, and only for that."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from xla_settings import OWN

import optax_clipx as clipx


def ones(*shapes, dtype=jnp.float32):
    return [jnp.ones(shape, dtype) for shape in shapes]


@pytest.mark.parametrize("around", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_the_norm_is_that_of_all_entries(around):
    # 70 * 4096 + 70 * 64 + 5000 + 81 = 296,281: two lots, and a leaf by itself.
    leaves = ones(*[(64, 64), (64,)] * 70, (5000,), (9, 9))
    found = around(clipx.functional.global_norm)(leaves)
    np.testing.assert_allclose(found, np.sqrt(296_281), rtol=1e-6)


def test_leaves_of_several_dtypes():
    leaves = [*ones((3,), (4,)), *ones((5,), (4,), dtype=jnp.bfloat16)]
    assert jax.jit(clipx.functional.global_norm)(leaves) == 4.0


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_squares_out_of_range(size):
    leaves = [size * x for x in ones((3,), (4, 4), (2, 3), (2000,))]
    found = jax.jit(clipx.functional.global_norm)(leaves)
    np.testing.assert_allclose(found, size * 45.0, rtol=1e-6)  # 2,025 entries


def test_a_nan_in_one_of_them_is_in_the_norm():
    leaves = [*ones((3,)), jnp.array([1.0, np.nan])]
    assert np.isnan(jax.jit(clipx.functional.global_norm)(leaves))


def test_the_derivative_is_that_of_each_leaf():
    slopes = jax.jit(jax.grad(clipx.functional.global_norm))(ones((4,), (3, 4)))
    for slope in slopes:
        np.testing.assert_allclose(slope, 0.25)


def test_bounds_that_differ_are_not_mixed_up():
    clipper = clipx.clip({"a": 1.0, "b": 2.0})
    updates = {"a": jnp.full(3, 5.0), "b": jnp.full(3, 5.0)}
    clipped, state = jax.jit(clipper.update)(updates, clipper.init(updates))
    np.testing.assert_array_equal(clipped["a"], [1.0] * 3)
    np.testing.assert_array_equal(clipped["b"], [2.0] * 3)
    found = clipx.metrics(state)
    np.testing.assert_allclose(found["clip/clipped_norm"], np.sqrt(15), rtol=1e-6)
    assert found["clip/clipped"] == 1.0


def test_many_leaves_are_summed_in_two_vectors():
    leaves = ones(*[(64, 64), (64,)] * 70)  # 291,200 entries, of which 262,144 fit
    text = jax.jit(clipx.functional.global_norm).lower(leaves).compile(OWN).as_text()
    sums = set(re.findall(r"f32\[(\d{4,})\]\{0\} concatenate", text))
    assert len(sums) == 2
    assert sum(map(int, sums)) == 291_200


@pytest.mark.parametrize(("platform", "joined"), [("cuda", True), ("tpu", False)])
def test_tpus_sum_each_leaf_by_itself(platform, joined):
    traced = jax.jit(clipx.functional.global_norm).trace(ones((64, 64), (64,)))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("tensor<4160xf32>" in text) == joined


def test_norms_of_leaves_take_each_by_itself():
    traced = jax.jit(clipx.functional.leaf_norms).trace(ones((64, 64), (64,)))
    assert "tensor<4160xf32>" not in traced.lower().as_text()


def test_gpus_sum_leaves_that_are_together_in_one_reduction():
    traced = jax.jit(clipx.functional.global_norm).trace(ones((64, 64), (64,)))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.reduce(") == 1
