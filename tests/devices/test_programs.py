"""What compiled programs exchange: one short collective, however many leaves."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_clipx as clipx

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import hlo  # noqa: E402

SPECS = [P("x", "y"), P("x", None), P(None, "y"), P(("x", "y"), None), P()]
SCOPES = {
    "tree": clipx.clip_by_global_norm(1.0),
    "inf": clipx.clip_by_global_norm(1.0, ord=np.inf),
    "3": clipx.clip_by_global_norm(1.0, ord=3),
    "leaf": clipx.clip_by_leaf_norm(1.0),
    "group": clipx.clip_by_group_norm({0: 1.0, 1: 2.0}, lambda p, x: int(p[0]) % 2),
}


def on_cpu(clipper, leaves, way):
    """The compiled clip of bfloat16 leaves of five shardings, on eight devices."""
    kind = AxisType.Explicit if way == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    specs = [SPECS[i % 5] for i in range(leaves)]
    updates = [
        jax.ShapeDtypeStruct((8, 4), jnp.bfloat16, sharding=NamedSharding(mesh, s))
        for s in specs
    ]
    with jax.set_mesh(mesh):
        kinds = jax.eval_shape(clipper.init, updates)
    state = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(
            s.shape, s.dtype, sharding=NamedSharding(mesh, P())
        ),
        kinds,
    )
    step = clipper.update
    if way == "shard_map":
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(specs, P()), out_specs=(specs, P())
        )
    with jax.set_mesh(mesh):
        return jax.jit(step, donate_argnums=(0, 1)).lower(updates, state).compile()


@pytest.mark.one_in(2, rest="slow")
@pytest.mark.parametrize("way", ["explicit", "shard_map"])
@pytest.mark.parametrize(
    ("scope", "leaves"),
    [
        *((scope, 10) for scope in SCOPES),
        ("tree", 50),
        pytest.param("tree", 1000, marks=pytest.mark.slow),
    ],
)
def test_collectives_on_cpu(scope, leaves, way):
    program = on_cpu(SCOPES[scope], leaves, way)
    found = hlo.collectives(program.as_text())
    usual = [c for c in found if not c.in_branch]
    groups = {"leaf": leaves, "group": 2}.get(scope, 1)
    assert [c.kind for c in found] == ["all-reduce"] * len(found)
    # Other orders take a maximum first; infinity takes nothing else.
    assert len(usual) == (2 if scope == "3" else 1)
    for collective in usual:
        assert collective.dtypes == ["f32"]
        assert collective.bytes == 4 * groups
    # The branch for extreme magnitudes holds the only other one.
    assert len(found) - len(usual) == (scope in ("tree", "leaf", "group"))
    sizes = program.memory_analysis()
    assert sizes.alias_size_in_bytes == sizes.argument_size_in_bytes


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs pip install libtpu"
)
@pytest.mark.parametrize("leaves", [10, pytest.param(200, marks=pytest.mark.whole)])
def test_collectives_on_a_pod(tmp_path, leaves):
    """1,024 chips of TPU v5p, compiled ahead of time."""
    line = ["--topologies", "v5p:8x8x16", "--leaves", str(leaves), "--dim", "256"]
    line += ["--layouts", "10 leaves", "20 leaves"]
    subprocess.run(
        [sys.executable, BENCHMARKS / "pod.py", *line, "--output", tmp_path / "pod"],
        env=os.environ | {"XLA_FLAGS": ""},  # libtpu stops at flags of the CPU
        check=True,
    )
    rows = json.loads((tmp_path / "pod.json").read_text())
    assert len(rows) == 27
    # To a train step the norm of the tree adds one all-reduce of three sums.
    assert "| tree | dim 256 | +1 | +1 | +12 |" in (tmp_path / "pod.md").read_text()
    steps = {r["clipper"]: r for r in rows if r["program"] == "train step"}
    for name in ("zclip", "skip_spikes, tree"):
        fixed = steps["tree"]
        assert steps[name]["bytes_accessed"] <= 1.02 * fixed["bytes_accessed"]
        assert len(steps[name]["collectives"]) == len(fixed["collectives"])
    fusions = {(r["clipper"], r["layout"]): r["fusions"] for r in rows if "layout" in r}
    ten = {
        name: fusions[name, "20 leaves"] - fusions[name, "10 leaves"]
        for name in ("none", "tree")
    }
    assert ten["tree"] == ten["none"] + 10  # a leaf takes one more, for its sums
    payload = {
        "tree": [4 * 3],  # sums of squares at three scales
        "tree, ord=inf": [4],
        "tree, ord=3": [4, 4],
        "leaf": [4 * 3 * leaves],
        "group": [4 * 3 * 2],
    }
    seen = 0
    for row in rows:
        assert "error" not in row, row
        assert row["conditionals"] == 0
        if row["program"] != "clip":
            # A step of Adam gets its gradients from outside, and keeps them.
            share = 0.99 if row["program"] == "train step" else 0.74
            assert row["alias_bytes"] >= share * row["argument_bytes"]
            continue
        if row["way"] == "Auto" or row["clipper"].startswith("optax"):
            continue
        seen += 1
        found = row["collectives"]
        assert {c["kind"] for c in found} == {"all-reduce"}
        assert {o.split("[")[0] for c in found for o in c["operands"]} == {"f32"}
        if row["clipper"] == "unit (AGC)":
            # Reduced over x, over x and y, and the metrics over what is kept.
            assert len(found) == 3
            assert row["alias_bytes"] >= 0.49 * row["argument_bytes"]
        else:
            assert [c["bytes"] for c in found] == payload[row["clipper"]]
            assert row["alias_bytes"] == row["argument_bytes"]
    assert seen == 12


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is not None, reason="can compile"
)
@pytest.mark.slow
def test_the_benchmark_for_gpus_says_what_is_missing():
    line = [sys.executable, BENCHMARKS / "gpu.py", "--ahead", "--leaves", "1"]
    found = subprocess.run(line, capture_output=True, text=True)
    assert found.returncode == 1
    assert 'pip install "jax[cuda12]"' in found.stderr
    assert "Traceback" not in found.stderr
