"""The tasks: six kinds of model, each with one task in each half.

Every task draws its batches from a key, so that hundreds of runs train side by side. A
batch is inputs and targets; `scale` multiplies the inputs, as a broken pipeline would.
"""

import functools
import itertools
import pydoc_data.topics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

Params = Any
Batch = tuple[Any, Any]


class Task(NamedTuple):
    """What is learned, by which model.

    Attributes:
        name: kind of the model, and what it learns.
        half: "design", "test", "second" or "third".
        init: from a key to parameters.
        batch: from a key to inputs and targets, the example first.
        losses: from parameters, inputs, targets and the scale to a loss an example.
        steps: how many.
        rates: a good learning rate for each optimizer.
        depth: the number of stacked layers whose leaves differ by their number alone.
    """

    name: str
    half: str
    init: Callable[[Any], Params]
    batch: Callable[[Any], Batch]
    losses: Callable[[Params, Any, Any, Any], Any]
    steps: int
    rates: dict[str, float]
    depth: int = 0


def dense(key: Any, inputs: int, outputs: int, gain: float = 1.0) -> dict[str, Any]:
    """A linear layer that keeps the variance times the square of the gain."""
    w = jax.random.normal(key, (inputs, outputs)) * gain / np.sqrt(inputs)
    return {"w": w, "b": jnp.zeros(outputs)}


def apply(layer: dict[str, Any], x: Any) -> Any:
    """The outputs of a linear layer."""
    return x @ layer["w"] + layer["b"]


def cross_entropy(logits: Any, labels: Any) -> Any:
    """For each label."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def perceptron(key: Any, sizes: list[int], gain: float = np.sqrt(2)) -> Params:
    """A stack of linear layers, the last one smaller."""
    keys = jax.random.split(key, len(sizes) - 1)
    *pairs, last = zip(keys, itertools.pairwise(sizes), strict=True)
    layers = [dense(k, a, b, gain) for k, (a, b) in pairs]
    return {"layers": layers, "head": dense(last[0], *last[1], 0.5)}


def run_perceptron(params: Params, x: Any, act: Any) -> Any:
    """Its outputs."""
    for layer in params["layers"]:
        x = act(apply(layer, x))
    return apply(params["head"], x)


def teacher() -> Task:
    """Labels that a random network gives to random inputs."""
    hidden = jax.random.normal(jax.random.key(99), (16, 12))
    out = jax.random.normal(jax.random.key(98), (12, 5))

    def batch(key: Any) -> Batch:
        x = jax.random.normal(key, (64, 16))
        return x, jnp.argmax(jnp.tanh(x @ hidden) @ out, axis=1)

    def losses(params: Params, x: Any, y: Any, scale: Any) -> Any:
        return cross_entropy(run_perceptron(params, x * scale, jax.nn.relu), y)

    return Task(
        "MLP, teacher",
        "design",
        lambda key: perceptron(key, [16] + [24] * 6 + [5]),
        batch,
        losses,
        600,
        {"sgd": 0.03, "adam": 3e-3, "muon": 0.01},
        depth=6,
    )


def surface() -> Task:
    """Friedman's surface of ten inputs, five of which matter, with noise."""

    def batch(key: Any) -> Batch:
        key, noise = jax.random.split(key)
        x = jax.random.uniform(key, (48, 10))
        y = 10 * jnp.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2
        y = (y + 10 * x[:, 3] + 5 * x[:, 4] - 14.4) / 5
        return 2 * x - 1, y + 0.3 * jax.random.normal(noise, (48,))

    def losses(params: Params, x: Any, y: Any, scale: Any) -> Any:
        return (run_perceptron(params, x * scale, jnp.tanh)[:, 0] - y) ** 2

    return Task(
        "MLP, surface",
        "test",
        lambda key: perceptron(key, [10] + [32] * 8 + [1], gain=1.2),
        batch,
        losses,
        800,
        {"sgd": 0.02, "adam": 2e-3, "muon": 0.005},
        depth=8,
    )


def elman(key: Any, inputs: int, hidden: int, outputs: int) -> Params:
    """A plain recurrent network, whose recurrence begins as a rotation."""
    a, b, c = jax.random.split(key, 3)
    again = jax.random.orthogonal(b, hidden)
    return {
        "in": dense(a, inputs, hidden),
        "again": again,
        "out": dense(c, hidden, outputs),
    }


def run_elman(params: Params, sequences: Any) -> Any:
    """The last hidden state; the loop is unrolled, as sequences are short."""
    seen = apply(params["in"], sequences)
    hidden = jnp.zeros_like(seen[:, 0])
    for t in range(sequences.shape[1]):
        hidden = jnp.tanh(seen[:, t] + hidden @ params["again"])
    return hidden


def adding() -> Task:
    """The sum of the two marked numbers of a sequence (Hochreiter and Schmidhuber)."""
    length = 10

    def batch(key: Any) -> Batch:
        a, b, c = jax.random.split(key, 3)
        numbers = jax.random.uniform(a, (32, length))
        first = jax.random.randint(b, (32,), 0, length // 2)
        second = jax.random.randint(c, (32,), length // 2, length)
        marks = jax.nn.one_hot(first, length) + jax.nn.one_hot(second, length)
        return jnp.stack([numbers, marks], axis=-1), jnp.sum(numbers * marks, axis=1)

    def losses(params: Params, x: Any, y: Any, scale: Any) -> Any:
        return (apply(params["out"], run_elman(params, x * scale))[:, 0] - y) ** 2

    return Task(
        "RNN, adding",
        "design",
        lambda key: elman(key, 2, 24, 1),
        batch,
        losses,
        600,
        {"sgd": 0.006, "adam": 3e-3, "muon": 0.005},
    )


def order() -> Task:
    """In which order two symbols come among distractors, with smoothed labels."""
    length, symbols = 12, 6

    def batch(key: Any) -> Batch:
        a, b, c, d = jax.random.split(key, 4)
        noise = jax.random.randint(a, (40, length), 2, symbols)
        first = jax.random.randint(b, (40,), 0, 3)
        second = jax.random.randint(c, (40,), 6, 9)
        two = jax.random.randint(d, (40, 2), 0, 2)
        place = jnp.arange(length)[None]
        shown = jnp.where(place == first[:, None], two[:, :1], noise)
        shown = jnp.where(place == second[:, None], two[:, 1:], shown)
        return jax.nn.one_hot(shown, symbols), 2 * two[:, 0] + two[:, 1]

    def losses(params: Params, x: Any, y: Any, scale: Any) -> Any:
        logits = apply(params["out"], run_elman(params, x * scale))
        smooth = 0.8 * jax.nn.one_hot(y, 4) + 0.05
        return optax.softmax_cross_entropy(logits, smooth)

    return Task(
        "RNN, order",
        "test",
        lambda key: elman(key, symbols, 28, 4),
        batch,
        losses,
        700,
        {"sgd": 0.1, "adam": 1e-3, "muon": 0.005},
    )


def lstm(key: Any, inputs: int, hidden: int, outputs: int) -> Params:
    """A long short-term memory; its forget gates begin open."""
    a, b, c = jax.random.split(key, 3)
    gates = dense(a, inputs, 4 * hidden)
    gates["b"] = gates["b"].at[hidden : 2 * hidden].set(1.0)
    again = dense(b, hidden, 4 * hidden)["w"]
    return {"in": gates, "again": again, "out": dense(c, hidden, outputs)}


def run_lstm(params: Params, sequences: Any) -> Any:
    """The last hidden state."""
    seen = apply(params["in"], sequences)
    hidden = cell = jnp.zeros_like(seen[:, 0, : seen.shape[-1] // 4])
    for t in range(sequences.shape[1]):
        gates = seen[:, t] + hidden @ params["again"]
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
    return hidden


@functools.cache
def text() -> tuple[Any, int]:
    """The language reference that ships with Python, as numbers of characters."""
    topics = pydoc_data.topics.topics
    whole = "".join(topics[name] for name in sorted(topics)).lower()
    letters, numbers = np.unique(list(whole), return_inverse=True)
    return jnp.asarray(numbers, jnp.int32), len(letters)


def characters(size: int, length: int) -> Callable[[Any], Batch]:
    """Pieces of the text, each with the characters that follow."""
    numbers, _ = text()

    def batch(key: Any) -> Batch:
        starts = jax.random.randint(key, (size,), 0, len(numbers) - length - 1)
        piece = numbers[starts[:, None] + jnp.arange(length + 1)[None]]
        return piece[:, :-1], piece[:, 1:]

    return batch


def recurrent_text() -> Task:
    """The next character after eight, by an LSTM."""
    _, letters = text()

    def losses(params: Params, x: Any, y: Any, scale: Any) -> Any:
        states = run_lstm(params, jax.nn.one_hot(x, letters) * scale)
        return cross_entropy(apply(params["out"], states), y[:, -1])

    return Task(
        "LSTM, characters",
        "design",
        lambda key: lstm(key, letters, 24, letters),
        characters(32, 8),
        losses,
        600,
        {"sgd": 0.5, "adam": 0.01, "muon": 0.02},
    )


@functools.cache
def digits() -> tuple[Any, Any]:
    """1,797 images of 8x8 in 0..1 with labels."""
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels, jnp.int32)


def drawn(size: int, shape: tuple[int, ...]) -> Callable[[Any], Batch]:
    """Batches of the images."""
    images, labels = digits()

    def batch(key: Any) -> Batch:
        index = jax.random.randint(key, (size,), 0, len(images))
        return images[index].reshape(size, *shape), labels[index]

    return batch


def rows() -> Task:
    """Images read row by row by an LSTM."""

    def losses(params: Params, x: Any, y: Any, scale: Any) -> Any:
        return cross_entropy(apply(params["out"], run_lstm(params, x * scale)), y)

    return Task(
        "LSTM, rows",
        "test",
        lambda key: lstm(key, 8, 20, 10),
        drawn(24, (8, 8)),
        losses,
        700,
        {"sgd": 0.3, "adam": 4e-3, "muon": 0.02},
    )


def convolve(images: Any, kernel: Any, stride: int) -> Any:
    """Of even images with 3x3 kernels, as one product of matrices."""
    low = 1 if stride == 1 else 0
    padded = jnp.pad(images, ((0, 0), (low, 1), (low, 1), (0, 0)))
    height, width = images.shape[1:3]
    shifted = [
        padded[:, i : i + height : stride, j : j + width : stride]
        for i, j in itertools.product(range(3), repeat=2)
    ]
    return jnp.concatenate(shifted, axis=-1) @ kernel


def convolutions(key: Any, channels: list[int], outputs: int) -> Params:
    """A stack of convolutions without normalization, and a linear layer."""
    keys = jax.random.split(key, len(channels))
    pairs = list(itertools.pairwise(channels))
    layers = [
        dense(k, 9 * a, b, np.sqrt(2)) for k, (a, b) in zip(keys, pairs, strict=False)
    ]
    return {"layers": layers, "head": dense(keys[-1], channels[-1], outputs)}


def run_convolutions(params: Params, images: Any, strides: tuple[int, ...]) -> Any:
    """Its outputs."""
    x = images[..., None]
    for layer, stride in zip(params["layers"], strides, strict=True):
        x = jax.nn.relu(convolve(x, layer["w"], stride) + layer["b"])
    return apply(params["head"], x.mean((1, 2)))


def images() -> Task:
    """Images of digits by five convolutions."""

    def losses(params: Params, x: Any, y: Any, scale: Any) -> Any:
        return cross_entropy(run_convolutions(params, x * scale, (2, 1, 2, 1, 1)), y)

    return Task(
        "CNN, digits",
        "design",
        lambda key: convolutions(key, [1, 8, 8, 8, 8, 8], 10),
        drawn(24, (8, 8)),
        losses,
        500,
        {"sgd": 0.03, "adam": 4e-3, "muon": 0.01},
        depth=5,
    )


def gratings() -> Task:
    """The direction of stripes in noise, by four convolutions."""
    grid = jnp.stack(jnp.meshgrid(jnp.arange(8.0), jnp.arange(8.0)), axis=-1)

    def batch(key: Any) -> Batch:
        a, b, c = jax.random.split(key, 3)
        labels = jax.random.randint(a, (32,), 0, 4)
        angle = labels * np.pi / 4
        along = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        phase = jax.random.uniform(b, (32, 1, 1), maxval=2 * np.pi)
        waves = jnp.sin(1.6 * jnp.einsum("hwd,nd->nhw", grid, along) + phase)
        return waves + 0.8 * jax.random.normal(c, (32, 8, 8)), labels

    def losses(params: Params, x: Any, y: Any, scale: Any) -> Any:
        return cross_entropy(run_convolutions(params, x * scale, (1, 2, 1, 2)), y)

    return Task(
        "CNN, gratings",
        "test",
        lambda key: convolutions(key, [1, 10, 10, 10, 10], 4),
        batch,
        losses,
        600,
        {"sgd": 0.05, "adam": 2e-3, "muon": 0.005},
        depth=4,
    )


def transformer(key: Any, letters: int, width: int, length: int, blocks: int) -> Params:
    """Blocks of attention and a hidden layer around a residual stream."""
    keys = iter(jax.random.split(key, 4 * blocks + 3))
    small = 1 / np.sqrt(blocks)
    return {
        "letters": jax.random.normal(next(keys), (letters, width)),
        "places": 0.5 * jax.random.normal(next(keys), (length, width)),
        "blocks": [
            {
                "qkv": dense(next(keys), width, 3 * width)["w"],
                "out": dense(next(keys), width, width, small)["w"],
                "up": dense(next(keys), width, 2 * width)["w"],
                "down": dense(next(keys), 2 * width, width, small)["w"],
            }
            for _ in range(blocks)
        ],
        "head": dense(next(keys), width, letters, 0.5),
    }


def run_transformer(params: Params, x: Any, scale: Any, causal: bool) -> Any:
    """The logits of each place."""

    def normal(x: Any) -> Any:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)

    length = x.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool)) if causal else True
    x = params["letters"][x] * scale + params["places"]
    for block in params["blocks"]:
        q, k, v = jnp.split(normal(x) @ block["qkv"], 3, axis=-1)
        scores = jnp.einsum("nqd,nkd->nqk", q, k) / np.sqrt(q.shape[-1])
        scores = jnp.where(mask, scores, -1e9)
        x = x + jax.nn.softmax(scores) @ v @ block["out"]
        x = x + jax.nn.gelu(normal(x) @ block["up"]) @ block["down"]
    return apply(params["head"], normal(x))


def sorting() -> Task:
    """Eight symbols in order, by a transformer that sees all of them."""

    def batch(key: Any) -> Batch:
        x = jax.random.randint(key, (16, 6), 0, 8)
        return x, jnp.sort(x, axis=1)

    def losses(params: Params, x: Any, y: Any, scale: Any) -> Any:
        return cross_entropy(run_transformer(params, x, scale, False), y).mean(1)

    return Task(
        "transformer, sorting",
        "design",
        lambda key: transformer(key, 8, 16, 6, 2),
        batch,
        losses,
        500,
        {"sgd": 0.09, "adam": 3e-3, "muon": 0.01},
    )


def language() -> Task:
    """The next character, by a causal transformer."""
    _, letters = text()

    def losses(params: Params, x: Any, y: Any, scale: Any) -> Any:
        return cross_entropy(run_transformer(params, x, scale, True), y).mean(1)

    return Task(
        "transformer, characters",
        "test",
        lambda key: transformer(key, letters, 20, 10, 3),
        characters(12, 10),
        losses,
        600,
        {"sgd": 0.3, "adam": 3e-3, "muon": 0.01},
    )


def policy(key: Any, inputs: int, hidden: int, actions: int) -> Params:
    """Two hidden layers to the logits of the actions, and to a value."""
    a, b, c, d = jax.random.split(key, 4)
    return {
        "first": dense(a, inputs, hidden),
        "second": dense(b, hidden, hidden),
        "actions": dense(c, hidden, actions, 0.3),
        "value": dense(d, hidden, 1, 0.3),
    }


def act(params: Params, x: Any, noise: Any) -> tuple[Any, Any, Any]:
    """An action drawn by the policy, its log-probability, and the value."""
    hidden = jnp.tanh(apply(params["second"], jnp.tanh(apply(params["first"], x))))
    logits = apply(params["actions"], hidden)
    chosen = jnp.argmax(jax.lax.stop_gradient(logits) + noise, axis=-1)
    chance = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[..., None], -1)
    return chosen, chance[..., 0], apply(params["value"], hidden)[..., 0]


def surrogate(chances: Any, values: Any, returns: Any) -> Any:
    """The loss whose gradient is that of the policy, and that of the value."""
    gain = returns - values
    return 0.5 * gain**2 - jax.lax.stop_gradient(gain) * chances


def bandit() -> Task:
    """One action a context; rewards are noisy."""
    quality = jax.random.normal(jax.random.key(97), (8, 5))

    def batch(key: Any) -> Batch:
        a, b, c = jax.random.split(key, 3)
        x = jax.random.normal(a, (48, 8))
        rewards = jnp.tanh(x @ quality) + 0.3 * jax.random.normal(b, (48, 5))
        return x, (jax.random.gumbel(c, (48, 5)), rewards)

    def losses(params: Params, x: Any, y: Any, scale: Any) -> Any:
        noise, rewards = y
        chosen, chances, values = act(params, x * scale, noise)
        got = jnp.take_along_axis(rewards, chosen[:, None], 1)[:, 0]
        return surrogate(chances, values, got)

    return Task(
        "policy, bandit",
        "design",
        lambda key: policy(key, 8, 24, 5),
        batch,
        losses,
        600,
        {"sgd": 0.05, "adam": 2e-3, "muon": 0.01},
    )


def walk() -> Task:
    """Six steps on a ring to a place that is shown; returns are sums of rewards."""
    length, places = 6, 9

    def batch(key: Any) -> Batch:
        a, b, c = jax.random.split(key, 3)
        start = jax.random.randint(a, (40, 2), 0, places)
        slips = jax.random.uniform(c, (40, length)) < 0.1
        return start, (jax.random.gumbel(b, (40, length, 3)), slips)

    def losses(params: Params, x: Any, y: Any, scale: Any) -> Any:
        noise, slips = y
        place, goal = x[:, 0], x[:, 1]
        rewards, chances, values = [], [], []
        for t in range(length):
            turn = 2 * np.pi * (goal - place) / places
            late = jnp.full_like(turn, t / length)
            seen = jnp.stack([jnp.sin(turn), jnp.cos(turn), late], axis=-1)
            chosen, chance, value = act(params, seen * scale, noise[:, t])
            place = (place + jnp.where(slips[:, t], 0, chosen - 1)) % places
            rewards.append((place == goal).astype(jnp.float32))
            chances.append(chance)
            values.append(value)
        returns = jnp.cumsum(jnp.stack(rewards[::-1]), axis=0)[::-1]
        return surrogate(jnp.stack(chances), jnp.stack(values), returns).mean(0)

    return Task(
        "policy, walk",
        "test",
        lambda key: policy(key, 3, 20, 3),
        batch,
        losses,
        800,
        {"sgd": 0.02, "adam": 2e-3, "muon": 0.005},
    )


def spirals() -> Task:
    """To which of three arms of a noisy spiral a point belongs."""

    def batch(key: Any) -> Batch:
        a, b, c = jax.random.split(key, 3)
        labels = jax.random.randint(a, (56,), 0, 3)
        far = jax.random.uniform(b, (56,), minval=0.2, maxval=1.5)
        angle = 3 * far + labels * 2 * np.pi / 3
        x = far[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        return x + 0.1 * jax.random.normal(c, (56, 2)), labels

    def losses(params: Params, x: Any, y: Any, scale: Any) -> Any:
        return cross_entropy(run_perceptron(params, x * scale, jax.nn.silu), y)

    return Task(
        "MLP, spirals",
        "second",
        lambda key: perceptron(key, [2] + [20] * 5 + [3], gain=1.6),
        batch,
        losses,
        650,
        {"sgd": 0.03, "adam": 3e-3, "muon": 0.01},
        depth=5,
    )


def waves() -> Task:
    """The next value of a noisy wave of any frequency."""

    def batch(key: Any) -> Batch:
        a, b, c = jax.random.split(key, 3)
        speed = jax.random.uniform(a, (36, 1), minval=0.3, maxval=1.2)
        phase = jax.random.uniform(b, (36, 1), maxval=2 * np.pi)
        x = jnp.sin(speed * jnp.arange(9) + phase)
        x = x + 0.15 * jax.random.normal(c, (36, 9))
        return x[:, :-1, None], x[:, -1]

    def losses(params: Params, x: Any, y: Any, scale: Any) -> Any:
        return (apply(params["out"], run_elman(params, x * scale))[:, 0] - y) ** 2

    return Task(
        "RNN, waves",
        "second",
        lambda key: elman(key, 1, 18, 1),
        batch,
        losses,
        650,
        {"sgd": 0.01, "adam": 2e-3, "muon": 0.004},
    )


def commonest() -> Task:
    """Which of four symbols is the commonest of seven, by an LSTM."""

    def batch(key: Any) -> Batch:
        x = jax.nn.one_hot(jax.random.randint(key, (28, 7), 0, 4), 4)
        return x, jnp.argmax(x.sum(axis=1), axis=1)

    def losses(params: Params, x: Any, y: Any, scale: Any) -> Any:
        return cross_entropy(apply(params["out"], run_lstm(params, x * scale)), y)

    return Task(
        "LSTM, commonest",
        "second",
        lambda key: lstm(key, 4, 14, 4),
        batch,
        losses,
        650,
        {"sgd": 0.2, "adam": 6e-3, "muon": 0.015},
    )


def rings() -> Task:
    """How wide a ring in noise is, by six convolutions."""
    grid = jnp.stack(jnp.meshgrid(jnp.arange(8.0), jnp.arange(8.0)), axis=-1)

    def batch(key: Any) -> Batch:
        a, b, c = jax.random.split(key, 3)
        labels = jax.random.randint(a, (20,), 0, 3)
        centre = jax.random.uniform(b, (20, 1, 1, 2), minval=2.5, maxval=4.5)
        far = jnp.linalg.norm(grid - centre, axis=-1)
        ring = jnp.exp(-2 * (far - (1.0 + labels[:, None, None])) ** 2)
        return ring + 0.4 * jax.random.normal(c, (20, 8, 8)), labels

    def losses(params: Params, x: Any, y: Any, scale: Any) -> Any:
        strides = (2, 1, 2, 1, 1, 1)
        return cross_entropy(run_convolutions(params, x * scale, strides), y)

    return Task(
        "CNN, rings",
        "second",
        lambda key: convolutions(key, [1] + [6] * 6, 3),
        batch,
        losses,
        550,
        {"sgd": 0.04, "adam": 3e-3, "muon": 0.008},
        depth=6,
    )


def reversing() -> Task:
    """Five symbols from the last to the first, by a transformer."""

    def batch(key: Any) -> Batch:
        x = jax.random.randint(key, (20, 5), 0, 10)
        return x, x[:, ::-1]

    def losses(params: Params, x: Any, y: Any, scale: Any) -> Any:
        return cross_entropy(run_transformer(params, x, scale, False), y).mean(1)

    return Task(
        "transformer, reversing",
        "second",
        lambda key: transformer(key, 10, 12, 5, 2),
        batch,
        losses,
        550,
        {"sgd": 0.1, "adam": 4e-3, "muon": 0.012},
    )


def balance() -> Task:
    """Four pushes that hold a point, which noise moves, near zero."""

    def batch(key: Any) -> Batch:
        a, b, c = jax.random.split(key, 3)
        noise = jax.random.gumbel(b, (44, 4, 3)), jax.random.normal(c, (44, 4))
        return 1.5 * jax.random.normal(a, (44,)), noise

    def losses(params: Params, x: Any, y: Any, scale: Any) -> Any:
        noise, pushes = y
        rewards, chances, values = [], [], []
        for t in range(4):
            seen = jnp.stack([x, jnp.full_like(x, t / 4)], axis=-1)
            chosen, chance, value = act(params, seen * scale, noise[:, t])
            x = x + 0.7 * (chosen - 1) + 0.2 * pushes[:, t]
            rewards.append(-jnp.abs(x))
            chances.append(chance)
            values.append(value)
        returns = jnp.cumsum(jnp.stack(rewards[::-1]), axis=0)[::-1]
        return surrogate(jnp.stack(chances), jnp.stack(values), returns).mean(0)

    return Task(
        "policy, balance",
        "second",
        lambda key: policy(key, 2, 16, 3),
        batch,
        losses,
        700,
        {"sgd": 0.01, "adam": 3e-3, "muon": 0.008},
    )


def mixture() -> Task:
    """From which of six clouds a point is, where one label in ten is random."""
    centres = 1.5 * jax.random.normal(jax.random.key(96), (6, 12))

    def batch(key: Any) -> Batch:
        a, b, c, d = jax.random.split(key, 4)
        labels = jax.random.randint(a, (72,), 0, 6)
        x = centres[labels] + jax.random.normal(b, (72, 12))
        wrong = jax.random.uniform(c, (72,)) < 0.1
        return x / 2, jnp.where(wrong, jax.random.randint(d, (72,), 0, 6), labels)

    def losses(params: Params, x: Any, y: Any, scale: Any) -> Any:
        return cross_entropy(run_perceptron(params, x * scale, jax.nn.gelu), y)

    return Task(
        "MLP, mixture",
        "third",
        lambda key: perceptron(key, [12] + [16] * 7 + [6], gain=1.5),
        batch,
        losses,
        600,
        {"sgd": 0.008, "adam": 2e-3, "muon": 0.008},
        depth=7,
    )


def recalling() -> Task:
    """The third of seven numbers, by a plain recurrent network."""

    def batch(key: Any) -> Batch:
        a, b = jax.random.split(key)
        x = jax.random.uniform(a, (30, 7), minval=-1.0, maxval=1.0)
        return x[:, :, None], x[:, 2] + 0.2 * jax.random.normal(b, (30,))

    def losses(params: Params, x: Any, y: Any, scale: Any) -> Any:
        return (apply(params["out"], run_elman(params, x * scale))[:, 0] - y) ** 2

    return Task(
        "RNN, recalling",
        "third",
        lambda key: elman(key, 1, 22, 1),
        batch,
        losses,
        600,
        {"sgd": 0.004, "adam": 1.5e-3, "muon": 0.004},
    )


def largest() -> Task:
    """The largest of six numbers, by an LSTM."""

    def batch(key: Any) -> Batch:
        a, b = jax.random.split(key)
        x = jax.random.normal(a, (26, 6))
        return x[:, :, None], x.max(axis=1) + 0.2 * jax.random.normal(b, (26,))

    def losses(params: Params, x: Any, y: Any, scale: Any) -> Any:
        return (apply(params["out"], run_lstm(params, x * scale))[:, 0] - y) ** 2

    return Task(
        "LSTM, largest",
        "third",
        lambda key: lstm(key, 1, 16, 1),
        batch,
        losses,
        600,
        {"sgd": 0.01, "adam": 3e-3, "muon": 0.01},
    )


def counting() -> Task:
    """How many of one to four bright spots are in noise, by five convolutions."""
    grid = jnp.stack(jnp.meshgrid(jnp.arange(8.0), jnp.arange(8.0)), axis=-1)

    def batch(key: Any) -> Batch:
        a, b, c = jax.random.split(key, 3)
        labels = jax.random.randint(a, (28,), 1, 5)
        places = jax.random.uniform(b, (28, 4, 1, 1, 2), minval=0.5, maxval=6.5)
        spots = jnp.exp(-jnp.sum((grid - places) ** 2, axis=-1))
        shown = jnp.arange(4)[None] < labels[:, None]
        whole = jnp.sum(jnp.where(shown[:, :, None, None], spots, 0), axis=1)
        return whole + 0.2 * jax.random.normal(c, (28, 8, 8)), labels - 2.5

    def losses(params: Params, x: Any, y: Any, scale: Any) -> Any:
        strides = (1, 2, 1, 2, 1)
        return (run_convolutions(params, x * scale, strides)[:, 0] - y) ** 2

    return Task(
        "CNN, counting",
        "third",
        lambda key: convolutions(key, [1] + [8] * 5, 1),
        batch,
        losses,
        500,
        {"sgd": 0.004, "adam": 2e-3, "muon": 0.006},
        depth=5,
    )


def shifting() -> Task:
    """Each symbol's left neighbour, where one in eight is random, by a transformer."""

    def batch(key: Any) -> Batch:
        a, b, c = jax.random.split(key, 3)
        x = jax.random.randint(a, (18, 7), 0, 9)
        wrong = jax.random.uniform(b, (18, 7)) < 1 / 8
        other = jax.random.randint(c, (18, 7), 0, 9)
        return x, jnp.where(wrong, other, jnp.roll(x, 1, axis=1))

    def losses(params: Params, x: Any, y: Any, scale: Any) -> Any:
        return cross_entropy(run_transformer(params, x, scale, False), y).mean(1)

    return Task(
        "transformer, shifting",
        "third",
        lambda key: transformer(key, 9, 14, 7, 3),
        batch,
        losses,
        500,
        {"sgd": 0.04, "adam": 3e-3, "muon": 0.01},
    )


def following() -> Task:
    """Five moves after a point that drifts on a line."""

    def batch(key: Any) -> Batch:
        a, b, c = jax.random.split(key, 3)
        noise = jax.random.gumbel(b, (52, 5, 3)), jax.random.normal(c, (52, 5))
        return jax.random.normal(a, (52, 2)), noise

    def losses(params: Params, x: Any, y: Any, scale: Any) -> Any:
        noise, drifts = y
        place, goal = 2 * x[:, 0], 2 * x[:, 1]
        rewards, chances, values = [], [], []
        for t in range(5):
            seen = jnp.stack([place, goal, jnp.full_like(goal, t / 5)], axis=-1)
            chosen, chance, value = act(params, seen * scale, noise[:, t])
            place = place + 0.8 * (chosen - 1)
            goal = goal + 0.3 * drifts[:, t]
            rewards.append(jnp.exp(-((place - goal) ** 2)))
            chances.append(chance)
            values.append(value)
        returns = jnp.cumsum(jnp.stack(rewards[::-1]), axis=0)[::-1]
        return surrogate(jnp.stack(chances), jnp.stack(values), returns).mean(0)

    return Task(
        "policy, following",
        "third",
        lambda key: policy(key, 3, 18, 3),
        batch,
        losses,
        600,
        {"sgd": 0.006, "adam": 2e-3, "muon": 0.006},
    )


MAKERS: tuple[Callable[[], Task], ...] = (
    *(teacher, adding, recurrent_text, images, sorting, bandit),
    *(surface, order, rows, gratings, language, walk),
    *(spirals, waves, commonest, rings, reversing, balance),
    *(mixture, recalling, largest, counting, shifting, following),
)


def tasks_of(half: str) -> list[Task]:
    """The six tasks of a half."""
    made = [make() for make in MAKERS]
    return [task for task in made if task.half == half]
