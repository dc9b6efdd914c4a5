"""Checkpoints of Optax's clipping go on with ours, and ours with Optax's."""

import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optax_clipx as clipx

pytestmark = pytest.mark.filterwarnings("ignore:.*jax.tree_util:DeprecationWarning")
PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
PAIRS = {
    "clip": (optax.clip(0.5), clipx.clip, (0.5,)),
    "clip_by_global_norm": (
        optax.clip_by_global_norm(1.0),
        clipx.clip_by_global_norm,
        (1.0,),
    ),
    "clip_by_block_rms": (
        optax.clip_by_block_rms(0.5),
        clipx.clip_by_block_rms,
        (0.5,),
    ),
    "adaptive_grad_clip": (
        optax.adaptive_grad_clip(0.1),
        clipx.adaptive_grad_clip,
        (0.1,),
    ),
}
each = pytest.mark.parametrize("name", PAIRS)


def before_adam(clipper):
    return optax.chain(clipper, optax.adam(0.1))


@jax.numpy_dtype_promotion("standard")
@jax.numpy_rank_promotion("allow")
def step(tx, state):
    return tx.update(jax.tree.map(lambda x: 3 * x, PARAMS), state, PARAMS)


def by_orbax(state, like, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return checkpointer.restore(folder / "state", target)


def by_pickle(state, like, folder):
    (folder / "state").write_bytes(pickle.dumps(jax.tree.map(np.asarray, state)))
    return pickle.loads((folder / "state").read_bytes())


def by_npz(state, like, folder):
    np.savez(folder / "state.npz", *jax.tree.leaves(state))
    with np.load(folder / "state.npz") as arrays:
        leaves = [jnp.asarray(x) for x in arrays.values()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


libraries = pytest.mark.parametrize("library", [by_orbax, by_pickle, by_npz])


@pytest.mark.one_in(10)
@each
@libraries
def test_without_metrics_it_is_restored_as_it_is(name, library, tmp_path):
    theirs, make, limit = PAIRS[name]
    old, new = before_adam(theirs), before_adam(make(*limit, metrics=False))
    _, state = step(old, old.init(PARAMS))
    restored = library(state, new.init(PARAMS), tmp_path)
    assert jax.tree.structure(restored) == jax.tree.structure(new.init(PARAMS))
    updates, after = step(new, restored)
    want, _ = step(old, state)
    chex.assert_trees_all_close(updates, want, rtol=1e-5)
    assert int(after[1][0].count) == 2


@pytest.mark.one_in(10)
@each
@libraries
def test_and_optax_restores_what_was_written_without_metrics(name, library, tmp_path):
    theirs, make, limit = PAIRS[name]
    old, new = before_adam(make(*limit, metrics=False)), before_adam(theirs)
    _, state = step(old, old.init(PARAMS))
    updates, _ = step(new, library(state, new.init(PARAMS), tmp_path))
    want, _ = step(old, state)
    chex.assert_trees_all_close(updates, want, rtol=1e-5)


@pytest.mark.one_in(10)
@each
@libraries
def test_with_metrics_it_is_carried_over(name, library, tmp_path):
    theirs, make, limit = PAIRS[name]
    old, new = before_adam(theirs), before_adam(make(*limit))
    _, state = step(old, old.init(PARAMS))
    restored = library(state, old.init(PARAMS), tmp_path)
    begun, fresh = clipx.carry_over(restored, new.init(PARAMS))
    assert fresh == ["0"]
    updates, after = step(new, begun)
    want, _ = step(old, state)
    chex.assert_trees_all_close(updates, want, rtol=1e-5)
    assert int(clipx.metrics(after)["clip/steps"]) == 1


@pytest.mark.one_in(10)
@each
@libraries
def test_and_back_to_optax_by_dropping_the_metrics(name, library, tmp_path):
    theirs, make, limit = PAIRS[name]
    old, new = before_adam(make(*limit)), before_adam(theirs)
    _, state = step(old, old.init(PARAMS))
    restored = library(state, old.init(PARAMS), tmp_path)
    begun, fresh = clipx.carry_over(restored, new.init(PARAMS), drop=["0"])
    assert fresh == []
    updates, _ = step(new, begun)
    want, _ = step(old, state)
    chex.assert_trees_all_close(updates, want, rtol=1e-5)
