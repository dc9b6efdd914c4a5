"""The gradient noise scale of a batch as a metric, against NumPy by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

import optax_clipx as clipx
from optax_clipx import per_example

X = np.random.default_rng(3).normal(2.0, 1.0, size=(8, 5))
PARAMS = {"a": jnp.zeros(3), "b": jnp.zeros(2)}


def loss(params, x):
    return jnp.vdot(params["a"], x[:3]) + jnp.vdot(params["b"], x[3:])


def by_hand(rows):
    """The covariance's trace, what the squared mean exceeds it by, and their ratio."""
    noise = np.trace(np.cov(rows, rowvar=False))
    signal = np.sum(rows.mean(0) ** 2) - noise / len(rows)
    return [noise / signal, signal, noise]


def estimated(rows, limit=jnp.inf, mask=None, **options):
    grad_fn = per_example.clipped_grad(loss, limit, noise_scale=True, **options)
    _, found = jax.jit(grad_fn)(PARAMS, jnp.asarray(rows, jnp.float32), mask=mask)
    return found.noise_scale


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "mean", "microbatch_size": 2},
        {"two_pass": True},
        {"measure": clipx.measures.leaf_norms()},
    ],
)
def test_it_is_that_of_the_gradients_of_the_examples(options):
    assert_allclose(estimated(X, **options), by_hand(X), rtol=2e-5)


@pytest.mark.parametrize("response", ["rescale", "drop", "biweight"])
def test_with_a_threshold_it_is_that_of_the_clipped_gradients(response):
    norms = np.linalg.norm(X, axis=1, keepdims=True)
    limit, scales = 5.0, {}
    scales["rescale"] = np.minimum(1, limit / norms)
    scales["drop"] = norms <= limit
    scales["biweight"] = np.maximum(0, 1 - (norms / limit) ** 2) ** 2
    found = estimated(X, limit, response=getattr(clipx.responses, response))
    assert np.any(norms > limit)
    assert_allclose(found, by_hand(X * scales[response]), rtol=2e-5)


def test_padding_is_left_out_and_what_is_not_finite_adds_nothing():
    rows = X.copy()
    rows[2, 1] = np.nan
    found = estimated(rows, mask=jnp.arange(8) < 6)
    rows[2] = 0
    assert_allclose(found, by_hand(rows[:6]), rtol=2e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_devices_of_a_shard_map_agree_on_that_of_the_whole_batch(check_vma):
    options = {} if check_vma else {"axis_name": "x"}
    grad_fn = per_example.clipped_grad(loss, 5.0, noise_scale=True, **options)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    step = jax.shard_map(
        lambda params, x: grad_fn(params, x)[1].noise_scale,
        mesh=mesh,
        in_specs=(P(), P("x")),
        out_specs=P(),
        check_vma=check_vma,
    )
    found = jax.jit(step)(PARAMS, jnp.asarray(X, jnp.float32))
    scales = np.minimum(1, 5 / np.linalg.norm(X, axis=1, keepdims=True))
    assert_allclose(found, by_hand(X * scales), rtol=2e-5)


@pytest.mark.parametrize("unit", [1e25, 1e-25])
def test_the_ratio_is_right_where_squares_are_out_of_range(unit):
    assert_allclose(estimated(X * unit).scale, by_hand(X)[0], rtol=2e-5)


def test_a_history_has_columns_of_it():
    grad_fn = per_example.clipped_grad(loss, jnp.inf, noise_scale=True)
    history = clipx.History()
    for step in range(2):
        found = grad_fn(PARAMS, jnp.asarray(X * (1 + step), jnp.float32))[1]
        history.append(step, per_example.metrics(found))
    ratio, signal, noise = by_hand(X)
    assert_allclose(history["examples/noise_scale"], [ratio, ratio], rtol=2e-5)
    assert_allclose(history["examples/signal"], [signal, 4 * signal], rtol=2e-5)
    assert_allclose(history["examples/noise"], [noise, 4 * noise], rtol=2e-5)
    assert_allclose(history["examples/num_examples"], [8, 8])


def test_without_the_option_nothing_is_estimated():
    grad_fn = jax.jit(per_example.clipped_grad(loss, 1e-3))
    found = grad_fn(PARAMS, jnp.asarray(X, jnp.float32))[1]
    assert found.noise_scale is None
    assert sorted(per_example.metrics(found, "batch")) == [
        "batch/clipped",
        "batch/num_examples",
        "batch/num_nonfinite",
    ]


def test_leaves_that_are_clipped_by_themselves_have_a_fraction_each():
    leaves = clipx.measures.leaf_norms()
    grad_fn = per_example.clipped_grad(loss, 1e-3, measure=leaves)
    found = grad_fn(PARAMS, jnp.asarray(X, jnp.float32))[1]
    read = per_example.metrics(found)
    assert read["examples/clipped/a"] == read["examples/clipped/b"] == 1


def test_norms_of_another_order_are_refused():
    make = functools.partial(per_example.clipped_grad, loss, 1.0, noise_scale=True)
    with pytest.raises(ValueError, match="2-norms beside noise_scale=True, got ord=1"):
        make(measure=clipx.measures.tree_norm(1))
    with pytest.raises(TypeError, match=r"ClippedExamples .* got tuple"):
        per_example.metrics((1, 2))
