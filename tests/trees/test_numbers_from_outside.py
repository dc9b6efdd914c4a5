"""Numbers as NumPy, a YAML file and plain Python give them; NumPy leaves."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from all_methods import EVERY

import optax_clipx as clipx
from optax_clipx import functional, measures, per_example, thresholds

TREE = {"w": jnp.array([[3.0, 1.0], [4.0, 0.0]])}
ROWS, WHOLE = [[5.0, 1.0]], [[26**0.5]]


@pytest.mark.parametrize(
    ("axis", "want"),
    [
        (np.int64(0), ROWS),
        (np.int32(-2), ROWS),
        ([0], ROWS),
        ((np.int64(0),), ROWS),
        (np.array([0]), ROWS),
        (np.array(0), ROWS),
        ([0, 1], WHOLE),
        ((np.int64(0), 1), WHOLE),
        ({"w": [0, 1]}, WHOLE),
        ({"w": np.int64(0)}, ROWS),
        (lambda path, leaf: [np.int64(0)], ROWS),
        (clipx.units.stacked(lambda path, leaf: (0,), "w", axis=np.int64(1)), ROWS),
    ],
)
def test_axes_of_units(axis, want):
    norms = functional.unit_norms(TREE, axis=axis)["w"]
    np.testing.assert_allclose(norms, want, rtol=1e-6)


def test_a_list_beside_a_list_of_leaves_has_an_axis_for_each():
    found = functional.unit_norms([TREE["w"], TREE["w"]], axis=[0, 1])
    np.testing.assert_allclose(found[0], ROWS, rtol=1e-6)
    np.testing.assert_allclose(found[1], [[10**0.5], [4.0]], rtol=1e-6)


@pytest.mark.parametrize("batch_axes", [np.int64(1), [1], (np.int64(1),)])
def test_batch_axes(batch_axes):
    clipped, _ = clipx.clip_by_leaf_norm(1.0, batch_axes=batch_axes).update(TREE)
    np.testing.assert_allclose(clipped["w"], [[0.6, 1.0], [0.8, 0.0]], rtol=1e-6)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("axis", ["0", 0.0, [0.5], 7, [np.int64(7)]])
def test_what_is_no_axis_is_an_error(axis):
    with pytest.raises(ValueError, match=r"Expected axis within the rank.*got axis="):
        functional.unit_norms(TREE, axis=lambda path, leaf: axis)


@pytest.mark.parametrize(("argnums", "batch_argnums"), [(np.int64(0), 1), ([0], [1])])
def test_numbers_of_arguments(argnums, batch_argnums):
    grads = per_example.clipped_grad(
        jnp.vdot,
        1.0,
        argnums=argnums,
        batch_argnums=batch_argnums,
        microbatch_size=np.int64(2),
    )
    found, _ = grads(jnp.ones(2), jnp.full((4, 2), 3.0))
    np.testing.assert_allclose(jax.tree.leaves(found)[0], [8**0.5] * 2, rtol=1e-6)


HUGE = 10**30  # more than int32 and int64 hold, and less than float32 does
UNCHANGED = {
    "tree": lambda: clipx.clip_by_global_norm(HUGE),
    "prefix": lambda: clipx.clip_by_leaf_norm({"w": HUGE}),
    "group": lambda: clipx.clip_by_group_norm({"w": HUGE}, lambda p, leaf: p[0]),
    "element": lambda: clipx.clip(HUGE),
    "interval": lambda: clipx.clip_by_value(-HUGE, HUGE),
    "relative": lambda: clipx.adaptive_grad_clip(HUGE),
    "schedule": lambda: clipx.clip_by_global_norm(lambda step: HUGE),
    "adaptive": lambda: clipx.zclip(max_norm=HUGE),
    "minimum": lambda: clipx.clip_by(
        measures.tree_norm(), thresholds.minimum(HUGE, HUGE)
    ),
    "spectral": lambda: clipx.clip_by_spectral_norm(HUGE),
    "skip": lambda: clipx.skip_spikes(optax.identity(), threshold=HUGE),
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_a_huge_int_is_a_limit_like_any_other(name):
    tx = UNCHANGED[name]()
    clipped, _ = tx.update(TREE, tx.init(TREE), TREE)
    np.testing.assert_allclose(clipped["w"], TREE["w"], rtol=1e-6)


def test_a_huge_int_is_a_limit_like_any_other_under_jit():
    @jax.jit
    def clipped_by_each(tree):
        made = {name: make() for name, make in UNCHANGED.items()}
        return {n: tx.update(tree, tx.init(tree), tree)[0] for n, tx in made.items()}

    for name, clipped in clipped_by_each(TREE).items():
        np.testing.assert_allclose(clipped["w"], TREE["w"], rtol=1e-6, err_msg=name)


def test_a_huge_int_in_the_backward_pass_and_for_examples():
    x = TREE["w"]
    _, norm = jax.vjp(lambda x: clipx.backward.clip_norm(x, HUGE), x)
    _, value = jax.vjp(lambda x: clipx.backward.clip_value(x, -HUGE, HUGE), x)
    np.testing.assert_array_equal(norm(x)[0], x)
    np.testing.assert_array_equal(value(x)[0], x)
    grads, _ = per_example.clipped_grad(jnp.vdot, HUGE)(jnp.ones(2), x)
    np.testing.assert_allclose(grads, [7.0, 1.0], rtol=1e-6)


def test_a_huge_int_as_the_norm():
    clipped, _ = clipx.clip_by_global_norm(HUGE).update(TREE, None, norm=10 * HUGE)
    np.testing.assert_allclose(clipped["w"], TREE["w"] / 10, rtol=1e-6)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "make",
    [
        clipx.clip_by_global_norm,
        clipx.clip,
        clipx.zclip,
        lambda n: clipx.skip_spikes(optax.identity(), threshold=n),
    ],
)
def test_an_int_beyond_all_floats_is_an_error(make):
    with pytest.raises(ValueError, match=r"below 1\.8e\+308, got an int of 16610 bits"):
        make(10**5000)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("warmup_steps", lambda n: clipx.zclip(warmup_steps=n)),
        ("warmup_steps", lambda n: clipx.adagc(warmup_steps=n)),
        ("patience", lambda n: clipx.skip_spikes(optax.identity(), patience=n)),
        ("every", lambda n: clipx.reset_moments(optax.identity(), n)),
        ("window", lambda n: clipx.quantile_clip(window=n)),
    ],
)
def test_a_count_beyond_int32_is_an_error(name, make):
    with pytest.raises(ValueError, match=rf"{name} <= 2147483647.*{name}={2**31}"):
        make(2**31)


@pytest.mark.one_in(21, rest="slow")  # in turn compiled and not
@pytest.mark.parametrize("transform", [jax.jit, lambda f: f])
@pytest.mark.parametrize("name", EVERY)
def test_float64_leaves_of_numpy_without_x64_warn_of_nothing(name, transform):
    tree = {"a": np.arange(1.0, 7.0).reshape(3, 2), "b": np.ones(3)}
    tx = EVERY[name].make()
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("error")
        updates, _ = transform(tx.update)(tree, tx.init(tree), tree)
    assert updates["a"].dtype == np.float32


def test_functions_of_float64_leaves_warn_of_nothing():
    rows = np.array([[3.0, 4.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, norm = functional.clip_by_global_norm(rows, np.float64(1.0))
        grads, _ = per_example.clipped_grad(jnp.vdot, 1.0)(np.ones(2), rows)
        clipped, _ = clipx.clip_by_global_norm(1.0).update(rows, None, norm=norm)
    np.testing.assert_allclose(grads, [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(clipped, [[0.6, 0.8]], rtol=1e-6)
