"""Sums of clipped per-example gradients, next to jax_privacy and optax.

Every contender computes the same sum of the same batch, one after the other in each
round, so that a slow minute of the machine hits all of them. Medians of ratios are
printed, and written with the environment as JSON and Markdown.

    pip install jax-privacy
    python benchmarks/per_example.py --output docs/results/per_example
"""

import argparse
import itertools
import pathlib
import platform
from importlib.metadata import version
from typing import Any

import harness
import jax
import jax.numpy as jnp
import jax_privacy.clipping
import numpy as np
import optax

import optax_clipx as clipx

LIMIT = 1.0


def network(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """The loss of one example: layers with ReLU, cross-entropy."""
    for kernel, bias in params[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    kernel, bias = params[-1]
    return optax.softmax_cross_entropy_with_integer_labels(x @ kernel + bias, y)


def convolutions(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """The loss of one example: two convolutions and a linear layer."""
    x = x[None]
    for kernel in params[:-1]:
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=dims
        )
        x = jax.nn.relu(x)
    logits = x.reshape(-1) @ params[-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def tasks(examples: int) -> dict[str, tuple[Any, Any, jax.Array, jax.Array]]:
    """Function, parameters, inputs and labels of each task."""
    keys = iter(jax.random.split(jax.random.key(0), 20))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) * shape[-2] ** -0.5

    labels = jax.random.randint(next(keys), (examples,), 0, 10)
    found = {}
    for width in (64, 256, 512):
        sizes = (64, width, width, 10)
        layers = [(normal(a, b), jnp.zeros(b)) for a, b in itertools.pairwise(sizes)]
        inputs = normal(examples, 64) * 8
        found[f"dense, width {width}"] = network, layers, inputs, labels
    filters = [normal(3, 3, 3, 32), normal(3, 3, 32, 64), normal(8 * 8 * 64, 10)]
    images = normal(examples, 32, 32, 3)
    found["convolutions"] = convolutions, filters, images, labels
    return found


def contenders(fun: Any, microbatch_size: int | None) -> dict[str, Any]:
    """Functions from parameters and batch to the sum."""

    def ours(**options: Any) -> Any:
        grad_fn = clipx.per_example.clipped_grad(
            fun,
            LIMIT,
            batch_argnums=(1, 2),
            microbatch_size=microbatch_size,
            **options,
        )
        return lambda *args: grad_fn(*args)[0]

    found = {
        "clipped_grad": ours(),
        "clipped_grad, two_pass": ours(two_pass=True),
        "jax_privacy.clipped_grad": jax_privacy.clipping.clipped_grad(
            fun,
            l2_clip_norm=LIMIT,
            batch_argnums=(1, 2),
            keep_batch_dim=False,
            microbatch_size=microbatch_size,
        ),
    }
    if microbatch_size is None:
        each = jax.vmap(jax.grad(fun), (None, 0, 0))
        found["per_example_global_norm_clip (ours)"] = lambda *args: (
            clipx.per_example_global_norm_clip(each(*args), LIMIT)[0]
        )
        found["per_example_global_norm_clip (optax)"] = lambda *args: (
            optax.per_example_global_norm_clip(each(*args), LIMIT)[0]
        )
    found["no clipping"] = lambda params, *batch: jax.grad(
        lambda p: jnp.sum(jax.vmap(fun, (None, 0, 0))(p, *batch))
    )(params)
    return found


def measure(
    name: str, examples: int, microbatch_size: int | None, rounds: int
) -> dict[str, Any]:
    """The table of one task."""
    fun, *args = tasks(examples)[name]
    programs, sums = {}, {}
    for who, step in contenders(fun, microbatch_size).items():
        programs[who] = jax.jit(step).lower(*args).compile()
        sums[who] = jax.block_until_ready(programs[who](*args))
    check(sums)
    runs = {
        who: lambda program=program: jax.block_until_ready(program(*args))
        for who, program in programs.items()
    }
    times = harness.alternate(runs, rounds, name)
    return {
        "task": name,
        "parameters": sum(x.size for x in jax.tree.leaves(args[0])),
        "examples": examples,
        "microbatch_size": microbatch_size,
        "rounds": rounds,
        "median_ms": {who: float(np.median(t)) for who, t in times.items()},
        "ratio_to_clipped_grad": {
            who: float(np.median(t / times["clipped_grad"])) for who, t in times.items()
        },
        "temporary_megabytes": {
            who: program.memory_analysis().temp_size_in_bytes / 1e6
            for who, program in programs.items()
        },
    }


def check(sums: dict[str, Any]) -> None:
    """All but the last compute the same sum."""
    want = np.concatenate([x.ravel() for x in jax.tree.leaves(sums["clipped_grad"])])
    for who, found in sums.items():
        if who != "no clipping":
            flat = np.concatenate([x.ravel() for x in jax.tree.leaves(found)])
            error = np.abs(flat - want).max() / np.abs(want).max()
            assert error < 1e-5, f"{who} is off by {error}"


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = []
    for table in report["tables"]:
        size = table["microbatch_size"]
        lines += [
            f"## {table['task']}, {table['parameters']:,} parameters,"
            f" {table['examples']} examples, "
            + ("all at a time" if size is None else f"{size} at a time"),
            "",
            f"Medians of {table['rounds']} alternated rounds.",
            "",
            "| sum of gradients | ms | ratio to `clipped_grad` | temporary MB |",
            "|---|---:|---:|---:|",
        ]
        for who, ms in table["median_ms"].items():
            ratio = table["ratio_to_clipped_grad"][who]
            memory = table["temporary_megabytes"][who]
            lines.append(f"| {who} | {ms:.2f} | {ratio:.2f} | {memory:.3f} |")
        lines.append("")
    return "\n".join(lines + harness.footer(report))


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--microbatch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=31, help="alternated rounds")
    parser.add_argument("--output", type=pathlib.Path, help="write OUTPUT.json and .md")
    options = parser.parse_args()
    tables = []
    for name in tasks(1):
        for size in (None, options.microbatch_size):
            tables.append(measure(name, options.examples, size, options.rounds))
            print(name, size, tables[-1]["ratio_to_clipped_grad"], flush=True)
    env = {**harness.environment(), "jax_privacy": version("jax_privacy")}
    report = {"environment": {**env, "system": platform.system()}, "tables": tables}
    harness.write(options.output, report, markdown(report))


if __name__ == "__main__":
    main()
