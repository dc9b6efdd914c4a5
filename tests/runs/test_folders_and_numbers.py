"""The command line on folders, infinite limits and numbers that are none."""

import os

import numpy as np
import pytest

import optax_clipx as clipx
from optax_clipx import __main__ as command_line, plotting


def record(path, limit=2.0):
    norms = np.random.default_rng(0).lognormal(size=200)
    history = clipx.History()
    history.append(
        range(200), {"clip/norm": norms, "clip/threshold": np.full(200, limit)}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    return history.save(path)


@pytest.mark.parametrize("name", ["run.jsonl", "metrics.csv"])
def test_a_folder_with_a_run_is_that_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = record(tmp_path / "runs" / "a" / name)
    assert command_line.main(["plot", "runs/a"]) == 0
    assert sorted(os.listdir("runs")) == ["a", "a.png"]
    found = clipx.suggest_threshold(tmp_path / "runs" / "a")
    assert found == clipx.suggest_threshold(path)


@pytest.mark.parametrize("command", ["suggest", "watch", "plot"])
def test_a_folder_of_several_runs_names_them(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        record(tmp_path / "runs" / f"{name}.jsonl")
    more = ["--once"] if command == "watch" else []
    assert command_line.main([command, "runs", *more]) == 2
    assert "2 of them. Name those that you want: runs/a.jsonl, runs/b" in (
        capsys.readouterr().err
    )


def test_a_folder_above_a_run_names_it(tmp_path):
    record(tmp_path / "runs" / "a" / "run.jsonl")
    with pytest.raises(ValueError, match=r"Name those .*runs/a/run\.jsonl"):
        clipx.History.load(tmp_path / "runs")


def test_watch_follows_the_run_in_a_folder(tmp_path):
    from optax_clipx.runs.live import Follower

    with clipx.History(tmp_path / "a" / "run.jsonl") as history:
        history.append(0, {"norm": 1.0})
        history.flush()
        follower = Follower(tmp_path / "a")
        assert follower.look()["norm"].tolist() == [1]
        history.append(1, {"norm": 2.0})
    assert follower.look()["norm"].tolist() == [1, 2]


@pytest.mark.one_in(2, rest="slow")
@pytest.mark.parametrize("limits", [np.inf, np.array([np.inf] * 100 + [2.0] * 100)])
@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")
def test_infinite_limits_are_drawn_without_warnings(limits, tmp_path):
    run = record(tmp_path / "run.jsonl", limits)
    plotting.overview(run).savefig(tmp_path / "run.png")
    assert (
        command_line.main(["plot", str(run), "--html", str(tmp_path / "x.html")]) == 0
    )


def test_an_infinite_limit_is_recorded(tmp_path):
    axes = plotting.histogram(record(tmp_path / "run.jsonl", np.inf)).axes[0]
    assert axes.get_title(loc="left") == "Norms; the threshold is infinite"


@pytest.mark.one_in(10)
@pytest.mark.parametrize("option", ["--limit", "--clip-rate", "--every"])
@pytest.mark.parametrize("text", ["abc", "nan", "inf"])
def test_an_option_that_is_no_number_is_named(option, text, capsys):
    command = {"--limit": "plot", "--clip-rate": "suggest", "--every": "watch"}[option]
    with pytest.raises(SystemExit) as ended:
        command_line.main([command, "run.jsonl", option, text])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"{option}: expected a finite number such as 1.0, got '{text}'" in said
