"""What clipping costs before the first step: tracing, lowering, compiling.

Programs of many leaves, clipping alone and the whole step with Adam, next to optax's.
Beside clipping alone stand its halves, as floors: what only reads the leaves, one by
one or 64 in one array, and what only scales them. "By hand, rows" is the two cheapest
halves and nothing else: what is not clipped is multiplied by 1, which makes zeros of
subnormal numbers. "By hand, rows, select" leaves it alone. Both are right for usual
norms only.

    python benchmarks/compiling.py --output docs/results/compiling
"""

import argparse
import gc
import pathlib
import time
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from steps import by_hand
from tqdm import tqdm

import optax_clipx as clipx

SHAPE = (64, 64)


def read_only() -> optax.GradientTransformation:
    """Adds up the squares of all leaves, in one array that stays whole."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        sums = jnp.stack([jnp.sum(jnp.square(x)) for x in updates])
        return jnp.sum(jax.lax.optimization_barrier(sums)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def sums_in_rows(updates: Any) -> jax.Array:
    """The sum of all squares, of 64 leaves at a time that are copied into one array."""
    sums = []
    for start in range(0, len(updates), 64):
        flat = jnp.concatenate([x.reshape(-1) for x in updates[start : start + 64]])
        sums.append(jnp.sum(jnp.square(jax.lax.optimization_barrier(flat))))
    return jnp.sum(jnp.stack(sums))


def rows_only() -> optax.GradientTransformation:
    """Adds up the squares of all leaves, at the least cost of compiling."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return sums_in_rows(updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def rows_by_hand(select: bool) -> optax.GradientTransformation:
    """The fewest operations that clip a usual norm: such sums, and multiplication."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        scale = jnp.minimum(1, jax.lax.rsqrt(sums_in_rows(updates)))
        scaled = [x * scale for x in updates]
        if select:
            pairs = zip(updates, scaled, strict=True)
            scaled = [jnp.where(scale == 1, x, y) for x, y in pairs]
        return scaled, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_only() -> optax.GradientTransformation:
    """Multiplies all leaves by a number that XLA does not know."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return [x * state for x in updates], state

    return optax.GradientTransformation(lambda params: jnp.ones(()), update)


CLIPPERS = {
    "none": optax.identity,
    "read alone": read_only,
    "rows alone": rows_only,
    "scale alone": scale_only,
    "tree": lambda: clipx.clip_by_global_norm(1.0),
    "zclip": clipx.zclip,
    "leaf": lambda: clipx.clip_by_leaf_norm(1.0),
    "unit (AGC)": lambda: clipx.adaptive_grad_clip(0.01),
    "optax tree": lambda: optax.clip_by_global_norm(1.0),
    "optax leaf": lambda: optax.clip_by_block_rms(1.0),
    "optax unit (AGC)": lambda: optax.adaptive_grad_clip(0.01),
    "by hand, tree": by_hand,
    "by hand, rows": lambda: rows_by_hand(select=False),
    "by hand, rows, select": lambda: rows_by_hand(select=True),
}
FLOORS = ("none", "rows alone", "scale alone", "by hand, rows", "by hand, rows, select")
PAIRS = {
    **dict.fromkeys(FLOORS, "optax tree"),
    "tree": "optax tree",
    "zclip": "optax tree",
    "leaf": "optax leaf",
    "unit (AGC)": "optax unit (AGC)",
}


def seconds(name: str, leaves: int, adam: bool) -> tuple[float, float, int]:
    """Of tracing and lowering, and of compiling; and the number of fusions."""
    jax.clear_caches()
    gc.collect()
    tx = CLIPPERS[name]()
    tx = optax.chain(tx, optax.adam(1e-3)) if adam else tx
    shapes = [jax.ShapeDtypeStruct(SHAPE, jnp.float32)] * leaves
    state = jax.eval_shape(tx.init, shapes)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates) if adam else updates), state

    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(shapes, state, shapes)
    middle = time.perf_counter()
    program = lowered.compile()
    end = time.perf_counter()
    fusions = program.as_text().count(" fusion(")
    return middle - start, end - middle, fusions


def measure(leaves: int, adam: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Every clipper in turn, round by round."""
    names = [x for x in CLIPPERS if not (adam and x.endswith("alone"))]
    if leaves > 1000:
        names = [x for x in names if "unit" not in x and x != "zclip"]
    if leaves > (1000 if adam else 2500):
        names = [x for x in names if "leaf" not in x]
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in names}
    for name in names:
        if leaves <= options.leaves[0]:
            seconds(name, leaves, adam)  # imports and the like
    rounds = options.rounds if leaves <= 1000 else 1
    for _ in range(rounds):
        for name in tqdm(names, desc=f"{leaves} leaves", leave=False):
            found[name].append(seconds(name, leaves, adam))
    medians = {name: np.median(rows, axis=0).tolist() for name, rows in found.items()}
    return {"leaves": leaves, "adam": adam, "rounds": rounds, "seconds": medians}


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = []
    for adam in (False, True):
        lines += [f"## {'A whole step of Adam' if adam else 'Clipping alone'}", ""]
        head = ["leaves", "clipping", "trace and lower s", "compile s", "fusions"]
        head += ["compile ms a leaf", "trace and lower / optax's", "compile / optax's"]
        rows = []
        for found in [x for x in report["tables"] if x["adam"] == adam]:
            for name, (lower, compile_s, fusions) in found["seconds"].items():
                other = found["seconds"].get(PAIRS.get(name, ""))
                ratios = (
                    [f"{lower / other[0]:.2f}", f"{compile_s / other[1]:.2f}"]
                    if other
                    else ["", ""]
                )
                cells = [str(found["leaves"]), name, f"{lower:.2f}", f"{compile_s:.2f}"]
                cells += [f"{fusions:.0f}", f"{1e3 * compile_s / found['leaves']:.2f}"]
                rows.append([*cells, *ratios])
        lines += [*harness.table(head, rows, 2), ""]
    lines += [
        f"Medians of {report['tables'][0]['rounds']} alternated rounds up to 1,000"
        " leaves, one round beyond."
    ]
    return "\n".join(lines + harness.footer(report))


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--leaves", type=int, nargs="+", default=[10, 100, 1000, 2500, 5000]
    )
    parser.add_argument("--rounds", type=int, default=3, help="up to 1,000 leaves")
    parser.add_argument("--output", type=pathlib.Path, help="write OUTPUT.json and .md")
    options = parser.parse_args()
    tables = [
        measure(leaves, adam, options)
        for adam in (False, True)
        for leaves in options.leaves
        if leaves <= 2500 or not adam  # Adam's own loops take minutes to compile
    ]
    report = {"environment": harness.environment(), "tables": tables}
    harness.write(options.output, report, markdown(report))


if __name__ == "__main__":
    main()
