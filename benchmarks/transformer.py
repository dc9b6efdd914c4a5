"""A small transformer in Flax NNX and its training step, as a user writes it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx


class Size(NamedTuple):
    """Of the model and its batches; 34 million parameters where nothing is said."""

    layers: int = 8
    width: int = 512
    heads: int = 8
    words: int = 8192
    length: int = 512
    batch: int = 16


class Block(nnx.Module):
    """Attention and a network of two layers, each after a norm and beside a skip."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(size.width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(
            size.heads, size.width, decode=False, rngs=rngs
        )
        self.up = nnx.Linear(size.width, 4 * size.width, rngs=rngs)
        self.down = nnx.Linear(4 * size.width, size.width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The activations after this block."""
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.norms[0](x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class LanguageModel(nnx.Module):
    """Words in, logits of the next words out."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        self.words = nnx.Embed(size.words, size.width, rngs=rngs)
        self.places = nnx.Embed(size.length, size.width, rngs=rngs)
        self.blocks = nnx.List([Block(size, rngs) for _ in range(size.layers)])
        self.norm = nnx.LayerNorm(size.width, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        """Logits at each place."""
        x = self.words(text) + self.places(jnp.arange(text.shape[1]))[None]
        for block in self.blocks:
            x = block(x)
        return self.words.attend(self.norm(x))


@nnx.jit
def train_step(model: nnx.Module, state: nnx.Optimizer, text: jax.Array) -> jax.Array:
    """Predicts each word from those before it, and updates the model."""

    def loss_fn(model: nnx.Module) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(
            model(text[:, :-1]), text[:, 1:]
        )
        return losses.mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    state.update(model, grads)
    return loss


def training(
    tx: optax.GradientTransformation, size: Size, steps: int
) -> Callable[[], None]:
    """Some steps of training with this optimizer, on random words."""
    model = LanguageModel(size, nnx.Rngs(0))
    state = nnx.Optimizer(model, tx, wrt=nnx.Param)
    shape = (size.batch, size.length)
    text = jax.random.randint(jax.random.key(0), shape, 0, size.words)

    def run() -> None:
        for _ in range(steps):
            loss = train_step(model, state, text)
        jax.block_until_ready((loss, nnx.state(model)))

    return run
