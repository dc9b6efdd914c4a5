"""Faults that noise, a NaN, or what the run did before hides: found in real runs."""

import numpy as np

import optax_clipx as clipx

TIME = np.arange(600)


def noisy(deviation, seed=0):
    return np.exp(deviation * np.random.default_rng(seed).normal(size=600))


def found(run, code, **names):
    (finding,) = [x for x in clipx.diagnose(run, **names).findings if x.code == code]
    return finding


def test_a_run_that_was_always_clipped_until_a_nan():
    norms = np.where(TIME < 300, 1.0, np.nan)
    assert found({"norm": norms}, "always-clipped", threshold=0.1).steps == (0, 299)


def test_a_run_that_was_never_clipped_until_a_nan():
    norms = np.where(TIME < 300, 1.0, np.nan)
    assert found({"norm": norms}, "never-clipped", threshold=50).steps == (0, 299)


def test_a_spike_before_a_rule_has_a_threshold_blinds_it():
    norms, limits = noisy(0.1), 2 + 100 * 0.98**TIME
    norms[20], limits[:50] = 80.0, np.inf
    finding = found({"clip/norm": norms, "clip/threshold": limits}, "warmup-spike")
    assert finding.steps == (20,)
    assert 140 <= finding.evidence["blind_steps"] <= 150  # 50 + 145: at 4 times 1.0


def test_norms_that_fall_from_the_start_are_no_spike():
    norms = noisy(0.1) * (1 + 20 * np.exp(-TIME / 30))
    limits = 2 + 100 * 0.99**TIME
    run = {"clip/norm": norms, "clip/threshold": limits}
    assert "warmup-spike" not in clipx.diagnose(run).codes


def test_a_norm_that_passes_now_and_then_ends_no_lock_out():
    skipped = np.where(TIME < 200, 0.0, 1.0)
    skipped[250] = 0.0
    run = {"norm": np.ones(600), "skip/skipped": skipped}
    assert found(run, "lock-out").steps == (200, 599)


def test_periodic_spikes_are_found_where_no_single_one_is_beyond_chance():
    norms = noisy(0.6)
    norms[40::70] *= 7
    finding = found({"norm": norms}, "periodic-spikes")
    assert finding.evidence["period"] == 70
    alone = noisy(0.6)
    alone[320] *= 7
    assert clipx.diagnose({"norm": alone}).codes == ()


def test_periodic_spikes_are_found_among_spikes_as_high():
    rng = np.random.default_rng(0)
    norms = np.exp(0.4 * rng.standard_normal(600))
    norms[rng.choice(600, 12, replace=False)] *= 8
    assert "periodic-spikes" not in clipx.diagnose({"norm": norms}).codes
    norms[25::48] *= 8
    finding = found({"norm": norms}, "periodic-spikes")
    assert finding.evidence["period"] == 48
    assert set(finding.steps) <= set(range(25, 600, 48))


def test_a_spike_in_a_quiet_part_of_a_run_that_grows_noisy():
    noise = np.random.default_rng(3).standard_normal(600)
    norms = np.exp(noise * np.where(TIME < 300, 0.2, 1.2))
    norms[150] = 8.0  # a few norms of the second half are as high
    assert norms[300:].max() > 8
    assert found({"norm": norms}, "spikes").steps == (150,)


def test_a_shift_among_norms_that_vary_by_a_factor_of_ten():
    noise = np.random.default_rng(3).standard_normal(600)
    norms = np.exp(np.where(noise > 0, 0.3, 1.6) * noise)  # now and then next to none
    assert "level-shift" not in clipx.diagnose({"norm": norms}).codes
    norms[300:] *= 6
    steps = found({"norm": norms}, "level-shift").steps
    assert min(abs(step - 300) for step in steps) <= 5


def test_norms_grow_while_more_and_more_batches_have_no_gradient():
    rng = np.random.default_rng(0)
    norms = np.exp(TIME / 100 + 0.2 * rng.standard_normal(600))
    norms[rng.random(600) < 0.7 * TIME / 600] *= 1e-6
    run = {"norm": norms, "loss": np.ones(600)}
    assert found(run, "growing-norms").evidence["factor"] > 50


def test_norms_that_rise_with_the_schedule_in_noise():
    rng = np.random.default_rng(0)
    norms = np.exp(0.002 * TIME + 0.9 * rng.standard_normal(600))
    rate = 0.01 * 0.996**TIME
    assert found({"norm": norms, "learning_rate": rate}, "rises-with-schedule")
    level = np.exp(1.2 * rng.standard_normal(600))
    run = {"norm": level, "learning_rate": rate}
    assert "rises-with-schedule" not in clipx.diagnose(run).codes


def test_updates_come_before_a_loss_that_varies_by_factors_of_ten():
    rng = np.random.default_rng(0)
    loss = np.exp(1.5 * rng.standard_normal(600)) / 50
    update = 0.01 * noisy(0.1)
    update[300:304] *= 50
    run = {"loss": loss, "update_norm": update, "norm": noisy(0.1, 2)}
    assert "update-before-loss" not in clipx.diagnose(run).codes
    loss[303:313] = 2 * loss.max()
    assert found(run, "update-before-loss").steps[0] == 300


def test_a_high_norm_of_noise_blinds_no_rule():
    norms = np.exp(1.2 * np.random.default_rng(5).standard_normal(600))
    limits = 30 + 0 * TIME + 0.01 * TIME
    run = {"clip/norm": norms, "clip/threshold": limits}
    assert "warmup-spike" not in clipx.diagnose(run).codes
    norms[20] = 400.0
    assert found(run, "warmup-spike").steps == (20,)


def test_norms_that_fell_before_they_rise_with_the_schedule():
    norms = (0.3 + 7 * np.exp(-TIME / 40)) * np.exp(TIME / 300) * noisy(0.1)
    rate = 0.01 * 0.996**TIME
    finding = found({"norm": norms, "learning_rate": rate}, "rises-with-schedule")
    assert finding.evidence["factor"] > 3  # from the lowest level on


def test_a_lasting_rise_of_the_updates_before_the_loss():
    update, loss = 0.01 * noisy(0.1), 0.5 * noisy(0.1, 1)
    update[300:] *= 20
    loss[302:] *= 4
    run = {"norm": noisy(0.1, 2), "update_norm": update, "loss": loss}
    assert found(run, "update-before-loss").steps == (300,)


def test_a_divergence_is_noisier_than_what_was_before_it():
    loss = 0.5 * noisy(0.1)
    loss[300:] = 20 * noisy(1.5, 1)[300:]
    finding = found({"loss": loss}, "loss-diverged")
    assert abs(finding.steps[0] - 300) <= 5


def test_norms_that_grow_while_the_loss_slowly_diverges():
    norms = noisy(0.2) * np.exp(np.maximum(0, TIME - 150) / 80)
    loss = (0.1 + 2 * np.exp(-TIME / 30)) * np.exp(np.maximum(0, TIME - 160) / 100)
    finding = found({"norm": norms, "loss": loss * noisy(0.1, 1)}, "growing-norms")
    assert finding.severity == "error"


def test_a_level_shift_in_noise_is_found_where_the_run_has_settled():
    norms = noisy(0.5)
    norms[350:] *= 2.5
    finding = found({"norm": norms}, "level-shift")
    assert abs(finding.steps[0] - 350) <= 5
