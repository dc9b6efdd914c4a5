"""States from before 0.1.0, with moments in flat lists, go on through carry_over."""

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stateful
from stateful import STATEFUL

import optax_clipx as clipx
from optax_clipx._methods.acclip import ACClipMemory
from optax_clipx._methods.mixed import MixedMemory
from optax_clipx._methods.second_moment import SecondMomentMemory
from optax_clipx._methods.stabilizers import StabilizerMemory
from optax_clipx._methods.stable_adam import StableAdamMemory
from optax_clipx._trees.leaves import path_of
from optax_clipx._wrappers.error_feedback import ErrorState

FOLDER = Path(__file__).parents[1] / "fixtures" / "states" / "0.1.0.dev0"
PATHS = json.loads((FOLDER / "states.json").read_text())["paths"]
RENAMED = {
    "autoclip": "quantile_clip",
    "autoclip window": "quantile_clip window",
    "autoclip all": "quantile_clip all",
    "quantile_clip": "quantile_clip tracked",
    "quantile_clip units": "quantile_clip tracked units",
    "norm_growth_limit": "norm_growth_clip",
    "clip_spikes": "clip_by_second_moment",
    "watch": "track_norms",
}
NAMES = [name.removesuffix(": state") for name in PATHS if name.endswith(": state")]
NAMES.remove("auto_clip")  # it remembers its first norms now, which nobody wrote down
LEAVES = jax.tree.leaves
LISTS = {
    SecondMomentMemory: lambda m: LEAVES(m.root),
    MixedMemory: lambda m: LEAVES(m.mu),
    ACClipMemory: lambda m: LEAVES(m.mu) + LEAVES(m.tau),
    StableAdamMemory: lambda m: (LEAVES(m.mu) + LEAVES(m.root), m.seen),
    StabilizerMemory: list,
}


def as_it_was(state):
    """A state with the flat lists of before in it."""

    def one(x):
        if isinstance(x, clipx.ClipState):
            return x._replace(rule=LISTS.get(type(x.rule), lambda m: m)(x.rule))
        if isinstance(x, ErrorState):
            return ErrorState(as_it_was(x.inner), LEAVES(x.error))
        return x

    def is_ours(x):
        return isinstance(x, clipx.ClipState | ErrorState)

    return jax.tree.map(one, state, is_leaf=is_ours)


def stored(name, like):
    """What was written, in the structure of another tree; all of it has a place."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    paths = ["/".join(path_of(keys)) for keys, _ in leaves]
    assert paths == PATHS[name]
    with np.load(FOLDER / "states.npz") as arrays:
        return treedef.unflatten([jnp.asarray(arrays[f"{name}: {p}"]) for p in paths])


@pytest.mark.one_in(10)
@pytest.mark.parametrize("name", NAMES)
def test_the_next_updates_are_those_of_before(name):
    tx = STATEFUL[RENAMED.get(name, name)]
    params, grads = (stored(n, stateful.params()) for n in ("params", "grads"))
    new = tx.init(params)
    state, fresh = clipx.carry_over(stored(f"{name}: state", as_it_was(new)), new)
    assert fresh == []
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
    updates, _ = jax.jit(tx.update, donate_argnums=1)(grads, state, params)
    want = stored(f"{name}: updates", stateful.params())
    chex.assert_trees_all_close(updates, want, rtol=2e-6, atol=1e-6)


def test_leaves_without_a_gradient_had_no_place_in_the_lists():
    tx = clipx.error_feedback(clipx.scale_by_stable_adam())
    params = {"a": jnp.ones(2), "b": jnp.arange(3), "c": jnp.ones(4)}
    new = tx.init(params)
    old = new._replace(
        inner=new.inner._replace(
            rule=([jnp.full(n, float(n)) for n in (2, 4, 2, 4)], jnp.int32(7))
        ),
        error=[jnp.full(n, 10.0 * n) for n in (2, 4)],
    )
    state, _ = clipx.carry_over(old, new)
    assert {n: float(x[0]) for n, x in state.error.items()} == {
        "a": 20,
        "b": 0,
        "c": 40,
    }
    assert float(state.inner.rule.root["c"][0]) == 4.0
    assert int(state.inner.rule.seen) == 7


def test_a_memory_that_has_no_place_is_named_with_what_may_be_dropped():
    new = clipx.auto_clip().init(jnp.ones(2))
    old = new._replace(rule=(jnp.float32(2.0), jnp.int32(9), jnp.int32(0)))
    with pytest.raises(ValueError, match=r"drop=\['rule'\]"):
        clipx.carry_over(old, new)
    _, fresh = clipx.carry_over(old, new, drop=["rule"])
    assert fresh == ["rule"]


def test_a_warm_up_goes_on_from_the_steps_that_the_metrics_counted():
    tx = clipx.clip_by_second_moment()
    new = tx.init(jnp.ones(2))
    metrics = new.metrics._replace(steps=jnp.int32(19))
    old = new._replace(metrics=metrics, rule=[jnp.ones(2)])
    state, _ = clipx.carry_over(old, new)
    assert int(state.rule.seen) == 19


def test_moments_of_other_parameters_are_refused():
    tx = clipx.mixed_clip(1.0)
    old = tx.init(jnp.ones(2))._replace(rule=[jnp.ones(3)])
    with pytest.raises(ValueError, match=r"rule/0 \(3,\)"):
        clipx.carry_over(old, tx.init(jnp.ones(2)))
