"""One row of the results: a setting, a method and its number; rates and seeds."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clipbench.training import FACTORS, clean

import optax_clipx as clipx
from lmbench.corpus import batches, corpus, corrupted, unigram_loss, windows
from lmbench.methods import (
    FIXED,
    RATES,
    SETTINGS,
    TRIED,
    Setting,
    optimizer_of,
)
from lmbench.models import MODELS, SIZES, Size, init, loss
from optax_clipx._wrappers.spike_score import after_norm, no_norms

SEEDS = 3
TUNING_SEED = 1000  # of no run that is compared
Record = dict[str, Any]


def tuned(model: str, optimizer: str, size_name: str) -> Record:
    """The learning rate with the lowest loss at the best of a few thresholds."""
    start, size = time.process_time(), SIZES[size_name]
    setting = Setting(model, optimizer, "clean")
    found = {
        (rate, limit): run(setting, FIXED, limit, rate, TUNING_SEED, size)["final"]
        for rate in RATES
        for limit in TRIED
    }
    losses = {key: np.nan_to_num(x, nan=np.inf) for key, x in found.items()}
    best = {rate: min(losses[rate, limit] for limit in TRIED) for rate in RATES}
    return {
        "kind": "rate",
        "model": model,
        "optimizer": optimizer,
        "size": size_name,
        "rate": min(RATES, key=lambda rate: best[rate]),
        "tried": {f"{rate:g}": short(x) for rate, x in best.items()},
        "seconds": round(time.process_time() - start, 1),
    }


def compared(
    name: str, method: str, number: float, tuned_rate: float, size_name: str
) -> Record:
    """A method at the tuned learning rate, a third of it and three times it."""
    start, size, setting = time.process_time(), SIZES[size_name], SETTINGS[name]
    runs = [
        [run(setting, method, number, rate, seed, size) for seed in range(SEEDS)]
        for rate in tuned_rate * np.array(FACTORS)
    ]
    return {
        "kind": "method",
        "setting": name,
        "method": method,
        "number": clean(number),
        "size": size_name,
        "rate": tuned_rate,
        "unigram": short(unigram_loss(size.length + 1)),
        **{
            key: [[short(r[key]) for r in at] for at in runs]
            for key in ("final", "spikes", "clipped", "norm")
        },
        "text": corpus().source,
        "seconds": round(time.process_time() - start, 1),
    }


def short(value: Any) -> float | None:
    """Five digits, or None where it is not finite."""
    found = clean(value)
    return found if found is None else float(f"{found:.5g}")


def run(
    setting: Setting, method: str, number: float, rate: float, seed: int, size: Size
) -> Record:
    """One run: its loss on held-out text, and what happened on the way."""
    tx = optimizer_of(setting.optimizer, method, number, rate, size.steps)
    key = jax.random.key(seed)
    params = init(key, MODELS[setting.model], size, corpus().words)
    state = tx.init(params)
    given = batches(seed, size.steps, size.batch, size.length + 1)
    if setting.data == "corrupt":
        given = corrupted(given, seed, size.corrupt)
    gradients = gradients_of(setting.model, size.heads)
    update = update_of(setting.optimizer, method, size.steps)
    norms = []
    for texts in given:
        norm, grads = gradients(params, texts)
        params, state = update(
            np.float32(number), np.float32(rate), grads, state, params
        )
        norms.append(norm)
    norms = jnp.stack(norms)
    read = clipx.metrics(state)
    count = read.get("skip/num_skipped", read.get("clip/num_clipped"))
    return {
        "final": float(
            loss_of(setting.model, size.heads)(params, windows(size.length + 1))
        ),
        "spikes": float(spike_score(norms)),
        "clipped": float(count) / size.steps,
        "norm": float(jnp.nanmedian(norms)),
    }


@functools.cache
def gradients_of(model: str, heads: int) -> Any:
    """The norm of the gradients and the gradients; compiled once for all methods."""

    @jax.jit
    def gradients(params: Any, texts: Any) -> Any:
        grads = jax.grad(loss)(params, texts, MODELS[model], heads)
        squares = [jnp.sum(g * g) for g in jax.tree.leaves(grads)]
        return jnp.sqrt(sum(squares)), grads

    return gradients


@functools.cache
def loss_of(model: str, heads: int) -> Any:
    """The loss alone."""
    return jax.jit(lambda params, texts: loss(params, texts, MODELS[model], heads))


@functools.cache
def update_of(optimizer: str, method: str, steps: int) -> Any:
    """One step of the optimizer; compiled once for all its numbers, rates and seeds."""

    @functools.partial(jax.jit, donate_argnums=(3, 4))
    def update(number: Any, rate: Any, grads: Any, state: Any, params: Any) -> Any:
        tx = optimizer_of(optimizer, method, number, rate, steps)
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    return update


@jax.jit
def spike_score(norms: jax.Array) -> jax.Array:
    """The share of norms far above those before them, as `track_norms` has it."""

    def step(window: Any, norm: Any) -> Any:
        score, window = after_norm(norm, window)
        return window, score

    return jax.lax.scan(step, no_norms(), norms)[1][-1]
