"""Spectral thresholds that adapt to the singular values of each leaf, and SPECTRA."""

import re
from functools import cache, partial

import adaptive_reference as ref
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from versions import EXPLICIT, JOINED

import optax_clipx as clipx
from optax_clipx import thresholds

QUANTILE = thresholds.quantile(0.9, window=5)
RULES = {
    "window": (QUANTILE, partial(ref.percentile, 0.9, 5)),
    "average": (
        thresholds.ema_ratio(1.2, decay=0.9),
        partial(ref.ema_ratio, 1.2, 0.9),
    ),
}


def bent(matrix, limit, form="hard"):
    u, s, v = np.linalg.svd(np.float64(matrix), full_matrices=False)
    new = np.minimum(s, limit) if form == "hard" else s / np.sqrt(1 + (s / limit) ** 2)
    return (u * new) @ v


def sequence(seed, steps=12):
    """Matrices of two leaves, whose level drifts, with one rank-1 spike in between."""
    rng = np.random.default_rng(seed)
    for step in range(steps):
        level = np.exp(0.1 * step + 0.2 * rng.normal())
        tree = {"a": rng.normal(size=(4, 6)), "b": 0.1 * rng.normal(size=(5, 3))}
        if step == 8:
            tree["a"] += 30 * np.outer(rng.normal(size=4), rng.normal(size=6))
        yield {key: np.float32(level * value) for key, value in tree.items()}


@cache
def stepper(name):
    tx = clipx.clip_by_spectral_norm(RULES[name][0])
    return tx.init, jax.jit(tx.update)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), name=st.sampled_from(sorted(RULES)))
def test_each_leaf_follows_its_largest_singular_value(seed, name):
    init, update = stepper(name)
    trees = list(sequence(seed))
    state = init(trees[0])
    rules = {key: RULES[name][1]() for key in trees[0]}
    for each in rules.values():
        next(each)
    for tree in trees:
        clipped, state = update(tree, state)
        for key, matrix in tree.items():
            limit = rules[key].send(np.linalg.norm(np.float64(matrix), 2))
            want = bent(matrix, limit)
            error = np.linalg.norm(np.float64(clipped[key]) - want)
            assert error <= 1e-5 * np.linalg.norm(matrix)


@pytest.mark.one_in(2, rest="slow")
@pytest.mark.parametrize("method", ["svd", "newton_schulz"])
def test_the_spike_of_one_leaf_moves_no_other_threshold(method):
    tx = clipx.clip_by_spectral_norm(QUANTILE, method=method)
    tree = {"a": jnp.diag(jnp.array([2.0, 1.0])), "b": jnp.eye(2)}
    state, update = tx.init(tree), jax.jit(tx.update)
    for _ in range(4):
        _, state = update(tree, state)
    spiked = tree | {"a": jnp.diag(jnp.array([200.0, 1.0]))}
    clipped, state = update(spiked, state)
    # The 0.9 quantile of 2, 2, 2, 2, 200 lies at 0.6 between the last two.
    np.testing.assert_allclose(np.diag(clipped["a"]), [120.8, 1], rtol=1e-4)
    np.testing.assert_allclose(clipped["b"], np.eye(2), rtol=1e-6)
    assert state.metrics.threshold == pytest.approx(120.8, rel=1e-4)


@pytest.mark.one_in(3, rest="slow")
@pytest.mark.parametrize("policy", ["propagate", "zero", "sanitize"])
def test_a_step_that_is_not_finite_teaches_nothing(policy):
    tx = clipx.clip_by_spectral_norm(QUANTILE, nonfinite=policy)
    good, bad = jnp.eye(3), jnp.eye(3).at[0, 1].set(jnp.nan)
    update = jax.jit(tx.update)
    _, before = update(good, tx.init(good))
    _, after = update(bad, before)
    assert jax.tree.leaves(before.rule)
    jax.tree.map(np.testing.assert_array_equal, after.rule, before.rule)
    assert after.metrics.num_nonfinite == 1


def test_the_state_keeps_its_types_and_is_that_of_these_leaves():
    tx = clipx.clip_by_spectral_norm(thresholds.ema_ratio(1.5))
    tree = {"a": jnp.eye(3, dtype=jnp.bfloat16), "b": jnp.ones(2)}
    state = tx.init(tree)
    _, after = jax.jit(tx.update)(tree, state)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    with pytest.raises(ValueError, match="leaves like these"):
        tx.update(tree | {"c": jnp.ones(2)}, after)
    with pytest.raises(ValueError, match="state of an adaptive clipper"):
        tx.update(tree)


def test_a_rule_of_the_parameters_is_refused():
    with pytest.raises(ValueError, match="norms of the parameters"):
        clipx.clip_by_spectral_norm(thresholds.relative_to_params(0.1))


def test_a_rule_that_remembers_nothing_sees_the_singular_values():
    rule = thresholds.Threshold(lambda n: (), lambda n, s, c: (n / 2, s))
    clipped, _ = clipx.clip_by_spectral_norm(rule).update(jnp.diag(jnp.array([4.0, 1])))
    np.testing.assert_allclose(np.diag(clipped), [2, 1], rtol=1e-6)


SPECS = {"a": P("x", None), "b": P(None, "y")}


def compiled(rule, kind):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2)
    tree = {"a": jnp.arange(32.0).reshape(4, 8), "b": jnp.ones((6, 4))}
    placed = {
        k: jax.device_put(v, NamedSharding(mesh, SPECS[k])) for k, v in tree.items()
    }
    if kind == AxisType.Explicit:
        tx = clipx.clip_by_spectral_norm(rule)
        program = jax.jit(tx.update).lower(placed, tx.init(placed)).compile()
        return program, program(placed, tx.init(placed))
    tx = clipx.clip_by_spectral_norm(rule, specs=SPECS)
    options = {"mesh": mesh, "in_specs": (SPECS, P()), "out_specs": (SPECS, P())}
    step = jax.jit(jax.shard_map(tx.update, **options))
    program = step.lower(placed, tx.init(tree)).compile()
    return program, program(placed, tx.init(tree))


def counts(program):
    found = re.findall(r" (all-gather|all-reduce|custom-call)\(.*", program.as_text())
    return {name: found.count(name) for name in set(found)}


@pytest.mark.one_in(2, rest="slow")
@JOINED
@pytest.mark.parametrize("kind", [EXPLICIT, AxisType.Auto])
def test_a_rule_adds_neither_collectives_nor_decompositions(kind):
    program, (clipped, state) = compiled(
        thresholds.scaled(thresholds.ema_ratio(1.0), 0.5), kind
    )
    fixed, _ = compiled(1.0, kind)
    assert counts(program) == counts(fixed)
    top = np.linalg.norm(np.arange(32.0).reshape(4, 8), 2)
    assert np.linalg.norm(clipped["a"], 2) == pytest.approx(top / 2, rel=1e-5)
    assert state.metrics.norm == pytest.approx(top, rel=1e-5)


def test_the_shape_factor():
    tx = clipx.clip_by_spectral_norm(1.0, shape_factor=True)
    wide = jnp.eye(2, 8) * jnp.array([[4.0], [0.5]])
    tree = {"wide": wide, "tall": wide.T, "vector": jnp.array([3.0, 4.0])}
    clipped, state = jax.jit(tx.update)(tree)
    np.testing.assert_allclose(np.diag(clipped["wide"]), [2, 1], rtol=1e-6)
    np.testing.assert_allclose(np.diag(clipped["tall"]), [1, 0.5], rtol=1e-6)
    np.testing.assert_allclose(clipped["vector"], [0.6, 0.8], rtol=1e-6)
    assert state.metrics.clipped_norm == pytest.approx(2)


def test_spectra():
    """The published wrapper around sign descent, with its warm-up, in float64."""
    schedule = optax.linear_schedule(0.25, 1.0, 3)
    rule = thresholds.warmup(
        thresholds.follow_schedule(2.0, schedule, -1), then=2.0, steps=3
    )
    clipper = clipx.clip_by_spectral_norm(rule, form="soft", shape_factor=True)
    tx = optax.chain(
        optax.scale_by_sign(), clipper, optax.scale_by_learning_rate(schedule)
    )
    weights = jnp.zeros((4, 9))
    state, want = tx.init(weights), np.zeros((4, 9))
    with jax.numpy_dtype_promotion("standard"):
        for step in range(5):
            grads = jax.random.normal(jax.random.key(step), (4, 9))
            updates, state = jax.jit(tx.update)(grads, state)
            weights += updates
            rate = 0.25 + 0.25 * min(step, 3)
            limit = 2.0 * 1.0 / rate if step < 3 else 2.0
            moved = bent(np.sign(grads), limit, "soft")
            want -= rate * np.sqrt(9 / 4) * moved
    np.testing.assert_allclose(weights, want, atol=1e-5)
