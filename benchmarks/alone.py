"""How near clipping alone comes to the memory's bandwidth, and how its time grows.

The gradients are donated, so that they are scaled in place: above the threshold the
least is two reads and one write, else one read. The bandwidth is measured beside it, by
a program that multiplies the same leaves in place. Time, above the threshold, is drawn
over bytes and over the number of leaves.

    python benchmarks/alone.py --output docs/results/alone --picture docs/images
"""

import argparse
import math
import pathlib
from typing import Any

import harness
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import models
import numpy as np
import optax
from steps import by_hand

import optax_clipx as clipx
from optax_clipx.runs.drawing import rc, theme_of

CLIPPERS = {
    "tree": lambda: clipx.clip_by_global_norm(1.0),
    "leaf": lambda: clipx.clip_by_leaf_norm(1.0),
    "group": lambda: clipx.clip_by_group_norm(
        {0: 1.0, 1: 1.0}, lambda path, leaf: int(path[0]) % 2
    ),
    "unit": lambda: clipx.clip_by(clipx.measures.unit_norms(), 1.0),
    "element": lambda: clipx.clip(0.1),
    "optax tree": lambda: optax.clip_by_global_norm(1.0),
    "by hand, tree": by_hand,
}
MOVES = dict.fromkeys(CLIPPERS, 3) | {"element": 2, "multiply in place": 2}
MOVES |= {"read": 1, "read, NumPy's dot": 1}
GROWTH = ("tree", "leaf", "optax tree", "read", "multiply in place")


def timed(
    shapes: models.Shapes,
    dtype: Any,
    names: list[str],
    rounds: int,
    title: str,
    above: bool = True,
) -> harness.Times:
    """Each clipper on the same donated leaves, a read and a multiplication in place.

    All entries are one before each, which is above the thresholds, or below them.
    """
    held = {"leaves": harness.normal_tree(0, shapes, dtype)}
    fill = harness.compiled(
        lambda g: [jnp.full_like(x, 1 if above else 1e-6) for x in g],
        held["leaves"],
        donate=(0,),
    )

    def refill() -> None:
        held["leaves"] = jax.block_until_ready(fill(held["leaves"]))

    def in_place(function: Any, state: Any) -> harness.Contender:
        program = harness.compiled(function, held["leaves"], state, donate=(0, 1))
        own = {"state": state}

        def run() -> None:
            held["leaves"], own["state"] = program(held["leaves"], own["state"])
            jax.block_until_ready(held)

        return run

    def clipped(name: str) -> harness.Contender:
        tx = CLIPPERS[name]()
        return in_place(lambda g, s: tx.update(g, s), tx.init(held["leaves"]))

    def squares(leaves: Any) -> Any:
        return sum(jnp.sum(jnp.square(x.astype(np.float32))) for x in leaves)

    read = harness.compiled(squares, held["leaves"])
    found = {name: clipped(name) for name in names if name in CLIPPERS}
    found["read"] = lambda: jax.block_until_ready(read(held["leaves"]))
    if jnp.dtype(dtype) == np.float32 and jax.default_backend() == "cpu":
        found["read, NumPy's dot"] = lambda: [
            np.dot(x, x) for x in map(np.ravel, map(np.from_dlpack, held["leaves"]))
        ]
    # By a number that XLA does not know.
    factor = jnp.asarray(1.0, dtype)
    found["multiply in place"] = in_place(lambda g, f: ([x * f for x in g], f), factor)
    return harness.alternate(found, rounds, title, refill)


def at_the_limit(
    megabytes: float, leaves: int, dtype: str, rounds: int, above: bool = True
) -> Any:
    """One row for each clipper: the fraction of the bandwidth that it reaches."""
    shapes = models.equal(megabytes * 4 / jnp.dtype(dtype).itemsize, leaves)
    title = f"{megabytes:g} MB of {dtype} in {leaves} leaves"
    title += ", above the threshold" if above else ", not above the threshold"
    times = timed(shapes, dtype, [*CLIPPERS], rounds, title, above)
    size = jnp.dtype(dtype).itemsize * sum(map(math.prod, shapes))
    copy = times["multiply in place"]  # one read and one write
    rows = {}
    for name, took in times.items():
        moves = MOVES[name]
        if not above and name in CLIPPERS:
            moves = 1
        rows[name] = {
            "ms": float(np.median(took)),
            "gb_per_s": moves * size / float(np.median(took)) / 1e6,
            "of_bandwidth": float(np.median((moves / 2) * copy / took)),
        }
    return {"title": title, "rounds": rounds, "rows": rows}


def growth(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Times against bytes, and against leaves at a constant size."""
    sizes = [x for x in (1, 4, 16, 64, 256, 1024, 4096) if x <= options.largest]
    numbers = [1, 10, 100, 1000, 2000]
    found: dict[str, list[dict[str, Any]]] = {"bytes": [], "leaves": []}
    for kind, cases in (
        ("bytes", [(size, 12) for size in sizes]),
        ("leaves", [(64, number) for number in numbers]),
    ):
        for megabytes, leaves in cases:
            times = timed(
                models.equal(megabytes, leaves),
                np.float32,
                list(GROWTH),
                max(7, min(options.rounds, int(8000 / megabytes))),
                f"{megabytes} MB in {leaves} leaves",
            )
            medians = {name: float(np.median(took)) for name, took in times.items()}
            found[kind].append({"megabytes": megabytes, "leaves": leaves} | medians)
            jax.clear_caches()
    return found


def picture(found: dict[str, list[dict[str, Any]]], path: pathlib.Path) -> None:
    """Time against bytes and against leaves, on a light and on a dark page."""
    for theme, name in (("light", "growth.png"), ("dark", "growth_dark.png")):
        with plt.rc_context(rc(theme)):
            figure = draw_growth(found, theme_of(theme))
            figure.savefig(path / name, dpi=150)
            plt.close(figure)


def draw_growth(found: dict[str, list[dict[str, Any]]], colours: Any) -> Any:
    """Both axes are logarithmic; the dashed lines are what is at best possible."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for panel, (kind, x, label) in zip(
        panels,
        (
            ("bytes", "megabytes", "MB of float32 in 12 leaves"),
            ("leaves", "leaves", "leaves, 64 MB in all"),
        ),
        strict=True,
    ):
        for name, colour in zip(GROWTH, colours.lines, strict=False):
            rows = [row for row in found[kind] if name in row]
            style = "--" if name in ("read", "multiply in place") else "o-"
            xs, ys = [row[x] for row in rows], [row[name] for row in rows]
            panel.loglog(xs, ys, style, color=colour, label=name, markersize=4)
        panel.set(xlabel=label, ylabel="ms, clipping alone (lower is better)")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper left", ncols=len(GROWTH))
    return figure


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = []
    for found in report["tables"]:
        lines += [
            f"## {found['title']}",
            "",
            f"Medians of {found['rounds']} alternated rounds.",
            "",
        ]
        head = ["clipping alone, in place", "ms", "GB/s", "fraction of the bandwidth"]
        head += ["time / read + multiply"]
        both = found["rows"]["read"]["ms"] + found["rows"]["multiply in place"]["ms"]
        rows = [
            [
                name,
                f"{row['ms']:.1f}",
                f"{row['gb_per_s']:.1f}",
                f"{row['of_bandwidth']:.0%}",
                f"{row['ms'] / both:.2f}",
            ]
            for name, row in found["rows"].items()
        ]
        lines += [*harness.table(head, rows), ""]
    for kind, title in (
        ("bytes", "Time against bytes"),
        ("leaves", "Time against leaves"),
    ):
        head = ["MB", "leaves", *(f"{name}, ms" for name in GROWTH)]
        rows = [
            [f"{row['megabytes']:g}", str(row["leaves"])]
            + [f"{row[name]:.2f}" if name in row else "-" for name in GROWTH]
            for row in report["growth"][kind]
        ]
        lines += [f"## {title}", "", *harness.table(head, rows, 0), ""]
    return "\n".join(lines + harness.footer(report))


def main() -> None:
    """Measures, prints, draws and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[200, 1000])
    parser.add_argument("--leaves", type=int, nargs="+", default=[12, 450])
    parser.add_argument("--largest", type=int, default=4096, help="MB, of the growth")
    parser.add_argument("--rounds", type=int, default=41, help="alternated rounds")
    parser.add_argument("--output", type=pathlib.Path, help="write OUTPUT.json and .md")
    parser.add_argument("--picture", type=pathlib.Path, help="folder for growth.png")
    options = parser.parse_args()
    tables = []
    for megabytes in options.megabytes:
        for leaves in options.leaves:
            narrow = megabytes == options.megabytes[0] and leaves == options.leaves[0]
            for dtype in ("float32", "bfloat16", "float16")[: 3 if narrow else 1]:
                case = (megabytes, leaves, dtype, options.rounds)
                tables.append(at_the_limit(*case))
                if narrow:
                    tables.append(at_the_limit(*case, above=False))
                jax.clear_caches()
    report = {"environment": harness.environment(), "tables": tables}
    report["growth"] = growth(options)
    if options.picture:
        picture(report["growth"], options.picture)
    harness.write(options.output, report, markdown(report))


if __name__ == "__main__":
    main()
