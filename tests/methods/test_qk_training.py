"""A small transformer whose logits explode without QK-Clip, and do not with it."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_clipx as clipx

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import qk_clip as experiment

pytestmark = pytest.mark.slow
STEPS = 200


@pytest.fixture(autouse=True)
def _as_users_have_it():
    """Optax and Flax need the standard promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def runs():
    """The largest logit and loss of each step, without and with a threshold of 100."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        run = jax.jit(
            lambda limit: experiment.train("Adam 0.03", limit, jnp.int32(0), STEPS)
        )
        found = {limit: jax.device_get(run(limit)) for limit in (jnp.inf, 100.0)}
    return found


def test_logits_pass_100_by_far_without_it(runs):
    (_, logits, clipped), _ = runs[jnp.inf]
    assert logits.max() > 1000
    assert not clipped.any()


def test_logits_exceed_100_by_what_one_step_adds_with_it(runs):
    (_, logits, clipped), _ = runs[100.0]
    assert clipped.sum() == (logits > 100).sum() > 0
    assert logits.max() < 200


def test_the_loss_is_no_worse_with_it(runs):
    assert runs[100.0][1] <= runs[jnp.inf][1]


def test_measured_after_the_step_the_weights_it_leaves_are_under_the_threshold():
    params = nnx.state(experiment.Repeater(nnx.Rngs(0)), nnx.Param)
    layouts = clipx.qk.flax(params)
    tx = optax.adam(0.03)

    @jax.jit
    def step(params, state, text):
        grads = jax.grad(lambda p: experiment.loss_fn(p, text)[0])(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        before = experiment.loss_fn(params, text)[1]
        params = clipx.qk_clip(params, before, layouts)
        return params, state, before, experiment.loss_fn(params, text)[1]

    state, above = tx.init(params), 0
    for i in range(STEPS):
        text = experiment.texts(jax.random.key(i))
        params, state, before, after = step(params, state, text)
        above += int(np.max(before["blocks/0/attention"]) > 100)
        # The inputs of the first layer do not depend on what is clipped.
        assert np.max(after["blocks/0/attention"]) <= 100 * (1 + 1e-5)
    assert above > 0
