"""Mistakes that were made once."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_clipx as clipx


@pytest.mark.one_in(10)
@pytest.mark.parametrize(
    ("size", "limit"), [(1e25, 1.0), (1e-21, 1e-22), (1e-25, 1e-26), (1e30, 1e-5)]
)
@pytest.mark.parametrize(
    "response", [clipx.responses.rescale, clipx.responses.normalize]
)
@pytest.mark.parametrize(
    "measure", [clipx.measures.tree_norm(), clipx.measures.leaf_norms()]
)
def test_the_derivative_of_a_quotient_does_not_square_the_norm(
    size, limit, response, measure
):
    weights = jnp.array([1.0, 2.0])
    clipper = clipx.clip_by(measure, limit, response)
    x = jnp.array([3.0, 4.0]) * np.float32(size)
    slope = jax.grad(lambda v: jnp.vdot(clipper.update(v)[0], weights))
    found = jax.jit(slope)(x)
    # weights minus their part along x, times limit over norm
    unit = np.array([0.6, 0.8])
    want = (np.array([1.0, 2.0]) - 2.2 * unit) * limit / (5 * size)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6 * abs(want).max())


@pytest.mark.parametrize("make", [clipx.responses.rescale, clipx.responses.smooth])
def test_a_limit_of_zero_and_a_tiny_norm_have_a_finite_gradient(make):
    clipper = clipx.clip_by(clipx.measures.tree_norm(), 0.0, make)
    found = jax.grad(lambda v: jnp.sum(clipper.update(v)[0]))(jnp.full((2,), 2e-30))
    assert np.all(np.isfinite(found))


def test_parameters_that_are_not_finite():
    grads = jnp.array([[3.0, 3.0], [4.0, 4.0]])
    infinite, lost = (jnp.ones((2, 2)).at[0, 0].set(x) for x in (jnp.inf, jnp.nan))
    clipper = clipx.adaptive_grad_clip(1.0)
    np.testing.assert_array_equal(
        clipper.update(grads, None, infinite)[0][:, 0], [3, 4]
    )
    assert np.all(np.isnan(clipper.update(grads, None, lost)[0]))


def test_single_entries_far_above_their_limit():
    for response in (clipx.responses.rescale, clipx.responses.smooth):
        clipper = clipx.clip_by(clipx.measures.magnitudes(), 1e-10, response)
        x = jnp.array([1e37 + 0j, 1e-3 + 0j], jnp.complex64)
        np.testing.assert_allclose(np.abs(clipper.update(x)[0]), 1e-10, rtol=1e-5)


def test_normalizing_a_tiny_norm_stays_finite():
    clipper = clipx.clip_by(clipx.measures.tree_norm(), 1e3, clipx.responses.normalize)
    clipped, _ = clipper.update(jnp.array([2e-38, 0.0]))
    assert np.all(np.isfinite(clipped))
    assert float(clipped[0]) > 0
    assert float(clipped[1]) == 0


@pytest.mark.parametrize("norm", [jnp.nan, jnp.inf])
def test_sanitized_updates_are_measured_anew(norm):
    clipper = clipx.clip_by_global_norm(1.0, nonfinite="sanitize")
    grads = jnp.array([jnp.inf, 1.0, jnp.nan])
    clipped, state = clipper.update(grads, clipper.init(grads), norm=norm)
    np.testing.assert_allclose(clipped, [1.0, 0.0, 0.0], atol=1e-7)
    assert float(state.metrics.clipped) == 1


def test_a_negative_norm_from_elsewhere():
    clipper = clipx.clip_by_global_norm(1.0)
    grads = jnp.array([3.0, 4.0])
    with pytest.raises(ValueError, match=r"norm=-5\.0"):
        clipper.update(grads, clipper.init(grads), norm=-5.0)
    step = jax.jit(lambda n: clipper.update(grads, clipper.init(grads), norm=n)[0])
    assert np.all(np.isnan(step(-5.0)))


def test_adaptive_rules_for_single_entries_are_refused():
    rule = clipx.thresholds.Threshold(lambda n: n, lambda n, s, c: (s, n))
    for threshold in (rule, clipx.thresholds.relative_to_params(0.1)):
        with pytest.raises(ValueError, match="adaptive rule"):
            clipx.clip_by(clipx.measures.magnitudes(), threshold)


@pytest.mark.parametrize("empty", [True, False])
def test_a_state_shares_no_buffer(empty):
    limit, norm = jnp.float32(1.0), jnp.float32(5.0)
    clipper = clipx.clip_by_global_norm(limit)
    grads = {} if empty else {"w": jnp.array([3.0, 4.0])}
    _, state = clipper.update(grads, clipper.init(grads), norm=norm)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((state, limit, norm))]
    assert len(set(buffers)) == len(buffers)


def test_an_ensemble_over_devices_is_no_replica():
    mesh = jax.make_mesh((8,), ("models",), axis_types=(AxisType.Auto,))
    models = jnp.arange(1.0, 17.0).reshape(8, 2).at[5, 0].set(jnp.nan)
    models = jax.device_put(models, NamedSharding(mesh, P("models")))
    tx = clipx.clip_by_global_norm(1.0)
    _, state = jax.jit(jax.vmap(lambda g: tx.update(g)))(models)
    assert clipx.metrics(state)["clip/norm"].shape == (8,)
    with pytest.raises(FloatingPointError):
        clipx.check(state)


class Two(NamedTuple):
    first: object
    second: object


def test_clippers_in_fields_are_told_apart():
    tx = clipx.clip_by_global_norm(1.0)
    states = Two(tx.init(jnp.ones(1)), tx.init(jnp.ones(1)))
    names = {k.rsplit("/", 1)[0] for k in clipx.metrics(states)}
    assert names == {"clip/first", "clip/second"}


def test_debug_nans_with_the_zero_policy():
    for make in (clipx.clip_by_global_norm, clipx.clip_by_leaf_norm):
        clipper = make(1.0, nonfinite="zero")
        grads = {"w": jnp.array([jnp.inf, 4.0])}
        state = clipper.init(grads)
        with jax.debug_nans(True):
            clipped, _ = jax.jit(clipper.update)(grads, state)
        np.testing.assert_array_equal(clipped["w"], 0)


def test_one_unusable_bound_makes_every_leaf_nan():
    step = jax.jit(lambda t, g: clipx.clip({"a": t, "b": 1.0}).update(g)[0])
    clipped = step(jnp.float32(-1.0), {"a": jnp.ones(2), "b": jnp.ones(2)})
    for leaf in jax.tree.leaves(clipped):
        assert np.all(np.isnan(leaf))


def test_metrics_of_a_sanitized_step_say_that_it_was_clipped():
    grads = jnp.array([jnp.inf, 1.0, 5.0])
    _, state = clipx.clip(1.0).update(grads)
    np.testing.assert_allclose(state.metrics.clipped, 2 / 3, rtol=1e-6)
    _, state = clipx.clip_by_global_norm(1.0, nonfinite="sanitize").update(grads)
    assert float(state.metrics.clipped) == int(state.metrics.num_clipped) == 1


def test_bounds_round_to_the_dtype_of_the_leaf():
    grads = jnp.array([0.1, 0.05], jnp.bfloat16)
    clipped, state = clipx.clip(0.1).update(grads)
    chex.assert_trees_all_equal(clipped, grads)
    assert float(state.metrics.clipped) == 0


def test_clip_by_value_in_blind_code():
    clip = lambda g: clipx.functional.clip_by_value(  # noqa: E731
        g, -1.0, 1.0, nonfinite="zero", axis_name=()
    )
    np.testing.assert_array_equal(jax.pmap(clip)(jnp.full((8, 2), 3.0)), 1.0)


def test_eps():
    with pytest.raises(TypeError, match="eps"):
        clipx.clip_by_global_norm(1.0, eps=optax.constant_schedule(1.0))
    with pytest.raises(ValueError, match=r"eps=-100\.0"):
        clipx.functional.clip_by_global_norm([jnp.ones(2)], 1.0, eps=-100.0)


def test_numpy_numbers_as_order():
    x = [jnp.array([3.0, 4.0])]
    assert float(clipx.functional.global_norm(x, ord=np.int64(1))) == 7


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "response",
    [
        *(clipx.responses.rescale, clipx.responses.smooth),
        *(clipx.responses.drop, clipx.responses.biweight),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_unusable_traced_limits_of_single_entries(response, dtype):
    @jax.jit
    def step(limit, updates):
        return clipx.clip_by(clipx.measures.magnitudes(), limit, response).update(
            updates
        )[0]

    for limit in (-1.0, np.nan):
        clipped = step(jnp.float32(limit), jnp.array([0.5, 2.0], dtype))
        assert np.all(np.isnan(clipped))


def test_an_infinite_limit_leaves_a_norm_beyond_the_range_alone():
    grads = [jnp.full(4, 3e38)]
    clipped, norm = clipx.functional.clip_by_global_norm(grads, jnp.inf)
    np.testing.assert_array_equal(clipped[0], grads[0])
    assert float(norm) == float(jnp.finfo(jnp.float32).max)


@pytest.mark.parametrize("largest", [8e37, 9e37, 1.5e38])
def test_norms_whose_reciprocal_is_subnormal(largest):
    """XLA divides by a broadcast number through 1 / y, which would be flushed to 0."""
    tree = {"a": jnp.array([largest, 0.0, largest]), "b": jnp.ones(8)}
    for ord, power in ((2, 1 / 2), (3, 1 / 3), (1.5, 1 / 1.5)):
        clipped, state = clipx.clip_by_leaf_norm(1.0, ord=ord).update(tree)
        np.testing.assert_allclose(clipped["a"][0], 0.5**power, rtol=1e-5)
        norm = largest * 2**power
        np.testing.assert_allclose(
            state.metrics.norm, min(norm, 3.4028235e38), rtol=1e-5
        )


def test_the_clipped_norm_far_below_a_large_norm():
    """The norm is measured in a large unit; its root times the scale is subnormal."""
    clipper = clipx.clip_by_global_norm(1e-14)
    grads = jnp.array([2e15, 0.0])
    _, state = clipper.update(grads, clipper.init(grads))
    np.testing.assert_allclose(
        clipx.metrics(state)["clip/clipped_norm"], 1e-14, rtol=1e-6
    )
