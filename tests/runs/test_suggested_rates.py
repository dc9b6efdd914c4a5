"""What was asked for, what is given, and why they differ."""

import inspect
import re

import numpy as np
import pytest

import optax_clipx as clipx
from optax_clipx import __main__ as command_line


def lognormal(count=2000, seed=0):
    return np.random.default_rng(seed).lognormal(sigma=0.5, size=count)


def spiky():
    norms = lognormal()
    norms[::4] *= 1e6
    return norms


def rounded():
    return np.repeat([1.0, 2.0], [700, 300])


CASES = {
    "falling norms": (lognormal() * np.geomspace(1, 0.1, 2000), None, "the norms fall"),
    "spikes": (spiky(), None, "25% of the steps are spikes"),
    "equal norms": (rounded(), None, "equal to the threshold"),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", CASES)
def test_a_rate_that_was_not_asked_for_is_explained(name):
    norms, limit, words = CASES[name]
    found = clipx.suggest_threshold(norms, 0.1, limit=limit)
    assert found.asked == 0.1
    assert abs(found.clip_rate - 0.1) > 0.05
    assert words in found.why
    text = str(found)
    assert "the goal is 10%" in text
    assert f"would have clipped {found.clip_rate:.1%} of the steps" in text
    assert f"why not 10%: {found.why}" in text


def fell_then_exploded():
    """Norms that fall, and of which the last twentieth is high."""
    norms = lognormal() * np.geomspace(1, 0.1, 2000)
    norms[1900:] *= 30
    return norms


def test_why_fewer_steps_are_clipped_agrees_with_the_rate():
    norms = fell_then_exploded()
    found = clipx.suggest_threshold(norms)
    late = norms[found.warmup :][-len(norms[found.warmup :]) // 3 :]
    assert found.drift < 1
    assert found.late_rate == pytest.approx(np.mean(late > found.value), abs=1e-3)
    assert found.clip_rate < 0.095 < found.late_rate
    assert found.why == (
        "most norms fall, but the largest ones do not. The threshold clips 10% of the"
        " last third of the run, and fewer of the steps before"
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_reason_never_contradicts_the_rates(seed):
    """Levels and tails that change at random places."""
    rng = np.random.default_rng(seed)
    norms = lognormal(900, seed) * np.geomspace(1, rng.uniform(0.05, 1), 900)
    first, last = np.sort(rng.integers(0, 900, 2))
    norms[first:last] *= rng.uniform(1, 30)
    found = clipx.suggest_threshold(norms)
    if "more of the steps before" in found.why:
        assert found.clip_rate > max(found.asked, found.late_rate)
    if "fewer of the steps before" in found.why:
        assert found.clip_rate < min(found.asked, found.late_rate)
    if "last third" in found.why:
        said = float(re.search(r"clips ([\d.]+)% of the last third", found.why)[1])
        assert said == pytest.approx(100 * found.late_rate, abs=0.51)


def test_a_rate_that_was_asked_for_needs_no_reason():
    found = clipx.suggest_threshold(lognormal(10_000), 0.1)
    assert (found.asked, found.why) == (0.1, "")
    assert "why not" not in str(found)


def test_the_command_line_prints_both(tmp_path, capsys):
    history = clipx.History()
    history.append(range(2000), {"norm": CASES["falling norms"][0]})
    run = history.save(tmp_path / "run.jsonl")
    assert command_line.main(["suggest", str(run)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "the goal is 10%" in out
    assert "why not 10%: the norms fall" in out
    assert command_line.main(["suggest", str(run), "--json"]) == 0
    assert '"asked": 0.1' in capsys.readouterr().out


@pytest.mark.one_in(2)
@pytest.mark.parametrize("scale", [1e308, 1.7e308, 1e-300, 5e-324])
def test_norms_at_the_ends_of_the_range(scale):
    norms = scale * np.random.default_rng(0).random(1001)
    found = clipx.suggest_threshold(norms[norms > 0] if (norms > 0).any() else [scale])
    assert 0 < found.value <= norms.max() or scale == 5e-324
    assert np.isfinite(found.value)
    assert np.isfinite(found.drift)


def first_line(norms, limit=None):
    return str(clipx.suggest_threshold(norms, limit=limit)).splitlines()[0]


def test_the_first_line_says_what_to_use():
    assert first_line(rounded()) == "use optax_clipx.clip_by_global_norm(2)"
    falling = lognormal() * np.geomspace(1, 0.1, 2000)
    value = clipx.suggest_threshold(falling).value
    assert first_line(falling) == (f"use optax_clipx.clip_by_global_norm({value:.4g})")
    rising = clipx.suggest_threshold(lognormal() * np.geomspace(1, 10, 2000))
    assert str(rising).startswith(f"use {rising.rule}\n")


def test_thresholds_that_vary_are_given_by_their_median():
    limits = np.resize([1.0, 2.0, 4.0], 2000)
    warning = clipx.suggest_threshold(lognormal() + 5, limit=limits).warning
    assert "clipped, with a median threshold of 2." in warning


def test_how_fast_the_tracker_falls_is_said_and_true():
    falling = lognormal() * np.geomspace(1, 0.1, 2000)
    text = str(clipx.suggest_threshold(falling))
    assert "and falls by at most 0.2% in each step" in text
    given = inspect.signature(clipx.quantile_clip).parameters["tracker_rate"]
    assert given.default == 0.02  # times the clip rate of 10%


def test_the_rate_of_all_steps_is_told_beside_that_after_the_warmup():
    norms = np.concatenate([np.full(50, 100.0), np.tile(np.arange(1.0, 11.0), 95)])
    found = clipx.suggest_threshold(norms)
    assert (found.warmup, found.value) == (50, 9.0)
    assert (found.clip_rate, found.of_all) == (0.1, 0.145)
    assert str(found).splitlines()[1] == (
        "it would have clipped 10.0% of the steps after the first 50, and 14.5% of all"
        " steps; the goal is 10%"
    )


def test_a_fixed_threshold_is_named_beside_a_rule():
    rising = clipx.suggest_threshold(lognormal() * np.geomspace(1, 10, 2000))
    assert (
        str(rising)
        .splitlines()[1]
        .startswith(
            "a fixed threshold instead, optax_clipx.clip_by_global_norm("
            f"{rising.value:.4g}), would have clipped "
        )
    )
