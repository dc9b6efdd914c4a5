"""The coefficient with an eps, at thresholds of every size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_clipx as clipx


@pytest.mark.parametrize("limit", [0.5, 1.0, 2.0, 5.0, 10.0])
def test_a_norm_at_the_threshold_is_scaled_as_in_pytorch(limit):
    clip = jax.jit(lambda g: clipx.functional.clip_by_global_norm(g, limit, eps=1e-6))
    clipped, _ = clip(jnp.array([limit]))
    want = np.float32(limit) / (np.float32(limit) + np.float32(1e-6))
    assert float(clipped[0]) / limit == pytest.approx(float(want), rel=6e-8)
    assert float(clipped[0]) < limit
