"""Tukey's biweight: a smooth response that lets outliers fall back to zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import optax_clipx as clipx
from optax_clipx.responses import biweight

ENTRIES = clipx.clip_by(clipx.measures.magnitudes(), 2.0, biweight)


def in_float64(n, t):
    """The scale by the formula, from the numbers that float32 holds."""
    n, t = np.longdouble(np.float32(n)), np.longdouble(np.float32(t))
    return np.where(n < t, (1 - (n / t) ** 2) ** 2, 0)


@settings(max_examples=30, deadline=None)
@given(st.floats(-30, 30), st.floats(-6, 0.1))
def test_the_scale_is_that_of_float64_at_any_magnitude(power, distance):
    limit = np.float32(10.0**power)
    norm = np.float32(limit * (1 - 10.0**distance))
    norms = np.array([abs(norm), limit / 3, 2 * limit], np.float32)
    found = jax.jit(biweight)(norms, jnp.full(3, limit))
    assert_allclose(found, in_float64(norms, limit).astype(float), rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-9, 9, width=32), min_size=4, max_size=4))
def test_single_entries_are_those_of_float64(values):
    entries = np.array(values, np.float32)
    want = entries * in_float64(np.abs(entries), 2.0).astype(float)
    assert_allclose(ENTRIES.update(jnp.array(entries))[0], want, rtol=1e-5, atol=1e-37)


def test_large_entries_are_pushed_back_to_zero():
    clipped, state = ENTRIES.update(jnp.array([0.5, 1.0, 1.9, 2.0, -1.0, 1e30]))
    assert_allclose(clipped, [0.439453, 0.5625, 0.018062, 0, -0.5625, 0], rtol=1e-4)
    assert_allclose(state.metrics.clipped, 1 / 6, rtol=1e-6)


def test_the_largest_entry_that_remains_is_at_the_threshold_over_root_5():
    entries = jnp.linspace(0.0, 2.0, 2001)
    clipped, _ = ENTRIES.update(entries)
    assert_allclose(jnp.max(clipped), 2 * 16 / (25 * np.sqrt(5)), rtol=1e-5)
    assert_allclose(entries[jnp.argmax(clipped)], 2 / np.sqrt(5), atol=1e-3)


def test_the_derivative_is_finite_at_zero_and_has_no_corner_at_the_threshold():
    slopes = jax.vmap(jax.grad(lambda g: ENTRIES.update(g[None])[0][0]))
    found = jax.jit(slopes)(jnp.array([0.0, 1.0, 2.0, 3.0]))
    assert_allclose(found, [1, -0.1875, 0, 0], atol=1e-6)


def test_a_zero_norm_and_an_infinite_threshold_change_nothing():
    norms = jnp.array([0.0, 0.0, 0.0, 1.0, jnp.inf, 3.0, jnp.inf, jnp.inf])
    limits = jnp.array([0.0, 2.0, jnp.nan, jnp.inf, jnp.inf, 0.0, 0.0, 2.0])
    assert_array_equal(biweight(norms, limits), [1, 1, 1, 1, 1, 0, 0, 0])
    slopes = jax.vmap(jax.grad(biweight, (0, 1)))(norms, limits)
    assert_array_equal(slopes, np.zeros((2, 8)))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_follows_the_policy(bad):
    grads = jnp.array([bad, 1.0])
    tree = clipx.clip_by(clipx.measures.tree_norm(), 2.0, biweight)
    assert np.all(np.isnan(tree.update(grads)[0]))
    for measure in (clipx.measures.tree_norm(), clipx.measures.magnitudes()):
        clipper = clipx.clip_by(measure, 2.0, biweight, nonfinite="zero")
        assert_array_equal(clipper.update(grads)[0], [0, 0])


def test_raw_statistics_let_an_entry_return_that_grew_for_good():
    returned = {}
    for stats in ("raw", "clipped"):
        clipper = clipx.clip_by_second_moment(
            4.685**2,
            decay=0.9,
            debias=True,
            warmup_steps=1,
            stats=stats,
            response=biweight,
        )
        state, step = clipper.init(jnp.zeros(1)), jax.jit(clipper.update)
        for size in [1.0] * 20 + [10.0] * 40:
            clipped, state = step(jnp.array([size]), state)
        returned[stats] = float(clipped[0])
    assert returned["clipped"] == 0
    assert_allclose(returned["raw"], 10 * (1 - 1 / 4.685**2) ** 2, rtol=0.01)


RESPONSES = ("rescale", "normalize", "smooth", "drop", "biweight")


@pytest.mark.parametrize("name", RESPONSES)
def test_integers_are_taken_as_floats(name):
    response = getattr(clipx.responses, name)
    norms, limits = jnp.array([0, 1, 3, 4]), jnp.array([0, 2, 4, 2])
    want = response(norms.astype(jnp.float32), limits.astype(jnp.float32))
    assert want[1] > 0
    for found in (
        response(norms, limits),
        response(norms, limits.astype(jnp.float32)),
        response(norms.astype(jnp.float32), limits),
        jnp.stack(
            [response(int(n), float(t)) for n, t in zip(norms, limits, strict=True)]
        ),
        jnp.stack([response(int(n), t) for n, t in zip(norms, limits, strict=True)]),
    ):
        assert found.dtype == jnp.float32
        assert_array_equal(found, want)
    narrow = response(norms.astype(jnp.bfloat16), limits)
    assert narrow.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", RESPONSES)
def test_an_infinite_threshold_changes_no_norm_and_a_zero_norm_is_not_changed(name):
    response = getattr(clipx.responses, name)
    norms = jnp.array([0.0, 1.0, 3e38, jnp.inf])
    assert_array_equal(response(norms, jnp.full(4, jnp.inf)), np.ones(4))
    assert response(jnp.zeros(1), jnp.zeros(1)) == 1


@pytest.mark.parametrize("name", RESPONSES)
def test_a_finite_norm_never_makes_nan(name):
    ends = jnp.array([0.0, 1e-45, 1e-38, 1.0, 3e38, jnp.inf])
    norms, limits = (x.ravel() for x in jnp.meshgrid(ends[:-1], ends))
    scales = getattr(clipx.responses, name)(norms, limits)
    assert not np.any(np.isnan(scales))


def test_a_number_of_python_takes_the_dtype_of_the_other():
    assert biweight(1, jnp.float16(2)).dtype == jnp.float16
    assert biweight(jnp.float16(1), 2).dtype == jnp.float16
