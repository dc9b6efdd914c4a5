"""Thresholds for another batch size, and the gradient noise scale."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

import optax_clipx as clipx

rescaled = clipx.thresholds.rescaled_for_batch
noise_scale = clipx.thresholds.noise_scale

SIZES = st.integers(1, 100_000)
NORMS = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


@settings(deadline=None)
@given(limit=st.floats(0, 1e6), old=SIZES, new=SIZES, scale=st.floats(0, 1e8))
def test_the_formula(limit, old, new, scale):
    want = limit * np.sqrt((1 + scale / new) / (1 + scale / old))
    np.testing.assert_allclose(rescaled(limit, old, new, scale), want, rtol=1e-5)


def test_without_a_noise_scale_noise_alone_counts():
    assert rescaled(1.0, 256, 1024) == 0.5
    assert rescaled(1.0, 256, 1024, float("inf")) == 0.5
    assert rescaled(1.0, 256, 1024, 0.0) == 1


def test_norms_of_another_size_meet_the_new_threshold_as_often():
    rng = np.random.default_rng(0)
    examples = rng.normal(0.2, 1.0, size=(2000, 64, 30))  # |G|^2 1.2, noise 30
    before = np.linalg.norm(examples[:, :16].mean(1), axis=1)
    after = np.linalg.norm(examples.mean(1), axis=1)
    limit = np.sqrt(np.mean(before**2))
    new = rescaled(float(limit), 16, 64, 30 / 1.2)
    np.testing.assert_allclose(new, np.sqrt(np.mean(after**2)), rtol=0.01)


def test_the_kind_of_the_threshold_is_kept():
    schedule = rescaled(lambda step: 2.0 - step, 1, 4)
    assert (schedule(0), schedule(1)) == (1.0, 0.5)
    array = rescaled(jnp.float32(2), 1, 4)
    assert isinstance(array, jax.Array)
    assert array == 1
    rule = rescaled(clipx.thresholds.constant(2.0), 1, 4)
    prefix = rescaled({"a": 2.0, "b": 4.0}, 1, 4)
    grads = {"a": jnp.array([9.0]), "b": jnp.array([9.0])}
    for threshold, want in ((rule, (1, 1)), (prefix, (1, 2))):
        clipper = clipx.clip_by(clipx.measures.leaf_norms(), threshold)
        clipped, _ = clipper.update(grads, clipper.init(grads))
        assert (clipped["a"], clipped["b"]) == want


def test_it_takes_traced_numbers():
    assert jax.jit(rescaled)(1.0, 256, 1024, 256.0) == np.float32(np.sqrt(1.25 / 2))


def test_it_makes_the_threshold_of_a_chain():
    tx = optax.chain(clipx.clip_by_global_norm(rescaled(1.0, 1, 4)), optax.sgd(1.0))
    updates, _ = tx.update(jnp.array([9.0]), tx.init(jnp.zeros(1)))
    assert updates == -0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rescaled(1.0, 0, 4), "above 0, got old=0"),
        (lambda: rescaled(1.0, 4, -1), "new"),
        (lambda: rescaled(1.0, 4, 8, -1.0), "noise_scale"),
        (lambda: rescaled(-1.0, 4, 8), "limit >= 0"),
        (lambda: noise_scale(1.0, 1.0, 8, 8), "small < large, got 8 and 8"),
        (lambda: clipx.per_example.noise_scale(jnp.ones(1), 1.0), r"shape \(1,\)"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@settings(max_examples=25, deadline=None)
@given(NORMS, NORMS, st.integers(1, 64), st.integers(65, 999), st.integers(-15, 15))
def test_the_estimates(small_norms, large_norms, small, large, power):
    unit = 2.0**power
    s, b = (
        np.mean(np.float32(n).astype(float) ** 2) for n in (small_norms, large_norms)
    )
    signal = (large * b - small * s) / (large - small)
    noise = (s - b) / (1 / small - 1 / large)
    found = noise_scale(
        jnp.float32(small_norms) * unit, jnp.float32(large_norms) * unit, small, large
    )
    tolerance = 1e-5 * max(s, b)
    assert abs(found.signal / unit**2 - signal) <= tolerance * large / (large - small)
    assert abs(found.noise / unit**2 - noise) <= tolerance * 2 * small * large
    if signal > 1e-2 * max(s, b):
        assert abs(found.scale - noise / signal) <= 1e-2 * (1 + abs(noise / signal))


def test_no_signal_is_an_infinite_scale():
    found = noise_scale(1.0, 0.1, 1, 4)
    assert found.signal < 0
    assert found.scale == jnp.inf


def test_gradients_of_zero_have_neither_signal_nor_noise():
    assert noise_scale(0.0, 0.0, 1, 4) == (jnp.inf, 0, 0)


def test_the_scale_is_right_where_squares_are_out_of_range():
    for unit in (1e25, 1e-25):
        found = noise_scale(jnp.array([3.0, 3.0]) * unit, 2 * unit, 8, 32)
        np.testing.assert_allclose(found.scale, 160 / 7, rtol=1e-5)


def test_the_estimates_are_unbiased():
    rng = np.random.default_rng(1)
    examples = jnp.asarray(rng.normal(0.5, 2.0, size=(4000, 8, 10)), jnp.float32)

    def one(batch):
        norms = jnp.linalg.norm(batch, axis=1)
        return clipx.per_example.noise_scale(norms, jnp.linalg.norm(batch.mean(0)))

    found = jax.jit(jax.vmap(one))(examples)
    assert np.mean(found.signal) == pytest.approx(2.5, rel=0.1)
    assert np.mean(found.noise) == pytest.approx(40, rel=0.02)


def test_padding_and_examples_that_are_not_finite():
    gradients = np.array([[1.0, 2], [3, -1], [0, 0], [9, 9]])  # a NaN; padding
    n = np.array([np.sqrt(5), np.sqrt(10), np.nan, 5.0])
    mean = np.linalg.norm(gradients[:3].mean(0))
    mask = jnp.array([True, True, True, False])
    found = jax.jit(clipx.per_example.noise_scale)(jnp.float32(n), mean, mask)
    signal = (3 * mean**2 - 5) / 2
    noise = (5 - mean**2) * 1.5
    np.testing.assert_allclose(found, [noise / signal, signal, noise], rtol=1e-5)


def test_the_norms_of_clipped_grad():
    x = jnp.array([[1.0, 2.0], [3.0, -1.0], [2.0, 2.0]])
    grad_fn = clipx.per_example.clipped_grad(jnp.dot, jnp.inf, reduction="mean")
    mean, norms = jax.jit(grad_fn)(jnp.zeros(2), x)
    found = clipx.per_example.noise_scale(norms.norms, np.linalg.norm(mean))
    cov = np.cov(np.asarray(x), rowvar=False)
    np.testing.assert_allclose(found.noise, np.trace(cov), rtol=1e-5)


def test_one_of_both_sizes_may_be_traced():
    found = jax.jit(lambda small: noise_scale(3.0, 1.0, small, 4))(1.0)
    np.testing.assert_allclose(found, noise_scale(3.0, 1.0, 1.0, 4), rtol=1e-6)
