"""Draws the pictures of the gallery, in light and dark, from training runs.

A plain recurrent network reads digits row by row, as in
``examples/exploding_gradients.py``, at a learning rate at which it explodes.

    python docs/make_gallery.py
"""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import optax_clipx as clipx
from optax_clipx import plotting

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import image_sequences  # noqa: E402
import tasks  # noqa: E402


def trainer(steps: int) -> Callable[..., dict[str, np.ndarray]]:
    """A function from threshold, rate and seeds to what every step recorded."""
    data = image_sequences.load("digits", None)
    task = tasks.images("rows", "rnn", data, batch_size=64, steps=steps)
    graph, _, rest = nnx.split(task.build(nnx.Rngs(0)), nnx.Param, ...)
    inputs, targets = (jnp.asarray(array) for array in task.train)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, None, 0))
    def train(limit: Any, learning_rate: Any, seed: Any) -> Any:
        tx = clipx.track_norms(
            optax.chain(
                clipx.clip_by_global_norm(limit),
                optax.sgd(learning_rate, task.momentum),
            ),
            ratios=True,
        )
        key = jax.random.key(seed)
        params = nnx.state(task.build(nnx.Rngs(key)), nnx.Param)

        def loss_fn(params: Any, batch: Any, labels: Any) -> Any:
            outputs = nnx.merge(graph, params, rest)(batch)
            return task.example_losses(outputs, labels).mean()

        def step(carry: Any, index: Any) -> Any:
            params, state = carry
            draw = jax.random.fold_in(key, index)
            chosen = jax.random.randint(draw, (task.batch_size,), 0, len(inputs))
            loss, grads = jax.value_and_grad(loss_fn)(
                params, inputs[chosen], targets[chosen]
            )
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), {"loss": loss, **clipx.metrics(state)}

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))[1]

    def recorded(limit: float, learning_rate: float, seeds: Any) -> Any:
        return jax.device_get(train(limit, learning_rate, jnp.asarray(seeds)))

    return recorded


def histories(recorded: Any) -> list[clipx.History]:
    """A history for each seed."""
    found = []
    for seed in range(len(recorded["loss"])):
        history = clipx.History()
        one = {name: values[seed] for name, values in recorded.items()}
        history.append(range(len(one["loss"])), one)
        found.append(history)
    return found


def main() -> None:
    """Trains, then draws."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images")
    arguments = parser.parse_args()
    train, seeds = trainer(arguments.steps), range(arguments.seeds)

    runs = {
        "clip_by_global_norm(0.3)": histories(train(0.3, 0.1, seeds)),
        "without clipping": histories(train(jnp.inf, 0.1, seeds)),
    }
    run = runs["clip_by_global_norm(0.3)"][0]

    def final_loss(limit: float, learning_rate: float = 0.1) -> np.ndarray:
        # All seeds in one call; find_threshold would train them one by one.
        return train(limit, learning_rate, seeds)["loss"][:, -50:].mean(1)

    def sweep(rates: list[float] | None) -> Any:
        known: dict[Any, np.ndarray] = {}

        def one(limit: float, seed: int, learning_rate: float = 0.1) -> float:
            setting = limit, learning_rate
            if setting not in known:
                known[setting] = final_loss(*setting)
            return float(known[setting][seed])

        return clipx.find_threshold(
            one, 0.03, 30, num=7, seeds=list(seeds), learning_rates=rates
        )

    by_limit, by_both = sweep(None), sweep([0.01, 0.03, 0.1, 0.3])
    draw = {
        "norms": lambda theme: plotting.norms(run, theme=theme),
        "clip_rate": lambda theme: plotting.clip_rate(run, theme=theme),
        "histogram": lambda theme: plotting.histogram(run, theme=theme),
        "heatmap": lambda theme: plotting.heatmap(run, theme=theme),
        "ratios": lambda theme: plotting.heatmap(
            run, prefix="track_ratios/", theme=theme
        ),
        "compare": lambda theme: plotting.compare(runs, theme=theme),
        "sweep": lambda theme: plotting.sweep(by_limit, theme=theme),
        "sweep_map": lambda theme: plotting.sweep_map(by_both, theme=theme),
        "overview": lambda theme: run.plot(theme=theme),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, picture in draw.items():
        for theme in ("light", "dark"):
            path = arguments.output / f"gallery_{name}_{theme}.png"
            picture(theme).savefig(path)
    print(f"Wrote {2 * len(draw)} pictures to {arguments.output}.")


if __name__ == "__main__":
    main()
