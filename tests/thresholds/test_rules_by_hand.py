"""Thresholds of a few norms, computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clipx as clipx
from optax_clipx._thresholds.base import refusals
from optax_clipx._thresholds.spikes import spikes_of_losses, spikes_of_norms
from optax_clipx._trees.arithmetic import at_least_float32, shaped_like

NOW = clipx.thresholds.Context(0)


def after(rule, norms):
    """The threshold of each norm, and the last state."""
    state = rule.init(jnp.zeros_like(jnp.float32(norms[0])))
    limits = []
    for norm in norms:
        limit, state = rule.update(jnp.float32(norm), state, NOW)
        limits.append(limit)
    return np.array(limits), state


def test_a_warmup_ends_for_good():
    limits, _ = after(clipx.thresholds.warmup(3.0, then=9.0, steps=2), [1.0] * 5)
    assert limits.tolist() == [3, 3, 9, 9, 9]


def test_a_window_moves_to_a_new_level_in_proportion():
    rule = clipx.thresholds.zscore(
        3.0, window=4, warmup_steps=4, patience=2, stats="skip"
    )
    limits, state = after(rule, [1.0, 1.2, 0.8, 1.0, 10.0, 10.0])
    np.testing.assert_allclose(limits[4], 1 + 3 * 0.02**0.5, rtol=1e-6)
    np.testing.assert_allclose(state.window, [10, 12, 8, 10], rtol=1e-6)


def test_the_usual_norm_of_auto_clip_starts_with_a_quick_pace():
    _, state = after(clipx.thresholds.auto(), [1.0])
    np.testing.assert_allclose(state.usual, np.exp(-0.25), rtol=1e-6)
    _, state = after(clipx.thresholds.auto(), [1.0, 2.0])
    np.testing.assert_allclose(state.usual, np.exp(-1 / 4 + 1 / 6), rtol=1e-6)


# Of these eight the level is 0, and the third and the sixth are 2 sizes off.
EIGHT = np.array([-4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0])
DEVIATION = 8 / 0.945


@pytest.mark.parametrize(
    ("size", "above"),
    [(0.05, 5 * 0.05 * DEVIATION), (0.1, np.log(15)), (0.4, 3 * 0.4 * DEVIATION)],
)
def test_spikes_of_norms_are_five_deviations_or_fifteen_times_or_three(size, above):
    limits, _ = after(spikes_of_norms(10), [*np.exp(size * EIGHT), 1.0])
    np.testing.assert_allclose(np.log(limits[-1]), above, rtol=1e-3)


def test_spikes_of_losses_are_seven_deviations():
    limits, _ = after(spikes_of_losses(10), [*EIGHT, 0.0])
    np.testing.assert_allclose(limits[-1], 7 * DEVIATION, rtol=1e-3)


def test_groups_have_histograms_of_their_own():
    rule = clipx.thresholds.quantile(0.5)
    one, other = [1.0, 2.0, 3.0], [50.0, 20.0, 10.0]
    both, _ = after(rule, np.stack([one, other], axis=1))
    np.testing.assert_array_equal(both[:, 0], after(rule, one)[0])
    np.testing.assert_array_equal(both[:, 1], after(rule, other)[0])


def test_what_is_narrower_than_float32_is_widened():
    assert at_least_float32(jnp.ones(1, jnp.bfloat16)) == jnp.float32
    assert at_least_float32(jnp.ones(1, jnp.float32)) == jnp.float32
    with jax.enable_x64(True):
        assert at_least_float32(jnp.ones(1, jnp.float64)) == jnp.float64


def test_auto_clip_goes_on_from_a_state_in_half_precision():
    _, state = after(clipx.thresholds.auto(), [1.0, 3.0, 2.0])
    narrow = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, state
    )
    with jax.numpy_dtype_promotion("standard"):
        limit, _ = clipx.thresholds.auto().update(jnp.float32(5.0), narrow, NOW)
    np.testing.assert_allclose(limit, 0.8 * 0.328 * 2, rtol=1e-6)


def test_a_window_forgets_the_oldest_norm_for_as_long_as_it_runs():
    limits, _ = after(clipx.thresholds.quantile(0.5, window=3), np.arange(1.0, 14))
    assert limits.tolist() == [1, 1.5, *range(2, 13)]


def test_each_of_several_norms_has_a_window():
    rule = clipx.thresholds.quantile(0.5, window=3)
    limits, _ = after(rule, np.array([[1.0, 9], [2, 8], [4, 1], [3, 5]]))
    assert limits.tolist() == [[1, 9], [1.5, 8.5], [2, 8], [3, 5]]


def test_what_could_lock_out_gives_in_after_fifty_norms():
    assert refusals("skip", None).patience == 50
    assert refusals("skip", 7).patience == 7
    assert refusals("raw", None).patience is None
    rule = clipx.thresholds.zscore(1.0, warmup_steps=2, stats="skip")
    limits, _ = after(rule, [1.0, 1.0] + [100.0] * 52)
    assert np.all(limits[2:51] < 2)
    assert limits[53] > 2


def test_a_norm_of_zero_is_no_step_of_a_warmup():
    limits, _ = after(
        clipx.thresholds.warmup(3.0, then=9.0, steps=2), [1.0, 0.0, 1.0, 1.0]
    )
    assert limits.tolist() == [3, 3, 3, 9]


def test_a_product_needs_the_step_if_either_part_does():
    scaled, schedule = clipx.thresholds.scaled, optax.constant_schedule(2.0)
    assert scaled(1.0, schedule).uses_step
    assert scaled(schedule, 2.0).uses_step
    assert not scaled(1.0, 2.0).uses_step


def test_a_rule_may_give_one_threshold_for_several_norms():
    single = (lambda norms: (), lambda norms, state, context: (jnp.float32(2), state))
    rule = clipx.thresholds.minimum(single, 5.0)
    norms = jnp.array([1.0, 3.0])
    limits, _ = rule.update(norms, rule.init(norms), NOW)
    assert limits.tolist() == [2, 2]
    of_units = (norms, norms[:, None])
    limits, _ = rule.update(of_units, rule.init(of_units), NOW)
    assert [x.tolist() for x in limits] == [[2, 2], [[2], [2]]]


def test_norms_beyond_the_last_bin_count():
    limits, _ = after(clipx.thresholds.quantile(1.0), [1.0, 1e20, 1e20])
    assert np.all(limits[1:] > 9e11)
    limits, _ = after(clipx.thresholds.quantile(0.3), [1.0, 1e20, 1e20])
    np.testing.assert_allclose(limits, 1, rtol=0.03)


def test_losses_are_judged_in_proportion_to_their_level():
    losses = np.array([1.0] * 8 + [1.0, 1.5])
    small, _ = after(spikes_of_losses(10), losses)
    large, _ = after(spikes_of_losses(10), 1000 * losses)
    np.testing.assert_allclose(large[8:], 1000 * small[8:], rtol=1e-5)


@pytest.mark.parametrize(("window", "decay"), [(None, 0.97), (4, 1.0)])
def test_a_new_level_has_its_deviation_in_proportion(window, decay):
    rule = clipx.thresholds.zscore(
        3.0, window=window, warmup_steps=4, patience=2, stats="skip"
    )
    norms = 0.01 * np.array([1.0, 1.2, 0.8, 1.0, 10.0, 10.0, 10.0])
    limits, _ = after(rule, norms)
    np.testing.assert_allclose(limits[4], 0.01 * (1 + 3 * 0.02**0.5), rtol=1e-5)
    # The norm that is the new level has entered an average of 0.97 once.
    after_one = 0.1 * (1 + 3 * (0.02 * decay) ** 0.5)
    np.testing.assert_allclose(limits[6], after_one, rtol=1e-5)


def test_without_a_warmup_the_first_norm_passes():
    limits, _ = after(clipx.thresholds.zscore(3.0, warmup_steps=0), [5.0, 5.0])
    assert limits[0] == np.inf
    assert np.isfinite(limits[1])


def test_small_parameters_count_as_a_thousandth():
    relative = clipx.thresholds.relative_to_params
    context = clipx.thresholds.Context(0, params_norms=jnp.array([1e-4, 2.0]))
    limits, _ = relative(0.1).update(jnp.ones(2), (), context)
    np.testing.assert_allclose(limits, [1e-4, 0.2], rtol=1e-6)


def test_a_relative_threshold_needs_the_step_if_either_number_does():
    relative, schedule = clipx.thresholds.relative_to_params, lambda step: 0.1
    assert relative(schedule).uses_step
    assert relative(0.1, eps=schedule).uses_step
    assert not relative(0.1).uses_step


def test_with_a_decay_of_one_the_average_stays():
    limits, _ = after(clipx.thresholds.ema_ratio(1.5, decay=1.0), [1.0, 1.2, 1.4])
    np.testing.assert_allclose(limits, 1.5, rtol=1e-6)


def test_norms_far_above_are_counted_anew_after_one_far_below():
    _, state = after(spikes_of_norms(2), [1.0] * 8 + [1e-3, 1e3, 1e3])
    np.testing.assert_allclose(state.level, np.log(1e3), rtol=1e-6)


def test_the_spread_of_logarithms_is_at_least_a_tenth():
    rule = spikes_of_norms(50)
    state = rule.init(jnp.float32(0))._replace(
        seen=jnp.int32(100), spread=jnp.float32(0.1)
    )
    _, state = rule.update(jnp.float32(1.0), state, NOW)
    assert state.spread == np.float32(0.1)


def test_a_tuple_of_one_schedule_is_a_pytree_of_thresholds():
    clipper = clipx.clip_by_leaf_norm((optax.constant_schedule(1.0),))
    tree = (jnp.array([3.0, 4.0]),)
    (clipped,), _ = clipper.update(tree, clipper.init(tree))
    np.testing.assert_allclose(clipped, [0.6, 0.8], rtol=1e-6)


def test_a_window_has_the_mean_and_the_deviation_of_each_norm():
    rule = clipx.thresholds.zscore(2.0, window=3, warmup_steps=1, stats="raw")
    limits, _ = after(rule, np.array([[1.0, 40], [2, 10], [4, 10], [9, 30]]))
    want = [[1.02, 40.8], [1.5 + 2 * 0.5, 25 + 2 * 15]]
    want += [[7 / 3 + 2 * (14 / 9) ** 0.5, 20 + 2 * 200**0.5]]
    np.testing.assert_allclose(limits[1:], want, rtol=1e-6)


def test_a_warmup_of_one_step_ends_after_it():
    rule = clipx.thresholds.zscore(9.0, decay=0.9, warmup_steps=1, stats="raw")
    _, state = after(rule, [1.0, 2.0])
    np.testing.assert_allclose(state.mean, 0.9 * 1 + 0.1 * 2, rtol=1e-6)


def test_the_third_loss_in_a_row_far_below_is_the_level():
    rule = spikes_of_losses(3)
    _, state = after(rule, [1.0] * 8 + [-50.0] * 2)
    assert state.far == -2
    assert state.level == 1
    _, state = after(rule, [1.0] * 8 + [-50.0] * 3)
    np.testing.assert_allclose(state.level, -50, rtol=1e-6)


def test_the_spread_of_losses_is_at_least_a_hundredth_of_their_level():
    rule = spikes_of_losses(50)
    state = rule.init(jnp.float32(0))._replace(
        seen=jnp.int32(10**5), level=jnp.float32(3.0), spread=jnp.float32(0.03)
    )
    _, state = rule.update(jnp.float32(3.0), state, NOW)
    np.testing.assert_allclose(state.spread, 0.03, rtol=1e-6)


def test_a_tracked_quantile_may_be_below_one():
    rule = clipx.thresholds.quantile_tracker(0.5, learning_rate=0.2)
    limits, _ = after(rule, [0.5, 9.0, 9.0])
    np.testing.assert_allclose(limits, 0.5 * np.exp([0, -0.1, 0]), rtol=1e-6)


def test_a_traced_decay_of_one_is_in_range():
    @jax.jit
    def target(decay):
        rule = clipx.thresholds.group_band(0.5, 2.0, decay=decay)
        return rule.update(jnp.float32(2.0), rule.init(jnp.float32(0)), NOW)[0]

    assert target(1.0) == 2
    assert np.isnan(target(1.5))


def test_losses_far_below_are_counted_anew_after_one_far_above():
    losses = [*(2 + 0.1 * EIGHT), 100.0, -100.0]
    _, state = after(spikes_of_losses(10), losses)
    assert state.far == -1


def test_a_loss_needs_no_step():
    assert not spikes_of_losses(10).uses_step


def test_a_new_level_near_the_largest_number_leaves_a_finite_window():
    rule = clipx.thresholds.zscore(
        3.0, window=4, warmup_steps=4, patience=2, stats="skip"
    )
    _, state = after(rule, [1.0, 1.0, 1.0, 9.0, 2e38, 2e38])
    assert np.isfinite(state.window).all()


def test_a_band_needs_the_step_if_either_end_is_a_schedule():
    rising = optax.linear_schedule(1.5, 2.0, 10)
    assert clipx.thresholds.group_band(0.5, rising).uses_step
    assert not clipx.thresholds.group_band(0.5, 1.5).uses_step


def test_a_plain_tuple_whose_first_two_entries_are_functions_is_a_rule():
    rule = clipx.thresholds.constant(2.0)
    clipper = clipx.clip_by(clipx.measures.tree_norm(), tuple(rule))
    clipped, _ = clipper.update(jnp.array([5.0]), clipper.init(jnp.zeros(1)))
    assert clipped.tolist() == [2.0]


def test_two_thresholds_for_one_norm_are_refused():
    with pytest.raises(ValueError, match="broadcast"):
        shaped_like(np.array([1.0, 2.0]), jnp.float32(1.0))


def test_a_rule_says_whether_it_looks_at_norms():
    assert not clipx.thresholds.constant(1.0).uses_norms
    assert not clipx.thresholds.relative_to_params(0.1).uses_norms
    assert clipx.thresholds.zscore().uses_norms
    assert clipx.thresholds.minimum(1.0, clipx.thresholds.zscore()).uses_norms


def test_a_rule_of_two_functions_sees_the_step_without_metrics():
    rule = clipx.thresholds.Threshold(
        lambda norms: (), lambda norms, state, context: (context.step + 1, state)
    )
    clipper = clipx.clip_by(clipx.measures.tree_norm(), rule, metrics=False)
    state = clipper.init(jnp.zeros(1))
    for step in range(3):
        clipped, state = clipper.update(jnp.array([9.0]), state)
        assert clipped.tolist() == [step + 1]


def test_a_tuple_of_a_schedule_and_a_number_are_two_thresholds():
    limits = (optax.constant_schedule(2.0), 3.0)
    clipper = clipx.clip_by_leaf_norm(limits)
    grads = (jnp.array([9.0]), jnp.array([9.0]))
    (first, second), _ = clipper.update(grads, clipper.init(grads))
    assert (first.item(), second.item()) == (2, 3)


@pytest.mark.parametrize("init", ["min", "mean"])
def test_an_average_of_a_warmup_goes_on_after_it(init):
    rule = clipx.thresholds.ema_ratio(1.5, decay=0.5, warmup_steps=1, init=init)
    limits, state = after(rule, [1.0, 4.0])
    assert limits.tolist() == [np.inf, 1.5]
    assert state.average == 1.25  # of the clipped norm, 1.5
    rule = clipx.thresholds.ema_ratio(1.5, decay=0.5, init=init)
    assert after(rule, [4.0])[0].tolist() == [6]


def test_small_norms_in_a_warm_up_are_limited_too():
    rule = clipx.thresholds.ema_ratio(2.0, warmup_steps=2, warmup_limit=0.1)
    limits, _ = after(rule, [0.5, 0.05])
    np.testing.assert_allclose(limits, [0.1, np.inf], rtol=1e-6)


def test_a_norm_at_its_threshold_enters_the_average():
    rule = clipx.thresholds.ema_ratio(2.0, decay=0.5, stats="skip")
    limits, state = after(rule, [1.0, 2.0])
    assert limits[1] == 2
    assert state.average == 1.5


def test_without_patience_a_refused_norm_is_seen_in_the_state():
    rule = clipx.thresholds.ema_ratio(2.0)
    _, state = after(rule, [1.0, 9.0, 9.0])
    assert state.refused == 1
    _, state = after(rule, [1.0, 9.0, 1.0])
    assert state.refused == 0


def test_a_full_window_counts_up_to_twice_its_size():
    rule = clipx.thresholds.zscore(3.0, window=4, warmup_steps=4)
    counts = [int(after(rule, [1.0] * n)[1].seen) for n in range(1, 14)]
    assert counts == [1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5]


def test_the_level_of_losses_is_a_mean_over_sixteen():
    rule = spikes_of_losses(50)
    _, state = after(rule, [1.0] * 40)
    assert state.level == 1
    _, state = after(rule, [1.0] * 40 + [1.016])
    np.testing.assert_allclose(state.level, 1.001, rtol=1e-6)
