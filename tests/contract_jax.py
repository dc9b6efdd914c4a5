"""The contract under JAX's transformations, settings and dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract_base import (
    assert_close,
    by_hand,
    first_params,
    gradients,
    same,
    stacked,
    train,
    trainer,
)
from jax import export, lax


def jitted(make):
    tx = trainer(make)
    return train(tx, first_params(), gradients(), jax.jit(tx.update))[0]


def scanned(make):
    tx = trainer(make)

    def body(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    start = (first_params(), tx.init(first_params()))
    _, found = jax.jit(lambda c, g: lax.scan(body, c, g))(start, stacked(gradients()))
    return [jax.tree.map(lambda x, i=i: x[i], found) for i in range(len(gradients()))]


def donated(make):
    tx = trainer(make)

    def body(g, state, params):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(body, donate_argnums=(1, 2))
    params, found = first_params(), []
    state = tx.init(params)
    for g in gradients():
        params, state = step(g, state, params)
        found.append(jax.tree.map(np.asarray, params))
    return found


def strict_promotion(make):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        return train(trainer(make), first_params(), gradients())[0]


def no_nans(make):
    with jax.debug_nans(True):
        return jitted(make)


def without_jit(make):
    with jax.disable_jit():
        return train(trainer(make), first_params(), gradients())[0]


def double(make):
    """Float64 parameters and gradients."""
    with jax.enable_x64(True):
        tx = trainer(make)
        step = jax.jit(tx.update)
        params = first_params(jnp.float64)
        found, state = train(tx, params, gradients(jnp.float64), step)
        kinds = {x.dtype for x in jax.tree.leaves(found)}
        assert kinds == {jnp.dtype("float64")}
        again = tx.update(gradients(jnp.float64)[0], state, params)[1]
        assert jax.tree.map(jax.typeof, again) == jax.tree.map(jax.typeof, state)
    return found


def exported(make):
    """Written to bytes and read back; states travel as lists of their leaves."""
    tx = trainer(make)
    state = tx.init(first_params())
    structure = jax.tree.structure(state)

    def body(grads, leaves, params):
        state = jax.tree.unflatten(structure, leaves)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), jax.tree.leaves(state)

    leaves, params = jax.tree.leaves(state), first_params()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTAX_CLIPX_TAP", "off")  # callbacks cannot be exported
        program = export.export(jax.jit(body))(gradients()[0], leaves, params)
    program = export.deserialize(program.serialize())
    found = []
    for g in gradients():
        params, leaves = program.call(g, leaves, params)
        found.append(params)
    return found


def ensemble(make):
    """Three models at once, with gradients of other sizes."""
    tx = trainer(make)
    sizes = jnp.array([0.01, 1.0, 100.0])

    def run(size, step):
        params = first_params()
        grads = [jax.tree.map(lambda x: x * size, g) for g in gradients()]
        return train(tx, params, grads, step)[0]

    together = jax.jit(jax.vmap(lambda size: run(size, None)))(sizes)
    for i, size in enumerate(sizes):
        one = [jax.tree.map(lambda x, i=i: x[i], tree) for tree in together]
        assert_close(one, run(size, jax.jit(tx.update)))


def by_pmap(make):
    """Each device has gradients of other examples; their mean is clipped."""
    count = 8

    def body(grads, state, params):
        mean = lax.pmean(grads, "devices")
        updates, state = tx.update(mean, state, params)
        return optax.apply_updates(params, updates), state

    tx = trainer(make, axis_name=())
    step = jax.pmap(body, axis_name="devices")

    def copies(tree):
        return jax.tree.map(lambda x: jnp.stack([x] * count), tree)

    shares = jnp.arange(1, count + 1) * 2 / (count + 1)  # their mean is 1
    params, found = copies(first_params()), []
    state = copies(tx.init(first_params()))
    for g in gradients():
        spread = jax.tree.map(lambda x: jnp.stack([x * s for s in shares]), g)
        params, state = step(spread, state, params)
        found.append(jax.tree.map(lambda x: x[3], params))
    assert_close(found, by_hand(make))


def differentiated(make):
    """The derivative of a step by what scales the gradients: a finite number."""
    tx = make()
    params = first_params()
    state = tx.init(params)
    _, state = tx.update(gradients()[0], state, params)

    def size(scale):
        scaled = jax.tree.map(lambda g: g * scale, gradients()[1])
        updates, _ = tx.update(scaled, state, params)
        return optax.tree.vdot(updates, params)

    found = jax.jit(jax.grad(size))(jnp.float32(1))
    assert np.isfinite(found)
    step = 1e-3
    slope = (size(jnp.float32(1 + step)) - size(jnp.float32(1 - step))) / (2 * step)
    np.testing.assert_allclose(found, slope, rtol=0.05, atol=2e-3)


def narrow(dtype):
    """Parameters in float32, gradients in less: as in float32, but rounded."""

    def cell(make):
        tx, alone = trainer(make), trainer(make)
        params = wanted = first_params()
        state, exact = tx.init(params), alone.init(params)
        kinds = jax.tree.map(jax.typeof, state)
        step = jax.jit(tx.update)
        eps = 2 * float(jnp.finfo(dtype).eps)
        for g in gradients(dtype):
            updates, state = step(g, state, params)
            # Optax's momentum and weight decay take over the dtype of the parameters.
            dtypes = {u.dtype for u in jax.tree.leaves(updates)}
            assert dtypes in ({jnp.dtype(dtype)}, {jnp.dtype("float32")})
            params = optax.apply_updates(params, updates)
            wide = jax.tree.map(lambda x: x.astype(jnp.float32), g)
            updates, exact = alone.update(wide, exact, wanted)
            wanted = optax.apply_updates(wanted, updates)
            assert_close([params], [wanted], rtol=eps, atol=eps)
        assert jax.tree.map(jax.typeof, state) == kinds

    return cell


def loss_scaled(make):
    """Scaled float16 gradients; if they overflow, half the scale and no step.

    The spike overflows once.
    """
    tx = trainer(make)

    @jax.jit
    def step(grads, scale, state, params):
        half = jax.tree.map(lambda g: (g * scale).astype(jnp.float16), grads)
        unscaled = jax.tree.map(lambda g: g.astype(jnp.float32) / scale, half)
        finite = optax.tree.norm(unscaled, ord=jnp.inf) < jnp.inf
        updates, new = tx.update(unscaled, state, params)
        moved = optax.apply_updates(params, updates)
        params, state = jax.tree.map(
            lambda x, y: jnp.where(finite, x, y), (moved, new), (params, state)
        )
        return params, state, jnp.where(finite, scale, scale / 2), unscaled, finite

    scale, params = jnp.float32(256.0), first_params()
    state, left_out = tx.init(params), 0
    wanted, alone = params, trainer(make)
    exact = alone.init(params)
    for g in gradients():
        params, state, scale, unscaled, finite = step(g, scale, state, params)
        left_out += int(not finite)
        if finite:
            updates, exact = alone.update(unscaled, exact, wanted)
            wanted = optax.apply_updates(wanted, updates)
        assert_close([params], [wanted])
    assert left_out == 1
    for x in jax.tree.leaves(state):
        assert not jnp.issubdtype(x.dtype, jnp.floating) or not np.isnan(x).any()


JAX = {
    "jit": same(jitted),
    "scan": same(scanned),
    "vmap": ensemble,
    "pmap": by_pmap,
    "grad": differentiated,
    "x64": same(double),
    "strict promotion": same(strict_promotion),
    "debug_nans": same(no_nans),
    "disable_jit": same(without_jit),
    "donated": same(donated),
    "jax.export": same(exported),
    "bfloat16": narrow(jnp.bfloat16),
    "float16": narrow(jnp.float16),
    "float16, scaled loss": loss_scaled,
}
