"""Moments and stabilizers: traces of reference codes, and what they promise."""

import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from all_methods import MOMENTS as EVERY
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from versions import MESH_OF_TRACED

import optax_clipx as clipx
from optax_clipx._methods.second_moment import SecondMomentMemory
from optax_clipx._reductions import norms as reductions

GOLDEN = Path(__file__).parents[1] / "golden"
INPUTS = np.load(GOLDEN / "inputs.npz")
partial = functools.partial


def run(tx, steps=80):
    """The updates of a transformation over the gradients of the traces."""
    grads = [jnp.asarray(INPUTS[f"g{i}"][:steps]) for i in range(3)]
    state = tx.init([g[0] for g in grads])
    _, found = jax.jit(lambda s, g: lax.scan(lambda s, g: tx.update(g, s)[::-1], s, g))(
        state, grads
    )
    return found


def sgd(lr):
    return optax.scale(-lr)


TRACES = {
    "acclip_update_mod0_alpha1": lambda: optax.chain(
        clipx.scale_by_acclip(), sgd(0.01)
    ),
    "acclip_update_mod0_alpha2": lambda: optax.chain(
        clipx.scale_by_acclip(alpha=2.0), sgd(0.01)
    ),
    # The paper's gamma is the limit times the rate.
    "zhang2020_sgdclip": lambda: optax.chain(
        clipx.mixed_clip(2.0, nu=1.0, decay=0.9), sgd(0.1)
    ),
    "zhang2020_momclip": lambda: optax.chain(
        clipx.mixed_clip(2.0, nu=1.0, decay=0.9, response=clipx.responses.smooth),
        sgd(0.1),
    ),
    "zhang2020_mixclip": lambda: optax.chain(
        clipx.mixed_clip(2.0, nu=0.7, decay=0.9, response=clipx.responses.smooth),
        sgd(0.1),
    ),
    "zhang2020_nsgd": lambda: optax.chain(
        clipx.normalized_momentum(0.9, eps=1e-6), sgd(0.1)
    ),
    "stableadamw_wortsman": lambda: clipx.stable_adamw(0.01, weight_decay=0.0),
    "stablespam_gradtransform": clipx.stabilize_norm,
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", TRACES)
def test_trace_of_the_reference(name):
    tx = TRACES[name]()
    if name == "stableadamw_wortsman":  # its decay of zero asks for parameters
        tx = optax.chain(clipx.scale_by_stable_adam(), sgd(0.01))
    found = run(tx)
    golden = np.load(GOLDEN / f"{name}.npz")
    for i in range(3):
        want = golden[f"u{i}"]
        assert np.max(np.abs(np.float64(found[i]) - want)) < 1e-5 * np.max(np.abs(want))


def test_trace_of_spam():
    """The reference counts its grace from 1, and adds eps before debiasing."""
    found = run(clipx.clip_by_second_moment(50.0, warmup_steps=4))
    golden = np.load(GOLDEN / "spam_update_theta50.npz")
    for i in range(3):
        m, v = 0.0, 0.0
        for t, g in enumerate(np.float64(found[i]), 1):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            size = np.sqrt(v) + 1e-6
            want = -0.01 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / size
            off = np.max(np.abs(golden[f"u{i}"][t - 1] - want))
            assert off < 1e-5 * np.max(np.abs(golden[f"u{i}"]))


@jax.numpy_dtype_promotion("standard")  # optax's Adam promotes its count
def test_spam_clips_in_the_trace_and_follows_adam_s_second_moment():
    tx = optax.chain(
        clipx.clip_by_second_moment(50.0, warmup_steps=4), optax.scale_by_adam()
    )
    grads = [jnp.asarray(INPUTS[f"g{i}"]) for i in range(3)]
    state = tx.init([g[0] for g in grads])
    update = jax.jit(tx.update)
    for t in range(45):
        _, state = update([g[t] for g in grads], state)
    assert float(state[0].metrics.num_clipped) >= 1
    for root, v in zip(state[0].rule.root, state[1].nu, strict=True):
        np.testing.assert_allclose(root**2, v, rtol=1e-5)


def test_an_entry_that_was_always_zero_is_not_killed():
    """In the published rule it is clipped to zero for ever."""
    clipper = clipx.clip_by_second_moment(warmup_steps=0)
    state, update = clipper.init(jnp.zeros(2)), jax.jit(clipper.update)
    for _ in range(5):
        _, state = update(jnp.array([1.0, 0.0]), state)
    clipped, state = update(jnp.array([1.0, 0.5]), state)
    assert clipped.tolist() == [1.0, 0.5]
    clipped, _ = update(jnp.array([1.0, 1e6]), state)
    assert float(clipped[1]) == pytest.approx(np.sqrt(5000 * 0.001 * 0.25), rel=1e-5)


@jax.numpy_dtype_promotion("standard")
def test_spam_as_a_whole_resets_and_warms_up():
    inner = optax.chain(
        clipx.clip_by_second_moment(warmup_steps=2), optax.scale_by_adam()
    )
    tx = clipx.reset_moments(inner, every=3, warmup=2)
    params = jnp.zeros(2)
    state = tx.init(params)
    for _ in range(4):
        updates, state = jax.jit(tx.update)(jnp.array([1.0, 2.0]), state, params)
    np.testing.assert_allclose(updates, [0.5, 0.5], rtol=1e-3)
    assert int(state.inner[0].metrics.steps) == 1


@jax.numpy_dtype_promotion("standard")
def test_the_stabilizer_forgets_the_scale_and_survives_resets():
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.normal(size=(4, 8)), jnp.float32) for _ in range(30)]
    small = clipx.stabilize_norm(eps=0.0)
    states = [small.init(grads[0]), small.init(grads[0])]
    for g in grads:
        one, states[0] = jax.jit(small.update)(g, states[0])
        tiny, states[1] = jax.jit(small.update)(g * 2.0**-60, states[1])
        np.testing.assert_allclose(one, tiny, rtol=1e-5)
    # Adam's moments are reset inside; the stabilizer outside keeps its averages.
    tx = optax.chain(
        clipx.stabilize_norm(), clipx.reset_moments(optax.scale_by_adam(), 2, warmup=0)
    )
    state = tx.init(grads[0])
    for g in grads[:6]:
        _, state = jax.jit(tx.update)(g, state, g)
    peaks, _, _, counts = state[0].rule
    assert counts.tolist() == [6.0]
    spike, _ = jax.jit(tx.update)(grads[6].at[0, 0].set(1e4), state, grads[0])
    assert float(jnp.max(jnp.abs(spike))) < 5
    assert float(peaks[0]) > 0


def test_the_rms_shows_a_second_moment_out_of_date():
    """What StableAdamW limits rises when gradients grow faster than their average."""
    tx = clipx.scale_by_stable_adam(b2=0.99)
    params = {"old": jnp.zeros(4), "new": jnp.zeros(4)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(50):
        _, state = update(jax.tree.map(jnp.ones_like, params), state)
    assert float(state.metrics.norm) == pytest.approx(1.0, rel=1e-3)
    updates, state = update({"old": jnp.ones(4), "new": jnp.full(4, 100.0)}, state)
    assert float(state.metrics.norm) > 5
    assert float(state.metrics.clipped) == 0.5
    scale = float(state.metrics.scale)
    assert scale == pytest.approx(1 / float(state.metrics.norm), rel=1e-6)
    assert float(jnp.max(updates["old"])) == pytest.approx(1.0, rel=1e-2)


every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)


def every_from(start):
    """The same from one of them on: each table takes others as usual cases."""
    names = [*EVERY][start:] + [*EVERY][:start]
    return pytest.mark.parametrize("make", [EVERY[x] for x in names], ids=names)


def spoiled(bad):
    return {**tree(1), "a": tree(1)["a"].at[0, 0].set(bad)}


def tree(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    values = {"a": rng.normal(size=(4, 8)), "b": rng.normal(size=(8,))}
    return {k: jnp.asarray(v * scale, jnp.float32) for k, v in values.items()}


@pytest.mark.one_in(3, rest="slow")
@every_from(1)
def test_one_trace_and_a_donated_state(make):
    tx = make()
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(tx.update, n=1), donate_argnums=1)
    state = tx.init(tree())
    leaves = jax.tree.leaves(state)
    assert len({id(x) for x in leaves}) == len(leaves)
    for i in range(5):
        kinds = jax.tree.map(jax.typeof, state)
        updates, state = update(tree(i, 10.0**i), state)
        assert jax.tree.map(jax.typeof, state) == kinds
        chex.assert_tree_all_finite((updates, state))
    assert int(state.metrics.steps) == 5
    assert float(state.metrics.num_clipped) >= 1


@pytest.mark.one_in(10)
@every
@pytest.mark.parametrize("policy", ["propagate", "zero", "sanitize"])
def test_what_is_not_finite_is_not_remembered(make, policy):
    tx = make(nonfinite=policy)
    step = jax.jit(tx.update)
    _, before = step(tree(), tx.init(tree()))
    for bad in (np.nan, np.inf):
        updates, after = step(spoiled(bad), before)
        chex.assert_trees_all_equal(after.rule, before.rule)
        assert bool(after.metrics.nonfinite)
        values = np.concatenate([np.ravel(x) for x in jax.tree.leaves(updates)])
        if policy == "propagate":
            assert np.all(np.isnan(values))
        elif policy == "zero":
            assert np.all(values == 0)
        else:
            chex.assert_tree_all_finite(updates)


@pytest.mark.one_in(10)
@every
def test_what_is_not_finite_raises_an_error(make):
    tx = make(nonfinite="raise")
    _, state = jax.jit(tx.update)(tree(), tx.init(tree()))
    for bad in (np.nan, np.inf):
        with pytest.raises(FloatingPointError, match="a"):
            tx.update(spoiled(bad), state)


@pytest.mark.one_in(3, rest="slow")
@every_from(2)
def test_the_full_range(make):
    tx = make()
    update = jax.jit(tx.update)
    state = tx.init({"a": jnp.zeros((2, 2)), "b": jnp.zeros(3)})
    for size in (1.0, 3e38, 1e-38, 3e38, 0.0, 1e-30, 1e30, 1.0):
        grads = {"a": jnp.full((2, 2), size), "b": jnp.full(3, -size)}
        updates, state = update(grads, state)
        chex.assert_tree_all_finite((updates, state))


@pytest.mark.one_in(10)
@every
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes(make, dtype):
    with jax.enable_x64(dtype == "float64"):
        tx = make()
        grads = jax.tree.map(lambda x: x.astype(dtype), tree())
        state = tx.init(grads)
        updates, new = jax.jit(tx.update)(grads, state)
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, new)
        assert all(x.dtype == dtype for x in jax.tree.leaves(updates))


@pytest.mark.one_in(3, rest="slow")
@every_from(0)
def test_under_vmap_each_model_has_its_own(make):
    tx = make()
    stacked = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), tree(0), tree(1, 50.0))
    state = jax.vmap(tx.init)(stacked)
    found, _ = jax.jit(jax.vmap(tx.update))(stacked, state)
    update = jax.jit(tx.update)
    for j, one in enumerate((tree(0), tree(1, 50.0))):
        want, _ = update(one, tx.init(one))
        mine = jax.tree.map(lambda x, j=j: x[j], found)
        chex.assert_trees_all_close(mine, want, rtol=1e-4, atol=1e-5)


SPECS = {"a": P("x", "y"), "b": P("y")}


@pytest.mark.one_in(10)
@every
@pytest.mark.parametrize(
    "way",
    ["auto", pytest.param("explicit", marks=MESH_OF_TRACED), "shard_map", "blind"],
)
def test_on_a_mesh_it_is_the_same(make, way):
    tx = make()
    kind = AxisType.Explicit if way == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    grads = [tree(i, 10.0**i) for i in range(4)]
    want_state = tx.init(grads[0])
    placed = jax.tree.map(
        lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree(), SPECS
    )
    state, update = tx.init(placed), tx.update
    if way in ("shard_map", "blind"):
        told = make(specs=SPECS)
        by_shape = {(4, 8): SPECS["a"], (8,): SPECS["b"]}
        state_specs = jax.tree.map(
            lambda x: by_shape.get(x.shape, P()), tx.init(grads[0])
        )
        update = jax.shard_map(
            lambda g, s: told.update(g, s),
            mesh=mesh,
            in_specs=(SPECS, state_specs),
            out_specs=(SPECS, state_specs),
            check_vma=way == "shard_map",
        )
    update, alone = jax.jit(update), jax.jit(tx.update)
    for g in grads:
        want, want_state = alone(g, want_state)
        here = jax.tree.map(
            lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), g, SPECS
        )
        found, state = update(here, state)
        chex.assert_trees_all_close(
            jax.device_get(found), jax.device_get(want), rtol=1e-5, atol=1e-6
        )
        chex.assert_trees_all_close(
            jax.device_get(state.metrics), jax.device_get(want_state.metrics), rtol=1e-4
        )
        if way == "explicit":
            kinds = jax.tree.map(jax.typeof, found)
            assert kinds == jax.tree.map(jax.typeof, here)


@pytest.mark.one_in(2)
@every
def test_nothing_to_clip_and_complex(make):
    tx = make()
    for empty in ({}, {"a": None}, {"a": jnp.zeros((0, 2))}):
        updates, state = tx.update(empty, tx.init(empty))
        assert int(state.metrics.steps) == 1
        assert jax.tree.structure(updates) == jax.tree.structure(empty)
    values = jnp.ones((2, 2), jnp.complex64)
    if make is EVERY["mixed_clip"]:
        tx.update(values, tx.init(values))
        return
    with pytest.raises(TypeError, match=r"real updates.*complex64"):
        tx.update(values, tx.init(values))


@pytest.mark.one_in(10)
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: clipx.clip_by_second_moment(-1.0), "theta=-1.0"),
        (lambda: clipx.clip_by_second_moment(decay=1.5), "decay=1.5"),
        (lambda: clipx.clip_by_second_moment(warmup_steps=-1), "warmup_steps=-1"),
        (lambda: clipx.scale_by_acclip(b1=-0.1), "b1=-0.1"),
        (lambda: clipx.scale_by_acclip(alpha=0.5), "alpha=0.5"),
        (lambda: clipx.mixed_clip(-1.0), "max_norm=-1.0"),
        (lambda: clipx.mixed_clip(1.0, nu=2.0), "nu=2.0"),
        (
            lambda: clipx.mixed_clip(clipx.thresholds.quantile(0.5)),
            "a rule that adapts",
        ),
        (lambda: clipx.stabilize_norm(b3=2.0), "b3=2.0"),
        (lambda: clipx.scale_by_stable_adam(eps=-1.0), "eps=-1.0"),
        (lambda: clipx.normalized_momentum(2.0), "decay=2.0"),
        (lambda: clipx.stabilize_norm(b1=1.0), "b1=1.0"),
        (lambda: clipx.clip_by_second_moment(0.0), "theta > 0"),
        (lambda: clipx.clip_by_spectral_norm(-1.0), "max_norm=-1.0"),
        (lambda: clipx.clip_by_spectral_norm(1.0, form="firm"), "'firm'"),
        (lambda: clipx.clip_by_spectral_norm(1.0, method="qr"), "'qr'"),
        (lambda: clipx.clip_by_spectral_norm(1.0, steps=0), "steps=0"),
    ],
)
def test_bad_arguments(make, named):
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.slow
def test_hyperparameters_may_be_traced():
    for make, kwargs in (
        (clipx.clip_by_second_moment, {"theta": 4.0, "decay": 0.9, "warmup_steps": 1}),
        (clipx.scale_by_acclip, {"b1": 0.5, "b2": 0.9}),
        (clipx.mixed_clip, {"max_norm": 0.5, "nu": 0.5, "decay": 0.9}),
        (clipx.stabilize_norm, {"b1": 0.5, "b2": 0.5, "b3": 0.9, "eps": 1e-8}),
        (clipx.scale_by_stable_adam, {"b1": 0.5, "b2": 0.9, "eps": 1e-6}),
        (clipx.clip_by_spectral_norm, {"max_norm": 0.5}),
        (clipx.normalized_momentum, {"decay": 0.5}),
    ):
        tx, plain = optax.inject_hyperparams(make)(**kwargs), make(**kwargs)
        state, want_state = tx.init(tree()), plain.init(tree())
        for i in range(3):
            found, state = jax.jit(tx.update)(tree(i), state)
            want, want_state = jax.jit(plain.update)(tree(i), want_state)
        chex.assert_trees_all_close(found, want, rtol=1e-5)


@jax.numpy_dtype_promotion("standard")
def test_the_rate_of_stable_adamw_may_be_injected():
    tx = optax.inject_hyperparams(clipx.stable_adamw)(learning_rate=0.1)
    state = tx.init(tree())
    updates, _ = jax.jit(tx.update)(tree(), state, tree())
    plain = clipx.stable_adamw(0.1)
    want, _ = jax.jit(plain.update)(tree(), plain.init(tree()), tree())
    chex.assert_trees_all_close(updates, want, rtol=1e-6)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("make", list(EVERY.values())[:6], ids=list(EVERY)[:6])
def test_other_leaves_than_at_init_are_an_error(make):
    tx = make()
    state = tx.init({"a": jnp.ones(3), "b": jnp.ones(3)})
    with pytest.raises(
        ValueError, match=r"leaves that init saw.*optax_clipx.excluding"
    ):
        tx.update({"a": None, "b": jnp.ones(3)}, state)


def test_the_stabilizer_at_the_largest_numbers():
    for decays in ({}, {"b1": 0.7, "b2": 0.8}):
        tx = clipx.stabilize_norm(**decays)
        state = tx.init(jnp.zeros(2))
        for _ in range(6):
            updates, state = jax.jit(tx.update)(jnp.full(2, 3.4e38), state)
            assert 0.5 < float(jnp.max(updates)) < 1.5
    tx = clipx.stabilize_norm(nonfinite="sanitize")
    updates, _ = jax.jit(tx.update)(jnp.array([jnp.inf, 1.0]), tx.init(jnp.zeros(2)))
    np.testing.assert_allclose(updates, [1.0, 0.0], atol=1e-6)


def test_an_unusable_limit_comes_first_in_a_mixture():
    def run(limit):
        tx = clipx.mixed_clip(limit, nonfinite="zero")
        return tx.update(jnp.array([jnp.nan]), tx.init(jnp.zeros(1)))[0]

    assert bool(jnp.isnan(jax.jit(run)(jnp.nan)[0]))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "make",
    [
        lambda: clipx.clip_by_second_moment(warmup_steps=0),
        clipx.scale_by_stable_adam,
        lambda: clipx.scale_by_acclip(alpha=1.5),
        clipx.stabilize_norm,
    ],
)
def test_derivatives_at_zero_entries_are_finite(make):
    tx = make()

    def after_two(x):
        _, state = tx.update(x, tx.init(x))
        return jnp.sum(tx.update(2 * x, state)[0])

    found = jax.jit(jax.grad(after_two))(jnp.array([0.0, 1.0]))
    assert np.all(np.isfinite(found))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "make",
    [
        partial(clipx.scale_by_acclip, b1=0.5, b2=0.5),
        clipx.scale_by_stable_adam,
        partial(clipx.mixed_clip, 1.0, nu=0.5),
        partial(clipx.clip_by_second_moment, 4.0, warmup_steps=0),
    ],
)
def test_sanitized_updates_go_on_where_the_moments_stay(make):
    tx = make(nonfinite="sanitize")
    step = jax.jit(tx.update)
    _, state = step(jnp.array([1.0, 2.0, 3.0]), tx.init(jnp.zeros(3)))
    for bad in (np.nan, np.inf):
        grads = jnp.array([bad, 1.0, 20.0])
        found, after = step(grads, state)
        want, _ = step(jnp.nan_to_num(grads), state)
        np.testing.assert_allclose(found, want, rtol=1e-6)
        chex.assert_trees_all_equal(after.rule, state.rule)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("policy", ["propagate", "zero", "sanitize"])
@pytest.mark.parametrize("metrics", [True, False])
def test_steps_that_are_not_finite_use_up_no_warm_up(policy, metrics):
    """As those of a loss scale that settles; the default warm-up is of 20 steps."""
    tx = clipx.clip_by_second_moment(nonfinite=policy, metrics=metrics)
    state, seen = tx.init(jnp.zeros(1)), []
    for gradient in [np.nan] * 20 + [1.0, 5.0, 5.0]:
        updates, state = jax.jit(tx.update)(jnp.array([gradient]), state)
        seen.append(float(updates[0]))
    assert seen[20:] == [1.0, 5.0, 5.0]
    assert int(state.rule.seen) == 3


def test_the_warm_up_ends_after_its_finite_steps():
    tx = clipx.clip_by_second_moment(warmup_steps=1)
    state, seen = tx.init(jnp.zeros(1)), []
    for gradient in (np.nan, 1.0, 5.0):
        updates, state = jax.jit(tx.update)(jnp.array([gradient]), state)
        seen.append(float(updates[0]))
    np.testing.assert_allclose(seen[1:], [1.0, 5.0**0.5], rtol=1e-5)


def test_a_bias_correction_counts_finite_steps():
    """Adam's second step has its own debiasing, however many were not finite before."""
    tx = clipx.scale_by_stable_adam(nonfinite="zero", eps=0.0)
    state = tx.init(jnp.zeros(1))
    for gradient in (np.nan, np.nan, 1.0):
        updates, state = jax.jit(tx.update)(jnp.array([gradient]), state)
    np.testing.assert_allclose(updates, [1.0], rtol=1e-6)
    assert int(state.rule.seen) == 1


def test_resets_count_every_step_but_those_that_are_skipped_around_them():
    resets = clipx.reset_moments(optax.trace(0.5), every=2, warmup=0)
    counts = {}
    for name, tx in (("bare", resets), ("skipped", clipx.skip_spikes(resets))):
        params = jnp.zeros(1)
        state = tx.init(params)
        for gradient in (1.0, np.nan, 1.0):
            _, state = jax.jit(tx.update)(jnp.array([gradient]), state, params)
        counts[name] = int(optax.tree.get(state, "ResetState").steps)
    assert counts == {"bare": 3, "skipped": 2}


def test_a_spike_is_clipped_where_the_root_underflows():
    tx = clipx.clip_by_second_moment(0.5, decay=0.5, warmup_steps=0)
    state = tx.init(jnp.zeros(2))._replace(
        rule=SecondMomentMemory(jnp.full((2,), 1.3e-38), jnp.zeros((), jnp.int32))
    )
    clipped, _ = tx.update(jnp.ones(2), state)
    assert float(jnp.max(clipped)) < 1e-37


@jax.numpy_dtype_promotion("standard")
def test_injected_numbers_are_traced_once():
    """Outside of jit each step makes a transformation anew."""
    tx = optax.inject_hyperparams(clipx.clip_by_second_moment)(theta=50.0)
    grads = [jnp.ones((7, 5)), jnp.ones(3)]
    state = tx.init(grads)
    sizes = []
    for _ in range(3):
        _, state = jax.jit(tx.update)(grads, state)
        sizes.append(reductions._compiled._cache_size())
    assert sizes[0] == sizes[-1]


@pytest.mark.parametrize(
    ("tx", "leaves"),
    [
        (clipx.clip(0.5), 8),
        (clipx.clip_by_second_moment(), 6),
        (clipx.scale_by_stable_adam(), 20),
    ],
)
def test_derivatives_of_large_leaves_keep_nothing_of_each_part(tx, leaves):
    """If they did, they would hold 12, 7 and 54 times the leaf."""

    def norm_after(x):
        return tx.update(x, tx.init(x))[1].metrics.clipped_norm

    leaf = jax.ShapeDtypeStruct((2**20,), jnp.float32)
    program = jax.jit(jax.grad(norm_after)).lower(leaf).compile()
    assert program.memory_analysis().temp_size_in_bytes < leaves * 4 * leaf.size


def test_leaves_whose_entries_int32_cannot_count():
    for tx in (clipx.clip(0.5), clipx.clip_by_second_moment()):
        huge = jax.ShapeDtypeStruct((2**15 + 1, 2**16), jnp.bfloat16)
        state = jax.eval_shape(tx.init, huge)
        assert jax.eval_shape(tx.update, huge, state)[0].shape == huge.shape


@pytest.mark.parametrize("size", [2**18 - 1, 2**18, 2**18 + 1])
def test_what_varies_over_a_mesh_beside_a_large_leaf_that_does_not(size):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def one(grads, limit):
        tx = clipx.clip(limit[0])
        return tx.update(grads, tx.init(grads))[0][None]

    limits = jnp.linspace(0.1, 0.9, 8)
    step = jax.shard_map(one, mesh=mesh, in_specs=(P(), P("x")), out_specs=P("x"))
    found = jax.jit(step)(jnp.ones(size), limits)
    np.testing.assert_allclose(found[:, -1], limits)
