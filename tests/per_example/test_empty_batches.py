"""Batches without examples, as random sampling may draw them, in every mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import optax_clipx as clipx

PARAMS = {"w": jnp.ones(3), "b": jnp.float32(1.0)}
EMPTY = {"w": jnp.zeros((0, 3)), "b": jnp.zeros(0)}


def loss(params, x):
    return jnp.vdot(params["w"], x) + params["b"]


def loss_of_row(params, x):
    return loss(params, x[0])


def loss_and_double(params, x):
    return loss(params, x), 2 * x


MODES = {
    "one pass": {},
    "two passes": {"two_pass": True},
    "microbatches": {"two_pass": True, "microbatch_size": 4},
    "leaves": {"two_pass": True, "measure": clipx.measures.leaf_norms()},
    "mean": {"two_pass": True, "reduction": "mean"},
    "expected size": {"two_pass": True, "reduction": "mean", "batch_size": 8},
}


@pytest.mark.one_in(2, rest="slow")
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_an_empty_batch_gives_zeros(mode):
    grad_fn = jax.jit(clipx.per_example.clipped_grad(loss, 1.0, **mode))
    grads, found = grad_fn(PARAMS, jnp.zeros((0, 3)))
    assert_array_equal(grads["w"], [0, 0, 0])
    assert float(grads["b"]) == 0
    assert {n.shape for n in jax.tree.leaves(found.norms)} == {(0,)}
    assert not any(map(np.any, jax.tree.leaves(found.clipped)))
    assert (int(found.num_examples), int(found.num_nonfinite)) == (0, 0)


@pytest.mark.parametrize("two_pass", [False, True])
def test_an_empty_batch_with_a_mask_and_an_axis_of_length_one(two_pass):
    grad_fn = clipx.per_example.clipped_grad(
        loss_of_row, 1.0, two_pass=two_pass, keep_batch_dim=True
    )
    grads, _ = grad_fn(PARAMS, jnp.zeros((0, 3)), mask=jnp.zeros(0, bool))
    assert_array_equal(grads["w"], [0, 0, 0])


@pytest.mark.parametrize("two_pass", [False, True])
def test_what_the_function_returns_besides_is_empty(two_pass):
    grad_fn = clipx.per_example.clipped_grad(
        loss_and_double, 1.0, two_pass=two_pass, has_aux=True
    )
    _, found = grad_fn(PARAMS, jnp.zeros((0, 3)))
    assert found.aux.shape == (0, 3)


def test_the_global_clip_of_no_gradients_is_zero():
    total, num_clipped = clipx.per_example_global_norm_clip(EMPTY, 1.0)
    assert_array_equal(total["w"], [0, 0, 0])
    assert (total["b"].shape, int(num_clipped)) == ((), 0)


def test_the_layer_clip_of_no_gradients_is_zero():
    total, num_clipped = clipx.per_example_layer_norm_clip(EMPTY, 1.0)
    assert_array_equal(total["w"], [0, 0, 0])
    assert {k: int(n) for k, n in num_clipped.items()} == {"w": 0, "b": 0}


def test_no_gradients_under_a_limit_that_turned_out_nan():
    clip = jax.jit(clipx.per_example_global_norm_clip)
    assert np.isnan(clip(EMPTY, jnp.nan)[0]["w"]).all()


def test_empty_leaves_of_different_lengths_are_an_error():
    grads = {"w": jnp.zeros((0, 3)), "b": jnp.zeros((4, 0))}
    with pytest.raises(ValueError, match="as many in each"):
        clipx.per_example_global_norm_clip(grads, 1.0)
