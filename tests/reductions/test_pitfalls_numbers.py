"""What goes wrong elsewhere with numbers: right here, and shown to fail there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import optax_clipx as clipx


@pytest.fixture(autouse=True)
def _as_users_have_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


def many_bfloat16_leaves():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=1000), jnp.bfloat16) for _ in range(2000)]


@pytest.mark.parametrize(
    "float32_leaf",
    [
        pytest.param("none", marks=[pytest.mark.slow, pytest.mark.whole]),
        pytest.param("first", marks=[pytest.mark.slow, pytest.mark.whole]),
        pytest.param("last", marks=pytest.mark.slow),
    ],
)
def test_two_thousand_bfloat16_leaves(float32_leaf):
    """optax accumulates in the leaf's dtype: norm 724 where 1413 is right."""
    leaves = many_bfloat16_leaves()
    extra = [jnp.asarray(np.random.default_rng(1).normal(size=1000), jnp.float32)]
    tree = {"none": leaves, "first": extra + leaves, "last": leaves + extra}[
        float32_leaf
    ]
    true = float(reference.norm(tree))
    clipped, norm = jax.jit(clipx.functional.clip_by_global_norm)(tree, 1.0)
    np.testing.assert_allclose(norm, true, rtol=1e-6)
    assert 0.999 <= float(reference.norm(clipped)) <= 1.001


@pytest.mark.slow
def test_two_thousand_bfloat16_leaves_in_optax():
    leaves = many_bfloat16_leaves()
    true = float(reference.norm(leaves))
    theirs, _ = optax.clip_by_global_norm(1.0).update(leaves, optax.EmptyState())
    assert float(optax.tree.norm(leaves)) < 0.6 * true
    assert float(reference.norm(theirs)) > 1.9
    extra = [jnp.ones(1000, jnp.float32)]
    first, last = (float(optax.tree.norm(x)) for x in (extra + leaves, leaves + extra))
    assert abs(first / last - 1) > 0.5


@pytest.mark.parametrize(
    ("dtype", "value"), [("float32", 1e20), ("bfloat16", 1e20), ("float16", 3e4)]
)
def test_large_entries(dtype, value):
    """The squares overflow: in optax the whole update becomes zero, silently."""
    tree = [jnp.full((16,), value, dtype)]
    ours, state = jax.jit(clipx.clip_by_global_norm(1.0).update)(tree)
    update = jax.jit(optax.clip_by_global_norm(1.0).update)
    theirs, _ = update(tree, optax.EmptyState())
    np.testing.assert_allclose(ours[0].astype(np.float32), 0.25, rtol=4e-3)
    np.testing.assert_allclose(state.metrics.norm, 4 * float(tree[0][0]), rtol=1e-5)
    assert np.all(np.asarray(theirs[0]) == 0)


def test_small_entries():
    """The squares underflow: in optax entries of 1e-23 pass a limit of 1e-24."""
    tree = [jnp.full((4,), 1e-23)]
    ours, state = clipx.clip_by_global_norm(1e-24).update(tree)
    theirs, _ = optax.clip_by_global_norm(1e-24).update(tree, optax.EmptyState())
    np.testing.assert_allclose(ours[0], 5e-25, rtol=1e-5)
    np.testing.assert_allclose(state.metrics.norm, 2e-23, rtol=1e-5)
    np.testing.assert_array_equal(theirs[0], tree[0])


def test_one_infinity():
    """In optax that entry becomes NaN and all others 0."""
    tree = [jnp.array([jnp.inf, 1.0, 2.0])]
    ours, _ = clipx.clip_by_global_norm(1.0).update(tree)
    theirs, _ = optax.clip_by_global_norm(1.0).update(tree, optax.EmptyState())
    assert np.all(np.isnan(ours[0]))
    np.testing.assert_array_equal(theirs[0], [np.nan, 0.0, 0.0])


def test_norm_and_limit_of_zero():
    tree = [jnp.zeros(3)]
    ours, _ = clipx.clip_by_global_norm(0.0).update(tree)
    theirs, _ = optax.clip_by_global_norm(0.0).update(tree, optax.EmptyState())
    np.testing.assert_array_equal(ours[0], 0.0)
    assert np.all(np.isnan(theirs[0]))


def test_gradient_at_zero():
    def through(tx):
        total = lambda x: jnp.sum(tx.update([x], optax.EmptyState())[0][0])  # noqa: E731
        return jax.jit(jax.grad(total))

    assert np.all(
        np.isfinite(
            through(clipx.clip_by_global_norm(1.0, metrics=False))(jnp.zeros(3))
        )
    )
    assert np.all(np.isnan(through(optax.clip_by_global_norm(1.0))(jnp.zeros(3))))


def test_the_cap_holds():
    """optax's norm after clipping is above the cap in a few percent of draws."""
    rng = np.random.default_rng(0)
    ours = jax.jit(lambda g: clipx.functional.clip_by_global_norm(g, 1.0)[0])
    theirs = jax.jit(
        lambda g: optax.clip_by_global_norm(1.0).update(g, optax.EmptyState())[0]
    )
    over = {ours: 0.0, theirs: 0.0}
    for _ in range(400):
        tree = [
            jnp.asarray(rng.normal(size=size) * 100, jnp.float32) for size in (64, 7)
        ]
        for fun in over:
            over[fun] = max(over[fun], float(reference.norm(fun(tree))) - 1)
    assert over[ours] <= 1e-6
    assert over[theirs] > 0


@pytest.mark.parametrize("limit", [jnp.float32(1.0), optax.constant_schedule(1.0)])
def test_float32_limits_with_bfloat16_gradients(limit):
    """optax: a TypeError, or a silent promotion of the updates to float32."""
    tree = [jnp.full((4,), 3.0, jnp.bfloat16)]
    for make in (clipx.clip_by_global_norm, clipx.clip_by_block_rms, clipx.clip):
        ours, _ = jax.jit(make(limit).update)(tree)
        assert ours[0].dtype == jnp.bfloat16
    if not callable(limit):
        with pytest.raises(TypeError):
            optax.clip_by_global_norm(limit).update(tree, optax.EmptyState())
        theirs, _ = optax.clip_by_block_rms(limit).update(tree, optax.EmptyState())
        assert theirs[0].dtype == jnp.float32


def test_a_tiny_limit_is_kept():
    """PyTorch's absolute eps makes 8.3e-7 of a limit of 1e-6, at a norm of 5e-6."""
    tree = [jnp.array([3e-6, 4e-6])]
    ours, _ = clipx.clip_by_global_norm(1e-6).update(tree)
    np.testing.assert_allclose(float(reference.norm(ours)), 1e-6, rtol=1e-6)
    like_torch, _ = clipx.clip_by_global_norm(1e-6, eps=1e-6).update(tree)
    np.testing.assert_allclose(float(reference.norm(like_torch)), 8.3e-7, rtol=1e-2)


def test_a_negative_limit_does_not_reverse_the_gradient():
    with pytest.raises(ValueError, match=r"max_norm=-1\.0"):
        clipx.clip_by_global_norm(-1.0)
    step = jax.jit(lambda t, g: clipx.clip_by_global_norm(t).update(g)[0])
    assert np.all(np.isnan(step(jnp.float32(-1.0), jnp.ones(3))))


def test_float16_zeros_in_normalizers():
    """n + 1e-8 is 0 in float16, and 0 / 0 is NaN."""
    tree = [jnp.zeros(3, jnp.float16)]
    clipper = clipx.clip_by(clipx.measures.tree_norm(), 1.0, clipx.responses.normalize)
    np.testing.assert_array_equal(clipper.update(tree)[0][0], 0)
