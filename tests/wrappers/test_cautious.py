"""`cautious`: the mask, the factor, on any mesh and at any magnitude."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_clipx as clipx

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import hlo

SGD = optax.sgd(0.5, momentum=0.9)


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax's optimizers rely on it
        yield


def given_updates(updates):
    """An optimizer whose updates are these, whatever the gradient is."""

    def update(grads, state, params=None):
        return jax.tree.map(lambda u, g: u.astype(g.dtype), updates, grads), state

    return optax.GradientTransformation(lambda params: (), update)


def reference(u, g, most):
    """The formula in float64."""
    u, g = np.asarray(u, np.float64), np.asarray(g, np.float64)
    phi = np.sign(u) * np.sign(g) < 0
    return phi * u * min(u.size / (phi.sum() + 1), most)


def masked(updates, grads, **options):
    tx = clipx.cautious(given_updates(updates), **options)
    return jax.jit(tx.update)(grads, tx.init(grads))


@jax.jit
def masked_up_to(u, g, most):
    return masked(u, g, max_factor=most)[0]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1, 2, 3, 17, 40]),  # each is compiled once
    shift=st.floats(-2, 2),
    most=st.floats(1, 50),
    power=st.integers(-37, 30),
)
def test_the_formula(seed, size, shift, most, power):
    rng = np.random.default_rng(seed)
    u, g = rng.normal(shift, 1, size), rng.normal(size=size)
    u, g = (np.float32(x * 10.0**power) for x in (u, g))
    for x in (u, g):
        x[np.abs(x) < np.finfo(np.float32).tiny] = 0  # as XLA takes them
    clipped = masked_up_to(u, g, most)
    want = reference(u, g, most)
    np.testing.assert_allclose(np.float64(clipped), want, rtol=1e-5, atol=1e-37)


def test_the_paper_has_no_cap():
    u, g = -jnp.ones(100), jnp.ones(100).at[1:].set(-1)
    clipped, state = masked(u, g, max_factor=float("inf"))
    assert clipped[0] == -50
    assert masked(u, g)[0][0] == -2
    assert clipx.metrics(state)["cautious/factor"] == 50


def test_each_leaf_has_its_own_factor_and_metrics_are_of_the_whole():
    u = {"a": jnp.array([-1.0, -1.0, 1.0]), "b": jnp.array([[-1.0]])}
    g = {"a": jnp.ones(3), "b": jnp.ones((1, 1))}
    clipped, state = masked(u, g)
    np.testing.assert_array_equal(clipped["a"], [-1, -1, 0])
    np.testing.assert_array_equal(clipped["b"], [[-0.5]])
    assert clipx.metrics(state) == {
        "cautious/descending": 0.75,
        "cautious/factor": 1.0,
    }


def test_the_inner_state_is_that_of_a_run_without():
    tx, params = clipx.cautious(SGD), jnp.zeros(3)
    state, plain = tx.init(params), SGD.init(params)
    for seed in range(3):
        grads = jax.random.normal(jax.random.key(seed), (3,))
        _, state = jax.jit(tx.update)(grads, state, params)
        _, plain = SGD.update(grads, plain, params)
    np.testing.assert_allclose(state.inner[0].trace, plain[0].trace, rtol=1e-6)


def test_the_metrics_of_a_clipper_inside_are_found():
    tx = clipx.cautious(optax.chain(clipx.clip_by_global_norm(1.0), SGD))
    grads = jnp.array([3.0, 4.0])
    updates, state = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates, [-0.2, -4 / 15], rtol=1e-6)
    assert clipx.metrics(state)["clip/norm"] == 5
    assert clipx.metrics(state, "a")["a_cautious/descending"] == 1
    by_name = {"descending": jnp.ones(()), "factor": jnp.full((), 2.0), "inner": {}}
    assert clipx.metrics({"opt": by_name})["cautious/factor"] == 2


def test_bfloat16_and_complex_leaves():
    u = {"half": -jnp.ones(2), "complex": jnp.array([1j, 1j, -2, 3e-30 + 1e-30j])}
    g = {
        "half": jnp.array([1.0, -1.0], jnp.bfloat16),
        "complex": jnp.array([-1j, 1j, 1 + 1j, -1e-30 + 2e-30j]),
    }
    clipped, _ = masked(u, g)
    assert clipped["half"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(clipped["half"]), [-1, 0])
    want = np.array([1j, 0, -2, 3e-30 + 1e-30j])  # 3 of 4 descend: a factor of 1
    np.testing.assert_allclose(clipped["complex"], want, rtol=1e-6)


def test_signs_count_where_products_underflow():
    clipped, _ = masked(-jnp.float32([1e-30, 1e-30]), jnp.float32([1e-30, -1e-30]))
    np.testing.assert_allclose(clipped, [-1e-30, 0], rtol=1e-6)


def test_what_is_no_leaf_passes():
    grads = {"none": None, "masked": optax.MaskedNode(), "empty": jnp.zeros((0, 3))}
    tx = clipx.cautious(SGD)
    updates, state = tx.update(grads, tx.init(grads))
    assert jax.tree.structure(updates) == jax.tree.structure(grads)
    assert clipx.metrics(state)["cautious/descending"] == 0


def test_what_is_not_finite_stays_and_a_lost_gradient_moves_nothing():
    u = jnp.array([jnp.nan, -jnp.inf, -1.0, -1.0])
    g = jnp.array([1.0, 1.0, jnp.nan, 1.0])
    clipped, _ = masked(u, g)
    assert jnp.isnan(clipped[0])
    assert clipped[1] == -jnp.inf
    np.testing.assert_allclose(clipped[2:], [0, -4 / 3], rtol=1e-6)


def tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {"a": (8, 4), "b": (4,), "c": (2, 8)}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


SPECS = {"a": P("x", "y"), "b": P("y"), "c": P(None, "x")}


def on(kind, values):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    return mesh, {
        k: jax.device_put(v, NamedSharding(mesh, SPECS[k])) for k, v in values.items()
    }


@pytest.mark.one_in(3, rest="slow")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("jitted", [True, False])
def test_sharded_leaves(kind, jitted):
    tx = clipx.cautious(given_updates(tree(1)))
    want, alone = jax.jit(tx.update)(tree(0), tx.init(tree(0)))
    _, grads = on(kind, tree(0))
    _, updates = on(kind, tree(1))
    tx = clipx.cautious(given_updates(updates))
    state = tx.init(grads)
    found, after = (jax.jit(tx.update) if jitted else tx.update)(grads, state)
    for key, value in found.items():
        np.testing.assert_allclose(value, want[key], rtol=1e-6)
    np.testing.assert_allclose(after[:2], alone[:2], rtol=1e-6)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


@pytest.mark.parametrize("check", [True, False])
def test_shard_map_needs_one_collective(check):
    tx = clipx.cautious(SGD, specs=SPECS)
    grads, trace = tree(0), tree(1)

    def step(grads, trace):
        state = tx.init(grads)
        inner = (optax.TraceState(trace), *state.inner[1:])
        updates, state = tx.update(grads, state._replace(inner=inner))
        return updates, (state.descending, state.factor)

    want = step(grads, trace)
    mesh, _ = on(AxisType.Auto, grads)
    options = {"mesh": mesh, "in_specs": (SPECS, SPECS), "check_vma": check}
    mapped = jax.shard_map(step, out_specs=(SPECS, P()), **options)
    found = jax.jit(mapped)(grads, trace)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, want)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    text = jax.jit(mapped).lower(grads, trace).compile().as_text()
    assert len(hlo.collectives(text)) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: clipx.cautious(SGD, max_factor=0.5), "1 <= max_factor"),
        (lambda: clipx.cautious(0.1), "inner"),
        (lambda: masked(jnp.ones(2), jnp.ones(3)), r"shapes of the gradients"),
        (lambda: clipx.cautious(SGD).update(jnp.ones(2), ()), "CautiousState"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
