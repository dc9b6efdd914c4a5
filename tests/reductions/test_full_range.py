"""The norm and the direction are right at any magnitude, in any dtype."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import HealthCheck, given, settings, strategies as st

import optax_clipx as clipx
from optax_clipx._devices import platforms
from optax_clipx._devices.mesh import Placement
from optax_clipx._reductions.norms import local_norms
from optax_clipx._reductions.plan import Plan, of_tree

# A new structure costs a compilation, so that there are twenty, and many values each.
SHAPES = [
    [(7,)],
    [()],
    [(3, 5), (1,)],
    [(2, 2), (2,), (2, 3, 2)],
    [(64,), (64,)],
    [(1,)] * 8,
    [(33, 3)],
]
NARROW = ("float16", "bfloat16", "float32")
STRUCTURES = [
    (shapes, [NARROW[(i + j) % 3] for j in range(len(shapes))])
    for i in range(3)
    for shapes in SHAPES[:6]
] + [([(33, 3)], ["float32"]), ([(33, 3)], ["bfloat16"])]
WIDE_STRUCTURES = [
    ([(7,)], ["float64"]),
    ([(3, 5), (4,)], ["float64", "float32"]),
    ([(2, 2), (2,), (9,)], ["bfloat16", "float64", "float16"]),
]


@functools.cache
def clipper():
    def clip(tree, limit):
        clipped, norm = clipx.functional.clip_by_global_norm(tree, limit)
        return clipped, norm

    return jax.jit(clip)


@functools.cache
def ends(dtype):
    """The exponents of the smallest and of the largest number."""
    info = jnp.finfo(dtype)
    return np.log2(float(info.smallest_normal)), np.log2(float(info.max))


def tree_of(rng, shapes, dtypes):
    tree = []
    for shape, dtype in zip(shapes, dtypes, strict=True):
        low, high = ends(dtype)
        center = rng.choice([low, 0, high, *rng.uniform(low, high, 5)])
        spread = rng.choice([0.0, 3.0, 300.0, 3000.0])
        exponents = np.clip(rng.normal(center, spread, shape), low + 0.001, high - 0.01)
        values = np.exp2(exponents) * rng.choice([-1, 1], shape)
        values = np.where(rng.random(shape) < rng.choice([0, 0.3]), 0, values)
        tree.append(np.asarray(values).astype(jnp.dtype(dtype)))
    return tree


def cases(structures):
    """A structure and a seed; the numbers come from NumPy, which is quicker."""
    return given(st.sampled_from(structures), st.integers(0, 2**32 - 1))


def check_ten(structure, seed):
    rng = np.random.default_rng(seed)
    for _ in range(10):
        check(
            tree_of(rng, *structure),
            rng.choice([-0.1, 30.0, *rng.uniform(-0.1, 30, 8)]),
        )


def check(tree, decades):
    wide = any(x.dtype == np.float64 for x in tree)
    dtype = np.float64 if wide else np.float32
    info = np.finfo(dtype)
    true = reference.norm(tree)
    smallest = float(info.smallest_normal) * 1e8
    wanted = true * reference.WIDE(10) ** -decades
    limit = dtype(np.clip(wanted, smallest, float(info.max)))
    clipped, norm = clipper()(tree, limit)

    assert norm.dtype == dtype
    assert abs(float(norm) - float(min(true, info.max))) <= 1e-5 * float(norm)

    expected = reference.rescale(tree, limit)
    size = np.sqrt(sum(x.size for x in tree))
    error, allowed = [], 1e-5 * min(float(limit), float(true))
    for out, want, x in zip(clipped, expected, tree, strict=True):
        assert out.dtype == x.dtype
        leaf = jnp.finfo(x.dtype)
        error.append(np.asarray(out).astype(np.float64) - want.astype(np.float64))
        allowed += float(leaf.eps) * float(np.max(np.abs(want), initial=0)) * size
        allowed += float(leaf.smallest_normal) * size  # what is smaller flushes to 0
        if float(true) * (1 + 1e-6) <= float(limit):
            np.testing.assert_array_equal(np.asarray(out), x)
    assert float(reference.norm(error)) <= allowed


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@cases(STRUCTURES)
def test_norm_and_direction(structure, seed):
    check_ten(structure, seed)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@cases(WIDE_STRUCTURES)
def test_norm_and_direction_in_float64(structure, seed):
    with jax.enable_x64(True):
        check_ten(structure, seed)


@pytest.mark.one_in(3, rest="slow")
@pytest.mark.parametrize("ord", [1, 3.5, np.inf, "rms"])
@pytest.mark.parametrize("exponent", [-120, -60, 0, 60, 120])
def test_other_orders(ord, exponent):
    rng = np.random.default_rng(0)
    tree = [
        (rng.normal(size=shape) * 2.0**exponent).astype(np.float32)
        for shape in [(3, 4), (5,)]
    ]
    norm = clipx.functional.global_norm(tree, ord)
    np.testing.assert_allclose(float(norm), float(reference.norm(tree, ord)), rtol=1e-5)


@pytest.mark.parametrize("ord", [1, 2, 3.5, "rms"])
def test_a_norm_beyond_the_largest_number_is_the_largest(ord):
    tree = [jnp.full(4, 3e38), jnp.full(2, 3e38)]
    want = min(reference.norm(tree, ord), np.longdouble(np.finfo(np.float32).max))
    norm = clipx.functional.global_norm(tree, ord)
    np.testing.assert_allclose(float(norm), float(want), rtol=1e-5)


@pytest.mark.slow
def test_sums_of_many_entries_keep_their_precision():
    x = np.random.default_rng(0).normal(size=1 << 24).astype(np.float32)
    norm = clipx.functional.global_norm([x, x])
    np.testing.assert_allclose(float(norm), float(reference.norm([x, x])), rtol=1e-6)


@jax.jit
def clipped_in_every_scope(tree, limit):
    measures = [
        clipx.measures.tree_norm(),
        clipx.measures.leaf_norms(),
        clipx.measures.unit_norms(),
        clipx.measures.leaf_norms(
            batch_axes=lambda path, leaf: 0 if leaf.ndim > 1 else None
        ),
        clipx.measures.group_norms({"w": "a", "b": "b"}),
    ]
    return [clipx.clip_by(measure, limit).update(tree) for measure in measures]


@pytest.mark.one_in(2, rest="slow")
@pytest.mark.parametrize("value", [3e38, 1e30, 1e-30, 1.3e-38])
@pytest.mark.parametrize("limit", [3e38, 1.0, 1e-30])
def test_every_scope_at_the_ends_of_the_range(value, limit):
    tree = {"w": jnp.full((2, 3), value), "b": jnp.full((4,), value)}
    for clipped, state in clipped_in_every_scope(tree, jnp.float32(limit)):
        for leaf in jax.tree.leaves(clipped):
            flat = np.asarray(leaf, np.float64).ravel()
            assert np.all(flat > 0)
            np.testing.assert_allclose(flat, flat[0], rtol=1e-6)
        assert np.isfinite(state.metrics.norm)
        assert np.isfinite(state.metrics.clipped_norm)


@pytest.fixture(params=["gpu", "tpu"])
def as_on_accelerators(request):
    """Three sums side by side, as programs for GPUs and TPUs take them."""
    token = platforms._platform.set(request.param)
    jax.clear_caches()
    yield
    platforms._platform.reset(token)
    jax.clear_caches()


EXPONENTS = [(e, e) for e in (-120, -45, 0, 60, 120)]
EXPONENTS += [(-120, 120), (-38, -100), (50, 0)]


@pytest.mark.usefixtures("as_on_accelerators")
def test_three_sums_side_by_side():
    rng = np.random.default_rng(0)
    entries = [rng.normal(size=shape) for shape in [(3, 4), (5,)]]
    measures = (
        clipx.measures.tree_norm(),
        clipx.measures.leaf_norms(),
        clipx.measures.group_norms(lambda path, leaf: path[0]),
        clipx.measures.unit_norms(axis=0),
    )

    @jax.jit
    def norms_and_slopes(tree):
        slopes = jax.grad(clipx.functional.global_norm)(tree)
        return [measure(tree) for measure in measures], slopes

    for exponents in EXPONENTS:
        tree = [
            (x * 2.0**e).astype(np.float32)
            for x, e in zip(entries, exponents, strict=True)
        ]
        whole = float(reference.norm(tree))
        each = [float(reference.norm([x])) for x in tree]
        (*found, units), slopes = norms_and_slopes(tree)
        for norms, want in zip(found, (whole, each, each), strict=True):
            norms = jax.tree.leaves(norms)
            np.testing.assert_allclose(norms, np.ravel(want), rtol=1e-6)
        columns = [float(reference.norm([column])) for column in tree[0].T]
        np.testing.assert_allclose(units[0][0], columns, rtol=1e-6)
        for slope, x in zip(slopes, tree, strict=True):
            want = np.asarray(x, np.float64) / whole
            np.testing.assert_allclose(slope, want, rtol=1e-5, atol=1e-37)
    for bad in (np.nan, np.inf):
        tree[0][1, 1] = bad
        assert np.array_equal(clipx.functional.global_norm(tree), bad, equal_nan=True)


def a_step(make, platform, tree):
    """A step of a method, as programs for a platform take it."""
    clipper = make()

    def step(grads, params):
        clipped, state = clipper.update(grads, clipper.init(params), params)
        return clipped, clipx.metrics(state)

    token = platforms._platform.set(platform)
    jax.clear_caches()
    try:
        return jax.jit(step)(tree, jax.tree.map(lambda x: x / 4, tree))
    finally:
        platforms._platform.reset(token)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: clipx.clip(0.1),
        lambda: clipx.clip_by_global_norm(1.0, nonfinite="sanitize"),
        lambda: clipx.adaptive_grad_clip(0.01),
        lambda: clipx.clip_by_leaf_norm(1.0),
    ],
    ids=["clip", "sanitized", "AGC", "leaf"],
)
def test_a_step_as_accelerators_take_it(make, platform):
    """Leaves that are put together, one that is too large, and three magnitudes."""
    rng = np.random.default_rng(0)
    shapes = [(3, 4), (5,), (4, 3), (600, 600), (6,)]
    scales = (1.0, 1e-3, 1e19, 1.0, 1e-25)
    tree = [
        jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
        for scale, shape in zip(scales, shapes, strict=True)
    ]
    found, wanted = (a_step(make, name, tree) for name in (platform, "cpu"))
    chex.assert_trees_all_close(found, wanted, rtol=2e-6)


def test_small_leaves_of_equal_entries():
    """Entry by entry, XLA sums to norms off by 1.4e-5, and clipped ones too large."""
    shapes = [(16, 16), (31, 31), (32, 32), (3, 3, 16, 16), (2,) * 12, (2,) * 13]

    @jax.jit
    def clip(leaf, limit):
        found = []
        for measure in (clipx.measures.tree_norm(), clipx.measures.leaf_norms()):
            clipper = clipx.clip_by(measure, limit)
            (clipped,), state = clipper.update([leaf], clipper.init([leaf]))
            found.append((clipped, state.metrics.norm))
        return found

    for shape, value in itertools.product(shapes, (1e-30, 0.4)):
        leaf = jnp.full(shape, value, jnp.float32)
        norm = float(np.float32(value)) * np.sqrt(leaf.size)
        for clipped, found in clip(leaf, value):
            assert abs(float(found) / norm - 1) < 1e-6
            clipped_norm = np.linalg.norm(np.asarray(clipped, np.float64))
            assert clipped_norm <= value * (1 + 1e-6)


@pytest.mark.parametrize("unit", [1e-36, 1e36])
def test_norms_of_one_device_are_right_at_any_magnitude(unit):
    plan = Plan((), (Placement((), ()),), of_tree(1))
    (norm,) = local_norms(plan, ((jnp.float32([3 * unit, 4 * unit]),),))
    np.testing.assert_allclose(norm.value, 5 * unit, rtol=1e-6)
