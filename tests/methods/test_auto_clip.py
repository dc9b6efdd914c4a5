"""auto_clip asks for no number: the same at any scale, bounded, never locked out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clipx as clipx

CLIPPER = clipx.auto_clip(nonfinite="zero")


@functools.partial(jax.jit, static_argnums=1)
def run(norms, what="threshold"):
    def step(state, norm):
        _, state = CLIPPER.update({"w": norm[None]}, state)
        return state, clipx.metrics(state)[f"clip/{what}"]

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
    assert np.mean(want_scales < 1) > 0.95
    assert np.min(want_scales) < 0.2
    np.testing.assert_allclose(scales, want_scales, rtol=1e-5)
    for key, want in want_directions.items():
        np.testing.assert_allclose(directions[key], want, rtol=0, atol=1e-5)


@pytest.mark.one_in(4, rest="slow")
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


def clipped(norms):
    """The norms after clipping."""
    return np.asarray(run(jnp.asarray(norms, jnp.float32), "clipped_norm"))


def test_the_threshold_rises_to_four_fifths_of_the_first_norms():
    found = limits(np.full(200, 5.0))
    np.testing.assert_allclose(found[0], 5 * 0.8 * 0.307, rtol=1e-6)
    np.testing.assert_allclose(found[49], 5 * 0.8 * 0.65, rtol=1e-6)
    np.testing.assert_allclose(found[99:], 5 * 0.8, rtol=1e-6)


def test_above_an_eighth_of_the_threshold_a_norm_grows_as_its_logarithm():
    after = clipped([*np.full(100, 1.0), 0.09, 0.1, 0.2, 1.0, 50.0, 1e4, 1e30])[100:]
    want = [0.09, 0.1, 0.1693147, 0.3302585, 0.7214608, 0.8, 0.8]
    np.testing.assert_allclose(after, want, rtol=1e-5)


def test_tiny_norms_are_not_lost():
    norms = np.full(10, 1.5e-37)
    np.testing.assert_allclose(
        clipped(norms) / 1e-37, clipped(norms / 1e-37), rtol=1e-4
    )


def test_the_unit_is_the_lower_median_of_the_first_ten_norms():
    first = [3.0, 1.0, 10.0, 2.0, 9.0, 8.0, 5.0, 7.0, 4.0, 6.0]
    ramp = 0.8 * (0.3 + 0.007 * np.arange(1, 11))
    want = [3, 1, 3, 2, 3, 3, 5, 5, 5, 5]
    np.testing.assert_allclose(limits(first) / ramp, want, rtol=1e-5)
    np.testing.assert_allclose(limits([*first, *np.full(200, 5.0)])[-1], 4, rtol=1e-5)


def test_norms_that_rise_do_not_raise_it():
    norms = noise(600)
    norms[200:] *= np.minimum(np.exp(0.1 * np.arange(400)), 20)
    found = limits(norms)
    np.testing.assert_array_equal(found[100:], found[100])


@pytest.mark.parametrize(("fall", "within"), [(100.0, 470), (1e4, 935)])
def test_norms_that_fall_bring_it_down(fall, within):
    norms = np.full(1500, 1.0)
    norms[200:] /= fall
    found = limits(norms)
    assert found[200] == found[199]
    np.testing.assert_allclose(found[200 + within :], 8 / fall, rtol=0.05)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("place", [0, 1, 5, 9, 40, 200])
def test_a_spike_has_bounded_influence(place):
    norms = noise(300)
    spiked = norms.copy()
    spiked[place] = 1e20
    if place:
        assert limits(spiked)[place] <= 1.3 * limits(norms)[place]
        assert clipped(spiked)[place] <= 1.1
    if place >= 10:
        np.testing.assert_array_equal(limits(spiked), limits(norms))
    else:
        np.testing.assert_allclose(limits(spiked)[20:], limits(norms)[20:], rtol=0.15)


@pytest.mark.parametrize(("level", "place"), [(1e3, 5), (1e3, 500), (1e6, 500)])
def test_nothing_is_locked_out(level, place):
    norms = noise(1000)
    usual = limits(norms)[-1]
    norms[place:] *= level
    found = limits(norms)
    assert 0.7 < found[place + 160] / (usual * level) < 1.4
    np.testing.assert_array_equal(found[place + 160 :], found[-1])


def test_an_explosion_of_fifty_steps_does_not_raise_it():
    norms = noise(400)
    norms[200:249] *= 1e6
    np.testing.assert_array_equal(limits(norms)[100:], limits(norms)[100])


def test_what_is_not_finite_or_zero_leaves_no_trace():
    norms = noise(100)
    with_faults = np.insert(norms, [10, 20, 30], [np.nan, np.inf, 0.0])
    np.testing.assert_array_equal(limits(with_faults)[-60:], limits(norms)[-60:])


def test_it_takes_no_number():
    for make in (clipx.auto_clip, clipx.thresholds.auto):
        with pytest.raises(TypeError, match="positional argument"):
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
    usual, _ = update(grads, state)
    np.testing.assert_array_equal(clipped["a"], usual["a"])
    assert 0.5 < np.linalg.norm(clipped["b"]) < 0.9


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
