"""The tasks: small problems on which the threshold of gradients makes a difference.

Each is a set of pure functions, so that many seeds and thresholds train side by side.
Half of the tasks were at hand when `auto_clip` was designed; the others were not looked
at.
"""

import functools
import itertools
import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits, make_regression

Params = Any
Batch = Any


@dataclass(frozen=True)
class Task:
    """What is learned.

    Attributes:
        name: of the task.
        title: what it is, in a few words.
        half: `"design"` or `"held out"`.
        init: from a key to parameters.
        batch: from a key and the number of the step to a batch.
        loss: from parameters and a batch to the training loss.
        final: from parameters to the loss that counts, on data of its own.
        steps: how many.
        heavy: whether each method has its default number alone.
    """

    name: str
    title: str
    half: str
    init: Callable[[Any], Params]
    batch: Callable[[Any, Any], Batch]
    loss: Callable[[Params, Batch], Any]
    final: Callable[[Params], Any]
    steps: int
    heavy: bool = False


def dense(key: Any, inputs: int, outputs: int, scale: float = 1.0) -> dict[str, Any]:
    """A linear layer, its variance preserved."""
    w = jax.random.normal(key, (inputs, outputs)) * scale / np.sqrt(inputs)
    return {"w": w, "b": jnp.zeros(outputs)}


def apply(layer: dict[str, Any], x: Any) -> Any:
    """The layer's outputs."""
    return x @ layer["w"] + layer["b"]


def cross_entropy(logits: Any, labels: Any) -> Any:
    """The mean over all labels."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def layers(key: Any, sizes: list[int]) -> list[dict[str, Any]]:
    """A stack of linear layers."""
    keys = jax.random.split(key, len(sizes) - 1)
    pairs = itertools.pairwise(sizes)
    return [dense(k, *pair) for k, pair in zip(keys, pairs, strict=True)]


def mlp(params: list[dict[str, Any]], x: Any, act: Any = jax.nn.relu) -> Any:
    """The outputs of a stack of linear layers."""
    for layer in params[:-1]:
        x = act(apply(layer, x))
    return apply(params[-1], x)


def drawn(
    train: tuple[np.ndarray, ...], size: int
) -> Callable[[Any, Any], tuple[Any, ...]]:
    """Batches of a data set, drawn with replacement."""
    arrays = [jnp.asarray(x) for x in train]

    def batch(key: Any, step: Any) -> tuple[Any, ...]:
        index = jax.random.randint(key, (size,), 0, len(arrays[0]))
        return tuple(x[index] for x in arrays)

    return batch


@functools.cache
def digits() -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """1,797 images of 8x8 in 0..1 with labels: training and test data."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = (images[order] / 16).astype(np.float32)
    labels = labels[order].astype(np.int32)
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


@functools.cache
def text() -> tuple[np.ndarray, np.ndarray, int]:
    """The language reference that ships with Python: training, test, characters."""
    topics = pydoc_data.topics.topics
    whole = "".join(topics[name] for name in sorted(topics)).lower()
    _, numbers = np.unique(np.array(list(whole)), return_inverse=True)
    numbers = numbers.astype(np.int32)
    cut = int(0.9 * len(numbers))
    return numbers[:cut], numbers[cut:], int(numbers.max()) + 1


def regression() -> Task:
    """Targets in the hundreds: gradients explode at ordinary learning rates."""
    x, y = make_regression(n_samples=1200, n_features=20, noise=10.0, random_state=1)
    x, y = x.astype(np.float32), y.astype(np.float32)

    def loss(params: Params, batch: Batch) -> Any:
        inputs, targets = batch
        return jnp.mean((mlp(params, inputs)[:, 0] - targets) ** 2)

    return Task(
        name="regression",
        title="regression with targets in the hundreds, network of two layers",
        half="design",
        init=lambda key: layers(key, [20, 25, 1]),
        batch=drawn((x[:1000], y[:1000]), 50),
        loss=loss,
        final=lambda params: loss(params, (x[1000:], y[1000:])),
        steps=600,
    )


def elman(key: Any, inputs: int, hidden: int, outputs: int) -> Params:
    """A plain recurrent network, whose recurrence begins as a rotation."""
    a, b, c = jax.random.split(key, 3)
    return {
        "in": dense(a, inputs, hidden),
        "again": jax.random.orthogonal(b, hidden),
        "out": dense(c, hidden, outputs),
    }


def run_elman(params: Params, sequences: Any) -> Any:
    """The hidden states after each step: batch, time, hidden."""
    seen = jnp.swapaxes(apply(params["in"], sequences), 0, 1)

    def step(hidden: Any, x: Any) -> tuple[Any, Any]:
        hidden = jnp.tanh(x + hidden @ params["again"])
        return hidden, hidden

    _, states = jax.lax.scan(step, jnp.zeros_like(seen[0, :, :]), seen)
    return jnp.swapaxes(states, 0, 1)


def lstm(key: Any, inputs: int, hidden: int, outputs: int) -> Params:
    """A long short-term memory; its forget gates begin open."""
    a, b, c = jax.random.split(key, 3)
    gates = dense(a, inputs, 4 * hidden)
    gates["b"] = gates["b"].at[hidden : 2 * hidden].set(1.0)
    again = dense(b, hidden, 4 * hidden)["w"]
    return {"in": gates, "again": again, "out": dense(c, hidden, outputs)}


def run_lstm(params: Params, sequences: Any) -> Any:
    """The hidden states after each step: batch, time, hidden."""
    seen = jnp.swapaxes(apply(params["in"], sequences), 0, 1)

    def step(carry: Any, x: Any) -> tuple[Any, Any]:
        hidden, cell = carry
        i, f, g, o = jnp.split(x + hidden @ params["again"], 4, axis=-1)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return (hidden, cell), hidden

    zero = jnp.zeros_like(jnp.split(seen[0], 4, axis=-1)[0])
    _, states = jax.lax.scan(step, (zero, zero), seen)
    return jnp.swapaxes(states, 0, 1)


def digit_sequences(
    name: str,
    title: str,
    half: str,
    width: int,
    init: Any,
    run: Any,
    steps: int,
    heavy: bool = False,
) -> Task:
    """Images read some pixels at a time, then named."""
    (images, labels), test = digits()

    def loss(params: Params, batch: Batch) -> Any:
        pixels, targets = batch
        states = run(params, pixels.reshape(len(pixels), -1, width))
        return cross_entropy(apply(params["out"], states[:, -1]), targets)

    return Task(
        name=name,
        title=title,
        half=half,
        init=lambda key: init(key, width, 32, 10),
        batch=drawn((images, labels), 32),
        loss=loss,
        final=lambda params: loss(params, test),
        steps=steps,
        heavy=heavy,
    )


def adding() -> Task:
    """The sum of the two marked numbers of a sequence (Hochreiter, Pascanu et al.)."""
    length, noise = 24, 0.1

    def batch(key: Any, step: Any, size: int = 32) -> Batch:
        a, b, c, d = jax.random.split(key, 4)
        numbers = jax.random.uniform(a, (size, length))
        first = jax.random.randint(b, (size,), 0, length // 2)
        second = jax.random.randint(c, (size,), length // 2, length)
        marks = jax.nn.one_hot(first, length) + jax.nn.one_hot(second, length)
        targets = jnp.sum(numbers * marks, axis=1)
        targets = targets + noise * jax.random.normal(d, (size,))
        return jnp.stack([numbers, marks], axis=-1), targets

    def loss(params: Params, given: Batch) -> Any:
        sequences, targets = given
        outputs = apply(params["out"], run_elman(params, sequences)[:, -1])
        return jnp.mean((outputs[:, 0] - targets) ** 2)

    test = batch(jax.random.key(12345), 0, 1000)
    return Task(
        name="adding",
        title="the adding problem over 24 steps, plain recurrent network",
        half="design",
        init=lambda key: elman(key, 2, 32, 1),
        batch=batch,
        loss=loss,
        final=lambda params: loss(params, test),
        steps=800,
    )


def temporal_order() -> Task:
    """Which two of two symbols came, and in which order, among six distractors."""
    length, symbols = 20, 6

    def batch(key: Any, step: Any, size: int = 32) -> Batch:
        a, b, c, d = jax.random.split(key, 4)
        noise = jax.random.randint(a, (size, length), 2, symbols)
        first = jax.random.randint(b, (size,), 1, 4)
        second = jax.random.randint(c, (size,), 10, 13)
        order = jax.random.randint(d, (size, 2), 0, 2)
        place = jnp.arange(length)[None]
        shown = jnp.where(place == first[:, None], order[:, :1], noise)
        shown = jnp.where(place == second[:, None], order[:, 1:], shown)
        return jax.nn.one_hot(shown, symbols), 2 * order[:, 0] + order[:, 1]

    def loss(params: Params, given: Batch) -> Any:
        sequences, labels = given
        outputs = apply(params["out"], run_elman(params, sequences)[:, -1])
        # Smoothed labels keep the loss of a solved task away from zero.
        smooth = 0.9 * jax.nn.one_hot(labels, 4) + 0.025
        return optax.softmax_cross_entropy(outputs, smooth).mean()

    test = batch(jax.random.key(12345), 0, 1000)
    return Task(
        name="temporal order",
        title="the temporal order problem over 20 steps, plain recurrent network",
        half="held out",
        init=lambda key: elman(key, symbols, 32, 4),
        batch=batch,
        loss=loss,
        final=lambda params: loss(params, test),
        steps=800,
    )


def pieces(numbers: np.ndarray, size: int, length: int) -> Callable[[Any, Any], Any]:
    """Batches of pieces of the text, one character longer than what is read."""
    numbers = jnp.asarray(numbers)

    def batch(key: Any, step: Any) -> Any:
        starts = jax.random.randint(key, (size,), 0, len(numbers) - length - 1)
        return numbers[starts[:, None] + jnp.arange(length + 1)[None]]

    return batch


def recurrent_lm() -> Task:
    """The next character, by a plain recurrent network."""
    train, test, characters = text()

    def loss(params: Params, given: Batch) -> Any:
        sequences = jax.nn.one_hot(given[:, :-1], characters)
        return cross_entropy(
            apply(params["out"], run_elman(params, sequences)), given[:, 1:]
        )

    held = pieces(test, 128, 24)(jax.random.key(1), 0)
    return Task(
        name="characters, RNN",
        title="next characters of Python's reference, plain recurrent network",
        half="design",
        init=lambda key: elman(key, characters, 48, characters),
        batch=pieces(train, 12, 24),
        loss=loss,
        final=lambda params: loss(params, held),
        steps=600,
    )


def transformer_lm() -> Task:
    """The next character, by a transformer of two blocks."""
    train, test, characters = text()
    length, width, heads = 24, 32, 2

    def init(key: Any) -> Params:
        keys = iter(jax.random.split(key, 16))
        block = {
            "norms": jnp.ones((2, width)),
            "qkv": dense(next(keys), width, 3 * width),
            "out": dense(next(keys), width, width),
            "up": dense(next(keys), width, 2 * width),
            "down": dense(next(keys), 2 * width, width),
        }
        other = jax.tree.map(
            lambda x: x if x.ndim == 1 else jax.random.permutation(next(keys), x, 0),
            block,
        )
        return {
            "characters": 0.5 * jax.random.normal(next(keys), (characters, width)),
            "places": 0.5 * jax.random.normal(next(keys), (length, width)),
            "blocks": [block, other],
            "head": dense(next(keys), width, characters),
        }

    def normal(x: Any, scale: Any) -> Any:
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale

    def attend(block: Params, x: Any) -> Any:
        q, k, v = jnp.split(apply(block["qkv"], x), 3, axis=-1)
        size, time = x.shape[:2]
        q, k, v = (a.reshape(size, time, heads, -1) for a in (q, k, v))
        seen = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return apply(block["out"], seen.reshape(size, time, width))

    def loss(params: Params, given: Batch) -> Any:
        x = params["characters"][given[:, :-1]] + params["places"]
        for block in params["blocks"]:
            x = x + attend(block, normal(x, block["norms"][0]))
            up = apply(block["up"], normal(x, block["norms"][1]))
            x = x + apply(block["down"], jax.nn.gelu(up))
        return cross_entropy(apply(params["head"], normal(x, 1.0)), given[:, 1:])

    held = pieces(test, 128, length)(jax.random.key(1), 0)
    return Task(
        name="characters, transformer",
        title="next characters of Python's reference, transformer of two blocks",
        half="held out",
        init=init,
        batch=pieces(train, 12, length),
        loss=loss,
        final=lambda params: loss(params, held),
        steps=500,
        heavy=True,
    )


def convolve(images: Any, kernel: Any, stride: int) -> Any:
    """Of even images with 3x3 kernels, padded as "SAME" is; one product of matrices."""
    low = 1 if stride == 1 else 0
    padded = jnp.pad(images, ((0, 0), (low, 1), (low, 1), (0, 0)))
    height, width = images.shape[1:3]
    shifted = [
        padded[:, i : i + height : stride, j : j + width : stride]
        for i, j in itertools.product(range(3), repeat=2)
    ]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def convolutions() -> Task:
    """Images of digits by a network of four convolutions without normalization."""
    (images, labels), test = digits()
    channels = [1, 8, 16, 16, 16]

    def init(key: Any) -> Params:
        keys = jax.random.split(key, 5)
        kernels = [
            jax.random.normal(k, (3, 3, a, b)) * np.sqrt(2 / (9 * a))
            for k, a, b in zip(keys, channels[:-1], channels[1:], strict=False)
        ]
        biases = [jnp.zeros(b) for b in channels[1:]]
        return {"kernels": kernels, "biases": biases, "out": dense(keys[4], 16, 10)}

    def loss(params: Params, batch: Batch) -> Any:
        pixels, targets = batch
        x = jnp.reshape(pixels, (-1, 8, 8, 1))
        pairs = zip(params["kernels"], params["biases"], strict=True)
        for i, (kernel, bias) in enumerate(pairs):
            x = jax.nn.relu(convolve(x, kernel, stride=2 if i in (1, 3) else 1) + bias)
        return cross_entropy(apply(params["out"], x.mean((1, 2))), targets)

    return Task(
        name="convolutions",
        title="images of digits, four convolutions without normalization",
        half="held out",
        init=init,
        batch=drawn((images, labels), 32),
        loss=loss,
        final=lambda params: loss(params, test),
        steps=400,
        heavy=True,
    )


def heavy_tails() -> Task:
    """A linear regression whose noise has no variance (Student's t, 1.5 degrees)."""
    size = 30
    truth = jax.random.normal(jax.random.key(7), (size,))
    spread = jnp.logspace(-1, 0, size)  # of the inputs: ill-conditioned

    def batch(key: Any, step: Any) -> Batch:
        a, b = jax.random.split(key)
        x = jax.random.normal(a, (16, size)) * spread
        return x, x @ truth + jax.random.t(b, 1.5, (16,))

    def loss(params: Params, given: Batch) -> Any:
        x, targets = given
        return 0.5 * jnp.mean((x @ params["w"] - targets) ** 2)

    def final(params: Params) -> Any:
        return 0.5 * jnp.sum(((params["w"] - truth) * spread) ** 2)

    return Task(
        name="heavy tails",
        title="linear regression with noise of infinite variance",
        half="design",
        init=lambda key: {"w": jax.random.normal(key, (size,))},
        batch=batch,
        loss=loss,
        final=final,
        steps=1500,
    )


def classifier(
    name: str, title: str, half: str, change: Callable[..., Batch], steps: int
) -> Task:
    """Images of digits, a network of three layers; something changes its batches."""
    (images, labels), test = digits()
    draw = drawn((images, labels), 32)

    def loss(params: Params, batch: Batch) -> Any:
        pixels, targets, weight = batch
        return weight * cross_entropy(mlp(params, pixels), targets)

    def batch(key: Any, step: Any) -> Batch:
        first, second = jax.random.split(key)
        return change(second, step, *draw(first, step))

    return Task(
        name=name,
        title=title,
        half=half,
        init=lambda key: layers(key, [64, 48, 48, 10]),
        batch=batch,
        loss=loss,
        final=lambda params: loss(params, (*test, 1.0)),
        steps=steps,
    )


def corrupt(key: Any, step: Any, images: Any, labels: Any) -> Batch:
    """One batch of 50 has inputs 30 times as large, with labels at random."""
    a, b = jax.random.split(key)
    broken = jax.random.bernoulli(a, 0.02)
    wrong = jax.random.randint(b, labels.shape, 0, 10)
    return (
        jnp.where(broken, 30 * images, images),
        jnp.where(broken, wrong, labels),
        1.0,
    )


def shifted(steps: int) -> Callable[..., Batch]:
    """The loss is 10 times as large in the second third of the run."""

    def change(key: Any, step: Any, images: Any, labels: Any) -> Batch:
        middle = (step >= steps // 3) & (step < 2 * steps // 3)
        return images, labels, jnp.where(middle, 10.0, 1.0)

    return change


def values() -> Task:
    """Values of the states of a random walk, learned from its own estimates (TD)."""
    states, discount = 20, 0.9
    walk = np.zeros((states, states))
    for state in range(states):
        walk[state, (state + 1) % states] += 0.5
        walk[state, (state - 1) % states] += 0.5
    rewards = np.sin(np.arange(states) * 2 * np.pi / states) + (np.arange(states) == 3)
    truth = np.linalg.solve(np.eye(states) - discount * walk, rewards)
    truth, rewards = truth.astype(np.float32), rewards.astype(np.float32)
    angles = 2 * np.pi * np.arange(states)[:, None] * np.arange(1, 6)[None] / states
    features = np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32)

    def value(params: Params, state: Any) -> Any:
        return mlp(params, jnp.asarray(features)[state], jnp.tanh)[..., 0]

    def batch(key: Any, step: Any) -> Batch:
        a, b, c = jax.random.split(key, 3)
        state = jax.random.randint(a, (16,), 0, states)
        move = 2 * jax.random.bernoulli(b, shape=(16,)).astype(jnp.int32) - 1
        # Rewards have a heavy tail, as scores of games do.
        reward = jnp.asarray(rewards)[state] + jax.random.t(c, 2.0, (16,))
        return state, reward, (state + move) % states

    def loss(params: Params, given: Batch) -> Any:
        state, reward, following = given
        target = jax.lax.stop_gradient(reward + discount * value(params, following))
        return 0.5 * jnp.mean((value(params, state) - target) ** 2)

    def final(params: Params) -> Any:
        return jnp.mean((value(params, jnp.arange(states)) - truth) ** 2)

    return Task(
        name="values",
        title="values of a random walk with heavy-tailed rewards (TD learning)",
        half="held out",
        init=lambda key: layers(key, [10, 32, 1]),
        batch=batch,
        loss=loss,
        final=final,
        steps=1500,
    )


MAKERS: dict[str, Callable[[], Task]] = {
    "regression": regression,
    "rows, RNN": lambda: digit_sequences(
        "rows, RNN",
        "images row by row, plain recurrent network",
        "design",
        8,
        elman,
        run_elman,
        600,
    ),
    "adding": adding,
    "characters, RNN": recurrent_lm,
    "heavy tails": heavy_tails,
    "corrupt batches": lambda: classifier(
        "corrupt batches",
        "images of digits, one batch of 50 corrupt",
        "design",
        corrupt,
        600,
    ),
    "pairs, LSTM": lambda: digit_sequences(
        "pairs, LSTM",
        "images two pixels at a time, LSTM",
        "held out",
        2,
        lstm,
        run_lstm,
        500,
        heavy=True,
    ),
    "temporal order": temporal_order,
    "characters, transformer": transformer_lm,
    "convolutions": convolutions,
    "level shifts": lambda: classifier(
        "level shifts",
        "images of digits, the loss 10 times as large for a third of the run",
        "held out",
        shifted(600),
        600,
    ),
    "values": values,
}


def task(name: str) -> Task:
    """The task of this name."""
    return MAKERS[name]()
