"""Which leaf, label or layer holds most of the norm, and which ones it starves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_clipx as clipx


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def step(tx, grads):
    """The metrics and the state after a step."""
    _, state = jax.jit(tx.update)(grads, jax.jit(tx.init)(grads), grads)
    return clipx.metrics(state), state


GRADS = {"a": jnp.array([3.0]), "b": jnp.array([1.0]), "c": jnp.array([2.0, 1.0, 1.0])}
SGD = optax.sgd(0.1)


def test_the_share_of_the_largest_leaf():
    tx = clipx.track_norms(SGD)
    for scale in (1e-30, 1.0, 1e30):
        read, state = step(tx, {k: g * scale for k, g in GRADS.items()})
        np.testing.assert_allclose(read["track/dominant_share"], 9 / 16, rtol=1e-5)
        name, share = clipx.dominant_leaf(state)
        assert name == "a"
        assert share == pytest.approx(9 / 16, rel=1e-5)


def test_the_share_of_a_label():
    labels = {"a": "first", "b": "rest", "c": "rest"}
    read, state = step(clipx.track_norms(SGD, labels=labels), GRADS)
    np.testing.assert_allclose(read["track/dominant_share"], 9 / 16)
    assert clipx.dominant_leaf(state) == ("first", pytest.approx(9 / 16))


def test_gradients_of_zero_have_no_dominant_leaf():
    read, state = step(clipx.track_norms(SGD), {"a": jnp.zeros(2), "b": jnp.zeros(1)})
    assert float(read["track/dominant_share"]) == 0
    assert clipx.dominant_leaf(state)[1] == 0


def test_a_leaf_that_is_not_finite_is_named():
    tx = clipx.track_norms(SGD)
    for bad in (jnp.nan, jnp.inf):
        read, state = step(tx, {**GRADS, "b": jnp.array([bad])})
        assert np.isnan(read["track/dominant_share"])
        name, share = clipx.dominant_leaf(state)
        assert name == "b"
        assert np.isnan(share)


def starved(clipper, grads=GRADS, optimizer=SGD):
    return step(clipx.track_norms(optax.chain(clipper, optimizer)), grads)[0].get(
        "track/starved"
    )


def leaves(*norms):
    return {str(i): jnp.array([norm]) for i, norm in enumerate(norms)}


def test_leaves_with_steps_10_times_smaller_than_by_themselves_are_starved():
    clipper = clipx.clip_by_global_norm(1.0)
    # Alone they would go through times 1, 1, 1/2 and 1/12; together times 1/100.
    assert float(starved(clipper, leaves(100.0, 0.5, 2.0, 12.0))) == pytest.approx(
        2 / 3
    )


def test_leaves_without_a_gradient_are_not_starved():
    clipper = clipx.clip_by_global_norm(1.0)
    assert float(starved(clipper, leaves(100.0, 0.5, 0.0))) == 0.5


def test_below_the_threshold_nothing_is_starved():
    assert float(starved(clipx.clip_by_global_norm(1e3), leaves(100.0, 0.5))) == 0


def test_the_threshold_of_an_adaptive_clipper_counts():
    clipper = clipx.zclip(warmup_steps=1, max_norm=1.0)
    tx = clipx.track_norms(optax.chain(clipper, SGD))
    assert float(step(tx, leaves(100.0, 0.5))[0]["track/starved"]) == 1.0


@pytest.mark.parametrize(
    "clipper",
    [
        optax.identity(),
        clipx.clip_by_leaf_norm(1.0),
        clipx.clip(1.0),
        clipx.clip_by_global_norm(1.0, ord=jnp.inf),
        clipx.clip_by_global_norm(1.0, metrics=False),
    ],
)
def test_there_is_no_such_number_where_no_norm_of_all_leaves_clips(clipper):
    assert starved(clipper) is None


def test_a_clipper_of_something_else_says_nothing():
    tx = clipx.track_norms(optax.chain(optax.adam(0.1), clipx.clip_by_global_norm(1.0)))
    assert np.isnan(step(tx, GRADS)[0]["track/starved"])


@pytest.mark.parametrize(
    "wrap",
    [
        clipx.skip_spikes,
        lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
        lambda tx: optax.masked(tx, True),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.partition({"all": tx}, "all"),
        lambda tx: optax.inject_hyperparams(lambda x: optax.chain(tx, optax.scale(x)))(
            x=1.0
        ),
        lambda tx: clipx.reset_moments(tx, 10),
    ],
)
def test_a_clipper_within_a_wrapper_is_found(wrap):
    tx = wrap(optax.chain(clipx.clip_by_global_norm(1.0), SGD))
    read, _ = step(clipx.track_norms(tx), leaves(100.0, 0.5))
    assert float(read["track/starved"]) == 1.0


TRACK = clipx.track_norms(
    optax.chain(clipx.clip_by_global_norm(1.0), optax.adam(1e-3)),
    updates=True,
    second_moment=0.999,
)


def dominant(params, grads):
    _, state = jax.jit(TRACK.update)(grads, TRACK.init(params), params)
    return clipx.dominant_leaf(state)[0]


@pytest.mark.slow
def test_the_name_in_linen():
    params = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))
    grads = jax.tree.map(jnp.zeros_like, params)
    grads["params"]["bias"] = jnp.ones(3)
    assert dominant(params, grads) == "params/bias"


def test_the_name_in_nnx():
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, TRACK, wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.sum(m(100 * jnp.ones((1, 2)))))(model)
    nnx.jit(nnx.Optimizer.update)(optimizer, model, grads)
    name, share = clipx.dominant_leaf(optimizer.opt_state)
    assert name == "layers/0/kernel"
    assert share > 0.99
    read = clipx.metrics(optimizer.opt_state)
    assert {"track_ratios/layers/0/bias", "track_rms_t/layers/0/kernel"} <= set(read)


def test_the_name_in_equinox():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    grads = jax.tree.map(jnp.zeros_like, params)
    grads = eqx.tree_at(lambda m: m.layers[1].weight, grads, jnp.ones((1, 4)))
    assert dominant(params, grads) == "layers/1/weight"


@pytest.mark.slow
def test_the_name_in_haiku():
    hk = pytest.importorskip("haiku")
    net = hk.transform(lambda x: hk.nets.MLP([3, 1])(x))
    params = net.init(jax.random.key(0), jnp.ones((1, 2)))
    grads = jax.tree.map(jnp.zeros_like, params)
    grads["mlp/~/linear_1"]["w"] = jnp.ones((3, 1))
    assert dominant(params, grads) == "mlp/~/linear_1/w"


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(3)(x), None


def scanned_stack():
    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True},
                    length=4)()  # fmt: skip
    return stack.init(jax.random.key(0), jnp.ones((1, 3)), None)


STACKED = clipx.units.stacked(clipx.units.flax, "Dense_0")


@pytest.mark.parametrize("batch_axes", [0, STACKED, lambda path, leaf: 0])
def test_the_name_of_a_layer_in_a_scanned_stack(batch_axes):
    params = scanned_stack()
    grads = jax.tree.map(jnp.zeros_like, params)
    kernel = grads["params"]["Dense_0"]["kernel"]
    grads["params"]["Dense_0"]["kernel"] = kernel.at[2].set(1.0)
    tx = clipx.track_norms(SGD, batch_axes=batch_axes, updates=True)
    read, state = step(tx, grads)
    assert clipx.dominant_leaf(state) == ("params/Dense_0/kernel/2", 1.0)
    assert float(read["track_norms/params/Dense_0/kernel/2"]) == 3.0
    assert float(read["track_norms/params/Dense_0/bias/3"]) == 0.0
    assert float(read["track/vanishing"]) == 7


def stack():
    rng = np.random.default_rng(0)
    return {
        "blocks": jnp.asarray(rng.normal(size=(4, 8, 2)), jnp.float32),
        "experts": jnp.asarray(rng.normal(size=(4, 2, 8)), jnp.float32),
        "head": jnp.asarray(rng.normal(size=(8,)), jnp.float32),
    }


def layers(path, leaf):
    return {"blocks": 0, "experts": (0, 1), "head": None}[path[0]]


def test_norms_and_ratios_of_layers_are_those_of_numpy():
    grads = stack()
    tx = clipx.track_norms(
        optax.chain(clipx.clip_by_global_norm(1.0), SGD), batch_axes=layers, ratios=True
    )
    read, _ = step(tx, grads)
    norms = {n: float(x) for n, x in read.items() if n.startswith("track_norms/")}
    want = {f"track_norms/blocks/{i}": np.linalg.norm(grads["blocks"][i].ravel())
            for i in range(4)}  # fmt: skip
    want |= {f"track_norms/experts/{i}/{j}": np.linalg.norm(grads["experts"][i, j])
             for i in range(4) for j in range(2)}  # fmt: skip
    want["track_norms/head"] = np.linalg.norm(grads["head"])
    assert norms == pytest.approx(want, rel=1e-6)
    total = np.linalg.norm(list(want.values()))
    np.testing.assert_allclose(read["clip/norm"], total, rtol=1e-6)
    np.testing.assert_allclose(
        read["track_ratios/blocks/3"], 0.1 / total, rtol=1e-5
    )  # the parameters are the gradients


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_layers_on_a_mesh_that_cuts_the_stack(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    specs = {"blocks": P("x", "y"), "experts": P("x"), "head": P("y")}
    tx = clipx.track_norms(SGD, batch_axes=layers, updates=True)
    want, _ = step(tx, stack())
    with jax.set_mesh(mesh):
        grads = {
            name: jax.device_put(x, NamedSharding(mesh, specs[name]))
            for name, x in stack().items()
        }
        found, _ = step(tx, grads)
    assert found.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def test_layers_that_are_cut_in_manual_code_are_refused():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    specs = {"blocks": P("x")}
    tx = clipx.track_norms(SGD, batch_axes=0, specs=specs)

    def run(grads):
        return tx.update(grads, tx.init(grads))[0]

    with pytest.raises(ValueError, match=r"layers of blocks.*mesh axes \('x',\)"):
        jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=specs,
                      check_vma=False)({"blocks": stack()["blocks"]})  # fmt: skip


@pytest.mark.slow
def test_an_ensemble_under_vmap():
    grads = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), stack())
    tx = clipx.track_norms(SGD, batch_axes=layers)
    _, state = jax.vmap(tx.update)(grads, jax.vmap(tx.init)(grads))
    norms = clipx.metrics(state)["track_norms/blocks/3"]
    np.testing.assert_allclose(norms[1] / norms[0], 2.0, rtol=1e-6)
    with pytest.raises(ValueError, match=r"one model, got norms of shapes \[\(2,\)\]"):
        clipx.dominant_leaf(state)


def test_layers_of_a_state_that_pmap_has_replicated():
    tx = clipx.track_norms(SGD, batch_axes=layers, updates=True, axis_name=())
    grads = jax.tree.map(lambda x: jnp.stack([x] * 2), stack())
    state = jax.pmap(tx.init, "x")(grads)
    _, state = jax.pmap(tx.update, "x")(grads, state, grads)
    norm = clipx.metrics(state)["track_norms/blocks/3"]
    np.testing.assert_allclose(norm, np.linalg.norm(stack()["blocks"][3].ravel()), 1e-6)


def test_labels_and_layers_at_once_are_refused():
    with pytest.raises(ValueError, match="got both"):
        clipx.track_norms(SGD, labels={"a": 1}, batch_axes=0)


def test_two_names_of_which_one_is_a_layers_are_refused():
    grads = {"a": jnp.ones((2, 3)), "a/0": jnp.ones(3)}
    tx = clipx.track_norms(
        SGD, batch_axes=lambda path, leaf: 0 if leaf.ndim > 1 else ()
    )
    with pytest.raises(ValueError, match=r"\['a/0'\] twice"):
        tx.init(grads)


def test_a_state_without_norms_is_refused():
    with pytest.raises(ValueError, match=r"got tuple\. Put it around"):
        clipx.dominant_leaf(SGD.init(GRADS))


def test_a_state_without_its_types_is_read():
    from flax import serialization

    _, state = step(clipx.track_norms(SGD), GRADS)
    assert clipx.dominant_leaf(serialization.to_state_dict(state))[0] == "a"


def test_stacks_in_stacks():
    rule = clipx.units.stacked(clipx.units.flax, "experts")
    rule = clipx.units.stacked(rule, "blocks", axis=-1)
    axes = rule.batch_axes(("blocks", "experts", "kernel"), jnp.zeros((4, 3, 2, 5)))
    assert axes == (0, 3)
    assert rule.batch_axes(("blocks", "kernel"), jnp.zeros((3, 2, 5))) == (2,)
    assert rule.batch_axes(("head", "kernel"), jnp.zeros((3, 2))) == ()
