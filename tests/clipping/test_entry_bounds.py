"""Bounds for single entries: what broadcasts against a leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal
from versions import EXPLICIT

import optax_clipx as clipx

LEAF = jnp.array([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]])
BOUNDS = {
    "own shape": jnp.array([[0.5, 1.0, 9.0], [9.0, 4.0, 0.0]]),
    "a row": np.array([0.5, 1.0, 4.0]),
    "a column": jnp.array([[2.0], [3.0]]),
    "one entry": jnp.array([2.5]),
}


def by_clip(bound):
    return clipx.clip(bound).update(LEAF)[0]


def by_value(bound):
    return clipx.clip_by_value(-bound, bound).update(LEAF)[0]


def by_function(bound):
    return clipx.functional.clip_by_value(LEAF, -bound, bound)


def on_the_way_back(bound):
    return jax.grad(
        lambda x: jnp.vdot(LEAF, clipx.backward.clip_value(x, -bound, bound))
    )(LEAF)


@pytest.mark.one_in(10, rest="slow")
@pytest.mark.parametrize("clip", [by_clip, by_value, by_function, on_the_way_back])
@pytest.mark.parametrize("name", BOUNDS)
def test_as_numpy_broadcasts(name, clip):
    bound = np.asarray(BOUNDS[name])
    assert_array_equal(clip(bound), np.clip(LEAF, -bound, bound))


def test_one_bound_an_array_and_one_a_number():
    clipped, _ = clipx.clip_by_value(-1.0, jnp.array([0.5, 1.0, 2.0])).update(LEAF)
    assert_array_equal(clipped, [[0.5, -1, 2], [-1, 1, -1]])


def test_a_prefix_of_arrays_and_numbers():
    updates = {"a": LEAF, "b": jnp.array([3.0, -3.0])}
    clipped, _ = clipx.clip({"a": jnp.array([1.0, 2.0, 3.0]), "b": 2.0}).update(updates)
    assert_array_equal(clipped["a"], [[1, -2, 3], [-1, 2, -3]])
    assert_array_equal(clipped["b"], [2, -2])


def test_a_schedule_beside_an_array():
    updates = {"a": LEAF[0], "b": LEAF[0]}
    limits = {"a": jnp.array([1.0, 1.0, 2.0]), "b": optax.linear_schedule(2, 1, 1)}
    clipper = clipx.clip(limits)
    state = clipper.init(updates)
    _, state = clipper.update(updates, state)
    clipped, _ = clipper.update(updates, state)
    assert_array_equal(clipped["a"], [1, -1, 2])
    assert_array_equal(clipped["b"], [1, -1, 1])


def test_metrics():
    clipper = clipx.clip(jnp.array([3.0, 1.0]))
    _, state = clipper.update(jnp.array([3.0, -4.0]), clipper.init(jnp.zeros(2)))
    found = clipx.metrics(state)
    assert float(found["clip/norm"]) == 5
    assert float(found["clip/clipped_norm"]) == pytest.approx(10**0.5)
    assert float(found["clip/clipped"]) == 0.5
    assert float(found["clip/threshold"]) == 3


def test_magnitudes_of_complex_entries():
    updates = jnp.array([3.0 + 4.0j, 3.0 + 4.0j])
    clipped, _ = clipx.clip(jnp.array([1.0, 10.0])).update(updates)
    assert_allclose(clipped, [0.6 + 0.8j, 3 + 4j], rtol=1e-6)


@pytest.mark.parametrize("policy", ["propagate", "zero", "sanitize"])
def test_policies_are_those_of_a_number(policy):
    updates = jnp.array([jnp.nan, 5.0, jnp.inf])
    number, _ = clipx.clip(2.0, nonfinite=policy).update(updates)
    array, _ = clipx.clip(jnp.full(3, 2.0), nonfinite=policy).update(updates)
    assert_array_equal(array, number)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_is_that_of_the_updates(dtype):
    clipped, _ = clipx.clip(jnp.array([1.0, 2.0])).update(jnp.full(2, 3.0, dtype))
    assert clipped.dtype == dtype
    assert_array_equal(clipped, jnp.array([1.0, 2.0], dtype))


def test_under_inject_hyperparams():
    tx = optax.inject_hyperparams(clipx.clip)(max_delta=jnp.array([1.0, 2.0]))
    updates = jnp.array([3.0, 3.0])
    clipped, _ = tx.update(updates, tx.init(updates))
    assert_array_equal(clipped, [1, 2])


def test_a_traced_bound_that_leaves_no_interval_makes_all_nan():
    clip = jax.jit(lambda low: clipx.functional.clip_by_value(LEAF, low, 1.0))
    assert np.isnan(clip(jnp.array([0.0, 2.0, 0.0]))).all()


BAD = {
    "shape": (jnp.ones(2), r"broadcasts against the shape \(2, 3\)"),
    "rank": (jnp.ones((1, 2, 3)), r"got an array of shape \(1, 2, 3\)"),
    "negative": (jnp.array([1.0, -1.0, 1.0]), "Expected max_delta >= 0"),
    "NaN": (jnp.array([1.0, jnp.nan, 1.0]), "Expected max_delta to be a number"),
    "in a prefix": ({"a": -jnp.ones(3)}, r"Expected max_delta\['a'\] >= 0"),
}


@pytest.mark.one_in(2, rest="slow")
@pytest.mark.parametrize("name", BAD)
def test_bad_bounds(name):
    bound, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        clipx.clip(bound).update(LEAF)


def test_bounds_that_cross_in_an_entry():
    with pytest.raises(ValueError, match="Expected min_value <= max_value"):
        clipx.clip_by_value(jnp.array([0.0, 2.0]), jnp.array([1.0, 1.0]))


def test_bounds_that_are_complex():
    with pytest.raises(TypeError, match="Expected a real max_delta"):
        clipx.clip(jnp.ones(3, jnp.complex64))


def on_mesh(kind, value, *spec):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    return jax.device_put(value, NamedSharding(mesh, P(*spec)))


ROW, WIDE = jnp.arange(8.0) - 4, jnp.arange(8.0) / 2
WANT = np.clip(ROW, -WIDE, WIDE)


@pytest.mark.one_in(2, rest="slow")
@pytest.mark.parametrize("spec", [("x",), ()], ids=["cut", "whole"])
@pytest.mark.parametrize("kind", [AxisType.Auto, EXPLICIT])
def test_a_bound_of_a_cut_leaf_under_jit(kind, spec):
    clipper = clipx.clip_by_value(-on_mesh(kind, WIDE, *spec), WIDE)
    placed = on_mesh(kind, ROW, "x")
    clipped, state = jax.jit(lambda g: clipper.update(g, clipper.init(g)))(placed)
    assert_array_equal(clipped, WANT)
    assert clipped.sharding.is_equivalent_to(placed.sharding, 1)
    assert float(state.metrics.clipped) == 0.375
    assert float(state.metrics.threshold) == 3.5


def test_a_bound_that_is_on_no_mesh_outside_of_jit():
    clipped, _ = clipx.clip(WIDE).update(on_mesh(AxisType.Explicit, ROW, "x"))
    assert_array_equal(clipped, WANT)


def in_shard_map(bound_spec, bound=WIDE):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def update(row, wide):
        clipper = clipx.clip(wide)
        clipped, state = clipper.update(row, clipper.init(row))
        return clipped, state.metrics.threshold

    mapped = jax.shard_map(
        update, mesh=mesh, in_specs=(P("x"), bound_spec), out_specs=(P("x"), P())
    )
    return jax.jit(mapped)(ROW, bound)


def test_in_shard_map_the_bound_is_cut_as_the_leaf():
    clipped, threshold = in_shard_map(P("x"))
    assert_array_equal(clipped, WANT)
    assert float(threshold) == 3.5


def test_in_shard_map_a_whole_bound_is_an_error():
    with pytest.raises(ValueError, match="In shard_map pass the part of this device"):
        in_shard_map(P())


def test_in_shard_map_a_bad_bound_makes_all_devices_nan():
    clipped, _ = in_shard_map(P("x"), WIDE.at[3].set(-1.0))
    assert np.isnan(clipped).all()
