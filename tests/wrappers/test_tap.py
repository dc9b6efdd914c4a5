"""`tap`: what a sink is called with, step by step."""

import gc
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clipx as clipx

GRADS = jnp.array([3.0, 4.0])  # of norm 5


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax's optimizers rely on it
        yield


def optimizer():
    return optax.chain(clipx.clip_by_global_norm(1.0), optax.sgd(0.1))


class Seen(list):
    """A sink that keeps step and norm."""

    def __call__(self, step, metrics):
        super().append((step, np.asarray(metrics["clip/norm"]).tolist()))


def train(tx, steps, grads=GRADS, state=None, wrap=jax.jit):
    """The state after some steps whose gradient grows by itself each time."""
    update = wrap(tx.update)
    first = tx.init(grads) if state is None else state
    for i in range(steps):
        _, first = update(grads * (i + 1), first)
    return first


@pytest.mark.parametrize("wrap", [jax.jit, lambda update: update])
def test_each_step_is_reported_once_and_in_order(wrap):
    seen = Seen()
    train(clipx.tap(optimizer(), seen), 4, wrap=wrap)
    clipx.flush_taps()
    assert seen == [(0, 5.0), (1, 10.0), (2, 15.0), (3, 20.0)]


@pytest.mark.parametrize("wrap", [jax.jit, lambda update: update])
def test_every_third_step(wrap):
    seen = Seen()
    train(clipx.tap(optimizer(), seen, every=np.int64(3)), 8, wrap=wrap)
    clipx.flush_taps()
    assert seen == [(0, 5.0), (3, 20.0), (6, 35.0)]


def test_updates_are_those_without_it():
    tx, tapped = optimizer(), clipx.tap(optimizer(), Seen())
    want, _ = jax.jit(tx.update)(GRADS, tx.init(GRADS))
    got, _ = jax.jit(tapped.update)(GRADS, tapped.init(GRADS))
    np.testing.assert_array_equal(got, want)


def test_the_sink_has_numbers_of_python():
    seen = []
    tx = clipx.tap(clipx.clip_by_global_norm(2.0), lambda *both: seen.append(both))
    train(tx, 1)
    clipx.flush_taps()
    ((step, metrics),) = seen
    assert type(step) is int
    assert metrics == {
        "clip/norm": 5.0,
        "clip/clipped_norm": 2.0,
        "clip/scale": pytest.approx(0.4),
        "clip/threshold": 2.0,
        "clip/clipped": 1.0,
        "clip/nonfinite": False,
        "clip/steps": 1,
        "clip/num_clipped": 1,
        "clip/num_nonfinite": 0,
    }
    kinds = {type(x) for x in metrics.values()}
    assert kinds == {float, bool, int}


def test_what_wrappers_measure_is_reported_too():
    seen = []
    inner = clipx.skip_spikes(clipx.track_norms(optimizer()))
    tx = clipx.tap(inner, lambda step, metrics: seen.append(metrics))
    params = {"w": GRADS}
    jax.jit(tx.update)(params, tx.init(params), params)
    clipx.flush_taps()
    assert seen[0]["track_norms/w"] == 5.0
    assert seen[0]["skip/skipped"] is False


def test_a_nan_arrives_as_one():
    seen = Seen()
    train(clipx.tap(optimizer(), seen), 1, jnp.array([jnp.nan, 1.0]))
    clipx.flush_taps()
    assert np.isnan(seen[0][1])


def test_inside_a_scan_whose_state_is_dropped():
    """As in trainers that return the parameters alone."""
    seen = Seen()
    tx = clipx.tap(optimizer(), seen)

    @jax.jit
    def train(params):
        def step(carry, i):
            params, state = carry
            updates, state = tx.update(GRADS * i, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = (params, tx.init(params))
        return jax.lax.scan(step, start, jnp.arange(1.0, 6.0))[0][0]

    train(GRADS)
    clipx.flush_taps()
    assert seen == [(0, 5.0), (1, 10.0), (2, 15.0), (3, 20.0), (4, 25.0)]


@pytest.mark.parametrize("every", [1, 2])
def test_four_seeds_are_one_report(every):
    seen = Seen()
    tx = clipx.tap(optimizer(), seen, every=every)
    grads = jnp.outer(jnp.arange(1.0, 5.0), GRADS)
    state = jax.vmap(tx.init)(grads)
    update = jax.jit(jax.vmap(tx.update))
    for _ in range(3):
        _, state = update(grads, state)
    clipx.flush_taps()
    norms = [5.0, 10.0, 15.0, 20.0]
    assert seen == [(step, norms) for step in range(0, 3, every)]


def test_seeds_within_seeds_and_a_scan():
    seen = Seen()
    tx = clipx.tap(optimizer(), seen, every=2)

    def train(grads):
        def step(state, _):
            return tx.update(grads, state)[1], None

        return jax.lax.scan(step, tx.init(grads), None, length=3)[0]

    grads = jnp.outer(jnp.arange(1.0, 5.0), GRADS).reshape(2, 2, 2)
    jax.jit(jax.vmap(jax.vmap(train)))(grads)
    clipx.flush_taps()
    norms = [[5.0, 10.0], [15.0, 20.0]]
    assert seen == [(0, norms), (2, norms)]


def test_seeds_that_stop_early_do_not_stop_the_others():
    seen = Seen()
    tx = clipx.tap(optimizer(), seen)

    def train(steps):
        def step(carry):
            i, state = carry
            return i + 1, tx.update(GRADS, state)[1]

        start = (jnp.int32(0), tx.init(GRADS))
        return jax.lax.while_loop(lambda carry: carry[0] < steps, step, start)[1]

    jax.jit(jax.vmap(train))(jnp.array([1, 3]))
    clipx.flush_taps()
    assert [step for step, _ in seen] == [0, 1, 2]


def test_a_derivative_through_updates_is_right_and_reported_once():
    seen = Seen()
    tx, bare = clipx.tap(optimizer(), seen), optimizer()

    def squares(tx, grads):
        updates, _ = tx.update(grads, tx.init(grads))
        return jnp.sum(updates**2) + jnp.sum(updates)

    def derivative(tx):
        return jax.jit(jax.grad(lambda grads: squares(tx, grads)))(GRADS)

    np.testing.assert_array_equal(derivative(tx), derivative(bare))
    clipx.flush_taps()
    assert seen == [(0, 5.0)]


def test_an_older_state_is_reported_again():
    seen = Seen()
    tx = clipx.tap(optimizer(), seen)
    early = train(tx, 2)
    train(tx, 2, state=early)
    train(tx, 1, state=early)
    clipx.flush_taps()
    assert [step for step, _ in seen] == [0, 1, 2, 3, 2]


def test_two_taps_are_not_confused():
    first, second = Seen(), Seen()
    inner = optax.chain(clipx.tap(clipx.clip_by_global_norm(1.0), first))
    train(clipx.tap(optax.chain(inner, clipx.clip(0.1)), second, every=2), 3)
    train(clipx.tap(optimizer(), second), 1)
    clipx.flush_taps()
    assert [step for step, _ in first] == [0, 1, 2]


def test_programs_go_the_quick_way():
    """JAX calls programs with effects through Python, array by array."""
    tx = clipx.tap(optimizer(), Seen(), every=10)
    assert not jax.make_jaxpr(tx.update)(GRADS, tx.init(GRADS)).effects


def test_off_by_the_environment(monkeypatch):
    seen = Seen()
    on = train(clipx.tap(optimizer(), seen), 1)
    clipx.flush_taps()
    monkeypatch.setenv("OPTAX_CLIPX_TAP", "off")
    off = train(clipx.tap(optimizer(), seen), 3)
    clipx.flush_taps()
    assert seen == [(0, 5.0)]
    assert jax.tree.map(jnp.shape, off) == jax.tree.map(jnp.shape, on)
    assert int(off.tapped) == 3


def test_the_environment_is_read_strictly(monkeypatch):
    tx = clipx.tap(optimizer(), Seen())
    monkeypatch.setenv("OPTAX_CLIPX_TAP", "of")
    with pytest.raises(ValueError, match="to be 'on' or 'off', got 'of'"):
        tx.update(GRADS, tx.init(GRADS))


def test_nothing_is_left_of_a_tap():
    seen = Seen()
    tx = clipx.tap(optimizer(), seen)
    train(tx, 2)
    clipx.flush_taps()
    alive = weakref.ref(seen)
    del tx, seen
    time.sleep(0.6)  # the thread ends
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: clipx.tap(optimizer(), 3), TypeError, "sink to be a function of step"),
        (lambda: clipx.tap(optimizer(), []), TypeError, r"got sink=\[\]"),
        (lambda: clipx.tap(optimizer(), lambda m: 0), TypeError, "of step and metrics"),
        (lambda: clipx.tap(optimizer(), print, every=0), ValueError, "every >= 1"),
        (lambda: clipx.tap(optimizer(), print, every=2.0), TypeError, "to be an int"),
        (
            lambda: clipx.tap(optax.adam(0.1), print).init(GRADS),
            ValueError,
            "with an optax_clipx clipper that keeps metrics",
        ),
        (
            lambda: clipx.tap(optimizer(), print).update(GRADS, ()),
            TypeError,
            "Expected the TapState",
        ),
    ],
)
def test_errors_say_what_to_pass(make, error, message):
    with pytest.raises(error, match=message):
        make()
