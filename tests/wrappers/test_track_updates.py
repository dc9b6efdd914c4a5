"""The update side of `track_norms`: norm, spike score, RMS_t, and what they cost."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_clipx as clipx

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import hlo
from test_track_norms import _standard_promotion, grads_like  # noqa: F401

PARAMS = {"w": jnp.full((3, 4), 2.0), "b": jnp.full((5,), 0.5)}
LIMIT = clipx.clip_by_global_norm(0.5)


def test_the_norm_of_the_whole_update():
    tx = clipx.track_norms(optax.chain(LIMIT, optax.adam(1e-2)), updates=True)
    updates, state = tx.update(grads_like(PARAMS), tx.init(PARAMS), PARAMS)
    read = clipx.metrics(state)
    norm = np.linalg.norm(np.concatenate([x.ravel() for x in jax.tree.leaves(updates)]))
    np.testing.assert_allclose(read["track/update_norm"], norm, rtol=1e-6)
    ratio = np.linalg.norm(updates["b"]) / np.linalg.norm(PARAMS["b"])
    np.testing.assert_allclose(read["track_ratios/b"], ratio, rtol=1e-6)


def test_a_ratio_of_a_nan_is_nan():
    tx = clipx.track_norms(optax.sgd(0.1), updates=True)
    grads = {**PARAMS, "w": PARAMS["w"].at[0, 0].set(jnp.nan)}
    read = clipx.metrics(tx.update(grads, tx.init(PARAMS), PARAMS)[1])
    assert np.isnan(read["track_ratios/w"])
    np.testing.assert_allclose(read["track_ratios/b"], 0.1, rtol=1e-6)
    params = {**PARAMS, "w": jnp.full((3, 4), jnp.nan)}
    read = clipx.metrics(tx.update(PARAMS, tx.init(PARAMS), params)[1])
    assert np.isnan(read["track_ratios/w"])


def test_the_update_needs_params():
    tx = clipx.track_norms(LIMIT, updates=True)
    with pytest.raises(ValueError, match="Expected params"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_what_was_not_asked_for_is_absent():
    tx = clipx.track_norms(optax.adam(1e-2))
    read = clipx.metrics(tx.update(PARAMS, tx.init(PARAMS), PARAMS)[1])
    assert {n for n in read if n.startswith("track/")} == {
        "track/vanishing",
        "track/exploding",
        "track/dominant_share",
    }
    assert not any(n.startswith(("track_ratios", "track_rms_t")) for n in read)


def scores(norms):
    """The spike score after each step with a gradient of such a norm."""
    return np.asarray(traced_scores(jnp.asarray(norms, jnp.float32)))


@jax.jit
def traced_scores(norms):
    tx = clipx.track_norms(optax.identity(), updates=True)

    def step(state, norm):
        grads = {"w": norm[None]}
        _, state = tx.update(grads, state, grads)
        return state, clipx.metrics(state)["track/spike_score"]

    start = tx.init({"w": jnp.ones(1)})
    return jax.lax.scan(step, start, norms)[1]


def by_hand(norms):
    """The same from the formula, in float64."""
    flags, kept, found = [], [], []
    for norm in norms:
        if np.isfinite(norm):
            last = np.array(kept[-1000:])
            enough = len(last) >= 50
            flags.append(enough and norm > np.mean(last) + 7 * np.std(last))
            kept.append(norm)
        found.append(np.mean(flags[-1000:]) if flags else 0.0)
    return np.array(found)


def noisy(steps, seed=0):
    return 1 + 0.1 * np.random.default_rng(seed).normal(size=steps)


@pytest.mark.parametrize("scale", [1e-37, 1.0, 1e36])
def test_the_spike_score_is_that_of_the_formula(scale):
    norms = noisy(3500)
    norms[[20, 60, 700, 1100, 1105, 2600]] = 2.5, 3.0, 2.5, 9.0, 4.0, 4.0
    norms[1500:] *= 1.5  # a new level is no spike, and widens the spread
    norms[[800, 2000]] = np.nan, np.inf
    np.testing.assert_allclose(scores(norms * scale), by_hand(norms * scale), rtol=1e-6)


def test_one_spike_in_a_thousand_steps():
    norms = noisy(1300)
    norms[200] = 10.0
    found = scores(norms)
    assert found[199] == 0
    np.testing.assert_allclose(found[200], 1 / 201, rtol=1e-6)
    np.testing.assert_allclose(found[1199], 1 / 1000, rtol=1e-6)
    assert found[1200] == 0  # it is 1,000 steps ago


def test_norms_that_are_not_finite_are_neither_spikes_nor_remembered():
    norms = noisy(120)
    with_bad = np.insert(norms, [60, 80], [np.nan, np.inf])
    assert scores(with_bad)[-1] == scores(norms)[-1] == 0


def test_equal_norms_and_a_rounding_are_no_spike():
    norms = np.full(300, 0.1)
    norms[200] = np.nextafter(np.float32(0.1), np.float32(1))
    assert scores(norms)[-1] == 0


def test_the_state_keeps_its_structure():
    tx = clipx.track_norms(
        optax.chain(LIMIT, optax.adam(1e-2)), updates=True, second_moment=0.999
    )
    state = tx.init(PARAMS)
    _, after = tx.update(grads_like(PARAMS), state, PARAMS)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, after)
    assert jax.tree.map(jnp.result_type, state) == jax.tree.map(jnp.result_type, after)


def rms_t(tx, steps, decay=0.9, **options):
    tx = clipx.track_norms(tx, second_moment=decay, **options)
    state = tx.init(PARAMS)
    for grads in steps:
        _, state = jax.jit(tx.update)(grads, state, PARAMS)
    read = clipx.metrics(state)
    start = "track_rms_t/"
    return {n.removeprefix(start): float(x) for n, x in read.items() if start in n}


STEPS = [grads_like(PARAMS, seed) for seed in range(3)]


def by_formula(steps, name, scales=(1, 1, 1), decay=0.9):
    v = 0.0
    for grads, scale in zip(steps, scales, strict=True):
        g = np.asarray(grads[name], np.float64) * scale
        v = decay * v + (1 - decay) * g**2
    unbiased = v / (1 - decay ** len(steps))
    return np.sqrt(np.mean(g**2 / np.maximum(unbiased, 1e-16)))


def test_rms_t_is_that_of_the_formula():
    found = rms_t(optax.adam(1e-2, b2=0.9), STEPS)
    assert found == pytest.approx({n: by_formula(STEPS, n) for n in PARAMS}, rel=1e-5)


def test_rms_t_of_a_steady_gradient_is_1():
    assert rms_t(optax.adam(1e-2), STEPS[:1] * 3, 0.999) == pytest.approx(
        {"w": 1.0, "b": 1.0}, rel=1e-4
    )


def test_rms_t_of_a_second_moment_that_is_out_of_date():
    """Of a gradient 100 times as large, it is sqrt(c 1e4 / (c - 1 + 1e4)), c of 3."""
    spike = jax.tree.map(lambda g: 100 * g, STEPS[0])
    weights = np.array([0.81, 0.9, 1.0]) * 0.1
    want = 100 / np.sqrt(weights @ [1, 1, 1e4] / (1 - 0.9**3))
    found = rms_t(optax.adam(1e-2, b2=0.9), [*STEPS[:1] * 2, spike])
    assert found == pytest.approx({"w": want, "b": want}, rel=1e-5)


def test_rms_t_is_of_the_gradient_that_the_clipper_passes_on():
    norms = [float(clipx.functional.global_norm(grads)) for grads in STEPS]
    found = rms_t(optax.chain(LIMIT, optax.adam(1e-2, b2=0.9)), STEPS)
    want = {n: by_formula(STEPS, n, [0.5 / norm for norm in norms]) for n in PARAMS}
    assert found == pytest.approx(want, rel=1e-5)


def test_rms_t_of_rmsprop_which_counts_no_steps():
    found = rms_t(optax.rmsprop(1e-2, decay=0.9), STEPS[:1])
    assert found == pytest.approx({"w": 10**0.5, "b": 10**0.5}, rel=1e-5)


def test_rms_t_counts_tiny_second_moments_as_eps():
    grads = jax.tree.map(lambda p: jnp.full_like(p, 1e-9), PARAMS)
    found = rms_t(optax.adam(1e-2, b2=0.9), [grads])
    assert found == pytest.approx({"w": 0.1, "b": 0.1}, rel=1e-4)


def test_leaves_without_a_second_moment_have_no_rms_t():
    labels = {"w": "sgd", "b": "adam"}
    inner = {"sgd": optax.sgd(0.1), "adam": optax.adam(1e-2, b2=0.9)}
    found = rms_t(optax.partition(inner, labels), STEPS)
    assert found == pytest.approx({"b": by_formula(STEPS, "b")}, rel=1e-5)


def test_sgd_has_no_rms_t():
    assert rms_t(optax.sgd(0.1), STEPS) == {}


def test_rms_t_of_a_label_is_that_of_its_leaves_with_a_second_moment():
    parts = {"w": "sgd", "b": "adam"}
    inner = {"sgd": optax.sgd(0.1), "adam": optax.adam(1e-2, b2=0.9)}
    found = rms_t(optax.partition(inner, parts), STEPS, labels=lambda p, x: "all")
    assert found == pytest.approx({"all": by_formula(STEPS, "b")}, rel=1e-5)


def test_rms_t_of_layers():
    found = rms_t(optax.adam(1e-2, b2=0.9), STEPS, batch_axes={"w": 0, "b": ()})
    row = [{"w": grads["w"][1]} for grads in STEPS]
    assert found["w/1"] == pytest.approx(by_formula(row, "w"), rel=1e-5)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, 2.0])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=f"second_moment={decay}"):
        clipx.track_norms(optax.adam(1e-2), second_moment=decay)


def test_a_history_records_the_columns(tmp_path):
    tx = clipx.track_norms(
        optax.chain(LIMIT, optax.adam(1e-2)), updates=True, second_moment=0.999
    )
    state, history = tx.init(PARAMS), clipx.History()
    for i, grads in enumerate(STEPS):
        _, state = tx.update(grads, state, PARAMS)
        history.append(i, clipx.metrics(state))
    history.save(tmp_path / "run.jsonl")
    again = clipx.History.load(tmp_path / "run.jsonl")
    for name in ("update_norm", "spike_score", "dominant_share", "starved"):
        assert np.all(np.isfinite(again[f"track/{name}"]))
    assert np.all(again["track_rms_t/w"] > 0)


def on_mesh(tx, kind):
    """The compiled step on 8 devices, and its metrics."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    specs = {"w": P("x"), "b": P()}
    params = {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
    with jax.set_mesh(mesh):
        grads, params = (
            {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in t.items()}
            for t in (grads_like(params), params)
        )
        state = jax.jit(tx.init)(params)
        program = jax.jit(tx.update).lower(grads, state, params).compile()
        return program.as_text(), clipx.metrics(program(grads, state, params)[1])


def all_reduces(tx, kind):
    calls = hlo.collectives(on_mesh(tx, kind)[0])
    return len([c for c in calls if not c.in_branch]), len(calls)


def tracked(**options):
    return clipx.track_norms(optax.chain(LIMIT, optax.adam(1e-2)), **options)


@pytest.mark.one_in(2, rest="slow")
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_the_update_takes_no_further_all_reduce(kind):
    before, after = tracked(ratios=True), tracked(updates=True)
    assert all_reduces(after, kind) == all_reduces(before, kind)


def test_rms_t_takes_no_further_all_reduce_either():
    before, after = tracked(ratios=True), tracked(updates=True, second_moment=0.999)
    assert all_reduces(before, AxisType.Explicit)[0] == 2
    assert all_reduces(after, AxisType.Explicit)[0] == 2


@pytest.mark.one_in(2, rest="slow")
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_on_a_mesh_as_on_one_device(kind):
    tx = tracked(updates=True, second_moment=0.999)
    params = {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
    _, state = tx.update(grads_like(params), tx.init(params), params)
    found = on_mesh(tx, kind)[1]
    for name, value in clipx.metrics(state).items():
        np.testing.assert_allclose(found[name], value, rtol=2e-6, err_msg=name)


def bytes_accessed(**options):
    params = {f"w{i}": jnp.ones((512, 512)) for i in range(8)}
    tx = tracked(**options)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, clipx.metrics(state)

    program = jax.jit(step, donate_argnums=(0, 1))
    compiled = program.lower(params, tx.init(params), params).compile()
    return hlo.memory(compiled)["bytes_accessed"]


def test_the_update_moves_no_more_bytes():
    assert bytes_accessed(updates=True) <= 1.02 * bytes_accessed(ratios=True)
