"""`watch`: norms of leaves and groups, ratios, and what they cost."""

import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_clipx as clipx

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import hlo

PARAMS = {
    "a": {"kernel": jnp.full((3, 4), 2.0), "bias": jnp.zeros(4)},
    "b": jnp.full((5,), 0.5),
}


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax's optimizers rely on it
        yield


def grads_like(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params
    )


def chain(limit=0.5):
    return optax.chain(clipx.clip_by_global_norm(limit), optax.adam(1e-2))


@pytest.mark.parametrize("jitted", [False, True])
def test_norms_and_ratios_are_those_of_numpy(jitted):
    tx = clipx.track_norms(chain(), ratios=True)
    grads, state = grads_like(PARAMS), tx.init(PARAMS)
    update = jax.jit(tx.update) if jitted else tx.update
    updates, state = update(grads, state, PARAMS)
    want, _ = jax.jit(chain().update)(grads, chain().init(PARAMS), PARAMS)
    for ours, theirs in zip(
        jax.tree.leaves(updates), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    read = jax.jit(clipx.metrics)(state) if jitted else clipx.metrics(state)
    for name, path in {"a/kernel": ("a", "kernel"), "b": ("b",)}.items():
        grad, param, update_ = grads, PARAMS, updates
        for key in path:
            grad, param, update_ = grad[key], param[key], update_[key]
        norm = np.linalg.norm(np.ravel(grad))
        np.testing.assert_allclose(read[f"track_norms/{name}"], norm, rtol=1e-6)
        ratio = np.linalg.norm(np.ravel(update_)) / np.linalg.norm(np.ravel(param))
        np.testing.assert_allclose(read[f"track_ratios/{name}"], ratio, rtol=1e-6)
    assert np.isposinf(read["track_ratios/a/bias"])  # from zero to something
    total = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(read["clip/norm"], total, rtol=1e-6)
    assert int(read["track/vanishing"]) == int(read["track/exploding"]) == 0


def test_the_state_keeps_its_structure_and_scans():
    tx = clipx.track_norms(chain(), ratios=True)
    state = tx.init(PARAMS)
    _, after = tx.update(grads_like(PARAMS), state, PARAMS)
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype,
                        state, after)  # fmt: skip
    assert all(jax.tree.leaves(same))

    def step(carry, scale):
        grads = jax.tree.map(lambda g: g * scale, grads_like(PARAMS))
        _, carry = tx.update(grads, carry, PARAMS)
        return carry, clipx.metrics(carry)

    _, stacked = jax.lax.scan(step, state, jnp.arange(1.0, 4.0))
    history = clipx.History()
    history.append(range(3), stacked)
    norms = history["track_norms/b"]
    np.testing.assert_allclose(norms[1:] / norms[0], [2, 3], rtol=1e-6)


def test_groups():
    tx = clipx.track_norms(chain(), labels=lambda path, leaf: path[0])
    grads = grads_like(PARAMS)
    _, state = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)
    read = clipx.metrics(state)
    want = clipx.functional.group_norms(grads, lambda path, leaf: path[0])
    assert {n for n in read if n.startswith("track_norms")} == {
        "track_norms/a",
        "track_norms/b",
    }
    np.testing.assert_allclose(read["track_norms/a"], want["a"], rtol=1e-6)


def test_vanishing_and_exploding_leaves_are_counted():
    grads = {f"leaf{i}": jnp.full((10 * (i + 1),), 1.0) for i in range(5)}
    tx = clipx.track_norms(optax.identity(), vanishing=1e-3, exploding=1e3)
    state, update = tx.init(grads), jax.jit(tx.update)

    def counts(**changed):
        _, after = update({**grads, **changed}, state)
        read = clipx.metrics(after)
        return int(read["track/vanishing"]), int(read["track/exploding"])

    assert counts() == (0, 0)
    assert counts(leaf0=jnp.full((10,), 0.9e-3)) == (1, 0)
    assert counts(leaf0=jnp.full((10,), 1.1e-3)) == (0, 0)
    assert counts(leaf0=jnp.zeros(10), leaf1=jnp.full((20,), 1.1e3)) == (1, 1)
    assert counts(leaf2=jnp.full((30,), jnp.nan)) == (0, 1)
    assert counts(leaf2=jnp.full((30,), jnp.inf), leaf3=jnp.zeros(40)) == (1, 1)


def test_the_clipper_inside_gets_the_whole_norm_at_any_magnitude():
    tx = clipx.track_norms(clipx.clip_by_global_norm(1e-20))
    update = jax.jit(tx.update)
    sizes = np.float32([1e-30, 1e-15, 1.0, 1e15, 3e36]), np.float32([1e-30, 1.0, 1e30])
    for one, other in itertools.product(*sizes):
        grads = {"a": jnp.full(40, one), "b": jnp.full(7, other), "z": jnp.zeros(3)}
        clipped, state = update(grads, tx.init(grads))
        want = np.sqrt(40 * np.float64(one) ** 2 + 7 * np.float64(other) ** 2)
        np.testing.assert_allclose(clipx.metrics(state)["clip/norm"], want, rtol=1e-5)
        norm = clipx.functional.global_norm(clipped)
        np.testing.assert_allclose(norm, min(1e-20, want), rtol=1e-5)


def test_nonfinite_gradients_reach_the_policy_inside():
    for bad in (jnp.inf, jnp.nan):
        grads = {"a": jnp.array([1.0, bad]), "b": jnp.ones(2)}
        tx = clipx.track_norms(clipx.clip_by_global_norm(1.0, nonfinite="zero"))
        clipped, state = tx.update(grads, tx.init(grads))
        assert not np.any(clipped["b"])
        assert int(clipx.metrics(state)["clip/num_nonfinite"]) == 1
        with pytest.raises(FloatingPointError):
            clipx.check(state)


@pytest.mark.one_in(2, rest="slow")
@pytest.mark.parametrize("explicit", [True, False])
def test_on_a_mesh_as_on_one_device(explicit):
    kind = AxisType.Explicit if explicit else AxisType.Auto
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    grads = {"w": jnp.arange(1.0, 33.0).reshape(8, 4), "b": jnp.arange(1.0, 5.0)}
    params = jax.tree.map(lambda g: 2 * g, grads)
    tx = clipx.track_norms(chain(), ratios=True)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    want = clipx.metrics(state)
    with jax.set_mesh(mesh):
        places = {"w": P("x"), "b": P()}

        def put(tree):
            return jax.tree.map(
                lambda x, p: jax.device_put(x, NamedSharding(mesh, p)), tree, places
            )

        grads, params = put(grads), put(params)
        state = jax.jit(tx.init)(params)
        _, state = jax.jit(tx.update)(grads, state, params)
        found = clipx.metrics(state)
        text = jax.jit(clipx.track_norms(chain()).update).lower(
            grads, clipx.track_norms(chain()).init(params), params
        ).compile().as_text()  # fmt: skip
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
    usual = [c for c in hlo.collectives(text) if not c.in_branch]
    if explicit:
        assert len(usual) == 1


def test_inside_shard_map_blind_types_need_specs():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    grads = {"w": jnp.arange(1.0, 33.0).reshape(8, 4), "b": jnp.arange(1.0, 5.0)}
    specs = {"w": P("x"), "b": P()}
    tx = clipx.track_norms(clipx.clip_by_global_norm(1.0, specs=specs), specs=specs)

    def step(grads):
        _, state = tx.update(grads, tx.init(grads))
        return clipx.metrics(state)

    found = jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(specs,), out_specs=P(), check_vma=False
        )
    )(grads)
    norm = np.linalg.norm(np.arange(1.0, 33.0))
    np.testing.assert_allclose(found["track_norms/w"], norm, rtol=1e-6)
    blind = clipx.track_norms(clipx.clip_by_global_norm(1.0, specs=specs))
    with pytest.raises(ValueError, match="specs="):
        jax.jit(
            jax.shard_map(
                lambda g: blind.update(g, blind.init(g))[0],
                mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=False,
            )
        )(grads)  # fmt: skip


def test_in_an_nnx_optimizer():
    model = nnx.Sequential(
        nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 1, rngs=nnx.Rngs(1))
    )
    optimizer = nnx.Optimizer(
        model, clipx.track_norms(chain(), ratios=True), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2))) ** 2))(model)
        optimizer.update(model, grads)
        return clipx.metrics(optimizer.opt_state)

    for _ in range(2):
        read = step(model, optimizer)
    names = {n for n in read if n.startswith("track_norms/")}
    assert "track_norms/layers/0/kernel" in names
    assert len(names) == 4
    assert all(float(read[n]) > 0 for n in names)


def test_bad_input():
    with pytest.raises(TypeError):  # beartype is first, with words of its own
        clipx.track_norms(1.0)
    state = clipx.track_norms(optax.identity()).init(PARAMS)
    with pytest.raises(ValueError, match="track_norms or"):
        clipx.check(state)
    with pytest.raises(ValueError, match="vanishing=2"):
        clipx.track_norms(chain(), vanishing=2, exploding=1)
    with pytest.raises(ValueError, match="a/b"):
        clipx.track_norms(chain()).init({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)})
    tx = clipx.track_norms(clipx.clip_by_global_norm(1.0), ratios=True)
    with pytest.raises(ValueError, match="params"):
        tx.update(PARAMS, tx.init(PARAMS))


def compiled(tx, keep):
    params = {f"w{i}": jnp.ones((512, 512)) for i in range(8)}

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, keep(state)

    return jax.jit(step, donate_argnums=(0, 1)).lower(
        params, tx.init(params), params
    ).compile()  # fmt: skip


def full_size(program):
    """The fusions, outside of branches, that read or write a whole leaf."""
    text = program.as_text()
    branches = hlo._branch_computations(text)
    return sum(
        " fusion(" in line and "f32[512,512]" in line and computation not in branches
        for computation, line in hlo._lines(text)
    )


@pytest.mark.parametrize("watched", [False, True])
def test_metrics_cost_no_pass_over_the_gradients(watched):
    def make(metrics):
        clipper = clipx.clip_by_global_norm(1.0, metrics=metrics)
        return optax.chain(clipper, optax.adam(1e-3))

    without = compiled(make(False), lambda state: ())
    tx = clipx.track_norms(make(True)) if watched else make(True)
    with_metrics = compiled(tx, clipx.metrics)
    assert full_size(without) >= 8  # a pass of Adam for each leaf, at the least
    assert full_size(with_metrics) == full_size(without)
    assert "callback" not in with_metrics.as_text()
    bytes_without = hlo.memory(without)["bytes_accessed"]
    assert hlo.memory(with_metrics)["bytes_accessed"] <= 1.01 * bytes_without


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: clipx.track_norms(clipx.skip_spikes(tx)),
        lambda tx: clipx.skip_spikes(clipx.track_norms(tx)),
        lambda tx: optax.MultiSteps(clipx.track_norms(tx), 1).gradient_transformation(),
        lambda tx: optax.masked(clipx.track_norms(tx), {"a": True, "b": True}),
        lambda tx: optax.apply_if_finite(clipx.track_norms(tx), 3),
    ],
)
def test_inside_and_around_wrappers(wrap):
    tx = wrap(chain())
    grads = grads_like(PARAMS)
    _, state = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)
    read = clipx.metrics(state)
    total = clipx.functional.global_norm(grads)
    np.testing.assert_allclose(read["clip/norm"], total, rtol=1e-6)
    norm = np.linalg.norm(np.ravel(grads["b"]))
    np.testing.assert_allclose(read["track_norms/b"], norm, rtol=1e-6)


def test_two_watchers_are_told_apart():
    tx = optax.named_chain(
        ("first", clipx.track_norms(optax.scale(2.0))),
        ("last", clipx.track_norms(chain())),
    )
    grads = grads_like(PARAMS)
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    read = clipx.metrics(state)
    first, last = read["track_norms/first/b"], read["track_norms/last/b"]
    np.testing.assert_allclose(last / first, 2.0, rtol=1e-6)
    assert "track/first/vanishing" in read
