"""The slack of the bound: its sensitivity, and what it says of the norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import optax_clipx as clipx

slack_indicator = clipx.per_example.slack_indicator


@jax.jit
def both_sums(batch, mask):
    """The clipped gradients and the slack of some examples, as one vector."""
    grad_fn = clipx.per_example.clipped_grad(jnp.dot, 1.5)
    total, found = grad_fn(jnp.zeros(5), batch, mask=mask)
    slack = slack_indicator(found.norms, 1.5, 8, mask=mask)
    return jnp.concatenate([total, slack])


def exact(norm, limit, size):
    """The numbers of one example, in float64."""
    left = np.floor(size * (1 - min(norm / limit, 1) ** 2))
    return np.where(np.arange(1, size + 1) <= left, limit / np.sqrt(size), 0.0)


@settings(max_examples=50, deadline=None)
@given(
    ratio=st.one_of(st.floats(0, 2), st.integers(0, 64).map(lambda k: (k / 64) ** 0.5)),
    limit=st.floats(1e-3, 1e3),
    size=st.sampled_from([1, 4, 16, 64]),
)
def test_an_example_and_its_slack_stay_within_the_bound(ratio, limit, size):
    norm = np.float32(ratio * limit)
    slack = np.float64(slack_indicator(jnp.array([norm]), np.float32(limit), size))
    clipped = min(float(norm), float(np.float32(limit)))
    assert np.hypot(clipped, np.linalg.norm(slack)) <= np.float32(limit) * (1 + 1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 100))
def test_adding_an_example_moves_both_sums_by_the_bound_at_most(seed, scale):
    """The sensitivity, measured on the sums themselves."""
    x = jax.random.normal(jax.random.key(seed), (6, 5)) * scale
    everyone = np.float64(both_sums(x, jnp.ones(6, bool)))
    for left_out in range(6):
        others = np.float64(both_sums(x, jnp.arange(6) != left_out))
        assert np.linalg.norm(everyone - others) <= 1.5 * (1 + 1e-5)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([1, 5, 32]))
def test_the_sum_against_float64(seed, size):
    norms = np.float32(np.random.default_rng(seed).exponential(size=20))
    levels = size * (1 - np.minimum(np.float64(norms) / 1.25, 1) ** 2)
    near_one = np.abs(levels - np.round(levels)) < 1e-5  # where rounding decides
    norms = norms[~near_one | (norms > 1.25)]
    want = sum(exact(float(n), 1.25, size) for n in norms)
    found = slack_indicator(jnp.asarray(norms), 1.25, size)
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_it_counts_the_norms_below_each_level():
    norms = jnp.linspace(0, 2, 1001)
    slack = slack_indicator(norms, 1.0, 4) * 2 / 1001
    levels = np.sqrt(1 - np.arange(1, 5) / 4)
    want = [np.mean(np.asarray(norms) <= level) for level in levels]
    np.testing.assert_allclose(slack, want, atol=2e-3)


def test_padding_and_what_is_not_finite_add_nothing():
    norms = jnp.array([0.0, jnp.nan, jnp.inf, 0.0])
    mask = jnp.array([True, True, True, False])
    found = jax.jit(slack_indicator, static_argnums=2)(norms, 2.0, 4, mask=mask)
    np.testing.assert_array_equal(found, [1, 1, 1, 1])


def test_a_threshold_of_zero_leaves_nothing_and_a_negative_one_is_nan():
    assert not np.any(slack_indicator(jnp.ones(2), 0.0, 3))
    traced = jax.jit(slack_indicator, static_argnums=2)(jnp.ones(2), -1.0, 3)
    assert np.all(np.isnan(traced))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((jnp.ones((2, 2)), 1.0), r"shape \(2, 2\)"),
        ((jnp.ones(2), -1.0), "max_norm >= 0"),
        ((jnp.ones(2), 1.0, 0), "size"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        slack_indicator(*arguments)
