"""What a tap costs: 10,000 training steps at full speed, with reports and without.

The networks of training.py learn scikit-learn's digits in three kinds of loops. Blocks
of steps alternate, each contender once a round and in another order every round, and
each block ends when its last step is done.

    python benchmarks/tap.py --output docs/results/tap
"""

import argparse
import pathlib
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


def free(step: Any, held: list[Any]) -> None:
    """A loop that waits for nothing."""
    for _ in range(BLOCK):
        *held[:], _ = step(*held)
    jax.block_until_ready(held)


def reading(step: Any, held: list[Any]) -> None:
    """A loop that reads the loss of each step, as for a progress bar."""
    for _ in range(BLOCK):
        *held[:], loss = step(*held)
        float(loss)


def scanned(step: Any, held: list[Any]) -> None:
    """A program of many steps."""
    *held[:], losses = step(*held)
    jax.block_until_ready(losses)


LOOPS = {
    "a loop that waits for nothing": free,
    "a loop that reads each loss": reading,
    "lax.scan": scanned,
}


def contender(name: str, batch: int, loop: str, tx: Any) -> harness.Contender:
    """A block of training steps of a network."""
    digits = load_digits()
    images = jnp.asarray(digits.images[:batch] / 16, np.float32)
    labels = jnp.asarray(digits.target[:batch])
    model = MODELS[name]()

    def loss_of(params: Any) -> jax.Array:
        logits = model.apply(params, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    def step(params: Any, state: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def steps(params: Any, state: Any) -> Any:
        def body(carry: Any, _: Any) -> Any:
            *carry, loss = step(*carry)
            return tuple(carry), loss

        carry, losses = jax.lax.scan(body, (params, state), length=BLOCK)
        return *carry, losses

    run = LOOPS[loop]
    program = jax.jit(steps if run is scanned else step, donate_argnums=(0, 1))
    params = model.init(jax.random.key(0), images)
    held = [params, tx.init(params)]
    return lambda: run(program, held)


def measure(name: str, steps: int, batch: int, every: int) -> dict[str, Any]:
    """The table of one network."""
    histories = {loop: clipx.History() for loop in LOOPS}
    contenders = {}
    for loop, history in histories.items():
        tx = optax.chain(clipx.clip_by_global_norm(1.0), optax.adam(1e-3))
        contenders[f"{loop}, without"] = contender(name, batch, loop, tx)
        tapped = clipx.tap(tx, history, every=every)
        contenders[f"{loop}, with"] = contender(name, batch, loop, tapped)
    rounds = steps // BLOCK
    times = harness.alternate(contenders, rounds, name)
    counts = clipx.flush_taps()
    wanted = np.arange(0, BLOCK * (rounds + 2), every)  # two rounds of warm-up

    rows = [
        {
            "loop": loop,
            "without": float(np.median(times[f"{loop}, without"]) / BLOCK),
            "with": float(np.median(times[f"{loop}, with"]) / BLOCK),
            "ratio": float(
                np.median(times[f"{loop}, with"] / times[f"{loop}, without"])
            ),
            "reports": len(history),
            "in_order": bool(np.array_equal(history.steps, wanted)),
        }
        for loop, history in histories.items()
    ]
    return {
        "model": name,
        "steps": rounds * BLOCK,
        "rounds": rounds,
        "every": every,
        "dropped": counts.dropped,
        "rows": rows,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = []
    for found in report["tables"]:
        lines += [
            f"{found['steps']:,} steps of the {found['model']} in each loop, with"
            f" every={found['every']} and a History. Medians of {found['rounds']}"
            f" alternated blocks of {BLOCK} steps.",
            "",
        ]
        head = ["loop", "ms a step without tap", "with", "ratio", "reports"]
        rows = [
            [
                row["loop"],
                f"{row['without']:.3f}",
                f"{row['with']:.3f}",
                f"{row['ratio']:.3f}",
                f"{row['reports']:,}" + ("" if row["in_order"] else ", not in order"),
            ]
            for row in found["rows"]
        ]
        lines += [*harness.table(head, rows), ""]
    return "\n".join(lines + harness.footer(report))


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["perceptron"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10_000, help="of each contender")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--output", type=pathlib.Path, help="write OUTPUT.json and .md")
    options = parser.parse_args()
    report = {
        "environment": harness.environment(),
        "tables": [
            measure(name, options.steps, options.batch, options.every)
            for name in options.models
        ],
    }
    harness.write(options.output, report, markdown(report))


if __name__ == "__main__":
    main()
