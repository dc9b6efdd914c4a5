"""What a small model feels: seconds to trace and compile, kernels, eager calls.

A step of Adam on 4, 16 and 50 leaves, with each clipper and with what it stands beside
in optax. In each round every contender is compiled once, in another order. Tracing
takes a twentieth of a second, which others on the machine disturb by half. So it has
more rounds of its own. "By hand" is a plain program that fills the same metrics
(`least.py`).

    python benchmarks/everyday.py --output docs/results/everyday
    pip install "jax[cuda12]" && python benchmarks/everyday.py --h100   # kernels too
"""

import argparse
import gc
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import least
import numpy as np
import optax
from tqdm import tqdm

import optax_clipx as clipx


def before_adam(clipper: Any) -> optax.GradientTransformation:
    """A clipper in front of Adam."""
    return optax.chain(clipper, optax.adam(1e-3))


OF_OPTAX: dict[str, Callable[[], Any]] = {
    "optax tree": lambda: before_adam(optax.clip_by_global_norm(1.0)),
    "optax clip": lambda: before_adam(optax.clip(0.1)),
    "optax leaf": lambda: before_adam(optax.clip_by_block_rms(1.0)),
    "optax AGC": lambda: before_adam(optax.adaptive_grad_clip(0.01)),
    "optax apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-3), 5),
}


class Ours(NamedTuple):
    """A contender, what it is compared with, and how long it may take to compile."""

    make: Callable[[], Any]
    beside: str
    goal: float | None = None


OURS = {
    "tree": Ours(
        lambda: before_adam(clipx.clip_by_global_norm(1.0)), "optax tree", 1.35
    ),
    "zclip": Ours(lambda: before_adam(clipx.zclip()), "optax tree", 1.8),
    "auto_clip": Ours(lambda: before_adam(clipx.auto_clip()), "optax tree", 1.8),
    "clip": Ours(lambda: before_adam(clipx.clip(0.1)), "optax clip", 2.0),
    "clip, metrics=False": Ours(
        lambda: before_adam(clipx.clip(0.1, metrics=False)), "optax clip", 1.15
    ),
    "clip, by hand": Ours(lambda: before_adam(least.clip(0.1)), "optax clip"),
    "leaf": Ours(lambda: before_adam(clipx.clip_by_leaf_norm(1.0)), "optax leaf"),
    "AGC": Ours(lambda: before_adam(clipx.adaptive_grad_clip(0.01)), "optax AGC", 3.0),
    "AGC, by hand": Ours(
        lambda: before_adam(least.adaptive_grad_clip(0.01)), "optax AGC"
    ),
    "skip_spikes": Ours(
        lambda: clipx.skip_spikes(optax.adam(1e-3)), "optax apply_if_finite", 1.8
    ),
    "track_norms": Ours(
        lambda: clipx.track_norms(before_adam(clipx.clip_by_global_norm(1.0))),
        "optax tree",
    ),
}
TRACE_GOAL, EAGER_GOAL = 1.6, 1.5
TRACED_PER_COMPILED = 5  # rounds
EVERY = OF_OPTAX | {name: ours.make for name, ours in OURS.items()}


def params_of(leaves: int) -> list[jax.Array]:
    """Kernels and biases of a small network in turn."""
    return [jnp.ones((64, 64) if i % 2 else (64,)) for i in range(leaves)]


def step_of(tx: Any) -> Callable[..., Any]:
    """A step of training: the new parameters and the new state."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def lowered_once(name: str, leaves: int) -> tuple[float, Any]:
    """Seconds of tracing and lowering a step, and the step."""
    jax.clear_caches()
    gc.collect()
    tx, params = EVERY[name](), params_of(leaves)
    state = tx.init(params)
    jitted = jax.jit(step_of(tx), donate_argnums=(0, 1))
    start = time.perf_counter()
    lowered = jitted.lower(params, state, params)
    return time.perf_counter() - start, lowered


def compiled_once(name: str, leaves: int) -> tuple[float, float]:
    """Seconds of compiling, and how many kernels there are."""
    _, lowered = lowered_once(name, leaves)
    start = time.perf_counter()
    program = lowered.compile()
    end = time.perf_counter()
    return end - start, kernels(program.as_text())


def in_turn(
    once: Callable[[str], Any], rounds: int, label: str
) -> dict[str, np.ndarray]:
    """What is found of each contender in each round, in another order each round."""
    found: dict[str, list[Any]] = {name: [] for name in EVERY}
    shuffle = np.random.default_rng(0)
    for name in EVERY:
        once(name)  # imports and the like
    for _ in tqdm(range(rounds), desc=label, unit="round"):
        for name in shuffle.permutation(list(EVERY)):
            found[name].append(once(name))
    return {name: np.array(rows).T for name, rows in found.items()}


def kernels(text: str) -> int:
    """The operations of the main computation that run code of their own."""
    entry = text[text.index("\nENTRY") :]
    nothing = "parameter|tuple|get-tuple-element|bitcast|constant"
    return len(
        re.findall(rf"^\s+(?:ROOT )?%\S+ = .*? (?!{nothing})[\w-]+\(", entry, re.M)
    )


def eager_of(leaves: int, rounds: int) -> harness.Times:
    """Milliseconds of one `update` outside of jit."""
    contenders = {}
    for name, make in EVERY.items():
        tx, params = make(), params_of(leaves)
        state = tx.init(params)
        contenders[name] = lambda tx=tx, state=state, params=params: (
            jax.block_until_ready(tx.update(params, state, params))
        )
    return harness.alternate(contenders, rounds, f"eager, {leaves} leaves")


def measure(leaves: int, rounds: int) -> dict[str, Any]:
    """Every contender in turn; the ratios are of the same round."""
    traced = in_turn(
        lambda name: lowered_once(name, leaves)[0],
        rounds * TRACED_PER_COMPILED,
        f"{leaves} leaves, tracing",
    )
    compiled = in_turn(
        lambda name: compiled_once(name, leaves), rounds, f"{leaves} leaves, compiling"
    )
    eager = eager_of(leaves, max(rounds, 11))
    rows = {}
    for name, ours in OURS.items():
        (mine, kernels), (other, its_kernels) = compiled[name], compiled[ours.beside]
        rows[name] = {
            "trace": float(np.median(traced[name] / traced[ours.beside])),
            "compile": float(np.median(mine / other)),
            "spread": np.quantile(mine / other, [0.25, 0.75]).tolist(),
            "kernels": [int(kernels[0]), int(its_kernels[0])],
            "eager": float(np.median(eager[name] / eager[ours.beside])),
        }
    return {"leaves": leaves, "rounds": rounds, "rows": rows}


def on_h100(leaves: int) -> dict[str, list[int]]:
    """Kernels of the step for an H100, compiled ahead of time."""
    import gpu

    place, params = gpu.h100(), params_of(leaves)

    def like(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    def count(tx: Any) -> int:
        shapes, state = jax.tree.map(like, (params, jax.eval_shape(tx.init, params)))
        traced = jax.jit(step_of(tx), donate_argnums=(0, 1)).trace(
            shapes, state, shapes
        )
        lowered = traced.lower(lowering_platforms=("cuda",))
        return gpu.compiled(lowered, {})[1]["kernels"]

    progress = tqdm(EVERY.items(), desc=f"H100, {leaves} leaves")
    counts = {name: count(make()) for name, make in progress}
    return {name: [counts[name], counts[x.beside]] for name, x in OURS.items()}


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    head = ["leaves", "clipping", "beside", "compile", "quartiles", "goal", "trace"]
    head += ["eager", "kernels, ours", "optax's"]
    rows = []
    for table in report["tables"]:
        for name, row in table["rows"].items():
            ours = OURS[name]
            low, high = row["spread"]
            rows.append(
                [
                    *(str(table["leaves"]), name, ours.beside, f"{row['compile']:.2f}"),
                    *(f"{low:.2f} to {high:.2f}", f"{ours.goal or ''}"),
                    *(f"{row['trace']:.2f}", f"{row['eager']:.2f}"),
                    *map(str, row["kernels"]),
                ]
            )
    lines = harness.table(head, rows, 3)
    for table in report.get("h100", []):
        counts = [
            f"{name} {ours} ({other})" for name, (ours, other) in table["rows"].items()
        ]
        lines += ["", f"H100, {table['leaves']} leaves, kernels of the step (optax's):"]
        lines += [", ".join(counts) + "."]
    lines += [
        "",
        "Ratios to what stands beside, medians over"
        f" {report['tables'][0]['rounds']} alternated rounds, of tracing"
        f" {TRACED_PER_COMPILED} times as many. Goals: tracing {TRACE_GOAL}, eager"
        f" calls {EAGER_GOAL}, compiling as in the table.",
    ]
    return "\n".join(lines + harness.footer(report))


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--leaves", type=int, nargs="+", default=[4, 16, 50])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--h100", action="store_true", help="count its kernels as well")
    parser.add_argument("--output", type=pathlib.Path, help="write OUTPUT.json and .md")
    options = parser.parse_args()
    report: dict[str, Any] = {"environment": harness.environment()}
    report["tables"] = [measure(n, options.rounds) for n in options.leaves]
    if options.h100:
        report["h100"] = [{"leaves": n, "rows": on_h100(n)} for n in (4, 12, 100)]
    harness.write(options.output, report, markdown(report))


if __name__ == "__main__":
    main()
