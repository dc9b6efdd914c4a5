"""What goes wrong on meshes elsewhere, and where clippers are used on them.

test_every_mesh.py has the table of all measures, test_programs.py the collectives.
"""

import contextlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from versions import MESH_OF_TRACED, since

import optax_clipx as clipx
from optax_clipx._devices.mesh import vary

EXPLICIT_VMAP = since((0, 10), "cannot put a branch under vmap over an Explicit axis")
HOST_MEMORY = since((0, 10), "does not return arrays in the memory of the host")

SPECS = {
    "both": P("x", "y"),
    "rows": P("x", None),
    "columns": P(None, "y"),
    "together": P(("x", "y"), None),
    "replicated": P(),
}
MEASURES = {
    "tree": clipx.measures.tree_norm(),
    "tree_1": clipx.measures.tree_norm(1),
    "tree_3": clipx.measures.tree_norm(3),
    "tree_inf": clipx.measures.tree_norm(np.inf),
    "tree_rms": clipx.measures.tree_norm("rms"),
    "leaf": clipx.measures.leaf_norms(),
    "leaf_rms": clipx.measures.leaf_norms("rms"),
    "group": clipx.measures.group_norms(lambda path, leaf: path[0][:1]),
    "unit": clipx.measures.unit_norms(),
    "element": clipx.measures.magnitudes(),
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


@pytest.mark.one_in(10)
@pytest.mark.parametrize(
    "measure",
    [
        pytest.param(m, id=name, marks=pytest.mark.slow if name == "unit" else ())
        for name, m in MEASURES.items()
    ],
)
def test_eager_explicit(measure):
    clipped, state = clipx.clip_by(measure, 0.7).update(
        on(mesh(AxisType.Explicit), tree())
    )
    assert_same((clipped, state), expected(measure, tree()))


def test_units_in_manual_code_need_specs():
    step = jax.shard_map(
        clipx.clip_by(clipx.measures.unit_norms(), 0.7).update,
        mesh=mesh(AxisType.Auto),
        in_specs=(SPECS,),
        out_specs=(SPECS, P()),
    )
    with pytest.raises(ValueError, match=r"units of both.*specs="):
        step(tree())


@pytest.mark.one_in(10)
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


@since((0, 8), "cannot tell the axis of a vmap from one of pmap")
def test_vmap_is_for_each_example_unless_named():
    values = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5)), jnp.float32)
    alone = clipx.clip_by_global_norm(0.7)
    each = jax.vmap(lambda g: alone.update(g), axis_name="i")
    clipped, _ = jax.jit(each)(values)
    np.testing.assert_allclose(jnp.linalg.norm(clipped, axis=1), 0.7, rtol=1e-6)
    named = clipx.clip_by_global_norm(0.7, axis_name="i")
    together = jax.vmap(lambda g: named.update(g), axis_name="i")
    clipped, _ = jax.jit(together)(values)
    np.testing.assert_allclose(jnp.linalg.norm(clipped), 0.7, rtol=1e-6)


@MESH_OF_TRACED
@pytest.mark.parametrize("policy", ["propagate", "zero"])
def test_one_shard_decides_for_all(policy):
    clipper = clipx.clip_by_global_norm(1e-31, nonfinite=policy)
    update = jax.jit(clipper.update)
    step = jax.shard_map(
        clipper.update,
        mesh=mesh(AxisType.Auto),
        in_specs=(SPECS,),
        out_specs=(SPECS, P()),
    )
    step = jax.jit(step)
    for bad in (np.nan, np.inf, 1e30, 1e-30):
        values = tree()
        values["both"][7, 3] = bad
        if bad == 1e-30:
            values = {k: v * np.float32(1e-30) for k, v in values.items()}
        want = update(values)
        for kind in (AxisType.Auto, AxisType.Explicit):
            assert_same(update(on(mesh(kind), values)), want)
        assert_same(step(values), want)


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
        x = vary(x, ("y",))
        found = clipx.clip_by_global_norm(0.7, specs=P("x")).update(x)[1]
        return found.metrics.norm

    step = jax.shard_map(step, mesh=mesh(AxisType.Auto), in_specs=P("x"), out_specs=P())
    values = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(step)(values), np.linalg.norm(values), rtol=1e-6)


def manual(step, specs, check_vma=True, **options):
    return jax.jit(
        jax.shard_map(
            step,
            mesh=mesh(AxisType.Auto),
            in_specs=(specs,),
            out_specs=(specs, P()),
            check_vma=check_vma,
            **options,
        )
    )


def test_the_largest_entry_of_a_replicated_leaf_is_not_shared_out():
    specs = {"cut": P("x"), "whole": P()}
    grads = {"cut": np.ones(8, np.float32), "whole": np.float32([6.0, 8.0])}
    clipper = clipx.clip_by_global_norm(4.0, ord=np.inf)
    clipped, state = manual(clipper.update, specs)(grads)
    np.testing.assert_allclose(clipped["whole"], [3.0, 4.0], rtol=1e-6)
    assert float(state.metrics.norm) == 8.0


def test_a_root_mean_square_counts_the_entries_on_all_devices():
    clipper = clipx.clip_by_global_norm(1.0, ord="rms")
    values = np.full(8, 3.0, np.float32)
    clipped, state = manual(clipper.update, P("x"))(values)
    np.testing.assert_allclose(clipped, np.ones(8), rtol=1e-6)
    assert float(state.metrics.norm) == pytest.approx(3.0, rel=1e-6)


def test_all_leaves_sharded():
    """optax: each device clips by the norm of its shard, together 2.83 times 1."""
    specs = P(("x", "y"))
    values = np.ones(8, np.float32)
    clipped, _ = manual(clipx.clip_by_global_norm(1.0).update, specs)(values)
    np.testing.assert_allclose(np.linalg.norm(clipped), 1, rtol=1e-6)
    theirs = optax.clip_by_global_norm(1.0).update
    wrong, _ = manual(lambda g: theirs(g, optax.EmptyState()), specs)(values)
    np.testing.assert_allclose(np.linalg.norm(wrong), 8**0.5, rtol=1e-6)


def test_one_shard_thirty_times_larger():
    """optax: the direction is lost (cosine .55)."""
    specs, values = P(("x", "y")), np.ones(8, np.float32)
    values[3] = 30

    def cosine(found):
        return found @ values / np.linalg.norm(found) / np.linalg.norm(values)

    clipped, _ = manual(clipx.clip_by_global_norm(1.0).update, specs)(values)
    np.testing.assert_allclose(cosine(np.asarray(clipped)), 1, rtol=1e-6)
    theirs = optax.clip_by_global_norm(1.0).update
    wrong, _ = manual(lambda g: theirs(g, optax.EmptyState()), specs)(values)
    assert cosine(np.asarray(wrong)) < 0.6


def test_replicas_stay_alike_where_types_are_blind():
    """optax, check_vma=False: a replicated leaf ends different on each device."""
    specs = {"sharded": P(("x", "y")), "replicated": P()}
    values = {
        "sharded": np.arange(1, 9, dtype=np.float32),
        "replicated": np.ones(3, np.float32),
    }
    clipper = clipx.clip_by_global_norm(1.0, specs=specs)
    clipped, _ = manual(clipper.update, specs, check_vma=False)(values)
    copies = {
        np.asarray(s.data).tobytes() for s in clipped["replicated"].addressable_shards
    }
    assert len(copies) == 1
    np.testing.assert_allclose(clipx.functional.global_norm(clipped), 1, rtol=1e-6)
    theirs = optax.clip_by_global_norm(1.0).update
    wrong, _ = manual(lambda g: theirs(g, optax.EmptyState()), specs, check_vma=False)(
        values
    )
    copies = {
        np.asarray(s.data).tobytes() for s in wrong["replicated"].addressable_shards
    }
    assert len(copies) == 8


def test_partial_manual_norm():
    """optax, two of the eight devices' axes manual: norm 2."""
    values = np.ones((4, 2), np.float32)
    options = {"axis_names": {"x"}}
    clipped, _ = manual(clipx.clip_by_global_norm(1.0).update, P("x"), **options)(
        values
    )
    np.testing.assert_allclose(np.linalg.norm(clipped), 1, rtol=1e-6)
    theirs = optax.clip_by_global_norm(1.0).update
    wrong, _ = manual(lambda g: theirs(g, optax.EmptyState()), P("x"), **options)(
        values
    )
    np.testing.assert_allclose(np.linalg.norm(wrong), 2, rtol=1e-6)


def test_a_sum_over_every_axis_counts_replicas_once():
    """A psum of squares over all axes has the replicated leaf eight times."""
    specs = {"sharded": P(("x", "y")), "replicated": P()}
    values = {"sharded": np.zeros(8, np.float32), "replicated": np.ones(1, np.float32)}
    _, state = manual(clipx.clip_by_global_norm(1.0).update, specs)(values)
    np.testing.assert_allclose(state.metrics.norm, 1, rtol=1e-6)


def test_clipping_before_pmean_cannot_be_seen():
    """docs/meshes.md: reduce first. Clipped before, the mean has another direction."""
    grads = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    grads[2] *= 30
    mean = grads.mean(0)
    clipper = clipx.clip_by_global_norm(1.0, axis_name=())

    def right(g):
        return clipper.update(lax.pmean(g, "i"))[0]

    def wrong(g):
        return lax.pmean(clipper.update(g)[0], "i")

    for step, least, most in ((right, 0.999, 1.001), (wrong, -1, 0.6)):
        found = np.asarray(jax.pmap(step, axis_name="i")(grads))[0]
        cosine = found @ mean / np.linalg.norm(found) / np.linalg.norm(mean)
        assert least <= cosine <= most


def test_optax_adaptive_clip_fails_on_explicit_axes():
    """As soon as a reduced axis is sharded; ours is in the table of meshes."""
    explicit = mesh(AxisType.Explicit)
    values = on(explicit, tree())
    clipper = optax.adaptive_grad_clip(0.1)
    with (
        jax.set_mesh(explicit),
        pytest.raises(Exception, match="harding"),
    ):
        jax.jit(lambda g: clipper.update(g, optax.EmptyState(), g))(values)


def test_eager_norm_outside_of_a_mesh_context():
    values = on(mesh(AxisType.Explicit), tree())
    found = clipx.functional.global_norm(values)
    want = np.sqrt(sum(np.sum(np.square(v, dtype=np.float64)) for v in tree().values()))
    np.testing.assert_allclose(found, want, rtol=1e-6)


@HOST_MEMORY
@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("jitted", [True, False])
def test_pinned_host_memory(kind, jitted):
    """optax: an obscure error from the sum of two memory spaces."""
    here = mesh(kind)
    values = {
        name: jax.device_put(
            np.full((8, 4), 3.0, np.float32),
            NamedSharding(here, P("x", "y"), memory_kind=memory),
        )
        for name, memory in (("host", "pinned_host"), ("device", "device"))
    }
    update = clipx.clip_by_global_norm(1.0).update
    clipped, state = (jax.jit(update) if jitted else update)(values)
    np.testing.assert_allclose(state.metrics.norm, 24, rtol=1e-6)
    np.testing.assert_allclose(clipped["host"], 3 / 24, rtol=1e-6)
    assert clipped["host"].sharding.memory_kind == "pinned_host"
    with pytest.raises(ValueError, match="memory_space"):
        jax.jit(lambda g: optax.clip_by_global_norm(1.0).update(g, None)[0])(values)


@EXPLICIT_VMAP
@pytest.mark.one_in(10)
@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P("x", "y")])
@pytest.mark.parametrize("scope", ["tree", "unit", "element"])
def test_vmap_over_explicit_axes(scope, spec, context):
    """An ensemble whose members lie on different devices."""
    explicit = mesh(AxisType.Explicit)
    values = np.random.default_rng(0).normal(size=(8, 4, 6)).astype(np.float32)
    clipper = clipx.clip_by(
        {
            "tree": clipx.measures.tree_norm,
            "unit": clipx.measures.unit_norms,
            "element": clipx.measures.magnitudes,
        }[scope](),
        0.7,
    )
    step = jax.jit(jax.vmap(lambda g: clipper.update(g)))
    want = step(values)
    with jax.set_mesh(explicit) if context else contextlib.nullcontext():
        found = step(jax.device_put(values, NamedSharding(explicit, spec)))
    assert_same(found, want)


@pytest.mark.parametrize("scope", ["tree", "unit"])
def test_scan_over_steps_in_manual_code(scope):
    """The state that a scan carries has one type from init on."""
    specs = {"a": P("x"), "b": P(), "c": P(None, "y")}
    values = {
        name: np.random.default_rng(i).normal(size=(8, 4)).astype(np.float32)
        for i, name in enumerate(specs)
    }
    make = {"tree": clipx.clip_by_global_norm, "unit": clipx.adaptive_grad_clip}[scope]

    def train(params, specs=None):
        tx = optax.chain(make(0.1, specs=specs), optax.sgd(0.1))

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(params, state, params)
            norm = clipx.metrics(state)["clip/norm"]
            return (optax.apply_updates(params, updates), state), norm

        (params, _), norms = lax.scan(step, (params, tx.init(params)), None, length=4)
        return params, norms

    told = specs if scope == "unit" else None
    found = manual(lambda p: train(p, told), specs)(values)
    assert_same(found, jax.jit(train)(values))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_scan_over_layers(kind):
    """Stacked layers, cut over the mesh inside of each layer."""
    here = mesh(kind)
    values = np.random.default_rng(0).normal(size=(3, 8, 4)).astype(np.float32)

    def by_scan(layers):
        def one(carry, layer):
            return carry, clipx.functional.clip_by_global_norm(layer, 0.7)

        return lax.scan(one, None, layers)[1]

    def by_batch_axes(layers):
        clipper = clipx.clip_by_leaf_norm(0.7, batch_axes=0)
        return clipper.update(layers)[0]

    placed = jax.device_put(values, NamedSharding(here, P(None, "x", "y")))
    with jax.set_mesh(here):
        clipped, norms = jax.jit(by_scan)(placed)
        stacked = jax.jit(by_batch_axes)(placed)
    np.testing.assert_allclose(
        norms, np.linalg.norm(values.reshape(3, -1), axis=1), rtol=1e-6
    )
    want = values * np.minimum(1, 0.7 / np.asarray(norms))[:, None, None]
    assert_same((clipped, stacked), (want, want))
    if kind == AxisType.Explicit:
        assert clipped.sharding.spec == P(None, "x", "y")


def test_the_message_helps():
    """What the error suggests, pasted, works."""
    specs = {"w": P(("x", "y")), "b": P()}
    values = {"w": np.ones((8, 2), np.float32), "b": np.ones(3, np.float32)}
    with pytest.raises(ValueError, match="Pass") as caught:
        manual(clipx.clip_by_global_norm(1.0).update, specs, check_vma=False)(values)
    suggested = re.findall(r"axis_name=(\(.*?\)|'\w+')", str(caught.value))
    assert suggested == ["()", "('x', 'y')"]

    def norm(step_specs, values, **told):
        step = clipx.clip_by_global_norm(1.0, **told).update
        return manual(step, step_specs, check_vma=False)(values)[1].metrics.norm

    same = {name: P() for name in specs}
    np.testing.assert_allclose(
        norm(same, values, axis_name=eval(suggested[0])), 19**0.5, rtol=1e-6
    )
    sharded = {"w": P(("x", "y"))}
    np.testing.assert_allclose(
        norm(sharded, {"w": values["w"]}, axis_name=eval(suggested[1])), 4, rtol=1e-6
    )
    np.testing.assert_allclose(norm(specs, values, specs=specs), 19**0.5, rtol=1e-6)


@pytest.mark.one_in(10)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize(
    "make",
    [clipx.clip_by_global_norm, clipx.clip_by_leaf_norm, clipx.adaptive_grad_clip],
)
def test_state_is_replicated_from_init_on(make, kind, context):
    """So a step is compiled once; optax's own states without a context are not."""
    here = mesh(kind)
    clipper, values = make(0.1), on(here, tree())
    with jax.set_mesh(here) if context else contextlib.nullcontext():
        step = jax.jit(clipper.update)
        state = clipper.init(values)
        for _ in range(3):
            before = [x.sharding for x in jax.tree.leaves(state)]
            _, state = step(values, state, values)
            assert [x.sharding for x in jax.tree.leaves(state)] == before
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
    assert step._cache_size() == 1


@pytest.mark.skipif(jax.__version_info__ >= (0, 8), reason="JAX 0.8 takes them")
def test_traced_explicit_updates_need_the_mesh_around_the_program():
    explicit = mesh(AxisType.Explicit)
    grads = jax.device_put(jnp.full((8, 2), 3.0), NamedSharding(explicit, P("x")))
    update = jax.jit(clipx.clip_by_global_norm(1.0).update)
    with pytest.raises(ValueError, match=r"program with jax\.set_mesh\(mesh\)"):
        update(grads)
    with jax.set_mesh(explicit):
        clipped, _ = update(grads)
    np.testing.assert_allclose(clipped, 0.25, rtol=1e-6)


@MESH_OF_TRACED
@pytest.mark.parametrize("bad", [None, np.nan, 1e6])
def test_stages_on_disjoint_meshes(bad):
    """docs/meshes.md: norms of stages, the norm of these norms, then each stage.

    optax, each stage by itself: together 1.41 instead of 1.
    """
    devices = np.array(jax.devices())
    stages = [
        jax.sharding.Mesh(devices[:4], ("x",), axis_types=(AxisType.Explicit,)),
        jax.sharding.Mesh(devices[4:], ("x",), axis_types=(AxisType.Explicit,)),
    ]
    values = [np.ones((8, 4), np.float32), np.ones((4, 2), np.float32)]
    if bad is not None:
        values[1][0, 0] = bad
    grads = [
        jax.device_put(v, NamedSharding(stage, P("x")))
        for v, stage in zip(values, stages, strict=True)
    ]
    norm_of = jax.jit(clipx.functional.global_norm)
    clipper = clipx.clip_by_global_norm(1.0, nonfinite="zero")
    update = jax.jit(clipper.update)

    norms = jax.device_get([norm_of(g) for g in grads])
    total = np.asarray(clipx.functional.global_norm(norms))
    clipped = [update(g, clipper.init(g), norm=total)[0] for g in grads]

    want, _ = clipper.update([jnp.asarray(v) for v in values])
    assert_same(clipped, want)
    if bad is None:
        alone = [optax.clip_by_global_norm(1.0).update(g, None)[0] for g in values]
        np.testing.assert_allclose(optax.tree.norm(alone), 2**0.5, rtol=1e-6)


@pytest.mark.parametrize(
    "said", [{"axis_name": "dat"}, {"axis_name": ("i", "dat")}, {"specs": P("dat")}]
)
def test_a_misspelled_axis_is_an_error_in_manual_code(said):
    """Its sum would be left out, and every device would have a norm of its own."""
    clipper = clipx.clip_by_global_norm(1.0, **said)
    update = jax.pmap(lambda g: clipper.update(g)[0], axis_name="i")
    with pytest.raises(ValueError, match=r"name axes of the mesh, got 'dat'; .* 'i'"):
        update(np.ones((8, 4), np.float32))
    # Outside of manual code there is no axis to name, as where a state is made.
    clipped, _ = clipper.update(jnp.full(4, 3.0))
    np.testing.assert_allclose(np.linalg.norm(clipped), 1, rtol=1e-6)


@EXPLICIT_VMAP
def test_gradients_of_models_along_an_explicit_axis():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(jnp.ones((8, 3, 4)), NamedSharding(mesh, P("data")))
    norm = clipx.measures.tree_norm()
    with jax.set_mesh(mesh):
        found = jax.jit(jax.vmap(jax.grad(lambda x: norm([x, 2 * x]))))(x)
    # The norm of both is the root of 5 times that of one, which is the root of 12.
    chex.assert_trees_all_close(found, jnp.full(x.shape, (5 / 12) ** 0.5), rtol=1e-6)
