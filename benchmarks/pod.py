"""Compiles clipping for TPU pods, without a TPU, and shows what it costs there.

`pip install libtpu` (Linux, x86-64) brings XLA's compiler for TPUs; it compiles real
programs for up to thousands of chips ahead of time. Three kinds are compiled: the bare
clip of many bfloat16 leaves of five shardings, a step of Adam on the shapes of models,
cut over the whole mesh where they can be, and the train step of
examples/transformer.py with AdamW (FSDP and tensor parallel, Explicit axes).

    python benchmarks/pod.py --output docs/results/pod
    python benchmarks/pod.py --topologies v5p:8x8x16 --leaves 1000 --only tree
"""

import argparse
import functools
import json
import os
import pathlib
import sys
import time
from typing import Any

os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
}

import hlo
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from tqdm import tqdm

import optax_clipx as clipx

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
import transformer

SPECS = [P("x", "y"), P("x", None), P(None, "y"), P(("x", "y"), None), P()]
SHAPE = (8192, 512)
CLIPPERS = {
    "none": optax.identity,
    "optax tree": lambda **_: optax.clip_by_global_norm(1.0),
    "tree": functools.partial(clipx.clip_by_global_norm, 1.0),
    "tree, ord=inf": functools.partial(clipx.clip_by_global_norm, 1.0, ord=np.inf),
    "tree, ord=3": functools.partial(clipx.clip_by_global_norm, 1.0, ord=3),
    "leaf": functools.partial(clipx.clip_by_leaf_norm, 1.0),
    "group": functools.partial(
        clipx.clip_by_group_norm,
        {0: 1.0, 1: 2.0},
        lambda path, leaf: int(path[0]) % 2,
    ),
    "unit (AGC)": functools.partial(clipx.adaptive_grad_clip, 0.01),
}
TRAIN_STEPS = {  # other chains than a clipper and AdamW
    "zclip": (clipx.zclip, None),
    "skip_spikes, tree": (CLIPPERS["tree"], clipx.skip_spikes),
}
WAYS = ("Explicit", "shard_map", "Auto")
LAYOUTS: dict[str, Any] = {  # of a step of Adam; two that differ in ten leaves
    "10 leaves": lambda: [SHAPE] * 10,
    "20 leaves": lambda: [SHAPE] * 20,
    "GPT-2 small": models.gpt2,
    "1B transformer": models.transformer_1b,
}


def mesh_of(topology: str, kind: Any, axes: tuple[str, str]) -> Mesh:
    """All chips of a topology in two axes, the second at most 16 long."""
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    second = min(16, 2 ** (int(np.log2(len(devices))) // 2))
    grid = np.array(devices).reshape(-1, second)
    return Mesh(grid, axes, axis_types=(kind,) * 2)


def bare_clip(clipper: str, way: str, leaves: int, mesh: Mesh) -> Any:
    """The traced clip of donated updates."""
    specs = [SPECS[i % len(SPECS)] for i in range(leaves)]
    updates = [
        jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for spec in specs
    ]
    needs_specs = clipper.startswith("unit") and way == "shard_map"
    tx = CLIPPERS[clipper](**({"specs": specs} if needs_specs else {}))
    state = on(mesh, jax.eval_shape(tx.init, updates))
    # Only a rule that is relative to the parameters reads them.
    params = updates if clipper.startswith("unit") else None

    def step(updates: Any, state: Any, params: Any) -> Any:
        return tx.update(updates, state, params)

    if way == "shard_map":
        step = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(specs, P(), specs if params else P()),
            out_specs=(specs, P()),
        )
    with jax.set_mesh(mesh):
        return jax.jit(step, donate_argnums=(0, 1)).trace(updates, state, params)


def adam_step(clipper: str, way: str, layout: str, mesh: Mesh) -> Any:
    """The traced step of Adam on float32 leaves."""
    tx = optax.chain(CLIPPERS[clipper](), optax.adam(1e-3))
    params = [
        jax.ShapeDtypeStruct(x, jnp.float32, sharding=NamedSharding(mesh, cut(x, mesh)))
        for x in LAYOUTS[layout]()
    ]

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        state = on(mesh, jax.eval_shape(tx.init, params))
        return jax.jit(step, donate_argnums=(0, 1)).trace(params, state, params)


def cut(shape: tuple[int, ...], mesh: Mesh) -> P:
    """The first dimension that the mesh, or else one of its axes, divides."""
    for axes in (("x", "y"), ("x",), ("y",)):
        for i, n in enumerate(shape):
            if n % np.prod([mesh.shape[name] for name in axes]) == 0:
                return P(*[axes if j == i else None for j in range(len(shape))])
    return P(*[None] * len(shape))


def train_step(clipper: str, way: str, dim: int, mesh: Mesh) -> Any:
    """The traced train step of the transformer."""
    make, wrap = TRAIN_STEPS.get(clipper) or (CLIPPERS[clipper], None)
    tx = optax.chain(make(), optax.adamw(1e-3))
    tx = wrap(tx) if wrap else tx
    data, length = mesh.shape["data"], 256

    def create() -> Any:
        model = transformer.Transformer(dim, 4, 16, length, nnx.Rngs(0))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    def step(state: Any, tokens: Any) -> Any:
        model, optimizer = nnx.merge(graph, state)
        loss, grads = nnx.value_and_grad(transformer.loss_of)(model, tokens)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), loss

    with jax.set_mesh(mesh):
        graph, state = nnx.split(nnx.eval_shape(create))
        tokens = jax.ShapeDtypeStruct(
            (data, length + 1), jnp.int32, sharding=NamedSharding(mesh, P("data"))
        )
        return jax.jit(step, donate_argnums=0).trace(on(mesh, state), tokens)


def on(mesh: Mesh, shapes: Any) -> Any:
    """Shapes that lie on the mesh as their types say, replicated if they do not."""
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(
            s.shape,
            s.dtype,
            sharding=NamedSharding(mesh, getattr(s.sharding, "spec", P())),
        ),
        shapes,
    )


def compiled(trace: Any) -> dict[str, Any]:
    """What a traced program is compiled to."""
    lowered = trace.lower(lowering_platforms=("tpu",))
    start = time.perf_counter()
    program = lowered.compile()
    seconds = time.perf_counter() - start
    text = program.as_text()
    found = hlo.collectives(text)
    return {
        "collectives": [c._asdict() | {"bytes": c.bytes} for c in found],
        "conditionals": hlo.conditionals(text),
        "fusions": hlo.fusions(text),
        "hbm_bytes": hlo.traffic(text),
        "cycles": hlo.cycles(text),
        **hlo.memory(program),
        "compile_s": round(seconds, 2),
    }


def exchanged(row: dict[str, Any]) -> np.ndarray:
    """The number of collectives, of their operands, and their bytes."""
    found = row["collectives"]
    return np.array(
        [
            len(found),
            sum(len(c["operands"]) for c in found),
            sum(c["bytes"] for c in found),
        ]
    )


def cells_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """What a program exchanges; a train step beyond the one without clipping.

    XLA puts collectives of a model and of its clipping into one, so only totals can be
    compared.
    """
    dtypes = {o.split("[")[0] for c in row["collectives"] for o in c["operands"]}
    numbers, sign = exchanged(row), ""
    if row["program"] == "train step" and row["clipper"] != "none":
        sign = "+"
        numbers = numbers - next(
            exchanged(other)
            for other in rows
            if other["clipper"] == "none"
            and other["program"] == "train step"
            and other["topology"] == row["topology"]
        )
    return [*(f"{n:{sign}}" for n in numbers), " ".join(sorted(dtypes))]


def is_shown(clipper: str, way: str, leaves: int, full: bool) -> bool:
    """Whether the bare clip has a row: all that make sense, or the main ones."""
    main = clipper in ("optax tree", "tree", "unit (AGC)")
    if leaves > 200:  # some of the others take five minutes to compile
        return clipper in ("optax tree", "tree", "leaf", "group") and way == "Explicit"
    if not full:
        return main and way == "Explicit"
    if way == "Auto":  # what XLA adds by itself; two rows show it
        return clipper in ("tree", "optax tree")
    # optax knows nothing of shard_map: its norm is wrong there.
    return clipper != "none" and (clipper, way) != ("optax tree", "shard_map")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All programs, one after the other."""
    middle = sorted(options.leaves)[len(options.leaves) // 2]
    jobs = []
    for topology in options.topologies:
        full = topology == options.full
        jobs += [
            ("clip", topology, way, clipper, leaves)
            for leaves in (options.leaves if full else [middle])
            for clipper in CLIPPERS
            for way in WAYS
            if is_shown(clipper, way, leaves, full)
        ]
        jobs += [
            ("Adam", topology, "Explicit", clipper, layout)
            for layout in (options.layouts if full else [])
            for clipper in ("none", "optax tree", "tree")
        ]
        jobs += [
            ("train step", topology, "Explicit", clipper, options.dim)
            for clipper in ("none", "optax tree", "tree", "unit (AGC)", *TRAIN_STEPS)
        ]
    jobs = [j for j in jobs if not options.only or j[3] in (*options.only, "none")]
    rows = []
    for kind, topology, way, clipper, size in tqdm(jobs, unit="program"):
        axis_type = AxisType.Explicit if way == "Explicit" else AxisType.Auto
        axes = ("data", "model") if kind == "train step" else ("x", "y")
        mesh = mesh_of(topology, axis_type, axes)
        build = {"clip": bare_clip, "Adam": adam_step, "train step": train_step}[kind]
        try:
            result = compiled(build(clipper, way, size, mesh))
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        rows.append(
            {
                "program": kind,
                "topology": topology,
                "chips": mesh.size,
                "way": way,
                "clipper": clipper,
                {"clip": "leaves", "Adam": "layout", "train step": "dim"}[kind]: size,
            }
            | result
        )
        tqdm.write(line(rows[-1], rows))
    return rows


HEAD = (
    "| chips | mesh axes | clipper | leaves | collectives | operands | payload B"
    " | dtypes | fusions | cycles | HBM MB | counted MB"
    " | temp MB | cond | aliased | compile s |"
)


def line(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """One row of the table."""
    where = [f"{row['topology']} ({row['chips']})", row["way"], row["clipper"]]
    size = row.get("leaves") or row.get("layout") or f"dim {row['dim']}"
    where.append(str(size))
    if "error" in row:
        return f"| {' | '.join(where)} | {row['error']} " + "| " * 11 + "|"
    cells = [
        *cells_of(row, rows),
        str(row["fusions"]),
        f"{row['cycles'] / 1e6:.3f} M",
        f"{row['hbm_bytes'] / 1e6:.1f}",
        f"{row['bytes_accessed'] / 1e6:.1f}",
        f"{row['temp_bytes'] / 1e6:.2f}",
        str(row["conditionals"]),
        f"{row['alias_bytes'] / row['argument_bytes']:.0%}",
        f"{row['compile_s']:.1f}",
    ]
    return f"| {' | '.join(where + cells)} |"


def markdown(rows: list[dict[str, Any]]) -> str:
    """The report as tables."""
    out = []
    for kind, title in (
        ("clip", "The bare clip"),
        ("Adam", "A step of Adam"),
        ("train step", "A train step, and the collectives that clipping adds"),
    ):
        out += [f"## {title}", "", HEAD, "|---|---|---|" + "---:|" * 13]
        out += [line(row, rows) for row in rows if row["program"] == kind]
        out += ["", *(a_leaf(rows) if kind == "Adam" else [])]
    out.append(
        f"Compiled ahead of time with jax {jax.__version__} and optax"
        f" {optax.__version__}, for one chip. Cycles are those of XLA's cost model. HBM"
        " is what the main computation reads from and writes to the chip's main memory;"
        " counted is XLA's own number, in which what is copied ahead of time to memory"
        " on the chip stands again where it is used. AGC also reads the parameters,"
        " which are not donated in the bare clip."
    )
    return "\n".join(out) + "\n"


def a_leaf(rows: list[dict[str, Any]]) -> list[str]:
    """How many fusions a leaf adds, by the two layouts that differ in ten."""
    of = {
        (row["clipper"], row["layout"]): row["fusions"]
        for row in rows
        if row["program"] == "Adam" and "fusions" in row
    }
    found = {
        name: (of[name, "20 leaves"] - of[name, "10 leaves"]) / 10
        for name, layout in of
        if layout == "20 leaves" and (name, "10 leaves") in of
    }
    listed = ", ".join(f"{name} {number:g}" for name, number in found.items())
    return [f"Fusions that each further leaf adds: {listed}.", ""] if found else []


def main() -> None:
    """Compiles, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--topologies",
        nargs="+",
        default=["v5e:2x4", "v5e:16x16", "v5p:2x2x2", "v5p:8x8x16", "v5p:16x16x16"],
    )
    parser.add_argument("--full", default="v5p:8x8x16", help="where to show everything")
    parser.add_argument("--leaves", type=int, nargs="+", default=[10, 200, 1000])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=[*LAYOUTS])
    parser.add_argument("--dim", type=int, default=1024, help="of the transformer")
    parser.add_argument(
        "--only", nargs="+", choices=[*CLIPPERS, *TRAIN_STEPS], help="some"
    )
    parser.add_argument("--output", type=pathlib.Path, help="write OUTPUT.json and .md")
    options = parser.parse_args()
    rows = run(options)
    print(markdown(rows))
    failed = sum("error" in row for row in rows)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".json").write_text(json.dumps(rows, indent=1))
        options.output.with_suffix(".md").write_text(markdown(rows))
    if failed:
        sys.exit(f"{failed} of {len(rows)} programs were not compiled")


if __name__ == "__main__":
    main()
