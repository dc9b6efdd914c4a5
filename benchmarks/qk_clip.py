"""What QK-Clip does for a small transformer, at usual and at high learning rates.

Two layers with four heads learn to repeat a random text. For each optimizer and
learning rate the same runs are trained without QK-Clip, with three thresholds, and with
100 and a second forward pass, which finds the logits of the new weights; each with
three seeds.

    python benchmarks/qk_clip.py --output docs/results/qk_clip --picture docs/images
    python benchmarks/qk_clip.py --output docs/results/qk_clip --only "Adam 0.03"

What is measured replaces its rows in the output; the others stay.
"""

import argparse
import json
import pathlib
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import optax_clipx as clipx

WIDTH, HEADS, WORDS, LENGTH, BATCH = 64, 4, 32, 16, 16
THRESHOLDS = (np.inf, 100.0, 20.0, 5.0)
STRICT = 100.0  # the threshold with a second forward pass
SEEDS = (0, 1, 2)
KEPT = 5  # every so many steps stand in the report
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "Adam 0.003": lambda: optax.adam(0.003),
    "Adam 0.03": lambda: optax.adam(0.03),
    "Muon 0.02": lambda: optax.contrib.muon(0.02),
    "Muon 0.1": lambda: optax.contrib.muon(0.1),
}


class Block(nnx.Module):
    """Attention that records its largest logits, and a network of two layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(
            HEADS,
            WIDTH,
            use_bias=False,
            decode=False,
            attention_fn=clipx.qk.recording(nnx.dot_product_attention),
            rngs=rngs,
        )
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The activations after this block."""
        x = x + self.attention(self.norms[0](x), is_causal=True, sow_weights=True)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Repeater(nnx.Module):
    """Words in, logits of the next words out."""

    def __init__(self, rngs: nnx.Rngs):
        self.words = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.places = nnx.Embed(2 * LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, WORDS, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        """Logits at each place."""
        x = self.words(text) + self.places(jnp.arange(text.shape[1]))[None]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def texts(key: Any, number: int = BATCH) -> jax.Array:
    """Random words, and the same again."""
    words = jax.random.randint(key, (number, LENGTH), 0, WORDS)
    return jnp.concatenate([words, words], axis=1)


def loss_fn(params: Any, text: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss over the second half, and the largest logit of each head."""
    graph, _, rest = nnx.split(Repeater(nnx.Rngs(0)), nnx.Param, ...)
    model = nnx.merge(graph, params, rest)
    logits, sown = nnx.capture(model, nnx.Intermediate)(text)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, LENGTH - 1 : -1], text[:, LENGTH:]
    )
    return losses.mean(), clipx.qk.recorded(sown)


def train(
    name: str, threshold: Any, seed: Any, steps: int, strict: bool = False
) -> Any:
    """One run: loss and metrics of each step, and the held-out loss at its end.

    If it is strict, the weights after a step are clipped by their own logits.
    """
    model = Repeater(nnx.Rngs(jax.random.key(seed)))
    params = nnx.state(model, nnx.Param)
    layouts = clipx.qk.flax(params)
    within_step = clipx.qk_clip_updates(
        layouts, threshold=jnp.inf if strict else threshold
    )
    tx = optax.chain(OPTIMIZERS[name](), within_step)
    key = jax.random.key(seed + 100)

    def step(carry: Any, index: Any) -> Any:
        params, state = carry
        text = texts(jax.random.fold_in(key, index))
        (loss, maxima), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, text)
        updates, state = tx.update(grads, state, params, max_logits=maxima)
        params = optax.apply_updates(params, updates)
        seen = clipx.metrics(state)
        clipped = seen["qk/scale"] < 1
        if strict:
            _, after = loss_fn(params, text)
            params = clipx.qk_clip(params, after, layouts, threshold=threshold)
            clipped = jnp.any(jnp.concatenate(jax.tree.leaves(after)) > threshold)
        return (params, state), (loss, seen["qk/max_logit"], clipped)

    first = (params, tx.init(params))
    (params, _), found = jax.lax.scan(step, first, jnp.arange(steps))
    return found, loss_fn(params, texts(jax.random.key(7), 256))[0]


def measure(name: str, steps: int) -> dict[str, Any]:
    """All thresholds and seeds with one optimizer, in one program."""
    rows = _rows(name, THRESHOLDS, steps, strict=False)
    rows += _rows(name, (STRICT,), steps, strict=True)
    return {"optimizer": name, "steps": steps, "rows": rows}


def _rows(
    name: str, thresholds: tuple[float, ...], steps: int, strict: bool
) -> list[dict[str, Any]]:
    @jax.jit
    @jax.vmap
    def run(pair: Any) -> Any:
        return train(name, pair[0], pair[1].astype(jnp.int32), steps, strict)

    grid = [(threshold, seed) for threshold in thresholds for seed in SEEDS]
    (loss, logit, clipped), held_out = jax.device_get(run(jnp.asarray(grid)))
    rows = []
    for i, threshold in enumerate(thresholds):
        own = slice(i * len(SEEDS), (i + 1) * len(SEEDS))
        rows.append(
            {
                "threshold": None if np.isinf(threshold) else threshold,
                "strict": strict,
                "largest": logit[own].max(axis=1).tolist(),
                "above_100": (logit[own] > 100).mean(axis=1).tolist(),
                "clipped": clipped[own].mean(axis=1).tolist(),
                "held_out": held_out[own].tolist(),
                "logit": _short(logit[own]),
                "loss": _short(loss[own]),
            }
        )
    return rows


def _short(series: Any) -> Any:
    return [[float(f"{x:.3g}") for x in one] for one in series[:, ::KEPT]]


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    head = ["optimizer, learning rate", "threshold", "largest logit"]
    head += ["steps above 100", "clipped steps", "held-out loss, three seeds"]
    rows = []
    for table in report["tables"]:
        for row in table["rows"]:
            threshold = row["threshold"]
            losses = " ".join(f"{x:.3f}" for x in sorted(row["held_out"]))
            rows.append(
                [
                    table["optimizer"],
                    "none"
                    if threshold is None
                    else f"{threshold:g}" + ", two passes" * row["strict"],
                    f"{np.median(row['largest']):,.0f}",
                    f"{np.median(row['above_100']):.0%}",
                    f"{np.median(row['clipped']):.0%}",
                    losses,
                ]
            )
    steps = report["tables"][0]["steps"]
    about = (
        f"{steps} steps; the median of three seeds, and the held-out loss of each."
        f" Guessing has a loss of {np.log(WORDS):.2f}."
    )
    lines = [*harness.table(head, rows), "", about]
    return "\n".join(lines + harness.footer(report))


def draw(tables: list[dict[str, Any]], folder: pathlib.Path) -> None:
    """Largest logit and loss over the steps, at the two high learning rates."""
    import matplotlib.pyplot as plt

    from optax_clipx.runs.drawing import rc, theme_of

    found = {table["optimizer"]: table for table in tables}
    for theme in ("light", "dark"):
        colours = theme_of(theme)
        with plt.rc_context(rc(theme)):
            figure, axes = plt.subplots(
                2, 2, figsize=(9, 5.4), sharex=True, sharey="row", layout="constrained"
            )
            for column, name in zip(axes.T, ("Adam 0.03", "Muon 0.1"), strict=True):
                _draw_column(column, found[name], colours)
            axes[0, 0].set_ylabel("largest logit")
            axes[1, 0].set_ylabel("training loss")
            handles, labels = axes[0, 0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper left", ncols=4)
            figure.savefig(folder / f"qk_clip_{theme}.png", dpi=150)
            plt.close(figure)


def _draw_column(column: Any, table: dict[str, Any], colours: Any) -> None:
    steps = KEPT * np.arange(len(table["rows"][0]["loss"][0]))
    lines = (colours.lines[4], colours.lines[0], colours.lines[1])
    for row, colour in zip(table["rows"], lines, strict=False):
        threshold = row["threshold"]
        label = "no QK-Clip" if threshold is None else f"threshold {threshold:g}"
        for ax, field in zip(column, ("logit", "loss"), strict=True):
            for one in row[field]:
                ax.plot(steps, one, color=colour, lw=0.6, alpha=0.5)
            middle = np.median(row[field], axis=0)
            ax.plot(steps, middle, color=colour, lw=1.6, label=label)
    style = {"color": colours.limit, "lw": 1.0, "ls": (0, (5, 2))}
    column[0].axhline(100, label="a logit of 100", **style)
    column[0].set_title(table["optimizer"])
    column[1].set_xlabel("step")
    for ax in column:
        ax.set_yscale("log")


def main() -> None:
    """Measures, prints, writes and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=OPTIMIZERS, default=[*OPTIMIZERS])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=pathlib.Path, help="write OUTPUT.json and .md")
    parser.add_argument("--picture", type=pathlib.Path, help="draw into this folder")
    options = parser.parse_args()
    path = options.output.with_suffix(".json") if options.output else None
    kept = json.loads(path.read_text())["tables"] if path and path.exists() else []
    found = {table["optimizer"]: table for table in kept}
    found |= {name: measure(name, options.steps) for name in options.only}
    tables = [found[name] for name in OPTIMIZERS if name in found]
    report = {"environment": harness.environment(), "tables": tables}
    harness.write(options.output, report, markdown(report))
    if options.picture:
        draw(tables, options.picture)


if __name__ == "__main__":
    main()
