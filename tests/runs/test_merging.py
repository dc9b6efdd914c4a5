"""Rows of one step become one row; a restart is told from several runs in one file."""

import numpy as np
import pytest

import optax_clipx as clipx

NAN = float("nan")


def load(tmp_path, text, name="run.csv"):
    (tmp_path / name).write_text(text)
    return clipx.History.load(tmp_path / name)


def of_steps(tmp_path, steps, names="n"):
    """A file whose columns are n, the number of the row, or take turns."""
    lines = [
        f'{{"step": {s}, "{names[i % len(names)]}": {i}}}' for i, s in enumerate(steps)
    ]
    return load(tmp_path, "\n".join(lines) + "\n", "run.jsonl")


def test_the_last_norm_of_an_epoch_is_kept(tmp_path):
    rows, step = ["epoch,step,train_loss,grad_norm,val_loss"], -1
    for epoch in range(10):
        for i in range(10):
            step += 1
            rows.append(f"{epoch},{step},.5,{50 if i == 9 else 1 + i / 100},")
        rows.append(f"{epoch},{step},,,.7")
    history = load(tmp_path, "\n".join(rows) + "\n")
    assert (history["grad_norm"] == 50).sum() == 10
    assert len(history) == 100
    assert history.recorded("val_loss").sum() == 10


def test_many_rows_a_step_are_not_several_runs(tmp_path):
    rows = "".join(f"{s},{s},\n{s},,7\n" for s in range(500))
    history = load(tmp_path, "step,norm,val\n" + rows)
    assert history["norm"].tolist() == list(range(500))
    assert set(history["val"]) == {7}


def test_the_later_value_that_is_present_wins(tmp_path):
    text = "step,a,b,c\n1,1,2,\n1,,nan,4\n1,5,,\n"
    with pytest.warns(UserWarning, match=r"1 steps have several values in 'a', 'b'"):
        history = load(tmp_path, text)
    assert history["a"].tolist() == [5]
    assert history.recorded("b").tolist() == [True]
    assert np.isnan(history["b"][0])
    assert history["c"].tolist() == [4]


def test_the_same_value_twice_is_no_contradiction(tmp_path):
    history = load(tmp_path, "step,epoch,a\n1,0,2\n1,0,\n")
    assert history["epoch"].tolist() == [0]


@pytest.mark.parametrize("again", [6, 1, 0])
def test_a_restart_takes_the_place_of_what_it_runs_again(again, tmp_path):
    steps = [*range(10), *range(again, 12)]
    with pytest.warns(UserWarning, match=f"{10 - again} records of steps .* run again"):
        history = of_steps(tmp_path, steps)
    assert history["n"].tolist() == [*range(again), *range(10, len(steps))]


def test_a_restart_leaves_nothing_of_the_step_it_begins_with(tmp_path):
    with pytest.warns(UserWarning, match="2 records of steps that were run again"):
        history = load(tmp_path, "step,a,b\n0,1,\n1,2,\n2,3,9\n1,4,\n2,5,\n")
    assert history["a"].tolist() == [1, 4, 5]
    assert not history.recorded("b").any()


def test_an_evaluation_that_is_logged_late_is_merged(tmp_path):
    history = of_steps(tmp_path, [0, 1, 2, 3, 1, 4, 5], names="aaaabaa")
    assert history.steps.tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_array_equal(history["a"], [0, 1, 2, 3, 5, 6])
    np.testing.assert_array_equal(history["b"], [NAN, 4, NAN, NAN, NAN, NAN])


@pytest.mark.parametrize(
    "steps",
    [
        [s + 100 * (i % 2) for i, s in enumerate(range(40))],
        [i // 2 + 5 * (i % 2) for i in range(40)],
        [i % 7 for i in range(200)],
    ],
)
def test_runs_that_are_mixed_in_one_file_are_an_error(steps, tmp_path):
    with pytest.raises(ValueError, match="several runs mixed in one file"):
        of_steps(tmp_path, steps)


def test_a_step_may_be_recorded_in_parts(tmp_path):
    path = tmp_path / "run.jsonl"
    with clipx.History(path) as history:
        history.append(0, {"loss": 1.0})
        history.append(0, {"val_loss": 2.0})
        history.append(1, {"loss": 3.0})
    for found in (history, clipx.History.load(path)):
        assert found.steps.tolist() == [0, 1]
        np.testing.assert_array_equal(found["loss"], [1, 3])
        np.testing.assert_array_equal(found["val_loss"], [2, NAN])


def test_a_step_in_parts_is_dropped_whole_by_a_restart(tmp_path):
    path = tmp_path / "run.jsonl"
    with clipx.History(path) as history:
        history.append(0, {"loss": 1.0})
        history.append(0, {"val_loss": 2.0})
    with clipx.History(path, resume=True) as history:
        history.append(0, {"loss": 5.0})
    assert path.read_text() == '{"step": 0, "loss": 5.0}\n'


def test_records_without_a_step_are_left_out_with_a_warning(tmp_path):
    text = '{"seed": 7}\n{"step": 0, "norm": 1}\n'
    with pytest.warns(UserWarning, match="1 records without a step"):
        history = load(tmp_path, text, "run.jsonl")
    assert history["norm"].tolist() == [1]
