"""A decoder transformer, with and without normalization and QK-norm."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Params = Any


class Size(NamedTuple):
    """Of the model, its batches and its run.

    Attributes:
        layers: how many blocks.
        width: of the residual stream.
        heads: of each attention layer.
        length: of a text, in bytes.
        batch: texts in a batch.
        steps: of a run.
        corrupt: one batch of so many is corrupt, where some are.
    """

    layers: int
    width: int
    heads: int
    length: int
    batch: int
    steps: int
    corrupt: int = 200


SIZES = {
    "small": Size(3, 96, 3, 32, 4, 400),  # 0.36 million parameters, for a slow core
    "large": Size(8, 512, 8, 256, 64, 4000),  # 25 million, for a GPU
    "tiny": Size(1, 16, 2, 8, 2, 20, 10),  # for tests
}


class Model(NamedTuple):
    """What is normalized: the inputs of each layer; queries and keys."""

    normalized: bool
    qk_norm: bool


MODELS = {
    "no norm": Model(normalized=False, qk_norm=False),
    "pre-norm": Model(normalized=True, qk_norm=False),
    "pre-norm, QK-norm": Model(normalized=True, qk_norm=True),
}


def init(key: jax.Array, model: Model, size: Size, words: int) -> Params:
    """Matrices that keep the variance; what ends a branch is smaller with depth."""
    keys = (jax.random.fold_in(key, n) for n in itertools.count())
    width = size.width

    def matrix(rows: int, columns: int, scale: float = 1.0) -> jax.Array:
        drawn = jax.random.normal(next(keys), (rows, columns))
        return drawn * scale / np.sqrt(rows)

    def block() -> dict[str, jax.Array]:
        end = 1 / np.sqrt(2 * size.layers)
        gain = {"gain": jnp.ones(size.heads)} if model.qk_norm else {}
        return gain | {
            "qkv": matrix(width, 3 * width),
            "out": matrix(width, width, end),
            "up": matrix(width, 4 * width),
            "down": matrix(4 * width, width, end),
        }

    return {
        "words": jax.random.normal(next(keys), (words, width)),
        "places": 0.1 * jax.random.normal(next(keys), (size.length, width)),
        "blocks": [block() for _ in range(size.layers)],
        "head": matrix(width, words, 0.1),
    }


def rms_norm(x: jax.Array) -> jax.Array:
    """Of RMS 1 along the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def attention(
    block: dict[str, jax.Array], x: jax.Array, model: Model, heads: int
) -> jax.Array:
    """Causal attention of several heads."""
    batch, length, width = x.shape
    qkv = (x @ block["qkv"]).reshape(batch, length, 3 * heads, width // heads)
    q, k, v = jnp.split(qkv, 3, axis=2)
    if model.qk_norm:
        q, k = rms_norm(q) * block["gain"][:, None], rms_norm(k)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(width // heads)
    mask = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(mask, logits, -1e30))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    return mixed.reshape(batch, length, width) @ block["out"]


def loss(params: Params, texts: jax.Array, model: Model, heads: int) -> jax.Array:
    """The mean cross entropy of each byte after those before it, in nats."""
    norm = rms_norm if model.normalized else lambda x: x
    given, wanted = texts[:, :-1], texts[:, 1:]
    x = params["words"][given] + params["places"][: given.shape[1]]
    for block in params["blocks"]:
        x = x + attention(block, norm(x), model, heads)
        x = x + jax.nn.gelu(norm(x) @ block["up"]) @ block["down"]
    logits = norm(x) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()
