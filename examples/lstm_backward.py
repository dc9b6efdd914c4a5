"""Clipping in the backward pass of an LSTM, against clipping the whole gradient.

Graves (2013) clips the derivatives by the inputs of an LSTM's gates to an interval, at
each step on the way back through time. Here an LSTM reads the digits of scikit-learn
pixel by pixel, in 64 steps, at a large learning rate: without clipping, with the global
norm clipped after the backward pass, and with each step clipped within it.

    python examples/lstm_backward.py
    python examples/lstm_backward.py --order rows --steps 300 --seeds 1
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import image_sequences
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pictures
from jax import lax
from jaxtyping import Array, Float
from progress import bar_of

import optax_clipx as clipx

HIDDEN, CLASSES, BATCH = 32, 10, 64
COLOURS = {"none": 1, "global": 0, "backward": 2}  # places among a theme's
LABELS = {
    "none": "no clipping",
    "global": "global norm, after the backward pass",
    "backward": "values, at each step of the backward pass",
}


class Run(NamedTuple):
    """One method, for all seeds: an array of seeds by steps for each quantity."""

    loss: np.ndarray
    norm: np.ndarray
    accuracy: np.ndarray  # after training, for each seed


def init(key: Array, inputs: int) -> dict[str, Array]:
    """An LSTM with a forget bias of 1, and a linear layer."""
    keys = jax.random.split(key, 3)

    def normal(key: Array, rows: int, columns: int) -> Array:
        return jax.random.normal(key, (rows, columns)) * rows**-0.5

    bias = jnp.zeros(4 * HIDDEN).at[HIDDEN : 2 * HIDDEN].set(1)
    return {
        "inputs": normal(keys[0], inputs, 4 * HIDDEN),
        "hidden": normal(keys[1], HIDDEN, 4 * HIDDEN),
        "bias": bias,
        "head": normal(keys[2], HIDDEN, CLASSES),
    }


def logits(
    params: dict[str, Array],
    sequence: Float[Array, "step value"],
    on_the_way: Callable[[Array], Array],
) -> Float[Array, " classes"]:
    """The LSTM's answer; `on_the_way` sees the inputs of each step's gates."""

    def step(carry: Any, x: Array) -> tuple[Any, None]:
        hidden, cell = carry
        gates = x @ params["inputs"] + hidden @ params["hidden"] + params["bias"]
        i, f, g, o = jnp.split(on_the_way(gates), 4)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(cell), cell), None

    zeros = jnp.zeros(HIDDEN)
    (hidden, _), _ = lax.scan(step, (zeros, zeros), sequence)
    return hidden @ params["head"]


def train(method: str, limit: float, options: argparse.Namespace, bar: Any) -> Run:
    """Trains one network for each seed, all at once."""
    data = image_sequences.load("digits")
    x = jnp.asarray(image_sequences.as_sequences(data.train_images, options.order))
    y = jnp.asarray(data.train_labels)
    test = jnp.asarray(image_sequences.as_sequences(data.test_images, options.order))

    def on_the_way(gates: Array) -> Array:
        if method != "backward":
            return gates
        # The loss is a mean: the threshold is for the derivative of one example's.
        return clipx.backward.clip_value(gates, -limit / BATCH, limit / BATCH)

    def answers(params: Any, sequences: Array) -> Array:
        return jax.vmap(lambda s: logits(params, s, on_the_way))(sequences)

    def loss_fn(params: Any, sequences: Array, labels: Array) -> Array:
        each = optax.softmax_cross_entropy_with_integer_labels(
            answers(params, sequences), labels
        )
        return each.mean()

    tx = optax.chain(
        clipx.clip_by_global_norm(limit if method == "global" else jnp.inf),
        optax.sgd(options.learning_rate, momentum=0.9),
    )

    def step(carry: Any, i: Array) -> tuple[Any, tuple[Array, Array]]:
        params, state, key = carry
        chosen = jax.random.randint(jax.random.fold_in(key, i), (BATCH,), 0, len(x))
        loss, grads = jax.value_and_grad(loss_fn)(params, x[chosen], y[chosen])
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state, key), (loss, clipx.metrics(state)["clip/norm"])

    @jax.jit
    def start(keys: Array) -> Any:
        params = jax.vmap(lambda key: init(key, x.shape[-1]))(keys)
        return params, jax.vmap(tx.init)(params), keys

    @jax.jit
    def chunk(carry: Any, steps: Array) -> Any:
        return jax.vmap(lambda c: lax.scan(step, c, steps))(carry)

    carry = start(jax.random.split(jax.random.key(0), options.seeds))
    history = []
    for steps in np.array_split(np.arange(options.steps), 20):
        carry, found = chunk(carry, jnp.asarray(steps))
        history.append(jax.device_get(found))
        bar.update(len(steps))
    loss, norm = (np.concatenate(h, axis=1) for h in zip(*history, strict=True))
    found = jax.jit(jax.vmap(answers, (0, None)))(carry[0], test)
    accuracy = np.mean(np.argmax(found, -1) == data.test_labels, axis=1)
    finite = np.isfinite(loss[:, -1])
    return Run(loss, norm, np.where(finite, accuracy, np.nan))


def draw(runs: dict[str, Run], path: Path, title: str) -> None:
    """Loss and gradient norm over the steps, on a light and on a dark page."""
    for theme in ("light", "dark"):
        with pictures.style(theme) as colours:
            figure, axes = plt.subplots(
                2, 1, figsize=(8, 7), sharex=True, layout="constrained"
            )
            draw_lines(*axes, runs, colours)
            axes[0].set_title(title, pad=62)
            pictures.save(figure, path, theme)


def draw_lines(top: Any, bottom: Any, runs: dict[str, Run], colours: Any) -> None:
    """The loss above, median and range of the seeds; the largest norm below."""
    for name, run in runs.items():
        colour = colours.lines[COLOURS[name]]
        style = {"color": colour, "label": LABELS[name], "lw": 1.8}
        low, middle, high = np.nanquantile(smoothed(run.loss), (0, 0.5, 1), axis=0)
        steps = np.arange(run.loss.shape[1])[-len(middle) :]
        top.plot(steps, middle, **style)
        top.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
        bottom.plot(steps, windows(run.norm).max(axis=(0, 2)), **style)
    top.set_ylabel("loss (lower is better)")
    top.set_ylim(bottom=0)
    bottom.set_ylabel("gradient norm")
    bottom.set_yscale("log")
    bottom.set_xlabel(
        "step (loss: mean of 25 steps, median and range of the seeds;\n"
        "norm: largest of 25 steps and all seeds)"
    )
    top.legend(loc="lower left", bbox_to_anchor=(0, 0.99), borderaxespad=0.2)


def smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of each step and those before it."""
    return windows(values).mean(axis=2)


def windows(values: np.ndarray, width: int = 25) -> np.ndarray:
    """Each step and those before it, along the last axis."""
    width = min(width, values.shape[1])
    return np.lib.stride_tricks.sliding_window_view(values, width, axis=1)


def main() -> None:
    """Trains, prints the table, draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--order", choices=("rows", "pixels"), default="pixels")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=1.0)
    parser.add_argument("--max-value", type=float, default=0.1)
    parser.add_argument("--max-norm", type=float, default=0.3)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/lstm_backward.png"),
        help="the picture",
    )
    options = parser.parse_args()
    limits = {"none": np.inf, "global": options.max_norm, "backward": options.max_value}
    runs = {}
    for name, limit in limits.items():
        with bar_of(total=options.steps, desc=f"{name:8}", unit="step") as bar:
            runs[name] = train(name, limit, options, bar)
    print("| clipping | threshold | final loss | accuracy | seeds | largest norm |")
    print("|---|---|---|---|---|---|")
    for name, run in runs.items():
        last = np.median(run.loss[:, -50:].mean(1))
        scores = f"{np.median(run.accuracy):.3f} | " + " ".join(
            f"{a:.2f}" for a in run.accuracy
        )
        largest = np.max(run.norm)
        print(f"| {name} | {limits[name]} | {last:.3f} | {scores} | {largest:.3g} |")
    title = f"LSTM on digits, {options.order}, learning rate {options.learning_rate:g}"
    draw(runs, options.output, title)
    print(f"Wrote the picture to {options.output}")
    largest = {name: np.max(run.norm) for name, run in runs.items()}
    print(
        "\nWithout clipping the gradient norm reaches"
        f" {largest['none']:.3g} at this learning rate.\nClipping inside the backward"
        f" pass keeps it at {largest['backward']:.3g} or less, because it acts before"
        " the derivatives of many time steps multiply."
    )


if __name__ == "__main__":
    main()
