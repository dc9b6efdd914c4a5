"""Values near the ends of a dtype, narrow memories, and what cannot be told apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import optax_clipx as clipx
from optax_clipx.per_example import clipped_grad


def line_mesh():
    return jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize("options", [{"microbatch_size": 2}, {"two_pass": True}])
def test_examples_by_microbatch_with_float64_enabled(options):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
        run = jax.jit(clipped_grad(jnp.vdot, 100.0, **options))
        grads, found = run(jnp.ones(3), x)
        np.testing.assert_allclose(grads, x.sum(0), rtol=1e-12)
        assert found.num_examples.dtype == jnp.int32


def test_parameters_cut_over_the_examples_axis_are_refused():
    def fun(shard, x):
        return jnp.vdot(jax.lax.all_gather(shard, "x", tiled=True), x)

    step = functools.partial(
        jax.shard_map, mesh=line_mesh(), in_specs=(P("x"), P("x")), out_specs=P("x")
    )(lambda w, x: clipped_grad(fun, 1e6)(w, x)[0])
    with pytest.raises(ValueError, match=r"varies over \['x'\].*axis_name=\('x',\)"):
        step(jnp.zeros(4), jnp.ones((8, 4)))


@pytest.mark.parametrize("make", [clipx.clip_by_second_moment, clipx.scale_by_acclip])
def test_moments_in_blind_code_must_be_told(make):
    """A NaN in one device's shard has to stop the moments on all devices."""

    def run(**options):
        tx = make(**options)

        def step(grads, bad):
            state = tx.init(grads)
            for factor in (1.0, bad[0], 2.0):
                spoiled = {**grads, "cut": grads["cut"] * factor}
                updates, state = tx.update(spoiled, state)
            return updates["whole"][None]

        mapped = jax.shard_map(
            step,
            mesh=line_mesh(),
            in_specs=({"whole": P(), "cut": P("x")}, P("x")),
            out_specs=P("x"),
            check_vma=False,
        )
        grads = {"whole": jnp.array([1.0, 2.0]), "cut": jnp.arange(1.0, 5.0)}
        return np.asarray(jax.jit(mapped)(grads, jnp.array([1.0, np.nan, 1.0, 1.0])))

    with pytest.raises(ValueError, match=r"axis_name=\(\)"):
        run()
    found = run(specs={"whole": P(), "cut": P("x")})
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, found[:1].repeat(4, 0))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_normalized_momentum_turns_in_a_narrow_dtype(dtype):
    tx = clipx.normalized_momentum(0.99)
    old, new = jnp.array([1.0, 0.0], dtype), jnp.array([0.0, 1.0], dtype)
    update = jax.jit(tx.update)
    state = tx.init(old)
    for _ in range(500):
        updates, state = update(old, state)
    for _ in range(1000):
        updates, state = update(new, state)
    assert updates.dtype == dtype
    np.testing.assert_allclose(np.float64(updates), [0, 1], atol=1e-3)


def test_error_feedback_stays_finite_in_float16():
    tx = clipx.error_feedback(clipx.clip_by_global_norm(1.0))
    grads = jnp.array([30000.0, 3.0], jnp.float16)
    state, update = tx.init(grads), jax.jit(tx.update)
    for _ in range(6):
        updates, state = update(grads, state)
        assert np.isfinite(np.float64(updates)).all()
    # What does not fit into the dtype stays in the error.
    assert float(state.error[0]) > float(jnp.finfo("float16").max)
    updates, _ = update(jnp.array([np.nan, 0.0], jnp.float16), state)
    assert np.isnan(np.float64(updates)).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounding_to_a_narrow_dtype_is_no_clipping(dtype):
    tx = clipx.scale_by_acclip(b1=0.99, b2=0.5)
    grads = jnp.asarray([0.3, 1.7, -2.9, 0.01], dtype)
    state, update = tx.init(grads), jax.jit(tx.update)
    for _ in range(3):
        _, state = update(grads, state)
    assert float(state.metrics.clipped) == 0
    assert int(state.metrics.num_clipped) == 0


def test_the_derivative_at_zero_through_watch():
    tx = clipx.track_norms(clipx.clip_by_global_norm(1.0))

    def total(x):
        return jnp.sum(tx.update({"a": x}, tx.init({"a": x}))[0]["a"])

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(jnp.zeros(2)), [1, 1])


def test_complex_entries_whose_magnitude_no_float_holds():
    grads = jnp.array([3e38 + 3e38j, 3e38, 1 + 1j, 0.1, 0], jnp.complex64)
    found, _ = jax.jit(clipx.clip(1.0).update)(grads)
    half = 0.5**0.5
    want = [half + half * 1j, 1, half + half * 1j, 0.1, 0]
    np.testing.assert_allclose(found, want, rtol=1e-6)


@pytest.mark.parametrize("limit", [1.0, 5.0])
def test_eps_counts_in_float64(limit):
    with jax.enable_x64(True):
        grads = jnp.array([3.0, 4.0])
        found, _ = clipx.clip_by_global_norm(limit, eps=1e-6).update(grads)
        want = np.array([3.0, 4.0]) * (limit / (5 + 1e-6))
        np.testing.assert_allclose(found, want, rtol=1e-15)


@pytest.mark.parametrize("value", [1.8e38, 3.3e38])
def test_derivatives_near_the_largest_number(value):
    x = jnp.array([value, 1e36])
    slope = jax.grad(lambda x: clipx.functional.global_norm([x]))(x)
    norm = np.linalg.norm(np.float64(x))
    np.testing.assert_allclose(slope, np.float64(x) / norm, rtol=1e-6)

    def first(x):
        return clipx.functional.clip_by_global_norm([x], 1.0)[0][0][0]

    one, other = np.float64(x) / norm
    want = [other * other / norm, -one * other / norm]
    np.testing.assert_allclose(np.float64(jax.grad(first)(x)), want, atol=1e-38)


def test_zero_means_zero_whatever_the_response_makes_of_infinity():
    def response(norm, limit):
        return jnp.where(norm > limit, norm * limit / (norm * norm), 1)

    tx = clipx.clip_by(clipx.measures.tree_norm(), 1.0, response, nonfinite="zero")
    grads = {"a": jnp.array([np.inf, 1.0]), "b": jnp.ones(2)}
    found, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_array_equal(found["a"], np.zeros(2))
    np.testing.assert_array_equal(found["b"], np.zeros(2))


def test_empty_leaves_lose_the_axis_of_the_examples():
    batched = [jnp.ones((4, 3)), jnp.zeros((4, 0))]
    kinds = lambda fun: jax.eval_shape(lambda x: fun(x, 1.0)[0], batched)  # noqa: E731
    found = kinds(clipx.per_example_global_norm_clip)
    with jax.numpy_dtype_promotion("standard"):
        want = kinds(optax.per_example_global_norm_clip)
    assert [x.shape for x in found] == [x.shape for x in want] == [(3,), (0,)]
