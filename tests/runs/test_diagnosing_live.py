"""Findings as a run grows: History calls a function, and watch shows them."""

import json
import time

import numpy as np
import pytest
from planted import FAULTS, HEALTHY

import optax_clipx as clipx
from optax_clipx import __main__ as command_line
from optax_clipx.runs.alarm import Alarm
from optax_clipx.runs.merging import Restarts


def stream(history, run):
    steps = run["step"]
    names = [name for name in run if name != "step"]
    for i in range(len(steps)):
        history.append(int(steps[i]), {name: float(run[name][i]) for name in names})


def heard(run):
    """The length of the history and the finding, for each call."""
    found = []
    history = clipx.History(on_finding=lambda x: found.append((len(history), x)))
    stream(history, run)
    return found


def flat(**changes):
    run = {"step": np.arange(400), "loss": np.ones(400), "clip/norm": np.ones(400)}
    for name, (step, value) in changes.items():
        run[{"norm": "clip/norm"}.get(name, name)][step] = value
    return run


def test_a_spike_is_told_once_within_a_hundred_steps():
    ((rows, finding),) = heard(flat(norm=(130, 50.0)))
    assert (finding.code, finding.steps) == ("spikes", (130,))
    assert 130 < rows <= 231


def test_what_the_last_records_show_is_told_at_the_end():
    run, found = {n: x[:160] for n, x in flat(norm=(130, 50.0)).items()}, []
    with clipx.History(on_finding=found.append) as history:
        stream(history, run)
        assert found == []  # 60 records since the last look
    assert [(finding.code, finding.steps) for finding in found] == [("spikes", (130,))]
    history.close()
    assert len(found) == 1


def test_a_number_that_is_not_finite_is_told_at_once():
    ((rows, finding),) = heard(flat(norm=(130, np.nan)))
    assert (finding.code, finding.steps) == ("nonfinite", (130,))
    assert rows == 132  # its own record is written with the next one


def test_a_second_spike_is_told_too():
    run = flat(norm=(130, 50.0))
    run["clip/norm"][290] = 50.0
    assert [finding.steps[-1] for _, finding in heard(run)] == [130, 290]


def test_a_fault_that_gets_worse_is_told_again():
    run = flat(norm=(slice(200, None), np.nan))
    severities = [(x.code, x.severity) for _, x in heard(run)]
    assert severities[0] == ("nonfinite", "warning")
    assert severities[1] == ("nonfinite", "error")


@pytest.mark.one_in(3, rest="slow")
@pytest.mark.parametrize("kind", HEALTHY)
def test_a_healthy_run_is_silent(kind):
    assert heard(HEALTHY[kind](np.random.default_rng(100))) == []


def test_what_the_function_raises_comes_out_and_no_record_is_lost(tmp_path):
    def stop(finding):
        raise StopIteration(finding.code)

    path = tmp_path / "run.jsonl"
    with (
        pytest.raises(StopIteration, match="nonfinite"),
        clipx.History(path, on_finding=stop) as history,
    ):
        stream(history, flat(loss=(20, np.inf)))
    assert clipx.History.load(path).steps.tolist() == list(range(22))


def test_blocks_of_steps_are_judged():
    run, found = flat(norm=(130, 50.0)), []
    history = clipx.History(on_finding=found.append)
    for start in range(0, 400, 50):
        block = {name: x[start : start + 50] for name, x in run.items()}
        history.append(block.pop("step"), block)
    assert [finding.code for finding in found] == ["spikes"]


def test_records_without_norm_and_loss_are_told_of_once():
    history = clipx.History(on_finding=print)
    run = {"step": np.arange(300), "accuracy": np.ones(300)}
    with pytest.warns(UserWarning, match="on_finding is not called") as warned:
        stream(history, run)
    assert len(warned) == 1


def test_a_history_that_goes_back_is_judged_again(tmp_path):
    found = []
    history = clipx.History(
        tmp_path / "run.jsonl", resume=True, on_finding=found.append
    )
    stream(history, {name: x[:200] for name, x in flat().items()})
    stream(history, {name: x[50:] for name, x in flat(norm=(80, 50.0)).items()})
    assert [finding.steps for finding in found] == [(80,)]


def test_judging_as_it_goes_is_cheap():
    run, _ = FAULTS["spikes"](np.random.default_rng(0))
    start = time.thread_time()
    heard(run)
    assert time.thread_time() - start < 2.0  # 1,000 steps; about 0.2 s


def test_an_alarm_follows_a_file_from_its_beginning():
    columns = {"step": np.arange(9000), "norm": np.ones(9000)}
    columns["norm"][[100, 8500]] = 50.0
    alarm = Alarm()
    alarm.follow({name: x[:5000] for name, x in columns.items()})
    alarm.follow(columns)
    alarm.follow(columns)
    assert [finding.steps for finding in alarm.found] == [(100,), (8500,)]


def test_watch_shows_findings(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "200")
    norms = np.ones(200)
    norms[120] = 40.0
    lines = [json.dumps({"step": i, "norm": x}) for i, x in enumerate(norms)]
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join(lines) + "\n")
    assert command_line.main(["watch", str(path), "--once"]) == 0
    assert "spikes at step 120" in capsys.readouterr().out


def test_watch_shows_restarts(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "200")
    steps = [*range(100), *range(60, 140)]
    path = tmp_path / "run.jsonl"
    path.write_text("".join(f'{{"step": {i}, "norm": 1.0}}\n' for i in steps))
    assert command_line.main(["watch", str(path), "--once"]) == 0
    assert "restarts at step 60" in capsys.readouterr().out


def test_a_restart_that_follows_another_is_told_too():
    columns, alarm = {"step": np.arange(100), "norm": np.ones(100)}, Alarm()
    alarm.follow(columns, Restarts((20,), (30,)))
    alarm.follow(columns, Restarts((20, 60), (30, 80)))
    assert [finding.steps for finding in alarm.found] == [(20,), (20, 60)]
