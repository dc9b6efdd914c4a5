"""Units of layers that are rare, by their names and shapes."""

import jax
import jax.numpy as jnp
import pytest

import optax_clipx as clipx
from optax_clipx._clipping.attention_names import axes_in_attention
from optax_clipx.per_example import clipped_grad


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
    ("layer", "name", "shape", "axes"),
    [
        ("q_einsum", "w", (4, 16, 4), (1,)),
        ("kv_einsum", "w", (2, 4, 16, 4), (2,)),
        ("q_einsum", "w", (16, 4), None),  # another rank
        ("attn_vec_einsum", "w", (4, 4, 16), (0, 1)),
        ("qkv", "kernel", (16, 3, 4, 4), (0,)),
        ("qkv", "kernel", (16, 4, 3, 4), (0,)),
        ("qkv", "kernel", (16, 4, 12), (0,)),
        ("qkv", "kernel", (16, 4, 5), None),
        ("q_proj", "kernel", (16, 4, 4), (0,)),
        ("q_proj", "kernel", (16, 4, 5), None),
        ("q_proj", "kernel", (16, 16), None),  # has no heads
        ("out", "kernel", (4, 4, 16), (0, 1)),
        ("out", "kernel", (4, 5, 16), None),
        ("gate", "kernel", (4, 4, 16), None),
    ],
)
def test_kernels_of_an_attention(layer, name, shape, axes):
    assert axes_in_attention(("attention", layer, name), leaf(*shape)) == axes


def test_the_same_names_outside_of_an_attention_say_nothing():
    assert axes_in_attention(("mlp", "query", "kernel"), leaf(16, 4, 4)) is None


@pytest.mark.parametrize(
    ("path", "shape", "axes"),
    [
        (("net/linear", "b"), (4,), (0,)),
        (("net/linear", "w"), (3, 4), (0,)),
        (("net/embed", "embeddings"), (10, 4), (1,)),
        (("net/conv2_d_transpose", "w"), (3, 3, 8, 4), (0, 1, 3)),
        (("net/conv2_d", "w"), (3, 3, 4, 8), (0, 1, 2)),
        (("__layer_stack/linear", "w"), (6, 3, 4), (1,)),
    ],
)
def test_layers_of_haiku(path, shape, axes):
    assert clipx.units.haiku(path, leaf(*shape)) == axes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: clipped_grad(jnp.sum, lambda step: 1.0), "Call a schedule"),
        (
            lambda: clipped_grad(jnp.sum, 1.0, argnums=-1),
            "Expected argnums to be 0 or above",
        ),
        (
            lambda: clipped_grad(jnp.sum, 1.0)(jnp.ones(2)),
            "positional arguments",
        ),
    ],
)
def test_calls_of_clipped_grad_that_are_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
