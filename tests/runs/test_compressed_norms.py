"""Norms that auto_clip compressed: its clip rate is high by design."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clipx as clipx
from optax_clipx._methods.auto import compress
from optax_clipx.runs.compression import is_compressed

NORMS = np.random.default_rng(0).lognormal(sigma=0.3, size=300)


def recorded(scales, limit=0.8):
    return {
        "clip/norm": NORMS,
        "clip/threshold": np.full(300, limit),
        "clip/clipped_norm": NORMS * np.asarray(scales),
        "clip/clipped": (limit < NORMS).astype(float),
    }


def by_auto(limit=0.3):
    found = compress(jnp.asarray(NORMS, jnp.float32), jnp.float32(limit))
    return recorded(found, limit)


def by_clamp(limit=0.3):
    return recorded(np.minimum(1, limit / NORMS), limit)


@pytest.mark.parametrize("limit", [0.03, 0.3, 0.8])
def test_compression_is_told_from_clipping(limit):
    assert is_compressed(by_auto(limit), "clip/norm")
    assert not is_compressed(by_clamp(limit), "clip/norm")


def test_few_or_small_norms_tell_nothing():
    for limit in (1e-3, 100.0):
        assert not is_compressed(by_auto(limit), "clip/norm")
    assert not is_compressed({"clip/norm": NORMS}, "clip/norm")


def test_a_high_clip_rate_is_usual_for_compressed_norms():
    assert "always-clipped" in clipx.diagnose(by_clamp()).codes
    assert "always-clipped" not in clipx.diagnose(by_auto()).codes


def test_a_run_with_auto_clip_tells_of_higher_thresholds(tmp_path):
    with clipx.History(tmp_path / "run.jsonl") as history:
        history.append(range(300), by_auto())
    found = clipx.suggest_threshold(history)
    assert found.value == pytest.approx(np.quantile(NORMS, 0.9), rel=0.02)
    assert str(found).startswith("use optax_clipx.clip_by_global_norm(")


def test_auto_clip_itself_is_recognized():
    clipper = clipx.auto_clip()
    state, update = clipper.init(jnp.zeros(1)), jax.jit(clipper.update)
    history = clipx.History()
    for step, norm in enumerate(NORMS[:40]):
        _, state = update(jnp.array([norm], jnp.float32), state)
        history.append(step, clipx.metrics(state))
    assert is_compressed(history.columns, "clip/norm")


def run_of(clipper, leaves=6, steps=300):
    """Leaves of different sizes with noise, clipped each by itself."""
    shape = (steps, leaves)
    noise = np.random.default_rng(0).lognormal(sigma=0.3, size=shape)
    grads = jnp.asarray(noise * np.logspace(0, 2, leaves), jnp.float32)

    def step(state, norms):
        tree = {f"{i}": norms[i : i + 1] for i in range(leaves)}
        return (state := clipper.update(tree, state)[1]), clipx.metrics(state)

    start = clipper.init({f"{i}": jnp.zeros(1) for i in range(leaves)})
    _, found = jax.lax.scan(step, start, grads)
    history = clipx.History()
    history.append(range(steps), found)
    return history


@pytest.mark.parametrize("leaves", [2, 6, 40])
def test_auto_clip_of_each_leaf_is_recognized(leaves):
    history = run_of(clipx.auto_clip(scope="leaf"), leaves)
    assert is_compressed(history.columns, "clip/norm")
    assert "always-clipped" not in clipx.diagnose(history).codes
    found = clipx.suggest_threshold(history)
    assert found.value == pytest.approx(np.quantile(history["clip/norm"], 0.9), rel=0.1)
    assert str(found).startswith("use optax_clipx.clip_by_global_norm(")
    assert "scaled down by auto_clip: 100.0% of the steps" in str(history)


def test_auto_clip_of_each_leaf_is_recognized_in_a_log_of_six_digits(tmp_path):
    columns = run_of(clipx.auto_clip(scope="leaf")).columns
    names = ("step", "clip/norm", "clip/threshold", "clip/scale", "clip/clipped")
    rows = zip(*(columns[name] for name in names), strict=True)
    lines = [",".join(names), *(",".join(f"{x:.6g}" for x in row) for row in rows)]
    path = tmp_path / "run.csv"
    path.write_text("\n".join(lines) + "\n")
    assert "always-clipped" not in clipx.diagnose(path).codes


LEAF = clipx.measures.leaf_norms()
OTHERS = {
    "fixed": clipx.clip_by_leaf_norm(0.3),
    "fixed for each leaf": clipx.clip_by_leaf_norm({f"{i}": 0.3 * i for i in range(6)}),
    "zclip": clipx.zclip(0.5, scope="leaf", warmup_steps=3),
    "quantile_clip": clipx.quantile_clip(0.1, scope="leaf"),
    "smooth_clip": clipx.smooth_clip(0.3, scope="leaf"),
    "its thresholds alone": clipx.clip_by(LEAF, clipx.thresholds.auto()),
    "a schedule that rises as its thresholds": clipx.clip_by_leaf_norm(
        optax.linear_schedule(0.09, 0.3, 100)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_with_a_threshold_for_each_leaf_are_not_compressed(name):
    history = run_of(OTHERS[name])
    assert (history["clip/clipped"][100:] > 0).mean() > 0.3
    assert not is_compressed(history.columns, "clip/norm")


def test_print_tells_how_many_steps_were_scaled_down():
    history = clipx.History()
    run = by_auto(limit=2.0)
    history.append(range(300), run | {"clip/scale": run["clip/clipped_norm"] / NORMS})
    lines = str(history).splitlines()
    assert lines[2] == f"clipped: {np.mean(NORMS > 2):.1%} of the steps"
    assert lines[3] == "scaled down by auto_clip: 100.0% of the steps"
