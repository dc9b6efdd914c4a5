"""Clipping can be differentiated: finite at zero, right above and below the limit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from all_methods import ALL_METHODS, ELEMENT_METHODS

import optax_clipx as clipx


def every_method(start=0):
    """A table of all, from one of them on: each table takes others as usual cases."""
    methods = [*ALL_METHODS.items()]
    names, makers = zip(*methods[start:], *methods[:start], strict=True)
    return pytest.mark.parametrize("make", makers, ids=names)


PARAMS = {"w": jnp.full((2, 2), 2.0), "b": jnp.full((3,), 2.0)}


def objective(make, limit=1.0):
    weights = {
        "w": jnp.array([[1.0, -2.0], [0.5, 3.0]]),
        "b": jnp.array([1.0, 2.0, -1.0]),
    }

    def fun(updates):
        clipped, _ = make(limit).update(updates, None, PARAMS)
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, weights, clipped)))

    return fun


@pytest.mark.one_in(4, rest="slow")
@every_method()
def test_finite_at_zero(make):
    @jax.jit
    def derivatives(x, limit):
        fun = objective(make, limit)
        return jax.grad(fun)(x), jax.jacfwd(fun)(x)

    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    for limit in (0.0, 1.0):
        found = derivatives(zeros, jnp.float32(limit))
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))


@pytest.mark.one_in(4, rest="slow")
@every_method(start=2)
def test_equals_finite_differences(make):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        unit = jax.tree.map(lambda p: rng.normal(size=p.shape), PARAMS)
        direction = jax.tree.map(lambda p: rng.normal(size=p.shape), PARAMS)
        fun = jax.jit(jax.value_and_grad(objective(make)))
        for size in (0.01, 10.0):
            step = 1e-6 * size
            updates = jax.tree.map(lambda u, size=size: size * u, unit)
            ends = [
                jax.tree.map(lambda u, d, h=h: u + h * d, updates, direction)
                for h in (step, -step)
            ]
            numeric = (fun(ends[0])[0] - fun(ends[1])[0]) / (2 * step)
            _, gradient = fun(updates)
            exact = sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, direction)))
            np.testing.assert_allclose(exact, numeric, rtol=1e-4, atol=1e-8)


def norm_of(x):
    return clipx.functional.global_norm([x])


SLOPES_OF_THE_NORM = jax.jit(lambda x: (jax.grad(norm_of)(x), jax.jacfwd(norm_of)(x)))


@pytest.mark.one_in(4, rest="slow")
@pytest.mark.parametrize("scale", [10.0**k for k in range(-36, 38, 2)])
def test_of_the_norm_at_any_magnitude(scale):
    x = jnp.array([3.0, 4.0]) * scale
    for found in SLOPES_OF_THE_NORM(x):
        np.testing.assert_allclose(found, [0.6, 0.8], rtol=1e-5)


def test_with_respect_to_the_limit():
    def fun(limit):
        clipped, _ = clipx.functional.clip_by_global_norm(
            [jnp.array([30.0, 40.0])], limit
        )
        return jnp.sum(clipped[0])

    np.testing.assert_allclose(jax.grad(fun)(5.0), 1.4, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(fun)(50.1), 0.0, atol=1e-7)
    assert np.isfinite(jax.grad(fun)(0.0))


@pytest.mark.parametrize("make", ELEMENT_METHODS.values(), ids=ELEMENT_METHODS.keys())
def test_the_clamp_passes_gradients_inside_only(make):
    fun = lambda x: jnp.sum(make(1.0).update(x)[0])  # noqa: E731
    found = jax.grad(fun)(jnp.array([0.5, 2.0, -3.0]))
    np.testing.assert_array_equal(found, [1.0, 0.0, 0.0])


def test_meta_gradient_through_a_training_step():
    """The derivative of the loss after two clipped steps by the learning rate."""
    with jax.enable_x64(True):

        def loss(w):
            return jnp.sum((w - jnp.array([3.0, -1.0])) ** 2)

        @jax.jit
        def after(learning_rate):
            tx = optax.chain(clipx.clip_by_global_norm(1.0), optax.sgd(learning_rate))
            w = jnp.zeros(2)
            state = tx.init(w)
            for _ in range(2):
                updates, state = tx.update(jax.grad(loss)(w), state, w)
                w = optax.apply_updates(w, updates)
            return loss(w)

        h = 1e-6
        numeric = (after(0.1 + h) - after(0.1 - h)) / (2 * h)
        slope = jax.jit(jax.grad(after))(0.1)
        np.testing.assert_allclose(slope, numeric, rtol=1e-6)


def test_the_slope_of_a_root_mean_square():
    # rms(x) = |x| / sqrt(n), so its slope is x / (n rms(x)).
    clipper = clipx.clip_by(clipx.measures.tree_norm(ord="rms"), np.inf)

    def norm(x):
        return clipx.metrics(clipper.update(x, clipper.init(x))[1])["clip/norm"]

    x = jnp.array([1.0, 1.0, 3.0, 5.0])  # rms 3
    np.testing.assert_allclose(jax.grad(norm)(x), x / 12, rtol=1e-6)
