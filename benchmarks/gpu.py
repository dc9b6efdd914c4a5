"""Clipping on a GPU: the share of its bandwidth, and what launching kernels costs.

With a GPU: 1 GB in 12 leaves and 1,000 leaves of 64 x 64, with and without command
buffers (CUDA graphs); ours, optax and PyTorch. Without one, or with --ahead, the same
programs are compiled ahead of time for an H100 and their kernels counted; nothing is
run, and so nothing timed.

    pip install "jax[cuda12]" && python benchmarks/gpu.py --output docs/results/gpu
    python benchmarks/gpu.py --ahead --output docs/results/gpu
"""

import argparse
import ctypes
import os
import pathlib
import re
import sys
import tempfile
from typing import Any

try:
    ctypes.CDLL("libcuda.so.1")
    HAS_DRIVER = True
except OSError:  # without it JAX's plugin can compile, but not load
    HAS_DRIVER = False
if "--ahead" in sys.argv or not HAS_DRIVER:
    os.environ["JAX_PLATFORMS"] = "cpu"  # then the plugin only compiles
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some

import harness
import hlo
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from steps import by_hand
from tqdm import tqdm

import optax_clipx as clipx

CLIPPERS = {
    "none": optax.identity,
    "tree": lambda: clipx.clip_by_global_norm(1.0),
    "tree, metrics=False": lambda: clipx.clip_by_global_norm(1.0, metrics=False),
    "zclip": clipx.zclip,
    "leaf": lambda: clipx.clip_by_leaf_norm(1.0),
    "group": lambda: clipx.clip_by_group_norm(
        {0: 1.0, 1: 1.0}, lambda path, leaf: int(path[0]) % 2
    ),
    "unit (AGC)": lambda: clipx.adaptive_grad_clip(0.01),
    "optax tree": lambda: optax.clip_by_global_norm(1.0),
    "optax leaf": lambda: optax.clip_by_block_rms(1.0),
    "optax unit (AGC)": lambda: optax.adaptive_grad_clip(0.01),
    "by hand, tree": by_hand,
}
OF_OPTAX = {
    "tree": "optax tree",
    "tree, metrics=False": "optax tree",
    "zclip": "optax tree",
    "leaf": "optax leaf",
    "unit (AGC)": "optax unit (AGC)",
}
STEPS = 10  # of one timing, so that Python is ahead of the GPU
NO_GRAPHS = {"xla_gpu_enable_command_buffer": ""}  # works for one program, too
# What XLA is told of an H100 SXM: public facts, as XLA's GpuTargetConfigProto.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
  clock_rate_ghz: 1.98
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 8 }
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def layouts(leaves: list[int]) -> dict[str, models.Shapes]:
    """Few large leaves, and many small ones."""
    small = {f"{n} leaves of 64 x 64": [(64, 64)] * n for n in leaves}
    return {"1 GB in 12 leaves": models.equal(1000, 12)} | small


def names_for(shapes: models.Shapes, only: list[str], timed: bool) -> list[str]:
    """Which to compile: of many leaves units take minutes, whoever's they are.

    Where kernels are only counted, the main ones do.
    """
    if len(shapes) <= 100:
        return only
    main = ("none", "tree", "leaf", "optax tree", "optax leaf")
    return [name for name in only if name in main or (timed and "unit" not in name)]


def program_of(
    name: str, adam: bool, params: Any, compiler_options: dict[str, Any]
) -> tuple[Any, dict[str, int]]:
    """The compiled step for these parameters, or shapes of them, and its kernels."""
    clipper, optimizer = CLIPPERS[name](), optax.adam(1e-3)

    def step(params: Any, clip: Any, state: Any, grads: Any) -> Any:
        updates, clip = clipper.update(grads, clip, params)
        if adam:
            updates, state = optimizer.update(updates, state, params)
            updates, grads = optax.apply_updates(params, updates), grads
        return updates, clip, state

    def like(tree: Any) -> Any:
        sharding = params[0].sharding
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    shapes = like(params)
    clip = like(jax.eval_shape(clipper.init, shapes))
    state = like(jax.eval_shape(optimizer.init, shapes)) if adam else ()
    # The optimizer writes over the parameters, the clip by itself over the gradients.
    donated = (0, 1, 2) if adam else (1, 3)
    lowered = (
        jax.jit(step, donate_argnums=donated)
        .trace(shapes, clip, state, shapes)
        .lower(lowering_platforms=("cuda",))
    )
    program, counts = compiled(lowered, compiler_options)
    text = program.as_text()
    moved = hlo.traffic(text) / sum(4 * np.prod(x.shape) for x in shapes)
    return program, counts | {"passes": float(moved)}


def compiled(lowered: Any, compiler_options: dict[str, Any]) -> Any:
    """The compiled program, and what it asks of the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder}
        program = lowered.compile(compiler_options=compiler_options | dump)
        return program, launches(pathlib.Path(folder))


def h100() -> SingleDeviceSharding:
    """The place of arrays on an H100 that need not be there."""
    (device,) = topologies.get_topology_desc(
        "h100", "cuda", target_config=H100, topology="1x1x1"
    ).devices
    return SingleDeviceSharding(device)


def launches(dump: pathlib.Path) -> dict[str, int]:
    """What a program asks of the GPU, from the thunks that XLA has dumped."""

    def lines(pattern: str) -> list[str]:
        text = "".join(path.read_text() for path in dump.glob(pattern))
        return re.findall(r"^ *\d+: k\w+", text, re.MULTILINE)

    before = lines("*.thunk_sequence.txt")
    after = lines("*.thunk_sequence_after_thunk_passes.txt") or before
    kinds = [line.split("k", 1)[1] for line in before]
    return {
        "kernels": sum("Kernel" in kind for kind in kinds),
        "copies": sum("Copy" in kind or "Mem" in kind for kind in kinds),
        "conditionals": sum("Conditional" in kind for kind in kinds),
        # Those inside of a command buffer are indented, and launched as one.
        "launches": sum(not line.startswith(" ") for line in after),
        "graphs": sum("CommandBuffer" in line for line in after),
    }


def ahead(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The kernels of every program, compiled for an H100 that need not be there."""
    place = h100()
    jobs = [
        (layout, shapes, adam, name)
        for layout, shapes in layouts(options.leaves).items()
        for adam in (False, True)
        for name in names_for(shapes, options.only, False)
    ]
    rows = []
    for layout, shapes, adam, name in tqdm(jobs, unit="program"):
        params = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=place) for s in shapes]
        _, counts = program_of(name, adam, params, {})
        rows.append({"layout": layout, "adam": adam, "clipper": name} | counts)
        tqdm.write(str(rows[-1]))
        jax.clear_caches()
    return rows


def contenders(
    shapes: models.Shapes, adam: bool, names: list[str], compiler_options: Any
) -> tuple[dict[str, harness.Contender], dict[str, dict[str, int]]]:
    """Some steps of each; all share parameters, gradients and the optimizer's state.

    No program here branches on a GPU: the clip takes as long below the threshold as
    above.
    """
    params, grads = harness.normal_tree(0, shapes), harness.normal_tree(1, shapes)
    held = {
        "params": params,
        "grads": grads,
        "state": optax.adam(1e-3).init(params) if adam else (),
    }
    found, counts = {}, {}

    def contender(name: str) -> harness.Contender:
        program, counts[name] = program_of(name, adam, params, compiler_options)
        own = {"clip": CLIPPERS[name]().init(held["params"])}
        updated = "params" if adam else "grads"

        def run() -> None:
            for _ in range(STEPS):
                held[updated], own["clip"], held["state"] = program(
                    held["params"], own["clip"], held["state"], held["grads"]
                )
            jax.block_until_ready((held, own))

        return run

    for name in tqdm(names, desc="compiling", leave=False):
        found[name] = contender(name)
    multiply = harness.compiled(
        lambda g, f: [x * f for x in g], grads, jnp.float32(1), donate=(0,)
    )
    squares = harness.compiled(optax.tree.norm, grads)

    def copy() -> None:
        for _ in range(STEPS):
            held["grads"] = multiply(held["grads"], jnp.float32(1))
        jax.block_until_ready(held)

    def read() -> None:
        jax.block_until_ready([squares(held["grads"]) for _ in range(STEPS)])

    return found | {"multiply in place": copy, "read": read}, counts


def torch_contenders(shapes: models.Shapes) -> dict[str, harness.Contender]:
    """PyTorch's Adam, alone and after clip_grad_norm_, if it has CUDA."""
    try:
        import torch
    except ImportError:
        torch = None
    if torch is None or not torch.cuda.is_available():
        print("PyTorch with CUDA is not installed: its rows are left out.")
        return {}
    params = [torch.nn.Parameter(torch.randn(s, device="cuda")) for s in shapes]
    for param in params:
        param.grad = torch.randn_like(param)

    def contender(optimizer: Any, clip: bool) -> harness.Contender:
        def run() -> None:
            for _ in range(STEPS):
                if clip:
                    torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
                optimizer.step()
            torch.cuda.synchronize()

        return run

    found = {}
    for kind in ("fused", "foreach"):
        optimizer = torch.optim.Adam(params, lr=1e-3, **{kind: True})
        found[f"torch Adam {kind}"] = contender(optimizer, False)
        found[f"torch tree {kind}"] = contender(optimizer, True)
    return found


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One table for each layout, with and without Adam and command buffers."""
    tables = []
    for layout, shapes in layouts(options.leaves).items():
        size = 4 * sum(int(np.prod(s)) for s in shapes)
        for adam in (False, True):
            for graphs in (True, False):
                names = names_for(shapes, options.only, True)
                found, counts = contenders(
                    shapes, adam, names, {} if graphs else NO_GRAPHS
                )
                if adam:
                    found |= torch_contenders(shapes)
                title = layout + (", Adam" if adam else ", clipping alone")
                title += "" if graphs else ", no command buffers"
                times = harness.alternate(found, options.rounds, title)
                times = {name: took / STEPS for name, took in times.items()}
                rows = rows_of(times, counts, adam, size)
                tables.append({"title": title, "rounds": options.rounds, "rows": rows})
                del found
                jax.clear_caches()
    return tables


def rows_of(
    times: harness.Times, counts: dict[str, dict[str, int]], adam: bool, size: int
) -> dict[str, dict[str, float]]:
    """What the times of one table mean."""
    one_read = times["multiply in place"] / 2
    rows = {}
    for name, took in times.items():
        row: dict[str, Any] = {"ms": float(np.median(took))} | counts.get(name, {})
        if name == "multiply in place":
            row["gb_per_s"] = 2 * size / row["ms"] / 1e6
        elif name == "read":
            row["gb_per_s"] = size / row["ms"] / 1e6
        elif adam:
            alone = times["none"]
            if name.startswith("torch"):
                alone = times[name.replace("tree", "Adam")]
            row["added_over_read"] = float(np.median((took - alone) / one_read))
        elif name != "none":  # at best two reads and one write
            row["of_bandwidth"] = float(np.median(3 * one_read / took))
        if OF_OPTAX.get(name) in times:
            row["optax_over_it"] = float(np.median(times[OF_OPTAX[name]] / took))
        rows[name] = row
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = []
    for found in report.get("tables", []):
        lines += [f"## {found['title']}", ""]
        lines += [f"Medians of {found['rounds']} rounds of {STEPS} steps.", ""]
        keys = {
            "ms": "ms",
            "gb_per_s": "GB/s",
            "of_bandwidth": "share of the bandwidth",
            "added_over_read": "(step - Adam) / one read",
            "optax_over_it": "optax's / it",
            "kernels": "kernels",
            "launches": "launches",
        }
        rows = [
            [name, *(f"{row[key]:.4g}" if key in row else "" for key in keys)]
            for name, row in found["rows"].items()
        ]
        lines += [*harness.table(["", *keys.values()], rows), ""]
    if "compiled" in report:
        lines += [
            "Compiled ahead of time for an H100, not run; times: not measured. A launch"
            " is a kernel, or a command buffer (CUDA graph) of many. Passes are the"
            " bytes that kernels read and write, in sizes of the gradients; Adam by"
            " itself needs 7, the clip of the tree by itself 3.",
            "",
        ]
        for layout in dict.fromkeys(row["layout"] for row in report["compiled"]):
            lines += [f"## {layout}", ""]
            lines += counted([r for r in report["compiled"] if r["layout"] == layout])
    return "\n".join(lines + harness.footer(report))


def counted(rows: list[dict[str, Any]]) -> list[str]:
    """A table of one layout: the clip by itself, and with Adam."""
    keys = ("kernels", "copies", "conditionals", "launches", "passes")
    head = ["clipping", *keys, *(f"with Adam: {key}" for key in keys)]
    cells = {}
    for row in rows:
        numbers = [f"{row[key]:.4g}" for key in keys]
        cells.setdefault(row["clipper"], [row["clipper"]]).extend(numbers)
    return [*harness.table(head, list(cells.values())), ""]


def main() -> None:
    """Measures where there is a GPU, else compiles; prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ahead", action="store_true", help="compile, and run nothing")
    parser.add_argument("--leaves", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--only", nargs="+", choices=CLIPPERS, default=[*CLIPPERS])
    parser.add_argument("--rounds", type=int, default=41, help="alternated rounds")
    parser.add_argument("--output", type=pathlib.Path, help="write OUTPUT.json and .md")
    options = parser.parse_args()
    report: dict[str, Any] = {}
    if jax.default_backend() == "gpu":
        options.only = list(dict.fromkeys(["none", *options.only]))
        report["tables"] = measured(options)
    else:
        try:
            report["compiled"] = ahead(options)
        except (NotImplementedError, RuntimeError) as error:
            sys.exit(
                "There is no GPU here, and without JAX's plugin for CUDA nothing can be"
                f' compiled for one either: pip install "jax[cuda12]". ({error})'
            )
    report["environment"] = harness.environment()
    harness.write(options.output, report, markdown(report))


if __name__ == "__main__":
    main()
