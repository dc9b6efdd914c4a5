"""The table: every measure, every way to lie on a mesh, three meshes, two dtypes.

All measures of one cell are one program, which compiles faster than one for each. A
cell takes a sixth of them, another one on each mesh, and all with OPTAX_CLIPX_WHOLE=1.
"""

import functools
import os

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_clipx as clipx

WHOLE = bool(os.environ.get("OPTAX_CLIPX_WHOLE"))
LIMIT = 0.7
ORDERS = {"1": 1, "2": 2, "3": 3, "inf": np.inf, "rms": "rms"}
SCOPES = {
    "tree": clipx.measures.tree_norm,
    "leaf": clipx.measures.leaf_norms,
    "group": functools.partial(
        clipx.measures.group_norms, lambda path, leaf: path[0] < "c"
    ),
    "unit": lambda ord: clipx.measures.unit_norms(ord),
    "stacked": lambda ord: clipx.measures.leaf_norms(ord, batch_axes=1),
}
MEASURES = {
    f"{scope}_{order}": make(ord=ord)
    for scope, make in SCOPES.items()
    for order, ord in ORDERS.items()
} | {"element": clipx.measures.magnitudes()}
METHODS = {
    name: functools.partial(clipx.clip_by, measure, LIMIT)
    for name, measure in MEASURES.items()
} | {"relative": functools.partial(clipx.adaptive_grad_clip, 0.1)}
NEED_SPECS = ("unit", "stacked", "relative")  # where types alone say too little

MESHES = {
    "8": ((8,), ("x",)),
    "4x2": ((4, 2), ("x", "y")),
    "2x2x2": ((2, 2, 2), ("x", "y", "z")),
}
SPECS = {
    "8": {
        "a": P("x", None),
        "b": P(None, "x"),
        "c": P(),
        "d": P("x"),
        "e": P(None, None, "x"),
    },
    "4x2": {
        "a": P("x", "y"),
        "b": P("x", None),
        "c": P(None, "y"),
        "d": P(("x", "y"), None),
        "e": P(),
        "f": P("y", None, "x"),
    },
    "2x2x2": {
        "a": P("x", "y"),
        "b": P(("z", "x"), None),
        "c": P(None, ("x", "y", "z")),
        "d": P("y"),
        "e": P(),
        "f": P("x", "y", "z"),
    },
}


def updates(specs, dtype):
    rng = np.random.default_rng(0)
    return {
        name: (rng.normal(size=(8, 16, 8)[: max(2, len(spec))]) * 3.0**i / 9).astype(
            dtype
        )
        for i, (name, spec) in enumerate(specs.items())
    }


def mesh_of(name, kind):
    shape, axes = MESHES[name]
    return jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes))


def put(mesh, specs, values):
    return {
        name: jax.device_put(value, NamedSharding(mesh, specs[name]))
        for name, value in values.items()
    }


def methods_for(values, turn):
    """A sixth; in bfloat16 without the orders 1, 3 and rms, to save time."""
    names = list(METHODS)
    if any(x.dtype != np.float32 for x in values.values()):
        names = [n for n in names if n.split("_")[-1] not in ("1", "3", "rms")]
    return names if WHOLE else names[turn::6]


def every_method(values, *, turn, specs_for=(), specs=None):
    """For each method the clipped updates and the metrics."""
    found = {}
    for name in methods_for(values, turn):
        make = METHODS[name]
        told = specs if name.split("_")[0] in specs_for else None
        clipper = make(specs=told)
        clipped, state = clipper.update(values, None, values)
        found[name] = clipped, state.metrics
    return found


@functools.cache
def single(mesh_name, dtype, turn):
    """The answer of one device, which knows of no mesh."""
    step = jax.jit(functools.partial(every_method, turn=turn))
    return jax.device_get(step(updates(SPECS[mesh_name], np.dtype(dtype))))


def in_jit(mesh, specs, values, turn, context=True):
    step = jax.jit(functools.partial(every_method, turn=turn))
    if not context:
        return step(put(mesh, specs, values))
    with jax.set_mesh(mesh):
        return step(put(mesh, specs, values))


def mapped(map_over, values, turn):
    """pmap, or vmap with an axis name, over the shards of the only mesh axis."""
    specs = SPECS["8"]
    told = {
        name: P(*("i" if e == "x" else None for e in s)) for name, s in specs.items()
    }
    cut = {name: [i for i, e in enumerate(s) if e == "x"] for name, s in specs.items()}
    shards = {
        name: np.stack(np.split(x, 8, cut[name][0]) if cut[name] else [x] * 8)
        for name, x in values.items()
    }
    step = functools.partial(
        every_method,
        turn=turn,
        specs=told,
        specs_for=SCOPES.keys() | METHODS.keys(),
    )
    found = jax.device_get(map_over(step, axis_name="i")(shards))

    def whole(name, x):
        if cut[name]:
            return np.concatenate(list(x), cut[name][0])
        assert all(np.array_equal(x[0], y) for y in x)
        return x[0]

    return {
        method: (
            {name: whole(name, x) for name, x in clipped.items()},
            jax.tree.map(lambda x: x[-1], metrics),
        )
        for method, (clipped, metrics) in found.items()
    }


def in_shard_map(mesh, specs, values, turn, manual, check_vma=True):
    """Over the manual axes; the others stay with jit."""
    inner = {
        name: P(*(keep(entry, manual) for entry in spec))
        for name, spec in specs.items()
    }
    step = jax.shard_map(
        functools.partial(
            every_method,
            turn=turn,
            specs=inner,
            specs_for=NEED_SPECS if check_vma else SCOPES.keys() | METHODS.keys(),
        ),
        mesh=mesh,
        in_specs=(inner,),
        out_specs={name: (inner, P()) for name in methods_for(values, turn)},
        axis_names=set(manual),
        check_vma=check_vma,
    )
    with jax.set_mesh(mesh):
        return jax.jit(step)(put(mesh, specs, values))


def names_of(entry):
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def keep(entry, manual):
    return tuple(name for name in names_of(entry) if name in manual) or None


def first(entry, manual):
    return tuple(sorted(names_of(entry), key=lambda n: n not in manual)) or None


def cells(mesh_name):
    axes = MESHES[mesh_name][1]
    auto, explicit = (
        mesh_of(mesh_name, kind) for kind in (AxisType.Auto, AxisType.Explicit)
    )
    found = {
        "auto": functools.partial(in_jit, auto),
        "explicit": functools.partial(in_jit, explicit),
        "explicit, no context": functools.partial(in_jit, explicit, context=False),
        "shard_map": functools.partial(in_shard_map, auto, manual=axes),
        "shard_map, Explicit": functools.partial(in_shard_map, explicit, manual=axes),
        "check_vma=False": functools.partial(
            in_shard_map, auto, manual=axes, check_vma=False
        ),
    }
    if len(axes) == 1:
        for name, map_over in (("pmap", jax.pmap), ("vmap", jax.vmap)):
            found[name] = lambda specs, values, turn, map_over=map_over: mapped(
                map_over, values, turn
            )
        return found
    for some in (axes[:1], axes[1:]):
        for kind, mesh in (("Auto", auto), ("Explicit", explicit)):
            found[f"{'+'.join(some)} manual, {kind}"] = functools.partial(
                in_shard_map, mesh, manual=some
            )
    return found


USUAL = {("4x2", "explicit")}  # the rest is slow


def every_cell():
    for i, mesh_name in enumerate(MESHES):
        for j, cell in enumerate(cells(mesh_name)):
            for k, dtype in enumerate(("float32", "bfloat16")):
                usual = dtype == "float32" and (mesh_name, cell) in USUAL
                marks = [] if usual else [pytest.mark.slow]
                other = (mesh_name != "2x2x2" or j % 2) if k else (i + j) % 2
                if other and not usual:
                    marks.append(pytest.mark.whole)
                turn = (i + j + 3 * k) % 6
                name = f"{mesh_name}-{cell}-{dtype}"
                yield pytest.param(mesh_name, cell, dtype, turn, marks=marks, id=name)


@pytest.mark.parametrize(("mesh_name", "cell", "dtype", "turn"), list(every_cell()))
def test_single_device_answer(mesh_name, cell, dtype, turn, record_property):
    specs = SPECS[mesh_name]
    if " manual" in cell:  # other axes can only cut what the manual ones leave
        manual = cell.split()[0].split("+")
        specs = {name: P(*(first(e, manual) for e in s)) for name, s in specs.items()}
    values = updates(specs, np.dtype(dtype))
    found = cells(mesh_name)[cell](specs=specs, values=values, turn=turn)
    want = single(mesh_name, dtype, turn)
    worst = 0.0
    assert found.keys() == want.keys()
    for method, (clipped, metrics) in found.items():
        want_clipped, want_metrics = want[method]
        for field, got, exact in zip(
            metrics._fields, metrics, want_metrics, strict=True
        ):
            worst = max(worst, error(got, exact, f"{method} {field}"))
        for name, leaf in clipped.items():
            if isinstance(leaf, jax.Array):
                same_on_copies(leaf)
                if "manual, Auto" not in cell:  # there XLA is free to choose
                    sharding = NamedSharding(leaf.sharding.mesh, specs[name])
                    assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            if dtype == "bfloat16":
                within_one_ulp(leaf, want_clipped[name], f"{method} {name}")
            else:
                worst = max(worst, error(leaf, want_clipped[name], f"{method} {name}"))
    record_property("max_relative_error", worst)


def error(got, exact, what):
    got, exact = np.asarray(got, np.float64), np.asarray(exact, np.float64)
    scale = np.where(exact == 0, 1, np.abs(exact))
    worst = float(np.max(np.abs(got - exact) / scale))
    assert worst <= 1e-6, (what, worst)
    return worst


def within_one_ulp(got, exact, what):
    def ordered(x):
        bits = np.asarray(x, ml_dtypes.bfloat16).view(np.int16).astype(np.int32)
        return np.where(bits < 0, -(bits & 0x7FFF), bits)

    assert np.max(np.abs(ordered(got) - ordered(exact))) <= 1, what


def same_on_copies(leaf):
    """Shards of one index are the same, bit for bit, on all their devices."""
    by_index = {}
    for shard in leaf.addressable_shards:
        data = np.asarray(shard.data).tobytes()
        assert by_index.setdefault(str(shard.index), data) == data
