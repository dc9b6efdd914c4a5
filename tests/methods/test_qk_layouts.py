"""Layouts of attention for QK-Clip: their names, Flax's layers, and errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optax_clipx as clipx

MHA = clipx.qk.mha("attn/query/kernel", "attn/key/kernel")


def params(query=(3, 4, 2), key=(3, 4, 2)):
    leaves = {"query": {"kernel": jnp.ones(query)}, "key": {"kernel": jnp.ones(key)}}
    return {"attn": leaves}


def clip(tree=None, maxima=None, layout=MHA, **options):
    tree = params() if tree is None else tree
    maxima = {"attn": jnp.full(4, 400.0)} if maxima is None else maxima
    return clipx.qk_clip(tree, maxima, layout, **options)


@pytest.mark.parametrize(
    ("query", "key", "name"),
    [
        ("attn/query/kernel", "attn/key/kernel", "attn"),
        (("layers", "0", "q"), ("layers", "0", "k"), "layers/0"),
        ("params/block/q/w", "params/block/k/w", "block"),
        ("query/kernel", "key/kernel", "attention"),
    ],
)
def test_the_name_is_the_common_part_of_the_paths(query, key, name):
    assert clipx.qk.mha(query, key).name == name


def test_layouts_are_hashable_and_equal_by_value():
    assert len({MHA, clipx.qk.mha("attn/query/kernel", "attn/key/kernel")}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": 3}, "Expected query to be the path of a leaf"),
        ({"query": ""}, "Expected query to be the path of a leaf"),
        ({"key": ("a", 1)}, "Expected key to be the path of a leaf"),
        ({"query_bias": 3}, "Expected query_bias to be the path"),
        ({"head_axis": 1.5}, "Expected head_axis to be an int, got 1.5"),
        ({"layer_axis": "0"}, "Expected layer_axis to be an int, got '0'"),
        ({"num_heads": 2.0}, "Expected num_heads to be an int, got num_heads=2.0"),
        ({"name": 3}, "Expected name to be a string or None, got name=3"),
    ],
)
def test_types_of_arguments(arguments, message):
    with pytest.raises(TypeError, match=message):
        clipx.qk.mha(**{"query": "a/q", "key": "a/k", **arguments})


def test_mla_has_to_know_where_the_rotary_part_is():
    with pytest.raises(ValueError, match=r"rotary_query=.*nope_dim=.*neither"):
        clipx.qk.mla("a/q", "a/k")


def test_a_leaf_in_two_roles():
    with pytest.raises(ValueError, match="different leaves for query and key"):
        clipx.qk.mha("a/q", "a/q")


def test_a_missing_path_names_its_neighbours():
    message = "leaf at 'attn/query/kernel'.*Did you mean 'model/attn/query/kernel'"
    with pytest.raises(ValueError, match=message):
        clip({"model": params()})


def test_a_misspelled_path_names_what_is_like_it():
    layout = clipx.qk.mha("attn/qeury/kernel", "attn/key/kernel")
    with pytest.raises(ValueError, match="Did you mean 'attn/query/kernel'"):
        clip(layout=layout)


def test_a_missing_name_names_what_is_like_it():
    message = r"the layout 'attn' in max_logits.*Did you mean 'block/attn'.*name="
    with pytest.raises(ValueError, match=message):
        clip(maxima={"block/attn": jnp.ones(4)})


@pytest.mark.parametrize("maxima", [jnp.ones(4), [1.0]])
def test_maxima_that_are_no_dict(maxima):
    with pytest.raises(TypeError, match=r"Expected max_logits=\{'attn': "):
        clip(maxima=maxima)


@pytest.mark.parametrize("shape", [(), (3,), (1, 4)])
def test_maxima_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"\(heads,\) = \(4,\) in max_logits"):
        clip(maxima={"attn": jnp.ones(shape)})


@pytest.mark.parametrize(
    ("tree", "layout", "message"),
    [
        (params(key=(3, 2, 2)), MHA, r"4 heads on axis 1 of 'attn/key.*qk\.gqa"),
        (
            params((3, 8), (3, 4)),
            clipx.qk.mha("attn/query/kernel", "attn/key/kernel", num_heads=4),
            r"same width in queries and keys, got .*widths \[1, 2\].*qk\.gqa",
        ),
        (
            params((3, 16), (3, 12)),
            clipx.qk.gqa("attn/query/kernel", "attn/key/kernel", num_heads=2),
            r"same width in queries and keys, got .*widths \[8, 12\]",
        ),
        (
            params(key=(3, 3, 2)),
            clipx.qk.gqa("attn/query/kernel", "attn/key/kernel"),
            "got 4 in 'attn/query/kernel' and 3 in 'attn/key/kernel'",
        ),
        (
            params(),
            clipx.qk.mha("attn/query/kernel", "attn/key/kernel", head_axis=3),
            r"head_axis to be an axis of 'attn/query/kernel' of shape \(3, 4, 2\)",
        ),
        (
            params(),
            clipx.qk.mha("attn/query/kernel", "attn/key/kernel", layer_axis=2),
            "Expected layer_axis before head_axis",
        ),
        (
            params((3, 4, 2), (3, 4, 2)),
            clipx.qk.mha("attn/query/kernel", "attn/key/kernel", layer_axis=0),
            r"head_axis= .* it may be 1 or 2. Pass head_axis=1 or head_axis=2",
        ),
        (
            params((3, 8, 8), (3, 8, 8)),
            clipx.qk.gqa(
                "attn/query/kernel", "attn/key/kernel", num_heads=4, layer_axis=0
            ),
            r"head_axis= .* shape \(3, 8, 8\) it may be 1 or 2",
        ),
        (
            params((3, 4, 2), (2, 4, 2)),
            clipx.qk.mha(
                "attn/query/kernel", "attn/key/kernel", head_axis=1, layer_axis=0
            ),
            "the same number of layers on axis 0",
        ),
        (
            params(),
            clipx.qk.mla("attn/query/kernel", "attn/key/kernel", nope_dim=3),
            "at least nope_dim=3 entries in each head of 'attn/query/kernel', got 2",
        ),
        (
            params(),
            clipx.qk.mha("attn/query/kernel", "attn/key/kernel", query_bias="attn/b"),
            "Expected a bias at 'attn/b', found none",
        ),
        (
            {
                "attn": params()["attn"]
                | {"query": {"kernel": jnp.ones((3, 4, 2), int)}}
            },
            MHA,
            "floating-point array at 'attn/query/kernel', got int32",
        ),
    ],
)
def test_what_does_not_fit(tree, layout, message):
    with pytest.raises((ValueError, TypeError), match=message):
        clip(tree, layout=layout)


def test_a_bias_that_does_not_fit():
    tree = params()
    tree["attn"]["query"]["bias"] = jnp.ones(3)
    with pytest.raises(
        ValueError, match=r"an axis with 4 entries in the bias .*\(3,\)"
    ):
        clip(tree)


def test_two_layouts_with_one_name():
    other = clipx.qk.mha("b/q", "b/k", name="attn")
    tree = params() | {"b": {"q": jnp.ones((3, 4, 2)), "k": jnp.ones((3, 4, 2))}}
    with pytest.raises(ValueError, match="each name in one layout only, got 'attn'"):
        clip(tree, layout=[MHA, other])


def test_two_layouts_with_one_leaf():
    other = clipx.qk.mha("attn/query/kernel", "attn/key/kernel", name="other")
    with pytest.raises(ValueError, match="each leaf in one layout only, got 'attn/key"):
        clip(layout=[MHA, other])


@pytest.mark.parametrize("layout", ["attn", None, [MHA, "attn"], {"attn": MHA}])
def test_what_is_no_layout(layout):
    with pytest.raises(TypeError, match=r"qk\.mha, \.gqa, \.mla, \.fused or \.flax"):
        clip(layout=layout)


def test_an_empty_list_of_layouts():
    with pytest.raises(ValueError, match="at least one layout"):
        clip(layout=[])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0}, "Expected threshold > 0, got threshold=0"),
        ({"threshold": -1.0}, "Expected threshold >= 0, got threshold=-1.0"),
        ({"threshold": np.nan}, "threshold=nan"),
        ({"alpha": 1.5}, "Expected 0 <= alpha <= 1, got alpha=1.5"),
        ({"alpha": np.nan}, "alpha=nan"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        clip(**options)
    with pytest.raises(ValueError, match=message):
        clipx.qk_clip_updates(MHA, **options)


def test_a_schedule_for_the_function():
    with pytest.raises(TypeError, match="Schedules go into"):
        clip(threshold=lambda step: 100.0)


class Block(nnx.Module):
    def __init__(self, rngs, **options):
        options = {"num_heads": 4, "in_features": 8, "decode": False} | options
        self.attention = nnx.MultiHeadAttention(**options, rngs=rngs)
        self.dense = nnx.Linear(8, 8, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs, **options):
        self.blocks = nnx.List([Block(rngs, **options) for _ in range(2)])


def test_nnx_models_and_their_state():
    model = Model(nnx.Rngs(0))
    layouts = clipx.qk.flax(model)
    assert [one.name for one in layouts] == ["blocks/0/attention", "blocks/1/attention"]
    assert clipx.qk.flax(nnx.state(model)) == layouts
    assert clipx.qk.flax(jax.eval_shape(lambda: nnx.state(model, nnx.Param))) == layouts


def test_kernels_and_biases_of_nnx_are_scaled():
    model = Model(nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    state = jax.tree.map(jnp.ones_like, state)
    maxima = {f"blocks/{i}/attention": jnp.array([400.0, 1, 1, 1]) for i in (0, 1)}
    got = clipx.qk_clip(state, maxima, clipx.qk.flax(model))
    assert jax.tree.structure(got) == jax.tree.structure(state)
    layer = got["blocks"][1]["attention"]
    for name in ("query", "key"):
        np.testing.assert_allclose(
            layer[name]["kernel"][...][0, :, 0], [0.5, 1, 1, 1], rtol=1e-6
        )
        np.testing.assert_allclose(
            layer[name]["bias"][...][:, 0], [0.5, 1, 1, 1], rtol=1e-6
        )
    np.testing.assert_array_equal(layer["value"]["kernel"][...], 1.0)
    np.testing.assert_array_equal(layer["out"]["kernel"][...], 1.0)


@pytest.mark.skipif(not hasattr(nnx, "capture"), reason="older Flax has no nnx.capture")
def test_grouped_queries_of_nnx():
    (layout, _) = clipx.qk.flax(Model(nnx.Rngs(0), num_kv_heads=2))
    assert layout.grouped


def test_a_layer_alone():
    layer = nnx.MultiHeadAttention(4, 8, decode=False, rngs=nnx.Rngs(0))
    assert [one.name for one in clipx.qk.flax(layer)] == ["attention"]


@pytest.mark.slow
def test_a_stack_of_nnx():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(axis_size=3)
    def make(rngs):
        return Block(rngs)

    model = make(nnx.Rngs(0))
    state = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    maxima = {"attention": jnp.ones((3, 4)).at[2, 1].set(400.0)}
    got = clipx.qk_clip(state, maxima, clipx.qk.flax(model))["attention"]
    want = np.ones((3, 4))
    want[2, 1] = 0.5
    np.testing.assert_allclose(got["query"]["kernel"][...][:, 0, :, 0], want, 1e-6)
    np.testing.assert_allclose(got["key"]["bias"][...][:, :, 0], want, 1e-6)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(num_heads=4)(x)
        return nn.MultiHeadAttention(num_heads=4, name="second")(x)


@pytest.mark.parametrize("inner", [False, True])
def test_linen_parameters(inner):
    variables = Linen().init(jax.random.key(0), jnp.ones((1, 3, 8)))
    tree = variables["params"] if inner else variables
    names = ["MultiHeadDotProductAttention_0", "second"]
    assert [one.name for one in clipx.qk.flax(tree)] == names
    maxima = {name: jnp.array([400.0, 1, 1, 1]) for name in names}
    got = clipx.qk_clip(tree, maxima, clipx.qk.flax(tree))
    got = got if inner else got["params"]
    was = variables["params"]["second"]["key"]["kernel"]
    now = got["second"]["key"]["kernel"]
    np.testing.assert_allclose(now[:, 0], was[:, 0] / 2, rtol=1e-6)
    np.testing.assert_array_equal(now[:, 1:], was[:, 1:])


def test_a_linen_module_without_parameters():
    with pytest.raises(TypeError, match="got Linen itself"):
        clipx.qk.flax(Linen())


def test_normalized_queries_are_refused():
    model = Model(nnx.Rngs(0), normalize_qk=True)
    with pytest.raises(ValueError, match="'blocks/0/attention', found 'query_ln'"):
        clipx.qk.flax(model)


def test_a_tree_without_attention():
    with pytest.raises(ValueError, match="found none in: dense/kernel"):
        clipx.qk.flax({"dense": {"kernel": jnp.ones((3, 4))}})
