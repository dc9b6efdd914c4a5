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


@pytest.mark.one_in(10)
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


@pytest.mark.parametrize("policy", ["zero", "propagate"])
def test_a_step_that_is_not_finite_leaves_no_trace(policy):
    tx = clipx.error_feedback(clipx.clip_by_global_norm(0.1, nonfinite=policy))
    update = jax.jit(tx.update)
    _, state = update(grads(0), tx.init(grads(0)))
    for bad in (np.nan, np.inf):
        spoiled = grads(1)
        spoiled["b"] = spoiled["b"].at[0].set(bad)
        _, after = update(spoiled, state)
        chex.assert_trees_all_equal(after.error, state.error)


# Where updates go on after a step that is not finite.
GO_ON = {
    "element": clipx.clip(1.0),
    "element sanitized": clipx.clip(1.0, nonfinite="sanitize"),
    "without metrics": clipx.clip(1.0, nonfinite="sanitize", metrics=False),
    "tree sanitized": clipx.clip_by_global_norm(1.0, nonfinite="sanitize"),
    "leaf sanitized": clipx.clip_by_leaf_norm(1.0, nonfinite="sanitize"),
    "optax": optax.clip(1.0),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", GO_ON)
def test_an_error_is_paid_out_once_however_many_steps_are_not_finite(name):
    tx = clipx.error_feedback(GO_ON[name])
    state, update, paid = tx.init(jnp.zeros(2)), jax.jit(tx.update), 0.0
    for gradient in [[10.0, 0.0], *[[0.0, np.nan]] * 30]:
        updates, state = update(jnp.array(gradient), state)
        paid += float(updates[0])
    assert paid == pytest.approx(10.0, rel=1e-6)
    np.testing.assert_allclose(state.error, [0.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("name", ["element", "element sanitized", "tree sanitized"])
def test_an_infinite_gradient_counts_as_zero(name):
    """What the clipper makes of it is taken back, and nothing else is paid again."""
    tx = clipx.error_feedback(GO_ON[name])
    state, paid = tx.init(jnp.zeros(2)), 0.0
    for gradient in [[10.0, 0.0], *[[0.0, np.inf]] * 3, *[[0.0, 0.0]] * 30]:
        updates, state = jax.jit(tx.update)(jnp.array(gradient), state)
        paid = paid + np.float64(updates)
    np.testing.assert_allclose(paid, [10.0, 0.0], atol=1e-5)


@pytest.mark.parametrize("metrics", [True, False])
def test_finite_entries_of_a_dropped_step(metrics):
    """They are dropped with it; without metrics it cannot be told that they were."""
    clipper = clipx.clip_by_global_norm(1.0, nonfinite="zero", metrics=metrics)
    tx = clipx.error_feedback(clipper)
    _, state = tx.update(jnp.array([3.0, 0.0]), tx.init(jnp.zeros(2)))
    updates, state = tx.update(jnp.array([5.0, jnp.nan]), state)
    assert updates.tolist() == [0.0, 0.0]
    assert state.error.tolist() == [2.0 if metrics else 7.0, 0.0]


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
