"""Runs that explode, early or after a spike, and runs of few steps."""

import numpy as np
import pytest

import optax_clipx as clipx

LOWER = "first lower the learning rate, for example to a third"
LOSSES = [2.3, 2.1, 6.0, 40.0, 700.0, 3e4, 1e7, 1e12, 1e25]
NORMS = [1.5, 1.4, 5.0, 30.0, 200.0, 5e3, 1e6, 1e9, 1e19]


def then(values, rest, count=200):
    """Values, and another one for the rest of so many steps."""
    return np.r_[values, np.full(count - len(values), rest)]


def found(run, code):
    return next((x for x in clipx.diagnose(run).findings if x.code == code), None)


@pytest.mark.parametrize("rest", [np.nan, np.inf])
@pytest.mark.parametrize("count", [10, 200])
def test_a_loss_that_explodes_in_the_first_steps_has_diverged(rest, count):
    diverged = found({"loss": then(LOSSES, rest, count)}, "loss-diverged")
    assert (diverged.severity, diverged.steps) == ("error", (2,))
    assert diverged.evidence["best"] == 2.1
    assert LOWER in diverged.advice


@pytest.mark.parametrize("rest", [np.nan, np.inf])
@pytest.mark.parametrize("count", [10, 200])
def test_norms_that_explode_in_the_first_steps_grow(rest, count):
    growth = found({"norm": then(NORMS, rest, count)}, "growing-norms")
    assert (growth.severity, growth.steps) == ("error", (1, 8))
    assert growth.evidence["factor"] == pytest.approx(1e19 / 1.4)
    assert growth.evidence["warned"] == 2
    assert growth.evidence["diverged"] == 9
    assert LOWER in growth.advice


def test_an_explosion_after_sixty_steps_is_named():
    """Most of the last levels are of steps before it."""
    assert found({"norm": then([1.0] * 60 + NORMS, np.nan)}, "growing-norms")


def test_an_explosion_in_one_step_from_the_start_is_named():
    run = {"loss": then([5.0, 1e30], np.nan), "norm": then([3.0, 1e20], np.nan)}
    assert {"loss-diverged", "growing-norms"} <= set(clipx.diagnose(run).codes)


def test_a_nan_after_steady_steps_is_no_explosion():
    steady = then(np.tile([2.0, 3.0, 1.0, 4.0], 5), np.nan)
    assert clipx.diagnose({"loss": steady, "norm": steady}).codes == ("nonfinite",)


def test_one_bad_batch_before_a_nan_is_no_growth():
    assert clipx.diagnose({"norm": then([1.0] * 20 + [1e4], np.nan)}).codes == (
        "nonfinite",
    )


def test_norms_that_come_back_before_a_nan_do_not_grow():
    back = [900.0, 500.0, 30.0, 1.0, 20.0, 300.0, 600.0]
    assert clipx.diagnose({"norm": then(back, np.nan)}).codes == ("nonfinite",)


def test_a_short_run_that_explodes_without_a_nan_is_named():
    loss = 5 * 10 ** np.linspace(0, 27, 35)
    diverged = found({"loss": loss}, "loss-diverged")
    assert diverged.sentence == (
        "The loss rises from its best level, 5 (step 0), to 5e+27 at the end (step 34)."
    )
    assert diverged.steps == (1,)
    assert LOWER in diverged.advice


@pytest.mark.parametrize(
    "norms", [np.linspace(0.01, 3.0, 35), then([1.0] * 34, 1e5, 35)]
)
def test_short_runs_whose_norms_rise_otherwise_are_not_named(norms):
    """A warm-up, and one spike at the end."""
    assert clipx.diagnose({"norm": norms}).codes == ()


def test_a_loss_that_has_nearly_vanished_does_not_explode():
    loss = np.r_[10.0 ** np.linspace(0, -8, 20), 10.0 ** np.linspace(-8, -3, 15)]
    assert clipx.diagnose({"loss": loss}).codes == ()


def test_a_short_run_says_what_few_steps_cannot_tell():
    run = {"loss": np.linspace(3, 2, 35), "norm": np.linspace(2, 1, 35)}
    assert (
        "Not checked: whether the loss diverges (loss-diverged), whether the gradient"
        " norms grow (growing-norms), whether the norm has single spikes (spikes),"
        " whether the norm has spikes at equal distances (periodic-spikes), whether the"
        " norms change their level at one step (level-shift). This needs 40 finite"
        " steps; 35 were recorded."
    ) in str(clipx.diagnose(run))


def test_what_was_found_in_a_short_run_was_checked():
    diagnosis = clipx.diagnose({"loss": then(LOSSES, np.nan), "norm": np.ones(200)})
    assert "loss-diverged" in diagnosis.codes
    assert "loss-diverged" not in diagnosis.not_judged


def test_forty_steps_are_enough():
    diagnosis = clipx.diagnose({"loss": np.linspace(3, 2, 40), "norm": np.ones(40)})
    assert "40 finite steps" not in str(diagnosis)


@pytest.mark.parametrize(("later", "left"), [(0, 160), (0, 5), (8, 2)])
def test_a_loss_did_not_recover_from_a_spike_before_it_is_lost(later, left):
    """The loss is infinite some steps later, until the end of the run."""
    run = {"norm": np.ones(234 + later + left)}
    run["loss"] = np.r_[np.linspace(2, 1, 234 + later), np.full(left, np.inf)]
    run["norm"][233] = 30.0
    spike = found(run, "spikes")
    assert (spike.severity, spike.steps) == ("error", (233,))
    assert spike.sentence.endswith("; the loss did not recover from it.")


def test_a_loss_did_not_recover_from_a_spike_within_a_divergence():
    run = {"norm": np.ones(400), "loss": np.ones(400)}
    run["loss"][150:] = 8.0
    run["norm"][[60, 250]] = 30.0
    spikes = found(run, "spikes")
    assert spikes.steps == (60, 250)
    assert spikes.sentence.endswith("; the loss did not recover from 1 of them.")
    assert spikes.evidence["first_not_recovered"] == 250


def test_a_spike_may_come_after_the_last_finite_loss():
    run = {"norm": np.ones(200), "loss": np.linspace(2, 1, 200)}
    run["loss"][194:] = np.inf
    run["norm"][194] = 1000.0
    assert found(run, "spikes").steps == (194,)
