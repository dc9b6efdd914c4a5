"""`clipx.metrics` reads any optimizer state, inside and outside of jit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_clipx as clipx

PARAMS = {"w": jnp.array([6.0, 8.0]), "b": jnp.array([0.5])}
FIELDS = clipx.ClipMetrics._fields


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax's optimizers rely on it
        yield


def run(tx, steps=1, params=PARAMS):
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(steps):
        _, state = step(params, state, params)
    return state


def clipper(limit=1.0):
    return clipx.clip_by_global_norm(limit)


WRAPPED = {
    "alone": clipper(),
    "chain": optax.chain(clipper(), optax.adam(1e-3)),
    "named_chain": optax.named_chain(("clip", clipper()), ("adam", optax.adam(1e-3))),
    "nested": optax.chain(optax.chain(optax.scale(1.0), clipper()), optax.sgd(1.0)),
    "masked": optax.masked(clipper(), {"w": True, "b": True}),
    "partition": optax.partition({"a": clipper()}, {"w": "a", "b": "a"}),
    "MultiSteps": optax.MultiSteps(
        optax.chain(clipper(), optax.sgd(1.0)), 1
    ).gradient_transformation(),
    "apply_if_finite": optax.apply_if_finite(clipper(), 3),
    "inject_hyperparams": optax.inject_hyperparams(clipx.clip_by_global_norm)(1.0),
}


@pytest.mark.one_in(10)
@pytest.mark.parametrize("name", WRAPPED)
def test_a_single_clipper_in_any_wrapper(name):
    state = run(WRAPPED[name], steps=2)
    for read in (clipx.metrics, jax.jit(clipx.metrics)):
        found = read(state)
        assert list(found) == [f"clip/{field}" for field in FIELDS] or set(found) == {
            f"clip/{field}" for field in FIELDS
        }
        np.testing.assert_allclose(found["clip/norm"], np.sqrt(100.25), rtol=1e-6)
        np.testing.assert_allclose(found["clip/clipped_norm"], 1.0, rtol=1e-6)
        assert int(found["clip/steps"]) == int(found["clip/num_clipped"]) == 2
        assert all(isinstance(x, jax.Array) and x.shape == () for x in found.values())


def test_several_clippers_are_told_apart():
    chained = run(optax.chain(clipper(), optax.adam(1e-3), clipx.clip(1.0)))
    assert {k.rsplit("/", 1)[0] for k in clipx.metrics(chained)} == {"clip/0", "clip/2"}
    named = run(
        optax.named_chain(
            ("first", clipper()), ("o", optax.sgd(1.0)), ("last", clipper())
        )
    )
    found = clipx.metrics(named, prefix="grads")
    assert {k.rsplit("/", 1)[0] for k in found} == {"grads/first", "grads/last"}
    labels = {"w": "body", "b": "head"}
    parts = run(optax.partition({"body": clipper(), "head": clipper()}, labels))
    found = clipx.metrics(parts)
    np.testing.assert_allclose(found["clip/body/norm"], 10.0)
    np.testing.assert_allclose(found["clip/head/norm"], 0.5)
    inner = optax.named_chain(("a", clipper()), ("b", clipper()))
    outer = optax.named_chain(("x", inner), ("y", clipper()))
    names = {k.rsplit("/", 1)[0] for k in clipx.metrics(run(outer))}
    assert names == {"clip/x/a", "clip/x/b", "clip/y"}


def test_in_an_nnx_optimizer():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, optax.chain(clipper(0.1), optax.adam(1e-3)), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2))) ** 2))(model)
        optimizer.update(model, grads)
        return clipx.metrics(optimizer.opt_state)

    inside = step(model, optimizer)
    outside = clipx.metrics(optimizer.opt_state)
    assert isinstance(outside["clip/norm"], jax.Array)
    np.testing.assert_allclose(outside["clip/clipped_norm"], 0.1, rtol=1e-6)
    np.testing.assert_array_equal(inside["clip/norm"], outside["clip/norm"])


def test_one_copy_of_a_pmap_replicated_state():
    tx = clipx.clip_by_global_norm(1.0, axis_name=())
    grads = jax.tree.map(lambda x: jnp.stack([x] * 8), PARAMS)
    state = jax.pmap(tx.init)(grads)
    _, state = jax.pmap(tx.update)(grads, state)
    found = clipx.metrics(state)
    assert found["clip/norm"].shape == ()
    np.testing.assert_allclose(found["clip/norm"], np.sqrt(100.25), rtol=1e-6)


def test_an_ensemble_keeps_its_axis():
    tx = clipper()
    grads = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), PARAMS)
    _, state = jax.vmap(tx.update)(grads, jax.vmap(tx.init)(grads))
    assert clipx.metrics(state)["clip/norm"].shape == (3,)


def test_no_clipper_is_an_error():
    with pytest.raises(ValueError, match="got ScaleByAdamState, EmptyState"):
        clipx.metrics(run(optax.adam(1e-3)))
    with pytest.raises(ValueError, match="metrics=False"):
        clipx.metrics(
            run(clipx.clip_by_global_norm(optax.constant_schedule(1.0), metrics=False))
        )


def test_counts():
    tx = clipx.clip_by_global_norm(1.0, nonfinite="zero")
    state = tx.init(PARAMS)
    for scale in (1.0, 0.01, jnp.nan, 1.0):
        _, state = jax.jit(tx.update)(
            jax.tree.map(lambda x, s=scale: x * s, PARAMS), state
        )
    found = state.metrics
    assert (int(found.steps), int(found.num_clipped), int(found.num_nonfinite)) == (
        4,
        2,
        1,
    )
    clipx.check(state)


def test_check_names_the_clipper():
    tx = optax.named_chain(("early", clipper()), ("late", clipper()))
    state = run(tx, params={"w": jnp.array([jnp.nan])})
    with pytest.raises(FloatingPointError, match="clip/early"):
        clipx.check(state)


def test_counts_saturate():
    tx = clipper()
    state = tx.init(PARAMS)
    full = state.metrics._replace(steps=jnp.int32(2**31 - 1))
    _, state = tx.update(PARAMS, state._replace(metrics=full))
    assert int(state.metrics.steps) == 2**31 - 1


def test_an_nnx_optimizer_without_a_clipper_is_told_to_add_one():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    with pytest.raises(ValueError, match="got Optimizer without such a clipper"):
        clipx.metrics(optimizer)


@pytest.mark.parametrize(("broken", "becomes"), [("both", 0.0), ("params", np.nan)])
def test_a_threshold_that_is_nan_counts_where_the_norm_is_finite(broken, becomes):
    """With 130 units: a maximum over so many need not pass a NaN through."""
    leaves = {"w": jnp.ones((64, 64)), "b": jnp.ones(64), "v": jnp.ones((8, 2))}
    bad = leaves | {"v": leaves["v"].at[-1, -1].set(np.nan)}
    clipper = clipx.adaptive_grad_clip(0.1, nonfinite="zero")
    updates = bad if broken == "both" else leaves
    clipped, _ = jax.jit(clipper.update)(updates, clipper.init(leaves), bad)
    np.testing.assert_array_equal(clipped["w"], np.full((64, 64), becomes))
