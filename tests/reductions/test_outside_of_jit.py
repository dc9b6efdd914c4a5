"""A norm outside of `jit` is one program, compiled once for all that is alike."""

import jax
import jax.numpy as jnp
import numpy as np

import optax_clipx as clipx

COMPILED = []


def heard(event, seconds, **other):
    """JAX says here what it compiles; older versions cannot forget a listener."""
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(heard)


def test_one_program_for_all_norms_that_are_alike():
    trees = [{"a": jnp.full((3, 17), x), "b": jnp.full(19, x)} for x in (1.0, 2.0)]
    numbers = []
    for tree in jax.block_until_ready(trees):
        COMPILED.clear()
        norm = jax.block_until_ready(clipx.functional.global_norm(tree))
        numbers.append(len(COMPILED))
    assert 1 <= numbers[0] <= 3
    assert numbers[1] == 0
    np.testing.assert_allclose(norm, 2 * 70**0.5, rtol=1e-6)


def test_within_a_trace_nothing_is_a_program_of_its_own():
    traced = jax.make_jaxpr(clipx.functional.global_norm)({"a": jnp.ones(5)})
    assert "_compiled" not in str(traced)
