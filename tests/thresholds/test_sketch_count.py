"""The sketch of `thresholds.quantile` counts the norms beyond its ends."""

import jax.numpy as jnp
import pytest

import optax_clipx as clipx

LARGEST = 2**31 - 1


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("norm", "before", "after"),
    [
        (1e20, 5, 6),
        (1.0, 5, 5),
        (1e20, LARGEST - 1, LARGEST),
        (1e20, LARGEST, LARGEST),
        (1.0, LARGEST, LARGEST),
    ],
)
def test_the_count_stays_at_the_largest_number(norm, before, after):
    rule = clipx.thresholds.quantile(0.5)
    state = rule.init(jnp.float32(0))
    full = state._replace(saturated=jnp.full_like(state.saturated, before))
    context = clipx.thresholds.Context(step=0)
    _, state = rule.update(jnp.float32(norm), full, context)
    assert int(state.saturated) == after
    assert state.saturated.dtype == jnp.int32
