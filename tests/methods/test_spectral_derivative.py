"""The derivative of clipped singular values, against float64 finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from numpy.testing import assert_allclose
from versions import EXPLICIT

import optax_clipx as clipx

FORMS = ("hard", "soft")
METHODS = ("svd", "newton_schulz")
RNG = np.random.default_rng(0)


def reference(matrix, limit, form):
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    bent = np.minimum(s, limit) if form == "hard" else s / np.sqrt(1 + (s / limit) ** 2)
    return (u * bent[..., None, :]) @ v


def slope(matrix, direction, limit, form, step=1e-6):
    """The central difference of the reference."""
    ends = [reference(matrix + h * direction, limit, form) for h in (step, -step)]
    return (ends[0] - ends[1]) / (2 * step)


def derivative(tree, directions, limit, form, method, **options):
    clipper = clipx.clip_by_spectral_norm(limit, form=form, method=method, **options)
    pair = jax.tree.map(jnp.float32, (tree, directions))
    return jax.jit(lambda x, d: jax.jvp(lambda x: clipper.update(x)[0], (x,), (d,))[1])(
        *pair
    )


def of_rank(rank, *shape):
    *stack, rows, columns = shape
    left = RNG.normal(size=(*stack, rows, rank))
    return left @ RNG.normal(size=(*stack, rank, columns)) / np.sqrt(rank)


MATRICES = {
    "ones": np.ones((3, 3)),
    "equal, above": 2 * np.eye(3),
    "equal, below": 0.5 * np.eye(3),
    "zero": np.zeros((4, 3)),
    "row": np.array([[3.0, 4.0, 0.0]]),
    "square": of_rank(8, 8, 8),
    "rank 1 of 3": of_rank(1, 3, 3),
    "rank 8 of 32": of_rank(8, 32, 32),
    "tall, rank 2": of_rank(2, 32, 8),
    "wide, rank 3": of_rank(3, 8, 32),
}
STACK = of_rank(2, 3, 6, 4)


@pytest.mark.one_in(4, rest="slow")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
def test_against_finite_differences(form, method):
    directions = {k: RNG.normal(size=x.shape) for k, x in MATRICES.items()}
    found = derivative(MATRICES, directions, 1.0, form, method)
    for name, matrix in MATRICES.items():
        want = slope(matrix, directions[name], 1.0, form)
        atol = 2e-5 * np.abs(want).max()
        assert_allclose(found[name], want, atol=atol, err_msg=name)


def test_of_stacked_matrices():
    directions = of_rank(2, 3, 6, 4)
    found = derivative(STACK, directions, 1.0, "hard", "newton_schulz", batch_axes=0)
    want = slope(STACK, directions, 1.0, "hard")
    assert_allclose(found, want, atol=2e-5 * np.abs(want).max())


def test_the_gradient_of_ones_in_numbers():
    """Only the plane of the ones is above: 3 turns into 1, and its slope is 0."""
    clipper = clipx.clip_by_spectral_norm(1.0, method="newton_schulz")
    first_entry = jax.grad(lambda x: clipper.update(x)[0][0, 0])
    grad = jax.jit(first_entry)(jnp.ones((3, 3)))
    # P_11 = 0, P_1j = Q_1j = 1/3, and 1 where nothing was.
    unit, rest = np.full((3, 3), 1 / 3), np.eye(3) - 1 / 3
    first = np.zeros((3, 3))
    first[0, 0] = 1
    want = rest @ first @ rest + (unit @ first @ rest + rest @ first @ unit) / 3
    assert_allclose(grad, want, atol=1e-6)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
def test_backward_is_the_transpose_of_forward(form, method):
    matrix, direction, weight = (of_rank(3, 8, 6) for _ in range(3))
    clipper = clipx.clip_by_spectral_norm(1.0, form=form, method=method)
    product = jax.grad(lambda x: jnp.vdot(jnp.float32(weight), clipper.update(x)[0]))
    grad = jax.jit(product)(jnp.float32(matrix))
    want = np.vdot(weight, slope(matrix, direction, 1.0, form))
    assert np.vdot(grad, direction) == pytest.approx(want, rel=1e-4)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
def test_by_the_limit(form, method):
    matrix = MATRICES["square"]

    def clipped(limit):
        clipper = clipx.clip_by_spectral_norm(limit, form=form, method=method)
        return clipper.update(jnp.float32(matrix))[0]

    _, found = jax.jit(lambda t: jax.jvp(clipped, (t,), (jnp.ones_like(t),)))(
        jnp.float32(1.0)
    )
    ends = [reference(matrix, 1 + h, form) for h in (1e-6, -1e-6)]
    assert_allclose(found, (ends[0] - ends[1]) / 2e-6, atol=2e-5)


def test_at_the_limit_it_is_that_from_below():
    direction = of_rank(3, 3, 3)
    found = derivative(2 * np.eye(3), direction, 2.0, "hard", "newton_schulz")
    assert_allclose(found, direction, atol=1e-6)


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_at_any_magnitude(size):
    matrix, direction = MATRICES["square"], of_rank(8, 8, 8)
    found = derivative(matrix * size, direction, size, "hard", "newton_schulz")
    want = slope(matrix, direction, 1.0, "hard")
    assert_allclose(found, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("form", FORMS)
def test_limits_of_zero_and_infinity(form):
    tree, directions = {"a": of_rank(3, 4, 4), "b": of_rank(3, 4, 4)}, of_rank(3, 4, 4)
    limits = {"a": 0.0, "b": np.inf}
    both = dict.fromkeys("ab", directions)
    found = derivative(tree, both, limits, form, "newton_schulz")
    assert not np.any(found["a"])
    assert_allclose(found["b"], directions, atol=1e-5)


def test_under_vmap():
    matrices, directions = STACK, of_rank(2, 3, 6, 4)
    each = jax.vmap(lambda x, d: derivative(x, d, 1.0, "hard", "newton_schulz"))
    want = slope(matrices, directions, 1.0, "hard")
    assert_allclose(each(matrices, directions), want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("form", FORMS)
def test_a_second_derivative_where_singular_values_differ(form):
    matrix, direction = MATRICES["square"], of_rank(8, 8, 8)
    clipper = clipx.clip_by_spectral_norm(1.0, form=form)

    def first(x):
        return jax.jvp(lambda x: clipper.update(x)[0], (x,), (jnp.float32(direction),))

    pair = jnp.float32(matrix), jnp.float32(direction)
    _, (_, found) = jax.jit(lambda x, d: jax.jvp(first, (x,), (d,)))(*pair)
    ends = [slope(matrix + h * direction, direction, 1.0, form) for h in (1e-4, -1e-4)]
    want = (ends[0] - ends[1]) / 2e-4
    assert_allclose(found, want, atol=1e-3 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["norm", "clipped_norm"])
def test_of_the_metrics(name):
    """The largest singular value is 3: it moves by u'dv before, and not after."""
    matrix = jnp.diag(jnp.array([3.0, 1.5, 0.5]))
    clipper = clipx.clip_by_spectral_norm(2.0)

    def metric(x):
        return getattr(clipper.update(x)[1].metrics, name)

    want = np.zeros((3, 3))
    want[0, 0] = name == "norm"
    assert_allclose(jax.grad(metric)(matrix), want, atol=1e-6)


@pytest.mark.one_in(2, rest="slow")
@pytest.mark.parametrize("kind", [AxisType.Auto, EXPLICIT])
def test_of_a_cut_matrix(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    clipper = clipx.clip_by_spectral_norm(1.0, method="newton_schulz")
    placed = [
        jax.device_put(jnp.float32(x), NamedSharding(mesh, P("x")))
        for x in (MATRICES["wide, rank 3"], of_rank(3, 8, 32))
    ]
    found = jax.jit(lambda x, d: jax.jvp(lambda x: clipper.update(x)[0], (x,), (d,)))(
        *placed
    )[1]
    want = slope(*map(np.float64, placed), 1.0, "hard")
    assert_allclose(found, want, atol=2e-5 * np.abs(want).max())
