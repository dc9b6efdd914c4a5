"""Threshold rules against their formulas, and methods against reference codes."""

import functools
from functools import partial
from pathlib import Path

import adaptive_reference as ref
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax import lax

import optax_clipx as clipx

GOLDEN = Path(__file__).parents[1] / "golden"
RULES = {
    "zscore": (clipx.thresholds.zscore(), ref.zscore_ema),
    "zscore_mean": (
        clipx.thresholds.zscore(target="mean"),
        partial(ref.zscore_ema, target="mean"),
    ),
    "zscore_reciprocal": (
        clipx.thresholds.zscore(2.0, target="reciprocal", clip_factor=0.8, decay=0.9),
        partial(ref.zscore_ema, 2.0, target="reciprocal", factor=0.8, decay=0.9),
    ),
    "zscore_raw": (
        clipx.thresholds.zscore(stats="raw"),
        partial(ref.zscore_ema, stats="raw", patience=None),
    ),
    "zscore_skip": (
        clipx.thresholds.zscore(stats="skip", patience=5),
        partial(ref.zscore_ema, stats="skip", patience=5),
    ),
    "zscore_patient": (
        clipx.thresholds.zscore(warmup_steps=5, patience=3),
        partial(ref.zscore_ema, warmup=5, patience=3),
    ),
    "window": (
        clipx.thresholds.zscore(3.0, window=16, warmup_steps=8, stats="raw"),
        ref.zscore_window,
    ),
    "window_clipped": (
        clipx.thresholds.zscore(3.0, window=7, warmup_steps=4),
        partial(ref.zscore_window, window=7, warmup=4, stats="clipped"),
    ),
    "log_zscore": (
        clipx.thresholds.zscore(
            2.0,
            decay=0.95,
            warmup_steps=0,
            space="log",
            target="mean",
            include_current=True,
            stats="raw",
        ),
        ref.log_zscore,
    ),
    "quantile_all": (clipx.thresholds.quantile(0.1, max_steps=100), ref.percentile),
    "quantile_window": (
        clipx.thresholds.quantile(0.9, window=9),
        partial(ref.percentile, 0.9, 9),
    ),
    "tracker": (clipx.thresholds.quantile_tracker(0.9), ref.tracker),
    "auto": (clipx.thresholds.auto(), ref.auto),
    "ema_ratio": (clipx.thresholds.ema_ratio(1.04), ref.ema_ratio),
    "ema_ratio_min": (
        clipx.thresholds.ema_ratio(
            1.1, decay=0.9, warmup_steps=6, warmup_limit=2.0, init="min"
        ),
        partial(ref.ema_ratio, 1.1, 0.9, 6, 2.0, "min"),
    ),
    "ema_ratio_mean": (
        clipx.thresholds.ema_ratio(
            1.1, warmup_steps=6, init="mean", floor=0.7, stats="raw"
        ),
        partial(ref.ema_ratio, 1.1, warmup=6, init="mean", floor=0.7, stats="raw"),
    ),
    "ema_ratio_skip": (
        clipx.thresholds.ema_ratio(1.5, stats="skip", patience=4),
        partial(ref.ema_ratio, 1.5, stats="skip", patience=4),
    ),
    "ema_ratio_olmo": (
        clipx.thresholds.ema_ratio(1.5, warmup_steps=1),
        partial(ref.ema_ratio, 1.5, warmup=1),
    ),
    "growth": (clipx.thresholds.norm_growth(), ref.growth),
    "growth_floor": (
        clipx.thresholds.norm_growth(1.2, floor=0.5, patience=6),
        partial(ref.growth, 1.2, 0.5, patience=6),
    ),
    "growth_raw": (
        clipx.thresholds.norm_growth(1.2, stats="raw"),
        partial(ref.growth, 1.2, stats="raw"),
    ),
    "band": (clipx.thresholds.group_band(0.5, 2.0), ref.band),
}


@functools.cache
def runner(name):
    rule, _ = RULES[name]

    def step(state, norm):
        limit, state = rule.update(norm, state, clipx.thresholds.Context(0))
        return state, limit

    @jax.jit
    def run(norms):
        return lax.scan(step, rule.init(jnp.float32(0)), norms)

    return run


@st.composite
def sequences(draw):
    """Norms of a run: noise, with spikes, zeros and a shift of the level."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    norms = np.exp(rng.normal(scale=draw(st.sampled_from([0.02, 0.3, 1.0])), size=80))
    norms *= 10.0 ** draw(st.integers(-9, 9))
    for _ in range(draw(st.integers(0, 4))):
        norms[draw(st.integers(0, 79))] *= draw(st.sampled_from([1e-4, 8.0, 1e3, 1e6]))
    for _ in range(draw(st.integers(0, 4))):
        norms[draw(st.integers(0, 79))] = 0
    norms[draw(st.integers(0, 79)) :] *= draw(st.sampled_from([1.0, 30.0, 0.01]))
    return norms.astype(np.float32)


@pytest.mark.parametrize("name", RULES)
def test_rule_is_its_formula(name):
    factory = RULES[name][1]

    @settings(max_examples=30, deadline=None, derandomize=True, database=None)
    @given(sequences())
    def check(norms):
        state, found = runner(name)(jnp.asarray(norms))
        want = ref.limits(factory(), norms)
        compared = 0
        for n, limit, exact in zip(norms, np.float64(found), want, strict=True):
            if n == 0:
                continue
            # Where a norm is at its limit to rounding, both decisions are right, and
            # from there on the two may part.
            if np.isfinite(exact) and abs(n / exact - 1) < 1e-5 and "band" not in name:
                break
            if not np.isfinite(exact):
                assert limit == exact
            else:
                assert abs(limit / exact - 1) < 1e-4, (n, limit, exact)
            compared += 1
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))

    check()
