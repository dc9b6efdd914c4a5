"""Runs with the norms of leaves alone: the whole norm is computed from them."""

import numpy as np
import pytest

import optax_clipx as clipx
from optax_clipx import __main__ as command_line
from optax_clipx.runs import naming
from optax_clipx.runs.table import MISSING, present


def columns(**more):
    return {"track_norms/a": np.array([3.0, 5.0]), **more}


def recorded(path, count=300):
    wave = np.random.default_rng(0).lognormal(sigma=0.3, size=count)
    history = clipx.History()
    both = {"track_norms/a": 3 * wave, "track_norms/b": 4 * wave}
    history.append(range(count), both)
    return history.save(path), 5 * wave


def test_it_is_the_root_of_the_sum_of_squares():
    found = naming.with_whole_norm(columns(**{"track_norms/b": np.array([4.0, 12.0])}))
    np.testing.assert_allclose(found["track/norm"], [5.0, 13.0])
    assert naming.pick(found, "norm") == "track/norm"


def test_a_recorded_norm_comes_first():
    given = columns(grad_norm=np.array([1.0, 2.0]))
    assert naming.with_whole_norm(given) is given


def test_a_leaf_named_norm_is_not_the_whole_norm():
    found = naming.with_whole_norm(
        columns(**{"track_norms/norm": np.array([4.0, 12.0])})
    )
    assert naming.pick(found, "norm") == "track/norm"


def test_a_step_without_all_leaves_has_none_and_a_nan_stays_one():
    other = np.array([MISSING, np.nan])
    whole = naming.with_whole_norm(columns(**{"track_norms/b": other}))["track/norm"]
    assert np.isnan(whole).all()
    assert present(whole).tolist() == [False, True]


def test_suggest_reads_it(tmp_path, capsys):
    run, norms = recorded(tmp_path / "run.jsonl")
    want = clipx.suggest_threshold(norms).value
    assert clipx.suggest_threshold(run).value == pytest.approx(want)
    assert command_line.main(["suggest", str(run)]) == 0
    assert f"clip_by_global_norm({want:.4g})" in capsys.readouterr().out


def test_plot_draws_it(tmp_path):
    pytest.importorskip("matplotlib")
    run, norms = recorded(tmp_path / "run.jsonl")
    line = clipx.plotting.norms(run).axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), norms)
    assert command_line.main(["plot", str(run)]) == 0
    clipx.History.load(run).plot(tmp_path / "other.png")


def test_diagnose_judges_it(tmp_path):
    run, norms = recorded(tmp_path / "run.jsonl")
    whole = clipx.diagnose({"grad_norm": norms})
    assert "spikes" in clipx.diagnose({"loss": norms}).not_judged
    assert "spikes" not in whole.not_judged
    assert "spikes" not in clipx.diagnose(run).not_judged


def test_watch_shows_it_and_ends_in_a_pipe(tmp_path, capsys):
    pytest.importorskip("rich")
    run, norms = recorded(tmp_path / "run.jsonl")
    assert command_line.main(["watch", str(run)]) == 0  # pytest's output is no terminal
    assert f"{norms[-1]:.4g}" in capsys.readouterr().out
