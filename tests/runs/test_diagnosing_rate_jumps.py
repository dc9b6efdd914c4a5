"""Runs that explode within a few steps, and jumps of the learning rate before that."""

import numpy as np
import pytest

import optax_clipx as clipx

LOSSES = [8.4, 215.0, 63.0, 5.5e5, 1.3e5, 1.3e22]
NORMS = [17.0, 230.0, 150.0, 3.4e5, 3.3e5, 1.4e19]
JUMP = " At step 250 the learning rate rises from 0.02 to 0.24 (12 times as high)."
REMEDY = "learning_rate = 0.02  # load a checkpoint from before step 250; if you"


def exploding(left=143):
    """Healthy up to step 250; then six steps of growth, and what is not finite."""
    rows = np.arange(251)
    loss, norm = 0.5 + 0.1 * (rows % 7), 1.2 + 0.2 * (rows % 5)
    rate = np.full(257 + left, 0.02)
    rate[250:] = 0.24
    update = np.r_[0.1 + 0.01 * (rows[:250] % 3), 1.4, 5.0, 68.0, 72.0]
    update = np.r_[update, 9e4, 1e5, 3e18, np.full(left, np.nan)]
    return {
        "loss": np.r_[loss, LOSSES, np.full(left, np.inf)],
        "grad_norm": np.r_[norm, NORMS, np.full(left, np.nan)],
        "learning_rate": rate,
        "update_norm": update,
    }


def without(run, *names):
    return {name: values for name, values in run.items() if name not in names}


def found(run, code):
    return next((x for x in clipx.diagnose(run).findings if x.code == code), None)


@pytest.mark.parametrize("left", [143, 6, 0])
def test_an_explosion_at_the_end_of_a_run_is_found(left):
    """Whether or not the recording ends before the first number that is not finite."""
    run = without(exploding(left), "update_norm")
    diverged, growth = found(run, "loss-diverged"), found(run, "growing-norms")
    assert (diverged.severity, diverged.steps) == ("error", (251,))
    assert (growth.severity, growth.steps) == ("error", (250, 256))
    assert "to 1.3e+22" in diverged.sentence


def test_a_loss_or_a_norm_alone_shows_the_explosion():
    run = exploding()
    assert found({"loss": run["loss"]}, "loss-diverged").steps == (251,)
    assert found({"norm": run["grad_norm"]}, "growing-norms").steps == (250, 256)


@pytest.mark.parametrize("last", [[1e6], [1e6, 0.5], [400.0, 400.0], [1e6, 500.0]])
def test_high_losses_at_the_end_are_no_explosion(last):
    """One of them may be a bad batch; two of them must be 1,000 times as high."""
    loss = np.r_[0.5 + 0.1 * (np.arange(250) % 7), last]
    assert "loss-diverged" not in clipx.diagnose({"loss": loss}).codes


def test_a_run_that_was_as_high_before_does_not_explode():
    run = without(exploding(0), "update_norm", "learning_rate")
    run["loss"][:2], run["grad_norm"][:2] = 1e22, 1e19
    assert not {"loss-diverged", "growing-norms"} & set(clipx.diagnose(run).codes)


@pytest.mark.parametrize(
    "code", ["update-before-loss", "growing-norms", "loss-diverged", "nonfinite"]
)
def test_each_finding_of_an_explosion_names_the_jump_of_the_learning_rate(code):
    explained = found(exploding(), code)
    assert explained.sentence.endswith(JUMP)
    assert explained.advice.startswith(REMEDY)
    assert explained.evidence["rate_jump"] == 250


def test_causes_come_before_what_follows_from_them():
    diagnosis = clipx.diagnose(exploding())
    assert diagnosis.codes == (
        *("update-before-loss", "growing-norms", "loss-diverged", "nonfinite"),
    )
    assert str(diagnosis).splitlines()[1] == (
        "It started with update-before-loss at step 250; then came growing-norms at"
        " step 250, then loss-diverged at step 251, then nonfinite at step 257."
    )


def warmup(step):
    return 0.24 * np.minimum(1, (step + 1) / 245)


def constant(step):
    return np.full(len(step), 0.24)


def long_before(step):
    return np.where(step < 200, 0.02, 0.24)


def falling(step):
    return np.where(step < 250, 0.24, 0.02)


@pytest.mark.parametrize("schedule", [warmup, constant, long_before, falling])
def test_other_learning_rates_do_not_jump(schedule):
    run = exploding()
    run["learning_rate"] = schedule(np.arange(400))
    diverged = found(run, "loss-diverged")
    assert "rate_jump" not in diverged.evidence
    assert "first lower the learning rate" in diverged.advice


def test_a_warmup_over_the_first_steps_is_no_jump():
    """The rate doubles within four steps, up to the eighth."""
    run = {name: values[240:] for name, values in exploding().items()}
    run["learning_rate"] = 0.24 * np.minimum(1, np.arange(160) / 50)
    assert "rate_jump" not in found(run, "loss-diverged").evidence


def test_a_rate_that_rises_within_four_steps_jumps():
    run = exploding()
    run["learning_rate"][248:252] = [0.04, 0.09, 0.16, 0.24]
    evidence = found(run, "loss-diverged").evidence
    assert evidence["rate_jump"] == 248
    assert [evidence["rate_before"], evidence["rate_after"]] == [0.02, 0.24]


def test_a_nan_after_a_divergence_has_the_remedy_of_the_divergence():
    run = without(exploding(), "learning_rate", "update_norm")
    assert found(run, "nonfinite").advice.startswith(
        "# follow the advice for growing-norms: the run diverges before this step"
    )


@pytest.mark.parametrize(
    ("first", "line"),
    [
        ("loss", 'jax.config.update("jax_debug_nans", True)  # stops at'),
        ("norm", 'clipx.clip_by_global_norm(1.0, nonfinite="raise")'),
    ],
)
def test_the_remedy_for_a_nan_depends_on_where_it_is_first(first, line):
    run = {"loss": np.ones(100), "norm": np.ones(100)}
    run[first][50:] = np.nan
    assert found(run, "nonfinite").advice.startswith(line)


def test_the_loss_rises_one_step_after_the_update_that_was_too_large():
    updates = found(exploding(), "update-before-loss")
    assert updates.evidence["lead"] == 1
    assert updates.sentence.startswith(
        "The norm of the updates rises, and the loss rises 1 step later."
    )


def test_the_remedy_for_large_updates_has_three_times_their_median():
    run = without(exploding(), "learning_rate")
    assert found(run, "update-before-loss").advice.startswith(
        "optax.chain(optimizer, clipx.clip_by_global_norm(0.33))"
    )


def test_updates_before_a_loss_that_recovers_are_a_warning():
    run = without(exploding(0), "learning_rate", "grad_norm")
    run = {name: np.r_[values[:250], values[:250]] for name, values in run.items()}
    run["update_norm"][250:260] = 1.0
    run["loss"][251:280] = 9.0
    assert found(run, "update-before-loss").severity == "warning"


def shifted(factor):
    norms = np.exp(0.05 * np.random.default_rng(0).normal(size=400))
    norms[200:] *= factor
    return {"norm": norms}


@pytest.mark.parametrize(
    ("factor", "severity"), [(0.25, "warning"), (0.5, "info"), (2.0, "warning")]
)
def test_a_fall_of_the_level_to_a_half_is_for_information(factor, severity):
    assert found(shifted(factor), "level-shift").severity == severity


@pytest.mark.parametrize("factor", [0.59, 1.7])
def test_a_level_that_changes_by_less_is_no_shift(factor):
    assert clipx.diagnose(shifted(factor)).codes == ()


def test_overflows_of_a_loss_scale_that_were_skipped_are_for_information():
    run = {"loss": np.ones(100), "clip/norm": np.ones(100), "skip/norm": np.ones(100)}
    run["skip/skipped"] = np.zeros(100)
    for step, value in ((10, np.nan), (11, np.inf)):
        run["skip/norm"][step], run["clip/norm"][step] = value, 0.0
        run["skip/skipped"][step] = 1.0
    overflow = found(run, "nonfinite")
    assert (overflow.severity, overflow.steps) == ("info", (10,))
    assert overflow.evidence["first_in"] == "skip/norm"
    assert overflow.sentence == (
        "2 steps were skipped because the gradients were not finite. This is normal"
        " while a dynamic loss scale is found."
    )
    run["loss"][50] = np.nan
    assert found(run, "nonfinite").severity == "warning"


def test_a_nan_of_a_leaf_is_in_the_column_of_the_leaf():
    leaves = {f"track_norms/{name}": np.ones(100) for name in "ab"}
    leaves["track_norms/b"][50] = np.nan
    assert found(leaves, "nonfinite").evidence["first_in"] == "track_norms/b"


def test_the_cause_and_its_remedy_are_printed_once():
    text = str(clipx.diagnose(exploding())) + "\n"
    line = "  learning_rate = 0.02  ("
    assert text.count(JUMP) == text.count(line) == 1
    assert text.count("Load a checkpoint from before step 250, and set the") == 1
    assert text.count("  First follow the advice for update-before-loss.  (") == 3
    html = clipx.diagnose(exploding())._repr_html_()
    assert html.count("<code>") == html.count(line.strip()) == 1


def test_a_cause_that_two_warnings_share_is_printed_once():
    """Neither is an error, so that none follows from the other."""
    run = without(exploding(0), "grad_norm")
    run = {name: np.r_[values[:250], values[:250]] for name, values in run.items()}
    run["update_norm"][250:260] = 1.0
    run["loss"][251:280] = 9.0
    run["loss"][256] = np.nan
    run["learning_rate"][250:] = 0.24
    text = str(clipx.diagnose(run))
    assert "warning: update-before-loss" in text
    assert "warning: nonfinite at step 256" in text
    assert text.count(JUMP) == text.count("Load a checkpoint") == 1
    assert text.count("First follow the advice for update-before-loss.  (") == 1
