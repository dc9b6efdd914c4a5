"""The largest logit of each head, without the logits, and how Flax records it."""

import functools
import inspect
import re
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qk_reference as reference
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_clipx as clipx

RNG = np.random.default_rng(0)
max_logits = jax.jit(clipx.qk.max_logits, static_argnames=("causal", "block_size"))


def pair(queries=37, keys=53, heads=4, key_heads=4, batch=2, dim=8):
    shapes = (batch, queries, heads, dim), (batch, keys, key_heads, dim)
    return [RNG.normal(size=s).astype(np.float32) for s in shapes]


@pytest.mark.one_in(3, rest="slow")
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("block_size", [8, 128])
def test_it_is_the_dense_maximum(key_heads, block_size):
    query, key = pair(key_heads=key_heads)
    got = max_logits(query, key, block_size=block_size)
    want = reference.maxima(reference.logits(query, key))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.one_in(3, rest="slow")
@pytest.mark.parametrize("lengths", [(1, 1), (1, 7), (7, 1), (2, 2), (3, 99), (99, 5)])
@pytest.mark.parametrize("causal", [False, True])
def test_every_length(lengths, causal):
    query, key = pair(*lengths)
    logits = reference.logits(query, key)
    if causal:
        logits = np.where(np.tri(*lengths, dtype=bool), logits, -np.inf)
    got = max_logits(query, key, causal=causal, block_size=64)
    np.testing.assert_allclose(got, reference.maxima(logits), rtol=1e-6)


@pytest.mark.parametrize(
    "shape",
    [(37, 53), (1, 53), (4, 1, 1), (2, 1, 37, 53), (2, 4, 37, 1), (1, 1, 1, 53), ()],
)
@pytest.mark.parametrize("dtype", [bool, np.float32, np.int32])
def test_masks(shape, dtype):
    query, key = pair(key_heads=2)
    mask = np.random.default_rng(1).random(shape) < 0.5
    logits = np.where(mask, reference.logits(query, key), -np.inf)
    got = max_logits(query, key, mask=jnp.asarray(mask, dtype), block_size=16)
    np.testing.assert_allclose(got, reference.maxima(logits), rtol=1e-6)


def test_a_mask_and_causal():
    query, key = pair(20, 20)
    mask = np.arange(20) < 12
    seen = mask & np.tri(20, dtype=bool)
    logits = np.where(seen, reference.logits(query, key), -np.inf)
    got = clipx.qk.max_logits(
        query, key, mask=jnp.asarray(mask), causal=True, block_size=6
    )
    np.testing.assert_allclose(got, reference.maxima(logits), rtol=1e-6)


def test_batch_axes_of_any_number():
    query, key = pair(batch=6)
    want = max_logits(query, key)
    several = [x.reshape(2, 3, *x.shape[1:]) for x in (query, key)]
    np.testing.assert_allclose(max_logits(*several), want, rtol=1e-6)
    one = max_logits(query[0], key[0])
    assert one.shape == (4,)


def test_the_scale():
    got = clipx.qk.max_logits(jnp.ones((1, 2, 3, 16)), jnp.ones((1, 2, 3, 16)), scale=2)
    np.testing.assert_array_equal(got, 32.0)


def test_narrow_products_are_summed_in_float32():
    query = jnp.full((1, 2, 1, 64), 200.0, jnp.float16)  # 64 * 200^2 is above 65504
    got = clipx.qk.max_logits(query, query)
    np.testing.assert_allclose(got, 200.0**2 * 8, rtol=1e-6)
    assert got.dtype == jnp.float32


def test_a_nan_is_seen():
    query, key = pair()
    query[1, 20, 2, 3] = np.nan
    got = clipx.qk.max_logits(query, key, block_size=8)
    np.testing.assert_array_equal(np.isnan(got), [False, False, True, False])


def test_nothing_to_see_is_minus_infinity():
    query, key = pair()
    got = max_logits(query, key, mask=jnp.zeros((1, 53), bool))
    np.testing.assert_array_equal(got, -np.inf)
    np.testing.assert_array_equal(max_logits(query[:, :0], key), -np.inf)
    np.testing.assert_array_equal(max_logits(query[:0], key[:0]), -np.inf)


def test_no_gradient_flows():
    query, key = (jnp.asarray(x) for x in pair())
    got = jax.grad(lambda q: clipx.qk.max_logits(q, key).sum())(query)
    np.testing.assert_array_equal(got, 0.0)


@pytest.mark.one_in(3, rest="slow")
@pytest.mark.parametrize("lengths", [(192, 320), (48, 80), (1024, 1024)])
@pytest.mark.parametrize("causal", [False, True])
def test_the_program_holds_no_array_of_both_lengths(lengths, causal):
    query, key = pair(*lengths, key_heads=2, batch=3, dim=5)
    run = jax.jit(functools.partial(clipx.qk.max_logits, causal=causal))
    text = run.lower(query, key).compile().as_text()
    shapes = {tuple(s.split(",")) for s in re.findall(r"\[([\d,]+)\]", text)}
    ends = [str(n) for n in lengths]
    assert any(ends[0] in shape for shape in shapes)  # of the queries themselves
    assert not [s for s in shapes if not Counter(ends) - Counter(s)]


def test_dense_logits_would_be_found():
    query, key = pair(192, 320, batch=3, dim=5)
    dense = jax.jit(lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k).max((0, 2, 3)))
    assert re.search(r"192,320", dense.lower(query, key).compile().as_text())


def test_memory_does_not_grow_with_the_lengths():
    query, key = pair(2048, 2048, batch=1, heads=1, key_heads=1)
    found = jax.jit(clipx.qk.max_logits).lower(query, key).compile().memory_analysis()
    assert found.temp_size_in_bytes < 2048 * 2048 * 4 / 16


@pytest.mark.one_in(3, rest="slow")
@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("masked", [False, True])
def test_sharded_batch_and_heads(kind, key_heads, masked):
    query, key = pair(batch=8, key_heads=key_heads)
    mask = np.random.default_rng(1).random((8, 1, 37, 53)) < 0.5 if masked else None
    want = max_logits(query, key, mask=mask, block_size=16)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        placed = NamedSharding(mesh, P("data", None, "model", None))
        query, key = jax.device_put((query, key), placed)
        if masked:
            mask = jax.device_put(mask, NamedSharding(mesh, P("data")))
        got = jax.jit(lambda q, k, m: clipx.qk.max_logits(q, k, mask=m, block_size=16))(
            query, key, mask
        )
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.one_in(3, rest="slow")
@pytest.mark.parametrize("key_heads", [2, 4])
def test_a_sharded_batch_takes_one_all_reduce(key_heads):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    placed = NamedSharding(mesh, P("data", None, "model", None))
    arrays = jax.device_put(pair(300, 300, batch=8, key_heads=key_heads), placed)
    text = jax.jit(clipx.qk.max_logits).lower(*arrays).compile().as_text()
    names = r"(all-reduce|all-gather|all-to-all|collective-permute)"
    found = re.findall(rf"= \S+ {names}(?:-start)?\(", text)
    assert found == ["all-reduce"]


@pytest.mark.one_in(3, rest="slow")
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    query, key = pair(batch=8)
    want = max_logits(query, key, block_size=16)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    run = jax.shard_map(
        functools.partial(clipx.qk.max_logits, axis_name="data", block_size=16),
        mesh=mesh,
        in_specs=P("data", None, "model", None),
        out_specs=P("model"),
        check_vma=check_vma,
    )
    np.testing.assert_allclose(jax.jit(run)(query, key), want, rtol=1e-6)


@pytest.mark.one_in(3, rest="slow")
@pytest.mark.parametrize("check_vma", [True, False])
def test_manual_code_asks_for_the_axes(check_vma):
    query, key = pair(batch=8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(
        clipx.qk.max_logits,
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P(),
        check_vma=check_vma,
    )
    with pytest.raises(ValueError, match=r"Pass axis_name='data' if they are sharded"):
        jax.jit(run)(query, key)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"key": np.ones((2, 5, 3, 8), np.float32)},
            "heads is a multiple of key heads",
        ),
        ({"key": np.ones((3, 5, 4, 8), np.float32)}, r"got shapes \(2, 37, 4, 8\)"),
        (
            {"key": np.ones((2, 5, 4, 9), np.float32)},
            "heads is a multiple of key heads",
        ),
        ({"mask": np.ones((5, 5), bool)}, r"mask broadcastable .* got shape \(5, 5\)"),
        ({"scale": -1.0}, "Expected scale > 0, got scale=-1.0"),
        ({"block_size": 0}, "Expected block_size >= 1, got block_size=0"),
    ],
)
def test_what_does_not_fit(options, message):
    query, key = pair()
    with pytest.raises(ValueError, match=message):
        clipx.qk.max_logits(**{"query": query, "key": key, **options})


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, mask=None):
        for _ in range(2):
            attention_fn = clipx.qk.recording(nn.dot_product_attention)
            layer = nn.MultiHeadDotProductAttention(4, attention_fn=attention_fn)
            x = layer(x, mask=mask, sow_weights=True)
        return x


def test_linen_records():
    model, x = Linen(), jnp.asarray(RNG.normal(size=(2, 9, 8)), jnp.float32)
    params = model.init(jax.random.key(0), x)["params"]
    mask = nn.make_causal_mask(x[..., 0])
    out, sown = jax.jit(
        lambda p: model.apply({"params": p}, x, mask, mutable=["intermediates"])
    )(params)
    got = clipx.qk.recorded(sown)
    assert set(got) == {one.name for one in clipx.qk.flax(params)}
    first = params["MultiHeadDotProductAttention_0"]
    query, key = (
        reference.project(x, first[name]["kernel"]) for name in ("query", "key")
    )
    logits = np.where(np.tri(9, dtype=bool), reference.logits(query, key), -np.inf)
    want = reference.maxima(logits)
    np.testing.assert_allclose(got["MultiHeadDotProductAttention_0"], want, rtol=1e-5)
    alone = model.apply({"params": params}, x, mask)
    np.testing.assert_allclose(out, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(
    "is_causal" not in inspect.signature(nnx.MultiHeadAttention.__call__).parameters,
    reason="older Flax has no is_causal=",
)
@pytest.mark.one_in(3, rest="slow")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_nnx_records(kv_heads):
    layer = nnx.MultiHeadAttention(
        4,
        8,
        num_kv_heads=kv_heads,
        decode=False,
        rngs=nnx.Rngs(0),
        attention_fn=clipx.qk.recording(nnx.dot_product_attention),
    )
    x = jnp.asarray(RNG.normal(size=(2, 9, 8)), jnp.float32)

    @nnx.capture(nnx.Intermediate)
    def twice(layer):
        layer(x, sow_weights=True, is_causal=True)
        layer(2 * x, sow_weights=True, is_causal=True)

    _, sown = twice(layer)
    got = clipx.qk.recorded(sown)["attention"]
    query = reference.project(2 * x, layer.query.kernel[...])
    key = reference.project(2 * x, layer.key.kernel[...])
    logits = np.where(np.tri(9, dtype=bool), reference.logits(query, key), -np.inf)
    np.testing.assert_allclose(got, reference.maxima(logits), rtol=1e-5)


def test_a_layer_that_is_not_asked_records_nothing():
    attend = clipx.qk.recording(nnx.dot_product_attention)
    layer = nnx.MultiHeadAttention(
        4, 8, decode=False, rngs=nnx.Rngs(0), attention_fn=attend
    )
    x = jnp.ones((1, 3, 8))
    layer(x)
    message = r"leaves named 'max_logits', found nothing.*sow_weights=True"
    with pytest.raises(ValueError, match=message):
        clipx.qk.recorded(nnx.state(layer, nnx.Intermediate))


def test_recording_wants_a_function():
    with pytest.raises(TypeError, match="attention_fn to be a function, got None"):
        clipx.qk.recording(None)


def test_a_scan_of_linen_records_a_stack():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            attend = clipx.qk.recording(nn.dot_product_attention)
            layer = nn.MultiHeadAttention(4, attention_fn=attend, name="attn")
            return x + layer(x, sow_weights=True), None

    scanned = nn.scan(
        Layer,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        length=3,
    )
    x = jnp.asarray(RNG.normal(size=(2, 5, 8)), jnp.float32)
    params = scanned().init(jax.random.key(0), x, None)["params"]
    sow = jax.jit(functools.partial(scanned().apply, mutable=["intermediates"]))
    _, sown = sow({"params": params}, x, None)
    maxima = clipx.qk.recorded(sown)
    assert maxima["attn"].shape == (3, 4)
    limit = float(maxima["attn"].min()) / 2
    got = clipx.qk_clip(params, maxima, clipx.qk.flax(params), threshold=limit)
    _, sown = sow({"params": got}, x, None)
    first = clipx.qk.recorded(sown)["attn"][0]  # its input has not changed
    np.testing.assert_allclose(first, limit, rtol=1e-5)
