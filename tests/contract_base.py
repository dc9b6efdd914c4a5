"""What the cells of the contract matrix share: one small model, and its way by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

RATE = 0.1
SHAPES = {
    "dense": {"kernel": (4, 3), "bias": (3,)},
    "out": {"kernel": (3, 2), "bias": (2,)},
}
SIZES = (1.0, 1.5, 200.0, 0.3)  # of the gradients of the steps; the third is a spike


def draw(seed, size=1.0, dtype=jnp.float32):
    """A tree of the model's shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(size * rng.normal(size=shape), dtype),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def first_params(dtype=jnp.float32):
    """The parameters before the first step."""
    return draw(0, 0.5, dtype)


def gradients(dtype=jnp.float32):
    """The gradients of each step."""
    return [draw(i + 1, size, dtype) for i, size in enumerate(SIZES)]


def stacked(trees):
    """Trees as one, with a leading axis."""
    return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *trees)


def trainer(make, **options):
    """The transformation before plain gradient descent."""
    return optax.chain(make(**options), optax.sgd(RATE))


def train(tx, params, grads, step=None):
    """The parameters after each step, and the last state."""
    step = tx.update if step is None else step
    state, found = tx.init(params), []
    for g in grads:
        updates, state = step(g, state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return found, state


@functools.cache
def by_hand(make):
    """The parameters after each step of the transformation alone."""
    tx = make()
    params, found = first_params(), []
    state, update = tx.init(params), jax.jit(tx.update)
    for g in gradients():
        updates, state = update(g, state, params)
        params = jax.tree.map(lambda p, u: p - RATE * u, params, updates)
        found.append(params)
    return found


def assert_close(found, wanted, rtol=2e-6, atol=1e-6):
    """Both are lists of trees; a spike's step sets what an absolute error may be."""
    found, wanted = list(found), list(wanted)
    assert len(found) == len(wanted)
    for have, want in zip(found, wanted, strict=True):
        assert jax.tree.structure(have) == jax.tree.structure(want)
        for x, y in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            size = np.max(np.abs(y))
            np.testing.assert_allclose(x, y, rtol=rtol, atol=atol + rtol * size)


def same(context):
    """A context whose parameters must be those by hand."""

    def cell(make):
        assert_close(context(make), by_hand(make))

    return cell
