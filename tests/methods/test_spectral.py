"""Singular values: against float64, at any magnitude, in stacks and on a mesh."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from versions import MESH_OF_TRACED

import optax_clipx as clipx

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "spectral.npz")
EXACT = 1e-5


def bound(matrix, steps=24):
    """What the docstring states for the iterative method."""
    return np.linalg.norm(np.float64(matrix)) * (2 ** (-0.9 * (steps - 4)) + 1e-5)


def reference(matrix, limit, form):
    u, s, v = np.linalg.svd(np.float64(matrix), full_matrices=False)
    bent = np.minimum(s, limit) if form == "hard" else s / np.sqrt(1 + (s / limit) ** 2)
    return (u * bent[..., None, :]) @ v


@functools.partial(
    jax.jit, static_argnames=("form", "method", "steps", "batch", "axis")
)
def jitted(matrix, limit, form, method, steps, batch, axis):
    clipper = clipx.clip_by_spectral_norm(
        limit, form=form, method=method, steps=steps, batch_axes=batch, axis=axis
    )
    return clipper.update(matrix, clipper.init(matrix))


def clip(
    matrix, limit, form="hard", method="svd", steps=24, batch_axes=None, axis=None
):
    limit = jnp.float32(limit)
    clipped, state = jitted(matrix, limit, form, method, steps, batch_axes, axis)
    return np.float64(clipped), state.metrics


def with_values(shape, values, seed=0):
    rng = np.random.default_rng(seed)
    u, _, v = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    return jnp.asarray((u * np.asarray(values)) @ v, jnp.float32)


MATRICES = {
    "square": with_values((8, 8), np.linspace(0.1, 4, 8)),
    "wide": with_values((6, 40), np.linspace(0.1, 4, 6)),
    "tall": with_values((40, 6), np.linspace(0.1, 4, 6)),
    "large": with_values((64, 128), np.geomspace(0.01, 8, 64)),
    "ill-conditioned": with_values((12, 16), np.geomspace(1e-6, 3, 12)),
    "rank 1": with_values((8, 12), [3.0] + [0.0] * 7),
    "equal": with_values((8, 8), np.full(8, 2.0)),
    "at the limit": with_values((8, 8), [1.0] * 4 + [0.5] * 4),
    "row": with_values((1, 9), [3.0]),
    "column": with_values((9, 1), [3.0]),
    "zero": jnp.zeros((5, 4)),
}


@pytest.mark.one_in(10)
@pytest.mark.parametrize("form", ["hard", "soft"])
@pytest.mark.parametrize("name", MATRICES)
def test_against_float64(name, form):
    matrix = MATRICES[name]
    size = max(np.linalg.norm(matrix), 1e-30)
    for limit in (0.05, 1.0, 2.5):
        want = reference(matrix, limit, form)
        exact, metrics = clip(matrix, limit, form=form)
        assert np.max(np.abs(exact - want)) <= EXACT * size
        top = np.linalg.svd(exact)[1].max()
        assert top <= limit * (1 + EXACT)
        norm = np.linalg.svd(np.float64(matrix))[1].max()
        assert float(metrics.norm) == pytest.approx(norm, rel=1e-5)
        assert float(metrics.clipped_norm) == pytest.approx(top, rel=1e-4)
        found, metrics = clip(matrix, limit, form=form, method="newton_schulz")
        assert np.linalg.norm(found - want, 2) <= bound(matrix)
        assert np.linalg.svd(found)[1].max() <= limit + bound(matrix)
        assert float(metrics.norm) <= norm * (1 + 1e-5)
        assert float(metrics.norm) >= 0.5 * norm


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "steps"),
    [
        ("hard", 8),
        ("soft", 12),
        pytest.param("hard", 16, marks=pytest.mark.whole),
        pytest.param("soft", 8, marks=pytest.mark.whole),
    ],
)
def test_fewer_steps_hold_their_bound(form, steps):
    for matrix in MATRICES.values():
        want = reference(matrix, 1.0, form)
        found, _ = clip(matrix, 1.0, form=form, method="newton_schulz", steps=steps)
        assert np.linalg.norm(found - want, 2) <= bound(matrix, steps)


@pytest.mark.one_in(3, rest="slow")
@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("limit", [1.0, pytest.param(5.0, marks=pytest.mark.slow)])
def test_trace_of_the_reference(index, limit):
    matrix = jnp.asarray(GOLDEN[f"in{index}"], jnp.float32)
    for form, name in (("soft", "exact"), ("hard", "hard")):
        want = GOLDEN[f"{name}{index}_c{limit}"]
        found, _ = clip(matrix, limit, form=form)
        assert np.max(np.abs(found - want)) <= 1e-5 * np.max(np.abs(want))
        found, _ = clip(matrix, limit, form=form, method="newton_schulz")
        assert np.linalg.norm(found - want, 2) <= bound(matrix)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("method", ["svd", "newton_schulz"])
@pytest.mark.parametrize("size", [1e-36, 1e-20, 1e20, 1e37])
def test_any_magnitude(size, method):
    matrix = MATRICES["wide"] * size
    want = reference(np.float64(MATRICES["wide"]), 1.0, "hard") * size
    found, _ = clip(matrix, size, method=method)
    tiny = float(jnp.finfo(jnp.float32).tiny)  # smaller entries are flushed to zero
    assert np.max(np.abs(found - want)) <= 3e-5 * np.linalg.norm(want) + tiny


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("method", ["svd", "newton_schulz"])
def test_half_precision(dtype, method):
    matrix = MATRICES["tall"].astype(dtype)
    found, _ = clip(matrix, 1.0, method=method)
    want = reference(np.asarray(matrix, np.float64), 1.0, "hard")
    assert np.max(np.abs(found - want)) <= float(jnp.finfo(dtype).eps)


def test_what_is_below_the_limit_comes_back_bit_for_bit():
    matrix = MATRICES["wide"]
    found, metrics = clip(matrix, 4.5)
    np.testing.assert_array_equal(found, matrix)
    assert not metrics.clipped
    for limit in (jnp.inf, 100.0):
        found, _ = clip(matrix, limit, method="newton_schulz")
        np.testing.assert_array_equal(found, matrix)


def test_a_limit_of_zero_and_one_that_is_traced_and_negative():
    for method in ("svd", "newton_schulz"):
        for form in ("hard", "soft"):
            found, _ = clip(MATRICES["wide"], 0.0, method=method, form=form)
            assert np.all(found == 0)
        run = jax.jit(
            lambda t, m, method=method: clipx.clip_by_spectral_norm(
                t, method=method
            ).update(m)[0]
        )
        assert np.all(np.isnan(run(jnp.float32(-1.0), MATRICES["wide"])))


def test_a_vector_is_a_matrix_of_one_column_and_the_rule_has_no_jump():
    vector = jnp.array([3.0, 4.0])
    for form, want in (("hard", 1.0), ("soft", 5 / np.sqrt(26))):
        found, _ = clip(vector, 1.0, form=form)
        assert np.linalg.norm(found) == pytest.approx(want, rel=1e-6)
    near = [clip(vector * s / 5, 1.0, form="soft")[0] for s in (0.999, 1.001)]
    assert np.linalg.norm(near[1] - near[0]) < 2e-3


def test_a_schedule_and_a_limit_for_each_leaf():
    clipper = clipx.clip_by_spectral_norm(optax.linear_schedule(2.0, 1.0, 1))
    matrix = with_values((4, 4), [3.0] * 4)
    state, update = clipper.init(matrix), jax.jit(clipper.update)
    for limit in (2.0, 1.0):
        clipped, state = update(matrix, state)
        assert np.linalg.norm(clipped, 2) == pytest.approx(limit, rel=1e-5)
    tree = {"a": matrix, "b": matrix}
    by_leaf = clipx.clip_by_spectral_norm({"a": 1.0, "b": 2.0})
    clipped, _ = jax.jit(by_leaf.update)(tree)
    assert np.linalg.norm(clipped["b"], 2) == pytest.approx(2.0, rel=1e-5)
    assert np.linalg.norm(clipped["a"], 2) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.one_in(2, rest="slow")
@pytest.mark.parametrize("method", ["svd", "newton_schulz"])
def test_stacks_and_kernels(method):
    rng = np.random.default_rng(0)
    stack = jnp.asarray(rng.normal(size=(3, 6, 10)), jnp.float32)
    found, _ = clip(stack, 1.0, batch_axes=0, method=method)
    want = np.stack([reference(m, 1.0, "hard") for m in stack])
    assert np.max(np.abs(found - want)) < 1e-4
    last = jnp.moveaxis(stack, 0, -1)
    found, _ = clip(last, 1.0, batch_axes=-1, method=method)
    assert np.max(np.abs(np.moveaxis(found, -1, 0) - want)) < 1e-4
    # A convolution: all but the last axis are rows; attention's heads are columns.
    kernel = jnp.asarray(rng.normal(size=(3, 4, 8)), jnp.float32)
    found, _ = clip(kernel, 1.0, method=method)
    want = reference(np.reshape(kernel, (12, 8)), 1.0, "hard").reshape(3, 4, 8)
    assert np.max(np.abs(found - want)) < 1e-4
    found, _ = clip(kernel, 1.0, axis=(0,), method=method)
    want = reference(np.reshape(kernel, (3, 32)), 1.0, "hard").reshape(3, 4, 8)
    assert np.max(np.abs(found - want)) < 1e-4


@pytest.mark.one_in(10)
@pytest.mark.parametrize(
    "way", [pytest.param("explicit", marks=MESH_OF_TRACED), "shard_map", "auto"]
)
@pytest.mark.parametrize(
    "spec", [P("x", "y"), P(("x", "y"), None), P(None, "y"), P()], ids=str
)
def test_sharded_matrices(way, spec):
    kind = AxisType.Explicit if way == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    matrix = with_values((16, 8), np.linspace(0.5, 4, 8))
    placed = jax.device_put(matrix, NamedSharding(mesh, spec))
    clipper = clipx.clip_by_spectral_norm(1.0)
    update = lambda m: clipper.update(m)[0]  # noqa: E731
    if way == "shard_map":
        told = clipx.clip_by_spectral_norm(1.0, specs=spec)
        update = jax.shard_map(
            lambda m: told.update(m)[0], mesh=mesh, in_specs=spec, out_specs=spec
        )
    found = jax.jit(update)(placed)
    assert found.sharding.is_equivalent_to(placed.sharding, 2)
    want = reference(matrix, 1.0, "hard")
    assert np.max(np.abs(jax.device_get(found) - want)) < 1e-5 * np.linalg.norm(matrix)


def test_a_cut_matrix_of_unknown_place_is_an_error():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    clipper = clipx.clip_by_spectral_norm(1.0)
    update = jax.shard_map(
        lambda m: clipper.update(m)[0], mesh=mesh, in_specs=P("x"), out_specs=P("x")
    )
    with pytest.raises(ValueError, match=r"specs= with a PartitionSpec"):
        jax.jit(update)(jnp.ones((16, 4)))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("form", ["hard", "soft"])
@pytest.mark.parametrize("method", ["svd", "newton_schulz"])
def test_large_numbers_and_limits_far_above(form, method):
    found, _ = clip(jnp.eye(2) * 2e38, 1e38, form=form, method=method)
    want = 1e38 if form == "hard" else 2e38 / np.sqrt(5)
    np.testing.assert_allclose(np.diag(found), want, rtol=1e-4)
    for size in (1.0, 1e-3, 1e-8, 1e-30):
        matrix = jnp.array([[1.0, 0.5], [0.25, 1.0]]) * size
        for limit in (1e8, 1e30, 3e38):
            found, metrics = clip(matrix, limit, form=form, method=method)
            np.testing.assert_allclose(found, matrix, rtol=1e-4)
            assert np.isfinite(metrics.clipped_norm)


def test_rows_that_are_stacked_are_an_error():
    with pytest.raises(ValueError, match=r"axis=\(0,\) and batch_axes=\(0,\)"):
        clip(jnp.ones((2, 3, 4)), 1.0, batch_axes=0, axis=0)


def test_a_limit_of_zero_is_what_the_metrics_show():
    tree = {"a": jnp.eye(2), "b": 5 * jnp.eye(2)}
    _, state = clipx.clip_by_spectral_norm({"a": 0.0, "b": 1.0}).update(tree)
    assert float(state.metrics.threshold) == 0
    assert float(state.metrics.scale) == 0
