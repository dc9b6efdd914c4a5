"""What clipping costs on a GPU: time, bandwidth, launches and compile time.

With a GPU the script measures ours, optax and PyTorch in eight minutes: small models,
Adam with 1 GB, a training step of a transformer in Flax NNX, the shapes of GPT-2 small,
and 1,000 leaves of 64 x 64. The tables are written after each of these steps. Without a
GPU, or with --ahead, the same programs are compiled ahead of time for an H100 and their
kernels counted; nothing is run, and so nothing timed.

    pip install "jax[cuda12]" && python benchmarks/gpu.py --output docs/results/gpu_ms
    python benchmarks/gpu.py --ahead --output docs/results/gpu
    python benchmarks/gpu.py --dry-run    # all steps on the CPU, with tiny sizes
"""

import argparse
import ctypes
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

try:
    ctypes.CDLL("libcuda.so.1")
    HAS_DRIVER = True
except OSError:  # without it JAX's plugin can compile, but not load
    HAS_DRIVER = False
if "--ahead" in sys.argv or "--dry-run" in sys.argv or not HAS_DRIVER:
    os.environ["JAX_PLATFORMS"] = "cpu"  # then the plugin only compiles
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some

import harness
import hlo
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import transformer
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from steps import by_hand
from tqdm import tqdm

import optax_clipx as clipx

Transformation = optax.GradientTransformation


def before(make: Callable[[], Any]) -> Callable[[Transformation], Transformation]:
    """A clipper in front of an optimizer."""
    return lambda optimizer: optax.chain(make(), optimizer)


# Each makes a whole optimizer from the one that is given.
CLIPPERS: dict[str, Callable[[Transformation], Transformation]] = {
    "none": before(optax.identity),
    "tree": before(lambda: clipx.clip_by_global_norm(1.0)),
    "tree, metrics=False": before(
        lambda: clipx.clip_by_global_norm(1.0, metrics=False)
    ),
    "zclip": before(clipx.zclip),
    "skip_spikes": lambda optimizer: clipx.skip_spikes(optimizer),
    "leaf": before(lambda: clipx.clip_by_leaf_norm(1.0)),
    "group": before(
        lambda: clipx.clip_by_group_norm(
            {0: 1.0, 1: 1.0}, lambda path, leaf: int(path[0]) % 2
        )
    ),
    "unit (AGC)": before(lambda: clipx.adaptive_grad_clip(0.01)),
    "optax tree": before(lambda: optax.clip_by_global_norm(1.0)),
    "optax leaf": before(lambda: optax.clip_by_block_rms(1.0)),
    "optax unit (AGC)": before(lambda: optax.adaptive_grad_clip(0.01)),
    "optax apply_if_finite": lambda optimizer: optax.apply_if_finite(optimizer, 5),
    "by hand, tree": before(by_hand),
}
OF_OPTAX = {
    "tree": "optax tree",
    "tree, metrics=False": "optax tree",
    "zclip": "optax tree",
    "skip_spikes": "optax apply_if_finite",
    "leaf": "optax leaf",
    "unit (AGC)": "optax unit (AGC)",
}
# Of many leaves units take minutes to compile, whoever's they are.
MAIN = ("none", "tree", "zclip", "skip_spikes", "optax tree", "optax apply_if_finite")
GRAPHS: dict[str, Any] = {}
NO_GRAPHS = {"xla_gpu_enable_command_buffer": ""}  # works for one program, too
STEPS = 10  # of one timing, so that Python is ahead of the GPU

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


class Size(NamedTuple):
    """How large the arrays are, and how often they are timed."""

    megabytes: float = 1000
    leaves: tuple[int, ...] = (100, 1000)
    side: int = 64
    gpt2_leaves: int = 148
    divided: int = 1  # the sides of these leaves
    model: transformer.Size = transformer.Size()
    steps: int = STEPS
    rounds: int = 21


TINY = Size(0.1, (10, 20), 8, 14, 64, transformer.Size(1, 16, 2, 32, 8, 2), 2, 3)


class Table(NamedTuple):
    """What is compiled, or timed, in one table."""

    title: str
    shapes: models.Shapes
    names: tuple[str, ...] = tuple(CLIPPERS)
    adam: bool = True
    options: dict[str, Any] = GRAPHS


def small(leaves: int, side: int) -> models.Shapes:
    """Kernels and biases of a small network in turn."""
    return [(side, side) if i % 2 else (side,) for i in range(leaves)]


def gpt2(leaves: int, divided: int) -> models.Shapes:
    """The shapes of GPT-2 small, all sides divided."""
    shapes = models.gpt2()[:leaves]
    return [tuple(max(1, n // divided) for n in shape) for shape in shapes]


def tables(size: Size) -> Iterator[Table]:
    """All but the training step, the shortest and most asked for first."""
    names = tuple(name for name in CLIPPERS if "hand" not in name)
    for leaves in (4, 16):
        shapes = small(leaves, size.side)
        yield Table(f"{leaves} leaves, Adam", shapes, names)
        title = f"{leaves} leaves, Adam, no command buffers"
        yield Table(title, shapes, names, options=NO_GRAPHS)
    large = models.equal(size.megabytes, 12)
    title = f"{size.megabytes:g} MB in 12 leaves"
    yield Table(f"{title}, Adam", large)
    yield Table(f"{title}, clipping alone", large, adam=False)
    yield Table("GPT-2 small, Adam", gpt2(size.gpt2_leaves, size.divided), names)
    many = [(size.side, size.side)] * size.leaves[-1]
    title = f"{len(many)} leaves of {size.side} x {size.side}"
    yield Table(f"{title}, Adam", many, MAIN)
    yield Table(f"{title}, Adam, no command buffers", many, MAIN, options=NO_GRAPHS)


def program_of(
    name: str, table: Table, params: Any, platforms: tuple[str, ...] | None = None
) -> tuple[Any, dict[str, Any]]:
    """The compiled step for these parameters, or shapes of them; what it is made of."""
    tx = CLIPPERS[name](optax.adam(1e-3) if table.adam else optax.identity())

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates) if table.adam else updates), state

    def like(tree: Any) -> Any:
        sharding = params[0].sharding
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    shapes = like(params)
    state = like(jax.eval_shape(tx.init, shapes))
    # The optimizer writes over the parameters, the clip by itself over the gradients.
    jitted = jax.jit(step, donate_argnums=(0, 1) if table.adam else (1, 2))
    start = time.perf_counter()
    lowered = jitted.trace(shapes, state, shapes).lower(lowering_platforms=platforms)
    middle = time.perf_counter()
    program, counts = compiled(lowered, table.options)
    seconds = {"trace_s": middle - start, "compile_s": time.perf_counter() - middle}
    moved = hlo.traffic(program.as_text()) / sum(4 * np.prod(x.shape) for x in shapes)
    return (tx, program), counts | seconds | {"passes": float(moved)}


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
    layouts = {"1 GB in 12 leaves": models.equal(1000, 12)}
    layouts |= {f"{n} leaves of 64 x 64": [(64, 64)] * n for n in options.leaves}
    wanted = [
        (name, Table(layout, shapes, adam=adam))
        for layout, shapes in layouts.items()
        for adam in (False, True)
        for name in (options.only if len(shapes) <= 100 else MAIN)
        if name in options.only
    ]
    rows = []
    for name, table in tqdm(wanted, unit="program"):
        params = [
            jax.ShapeDtypeStruct(s, jnp.float32, sharding=place) for s in table.shapes
        ]
        _, counts = program_of(name, table, params, ("cuda",))
        rows.append(
            {"layout": table.title, "adam": table.adam, "clipper": name} | counts
        )
        tqdm.write(str(rows[-1]))
        jax.clear_caches()
    return rows


def contenders(
    table: Table, names: list[str], steps: int
) -> tuple[dict[str, harness.Contender], dict[str, dict[str, Any]]]:
    """Some steps of each; all share parameters and gradients.

    No program here branches on a GPU: the clip takes as long below the threshold as
    above.
    """
    held = {
        "params": harness.normal_tree(0, table.shapes),
        "grads": harness.normal_tree(1, table.shapes),
    }
    found, counts = {}, {}
    updated = "params" if table.adam else "grads"

    def contender(name: str) -> harness.Contender:
        (tx, program), counts[name] = program_of(name, table, held["params"])
        own = {"state": tx.init(held["params"])}

        def run() -> None:
            for _ in range(steps):
                held[updated], own["state"] = program(
                    held["params"], own["state"], held["grads"]
                )
            jax.block_until_ready((held, own))

        return run

    for name in tqdm(names, desc="compiling", leave=False):
        found[name] = contender(name)
    return found | memory_contenders(held, steps), counts


def memory_contenders(held: dict[str, Any], steps: int) -> dict[str, harness.Contender]:
    """What the bandwidth is measured by: each entry read and written, or read."""
    multiply = harness.compiled(
        lambda g, f: [x * f for x in g], held["grads"], jnp.float32(1), donate=(0,)
    )
    squares = harness.compiled(optax.tree.norm, held["grads"])

    def copy() -> None:
        for _ in range(steps):
            held["grads"] = multiply(held["grads"], jnp.float32(1))
        jax.block_until_ready(held)

    def read() -> None:
        jax.block_until_ready([squares(held["grads"]) for _ in range(steps)])

    return {"multiply in place": copy, "read": read}


def torch_contenders(shapes: models.Shapes, steps: int) -> dict[str, harness.Contender]:
    """PyTorch's Adam, alone and after clip_grad_norm_, where JAX has its arrays."""
    try:
        import torch
    except ImportError:
        torch = None
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if torch is None or (device == "cuda" and not torch.cuda.is_available()):
        print(f"PyTorch is not installed for {device}: its rows are left out.")
        return {}
    params = [torch.nn.Parameter(torch.randn(s, device=device)) for s in shapes]
    for param in params:
        param.grad = torch.randn_like(param)

    def contender(optimizer: Any, clip: bool) -> harness.Contender:
        def run() -> None:
            for _ in range(steps):
                if clip:
                    torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
                optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    found = {}
    for kind in ("fused", "foreach"):
        optimizer = torch.optim.Adam(params, lr=1e-3, **{kind: True})
        found[f"torch Adam {kind}"] = contender(optimizer, False)
        found[f"torch tree {kind}"] = contender(optimizer, True)
    return found


def timed(table: Table, only: list[str], size: Size) -> dict[str, Any]:
    """One table of Adam, or of clipping alone."""
    names = [name for name in table.names if name in only]
    found, counts = contenders(table, names, size.steps)
    if table.adam:
        found |= torch_contenders(table.shapes, size.steps)
    times = harness.alternate(found, size.rounds, table.title)
    times = {name: took / size.steps for name, took in times.items()}
    arrays = 4 * sum(int(np.prod(s)) for s in table.shapes)
    return {"rows": rows_of(times, counts, table.adam, arrays)}


def trained(only: list[str], size: Size) -> dict[str, Any]:
    """The table of the training step of a transformer in Flax NNX."""
    lists = ("group", "by hand, tree")  # these take no other trees
    names = [name for name in CLIPPERS if name in only and name not in lists]
    found, counts = {}, {}
    for name in tqdm(names, desc="compiling", leave=False):
        tx = CLIPPERS[name](optax.adam(1e-3))
        start = time.perf_counter()
        found[name] = transformer.training(tx, size.model, size.steps)
        found[name]()
        counts[name] = {"first_s": time.perf_counter() - start}
    times = harness.alternate(found, size.rounds, "training step")
    rows = {}
    for name, took in times.items():
        row = {"ms": float(np.median(took)) / size.steps} | counts[name]
        row["over_none"] = float(np.median(took / times["none"]))
        if OF_OPTAX.get(name) in times:
            row["optax_over_it"] = float(np.median(times[OF_OPTAX[name]] / took))
        rows[name] = row
    return {"rows": rows}


def measured(options: argparse.Namespace, size: Size) -> dict[str, Any]:
    """Every table that is begun in time; written after each."""
    start = time.perf_counter()
    jobs = {}
    for table in tables(size):
        if table.title.startswith("GPT-2"):
            jobs["Training step in Flax NNX, Adam"] = lambda: trained(
                options.only, size
            )
        jobs[table.title] = lambda table=table: timed(table, options.only, size)
    report: dict[str, Any] = {"tables": [], "environment": harness.environment()}
    for title, job in jobs.items():
        took = time.perf_counter() - start
        table = {"title": title, "rounds": size.rounds, "steps": size.steps, "rows": {}}
        if took > 60 * options.minutes:
            table["note"] = f"Left out: {options.minutes:g} minutes were over."
        else:
            try:
                table |= job()
            except Exception as error:  # such as no memory left: the others go on
                table["note"] = f"Failed: {type(error).__name__}: {error}"
        report["tables"].append(table)
        print("\n".join(timings(table)), flush=True)
        harness.save(options.output, report, markdown(report))
        jax.clear_caches()
    return report


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


COLUMNS = {
    "ms": "ms",
    "gb_per_s": "GB/s",
    "of_bandwidth": "fraction of the bandwidth",
    "added_over_read": "(step - Adam) / one read",
    "over_none": "step / step without clipping",
    "optax_over_it": "optax's / it",
    "kernels": "kernels",
    "launches": "launches",
    "trace_s": "seconds to trace",
    "compile_s": "to compile",
    "first_s": "seconds of the first steps",
}


def timings(found: dict[str, Any]) -> list[str]:
    """One table of times, without the columns that it does not have."""
    lines = [f"## {found['title']}", ""]
    if found.get("note"):
        return [*lines, found["note"], ""]
    keys = [k for k in COLUMNS if any(k in row for row in found["rows"].values())]
    rows = [
        [name, *(f"{row[key]:.4g}" if key in row else "" for key in keys)]
        for name, row in found["rows"].items()
    ]
    lines += [f"Medians of {found['rounds']} rounds of {found['steps']} steps.", ""]
    return [*lines, *harness.table(["", *(COLUMNS[k] for k in keys)], rows), ""]


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = [line for found in report.get("tables", []) for line in timings(found)]
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
    parser.add_argument("--dry-run", action="store_true", help="tiny, and on the CPU")
    parser.add_argument("--leaves", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--only", nargs="+", choices=CLIPPERS, default=[*CLIPPERS])
    parser.add_argument("--minutes", type=float, default=7, help="begin no table later")
    parser.add_argument("--output", type=pathlib.Path, help="write OUTPUT.json and .md")
    options = parser.parse_args()
    options.only = list(dict.fromkeys(["none", *options.only]))
    if options.dry_run:
        options.minutes = 60.0
    if options.dry_run or (jax.default_backend() == "gpu" and not options.ahead):
        size = TINY if options.dry_run else Size(leaves=tuple(options.leaves))
        measured(options, size)
        return
    try:
        report = {"compiled": ahead(options)}
    except (NotImplementedError, RuntimeError) as error:
        sys.exit(
            "There is no GPU here, and without JAX's plugin for CUDA nothing can be"
            f' compiled for one either: pip install "jax[cuda12]". ({error})'
        )
    report["environment"] = harness.environment()
    harness.write(options.output, report, markdown(report))


if __name__ == "__main__":
    main()
