"""What adaptive rules remember and move: little more than the fixed ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import optax_clipx as clipx

TRACKED_QUANTILE = functools.partial(clipx.quantile_clip, 0.9, estimator="tracker")

DISTRIBUTIONS = {
    "lognormal": lambda rng, n: rng.lognormal(size=n),
    "pareto": lambda rng, n: 1 + rng.pareto(1.1, size=n),
    "uniform": lambda rng, n: rng.uniform(0.5, 1.5, size=n),
    "two_levels": lambda rng, n: (
        np.where(rng.random(n) < 0.3, 1e-9, 1e9) * rng.lognormal(size=n)
    ),
    "exponential": lambda rng, n: 1e-6 * rng.exponential(size=n),
}
SHARES = [0.01, 0.1, 0.5, 0.9, 0.99]


@pytest.mark.slow
@pytest.mark.parametrize("number", [20000, pytest.param(10**6, marks=pytest.mark.slow)])
def test_the_sketch_is_within_three_percent(number):
    rng = np.random.default_rng(0)
    norms = np.stack([make(rng, number) for make in DISTRIBUTIONS.values()])
    norms = np.clip(norms, 1e-12, 1e12).astype(np.float32)
    rule = clipx.thresholds.quantile(0.5)
    state = rule.init(jnp.zeros(len(norms)))
    assert sum(x.nbytes for x in jax.tree.leaves(rule.init(jnp.zeros(())))) <= 4096

    def step(state, norm):
        return rule.update(norm, state, clipx.thresholds.Context(0))[1], None

    before, _ = jax.jit(lambda s, n: lax.scan(step, s, n))(state, norms[:, :-1].T)
    for q in SHARES:
        limits, _ = clipx.thresholds.quantile(q).update(
            norms[:, -1], before, clipx.thresholds.Context(0)
        )
        want = np.quantile(norms, q, axis=1, method="inverted_cdf")
        np.testing.assert_allclose(limits, want, rtol=0.03)
    assert np.max(before.saturated) <= 2  # the clipped ends alone


def test_the_sketch_saturates_and_says_so():
    rule = clipx.thresholds.quantile(1.0)
    state = rule.init(jnp.float32(0))
    for norm in (1e-30, 1e20, 1.0):
        limit, state = rule.update(
            jnp.float32(norm), state, clipx.thresholds.Context(0)
        )
    assert int(state.saturated) == 2
    assert 0.97e12 < float(limit) < 1e12


@pytest.mark.one_in(10)
@pytest.mark.parametrize(
    ("make", "numbers"),
    [
        (clipx.zclip, 4),
        (clipx.adagc, 3),
        (TRACKED_QUANTILE, 1),
        (clipx.auto_clip, 13),
        (clipx.norm_growth_clip, 2),
        (clipx.log_zscore_clip, 4),
        (clipx.historical_update_clip, 130),
        (lambda: clipx.quantile_clip(window=7), 8),
        (clipx.quantile_clip, 1000),
    ],
)
def test_state_is_as_small_as_stated(make, numbers):
    state = make().init({"w": jnp.ones((100, 100))})
    assert sum(x.size for x in jax.tree.leaves(state.rule)) == numbers


def moved(clipper):
    """Bytes that a step of Adam moves, from XLA's own count."""
    tx = optax.chain(clipper, optax.adam(1e-3))
    params = {f"w{i}": jnp.ones((512, 512)) for i in range(8)}

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):
        compiled = (
            jax.jit(step, donate_argnums=(0, 1))
            .lower(params, tx.init(params), params)
            .compile()
        )
    return compiled.cost_analysis()["bytes accessed"]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "make",
    [
        clipx.zclip,
        TRACKED_QUANTILE,
        clipx.auto_clip,
        clipx.norm_growth_clip,
        clipx.log_zscore_clip,
        clipx.quantile_clip,
        clipx.historical_update_clip,
        lambda: clipx.adagc(scope="tree"),
    ],
)
def test_an_adaptive_rule_adds_only_scalars(make):
    fixed = moved(clipx.clip_by_global_norm(1.0))
    assert moved(make()) <= 1.02 * fixed


def test_a_clipper_inside_takes_over_the_norm_of_the_same_updates_only():
    """test_programs.py has what skipping moves on a TPU: as much as not skipping."""
    clipper = clipx.clip_by_global_norm(1.0)
    grads = {"w": jnp.full(4, 3e37)}
    for inner in (
        optax.chain(clipper, optax.sgd(1.0)),
        optax.chain(optax.scale(0.1), clipper, optax.sgd(1.0)),
        optax.chain(clipx.clip_by_global_norm(1.0, ord=np.inf), optax.sgd(1.0)),
        optax.masked(clipper, {"w": True}),
    ):
        tx = clipx.skip_spikes(inner)
        found, _ = jax.jit(tx.update)(grads, tx.init(grads), grads)
        want, _ = jax.jit(inner.update)(grads, inner.init(grads), grads)
        np.testing.assert_array_equal(found["w"], want["w"])
