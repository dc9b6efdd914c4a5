"""What a tap costs: 10,000 training steps at full speed, with reports and without.

The networks of training.py learn scikit-learn's digits in an ordinary loop that waits
for nothing. Blocks of steps alternate, each contender once a round and in another order
every round, and each block ends when its last step is done.

    python benchmarks/tap.py --output docs/results/tap
"""

import argparse
import pathlib
import time
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from training import MODELS

import optax_clipx as clipx

BLOCK = 50  # steps of one contender before the next has its turn


def contender(name: str, batch: int, wrap: Any) -> harness.Contender:
    """A block of training steps of a network."""
    digits = load_digits()
    images = jnp.asarray(digits.images[:batch] / 16, np.float32)
    labels = jnp.asarray(digits.target[:batch])
    model = MODELS[name]()
    tx = wrap(optax.chain(clipx.clip_by_global_norm(1.0), optax.adam(1e-3)))

    def loss_of(params: Any) -> jax.Array:
        logits = model.apply(params, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    def step(params: Any, state: Any) -> Any:
        grads = jax.grad(loss_of)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    program = jax.jit(step, donate_argnums=(0, 1))
    params = model.init(jax.random.key(0), images)
    held = [params, tx.init(params)]

    def run() -> None:
        for _ in range(BLOCK):
            held[:] = program(*held)
        jax.block_until_ready(held)

    return run


def measure(name: str, steps: int, batch: int) -> dict[str, Any]:
    """The table of one network."""
    histories = {every: clipx.History() for every in (1, 10)}
    contenders = {"no tap": contender(name, batch, lambda tx: tx)}
    for every, history in histories.items():
        contenders[f"every={every}"] = contender(
            name,
            batch,
            lambda tx, history=history, every=every: clipx.tap(
                tx, history, every=every
            ),
        )
    rounds = steps // BLOCK
    start = time.perf_counter()
    times = harness.alternate(contenders, rounds, name)
    counts = clipx.flush_taps()
    rows = {
        who: {
            "ms": float(np.median(took) / BLOCK),
            "ratio": float(np.median(took / times["no tap"])),
        }
        for who, took in times.items()
    }
    for every, history in histories.items():
        total = BLOCK * (rounds + 2)  # two rounds of warm-up
        rows[f"every={every}"]["reports"] = len(history)
        wanted = np.arange(0, total, every)
        rows[f"every={every}"]["in_order"] = bool(np.array_equal(history.steps, wanted))
    return {
        "model": name,
        "steps": rounds * BLOCK,
        "rounds": rounds,
        "seconds": time.perf_counter() - start,
        "dropped": counts.dropped,
        "rows": rows,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = []
    for found in report["tables"]:
        lines += [
            f"## {found['model']}: {found['steps']:,} steps of each",
            "",
            f"Medians of {found['rounds']} alternated blocks of {BLOCK} steps. The sink"
            " is a History.",
            "",
        ]
        head = ["tap", "ms a step", "ratio to no tap", "reports", "all, and in order"]
        rows = [
            [
                who,
                f"{row['ms']:.3f}",
                f"{row['ratio']:.3f}",
                f"{row['reports']:,}" if "reports" in row else "",
                ("yes" if row["in_order"] else "no") if "in_order" in row else "",
            ]
            for who, row in found["rows"].items()
        ]
        lines += [*harness.table(head, rows), ""]
    return "\n".join(lines + harness.footer(report))


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["perceptron"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10_000, help="of each contender")
    parser.add_argument("--output", type=pathlib.Path, help="write OUTPUT.json and .md")
    options = parser.parse_args()
    report = {
        "environment": harness.environment(),
        "tables": [
            measure(name, options.steps, options.batch) for name in options.models
        ],
    }
    harness.write(options.output, report, markdown(report))


if __name__ == "__main__":
    main()
