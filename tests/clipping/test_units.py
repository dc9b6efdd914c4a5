"""Units: what the presets know of real models, and what is done with it."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_clipx as clipx


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(x, x)
        return x + nn.Dense(16)(nn.LayerNorm()(x)), None


class Linen(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(50, 16)(tokens)
        x = nn.Conv(32, (3,))(x)
        x = nn.Conv(16, (3,), name="conv_back")(x)
        blocks = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=6
        )
        x, _ = blocks(name="blocks")(x, None)
        x = nn.RNN(nn.OptimizedLSTMCell(8))(x)
        x = nn.RNN(nn.GRUCell(8))(x)
        image = nn.Conv(4, (3, 3))(x[..., None])
        volume = nn.Conv(4, (3, 3, 3))(image[..., None])
        return nn.Dense(3, name="head")(x), volume


class Stack(nnx.Module):
    """Layers with names that say nothing."""

    def __init__(self, rngs):
        self.words = nnx.Embed(50, 16, rngs=rngs)
        self.first = nnx.Conv(3, 8, (3,), rngs=rngs)
        self.back = nnx.ConvTranspose(3, 8, (3,), transpose_kernel=True, rngs=rngs)
        self.mix = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)
        self.cell = nnx.RNN(nnx.OptimizedLSTMCell(3, 5, rngs=rngs))
        self.gate = nnx.GRUCell(3, 5, rngs=rngs)
        self.wide = nnx.LinearGeneral((4, 4), 16, axis=(-2, -1), rngs=rngs)
        self.product = nnx.Einsum("abc,cd->abd", (3, 4), (4,), rngs=rngs)
        self.low = nnx.LoRA(3, 2, 5, rngs=rngs)

        @nnx.split_rngs(splits=6)
        @nnx.vmap
        def make(rngs):
            return nnx.Linear(16, 8, rngs=rngs)

        self.layers = make(rngs)


class Tower(eqx.Module):
    parts: list

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 12)
        self.parts = [
            eqx.nn.Conv1d(3, 8, 3, key=keys[0]),
            eqx.nn.MultiheadAttention(4, 16, key=keys[1]),
            eqx.nn.LSTMCell(3, 5, key=keys[2]),
            eqx.nn.Embedding(50, 16, key=keys[3]),
            eqx.filter_vmap(lambda k: eqx.nn.Linear(4, 5, key=k))(keys[4:10]),
            eqx.nn.GRUCell(3, 5, key=keys[10]),
            eqx.nn.Conv2d(3, 8, 3, key=keys[11]),
        ]


def printed(capsys, params, axis):
    """The table that `show` prints: path to (shape, spans, units, entries)."""
    clipx.units.show(params, axis=axis)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["leaf", "shape"]
    found = {}
    for row in rows:
        path, _, rest = row.partition(" ")
        shape, spans, units, entries = [x for x in rest.split("  ") if x.strip()]
        found[path] = (shape.strip(), spans.strip(), int(units), int(entries))
    return found


def test_linen(capsys):
    params = jax.eval_shape(
        Linen().init, jax.random.key(0), jnp.ones((2, 7), jnp.int32)
    )["params"]
    with pytest.raises(ValueError, match=r"blocks/Dense_0/kernel.*stacked"):
        clipx.units.show(params, axis=clipx.units.flax)
    rule = clipx.units.stacked(clipx.units.flax, "blocks")
    found = printed(capsys, params, rule)
    attention = "blocks/MultiHeadDotProductAttention_0"
    assert {path: row[1:] for path, row in found.items()} == {
        "Embed_0/embedding": ("(1,)", 50, 16),
        "Conv_0/kernel": ("(0, 1)", 32, 48),
        "Conv_0/bias": ("everything", 1, 32),
        "conv_back/kernel": ("(0, 1)", 16, 96),
        "conv_back/bias": ("everything", 1, 16),
        f"{attention}/query/kernel": ("(1,)", 6 * 16, 16),
        f"{attention}/key/kernel": ("(1,)", 6 * 16, 16),
        f"{attention}/value/kernel": ("(1,)", 6 * 16, 16),
        f"{attention}/query/bias": ("(1, 2)", 6, 16),
        f"{attention}/key/bias": ("(1, 2)", 6, 16),
        f"{attention}/value/bias": ("(1, 2)", 6, 16),
        f"{attention}/out/kernel": ("(1, 2)", 6 * 16, 16),
        f"{attention}/out/bias": ("(1,)", 6, 16),
        "blocks/LayerNorm_0/scale": ("(1,)", 6, 16),
        "blocks/LayerNorm_0/bias": ("(1,)", 6, 16),
        "blocks/Dense_0/kernel": ("(1,)", 6 * 16, 16),
        "blocks/Dense_0/bias": ("(1,)", 6, 16),
        **{f"OptimizedLSTMCell_0/i{g}/kernel": ("(0,)", 8, 16) for g in "figo"},
        **{f"OptimizedLSTMCell_0/h{g}/kernel": ("(0,)", 8, 8) for g in "figo"},
        **{f"OptimizedLSTMCell_0/h{g}/bias": ("everything", 1, 8) for g in "figo"},
        **{f"GRUCell_0/i{g}/kernel": ("(0,)", 8, 8) for g in "rnz"},
        **{f"GRUCell_0/i{g}/bias": ("everything", 1, 8) for g in "rnz"},
        **{f"GRUCell_0/h{g}/kernel": ("(0,)", 8, 8) for g in "rnz"},
        "GRUCell_0/hn/bias": ("everything", 1, 8),
        "Conv_1/kernel": ("(0, 1, 2)", 4, 9),
        "Conv_1/bias": ("everything", 1, 4),
        "Conv_2/kernel": ("(0, 1, 2, 3)", 4, 27),
        "Conv_2/bias": ("everything", 1, 4),
        "head/kernel": ("(0,)", 3, 8),
        "head/bias": ("everything", 1, 3),
    }


def test_nnx(capsys):
    model = nnx.eval_shape(lambda: Stack(nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    found = printed(capsys, params, clipx.units.of_model(model))
    assert {path: row[1:] for path, row in found.items()} == {
        "words/embedding": ("(1,)", 50, 16),
        "first/kernel": ("(0, 1)", 8, 9),
        "first/bias": ("everything", 1, 8),
        "back/kernel": ("(0, 2)", 8, 9),
        "back/bias": ("everything", 1, 8),
        **{f"mix/{n}/kernel": ("(0,)", 16, 16) for n in ("query", "key", "value")},
        **{f"mix/{n}/bias": ("everything", 1, 16) for n in ("query", "key", "value")},
        "mix/out/kernel": ("(0, 1)", 16, 16),
        "mix/out/bias": ("everything", 1, 16),
        "cell/cell/dense_i/kernel": ("(0,)", 20, 3),
        "cell/cell/dense_h/kernel": ("(0,)", 20, 5),
        "cell/cell/dense_h/bias": ("everything", 1, 20),
        "gate/dense_i/kernel": ("(0,)", 15, 3),
        "gate/dense_i/bias": ("everything", 1, 15),
        "gate/dense_h/kernel": ("(0,)", 15, 5),
        "wide/kernel": ("(0, 1)", 16, 16),
        "wide/bias": ("everything", 1, 16),
        "product/kernel": ("(0,)", 4, 3),
        "product/bias": ("everything", 1, 4),
        "low/lora_a": ("(0,)", 2, 3),
        "low/lora_b": ("(0,)", 5, 2),
        "layers/kernel": ("(1,)", 6 * 8, 16),
        "layers/bias": ("(1,)", 6, 8),
    }


def test_equinox(capsys):
    model = eqx.filter_jit(Tower)()
    params = eqx.filter(model, eqx.is_inexact_array)
    found = printed(capsys, params, clipx.units.of_model(model))
    projections = ("query_proj", "key_proj", "value_proj", "output_proj")
    assert {path: row[1:] for path, row in found.items()} == {
        "parts/0/weight": ("(1, 2)", 8, 9),
        "parts/0/bias": ("everything", 1, 8),
        **{f"parts/1/{n}/weight": ("(1,)", 16, 16) for n in projections},
        "parts/2/weight_ih": ("(1,)", 20, 3),
        "parts/2/weight_hh": ("(1,)", 20, 5),
        "parts/2/bias": ("everything", 1, 20),
        "parts/3/weight": ("(1,)", 50, 16),
        "parts/4/weight": ("(2,)", 30, 4),
        "parts/4/bias": ("(1,)", 6, 5),
        "parts/5/weight_ih": ("(1,)", 15, 3),
        "parts/5/weight_hh": ("(1,)", 15, 5),
        "parts/5/bias": ("everything", 1, 15),
        "parts/5/bias_n": ("everything", 1, 5),
        "parts/6/weight": ("(1, 2, 3)", 8, 27),
        "parts/6/bias": ("everything", 1, 8),
    }


@pytest.mark.one_in(10)
@pytest.mark.parametrize(
    ("rule", "path", "shape", "axes"),
    [
        (clipx.units.equinox, "layers/0/weight", (8, 32), (1,)),
        (clipx.units.equinox, "conv1/weight", (8, 3, 5), (1, 2)),
        (clipx.units.equinox, "first/weight", (8, 3, 5, 5), (1, 2, 3)),
        (clipx.units.equinox, "conv1/bias", (8, 1), (0, 1)),
        (clipx.units.haiku, "mlp/~/linear_0/w", (8, 32), (0,)),
        (clipx.units.haiku, "conv1_d/w", (3, 8, 32), (0, 1)),
        (clipx.units.haiku, "conv2_d/w", (3, 3, 8, 32), (0, 1, 2)),
        (clipx.units.haiku, "embed/embeddings", (50, 16), (1,)),
        (clipx.units.haiku, "__layer_stack_no_per_layer/linear/w", (6, 8, 32), (1,)),
        (clipx.units.haiku, "linear/b", (32,), (0,)),
        (clipx.units.flax, "pos_embedding", (1, 64, 16), (2,)),
        (clipx.units.flax, "cls", (1, 1, 16), (0, 1, 2)),
        (clipx.units.flax, "self_attention/out/kernel", (4, 4, 16), (0, 1)),
        (clipx.units.flax, "kernel", (8, 32), (0,)),
        (clipx.units.flax, "kernel", (1, 32), (0,)),
        (clipx.units.flax, "blocks/Dense_0/bias", (12, 1), (1,)),
        (clipx.units.flax, "MBConvBlock_0/Dense_0/kernel", (8, 16), (0,)),
        (clipx.units.flax, "attention/query/kernel", (768, 768), (0,)),
        (clipx.units.flax, "attention/out/kernel", (768, 768), (0,)),
        (clipx.units.equinox, "conv_net/linear/weight", (8, 16), (1,)),
        (clipx.units.haiku, "conv_net/~/linear_0/w", (8, 16), (0,)),
        (clipx.units.haiku, "conv2_d_transpose/w", (3, 3, 16, 8), (0, 1, 3)),
        (
            clipx.units.stacked(lambda path, leaf: -1, "blocks", axis=-1),
            "blocks/w",
            (3, 4, 6),
            (1,),
        ),
    ],
)
def test_presets_by_name(rule, path, shape, axes):
    assert rule(tuple(path.split("/")), jnp.zeros(shape)) == axes


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("rule", "path", "shape"),
    [
        (clipx.units.flax, "out/kernel", (6, 16, 16)),
        (clipx.units.flax, "w", (2, 2, 2, 2, 2, 2)),
        (clipx.units.equinox, "mlp/weight", (6, 16, 16)),
        (clipx.units.haiku, "linear/w", (6, 16, 16)),
        (clipx.units.flax, "linear/weight", (8, 16)),
        (clipx.units.equinox, "Dense_0/kernel", (8, 16)),
        (clipx.units.haiku, "linear/weight", (8, 16)),
    ],
)
def test_what_may_be_two_things_is_an_error(rule, path, shape):
    with pytest.raises(ValueError, match=f"Cannot tell the units of {path}"):
        rule(tuple(path.split("/")), jnp.zeros(shape))


def test_layer_0_of_a_stack_leaves_layer_5_alone():
    rng = np.random.default_rng(0)
    params = {
        "blocks": {"kernel": jnp.asarray(rng.normal(size=(6, 16, 8)), jnp.float32)}
    }
    grads = jax.tree.map(lambda p: 1e-4 * p, params)
    grads["blocks"]["kernel"] = grads["blocks"]["kernel"].at[0].multiply(1e8)
    rule = clipx.units.stacked(clipx.units.flax, "blocks")
    clipper = clipx.adaptive_grad_clip(0.01, axis=rule)
    clipped, state = jax.jit(clipper.update)(grads, clipper.init(params), params)
    assert float(state.metrics.num_clipped) == 1
    # By rank alone units reach across layers, and optax's cut layer 5 as well.
    theirs = optax.adaptive_grad_clip(0.01)
    cut, _ = jax.jit(theirs.update)(grads, theirs.init(params), params)
    before, after, by_rank = (
        np.asarray(tree["blocks"]["kernel"]) for tree in (grads, clipped, cut)
    )
    np.testing.assert_array_equal(after[1:], before[1:])
    assert np.max(np.abs(after[0])) < 1
    assert np.linalg.norm(before[5]) / np.linalg.norm(by_rank[5]) > 1000


@pytest.mark.one_in(2)
@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize(
    ("shape", "axes"), [((3, 2**16), 0), ((5, 2**8, 2**9), 0), ((2, 9, 2**16), (0, 1))]
)
def test_few_long_rows(shape, axes, size):
    """Experts, for example: their sums are taken row by row on CPU."""
    x = np.random.default_rng(0).normal(size=shape) * size
    found = clipx.measures.unit_norms(axis=axes)([jnp.asarray(x, jnp.float32)])[0]
    wanted = np.sqrt(np.sum(np.square(x), axis=axes, keepdims=True))
    np.testing.assert_allclose(found, wanted, rtol=2e-6)


def test_few_long_rows_are_clipped_and_differentiated():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2**16)), jnp.bfloat16)
    clipper = clipx.clip_by(clipx.measures.unit_norms(axis=0), 1.0)
    clipped, _ = jax.jit(clipper.update)([x])
    wide = np.asarray(x, np.float64)
    norm = np.sqrt(np.sum(wide**2, axis=0))
    np.testing.assert_allclose(
        np.asarray(clipped[0], np.float64), wide * np.minimum(1, 1 / norm), rtol=8e-3
    )
    total = jax.grad(lambda x: jnp.sum(clipx.functional.unit_norms([x], 0)[0]))
    gradient = jax.jit(total)(x.astype(jnp.float32))
    np.testing.assert_allclose(gradient, wide / norm, rtol=1e-5)


def test_a_huge_unit_beside_usual_ones():
    """One first factor that is not 1: then none is left out."""
    x = jnp.ones((4, 3), jnp.float32).at[:, 1].set(3e38)
    clipped, _ = clipx.clip_by(clipx.measures.unit_norms(axis=0), 1e-3).update([x])
    np.testing.assert_allclose(clipped[0], np.full((4, 3), 5e-4), rtol=1e-6)


def test_axes_as_a_prefix():
    tree = {"a": {"w": jnp.ones((4, 8)), "v": jnp.ones((4, 8))}, "b": jnp.ones((3, 5))}
    norms = clipx.measures.unit_norms(axis={"a": 1, "b": (0, 1)})(tree)
    assert norms["a"]["w"].shape == norms["a"]["v"].shape == (4, 1)
    assert norms["b"].shape == (1, 1)
    stacked = clipx.measures.leaf_norms(batch_axes={"a": 0, "b": ()})(tree)
    assert stacked["a"]["w"].shape == (4, 1)
    assert stacked["b"].shape == (1, 1)
    with pytest.raises(ValueError, match=r"axis for every leaf, got none for b"):
        clipx.measures.unit_norms(axis={"a": 1})(tree)


def test_timm_s_units_by_transposed_axes():
    from pathlib import Path

    folder = Path(__file__).parents[1] / "golden"
    inputs = np.load(folder / "inputs.npz")
    grads = [jnp.asarray(inputs[f"g{i}"]) for i in range(3)]
    params = [jnp.asarray(inputs[f"p{i}"]) for i in range(3)]

    def rows(path, leaf):  # (out, in, ...); a vector is one unit
        return tuple(range(1, leaf.ndim)) or (0,)

    for clipping in (0.01, 0.1):
        golden = np.load(folder / f"timm_agc_{clipping}.npz")
        clipper = clipx.adaptive_grad_clip(clipping, axis=rows)
        step = jax.jit(lambda *g, c=clipper: c.update(list(g), None, params)[0])
        for t in range(0, 80, 5):
            found = step(*[g[t] for g in grads])
            for i in range(3):
                want = golden[f"u{i}"][t]
                assert np.max(np.abs(found[i] - want)) <= 1e-5 * np.max(np.abs(want))


def test_excluding():
    grads = {
        "body": {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.array([9.0])},
        "_overwrite_with_gradient": {"scale": jnp.array([7.0])},
    }
    clipper = clipx.excluding(
        clipx.clip_by_global_norm(1.0), ("bias", "_overwrite_with_gradient")
    )
    state = clipper.init(grads)
    clipped, state = jax.jit(clipper.update)(grads, state)
    np.testing.assert_allclose(clipped["body"]["kernel"], [0.6, 0.8], rtol=1e-6)
    assert float(clipped["body"]["bias"][0]) == 9.0
    assert float(clipped["_overwrite_with_gradient"]["scale"][0]) == 7.0
    assert float(clipx.metrics(state)["clip/norm"]) == 5.0
    by_rank = clipx.excluding(
        clipx.adaptive_grad_clip(0.01), lambda path, leaf: path[-1] == "bias"
    )
    by_rank.update(grads, by_rank.init(grads), grads)
    with pytest.raises(ValueError, match=r"'head'.*fits none of: .*body/bias"):
        clipx.excluding(clipx.clip(1.0), "head").init(grads)
    with pytest.raises(TypeError, match="Expected where"):
        clipx.excluding(clipx.clip(1.0), 3)


@pytest.mark.parametrize("kind", [tuple, list, frozenset])
def test_each_of_several_names_must_fit_a_leaf(kind):
    grads = {"body": {"kernel": jnp.ones(2), "bias": jnp.ones(1)}, "head": jnp.ones(1)}
    clipper = clipx.excluding(clipx.clip(1.0), kind(("head", "biass")))
    message = (
        r"where=.*'biass' fits none of: body/bias, body/kernel, head\. Did you mean"
        r" 'bias'\? Correct the name"
    )
    with pytest.raises(ValueError, match=message):
        clipper.init(grads)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(clipper.update, grads, optax.MaskedState(()))
    clipx.excluding(clipx.clip(1.0), kind(("head", "bias", "body"))).init(grads)
    with pytest.raises(ValueError, match=r"'zzz' fits none of: .*head\. Correct"):
        clipx.excluding(clipx.clip(1.0), kind(("head", "zzz"))).init(grads)


def test_a_name_among_several_may_fit_what_is_hidden():
    grads = {"body": jnp.ones(2), "head": jnp.ones(1), "bias": None}
    clipper = clipx.excluding(clipx.clip(1.0), ("head", "bias"))
    clipper.update(grads, clipper.init(grads))
    masked = optax.masked(
        clipx.excluding(clipx.clip(1.0), ("kernel", "bias")), {"a": False, "b": True}
    )
    params = {"a": {"bias": jnp.ones(1)}, "b": {"kernel": jnp.ones(1)}}
    masked.update(params, masked.init(params))


def test_excluding_in_nnx():
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    tx = optax.chain(clipx.excluding(clipx.clip_by_global_norm(1e-3), "bias"))
    optimizer = nnx.Optimizer(model, optax.chain(tx, optax.sgd(1.0)), wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 3))) * 10))(model)
    before = model.layers[0].bias[...]
    optimizer.update(model, grads)
    np.testing.assert_allclose(model.layers[0].bias[...], before - 10.0)


def test_of_model_of_something_else():
    for other, name in (({}, "dict"), (nn.Dense(3), "Dense")):
        with pytest.raises(
            TypeError, match=rf"NNX or Equinox.*got {name}.*units\.flax"
        ):
            clipx.units.of_model(other)


def test_a_name_that_fits_what_is_frozen_is_no_mistake():
    clipper = clipx.excluding(clipx.clip_by_global_norm(1.0), "head")
    for nothing in (None, optax.MaskedNode()):
        tree = {"body": jnp.array([3.0, 4.0]), "head": nothing}
        clipped, _ = clipper.update(tree, clipper.init(tree))
        np.testing.assert_allclose(clipped["body"], [0.6, 0.8], rtol=1e-6)


def test_a_function_that_excludes_is_not_asked_of_what_is_no_array():
    clipper = clipx.excluding(clipx.clip(1.0), lambda path, leaf: leaf.ndim < 2)
    for nothing in (None, optax.MaskedNode()):
        grads = {"w": jnp.full((2, 2), 3.0), "b": jnp.full(2, 3.0), "none": nothing}
        clipped, _ = clipper.update(grads, clipper.init(grads))
        assert float(clipped["w"][0, 0]) == 1
        assert float(clipped["b"][0]) == 3
        matrices = {"w": grads["w"], "none": nothing}  # it may have fitted what is gone
        clipper.update(matrices, clipper.init(matrices))
