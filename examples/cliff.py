"""The cliff in a recurrent network's error, and two ways to meet it.

A network of one unit, x_t = w sigmoid(x_{t-1}) + b, runs 50 steps from x_0 = 0.5, and
its error is (sigmoid(x_50) - 0.7)^2. Over w and b the error has a cliff: there the unit
stands between two states of rest, and 50 steps make a great change of a small one. The
gradient on the cliff is thousands of times larger than beside it, and one step of
gradient descent throws the parameters far away. Clipping the norm keeps the direction
of the step and limits its length.

    python examples/cliff.py

After figure 6 of Pascanu, Mikolov and Bengio, On the difficulty of training recurrent
neural networks, 2013, arXiv 1211.5063.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pictures
from jaxtyping import Array, Float
from matplotlib.axes import Axes

import optax_clipx as clipx

WEIGHTS, BIASES = (4.0, 6.4), (-3.4, -1.2)  # the part of the plane that is drawn


class Descent(NamedTuple):
    """The steps of gradient descent, and where it ended.

    Attributes:
        params: w and b before each step, and after the last.
        errors: the error there.
        norms: the gradient's norm before clipping, for each step.
        num_clipped: how many steps were clipped.
    """

    params: Float[Array, "point 2"]
    errors: Float[Array, " point"]
    norms: Float[Array, " step"]
    num_clipped: int


def error(params: Float[Array, "2"]) -> Float[Array, ""]:
    """The error of the network with the weight and the bias in ``params``."""
    weight, bias = params

    def step(_: int, state: Array) -> Array:
        return weight * jax.nn.sigmoid(state) + bias

    last = jax.lax.fori_loop(0, 50, step, jnp.asarray(0.5))
    return (jax.nn.sigmoid(last) - 0.7) ** 2


def descend(
    start: tuple[float, float], learning_rate: float, max_norm: float, num_steps: int
) -> Descent:
    """Gradient descent with clipped gradients; an infinite threshold only measures."""
    optimizer = optax.chain(
        clipx.clip_by_global_norm(max_norm), optax.sgd(learning_rate)
    )

    def step(carry: Any, _: None) -> tuple[Any, tuple[Array, Array]]:
        params, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(error)(params), opt_state)
        norm = clipx.metrics(opt_state)["clip/norm"]
        return (optax.apply_updates(params, updates), opt_state), (params, norm)

    @jax.jit
    def run(params: Array) -> Any:
        carry = params, optimizer.init(params)
        carry, (path, norms) = jax.lax.scan(step, carry, length=num_steps)
        path = jnp.vstack([path, carry[0]])
        return path, jax.vmap(error)(path), norms, carry[1]

    path, errors, norms, opt_state = run(jnp.asarray(start))
    num_clipped = int(clipx.metrics(opt_state)["clip/num_clipped"])
    return Descent(path, errors, norms, num_clipped)


def report(name: str, descent: Descent) -> None:
    """Prints what a path met and where it ended."""
    worst = int(descent.norms.argmax())
    length = float(jnp.linalg.norm(descent.params[worst + 1] - descent.params[worst]))
    print(
        f"{name}:\n"
        f"  largest norm {descent.norms[worst]:.4g} in step {worst + 1}"
        f" (median {jnp.median(descent.norms):.2g}); that step was {length:.3g} long\n"
        f"  from w, b = {point(descent.params[worst])}"
        f" to {point(descent.params[worst + 1])}\n"
        f"  ends at {point(descent.params[-1])} with error {descent.errors[-1]:.2g};"
        f" {descent.num_clipped} of {len(descent.norms)} steps clipped"
    )


def point(params: Float[Array, "2"]) -> str:
    """A point as text."""
    return f"({params[0]:.2f}, {params[1]:.2f})"


def draw(unclipped: Descent, clipped: Descent, max_norm: float, path: Path) -> None:
    """Draws the surface, and both paths on its map."""
    weights, biases = np.meshgrid(np.linspace(*WEIGHTS, 400), np.linspace(*BIASES, 400))
    grid = jnp.stack([weights.ravel(), biases.ravel()], axis=-1)
    errors = np.asarray(jax.jit(jax.vmap(error))(grid)).reshape(weights.shape)

    landscape = weights, biases, errors
    for theme in ("light", "dark"):
        with pictures.style(theme) as colours:
            figure = plt.figure(figsize=(11, 5))
            surface = figure.add_axes((0.06, 0.04, 0.41, 0.84), projection="3d")
            draw_surface(surface, landscape, colours)
            plane = figure.add_axes((0.53, 0.12, 0.46, 0.74))
            draw_plane(plane, landscape, theme)
            blue, orange = colours.lines[:2]
            without = {"ms": 3.5, "zorder": 4, "label": "without clipping"}
            draw_path(plane, unclipped, orange, **without)
            label = f"clip_by_global_norm({max_norm:g})"
            draw_path(plane, clipped, blue, ms=6, zorder=3, label=label)
            draw_exit(plane, unclipped, colours)
            start = unclipped.params[0]
            plane.plot(*start, "o", ms=9, color=colours.text, zorder=6)
            beside = {"xytext": (9, 4), "textcoords": "offset points"}
            plane.annotate("start", start, **beside)
            above = {"loc": "lower left", "bbox_to_anchor": (0, 0.99)}
            plane.legend(ncols=2, borderaxespad=0.2, **above)
            pictures.save(figure, path, theme)


def draw_surface(axis: Axes, landscape: Any, colours: Any) -> None:
    """The error as a landscape."""
    dark = colours.page != "#ffffff"
    axis.plot_surface(
        *landscape,
        color="0.25" if dark else "0.93",
        edgecolor="0.7" if dark else "0.3",
        lw=0.25,
        rcount=60,
        ccount=60,
        shade=False,
    )
    axis.set(xlabel="weight w", ylabel="bias b")
    axis.set_zlabel("error", labelpad=10)
    for part in (axis.xaxis, axis.yaxis, axis.zaxis):
        part.set_pane_color(colours.page)
    axis.set_title("The error has a cliff")
    axis.view_init(elev=28, azim=35)
    axis.set_box_aspect(None, zoom=0.9)


def draw_plane(axis: Axes, landscape: Any, theme: str) -> None:
    """The error as a map: low is as bright or dark as the page."""
    weights, biases, errors = landscape
    levels = np.linspace(0, errors.max(), 25)
    # Half of the colour map: no grey is so dark that the paths are hard to see.
    grey = {"cmap": "Greys" if theme == "light" else "gray", "vmax": 2 * errors.max()}
    areas = axis.contourf(weights, biases, errors, levels, **grey)
    label = "error (lower is better)"
    axis.figure.colorbar(areas, ax=axis, label=label, format="%.2f")
    axis.grid(False)
    axis.set(xlabel="weight w", ylabel="bias b", xlim=WEIGHTS, ylim=BIASES)
    axis.set_title("Gradient descent meets it", pad=28)


def draw_path(axis: Axes, descent: Descent, colour: str, **style: Any) -> None:
    """A path with a dot for each step."""
    axis.plot(
        *np.asarray(descent.params).T,
        marker="o",
        mec="white",
        mew=0.5,
        lw=1.6,
        color=colour,
        **style,
    )


def draw_exit(axis: Axes, descent: Descent, colours: Any) -> None:
    """Says where a path goes that leaves the picture."""
    params = np.asarray(descent.params)
    low, high = np.transpose([WEIGHTS, BIASES])
    outside = np.flatnonzero(~((low < params) & (params < high)).all(1))
    if not len(outside) or outside[0] == 0:
        return
    before, after = params[outside[0] - 1], params[outside[0]]
    edge = np.where(after > before, high, low)
    way_out = np.min(np.abs(edge - before) / np.maximum(np.abs(after - before), 1e-9))
    axis.annotate(
        f"thrown in one step to\nw = {after[0]:.3g}, b = {after[1]:.3g}",
        before + 0.85 * way_out * (after - before),
        xytext=(-14, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        bbox={"fc": colours.page, "ec": colours.lines[1], "boxstyle": "round"},
        zorder=7,
    )


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=150, help="of gradient descent")
    add("--learning-rate", type=float, default=0.3)
    add("--max-norm", type=float, default=0.3, help="the threshold of the clipped path")
    add("--start", type=float, nargs=2, metavar=("W", "B"), default=(5.5, -1.5))
    add("--output", type=Path, default=Path("runs/cliff"), help="folder of the picture")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    return arguments


def main() -> None:
    """Descends twice, prints both paths and draws them."""
    arguments = parse_arguments()
    start, steps = tuple(arguments.start), arguments.steps
    unclipped = descend(start, arguments.learning_rate, jnp.inf, steps)
    clipped = descend(start, arguments.learning_rate, arguments.max_norm, steps)
    report("Without clipping", unclipped)
    report(f"With clip_by_global_norm({arguments.max_norm:g})", clipped)
    picture = arguments.output / "cliff.png"
    draw(unclipped, clipped, arguments.max_norm, picture)
    print(f"Wrote the picture to {picture}")
    norm = float(unclipped.norms.max())
    print(
        "\nOn the cliff the gradient is so large that one unclipped step leaves the"
        f" valley: its norm is {norm:.3g}.\n"
        f"With clipping, no step is longer than {arguments.learning_rate:g} times the"
        " threshold, so the path follows the cliff to the minimum."
    )


if __name__ == "__main__":
    main()
