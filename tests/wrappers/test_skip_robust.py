"""The default limits of `skip_spikes`: robust from the first norms on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from xla_settings import OWN

import optax_clipx as clipx
from optax_clipx._thresholds.spikes import spikes_of_norms


@functools.cache
def stepper():
    tx = clipx.skip_spikes(optax.sgd(1.0))

    @jax.jit
    def run(norms, losses):
        def step(state, now):
            norm, loss = now
            _, state = tx.update(norm[None], state, loss=loss)
            return state, state.reason

        return lax.scan(step, tx.init(jnp.zeros(1)), (norms, losses))[1]

    return run


def reasons(norms, losses=None):
    """Why each step of a run was skipped; 0 where it was not."""
    losses = np.full(len(norms), 2.0) if losses is None else losses
    found = stepper()(jnp.asarray(norms, jnp.float32), jnp.asarray(losses, jnp.float32))
    return np.asarray(found)


def usual(number=300, seed=0, noise=0.1):
    return np.exp(noise * np.random.default_rng(seed).normal(size=number))


def skipped(norms, losses=None):
    return list(np.nonzero(reasons(norms, losses))[0])


def test_a_spike_in_the_warm_up_hides_no_other():
    norms = 15 * usual()
    norms[50], norms[60] = 3000, 300
    assert skipped(norms) == [50, 60]


@pytest.mark.parametrize("first", [(0,), (3,), (0, 5)])
def test_spikes_among_the_first_norms_hide_no_other(first):
    norms = usual()
    norms[list(first)] = 200
    norms[8] = 20
    assert skipped(norms) == [8]


def test_a_loss_spike_among_the_first_hides_no_other():
    losses = 2.3 + 0.1 * np.random.default_rng(0).normal(size=300)
    losses[3], losses[8] = 100, 20
    assert skipped(usual(), losses) == [8]


def test_neither_do_losses_around_zero():
    losses = np.random.default_rng(0).normal(size=300)
    losses[3], losses[20] = 100, 30
    assert skipped(usual(), losses) == [20]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e30])
def test_norms_have_no_unit(size):
    norms = usual()
    norms[[5, 50, 100, 101]] = 60
    assert skipped(size * norms) == skipped(norms) == [50, 100, 101]


@pytest.mark.parametrize("factor", [20.0, 1e4, 1e-4])
def test_a_new_level_is_taken_on_within_ten_steps(factor):
    """And a spike is one beside the new level."""
    norms = usual()
    norms[150:] *= factor
    norms[200] *= 20
    higher = list(range(150, 159)) if factor > 1 else []
    assert skipped(norms) == [*higher, 200]


def test_steps_that_are_not_finite_are_not_among_the_first():
    norms, losses = np.full(300, np.nan), np.full(300, 2.0)
    norms[100:] = usual(200)
    norms[107], norms[115] = 30, 30
    assert list(reasons(norms, losses)[98:118]) == [1] * 2 + [0] * 15 + [2] + [0] * 2


@functools.partial(jax.jit, compiler_options=OWN)  # it runs ten times as long as others
def counts(norms):
    """How many of many runs' norms are above the limits of these and published ones."""
    rules = (
        spikes_of_norms(10),
        clipx.thresholds.zscore(
            6.0, window=128, warmup_steps=64, stats="skip", patience=10
        ),
    )

    def step(states, norm):  # each is a norm of its own
        updated = [
            rule.update(norm, state, clipx.thresholds.Context(0))
            for rule, state in zip(rules, states, strict=True)
        ]
        above = [jnp.sum(norm > limit) for limit, _ in updated]
        return [state for _, state in updated], jnp.stack(above)

    start = [rule.init(norms[0]) for rule in rules]
    return jnp.sum(lax.scan(step, start, norms)[1], axis=0)


HEALTHY = {
    "noise of 10%": (0.1, 0),
    "noise of 30%": (0.3, 0),
    "noise of 50%": (0.5, 0),
    "a factor e": (1.0, 0),
    "falling": (0.5, 100),
    "falling, a factor e": (1.0, 100),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", HEALTHY)
def test_no_more_false_skips_than_the_mean_and_six_deviations(name):
    """Of the last 128 norms, from the 64th on, as OLMo-core and MaxText have it."""
    noise, fall = HEALTHY[name]
    level = 1 + fall * np.exp(-np.arange(1000) / 30)
    values = np.random.default_rng(1).normal(size=(1000, 500))
    norms = level[:, None] * np.exp(noise * values)
    found, published = counts(norms.astype(np.float32)).tolist()
    assert found <= published
    assert found <= 2 * 500 * (noise == 1.0) + 2  # at most 2 in a run of 1,000 steps


def test_a_state_in_half_precision_goes_on():
    tx = clipx.skip_spikes(optax.sgd(0.1))
    grads = jnp.ones(3)
    state = tx.init(grads)
    half = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, state
    )
    updates, after = jax.jit(tx.update)(grads, half, grads, loss=jnp.float32(2.0))
    np.testing.assert_allclose(updates, -0.1, rtol=1e-6)
    assert after.loss_rule.ordered[0] == 2.0
