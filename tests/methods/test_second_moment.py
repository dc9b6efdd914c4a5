"""Clipping by the second moment: each setting against float64, AdamWClip and ADOPT."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st
from optax.contrib import scale_by_adopt

import optax_clipx as clipx

SMOOTH = functools.partial(clipx.responses.smooth, p=2.0)


def reference(grads, theta, decay, warmup, debias, init, stats, floor, smooth):
    """The docstring's formula, one step after the other."""
    v, out = np.zeros_like(grads[0]), []
    for k, g in enumerate(grads):
        weight = 1 - decay**k if debias and k else 1.0
        root = np.maximum(np.sqrt(v / weight), floor)
        limit = np.sqrt(theta(k)) * root
        limit = np.where((limit > 0) & (k >= warmup), limit, np.inf)
        size = np.abs(g)
        if smooth:
            shrunk = size / np.sqrt(1 + (size / limit) ** 2)
        else:
            shrunk = np.minimum(size, limit)
        out.append(np.sign(g) * shrunk)
        entering = size if stats == "raw" else shrunk
        b = 0.0 if init == "first" and k == 0 else decay
        v = b * v + (1 - b) * entering**2
    return out


def spiky(seed, steps=12, size=6):
    """Heavy-tailed entries of different levels; one of them is 0 for some steps."""
    rng = np.random.default_rng(seed)
    grads = rng.standard_t(2, size=(steps, size)) * np.geomspace(1e-3, 1e3, size)
    grads[:4, 2] = 0
    return np.float64(np.float32(grads))


SETTINGS = st.fixed_dictionaries(
    {
        "theta": st.floats(0.5, 20),
        "decay": st.sampled_from([0.0, 0.5, 0.9, 0.999]),
        "warmup_steps": st.integers(0, 3),
        "start": st.sampled_from(["zeros", "debiased", "first"]),
        "stats": st.sampled_from(["clipped", "raw"]),
        "floor": st.sampled_from([0.0, 0.01, 10.0]),
        "smooth": st.booleans(),
        "scheduled": st.booleans(),
    }
)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31), chosen=SETTINGS)
def test_the_formula(seed, chosen):
    grads = spiky(seed)

    def theta(k):
        return chosen["theta"] * (1 + k if chosen["scheduled"] else 1)

    debias = chosen["start"] == "debiased"
    init = "first" if chosen["start"] == "first" else "zeros"
    shared = {key: chosen[key] for key in ("decay", "stats", "floor")}
    tx = clipx.clip_by_second_moment(
        (lambda k: theta(k.astype(jnp.float32))) if chosen["scheduled"] else theta(0),
        warmup_steps=chosen["warmup_steps"],
        debias=debias,
        init=init,
        response=SMOOTH if chosen["smooth"] else None,
        **shared,
    )
    want = reference(
        grads,
        theta,
        warmup=chosen["warmup_steps"],
        debias=debias,
        init=init,
        smooth=chosen["smooth"],
        **shared,
    )
    state = tx.init(jnp.zeros(grads.shape[1]))
    _, found = jax.jit(
        lambda g: jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], state, g)
    )(jnp.float32(grads))
    np.testing.assert_allclose(np.float64(found), want, rtol=1e-5, atol=1e-12)


def test_adamw_clip():
    """v and m of AdamW are fed with what t = 3 sqrt(v / (1 - b2^(t-1))) leaves."""
    rate, b1, b2, wd = 0.01, 0.9, 0.99, 0.1
    tx = optax.chain(
        clipx.clip_by_second_moment(9.0, decay=b2, debias=True, warmup_steps=1),
        optax.adamw(rate, b1, b2, weight_decay=wd),
    )
    grads, params = spiky(3, steps=20), jnp.ones(6)
    state, update = tx.init(params), jax.jit(tx.update)
    w, m, v, clipped = np.ones(6), np.zeros(6), np.zeros(6), 0
    with jax.numpy_dtype_promotion("standard"):
        for t, g in enumerate(grads, 1):
            updates, state = update(jnp.float32(g), state, params)
            params = optax.apply_updates(params, updates)
            limit = 3 * np.sqrt(v / (1 - b2 ** (t - 1))) if t > 1 else np.inf
            limit = np.where((v > 0) & (t > 1), limit, np.inf)
            clipped += np.sum(np.abs(g) > limit)
            g = np.clip(g, -limit, limit)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            size = np.sqrt(v / (1 - b2**t)) + 1e-8
            w -= rate * (m / (1 - b1**t) / size + wd * w)
    assert clipped > 10
    np.testing.assert_allclose(params, w, rtol=1e-4)


def test_adopt_clips_the_same():
    """optax's ADOPT without momentum is the clipped gradient over its root."""
    theirs = scale_by_adopt(b1=0.0, b2=0.99, eps=1e-2)
    ours = clipx.clip_by_second_moment(
        lambda k: jnp.sqrt(k.astype(jnp.float32)),
        decay=0.99,
        init="first",
        stats="raw",
        floor=1e-2,
        warmup_steps=1,
    )
    grads, zeros = spiky(5, steps=20), jnp.zeros(6)
    states, v = [theirs.init(zeros), ours.init(zeros)], np.zeros(6)
    number = 0
    with jax.numpy_dtype_promotion("standard"):
        for k, g in enumerate(grads):
            want, states[0] = theirs.update(jnp.float32(g), states[0])
            found, states[1] = ours.update(jnp.float32(g), states[1])
            if k:
                root = np.maximum(np.sqrt(v), 1e-2)
                np.testing.assert_allclose(found / root, want, rtol=1e-5)
                number += np.sum(np.abs(g) > k**0.25 * root)
            b = 0.99 if k else 0.0
            v = b * v + (1 - b) * g**2
    assert number > 10


@pytest.mark.parametrize("options", [{"debias": True}, {"init": "first"}])
def test_nothing_is_clipped_before_there_is_a_second_moment(options):
    tx = clipx.clip_by_second_moment(1.0, warmup_steps=0, **options)
    state = tx.init(jnp.zeros(1))
    clipped, state = tx.update(jnp.array([5.0]), state)
    assert clipped == 5
    # From the second step on the first gradient is the threshold.
    np.testing.assert_allclose(tx.update(jnp.array([7.0]), state)[0], 5, rtol=1e-6)


def test_without_debiasing_the_second_step_is_far_too_low():
    tx = clipx.clip_by_second_moment(1.0, warmup_steps=1)
    _, state = tx.update(jnp.array([5.0]), tx.init(jnp.zeros(1)))
    found, _ = tx.update(jnp.array([5.0]), state)
    np.testing.assert_allclose(found, 5 * np.sqrt(0.001), rtol=1e-5)


def test_the_floor_lets_small_entries_alone():
    grads = [jnp.array([1e-6]), jnp.array([1e-4]), jnp.array([1.0])]
    tx = clipx.clip_by_second_moment(
        4.0, debias=True, decay=0.5, warmup_steps=1, floor=1e-3
    )
    state, found = tx.init(jnp.zeros(1)), []
    for g in grads:
        clipped, state = jax.jit(tx.update)(g, state)
        found.append(float(clipped[0]))
    np.testing.assert_allclose(found, [1e-6, 1e-4, 2e-3], rtol=1e-5)


def test_raw_statistics_with_a_response_and_a_policy():
    response = functools.partial(clipx.responses.smooth, p=1.0)
    tx = clipx.clip_by_second_moment(
        4.0, warmup_steps=1, stats="raw", response=response, nonfinite="zero"
    )
    state = tx.init(jnp.zeros(2))
    for g in ([1.0, 2.0], [jnp.nan, 1.0], [1.0, 2.0]):
        clipped, state = jax.jit(tx.update)(jnp.array(g), state)
    assert state.rule.seen == 2
    bound = 2 * np.sqrt(0.001) * np.array([1.0, 2.0])
    np.testing.assert_allclose(clipped, bound / (1 + bound / [1, 2]), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"debias": True, "init": "first"}, "needs no correction"),
        ({"init": "ones"}, "init to be one of"),
        ({"stats": "skip"}, "stats to be one of"),
        ({"floor": -1.0}, "0 <= floor"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        clipx.clip_by_second_moment(**options)


def test_magnitudes_shrink_smoothly():
    tx = clipx.clip_by(clipx.measures.magnitudes(), 3.0, SMOOTH)
    clipped, _ = tx.update(jnp.array([4.0, -4.0, 0.0]))
    np.testing.assert_allclose(clipped, [2.4, -2.4, 0], rtol=1e-6)
