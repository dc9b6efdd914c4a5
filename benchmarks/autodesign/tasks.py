"""The tasks on which rules for `auto_clip` are designed.

None of them is in clipbench. All are tiny, so that every rule, learning rate and seed
of a task trains in one program.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clipbench.tasks import (
    Batch,
    Params,
    Task,
    apply,
    cross_entropy,
    dense,
    digits,
    drawn,
    elman,
    layers,
    mlp,
    run_elman,
)

TEST_KEY = 12345


def made(name: str, title: str, steps: int, *functions: Any) -> Task:
    """A task from its functions: init, batch, loss, final."""
    init, batch, loss, final = functions
    return Task(name, title, "design", init, batch, loss, final, steps)


@functools.cache
def small_digits() -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Digits of 4x4 pixels; 256 for the test."""
    (images, labels), (test, test_labels) = digits()

    def smaller(x: np.ndarray) -> np.ndarray:
        return x.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(-1, 16)

    return (smaller(images), labels), (smaller(test)[:256], test_labels[:256])


def copying() -> Task:
    """Two symbols, and after a delay both again, in order."""
    symbols, delay = 4, 6

    def batch(key: Any, step: Any, size: int = 8) -> Batch:
        shown = jax.random.randint(key, (size, 2), 0, symbols)
        blank = jnp.full((size, delay), symbols)
        go = jnp.full((size, 2), symbols + 1)
        whole = jnp.concatenate([shown, blank, go], axis=1)
        return jax.nn.one_hot(whole, symbols + 2), shown

    def loss(params: Params, given: Batch) -> Any:
        sequences, labels = given
        states = run_elman(params, sequences)[:, -2:]
        # Smoothed labels keep the loss of a solved task away from zero.
        smooth = 0.9 * jax.nn.one_hot(labels, symbols) + 0.1 / symbols
        return optax.softmax_cross_entropy(apply(params["out"], states), smooth).mean()

    test = batch(jax.random.key(TEST_KEY), 0, 128)
    return made(
        "copying",
        "two symbols to be repeated after six steps, plain recurrent network",
        400,
        lambda key: elman(key, symbols + 2, 12, symbols),
        batch,
        loss,
        lambda params: loss(params, test),
    )


def deep_tanh() -> Task:
    """A plain network of twelve layers, whose weights begin large."""
    train, test = small_digits()

    def init(key: Any) -> Params:
        a, b, c = jax.random.split(key, 3)
        middle = jax.random.normal(b, (10, 12, 12)) * 1.4 / np.sqrt(12)
        return {"in": dense(a, 16, 12), "middle": middle, "out": dense(c, 12, 10)}

    def loss(params: Params, given: Batch) -> Any:
        x, labels = given
        x = jnp.tanh(apply(params["in"], x))
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["middle"])
        return cross_entropy(apply(params["out"], x), labels)

    return made(
        "deep plain network",
        "images of digits, twelve layers of tanh without normalization",
        400,
        init,
        drawn(train, 8),
        loss,
        lambda params: loss(params, test),
    )


def chaotic_series() -> Task:
    """The next values of a logistic map, predicted in closed loop for six steps."""

    def series(key: Any, size: int, length: int) -> Any:
        x = jax.random.uniform(key, (size,), minval=0.1, maxval=0.9)
        step = lambda x, _: (3.9 * x * (1 - x), x)  # noqa: E731
        _, values = jax.lax.scan(step, x, None, length)
        return values.T

    def batch(key: Any, step: Any, size: int = 8) -> Batch:
        return series(key, size, 7)

    def loss(params: Params, given: Batch) -> Any:
        def step(x: Any, target: Any) -> Any:
            x = mlp(params, 2 * x[:, None] - 1, jnp.tanh)[:, 0]
            return x, jnp.mean((x - target) ** 2)

        _, errors = jax.lax.scan(step, given[:, 0], given[:, 1:].T)
        return jnp.mean(errors)

    test = batch(jax.random.key(TEST_KEY), 0, 128)
    return made(
        "chaotic series",
        "a logistic map in closed loop for six steps",
        400,
        lambda key: layers(key, [1, 16, 16, 1]),
        batch,
        loss,
        lambda params: loss(params, test),
    )


def factorization() -> Task:
    """A matrix of rank 4 from noisy entries; the factors begin large."""
    size, rank = 20, 4
    a, b = jax.random.split(jax.random.key(3))
    truth = jax.random.normal(a, (size, rank)) @ jax.random.normal(b, (rank, size))

    def batch(key: Any, step: Any) -> Batch:
        a, b = jax.random.split(key)
        place = jax.random.randint(a, (16, 2), 0, size)
        return place, truth[place[:, 0], place[:, 1]] + jax.random.normal(b, (16,))

    def init(key: Any) -> Params:
        a, b = jax.random.split(key)
        draw = functools.partial(jax.random.normal, shape=(size, rank))
        return {"u": 2 * draw(a), "v": 2 * draw(b)}

    def loss(params: Params, given: Batch) -> Any:
        place, targets = given
        found = jnp.sum(params["u"][place[:, 0]] * params["v"][place[:, 1]], axis=1)
        return jnp.mean((found - targets) ** 2)

    return made(
        "factorization",
        "a matrix of rank 4 from noisy entries",
        400,
        init,
        batch,
        loss,
        lambda params: jnp.mean((params["u"] @ params["v"].T - truth) ** 2),
    )


def deep_linear() -> Task:
    """A product of four small matrices: the gradients begin tiny, then explode."""
    size = 8
    values = jnp.linspace(0.3, 2, size)

    def batch(key: Any, step: Any) -> Batch:
        a, b = jax.random.split(key)
        x = jax.random.normal(a, (8, size))
        return x, x * values + 0.3 * jax.random.normal(b, (8, size))

    def product(params: Params) -> Any:
        a, b, c, d = params["w"]
        return a @ b @ c @ d

    def loss(params: Params, given: Batch) -> Any:
        x, targets = given
        return jnp.mean((x @ product(params) - targets) ** 2)

    def init(key: Any) -> Params:
        return {"w": 0.5 * jax.random.normal(key, (4, size, size)) / np.sqrt(size)}

    return made(
        "deep linear network",
        "a product of four matrices that begin small",
        400,
        init,
        batch,
        loss,
        lambda params: jnp.mean((product(params) - jnp.diag(values)) ** 2),
    )


def recall() -> Task:
    """Associative recall: the value that came with a key, by one layer of attention."""
    symbols, pairs, width = 8, 4, 12

    def batch(key: Any, step: Any, size: int = 8) -> Batch:
        a, b, c = jax.random.split(key, 3)
        keys = jax.vmap(lambda k: jax.random.permutation(k, symbols)[:pairs])(
            jax.random.split(a, size)
        )
        values = jax.random.randint(b, (size, pairs), 0, symbols)
        asked = jax.random.randint(c, (size, 1), 0, pairs)
        pick = functools.partial(jnp.take_along_axis, indices=asked, axis=1)
        return keys, values, pick(keys)[:, 0], pick(values)[:, 0]

    def init(key: Any) -> Params:
        names = ("keys", "values", "asked", "out")
        sizes = ((symbols, width), (symbols, width), (symbols, width), (width, symbols))
        found = zip(names, sizes, jax.random.split(key, 4), strict=True)
        return {n: dense(k, *size)["w"] for n, size, k in found}

    def loss(params: Params, given: Batch) -> Any:
        keys, values, asked, labels = given
        hot = functools.partial(jax.nn.one_hot, num_classes=symbols)
        scores = jnp.einsum(
            "npw,nw->np", hot(keys) @ params["keys"], hot(asked) @ params["asked"]
        )
        mixed = jnp.einsum(
            "np,npw->nw", jax.nn.softmax(scores), hot(values) @ params["values"]
        )
        smooth = 0.9 * hot(labels) + 0.1 / symbols
        return optax.softmax_cross_entropy(mixed @ params["out"], smooth).mean()

    test = batch(jax.random.key(TEST_KEY), 0, 128)
    return made(
        "associative recall",
        "the value that came with a key, one layer of attention",
        400,
        init,
        batch,
        loss,
        lambda params: loss(params, test),
    )


def rosenbrock() -> Task:
    """Rosenbrock's function of ten variables with noise in its gradient."""
    size = 10

    def valley(x: Any) -> Any:
        return jnp.sum(10 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)

    return made(
        "Rosenbrock",
        "Rosenbrock's function of ten variables with noisy gradients",
        600,
        lambda key: {"x": jax.random.uniform(key, (size,), minval=-2, maxval=2)},
        lambda key, step: jax.random.normal(key, (size,)),
        lambda params, noise: valley(params["x"]) + noise @ params["x"],
        lambda params: valley(params["x"]) + 0.01,
    )


def imbalanced() -> Task:
    """Digits of which some are rare and weigh more: rare gradients are large."""
    (images, labels), (test, test_labels) = small_digits()
    share = 2.0 ** -np.arange(10)
    draws = share[labels] / np.bincount(labels)[labels]
    draws = jnp.asarray(np.log(draws / draws.sum()), jnp.float32)
    weights = jnp.asarray(share.sum() / share / 10, jnp.float32)
    images, labels = jnp.asarray(images), jnp.asarray(labels)

    def batch(key: Any, step: Any) -> Batch:
        index = jax.random.categorical(key, draws, shape=(8,))
        return images[index], labels[index]

    def weighted(params: Params, given: Batch) -> Any:
        x, named = given
        losses = optax.softmax_cross_entropy_with_integer_labels(mlp(params, x), named)
        return jnp.mean(losses * weights[named])

    return made(
        "imbalanced classes",
        "images of digits, some 500 times as rare as others and weighted",
        400,
        lambda key: layers(key, [16, 16, 10]),
        batch,
        weighted,
        lambda params: cross_entropy(mlp(params, test), test_labels),
    )


def online() -> Task:
    """Logistic regression, one example at a time, with a few huge inputs."""
    size = 20
    truth = jax.random.normal(jax.random.key(5), (size,)) / np.sqrt(size)

    def batch(key: Any, step: Any, count: int = 1) -> Batch:
        a, b, c = jax.random.split(key, 3)
        x = jax.random.normal(a, (count, size))
        x = x * jnp.exp(jax.random.normal(b, (count, 1)))
        sign = jnp.where(jax.random.uniform(c, (count,)) < 0.1, -1, 1)
        return x, sign * jnp.sign(x @ truth)

    def loss(params: Params, given: Batch) -> Any:
        x, sign = given
        return jnp.mean(jax.nn.softplus(-sign * (x @ params["w"] + params["b"])))

    def final(params: Params) -> Any:
        x, _ = test
        return jnp.mean(jax.nn.softplus(-jnp.sign(x @ truth) * (x @ params["w"])))

    test = batch(jax.random.key(TEST_KEY), 0, 512)
    return made(
        "one example at a time",
        "logistic regression in batches of one, a tenth of the labels wrong",
        800,
        lambda key: {"w": jnp.zeros(size), "b": jnp.zeros(())},
        batch,
        loss,
        final,
    )


def autoencoder() -> Task:
    """Digits through a bottleneck."""
    (images, _), (test, _) = small_digits()

    def loss(params: Params, given: Batch) -> Any:
        return jnp.mean((mlp(params, given[0], jnp.tanh) - given[0]) ** 2)

    return made(
        "autoencoder",
        "images of digits through a bottleneck of four",
        400,
        lambda key: layers(key, [16, 16, 4, 16, 16]),
        drawn((images,), 8),
        loss,
        lambda params: loss(params, (test,)),
    )


def bandit() -> Task:
    """A policy for a bandit with contexts, by REINFORCE; rewards have heavy tails."""
    contexts, actions = 6, 5
    worth = jax.random.normal(jax.random.key(9), (contexts, actions))
    features = jax.random.normal(jax.random.key(10), (contexts, 8))
    best = jnp.mean(jnp.max(worth, axis=1))

    def batch(key: Any, step: Any) -> Batch:
        a, b, c = jax.random.split(key, 3)
        context = jax.random.randint(a, (8,), 0, contexts)
        noise = jax.random.t(b, 2.0, (8, actions))
        return context, worth[context] + noise, jax.random.gumbel(c, (8, actions))

    def loss(params: Params, given: Batch) -> Any:
        context, rewards, gumbel = given
        logs = jax.nn.log_softmax(mlp(params, features[context], jnp.tanh))
        acted = jnp.argmax(jax.lax.stop_gradient(logs) + gumbel, axis=1)
        pick = functools.partial(jnp.take_along_axis, indices=acted[:, None], axis=1)
        return -jnp.mean(pick(rewards) * pick(logs))

    def final(params: Params) -> Any:
        policy = jax.nn.softmax(mlp(params, features, jnp.tanh))
        return best - jnp.mean(jnp.sum(policy * worth, axis=1)) + 0.01

    return made(
        "policy gradient",
        "REINFORCE on a bandit with contexts and heavy-tailed rewards",
        400,
        lambda key: layers(key, [8, 16, actions]),
        batch,
        loss,
        final,
    )


def neural_ode() -> Task:
    """A spiral, by a network that is integrated for ten steps of Euler."""
    turn = jnp.array([[-0.1, 2.0], [-2.0, -0.1]])

    def run(field: Callable[[Any], Any], start: Any) -> Any:
        def step(x: Any, _: Any) -> Any:
            x = x + 0.2 * field(x)
            return x, x

        return jax.lax.scan(step, start, None, 10)[1]

    def batch(key: Any, step: Any, size: int = 8) -> Batch:
        a, b = jax.random.split(key)
        start = 2 * jax.random.normal(a, (size, 2))
        path = run(lambda x: (x**3 / 4) @ turn / 2, jnp.clip(start, -1.5, 1.5))
        return jnp.clip(start, -1.5, 1.5), path + 0.1 * jax.random.normal(b, path.shape)

    def loss(params: Params, given: Batch) -> Any:
        start, path = given
        return jnp.mean((run(lambda x: mlp(params, x, jnp.tanh), start) - path) ** 2)

    test = batch(jax.random.key(TEST_KEY), 0, 64)
    return made(
        "neural ODE",
        "a spiral by a network integrated for ten steps",
        400,
        lambda key: layers(key, [2, 16, 2]),
        batch,
        loss,
        lambda params: loss(params, test),
    )


MAKERS: dict[str, Callable[[], Task]] = {
    "copying": copying,
    "deep plain network": deep_tanh,
    "chaotic series": chaotic_series,
    "factorization": factorization,
    "deep linear network": deep_linear,
    "associative recall": recall,
    "Rosenbrock": rosenbrock,
    "imbalanced classes": imbalanced,
    "one example at a time": online,
    "autoencoder": autoencoder,
    "policy gradient": bandit,
    "neural ODE": neural_ode,
}
