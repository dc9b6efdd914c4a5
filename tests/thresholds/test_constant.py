"""Fixed thresholds: one for all, for each leaf or for each label."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clipx as clipx

UPDATES = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([6.0, 8.0])}


def clipped(tx, updates=UPDATES):
    return tx.update(updates, tx.init(updates))[0]


def test_one_threshold_for_each_leaf():
    found = clipped(clipx.clip_by_leaf_norm({"a": 1.0, "b": 20.0}))
    np.testing.assert_allclose(found["a"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(found["b"], [6.0, 8.0])


def test_one_leaf_has_one_threshold():
    found = clipped(clipx.clip_by_leaf_norm({"a": 1.0}), {"a": UPDATES["a"]})
    np.testing.assert_allclose(found["a"], [0.6, 0.8], rtol=1e-6)


def test_none_stands_opposite_none():
    updates = {"a": UPDATES["a"], "b": None}
    found = clipped(clipx.clip_by_leaf_norm({"a": 1.0, "b": None}), updates)
    np.testing.assert_allclose(found["a"], [0.6, 0.8], rtol=1e-6)


def test_the_key_of_a_bad_threshold_is_named():
    with pytest.raises(ValueError, match=r"max_norm\['b'\]=-2\.0"):
        clipx.clip_by_leaf_norm({"a": None, "b": -2.0})


def test_the_tree_has_one_threshold():
    tx = clipx.clip_by(clipx.measures.tree_norm(), {"a": 1.0, "b": 2.0})
    with pytest.raises(ValueError, match="Expected a single threshold for the norm"):
        tx.update(UPDATES, tx.init(UPDATES))


def test_each_unit_has_the_threshold_of_its_leaf():
    units = clipx.measures.unit_norms(axis=0)
    found = clipped(clipx.clip_by(units, {"a": 1.0, "b": 20.0}))
    np.testing.assert_allclose(found["a"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(found["b"], [6.0, 8.0])


def by_label(limits):
    return clipx.clip_by_group_norm(limits, lambda path, leaf: path[0])


def test_one_threshold_for_each_label():
    found = clipped(by_label({"a": 1.0, "b": optax.constant_schedule(5.0)}))
    np.testing.assert_allclose(found["a"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(found["b"], [3.0, 4.0], rtol=1e-6)


def test_every_label_needs_a_threshold():
    with pytest.raises(ValueError, match=r"none for 'b': .* has \['a'\]"):
        clipped(by_label({"a": 1.0}))


def test_schedules_count_from_zero():
    schedule = optax.linear_schedule(4.0, 1.0, 3)
    rule = clipx.thresholds.constant(schedule)
    assert rule.uses_step
    assert not clipx.thresholds.constant(4.0).uses_step
    for step, want in enumerate((4.0, 3.0, 2.0, 1.0, 1.0)):
        context = clipx.thresholds.Context(step=step)
        found, _ = rule.update(jnp.float32(9.0), (), context)
        np.testing.assert_allclose(found, want, rtol=1e-6)
