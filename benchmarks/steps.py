"""What clipping adds to a step of an optimizer, next to optax, PyTorch and by hand.

Every contender takes the same step on the same gradients, and all share the parameters
and the optimizer's state. Beside each stands what it has to read at least: its passes.

    python benchmarks/steps.py --output docs/results/steps
    python benchmarks/steps.py --layouts "GPT-2 small" --optimizers lion

What is measured replaces its table in the output; the others stay.
"""

import argparse
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax

import optax_clipx as clipx

LIMIT = 1.0
LAYOUTS: dict[str, Callable[[], models.Shapes]] = {
    "200 MB in 12 leaves": lambda: models.equal(200, 12),
    "200 MB in 450 leaves": lambda: models.equal(200, 450),
    **{name: make for name, make in models.MODELS.items() if name != "1B transformer"},
}
OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-3),
    "adamw": lambda: optax.adamw(1e-3),
    "sgd": lambda: optax.sgd(1e-3),
    "lion": lambda: optax.lion(1e-3),
}


def by_hand() -> optax.GradientTransformation:
    """The least code for it: a plain sum, and min(1, limit / norm) times each leaf."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in updates))
        scale = jnp.minimum(1.0, LIMIT / norm)
        return [x * scale for x in updates], state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


# What each needs: the name of its passes, or None where it needs none.
CLIPPERS: dict[str, tuple[Callable[[], Any], str | None]] = {
    "tree": (lambda: clipx.clip_by_global_norm(LIMIT), "tree"),
    "tree, metrics=False": (
        lambda: clipx.clip_by_global_norm(LIMIT, metrics=False),
        "tree",
    ),
    "zclip": (clipx.zclip, "tree"),
    "group": (
        lambda: clipx.clip_by_group_norm(
            {0: LIMIT, 1: LIMIT}, lambda path, leaf: int(path[0]) % 2
        ),
        "tree",
    ),
    "leaf": (lambda: clipx.clip_by_leaf_norm(LIMIT), "leaf"),
    "unit (AGC)": (lambda: clipx.adaptive_grad_clip(0.01), "units of both"),
    "element": (lambda: clipx.clip(0.1), None),
    "optax tree": (lambda: optax.clip_by_global_norm(LIMIT), "tree"),
    "optax leaf": (lambda: optax.clip_by_block_rms(LIMIT), "leaf"),
    "optax unit (AGC)": (lambda: optax.adaptive_grad_clip(0.01), "units of both"),
    "by hand, tree": (by_hand, "tree"),
}
OF_OPTAX = {
    "tree": "optax tree",
    "leaf": "optax leaf",
    "unit (AGC)": "optax unit (AGC)",
}


def passes(grads: Any, params: Any) -> dict[str, harness.Contender]:
    """The reads that each scope needs at least, compiled by themselves."""

    def units(x: jax.Array) -> jax.Array:
        axis = 0 if x.ndim in (2, 3) else tuple(range(max(1, x.ndim - 1)))
        return jnp.sqrt(jnp.sum(jnp.square(x), axis))

    functions = {
        "tree": optax.tree.norm,
        "leaf": lambda g: [jnp.sqrt(jnp.sum(jnp.square(x))) for x in g],
    }
    found = {}
    for name, function in functions.items():
        program = harness.compiled(function, grads)
        found[name] = lambda program=program: jax.block_until_ready(program(grads))
    both = harness.compiled(lambda g, p: list(map(units, [*g, *p])), grads, params)
    found["units of both"] = lambda: jax.block_until_ready(both(grads, params))
    return found


def jax_contenders(optimizer: Any, params: Any, grads: Any) -> Any:
    """A compiled step with each clipper, and what each holds besides in memory.

    Parameters and states are donated.
    """
    held = {"params": params, "state": optimizer.init(params)}
    memory = {}

    def contender(name: str, clipper: Any) -> harness.Contender:
        def step(params: Any, clip: Any, state: Any, grads: Any) -> Any:
            updates, clip = clipper.update(grads, clip, params)
            updates, state = optimizer.update(updates, state, params)
            return optax.apply_updates(params, updates), clip, state

        own = {"clip": clipper.init(held["params"])}
        program = harness.compiled(
            step, held["params"], own["clip"], held["state"], grads, donate=(0, 1, 2)
        )
        memory[name] = {
            "state_bytes": sum(x.nbytes for x in jax.tree.leaves(own)),
            "temp_bytes": program.memory_analysis().temp_size_in_bytes,
        }

        def run() -> None:
            held["params"], own["clip"], held["state"] = program(
                held["params"], own["clip"], held["state"], grads
            )
            jax.block_until_ready(held)

        return run

    found = {"alone": contender("alone", optax.identity())}
    for name, (make, _) in CLIPPERS.items():
        found[name] = contender(name, make())
    return found, memory


def torch_contenders(shapes: models.Shapes) -> dict[str, harness.Contender]:
    """PyTorch's Adam, alone and after clip_grad_norm_."""
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed: its rows are left out.")
        return {}
    torch.set_num_threads(os.cpu_count() or 1)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    params = [torch.nn.Parameter(torch.randn(s, device=device)) for s in shapes]
    grads = [torch.randn(s, device=device) for s in shapes]

    def contender(optimizer: Any, clip: bool, foreach: bool) -> harness.Contender:
        def run() -> None:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            if clip:
                torch.nn.utils.clip_grad_norm_(params, LIMIT, foreach=foreach)
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    found = {}
    for foreach in (True, False):
        optimizer = torch.optim.Adam(params, lr=1e-3, foreach=foreach)
        kind = " foreach" if foreach else ""
        found[f"torch Adam{kind}"] = contender(optimizer, False, foreach)
        found[f"torch tree{kind}"] = contender(optimizer, True, foreach)
    return found


def measure(layout: str, optimizer: str, rounds: int) -> dict[str, Any]:
    """The table of one layout and optimizer."""
    shapes = LAYOUTS[layout]()
    params, grads = harness.normal_tree(0, shapes), harness.normal_tree(1, shapes)
    kept = jax.tree.map(jnp.copy, params)  # the steps donate the others
    contenders, memory = jax_contenders(OPTIMIZERS[optimizer](), params, grads)
    reads = passes(grads, kept)
    torch = torch_contenders(shapes) if optimizer == "adam" else {}
    all_of_them = contenders | {f"pass: {k}": run for k, run in reads.items()} | torch
    times = harness.alternate(all_of_them, rounds, f"{layout}, {optimizer}")
    rows = {}
    for name, took in times.items():
        alone = times[_alone(name)]
        row = {"ms": float(np.median(took)), "ratio": float(np.median(took / alone))}
        if name in CLIPPERS:
            row["added_ms"] = float(np.median(took - alone))
            row["added_quartiles"] = np.percentile(took - alone, [25, 75]).tolist()
            needed = CLIPPERS[name][1]
            if needed:
                read = times[f"pass: {needed}"]
                row["added_over_pass"] = row["added_ms"] / float(np.median(read))
        row |= memory.get(name, {})
        if name in OF_OPTAX:
            row["of_optax"] = float(np.median(took / times[OF_OPTAX[name]]))
        rows[name] = row
    size = 4 * sum(map(math.prod, shapes))
    facts = {"megabytes": size / 1e6, "leaves": len(shapes), "rounds": rounds}
    facts["environment"] = harness.environment()
    return {"layout": layout, "optimizer": optimizer, **facts, "rows": rows}


def _alone(name: str) -> str:
    if not name.startswith("torch"):
        return "alone"
    return "torch Adam foreach" if name.endswith("foreach") else "torch Adam"


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = []
    for found in report["tables"]:
        lines += [
            f"## {found['layout']}, {found['optimizer']}",
            "",
            f"{found['megabytes']:.0f} MB of float32 in {found['leaves']} leaves,"
            f" medians of {found['rounds']} alternated rounds.",
            "",
        ]
        if found.get("environment", report["environment"]) != report["environment"]:
            lines += [f"Measured elsewhere: {found['environment']}.", ""]
        head = ["step", "ms", "ratio to the optimizer alone", "adds ms"]
        head += ["added / own passes", "whole step / optax's"]
        head += ["state, bytes", "temporaries, MB"]
        rows = []
        for name, row in found["rows"].items():
            cells = [name, f"{row['ms']:.1f}", f"{row['ratio']:.2f}"]
            cells.append(f"{row['added_ms']:.1f}" if "added_ms" in row else "")
            cells += [
                f"{row[key]:.2f}" if key in row else ""
                for key in ("added_over_pass", "of_optax")
            ]
            if "temp_bytes" in row:
                cells += [f"{row['state_bytes']:,}", f"{row['temp_bytes'] / 1e6:.2f}"]
            rows.append([*cells, *[""] * (len(head) - len(cells))])
        lines += [*harness.table(head, rows), ""]
    return "\n".join(lines + harness.footer(report))


def merged(
    tables: list[dict[str, Any]], output: pathlib.Path | None
) -> list[dict[str, Any]]:
    """The tables that the output has, with those measured now in their places."""
    path = output.with_suffix(".json") if output else None
    kept = json.loads(path.read_text())["tables"] if path and path.exists() else []
    found = {(x["layout"], x["optimizer"]): x for x in [*kept, *tables]}
    return list(found.values())


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=[*LAYOUTS])
    parser.add_argument(
        "--optimizers", nargs="+", choices=OPTIMIZERS, default=[*OPTIMIZERS]
    )
    parser.add_argument("--rounds", type=int, default=41, help="alternated rounds")
    parser.add_argument("--output", type=pathlib.Path, help="write OUTPUT.json and .md")
    options = parser.parse_args()
    tables = []
    for layout in options.layouts:
        for optimizer in options.optimizers:
            # The other optimizers on one layout: they read the same gradients.
            if optimizer == options.optimizers[0] or layout == options.layouts[0]:
                tables.append(measure(layout, optimizer, options.rounds))
                jax.clear_caches()
    report = {
        "environment": harness.environment(),
        "tables": merged(tables, options.output),
    }
    harness.write(options.output, report, markdown(report))


if __name__ == "__main__":
    main()
