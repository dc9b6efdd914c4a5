"""What clipping adds to a whole training step: gradients fresh from a backward pass.

Three small networks on scikit-learn's digits: a perceptron, a convolutional network and
an LSTM that reads the rows of an image.

    python benchmarks/training.py --output docs/results/training
"""

import argparse
import pathlib
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from steps import CLIPPERS, OF_OPTAX

CHOSEN = [
    "tree",
    "zclip",
    "leaf",
    "unit (AGC)",
    "optax tree",
    "optax leaf",
    "optax unit (AGC)",
]


class Perceptron(nn.Module):
    """Three hidden layers of 512."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits from 64 pixels."""
        x = x.reshape(len(x), -1)
        for _ in range(3):
            x = nn.relu(nn.Dense(512)(x))
        return nn.Dense(10)(x)


class Convolutional(nn.Module):
    """Six layers of 64 channels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits from an image of 8 x 8."""
        x = x[..., None]
        for _ in range(6):
            x = nn.relu(nn.Conv(64, (3, 3))(x))
        return nn.Dense(10)(x.mean((1, 2)))


class Recurrent(nn.Module):
    """An LSTM of 512 over the eight rows."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits from an image of 8 x 8."""
        return nn.Dense(10)(nn.RNN(nn.OptimizedLSTMCell(512))(x)[:, -1])


MODELS = {
    "perceptron": Perceptron,
    "convolutional": Convolutional,
    "LSTM": Recurrent,
}


def measure(name: str, rounds: int, batch: int) -> dict[str, Any]:
    """The table of one network."""
    digits = load_digits()
    images = jnp.asarray(digits.images[:batch] / 16, np.float32)
    labels = jnp.asarray(digits.target[:batch])
    model = MODELS[name]()
    params = model.init(jax.random.key(0), images)
    adam = optax.adam(1e-3)

    def loss_of(params: Any) -> jax.Array:
        logits = model.apply(params, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    def contender(clipper: Any) -> harness.Contender:
        tx = optax.chain(clipper, adam)

        def step(params: Any, state: Any) -> Any:
            grads = jax.grad(loss_of)(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        held = [jax.tree.map(jnp.copy, params), tx.init(params)]
        program = harness.compiled(step, *held, donate=(0, 1))

        def run() -> None:
            held[:] = program(*held)
            jax.block_until_ready(held)

        return run

    contenders = {"no clipping": contender(optax.identity())}
    contenders |= {who: contender(CLIPPERS[who][0]()) for who in CHOSEN}
    times = harness.alternate(contenders, rounds, name)
    rows = {
        who: {
            "ms": float(np.median(took)),
            "ratio": float(np.median(took / times["no clipping"])),
        }
        for who, took in times.items()
    }
    for who in set(OF_OPTAX) & set(rows):
        rows[who]["of_optax"] = float(np.median(times[who] / times[OF_OPTAX[who]]))
    leaves = jax.tree.leaves(params)
    return {
        "model": name,
        "parameters": sum(x.size for x in leaves),
        "leaves": len(leaves),
        "batch": batch,
        "rounds": rounds,
        "rows": rows,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = []
    for found in report["tables"]:
        lines += [
            f"## {found['model']}: {found['parameters']:,} parameters in"
            f" {found['leaves']} leaves, batch {found['batch']}",
            "",
            f"Medians of {found['rounds']} alternated rounds.",
            "",
        ]
        head = ["training step", "ms", "ratio to no clipping", "whole step / optax's"]
        rows = [
            [
                name,
                f"{row['ms']:.2f}",
                f"{row['ratio']:.3f}",
                f"{row['of_optax']:.3f}" if "of_optax" in row else "",
            ]
            for name, row in found["rows"].items()
        ]
        lines += [*harness.table(head, rows), ""]
    return "\n".join(lines + harness.footer(report))


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=101, help="alternated rounds")
    parser.add_argument("--output", type=pathlib.Path, help="write OUTPUT.json and .md")
    options = parser.parse_args()
    report = {
        "environment": harness.environment(),
        "tables": [
            measure(name, options.rounds, options.batch) for name in options.models
        ],
    }
    harness.write(options.output, report, markdown(report))


if __name__ == "__main__":
    main()
