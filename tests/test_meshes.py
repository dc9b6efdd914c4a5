"""The single-device answer, wherever the updates lie on the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_clipx as clipx

SPECS = {
    "both": P("x", "y"),
    "rows": P("x", None),
    "columns": P(None, "y"),
    "together": P(("x", "y"), None),
    "replicated": P(),
}
MEASURES = {
    "tree": clipx.tree_norm(),
    "tree_1": clipx.tree_norm(1),
    "tree_3": clipx.tree_norm(3),
    "tree_inf": clipx.tree_norm(np.inf),
    "tree_rms": clipx.tree_norm("rms"),
    "leaf": clipx.leaf_norms(),
    "leaf_rms": clipx.leaf_norms("rms"),
    "group": clipx.group_norms(lambda path, leaf: path[0][:1]),
    "unit": clipx.unit_norms(),
    "element": clipx.magnitudes(),
}
every_measure = pytest.mark.parametrize(
    "measure", MEASURES.values(), ids=MEASURES.keys()
)


def mesh(kind):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)


def tree():
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=(8, 4)).astype(np.float32) * 3.0**i
        for i, name in enumerate(SPECS)
    }


def on(mesh, values):
    return {
        k: jax.device_put(v, NamedSharding(mesh, SPECS[k])) for k, v in values.items()
    }


def expected(measure, values):
    return jax.jit(clipx.clip_by(measure, 0.7).update)(values)


def assert_same(found, want):
    for got, exact in zip(*map(jax.tree.leaves, (found, want)), strict=True):
        np.testing.assert_allclose(
            np.asarray(got, np.float64), np.asarray(exact, np.float64), rtol=2e-6
        )


@every_measure
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("context", [True, False])
def test_jit(measure, kind, context):
    values = on(mesh(kind), tree())
    step = jax.jit(clipx.clip_by(measure, 0.7).update)
    if context:
        with jax.set_mesh(mesh(kind)):
            clipped, state = step(values)
    else:
        clipped, state = step(values)
    assert_same((clipped, state), expected(measure, tree()))
    for name, leaf in clipped.items():
        assert leaf.sharding.is_equivalent_to(values[name].sharding, 2)


@every_measure
def test_eager_explicit(measure):
    clipped, state = clipx.clip_by(measure, 0.7).update(
        on(mesh(AxisType.Explicit), tree())
    )
    assert_same((clipped, state), expected(measure, tree()))


@every_measure
@pytest.mark.parametrize("told", ["types", "specs", "blind"])
def test_shard_map(measure, told):
    if measure.scope == "unit" and told == "types":
        told = "specs"  # a type does not say along which dimension a leaf is cut
    specs = None if told == "types" else SPECS
    clipper = clipx.clip_by(measure, 0.7, specs=specs)
    step = jax.shard_map(
        clipper.update,
        mesh=mesh(AxisType.Auto),
        in_specs=(SPECS,),
        out_specs=(SPECS, P()),
        check_vma=told != "blind",
    )
    assert_same(jax.jit(step)(tree()), expected(measure, tree()))


def test_units_in_manual_code_need_specs():
    step = jax.shard_map(
        clipx.clip_by(clipx.unit_norms(), 0.7).update,
        mesh=mesh(AxisType.Auto),
        in_specs=(SPECS,),
        out_specs=(SPECS, P()),
    )
    with pytest.raises(ValueError, match=r"units of both.*specs="):
        step(tree())


def test_partly_manual():
    clipper = clipx.clip_by_global_norm(0.7)
    for kind in (AxisType.Auto, AxisType.Explicit):
        specs = {k: P(*("x" if s == "x" else None for s in SPECS[k])) for k in SPECS}
        specs["together"] = P("x")
        step = jax.shard_map(
            clipper.update,
            mesh=mesh(kind),
            in_specs=(specs,),
            out_specs=(specs, P()),
            axis_names={"x"},
        )
        placed = {
            "both": P("x", "y"),
            "rows": P("x"),
            "columns": P(None, "y"),
            "together": P("x"),
            "replicated": P(),
        }
        values = {
            k: jax.device_put(v, NamedSharding(mesh(kind), placed[k]))
            for k, v in tree().items()
        }
        with jax.set_mesh(mesh(kind)):
            found = jax.jit(step)(values)
        assert_same(found, expected(clipx.tree_norm(), tree()))


@every_measure
def test_pmap_must_be_told(measure):
    values = jax.tree.map(lambda x: jnp.stack([x] * 8), tree())
    if measure.scope != "element":
        with pytest.raises(
            ValueError, match=r"axis_name=\(\).*pmean.*axis_name='i'.*specs="
        ):
            jax.pmap(clipx.clip_by(measure, 0.7).update, axis_name="i")(values)
    clipper = clipx.clip_by(measure, 0.7, axis_name=())
    clipped, _ = jax.pmap(clipper.update, axis_name="i")(values)
    want, _ = expected(measure, tree())
    assert_same(jax.tree.map(lambda x: x[3], clipped), want)


def test_pmap_over_shards():
    values = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    clipper = clipx.clip_by_global_norm(0.7, axis_name="i")
    clipped, _ = jax.pmap(clipper.update, axis_name="i")(values)
    want, _ = clipx.clip_by_global_norm(0.7).update(jnp.asarray(values))
    assert_same(clipped, want)


def test_vmap_is_for_each_example_unless_named():
    values = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5)), jnp.float32)
    alone = clipx.clip_by_global_norm(0.7)
    clipped, _ = jax.vmap(lambda g: alone.update(g), axis_name="i")(values)
    np.testing.assert_allclose(jnp.linalg.norm(clipped, axis=1), 0.7, rtol=1e-6)
    named = clipx.clip_by_global_norm(0.7, axis_name="i")
    clipped, _ = jax.vmap(lambda g: named.update(g), axis_name="i")(values)
    np.testing.assert_allclose(jnp.linalg.norm(clipped), 0.7, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30, 1e-30])
@pytest.mark.parametrize("policy", ["propagate", "zero"])
def test_one_shard_decides_for_all(bad, policy):
    values = tree()
    values["both"][7, 3] = bad
    if bad == 1e-30:
        values = {k: v * np.float32(1e-30) for k, v in values.items()}
    clipper = clipx.clip_by_global_norm(1e-31, nonfinite=policy)
    want = jax.jit(clipper.update)(values)
    for kind in (AxisType.Auto, AxisType.Explicit):
        assert_same(jax.jit(clipper.update)(on(mesh(kind), values)), want)
    step = jax.shard_map(
        clipper.update,
        mesh=mesh(AxisType.Auto),
        in_specs=(SPECS,),
        out_specs=(SPECS, P()),
    )
    assert_same(jax.jit(step)(values), want)


@pytest.mark.parametrize("leaves", [10, 200])
def test_one_all_reduce_of_one_short_vector(leaves):
    kinds = list(SPECS.values())
    values = [
        jax.device_put(
            np.ones((8, 4), np.float32),
            NamedSharding(mesh(AxisType.Explicit), kinds[i % len(kinds)]),
        )
        for i in range(leaves)
    ]
    step = jax.jit(lambda g: clipx.functional.clip_by_global_norm(g, 1.0)[0])
    text = step.lower(values).compile().as_text()
    reduces = [line for line in text.splitlines() if " all-reduce(" in line]
    # The usual path has one; the second stands in the branch for extreme magnitudes.
    assert len(reduces) == 2
    assert all("f32[] all-reduce" in line or "f32[1]" in line for line in reduces)


def test_an_unreduced_leaf_is_refused():
    explicit = mesh(AxisType.Explicit)
    with jax.set_mesh(explicit):
        x = jax.device_put(
            np.ones((8, 4), np.float32), NamedSharding(explicit, P(None, "x"))
        )
        y = jax.device_put(
            np.ones((4, 8), np.float32), NamedSharding(explicit, P("x", None))
        )

        @jax.jit
        def step(x, y):
            partial = jnp.matmul(x, y, out_sharding=P(None, None, unreduced={"x"}))
            return clipx.clip_by_global_norm(1.0).update({"w": partial})

        with pytest.raises(ValueError, match=r"at w are unreduced.*'x'"):
            step(x, y)


def test_a_value_made_varying_needs_specs():
    def step(x):
        x = lax.pcast(x, "y", to="varying")
        found = clipx.clip_by_global_norm(0.7, specs=P("x")).update(x)[1]
        return found.metrics.norm

    step = jax.shard_map(step, mesh=mesh(AxisType.Auto), in_specs=P("x"), out_specs=P())
    values = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(step)(values), np.linalg.norm(values), rtol=1e-6)
