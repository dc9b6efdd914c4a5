"""Draws every method at work on the same run, for the pages of the methods.

The run has what real ones have: a level that falls, noise of 10%, one norm 30 times as
large, two of 5 times close together, and a level that is 4 times as high from step 200
on. Gradients have 64 entries, of which in the two spikes one is large.

    python docs/make_methods.py
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import optax_clipx as clipx
from optax_clipx.runs.drawing import rc, theme_of

ROOT = Path(__file__).resolve().parent.parent
SPIKES = {80: 30.0, 150: 5.0, 154: 5.0}
METHODS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "clip": lambda: clipx.clip(0.3),
    "clip_by_global_norm": lambda: clipx.clip_by_global_norm(2.0),
    "clip_by_leaf_norm": lambda: clipx.clip_by_leaf_norm(1.5),
    "clip_by_block_rms": lambda: clipx.clip_by_block_rms(0.25),
    "clip_by_spectral_norm": lambda: clipx.clip_by_spectral_norm(1.0),
    "adaptive_grad_clip": lambda: clipx.adaptive_grad_clip(0.2),
    "auto_clip": clipx.auto_clip,
    "zclip": clipx.zclip,
    "quantile_clip": clipx.quantile_clip,
    "quantile_clip_tracker": lambda: clipx.quantile_clip(0.9, estimator="tracker"),
    "adagc": lambda: clipx.adagc(warmup_steps=20, warmup_max_norm=2.0),
    "olmo_ratio_clip": lambda: clipx.olmo_ratio_clip(1.5),
    "norm_growth_clip": clipx.norm_growth_clip,
    "log_zscore_clip": clipx.log_zscore_clip,
    "historical_update_clip": clipx.historical_update_clip,
    "smooth_clip": lambda: clipx.smooth_clip(2.0),
    "normalize_by_norm": clipx.normalize_by_norm,
    "skip_spikes": lambda: clipx.skip_spikes(optax.identity()),
    "error_feedback": lambda: clipx.error_feedback(clipx.clip_by_global_norm(2.0)),
    "cautious": lambda: clipx.cautious(optax.sgd(0.1, momentum=0.9)),
    "scale_by_stable_adam": clipx.scale_by_stable_adam,
    "clip_by_second_moment": lambda: clipx.clip_by_second_moment(100.0),
    "stabilize_norm": clipx.stabilize_norm,
    "scale_by_acclip": clipx.scale_by_acclip,
    "mixed_clip": lambda: clipx.mixed_clip(2.0),
}
THEMES = ("light", "dark")
# Their thresholds are not of the norm that is drawn.
OF_OTHERS = ("clip", "clip_by_second_moment", "stabilize_norm", "clip_by_leaf_norm")
OF_OTHERS += ("clip_by_block_rms", "clip_by_spectral_norm", "scale_by_stable_adam")
# What the 64 entries are where they are no vector.
FORMS: dict[str, Callable[[Any], Any]] = {
    "clip_by_leaf_norm": lambda x: jnp.split(x, 2),
    "clip_by_block_rms": lambda x: jnp.split(x, 2),
    "clip_by_spectral_norm": lambda x: x.reshape(8, 8),
}


def run(steps: int = 300) -> np.ndarray:
    """The gradients: steps by 64 entries."""
    rng = np.random.default_rng(0)
    level = 0.7 + 1.5 * np.exp(-np.arange(steps) / 40)
    level[200:] *= 4
    norms = level * np.exp(0.1 * rng.normal(size=steps))
    gradients = rng.normal(size=(steps, 64))
    for step, factor in SPIKES.items():
        norms[step] *= factor
        gradients[step, 0] = 5 * np.abs(gradients[step]).max()
    gradients /= np.linalg.norm(gradients, axis=1, keepdims=True)
    return (gradients * norms[:, None]).astype(np.float32)


def at_work(name: str, gradients: Any) -> Any:
    """The norm after each step, and the threshold where the method has one."""
    tx, form = METHODS[name](), FORMS.get(name, lambda x: x)
    params = form(jnp.full(64, 1 / 8.0))

    def step(state: Any, grads: Any) -> Any:
        updates, state = tx.update(form(grads), state, params)
        seen = clipx.metrics(state)
        kind = "skip" if "skip/threshold" in seen else "clip"
        limit = seen.get(f"{kind}/threshold", jnp.nan)
        return state, (optax.tree.norm(updates), jnp.asarray(limit, jnp.float32))

    return jax.jit(lambda g: jax.lax.scan(step, tx.init(params), g)[1])(gradients)


def draw(name: str, theme: str, before: Any, after: Any, limits: Any) -> Any:
    """The picture of one method."""
    colours = theme_of(theme)
    grey = colours.lines[4]
    figure, ax = plt.subplots(figsize=(8, 3), layout="constrained")
    steps = np.arange(len(before))
    ax.plot(steps, before, color=grey, lw=1.2, label="norm before")
    ax.plot(steps, after, color=colours.norm, lw=1.4, label="norm after")
    drawn = np.where((limits > 0) & (limits < 1e3), limits, np.nan)
    if np.isfinite(drawn).any() and name not in OF_OTHERS:
        style = {"color": colours.limit, "lw": 1.2, "ls": (0, (5, 2))}
        ax.plot(steps, drawn, label="threshold", **style)
    ax.set_yscale("log")
    ax.set_ylim(max(0.02, 0.5 * after[after > 0].min()), 1.5 * before.max())
    ax.set(xlabel="step", ylabel="norm")
    place = {"loc": "lower left", "bbox_to_anchor": (0, 0.99), "borderaxespad": 0.2}
    ax.legend(ncols=3, **place)
    return figure


def main() -> None:
    """Runs every method on the run, and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "images" / "methods"
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    gradients = run()
    before = np.linalg.norm(gradients, axis=1)
    for name in options.only:
        after, limits = map(np.asarray, at_work(name, gradients))
        for theme in THEMES:
            with plt.rc_context(rc(theme)):
                figure = draw(name, theme, before, after, limits)
                figure.savefig(options.output / f"{name}_{theme}.png", dpi=150)
                plt.close(figure)
    print(f"Wrote {2 * len(options.only)} pictures to {options.output}.")


if __name__ == "__main__":
    main()
