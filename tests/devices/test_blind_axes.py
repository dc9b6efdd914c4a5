"""Mesh axes of which types say nothing: `pmap` after `pmean`, and the switch for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from all_methods import EVERY
from jax.sharding import AxisType, PartitionSpec as P

import optax_clipx as clipx
from optax_clipx import per_example


@pytest.fixture
def replicated():
    clipx.config.update("blind_axes", "replicated")
    yield
    clipx.config.update("blind_axes", "error")


def averaged(step, devices):
    """A step of pmap after pmean, of gradients whose mean is [3, 4]."""
    return jax.pmap(
        lambda g: step(jax.lax.pmean(g, "i")),
        axis_name="i",
        devices=jax.devices()[:devices],
    )(np.stack([np.array([3.0, 4.0], np.float32)] * devices))


def in_blind_shards(step, devices=2):
    mesh = jax.make_mesh(
        (devices,),
        ("x",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:devices],
    )
    shards = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
    )
    return shards(step)(jnp.array([3.0, 4.0]))


def clip(g):
    tx = clipx.clip_by_global_norm(1.0)
    return tx.update(g, tx.init(g))[0]


@pytest.mark.parametrize("run", [averaged, in_blind_shards])
def test_an_axis_of_one_device_needs_no_word(run):
    found = np.ravel(run(clip, devices=1))
    np.testing.assert_allclose(found, [0.6, 0.8], rtol=1e-6)


@pytest.mark.usefixtures("replicated")
@pytest.mark.parametrize("run", [averaged, in_blind_shards])
def test_the_switch_says_that_updates_are_the_same_everywhere(run):
    found = np.reshape(run(clip, devices=2), (-1, 2))
    np.testing.assert_allclose(found, [[0.6, 0.8]] * len(found), rtol=1e-6)


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("replicated")
@pytest.mark.parametrize(
    "step",
    [
        lambda g: clipx.functional.clip_by_global_norm(g, 1.0)[0],
        lambda g: g / clipx.functional.global_norm(g),
        lambda g: clipx.functional.clip_by_leaf_norm(g, 1.0)[0],
        lambda g: jax.vjp(lambda x: clipx.backward.clip_norm(x, 1.0), g)[1](g)[0],
    ],
)
def test_the_switch_holds_for_functions(step):
    np.testing.assert_allclose(averaged(step, 2), [[0.6, 0.8]] * 2, rtol=1e-6)


@pytest.mark.one_in(10)
@pytest.mark.usefixtures("replicated")
@pytest.mark.parametrize("name", EVERY)
def test_with_the_switch_every_method_is_what_it_is_on_one_device(name):
    tx = EVERY[name].make()

    def step(g):
        tree = {"w": g.reshape(2, 1) * jnp.array([[1.0, 2.0]]), "b": g}
        return tx.update(tree, tx.init(tree), tree)[0]

    g = jnp.array([3.0, 4.0])
    want = jax.tree.map(lambda x: np.stack([x] * 2), jax.jit(step)(g))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-6),
        averaged(step, 2),
        want,
    )


@pytest.mark.usefixtures("replicated")
def test_axis_name_comes_before_the_switch():
    def norm(g):
        return clipx.functional.global_norm(g, axis_name="i")

    found = jax.pmap(norm, axis_name="i", devices=jax.devices()[:2])(
        np.array([[3.0], [4.0]], np.float32)
    )
    np.testing.assert_allclose(found, [5, 5], rtol=1e-6)


@pytest.mark.usefixtures("replicated")
def test_examples_are_no_updates():
    """Each device has examples of its own, and nothing says so."""
    grads = per_example.clipped_grad(lambda w, x: jnp.vdot(w, x), 1.0)
    step = jax.pmap(lambda x: grads(jnp.ones(2), x), axis_name="i")
    with pytest.raises(ValueError, match="axes the examples are spread"):
        step(np.ones((2, 3, 2), np.float32))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("transform", [jax.jit, lambda f: f])
@pytest.mark.parametrize("said", [{"axis_name": "nowhere"}, {"specs": P("nowhere")}])
def test_outside_of_a_mesh_no_name_means_anything(transform, said):
    """A chain for shard_map also makes its state, and runs, outside of it."""
    tx = clipx.clip_by_global_norm(1.0, **said)
    clipped, _ = transform(tx.update)(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
    np.testing.assert_allclose(clipped, [0.6, 0.8], rtol=1e-6)


def test_the_error_names_both_ways_out():
    with pytest.raises(ValueError, match="Cannot tell") as caught:
        averaged(clip, 2)
    assert "axis_name=()" in str(caught.value)
    assert 'config.update("blind_axes", "replicated")' in str(caught.value)


def test_a_chain_of_optax_around_it_is_the_same(replicated):
    tx = optax.chain(clipx.clip_by_global_norm(1.0), optax.sgd(0.5))
    found = averaged(lambda g: tx.update(g, tx.init(g))[0], 2)
    np.testing.assert_allclose(found, [[-0.3, -0.4]] * 2, rtol=1e-6)


def test_the_default_is_an_error():
    assert clipx.config.blind_axes == "error"


@pytest.mark.usefixtures("replicated")
def test_a_switch_is_read_as_an_attribute():
    assert clipx.config.blind_axes == "replicated"


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("blind_axis", "error", r"one of \('blind_axes',\), got 'blind_axis'"),
        ("blind_axes", "same", r"one of \('error', 'replicated'\), got 'same'"),
        ("blind_axes", None, r"one of \('error', 'replicated'\), got None"),
    ],
)
def test_unknown_names_and_values_are_errors(name, value, match):
    with pytest.raises(ValueError, match=match):
        clipx.config.update(name, value)
    assert clipx.config.blind_axes == "error"


def test_a_switch_that_is_set_as_an_attribute_is_an_error():
    with pytest.raises(AttributeError):
        clipx.config.blind_axes = "replicated"
