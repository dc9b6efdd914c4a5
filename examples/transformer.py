"""A small transformer language model on a mesh with Explicit axes, in Flax NNX.

Weights are sharded over "data" (FSDP) and "model" (tensor parallel). A weight is
gathered over "data" where it is used; the transpose of that gather reduces and scatters
its gradient, so gradients lie as the weights do.
"""

import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

VOCABULARY = 256  # bytes


def text():
    """The language reference that ships with Python, as bytes."""
    topics = pydoc_data.topics.topics
    return np.frombuffer(
        "\n".join(topics[name] for name in sorted(topics)).encode(), np.uint8
    )


def batches(data, batch_size, length, seed=0):
    """Endless random windows: inputs and, one byte later, targets."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(data) - length - 1, batch_size)
        yield np.stack([data[s : s + length + 1] for s in starts]).astype(np.int32)


def weight(rngs, shape, spec, fan_in):
    """A normal weight, made where it lies."""
    value = jax.random.normal(rngs.params(), shape, out_sharding=spec)
    return nnx.Param(value * fan_in**-0.5)


def whole(param, *spec):
    """A weight gathered over "data"."""
    return jax.reshard(param[...], P(*spec))


def normalized(x, scale):
    """Root-mean-square normalization."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * whole(scale)


class Block(nnx.Module):
    """Attention and a feed-forward layer."""

    def __init__(self, dim, heads, rngs):
        size = dim // heads
        self.attention_scale = nnx.Param(jnp.ones(dim, out_sharding=P("data")))
        self.qkv = weight(
            rngs, (dim, 3, heads, size), P("data", None, "model", None), dim
        )
        self.out = weight(rngs, (heads, size, dim), P("model", None, "data"), dim)
        self.feed_scale = nnx.Param(jnp.ones(dim, out_sharding=P("data")))
        self.up = weight(rngs, (dim, 4 * dim), P("data", "model"), dim)
        self.down = weight(rngs, (4 * dim, dim), P("model", "data"), 4 * dim)

    def __call__(self, x):
        """Activations of shape (batch, length, dim), sharded over the batch."""
        h = normalized(x, self.attention_scale)
        qkv = whole(self.qkv, None, None, "model", None)
        q, k, v = jnp.einsum("btd,dchk->cbthk", h, qkv)
        scores = jnp.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
        past = np.tril(np.ones(scores.shape[-2:], bool))
        attention = jax.nn.softmax(jnp.where(past, scores, -1e30))
        h = jnp.einsum("bhts,bshk->bthk", attention, v)
        out = whole(self.out, "model", None, None)
        x = x + jnp.einsum("bthk,hkd->btd", h, out, out_sharding=P("data"))
        h = normalized(x, self.feed_scale)
        h = jax.nn.gelu(jnp.einsum("btd,df->btf", h, whole(self.up, None, "model")))
        down = whole(self.down, "model", None)
        return x + jnp.einsum("btf,fd->btd", h, down, out_sharding=P("data"))


class Transformer(nnx.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, dim, layers, heads, length, rngs):
        self.embed = weight(rngs, (VOCABULARY, dim), P("model", "data"), dim)
        self.position = weight(rngs, (length, dim), P(None, "data"), dim)
        self.blocks = nnx.List([Block(dim, heads, rngs) for _ in range(layers)])
        self.final_scale = nnx.Param(jnp.ones(dim, out_sharding=P("data")))

    def __call__(self, tokens):
        """Tokens of shape (batch, length), sharded over the batch."""
        embed = whole(self.embed, None, None)
        one_hot = jax.nn.one_hot(tokens, VOCABULARY)
        x = jnp.einsum("btv,vd->btd", one_hot, embed) + whole(self.position)
        for block in self.blocks:
            x = block(x)
        return jnp.einsum("btd,vd->btv", normalized(x, self.final_scale), embed)


def loss_of(model, tokens):
    """Mean cross-entropy in nats a byte."""
    logits = model(tokens[:, :-1])
    targets = jax.nn.one_hot(tokens[:, 1:], VOCABULARY)
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))
