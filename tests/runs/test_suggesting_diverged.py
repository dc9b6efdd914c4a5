"""What is suggested from a run whose loss diverged: the steps before that count."""

import json
import re
from pathlib import Path

import numpy as np
import planted
import pytest

import optax_clipx as clipx
from optax_clipx import __main__ as command_line

START = 510
LEAVES = [f"layers/{i}/{kind}" for i in range(3) for kind in ("kernel", "bias")]


def diverging(after, level=0.5, count=900):
    """Norms around a level up to step 510; then high ones, and then those after."""
    rng = np.random.default_rng(0)
    factor = np.r_[
        np.ones(START), np.full(50, 20.0), np.full(count - START - 50, after)
    ]
    norms = level * factor * np.exp(0.3 * rng.normal(size=count))
    loss = 0.05 + 2 * np.exp(-np.arange(count) / 40) + 0.01 * rng.random(count)
    loss[START:] += 2.5
    return {"clip/norm": norms, "loss": loss}


def dead(count=900):
    """A run of which all leaves but one have no gradient after it has diverged."""
    run = diverging(0.3, count=count)
    for name in LEAVES:
        run[f"track_norms/{name}"] = run["clip/norm"] / np.sqrt(len(LEAVES))
    for name in LEAVES[:-1]:
        run[f"track_norms/{name}"][START + 50 :] = 0.0
    return run


def saved(run, tmp_path, **more):
    history = clipx.History()
    history.append(range(len(next(iter(run.values())))), {**run, **more})
    return history.save(tmp_path / "run.jsonl")


def without_loss(run):
    return {name: values for name, values in run.items() if name != "loss"}


RUNS = {
    "falls back": lambda: diverging(1.0),
    "falls below": lambda: diverging(0.3),
    "stays high": lambda: diverging(20.0),
    "ends as NaN": lambda: diverging(np.nan),
    "dead network": dead,
}


@pytest.mark.parametrize("name", RUNS)
def test_the_threshold_is_that_of_the_steps_before_the_divergence(name, tmp_path):
    run = RUNS[name]()
    path = saved(run, tmp_path)
    found = clipx.suggest_threshold(path)
    diagnosed = clipx.diagnose(path)
    first = min(x.steps[0] for x in diagnosed.findings if "diverged" in x.code)
    assert found.diverged == first
    assert abs(first - START) <= 2
    healthy = clipx.suggest_threshold(run["clip/norm"][:first])
    assert found.value == healthy.value
    assert found.clip_rate == healthy.clip_rate
    said, lower, then, fixed = str(found).splitlines()[:4]
    assert said.startswith(f"this run diverged at step {first}: the loss rises from ")
    assert said.endswith("A threshold alone does not prevent this")
    assert lower.startswith("first use a lower learning rate")
    assert then == (
        "then use optax_clipx.zclip(max_norm=1.5) as a second protection:"
        f" {found.max_norm_from}"
    )
    assert fixed == (
        "if you prefer a fixed threshold, use"
        f" optax_clipx.clip_by_global_norm({found.value:.4g}) instead"
    )
    assert f"would have clipped 10.0% of the steps before step {first}" in str(found)
    assert f"comes from the {first} steps before step {first}." in found.warning


@pytest.mark.parametrize("name", RUNS)
def test_a_history_and_the_command_line_say_the_same(name, tmp_path, capsys):
    path = saved(RUNS[name](), tmp_path)
    found = clipx.suggest_threshold(path)
    assert clipx.suggest_threshold(clipx.History.load(path)) == found
    assert command_line.main(["suggest", str(path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert " ".join(str(found).split()) in said
    assert command_line.main(["suggest", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["diverged"] == found.diverged


@pytest.mark.parametrize("name", RUNS)
def test_the_upper_limit_is_the_one_that_diagnose_prints(name, tmp_path):
    run = RUNS[name]()
    path = saved(run, tmp_path)
    found = clipx.suggest_threshold(path)
    usual = np.median(run["clip/norm"][: found.diverged])
    assert found.max_norm == pytest.approx(3 * usual, rel=0.03)
    advice = clipx.diagnose(path).findings[0].advice
    assert f"clipx.zclip(max_norm={found.max_norm:g})" in advice
    assert found.max_norm_from in advice
    assert found.max_norm_from == (
        f"{found.max_norm:g} is 3 times the usual norm before step {found.diverged},"
        f" {usual:.3g}"
    )
    assert "optax_clipx.zclip(max_norm=1.5) as a second protection" in str(found)


def test_the_learning_rate_to_go_back_to_is_named(tmp_path):
    rates = np.r_[np.full(START - 2, 0.05), np.full(392, 1.0)]
    found = clipx.suggest_threshold(
        saved(diverging(0.3), tmp_path, learning_rate=rates)
    )
    assert found.first.startswith("go back to a learning rate of 0.05: at step 508 ")


def test_a_jump_is_named_that_comes_between_the_growth_and_the_loss(tmp_path):
    run = diverging(0.3)
    run["clip/norm"][400:START] *= np.geomspace(1, 30, START - 400)
    rates = np.r_[np.full(START - 2, 0.05), np.full(392, 1.0)]
    path = saved(run, tmp_path, learning_rate=rates)
    first = clipx.suggest_threshold(path).first
    assert first.startswith("go back to a learning rate of 0.05: at step 508 ")
    advice = [x.advice for x in clipx.diagnose(path).findings]
    assert any("learning_rate = 0.05" in line for line in advice)


def test_norms_that_grow_before_the_loss_rises_are_left_out(tmp_path):
    run = diverging(0.3)
    run["clip/norm"][400:START] *= np.geomspace(1, 30, START - 400)
    path = saved(run, tmp_path)
    growth = next(x for x in clipx.diagnose(path).findings if "growing" in x.code)
    found = clipx.suggest_threshold(path)
    assert found.diverged == growth.steps[0] < START
    assert str(found).startswith(
        f"this run diverged: the norms grow from step {growth.steps[0]} on, and from"
        " step 51"
    )


def test_a_loss_that_is_nan_ends_the_run_as_well(tmp_path):
    run = diverging(0.3)
    run["loss"][START:] = np.nan
    found = clipx.suggest_threshold(saved(run, tmp_path))
    assert found.diverged == START
    assert "this run diverged at step 510: the loss is not finite" in str(found)


def test_a_run_that_diverges_at_once_has_no_threshold(tmp_path):
    run = {name: x[START - 10 :] for name, x in diverging(20.0).items()}
    run["loss"][:10] = np.linspace(1.0, 0.5, 10)
    run["loss"][10:] += np.arange(390) / 100
    found = clipx.suggest_threshold(saved(run, tmp_path))
    assert np.isnan(found.value)
    said, _, then, warning = str(found).splitlines()
    assert said.startswith(f"this run diverged at step {found.diverged}: ")
    assert then == "then record the norms again with optax_clipx.auto_clip()"
    assert warning == (
        f"warning: This run diverged after {found.diverged} steps. A threshold needs at"
        " least 20 steps before that."
    )


def test_without_a_loss_a_dead_network_is_a_doubt(tmp_path):
    run = without_loss(dead())
    found = clipx.suggest_threshold(saved(run, tmp_path))
    assert found.diverged is None
    assert found.value == clipx.suggest_threshold(run["clip/norm"]).value
    assert found.warning.startswith(
        "From step 560 on, 5 of 6 leaves have no gradient. If the run diverged there,"
    )


def test_leaves_that_never_had_a_gradient_are_no_doubt(tmp_path):
    run = without_loss(dead())
    for name in LEAVES[:-1]:
        run[f"track_norms/{name}"][:] = 0.0
    run["clip/norm"] = 0.5 + np.random.default_rng(0).random(900)
    assert clipx.suggest_threshold(saved(run, tmp_path)).doubt == ""


def test_without_a_loss_norms_that_rise_and_stay_are_a_doubt():
    norms = diverging(20.0)["clip/norm"]
    found = clipx.suggest_threshold(norms)
    assert found.diverged is None
    assert found.warning.startswith("At step 510 the norms rise to ")
    assert clipx.suggest_threshold(norms[::-1]).doubt == ""


def test_a_rise_is_no_doubt_if_the_loss_was_recorded(tmp_path):
    run = diverging(20.0)
    run["loss"] = 2 * np.exp(-np.arange(900) / 200)
    found = clipx.suggest_threshold(saved(run, tmp_path))
    assert (found.diverged, found.doubt) == (None, "")


@pytest.mark.parametrize("name", planted.HEALTHY)
@pytest.mark.parametrize("seed", range(3))
def test_of_a_healthy_run_all_steps_are_used(name, seed):
    run = planted.HEALTHY[name](np.random.default_rng(seed))
    history = clipx.History()
    history.append(run.pop("step"), run)
    found = clipx.suggest_threshold(history)
    alone = clipx.suggest_threshold(run["clip/norm"], limit=run["clip/threshold"])
    assert found == alone
    assert (found.diverged, found.exploded, found.doubt) == (None, False, "")
    assert "diverged" not in str(found)


def test_the_page_shows_what_is_printed(monkeypatch, capsys):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    page = (root / "docs" / "choosing.md").read_text()
    (shown,) = re.findall(r"suggest docs/runs/rate.csv\n(.*?)```", page, re.S)
    assert command_line.main(["suggest", "docs/runs/rate.csv"]) == 0
    assert capsys.readouterr().out == shown
