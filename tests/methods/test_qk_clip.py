"""QK-Clip next to a dense reference in NumPy, for each layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qk_reference as reference

import optax_clipx as clipx

HEADS = 4


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def kernels(rng, *shapes, size=3.0):
    return [rng.normal(size=s).astype(np.float32) * size for s in shapes]


def attention(query, key, **others):
    leaves = {"query": {"kernel": query}, "key": {"kernel": key}}
    more = {name: {"kernel": value} for name, value in others.items()}
    return {"attn": jax.tree.map(jnp.asarray, leaves | more)}


def under_threshold(before, after, threshold=100.0):
    """Some heads were above the threshold, and none is now."""
    was, now = reference.maxima(before), reference.maxima(after)
    assert (was > threshold).any()
    assert (was <= threshold).any()
    assert (now <= threshold * (1 + 1e-6)).all()


MHA = clipx.qk.mha("attn/query/kernel", "attn/key/kernel")
GQA = clipx.qk.gqa("attn/query/kernel", "attn/key/kernel")
MAXIMA = np.array([50.0, 400.0, 100.0, 1e6], np.float32)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_mha_is_the_reference(rng, alpha):
    query, key = kernels(rng, (6, HEADS, 8), (6, HEADS, 8))
    got = clipx.qk_clip(attention(query, key), {"attn": MAXIMA}, MHA, alpha=alpha)
    want = reference.mha(query, key, MAXIMA, alpha)
    np.testing.assert_allclose(got["attn"]["query"]["kernel"], want[0], rtol=1e-6)
    np.testing.assert_allclose(got["attn"]["key"]["kernel"], want[1], rtol=1e-6)


@pytest.mark.one_in(3, rest="slow")
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("groups", [1, 2])
def test_gqa_is_the_reference(rng, alpha, groups):
    query, key = kernels(rng, (6, HEADS, 8), (6, groups, 8))
    got = clipx.qk_clip(attention(query, key), {"attn": MAXIMA}, GQA, alpha=alpha)
    want = reference.gqa(query, key, MAXIMA, alpha)
    np.testing.assert_allclose(got["attn"]["query"]["kernel"], want[0], rtol=1e-6)
    np.testing.assert_allclose(got["attn"]["key"]["kernel"], want[1], rtol=1e-6)


def test_mla_is_the_reference(rng):
    query, key, rotary = kernels(rng, (6, HEADS, 8), (5, HEADS, 8), (6, HEADS, 4))
    params = attention(query, key, rotary=rotary, key_rotary=np.ones((5, 4)))
    layout = clipx.qk.mla(
        "attn/query/kernel", "attn/key/kernel", rotary_query="attn/rotary/kernel"
    )
    got = clipx.qk_clip(params, {"attn": MAXIMA}, layout)
    want = reference.mla(query, key, rotary, MAXIMA)
    for name, value in zip(("query", "key", "rotary"), want, strict=True):
        np.testing.assert_allclose(got["attn"][name]["kernel"], value, rtol=1e-6)
    assert got["attn"]["key_rotary"] == params["attn"]["key_rotary"]


def test_mla_in_fused_kernels(rng):
    query, key, rotary, value = kernels(rng, *[(6, HEADS, n) for n in (8, 8, 4, 7)])
    fused = np.concatenate([query, rotary], -1), np.concatenate([key, value], -1)
    layout = clipx.qk.mla("attn/query/kernel", "attn/key/kernel", nope_dim=8)
    got = clipx.qk_clip(attention(*fused), {"attn": MAXIMA}, layout)["attn"]
    want = reference.mla(query, key, rotary, MAXIMA)
    rows = np.asarray(got["query"]["kernel"])
    np.testing.assert_allclose(rows[..., :8], want[0], rtol=1e-6)
    np.testing.assert_allclose(rows[..., 8:], want[2], rtol=1e-6)
    np.testing.assert_allclose(got["key"]["kernel"][..., :8], want[1], rtol=1e-6)
    np.testing.assert_array_equal(got["key"]["kernel"][..., 8:], value)


def test_mha_logits_end_at_the_threshold(rng):
    query, key = kernels(rng, (6, HEADS, 8), (6, HEADS, 8))
    query[:, :2] *= 0.1
    x = rng.normal(size=(2, 9, 6))

    def logits(query, key):
        return reference.logits(
            reference.rotated(reference.project(x, query)),
            reference.rotated(reference.project(x, key)),
        )

    before = logits(query, key)
    maxima = {"attn": reference.maxima(before).astype(np.float32)}
    got = clipx.qk_clip(attention(query, key), maxima, MHA)["attn"]
    after = logits(got["query"]["kernel"], got["key"]["kernel"])
    under_threshold(before, after)
    np.testing.assert_allclose(
        after, before * reference.scales(reference.maxima(before))[:, None, None], 1e-5
    )


def test_gqa_logits_end_at_the_threshold(rng):
    query, key = kernels(rng, (6, HEADS, 8), (6, 2, 8))
    query[:, ::2] *= 0.1
    x = rng.normal(size=(2, 9, 6))

    def logits(query, key):
        return reference.logits(reference.project(x, query), reference.project(x, key))

    before = logits(query, key)
    maxima = {"attn": reference.maxima(before).astype(np.float32)}
    got = clipx.qk_clip(attention(query, key), maxima, GQA)["attn"]
    under_threshold(before, logits(got["query"]["kernel"], got["key"]["kernel"]))


def test_mla_logits_end_at_the_threshold(rng):
    shapes = [(6, HEADS, 8), (6, HEADS, 8), (6, HEADS, 4)]
    query, key, rotary = kernels(rng, *shapes)
    shared = rng.normal(size=(6, 1, 4)) * 3
    query[:, :2] *= 0.02
    rotary[:, :2] *= 0.02
    x = rng.normal(size=(2, 9, 6))

    def logits(query, key, rotary):
        turned = reference.rotated(reference.project(x, rotary))
        shared_key = reference.rotated(reference.project(x, shared))
        rows = np.concatenate([reference.project(x, query), turned], -1)
        columns = np.concatenate(
            [reference.project(x, key), np.repeat(shared_key, HEADS, 2)], -1
        )
        return reference.logits(rows, columns)

    before = logits(query, key, rotary)
    maxima = {"attn": reference.maxima(before).astype(np.float32)}
    layout = clipx.qk.mla(
        "attn/query/kernel", "attn/key/kernel", rotary_query="attn/rotary/kernel"
    )
    params = attention(query, key, rotary=rotary)
    got = clipx.qk_clip(params, maxima, layout)["attn"]
    names = ("query", "key", "rotary")
    under_threshold(before, logits(*(got[name]["kernel"] for name in names)))


def test_a_group_shrinks_by_literal_numbers():
    params = attention(np.ones((1, 4, 1), np.float32), np.ones((1, 2, 1), np.float32))
    maxima = {"attn": jnp.array([1600.0, 100.0, 200.0, 400.0])}
    got = clipx.qk_clip(params, maxima, GQA)["attn"]
    # Keys: 1/16 and 1/4 to the power 0.5. Queries: gamma over that, at most 1.
    np.testing.assert_allclose(got["key"]["kernel"].ravel(), [0.25, 0.5], 1e-6)
    np.testing.assert_allclose(got["query"]["kernel"].ravel(), [0.25, 1, 1, 0.5], 1e-6)


@pytest.mark.parametrize("maximum", [0.0, -3.0, np.nan, np.inf, -np.inf, 100.0])
def test_a_maximum_that_is_no_reason_changes_no_bit(rng, maximum):
    query, key = kernels(rng, (3, 2, 4), (3, 2, 4))
    query[0, 0, 0] = 1e-40  # a subnormal: times 1 it would be 0
    maxima = {"attn": jnp.array([maximum, 400.0])}
    got = clipx.qk_clip(attention(query, key), maxima, MHA)["attn"]
    np.testing.assert_array_equal(got["query"]["kernel"][:, 0], query[:, 0])
    np.testing.assert_array_equal(got["key"]["kernel"][:, 0], key[:, 0])
    np.testing.assert_allclose(got["query"]["kernel"][:, 1], query[:, 1] / 2, 1e-6)


def test_extreme_maxima_give_finite_weights():
    params = attention(np.ones((1, 2, 1), np.float32), np.ones((1, 2, 1), np.float32))
    maxima = {"attn": jnp.array([3e38, 3e38])}
    got = clipx.qk_clip(params, maxima, MHA, threshold=1e-6)["attn"]
    assert np.isfinite(got["query"]["kernel"]).all()
    assert np.isfinite(got["key"]["kernel"]).all()


def test_biases_are_scaled_with_their_kernels(rng):
    query, key, b, c = kernels(rng, (6, 2, 8), (6, 2, 8), (2, 8), (2, 8))
    params = attention(query, key)
    params["attn"]["query"]["bias"] = jnp.asarray(b)
    params["attn"]["key"]["bias"] = jnp.asarray(c)
    x = rng.normal(size=(2, 9, 6))

    def logits(query, key, b, c):
        return reference.logits(
            reference.project(x, query, b), reference.project(x, key, c)
        )

    before = logits(query, key, b, c)
    maxima = {"attn": reference.maxima(before).astype(np.float32)}
    got = clipx.qk_clip(params, maxima, MHA, threshold=10.0)["attn"]
    after = logits(
        *(got[name][leaf] for leaf in ("kernel", "bias") for name in ("query", "key"))
    )
    np.testing.assert_allclose(reference.maxima(after), 10.0, rtol=1e-6)


def test_a_bias_of_another_name():
    params = {
        "q": jnp.ones((1, 2, 3)),
        "k": jnp.ones((1, 2, 3)),
        "qb": jnp.ones((2, 3)),
    }
    layout = clipx.qk.mha("q", "k", query_bias="qb", name="a")
    got = clipx.qk_clip(params, {"a": jnp.array([400.0, 1.0])}, layout)
    np.testing.assert_allclose(got["qb"][:, 0], [0.5, 1.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("kernel", "bias", "head_axis"),
    [((5, 2, 3), (2, 3), 1), ((2, 3, 5), (2, 3), 0), ((2, 5, 3), (2, 3), -3)],
)
def test_the_heads_of_a_bias_are_found(kernel, bias, head_axis):
    one = {"kernel": jnp.ones(kernel), "bias": jnp.ones(bias)}
    layout = clipx.qk.mha("q/kernel", "k/kernel", head_axis=head_axis, name="a")
    params = {"q": one, "k": one}
    got = clipx.qk_clip(params, {"a": jnp.array([400.0, 1.0])}, layout)
    np.testing.assert_allclose(got["q"]["bias"][:, 0], [0.5, 1.0], rtol=1e-6)


def test_heads_in_a_row(rng):
    query, key = kernels(rng, (6, 4 * 8), (6, 2 * 8))
    layout = clipx.qk.gqa("attn/query/kernel", "attn/key/kernel", num_heads=4)
    got = clipx.qk_clip(attention(query, key), {"attn": MAXIMA}, layout)["attn"]
    want = reference.gqa(query.reshape(6, 4, 8), key.reshape(6, 2, 8), MAXIMA)
    np.testing.assert_allclose(
        got["query"]["kernel"], want[0].reshape(6, -1), rtol=1e-6
    )
    np.testing.assert_allclose(got["key"]["kernel"], want[1].reshape(6, -1), rtol=1e-6)


def test_mla_with_heads_in_a_row():
    params = attention(np.ones((1, 2 * 3), np.float32), np.ones((1, 2 * 4), np.float32))
    layout = clipx.qk.mla(
        "attn/query/kernel", "attn/key/kernel", nope_dim=2, num_heads=2
    )
    got = clipx.qk_clip(params, {"attn": jnp.array([400.0, 1.0])}, layout)["attn"]
    rows, columns = got["query"]["kernel"][0], got["key"]["kernel"][0]
    np.testing.assert_allclose(rows, [0.5, 0.5, 0.25, 1, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(columns, [0.5, 0.5, 1, 1, 1, 1, 1, 1], rtol=1e-6)


def test_a_stack_of_layers(rng):
    query, key = kernels(rng, (3, 6, HEADS, 8), (3, 6, 2, 8))
    layout = clipx.qk.gqa(
        "attn/query/kernel", "attn/key/kernel", head_axis=2, layer_axis=0
    )
    maxima = np.stack([MAXIMA, MAXIMA[::-1], MAXIMA / 4])
    got = clipx.qk_clip(attention(query, key), {"attn": maxima}, layout)["attn"]
    for i in range(3):
        want = reference.gqa(query[i], key[i], maxima[i])
        np.testing.assert_allclose(got["query"]["kernel"][i], want[0], rtol=1e-6)
        np.testing.assert_allclose(got["key"]["kernel"][i], want[1], rtol=1e-6)


def test_several_layouts(rng):
    query, key = kernels(rng, (6, HEADS, 8), (6, HEADS, 8))
    params = [attention(query, key), attention(query, key)]
    layouts = [
        clipx.qk.mha(f"{i}/attn/query/kernel", f"{i}/attn/key/kernel") for i in (0, 1)
    ]
    maxima = {"0/attn": MAXIMA, "1/attn": MAXIMA[::-1].copy()}
    got = clipx.qk_clip(params, maxima, layouts)
    for one, values in zip(got, maxima.values(), strict=True):
        want, _ = reference.mha(query, key, values)
        np.testing.assert_allclose(one["attn"]["query"]["kernel"], want, rtol=1e-6)


def test_narrow_leaves_are_rounded_once(rng):
    query, key = (x.astype(jnp.bfloat16) for x in kernels(rng, (6, 1, 8), (6, 1, 8)))
    maxima = {"attn": jnp.array([300.0])}
    got = clipx.qk_clip(attention(query, key), maxima, MHA)["attn"]["query"]["kernel"]
    want = (np.asarray(query, np.float32) * np.sqrt(np.float32(1 / 3))).astype(
        jnp.bfloat16
    )
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want)


def test_float64_leaves_keep_their_precision(rng):
    with jax.enable_x64(True):
        kernel = jnp.asarray(rng.normal(size=(6, 1, 8)))
        maxima = {"attn": jnp.array([300.0], jnp.float64)}
        got = clipx.qk_clip(attention(kernel, kernel), maxima, MHA)["attn"]
        want = np.asarray(kernel) * np.sqrt(1 / 3)
        assert got["query"]["kernel"].dtype == jnp.float64
        np.testing.assert_allclose(got["query"]["kernel"], want, rtol=1e-14)


def test_it_can_be_jitted_with_traced_numbers(rng):
    query, key = kernels(rng, (6, HEADS, 8), (6, HEADS, 8))
    params = attention(query, key)
    run = jax.jit(lambda p, m, t, a: clipx.qk_clip(p, m, MHA, threshold=t, alpha=a))
    got = run(params, {"attn": MAXIMA}, 100.0, 0.5)
    want, _ = reference.mha(query, key, MAXIMA)
    np.testing.assert_allclose(got["attn"]["query"]["kernel"], want, rtol=1e-6)


@pytest.mark.parametrize(
    ("threshold", "alpha"),
    [(-1.0, 0.5), (0.0, 0.5), (np.nan, 0.5), (9.0, 2.0), (9.0, -1.0), (9.0, np.nan)],
)
def test_traced_numbers_out_of_range_give_nan(threshold, alpha):
    params = attention(np.ones((1, 2, 1), np.float32), np.ones((1, 2, 1), np.float32))
    run = jax.jit(lambda t, a: clipx.qk_clip(params, maxima, MHA, threshold=t, alpha=a))
    maxima = {"attn": jnp.array([400.0, 1.0])}
    got = run(threshold, alpha)["attn"]
    assert np.isnan(got["query"]["kernel"]).all()
    assert np.isnan(got["key"]["kernel"]).all()


def test_an_infinite_threshold_changes_nothing(rng):
    query, key = kernels(rng, (6, HEADS, 8), (6, HEADS, 8))
    params = attention(query, key)
    got = clipx.qk_clip(params, {"attn": MAXIMA}, MHA, threshold=np.inf)
    np.testing.assert_array_equal(got["attn"]["query"]["kernel"], query)
