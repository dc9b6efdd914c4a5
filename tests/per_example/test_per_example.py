"""The per-example functions of optax's names, also with broken examples."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax import numpy_dtype_promotion

import optax_clipx as clipx


def batch(dtype="float32", examples=6):
    rng = np.random.default_rng(0)
    scale = rng.lognormal(size=examples)
    return {
        "w": jnp.asarray(
            scale[:, None, None] * rng.normal(size=(examples, 3, 2)), dtype
        ),
        "b": jnp.asarray(scale[:, None] * rng.normal(size=(examples, 4)), dtype),
    }


@pytest.mark.one_in(2)
@pytest.mark.parametrize("limit", [0.0, 0.5, 2.0, np.inf])
def test_equal_to_optax_in_float32(limit):
    grads = batch()

    def both(module):
        return jax.jit(
            lambda g: (
                module.per_example_global_norm_clip(g, limit),
                module.per_example_layer_norm_clip(g, limit, uniform=False),
            )
        )(grads)

    with numpy_dtype_promotion("standard"):
        theirs, theirs_by_layer = both(optax)
    ours, ours_by_layer = both(clipx)
    for name in grads:
        np.testing.assert_allclose(ours[0][name], theirs[0][name], rtol=1e-5, atol=1e-7)
        for k in range(2):
            np.testing.assert_allclose(
                ours_by_layer[k][name], theirs_by_layer[k][name], rtol=1e-5, atol=1e-7
            )
    assert int(ours[1]) == int(theirs[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_broken_example_adds_zero_and_is_counted(dtype):
    grads = batch(dtype)
    clip = jax.jit(lambda g: clipx.per_example_global_norm_clip(g, 0.01))
    found = [
        clip({**grads, "w": grads["w"].at[2, 0, 0].set(bad)})
        for bad in (jnp.nan, jnp.inf)
    ]
    expected = dict.fromkeys(grads, 0.0)
    for i in range(6):
        if i == 2:
            continue
        example = reference.rescale([x[i] for x in grads.values()], 0.01)
        for name, g in zip(grads, example, strict=True):
            expected[name] = expected[name] + g
    eps = float(jnp.finfo(dtype).eps)
    for total, num_clipped in found:
        assert int(num_clipped) == 6
        for name, want in expected.items():
            assert total[name].dtype == dtype
            np.testing.assert_allclose(
                total[name].astype(np.float32),
                want.astype(float),
                rtol=2 * eps,
                atol=eps / 100,
            )


def test_integer_leaves():
    grads = [jnp.array([[0, 0, 0], [0, 3, 4], [4, 0, 3], [3, 4, 0]])]
    total, num_clipped = clipx.per_example_global_norm_clip(grads, 1.25)
    np.testing.assert_allclose(total[0], 1.75)
    assert total[0].dtype == jnp.float32
    assert int(num_clipped) == 3
