"""What a review of the adaptive rules and wrappers found, each once wrong."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from versions import MESH_OF_TRACED

import optax_clipx as clipx


def run(rule, norms):
    @jax.jit
    def update(norm, state):
        return rule.update(norm, state, clipx.thresholds.Context(0))

    state, limits = rule.init(jnp.float32(0)), []
    for norm in norms:
        limit, state = update(jnp.float32(norm), state)
        limits.append(float(limit))
    return limits, state


@pytest.mark.slow
def test_units_of_one_zero_on_each_device():
    """XLA squares a constant factor of arrays with one entry: 0 times infinity."""
    explicit = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    auto = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    in_shards = jax.jit(
        jax.shard_map(
            lambda g: clipx.functional.unit_norms(g, specs=P("x")),
            mesh=auto,
            in_specs=P("x"),
            out_specs=P(),
        )
    )
    for value in (0.0, 1e-30, 1.0, 1e30):
        x = jax.device_put(
            jnp.full(8, value, jnp.float32), NamedSharding(explicit, P("x"))
        )
        want = [np.float32(value * 8**0.5)]
        np.testing.assert_allclose(clipx.functional.unit_norms(x), want, rtol=1e-6)
        np.testing.assert_allclose(in_shards(np.asarray(x)), want, rtol=1e-6)
    params = {"w": jax.device_put(jnp.ones((8, 2)), NamedSharding(explicit, P("x")))}
    params["b"] = jax.device_put(jnp.zeros(8), NamedSharding(explicit, P("x")))
    clipped, _ = clipx.adaptive_grad_clip(0.1).update(params, None, params)
    chex.assert_tree_all_finite(clipped)


def test_skip_spikes_inside_of_skip_spikes():
    tx = clipx.skip_spikes(optax.chain(clipx.skip_spikes(optax.sgd(1.0))))
    params = jnp.ones(2)
    updates, state = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates, -params)
    assert clipx.metrics(state)["skip/steps"] == 1


def test_a_window_shorter_than_the_warm_up_still_limits():
    clipper = clipx.historical_update_clip(window=32)
    state, update = clipper.init(jnp.zeros(1)), jax.jit(clipper.update)
    for i in range(40):
        _, state = update(jnp.array([1 + 0.1 * (-1.0) ** i]), state)
    clipped, _ = update(jnp.array([1e6]), state)
    assert float(clipped[0]) < 2


def test_losses_around_zero_keep_their_deviation():
    rng = np.random.default_rng(0)
    tx = clipx.skip_spikes(optax.sgd(1.0))
    state, update = tx.init(jnp.zeros(1)), jax.jit(tx.update)
    losses = rng.normal(size=128)
    losses -= losses.mean() - 1e-6
    for loss in [*losses, *(10 + rng.normal(size=12))]:
        _, state = update(jnp.ones(1), state, loss=jnp.float32(loss))
    skipped = int(state.num_skipped)
    assert 9 <= skipped <= 11
    _, state = update(jnp.ones(1), state, loss=jnp.float32(1e4))
    assert state.reason == 4


@pytest.mark.parametrize("options", [{"window": 32}, {}])
def test_a_level_beyond_any_ratio_is_accepted(options):
    rule = clipx.thresholds.zscore(patience=2, **options)
    usual = [1e-30 * (1 + 0.1 * (-1) ** i) for i in range(40)]
    limits, state = run(rule, [*usual, *[1e30] * 10])
    chex.assert_tree_all_finite(state)
    assert limits[40] < 2e-30
    assert limits[41] == np.inf  # accepted
    assert all(0.5e30 < t < 1e32 for t in limits[43:])


def test_error_feedback_does_not_take_the_norm_of_something_else():
    tx = clipx.error_feedback(clipx.clip_by_global_norm(1.0))
    state, g = tx.init(jnp.zeros(1)), jnp.array([3.0])
    for _ in range(4):
        clipped, state = tx.update(g, state, norm=clipx.functional.global_norm(g))
        np.testing.assert_allclose(clipped, [1.0], rtol=1e-6)
    with pytest.raises(ValueError, match=r"1 leaves.*got 0.*masked"):
        tx.update(None, state)


def test_float64_norms_are_within_what_they_have_made():
    with jax.enable_x64(True):
        clipper = clipx.quantile_clip(1, window=10)
        state = clipper.init(jnp.zeros(1))
        for norm in np.linspace(0.1, 0.2, 20):
            _, state = jax.jit(clipper.update)(jnp.array([norm]), state)
        assert int(state.metrics.num_clipped) == 0


@MESH_OF_TRACED
def test_warmup_with_units_on_explicit_axes():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    w = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("x", "y")))
    rule = clipx.thresholds.warmup(1.0, then=clipx.thresholds.zscore(), steps=1)
    tx = clipx.clip_by(clipx.measures.unit_norms(), rule)
    clipped, _ = jax.jit(tx.update)(w, tx.init(w), w)
    assert clipped.sharding.spec == P("x", "y")


def test_keys_of_random_numbers_in_the_inner_state():
    params = jnp.ones(2)
    for wrap in (clipx.skip_spikes, clipx.reset_moments):
        with jax.numpy_dtype_promotion("standard"):
            tx = wrap(optax.add_noise(0.1, 0.1, jax.random.key(0)))
            jax.jit(tx.update)(params, tx.init(params), params)


def test_no_limit_and_a_norm_of_zero():
    grads = {"a": jnp.zeros(2), "b": jnp.ones(2)}
    inf = float("inf")
    for rule, response in (
        (clipx.thresholds.group_band(0.5, inf), clipx.responses.normalize),
        (clipx.thresholds.ema_ratio(inf), clipx.responses.rescale),
        (
            clipx.thresholds.scaled(clipx.thresholds.zscore(), 0.0),
            clipx.responses.rescale,
        ),
    ):
        tx = clipx.clip_by(clipx.measures.leaf_norms(), rule, response)
        state, update = tx.init(grads), jax.jit(tx.update)
        for _ in range(3):
            clipped, state = update(grads, state)
            chex.assert_trees_all_close(clipped, grads)


def test_reset_moments_is_traced_once_and_passes_float0():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    w = jax.device_put(jnp.ones(8), NamedSharding(mesh, P("x")))
    tx = clipx.reset_moments(optax.trace(0.9))
    state, step = tx.init(w), jax.jit(tx.update)
    for _ in range(3):
        _, state = step(w, state, w)
    assert step._cache_size() == 1
    mixed = {"w": jnp.ones(2), "i": np.zeros(2, jax.dtypes.float0)}
    tx = clipx.reset_moments(optax.identity())
    updates, _ = tx.update(mixed, tx.init(mixed), mixed)
    assert updates["i"].dtype == jax.dtypes.float0


def test_an_unusable_limit_is_loud_under_infinite_gradients():
    @jax.jit
    def step(limit, grads):
        tx = clipx.skip_spikes(optax.sgd(1.0), threshold=limit)
        return tx.update(grads, tx.init(grads), grads)[0]

    for value in (1.0, np.inf):
        assert np.isnan(step(jnp.float32(np.nan), jnp.array([value])))[0]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clipx.skip_spikes(optax.sgd(1.0), patience=None), "patience=None"),
        (lambda: clipx.reset_moments(optax.sgd(1.0), every=None), "every=None"),
        (lambda: clipx.thresholds.warmup(1.0, then=2.0, steps=None), "steps=None"),
        (lambda: clipx.thresholds.zscore(warmup_steps="a"), "warmup_steps='a'"),
        (lambda: clipx.thresholds.quantile([0.1]), r"q to be a number"),
        (lambda: clipx.thresholds.quantile(0.5, window=2.0), r"window=2\.0"),
        (
            lambda: clipx.skip_spikes(optax.sgd(1.0), threshold=optax.adam(1.0)),
            "transformation",
        ),
    ],
)
def test_messages_name_the_value(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_a_factor_above_one_does_not_ratchet():
    """What enters is never more than the norm itself."""
    rule = clipx.thresholds.zscore(target="reciprocal", clip_factor=3.0, warmup_steps=5)
    rng = np.random.default_rng(0)
    norms = 1 + 0.1 * rng.normal(size=400)
    norms[::20] = 4.0
    _, state = run(rule, norms)
    assert float(state.mean) < 2


def test_a_nan_among_float64_is_no_unusable_limit():
    """The limit became NaN with the norm, and so did the updates under any policy."""
    with jax.enable_x64(True):
        clipper = clipx.quantile_clip(nonfinite="zero")
        update = jax.jit(clipper.update)
        grads = jnp.ones(3, jnp.float64)
        _, state = update(grads, clipper.init(grads))
        clipped, state = update(grads.at[0].set(jnp.nan), state)
        assert clipped.tolist() == [0, 0, 0]
        assert not np.isnan(state.metrics.threshold)
