"""Calls as in another library: the error says what to type here."""

import functools
import inspect
import pickle
import re

import jax.numpy as jnp
import optax
import pytest

import optax_clipx as clipx
from optax_clipx._trees.calls import explains_calls

TREE = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
METHODS = {
    name: getattr(clipx, name)
    for name in clipx.__all__
    if getattr(getattr(clipx, name), "__module__", "").startswith(
        "optax_clipx._methods"
    )
    and inspect.signature(getattr(clipx, name)).return_annotation
    is optax.GradientTransformationExtraArgs
}
NORM = (
    "clip_by_global_norm takes no gradients and no parameters:"
    " clip_by_global_norm(max_norm) makes a transformation for"
    " optax.chain(clip_by_global_norm(max_norm), optimizer), whose update clips the"
    " gradients. To clip one tree, call"
    " optax_clipx.functional.clip_by_global_norm(tree, max_norm)."
)
KERAS = "clip_by_global_norm has no argument {}. Write optax_clipx.{}, which does the"
KERAS += " same as in Keras."
WRONG = {
    "tree first": (lambda: clipx.clip_by_global_norm(TREE, 1.0), NORM),
    "list first": (lambda: clipx.clip_by_global_norm([jnp.ones(2)], 1.0), NORM),
    "tree and name": (lambda: clipx.clip_by_global_norm(TREE, max_norm=1.0), NORM),
    "tree and option": (lambda: clipx.clip_by_global_norm(TREE, norm_type=2), NORM),
    "tree by name": (
        lambda: clipx.clip_by_global_norm(parameters=TREE, max_norm=1.0),
        NORM,
    ),
    "clip": (
        lambda: clipx.clip(TREE, 1.0),
        "clip takes no gradients and no parameters: clip(max_delta) makes a"
        " transformation for optax.chain(clip(max_delta), optimizer), whose update"
        " clips the gradients. To clip one tree, call"
        " optax_clipx.functional.clip_by_value(tree, -max_delta, max_delta).",
    ),
    "without a pure function": (
        lambda: clipx.zclip(TREE, 1.0),
        "zclip takes no gradients and no parameters: zclip() makes a transformation"
        " for optax.chain(zclip(), optimizer), whose update clips the gradients.",
    ),
    "numbers": (
        lambda: clipx.clip_by_leaf_norm(jnp.float32(1.0), 2),
        "clip_by_leaf_norm got 2 positional arguments, but takes max_norm. Pass others"
        " by name: ord=, batch_axes=, nonfinite=, axis_name=, specs=, metrics=.",
    ),
    "no position": (
        lambda: clipx.auto_clip(1.0),
        "auto_clip got 1 positional argument, but takes none. Pass others by name:"
        " scope=, nonfinite=, axis_name=, specs=, metrics=.",
    ),
    "norm_type": (
        lambda: clipx.clip_by_global_norm(1.0, norm_type=2),
        "clip_by_global_norm has no argument norm_type. Write ord=2.",
    ),
    "norm_type without ord": (
        lambda: clipx.auto_clip(norm_type=2),
        "auto_clip has no argument norm_type. It has scope, nonfinite, axis_name,"
        " specs, metrics.",
    ),
    "error_if_nonfinite": (
        lambda: clipx.clip_by_global_norm(1.0, error_if_nonfinite=True),
        "clip_by_global_norm has no argument error_if_nonfinite. Write"
        ' nonfinite="raise".',
    ),
    "foreach": (
        lambda: clipx.clip(1.0, foreach=True),
        "clip has no argument foreach. Leave it out: XLA compiles the operations of"
        " all leaves.",
    ),
    "clipvalue": (
        lambda: clipx.clip_by_global_norm(clipvalue=0.5),
        KERAS.format("clipvalue", "clip(0.5)"),
    ),
    "clipnorm": (
        lambda: clipx.clip_by_global_norm(clipnorm=TREE),
        KERAS.format("clipnorm", "clip_by_leaf_norm(...)"),
    ),
    "global_clipnorm": (
        lambda: clipx.clip_by_global_norm(global_clipnorm=1.0),
        KERAS.format("global_clipnorm", "clip_by_global_norm(1.0)"),
    ),
    "lr": (
        lambda: clipx.stable_adamw(lr=0.001),
        "stable_adamw has no argument lr. Write learning_rate=0.001.",
    ),
    "betas": (
        lambda: clipx.scale_by_acclip(betas=(0.9, 0.99)),
        "scale_by_acclip has no argument betas. Write b1=..., b2=....",
    ),
    "a name for the threshold": (
        lambda: clipx.clip_by_block_rms(max_norm=1.0),
        "clip_by_block_rms has no argument max_norm. Did you mean threshold?",
    ),
    "near": (
        lambda: clipx.zclip(warmup=10),
        "zclip has no argument warmup. Did you mean warmup_steps?",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_error_says_what_to_type(case):
    call, text = WRONG[case]
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        call()


def test_the_error_of_a_missing_argument_is_that_of_python():
    with pytest.raises(TypeError, match=r"missing.* 'max_norm'"):
        clipx.clip_by_global_norm()


def test_an_error_from_inside_stays_as_it_is():
    with pytest.raises(TypeError, match=r"^Expected max_norm to be a number, .* 1j\.$"):
        clipx.clip_by_global_norm(1j)


@pytest.mark.parametrize(
    ("method", "given"),
    [
        (clipx.clip, {"max_delta": 0.5}),
        (clipx.clip_by_value, {"min_value": -1.0, "max_value": 0.5}),
        (clipx.clip_by_leaf_norm, {"max_norm": 0.5}),
        (clipx.clip_by_global_norm, {"max_norm": 0.5}),
        (clipx.adaptive_grad_clip, {"clipping": 0.5}),
    ],
)
def test_the_named_function_clips_as_the_method_does(method, given):
    with pytest.raises(TypeError) as caught:
        method(TREE, *given.values(), 1.0, 2.0)
    line = re.search(r"call optax_clipx\.(.*)\.$", str(caught.value))[1]
    ours = eval(line, {"functional": clipx.functional, "params": TREE, **given,
                       "tree": TREE})  # fmt: skip
    want, _ = method(**given).update(TREE, method(**given).init(TREE), TREE)
    clipped = ours[0] if isinstance(ours, tuple) else ours
    assert jnp.array_equal(clipped["kernel"], want["kernel"])
    assert not jnp.array_equal(clipped["kernel"], TREE["kernel"])


@pytest.mark.parametrize("name", METHODS)
def test_each_method_explains_its_calls(name):
    with pytest.raises(TypeError, match=f"^{name} has no argument foreach. Leave it"):
        METHODS[name](foreach=True)


def test_there_are_methods():
    assert {"clip", "zclip", "auto_clip", "stable_adamw"} <= set(METHODS)


@explains_calls
def example(limit, *, other=1):
    """Docstring."""
    return limit, other


def test_a_call_that_fits_returns_what_the_function_returns():
    assert example(1.0, other=2) == (1.0, 2)


def test_signature_name_and_docstring_stay():
    assert str(inspect.signature(example)) == "(limit, *, other=1)"
    assert (example.__name__, example.__doc__) == ("example", "Docstring.")


@pytest.mark.parametrize("name", ["clip_by_global_norm", "zclip"])
def test_pickles_as_itself(name):
    method = METHODS[name]
    assert pickle.loads(pickle.dumps(method)) is method
    partial = pickle.loads(pickle.dumps(functools.partial(method, metrics=False)))
    assert partial.func is method


def test_inject_hyperparams_sees_the_names():
    tx = optax.inject_hyperparams(clipx.clip_by_global_norm)(max_norm=1.0)
    assert set(tx.init(TREE).hyperparams) == {"max_norm", "eps"}
