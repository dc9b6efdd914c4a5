"""CSV: what is cut off or ambiguous is told, and what is saved loads again."""

import sys

import numpy as np
import pytest

import optax_clipx as clipx
from optax_clipx.runs import csv_files


def load(tmp_path, text, name="run.csv"):
    (tmp_path / name).write_bytes(text.encode())
    return clipx.History.load(tmp_path / name)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["Step", "Global Step", "step", "_step"])
def test_epochs_are_no_steps_beside_steps(name, tmp_path):
    (tmp_path / "run.csv").write_text(f"epoch,{name},norm\n0,1,1.0\n0,2,9.0\n1,3,1.0\n")
    loaded = clipx.History.load(tmp_path / "run.csv")
    assert loaded.steps.tolist() == [1, 2, 3]


@pytest.mark.parametrize("last", ["2,12", "2,", "2", "2,12.7"])
def test_a_last_line_that_may_be_cut_off_is_left_out(last, tmp_path):
    with pytest.warns(UserWarning, match="the last line has no end"):
        history = load(tmp_path, f"step,norm\n0,10.5\n1,11.5\n{last}")
    assert history["norm"].tolist() == [10.5, 11.5]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("cell", ["1_5", "1,5", "1,234", "1'234", "1 234.5"])
def test_a_column_of_ambiguous_numbers_is_told(cell, tmp_path):
    with pytest.warns(UserWarning, match="run.csv:2: the column 'norm' is left out"):
        history = load(tmp_path, f"step;norm;loss\n0;{cell};1\n1;{cell};2\n")
    assert list(history.columns) == ["step", "loss"]


@pytest.mark.parametrize("cell", ["1_5", "1,5", "١٢"])
def test_one_ambiguous_number_is_an_error(cell, tmp_path):
    with pytest.raises(ValueError, match=r"run\.csv:3: expected a number in 'norm'"):
        load(tmp_path, f"step;norm\n0;1\n1;{cell}\n")


def test_one_ambiguous_number_in_json_is_an_error(tmp_path):
    text = '{"step": 0, "norm": 1}\n{"step": 1, "norm": "1_5"}\n'
    with pytest.raises(ValueError, match=r":2: expected a number in 'norm', got '1_5'"):
        load(tmp_path, text, "run.jsonl")


def test_a_column_of_text_is_left_out_in_silence(tmp_path):
    history = load(tmp_path, "step,norm,run\n0,1,a\n1,2,2026-01-01\n")
    assert list(history.columns) == ["step", "norm"]


def test_words_for_missing_are_missing(tmp_path):
    history = load(tmp_path, "step,norm\n0,1\n1,NA\n2,nan\n3, \n4,None\n5,null\n")
    assert history.recorded("norm").tolist() == [True, False, True] + [False] * 3


@pytest.mark.parametrize("first", ["Step,step", "step,Step"])
def test_an_exact_name_of_the_step_comes_first(first, tmp_path):
    values = {"Step": "7", "step": "3"}
    row = ",".join(values[name] for name in first.split(","))
    history = load(tmp_path, f"{first},norm\n{row},1\n")
    assert history.steps.tolist() == [3]
    assert history["Step"].tolist() == [7]


def test_resuming_goes_by_the_exact_name(tmp_path):
    path = tmp_path / "run.jsonl"
    lines = [f'{{"Step": {100 - i}, "step": {i}}}\n' for i in range(3)]
    path.write_text("".join(lines))
    with clipx.History(path, resume=True) as history:
        history.append(3, {"Step": 0})
    assert history.steps.tolist() == [0, 1, 2, 3]
    assert history["Step"].tolist() == [100, 99, 98, 0]


def test_an_exact_name_of_the_norm_comes_first():
    history = clipx.History()
    history.append(range(3), {"Norm": np.full(3, 9.0), "norm": np.full(3, 2.0)})
    assert clipx.suggest_threshold(history).value == 2.0


NAMES = ["a\nb", "a\tb", "a;b", ";;;", " a ", 'a"b', "a,b", "\r", "", "step;x", "µ"]


@pytest.mark.one_in(10)
@pytest.mark.parametrize("name", NAMES)
def test_any_name_loads_again(name, tmp_path):
    history = clipx.History()
    history.append(range(2), {name: np.array([1.0, 2.0]), "other": np.ones(2)})
    loaded = clipx.History.load(history.save(tmp_path / "run.csv"))
    assert list(loaded.columns) == ["step", name, "other"]
    assert loaded[name].tolist() == [1, 2]


@pytest.mark.parametrize("name", ["run.csv", "run.jsonl"])
def test_steps_alone_load_again(name, tmp_path):
    history = clipx.History()
    history.append(range(3), {})
    loaded = clipx.History.load(history.save(tmp_path / name))
    assert list(loaded.columns) == ["step"]
    assert loaded.steps.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.jsonl", '{"step": 0, "norm": 1}\n{"step": 1, "norm": 2}\n'),
        ("run.csv", "step,norm\n0,1\n1,2\n"),
        ("run.json", '{"log_history": [\n{"step": 0, "norm": 1}, '
                     '{"step": 1, "norm": 2}]}\n'),
    ],
)  # fmt: skip
def test_a_byte_order_mark_is_no_part_of_the_content(name, text, tmp_path):
    assert load(tmp_path, "\ufeff" + text, name)["norm"].tolist() == [1, 2]


def test_watch_reads_past_a_byte_order_mark(tmp_path):
    from optax_clipx.runs.live import Follower

    path = tmp_path / "run.jsonl"
    path.write_text('\ufeff{"step": 0, "norm": 1}\n', encoding="utf-8")
    follower = Follower(path)
    assert follower.look()["norm"].tolist() == [1]
    with path.open("a") as file:
        file.write('{"step": 1, "norm": 2}\n')
    assert follower.look()["norm"].tolist() == [1, 2]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(csv_files, "_BLOCK", 16)  # of a few lines


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("without", [(), ("orjson",)])
def test_blocks_of_numbers_are_read_at_once(
    without, delimiter, end, tmp_path, monkeypatch
):
    for name in without:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(csv_files, "_blocks", lambda *_: iter(()))  # one by one: none
    rows = ["step,a,b", "0,1.5,-2e-3", "1,nan,inf", "2,,.5", "3,7,", "4,,", "5,1,-inf"]
    text = end.join([*rows, ""]).replace(",", delimiter)
    history = load(tmp_path, text)
    assert history.steps.tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_array_equal(history["a"], [1.5, np.nan, np.nan, 7, np.nan, 1])
    np.testing.assert_array_equal(
        history["b"], [-2e-3, np.inf, 0.5, np.nan, np.nan, -np.inf]
    )
    assert history.recorded("a").tolist() == [True, True, False, True, False, True]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("row", ["4,1,2", "4", "4,1_0", "4,x", "4,0x1"])
def test_a_broken_line_in_a_later_block_is_named(row, tmp_path):
    text = "step,norm\n" + "".join(f"{i},1.0\n" for i in range(4))
    with pytest.raises(ValueError, match=r"run\.csv:6: expected"):
        load(tmp_path, f"{text}{row}\n5,1.0\n")


@pytest.mark.usefixtures("small_blocks")
def test_cells_that_are_quoted_later_are_read(tmp_path):
    history = load(tmp_path, 'step,norm\n0,1\n1,2\n2,3\n"3","4.5"\n4,5\n')
    assert history["norm"].tolist() == [1, 2, 3, 4.5, 5]


@pytest.mark.usefixtures("small_blocks")
def test_a_line_with_a_cell_too_many_is_not_made_up_for_by_the_next(tmp_path):
    with pytest.raises(ValueError, match=r"run\.csv:3: expected 2 values"):
        load(tmp_path, "step,norm\n0,1\n1,2,3\n4\n")


@pytest.mark.usefixtures("small_blocks")
def test_a_line_that_is_longer_than_a_block_is_read(tmp_path):
    history = load(tmp_path, f"step,norm\n0,1.{'0' * 50}\n1,2\n2,3\n")
    assert history["norm"].tolist() == [1, 2, 3]


@pytest.mark.usefixtures("small_blocks")
def test_a_last_line_without_an_end_is_left_out(tmp_path):
    with pytest.warns(UserWarning, match="the last line has no end"):
        history = load(tmp_path, "step,norm\n0,1\n1,2\n2,3\n3,4\n4,5")
    assert history["norm"].tolist() == [1, 2, 3, 4]
