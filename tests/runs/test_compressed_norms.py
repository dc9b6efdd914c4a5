"""Norms that auto_clip compressed: its clip rate is high by design."""

import jax.numpy as jnp
import numpy as np
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
    state = clipper.init(jnp.zeros(1))
    history = clipx.History()
    for step, norm in enumerate(NORMS[:40]):
        _, state = clipper.update(jnp.array([norm], jnp.float32), state)
        history.append(step, clipx.metrics(state))
    assert is_compressed(history.columns, "clip/norm")


def test_print_tells_how_many_steps_were_scaled_down():
    history = clipx.History()
    run = by_auto(limit=2.0)
    history.append(range(300), run | {"clip/scale": run["clip/clipped_norm"] / NORMS})
    lines = str(history).splitlines()
    assert lines[2] == f"clipped: {np.mean(NORMS > 2):.1%} of the steps"
    assert lines[3] == "scaled down by auto_clip: 100.0% of the steps"
