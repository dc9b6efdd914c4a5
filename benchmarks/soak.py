"""A long run of every method with a fault every 50 steps.

A small network is trained for 100,000 steps with each transformation of the package,
and about every 50th gradient is spoiled: a NaN, an infinity, a spike of 1000 times,
zeros, or a new level, 30 times as high, that stays until the next such fault. After
each step what the method remembers and the parameters must be finite; after a step
whose gradients were finite nothing in the state may be NaN; and the counts in the
metrics must be those of the faults. The step is compiled once, and the memory of the
process stays where it is.

    python benchmarks/soak.py --output docs/results/soak

An interrupted run goes on with --resume. Some methods alone: --only zclip adagc.
"""

import argparse
import json
import pathlib
import platform
import runpy
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from tqdm import tqdm

import optax_clipx as clipx

TABLE = pathlib.Path(__file__).parent.parent / "tests" / "all_methods.py"
METHODS = runpy.run_path(str(TABLE))
FAULTS = ("none", "nan", "inf", "spike", "zero", "level")
EVERY, SPIKE, LEVEL, RATE = 50, 1000.0, 30.0, 1e-3
BLOCK = 1000  # steps of one call of the compiled loop
STEPWISE = "clip_by_global_norm, step by step"


class Tally(NamedTuple):
    """What is counted on the way."""

    faults: jax.Array  # of each kind, in the order of FAULTS
    failures: jax.Array  # steps after which something was not as it should be


class Run(NamedTuple):
    """All that goes from step to step."""

    params: Any
    state: Any
    key: jax.Array
    level: jax.Array
    tally: Tally


def transformation(name: str) -> optax.GradientTransformationExtraArgs:
    """A method that answers what is not finite with zeros."""
    method = METHODS["EVERY"][name]
    tx = method.make(nonfinite="zero")
    # Its docstring asks for this: a plain momentum forgets no NaN.
    return tx if method.forgets else clipx.skip_spikes(tx, threshold=jnp.inf)


def start(tx: optax.GradientTransformationExtraArgs, seed: int) -> Run:
    """The network before the first step."""
    first, second, key = jax.random.split(jax.random.key(seed), 3)
    params = {
        "hidden": jax.random.normal(first, (6, 8)) * 0.4,
        "bias": jnp.zeros(8),
        "out": jax.random.normal(second, (8, 3)) * 0.4,
    }
    tally = Tally(jnp.zeros(len(FAULTS), jnp.int32), jnp.zeros((), jnp.int32))
    return Run(params, tx.init(params), key, jnp.ones(()), tally)


def loss(params: Any, key: jax.Array) -> jax.Array:
    """Of a batch; its gradient is bounded, so that a spike throws nothing out."""
    x = jax.random.normal(key, (8, 6))
    wanted = jnp.sin(x[:, :3]) + x[:, 3:]
    found = jnp.tanh(x @ params["hidden"] + params["bias"][None]) @ params["out"]
    return jnp.mean(jnp.logaddexp(found - wanted, wanted - found))


def spoiled(grads: Any, key: jax.Array, kind: jax.Array, level: jax.Array) -> Any:
    """Gradients with a fault; single entries are spoiled in a matrix."""
    factor = jnp.where(kind == FAULTS.index("spike"), SPIKE * level, level)
    grads = jax.tree.map(lambda g: g * factor, grads)
    is_zero = kind == FAULTS.index("zero")
    grads = jax.tree.map(lambda g: jnp.where(is_zero, jnp.zeros_like(g), g), grads)
    bad = jnp.where(kind == FAULTS.index("nan"), jnp.nan, jnp.inf)
    here = (kind == FAULTS.index("nan")) | (kind == FAULTS.index("inf"))
    place = jax.random.randint(key, (), 0, grads["hidden"].size)
    at = jnp.arange(grads["hidden"].size).reshape(grads["hidden"].shape) == place
    return {**grads, "hidden": jnp.where(here & at, bad, grads["hidden"])}


def all_finite(tree: Any) -> jax.Array:
    """Whether there is neither NaN nor infinity."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def no_nan(tree: Any) -> jax.Array:
    """Whether there is no NaN; the threshold of a warm-up may be infinite."""
    return ~jnp.any(jnp.stack([jnp.any(jnp.isnan(x)) for x in jax.tree.leaves(tree)]))


def make_step(name: str, tx: Any) -> Any:
    """One step of training, with its fault and its checks."""
    has_rate = name == "stable_adamw"

    def step(run: Run) -> Run:
        key, of_batch, of_fault, of_kind, of_place = jax.random.split(run.key, 5)
        happens = jax.random.bernoulli(of_fault, 1 / EVERY)
        kind = jax.random.randint(of_kind, (), 1, len(FAULTS))
        kind = jnp.where(happens, kind, 0)
        is_level = kind == FAULTS.index("level")
        level = jnp.where(is_level, LEVEL + 1 - run.level, run.level)
        grads = jax.grad(loss)(run.params, of_batch)
        grads = spoiled(grads, of_place, kind, level)
        updates, state = tx.update(grads, run.state, run.params)
        rate = 1.0 if has_rate else -RATE
        params = jax.tree.map(lambda p, u: p + rate * u, run.params, updates)
        fine = all_finite((params, METHODS["remembered"](state)))
        fine = fine & (~all_finite(grads) | no_nan(state))
        tally = Tally(
            run.tally.faults.at[kind].add(1),
            run.tally.failures + (~fine).astype(jnp.int32),
        )
        return Run(params, state, key, level, tally)

    return step


def resident() -> float:
    """The memory of this process now, in MiB."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def soak(name: str, steps: int, seed: int = 0) -> dict[str, Any]:
    """The whole run of one method, in blocks of a compiled loop."""
    stepwise = name == STEPWISE
    name = "clip_by_global_norm" if stepwise else name
    tx = transformation(name)
    step, traces, block = make_step(name, tx), 0, 1 if stepwise else BLOCK

    def advance(run: Run) -> Run:
        nonlocal traces
        traces += 1
        if stepwise:
            return step(run)
        return lax.scan(lambda run, _: (step(run), None), run, None, length=block)[0]

    update = jax.jit(advance, donate_argnums=0)
    run = start(tx, seed)
    calls = steps // block
    settled = max(calls // 10, 1)  # compiling, and the first tenth, fill caches
    before, began = 0.0, time.perf_counter()
    for i in tqdm(range(calls), desc=name, leave=False, mininterval=1):
        if i == settled:
            before = resident()
        run = jax.block_until_ready(update(run))
    seconds = time.perf_counter() - began
    return report(run, calls * block, METHODS["EVERY"][name].resets) | {
        "traces": traces,
        "mib_first": round(before, 1),
        "mib_last": round(resident(), 1),
        "seconds": round(seconds, 2),
    }


def report(run: Run, steps: int, resets: bool) -> dict[str, Any]:
    """The counts of a run, and where those of the metrics differ."""
    read = {k: np.asarray(v) for k, v in clipx.metrics(run.state).items()}
    faults = dict(zip(FAULTS[1:], run.tally.faults.tolist()[1:], strict=True))
    # A skipper sees every step, the clipper inside of it those that are not skipped.
    outer = "skip" if "skip/steps" in read else "clip"
    wrong = []
    for key, wanted in (
        ("steps", steps),
        ("num_nonfinite", faults["nan"] + faults["inf"]),
    ):
        if read[f"{outer}/{key}"] != wanted and not resets:
            wrong.append(f"{key} is {read[f'{outer}/{key}']}, not {wanted}")
    return {
        "steps": steps,
        "faults": faults,
        "clipped": int(read[f"{outer}/num_clipped"]),
        "skipped": int(read.get("skip/num_skipped", 0)),
        "failures": int(run.tally.failures),
        "wrong_counts": wrong,
    }


def failed(row: dict[str, Any]) -> bool:
    """Whether a run was not as it should be."""
    grown = row["mib_last"] - row["mib_first"]
    return bool(
        row["failures"] or row["wrong_counts"] or row["traces"] != 1 or grown > 16
    )


def markdown(rows: dict[str, Any], settings: dict[str, Any]) -> str:
    """The table, with a line for each method."""
    steps = sum(row["steps"] for row in rows.values())
    faults = sum(sum(row["faults"].values()) for row in rows.values())
    lost = [name for name, row in rows.items() if failed(row)]
    lines = [
        f"{steps:,} steps and {faults:,} faults; {len(rows) - len(lost)} of {len(rows)}"
        f" runs without a failure{': not ' + ', '.join(lost) if lost else ''}.",
        "",
        ", ".join(f"{k} {v}" for k, v in settings.items()) + ".",
        "",
        "| method | steps | NaN | inf | x1000 | zeros | new level | steps clipped"
        " | skipped | failures | traces | MiB, first to last |",
        "|---|" + "---:|" * 11,
    ]
    for name, row in rows.items():
        cells = [
            name,
            f"{row['steps']:,}",
            *row["faults"].values(),
            row["clipped"],
            row["skipped"],
            row["failures"] + len(row["wrong_counts"]),
            row["traces"],
            f"{row['mib_first']:.0f} to {row['mib_last']:.0f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, ""])


def environment() -> dict[str, str]:
    """What the figures depend on."""
    device = jax.devices()[0].device_kind
    versions = {"jax": jax.__version__, "optax": optax.__version__}
    return {"device": device, "python": platform.python_version(), **versions}


def main() -> None:
    """Runs, prints and writes after each method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these alone")
    parser.add_argument("--resume", action="store_true", help="keep what OUTPUT has")
    parser.add_argument("--output", type=pathlib.Path, help="write OUTPUT.json and .md")
    options = parser.parse_args()
    known = [*METHODS["EVERY"], STEPWISE]
    unknown = sorted(set(options.only or []) - set(known))
    if unknown:
        parser.error(f"no such method: {', '.join(unknown)}; there are {known}")
    rows: dict[str, Any] = {}
    file = options.output and options.output.with_suffix(".json")
    if options.resume and file and file.exists():
        rows = json.loads(file.read_text())["runs"]
    for name in tqdm(options.only or known, unit="method"):
        if options.resume and not options.only and name in rows:
            continue
        jax.clear_caches()
        rows[name] = soak(name, options.steps, options.seed)
        rows = {
            known_name: rows[known_name] for known_name in known if known_name in rows
        }
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            written = {"settings": environment(), "runs": rows}
            file.write_text(json.dumps(written, indent=1))
            text = markdown(rows, environment())
            options.output.with_suffix(".md").write_text(text)
    print(markdown(rows, environment()))
    raise SystemExit(any(failed(row) for row in rows.values()))


if __name__ == "__main__":
    main()
