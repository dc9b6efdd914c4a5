"""States that `init` did not make, parameters that are no arrays, missing calls."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from all_methods import ALL_METHODS, EVERY
from flax.training.train_state import TrainState

import optax_clipx as clipx


@pytest.fixture(autouse=True)
def as_users_run_it():
    """Without the check of annotations, which would be the first to complain."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


GRADS = {"w": jnp.array([3.0, 4.0])}
WITHOUT_MEMORY = {
    **{name: make(0.5) for name, make in ALL_METHODS.items()},
    "smooth_clip": clipx.smooth_clip(1.0),
    "spectral": clipx.clip_by_spectral_norm(0.5),
    "without metrics": clipx.clip_by_global_norm(0.5, metrics=False),
}


def train_state():
    return TrainState.create(
        apply_fn=print, params={"kernel": jnp.full(999, 7.25)}, tx=optax.sgd(0.1)
    )


@pytest.mark.one_in(10)
@pytest.mark.parametrize("name", WITHOUT_MEMORY)
@pytest.mark.parametrize("make", [train_state, optax.EmptyState, dict])
def test_a_limit_without_memory_takes_any_state_and_returns_it(name, make):
    tx, state = WITHOUT_MEMORY[name], make()
    want, _ = tx.update(GRADS, tx.init(GRADS), GRADS)
    clipped, after = tx.update(GRADS, state, GRADS)
    assert after is state
    np.testing.assert_array_equal(clipped["w"], want["w"])


@pytest.mark.one_in(10)
@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (clipx.zclip(), "ClipState"),
        (clipx.clip_by_global_norm(lambda step: 1.0 + step), "ClipState"),
        (clipx.scale_by_acclip(), "ClipState"),
        (clipx.skip_spikes(optax.adam(1.0)), "SkipState"),
        (clipx.track_norms(optax.adam(1.0)), "TrackState"),
        (clipx.reset_moments(optax.adam(1.0)), "ResetState"),
        (clipx.tap(clipx.clip(1.0), print), "TapState"),
        (clipx.error_feedback(clipx.clip(1.0)), "ErrorState"),
        (clipx.excluding(clipx.clip(1.0), "b"), "MaskedState"),
        (clipx.normalized_momentum(), "EmaState"),
    ],
)
def test_elsewhere_the_error_names_the_type_and_not_the_model(tx, expected):
    with pytest.raises(TypeError) as caught:
        tx.update(GRADS, train_state(), GRADS)
    text = str(caught.value)
    assert text.startswith(f"Expected the {expected} that init(params) returned")
    assert "got a state of type TrainState. Call state = tx.init(params)" in text
    assert "7.25" not in text


def test_the_state_of_a_chain_is_named_by_its_parts():
    state = optax.chain(clipx.clip(1.0), optax.adam(1.0)).init(GRADS)
    with pytest.raises(TypeError, match=r"type tuple of ClipState, tuple\. Call"):
        clipx.zclip().update(GRADS, state)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("tx", "other", "match"),
    [
        (clipx.zclip(), clipx.auto_clip(), "ZScoreState, .* got the AutoState of"),
        (clipx.zclip(), clipx.clip(1.0), "ZScoreState, .* got the nothing of"),
        (clipx.clip_by_global_norm(1.0), clipx.zclip(), "nothing, .* the ZScoreState"),
        (clipx.mixed_clip(1.0), clipx.zclip(), "MixedMemory, .* the ZScoreState"),
        (clipx.scale_by_acclip(), clipx.mixed_clip(1.0), "ACClipM.* the MixedMemory"),
        (clipx.clip(1.0), clipx.zclip(), "nothing, .* the ZScoreState"),
    ],
)
def test_the_state_of_another_clipper_is_an_error(tx, other, match):
    with pytest.raises(TypeError, match=f"rule remembers {match}.*carry_over"):
        tx.update(GRADS, other.init(GRADS), GRADS)


class Opaque:
    """A parameter that says its shape and dtype, and is no array."""

    shape, dtype = (2,), jnp.dtype("float32")


@pytest.mark.one_in(10)
@pytest.mark.parametrize("name", WITHOUT_MEMORY)
def test_init_without_memory_does_not_look_at_the_parameters(name):
    tx = WITHOUT_MEMORY[name]
    state = tx.init({"a": Opaque(), "b": "no array", "c": print})
    clipped, _ = tx.update(GRADS, state, GRADS)
    want, _ = tx.update(GRADS, tx.init(GRADS), GRADS)
    np.testing.assert_array_equal(clipped["w"], want["w"])


@pytest.mark.parametrize(
    "make",
    [clipx.zclip, clipx.scale_by_acclip, EVERY["track_norms"].make],
)
def test_init_with_memory_names_the_leaf_and_what_to_pass(make):
    with pytest.raises(TypeError) as caught:
        make().init({"layer": {"w": Opaque()}})
    text = str(caught.value)
    assert "a leaf of type Opaque at layer/w" in text
    assert "jax.tree.map(lambda p: p.value, params)" in text


@pytest.mark.parametrize(
    "wrap",
    [
        clipx.skip_spikes,
        clipx.reset_moments,
        lambda tx: clipx.excluding(tx, "b"),
    ],
)
def test_wrappers_hand_parameters_on_as_they_are(wrap):
    seen = []

    def init(params):
        seen.append(params["w"])
        return optax.EmptyState()

    leaf = Opaque()
    inner = optax.GradientTransformation(init, lambda u, s, p=None: (u, s))
    wrap(inner).init({"w": leaf, "b": Opaque()})
    assert seen == [leaf]


def test_boxed_parameters_are_read_through():
    params = {"w": nn.Partitioned(jnp.ones(2), names=("x",))}
    assert clipx.zclip().init(params).metrics.steps == 0


WRAPPERS = {
    "skip_spikes": clipx.skip_spikes,
    "reset_moments": clipx.reset_moments,
    "track_norms": clipx.track_norms,
    "tap": lambda tx: clipx.tap(tx, print),
    "error_feedback": clipx.error_feedback,
    "excluding": lambda tx: clipx.excluding(tx, "b"),
}


@pytest.mark.one_in(10)
@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize(("made", "call"), [(optax.adam, "adam"), (clipx.clip, "clip")])
def test_an_optimizer_that_was_not_called_is_an_error(name, made, call):
    with pytest.raises(TypeError, match=rf"got the function {call}\. Call it first"):
        WRAPPERS[name](made)


@pytest.mark.parametrize("combine", [optax.chain, optax.with_extra_args_support])
def test_a_clipper_that_was_not_called_is_an_error_in_optax(combine):
    with pytest.raises(
        TypeError, match=r"the function auto_clip. Call it first: auto_cl"
    ):
        combine(clipx.auto_clip).init(GRADS)


@pytest.mark.one_in(10)
@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (clipx.clip(1.0), "GradientTransformationExtraArgs"),
        (optax.adam(1.0), "GradientTransformationExtraArgs"),
        ({"w": jnp.ones(2)}, "a dict with 'w'"),
        (train_state(), "TrainState"),
        (optax.adam(1.0).init(GRADS), "ScaleByAdamState, EmptyState"),
    ],
)
@pytest.mark.parametrize("read", [clipx.metrics, clipx.check])
def test_metrics_of_something_else_say_what_to_pass(read, given, kind):
    with pytest.raises(ValueError, match=r"pass what tx\.init and .* return") as caught:
        read(given)
    assert f"got {kind} without such a clipper. " in str(caught.value)


def test_a_function_can_still_be_given_hyperparameters():
    tx = optax.inject_hyperparams(clipx.clip_by_global_norm)(max_norm=1.0)
    clipped, _ = jax.jit(tx.update)(GRADS, tx.init(GRADS))
    np.testing.assert_allclose(clipped["w"], [0.6, 0.8], rtol=1e-6)
