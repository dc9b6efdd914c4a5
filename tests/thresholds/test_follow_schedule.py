"""Thresholds that follow a schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_clipx as clipx

follow = clipx.thresholds.follow_schedule


@pytest.fixture(autouse=True)
def usual_promotion():
    """optax's schedules multiply the int32 step by floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def limit_at(rule, step, norm=9.0):
    context = clipx.thresholds.Context(step=jnp.int32(step))
    return float(rule.update(jnp.float32(norm), rule.init(jnp.float32(0)), context)[0])


def warmup_cosine(step, peak, warmup, end):
    """optax's schedule of that name, from 0 to the peak and back to 0."""
    if step < warmup:
        return peak * step / warmup
    done = min(step - warmup, end - warmup) / (end - warmup)
    return peak * 0.5 * (1 + np.cos(np.pi * done))


@settings(max_examples=25, deadline=None)
@given(
    peak=st.floats(1e-5, 10),
    warmup=st.integers(1, 50),
    step=st.integers(0, 250),
    power=st.floats(-2, 2),
    floor=st.floats(1e-3, 1),
)
def test_the_formula(peak, warmup, step, power, floor):
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, 200)
    rule = follow(2.0, schedule, power, peak=peak, floor=floor)
    ratio = warmup_cosine(step, peak, warmup, 200) / peak
    # Near its end the schedule itself is a difference of float32 numbers near 1.
    want = 2 * max(ratio, floor) ** power
    np.testing.assert_allclose(limit_at(rule, step), want, rtol=1e-5 + 1e-6 / floor)


def test_the_peak_is_found_where_the_schedule_has_it():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-4, 777, 100_000)
    assert limit_at(follow(1.0, schedule), 777) == 1
    assert limit_at(follow(1.0, schedule, 1), 777 // 7) == pytest.approx(1 / 7)


def test_a_schedule_of_zero_gives_a_finite_threshold():
    rule = follow(1.0, lambda step: jnp.where(step == 0, 0.0, 1.0))
    assert [limit_at(rule, step) for step in (0, 1)] == [10, 1]
    rule = follow(1.0, lambda step: jnp.where(step == 0, 0.0, 1.0), -1, floor=0.25)
    assert limit_at(rule, 0) == 4


def test_the_warm_up_of_spectra_keeps_step_times_threshold():
    schedule = optax.linear_schedule(0.1, 1.0, 9)
    rule = follow(10.0, schedule, -1)
    products = [float(schedule(k)) * limit_at(rule, k) for k in (0, 4, 9)]
    np.testing.assert_allclose(products, 10, rtol=1e-6)


def test_the_memory_is_that_of_the_rule_alone():
    inner = clipx.thresholds.quantile_tracker(0.5)
    rule = follow(inner, lambda step: jnp.where(step < 2, 1.0, 0.25))
    states, limits = [rule.init(jnp.float32(0))] * 2, []
    for step, norm in enumerate((4.0, 2.0, 8.0)):
        context = clipx.thresholds.Context(step=jnp.int32(step))
        limit, mine = rule.update(jnp.float32(norm), states[0], context)
        plain, theirs = inner.update(jnp.float32(norm), states[1], context)
        assert mine == theirs
        states = [mine, theirs]
        limits.append(float(limit / plain))
    assert limits == [1, 1, 2]


def test_each_leaf_keeps_its_own_threshold():
    schedule = optax.constant_schedule(1.0)
    rule = follow({"a": 1.0, "b": 2.0}, schedule)
    clipper = clipx.clip_by(clipx.measures.leaf_norms(), rule)
    grads = {"a": jnp.array([9.0]), "b": jnp.array([9.0])}
    clipped, _ = clipper.update(grads, clipper.init(grads))
    assert (clipped["a"], clipped["b"]) == (1, 2)


def test_steps_are_counted_without_metrics():
    schedule = optax.linear_schedule(1.0, 0.25, 3)
    rule = follow(1.0, schedule)
    clipper = clipx.clip_by(clipx.measures.tree_norm(), rule, metrics=False)
    state = clipper.init(jnp.zeros(1))
    for _ in range(4):
        clipped, state = clipper.update(jnp.array([9.0]), state)
    assert np.isclose(clipped, 2, rtol=1e-6)


def in_shard_map(check):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    spec = PartitionSpec("data")

    def run(update, grads):
        grads = jax.device_put(grads, NamedSharding(mesh, spec))
        options = {"in_specs": spec, "out_specs": spec, "check_vma": check}
        with jax.set_mesh(mesh):
            return jax.jit(jax.shard_map(update, **options))(grads)

    return run


@pytest.mark.parametrize(
    "run",
    [
        lambda update, grads: update(grads),
        lambda update, grads: jax.jit(update)(grads),
        lambda update, grads: jax.jit(lambda g: jax.lax.map(update, g[None]))(grads)[0],
        in_shard_map(True),
        in_shard_map(False),
    ],
    ids=["eager", "jit", "loop", "shard_map", "shard_map without types"],
)
def test_the_peak_is_found_wherever_the_update_runs(run):
    # The first ten steps are at half of the peak.
    rule = follow(1.0, lambda step: jnp.where(step < 10, 1.0, 2.0), 1)
    clipper = clipx.clip_by(clipx.measures.tree_norm(), rule, axis_name="data")
    state = clipper.init(jnp.zeros(2))
    clipped = run(lambda g: clipper.update(g, state)[0], jnp.array([3.0, 4.0]))
    np.testing.assert_allclose(clipped, [0.3, 0.4], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: follow(1.0, 0.1), "Expected schedule to be an optax schedule"),
        (lambda: follow(1.0, lambda k: 1.0, jnp.inf), "finite power"),
        (lambda: follow(1.0, lambda k: 1.0, peak=0), "peak > 0"),
        (lambda: follow(1.0, lambda k: 1.0, floor=0), "floor > 0"),
        (lambda: follow(1.0, lambda k: 1.0, jnp.ones(())), "static power"),
        (lambda: limit_at(follow(1.0, lambda k: 0.0 * k), 0), "got 0.0 as the largest"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_traced_schedule_needs_its_peak():
    def limit(rate, **options):
        rule = follow(1.0, lambda step: rate * (1.0 + step), -1, **options)
        context = clipx.thresholds.Context(step=jnp.int32(0))
        return rule.update(jnp.float32(9), (), context)[0]

    with pytest.raises(ValueError, match="pass peak="):
        jax.jit(limit)(1.0)
    assert jax.jit(lambda rate: limit(rate, peak=4 * rate))(2.0) == 4
