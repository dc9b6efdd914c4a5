"""What the host is handed: a NumPy array on one device, with no copy to a device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_clipx._devices.host import report


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("loop", ["jit", "scan", "vmap"])
def test_the_host_is_handed_a_numpy_array(loop, every):
    seen = []

    def step(number, x):
        (x,) = report(seen.append, every, number, jnp.stack([x, 2 * x]), [x])
        return number + 1, x

    numbers = jnp.arange(3, dtype=jnp.float32)
    if loop == "scan":
        jax.block_until_ready(jax.lax.scan(step, jnp.int32(0), numbers))
        want = [[x, 2 * x] for x in range(0, 3, every)]
    elif loop == "vmap":
        steps = jax.jit(jax.vmap(step, (None, 0)))
        jax.block_until_ready(steps(jnp.int32(4), numbers))
        want = [[[0, 0], [1, 2], [2, 4]]]
    else:
        jax.block_until_ready(jax.jit(step)(jnp.int32(4), numbers[1]))
        want = [[1, 2]]
    jax.effects_barrier()
    assert {type(x) for x in seen} == {np.ndarray}
    np.testing.assert_array_equal(seen, want)
