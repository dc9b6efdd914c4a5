"""Whose numbers `metrics` shows: those of the clipper and those of the skipper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clipx as clipx

PARAMS = {"w": jnp.zeros(2)}


def clip():
    return clipx.clip_by_global_norm(1.0)


def stepped(tx, *sizes):
    """The state after gradients along [0.6, 0.8] of these norms."""
    state = tx.init(PARAMS)
    for size in sizes:
        grads = {"w": size * jnp.array([0.6, 0.8])}
        _, state = jax.jit(tx.update)(grads, state, PARAMS)
    return state


def groups(read):
    return {name.rsplit("/", 1)[0] for name in read}


def test_the_clipper_inside_is_seen_under_clip():
    tx = clipx.skip_spikes(optax.chain(clip(), optax.sgd(0.1)))
    read = clipx.metrics(stepped(tx, 20.0))
    assert groups(read) == {"clip", "skip"}
    shown = [read[f"clip/{k}"] for k in ("norm", "clipped_norm", "clipped")]
    np.testing.assert_allclose(shown, [20.0, 1.0, 1.0], rtol=1e-6)
    assert not read["skip/skipped"]
    assert read["skip/clipped"] == 0


def test_without_a_clipper_there_is_skip_alone():
    read = clipx.metrics(stepped(clipx.skip_spikes(optax.sgd(0.1)), 20.0))
    assert groups(read) == {"skip"}
    np.testing.assert_allclose(read["skip/norm"], 20.0, rtol=1e-6)


def test_the_skipper_shows_all_that_it_knows():
    read = clipx.metrics(stepped(clipx.skip_spikes(optax.sgd(0.1)), 20.0))
    own = {"skipped", "reason", "num_skipped", "consecutive_skips"}
    assert set(read) == {f"skip/{k}" for k in (*clipx.ClipMetrics._fields, *own)}


def test_after_a_skip_the_clipper_shows_its_last_step_and_the_skipper_this_one():
    inner = optax.chain(clip(), optax.sgd(0.1))
    tx = clipx.skip_spikes(inner, threshold=50.0)
    read = clipx.metrics(stepped(tx, 3.0, 4.0, 700.0))
    found = [read[k] for k in ("clip/norm", "clip/steps", "clip/num_clipped")]
    np.testing.assert_allclose(found, [4.0, 2, 2], rtol=1e-6)
    found = [read[k] for k in ("skip/norm", "skip/threshold", "skip/steps")]
    np.testing.assert_allclose(found, [700.0, 50.0, 3], rtol=1e-6)
    assert read["skip/skipped"]
    assert read["skip/num_skipped"] == read["skip/consecutive_skips"] == 1


def test_another_prefix_stands_before_skip_and_track():
    tx = clipx.track_norms(clipx.skip_spikes(optax.chain(clip(), optax.sgd(0.1))))
    read = clipx.metrics(stepped(tx, 20.0), prefix="grads")
    assert groups(read) == {
        *("grads", "grads_skip", "grads_track", "grads_track_norms"),
    }


def test_nested_skippers_and_several_clippers_are_told_apart():
    inner = clipx.skip_spikes(optax.chain(clip(), optax.scale(3.0), clip()))
    read = clipx.metrics(stepped(clipx.skip_spikes(inner), 20.0))
    assert groups(read) == {"clip/0", "clip/2", "skip", "skip/inner"}
    found = [read[f"{group}/norm"] for group in ("clip/0", "clip/2", "skip/inner")]
    np.testing.assert_allclose(found, [20.0, 3.0, 20.0], rtol=1e-6)


def test_skippers_in_a_named_chain_have_its_names():
    tx = optax.named_chain(
        ("a", clipx.skip_spikes(clip())), ("b", clipx.skip_spikes(optax.sgd(0.1)))
    )
    read = clipx.metrics(stepped(tx, 20.0))
    assert groups(read) == {"clip", "skip/a", "skip/b"}


def test_check_tells_a_nonfinite_step_of_a_skipper_and_of_a_clipper():
    with pytest.raises(
        FloatingPointError, match=r"^skip: non-finite updates in step 2"
    ):
        clipx.check(stepped(clipx.skip_spikes(clip()), 1.0, np.nan))
    for policy in ("propagate", "zero"):
        outside = optax.chain(
            clipx.clip_by_global_norm(1.0, nonfinite=policy), clipx.skip_spikes(clip())
        )
        with pytest.raises(FloatingPointError, match="non-finite updates in step 2"):
            clipx.check(stepped(outside, 1.0, np.nan))
    clipx.check(stepped(clipx.skip_spikes(clip()), 1.0, np.nan, 1.0))
