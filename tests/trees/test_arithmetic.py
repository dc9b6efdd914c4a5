"""Each number and sign of the arithmetic, looked at directly; never sampled.

Other tests judge whole transformations against references. These are small and close to
the code, so that one changed sign, bound or default is seen at once.
"""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_clipx as clipx
from optax_clipx._devices import sums
from optax_clipx._reductions import norms as reductions
from optax_clipx._reductions.whole_norm import whole_norm
from optax_clipx._thresholds import quantile as _quantile
from optax_clipx._trees import arguments, arithmetic

LARGEST = float(np.finfo(np.float32).max)


def trace(rule, norms, step=0):
    """The limits of a rule over some norms, one after the other."""

    def one(carry, norm):
        number, state = carry
        limit, state = rule.update(norm, state, clipx.thresholds.Context(number))
        return (number + 1, state), limit

    norms = jnp.asarray(norms, jnp.float32)
    start = (jnp.int32(step), rule.init(jnp.float32(0)))
    return np.asarray(jax.lax.scan(one, start, norms)[1], np.float64)


def close(found, expected, rtol=1e-5):
    np.testing.assert_allclose(found, expected, rtol=rtol)


# Reductions


def test_the_norm_of_norms():
    close(whole_norm(jnp.array([3.0, 4.0, 12.0])), 13.0)
    assert whole_norm(jnp.zeros(3)) == 0
    assert whole_norm(jnp.array([jnp.inf, 1.0])) == jnp.inf
    assert jnp.isnan(whole_norm(jnp.array([jnp.nan, 1.0])))
    close(whole_norm(jnp.array([3e38, 1e38])), np.hypot(3e38, 1e38))


def test_factors_are_powers_of_two_that_undo_each_other():
    for limits in reductions._RANGES.values():
        assert limits.small * limits.large == 1
        assert {np.frexp(number)[0] for number in limits} == {0.5}
        assert limits.low < 1 < limits.high


def test_small_leaves_are_summed_as_vectors():
    for shape, flat in (((2, 2**12), True), ((2, 2**12 + 1), False), ((7,), True)):
        total = functools.partial(sums.sum_of, jnp.abs, axes=None, sums=jnp.float32)
        text = str(jax.make_jaxpr(total)(jnp.ones(shape)))
        assert (f"f32[{math.prod(shape)}] = abs" in text) == flat


def test_a_second_pass_stands_behind_a_branch_also_on_a_mesh():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        leaf = jax.device_put(jnp.ones((16, 3)), jax.P("x"))
        program = jax.jit(clipx.measures.tree_norm()).lower(leaf).compile()
    assert " conditional(" in program.as_text()


@pytest.mark.parametrize(
    ("dtype", "ord"),
    [
        ("float32", 2),
        ("float32", np.inf),
        pytest.param("float32", 3, marks=pytest.mark.slow),
        pytest.param("bfloat16", 2, marks=pytest.mark.slow),
        pytest.param("complex64", 2, marks=pytest.mark.slow),
    ],
)
def test_norms_of_many_small_leaves_of_mixed_sizes(dtype, ord):
    """They are summed as rows of a few arrays, batch by batch."""
    rng = np.random.default_rng(0)
    shapes = [(3, 5), (7,), (2, 2, 2), (15,), ()] * 14
    sizes = 10.0 ** rng.uniform(-25, 25, len(shapes))  # some take the second pass
    leaves = [
        jnp.asarray(size * rng.normal(size=shape), dtype)
        for size, shape in zip(sizes, shapes, strict=True)
    ]
    expected = [
        np.linalg.norm(np.ravel(np.asarray(x, np.complex128)), ord) for x in leaves
    ]
    close(jax.jit(clipx.measures.leaf_norms(ord=ord))(leaves), expected)
    whole = np.linalg.norm(expected, ord)
    close(jax.jit(clipx.measures.tree_norm(ord=ord))(leaves), whole)
    groups = clipx.measures.group_norms(lambda path, _: int(path[0]) % 3, ord=ord)
    for label, norm in jax.jit(groups)(leaves).items():
        close(norm, np.linalg.norm(expected[label::3], ord))


@pytest.mark.parametrize("ord", [1, 2, 3, np.inf, "rms"])
def test_norms_of_all_orders_at_all_sizes(ord):
    clippers = [
        clipx.clip_by(measure(ord=ord), jnp.inf)
        for measure in (clipx.measures.tree_norm, clipx.measures.leaf_norms)
    ]

    @jax.jit
    def norms_of(leaves):
        states = [x.update(leaves, x.init(leaves))[1] for x in clippers]
        return [state.metrics.norm for state in states]

    for size in (0.0, 1e-30, 2.0**-49, 1.0, 1e30):
        leaves = [
            np.float32(size) * np.array(x, np.float32) for x in ([1, -2], [[3], [4]])
        ]
        flat = np.abs(np.concatenate([x.ravel() for x in leaves]).astype(np.float64))
        if ord == "rms":
            expected = np.sqrt(np.mean(flat**2))
        else:
            expected = np.linalg.norm(flat / max(size, 1e-38), ord) * size
        for norm in norms_of(leaves):
            close(norm, expected, rtol=2e-6)


def test_complex_leaves():
    for size in (1e-30, 1.0, 1e30):
        leaf = np.array([3 + 4j, 12], np.complex64) * np.float32(size)
        close(clipx.functional.global_norm([leaf]), 13 * size)
    assert arithmetic.widened(leaf, jnp.dtype("float32")) == jnp.complex64
    assert arithmetic.widened(leaf, jnp.dtype("float64")) == jnp.complex128
    assert arithmetic.widened(leaf.real, jnp.dtype("float32")) == jnp.float32


def test_quotients_near_the_largest_number():
    divide = jax.jit(arithmetic.quotient)
    for y in (1e-30, 1.0, 2.0**90, 2.0**99, 2.0**101, 2.0**126, LARGEST):
        x = jnp.full((64,), y, jnp.float32) * jnp.float32(0.5)
        np.testing.assert_array_equal(divide(x, jnp.float32(y)), np.full(64, 0.5))


def test_which_dtypes_leave_the_range():
    leaves = {n: jnp.zeros(1, n) for n in ("float16", "bfloat16", "float32")}
    found = {
        n: reductions._can_leave_range(x.dtype, jnp.float32) for n, x in leaves.items()
    }
    assert found == {"float16": False, "bfloat16": True, "float32": True}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ranges_hold_what_they_promise(dtype):
    limits = reductions._RANGES[jnp.dtype(dtype)]
    low, high = limits.low, limits.high
    up, down = 1 / limits.small, 1 / limits.large
    info = np.finfo(dtype)
    # The smallest normal number raised, and the largest lowered, are within.
    assert (float(info.tiny) * up) ** 2 > float(info.tiny) / float(info.eps)
    assert (float(info.max) * down) ** 2 < high
    # Raised or lowered sums of what is outside are finite, for 2^24 entries too.
    assert low * up * up * 2.0**24 < float(info.max)
    assert high * down * down > float(info.tiny)
    # What is not raised loses no more than a rounding to what underflows.
    assert float(info.tiny) / low < float(info.eps)


def test_derivatives_of_roots_and_powers_at_zero():
    assert jax.grad(arithmetic.safe_sqrt)(0.0) == 0
    close(jax.grad(arithmetic.safe_sqrt)(4.0), 0.25)
    assert jax.grad(lambda x: arithmetic.power(x, 0.5))(0.0) == 1
    close(arithmetic.power(jnp.float32(3.0), 3.0), 27.0)


# Responses


def test_responses_by_hand():
    norms = jnp.array([0.0, 1.0, 2.0, 4.0, 1.0, 0.0])
    limits = jnp.array([2.0, 2.0, 2.0, 2.0, jnp.inf, 0.0])
    close(clipx.responses.rescale(norms, limits), [1, 1, 1, 0.5, 1, 1])
    close(clipx.responses.normalize(norms, limits), [1, 2, 1, 0.5, 1, 1])
    close(clipx.responses.drop(norms, limits), [1, 1, 1, 0, 1, 1])
    close(clipx.responses.smooth(norms, limits), [1, 2 / 3, 0.5, 1 / 3, 1, 1])
    bent = clipx.responses.smooth(jnp.array([3.0, 4.0]), jnp.array([4.0, 3.0]), p=2.0)
    close(bent, [0.8, 0.6])
    close(
        jax.grad(lambda n: clipx.responses.rescale(n, jnp.float32(2.0)) * n)(4.0), 0.0
    )
    close(
        jax.grad(lambda n: clipx.responses.smooth(n, jnp.float32(2.0)) * n)(4.0), 1 / 9
    )


# Rules


def test_quantiles_of_a_sketch():
    rng = np.random.default_rng(0)
    norms = np.exp(rng.normal(size=200) * 8)  # over 20 decades
    for q in (0.1, 0.5, 0.9):
        limits = trace(clipx.thresholds.quantile(q), norms)
        ordered = [np.sort(norms[: i + 1]) for i in range(200)]
        exact = [x[max(0, int(np.ceil(q * len(x) - 1e-6)) - 1)] for x in ordered]
        assert np.abs(np.log(limits / exact)).max() < 0.029


def test_the_least_of_all_norms():
    limits = trace(clipx.thresholds.quantile(0.0), [4.0, 1.0, 3.0])
    assert np.abs(np.log(limits / [4.0, 1.0, 1.0])).max() < 0.029


def test_the_sketch_counts_what_lies_beyond():
    rule = clipx.thresholds.quantile(0.5)
    state = rule.init(jnp.float32(0))
    for norm, beyond in ((1e-13, 1), (1.0, 1), (1e13, 2), (1.01e-12, 2), (0.99e12, 2)):
        _, state = rule.update(jnp.float32(norm), state, clipx.thresholds.Context(0))
        assert state.saturated == beyond
    assert state.counts.shape == (999,)
    assert state.counts[0] == 2
    assert state.counts[-1] == 2
    assert jnp.sum(state.counts) == 5


def test_the_sketch_halves_full_counts():
    rule = clipx.thresholds.quantile(0.5)
    state = rule.init(jnp.float32(0))
    full = jnp.iinfo(jnp.int32).max // _quantile._BINS
    state = state._replace(counts=state.counts.at[500].set(full))
    _, state = rule.update(jnp.float32(1e3), state, clipx.thresholds.Context(0))
    assert state.counts[500] == full // 2


def test_tracked_quantiles():
    limits = trace(
        clipx.thresholds.quantile_tracker(0.75, learning_rate=0.2), [2, 1, 9, 9, 1]
    )
    steps = np.cumsum([0, -0.05, -0.05, 0.15, 0.15])
    close(limits, 2 * np.exp(steps))


def test_quantiles_of_windows():
    close(
        trace(clipx.thresholds.quantile(0.25, window=3), [4, 1, 3, 9]),
        [4, 1.75, 2.0, 2.0],
    )
    close(trace(clipx.thresholds.quantile(0.5, max_steps=9), [4, 1, 3]), [4, 2.5, 3])


@pytest.mark.parametrize("init", ["first", "min", "mean"])
def test_averages_with_a_warmup(init):
    rule = clipx.thresholds.ema_ratio(
        1.5, decay=0.5, warmup_steps=3, warmup_limit=4.0, init=init, floor=0.1
    )
    limits = trace(rule, [8, 2, 3, 6, 6])
    start = {"first": 6.0, "min": 2.0, "mean": 3.0}[init]
    entering = min(6.0, 1.5 * start)
    after = 0.5 * start + 0.5 * entering if init != "first" else 6.0
    close(limits, [4, np.inf, np.inf, 1.5 * start, 1.5 * after])


@pytest.mark.parametrize("stats", ["raw", "clipped", "skip"])
def test_averages_without_a_warmup(stats):
    limits = trace(
        clipx.thresholds.ema_ratio(2.0, decay=0.75, stats=stats), [1, 1, 9, 1]
    )
    last = {"raw": 3.0, "clipped": 1.25, "skip": 1.0}[stats]
    close(limits, [2, 2, 2, 2 * last])


def test_averages_with_patience_and_floor():
    rule = clipx.thresholds.ema_ratio(
        2.0, decay=0.5, floor=1.0, patience=2, stats="skip"
    )
    close(trace(rule, [0.1, 9, 9, 9, 1]), [2, 2, np.inf, 18, 18])
    close(trace(clipx.thresholds.ema_ratio(2.0, decay=0.5), [0.1, 0.1]), [0.2, 0.2])


def test_the_growth_of_norms():
    close(
        trace(clipx.thresholds.norm_growth(1.5), [1, 9, 9, 1, 9]),
        [np.inf, 1.5, 2.25, 3.375, 1.5],
    )
    floored = clipx.thresholds.norm_growth(1.5, floor=2.0, patience=2)
    close(trace(floored, [1, 9, 9, 9]), [np.inf, 3, np.inf, 13.5])


def test_bands():
    rule = clipx.thresholds.group_band(0.5, 2.0, decay=0.9)
    close(trace(rule, [1, 9, 0.1]), [1, 3.6, 0.5 * (0.9 * 1.8 + 0.01)])
    floored = clipx.thresholds.group_band(0.5, 2.0, decay=0.9, floor=1.5)
    close(trace(floored, [1, 1])[1], 1.5)
    scheduled = clipx.thresholds.group_band(
        lambda step: 0.5, lambda step: 2.0, decay=0.9
    )
    close(trace(scheduled, [1, 9]), [1, 3.6])
    assert scheduled.uses_step
    assert not rule.uses_step
    patient = clipx.thresholds.group_band(0.5, 2.0, decay=0.9, patience=2)
    close(trace(patient, [1, 90, 90]), [1, 19.8, 90])


def test_deviations():
    rule = clipx.thresholds.zscore(2.0, warmup_steps=2, decay=0.5, target="threshold")
    limits = trace(rule, [1, 3, 3, 9, 2])
    mean, sd = 2.0, 1.0
    expected = [np.inf, np.inf, mean + 2 * sd]
    new = 0.5 * mean + 0.5 * 3
    sd = np.sqrt(0.5 * sd**2 + 0.5 * (3 - new) ** 2)
    expected.append(new + 2 * sd)
    mean, entering = new, new + 2 * sd
    new = 0.5 * mean + 0.5 * entering
    sd = np.sqrt(0.5 * sd**2 + 0.5 * (entering - new) ** 2)
    expected.append(new + 2 * sd)
    close(limits, expected)


def test_least_limits_and_multiples():
    both = clipx.thresholds.minimum(clipx.thresholds.quantile(0.5, window=1), 3.0)
    close(trace(both, [2, 5]), [2, 3])
    close(
        trace(
            clipx.thresholds.scaled(clipx.thresholds.quantile(0.5, window=1), 0.5),
            [2, 5],
        ),
        [1, 2.5],
    )
    assert trace(clipx.thresholds.scaled(jnp.inf, 0.0), [2])[0] == np.inf


def test_warming_up():
    rule = clipx.thresholds.warmup(1.0, then=2.0, steps=2)
    close(trace(rule, [5, 5, 5]), [1, 1, 2])
    close(trace(clipx.thresholds.warmup(1.0, then=2.0, steps=0), [5]), [2])
    assert not rule.uses_step  # it counts the norms that it has seen


def test_a_pair_of_functions():
    rule = clipx.thresholds.minimum((lambda n: (), lambda n, s, c: (n / 2, s)), 9.0)
    close(trace(rule, [4]), [2])


def test_relative_limits():
    rule = clipx.thresholds.relative_to_params(0.1, eps=0.5)
    limits, _ = rule.update(
        jnp.float32(9.0), (), clipx.thresholds.Context(0, params_norms=jnp.float32(0.2))
    )
    close(limits, 0.05)


def test_rules_that_need_no_step():
    for rule in (
        clipx.thresholds.quantile(0.5),
        clipx.thresholds.quantile_tracker(0.5),
        clipx.thresholds.ema_ratio(2.0),
        clipx.thresholds.norm_growth(),
        clipx.thresholds.zscore(),
        clipx.thresholds.constant(1.0),
    ):
        assert not rule.uses_step
    assert clipx.thresholds.constant(lambda step: 1.0).uses_step


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: arguments.check_count(2.5, "n"), "whole number"),
        (lambda: arguments.check_count(-1, "n"), "n >= 1"),
        (lambda: arguments.check_count(0, "n"), "n >= 1"),
        (lambda: arguments.check_count(-1, "n", 0), "n >= 0"),
        (lambda: arguments.check_decay(1, "decay"), "decay < 1"),
        (lambda: arguments.check_decay(1.5, "decay"), "<= 1"),
        (lambda: arguments.check_decay(-0.5, "decay"), "Expected 0 <="),
        (lambda: arguments.check_static_count(1, "size", 2), "size >= 2"),
        (lambda: clipx.thresholds.group_band(-0.5, 2.0), "low"),
        (lambda: clipx.thresholds.group_band(1.5, 2.0), "low"),
        (lambda: clipx.thresholds.group_band(0.5, 0.9), "high"),
        (lambda: clipx.thresholds.group_band(0.5, 2.0, decay=-0.5), "decay"),
        (lambda: clipx.thresholds.group_band(0.5, 2.0, floor=-0.5), "floor"),
        (lambda: clipx.thresholds.ema_ratio(0.9), "ratio"),
        (lambda: clipx.thresholds.ema_ratio(2.0, decay=-0.5), "decay"),
        (lambda: clipx.thresholds.ema_ratio(2.0, floor=-0.5), "floor"),
        (lambda: clipx.thresholds.ema_ratio(2.0, warmup_limit=-0.5), "warmup_limit"),
        (lambda: clipx.thresholds.ema_ratio(2.0, warmup_steps=-1), "warmup_steps"),
        (lambda: clipx.thresholds.norm_growth(0.9), "ratio"),
        (lambda: clipx.thresholds.norm_growth(floor=-0.5), "floor"),
        (lambda: clipx.thresholds.quantile(-0.5), "q"),
        (lambda: clipx.thresholds.quantile_tracker(-0.5), "q"),
        (
            lambda: clipx.thresholds.quantile_tracker(0.5, learning_rate=-0.5),
            "learning_rate",
        ),
        (lambda: clipx.thresholds.zscore(-0.5), "z_threshold"),
        (lambda: clipx.thresholds.zscore(decay=-0.5), "decay"),
        (lambda: clipx.thresholds.zscore(warmup_steps=-1), "warmup_steps"),
        (lambda: clipx.thresholds.zscore(window=1), "window"),
        (lambda: clipx.thresholds.zscore(clip_factor=-0.5), "clip_factor"),
        (lambda: clipx.thresholds.zscore(min_relative_sd=-0.5), "min_relative_sd"),
        (lambda: clipx.thresholds.warmup(1.0, then=2.0, steps=-1), "steps"),
        (lambda: clipx.thresholds.scaled(1.0, -0.5), "factor"),
        (lambda: clipx.thresholds.constant(-0.5), "max_norm|limit"),
        (lambda: clipx.responses.smooth(jnp.ones(1), jnp.ones(1), p=0.0), "p > 0"),
        (
            lambda: clipx.thresholds.ema_ratio(2.0, warmup_limit=1.0).init(
                (jnp.zeros(1),)
            ),
            "units",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_just_allowed():
    for make in (
        lambda: arguments.check_count(1, "n"),
        lambda: arguments.check_count(2.0, "n"),
        lambda: arguments.check_decay(0, "decay"),
        lambda: clipx.thresholds.group_band(0, 1, decay=0, floor=0),
        lambda: clipx.thresholds.group_band(1, 1, decay=1),
        lambda: clipx.thresholds.ema_ratio(1, decay=0, warmup_limit=0, warmup_steps=0),
        lambda: clipx.thresholds.norm_growth(1, floor=0),
        lambda: clipx.thresholds.quantile(0),
        lambda: clipx.thresholds.quantile(1),
        lambda: clipx.thresholds.quantile_tracker(1, learning_rate=0),
        lambda: clipx.thresholds.zscore(0, decay=0, warmup_steps=0, min_relative_sd=0),
        lambda: clipx.thresholds.zscore(decay=1, window=2, clip_factor=0),
        lambda: clipx.thresholds.scaled(1.0, 0),
    ):
        make()


def test_a_new_level_leaves_the_deviation_of_logarithms_as_it_was():
    rule = clipx.thresholds.zscore(
        3.0, space="log", stats="skip", patience=3, warmup_steps=4
    )
    limits = trace(rule, [1.0, 1.2, 0.9, 1.1, 50.0, 51.0, 49.0, 50.0])
    sd = np.std(np.log([1.0, 1.2, 0.9, 1.1]))
    assert np.isposinf(limits[6])
    assert 49 * np.exp(2.8 * sd) < limits[7] < 50 * np.exp(3 * sd)


def test_a_factor_of_the_reciprocal_target_in_logarithms():
    usual = [1.0, 1.2, 0.9, 1.1]
    mean, sd = np.mean(np.log(usual)), np.std(np.log(usual))
    rule = clipx.thresholds.zscore(
        2.0, space="log", target="reciprocal", clip_factor=0.5, warmup_steps=4
    )
    z = (np.log(50.0) - mean) / sd
    close(trace(rule, [*usual, 50.0])[4], 0.5 * np.exp(mean + 2.0**2 / z * sd))


@pytest.mark.parametrize("name", ["zscore", "ema_ratio", "quantile", "norm_growth"])
def test_numbers_are_given_by_name(name):
    first, *others = inspect.signature(
        getattr(clipx.thresholds, name)
    ).parameters.values()
    assert first.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert {p.kind for p in others} == {inspect.Parameter.KEYWORD_ONLY}


def test_defaults():
    given = {
        (rule.__name__, name): p.default
        for rule in (
            clipx.thresholds.zscore,
            clipx.thresholds.ema_ratio,
            clipx.thresholds.norm_growth,
            clipx.thresholds.group_band,
            clipx.thresholds.quantile_tracker,
        )
        for name, p in inspect.signature(rule).parameters.items()
        if p.default is not inspect.Parameter.empty and p.default is not None
    }
    assert given == {
        ("zscore", "z_threshold"): 2.5,
        ("zscore", "decay"): 0.97,
        ("zscore", "warmup_steps"): 25,
        ("zscore", "space"): "linear",
        ("zscore", "target"): "threshold",
        ("zscore", "clip_factor"): 1.0,
        ("zscore", "include_current"): False,
        ("zscore", "stats"): "clipped",
        ("zscore", "min_relative_sd"): 0.01,
        ("ema_ratio", "decay"): 0.99,
        ("ema_ratio", "warmup_steps"): 0,
        ("ema_ratio", "init"): "first",
        ("ema_ratio", "floor"): 0.0,
        ("ema_ratio", "stats"): "clipped",
        ("norm_growth", "ratio"): 1.01,
        ("norm_growth", "floor"): 0.0,
        ("norm_growth", "stats"): "clipped",
        ("group_band", "decay"): 0.99,
        ("group_band", "floor"): 0.0,
        ("quantile_tracker", "learning_rate"): 0.02,
    }


@pytest.mark.parametrize("y", [1, 1.0, np.float32(1), jnp.float32(1)])
@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("array", [np.full, jnp.full])
def test_where_chooses_by_one_flag_that_is_traced(array, shape, y):
    x = array(shape, 2, jnp.float32)
    chosen = jax.jit(lambda flag: arithmetic.where(flag, x, y))
    assert chosen(True).shape == shape
    close(chosen(True), np.full(shape, 2))
    close(chosen(False), np.full(shape, 1))


def test_what_is_known_is_chosen_at_once():
    one, two = np.float32(1), np.float32(2)
    for mask, want in ((np.True_, 1), (np.False_, 2)):
        found = jax.make_jaxpr(lambda m=mask: arithmetic.where(m, one, two))()
        assert not found.eqns
        assert arithmetic.where(mask, one, two) == want
        assert isinstance(arithmetic.where(mask, one, two), np.ndarray | np.generic)


def test_a_number_like_a_known_one_is_known():
    found = arithmetic.full_like(np.float32(1), 3)
    assert isinstance(found, np.ndarray | np.generic)
    assert found.dtype == np.float32
    assert found == 3
    assert arithmetic.where(np.True_, 3, np.float32(1)) == 3


FLOATS, COUNTS = np.ones(3, np.float32), np.ones(3, np.int32)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (FLOATS, 2 * FLOATS),
        (FLOATS, 0),
        (0.5, FLOATS),
        (COUNTS, 0),
        (True, COUNTS > 0),
        (np.float32(1), 2.0),
        (np.float32(1), FLOATS),
        (2, np.float32(1)),
    ],
)
def test_where_is_a_select_and_no_call(x, y):
    mask = np.array([True, False, True])
    traced = [v if isinstance(v, np.ndarray) else None for v in (x, y)]

    def of_arrays(mask, *given):
        pairs = zip((x, y), given, strict=True)
        return arithmetic.where(mask, *(v if a is None else a for v, a in pairs))

    program = jax.make_jaxpr(of_arrays)(mask, *traced)
    names = [step.primitive.name for step in program.eqns]
    assert names[-1] == "select_n"
    assert set(names[:-1]) <= {"broadcast_in_dim"}
    found = jax.jit(of_arrays)(mask, *traced)
    np.testing.assert_array_equal(found, np.where(mask, x, y))


def test_one_flag_chooses_a_number_or_a_vector_by_a_select():
    program = jax.make_jaxpr(lambda m: arithmetic.where(m, np.float32(1), FLOATS))(True)
    assert program.eqns[-1].primitive.name == "select_n"
    assert program.out_avals[0].shape == FLOATS.shape


def test_of_two_numbers_where_takes_an_entry_for_each_of_the_mask():
    mask = jnp.array([True, False])
    assert arithmetic.where(mask, 1.0, 2.0).tolist() == [1.0, 2.0]
    with jax.numpy_dtype_promotion("standard"):
        assert arithmetic.where(mask, 2.5, np.int32(1)).tolist() == [2.5, 1.0]


def test_a_known_flag_settles_either_and_both():
    flags = jnp.array([True, False])
    assert arithmetic.either(np.False_, flags) is flags
    assert arithmetic.either(flags, np.True_) == np.True_
    assert arithmetic.both(np.True_, flags) is flags
    assert arithmetic.both(flags, np.False_) == np.False_
    known = np.array([False, True])
    assert arithmetic.either(known, flags).tolist() == [True, True]
    assert arithmetic.both(known, flags).tolist() == [False, False]


def test_each_row_has_a_factor():
    with jax.numpy_rank_promotion("allow"):
        found = arithmetic.times(jnp.ones((2, 3)), jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(found, [[1, 2, 3]] * 2)


@pytest.mark.parametrize("y", [1.5, 1e30, 1.8e38, LARGEST])
def test_a_quotient_by_a_large_number_is_rounded_once(y):
    x = np.linspace(0.1, 1, 50, dtype=np.float32) * np.float32(y)
    found = arithmetic.quotient(jnp.asarray(x), jnp.full(50, y, jnp.float32))
    np.testing.assert_array_equal(found, x / np.float32(y))


def test_of_two_dtypes_the_wider_is_chosen():
    wide, narrow = jnp.ones(3), jnp.zeros(3, jnp.float16)
    mask = jnp.array([True, False, True])
    with jax.numpy_dtype_promotion("standard"):
        found = arithmetic.where(mask, wide, narrow)
        other = arithmetic.where(mask, narrow, wide)
    assert found.dtype == other.dtype == jnp.float32
    np.testing.assert_array_equal(found, [1, 0, 1])
    np.testing.assert_array_equal(other, [0, 1, 0])


def test_an_array_like_a_sharded_one_is_sharded_like_it():
    kind = jax.sharding.AxisType.Explicit
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    like = jax.device_put(jnp.zeros(8), sharding)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda x: arithmetic.full_like(x, 2.0))(like)
    assert jax.typeof(found).sharding.spec == jax.P("data")
    np.testing.assert_array_equal(found, 2.0)


def test_text_is_no_concrete_number():
    assert arithmetic.is_concrete([jnp.ones(2), np.ones(2), np.float32(1), 1.0, 2])
    assert not arithmetic.is_concrete([1.0, "one"])
