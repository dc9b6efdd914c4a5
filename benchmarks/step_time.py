"""What clipping adds to a step of Adam, next to optax and PyTorch.

Every contender takes the same step on the same gradients, one after the other in each
round, so that a slow minute of the machine hits all of them. Medians and ratios are
printed, and written with the environment as JSON and Markdown.

    python benchmarks/step_time.py --megabytes 200 --leaves 12 450
"""

import argparse
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import optax_clipx as clipx

LIMIT = 1.0
Contender = Callable[[], None]


def shapes(megabytes: float, leaves: int) -> list[tuple[int, int]]:
    """Equal float32 matrices of 64 columns."""
    rows = int(megabytes * 1e6 / 4 / leaves / 64)
    return [(rows, 64)] * leaves


def jax_tree(seed: int, kinds: list[tuple[int, int]]) -> list[jax.Array]:
    """Normal entries."""
    key = jax.random.key(seed)
    return [
        jax.random.normal(jax.random.fold_in(key, i), shape)
        for i, shape in enumerate(kinds)
    ]


def jax_contender(optimizer: Any, kinds: list[tuple[int, int]]) -> Contender:
    """One compiled step of an optimizer, parameters and state donated."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    grads, params = jax_tree(1, kinds), jax_tree(0, kinds)
    held = {"params": params, "state": optimizer.init(params)}
    compiled = (
        jax.jit(step, donate_argnums=(0, 1))
        .lower(held["params"], held["state"], grads)
        .compile()
    )

    def run() -> None:
        held["params"], held["state"] = compiled(held["params"], held["state"], grads)
        jax.block_until_ready(held["params"])

    return run


def norm_contender(norm: Callable[[Any], jax.Array], kinds: Any) -> Contender:
    """One read of the gradients."""
    grads = jax_tree(1, kinds)
    compiled = jax.jit(norm).lower(grads).compile()
    return lambda: jax.block_until_ready(compiled(grads)) and None


def torch_contenders(kinds: list[tuple[int, int]]) -> dict[str, Contender]:
    """PyTorch's Adam, alone and after clip_grad_norm_."""
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed: pip install torch for its rows.")
        return {}
    torch.set_num_threads(os.cpu_count() or 1)

    def contender(clip: bool, foreach: bool) -> Contender:
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in kinds]
        for param in params:
            param.grad = torch.randn(param.shape)
        optimizer = torch.optim.Adam(params, lr=1e-3, foreach=foreach)
        grads = [param.grad.clone() for param in params]

        def run() -> None:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            if clip:
                torch.nn.utils.clip_grad_norm_(params, LIMIT, foreach=foreach)
            optimizer.step()

        return run

    return {
        f"torch Adam{name}{' foreach' if foreach else ''}": contender(clip, foreach)
        for foreach in (True, False)
        for clip, name in ((False, ""), (True, " + clip_grad_norm_"))
    }


def alternate(contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each contender, round by round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def measure(megabytes: float, leaves: int, rounds: int) -> dict[str, Any]:
    """The table of one size."""
    kinds = shapes(megabytes, leaves)
    adam = optax.adam(1e-3)
    contenders = {
        "Adam": jax_contender(adam, kinds),
        "Adam + ours": jax_contender(
            optax.chain(clipx.clip_by_global_norm(LIMIT), adam), kinds
        ),
        "Adam + ours, metrics=False": jax_contender(
            optax.chain(clipx.clip_by_global_norm(LIMIT, metrics=False), adam), kinds
        ),
        "Adam + zclip": jax_contender(optax.chain(clipx.zclip(), adam), kinds),
        "Adam + optax": jax_contender(
            optax.chain(optax.clip_by_global_norm(LIMIT), adam), kinds
        ),
        "norm pass (optax.tree.norm)": norm_contender(optax.tree.norm, kinds),
        "norm pass (ours)": norm_contender(clipx.functional.global_norm, kinds),
        **torch_contenders(kinds),
    }
    times = {name: np.array(t) for name, t in alternate(contenders, rounds).items()}
    # Differences within a round cancel what slows the whole machine for a while.
    added = times["Adam + ours"] - times["Adam"]
    adaptive = times["Adam + zclip"] / times["Adam + ours"]
    norm = times["norm pass (optax.tree.norm)"]
    quartiles = np.percentile(added, [25, 75])
    return {
        "megabytes": megabytes,
        "leaves": leaves,
        "rounds": rounds,
        "median_ms": {name: float(np.median(t)) for name, t in times.items()},
        "ratio_to_adam": {
            name: float(np.median(t / times[_alone(name)])) for name, t in times.items()
        },
        "added_by_ours_ms": float(np.median(added)),
        "added_quartiles_ms": quartiles.tolist(),
        "adaptive_over_fixed": float(np.median(adaptive)),
        "norm_pass_ms": float(np.median(norm)),
        "added_over_norm_pass": float(np.median(added) / np.median(norm)),
    }


def _alone(name: str) -> str:
    """The optimizer without clipping to which a contender is compared."""
    if not name.startswith("torch"):
        return "Adam"
    return "torch Adam foreach" if name.endswith("foreach") else "torch Adam"


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "cpu_count": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = []
    for table in report["tables"]:
        lines += [
            f"## {table['megabytes']:g} MB of float32 in {table['leaves']} leaves",
            "",
            f"Medians of {table['rounds']} alternated rounds.",
            "",
            "| step | ms | ratio to the optimizer alone |",
            "|---|---:|---:|",
        ]
        for name, ms in table["median_ms"].items():
            lines.append(f"| {name} | {ms:.1f} | {table['ratio_to_adam'][name]:.2f} |")
        low, high = table["added_quartiles_ms"]
        lines += [
            "",
            f"Ours adds {table['added_by_ours_ms']:.1f} ms (quartiles {low:.1f} to"
            f" {high:.1f}); one norm pass takes {table['norm_pass_ms']:.1f} ms: ratio"
            f" {table['added_over_norm_pass']:.2f}. `zclip` instead of the fixed limit:"
            f" the step takes {table['adaptive_over_fixed']:.3f} times as long (median"
            f" of {table['rounds']} pairs).",
            "",
        ]
    env = ", ".join(f"{key} {value}" for key, value in report["environment"].items())
    return "\n".join([*lines, f"Environment: {env}.", ""])


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--megabytes", type=float, default=200, help="size of the leaves"
    )
    parser.add_argument("--leaves", type=int, nargs="+", default=[12, 450])
    parser.add_argument("--rounds", type=int, default=41, help="alternated rounds")
    parser.add_argument("--output", type=pathlib.Path, help="write OUTPUT.json and .md")
    options = parser.parse_args()
    tables = []
    for leaves in options.leaves:
        print(f"{options.megabytes:g} MB in {leaves} leaves ...", flush=True)
        tables.append(measure(options.megabytes, leaves, options.rounds))
    report = {"environment": environment(), "tables": tables}
    print(markdown(report))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".json").write_text(json.dumps(report, indent=1))
        options.output.with_suffix(".md").write_text(markdown(report))


if __name__ == "__main__":
    main()
