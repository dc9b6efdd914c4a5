"""What a wrapper hands to the optimizer inside: what the caller passed, and no more."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clipx as clipx

PARAMS = {"w": jnp.array([3.0, 4.0])}


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax's optimizers rely on it
        yield


def bowl(params):
    return optax.tree.vdot(params, params) / 2


def recorder():
    """A transformation that notes the names of the extra arguments it gets."""
    seen = []

    def update(updates, state, params=None, **extra):
        seen.extend(extra)
        return updates, state

    init = lambda params: optax.EmptyState()  # noqa: E731
    return optax.GradientTransformationExtraArgs(init, update), seen


WRAPPERS = {
    "skip_spikes": clipx.skip_spikes,
    "track_norms": clipx.track_norms,
    "error_feedback": clipx.error_feedback,
    "reset_moments": clipx.reset_moments,
    "excluding": lambda tx: clipx.excluding(tx, lambda path, leaf: path == ("b",)),
    "both": lambda tx: clipx.track_norms(clipx.skip_spikes(tx)),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", WRAPPERS)
def test_only_the_arguments_of_the_caller_reach_the_inner_one(name):
    inner, seen = recorder()
    params = {**PARAMS, "b": jnp.ones(2)} if name == "excluding" else PARAMS
    tx = WRAPPERS[name](optax.chain(clipx.clip_by_global_norm(1.0), inner))
    tx.update(params, tx.init(params), params, value=jnp.float32(1.0))
    assert seen == ["value"]


SEARCHES = {
    "zoom": lambda: optax.lbfgs(),
    "backtracking": lambda: optax.chain(
        optax.sgd(1.0),
        optax.scale_by_backtracking_linesearch(max_backtracking_steps=15),
    ),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("name", ["skip_spikes", "track_norms"])
def test_a_line_search_inside_finds_the_minimum(name, search):
    tx = WRAPPERS[name](SEARCHES[search]())
    state, params = tx.init(PARAMS), PARAMS

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(bowl)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=bowl
        )
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    np.testing.assert_allclose(params["w"], [0.0, 0.0], atol=1e-5)


@pytest.mark.parametrize("name", ["skip_spikes", "track_norms"])
def test_sam_inside_asks_for_gradients_of_its_own(name):
    sam = optax.contrib.sam(
        optax.sgd(0.1),
        optax.chain(optax.contrib.normalize(), optax.sgd(0.5)),
        opaque_mode=True,
    )
    tx = WRAPPERS[name](sam)
    updates, _ = tx.update(
        PARAMS, tx.init(PARAMS), PARAMS, grad_fn=lambda p, _: jax.grad(bowl)(p)
    )
    # Up the gradient's direction [0.6, 0.8] by 0.5, then down a tenth of what is there.
    np.testing.assert_allclose(updates["w"], [-0.33, -0.44], rtol=1e-5)


@pytest.mark.parametrize("name", ["skip_spikes", "track_norms"])
def test_a_clipper_behind_something_that_changes_its_updates_measures_them(name):
    """The norm of what came in, 5, is not that of twice as much."""
    tx = WRAPPERS[name](optax.chain(optax.scale(2.0), clipx.clip_by_global_norm(1.0)))
    updates, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    inner = state.inner[1].metrics
    np.testing.assert_allclose(inner.norm, 10.0, rtol=1e-6)
    np.testing.assert_allclose(updates["w"], [0.6, 0.8], rtol=1e-6)


def test_nothing_is_remembered_after_an_update():
    """The same arrays, which were measured with another order, are measured anew."""
    tx = clipx.track_norms(clipx.clip_by_global_norm(1.0))
    tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    infinity = clipx.clip_by_global_norm(1.0, ord=jnp.inf)
    _, state = infinity.update(PARAMS, infinity.init(PARAMS))
    assert state.metrics.norm == 4.0


def test_the_number_of_apply_if_finite_is_refused():
    with pytest.raises(TypeError, match="positional argument"):
        clipx.skip_spikes(optax.sgd(0.1), 5)
