"""Runs and files that are rare: what is said of them, and which errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clipx as clipx
from optax_clipx.__main__ import _end, _labels, main
from optax_clipx._wrappers import sinks
from optax_clipx.runs import advice, causes, csv_files, findings, live, marks
from optax_clipx.runs.jsonl import ReadError, columns_of_records
from optax_clipx.runs.overview import overview
from optax_clipx.runs.table import MISSING


def printed(path, capsys):
    """What `watch --once` prints of a run."""
    live.follow({"run": path}, None, None, 1.0, once=True)
    return capsys.readouterr().out


def write(path, *records):
    path.write_text("".join(json.dumps(x) + "\n" for x in records))
    return path


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        ({"norm": [1.0, 2.0], "loss": [1.0]}, {}, "columns of one length above 0"),
        ({"norm": []}, {}, "columns of one length above 0"),
        ({"norm": [1.0, 2.0]}, {"step": "batch"}, "batch"),
        ({"step": [0.5, 1.5], "norm": [1.0, 2.0]}, {}, "Expected whole numbers"),
        ({"norm": np.ones((3, 2))}, {}, "got shape"),
        ({"norm": ["a", "b"]}, {}, "Expected numbers in 'norm'"),
    ],
)
def test_columns_that_are_refused(run, options, message):
    with pytest.raises(ReadError, match=message):
        clipx.diagnose(run, **options)


def test_a_history_without_records_cannot_be_judged():
    with pytest.raises(ReadError, match="Was anything appended"):
        clipx.diagnose(clipx.History())


def test_a_record_that_is_no_object_is_named():
    with pytest.raises(ReadError, match=r"run.jsonl:7: expected an object"):
        columns_of_records("run.jsonl", [6, 7], [{"step": 1}, [2]])


def test_records_of_which_each_has_names_of_its_own_are_refused():
    records = [{f"{i}": 1} for i in range(4000)]
    with pytest.raises(ReadError, match="mostly the same names"):
        columns_of_records("run.jsonl", list(range(4000)), records)


def test_a_run_without_numbers_is_no_run_of_levanter():
    tracked = {"event": "log_config", "tracker": "json"}
    assert columns_of_records("run.jsonl", [1], [tracked]) == {}


def test_the_cause_and_the_remedy_follow_the_evidence():
    skipped = {"all_skipped": True, "in_loss": False}
    assert causes._stop(skipped).startswith("You need to change nothing")
    assert "first NaN" in causes._stop({"in_loss": True})
    assert "names the leaves" in causes._stop({"in_loss": False})
    assert "Muon" in causes._apart({"starved_by": causes.MUON})
    assert causes._apart({}) == "Clip each leaf by its own norm."
    assert "resumed" in causes._written_twice({"kind": "resumed"})
    assert "several runs" in causes._written_twice({"kind": "mixed"})


def test_a_finding_may_have_no_step():
    one = findings.Finding("spikes", "info", (), {}, "")
    assert findings.places(one) == "no step of its own"


def test_a_sparkline_of_nothing_finite_is_empty():
    assert live.sparkline(np.array([np.nan, np.inf])) == ""


def test_a_sparkline_of_negative_numbers_rises():
    bars = live.sparkline(np.array([-2.0, 0.0, 2.0]))
    assert len(bars) == 3
    assert bars[0] < bars[1] < bars[2]


def test_watch_says_that_nothing_is_recorded(tmp_path, capsys):
    path = tmp_path / "run.jsonl"
    path.write_text("")
    assert "nothing is recorded yet" in printed(path, capsys)


def test_watch_counts_what_is_not_finite(tmp_path, capsys):
    records = [{"step": i, "norm": x} for i, x in enumerate([1.0, None, 2.0, 3.0])]
    path = write(tmp_path / "run.jsonl", *records)
    text = path.read_text().replace("null", "NaN")
    path.write_text(text)
    assert "non-finite" in printed(path, capsys)


def test_watch_leaves_out_a_loss_without_numbers(tmp_path, capsys):
    records = [{"step": i, "norm": 1.0 + i, "loss": None} for i in range(4)]
    shown = printed(write(tmp_path / "run.jsonl", *records), capsys)
    assert "norm" in shown
    assert "loss" not in shown


def without_losses():
    """A run of which every loss is missing."""
    run = clipx.History()
    for i in range(3):
        run.append(i, {"norm": 1.0 + i, "loss": MISSING})
    return run


def test_an_overview_leaves_out_a_loss_without_numbers():
    lines = overview(without_losses().columns)
    assert any("largest 3" in line for line in lines)
    assert not any("loss" in line for line in lines)


def test_the_end_of_a_run_that_diverged_is_nan():
    assert np.isnan(_end(np.array([1.0, 2.0, np.inf])))
    assert _end(np.array([1.0, 2.0, 3.0])) == 3.0


def test_runs_of_one_name_are_told_apart_by_their_folders():
    assert _labels(["x/a/run.csv", "x/b/run.csv"]) == ["a/run.csv", "b/run.csv"]
    assert _labels(["one.csv", "two.jsonl"]) == ["one", "two"]
    with pytest.raises(ValueError, match="named twice"):
        _labels(["run.csv", "run.csv"])


def test_a_run_without_a_finite_norm_is_refused(tmp_path, capsys):
    path = tmp_path / "run.csv"
    path.write_text("step,norm\n0,nan\n1,nan\n")
    assert main(["suggest", str(path)]) != 0
    assert "no finite number" in capsys.readouterr().err


def test_a_run_without_a_value_has_no_band():
    with pytest.raises(ReadError, match="There is no value in 'loss'"):
        marks.seed_band([without_losses()], "loss")


def test_the_dominant_leaf_is_that_of_one_model():
    tx = clipx.track_norms(optax.sgd(1.0))
    state = jax.vmap(tx.init)({"w": jnp.zeros((3, 2))})
    with pytest.raises(ValueError, match="Expected the state of one model"):
        clipx.dominant_leaf(state)


def test_a_csv_file_of_other_bytes_is_refused(tmp_path):
    path = tmp_path / "run.csv"
    path.write_bytes(b"step,norm\n0,\xff\xfe1\n")
    with pytest.raises(ReadError, match="UTF-8"):
        clipx.History.load(path)


def test_a_history_stays_with_the_process_that_opened_it(tmp_path):
    history = clipx.History(tmp_path / "run.jsonl")
    history.append(0, {"norm": 1.0})
    history._writer.process += 1  # as after a fork
    with pytest.raises(ValueError, match="Expected a record from the process"):
        history.append(1, {"norm": 1.0})
    history.close()  # writes nothing: its parent does
    assert "norm" not in (tmp_path / "run.jsonl").read_text()
    history._writer.process -= 1
    history._writer.close()


def test_a_target_is_a_share():
    with pytest.raises(ValueError, match="Expected 0 <= target <= 1, got target=2"):
        clipx.diagnose({"norm": [1.0, 2.0]}, target=2)


def test_numbers_of_steps_may_be_fractions():
    assert findings._number_of(1.0, "step") == "1 step"
    assert findings._number_of(1.5, "step") == "1.5 steps"


def test_a_tap_prints_arrays_of_seeds(capsys):
    sinks._print_line(3, {"norm": np.array([1.0, 2.0]), "skipped": True})
    assert capsys.readouterr().out == "step 3: norm=[1.,2.] skipped=True\n"


def test_a_function_that_says_nothing_of_its_arguments_may_be_a_sink():
    assert sinks._takes_step_and_metrics(max)


@pytest.mark.parametrize("block", [b"1,2,3\n4\n", b"1\n2,3\n4,", b"1,2,3\n"])
def test_lines_with_other_numbers_of_cells_are_read_one_by_one(block):
    assert csv_files._numbers(block, b",", 2) is None


def test_axes_without_labels_have_no_legend():
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    marks.legend_above(ax)
    assert ax.get_legend() is None


def test_what_is_said_of_a_rule_with_a_target():
    assert "target is" in advice._always({"clip_rate": 0.5, "target": 0.1})
    assert "target" not in advice._always({"clip_rate": 0.5})
