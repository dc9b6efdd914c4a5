"""One cell of the table: a task, an optimizer, a method, many seeds side by side."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_clipx as clipx
from clipbench.methods import (
    FIXED,
    METHODS,
    OPTIMIZERS,
    RELATIVE_LIMITS,
    Method,
    Optimizer,
)
from clipbench.report import over_seeds
from clipbench.tasks import Task, task

SEEDS = 6
FACTORS = (1 / 3, 1.0, 3.0)  # of the tuned learning rate
CHECKS = 20  # how often the final loss is looked at; the last three count
Record = dict[str, Any]


def tuned(name: str, optimizer: str) -> Record:
    """The learning rate with the lowest loss at the best of the fixed thresholds.

    It is what somebody finds who tunes both; a lower rate may need no clipping.
    """
    start = time.perf_counter()
    what, with_optimizer = task(name), OPTIMIZERS[optimizer]
    typical = typical_norm(what)
    limits, rates = typical * np.array(RELATIVE_LIMITS), np.array(with_optimizer.rates)
    rates = rates / typical if with_optimizer.per_norm else rates
    found = trained(what, with_optimizer, METHODS[FIXED], rates, limits, seeds=2)
    best = over_seeds(found["final"]).min(axis=1)
    return {
        "kind": "rate",
        "task": name,
        "half": what.half,
        "optimizer": optimizer,
        "rate": float(rates[best.argmin()]),
        "typical_norm": typical,
        "tried": {f"{r:.3g}": clean(x) for r, x in zip(rates, best, strict=True)},
        "seconds": time.perf_counter() - start,
    }


def compared(name: str, optimizer: str, label: str, rate: float) -> Record:
    """One method with its numbers, at the tuned learning rate and beside it.

    A threshold below all norms makes steps shorter, and a higher rate makes up for it:
    so every method, and every fixed threshold, may have the best of three rates.
    """
    start = time.perf_counter()
    what, method = task(name), METHODS[label]
    numbers = np.array(method.numbers)
    if what.heavy and label != FIXED:
        numbers = numbers[:1]
    if label == FIXED:
        numbers = numbers * typical_norm(what)
    rates = rate * np.array(FACTORS)
    found = trained(what, OPTIMIZERS[optimizer], method, rates, numbers, SEEDS)
    return {
        "kind": "method",
        "task": name,
        "half": what.half,
        "optimizer": optimizer,
        "method": label,
        "asks_for": method.asks_for,
        "numbers": [clean(x) for x in numbers],
        "factors": list(FACTORS),
        "final": [[[clean(x) for x in row] for row in at] for at in found["final"]],
        "initial": float(np.median(found["initial"])),
        "spikes": [[float(x) for x in spikes(at)] for at in found["losses"]],
        "clipped": [[float(x) for x in at.mean(-1)] for at in found["clipped"]],
        "seconds": time.perf_counter() - start,
    }


def clean(value: Any) -> float | None:
    """A number that JSON knows; None for a run that came to nothing."""
    return float(value) if np.isfinite(value) else None


def typical_norm(what: Task) -> float:
    """The median norm of 16 gradients at the first parameters of each seed."""

    @jax.jit
    @jax.vmap
    def norm(seed: Any) -> Any:
        key = jax.random.key(seed)
        params = what.init(jax.random.fold_in(key, 0))
        return jax.lax.map(
            lambda i: optax.tree.norm(
                jax.grad(what.loss)(params, what.batch(jax.random.fold_in(key, i), 0))
            ),
            jnp.arange(1, 17),
        )

    return float(np.median(norm(jnp.arange(SEEDS))))


def trained(
    what: Task,
    optimizer: Optimizer,
    method: Method,
    rates: np.ndarray,
    numbers: np.ndarray,
    seeds: int,
) -> dict[str, np.ndarray]:
    """Every rate with every number and every seed: arrays of these three axes.

    Over the last third the learning rate goes down to zero, so that what is compared
    at the end is not the noise of the last steps.
    """
    train = functools.partial(one_run, what, optimizer, method)
    grid = np.meshgrid(
        np.asarray(rates, np.float32),
        np.asarray(numbers, np.float32),
        np.arange(seeds),
        indexing="ij",
    )
    # One run after the other: side by side, a cond would compute both of its branches.
    run = jax.jit(lambda cases: jax.lax.map(lambda case: train(*case), cases))
    found = run([jnp.asarray(x.ravel()) for x in grid])
    return {
        name: np.asarray(x).reshape(*grid[0].shape, *x.shape[1:])
        for name, x in found.items()
    }


def one_run(
    what: Task, optimizer: Optimizer, method: Method, rate: Any, number: Any, seed: Any
) -> dict[str, Any]:
    """The losses of one run, and the mean of the last looks at the final loss."""
    key = jax.random.key(seed)
    params = what.init(jax.random.fold_in(key, 0))

    def schedule(count: Any) -> Any:
        left = (what.steps - count) / (what.steps / 3)
        return rate * jnp.clip(left, 0.0, 1.0)

    tx = optax.chain(method.make(number), optimizer.make(schedule))

    def step(carry: Any, number: Any) -> tuple[Any, Any]:
        params, state = carry
        batch = what.batch(jax.random.fold_in(key, number + 1), number)
        loss, grads = jax.value_and_grad(what.loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    def stretch(carry: Any, numbers: Any) -> tuple[Any, Any]:
        carry, losses = jax.lax.scan(step, carry, numbers)
        return carry, (losses, what.final(carry[0]))

    steps = jnp.arange(what.steps).reshape(CHECKS, -1)
    (_, state), (losses, finals) = jax.lax.scan(
        stretch, (params, tx.init(params)), steps
    )
    initial = what.final(params)
    final = jnp.mean(finals[-3:])
    # Worse than before the first step: it diverged.
    final = jnp.where(final <= initial, final, jnp.nan)
    return {
        "final": final,
        "initial": initial,
        "losses": losses.ravel(),
        "clipped": clipx.metrics(state)["clip/num_clipped"] / what.steps,
    }


def spikes(losses: np.ndarray, window: int = 50) -> np.ndarray:
    """The share of steps whose loss is far above those before; the mean over seeds.

    Far is more than seven times the width between the 25th and the 75th percentile of
    the last losses above their median.
    """
    views = np.lib.stride_tricks.sliding_window_view(losses, window, axis=-1)
    low, middle, high = np.nanpercentile(views[..., :-1, :], [25, 50, 75], axis=-1)
    now = losses[..., window:]
    far = ~(now <= middle + 7 * (high - low))
    return far.mean(axis=-1).mean(axis=-1)
