"""What `track_norms` costs beside the step of training that it looks at.

Adam with a global norm in front, with and without `track_norms`, on matrices and on a
mesh: bytes as XLA counts them, all-reduces outside of conditionals, and the time of
alternated steps.

    python benchmarks/tracking.py --output docs/results/tracking
"""

import argparse
import pathlib
from collections.abc import Callable
from typing import Any

import harness
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_clipx as clipx

OPTIONS: dict[str, dict[str, Any]] = {
    "`track_norms(tx)`": {},
    "`ratios=True`": {"ratios": True},
    "`updates=True`": {"updates": True},
    "`updates=True, second_moment=0.999`": {"updates": True, "second_moment": 0.999},
}
LEAVES, SIDE = 8, 512
ROUNDS = 40


def optimizers() -> dict[str, optax.GradientTransformation]:
    """The optimizer alone, and with each choice of what is tracked."""

    def alone() -> optax.GradientTransformation:
        return optax.chain(clipx.clip_by_global_norm(1.0), optax.adam(1e-3))

    tracked = {n: clipx.track_norms(alone(), **how) for n, how in OPTIONS.items()}
    return {"nothing": alone(), **tracked}


def step_of(tx: optax.GradientTransformation) -> Callable[..., Any]:
    """A step of training, with the metrics of it."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, clipx.metrics(state)

    return step


def on_one_device(tx: optax.GradientTransformation) -> tuple[float, harness.Contender]:
    """The bytes of a step, and a contender."""
    params, grads = (
        dict(enumerate(harness.normal_tree(seed, [(SIDE, SIDE)] * LEAVES)))
        for seed in range(2)
    )
    state = tx.init(params)
    program = harness.compiled(step_of(tx), params, state, grads, donate=(0, 1))
    held = [params, state]

    def run() -> None:
        *held[:], _ = program(*held, grads)
        jax.block_until_ready(held)

    return hlo.memory(program)["bytes_accessed"], run


def all_reduces(tx: optax.GradientTransformation) -> int:
    """Those of each step on a mesh of 8 devices, over which every matrix is cut."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params = {
            i: jax.device_put(
                jnp.ones((SIDE, SIDE)), NamedSharding(mesh, PartitionSpec("x"))
            )
            for i in range(LEAVES)
        }
        state = jax.jit(tx.init)(params)
        program = harness.compiled(step_of(tx), params, state, params)
    return sum(not call.in_branch for call in hlo.collectives(program.as_text()))


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    head = ["tracked", "bytes", "of `ratios=True`", "step time", "all-reduces"]
    rows = [
        [
            row["name"],
            f"{row['bytes'] / 1e6:.1f} MB",
            f"{row['of_ratios']:.3f}",
            f"{row['time']:.2f}",
            str(row["all_reduces"]),
        ]
        for row in report["rows"]
    ]
    text = (
        f"A step of Adam with a global norm on {LEAVES} matrices of {SIDE} x {SIDE},"
        " and its metrics. Step times are divided by that of a step without"
        f" `track_norms`: medians of {ROUNDS} alternated rounds. All-reduces are those"
        " outside of conditionals, of a step on a mesh of 8 devices."
    )
    return "\n".join([*harness.table(head, rows), "", text, *harness.footer(report)])


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, help="write OUTPUT.json and .md")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    made = {name: on_one_device(tx) for name, tx in optimizers().items()}
    times = harness.alternate({name: run for name, (_, run) in made.items()}, ROUNDS)
    reference = made["`ratios=True`"][0]
    rows = [
        {
            "name": name,
            "bytes": made[name][0],
            "of_ratios": made[name][0] / reference,
            "time": float(np.median(times[name] / times["nothing"])),
            "all_reduces": all_reduces(tx),
        }
        for name, tx in optimizers().items()
    ]
    report = {"environment": harness.environment(), "rows": rows}
    harness.write(options.output, report, markdown(report))


if __name__ == "__main__":
    main()
