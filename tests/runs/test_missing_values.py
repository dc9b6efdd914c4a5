"""Missing, non-finite and finite values are three things, wherever a run is kept."""

import json

import numpy as np
import pytest

import optax_clipx as clipx
from optax_clipx import __main__ as command_line, plotting
from optax_clipx.runs import table
from optax_clipx.runs.drawing import norms_of
from optax_clipx.runs.live import Follower

NAN, INF = float("nan"), float("inf")


def sparse():
    """Steps 0 to 3; x is finite, NaN, missing, infinite; y is there in step 2 alone."""
    history = clipx.History()
    for step, x in enumerate((1.0, NAN, None, INF)):
        history.append(step, {"x": x, "y": 5.0} if step == 2 else {"x": x})
    return history


def assert_is_sparse(history):
    assert history.recorded("x").tolist() == [True, True, False, True]
    assert history.recorded("y").tolist() == [False, False, True, False]
    np.testing.assert_array_equal(history["x"], [1.0, NAN, NAN, INF])
    np.testing.assert_array_equal(history["y"], [NAN, NAN, 5.0, NAN])


def with_evaluations(norm="clip/norm"):
    """A norm in every second step, an evaluation in every twelfth."""
    norms = np.random.default_rng(1).lognormal(size=4000)
    history = clipx.History()
    for i, value in enumerate(norms):
        history.append(2 * i, {"loss": 0.5, norm: value})
        if i % 12 == 11:
            history.append(2 * i + 1, {"val_loss": 0.7})
    return history, norms


def test_in_memory():
    assert_is_sparse(sparse())


@pytest.mark.parametrize("name", ["run.jsonl", "run.csv"])
def test_save_and_load(name, tmp_path):
    assert_is_sparse(clipx.History.load(sparse().save(tmp_path / name)))


def test_a_line_of_json_has_only_what_is_present(tmp_path):
    lines = sparse().save(tmp_path / "run.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"step": 1, "x": "NaN"}
    assert json.loads(lines[2]) == {"step": 2, "y": 5.0}


def test_a_cell_of_csv_is_empty_if_nothing_is_present(tmp_path):
    text = sparse().save(tmp_path / "run.csv").read_text()
    assert text == "step,x,y\n0,1.0,\n1,nan,\n2,,5.0\n3,inf,\n"


def test_a_history_may_be_recorded_from_another():
    old, new = sparse(), clipx.History()
    new.append(old.steps, {"x": old["x"], "y": old["y"].astype(np.float32)})
    assert_is_sparse(new)


def test_pandas_drops_what_is_missing_alone():
    pytest.importorskip("pandas")
    frame = sparse().to_pandas()
    assert frame["x"].dropna().index.tolist() == [0, 1, 3]
    assert frame["y"].dropna().to_dict() == {2: 5.0}
    dense = clipx.History()
    dense.append(0, {"x": NAN})
    assert dense.to_pandas()["x"].dtype == np.float64


def test_tensorboard_tags_have_steps_of_their_own(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for step, x in ((0, 1.0), (1, NAN), (3, INF)):
            writer.add_scalar("x", x, step)
        writer.add_scalar("y", 5.0, 2)
    assert_is_sparse(clipx.History.load(tmp_path))


def test_a_cell_is_eight_bytes():
    rows = table.Table()
    rows.extend({"step": np.arange(10.0), "x": np.ones(10)})
    assert all(x.itemsize * len(x) == 80 for x in rows._columns.values())


@pytest.mark.one_in(2)
@pytest.mark.parametrize("where", ["memory", "array", "run.jsonl", "run.csv"])
def test_suggest_leaves_out_what_is_missing(where, tmp_path):
    history, norms = with_evaluations()
    run = {"memory": history, "array": history["clip/norm"]}.get(where)
    if run is None:
        run = history.save(tmp_path / where)
    assert clipx.suggest_threshold(run) == clipx.suggest_threshold(norms)
    assert clipx.suggest_threshold(run).value == pytest.approx(3.57, abs=0.005)


def test_suggest_counts_a_nan_that_was_recorded():
    history = clipx.History()
    for step in range(20):
        history.append(2 * step, {"norm": NAN if step == 7 else 1.0 + step})
        history.append(2 * step + 1, {"loss": 1.0})
    assert clipx.suggest_threshold(history).nonfinite == 1


def test_suggest_takes_a_limit_that_is_recorded_less_often():
    history = clipx.History()
    norms = np.random.default_rng(0).lognormal(size=200) + 5
    for step, norm in enumerate(norms):
        limit = 2.0 if step % 10 == 0 else None
        history.append(step, {"clip/norm": norm, "clip/threshold": limit})
    assert clipx.suggest_threshold(history).value == 2.0


def test_pictures_show_the_steps_that_have_a_norm():
    history, norms = with_evaluations()
    seen = norms_of(history, None, 2.0)
    np.testing.assert_array_equal(seen.norms, norms)
    np.testing.assert_array_equal(seen.steps, 2 * np.arange(4000))
    assert seen.rate == np.mean(norms > 2.0)


def test_pictures_count_only_recorded_values_as_non_finite():
    history = clipx.History()
    for step, norm in enumerate((1.0, NAN, None, 2.0)):
        history.append(step, {"norm": norm, "loss": 1.0})
    _, labels = plotting.norms(history).axes[0].get_legend_handles_labels()
    assert labels == ["norm", "non-finite: 1 step"]


def test_layers_that_are_recorded_less_often_are_drawn_without_gaps():
    history = clipx.History()
    for step in range(40):
        layers = {f"track_norms/{n}": 1.0 + step for n in "ab"}
        history.append(step, {"norm": 1.0, **(layers if step % 10 == 0 else {})})
    (image,) = plotting.heatmap(history).axes[0].get_images()
    np.testing.assert_array_equal(image.get_array(), [[1, 11, 21, 31]] * 2)


def test_compare_draws_a_loss_that_is_recorded_less_often():
    history, _ = with_evaluations()
    figure = plotting.compare({"a": history}, column="val_loss")
    (line,) = figure.axes[0].get_lines()
    assert set(line.get_ydata()) == {0.7}


def test_compare_says_where_a_recorded_loss_ends_in_nan():
    history = clipx.History()
    for step in range(6):
        history.append(2 * step, {"loss": 1.0 if step < 4 else NAN})
        history.append(2 * step + 1, {"val": 1.0})
    lines = plotting.compare({"a": history}).axes[0].get_lines()
    assert [list(x.get_xdata()) for x in lines if x.get_marker() == "x"] == [[8]]


def test_the_command_compares_what_was_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with_evaluations()[0].save("run.jsonl")
    assert command_line.main(["compare", "run.jsonl", "--column", "val_loss"]) == 0
    assert "run: val_loss 0.7 (1 run), " in capsys.readouterr().out


def test_the_page_counts_what_was_recorded():
    pytest.importorskip("plotly")
    from optax_clipx.runs.page import page

    history, norms = with_evaluations()
    text = page({"a": (history.columns, "clip/norm")})
    row = f"<td>a</td><td>4,000</td><td>{np.median(norms):.4g}</td>"
    assert row in text
    assert "<td>0</td>" in text  # non-finite


def test_watch_shows_the_last_value_that_was_recorded(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.chdir(tmp_path)
    history = clipx.History()
    history.append(0, {"norm": 2.5, "loss": 1.25})
    history.append(1, {"other": 1.0})
    history.save("run.jsonl")
    assert command_line.main(["watch", "run.jsonl", "--once"]) == 0
    shown = capsys.readouterr().out
    assert "2.5" in shown
    assert "1.25" in shown
    assert "nan" not in shown
    assert "non-finite" not in shown


def test_watch_merges_the_rows_of_a_step(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"step": 0, "norm": 2}\n')
    follower = Follower(path)
    assert follower.look()["norm"].tolist() == [2]
    with path.open("a") as file:
        file.write('{"step": 0, "val": 7}\n{"step": 1, "norm": 3}\n')
    found = follower.look()
    assert found["norm"].tolist() == [2, 3]
    assert found["val"][0] == 7
