"""What an adaptive threshold costs beyond a fixed one, in a step of Adam.

Each method in the place of `clip_by_global_norm`, as many bytes and operations as XLA
counts, and the time of alternated pairs. Methods that measure by leaf or unit stand
beside the fixed threshold of that scope. Those that remember something of each entry
need more passes, and stand beside the same rule in a few lines of JAX.

    python benchmarks/adaptive.py --output docs/results/adaptive
"""

import argparse
import pathlib
from typing import Any

import harness
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax

import optax_clipx as clipx

FIXED = {
    "tree": lambda: clipx.clip_by_global_norm(1.0),
    "leaf": lambda: clipx.clip_by_leaf_norm(1.0),
    "unit": lambda: clipx.clip_by(clipx.measures.unit_norms(), 1.0),
}
METHODS = {  # what each measures, and what it must read or write beyond that
    "zclip": ("tree", clipx.zclip, ""),
    "zclip, skip": ("tree", lambda: clipx.zclip(stats="skip"), ""),
    "quantile_clip": ("tree", clipx.quantile_clip, ""),
    "auto_clip": ("tree", clipx.auto_clip, ""),
    "quantile_clip, tracker": (
        "tree",
        lambda: clipx.quantile_clip(0.9, estimator="tracker"),
        "",
    ),
    "log_zscore_clip": ("tree", clipx.log_zscore_clip, ""),
    "norm_growth_clip": ("tree", clipx.norm_growth_clip, ""),
    "historical_update_clip": ("tree", clipx.historical_update_clip, ""),
    "smooth_clip": ("tree", lambda: clipx.smooth_clip(1.0), ""),
    "normalize_by_norm": ("tree", lambda: clipx.normalize_by_norm(1.0), ""),
    "adagc": ("leaf", clipx.adagc, ""),
    "olmo_ratio_clip": ("leaf", lambda: clipx.olmo_ratio_clip(1.1), ""),
    "adagc, tree": ("tree", lambda: clipx.adagc(scope="tree"), ""),
    "zclip, leaf": ("leaf", lambda: clipx.zclip(scope="leaf"), ""),
    "quantile_clip, tracker, units": (
        "unit",
        lambda: clipx.quantile_clip(
            0.9, estimator="tracker", scope=clipx.measures.unit_norms()
        ),
        "",
    ),
    "adaptive_grad_clip": (
        "unit",
        lambda: clipx.adaptive_grad_clip(0.01),
        "the parameters",
    ),
    "clip_by_second_moment": (
        "tree",
        clipx.clip_by_second_moment,
        "a second moment for each entry",
    ),
    "clip_by_second_moment, by hand": ("tree", lambda: spikes_by_hand(), "the same"),
    "mixed_clip": ("tree", lambda: clipx.mixed_clip(0.5), "a mean for each entry"),
    "mixed_clip, by hand": ("tree", lambda: mixture_by_hand(0.5), "the same"),
    "clip": ("tree", lambda: clipx.clip(0.1), "nothing"),
    "fixed, sanitize": (
        "tree",
        lambda: clipx.clip_by_global_norm(1.0, nonfinite="sanitize"),
        "nothing",
    ),
}


def whole_norm(tree: Any) -> jax.Array:
    """The norm, right while its square is in float32's range."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


def mixture_by_hand(limit: float, nu: float = 0.7, decay: float = 0.999) -> Any:
    """The mixture of clipped momentum and gradient in as few lines as it takes."""

    def update(grads: Any, means: Any, params: Any = None) -> Any:
        means = jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, means, grads)
        a = nu * jnp.minimum(1, limit / whole_norm(means))
        b = (1 - nu) * jnp.minimum(1, limit / whole_norm(grads))
        return jax.tree.map(lambda m, g: a * m + b * g, means, grads), means

    def init(params: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, params)

    return optax.GradientTransformation(init, update)


def spikes_by_hand(theta: float = 5000.0, decay: float = 0.999) -> Any:
    """SPAM's clipping in as few lines as it takes, with the norms before and after."""

    def clip(g: jax.Array, v: jax.Array) -> jax.Array:
        spike = (jnp.square(g) > theta * v) & (v > 0)
        return jnp.where(spike, jnp.sign(g) * jnp.sqrt(theta * v), g)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        out = jax.tree.map(clip, grads, state[0])
        moments = jax.tree.map(
            lambda v, u: decay * v + (1 - decay) * jnp.square(u), state[0], out
        )
        return out, (moments, jnp.stack([whole_norm(grads), whole_norm(out)]))

    def init(params: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, params), jnp.zeros((2,))

    return optax.GradientTransformation(init, update)


def step_of(clipper: Any, shapes: models.Shapes) -> tuple[Any, Any, Any]:
    """The compiled step of Adam, and a state to start from."""
    tx = optax.chain(clipper, optax.adam(1e-3))
    kinds = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, kinds)
    return harness.compiled(step, kinds, state, kinds, donate=(0, 1)), tx, state


def pairs(
    programs: dict[str, tuple[Any, Any]], shapes: models.Shapes, rounds: int, title: str
) -> harness.Times:
    """Milliseconds of each program; all share the parameters and Adam's state."""
    held = {"params": harness.normal_tree(0, shapes), "adam": None}
    grads = harness.normal_tree(1, shapes)

    def contender(program: Any, tx: Any) -> harness.Contender:
        clip, adam = tx.init(held["params"])
        own = {"clip": clip}
        if held["adam"] is None:
            held["adam"] = adam

        def run() -> None:
            held["params"], (own["clip"], held["adam"]) = program(
                held["params"], (own["clip"], held["adam"]), grads
            )
            jax.block_until_ready(held)

        return run

    contenders = {name: contender(*each) for name, each in programs.items()}
    return harness.alternate(contenders, rounds, title)


def measure(scope: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one scope: the fixed threshold first."""
    shapes = models.equal(options.megabytes, options.leaves)
    makers = {f"fixed, {scope}": FIXED[scope]}
    makers |= {name: make for name, (own, make, _) in METHODS.items() if own == scope}
    built = {name: step_of(make(), shapes) for name, make in makers.items()}
    bytes_of = {
        name: program.cost_analysis()["bytes accessed"]
        for name, (program, _, _) in built.items()
    }
    programs = {name: (program, tx) for name, (program, tx, _) in built.items()}
    times = pairs(programs, shapes, options.rounds, scope)
    fixed = next(iter(makers))
    return [
        {
            "method": name,
            "scope": scope,
            "more": METHODS[name][2] if name in METHODS else "",
            "bytes": bytes_of[name],
            "bytes_ratio": bytes_of[name] / bytes_of[fixed],
            "temporary": built[name][0].memory_analysis().temp_size_in_bytes,
            "state_numbers": int(
                sum(np.prod(x.shape) for x in jax.tree.leaves(built[name][2][0]))
            ),
            "ms": float(np.median(times[name])),
            "ratio": float(np.median(times[name] / times[fixed])),
        }
        for name in makers
    ]


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    head = ["method", "measures", "reads or writes besides", "MB moved"]
    head += ["bytes / fixed", "temporary MB", "numbers in its state", "time / fixed"]
    rows = [
        [
            row["method"],
            row["scope"],
            row["more"],
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['bytes_ratio']:.4f}",
            f"{row['temporary'] / 1e6:.1f}",
            f"{row['state_numbers']:,}",
            f"{row['ratio']:.3f}",
        ]
        for row in report["rows"]
    ]
    lines = [
        f"A whole step of Adam on {report['megabytes']:g} MB of float32 in"
        f" {report['leaves']} leaves; bytes as XLA counts them, times as the median"
        f" ratio of {report['rounds']} alternated rounds. Of a loop XLA counts one"
        " turn's bytes.",
        "",
        *harness.table(head, rows, 3),
    ]
    return "\n".join(lines + harness.footer(report))


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--leaves", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=101, help="alternated rounds")
    parser.add_argument("--output", type=pathlib.Path, help="write OUTPUT.json and .md")
    options = parser.parse_args()
    report = {
        "environment": harness.environment(),
        "megabytes": options.megabytes,
        "leaves": options.leaves,
        "rounds": options.rounds,
        "rows": [row for scope in FIXED for row in measure(scope, options)],
    }
    harness.write(options.output, report, markdown(report))


if __name__ == "__main__":
    main()
