"""Exploding gradients, and what each way of clipping them does.

Trains small networks without clipping and with four methods, all else equal, and
writes a table, a picture and TensorBoard logs:

* ``regression``: two layers, plain gradient descent with momentum. Without clipping
  the loss passes 1e18 within five epochs and is NaN soon after.
* ``rows`` and ``pixels``: a plain recurrent network and an LSTM that read images of
  digits row by row or pixel by pixel. The rows and the plain network are the default.

    python examples/exploding_gradients.py
    python examples/exploding_gradients.py --task rows --seeds 5
    python examples/exploding_gradients.py --task all --cells rnn lstm   # many minutes
    python examples/exploding_gradients.py --dataset mnist --data-dir DIR
    tensorboard --logdir runs/exploding_gradients
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import image_sequences
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tasks
import training_picture
from flax import nnx
from jaxtyping import Array
from progress import bar_of
from tasks import Task
from tensorboardX import SummaryWriter

import optax_clipx as clipx
from optax_clipx.runs.naming import counted

CLIPPERS = {
    # An infinite threshold clips nothing: it only measures.
    "none": lambda limit: clipx.clip_by_global_norm(jnp.inf),
    "value": lambda limit: clipx.clip_by_value(-limit, limit),
    "leaf": lambda limit: clipx.clip_by_leaf_norm(limit),
    "global": lambda limit: clipx.clip_by_global_norm(limit),
    "adaptive": lambda limit: clipx.adaptive_grad_clip(limit),
}


class Run(NamedTuple):
    """One task trained with one method, for all seeds.

    Attributes:
        task: what was learned.
        method: a key of ``CLIPPERS``.
        limit: the threshold of the method; infinite without clipping.
        history: for each quantity its values, an array of seeds by steps.
        loss: after training, for each seed.
        score: after training, for each seed; NaN where the loss is not finite.
    """

    task: Task
    method: str
    limit: float
    history: dict[str, np.ndarray]
    loss: np.ndarray
    score: np.ndarray

    def first_nonfinite(self) -> np.ndarray:
        """For each seed the first step with a non-finite loss or norm, 0 for none."""
        finite = np.isfinite(self.history["loss"]) & np.isfinite(self.history["norm"])
        return np.where(finite.all(1), 0, finite.argmin(1) + 1)

    def largest_norm(self) -> np.ndarray:
        """For each seed the largest finite norm before clipping."""
        norm = self.history["norm"]
        return np.where(np.isfinite(norm), norm, 0).max(1)


def train(task: Task, method: str, num_seeds: int) -> Run:
    """Trains one network per seed, all at once."""
    limit = task.limits.get(method, np.inf)
    optimizer = optax.chain(
        CLIPPERS[method](limit),
        optax.sgd(task.learning_rate, task.momentum),
    )
    graph, _, rest = nnx.split(task.build(nnx.Rngs(0)), nnx.Param, ...)
    inputs, targets = (jnp.asarray(array) for array in task.train)

    @jax.jit
    @jax.vmap
    def init(key: Array) -> Any:
        params = nnx.state(task.build(nnx.Rngs(key)), nnx.Param)
        return params, optimizer.init(params), key

    def outputs_of(params: Any, batch: Array) -> Array:
        return nnx.merge(graph, params, rest)(batch)

    def loss_fn(params: Any, batch: Array, labels: Array) -> Array:
        return task.example_losses(outputs_of(params, batch), labels).mean()

    def step(carry: Any, index: Array) -> tuple[Any, dict[str, Array]]:
        params, opt_state, key = carry
        batch, labels = inputs, targets
        if task.batch_size < len(inputs):
            chosen = jax.random.randint(
                jax.random.fold_in(key, index), (task.batch_size,), 0, len(inputs)
            )
            batch, labels = inputs[chosen], targets[chosen]
        loss, grads = jax.value_and_grad(loss_fn)(params, batch, labels)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state, key), record(loss, opt_state)

    @jax.jit
    def train_chunk(carry: Any, indices: Array) -> tuple[Any, dict[str, Array]]:
        return jax.vmap(lambda c: jax.lax.scan(step, c, indices))(carry)

    @jax.jit
    def predict(params: Any, batch: Array) -> Array:
        return jax.vmap(outputs_of, (0, None))(params, batch)

    carry = init(jax.vmap(jax.random.key)(jnp.arange(num_seeds)))
    chunks = []
    label = f"{task.name}, {task.model}, {method}"
    with bar_of(total=task.steps, desc=f"{label:24}", unit="step") as progress:
        for indices in split(np.arange(task.steps)):
            carry, chunk = train_chunk(carry, indices)
            chunks.append(jax.device_get(chunk))
            progress.update(len(indices))
    loss, score = evaluate(task, lambda batch: predict(carry[0], batch))
    history = {name: np.hstack([c[name] for c in chunks]) for name in chunks[0]}
    return Run(task, method, limit, history, loss, score)


def evaluate(
    task: Task, predict: Callable[[Array], Array], batch_size: int = 200
) -> tuple[np.ndarray, np.ndarray]:
    """The loss and the score of each seed on the test data, read in batches."""
    inputs, targets = task.test
    starts = range(0, len(inputs), batch_size)
    outputs = [predict(inputs[i : i + batch_size]) for i in starts]

    def of_one_seed(outputs: Array) -> tuple[Array, Array]:
        loss = task.example_losses(outputs, targets).mean()
        score = task.score(outputs, targets)
        return loss, jnp.where(jnp.isfinite(loss), score, jnp.nan)

    of_seeds = jax.jit(jax.vmap(of_one_seed))
    return jax.device_get(of_seeds(jnp.concatenate(outputs, axis=1)))


def record(loss: Array, opt_state: Any) -> dict[str, Array]:
    """What is kept of one step; ``clip_rate`` is that of all steps so far."""
    metrics = clipx.metrics(opt_state)
    names = ("norm", "clipped_norm", "scale", "threshold")
    kept = {name: metrics[f"clip/{name}"] for name in names}
    clip_rate = metrics["clip/num_clipped"] / metrics["clip/steps"]
    return {"loss": loss, **kept, "clip_rate": clip_rate}


def split(indices: np.ndarray, most: int = 20) -> list[np.ndarray]:
    """Chunks of one length, so that they compile once."""
    parts = max(n for n in range(1, most + 1) if len(indices) % n == 0)
    return np.split(indices, parts)


def write_logs(run: Run, folder: Path, every: int) -> None:
    """Writes TensorBoard logs, one folder a seed, without the non-finite values."""
    for seed in range(len(run.loss)):
        name = f"{run.task.name}/{run.task.model}/{run.method}/seed{seed}"
        with SummaryWriter(str(folder / name)) as writer:
            for tag, values in run.history.items():
                for step in range(0, run.task.steps, every):
                    if np.isfinite(values[seed, step]):
                        writer.add_scalar(tag, values[seed, step], step + 1)


def table(runs: list[Run]) -> str:
    """The runs as a table in Markdown, of at most 100 columns."""
    header = ["task, network", "clipping", "loss", "score"]
    header += ["non-finite", "max norm", "clipped"]
    rows = [header, *(row(run) for run in runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(map(str.ljust, cells, widths)) + " |" for cells in rows
    )


def row(run: Run) -> list[str]:
    """One line of the table."""
    first = run.first_nonfinite()
    exploded = first[first > 0]
    when = "never"
    if len(exploded):
        when = f"{np.median(exploded):.0f}"
        if len(exploded) < len(first):
            when += f" ({len(exploded)} of {len(first)})"
    return [
        f"{run.task.name}, {run.task.model}",
        run.method if run.method == "none" else f"{run.method} at {run.limit:g}",
        f"{np.median(run.loss):.3g}",
        spread(run.score),
        when,
        f"{np.median(run.largest_norm()):.2g}",
        f"{np.median(run.history['clip_rate'][:, -1]):.0%}",
    ]


def spread(values: np.ndarray) -> str:
    """The smallest and largest value, or one where they do not differ."""
    low, high = f"{np.min(values):.2f}", f"{np.max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def learned(runs: list[Run]) -> str:
    """What the runs show, in two sentences."""
    plain = [run for run in runs if run.method == "none"]
    clipped = [run for run in runs if run.method != "none"]
    exploded = sum(run.first_nonfinite().any() for run in plain)
    failed = sum(run.first_nonfinite().any() for run in clipped)
    worse = 0
    for run in plain:
        others = [np.median(c.score) for c in clipped if c.task is run.task]
        worse += not np.median(run.score) >= max(others, default=-np.inf)
    tasks_, others = counted(len(plain), "task"), counted(len(clipped), "run")
    return (
        f"Without clipping, the loss became infinite or NaN in {exploded} of {tasks_},"
        f" and the score was worse than with clipping in {worse}.\nWith clipping and"
        f" the same learning rates, the loss became so in {failed} of {others}."
    )


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = ["regression", "rows", "pixels"]
    add("--task", nargs="+", choices=[*names, "all"], default=names[:2])
    add("--cells", nargs="+", choices=["rnn", "lstm"], default=["rnn"])
    add("--methods", nargs="+", choices=list(CLIPPERS), default=list(CLIPPERS))
    add("--dataset", choices=["digits", "mnist"], default="digits")
    add("--data-dir", type=Path, metavar="DIR", help="where the MNIST files are")
    add("--epochs", type=int, default=50, help="of the regression")
    add("--batch-size", type=int, default=1000, help="of the regression; 1000 is all")
    add("--steps", type=int, default=1000, help="of the recurrent networks")
    add("--max-norm", type=float, help='the threshold of the method "global"')
    add("--seeds", type=int, default=3, help="how many networks each")
    add("--log-every", type=int, default=5, help="steps between points in TensorBoard")
    add("--output", type=Path, default=Path("runs/exploding_gradients"))
    add("--quick", action="store_true", help="a short run that only shows that it runs")
    arguments = parser.parse_args()
    for name in ("epochs", "batch_size", "steps", "seeds", "log_every"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.quick:
        arguments.steps, arguments.seeds = min(arguments.steps, 40), 1
        arguments.cells = arguments.cells[:1]
        if "all" in arguments.task:
            arguments.task = ["regression", "rows"]
    return arguments


def choose_tasks(arguments: argparse.Namespace) -> list[Task]:
    """The tasks that the command line asks for."""
    chosen = []
    if {"regression", "all"} & set(arguments.task):
        chosen.append(tasks.regression(arguments.batch_size, arguments.epochs))
    orders = [order for order in ("rows", "pixels") if order in arguments.task]
    if "all" in arguments.task:
        orders = ["rows", "pixels"]
    if orders:
        try:
            data = image_sequences.load(arguments.dataset, arguments.data_dir)
        except (FileNotFoundError, ValueError) as error:
            raise SystemExit(f"error: {error}") from None
        chosen += [
            tasks.images(order, cell, data, batch_size=64, steps=arguments.steps)
            for order in orders
            for cell in arguments.cells
        ]
    if arguments.max_norm is not None:
        limit = {"global": arguments.max_norm}
        chosen = [
            dataclasses.replace(task, limits={**task.limits, **limit})
            for task in chosen
        ]
    return chosen


def main() -> None:
    """Trains, then writes and prints what happened."""
    start = time.perf_counter()
    arguments = parse_arguments()
    chosen = choose_tasks(arguments)
    runs = []
    for task in chosen:
        for method in arguments.methods:
            runs.append(train(task, method, arguments.seeds))
            every = 1 if task.steps <= 200 else arguments.log_every
            write_logs(runs[-1], arguments.output / "logs", every)

    seeds = counted(arguments.seeds, "seed")
    print(f"\nMedians over {seeds}; of the score, the smallest and largest value.")
    print("non-finite: at which step the loss or a norm was infinite or NaN.")
    for name in dict.fromkeys(task.score_name for task in chosen):
        where = [r for r in runs if r.task.score_name == name]
        print(f"\nScore: {name}.\n\n{table(where)}")

    picture = arguments.output / "exploding_gradients.png"
    training_picture.draw(runs, picture)
    print(f"\nWrote the picture to {picture}")
    print(f"and TensorBoard logs to {arguments.output / 'logs'}")
    print(f"in {time.perf_counter() - start:.0f} s.\n")
    print(learned(runs))


if __name__ == "__main__":
    main()
