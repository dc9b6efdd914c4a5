"""QK-Clip of queries, keys and values in one kernel, next to NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qk_reference as reference
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

import optax_clipx as clipx

IN, HEADS, DIM = 6, 4, 8
MAXIMA = np.array([50.0, 400.0, 100.0, 1e6], np.float32)
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (
    RNG.normal(size=(IN, HEADS, DIM)).astype(np.float32) for _ in range(3)
)
FUSED = clipx.qk.fused("attn/c_attn/kernel", num_heads=HEADS)


def clip(kernel, layout=FUSED, maxima=MAXIMA, **others):
    leaves = {"kernel": jnp.asarray(kernel), **others}
    params = {"attn": {"c_attn": leaves}}
    return clipx.qk_clip(params, {"attn": maxima}, layout)["attn"]["c_attn"]


def flat(*parts):
    """Parts (in, heads, dim) as one kernel (in, all entries)."""
    return np.concatenate([x.reshape(len(x), -1) for x in parts], axis=1)


def clipped():
    return *reference.mha(QUERY, KEY, MAXIMA), VALUE


def test_parts_one_after_the_other_on_one_axis():
    got = clip(flat(QUERY, KEY, VALUE))["kernel"]
    assert_allclose(got, flat(*clipped()), rtol=1e-6)
    assert_array_equal(got[:, 2 * HEADS * DIM :], VALUE.reshape(IN, -1))


@pytest.mark.parametrize("axis", [0, 1, 2, -3])
def test_parts_on_an_axis_of_their_own(axis):
    place = {0: {"head_axis": 2}, 1: {}, 2: {"head_axis": 1}, -3: {}}[axis]
    layout = clipx.qk.fused("attn/c_attn/kernel", part_axis=axis, **place)
    got = clip(np.stack([QUERY, KEY, VALUE], axis=axis), layout)["kernel"]
    assert_allclose(got, np.stack(clipped(), axis=axis), rtol=1e-6)


def test_outputs_before_inputs_as_in_pytorch():
    layout = clipx.qk.fused("attn/c_attn/kernel", num_heads=HEADS, head_axis=0)
    bias = flat(QUERY[:1], KEY[:1], VALUE[:1])[0]
    got = clip(flat(QUERY, KEY, VALUE).T, layout, bias=jnp.asarray(bias))
    assert_allclose(got["kernel"], flat(*clipped()).T, rtol=1e-6)
    assert_allclose(got["bias"], flat(*clipped())[0], rtol=1e-6)


def test_groups_share_their_keys():
    key, value = KEY[:, :2], VALUE[:, :2]
    layout = clipx.qk.fused("attn/c_attn/kernel", num_heads=HEADS, key_heads=2)
    got = clip(flat(QUERY, key, value), layout)["kernel"]
    want = *reference.gqa(QUERY, key, MAXIMA), value
    assert_allclose(got, flat(*want), rtol=1e-6)


def test_biases_are_scaled_with_the_kernel():
    kernel = np.stack([QUERY, KEY, VALUE], axis=1)
    layout = clipx.qk.fused("attn/c_attn/kernel", part_axis=1)
    got = clip(kernel, layout, bias=jnp.asarray(kernel[0]))["bias"]
    assert_allclose(got, np.stack(clipped(), axis=1)[0], rtol=1e-6)


def test_a_stack_of_layers():
    maxima = np.stack([MAXIMA, MAXIMA[::-1]])
    layout = clipx.qk.fused(
        "attn/c_attn/kernel", num_heads=HEADS, head_axis=2, layer_axis=0
    )
    kernel = flat(QUERY, KEY, VALUE)
    got = clip(np.stack([kernel, kernel]), layout, maxima)["kernel"]
    assert_array_equal(got[0], clip(kernel)["kernel"])
    assert_array_equal(got[1], clip(kernel, maxima=MAXIMA[::-1])["kernel"])


def test_logits_of_an_attention_end_at_the_threshold():
    x = RNG.normal(size=(2, 5, IN))
    kernel = 3 * flat(QUERY, KEY, VALUE)

    def logits(kernel):
        parts = np.split(np.asarray(kernel).reshape(IN, 3 * HEADS, DIM), 3, axis=1)
        return reference.logits(*(reference.project(x, part) for part in parts[:2]))

    before = reference.maxima(logits(kernel))
    limit = float(np.median(before))
    params = {"attn": {"c_attn": {"kernel": jnp.asarray(kernel)}}}
    got = clipx.qk_clip(params, {"attn": jnp.asarray(before)}, FUSED, threshold=limit)
    after = reference.maxima(logits(got["attn"]["c_attn"]["kernel"]))
    assert_allclose(after, np.minimum(before, limit), rtol=1e-5)


def test_updates_lead_to_the_clipped_kernel():
    params = {"attn": {"c_attn": {"kernel": jnp.asarray(flat(QUERY, KEY, VALUE))}}}
    tx = optax.chain(optax.sgd(0.1), clipx.qk_clip_updates(FUSED))
    state, maxima = tx.init(params), {"attn": MAXIMA}
    step = jax.jit(lambda state: tx.update(params, state, params, max_logits=maxima))
    got = optax.apply_updates(params, step(state)[0])["attn"]["c_attn"]["kernel"]
    assert_allclose(got, 0.9 * flat(*clipped()), rtol=1e-5)


@pytest.mark.parametrize("spec", [P(None, "x"), P("x")])
def test_a_kernel_that_is_cut_over_an_explicit_mesh(spec):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    kernel = jax.device_put(flat(QUERY, KEY, VALUE), NamedSharding(mesh, spec))
    got = jax.jit(clip)(kernel)["kernel"]
    assert jax.typeof(got).sharding.spec == jax.typeof(kernel).sharding.spec
    assert_allclose(got, flat(*clipped()), rtol=1e-6)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("params/h/0/attn/c_attn/kernel", "h/0/attn"),
        (("layers", "0", "qkv"), "layers/0"),
        ("qkv/w", "attention"),
    ],
)
def test_the_name_is_that_of_the_module_with_the_projection(path, name):
    assert clipx.qk.fused(path, num_heads=2).name == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"num_heads= .* in 'a/qkv'.*or part_axis=.*got neither"),
        ({"part_axis": 1, "key_heads": 2}, "got key_heads=2, part_axis=1"),
        ({"num_heads": 4, "key_heads": 3}, "multiple of it, got key_heads=3"),
        ({"num_heads": 0}, "num_heads"),
    ],
)
def test_arguments_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        clipx.qk.fused("a/qkv", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_heads": 5},
            r"of 5 heads one after the other on axis 1 of 'attn/c_attn/kernel', which"
            r" are a multiple of 15 entries, got shape \(6, 96\)",
        ),
        ({"num_heads": 4, "head_axis": 2}, r"an axis of .* shape \(6, 96\)"),
        (
            {"part_axis": 0, "head_axis": 1},
            r"axis of length 3 .* got part_axis=0, head_axis=1 and shape \(6, 96\)",
        ),
        (
            {"num_heads": 4, "layer_axis": 1},
            "Expected layer_axis before head_axis in .* got layer_axis=1",
        ),
    ],
)
def test_kernels_that_do_not_fit(options, message):
    layout = clipx.qk.fused("attn/c_attn/kernel", **options)
    with pytest.raises(ValueError, match=message):
        clip(flat(QUERY, KEY, VALUE), layout)


# 12 entries are a multiple of 3 * 4 heads, so that inputs may be outputs.
@pytest.mark.parametrize(
    ("shape", "options", "axes"),
    [
        ((96, 6), {"num_heads": 4}, [0]),
        ((96, 12), {"num_heads": 4}, [0, 1]),
        ((12, 96), {"num_heads": 4}, [0, 1]),
        ((8, 64), {"num_heads": 4, "key_heads": 2}, [0, 1]),
        ((2, 96, 6), {"num_heads": 4, "layer_axis": 0}, [1]),
        ((2, 12, 96), {"num_heads": 4, "layer_axis": 0}, [1, 2]),
        ((6, 2, 12, 96), {"num_heads": 4, "layer_axis": -3}, [2, 3]),
        ((8, 3, 8, 6), {"part_axis": 1}, [0, 2]),  # (heads, 3, dimension, in)
        ((6, 8, 3, 8), {"part_axis": 2}, [1, 3]),  # (in, heads, 3, dimension)
        ((6, 8, 3, 8), {"part_axis": -2, "num_heads": 8}, [1, 3]),
        ((2, 8, 3, 8, 6), {"part_axis": 2, "layer_axis": 0}, [1, 3]),
        ((6, 8, 4, 3), {"part_axis": -1}, [2]),
    ],
)
def test_a_shape_that_allows_other_axes_needs_head_axis(shape, options, axes):
    layout = clipx.qk.fused("attn/c_attn/kernel", **options)
    tx = clipx.qk_clip_updates(layout)
    params = {"attn": {"c_attn": {"kernel": jnp.ones(shape)}}}
    advice = " or ".join(f"head_axis={axis}" for axis in axes)
    with pytest.raises(ValueError, match=rf"Expected head_axis= .*Pass {advice}\."):
        tx.init(params)
    for axis in axes:
        clear = clipx.qk.fused("attn/c_attn/kernel", head_axis=axis, **options)
        clipx.qk_clip_updates(clear).init(params)


@pytest.mark.parametrize("layer", [0, -3])
def test_a_stack_of_layers_has_its_heads_on_the_last_axis(layer):
    layout = clipx.qk.fused("attn/c_attn/kernel", num_heads=HEADS, layer_axis=layer)
    kernel = flat(QUERY, KEY, VALUE)
    maxima = np.stack([MAXIMA, MAXIMA[::-1]])
    got = clip(np.stack([kernel, kernel]), layout, maxima)["kernel"]
    assert_array_equal(got[0], clip(kernel)["kernel"])
    assert_array_equal(got[1], clip(kernel, maxima=MAXIMA[::-1])["kernel"])


def test_parts_on_an_axis_after_that_of_the_layers():
    layout = clipx.qk.fused("attn/c_attn/kernel", part_axis=2, layer_axis=0)
    kernel = np.stack([QUERY, KEY, VALUE], axis=1)[None]
    got = clip(kernel, layout, MAXIMA[None])["kernel"]
    assert_allclose(got[0], np.stack(clipped(), axis=1), rtol=1e-6)


def test_a_number_of_heads_that_is_not_that_of_the_kernel():
    layout = clipx.qk.fused("attn/c_attn/kernel", part_axis=1, num_heads=2)
    with pytest.raises(ValueError, match="and 2 heads on another"):
        clip(np.stack([QUERY, KEY, VALUE], axis=1), layout)


def test_a_bias_that_does_not_fit():
    with pytest.raises(ValueError, match=r"96 entries in the bias .* got shape \(5,\)"):
        clip(flat(QUERY, KEY, VALUE), bias=jnp.ones(5))
