"""Every rule, learning rate and seed of a task in one program."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clipbench.methods import OPTIMIZERS, RELATIVE_LIMITS
from clipbench.report import over_seeds
from clipbench.tasks import Task
from clipbench.training import FACTORS, clean, typical_norm

from optax_clipx.thresholds import Context, Threshold

SEEDS = 6
TUNING_SEEDS = 2
CHECKS = 20  # parts of a run; the final loss is the mean after the last three
Record = dict[str, Any]
SCALES = {  # the optimizers of clipbench without their learning rate
    "sgd": optax.identity(),
    "momentum": optax.trace(0.9),
    "adam": optax.scale_by_adam(),
    "lion": optax.scale_by_lion(),
}


def hard(norm: Any, limit: Any) -> Any:
    """The usual response: the norm comes down to the threshold."""
    return jnp.minimum(1, limit / norm)


class Design(NamedTuple):
    """A rule and what is done above its threshold."""

    rule: Threshold
    response: Callable[[Any, Any], Any] = hard
    guarded: bool = True  # whether steps that are not finite are dropped


def constant(limit: Any) -> Threshold:
    """The same threshold at every step."""
    return Threshold(lambda norms: (), lambda norms, state, context: (limit, state))


def tuned(what: Task) -> dict[str, Record]:
    """For each optimizer the rate with the lowest loss at the best fixed threshold."""
    typical = typical_norm(what)
    rates = np.array([rates_of(o, typical) for o in SCALES])
    found = trained(what, fixed(typical), rates, TUNING_SEEDS)
    best = over_seeds(found).min(axis=1)  # optimizers, rules, rates, seeds
    return {
        o: {"rate": float(r[b.argmin()]), "typical": typical, "best": float(b.min())}
        for o, r, b in zip(SCALES, rates, best, strict=True)
    }


def rates_of(optimizer: str, typical: float) -> np.ndarray:
    """The learning rates that are tried."""
    made = OPTIMIZERS[optimizer]
    return np.array(made.rates) / (typical if made.per_norm else 1)


def fixed(typical: float) -> dict[str, Design]:
    """The fixed thresholds of clipbench, in units of the first norms."""
    return {f"fixed {c:g}": Design(constant(c * typical)) for c in RELATIVE_LIMITS}


def compared(
    what: Task, rates: dict[str, Record], designs: dict[str, Design], first: int = 0
) -> list[Record]:
    """The final losses of each design: rates by seeds, for each optimizer.

    The seeds are six numbers from `first` on.
    """
    start = time.perf_counter()
    tried = np.array([[rates[o]["rate"] * f for f in FACTORS] for o in SCALES])
    found = trained(what, designs, tried, SEEDS, first)
    seconds = (time.perf_counter() - start) / (len(SCALES) * len(designs))
    return [
        {
            "task": what.name,
            "optimizer": optimizer,
            "design": name,
            "final": [[clean(x) for x in at] for at in found[i, j]],
            "seconds": round(seconds, 2),
        }
        for i, optimizer in enumerate(SCALES)
        for j, name in enumerate(designs)
    ]


def trained(
    what: Task,
    designs: dict[str, Design],
    rates: np.ndarray,
    seeds: int,
    first: int = 0,
) -> np.ndarray:
    """The final losses: optimizers, designs, rates, seeds."""
    rates = jnp.asarray(rates, jnp.float32)
    run = functools.partial(one_seed, what, list(designs.values()), rates)
    numbers = jnp.arange(first, first + seeds)
    found = jax.jit(lambda every: jax.lax.map(run, every))(numbers)
    return np.moveaxis(np.asarray(found), 0, -1)


def one_seed(what: Task, designs: list[Design], rates: Any, seed: Any) -> Any:
    """All optimizers, designs and rates side by side, on the same batches."""
    shape = (len(SCALES), len(designs), rates.shape[1])
    key = jax.random.key(seed)
    first = what.init(jax.random.fold_in(key, 0))
    params = jax.tree.map(lambda x: jnp.broadcast_to(x, (*shape, *x.shape)), first)
    state = init_clipping(designs, shape), init_optimizers(params)

    def step(carry: Any, number: Any) -> tuple[Any, None]:
        params, (clipping, moments) = carry
        batch = what.batch(jax.random.fold_in(key, number + 1), number)
        loss, grads = over_all(lambda p: jax.value_and_grad(what.loss)(p, batch))(
            params
        )
        scale, clipping = clip(designs, norms_of(grads, shape), loss, clipping, number)
        # Zero and not NaN times zero, where a step is dropped.
        grads = jax.tree.map(
            lambda g: jnp.where(like(scale, g) == 0, 0, like(scale, g) * g), grads
        )
        left = (what.steps - number) / (what.steps / 3)
        rate = rates[:, None, :] * jnp.clip(left, 0.0, 1.0)
        updates, moments = optimize(grads, moments)
        params = jax.tree.map(lambda p, u: p - like(rate, u) * u, params, updates)
        return (params, (clipping, moments)), None

    def part(carry: Any, numbers: Any) -> tuple[Any, Any]:
        carry, _ = jax.lax.scan(step, carry, numbers)
        return carry, jax.lax.cond(
            numbers[-1] >= what.steps * (CHECKS - 3) // CHECKS,
            lambda: over_all(what.final)(carry[0]),
            lambda: jnp.zeros(shape),
        )

    numbers = jnp.arange(what.steps).reshape(CHECKS, -1)
    _, finals = jax.lax.scan(part, (params, state), numbers)
    final = jnp.mean(finals[-3:], axis=0)
    # Worse than before the first step: it diverged.
    return jnp.where(final <= what.final(first), final, jnp.nan)


def over_all(function: Any) -> Any:
    """Of every optimizer, design and rate."""
    return jax.vmap(jax.vmap(jax.vmap(function)))


def like(values: Any, leaf: Any) -> Any:
    """One value for each run, in the rank of a leaf of its parameters."""
    return values.reshape(values.shape + (1,) * (leaf.ndim - values.ndim))


def norms_of(grads: Any, shape: tuple[int, ...]) -> Any:
    """The norm of the gradients of each run."""
    return jnp.sqrt(
        sum(
            jnp.sum(g.reshape(*shape, -1) ** 2, axis=-1) for g in jax.tree.leaves(grads)
        )
    )


def init_clipping(designs: list[Design], shape: tuple[int, ...]) -> list[Any]:
    """What each design remembers of its runs: one number for each rate."""
    return [d.rule.init(jnp.zeros((shape[0], shape[2]))) for d in designs]


def clip(
    designs: list[Design], norms: Any, losses: Any, states: list[Any], step: Any
) -> tuple[Any, list[Any]]:
    """By what each gradient is multiplied."""
    scales, after = [], []
    for i, (design, state) in enumerate(zip(designs, states, strict=True)):
        norm, loss = norms[:, i], losses[:, i]
        fine = jnp.isfinite(norm)
        context = Context(step=step, extra={"value": loss})
        limit, new = design.rule.update(jnp.where(fine, norm, 1), state, context)
        scale = jnp.where(norm > 0, design.response(norm, limit), 1)
        scales.append(jnp.where(fine, scale, 0) if design.guarded else scale)
        after.append(
            jax.tree.map(lambda n, o: jnp.where(like(fine, o), n, o), new, state)  # noqa: B023
        )
    return jnp.stack(scales, axis=1), after


def init_optimizers(params: Any) -> list[Any]:
    """The state of each optimizer."""
    return [
        scale.init(jax.tree.map(lambda p: p[i], params))  # noqa: B023
        for i, scale in enumerate(SCALES.values())
    ]


def optimize(grads: Any, states: list[Any]) -> tuple[Any, list[Any]]:
    """What each optimizer makes of its gradients."""
    found = [
        scale.update(jax.tree.map(lambda g: g[i], grads), state)  # noqa: B023
        for i, (scale, state) in enumerate(zip(SCALES.values(), states, strict=True))
    ]
    updates = jax.tree.map(lambda *u: jnp.stack(u), *(u for u, _ in found))
    return updates, [state for _, state in found]
