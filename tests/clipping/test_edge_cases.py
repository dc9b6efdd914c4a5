"""Every row of the edge-case table, for every norm method, eager and jitted."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from all_methods import ALL_METHODS, ELEMENT_METHODS, NORM_METHODS, RELATIVE_METHODS

import optax_clipx as clipx

norm_methods = pytest.mark.parametrize(
    "make", NORM_METHODS.values(), ids=NORM_METHODS.keys()
)
norm_and_relative = pytest.mark.parametrize(
    "make",
    [*NORM_METHODS.values(), *RELATIVE_METHODS.values()],
    ids=[*NORM_METHODS.keys(), *RELATIVE_METHODS.keys()],
)
every_method = pytest.mark.parametrize(
    "make", ALL_METHODS.values(), ids=ALL_METHODS.keys()
)
element_methods = pytest.mark.parametrize(
    "make", ELEMENT_METHODS.values(), ids=ELEMENT_METHODS.keys()
)
bad_values = pytest.mark.parametrize("bad", [-jnp.inf, jnp.nan])

TREE = {
    "w": np.array([[3.0, 4.0], [1.0, 2.0]], np.float32),
    "b": np.ones(3, np.float32),
}


def tree(scale=1.0):
    return jax.tree.map(lambda x: jnp.asarray(x * np.float32(scale)), TREE)


def broken(bad):
    return {**tree(), "w": tree()["w"].at[0, 1].set(bad)}


def run(make, limit, updates, wrap=jax.jit, **options):
    clipper = make(limit, **options)
    return wrap(clipper.update)(updates, clipper.init(updates), tree())


@pytest.mark.one_in(10)
@every_method
@pytest.mark.parametrize("limit", [0.0, 1.0, np.inf])
def test_zero_stays_zero(make, limit):
    clipped, state = run(make, limit, tree(0))
    chex.assert_trees_all_equal(clipped, tree(0))
    assert float(state.metrics.norm) == 0
    assert float(state.metrics.clipped_norm) == 0
    assert float(state.metrics.clipped) == 0


@pytest.mark.one_in(10)
@norm_and_relative
@pytest.mark.parametrize("limit", [1e3, np.inf])
def test_below_the_limit_nothing_changes_bit_for_bit(make, limit):
    updates = {**tree(1e-2), "subnormal": jnp.full((2,), 1e-40, jnp.float32)}
    clipper = make(limit)
    clipped, state = jax.jit(clipper.update)(updates, clipper.init(updates), updates)
    for got, want in zip(*map(jax.tree.leaves, (clipped, updates)), strict=True):
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
    assert float(state.metrics.scale) == 1


@pytest.mark.one_in(10)
@norm_methods
def test_a_limit_of_zero_gives_zeros(make):
    clipped, state = run(make, 0.0, tree())
    chex.assert_trees_all_equal(clipped, tree(0))
    assert float(state.metrics.clipped_norm) == 0
    assert float(state.metrics.clipped) == 1


def clip_often(make, dtype):
    """200 random trees clipped, each by itself, and clipped once more."""
    rng = np.random.default_rng(0)
    draws = {k: rng.normal(size=(200, *x.shape)) for k, x in TREE.items()}

    @jax.jit
    @jax.vmap
    def clip(updates):
        return make(0.7).update(updates, make(0.7).init(updates))

    clipped, state = clip({k: jnp.asarray(x, dtype) for k, x in draws.items()})
    return clipped, state.metrics, clip(clipped)[1].metrics


@pytest.mark.one_in(10)
@norm_methods
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_after_clipping_the_norm_is_at_most_the_limit(make, dtype):
    slack = 1e-6 if dtype == "float32" else float(jnp.finfo(dtype).eps)
    _, before, after = clip_often(make, dtype)
    # Clipped once more, the group that is furthest above is scaled by almost 1.
    assert np.min(after.scale) >= 1 - slack
    np.testing.assert_allclose(after.norm, before.clipped_norm, rtol=2 * slack)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_after_clipping_the_exact_norm_is_at_most_the_limit(dtype):
    slack = 1e-6 if dtype == "float32" else float(jnp.finfo(dtype).eps)
    clipped, _, _ = clip_often(clipx.clip_by_global_norm, dtype)
    for one in zip(*jax.tree.leaves(clipped), strict=True):
        assert float(reference.norm(one)) <= 0.7 * (1 + slack)


@pytest.mark.one_in(10)
@every_method
@pytest.mark.parametrize("limit", [-1.0, float("nan")])
def test_unusable_numbers_are_refused_at_construction(make, limit):
    with pytest.raises(ValueError, match=str(limit)):
        make(limit)


@pytest.mark.one_in(10)
@every_method
@pytest.mark.parametrize("policy", ["propagate", "zero", "sanitize"])
def test_unusable_traced_limits_make_everything_nan(make, policy):
    @jax.jit
    def step(limit, updates):
        return make(limit, nonfinite=policy).update(updates, None, tree())

    for limit in (-1.0, np.nan):
        for updates in (tree(), tree(0), broken(jnp.nan)):
            clipped, _ = step(jnp.float32(limit), updates)
            for leaf in jax.tree.leaves(clipped):
                assert np.all(np.isnan(leaf))


@pytest.mark.one_in(10)
@norm_and_relative
@bad_values
def test_propagate_makes_every_leaf_nan(make, bad):
    clipped, state = run(make, 1.0, broken(bad))
    for leaf in jax.tree.leaves(clipped):
        assert np.all(np.isnan(leaf))
    assert bool(state.metrics.nonfinite)
    assert int(state.metrics.num_nonfinite) == 1
    assert int(state.metrics.num_clipped) == 0
    assert not np.isfinite(state.metrics.norm)


@pytest.mark.one_in(10)
@every_method
@bad_values
def test_zero_makes_every_leaf_zero(make, bad):
    clipped, state = run(make, 1.0, broken(bad), nonfinite="zero")
    chex.assert_trees_all_equal(clipped, tree(0))
    assert bool(state.metrics.nonfinite)
    with pytest.raises(FloatingPointError, match="step 1"):
        clipx.check(state)


@pytest.mark.one_in(10)
@every_method
@bad_values
def test_raise_names_the_leaf(make, bad):
    with pytest.raises(FloatingPointError, match="at: w\\."):
        run(make, 1.0, broken(bad), lambda f: f, nonfinite="raise")


@pytest.mark.one_in(10)
@every_method
def test_raise_in_a_trace_is_seen_when_a_result_is_read(make):
    with pytest.raises(Exception, match="at: w\\."):
        jax.block_until_ready(run(make, 1.0, broken(jnp.nan), nonfinite="raise"))
    clipped, _ = run(make, 1.0, tree(), nonfinite="raise")
    expected, _ = run(make, 1.0, tree())
    chex.assert_trees_all_close(clipped, expected, rtol=1e-6)


@pytest.mark.one_in(10)
@every_method
@bad_values
def test_sanitize_clips_what_is_left(make, bad):
    clipped, state = run(make, 1.0, broken(bad), nonfinite="sanitize")
    replaced = jax.tree.map(jnp.nan_to_num, broken(bad))
    expected, _ = run(make, 1.0, replaced)
    chex.assert_tree_all_finite(clipped)
    chex.assert_trees_all_close(clipped, expected, rtol=1e-6)
    assert bool(state.metrics.nonfinite)


@element_methods
def test_the_clamp_keeps_a_nan_in_its_entry(make):
    updates = {"w": jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.5])}
    clipped, state = jax.jit(make(1.0).update)(updates, make(1.0).init(updates))
    np.testing.assert_array_equal(clipped["w"], [np.nan, 1.0, -1.0, 0.5])
    assert bool(state.metrics.nonfinite)


def test_traced_bounds_in_the_wrong_order_give_nan():
    step = jax.jit(lambda lo, hi: clipx.clip_by_value(lo, hi).update(tree())[0])
    for leaf in jax.tree.leaves(step(jnp.float32(1.0), jnp.float32(-1.0))):
        assert np.all(np.isnan(leaf))


@pytest.mark.one_in(10)
@every_method
@bad_values
def test_the_next_step_is_clean(make, bad):
    clipper = make(1.0)
    step = jax.jit(clipper.update)
    _, state = step(broken(bad), clipper.init(tree()), tree())
    clipped, state = step(tree(), state, tree())
    expected, _ = step(tree(), clipper.init(tree()), tree())
    chex.assert_trees_all_equal(clipped, expected)
    assert int(state.metrics.steps) == 2
    assert not bool(state.metrics.nonfinite)
    clipx.check(state)


@pytest.mark.one_in(10)
@every_method
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_schedules_and_arrays_of_any_dtype_keep_the_updates_dtype(make, dtype):
    updates = jax.tree.map(lambda x: x.astype(dtype), tree())
    for limit in (jnp.float32(0.5), jnp.asarray(0.5, dtype), np.float64(0.5)):
        clipped, _ = jax.jit(make(limit).update)(updates, None, updates)
        assert {x.dtype for x in jax.tree.leaves(clipped)} == {jnp.dtype(dtype)}


@pytest.mark.one_in(10)
@norm_methods
def test_a_norm_of_zero_is_not_scaled_by_a_limit_near_zero(make):
    """Subnormal entries, whose norm is zero, were made zero by limits under 1e-28."""
    updates = jax.tree.map(lambda x: jnp.full_like(x, 1e-40), tree())
    clipped, state = run(make, 1e-31, updates)
    for got, want in zip(*map(jax.tree.leaves, (clipped, updates)), strict=True):
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
    assert float(state.metrics.scale) == 1
    _, state = run(make, 1e-31, tree(0))
    assert float(state.metrics.scale) == 1
