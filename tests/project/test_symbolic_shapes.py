"""`jax.export` with sizes that are known only when the program is called."""

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from all_methods import EVERY
from jax import export

import optax_clipx as clipx
from optax_clipx import backward, functional

FUNCTIONS = {
    "clip_norm": lambda x: backward.clip_norm(x, 1.0) ** 2,
    "clip_norm of examples": lambda x: backward.clip_norm(x, 1.0, batch_axes=0) ** 2,
    "clip_value": lambda x: backward.clip_value(x, -1.0, 1.0) ** 2,
    "zero_nonfinite": lambda x: backward.zero_nonfinite(x) ** 2,
    "clip_by_global_norm": lambda x: functional.clip_by_global_norm(x, 1.0)[0],
    "clip_by_leaf_norm": lambda x: functional.clip_by_leaf_norm(x, 1.0)[0],
    "clip_by_value": lambda x: functional.clip_by_value(x, -1.0, 1.0),
    "adaptive_grad_clip": lambda x: functional.adaptive_grad_clip(x, x, 0.1)[0],
    "unit_norms": lambda x: functional.unit_norms(x, axis=0),
    "unit_norms of rows": lambda x: functional.unit_norms(x, axis=1),
    "rms": lambda x: functional.global_norm(x, "rms"),
    "order 3": lambda x: functional.global_norm(x, 3),
    "order inf": lambda x: functional.leaf_norms(x, jnp.inf),
}


@pytest.fixture(autouse=True)
def as_users_run_it():
    """Without the check of annotations: a symbol stands for an int, and is none."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def values(rows):
    return jnp.linspace(-3.0, 2.0, 3 * rows).reshape(rows, 3)


def exported(fun, *shapes, vjp_order=0):
    """The function after a round trip through bytes."""
    (rows,) = export.symbolic_shape("b")
    args = [jax.ShapeDtypeStruct((rows, *s), jnp.float32) for s in shapes]
    data = export.export(jax.jit(fun))(*args).serialize(vjp_order=vjp_order)
    return export.deserialize(data)


@pytest.mark.one_in(10, rest="slow")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_their_derivatives(name):
    fun = FUNCTIONS[name]
    again = exported(fun, (3,), vjp_order=1)
    for rows in (2, 7):
        x = values(rows)
        want, back = jax.vjp(jax.jit(fun), x)
        chex.assert_trees_all_close(again.call(x), want, rtol=1e-5, atol=1e-7)
        (found,) = again.vjp().call(x, want)
        chex.assert_trees_all_close(found, *back(want), rtol=1e-5, atol=1e-6)


@pytest.mark.one_in(10, rest="slow")
@pytest.mark.parametrize("name", EVERY)
def test_every_method(name, monkeypatch):
    monkeypatch.setenv("OPTAX_CLIPX_TAP", "off")  # callbacks cannot be exported

    def step(x, y):
        tx, tree = EVERY[name].make(), {"a": x, "b": y}
        updates, state = tx.update(tree, tx.init(tree), tree)
        read = clipx.metrics(state)
        return updates, {k: v for k, v in read.items() if v.dtype == jnp.float32}

    again = exported(step, (3,), ())
    x = values(5)
    chex.assert_trees_all_close(
        again.call(x, x[:, 0]), jax.jit(step)(x, x[:, 0]), rtol=1e-4, atol=1e-6
    )


def test_units_are_measured_on_gpus_as_well():
    def clipped(x):
        clipper = clipx.clip_by(clipx.measures.unit_norms(axis=1), 1.0)
        return clipper.update([x, x], clipper.init([x, x]))[0]

    (rows,) = export.symbolic_shape("b")
    given = jax.ShapeDtypeStruct((rows, 4), jnp.float32)
    both = export.export(jax.jit(clipped), platforms=["cuda", "cpu"])(given)
    _, found = both.call(jnp.full((3, 4), 5.0))
    chex.assert_trees_all_close(found, jnp.full((3, 4), 0.5), rtol=1e-6)
