"""What is suggested from a run that exploded, or of which every step was clipped."""

import json

import numpy as np
import pytest

import optax_clipx as clipx
from optax_clipx import __main__ as command_line

FIRST = "first use a lower learning rate, for example a third of the present one"
NONE = "then record the norms again with optax_clipx.auto_clip()"


def early(finite, end, count=400):
    """Norms that grow evenly from 2 to ``end``, and are NaN from then on."""
    return np.append(np.geomspace(2.0, end, finite), np.full(count - finite, np.nan))


def late():
    """Norms around 1.5 that grow from step 600 on and end as NaN."""
    grown = np.exp(np.clip((np.arange(900) - 600) / 60, 0, None))
    norms = 1.5 * grown * np.exp(0.05 * np.random.default_rng(0).normal(size=900))
    norms[840:] = np.nan
    return norms


def lines(norms, limit=None):
    return str(clipx.suggest_threshold(norms, limit=limit)).splitlines()


@pytest.mark.parametrize(
    ("finite", "end"), [(14, 6e18), (31, 2.262e18), (66, 1.3e20), (3, 1e12)]
)
def test_a_run_that_explodes_at_once_has_no_threshold(finite, end):
    found = clipx.suggest_threshold(early(finite, end))
    assert np.isnan(found.value)
    assert found.exploded
    *do, lost, warning = str(found).splitlines()
    assert do == [FIRST, NONE]
    assert lost == f"non-finite: {400 - finite} norms"
    assert warning.startswith("warning: This run exploded after ")


@pytest.mark.parametrize("count", [66, 67, 400])
def test_a_recording_that_stops_at_the_explosion_is_told_as_well(count):
    assert lines(early(66, 1.3e20, count))[:2] == [FIRST, NONE]


def test_slow_growth_from_the_start_gives_a_threshold_near_the_start():
    found = clipx.suggest_threshold(2.0 * 1.05 ** np.append(range(600), [np.nan] * 99))
    assert 2 < found.value < 8
    then = "then use optax_clipx.zclip(max_norm="
    assert str(found).startswith(f"{FIRST}\n{then}")


def test_the_threshold_is_that_of_the_steps_before_the_growth():
    before = float(np.quantile(late()[:600], 0.9))
    found = clipx.suggest_threshold(late())
    assert before < found.value < 1.2 * before
    assert lines(late())[:3] == [
        FIRST,
        "then use optax_clipx.zclip(max_norm=4.5) as a second protection: 4.5 is 3"
        " times the usual norm before step 600, 1.5",
        "if you prefer a fixed threshold, use"
        f" optax_clipx.clip_by_global_norm({found.value:.4g}) instead",
    ]
    assert "of the steps before the norms grew;" in str(found)
    assert "exploded. The threshold comes from the 66" in found.warning


def test_norms_that_were_small_at_first_do_not_lower_it():
    steady = np.random.default_rng(0).lognormal(sigma=0.3, size=2000)
    norms = np.concatenate(
        [0.01 * steady[:50], steady, np.geomspace(1, 1e9, 60), np.full(100, np.nan)]
    )
    found = clipx.suggest_threshold(norms)
    assert found.value == pytest.approx(np.quantile(steady, 0.9), rel=0.05)


def test_nan_steps_and_growth_are_not_called_spikes():
    assert "spikes" not in str(clipx.suggest_threshold(late()))
    assert "spikes" not in str(clipx.suggest_threshold(early(31, 2e18)))


def test_a_spike_at_the_end_is_no_explosion():
    norms = np.random.default_rng(0).lognormal(sigma=0.5, size=400)
    norms[-3:] = 1e9
    assert not clipx.suggest_threshold(norms).exploded


def test_without_a_threshold_json_has_null(tmp_path, capsys):
    history = clipx.History()
    history.append(range(400), {"norm": early(14, 6e18)})
    run = history.save(tmp_path / "run.jsonl")
    assert command_line.main(["suggest", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["run"]
    assert (found["value"], found["clip_rate"]) == (None, None)


def test_a_run_that_was_always_clipped_asks_for_another_recording():
    norms = np.random.default_rng(0).lognormal(sigma=0.5, size=400) + 5
    first, second = lines(norms, limit=1.0)
    assert first == (
        "record another run first, with optax_clipx.zclip() or with a much higher"
        " threshold, such as 10"
    )
    assert second.startswith("warning: Nearly every step of this run was clipped")
    assert "threshold of 1." in second


def test_a_lower_threshold_than_that_of_an_always_clipped_run_is_suggested():
    norms = np.random.default_rng(0).lognormal(sigma=0.5, size=400) + 5
    text = str(clipx.suggest_threshold(norms, 0.99, limit=np.quantile(norms, 0.03)))
    assert text.startswith("use optax_clipx.clip_by_global_norm(5.")


def with_rates(rates, tmp_path):
    """The file of a run whose norms grow from step 600 on."""
    history = clipx.History()
    history.append(range(900), {"norm": late(), "learning_rate": rates})
    return history.save(tmp_path / "run.jsonl")


def test_the_lower_learning_rate_is_a_number_if_it_was_recorded(tmp_path):
    run = with_rates(np.full(900, 0.3), tmp_path)
    assert clipx.suggest_threshold(run).first == (
        "use a lower learning rate, for example 0.1, which is a third of 0.3"
    )


def test_the_rate_before_a_jump_is_named(tmp_path, capsys):
    rates = np.full(900, 0.02)
    rates[650:] = 0.24
    run = with_rates(rates, tmp_path)
    said = (
        "go back to a learning rate of 0.02: at step 650 the learning rate rose to"
        " 0.24, and then training failed"
    )
    assert clipx.suggest_threshold(run).first == said
    assert command_line.main(["suggest", str(run)]) == 0
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("limit", [8.0, 1.0])
def test_auto_clip_is_named_unless_most_steps_were_clipped(limit):
    falling = np.random.default_rng(0).lognormal(sigma=0.5, size=2000)
    falling *= np.geomspace(4, 0.8, 2000)
    found = clipx.suggest_threshold(falling, limit=limit)
    assert found.rule
    assert ("auto_clip()" in str(found)) == (limit == 8.0)


def test_auto_clip_is_not_named_where_norms_rise():
    norms = np.random.default_rng(0).lognormal(sigma=0.5, size=2000)
    text = str(clipx.suggest_threshold(norms * np.geomspace(1, 10, 2000)))
    assert "auto_clip()" not in text
    assert text.endswith("use optax_clipx.find_threshold")


def test_the_rate_before_an_explosion_leaves_out_the_warmup_and_says_so():
    steady = np.random.default_rng(0).lognormal(sigma=0.3, size=600)
    norms = np.concatenate([50 * steady[:60], steady, np.geomspace(1, 1e12, 40)])
    found = clipx.suggest_threshold(np.append(norms, np.full(100, np.nan)))
    assert found.warmup > 0
    assert (
        f"{found.clip_rate:.1%} of the steps after the first {found.warmup} before the"
        f" norms grew, and {found.of_all:.1%} of all steps before the norms grew"
    ) in str(found)
