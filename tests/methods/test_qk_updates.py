"""QK-Clip as a transformation after any optimizer, and its metrics."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_clipx as clipx

LAYOUT = clipx.qk.mha("attn/query/kernel", "attn/key/kernel")
MAXIMA = {"attn": jnp.array([50.0, 400.0, -1.0, jnp.nan])}


def tree(seed, size=1.0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    kernels = {
        name: {"kernel": jnp.asarray(size * rng.normal(size=(6, 4, 8)), dtype)}
        for name in ("query", "key", "value")
    }
    return {"attn": kernels, "out": jnp.asarray(rng.normal(size=3), dtype)}


def steps(tx, params, maxima=MAXIMA, number=1):
    state = tx.init(params)
    for seed in range(number):
        updates, state = tx.update(tree(seed + 9), state, params, max_logits=maxima)
        params = optax.apply_updates(params, updates)
    return params, state


def test_it_leads_to_the_clipped_weights():
    params = tree(0)
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), clipx.qk_clip_updates(LAYOUT))
    got, _ = steps(tx, params)
    usual, _ = steps(
        optax.with_extra_args_support(optax.sgd(0.1, momentum=0.9)), params
    )
    want = clipx.qk_clip(usual, MAXIMA, LAYOUT)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(got["out"], usual["out"])
    query, was = got["attn"]["query"]["kernel"], usual["attn"]["query"]["kernel"]
    np.testing.assert_array_equal(query[:, 0], was[:, 0])
    np.testing.assert_allclose(query[:, 1], was[:, 1] / 2, rtol=1e-5, atol=1e-7)


def test_the_optimizer_state_is_that_without_it():
    tx = optax.chain(optax.adam(0.1), clipx.qk_clip_updates(LAYOUT))
    with jax.numpy_dtype_promotion("standard"):  # Adam needs it
        _, state = steps(tx, tree(0))
        _, usual = steps(optax.with_extra_args_support(optax.adam(0.1)), tree(0))
    chex.assert_trees_all_equal(state[0], usual)


def test_metrics():
    tx = optax.chain(
        clipx.clip_by_global_norm(1.0),
        optax.sgd(0.1, momentum=0.9),
        clipx.qk_clip_updates(LAYOUT),
    )
    _, state = steps(tx, tree(0), number=2)
    seen = {
        name: float(value)
        for name, value in clipx.metrics(state).items()
        if name.startswith("qk/")
    }
    assert seen == {
        "qk/max_logit": 400.0,
        "qk/scale": 0.25,
        "qk/clipped": 0.25,
        "qk/nonfinite": 1.0,
        "qk/nonpositive": 1.0,
        "qk/steps": 2.0,
        "qk/num_clipped": 2.0,
        "qk/num_nonfinite": 2.0,
    }
    assert clipx.metrics(state)["clip/steps"] == 2
    clipx.check(state)


def test_metrics_of_a_step_that_clips_nothing():
    maxima = {"attn": jnp.full(4, 99.0)}
    _, state = steps(clipx.qk_clip_updates(LAYOUT), tree(0), maxima)
    seen = clipx.metrics(state)
    assert (seen["qk/clipped"], seen["qk/num_clipped"]) == (0, 0)
    assert (seen["qk/max_logit"], seen["qk/scale"]) == (99.0, 1.0)


def test_no_finite_maximum_is_reported_as_nan():
    maxima = {"attn": jnp.full(4, jnp.inf)}
    _, state = steps(clipx.qk_clip_updates(LAYOUT), tree(0), maxima)
    assert np.isnan(clipx.metrics(state)["qk/max_logit"])
    assert clipx.metrics(state)["qk/nonfinite"] == 4


def test_metrics_of_a_state_without_types():
    _, state = steps(clipx.qk_clip_updates(LAYOUT), tree(0))
    flat = {f"opt/1/{name}": value for name, value in state._asdict().items()}
    assert clipx.metrics(flat)["qk/max_logit"] == 400.0


def test_metrics_with_another_prefix():
    _, state = steps(clipx.qk_clip_updates(LAYOUT), tree(0))
    assert clipx.metrics(state, "actor")["actor_qk/clipped"] == 0.25


def test_check_wants_a_clipper():
    _, state = steps(clipx.qk_clip_updates(LAYOUT), tree(0))
    with pytest.raises(ValueError, match="got cautious, track_norms or qk_clip"):
        clipx.check(state)


def test_the_state_keeps_its_types_under_jit_and_donation():
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), clipx.qk_clip_updates(LAYOUT))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, maxima):
        updates, state = tx.update(tree(9), state, params, max_logits=maxima)
        return optax.apply_updates(params, updates), state

    params, state = tree(0), tx.init(tree(0))
    types = jax.tree.map(jax.typeof, state)
    for _ in range(3):
        params, state = step(params, state, MAXIMA)
    assert jax.tree.map(jax.typeof, state) == types
    assert clipx.metrics(state)["qk/steps"] == 3


def test_inject_hyperparams():
    make = optax.inject_hyperparams(clipx.qk_clip_updates)
    tx = make(LAYOUT, threshold=optax.linear_schedule(100.0, 200.0, 1), alpha=1.0)
    params = tree(0)
    _, state = jax.jit(lambda p: tx.update(p, tx.init(p), p, max_logits=MAXIMA))(params)
    assert clipx.metrics(state)["qk/scale"] == 0.25


def test_a_schedule_of_the_threshold():
    tx = clipx.qk_clip_updates(LAYOUT, threshold=optax.linear_schedule(100.0, 200.0, 1))
    _, state = steps(tx, tree(0), number=2)
    assert clipx.metrics(state)["qk/scale"] == 0.5


@pytest.mark.parametrize("scale", [0.9, 0.5])
def test_bfloat16_is_exact_while_weights_change_by_less_than_half(scale):
    params = tree(0, dtype=jnp.bfloat16)
    updates = jax.tree.map(jnp.zeros_like, params)
    maxima = {"attn": jnp.full(4, 100.0 / scale**2)}
    tx = clipx.qk_clip_updates(LAYOUT)
    step, _ = tx.update(updates, tx.init(params), params, max_logits=maxima)
    got = optax.apply_updates(params, step)
    assert got["out"].dtype == jnp.bfloat16
    chex.assert_trees_all_equal(got, clipx.qk_clip(params, maxima, LAYOUT))


def test_bfloat16_after_a_large_change_is_near_to_a_unit_of_the_weights_before():
    params = tree(0, dtype=jnp.bfloat16)
    updates = jax.tree.map(jnp.zeros_like, params)
    maxima = {"attn": jnp.full(4, 1e6)}
    tx = clipx.qk_clip_updates(LAYOUT)
    step, _ = tx.update(updates, tx.init(params), params, max_logits=maxima)
    got = optax.apply_updates(params, step)["attn"]["query"]["kernel"]
    want = clipx.qk_clip(params, maxima, LAYOUT)["attn"]["query"]["kernel"]
    unit = np.abs(np.asarray(params["attn"]["query"]["kernel"], np.float32)) / 2**8
    off = np.abs(np.asarray(got, np.float32) - np.asarray(want, np.float32))
    assert (off <= unit).all()


def test_float32_updates_of_bfloat16_weights():
    params = tree(0, dtype=jnp.bfloat16)
    updates = tree(1, 0.1)
    tx = clipx.qk_clip_updates(LAYOUT)
    step, _ = tx.update(updates, tx.init(params), params, max_logits=MAXIMA)
    assert step["attn"]["key"]["kernel"].dtype == jnp.float32
    with jax.numpy_dtype_promotion("standard"):
        got = optax.apply_updates(params, step)
        usual = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal(got, clipx.qk_clip(usual, MAXIMA, LAYOUT))


def wrapped(inner):
    return {
        "MultiSteps": optax.MultiSteps(inner, 1),
        "apply_if_finite": optax.apply_if_finite(inner, 3),
        "skip_spikes": clipx.skip_spikes(inner),
        "track_norms": clipx.track_norms(inner),
        "masked": optax.masked(inner, lambda tree: jax.tree.map(lambda _: True, tree)),
    }


@pytest.mark.one_in(3, rest="slow")
@pytest.mark.parametrize("name", wrapped(optax.identity()))
def test_wrappers_pass_the_maxima_on(name):
    tx = wrapped(optax.chain(optax.sgd(0.0), clipx.qk_clip_updates(LAYOUT)))[name]
    params = tree(0)
    with jax.numpy_dtype_promotion("standard"):
        got, state = steps(tx, params)
    want = clipx.qk_clip(params, MAXIMA, LAYOUT)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-7)
    assert clipx.metrics(state)["qk/clipped"] == 0.25


def test_it_needs_params_and_maxima():
    tx = clipx.qk_clip_updates(LAYOUT)
    params = tree(0)
    state = tx.init(params)
    with pytest.raises(ValueError, match="Expected params, got None"):
        tx.update(params, state, max_logits=MAXIMA)
    with pytest.raises(ValueError, match=r"Expected max_logits=\{'attn': array"):
        tx.update(params, state, params)


def test_init_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="Expected a leaf at 'attn/query/kernel'"):
        clipx.qk_clip_updates(LAYOUT).init({"w": jnp.ones(3)})


def test_the_state_of_another():
    tx = clipx.qk_clip_updates(LAYOUT)
    with pytest.raises(TypeError, match="Expected the QKClipState"):
        tx.update(tree(0), optax.EmptyState(), tree(0), max_logits=MAXIMA)


def test_leaves_that_are_masked_away_elsewhere():
    params = tree(0)
    labels = {"attn": "fast", "out": "slow"}
    tx = optax.chain(
        optax.partition({"fast": optax.sgd(0.9), "slow": optax.sgd(0.1)}, labels),
        clipx.qk_clip_updates(LAYOUT),
    )
    got, _ = steps(tx, params)
    assert jax.tree.structure(got) == jax.tree.structure(params)


@pytest.mark.one_in(3, rest="slow")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_heads_give_the_answer_of_one_device(kind):
    params, grads = tree(0), tree(1)
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), clipx.qk_clip_updates(LAYOUT))
    want, state = tx.update(grads, tx.init(params), params, max_logits=MAXIMA)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):

        def place(tree):
            specs = jax.tree.map(
                lambda x: P("data", "model") if x.ndim > 1 else P(), tree
            )
            shardings = jax.tree.map(
                lambda s: NamedSharding(mesh, s),
                specs,
                is_leaf=lambda x: isinstance(x, P),
            )
            return jax.device_put(tree, shardings)

        def pad(tree):  # 6 inputs do not divide by 4
            return jax.tree.map(
                lambda x: jnp.pad(x, ((0, 2), (0, 0), (0, 0))) if x.ndim > 1 else x,
                tree,
            )

        sharded = place(pad(params))
        maxima = jax.device_put(MAXIMA, NamedSharding(mesh, P("model")))
        got, seen = jax.jit(tx.update)(
            place(pad(grads)), tx.init(sharded), sharded, max_logits=maxima
        )
    kernels = jax.tree.map(lambda x: np.asarray(x)[:6], got["attn"])
    chex.assert_trees_all_close(kernels, want["attn"], rtol=1e-6)
    chex.assert_trees_all_close(clipx.metrics(seen), clipx.metrics(state), rtol=1e-6)


IN_A_ROW = [
    clipx.qk.mha("q", "k", num_heads=4, name="a"),
    clipx.qk.gqa("q", "k", num_heads=4, name="a"),
    clipx.qk.mla("q", "k", num_heads=4, nope_dim=1, name="a"),
]


@pytest.mark.one_in(3, rest="slow")
@pytest.mark.parametrize("layout", IN_A_ROW, ids=["mha", "gqa", "mla"])
@pytest.mark.parametrize("placed", [P("model"), P()])
def test_heads_in_a_row_on_explicit_axes(layout, placed):
    rng = np.random.default_rng(0)
    kernels = {x: jnp.asarray(rng.normal(size=(8, 8)), jnp.float32) for x in "qk"}
    maxima = {"a": jnp.array([50.0, 400.0, 900.0, 200.0])}
    want = clipx.qk_clip(kernels, maxima, layout)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(kernels, NamedSharding(mesh, P("data", "model")))
        given = jax.device_put(maxima, NamedSharding(mesh, placed))
        got = jax.jit(lambda p, m: clipx.qk_clip(p, m, layout))(sharded, given)
    assert jax.typeof(got["q"]).sharding.spec == P("data", "model")
    chex.assert_trees_all_close(jax.device_get(got), want, rtol=1e-6)


@pytest.mark.one_in(3, rest="slow")
@pytest.mark.parametrize("placed", [P("model"), P()])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_groups_on_a_mesh(kind, placed):
    kernels = {
        "q": jnp.asarray(np.random.default_rng(0).normal(size=(8, 4, 2)), jnp.float32),
        "k": jnp.asarray(np.random.default_rng(1).normal(size=(8, 2, 2)), jnp.float32),
    }
    layout = clipx.qk.gqa("q", "k", name="a")
    maxima = {"a": jnp.array([50.0, 400.0, 900.0, 200.0])}
    want = clipx.qk_clip(kernels, maxima, layout)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(kernels, NamedSharding(mesh, P("data", "model")))
        given = jax.device_put(maxima, NamedSharding(mesh, placed))
        got = jax.jit(lambda p, m: clipx.qk_clip(p, m, layout))(sharded, given)
    chex.assert_trees_all_close(jax.device_get(got), want, rtol=1e-6)


@pytest.mark.one_in(3, rest="slow")
@pytest.mark.parametrize("check_vma", [True, False])
def test_heads_sharded_in_shard_map(check_vma):
    params, grads = tree(0), tree(1)
    named = None if check_vma else ("model",)
    tx = clipx.qk_clip_updates(LAYOUT, axis_name=named)
    want, state = tx.update(grads, tx.init(params), params, max_logits=MAXIMA)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = jax.tree.map(
        lambda x: P(None, "model", None) if x.ndim > 1 else P(), params
    )

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(specs, specs, P(), P("model")),
        out_specs=(specs, P()),
        check_vma=check_vma,
    )
    def update(grads, params, state, maxima):
        return tx.update(grads, state, params, max_logits=maxima)

    got, seen = update(grads, params, tx.init(params), MAXIMA)
    chex.assert_trees_all_close(got, want, rtol=1e-6)
    chex.assert_trees_all_close(seen, state, rtol=1e-6)


def test_manual_code_without_types_asks_where_the_heads_are():
    tx = clipx.qk_clip_updates(LAYOUT)
    params = tree(0)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def update(params):
        return tx.update(params, tx.init(params), params, max_logits=MAXIMA)

    run = jax.shard_map(update, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    with pytest.raises(ValueError, match=r"over the mesh axes \('data',\).*axis_name="):
        jax.jit(run)(params)
