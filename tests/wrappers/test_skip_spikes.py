"""Skipped steps: nothing of the optimizer moves, and nothing locks out."""

from pathlib import Path

import chex
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_clipx as clipx

GOLDEN = Path(__file__).parents[1] / "golden"
PARAMS = {"a": jnp.ones((3, 2)), "b": jnp.ones(3)}
QUICK = clipx.thresholds.zscore(
    6.0, window=16, warmup_steps=4, stats="skip", patience=5
)


def grads(norm, seed=0):
    rng = np.random.default_rng(seed)
    values = {k: rng.normal(size=v.shape) for k, v in PARAMS.items()}
    whole = np.sqrt(sum(np.sum(v**2) for v in values.values()))
    return {k: jnp.asarray(v * norm / whole, jnp.float32) for k, v in values.items()}


def usual(tx, number=8, state=None, **extra):
    """Some steps of norms of about 1."""
    update = jax.jit(tx.update)
    state = tx.init(PARAMS) if state is None else state
    for i in range(number):
        _, state = update(grads(1 + 0.1 * (-1) ** i, i), state, PARAMS, **extra)
    return state


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


BAD = {
    "nan": {"grads": grads(np.nan)},
    "inf": {"grads": grads(np.inf)},
    "spike": {"grads": grads(1000.0)},
    "loss_nan": {"grads": grads(1.0), "loss": np.float32(np.nan)},
    "loss_spike": {"grads": grads(1.0), "loss": np.float32(500.0)},
}
REASONS = {"nan": 1, "inf": 1, "spike": 2, "loss_nan": 3, "loss_spike": 4}


@pytest.mark.one_in(10)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("jitted", [True, False])
def test_a_skipped_step_leaves_the_inner_state_bit_for_bit(bad, jitted):
    inner = optax.chain(clipx.clip_by_global_norm(0.5), optax.adamw(0.1))
    tx = clipx.skip_spikes(inner, threshold=QUICK, loss_threshold=QUICK)
    with jax.numpy_dtype_promotion("standard"):
        state = usual(tx, loss=jnp.float32(2.0))
        case = BAD[bad]
        update = jax.jit(tx.update) if jitted else tx.update
        loss = case.get("loss", np.float32(2.0))
        updates, after = update(case["grads"], state, PARAMS, loss=loss)
    assert not any(np.any(np.asarray(x)) for x in jax.tree.leaves(updates))
    assert bits(after.inner) == bits(state.inner)
    shown = clipx.metrics(after)
    assert shown["skip/skipped"]
    assert shown["skip/reason"] == REASONS[bad]
    assert shown["skip/num_skipped"] == shown["skip/consecutive_skips"] == 1
    assert shown["skip/steps"] == 9
    # Also where the optimizer inside has a clipper: its metrics stand still.
    assert shown["clip/steps"] == 8
    np.testing.assert_allclose(shown["clip/norm"], 0.9, rtol=1e-6)
    want = clipx.functional.global_norm(case["grads"])
    np.testing.assert_array_equal(shown["skip/norm"], want)
    assert shown["skip/clipped_norm"] == 0
    if "loss" in bad or bad == "spike":
        chex.assert_tree_all_finite((after.rule, after.loss_rule))
    else:
        chex.assert_trees_all_equal(after.rule, state.rule)
    if bad in ("nan", "inf"):
        with pytest.raises(FloatingPointError, match="step 9"):
            clipx.check(after)


def test_the_next_usual_step_goes_on_as_if_nothing_had_been():
    tx = clipx.skip_spikes(optax.adam(0.1), threshold=QUICK)
    with jax.numpy_dtype_promotion("standard"):
        state = usual(tx)
        want, want_state = tx.update(grads(1.0, 99), state, PARAMS)
        for bad in (np.nan, 1e4, np.inf, 1e4):
            _, state = jax.jit(tx.update)(grads(bad), state, PARAMS)
        found, state = tx.update(grads(1.0, 99), state, PARAMS)
    chex.assert_trees_all_equal(found, want)
    chex.assert_trees_all_equal(state.inner, want_state.inner)
    assert int(state.consecutive_skips) == 0
    assert int(state.num_skipped) == 4


def test_one_nan_does_not_fill_the_window():
    """OLMo-core, Levanter, MaxText: after one NaN the next W steps are skipped."""
    tx = clipx.skip_spikes(optax.sgd(0.1), threshold=QUICK)
    state = usual(tx, loss=jnp.float32(1.0))
    _, state = tx.update(grads(np.nan), state, PARAMS, loss=jnp.float32(np.nan))
    for i in range(20):
        _, state = jax.jit(tx.update)(
            grads(1.0, i), state, PARAMS, loss=jnp.float32(1.0)
        )
        assert not state.skipped


def test_nan_in_the_warm_up_is_not_applied():
    """MaxText applies it."""
    tx = clipx.skip_spikes(optax.sgd(0.1))
    updates, state = tx.update(grads(np.nan), tx.init(PARAMS), PARAMS)
    assert state.skipped
    assert not any(np.any(np.asarray(x)) for x in jax.tree.leaves(updates))


def test_the_raw_norm_is_judged_and_not_the_clipped_one():
    """MaxText's test is fed the clipped norm: a spike of 1000 goes unseen."""
    inner = optax.chain(clipx.clip_by_global_norm(1.0), optax.sgd(0.1))
    tx = clipx.skip_spikes(inner, threshold=QUICK)
    _, state = tx.update(grads(1000.0), usual(tx), PARAMS)
    assert state.reason == 2


def test_a_new_level_is_accepted_after_patience():
    """axlearn refuses it for ever."""
    tx = clipx.skip_spikes(optax.sgd(0.1), threshold=QUICK)
    before = usual(tx)
    for factor in (30.0, 1e4):
        state, skipped = before, []
        for i in range(20):
            _, state = jax.jit(tx.update)(grads(factor, i), state, PARAMS)
            skipped.append(bool(state.skipped))
        assert skipped == [True] * 4 + [False] * 16


def test_two_equal_spikes_are_both_skipped():
    """Rules whose window takes the spike in do not see the second one."""
    tx = clipx.skip_spikes(optax.sgd(0.1), threshold=QUICK)
    state = usual(tx)
    for norm, expected in ((50.0, True), (1.0, False), (1.0, False), (50.0, True)):
        _, state = jax.jit(tx.update)(grads(norm), state, PARAMS)
        assert bool(state.skipped) == expected


def test_what_is_not_finite_is_never_accepted():
    """apply_if_finite gives up after a number of them, and applies one."""
    tx = clipx.skip_spikes(optax.sgd(0.1), threshold=QUICK)
    state = usual(tx)
    for i in range(40):
        updates, state = jax.jit(tx.update)(grads(np.nan), state, PARAMS)
        assert not any(np.any(np.asarray(x)) for x in jax.tree.leaves(updates))
        assert int(state.consecutive_skips) == i + 1


def test_a_negative_loss_is_judged_like_any_other():
    tx = clipx.skip_spikes(optax.sgd(0.1), patience=3)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for i in range(70):
        loss = jnp.float32(-5 + 0.1 * (-1) ** i)
        _, state = update(grads(1.0, i), state, PARAMS, value=loss)
        assert not state.skipped
    for expected in (True, True, False):
        _, state = update(grads(1.0), state, PARAMS, value=jnp.float32(3.0))
        assert bool(state.skipped) == expected


@pytest.mark.parametrize("name", ["olmo_skipstep_w16_s6", "maxtext_skip_w16_s6"])
def test_trace_of_the_reference(name):
    """They skip step 40, where norm and loss spike; ours skips the same."""
    golden, inputs = np.load(GOLDEN / f"{name}.npz"), np.load(GOLDEN / "inputs.npz")
    if "factor" in golden:
        want = golden["factor"] == 0
    else:
        want = golden["skipped"].astype(bool)
    rule = clipx.thresholds.zscore(6.0, window=16, warmup_steps=8, stats="raw")
    tx = clipx.skip_spikes(optax.sgd(0.1), threshold=np.inf, loss_threshold=rule)
    values = [jnp.asarray(inputs[f"g{i}"]) for i in range(3)]
    params = [v[0] for v in values]

    def step(state, batch):
        g, loss = batch
        _, state = tx.update(g, state, params, loss=loss)
        return state, state.skipped

    _, found = lax.scan(step, tx.init(params), (values, jnp.asarray(inputs["loss"])))
    np.testing.assert_array_equal(np.asarray(found), want)
    assert list(np.nonzero(want)[0]) == [40]


@pytest.mark.parametrize("way", ["explicit", "shard_map"])
def test_all_devices_skip_or_none(way):
    """Decided by each shard: one device skips, seven step."""
    kind = AxisType.Explicit if way == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    tx = clipx.skip_spikes(optax.sgd(1.0), threshold=QUICK)
    update = tx.update
    if way == "shard_map":
        update = jax.shard_map(
            lambda g, s: tx.update(g, s),
            mesh=mesh,
            in_specs=(P("x"), P()),
            out_specs=(P("x"), P()),
        )
    update = jax.jit(update)
    with jax.set_mesh(mesh):

        def placed(norm, i):
            x = np.random.default_rng(i).normal(size=(8, 2)).astype(np.float32)
            x /= np.linalg.norm(x)
            x[3] *= norm
            return jax.device_put(x, NamedSharding(mesh, P("x")))

        state = tx.init(placed(1.0, 0))
        for i in range(8):
            updates, state = update(placed(1.0, i), state)
        assert np.all(np.asarray(updates) != 0)
        for bad in (np.nan, 1e4):
            updates, after = update(placed(bad, 9), state)
            assert not np.any(np.asarray(updates))
            assert after.skipped


def test_losses_of_shards_decide_together():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    tx = clipx.skip_spikes(optax.sgd(1.0), threshold=QUICK)

    def step(g, state, losses):
        return tx.update(g, state, loss=losses[0])

    update = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(P("x"), P(), P("x")),
            out_specs=(P("x"), P()),
        )
    )
    state = tx.init(jnp.ones((8, 2)))
    losses = jnp.ones(8).at[5].set(jnp.nan)
    updates, state = update(jnp.ones((8, 2)), state, losses)
    assert state.reason == 3
    assert not np.any(np.asarray(updates))


def test_in_scan_with_donation_and_in_a_train_state():
    tx = clipx.skip_spikes(optax.adam(0.1), threshold=QUICK)
    with jax.numpy_dtype_promotion("standard"):
        stacked = jax.tree.map(
            lambda *x: jnp.stack(x), *[grads(n, i) for i, n in enumerate([1, 1, 1e9])]
        )
        state, _ = jax.jit(
            lambda s, g: lax.scan(lambda s, g: tx.update(g, s, PARAMS)[::-1], s, g),
            donate_argnums=0,
        )(tx.init(PARAMS), stacked)
        assert int(state.metrics.steps) == 3
        train = flax.training.train_state.TrainState.create(
            apply_fn=None, params=PARAMS, tx=tx
        )
        train = train.apply_gradients(grads=grads(np.nan))
    chex.assert_trees_all_equal(train.params, PARAMS)


def test_bad_input():
    with pytest.raises(TypeError, match="inner"):
        clipx.skip_spikes(3)
    with pytest.raises(ValueError, match="patience=0"):
        clipx.skip_spikes(optax.sgd(0.1), patience=0)
    named = optax.GradientTransformation(
        lambda params: {"name": "adam"}, lambda u, s, p=None: (u, s)
    )
    with pytest.raises(TypeError, match="'adam' of type str at name"):
        clipx.skip_spikes(named).init(PARAMS)
    tx = clipx.skip_spikes(optax.sgd(0.1))
    with pytest.raises(ValueError, match="loss to be a real scalar"):
        tx.update(grads(1.0), tx.init(PARAMS), PARAMS, loss=jnp.ones(3))
    with pytest.raises(TypeError, match="SkipState that init"):
        tx.update(grads(1.0), optax.EmptyState(), PARAMS)
    reset = clipx.reset_moments(optax.adam(0.1))
    with pytest.raises(ValueError, match="params"):
        reset.update(grads(1.0), reset.init(PARAMS))


def test_moments_are_reset_and_warmed_up():
    inner = optax.trace(0.5)
    tx = clipx.reset_moments(inner, every=4, warmup=2)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    found = []
    for _ in range(12):
        updates, state = update(ones, state, PARAMS)
        found.append(float(updates["b"][0]))
    moments = np.array([1, 1.5, 1.75, 1.875] * 3)
    scale = np.array([1, 1, 1, 1] + [0.5, 1, 1, 1] * 2)
    np.testing.assert_allclose(found, moments * scale, rtol=1e-6)
    fresh = clipx.reset_moments(optax.adam(0.1), every=2, warmup=0)
    with jax.numpy_dtype_promotion("standard"):
        state = fresh.init(PARAMS)
        for _ in range(3):
            updates, state = fresh.update(ones, state, PARAMS)
        want, _ = optax.adam(0.1).update(ones, optax.adam(0.1).init(PARAMS), PARAMS)
    chex.assert_trees_all_close(updates, want, rtol=1e-6)


def test_a_leaf_of_float0_passes_through():
    """The gradient of integers; it came out as an array of another dtype."""
    tx = clipx.skip_spikes(clipx.clip_by_global_norm(1.0))
    params = {"count": jnp.arange(2), "w": jnp.ones(2)}
    grads = {"count": np.zeros(2, jax.dtypes.float0), "w": jnp.ones(2)}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        assert updates["count"] is grads["count"]
