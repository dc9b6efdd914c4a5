"""auto_clip asks for no number: the same at any scale, bounded, never locked out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clipx as clipx

CLIPPER = clipx.auto_clip(nonfinite="zero")


@jax.jit
def run(norms):
    def step(state, norm):
        _, state = CLIPPER.update({"w": norm[None]}, state)
        return state, clipx.metrics(state)["clip/threshold"]

    return jax.lax.scan(step, CLIPPER.init({"w": jnp.ones(1)}), norms)[1]


def limits(norms):
    """The limit at each of the norms, through the clipper itself."""
    return np.asarray(run(jnp.asarray(norms, jnp.float32)))


def noise(steps, spread=0.2, seed=0):
    return np.exp(spread * np.random.default_rng(seed).normal(size=steps))


STEPS = 300


def batches():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(STEPS, 8, 12, 3)), jnp.float32)


def initial():
    """A recurrent network whose gradients explode now and then."""
    rng = np.random.default_rng(1)
    again = 1.2 * np.linalg.qr(rng.normal(size=(8, 8)))[0]
    shapes = {"in": rng.normal(size=(3, 8)) / 2, "out": rng.normal(size=(8, 1))}
    return jax.tree.map(lambda x: jnp.asarray(x, "float32"), shapes | {"again": again})


def gradients(params, x, factor):
    """Of the loss, multiplied by a factor."""

    def loss(params):
        hidden = jnp.zeros((8, 8))
        for t in range(12):
            hidden = jnp.tanh(x[:, t] @ params["in"] + hidden @ params["again"])
        return factor * jnp.mean(((hidden @ params["out"])[:, 0] - x[:, 0, 0]) ** 2)

    return jax.grad(loss)(params)


@functools.partial(jax.jit, static_argnums=1)
def train(factor, of_its_own=True):
    """Clips on the way of a training run, and says by what factors and to where.

    Of its own, or along that of the loss as it is: where trajectories are chaotic, the
    rounding of a factor that is no power of two tells them apart.
    """
    tx = clipx.auto_clip()

    def step(carry, x):
        params, state, reference = carry
        grads = gradients(params, x, factor)
        updates, state = tx.update(grads, state)
        scale = clipx.metrics(state)["clip/scale"]
        direction = jax.tree.map(
            lambda u: u / clipx.measures.tree_norm()(updates), updates
        )
        if of_its_own:
            # The optimizer's own dependence on the unit of the loss is divided out.
            steps = jax.tree.map(lambda u: u / factor, updates)
        else:
            steps, reference = tx.update(gradients(params, x, 1.0), reference)
        params = jax.tree.map(lambda p, u: p - 0.05 * u, params, steps)
        return (params, state, reference), (scale, direction)

    start = initial(), tx.init(initial()), tx.init(initial())
    (params, *_), found = jax.lax.scan(step, start, batches())
    return params, *found


def same(found, wanted):
    (_, scales, directions), (_, want_scales, want_directions) = found, wanted
    assert 0.05 < np.mean(want_scales < 1) < 0.95
    np.testing.assert_allclose(scales, want_scales, rtol=1e-5)
    for key, want in want_directions.items():
        np.testing.assert_allclose(directions[key], want, rtol=0, atol=1e-5)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("power", [-6, -5, -3, -1, 1, 2, 4, 6])
def test_a_loss_in_another_unit_is_clipped_alike(power):
    same(train(np.float32(10.0**power), of_its_own=False), train(np.float32(1.0)))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("power", [-20, -9, 1, 20])
def test_a_run_in_another_unit_goes_the_same_way(power):
    found, wanted = train(np.float32(2.0**power)), train(np.float32(1.0))
    same(found, wanted)
    for key, want in wanted[0].items():
        np.testing.assert_array_equal(found[0][key], want)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("factor", [1e-30, 1e-6, 3e-3, 7.0, 1e6, 1e30])
def test_norms_in_another_unit_change_nothing(factor):
    norms = noise(500, 0.7)
    np.testing.assert_allclose(
        limits(norms * factor) / factor, limits(norms), rtol=1e-5
    )


def test_usual_norms_are_hardly_clipped():
    norms = noise(2000, 0.1)
    assert np.sum(norms > limits(norms)) == 0
    norms[1000] = 3.0
    assert np.sum(norms > limits(norms)) == 1


def test_heavy_tails_are_clipped_often():
    norms = np.random.default_rng(0).pareto(1.0, size=2000) + 0.1
    assert 0.6 < np.mean(norms[50:] > limits(norms)[50:]) < 0.9


def test_most_norms_exceed_the_level():
    norms = noise(20000, 0.7)
    assert 0.05 < np.mean(norms[1000:] <= limits(norms)[1000:] / 2) < 0.07


@pytest.mark.one_in(2)
@pytest.mark.parametrize("place", [1, 5, 40, 200])
def test_a_spike_has_bounded_influence(place):
    norms = noise(300)
    spiked = norms.copy()
    spiked[place] = 1e20
    assert limits(spiked)[place] == limits(norms)[place]
    ratio = limits(spiked)[place + 1] / limits(norms)[place]
    assert 1 < ratio < max(np.exp(0.1 / (place + 2)), 1.002)


@pytest.mark.parametrize(("first", "within"), [(1e-3, 330), (30.0, 40)])
def test_a_first_norm_far_off_is_left_behind(first, within):
    norms = noise(600)
    usual = limits(norms)
    norms[0] = first
    assert 0.5 < limits(norms)[within] / usual[within] < 2


@pytest.mark.parametrize(("level", "within"), [(1e-3, 350), (30.0, 265), (1e6, 460)])
def test_nothing_is_locked_out(level, within):
    norms = noise(3000)
    usual = limits(norms)
    norms[500:] *= level
    ratio = limits(norms) / (usual * level)
    assert 0.5 < ratio[500 + within] < 2
    assert np.all(np.abs(np.log(ratio[2000:])) < 0.3)


def test_an_explosion_does_not_carry_the_limit_along():
    norms = noise(400)
    norms[200:] = np.minimum(norms[200:] * np.exp(0.1 * np.arange(200)), 1e30)
    found = limits(norms)
    assert found[250] / found[200] < 1.12
    assert found[300] / found[200] < 1.4


def test_what_is_not_finite_or_zero_leaves_no_trace():
    norms = noise(100)
    with_faults = np.insert(norms, [10, 20, 30], [np.nan, np.inf, 0.0])
    np.testing.assert_array_equal(limits(with_faults)[-60:], limits(norms)[-60:])


def test_it_takes_no_number():
    for make in (clipx.auto_clip, clipx.thresholds.auto):
        with pytest.raises(TypeError, match="positional arguments"):
            make(1.0)
    with pytest.raises(ValueError, match="scope='layer'"):
        clipx.auto_clip(scope="layer")


def test_each_leaf_by_itself():
    clipper = clipx.auto_clip(scope="leaf")
    grads = {"a": jnp.ones(4), "b": jnp.ones(4)}
    state, update = clipper.init(grads), jax.jit(clipper.update)
    for _ in range(30):
        _, state = update(grads, state)
    clipped, _ = update(grads | {"b": 100 * grads["b"]}, state)
    np.testing.assert_array_equal(clipped["a"], grads["a"])
    assert 1 < np.linalg.norm(clipped["b"]) < 6


def test_in_a_chain_under_jit():
    tx = optax.chain(clipx.auto_clip(), optax.adam(0.1))
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    step = jax.jit(tx.update)
    with jax.numpy_dtype_promotion("standard"):
        for scale in (1.0, 1.0, 1.0, 1e6):
            updates, state = step({"w": jnp.full(3, scale)}, state, params)
    assert clipx.metrics(state)["clip/clipped_norm"] < 4
    assert np.isfinite(updates["w"]).all()
