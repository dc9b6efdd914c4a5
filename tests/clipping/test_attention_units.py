"""Units of attention by the names of public codes, and what is printed elsewhere."""

import jax
import jax.numpy as jnp
import pytest

import optax_clipx as clipx

KNOWN = {
    # nanodo
    "CausalAttn_0/query/kernel": ((16, 4, 4), (0,)),
    "CausalAttn_0/attn_out_proj/kernel": ((4, 4, 16), (0, 1)),
    "embed/embedding": ((50, 16), (1,)),
    # MaxText
    "decoder/self_attention/qkv_proj/kernel": ((16, 3, 4, 4), (0,)),
    "decoder/self_attention/out/kernel": ((4, 4, 16), (0, 1)),
    # big_vision
    "MultiHeadDotProductAttention_0/key/kernel": ((16, 4, 4), (0,)),
    "MAPHead_0/MultiHeadDotProductAttention_0/out/kernel": ((4, 4, 16), (0, 1)),
    # others
    "attn/q_proj/kernel": ((16, 4, 4), (0,)),
    "attn/o_proj/kernel": ((4, 4, 16), (0, 1)),
    "SelfAttention_0/out_proj/kernel": ((4, 4, 16), (0, 1)),
    "MHSA_0/proj/kernel": ((4, 4, 16), (0, 1)),
    "attn/qkv/kernel": ((16, 4, 3, 4), (0,)),
    "attn/kv/kernel": ((16, 2, 4, 4), (0,)),
    "attention/qkv_proj/kernel": ((16, 4, 12), (0,)),
    "attn/q_proj/bias": ((16,), (0,)),
    # Gemma
    "layer_0/attn/q_einsum/w": ((4, 16, 4), (1,)),
    "layer_0/attn/kv_einsum/w": ((2, 1, 16, 4), (2,)),
    "layer_0/attn/qkv_einsum/w": ((3, 4, 16, 4), (2,)),
    "layer_0/attn/attn_vec_einsum/w": ((4, 4, 16), (0, 1)),
    "embedder/input_embedding": ((50, 16), (1,)),
    # a convolution that only looks like it
    "attentions_0/proj_out/kernel": ((1, 1, 16, 16), (0, 1, 2)),
}


def units(path, shape, rule=clipx.units.flax):
    return rule(tuple(path.split("/")), jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.one_in(10, rest="slow")
@pytest.mark.parametrize("path", KNOWN)
def test_names_of_public_codes(path):
    shape, want = KNOWN[path]
    assert units(path, shape) == want


UNCLEAR = {
    "attn/o_proj/kernel": (6, 16, 16),  # six layers
    "attn/q_proj/kernel": (6, 16, 16),
    "attn/k_proj/kernel": (16, 2, 4),  # fewer heads: or sixteen layers
    "attn/qkv/kernel": (6, 16, 4, 12),
    "attn/pos_proj/kernel": (6, 16, 16),
    "mlp/gating_einsum/w": (2, 16, 64),
    "block/out_proj/kernel": (4, 4, 16),  # below no attention
}


@pytest.mark.one_in(2, rest="slow")
@pytest.mark.parametrize("path", UNCLEAR)
def test_what_may_be_a_stack_is_an_error(path):
    with pytest.raises(ValueError, match=f"Cannot tell the units of {path}"):
        units(path, UNCLEAR[path])


@pytest.mark.parametrize("library", ["flax", "equinox", "haiku"])
def test_what_the_error_shows_can_be_pasted(library):
    rule = getattr(clipx.units, library)
    name = {"flax": "kernel", "equinox": "weight", "haiku": "w"}[library]
    path, shape = f"a/mixer/{name}", (6, 5, 4)
    with pytest.raises(ValueError, match="Cannot tell") as caught:
        units(path, shape, rule)
    code = str(caught.value).rpartition("axis=")[2]
    pasted = eval(code, {"optax_clipx": clipx})
    assert units(path, shape, pasted) == ((1, 2) if library == "equinox" else (0, 1))
    assert units(f"a/{name}", (5, 4), pasted) == units(f"a/{name}", (5, 4), rule)


def test_a_linen_model_is_sent_to_what_takes_it():
    with pytest.raises(TypeError, match="errors show a function to paste"):
        clipx.units.of_model(object())
