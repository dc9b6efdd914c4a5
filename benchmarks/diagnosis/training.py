"""Trains many runs side by side, and records what a user records.

Faults are data: arrays with one number a step, so that one compiled program trains
healthy runs and all kinds of faulty ones.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_clipx as clipx
from diagnosis.cells import HALVES
from diagnosis.tasks import Task, tasks_of

Columns = dict[str, np.ndarray]
COUNTS = ("steps", "num_clipped", "num_nonfinite", "num_skipped", "consecutive_skips")

OPTIMIZERS = {
    "sgd": lambda: optax.sgd(1.0, momentum=0.9),
    "adam": lambda: optax.adam(1.0),
    "muon": lambda: optax.contrib.muon(1.0),
}

OPTIMIZERS_OF = {  # the later test halves have other settings of them
    "second": {
        "sgd": lambda: optax.sgd(1.0, momentum=0.8, nesterov=True),
        "adam": lambda: optax.adam(1.0, b1=0.85, b2=0.99),
        "muon": lambda: optax.contrib.muon(1.0, beta=0.9),
    },
    "third": {
        "sgd": lambda: optax.sgd(1.0, momentum=0.95),
        "adam": lambda: optax.adam(1.0, b1=0.9, b2=0.95),
        "muon": lambda: optax.contrib.muon(1.0, beta=0.97),
    },
}


def _skipping(limit: Any, optimizer: Any) -> Any:
    """Skips what is above a fixed norm: nothing tells it of a lasting change."""
    inner = optax.chain(clipx.clip_by_global_norm(limit), optimizer)
    return clipx.skip_spikes(inner, threshold=4 * limit)


CLIPPERS = {
    "fixed": lambda limit, tx: optax.chain(clipx.clip_by_global_norm(limit), tx),
    "auto": lambda limit, tx: optax.chain(clipx.auto_clip(), tx),
    "quantile": lambda limit, tx: optax.chain(clipx.quantile_clip(), tx),
    "zclip": lambda limit, tx: optax.chain(
        clipx.zclip(decay=0.99, warmup_steps=50), tx
    ),
    "skip": _skipping,
}
TARGETS = {"quantile": 0.9}  # what each rule is to clip


@dataclasses.dataclass
class Settings:
    """All that one run is trained with; arrays have one number a step.

    Attributes:
        seed: of parameters and data.
        later: of the data from step `switch` on.
        switch: where the data changes to those of the other seed.
        rate: the learning rate.
        decay: of the weights, decoupled, times the learning rate.
        limit: of a fixed threshold.
        loss_scale: by which gradients are too large, as by a loss that is scaled.
        input_scale: by which inputs are too large.
        part: the fraction of each batch that is used.
        gains: by which the gradient of each leaf is too large, from `gains_from` on.
        gains_from: a step.
        init_gain: by which the kernels of the stack begin too large.
        invariant: 1 if kernels are used divided by their norms.
    """

    seed: int
    later: int
    switch: int
    rate: np.ndarray
    decay: float
    limit: float
    loss_scale: np.ndarray
    input_scale: np.ndarray
    part: np.ndarray
    gains: np.ndarray
    gains_from: int
    init_gain: float
    invariant: float


def task_named(name: str) -> Task:
    """The task of a name, whichever half it is of."""
    (task,) = [t for half in HALVES for t in tasks_of(half) if t.name == name]
    return task


def leaves_of(task: Task) -> list[str]:
    """The names of the leaves, as the columns have them."""
    params = jax.eval_shape(task.init, jax.random.key(0))
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    return [
        "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path)
        for path, _ in paths
    ]


def _grown(params: Any, gain: Any) -> Any:
    """Kernels of the stack times a gain."""
    stack = "layers" if "layers" in params else "blocks"
    if stack not in params:
        return params
    wider = jax.tree.map(lambda x: x * gain if x.ndim > 1 else x, params[stack])
    return params | {stack: wider}


def _invariant(params: Any, first: Any, flag: Any) -> Any:
    """Kernels divided by their norms, times those they began with."""

    def one(w: Any, w0: Any) -> Any:
        if w.ndim < 2:
            return w
        squares = jnp.sum(w * w) + 1e-30
        return jnp.where(flag > 0, w * jnp.sqrt(jnp.sum(w0 * w0) / squares), w)

    return jax.tree.map(one, params, first)


@functools.cache
def program(name: str, optimizer: str, clipper: str) -> Any:
    """The compiled training of one cell: from settings of many runs to columns."""
    task = task_named(name)
    make = OPTIMIZERS_OF.get(task.half, OPTIMIZERS)[optimizer]

    def train(s: dict[str, Any]) -> dict[str, Any]:
        tx = clipx.track_norms(CLIPPERS[clipper](s["limit"], make()))
        seed, later = jax.random.key(s["seed"]), jax.random.key(s["later"])
        first = _grown(task.init(seed), s["init_gain"])

        def loss_fn(params: Any, batch: Any, now: Any) -> Any:
            used = _invariant(params, first, s["invariant"])
            losses = task.losses(used, *batch, now["input_scale"])
            kept = jnp.arange(len(losses)) < jnp.round(now["part"] * len(losses))
            loss = jnp.sum(jnp.where(kept, losses, 0)) / jnp.sum(kept)
            return loss * now["loss_scale"], loss

        def step(carry: Any, now: Any) -> Any:
            params, state = carry
            t = now["t"]
            key = jax.random.fold_in(jnp.where(t < s["switch"], seed, later), t)
            grads, loss = jax.grad(loss_fn, has_aux=True)(params, task.batch(key), now)
            flat, tree = jax.tree.flatten(grads)
            gains = jnp.where(t < s["gains_from"], 1.0, s["gains"])
            grads = tree.unflatten([g * x for g, x in zip(flat, gains, strict=True)])
            updates, state = tx.update(grads, state, params)
            updates = jax.tree.map(
                lambda u, p: now["rate"] * (u - s["decay"] * p), updates, params
            )
            record = {
                "loss": loss,
                "learning_rate": now["rate"],
                "update_norm": optax.tree.norm(updates),
                **clipx.metrics(state),
            }
            return (optax.apply_updates(params, updates), state), record

        per_step = {k: s[k] for k in ("rate", "loss_scale", "input_scale", "part")}
        per_step["t"] = jnp.arange(task.steps)
        _, records = jax.lax.scan(step, (first, tx.init(first)), per_step)
        return {k: x for k, x in records.items() if k.rpartition("/")[2] not in COUNTS}

    return jax.jit(jax.vmap(train))


def train(
    name: str, optimizer: str, clipper: str, settings: list[Settings], width: int = 16
) -> list[Columns]:
    """The columns of each run; so many at a time, so that one program serves all."""
    found: list[Columns] = []
    for start in range(0, len(settings), width):
        some = settings[start : start + width]
        padded = some + some[-1:] * (width - len(some))
        stacked = {
            field.name: jnp.asarray(
                np.stack([getattr(s, field.name) for s in padded]),
                jnp.int32 if field.type in (int, "int") else jnp.float32,
            )
            for field in dataclasses.fields(Settings)
        }
        columns = jax.device_get(program(name, optimizer, clipper)(stacked))
        for i in range(len(some)):
            run = {n: np.asarray(x[i], np.float64) for n, x in columns.items()}
            run["step"] = np.arange(len(run["loss"]))
            if clipper in TARGETS:
                run["clip/target"] = np.full(len(run["loss"]), TARGETS[clipper])
            found.append(run)
    return found
