"""`tap`: one report a step, wherever the updates lie."""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from versions import EXPLICIT, since

import optax_clipx as clipx

sys.path.insert(0, str(Path(__file__).parent))
from tap_worker import scanned
from test_processes import HERE, free_port, start

GRADS = jnp.arange(1.0, 9.0)  # of norm 14.28
STEPS = 20
since_jax_0_10 = since((0, 10), "has an XLA that cannot nest this shard_map")


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def seen():
    return []


def make(seen, every=1, axis_name=None):
    clipper = clipx.clip_by_global_norm(1.0, axis_name=axis_name)
    return clipx.tap(
        optax.chain(clipper, optax.sgd(0.1)),
        lambda step, metrics: seen.append((step, round(metrics["clip/norm"], 2))),
        every=every,
    )


def check(seen, every=1):
    clipx.flush_taps()
    assert seen == [(step, 14.28) for step in range(0, STEPS, every)]


KINDS = [AxisType.Auto, EXPLICIT]


@pytest.mark.parametrize("kind", KINDS, ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [P(("x", "y")), P()], ids=["sharded", "replicated"])
def test_a_loop(seen, kind, spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    grads = jax.device_put(GRADS, NamedSharding(mesh, spec))
    tx = make(seen)
    update, state = jax.jit(tx.update), tx.init(grads)
    for _ in range(STEPS):
        _, state = update(grads, state)
    check(seen)


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("kind", KINDS, ids=["auto", "explicit"])
def test_a_scan_whose_results_nobody_keeps(seen, kind, every):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    grads = jax.device_put(GRADS, NamedSharding(mesh, P("x")))
    with jax.set_mesh(mesh):
        jax.jit(scanned(make(seen, every)))(grads)
        check(seen, every)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    ("sizes", "every"),
    [
        pytest.param((8,), 1, id="whole-1"),
        pytest.param((8,), 10, id="whole-10"),
        pytest.param((4, 2), 1, id="one_left-1"),
        pytest.param((4, 2), 10, id="one_left-10", marks=pytest.mark.slow),
        pytest.param((2, 2, 2), 1, id="two_left-1", marks=since_jax_0_10),
        pytest.param(
            (2, 2, 2), 10, id="two_left-10", marks=[since_jax_0_10, pytest.mark.slow]
        ),
    ],
)
def test_shard_map_over_the_first_axis(seen, sizes, check_vma, every):
    names = ("x", "y", "z")[: len(sizes)]
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))
    train = scanned(make(seen, every, axis_name=None if check_vma else "x"))
    mapped = jax.shard_map(
        lambda grads: jax.lax.psum(train(grads), "x"),
        mesh=mesh,
        in_specs=P("x"),
        out_specs=P(),
        axis_names={"x"},
        check_vma=check_vma,
    )
    jax.block_until_ready(jax.jit(mapped)(GRADS))
    check(seen, every)


def test_pmap(seen):
    train = jax.pmap(scanned(make(seen, axis_name="d")), axis_name="d")
    train(GRADS.reshape(8, 1))
    check(seen)


def test_seeds_over_devices(seen):
    """One report of all seeds, each of which lies on a device of its own."""
    tx = clipx.tap(
        clipx.clip_by_global_norm(1.0),
        lambda step, metrics: seen.append((step, metrics["clip/norm"].tolist())),
    )
    mesh = jax.make_mesh((8,), ("seed",), axis_types=(AxisType.Auto,))
    grads = jax.device_put(GRADS[:, None], NamedSharding(mesh, P("seed")))
    jax.jit(jax.vmap(lambda g: tx.update(g, tx.init(g))))(grads)
    clipx.flush_taps()
    assert seen == [(0, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])]


@pytest.mark.parametrize("kind", KINDS, ids=["auto", "explicit"])
def test_programs_communicate_as_without_it(seen, kind):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    grads = jax.device_put(GRADS, NamedSharding(mesh, P("d")))

    def collectives(tx):
        program = jax.jit(tx.update).lower(grads, tx.init(grads)).compile().as_text()
        kinds = r"= \S+ (all-\w+|collective-\w+|reduce-scatter)"
        return re.findall(kinds, program)

    bare = optax.chain(clipx.clip_by_global_norm(1.0), optax.sgd(0.1))
    alone = collectives(bare)
    assert alone
    assert collectives(make(seen, every=10)) == alone


@pytest.mark.slow
def test_one_of_two_processes_reports(tmp_path):
    """The one that holds the first device of the mesh."""
    coordinator = f"localhost:{free_port()}"
    files = [tmp_path / f"{i}.json" for i in range(2)]
    worker = HERE / "tap_worker.py"
    start([([worker, file, coordinator, 2, i], {}) for i, file in enumerate(files)])
    first, second = (json.loads(file.read_text()) for file in files)
    want = [[step, pytest.approx(np.linalg.norm(GRADS))] for step in range(STEPS)]
    assert set(first) == {"auto", "explicit", "backwards", "scan", "shard_map"}
    for name in first:
        reports, none = first[name], second[name]
        if name == "backwards":
            reports, none = none, reports
        assert reports == want, name
        assert none == [], name
