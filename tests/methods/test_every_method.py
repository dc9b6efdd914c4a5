"""The table of every public transformation is complete, and what it says is so."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest
from all_methods import EVERY, PUBLIC

import optax_clipx as clipx

KINDS = (
    optax.GradientTransformationExtraArgs,
    optax.GradientTransformation,
    clipx.thresholds.Threshold,
    clipx.measures.Measure,
)


# Its `update` needs the largest logits: tests/methods/test_qk_updates.py.
SUITES = {"qk_clip_updates"}


def makes_a_method(fun):
    """Whether it returns a transformation, or a part of one, or is a response."""
    if not inspect.isfunction(fun):
        return False
    signature = inspect.signature(fun)
    is_response = list(signature.parameters)[:2] == ["norms", "limits"]
    return signature.return_annotation in KINDS or is_response


def test_none_is_missing():
    public = {name for name, fun in PUBLIC.items() if makes_a_method(fun)}
    assert {"clip_by", "zscore", "tree_norm", "drop", "track_norms"} <= public
    covered = frozenset().union(*(method.covers for method in EVERY.values()))
    missing = public - covered - SUITES
    assert missing == set(), (
        "put these in tests/all_methods.py, a rule in ALSO or RULES"
    )
    assert covered <= set(PUBLIC)


def tree(dtype):
    return {"w": jnp.ones((2, 3), dtype), "b": jnp.full(3, 2, dtype)}


@pytest.mark.one_in(10)
@pytest.mark.parametrize("name", EVERY)
def test_each_takes_every_option_and_a_step(name):
    method = EVERY[name]
    for options in (
        {},
        {"nonfinite": "zero", "metrics": False, "axis_name": None, "specs": None},
    ):
        tx = method.make(**options)
        params = tree(jnp.float32)
        updates, _ = jax.eval_shape(tx.update, params, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.one_in(10)
@pytest.mark.parametrize("name", EVERY)
def test_complex_leaves_are_taken_or_refused_as_the_table_says(name):
    tx, params = EVERY[name].make(), tree(jnp.complex64)

    def step():
        return tx.update(params, tx.init(params), params)

    if EVERY[name].complex:
        jax.eval_shape(step)
    else:
        with pytest.raises(TypeError, match="complex"):
            jax.eval_shape(step)
