"""Clipping inside of the backward pass: against a reverse pass written by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings, strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_clipx as clipx
from optax_clipx.backward import clip_norm, clip_value, zero_nonfinite

STEPS, INPUTS, HIDDEN = 8, 3, 5


def cotangent(identity, ct, *limits):
    """What an identity function makes of a cotangent."""
    x = jax.tree.map(jnp.zeros_like, ct)
    return jax.vjp(lambda x: identity(x, *limits), x)[1](ct)[0]


# A recurrent network, h <- tanh(W h + U x + b), loss the sum of c h over the steps.


def problem():
    rng = np.random.default_rng(0)
    params = {
        "W": rng.normal(size=(HIDDEN, HIDDEN)),
        "U": rng.normal(size=(HIDDEN, INPUTS)),
        "b": rng.normal(size=HIDDEN),
    }
    inputs = 0.3 * rng.normal(size=(STEPS, INPUTS))
    weights = rng.normal(size=(STEPS, HIDDEN))
    return params, inputs, weights


def by_hand(params, inputs, weights, clip, truncated=None):
    """Gradients by a loop over the steps from the last to the first, in float64."""
    states = [np.zeros(HIDDEN)]
    for x in inputs:
        states.append(np.tanh(params["W"] @ states[-1] + params["U"] @ x + params["b"]))
    grads = {name: np.zeros_like(p) for name, p in params.items()}
    from_later = np.zeros(HIDDEN)
    for t in reversed(range(STEPS)):
        if truncated and (t + 1) % truncated == 0:
            from_later = np.zeros(HIDDEN)
        by_state = clip(weights[t] + from_later)
        by_sum = by_state * (1 - states[t + 1] ** 2)
        grads["W"] += np.outer(by_sum, states[t])
        grads["U"] += np.outer(by_sum, inputs[t])
        grads["b"] += by_sum
        from_later = params["W"].T @ by_sum
    return grads


def loss(params, inputs, weights, clip, loop="scan", truncated=None, remat=False):
    def step(state, now):
        t, x, weight = now
        if truncated:
            state = jnp.where(t % truncated == 0, lax.stop_gradient(state), state)
        state = jnp.tanh(params["W"] @ state + params["U"] @ x + params["b"])
        state = clip(state)
        return state, jnp.vdot(weight, state)

    step = jax.checkpoint(step) if remat else step
    start = 0 * params["b"] + 0 * inputs[0, 0]
    now = (jnp.arange(STEPS), inputs, weights)
    if loop == "scan":
        return jnp.sum(lax.scan(step, start, now)[1])
    total, state = 0.0, start
    for t in range(STEPS):
        state, part = step(state, jax.tree.map(lambda x, t=t: x[t], now))
        total = total + part
    return total


CLIPS = {
    "value": (lambda g: np.clip(g, -0.4, 0.3), lambda h: clip_value(h, -0.4, 0.3)),
    "norm": (lambda g: reference.rescale([g], 0.7)[0], lambda h: clip_norm(h, 0.7)),
    "norm_inf": (
        lambda g: reference.rescale([g], 0.5, ord=np.inf)[0],
        lambda h: clip_norm(h, 0.5, ord=np.inf),
    ),
}
every_clip = pytest.mark.parametrize("name", CLIPS)


@pytest.mark.one_in(10)
@every_clip
@pytest.mark.parametrize(
    ("wrap", "options"),
    [
        (lambda f: f, {}),
        (jax.jit, {}),
        (jax.jit, {"loop": "python"}),
        (jax.jit, {"truncated": 4}),
        (jax.jit, {"remat": True, "truncated": 3}),
    ],
    ids=["eager", "jit", "python loop", "truncated", "remat"],
)
def test_equals_a_reverse_pass_with_clamps_in_it(name, options, wrap):
    by_numpy, clip = CLIPS[name]
    args = problem()
    want = by_hand(*args, by_numpy, options.get("truncated"))
    unclipped = by_hand(*args, lambda g: g, options.get("truncated"))
    with jax.enable_x64(True):
        args64 = jax.tree.map(jnp.asarray, args)
        found = wrap(jax.grad(lambda p, *a: loss(p, *a, clip, **options)))(*args64)
    args32 = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), args)
    found32 = wrap(jax.grad(lambda p, *a: loss(p, *a, clip, **options)))(*args32)
    for key, exact in want.items():
        np.testing.assert_allclose(found[key], exact, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(found32[key], exact, atol=1e-6 * np.abs(exact).max())
        assert np.abs(exact - unclipped[key]).max() > 0.1  # it did clip


def test_the_value_is_the_argument_itself():
    tree = {"a": jnp.array([1.0, jnp.nan]), "n": None, "i": jnp.arange(3)}
    for found in (
        clip_value(tree, -1, 1),
        jax.jit(clip_norm)(tree, 1.0),
        zero_nonfinite(tree),
    ):
        chex.assert_trees_all_equal(found, tree)


@every_clip
def test_vmap_clips_each_by_itself(name):
    by_numpy, clip = CLIPS[name]
    cts = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    found = jax.jit(jax.vmap(lambda ct: cotangent(clip, ct)))(cts)
    np.testing.assert_allclose(found, [by_numpy(ct) for ct in cts], rtol=1e-6)


@pytest.mark.parametrize("batch_axes", [0, (0, 2), lambda path, leaf: 0])
def test_norm_of_each_example(batch_axes):
    ct = np.random.default_rng(1).normal(size=(4, 5, 3)).astype(np.float32)
    clip = lambda x: clip_norm(x, 0.7, batch_axes=batch_axes)  # noqa: E731
    found = jax.jit(lambda ct: cotangent(clip, ct))(ct)
    reduced = (1,) if batch_axes == (0, 2) else (1, 2)
    norms = reference.unit_norms(ct, reduced)
    np.testing.assert_allclose(found, ct * np.minimum(1, 0.7 / norms), rtol=1e-6)


def test_each_array_of_a_pytree_has_a_norm_of_its_own():
    ct = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.3]), "c": jnp.array([30.0])}
    limits = {"a": 1.0, "b": 1.0, "c": 2.0}
    found = jax.jit(lambda ct: cotangent(clip_norm, ct, limits))(ct)
    want = {"a": jnp.array([0.6, 0.8]), "b": jnp.array([0.3]), "c": jnp.array([2.0])}
    chex.assert_trees_all_close(found, want, rtol=1e-6)


def test_limits_may_be_traced_and_have_no_gradient():
    weight = jnp.array([3.0, 4.0])

    @jax.jit
    def fun(h, limit, low):
        clipped = clip_value(clip_norm(h, limit), low, 0.9)
        return jnp.vdot(weight, clipped) * limit

    grads = jax.grad(fun, (0, 1, 2))(jnp.ones(2), jnp.float32(2.0), jnp.float32(0.0))
    np.testing.assert_allclose(grads[0], [0.9, 0.9], rtol=1e-6)
    np.testing.assert_allclose(grads[1], 7.0, rtol=1e-6)  # of the product alone
    assert float(grads[2]) == 0
    chex.clear_trace_counter()
    counted = jax.jit(chex.assert_max_traces(lambda *a: jax.grad(fun)(*a), n=1))
    for limit in (0.5, 1.0, 7.0):
        counted(jnp.ones(2), jnp.float32(limit), jnp.float32(-0.1))


# The edge-case table, for the cotangent.

SHAPED = {"w": np.array([[3.0, 4.0], [1.0, 2.0]], np.float32)}


def both(fun):
    return pytest.mark.parametrize(
        "wrap", [lambda f: f, jax.jit], ids=["eager", "jit"]
    )(fun)


@pytest.mark.one_in(2)
@both
@pytest.mark.parametrize("limit", [0.0, 1.0, np.inf])
def test_zero_stays_zero(wrap, limit):
    zeros = jax.tree.map(jnp.zeros_like, SHAPED)
    found = wrap(lambda ct: cotangent(clip_norm, ct, limit))(zeros)
    chex.assert_trees_all_equal(found, zeros)


@both
def test_a_gradient_through_the_clip_at_zero_is_finite(wrap):
    def fun(scale):
        grads = jax.grad(lambda h: scale * jnp.sum(clip_norm(h, 1.0)))(jnp.ones(3))
        return jnp.sum(grads)

    np.testing.assert_allclose(wrap(jax.grad(fun))(0.0), 3.0)


@pytest.mark.one_in(2)
@both
@pytest.mark.parametrize("limit", [1e3, np.inf])
def test_below_the_limit_nothing_changes_bit_for_bit(wrap, limit):
    ct = {**SHAPED, "subnormal": np.full(2, 1e-40, np.float32)}
    found = wrap(lambda ct: cotangent(clip_norm, ct, limit))(ct)
    for key, value in ct.items():
        assert np.asarray(found[key]).tobytes() == value.tobytes()
    found = wrap(lambda ct: cotangent(clip_value, ct, -limit, limit))(SHAPED)
    assert np.asarray(found["w"]).tobytes() == SHAPED["w"].tobytes()


@both
def test_a_limit_of_zero_gives_zeros(wrap):
    for identity, limits in ((clip_norm, (0.0,)), (clip_value, (0.0, 0.0))):
        found = wrap(lambda ct, i=identity, t=limits: cotangent(i, ct, *t))(SHAPED)
        assert not np.any(found["w"])


@pytest.mark.one_in(10)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("policy", ["propagate", "zero", "sanitize", "raise"])
def test_a_cotangent_that_is_not_finite(policy, bad):
    ct = {"a": jnp.array([1.0, bad, 2.0]), "b": jnp.ones(2)}

    def found():
        return cotangent(lambda x: clip_norm(x, 1.0, nonfinite=policy), ct)

    if policy == "raise":
        with pytest.raises(FloatingPointError, match=r"at: a\."):
            found()
    elif policy == "propagate":
        assert all(np.all(np.isnan(x)) for x in jax.tree.leaves(found()))
    elif policy == "zero":
        assert not any(np.any(x) for x in jax.tree.leaves(found()))
    else:
        clean = jax.tree.map(jnp.nan_to_num, ct)
        want, _ = clipx.functional.clip_by_leaf_norm(clean, 1.0)
        chex.assert_trees_all_close(found(), want, rtol=1e-6)


def test_the_clamp_keeps_a_nan_in_its_entry():
    ct = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.5])
    np.testing.assert_array_equal(
        cotangent(clip_value, ct, -1, 1), [np.nan, 1, -1, 0.5]
    )


@both
def test_zero_nonfinite(wrap):
    ct = {
        "a": jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.5, 1e-40]),
        "c": jnp.array([complex(np.nan, 1), 1j], jnp.complex64),
    }
    found = wrap(lambda ct: cotangent(zero_nonfinite, ct))(ct)
    np.testing.assert_array_equal(found["a"], np.float32([0, 0, 0, 0.5, 1e-40]))
    np.testing.assert_array_equal(found["c"], [0, 1j])


@pytest.mark.parametrize("bad", [-1.0, np.nan])
def test_unusable_traced_limits_make_everything_nan(bad):
    found = jax.jit(lambda ct, t: cotangent(clip_norm, ct, t))(SHAPED, jnp.float32(bad))
    assert np.all(np.isnan(found["w"]))
    found = jax.jit(lambda ct, t: cotangent(clip_value, ct, t, -2.0))(
        SHAPED, jnp.float32(bad)
    )
    assert np.all(np.isnan(found["w"]))


def test_what_is_no_floating_point_array_passes_through():
    def fun(tree):
        tree = clip_norm(clip_value(zero_nonfinite(tree), -1, 1), 1.0)
        return jnp.sum(tree["a"]) + jnp.sum(tree["i"].astype(jnp.float32))

    tree = {"a": jnp.ones(4), "i": jnp.arange(3), "n": None, "e": jnp.zeros((0, 2))}
    found = jax.grad(fun, allow_int=True)(tree)
    np.testing.assert_allclose(found["a"], 0.5, rtol=1e-6)
    assert found["i"].dtype == jax.dtypes.float0
    assert found["e"].shape == (0, 2)
    for nothing in ({}, None, []):
        assert clip_norm(clip_value(zero_nonfinite(nothing), -1, 1), 1.0) == nothing


def test_complex_cotangents_keep_their_phase():
    ct = jnp.array([3 + 4j, 0j], jnp.complex64)
    np.testing.assert_allclose(cotangent(clip_norm, ct, 1.0), [0.6 + 0.8j, 0])
    with pytest.raises(TypeError, match="magnitudes"):
        cotangent(clip_value, ct, -1.0, 1.0)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_are_kept_whatever_the_limits(dtype):
    with jax.enable_x64(dtype == "float64"):
        ct = jnp.asarray([3.0, 4.0], dtype)
        for limit in (1, 0.5, jnp.float32(0.5), np.float64(0.5), jnp.bfloat16(0.5)):
            for found in (
                cotangent(clip_norm, ct, limit),
                cotangent(clip_value, ct, 0, limit),
            ):
                assert found.dtype == jnp.dtype(dtype)
                assert float(jnp.max(found)) <= float(limit)


@settings(max_examples=300, deadline=None)
@given(
    st.floats(-37.8, 38.0),
    st.floats(-0.1, 30.0),
    st.integers(0, 2**32 - 1),
)
def test_any_magnitude(decade, above, seed):
    rng = np.random.default_rng(seed)
    ct = np.clip(rng.uniform(0.1, 1, 7) * 10.0**decade, 1.2e-38, 3e38)
    ct = ct.astype(np.float32)
    true = float(reference.norm([ct]))
    limit = np.float32(np.clip(true * 10.0**-above, 1.2e-30, 3e38))
    found = np.asarray(clip_any(ct, limit), np.float64)
    want = reference.rescale([ct], limit)[0].astype(np.float64)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-37)
    if true > limit:
        assert float(reference.norm([found])) <= limit * (1 + 1e-6)


clip_any = jax.jit(lambda ct, limit: cotangent(clip_norm, ct, limit))


# Derivatives of what was clipped.


def test_forward_mode_is_refused():
    for identity in (
        zero_nonfinite,
        lambda x: clip_norm(x, 1.0),
        lambda x: clip_value(x, -1, 1),
    ):
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(identity, (jnp.ones(2),), (jnp.ones(2),))


@pytest.mark.parametrize("over", [jax.jacfwd, jax.jacrev])
def test_second_derivatives_are_those_of_the_clipped_gradient(over):
    with jax.enable_x64(True):
        x = jnp.array([0.1, 0.5, 1.4])

        def fun(identity):
            return lambda x: jnp.sum(jnp.sin(2 * identity(x)))

        value = jax.jit(jax.grad(fun(lambda x: clip_value(x, -0.9, 0.9))))
        plain = 2 * np.cos(2 * np.asarray(x))
        np.testing.assert_allclose(value(x), np.clip(plain, -0.9, 0.9))
        inside = np.abs(plain) < 0.9
        want = np.diag(np.where(inside, -4 * np.sin(2 * np.asarray(x)), 0))
        # The clamp acts on the cotangent, whose derivative by x is a diagonal matrix.
        np.testing.assert_allclose(jax.jit(over(value))(x), want, atol=1e-12)
        norm = jax.jit(jax.grad(fun(lambda x: clip_norm(x, 0.5))))
        steps = 1e-6 * np.eye(3)
        numeric = [(norm(x + step) - norm(x - step)) / 2e-6 for step in steps]
        got = jax.jit(over(norm))(x)
        np.testing.assert_allclose(got, np.stack(numeric, 1), atol=1e-8)


# On meshes.

ARRAY = np.random.default_rng(3).normal(size=(8, 4)).astype(np.float32)


def objective(x, **options):
    return jnp.sum(jnp.sin(clip_norm(jnp.tanh(x), 0.7, **options)))


def mesh(kind):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("options", [{}, {"batch_axes": 0}])
def test_the_norm_is_that_of_a_sharded_array_under_jit(kind, options):
    want = jax.grad(lambda x: objective(x, **options))(ARRAY)
    sharding = NamedSharding(mesh(kind), P("x", "y"))
    x = jax.device_put(ARRAY, sharding)
    found = jax.jit(jax.grad(lambda x: objective(x, **options)))(x)
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-7)
    assert found.sharding == sharding


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("check_vma", "options"),
    [
        (True, {}),
        (True, {"batch_axes": 0, "specs": P("x", "y")}),
        (False, {"axis_name": ("x", "y")}),
        (False, {"specs": P("x", "y")}),
        (False, {"batch_axes": 0, "specs": P("x", "y")}),
    ],
    ids=str,
)
def test_the_norm_is_that_of_a_sharded_array_in_shard_map(check_vma, options):
    alone = {k: v for k, v in options.items() if k == "batch_axes"}
    want = jax.grad(lambda x: objective(x, **alone))(ARRAY)
    step = jax.shard_map(
        jax.grad(lambda x: objective(x, **options)),
        mesh=mesh(AxisType.Auto),
        in_specs=P("x", "y"),
        out_specs=P("x", "y"),
        check_vma=check_vma,
    )
    np.testing.assert_allclose(jax.jit(step)(ARRAY), want, rtol=1e-6, atol=1e-7)


def test_where_types_are_blind_it_asks():
    step = jax.shard_map(
        jax.grad(objective),
        mesh=mesh(AxisType.Auto),
        in_specs=P("x", "y"),
        out_specs=P("x", "y"),
        check_vma=False,
    )
    with pytest.raises(ValueError, match="axis_name="):
        step(ARRAY)


def test_replicated_parameters_in_shard_map_within_a_scan():
    """The network with a batch over the devices: the gradient of one device."""
    params, inputs, weights = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), problem()
    )
    batch = jnp.stack([inputs * (1 + 0.1 * i) for i in range(8)])

    def total(params, batch, **options):
        def one(x):
            return loss(params, x, weights, lambda h: clip_value(h, -0.4, 0.3))

        return jnp.sum(jax.vmap(one)(batch))

    want = jax.grad(total)(params, batch)
    step = jax.shard_map(
        jax.grad(lambda p, b: lax.psum(total(p, b), ("x", "y"))),
        mesh=mesh(AxisType.Auto),
        in_specs=(P(), P(("x", "y"))),
        out_specs=P(),
    )
    found = jax.jit(step)(params, batch)
    for key in params:
        np.testing.assert_allclose(
            found[key], want[key], atol=2e-6 * np.abs(want[key]).max()
        )


@pytest.mark.one_in(10)
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: clip_norm(1.0, -1.0), ValueError, r"max_norm=-1\.0"),
        (lambda: clip_norm(1.0, np.nan), ValueError, "max_norm=nan"),
        (lambda: clip_norm([1.0], [-2.0]), ValueError, r"max_norm\[0\]=-2\.0"),
        (lambda: clip_norm(1.0, 1.0, ord=0), ValueError, "ord=0"),
        (lambda: clip_norm(1.0, 1.0, nonfinite="no"), ValueError, "'no'"),
        (lambda: clip_norm(1.0, "1"), TypeError, "'1'"),
        (lambda: clip_norm(1.0, lambda step: 1.0), TypeError, "schedule"),
        (lambda: clip_value(1.0, 1.0, -1.0), ValueError, r"max_value=-1\.0"),
        (lambda: clip_value(1.0, np.nan, 1.0), ValueError, "min_value=nan"),
        (lambda: clip_value(1.0, None, 1.0), TypeError, "min_value.*None"),
        (lambda: clip_value(1.0, 0, 1, nonfinite="no"), ValueError, "'no'"),
    ],
)
def test_bad_input_is_refused_in_the_forward_pass(call, error, message):
    with pytest.raises(error, match=message):
        call()
