"""A recurrent language model on real text, with TensorBoard and an interactive page.

The text is the reference of the Python language, which every Python has with it:
about 700,000 characters. A GRU predicts the next character, without clipping and with
an adaptive threshold.

    python examples/nnx_lm_dashboard.py
    tensorboard --logdir runs/nnx_lm/logs
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int
from progress import bar_of
from tensorboardX import SummaryWriter

import optax_clipx as clipx
from optax_clipx import plotting
from optax_clipx.__main__ import main as clipx_command

METHODS = {
    "quantile_clip": lambda: clipx.quantile_clip(0.9, estimator="tracker"),
    # An infinite threshold clips nothing: it only measures.
    "without": lambda: clipx.clip_by_global_norm(jnp.inf),
}


class LanguageModel(nnx.Module):
    """Characters in, logits of the next characters out."""

    def __init__(self, characters: int, hidden: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(characters, hidden, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(hidden, hidden, rngs=rngs))
        self.head = nnx.Linear(hidden, characters, rngs=rngs)

    def __call__(self, text: Int[Array, "batch time"]) -> Float[Array, "batch time c"]:
        """Logits at each place."""
        embedded = self.embed(text)
        shape = embedded[:, 0].shape
        start = self.rnn.cell.initialize_carry(shape, nnx.Rngs(0))
        return self.head(self.rnn(embedded, initial_carry=start))


def load() -> tuple[np.ndarray, int]:
    """The text as numbers, and how many different characters there are."""
    text = "\n".join(topics[name] for name in sorted(topics))
    characters, numbers = np.unique(list(text), return_inverse=True)
    return numbers.astype(np.int32), len(characters)


def train(method: str, arguments: argparse.Namespace) -> clipx.History:
    """Trains with one method and records every step."""
    text, characters = load()
    model = LanguageModel(characters, arguments.hidden, rngs=nnx.Rngs(0))
    tx = clipx.track_norms(
        optax.chain(METHODS[method](), optax.sgd(arguments.learning_rate, 0.9))
    )
    state = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Module, state: nnx.Optimizer, batch: Array) -> Any:
        def loss_fn(model: nnx.Module) -> Array:
            logits = model(batch[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, batch[:, 1:]
            )
            return losses.mean()

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        state.update(model, grads)
        return {"loss": loss, **clipx.metrics(state.opt_state)}

    rng = np.random.default_rng(0)
    run = arguments.output / f"{method}.jsonl"
    run.unlink(missing_ok=True)
    logs = str(arguments.output / "logs" / method)
    with clipx.History(run) as history, SummaryWriter(logs) as writer:
        for number in bar_of(range(arguments.steps), desc=f"{method:14}", unit="step"):
            starts = rng.integers(len(text) - arguments.length - 1, size=32)
            batch = text[starts[:, None] + np.arange(arguments.length + 1)]
            metrics = step(model, state, jnp.asarray(batch))
            history.append(number, metrics)
            if number % 5 == 0:
                for name, value in jax.device_get(metrics).items():
                    if np.isfinite(value):
                        writer.add_scalar(name, value, number)
    return history


def main() -> None:
    """Trains with both methods, then draws."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--length", type=int, default=64, help="of a piece of text")
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--learning-rate", type=float, default=2.0)
    parser.add_argument("--output", type=Path, default=Path("runs/nnx_lm"))
    arguments = parser.parse_args()
    runs = {method: train(method, arguments) for method in METHODS}

    figure = plotting.compare(runs)
    figure.savefig(arguments.output / "compare.png")
    files = [str(arguments.output / f"{method}.jsonl") for method in runs]
    page = str(arguments.output / "runs.html")
    clipx_command(["plot", *files, "--html", page, "--force"])
    losses = {m: np.median(x["loss"][-20:]) for m, x in runs.items()}
    for method, loss in losses.items():
        print(f"{method}: loss {loss:.3f} nats for each character")
    largest = {m: np.nanmax(x["clip/norm"]) for m, x in runs.items()}
    print(
        f"\nWithout clipping the gradient norm reaches {largest['without']:.3g}, and"
        f" the loss ends at {losses['without']:.2f}.\nWith quantile_clip, which finds"
        f" its threshold by itself, the loss ends at {losses['quantile_clip']:.2f}."
    )


if __name__ == "__main__":
    main()
