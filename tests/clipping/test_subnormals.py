"""Entries inside of their bounds come back bit for bit, subnormal ones too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_clipx as clipx

CLAMPS = {
    "clip": clipx.clip(1.0),
    "clip_by_value": clipx.clip_by_value(-1.0, 1.0),
    "magnitudes": clipx.clip_by(clipx.measures.magnitudes(), 1.0),
    "zero": clipx.clip(1.0, nonfinite="zero"),
    "without metrics": clipx.clip(1.0, metrics=False),
}


@pytest.mark.parametrize("name", CLAMPS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("transform", [jax.jit, lambda f: f])
def test_clamps_keep_subnormal_numbers(name, dtype, transform):
    least = float(jnp.finfo(dtype).smallest_subnormal)
    values = np.array([least, -3 * least, 0.5, -0.0, 1.0, 2.0, -2.0]).astype(dtype)
    clipped, _ = transform(CLAMPS[name].update)(jnp.asarray(values), None)
    want = np.array([least, -3 * least, 0.5, -0.0, 1.0, 1.0, -1.0]).astype(dtype)
    assert np.asarray(clipped).tobytes() == want.tobytes()


def test_nan_stays_in_its_entry_and_infinity_goes_to_its_bound():
    values = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.5])
    clipped, _ = clipx.clip(1.0).update(values, None)
    np.testing.assert_array_equal(clipped, [np.nan, 1.0, -1.0, 0.5])


def test_the_functions_keep_them_too():
    least = float(jnp.finfo(jnp.float32).smallest_subnormal)
    values = np.array([least], np.float32)
    clamp = clipx.functional.clip_by_value
    assert np.asarray(clamp(values, -1.0, 1.0)).tobytes() == values.tobytes()
    _, back = jax.vjp(lambda x: clipx.backward.clip_value(x, -1.0, 1.0), values)
    assert np.asarray(back(jnp.asarray(values))[0]).tobytes() == values.tobytes()
