"""Gradients clipped example by example: the bound, both modes, masks, users, meshes."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from hypothesis import HealthCheck, given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from versions import FUSED, JOINED
from xla_settings import OWN

import optax_clipx as clipx
from optax_clipx.per_example import ClippedExamples, clipped_grad, group_by_user, psac

SIZES = ((5, 8), (8, 2))
MODES = {
    "one pass": {},
    "microbatches": {"microbatch_size": 4},
    "two passes": {"two_pass": True},
    "two passes by microbatches": {"two_pass": True, "microbatch_size": 4},
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def usually(name):
    """All modes, of which the others are slow; each table has another usual one."""
    marks = {x: () if x == name else (pytest.mark.slow,) for x in MODES}
    cases = [pytest.param(MODES[x], id=x, marks=marks[x]) for x in MODES]
    return pytest.mark.parametrize("mode", cases)


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["a"])
    return jnp.mean((hidden @ params["b"] - y) ** 2)


def problem(size=12, dtype="float32", seed=0, broken=()):
    rng = np.random.default_rng(seed)
    params = {
        name: jnp.asarray(rng.normal(size=shape), dtype)
        for name, shape in zip("ab", SIZES, strict=True)
    }
    scale = rng.lognormal(sigma=1.5, size=(size, 1))
    x = np.asarray(rng.normal(size=(size, 5)) * scale)
    for index, bad in broken:
        x[index, 1] = bad
    y = rng.normal(size=(size, 2)) * scale
    return params, jnp.asarray(x, dtype), jnp.asarray(y, dtype)


def gradients(params, x, y, settings=None):
    """The gradient of each example, in float64."""
    each = jax.vmap(jax.grad(loss), (None, 0, 0))
    found = jax.jit(each, compiler_options=settings)(params, x, y)
    return {k: np.asarray(v).astype(np.float64) for k, v in found.items()}


def dense(grads, scale_of, keep=None):
    """Sums and norms by a loop over the examples."""
    total = {k: np.zeros(v.shape[1:]) for k, v in grads.items()}
    norms = []
    for i in range(len(grads["a"])):
        example = [grads["a"][i], grads["b"][i]]
        norms.append(float(reference.norm(example)))
        if np.isfinite(norms[-1]) and (keep is None or keep[i]):
            for k, g in zip("ab", example, strict=True):
                total[k] += g * float(scale_of(norms[-1]))
    return total, np.array(norms)


def assert_close(found, want, rtol=1e-6):
    for key, exact in want.items():
        atol = rtol * max(np.abs(exact).max(), 1e-30)
        np.testing.assert_allclose(np.asarray(found[key], np.float64), exact, atol=atol)


RESPONSES = {
    "rescale": (clipx.responses.rescale, lambda n: min(1, 0.5 / n)),
    "auto-s": (
        functools.partial(clipx.responses.normalize, eps=0.01),
        lambda n: 0.5 / (n + 0.01),
    ),
    "dp-psac": (psac, lambda n: 0.5 / (n + 0.1 / (n + 0.1))),
    "drop": (clipx.responses.drop, lambda n: float(n <= 0.5)),
    "biweight": (
        clipx.responses.biweight,
        lambda n: max(0, 1 - (n / 0.5) ** 2) ** 2,
    ),
}


@pytest.mark.one_in(10)
@every_mode
@pytest.mark.parametrize("name", RESPONSES)
def test_equals_a_loop_over_the_examples(mode, name):
    response, scale_of = RESPONSES[name]
    args = problem(broken=[(3, np.nan), (7, np.inf)])
    want, norms = dense(gradients(*args, settings=OWN), scale_of)
    grads, found = plain(0.5, settings="own", response=response, **mode)(*args)
    assert_close(grads, want, 2e-6)
    np.testing.assert_allclose(found.norms, norms, rtol=1e-5)
    assert int(found.num_nonfinite) == 2
    assert int(found.num_examples) == 12
    assert float(found.clipped) == pytest.approx(np.mean(~(norms <= 0.5)))


def test_one_pass_and_two_are_equal():
    one_pass = plain(0.5, settings="own")
    two_passes = plain(0.5, settings="own", two_pass=True, microbatch_size=4)
    for seed in range(20):
        args = problem(seed=seed, broken=[(seed % 12, np.nan)])
        assert_close(two_passes(*args)[0], one_pass(*args)[0], 1e-6)


@functools.cache
def compiled(settings, **options):
    def run(limit, *args, **kwargs):
        return clipped_grad(loss, limit, batch_argnums=(1, 2), **options)(
            *args, **kwargs
        )

    # Two programs of XLA's own settings differ in fewer of a gradient's last bits.
    return jax.jit(run, compiler_options=OWN if settings == "own" else None)


def plain(limit, settings="quick", **options):
    return functools.partial(compiled(settings, **options), jnp.float32(limit))


# The bound.

DTYPES = ("float32", "bfloat16", "float16")


def affine(params, x):
    """Gradients are entries of `x`, whatever they are."""
    return jnp.vdot(params["a"], x["a"]) + jnp.vdot(params["b"], x["b"])


@functools.cache
def one_example(two_pass, fun, settings):
    """What each example of a batch adds, alone."""

    def alone(limit, params, x):
        def one(x):
            grad_fn = clipped_grad(fun, limit, two_pass=two_pass)
            grads, found = grad_fn(params, jax.tree.map(lambda x: x[None], x))
            return grads, found.num_nonfinite

        return jax.lax.map(one, x)

    return jax.jit(alone, compiler_options=OWN if settings == "own" else None)


def network(params, x):
    hidden = jnp.tanh(x["a"] @ params["a"].T)
    return jnp.mean(jnp.square(hidden @ params["a"] + jnp.sum(params["b"] * x["b"])))


def check_bound(seed, decade, above, dtype, two_pass, fun, settings="quick"):
    """No example adds more than the limit; one that is not finite adds nothing."""
    rng = np.random.default_rng(seed)
    info = jnp.finfo(dtype)
    decade = np.clip(decade, np.log10(float(info.tiny)) + 1, np.log10(float(info.max)))
    values = rng.normal(size=(4, 11)) * 10.0 ** (decade * rng.uniform(0, 1, (4, 1)))
    values = np.clip(values, -float(info.max), float(info.max))
    bad = rng.random(4) < 0.3
    values[bad, rng.integers(0, 11)] = rng.choice([np.nan, np.inf, -np.inf])
    x = {"a": jnp.asarray(values[:, :4], dtype), "b": jnp.asarray(values[:, 4:], dtype)}
    params = {
        "a": jnp.asarray(rng.normal(size=4), dtype),
        "b": jnp.asarray(rng.normal(size=7), dtype),
    }
    if fun is network:
        params["a"] = jnp.asarray(rng.normal(size=(3, 4)), dtype)
    limit = np.float32(10.0 ** (max(decade, -20) * 0.5 - above))
    grads, num_nonfinite = one_example(two_pass, fun, settings)(limit, params, x)
    for i in range(4):
        one = [np.asarray(g[i]) for g in grads.values()]
        assert all(g.dtype == np.float32 for g in one)
        norm = float(reference.norm(one))
        assert norm <= limit * (1 + 1e-6)
        if num_nonfinite[i]:
            assert norm == 0
        assert bool(num_nonfinite[i]) >= bool(bad[i])


bound_cases = given(
    st.integers(0, 2**32 - 1),
    st.floats(-20, 20),
    st.floats(0, 5),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from([affine, network]),
)
quiet = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.slow
@settings(max_examples=100, **quiet)
@bound_cases
def test_no_example_adds_more_than_the_limit(seed, decade, above, dtype, two, fun):
    check_bound(seed, decade, above, dtype, two, fun)


@pytest.mark.slow
@settings(max_examples=1000, **quiet)
@bound_cases
def test_the_bound_in_a_thousand_cases(seed, decade, above, dtype, two, fun):
    check_bound(seed, decade, above, dtype, two, fun)


@pytest.mark.parametrize("two_pass", [False, True])
def test_gradients_of_float16_are_rounded_once(two_pass):
    # Some CPUs compute in float16, and round in other places in each kernel.
    for seed in range(10):
        check_bound(seed, 1.0, 0.0, "float16", two_pass, network, "own")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mode", [{}, {"two_pass": True}], ids=str)
def test_many_narrow_leaves(dtype, mode):
    """Sums in the leaves' own dtype would stop growing here, far below the norm."""
    leaves = 20
    params = [jnp.zeros(500, dtype) for _ in range(leaves)]
    rng = np.random.default_rng(0)
    x = [jnp.asarray(rng.normal(size=(4, 500)) * 5, dtype) for _ in range(leaves)]
    fun = lambda p, x: sum(map(jnp.vdot, p, x))  # noqa: E731
    grads, found = jax.jit(clipped_grad(fun, 1.0, **mode))(params, x)
    each = [np.asarray(v, np.float64) for v in x]
    norms = np.sqrt(sum(np.sum(v**2, axis=1) for v in each))
    np.testing.assert_allclose(found.norms, norms, rtol=1e-5)
    assert float(reference.norm(grads)) <= 4
    first = jax.tree.map(lambda v: v[:1], x)
    alone, _ = jax.jit(clipped_grad(fun, 1.0))(params, first)
    assert 1 - 1e-6 <= float(reference.norm(alone)) <= 1 + 1e-6


def test_the_sum_is_cast_last_and_only_if_asked():
    args = problem(dtype="bfloat16")
    wide, _ = plain(0.5)(*args)
    narrow, _ = plain(0.5, dtype=jnp.bfloat16)(*args)
    assert {g.dtype for g in wide.values()} == {jnp.dtype("float32")}
    for key, g in wide.items():
        np.testing.assert_array_equal(narrow[key], g.astype(jnp.bfloat16))
    with jax.enable_x64(True):
        args = problem(dtype="float64")
        run = clipped_grad(loss, 0.5, batch_argnums=(1, 2))
        grads, found = jax.jit(run)(*args)
        assert grads["a"].dtype == found.norms.dtype == jnp.float64


# The table of edge cases.


@usually("one pass")
def test_edge_cases(mode):
    x = {
        "a": jnp.array([[0.0] * 4, [3e38] * 4, [1e-36] * 4, [0.5] * 4]),
        "b": jnp.zeros((4, 7)),
    }
    params = {"a": jnp.zeros(4), "b": jnp.zeros(7)}

    @jax.jit
    def run(limit, x):
        return clipped_grad(affine, limit, **mode)(params, x)

    def sum_of(limit):
        grads, found = run(jnp.float32(limit), x)
        assert int(found.num_nonfinite) == 0
        return np.asarray(grads["a"])

    np.testing.assert_allclose(sum_of(1.0), [1.0] * 4, rtol=1e-6)
    np.testing.assert_array_equal(sum_of(0.0), [0.0] * 4)
    np.testing.assert_allclose(sum_of(np.inf), [3e38] * 4, rtol=1e-6)
    for unusable in (-1.0, np.nan):
        grads, _ = run(jnp.float32(unusable), x)
        assert all(np.all(np.isnan(g)) for g in grads.values())
    large = jax.tree.map(lambda v: v[1:2], x)
    tiny = jax.tree.map(lambda v: v[2:3], x)
    for one, limit in ((large, 1e-20), (large, 1.0), (tiny, 1e-36)):
        grads, _ = run(jnp.float32(limit), one)
        np.testing.assert_allclose(np.asarray(grads["a"]) / limit, 0.5, rtol=1e-5)


@usually("microbatches")
def test_a_whole_batch_that_is_not_finite_adds_zero(mode):
    params, x, y = problem(size=8)
    grads, found = plain(0.5, **mode)(params, x * jnp.nan, y)
    assert not any(np.any(g) for g in grads.values())
    assert int(found.num_nonfinite) == 8


def test_no_examples():
    params, x, y = problem(size=1)
    run = clipped_grad(loss, 0.5, batch_argnums=(1, 2), reduction="mean")
    grads, found = jax.jit(run)(params, x[:0], y[:0])
    assert not any(np.any(g) for g in grads.values())
    assert found.norms.shape == (0,)
    assert int(found.num_examples) == 0


def test_parameters_that_pass_through():
    params = {"w": jnp.ones(2), "none": None, "empty": jnp.zeros((0, 3))}
    grads, found = clipped_grad(lambda p, x: jnp.vdot(p["w"], x), 1.0)(
        params, jnp.array([[3.0, 4.0]])
    )
    np.testing.assert_allclose(grads["w"], [0.6, 0.8], rtol=1e-6)
    assert grads["none"] is None
    assert grads["empty"].shape == (0, 3)
    np.testing.assert_allclose(found.norms, [5.0])


# Scopes.


@pytest.mark.one_in(2)
@pytest.mark.parametrize("shares", ["equal", "size"])
@pytest.mark.parametrize("mode", [{}, {"microbatch_size": 4, "two_pass": True}])
def test_leaves_share_the_limit(shares, mode):
    args = problem(broken=[(2, np.nan)])
    grads, found = plain(
        0.5, measure=clipx.measures.leaf_norms(), shares=shares, **mode
    )(*args)
    sizes = {"a": 40, "b": 16}
    each = gradients(*args)
    for key, size in sizes.items():
        limit = 0.5 * np.sqrt(0.5 if shares == "equal" else size / 56)
        want = 0
        for i in range(12):
            if i != 2:
                want = want + reference.rescale([each[key][i]], limit)[0]
        np.testing.assert_allclose(grads[key], want.astype(float), rtol=2e-5, atol=1e-6)
        assert found.norms[key].shape == (12,)
        norms = np.array([float(reference.norm([g])) for g in each[key]])
        assert float(found.clipped[key]) == pytest.approx(np.mean(~(norms <= limit)))
    alone, _ = plain(0.5, measure=clipx.measures.leaf_norms(), shares=shares)(
        args[0], args[1][:1], args[2][:1]
    )
    assert float(reference.norm(alone.values())) <= 0.5 * (1 + 1e-6)


def test_groups_with_limits_of_their_own():
    args = problem()
    labels = {"a": "body", "b": "head"}
    run = clipped_grad(
        loss,
        {"body": 0.25, "head": jnp.float32(0.75)},
        batch_argnums=(1, 2),
        measure=clipx.measures.group_norms(labels),
    )
    grads, found = jax.jit(run)(*args)
    by_leaf = clipped_grad(
        loss,
        {"a": 0.25, "b": 0.75},
        batch_argnums=(1, 2),
        measure=clipx.measures.leaf_norms(),
    )
    want, other = jax.jit(by_leaf)(*args)
    assert_close(grads, {k: np.asarray(v) for k, v in want.items()}, 5e-6)
    np.testing.assert_allclose(found.norms["head"], other.norms["b"], rtol=1e-5)
    np.testing.assert_allclose(found.clipped["body"], other.clipped["a"])


# Masks, means, users, and what is passed on.


@pytest.mark.slow
@usually("two passes")
def test_padding_is_as_if_it_were_not_there(mode):
    params, x, y = problem(broken=[(1, np.nan), (5, np.nan)])
    mask = np.ones(12, bool)
    mask[[4, 5, 10, 11]] = False
    mean = functools.partial(plain, 0.5, settings="own", reduction="mean")
    grads, found = mean(**mode)(params, x, y, mask=mask)
    want, alone = mean()(params, x[mask], y[mask])
    assert_close(grads, {k: np.asarray(v) for k, v in want.items()}, 2e-6)
    assert int(found.num_examples) == 8
    assert int(found.num_nonfinite) == int(alone.num_nonfinite) == 1
    assert float(found.clipped) == pytest.approx(float(alone.clipped))


def test_the_mean_divides_by_what_it_is_told():
    args = problem()
    total, _ = plain(0.5)(*args)
    mean, _ = plain(0.5, reduction="mean")(*args)
    expected, _ = plain(0.5, reduction="mean", batch_size=16)(*args)
    for key, g in total.items():
        np.testing.assert_allclose(mean[key], g / 12, rtol=1e-6)
        np.testing.assert_allclose(expected[key], g / 16, rtol=1e-6)


@usually("two passes by microbatches")
def test_examples_of_a_user_are_clipped_together(mode):
    params, x, y = problem(size=9)
    users = np.array(["c", "a", "b", "a", "c", "a", "d", "d", "d"])
    (gx, gy), mask = group_by_user(users, (x, y))
    assert mask.tolist() == [
        [True] * 3,
        [True, False, False],
        [True, True, False],
        [True] * 3,
    ]

    def of_user(params, x, y, mask):
        each = jax.vmap(loss, (None, 0, 0))(params, x, y)
        return jnp.sum(jnp.where(mask, each, 0))

    run = clipped_grad(of_user, 0.5, batch_argnums=(1, 2, 3), **mode)
    grads, found = jax.jit(run)(params, gx, gy, mask)
    each = gradients(params, x, y)
    by_user = {
        k: np.stack([v[users == u].sum(0) for u in "abcd"]) for k, v in each.items()
    }
    want, norms = dense(by_user, RESPONSES["rescale"][1])
    assert_close(grads, want, 2e-6)
    np.testing.assert_allclose(found.norms, norms, rtol=1e-5)


def test_what_the_function_returns_besides_and_other_arguments():
    def fun(x, params, scale, *, shift):
        return scale * jnp.vdot(params, x) + shift, {"twice": 2 * x, "shift": shift}

    for mode in MODES.values():
        clipped = clipped_grad(
            fun, 100.0, argnums=(1, 2), batch_argnums=0, has_aux=True, **mode
        )
        x = jnp.arange(8.0).reshape(4, 2)
        grads, found = jax.jit(clipped)(x, jnp.ones(2), 3.0, shift=7.0)
        np.testing.assert_allclose(grads[0], [36.0, 48.0])
        np.testing.assert_allclose(grads[1], 28.0)
        np.testing.assert_allclose(found.aux["twice"], 2 * np.arange(8).reshape(4, 2))
        np.testing.assert_allclose(found.aux["shift"], [7.0] * 4)


def test_functions_of_a_batch():
    def fun(params, x):
        assert x.shape == (1, 2)
        return jnp.mean(x @ params)

    grads, _ = clipped_grad(fun, 1.0, keep_batch_dim=True)(
        jnp.ones(2), jnp.array([[3.0, 4.0], [0.1, 0.2]])
    )
    np.testing.assert_allclose(grads, [0.7, 1.0], rtol=1e-6)


def linear(params, x):
    return jnp.vdot(params, x)


@usually("one pass")
def test_under_vmap_and_differentiated_by_the_limit(mode):
    rng = np.random.default_rng(0)
    models, batches = rng.normal(size=(3, 2)), rng.normal(size=(3, 4, 2)) * 5
    models, batches = jnp.float32(models), jnp.float32(batches)

    def run(params, x, limit=1.0):
        return clipped_grad(linear, limit, **mode)(params, x)[0]

    found, alone = jax.jit(jax.vmap(run))(models, batches), jax.jit(run)
    for i in range(3):
        np.testing.assert_allclose(found[i], alone(models[i], batches[i]), rtol=1e-5)
    slope_by = jax.grad(lambda c: jnp.sum(run(models[0], batches[0], c)))
    slope = jax.jit(slope_by)(1.0)
    norms = np.linalg.norm(batches[0], axis=1, keepdims=True)
    want = np.sum(np.where(norms > 1, batches[0] / norms, 0))
    np.testing.assert_allclose(slope, want, rtol=1e-5)


@usually("microbatches")
def test_batches_of_integers_and_random_keys(mode):
    def fun(params, i, key):
        kept = jax.random.bernoulli(key, 0.5, (3,)).astype(jnp.float32)
        return jnp.log(params[i]) * jnp.sum(kept)

    keys = jax.random.split(jax.random.key(0), 4)
    index = jnp.array([0, 1, 2, 1])
    params = jnp.array([0.0, 4.0, 0.5])  # the first one divides by zero
    run = clipped_grad(fun, 1.0, batch_argnums=(1, 2), **mode)
    grads, found = jax.jit(run)(params, index, keys)
    each = jax.vmap(jax.grad(fun), (None, 0, 0))(params, index, keys)
    assert int(found.num_nonfinite) == int(np.sum(~np.isfinite(each).all(1))) == 1
    want = np.nansum(np.clip(each[1:], -1, 1), axis=0)  # one entry in each
    np.testing.assert_allclose(grads, want, rtol=1e-6)


def test_the_limit_may_follow_a_quantile():
    """Andrew et al.: from .1 to within 10% of the median, after about 46 rounds."""

    @jax.jit
    def round_(limit, x):
        _, found = clipped_grad(lambda p, x: p * x, limit)(1.0, x)
        return limit * jnp.exp(-0.2 * ((1 - found.clipped) - 0.5))

    limits = [jnp.float32(0.1)]
    for key in jax.random.split(jax.random.key(0), 200):
        limits.append(round_(limits[-1], jnp.exp(jax.random.normal(key, (100,)))))
    near = np.abs(np.array(limits) - 1) < 0.1
    assert 40 <= np.argmax(near) <= 52
    assert np.mean(near[60:]) > 0.9
    assert round_._cache_size() == 1


@pytest.mark.parametrize(("name", "end"), [("rescale", 0.5), ("auto-s", 0.01)], ids=str)
def test_the_bias_of_clipping(name, end):
    """Descent to the mean of 9, 0 and 0 with gradients clipped to 1."""
    response, _ = RESPONSES[name]
    grad_fn = clipped_grad(
        lambda x, t: (x - t) ** 2 / 2, 1.0, response=response, reduction="mean"
    )

    def step(x, _):
        return x - 0.002 * grad_fn(x, jnp.array([9.0, 0.0, 0.0]))[0], None

    last, _ = jax.jit(lambda: jax.lax.scan(step, jnp.float32(1.0), None, 20_000))()
    assert float(last) == pytest.approx(end, abs=0.006)


# Meshes.


@functools.cache
def on_one_device():
    args = problem(size=32, broken=[(3, np.nan)])
    return args, plain(0.5)(*args)


def assert_same(found, want):
    assert_close(found[0], {k: np.asarray(v) for k, v in want[0].items()}, 2e-6)
    np.testing.assert_allclose(found[1].norms, want[1].norms, rtol=1e-5)
    for got, exact in zip(found[1][1:4], want[1][1:4], strict=True):
        np.testing.assert_allclose(got, exact)


def mesh(kind):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)


mesh_modes = pytest.mark.parametrize(
    "mode",
    [{}, {"microbatch_size": 4}, {"microbatch_size": 4, "two_pass": True}],
    ids=str,
)


@pytest.mark.one_in(10)
@mesh_modes
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P(), P(None, "y")], ids=["whole", "cut"])
def test_a_sharded_batch_under_jit(kind, mode, spec):
    (params, x, y), want = on_one_device()
    put = lambda v, s: jax.device_put(v, NamedSharding(mesh(kind), s))  # noqa: E731
    args = (
        jax.tree.map(lambda p: put(p, spec), params),
        put(x, P("x")),
        put(y, P("x")),
    )
    with jax.set_mesh(mesh(kind)):
        found = plain(0.5, **mode)(*args)
    assert_same(found, want)
    for g in found[0].values():
        if kind == AxisType.Explicit:
            assert g.sharding.is_equivalent_to(NamedSharding(mesh(kind), spec), 2)


OUT = (P(), ClippedExamples(P("x"), P(), P(), P(), None))


def manual(check_vma, **options):
    grad_fn = clipped_grad(loss, 0.5, batch_argnums=(1, 2), **options)
    return jax.jit(
        jax.shard_map(
            grad_fn,
            mesh=mesh(AxisType.Auto),
            in_specs=(P(), P("x"), P("x")),
            out_specs=OUT,
            check_vma=check_vma,
        )
    )


@pytest.mark.one_in(2)
@mesh_modes
@pytest.mark.parametrize("check_vma", [True, False])
def test_each_device_clips_its_examples_in_shard_map(mode, check_vma):
    args, want = on_one_device()
    options = {} if check_vma else {"axis_name": "x"}
    assert_same(manual(check_vma, **mode, **options)(*args), want)


@JOINED
def test_one_sum_over_the_devices():
    """XLA makes of it one all-reduce for gradients, and one for counts."""
    args, _ = on_one_device()
    program = manual(True, microbatch_size=4).lower(*args).compile().as_text()
    found = re.findall(r"= (\(.*?\)|\S+) all-reduce(?:-start)?\(", program)
    assert len(found) == 2
    assert sum("f32[5,8]" in kinds and "f32[8,2]" in kinds for kinds in found) == 1


def test_where_types_are_blind_it_asks():
    args, _ = on_one_device()
    with pytest.raises(ValueError, match="Pass axis_name="):
        manual(False)(*args)


def test_parameters_that_are_sharded_in_shard_map():
    (params, x, y), want = on_one_device()

    def parallel(params, x, y):
        hidden = jnp.tanh(x @ params["a"])
        return jnp.mean((jax.lax.psum(hidden @ params["b"], "y") - y) ** 2)

    specs = {"a": P(None, "y"), "b": P("y")}
    step = jax.shard_map(
        clipped_grad(parallel, 0.5, batch_argnums=(1, 2)),
        mesh=mesh(AxisType.Auto),
        in_specs=(specs, P("x"), P("x")),
        out_specs=(specs, OUT[1]),
    )
    assert_same(jax.jit(step)(params, x, y), want)


def test_pmap():
    (params, x, y), want = on_one_device()
    run = jax.pmap(
        clipped_grad(loss, 0.5, batch_argnums=(1, 2), axis_name="i"),
        axis_name="i",
        in_axes=(None, 0, 0),
    )
    grads, found = run(params, x.reshape(8, 4, 5), y.reshape(8, 4, 2))
    found = jax.tree.map(lambda v: v[0], found)._replace(norms=found.norms.ravel())
    assert_same((jax.tree.map(lambda g: g[5], grads), found), want)


# Memory, other libraries, bad input.


@functools.cache
def peak(size, **options):
    """Bytes of a compiled program besides its arguments and what it returns."""
    kinds = jax.tree.map(jax.typeof, problem(size=size))
    step = jax.jit(clipped_grad(loss, 0.5, batch_argnums=(1, 2), **options))
    return step.lower(*kinds).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.one_in(2, rest="slow")
@pytest.mark.parametrize("microbatch_size", [None, 8])
def test_the_memory_of_two_passes_does_not_grow_with_the_batch(microbatch_size):
    two = {"two_pass": True, "microbatch_size": microbatch_size}
    small, large = peak(64, **two), peak(64 * 64, **two)
    # Of each example its norm.
    assert large - small <= 4 * (64 * 64 - 64)
    assert peak(64 * 64) > 20 * large


@FUSED
def test_the_gradients_of_examples_are_held_once():
    """A branch for broken examples had room for a second copy of them all."""
    params = {"a": jnp.zeros((5, 128)), "b": jnp.zeros((128, 64))}
    x, y = jnp.zeros((64, 5)), jnp.zeros((64, 64))
    each = jax.vmap(jax.grad(loss), (None, 0, 0))

    def by_microbatch(size):
        options = {"batch_argnums": (1, 2), "microbatch_size": size}
        return clipped_grad(loss, 0.5, **options)

    def at_hand(*args):
        return clipx.per_example_global_norm_clip(each(*args), 0.5)

    one = 4 * sum(x.size for x in params.values())
    cases = [(by_microbatch(None), 64), (by_microbatch(8), 8), (at_hand, 64)]
    for fun, held in cases:
        program = jax.jit(fun).lower(params, x, y).compile()
        memory = program.memory_analysis().temp_size_in_bytes
        assert memory < 1.1 * held * one


@FUSED
def test_sums_of_leaves_lie_where_gradients_did():
    """The first sum has no such room: it is that of the smallest leaf."""
    sizes = (64, 256, 256, 10)
    params = [jnp.zeros((a, b)) for a, b in itertools.pairwise(sizes)]

    def network(params, x, y):
        for kernel in params:
            x = jnp.tanh(x @ kernel)
        return jnp.sum(x * y)

    fun = clipped_grad(network, 0.5, batch_argnums=(1, 2), microbatch_size=8)
    batch = jnp.zeros((64, 64)), jnp.zeros((64, 10))
    program = jax.jit(fun).lower(params, *batch).compile()
    held = program.memory_analysis().temp_size_in_bytes
    bound = 8 * 4 * sum(x.size for x in params) + 4 * params[0].size
    assert held < bound


# jax_privacy calls a function that optax has renamed.
renamed = pytest.mark.filterwarnings("ignore:optax.global_norm:DeprecationWarning")


@pytest.mark.slow
@renamed
def test_equal_to_jax_privacy_where_it_is_right():
    clipping = pytest.importorskip("jax_privacy.clipping")
    params, x, y = problem()
    padding = np.arange(12) >= 10
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = clipping.clipped_grad(
            loss,
            l2_clip_norm=0.5,
            batch_argnums=(1, 2),
            microbatch_size=4,
            return_grad_norms=True,
        )
        want, aux = theirs(params, x, y, is_padding_example=padding)
    for mode in MODES.values():
        grads, found = plain(0.5, **mode)(params, x, y, mask=~padding)
        assert_close(grads, {k: np.asarray(v) for k, v in want.items()}, 2e-6)
        np.testing.assert_allclose(found.norms[:10], aux.grad_norms[:10], rtol=1e-5)


@pytest.mark.slow
@renamed
def test_the_bound_holds_where_that_of_jax_privacy_does_not():
    """An example in bfloat16 of 500 leaves, and limit 1."""
    clipping = pytest.importorskip("jax_privacy.clipping")
    rng = np.random.default_rng(0)
    example = [jnp.asarray(rng.normal(size=(1, 100)), "bfloat16") for _ in range(500)]
    params = [jnp.zeros(100, "bfloat16") for _ in range(500)]
    fun = lambda p, x: sum(jnp.vdot(a, b) for a, b in zip(p, x, strict=True))  # noqa: E731
    with jax.numpy_dtype_promotion("standard"):
        theirs = clipping.clipped_grad(fun, l2_clip_norm=1.0, keep_batch_dim=False)
        assert float(reference.norm(jax.jit(theirs)(params, example))) > 1.2
    ours, _ = jax.jit(clipped_grad(fun, 1.0))(params, example)
    assert float(reference.norm(ours)) <= 1 + 1e-6


@pytest.mark.one_in(10)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_norm": -1.0}, ValueError, r"max_norm=-1\.0"),
        ({"max_norm": np.nan}, ValueError, "max_norm=nan"),
        ({"max_norm": {"a": -2.0}}, ValueError, r"\['a'\]=-2\.0"),
        ({"max_norm": lambda step: 1.0}, TypeError, "schedule"),
        ({"max_norm": "1"}, TypeError, "'1'"),
        ({"max_norm": {"a": 1.0, "b": 1.0}}, ValueError, "leaf_norms"),
        ({"fun": 3}, TypeError, "fun.*3"),
        ({"measure": clipx.measures.unit_norms()}, ValueError, "group_norms"),
        ({"measure": "tree"}, TypeError, "'tree'"),
        ({"argnums": 1}, ValueError, "argnums=1"),
        ({"batch_argnums": ()}, ValueError, r"batch_argnums=\(\)"),
        ({"batch_argnums": -1}, ValueError, "batch_argnums=-1"),
        ({"batch_argnums": (1, 3)}, ValueError, "at least 4"),
        ({"microbatch_size": 0}, ValueError, "microbatch_size=0"),
        ({"microbatch_size": 5}, ValueError, "divide the batch of 12.*=5"),
        ({"reduction": "max"}, ValueError, "'max'"),
        ({"shares": "even"}, ValueError, "'even'"),
        ({"batch_size": 3}, ValueError, 'reduction="mean"'),
        ({"mask": np.ones(3, bool)}, ValueError, "12 examples"),
        ({"mask": np.ones(12)}, ValueError, "bool"),
        ({"y": np.ones((3, 2), np.float32)}, ValueError, r"\(12, 5\), \(3, 2\)"),
        ({"y": np.float32(1.0)}, ValueError, "axis 0"),
        ({"params": {"a": np.arange(3)}}, TypeError, "int.* at a"),
        ({"params": {"a": None}}, ValueError, "with an array"),
    ],
)
def test_bad_input(options, error, message):
    params, x, y = problem()
    mask = options.pop("mask", None)
    params, y = options.pop("params", params), options.pop("y", y)
    arguments = {"fun": loss, "max_norm": 0.5, "batch_argnums": (1, 2), **options}
    with pytest.raises(error, match=message):
        clipped_grad(**arguments)(params, x, y, mask=mask)


def test_users_without_examples():
    with pytest.raises(ValueError, match=r"\(2,\).*\[3\]"):
        group_by_user([0, 1], np.ones((3, 2)))
    with pytest.raises(ValueError, match="r=0"):
        psac(jnp.ones(1), jnp.ones(1), r=0)


@renamed
def test_the_noise_of_optax_and_of_jax_privacy():
    """Both add to the sum what the recipe says: Gaussian, of the bound's size."""
    noise_addition = pytest.importorskip("jax_privacy.noise_addition")
    zeros = {"a": jnp.zeros(20_000)}
    with jax.numpy_dtype_promotion("standard"):
        for tx in (
            optax.add_noise((1.1 * 2.0) ** 2, 0.0, jax.random.key(1)),
            noise_addition.gaussian_privatizer(stddev=1.1 * 2.0, prng_key=1),
        ):
            noisy, _ = tx.update(zeros, tx.init(zeros))
            assert float(jnp.std(noisy["a"])) == pytest.approx(2.2, rel=0.03)
            assert abs(float(jnp.mean(noisy["a"]))) < 0.07
