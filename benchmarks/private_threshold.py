"""When does the slack indicator help to choose a threshold for DP-SGD, and when not?

Three seeds each. A small network learns scikit-learn's digits by DP-SGD, with a
threshold that is far off, or that follows the median of the norms. The median is found
in two private ways: by the noisy fraction of examples that were clipped, which costs a
part of the budget, and by the slack indicator, which costs none. All take some minutes
on one core, and an interrupted run goes on where it stopped.

    python benchmarks/private_threshold.py --output docs/results --images docs/images
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rules
from rules import EVERY, SEEDS, STEPS, Situation, Trial, batch_of, digits, init, logits

import optax_clipx as clipx

NOISE = 1.0  # the noise multiplier: that of the gradient alone costs the whole budget
SIZE = (
    4  # of the slack: its first entry counts the norms up to 0.87 times the threshold
)
SPEED = 0.2  # of the threshold, as in Andrew et al. 2021
Follow = Callable[[Any, Any, Any, int], Any]


class Private(NamedTuple):
    """A way to make gradients private.

    `follow(key, norms, threshold, batch)` is a noisy fraction of the norms that are
    below the threshold, or NaN: then the threshold does not change.
    """

    start: float
    noise: float = NOISE
    follow: Follow = lambda key, norms, threshold, batch: jnp.nan
    response: Any = None


def fraction(key: Any, norms: Any, threshold: Any, batch: int) -> Any:
    """The fraction of examples that are not clipped, with noise of 1/20."""
    below = jnp.mean((norms <= threshold).astype(jnp.float32))
    return below + jax.random.normal(key) / 20


def by_fraction(situation: Situation) -> Private:
    """The gradient gets more noise, so that both together cost the same budget."""
    of_count = situation.batch / 20
    noise = (NOISE**-2 - (2 * of_count) ** -2) ** -0.5
    return Private(situation.threshold, noise, fraction)


def slack(key: Any, norms: Any, threshold: Any, batch: int) -> Any:
    """The fraction of examples that leave a quarter of the bound, from the slack."""
    found = clipx.per_example.slack_indicator(norms, threshold, SIZE)
    noisy = found + NOISE * threshold * jax.random.normal(key, (SIZE,))
    return noisy[0] * jnp.sqrt(SIZE) / (threshold * batch)


def loss_of(params: Any, x: Any, y: Any) -> Any:
    """The loss of one example, or of each of several."""
    found = logits(params, x, normalized=False)
    return optax.softmax_cross_entropy_with_integer_labels(found, y)


def train(
    situation: Situation, make: Callable[[Situation], Private]
) -> list[dict[str, Any]]:
    """What happened in the run of each seed; all seeds train side by side."""
    private = make(situation)
    _, _, x_test, y_test = map(jnp.asarray, digits())
    options = {} if private.response is None else {"response": private.response}
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))

    def step(order: Any, carry: Any, number: Any) -> Any:
        params, state, threshold = carry
        key = jax.random.fold_in(order, number)
        own, counted = jax.random.split(jax.random.fold_in(key, 1))
        _, x, y = batch_of(situation, key)
        grad_fn = clipx.per_example.clipped_grad(
            loss_of, threshold, batch_argnums=(1, 2), **options
        )
        total, found = grad_fn(params, x, y)
        noise = optax.tree.random_like(own, total, jax.random.normal)
        size = private.noise * threshold
        grads = jax.tree.map(
            lambda g, n: (g + size * n) / situation.batch, total, noise
        )
        updates, state = tx.update(grads, state, params)
        below = private.follow(counted, found.norms, threshold, situation.batch)
        factor = jnp.nan_to_num(jnp.exp(-SPEED * (below - 0.5)), nan=1.0)
        shown = threshold if private.response is None else jnp.nan
        seen = {
            "norm": jnp.median(found.norms),
            "clipped": jnp.mean((found.norms > threshold).astype(jnp.float32)),
            "threshold": jnp.asarray(shown, jnp.float32),
        }
        return (optax.apply_updates(params, updates), state, threshold * factor), seen

    def block(order: Any, carry: Any, numbers: Any) -> Any:
        carry, seen = jax.lax.scan(functools.partial(step, order), carry, numbers)
        return carry, seen | {"loss": loss_of(carry[0], x_test, y_test).mean()}

    def run(seed: Any) -> Any:
        start, order = jax.random.split(jax.random.key(seed))
        params = init(start)
        carry = (params, tx.init(params), jnp.float32(private.start))
        numbers = jnp.arange(STEPS).reshape(-1, EVERY)
        (params, *_), seen = jax.lax.scan(
            functools.partial(block, order), carry, numbers
        )
        right = logits(params, x_test, normalized=False).argmax(-1) == y_test
        return right.mean(), seen

    accuracy, seen = jax.jit(jax.vmap(run))(jnp.arange(SEEDS))
    return [
        rules.summary(float(accuracy[i]), {k: np.ravel(v[i]) for k, v in seen.items()})
        for i in range(SEEDS)
    ]


TRIALS = {
    "slack": Trial(
        "A private threshold",
        (
            Situation("batches of 256, start at 50", batch=256, threshold=50.0),
            Situation("batches of 256, start at 0.01", batch=256, threshold=0.01),
            Situation("batches of 32, start at 50", batch=32, threshold=50.0),
        ),
        {
            "fixed at the start": lambda s: Private(s.threshold),
            "fixed, 1.0": lambda s: Private(1.0),
            "fraction clipped": by_fraction,
            "slack": lambda s: Private(s.threshold, follow=slack),
            "AUTO-S": lambda s: Private(
                1.0,
                response=functools.partial(clipx.responses.normalize, eps=0.01),
            ),
        },
        shows="norm",
        norm_of="slack",
        train=train,
    )
}


if __name__ == "__main__":
    rules.main(TRIALS, __doc__)
