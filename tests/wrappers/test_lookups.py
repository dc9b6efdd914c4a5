"""Fields of other transformations are found in the state, whatever is around them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clipx as clipx

PARAMS = {"w": jnp.array([3.0, 4.0])}
WRAPPERS = {
    "none": lambda tx: tx,
    "skip_spikes": clipx.skip_spikes,
    "track_norms": clipx.track_norms,
    "reset_moments": clipx.reset_moments,
}


def is_array(path, value):
    return isinstance(value, jax.Array)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_learning_rate_of_a_schedule(name):
    schedule = optax.linear_schedule(0.25, 0.0, 4)
    inner = optax.inject_hyperparams(optax.sgd)(learning_rate=schedule)
    tx = WRAPPERS[name](optax.chain(clipx.clip_by_global_norm(1.0), inner))
    with jax.numpy_dtype_promotion("standard"):
        _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
        _, state = tx.update(PARAMS, state, PARAMS)
    found = optax.tree.get(state, "learning_rate", filtering=is_array)
    np.testing.assert_allclose(found, 0.1875)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_scale_of_reduce_on_plateau(name):
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    inner = (clipx.clip_by_global_norm(1.0), optax.sgd(0.1), plateau)
    tx = WRAPPERS[name](optax.chain(*inner))
    state = tx.init(PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(2):
            _, state = tx.update(PARAMS, state, PARAMS, value=jnp.float32(1.0))
    assert optax.tree.get(state, "ReduceLROnPlateauState").scale == 0.5
