"""benchmarks/diagnosis: faults cover all codes, and the criteria tell them apart."""

import collections
import sys
from pathlib import Path

import numpy as np
import pytest

from optax_clipx.runs.advice import ADVICE

pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from diagnosis import planting, truths
from diagnosis.__main__ import EACH
from diagnosis.cells import HALVES, Cell, cells_of

TIME = np.arange(400)


def run(**changed):
    """A healthy run of three leaves with a little noise."""
    noise = np.exp(0.1 * np.random.default_rng(0).normal(size=400))
    columns = {
        "step": TIME,
        "loss": 1 + np.exp(-TIME / 50) + 0.01 * noise,
        "learning_rate": np.full(400, 0.1),
        "update_norm": 0.1 * noise,
        "clip/norm": 3**0.5 * noise,
        "clip/threshold": np.full(400, 1.8),
        **{f"track_norms/{name}": noise.copy() for name in "abc"},
    }
    return columns | changed


def present(faulty, *faults):
    """The codes that are present, by the criteria."""
    facts = {"faults": [f._asdict() for f in faults], "cell": ["MLP"], "lost": 0}
    found = truths.truths(facts, faulty, run())
    return {code for code, truth in found.items() if truth.present}


def test_each_code_is_planted():
    assert {kind.code for kind in planting.KINDS.values()} == set(ADVICE)


def test_the_halves_have_no_task_in_common():
    tasks = [{cell.task for cell in cells_of(half)} for half in HALVES]
    assert [len(some) for some in tasks] == [6, 6, 6, 6]
    assert len(set.union(*tasks)) == 24


@pytest.mark.slow
def test_the_same_runs_are_drawn_again():
    drawn = planting.kinds_of_runs("design", 2)
    assert drawn == planting.kinds_of_runs("design", 2)
    assert {name for _, names in drawn for name in names} == set(planting.KINDS)


@pytest.fixture
def settings():
    """Healthy settings of a run of 650 steps."""
    rng = np.random.default_rng(0)
    return planting.plain(rng, Cell("RNN, waves", "adam", "skip"), 0)


def test_a_locked_run_has_all_norms_above_the_limit_of_skipping(settings):
    clean = {"clip/norm": np.linspace(1.0, 3.0, 650)}
    settings.limit = 2.0
    kind = planting.kinds_for("second")["locked"]
    kind.plant(np.random.default_rng(1), settings, 200, 1.5, clean)
    after = clean["clip/norm"][200:] * settings.loss_scale[200:]
    assert settings.loss_scale[199] == 1.0
    assert (after > 4 * 2.0 * 1.5).all()


def test_in_the_third_half_no_rule_skips_all_steps_without_a_fault(settings):
    clean = {"clip/norm": np.concatenate([np.full(50, 8.0), np.full(600, 0.3)])}
    cell = Cell("RNN, waves", "adam", "skip")
    rng = np.random.default_rng(0)
    drawn = planting.draw(rng, "third", cell, ("locked",), settings, clean)
    assert 4 * drawn.twin.limit > 8.0


@pytest.mark.slow
def test_the_third_half_has_many_runs_of_each_code():
    drawn = planting.kinds_of_runs("third", EACH["third"])
    codes = collections.Counter(
        planting.KINDS[name].code for _, names in drawn for name in names
    )
    assert set(codes) == set(truths.CODES)
    assert min(codes.values()) >= 12  # of some, other faults have the effect, too
    assert len(drawn) >= 400


def test_an_early_batch_has_a_multiple_of_the_norms_that_follow(settings):
    clean = {"clip/norm": np.full(650, 2.0)}
    clean["clip/norm"][:45] = 0.1
    kind = planting.kinds_for("second")["early batch"]
    (at,) = kind.plant(np.random.default_rng(1), settings, 200, 50, clean)
    assert 3 <= at < 40
    assert clean["clip/norm"][at] * settings.loss_scale[at] == pytest.approx(100.0)


def test_nothing_is_present_in_a_healthy_run():
    assert present(run()) == set()


@pytest.mark.parametrize(("factor", "found"), [(10, {"spikes"}), (1.5, set())])
def test_a_spike_is_present_if_its_effect_is_large(factor, found):
    norms = run()["clip/norm"]
    norms[200] *= factor
    fault = planting.Fault("bad batches", "spikes", factor, (200,))
    assert present(run(**{"clip/norm": norms}), fault) == found


def test_a_level_that_falls_to_zero_is_no_shift_that_has_to_be_found():
    norms = run()["clip/norm"]
    norms[300:] = np.where(TIME[300:] % 3 == 0, norms[300:], 0.0)
    fault = planting.Fault("wrong sign", "growing-norms", 10, ())
    assert "level-shift" not in present(run(**{"clip/norm": norms}), fault)


def test_a_rise_within_the_noise_is_not_present():
    rate = planting.cosine(400, 0.1, 0.1)
    rise, noise = (0.1 / rate) ** 0.5, np.random.default_rng(0).standard_normal(400)
    fault = planting.Fault("weighted", "rises-with-schedule", 3, ())

    def codes(size):
        norms = rise * np.exp(size * noise)
        return present(run(**{"clip/norm": norms, "learning_rate": rate}), fault)

    assert "rises-with-schedule" in codes(0.1)
    assert "rises-with-schedule" not in codes(3.0)


def test_a_shift_is_present_with_what_follows_from_it():
    norms = run()["clip/norm"]
    norms[100:] *= 4
    fault = planting.Fault("loss scale", "level-shift", 4, (100,))
    faulty = run(**{"clip/norm": norms})
    assert present(faulty, fault) == {"level-shift", "always-clipped"}


def test_a_loss_that_is_lost_again_has_diverged():
    loss = run()["loss"]
    loss[300:] += 3
    fault = planting.Fault("higher rate", "loss-diverged", 100, (300,))
    assert present(run(loss=loss), fault) == {"loss-diverged"}


def test_a_leaf_without_gradient_is_dead():
    fault = planting.Fault("frozen", "dead-leaf", 1, (200,))
    faulty = run(**{"track_norms/b": np.where(TIME < 200, 1.0, 0.0)})
    assert present(faulty, fault) == {"dead-leaf"}
