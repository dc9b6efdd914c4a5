"""A training loop that records what clipping does, and looks at it afterwards.

A plain recurrent network reads digits row by row. Every step's loss, norms and
metrics go to a JSONL file and to TensorBoard; at the end there are a picture, an
interactive page, and a suggestion for the threshold.

    python examples/monitor.py
    python -m optax_clipx watch runs/monitor/run.jsonl      # in another terminal
    tensorboard --logdir runs/monitor/logs
"""

import argparse
from pathlib import Path
from typing import Any

import image_sequences
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tasks
from flax import nnx
from jaxtyping import Array
from progress import bar_of
from tensorboardX import SummaryWriter

import optax_clipx as clipx
from optax_clipx.__main__ import main as clipx_command


def make_step(optimizer: optax.GradientTransformation, task: tasks.Task) -> Any:
    """One step of training; it returns numbers for the history and asks for nothing."""

    @nnx.jit
    def step(model: nnx.Module, state: nnx.Optimizer, batch: Array, labels: Array):
        def loss_fn(model: nnx.Module) -> Array:
            return task.example_losses(model(batch), labels).mean()

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        state.update(model, grads)
        return {"loss": loss, **clipx.metrics(state.opt_state)}

    return step


def train(task: tasks.Task, limit: float, output: Path) -> clipx.History:
    """Trains, and records every step."""
    model = task.build(nnx.Rngs(0))
    optimizer = clipx.track_norms(
        optax.chain(
            clipx.clip_by_global_norm(limit), optax.sgd(task.learning_rate, 0.9)
        ),
        ratios=True,
    )
    state = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    step = make_step(optimizer, task)
    inputs, targets = task.train
    rng = np.random.default_rng(0)
    with (
        clipx.History(output / "run.jsonl") as history,
        SummaryWriter(str(output / "logs")) as writer,
    ):
        for number in bar_of(range(task.steps), unit="step"):
            chosen = rng.integers(len(inputs), size=task.batch_size)
            batch, labels = jnp.asarray(inputs[chosen]), jnp.asarray(targets[chosen])
            metrics = step(model, state, batch, labels)
            history.append(number, metrics)
            if number % 10 == 0:
                for name, value in jax.device_get(metrics).items():
                    if np.isfinite(value):
                        writer.add_scalar(name, value, number)
    return history


def main() -> None:
    """Trains, then draws and suggests."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--max-norm", type=float, default=0.3)
    parser.add_argument("--output", type=Path, default=Path("runs/monitor"))
    arguments = parser.parse_args()
    run = arguments.output / "run.jsonl"
    run.unlink(missing_ok=True)
    data = image_sequences.load("digits", None)
    task = tasks.images("rows", "rnn", data, batch_size=64, steps=arguments.steps)
    history = train(task, arguments.max_norm, arguments.output)

    history.plot(arguments.output / "run.png", force=True)
    page = str(arguments.output / "run.html")
    clipx_command(["plot", str(run), "--html", page, "--force"])
    print(f"Wrote {arguments.output / 'run.png'}")
    print(f"Loss: {np.median(history['loss'][-50:]):.3f}")
    for rate in (0.1, 0.5):
        print(clipx.suggest_threshold(history, rate))
    norm, clipped = history["clip/norm"], history["clip/num_clipped"][-1]
    print(
        f"\nThe gradient norm was between {norm.min():.2g} and {norm.max():.2g}, and"
        f" {clipped / len(norm):.0%} of the steps were clipped to"
        f" {arguments.max_norm:g}.\nThe lines above suggest a threshold for a clip rate"
        " of 10%, and one for a clip rate of 50%."
    )


if __name__ == "__main__":
    main()
