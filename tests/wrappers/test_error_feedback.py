"""What is cut off comes back, and nothing else does."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import optax_clipx as clipx

CLIPPERS = {
    "tree": clipx.clip_by_global_norm(1.0),
    "leaf": clipx.clip_by_leaf_norm(0.5),
    "element": clipx.clip(0.3),
    "optax": optax.clip_by_global_norm(1.0),
    "zclip": clipx.zclip(warmup_steps=2),
}


def grads(i, dtype=jnp.float32):
    rng = np.random.default_rng(i)
    return {"a": jnp.asarray(rng.normal(size=(3, 2)), dtype), "b": jnp.ones(2, dtype)}


@pytest.mark.parametrize("name", CLIPPERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_and_error_add_up_to_the_gradients(name, dtype):
    tx = clipx.error_feedback(CLIPPERS[name])
    state = tx.init(grads(0, dtype))
    update, total, given = jax.jit(tx.update), 0.0, 0.0
    for i in range(8):
        clipped, new = update(grads(i, dtype), state)
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
        state = new
        total = total + np.float64(clipped["a"])
        given = given + np.float64(grads(i, dtype)["a"])
    np.testing.assert_allclose(total + np.float64(state.error["a"]), given, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("policy", ["zero", "propagate"])
def test_a_step_that_is_not_finite_leaves_no_trace(bad, policy):
    tx = clipx.error_feedback(clipx.clip_by_global_norm(0.1, nonfinite=policy))
    _, state = tx.update(grads(0), tx.init(grads(0)))
    spoiled = grads(1)
    spoiled["b"] = spoiled["b"].at[0].set(bad)
    _, after = tx.update(spoiled, state)
    chex.assert_trees_all_equal(after.error, state.error)


def test_the_bias_of_clipping_vanishes():
    """Targets 9, 0, 0 with gradients clipped to 1: the mean is 3, the median 0."""
    targets = jnp.array([9.0, 0.0, 0.0])

    def descend(clipper, steps=30_000):
        tx = optax.chain(clipper, optax.sgd(0.002))

        def step(carry, i):
            x, state = carry
            g = x - targets[i % 3]
            u, state = tx.update(g[None], state)
            x = x + u[0]
            return (x, state), x

        start = (jnp.float32(1.0), tx.init(jnp.zeros(1)))
        return lax.scan(step, start, jnp.arange(steps))[1][-3000:].mean()

    plain = clipx.clip_by_global_norm(1.0)
    assert abs(descend(plain) - 0.5) < 0.02
    with_feedback = clipx.error_feedback(clipx.clip_by_global_norm(4.0))
    assert abs(descend(with_feedback) - 3.0) < 0.05


def test_bad_input():
    with pytest.raises(TypeError, match="clipper"):
        clipx.error_feedback(3.0)
