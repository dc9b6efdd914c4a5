"""Decays that optax.inject_hyperparams casts: in bfloat16, 0.999 is 1."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clipx as clipx

PARAMS = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2, jnp.bfloat16)}
LARGE = {"decay": 0.999}
METHODS = {
    "zclip": (clipx.zclip, LARGE, ("mode", "max_norm", "scope", "stats")),
    "adagc": (clipx.adagc, LARGE, ("scope",)),
    "olmo_ratio_clip": (clipx.olmo_ratio_clip, LARGE | {"ratio": 1.5}, ()),
    "clip_by_second_moment": (clipx.clip_by_second_moment, LARGE, ()),
    "scale_by_acclip": (clipx.scale_by_acclip, {"b2": 0.999}, ()),
    "scale_by_stable_adam": (clipx.scale_by_stable_adam, {"b2": 0.999}, ()),
    "stable_adamw": (clipx.stable_adamw, {"learning_rate": 0.1, "b1": 0.999}, ()),
    "stabilize_norm": (clipx.stabilize_norm, {"b3": 0.999}, ()),
    "mixed_clip": (clipx.mixed_clip, LARGE | {"max_norm": 1.0}, ()),
    "normalized_momentum": (clipx.normalized_momentum, LARGE, ()),
}
each = pytest.mark.parametrize("name", METHODS)


def injected(name, dtype=None):
    make, numbers, static = METHODS[name]
    known = inspect.signature(make).parameters
    static = [*static, *{"warmup_steps", "warmup_max_norm"} & set(known)]
    return optax.inject_hyperparams(make, static, hyperparam_dtype=dtype)(**numbers)


@pytest.mark.one_in(10)
@each
def test_a_decay_that_is_rounded_to_1_is_an_error(name):
    match = r"< 1, got .*=Array\(1, dtype=bfloat16\).*hyperparam_dtype=jnp.float32"
    with pytest.raises(ValueError, match=match):
        injected(name).init(PARAMS)


@pytest.mark.one_in(10)
@each
@jax.numpy_dtype_promotion("standard")
def test_where_it_is_traced_every_leaf_is_nan(name):
    tx = injected(name)
    state = jax.jit(tx.init)(PARAMS)
    updates, _ = jax.jit(tx.update)(PARAMS, state, PARAMS)
    assert all(np.isnan(np.float32(u)).all() for u in updates.values())


@pytest.mark.one_in(10)
@each
@jax.numpy_dtype_promotion("standard")
def test_in_float32_it_is_what_was_passed(name):
    tx = injected(name, jnp.float32)
    state = jax.jit(tx.init)(PARAMS)
    updates, state = jax.jit(tx.update)(PARAMS, state, PARAMS)
    assert all(np.isfinite(np.float32(u)).all() for u in updates.values())
    assert jnp.float32(0.999) in state.hyperparams.values()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, jnp.nan])
def test_any_traced_decay_out_of_range_makes_every_leaf_nan(decay):
    @jax.jit
    def step(decay):
        tx = clipx.clip_by_second_moment(decay=decay)
        return tx.update(jnp.ones(2), tx.init(jnp.ones(2)))[0]

    assert np.isnan(step(decay)).all()
    assert step(0.5).tolist() == [1.0, 1.0]


def test_a_mean_that_never_moves_stays_allowed():
    """A decay of 1 freezes z-clip's statistics after its warm-up, if it was meant."""
    clipx.zclip(decay=1.0)
    with pytest.raises(ValueError, match="got decay=Array"):
        clipx.zclip(decay=jnp.bfloat16(0.999))
