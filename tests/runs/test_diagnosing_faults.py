"""Each fault is found in runs in which it was planted, and not in healthy ones."""

import numpy as np
import pytest
from planted import FAULTS, HEALTHY

import optax_clipx as clipx
from optax_clipx.runs.advice import ADVICE

SEEDS = range(100, 103)
# What is true of the same run: a threshold for old norms clips all of the new ones.
BESIDE = {
    "level-shift": {"always-clipped"},
    "growing-norms": {"always-clipped", "loss-diverged"},
    "warmup-spike": {"spikes", "never-clipped"},
    "starved-leaves": {"dominant-leaf", "always-clipped"},
    "vanishing-by-depth": {"dominant-leaf"},
    "exploding-by-depth": {"dominant-leaf"},
}


def near(findings, step):
    return min(abs(at - step) for found in findings for at in found.steps) <= 5


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("code", FAULTS)
def test_a_planted_fault_is_found_where_it_is(code, seed):
    run, steps = FAULTS[code](np.random.default_rng(seed))
    diagnosis = clipx.diagnose(run)
    mine = [finding for finding in diagnosis.findings if finding.code == code]
    assert mine
    assert near(mine, steps[0])
    assert set(diagnosis.codes) - {code} <= BESIDE.get(code, set())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", HEALTHY)
def test_a_healthy_run_is_healthy(kind, seed):
    diagnosis = clipx.diagnose(HEALTHY[kind](np.random.default_rng(seed)))
    assert not diagnosis
    assert diagnosis.codes == ()


def with_muon(share, threshold):
    """Half of the leaves are Muon's, and none of them dominates."""
    run = {f"track_norms/{i}": np.full(200, 3.0 if i < 4 else 1.0) for i in range(8)}
    run |= {
        "clip/norm": np.full(200, 40**0.5),
        "clip/threshold": np.full(200, threshold),
    }
    return run | {"track/muon_share": np.full(200, share)}


def test_leaves_that_muon_handles_starve_the_others():
    findings = clipx.diagnose(with_muon(0.99, 1.0)).findings
    (found,) = [x for x in findings if x.code == "starved-leaves"]
    assert found.severity == "warning"
    assert found.evidence["factor"] == pytest.approx(40**0.5)
    assert (
        "smaller than they would be without the leaves that Muon handles"
        in found.sentence
    )
    assert found.advice.startswith(
        "clipx.excluding(clipx.clip_by_global_norm(1.0), clipx.muon_leaves)  # in place"
        " of 1.0, put three times the median norm of steps that went well  ("
    )


@pytest.mark.parametrize(
    ("share", "threshold"), [(0.9, 1.0), (0.99, 7.0), (np.nan, 1.0)]
)
def test_muons_leaves_do_no_harm(share, threshold):
    """Few of the norm's squares, no clipping, or a norm without them."""
    assert "starved-leaves" not in clipx.diagnose(with_muon(share, threshold)).codes


def test_each_code_has_a_planted_fault_and_advice():
    assert set(FAULTS) == set(ADVICE)


def test_all_spikes_have_their_steps():
    run, steps = FAULTS["spikes"](np.random.default_rng(5))
    assert clipx.diagnose(run).findings[0].steps == tuple(steps.tolist())


def test_the_period_is_told():
    norms = np.ones(1000)
    norms[37::90] = 20.0
    (found,) = clipx.diagnose({"norm": norms}).findings
    assert (found.code, found.evidence["period"]) == ("periodic-spikes", 90)
    assert found.steps[:2] == (37, 127)


def test_a_spike_beside_periodic_ones_is_single():
    norms = np.ones(1000)
    norms[37::90] = 20.0
    norms[500] = 20.0
    single, periodic = clipx.diagnose({"norm": norms}).findings
    assert (single.code, single.steps) == ("spikes", (500,))
    assert 500 not in periodic.steps


def test_the_factor_of_a_level_shift_is_told():
    norms = np.ones(1000)
    norms[400:] = 4.0
    (found,) = clipx.diagnose({"norm": norms}).findings
    assert (found.code, found.steps) == ("level-shift", (400,))
    assert found.evidence["factors"] == pytest.approx([4.0])


def test_norms_that_find_their_level_at_the_start_do_not_shift():
    norms = np.ones(2000)
    norms[:70] = 4.0
    assert clipx.diagnose({"norm": norms}).codes == ()
    assert clipx.diagnose({"norm": norms[:1000]}).codes == ("level-shift",)


def test_a_level_shift_is_found_in_noise_that_wanders():
    rng = np.random.default_rng(3)
    logs = 0.06 * np.cumsum(rng.normal(size=600)) + rng.normal(size=600)
    logs[400:] += 3.0
    findings = clipx.diagnose({"norm": np.exp(logs)}).findings
    assert [f.steps for f in findings if f.code == "level-shift"] == [(400,)]


def growth_before_divergence(seed):
    """Norms that fall for some time as the loss does, and grow with it."""
    rng, time = np.random.default_rng(seed), np.arange(700)
    course = [0, 40, 150, 200, 240, 560, 700], [-1, 0.9, 0.9, 0.1, 0.6, 3.3, 4.3]
    logs = np.interp(time, *course) + 0.3 * rng.normal(size=700)
    logs[300:] += 0.6 * np.sin(time[300:] / 25)
    loss = np.interp(time, [0, 300, 500, 560, 700], [2.2, 0.3, 0.4, 2.5, 8.0])
    return {"norm": np.exp(logs), "loss": loss * np.exp(0.1 * rng.normal(size=700))}


@pytest.mark.parametrize("seed", [1, 3, 6])
def test_growth_is_found_after_norms_that_took_another_course(seed):
    codes = clipx.diagnose(growth_before_divergence(seed)).codes
    assert {"loss-diverged", "growing-norms"} <= set(codes)


def test_steady_growth_is_no_level_shift():
    rng, time = np.random.default_rng(1), np.arange(700)
    course = [0, 20, 60, 450, 560, 700], [-2, 0.3, 0.6, 0.6, 3.0, 4.2]
    norms = np.exp(np.interp(time, *course) + 0.4 * rng.normal(size=700))
    assert "level-shift" not in clipx.diagnose({"norm": norms}).codes


def test_all_level_shifts_are_one_finding():
    norms = np.ones(1000)
    norms[300:700] = 4.0
    (found,) = clipx.diagnose({"norm": norms}).findings
    assert found.steps == (300, 700)
    assert found.evidence["factors"] == pytest.approx([4.0, 0.25])


def test_a_loss_that_does_not_recover_from_a_spike_is_an_error():
    norms, loss = np.ones(400), 1 + 0.01 * np.sin(np.arange(400.0))
    norms[100] = norms[300] = 20.0
    loss[300:] += 0.2
    found = clipx.diagnose({"norm": norms, "loss": loss}).findings[-1]
    assert (found.code, found.severity) == ("spikes", "error")
    assert found.evidence["not_recovered"] == 1
    assert found.evidence["first_not_recovered"] == 300


def test_a_rule_that_is_to_clip_most_steps_is_judged_by_its_target():
    norms, limits = np.ones(400), np.full(400, 2.0)
    limits[np.arange(400) % 50 != 0] = 0.5  # clips 98%
    run = {"clip/norm": norms, "clip/threshold": limits}
    assert clipx.diagnose(run).codes == ("always-clipped",)
    assert clipx.diagnose(run, target=0.95).codes == ()
    recorded = run | {"clip/target": np.full(400, 0.95)}
    assert clipx.diagnose(recorded).codes == ()


def test_a_threshold_that_is_a_little_above_all_norms_is_no_warning():
    run = {"norm": np.ones(400)}
    assert clipx.diagnose(run, threshold=1.5).findings[0].severity == "info"
    assert clipx.diagnose(run, threshold=15.0).findings[0].severity == "warning"


def test_growth_is_told_with_the_step_at_which_norms_had_doubled():
    norms = np.exp(0.01 * np.maximum(0, np.arange(1000.0) - 500))
    (found,) = clipx.diagnose({"norm": norms}).findings
    assert found.code == "growing-norms"
    assert 570 <= found.evidence["warned"] <= 600


def test_growth_with_a_loss_that_falls_is_none():
    norms = np.exp(0.01 * np.maximum(0, np.arange(1000.0) - 500))
    run = {"norm": norms, "loss": np.linspace(3, 1, 1000)}
    assert clipx.diagnose(run).codes == ()


@pytest.mark.parametrize(
    ("name", "first"), [("track_norms/b", "track_norms/b"), ("loss", "loss")]
)
def test_the_first_column_that_is_not_finite_is_named(name, first):
    names = ("loss", "clip/norm", "track_norms/a", "track_norms/b")
    run = {n: np.ones(100) for n in names}
    run[name][40] = np.inf
    for column in run.values():
        column[41:] = np.nan
    found = clipx.diagnose(run).findings[0]
    assert (found.code, found.severity, found.steps) == ("nonfinite", "error", (40,))
    assert (found.evidence["first_in"], found.evidence["value"]) == (first, "infinity")


def test_one_step_that_is_not_finite_is_a_warning():
    norms = np.ones(100)
    norms[50] = np.nan
    (found,) = clipx.diagnose({"norm": norms}).findings
    assert (found.code, found.severity) == ("nonfinite", "warning")


def test_a_gradient_that_spikes_first_is_not_the_updates_fault():
    run, steps = FAULTS["update-before-loss"](np.random.default_rng(1))
    run["clip/norm"][steps[0] - 1 : steps[0] + 3] *= 20
    assert "update-before-loss" not in clipx.diagnose(run).codes


def test_mixed_runs_are_an_error_and_nothing_else_is_judged():
    steps = np.ravel([np.arange(100), np.arange(100) + 50], order="F")
    diagnosis = clipx.diagnose({"step": steps, "norm": np.ones(200)})
    assert diagnosis.codes == ("restarts",)
    assert diagnosis.findings[0].severity == "error"
    assert diagnosis.not_judged["spikes"] == "a log of one run"


def test_the_worst_comes_first():
    run, _ = FAULTS["growing-norms"](np.random.default_rng(3))
    severities = [finding.severity for finding in clipx.diagnose(run).findings]
    assert severities == ["error", "error", "warning"]


def test_leaves_without_gradient_after_a_nan_are_not_dead():
    run = {f"track_norms/layer{i}": np.ones(300) for i in range(5)}
    run |= {"clip/norm": np.full(300, 5**0.5), "loss": np.ones(300)}
    for name in ("clip/norm", "loss"):
        run[name][150:] = np.nan
    for i in range(3):
        run[f"track_norms/layer{i}"][150:] = 0.0
    assert clipx.diagnose(run).codes == ("nonfinite",)


def test_norms_that_fell_and_come_back_do_not_grow():
    time = np.arange(1000.0)
    fell = {"norm": np.exp(-6 * np.exp(-(((time - 400) / 150) ** 2)))}
    assert "growing-norms" not in clipx.diagnose(fell).codes


def test_a_loss_that_loses_little_more_than_its_noise_is_found_where_it_does():
    noise = 0.1 * np.random.default_rng(0).normal(size=1000)
    loss = 0.6 + np.exp(-np.arange(1000) / 100) + noise
    loss[700:] += 0.5
    (found,) = clipx.diagnose({"loss": loss}).findings
    assert found.code == "loss-diverged"
    assert abs(found.steps[0] - 700) <= 5
