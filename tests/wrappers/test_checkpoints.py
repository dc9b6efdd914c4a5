"""Checkpoints: every state comes back, and old ones take in new clippers."""

import functools
import inspect
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import stateful
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from stateful import STATEFUL

import optax_clipx as clipx
from optax_clipx._trees.leaves import path_of

HERE = Path(__file__).parents[1]
RELEASES = sorted(  # what was before them has a test of its own
    (x for x in (HERE / "fixtures" / "states").iterdir() if ".dev" not in x.name),
    key=lambda path: [int(number) for number in path.name.split(".")],
)
# One for each kind of state; the others are in the slow run.
USUAL = ("quantile_clip window", "quantile_clip tracked units", "skip_spikes")
by_release = pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)


@functools.cache
def stored(release):
    """What a release wrote: the arrays of each tree by path, in their order."""
    paths = json.loads((release / "states.json").read_text())["paths"]
    with np.load(release / "states.npz") as arrays:
        return {
            name: {path: arrays[f"{name}: {path}"] for path in paths[name]}
            for name in paths
        }


def load(release, name, fresh):
    """Stored arrays in the place of fresh ones, by path; each of them has one."""
    arrays = dict(stored(release)[name])
    leaves, treedef = jax.tree_util.tree_flatten_with_path(fresh)
    found = []
    for keys, leaf in leaves:
        array = arrays.pop("/".join(path_of(keys)), None)
        if array is not None:
            assert (array.shape, array.dtype) == (leaf.shape, leaf.dtype), keys
            leaf = jnp.asarray(array)
        found.append(leaf)
    assert not arrays, f"{name} has no place for {list(arrays)}"
    return jax.tree.unflatten(treedef, found)


@functools.cache
def states():
    """The stored state of each transformation in the newest release."""
    return {
        name: load(RELEASES[-1], f"{name}: state", state)
        for name, state in fresh().items()
    }


def abstract(tree):
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


def known(release):
    return [name for name in STATEFUL if f"{name}: state" in stored(release)]


def fresh():
    params = stateful.params()
    return {name: STATEFUL[name].init(params) for name in known(RELEASES[-1])}


def assert_same(found, want):
    """The same structure, types and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(want)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, want)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_no_transformation_is_left_out():
    public = {
        name
        for name, value in vars(clipx).items()
        if inspect.isfunction(value)
        and inspect.signature(value).return_annotation
        is optax.GradientTransformationExtraArgs
    }
    assert public == {name.split()[0] for name in STATEFUL}
    assert len(public) > 25


@by_release
def test_states_of_releases_load(release):
    """Each array has its place, of its shape and dtype, and in the old order."""
    assert release.name != clipx.__version__ or known(release) == list(STATEFUL)
    for name in known(release):
        old = stored(release)[f"{name}: state"]
        now = STATEFUL[name].init(stateful.params())
        load(release, f"{name}: state", now)
        leaves = jax.tree_util.tree_leaves_with_path(now)
        order = ["/".join(path_of(keys)) for keys, _ in leaves]
        assert len(set(order)) == len(order)
        # Equinox has nothing but the order to go by.
        assert [path for path in order if path in old] == list(old)


@by_release
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in USUAL else pytest.mark.slow)
        for name in STATEFUL
    ],
)
def test_states_of_releases_go_on_as_they_did(release, name):
    if name not in known(release):
        pytest.skip(f"{release.name} had no {name}")
    params, grads = (
        load(release, tree, stateful.params()) for tree in ("params", "grads")
    )
    tx = STATEFUL[name]
    before = load(release, f"{name}: state", tx.init(params))
    updates, after = jax.jit(tx.update)(grads, before, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    for tree, found in (("updates", updates), ("next", after)):
        want = load(release, f"{name}: {tree}", found)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            if jnp.issubdtype(b.dtype, jnp.floating):
                # Another processor or compiler may round the last bits otherwise.
                largest = float(jnp.max(jnp.abs(b)))
                np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6 * largest)
            else:
                np.testing.assert_array_equal(a, b)


def by_orbax(tree, like, folder):
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(folder / "state", args=ocp.args.StandardSave(tree))
        return checkpointer.restore(
            folder / "state", args=ocp.args.StandardRestore(abstract(like))
        )


def by_orbax_manager(tree, like, folder):
    with ocp.CheckpointManager(folder) as manager:
        manager.save(1, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
        return manager.restore(1, args=ocp.args.StandardRestore(abstract(like)))


def by_flax_bytes(tree, like, folder):
    (folder / "state").write_bytes(flax.serialization.to_bytes(tree))
    return flax.serialization.from_bytes(like, (folder / "state").read_bytes())


def by_flax_dict(tree, like, folder):
    plain = flax.serialization.to_state_dict(tree)
    return flax.serialization.from_state_dict(like, plain)


def by_equinox(tree, like, folder):
    eqx.tree_serialise_leaves(folder / "state.eqx", tree)
    return eqx.tree_deserialise_leaves(folder / "state.eqx", like)


LIBRARIES = (by_orbax, by_orbax_manager, by_flax_bytes, by_flax_dict, by_equinox)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("library", LIBRARIES)
def test_every_state_comes_back(library, tmp_path):
    assert_same(library(states(), fresh(), tmp_path), states())


def test_a_state_that_came_back_goes_on_without_another_trace(tmp_path):
    tx = clipx.zclip(warmup_steps=3)
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(n=1)(tx.update))
    state = tx.init(stateful.params())
    for i in range(4):
        _, state = step(stateful.grads(i), state)
    want = step(stateful.grads(4), state)
    for library in LIBRARIES:
        folder = tmp_path / library.__name__
        folder.mkdir()
        restored = library(state, tx.init(stateful.params()), folder)
        assert_same(step(stateful.grads(4), restored), want)


def test_an_asynchronous_save_has_the_state_of_its_step(tmp_path):
    """The next step is given the same memory while the save is under way."""
    tx = clipx.error_feedback(clipx.clip_by_global_norm(1.0))
    tree = {"w": jnp.zeros((1024, 1024))}
    step = jax.jit(tx.update, donate_argnums=1)
    _, state = step({"w": jnp.ones((1024, 1024))}, tx.init(tree))
    want = jax.tree.map(np.array, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        for _ in range(3):
            _, state = step({"w": jnp.ones((1024, 1024))}, state)
        checkpointer.wait_until_finished()
        found = checkpointer.restore(tmp_path / "state", abstract(tx.init(tree)))
    assert_same(found, want)
    assert not np.array_equal(state.error["w"], want.error["w"])


def mesh_of(count, kind):
    devices = jax.devices()[:count]
    return jax.make_mesh((count,), ("x",), axis_types=(kind,), devices=devices)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        pytest.param(kind, names, marks=marks, id=f"{kind.name}-{names[0]}")
        for kind, names, marks in (
            (AxisType.Auto, ("error_feedback", "quantile_clip window"), ()),
            (AxisType.Auto, ("track_norms", "adagc"), pytest.mark.slow),
            (AxisType.Explicit, ("clip_by_second_moment", "zclip"), pytest.mark.slow),
            (AxisType.Explicit, ("quantile_clip tracked units",), pytest.mark.slow),
        )
    ],
)
def test_onto_another_mesh(kind, names, tmp_path):
    """Saved on eight devices, restored onto four: the same state, and step."""
    eight, four = mesh_of(8, kind), mesh_of(4, kind)

    def put(tree, mesh):
        return jax.device_put(tree, NamedSharding(mesh, P("x")))

    def target(mesh):
        params = put(stateful.params(), mesh)
        return abstract({n: STATEFUL[n].init(params) for n in names})

    alone = {name: states()[name] for name in names}
    saved = jax.tree.map(
        lambda x, t: jax.device_put(x, t.sharding), alone, target(eight)
    )
    if names[0] in ("error_feedback", "clip_by_second_moment"):
        shardings = [leaf.sharding for leaf in jax.tree.leaves(saved)]
        assert not all(sharding.is_fully_replicated for sharding in shardings)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", target(four))
    assert_same(restored, alone)
    for leaf in jax.tree.leaves(restored):
        assert leaf.sharding.device_set == set(four.devices.flat)
    grads, params = stateful.grads(6), stateful.params()
    found = stateful.jitted(put(grads, four), restored, put(params, four), names)
    want = stateful.jitted(grads, alone, params, names)
    chex.assert_trees_all_close(
        *(jax.tree.map(np.asarray, x) for x in (found, want)), rtol=1e-5, atol=1e-6
    )


def run(folder, steps, kill_after=None):
    """Runs the worker, killed when it tells of a step; the steps that it told of."""
    command = [sys.executable, HERE / "resume_worker.py", folder, str(steps)]
    told = []
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache"),  # for time
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        for line in process.stdout:
            told.append(int(line))
            if len(told) == kill_after:
                time.sleep(random.Random(told[-1]).uniform(0, 0.02))
                process.send_signal(signal.SIGKILL)
    assert process.returncode == (0 if kill_after is None else -signal.SIGKILL)
    return told


@pytest.mark.slow
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path):
    """Parameters, state and records, bit for bit, after ten kills."""
    steps, rng = 160, random.Random(0)
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    runs = [run(tmp_path / "killed", steps, rng.randint(2, 14)) for _ in range(10)]
    runs.append(run(tmp_path / "killed", steps))
    starts = [told[0] for told in runs]
    assert starts[-1] > starts[0] == 0
    assert sum(map(len, runs)) > steps  # steps were run again
    run(tmp_path / "whole", steps)
    killed, whole = (
        dict(np.load(tmp_path / n / "end.npz")) for n in ("killed", "whole")
    )
    assert list(killed) == list(whole)
    for name in whole:
        assert killed[name].tobytes() == whole[name].tobytes(), name
    killed, whole = ((tmp_path / n / "run.jsonl") for n in ("killed", "whole"))
    assert killed.read_bytes() == whole.read_bytes()
    history = clipx.History.load(killed)
    assert history.steps.tolist() == list(range(steps))
    assert history["skip/num_skipped"][-1] > 0
