"""The tasks of the third round, which measures and chooses nothing.

None of them is in clipbench or among the tasks on which the rules were designed. They
are standard problems, written down before any rule ran on them.
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
    drawn,
    layers,
    lstm,
    mlp,
    run_lstm,
)

from autodesign.tasks import TEST_KEY, made, small_digits

smooth_mlp = functools.partial(mlp, act=jnp.tanh)


def smoothed(scores: Any, labels: Any) -> Any:
    """The mean cross entropy; a solved task keeps a loss above zero."""
    count = scores.shape[-1]
    targets = 0.9 * jax.nn.one_hot(labels, count) + 0.1 / count
    return optax.softmax_cross_entropy(scores, targets).mean()


def parity() -> Task:
    """Whether the number of ones is odd, after six bits."""

    def batch(key: Any, step: Any, size: int = 16) -> Batch:
        bits = jax.random.randint(key, (size, 6), 0, 2)
        return 2.0 * bits[..., None] - 1, jnp.sum(bits, axis=1) % 2

    def loss(params: Params, given: Batch) -> Any:
        sequences, labels = given
        last = run_lstm(params, sequences)[:, -1]
        return smoothed(apply(params["out"], last), labels)

    test = batch(jax.random.key(TEST_KEY), 0, 128)
    return made(
        "parity",
        "the parity of six bits, LSTM",
        800,
        lambda key: lstm(key, 1, 10, 2),
        batch,
        loss,
        lambda params: loss(params, test),
    )


def modular_addition() -> Task:
    """The sum of two numbers modulo 5, by a transformer of one block."""
    base, width = 5, 16
    pairs = np.stack(np.meshgrid(np.arange(base), np.arange(base)), -1).reshape(-1, 2)
    tokens = np.concatenate([pairs, np.full((len(pairs), 1), base)], axis=1)
    hot = np.eye(base + 1, dtype=np.float32)[tokens]
    labels = (pairs.sum(axis=1) % base).astype(np.int32)

    def init(key: Any) -> Params:
        a, b, c, d, e, f = jax.random.split(key, 6)
        return {
            "embed": jax.random.normal(a, (base + 1, width)),
            "place": jax.random.normal(b, (3, width)),
            "read": dense(c, width, 3 * width)["w"],
            "write": dense(d, width, width)["w"],
            "mlp": layers(e, [width, 2 * width, width]),
            "out": dense(f, width, base),
        }

    def loss(params: Params, given: Batch) -> Any:
        shown, sums = given
        x = shown @ params["embed"] + params["place"]
        q, k, v = jnp.split(jax.nn.standardize(x) @ params["read"], 3, axis=-1)
        scores = jnp.einsum("nqw,nkw->nqk", q, k) / np.sqrt(width)
        mixed = jnp.einsum("nqk,nkw->nqw", jax.nn.softmax(scores), v)
        last = (x + mixed @ params["write"])[:, -1]
        last = last + mlp(params["mlp"], jax.nn.standardize(last))
        return smoothed(apply(params["out"], jax.nn.standardize(last)), sums)

    whole = jnp.asarray(hot), jnp.asarray(labels)
    return made(
        "modular addition",
        "the sum of two numbers modulo 5, transformer of one block",
        600,
        init,
        drawn((hot, labels), 16),
        loss,
        lambda params: loss(params, whole),
    )


def critic() -> Task:
    """Two humps, drawn by a generator against a critic with a gradient penalty."""

    def real(key: Any, size: int) -> Any:
        a, b = jax.random.split(key)
        side = 2.0 * jax.random.bernoulli(a, shape=(size, 1)) - 1
        return 2 * side + 0.3 * jax.random.normal(b, (size, 1))

    def batch(key: Any, step: Any, size: int = 16) -> Batch:
        a, b, c = jax.random.split(key, 3)
        share = jax.random.uniform(c, (size, 1))
        return real(a, size), jax.random.normal(b, (size, 2)), share

    def loss(params: Params, given: Batch) -> Any:
        shown, noise, share = given
        drawn_here = smooth_mlp(params["generator"], noise)
        others = jax.lax.stop_gradient(params["critic"])
        fooled = -jnp.mean(smooth_mlp(others, drawn_here))
        judge = functools.partial(smooth_mlp, params["critic"])
        fake = jax.lax.stop_gradient(drawn_here)
        slope = jax.grad(lambda x: jnp.sum(judge(x)))(
            share * shown + (1 - share) * fake
        )
        penalty = jnp.mean((jnp.abs(slope) - 1) ** 2)
        return fooled + jnp.mean(judge(fake)) - jnp.mean(judge(shown)) + penalty

    a, b = jax.random.split(jax.random.key(TEST_KEY))
    shown, noise = jnp.sort(real(a, 256)[:, 0]), jax.random.normal(b, (256, 2))

    def final(params: Params) -> Any:
        found = jnp.sort(smooth_mlp(params["generator"], noise)[:, 0])
        return jnp.mean(jnp.abs(found - shown)) + 0.02

    def init(key: Any) -> Params:
        a, b = jax.random.split(key)
        sizes = {"generator": [2, 12, 1], "critic": [1, 16, 1]}
        return {n: layers(k, sizes[n]) for n, k in zip(sizes, (a, b), strict=True)}

    return made(
        "Wasserstein critic",
        "a generator of two humps against a critic with a gradient penalty",
        800,
        init,
        batch,
        loss,
        final,
    )


def variational() -> Task:
    """Digits by a variational autoencoder with four latent numbers."""
    (images, _), (test, _) = small_digits()

    def bound(params: Params, x: Any, noise: Any) -> Any:
        mean, log = jnp.split(smooth_mlp(params["encoder"], x), 2, axis=-1)
        logits = smooth_mlp(params["decoder"], mean + jnp.exp(log / 2) * noise)
        pixels = optax.sigmoid_binary_cross_entropy(logits, x)
        # Less the entropy of the pixels, which nothing can remove.
        pixels = pixels + jax.scipy.special.xlogy(x, x)
        pixels = pixels + jax.scipy.special.xlogy(1 - x, 1 - x)
        apart = 0.5 * (mean**2 + jnp.exp(log) - log - 1)
        return jnp.mean(jnp.sum(pixels, axis=-1) + jnp.sum(apart, axis=-1))

    draw = drawn((images,), 8)

    def batch(key: Any, step: Any) -> Batch:
        a, b = jax.random.split(key)
        return *draw(a, step), jax.random.normal(b, (8, 4))

    def init(key: Any) -> Params:
        a, b = jax.random.split(key)
        return {"encoder": layers(a, [16, 16, 8]), "decoder": layers(b, [4, 16, 16])}

    noise = jax.random.normal(jax.random.key(TEST_KEY), (len(test), 4))
    return made(
        "variational autoencoder",
        "images of digits by a variational autoencoder with four latent numbers",
        400,
        init,
        batch,
        lambda params, given: bound(params, *given),
        lambda params: bound(params, test, noise),
    )


def oscillator() -> Task:
    """A damped oscillation from its differential equation alone."""
    damping, stiffness = 0.5, 4.0
    turn = np.sqrt(stiffness - damping**2 / 4)

    def value(params: Params, time: Any) -> Any:
        return smooth_mlp(params, (time / 1.5 - 1)[None, None])[0, 0]

    def loss(params: Params, times: Any) -> Any:
        u = functools.partial(value, params)
        slope = jax.grad(u)

        def residual(time: Any) -> Any:
            return jax.grad(slope)(time) + damping * slope(time) + stiffness * u(time)

        start = (u(jnp.zeros(())) - 1) ** 2 + slope(jnp.zeros(())) ** 2
        return jnp.mean(jax.vmap(residual)(times) ** 2) + 10 * start

    times = jnp.linspace(0, 3, 64)
    wave = jnp.cos(turn * times) + damping / 2 / turn * jnp.sin(turn * times)
    truth = jnp.exp(-damping / 2 * times) * wave

    def final(params: Params) -> Any:
        found = jax.vmap(functools.partial(value, params))(times)
        return jnp.mean((found - truth) ** 2) + 0.001

    return made(
        "physics-informed",
        "a damped oscillation from the residual of its differential equation",
        600,
        lambda key: layers(key, [1, 16, 16, 1]),
        lambda key, step: jax.random.uniform(key, (16,), maxval=3.0),
        loss,
        final,
    )


def equilibrium() -> Task:
    """Digits from the state to which a layer settles in 20 iterations."""
    train, test = small_digits()
    hidden = 12

    def init(key: Any) -> Params:
        a, b, c = jax.random.split(key, 3)
        return {
            "in": dense(a, 16, hidden),
            "again": dense(b, hidden, hidden)["w"],
            "out": dense(c, hidden, 10),
        }

    def loss(params: Params, given: Batch) -> Any:
        x, labels = given
        x = apply(params["in"], x)
        settle = lambda z, _: (jnp.tanh(x + z @ params["again"]), None)  # noqa: E731
        z, _ = jax.lax.scan(settle, jnp.zeros_like(x), None, 20)
        return cross_entropy(apply(params["out"], z), labels)

    return made(
        "equilibrium",
        "images of digits by the fixed point of a layer",
        400,
        init,
        drawn(train, 8),
        loss,
        lambda params: loss(params, test),
    )


def q_learning() -> Task:
    """Values of the actions on a chain of states, learned from their own maximum."""
    states, discount = 8, 0.9
    following = np.stack(
        [np.maximum(np.arange(states) - 1, 0), (np.arange(states) + 1) % states], axis=1
    )
    rewards = np.zeros((states, 2))
    rewards[0, 0], rewards[-1, 1] = 0.1, 2.0
    truth = np.zeros((states, 2))
    for _ in range(500):
        best = truth.max(axis=1)[following]
        truth = rewards + discount * (0.9 * best + 0.1 * best[:, ::-1])
    table, worth = jnp.asarray(following), jnp.asarray(rewards, jnp.float32)
    features = jax.random.normal(jax.random.key(11), (states, 6))

    def value(params: Params, state: Any) -> Any:
        return smooth_mlp(params, features[state])

    def batch(key: Any, step: Any) -> Batch:
        a, b, c, d = jax.random.split(key, 4)
        state = jax.random.randint(a, (8,), 0, states)
        action = jax.random.randint(b, (8,), 0, 2)
        slips = jax.random.bernoulli(c, 0.1, (8,))
        reward = worth[state, action] + 0.3 * jax.random.normal(d, (8,))
        moved = jnp.where(slips, 1 - action, action)
        return state, action, reward, table[state, moved]

    def loss(params: Params, given: Batch) -> Any:
        state, action, reward, arrived = given
        target = reward + discount * jnp.max(value(params, arrived), axis=1)
        found = jnp.sum(value(params, state) * jax.nn.one_hot(action, 2), axis=1)
        return 0.5 * jnp.mean((found - jax.lax.stop_gradient(target)) ** 2)

    known = jnp.asarray(truth, jnp.float32)
    return made(
        "Q-learning",
        "values of the actions on a chain of eight states, bootstrapped",
        800,
        lambda key: layers(key, [6, 16, 2]),
        batch,
        loss,
        lambda params: (
            jnp.mean((value(params, jnp.arange(states)) - known) ** 2) + 0.01
        ),
    )


def contrastive() -> Task:
    """Which of 16 noisy images shows the same digit image, at a low temperature."""
    (images, _), (test, _) = small_digits()
    draw = drawn((images,), 16)

    def batch(key: Any, step: Any) -> Batch:
        a, b = jax.random.split(key)
        return draw(a, step)[0] + 0.2 * jax.random.normal(b, (2, 16, 16))

    def embedded(params: Params, x: Any) -> Any:
        z = mlp(params, x)
        return z / jnp.sqrt(jnp.sum(z**2, axis=-1, keepdims=True) + 1e-6)

    def loss(params: Params, views: Any) -> Any:
        first, second = embedded(params, views)
        scores = first @ second.T / 0.05
        own = jnp.arange(len(scores))
        return (cross_entropy(scores, own) + cross_entropy(scores.T, own)) / 2

    noise = jax.random.normal(jax.random.key(TEST_KEY), (2, *test[:128].shape))
    views = test[:128] + 0.2 * noise
    groups = jnp.swapaxes(views.reshape(2, 8, 16, 16), 0, 1)

    def final(params: Params) -> Any:
        return jnp.mean(jax.vmap(functools.partial(loss, params))(groups))

    return made(
        "contrastive",
        "two noisy views of an image of digits, temperature 0.05",
        400,
        lambda key: layers(key, [16, 16, 8]),
        batch,
        loss,
        final,
    )


def mixture_density() -> Task:
    """A relation that is not a function, by a mixture of four normal densities."""

    def batch(key: Any, step: Any, size: int = 16) -> Batch:
        a, b = jax.random.split(key)
        y = jax.random.uniform(a, (size,))
        x = y + 0.3 * jnp.sin(2 * np.pi * y)
        return x + jax.random.uniform(b, (size,), minval=-0.1, maxval=0.1), y

    def loss(params: Params, given: Batch) -> Any:
        x, y = given
        found = smooth_mlp(params, 4 * x[:, None] - 2)
        weight, mean, log = jnp.split(found, 3, axis=-1)
        apart = (y[:, None] - mean) * jnp.exp(-log)
        parts = -0.5 * apart**2 - log - 0.5 * np.log(2 * np.pi)
        scores = jax.nn.log_softmax(weight) + parts
        return -jnp.mean(jax.nn.logsumexp(scores, axis=-1))

    test = batch(jax.random.key(TEST_KEY), 0, 256)
    return made(
        "mixture density",
        "a relation that is not a function, by four normal densities",
        600,
        lambda key: layers(key, [1, 16, 12]),
        batch,
        loss,
        # A likelihood, as its logarithm can be negative.
        lambda params: jnp.exp(loss(params, test)),
    )


def meta_learning() -> Task:
    """Sinusoids from ten points, after one step of SGD from parameters in common."""

    def batch(key: Any, step: Any, size: int = 4) -> Batch:
        a, b, c = jax.random.split(key, 3)
        height = jax.random.uniform(a, (size, 1), minval=0.1, maxval=5.0)
        phase = jax.random.uniform(b, (size, 1), maxval=np.pi)
        x = jax.random.uniform(c, (size, 20), minval=-5.0, maxval=5.0)
        return x, height * jnp.sin(x - phase)

    def error(params: Params, x: Any, y: Any) -> Any:
        return jnp.mean((smooth_mlp(params, x[:, None] / 2)[:, 0] - y) ** 2)

    def adapted(params: Params, x: Any, y: Any) -> Any:
        grads = jax.grad(error)(params, x[:10], y[:10])
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
        return error(params, x[10:], y[10:])

    def loss(params: Params, given: Batch) -> Any:
        return jnp.mean(jax.vmap(functools.partial(adapted, params))(*given))

    test = batch(jax.random.key(TEST_KEY), 0, 64)
    return made(
        "meta-learning",
        "sinusoids from ten points after one step of SGD (MAML)",
        400,
        lambda key: layers(key, [1, 16, 16, 1]),
        batch,
        loss,
        lambda params: loss(params, test),
    )


def graphs() -> Task:
    """The number of triangles of a random graph, by sums over neighbours."""
    nodes, width = 10, 8

    def batch(key: Any, step: Any, size: int = 8) -> Batch:
        a, b = jax.random.split(key)
        density = jax.random.uniform(a, (size, 1, 1), minval=0.1, maxval=0.6)
        upper = jnp.triu(jax.random.uniform(b, (size, nodes, nodes)) < density, 1)
        edges = upper.astype(jnp.float32)
        edges = edges + jnp.swapaxes(edges, 1, 2)
        return edges, jnp.einsum("nij,njk,nki->n", edges, edges, edges) / 60

    def init(key: Any) -> Params:
        a, b, c = jax.random.split(key, 3)
        return {
            "own": layers(a, [1, width, width, width]),
            "near": layers(b, [1, width, width, width]),
            "out": dense(c, width, 1),
        }

    def loss(params: Params, given: Batch) -> Any:
        edges, targets = given
        x = jnp.ones((*edges.shape[:2], 1))
        for own, near in zip(params["own"], params["near"], strict=True):
            x = jax.nn.relu(apply(own, x) + edges @ apply(near, x))
        found = apply(params["out"], jnp.sum(x, axis=1) / nodes)
        return jnp.mean((found[:, 0] - targets) ** 2)

    test = batch(jax.random.key(TEST_KEY), 0, 128)
    return made(
        "graph network",
        "the number of triangles of a random graph, three sums over neighbours",
        400,
        init,
        batch,
        loss,
        lambda params: loss(params, test),
    )


def flow() -> Task:
    """Two moons by a flow of four affine couplings."""

    def batch(key: Any, step: Any, size: int = 16) -> Batch:
        a, b, c = jax.random.split(key, 3)
        angle = np.pi * jax.random.uniform(a, (size,))
        lower = jax.random.bernoulli(b, shape=(size,))
        x = jnp.where(lower, 0.5 - jnp.cos(angle), jnp.cos(angle) - 0.5)
        y = jnp.where(lower, 0.25 - jnp.sin(angle), jnp.sin(angle) - 0.25)
        return jnp.stack([x, y], axis=1) + 0.1 * jax.random.normal(c, (size, 2))

    def loss(params: Params, points: Any) -> Any:
        kept, moved = points[:, :1], points[:, 1:]
        volume = jnp.zeros_like(kept)
        for coupling in params:
            log, shift = jnp.split(smooth_mlp(coupling, kept), 2, axis=1)
            kept, moved = moved * jnp.exp(log) + shift, kept
            volume = volume + log
        far = 0.5 * (kept**2 + moved**2) + np.log(2 * np.pi)
        return jnp.mean(far - volume)

    test = batch(jax.random.key(TEST_KEY), 0, 256)
    return made(
        "normalizing flow",
        "two moons by four affine couplings",
        400,
        lambda key: [layers(k, [1, 10, 2]) for k in jax.random.split(key, 4)],
        batch,
        loss,
        # A likelihood, as its logarithm can be negative.
        lambda params: jnp.exp(loss(params, test)),
    )


LATER_MAKERS: dict[str, Callable[[], Task]] = {
    "parity": parity,
    "modular addition": modular_addition,
    "Wasserstein critic": critic,
    "variational autoencoder": variational,
    "physics-informed": oscillator,
    "equilibrium": equilibrium,
    "Q-learning": q_learning,
    "contrastive": contrastive,
    "mixture density": mixture_density,
    "meta-learning": meta_learning,
    "graph network": graphs,
    "normalizing flow": flow,
}
