"""Bad input is an error that names the value, the leaf and the mend."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from all_methods import ALL_METHODS

import optax_clipx as clipx

every_method = pytest.mark.parametrize(
    "make", ALL_METHODS.values(), ids=ALL_METHODS.keys()
)
PARAMS = {"layers": [{"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}]}


@pytest.mark.one_in(10)
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clipx.clip(-1.0), r"max_delta >= 0, got max_delta=-1\.0"),
        (lambda: clipx.clip(float("nan")), "max_delta=nan"),
        (lambda: clipx.clip_by_value(1.0, -1.0), r"min_value=1\.0 and max_value=-1\.0"),
        (lambda: clipx.clip_by_value(float("nan"), 1.0), "min_value=nan"),
        (lambda: clipx.clip_by_leaf_norm(-2), "max_norm=-2"),
        (lambda: clipx.clip_by_leaf_norm({"a": 1.0, "b": -3.0}), r"\['b'\]=-3\.0"),
        (lambda: clipx.clip_by_block_rms(-1.0), r"threshold=-1\.0"),
        (lambda: clipx.clip_by_global_norm(np.float32(-1)), r"max_norm=-1\.0"),
        (lambda: clipx.clip_by_global_norm(jnp.ones(2)), r"scalar max_norm.*\(2,\)"),
        (lambda: clipx.clip_by_global_norm(1.0, eps=-1.0), r"eps=-1\.0"),
        (lambda: clipx.clip_by_global_norm(1.0, ord=0), "ord=0"),
        (lambda: clipx.clip_by_global_norm(1.0, ord="fro"), "ord='fro'"),
        (lambda: clipx.clip_by_global_norm(1.0, ord=True), "ord=True"),
        (
            lambda: clipx.clip_by_global_norm(1.0, nonfinite="ignore"),
            "'propagate'.*'ignore'",
        ),
        (lambda: clipx.clip_by_group_norm({"a": -1.0}, {"w": "a"}), r"\['a'\]=-1\.0"),
        (lambda: clipx.adaptive_grad_clip(-0.1), r"clipping=-0\.1"),
        (lambda: clipx.adaptive_grad_clip(0.1, eps=-0.1), r"eps=-0\.1"),
        (lambda: clipx.responses.smooth(jnp.ones(1), jnp.ones(1), p=0.0), r"p=0\.0"),
        (lambda: clipx.responses.smooth(jnp.ones(1), jnp.ones(1), p=-1.0), r"p=-1\.0"),
    ],
)
def test_values_are_refused_at_construction(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clipx.clip("1"), "max_delta.*'1'"),
        (lambda: clipx.clip(True), "max_delta.*True"),
        (lambda: clipx.clip_by_global_norm(1j), "max_norm.*1j"),
        (lambda: clipx.clip_by_global_norm(None), "max_norm.*None"),
        (lambda: clipx.clip_by_group_norm(1.0, {"w": "a"}), "max_norms.*1.0"),
        (lambda: clipx.clip_by(lambda x: x, 1.0), "measure"),
        (
            lambda: clipx.clip_by(clipx.measures.tree_norm(), 1.0, "rescale"),
            "response.*'rescale'",
        ),
        (
            lambda: clipx.clip_by_global_norm(1.0, ord=jnp.float32(2)),
            "static_args='ord'",
        ),
    ],
)
def test_types_are_refused_at_construction(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.one_in(10)
@every_method
@pytest.mark.parametrize("dtype", ["int32", "bool", "uint8"])
def test_integer_leaves(make, dtype):
    grads = {"layers": [{"kernel": jnp.ones((2, 2), dtype), "bias": jnp.ones(2)}]}
    clipper = make(1.0)
    with pytest.raises(TypeError, match=rf"{dtype} at layers/0/kernel\..*masked"):
        clipper.update(grads, clipper.init(PARAMS), PARAMS)


@pytest.mark.one_in(10)
@every_method
@pytest.mark.parametrize("leaf", [3, True, "text", object()])
def test_leaves_that_are_no_arrays(make, leaf):
    clipper = make(1.0)
    with pytest.raises(TypeError, match="at 1"):
        clipper.update(
            [jnp.ones(2), leaf], clipper.init([jnp.ones(2)]), [jnp.ones(2)] * 2
        )


@pytest.mark.one_in(10)
@every_method
def test_an_unfiltered_equinox_module(make):
    model = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    clipper = make(1.0)
    with pytest.raises(TypeError, match=r"activation.*equinox\.filter"):
        clipper.update(model, clipper.init(model), model)
    filtered = eqx.filter(model, eqx.is_inexact_array)
    clipped, _ = clipper.update(filtered, clipper.init(filtered), filtered)
    assert jax.tree.structure(clipped) == jax.tree.structure(filtered)


def test_python_floats_are_arrays():
    clipped, _ = clipx.clip_by_global_norm(1.0).update({"a": 3.0, "b": 4.0})
    np.testing.assert_allclose([clipped["a"], clipped["b"]], [0.6, 0.8], rtol=1e-6)


def test_labels():
    grads = {"w": jnp.ones(2), "head": {"v": jnp.ones(2)}}
    clipper = clipx.clip_by_group_norm({"body": 1.0}, {"w": "body"})
    with pytest.raises(ValueError, match=r"none for head/v.*has values for: w"):
        clipper.update(grads)
    clipper = clipx.clip_by_group_norm({"body": 1.0}, lambda path, leaf: path[0])
    with pytest.raises(ValueError, match=r"for every label.*'head'.*\['body'\]"):
        clipper.update(grads)


def test_prefix_without_a_limit():
    with pytest.raises(ValueError, match="none for v"):
        clipx.clip_by_leaf_norm({"w": 1.0, "v": None}).update(
            {"w": jnp.ones(2), "v": jnp.ones(2)}
        )
    with pytest.raises(ValueError, match="single max_norm"):
        clipx.clip_by_global_norm({"w": 1.0}).update({"w": jnp.ones(2)})


def test_missing_or_different_params():
    clipper = clipx.adaptive_grad_clip(0.1)
    grads = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=r"update\(updates, state, params\)"):
        clipper.update(grads)
    with pytest.raises(ValueError, match=r"at w.*none"):
        clipper.update(grads, None, {"v": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match=r"\(2, 2\) at w.*\(3,\)"):
        clipper.update(grads, None, {"w": jnp.ones(3)})


def test_axes():
    grads = {"w": jnp.ones((2, 2)), "deep": jnp.ones((1, 2, 2, 2, 2, 2))}
    with pytest.raises(ValueError, match=r"rank 5.*at deep.*axis="):
        clipx.functional.unit_norms(grads)
    with pytest.raises(ValueError, match=r"\(2, 2\) at w.*axis=5"):
        clipx.functional.unit_norms(grads, axis=5)
    with pytest.raises(ValueError, match="batch_axes"):
        clipx.clip_by_leaf_norm(1.0, batch_axes=7).update(grads)


def adaptive():
    return clipx.thresholds.Threshold(lambda n: n, lambda n, s, c: (s, n))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize(
    "measure", [clipx.measures.leaf_norms(), clipx.measures.unit_norms()]
)
def test_a_state_of_other_leaves(measure, before, now):
    tx = clipx.clip_by(measure, clipx.thresholds.quantile(0.9))
    state = tx.init([jnp.ones((2, 3))] * before)
    with pytest.raises(ValueError, match="leaves like these"):
        tx.update([jnp.ones((2, 3))] * now, state)


def test_an_adaptive_clipper_without_state():
    with pytest.raises(ValueError, match=r"init\(params\)"):
        clipx.clip_by(clipx.measures.tree_norm(), adaptive()).update(jnp.ones(2))


def test_static_arguments_under_inject_hyperparams():
    grads = {"w": jnp.array([3.0, 4.0])}
    traced = optax.inject_hyperparams(clipx.clip_by_global_norm)(1.0, ord=2)
    with pytest.raises(TypeError, match="static_args='ord'"):
        traced.init(grads)
    static = optax.inject_hyperparams(clipx.clip_by_global_norm, static_args="ord")
    clipper = static(1.0, ord=1)
    clipped, _ = jax.jit(clipper.update)(grads, clipper.init(grads))
    np.testing.assert_allclose(clipped["w"], [3 / 7, 4 / 7], rtol=1e-6)


def test_per_example_gradients_need_a_batch():
    with pytest.raises(ValueError, match="axis 0"):
        clipx.per_example_global_norm_clip([jnp.ones((2, 3)), jnp.ones((3, 3))], 1.0)
    with pytest.raises(ValueError, match="axis 0"):
        clipx.per_example_layer_norm_clip([jnp.float32(1.0)], 1.0)
