"""Files of other loggers: each has a small one in tests/fixtures/logs."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import optax_clipx as clipx
from optax_clipx import __main__ as command_line

LOGS = Path(__file__).parents[1] / "fixtures" / "logs"
NAN = float("nan")
# The column of the norm, the norms that it holds, and a column that is sparse.
FOUND = {
    "lightning": ("grad_norm", [1, 1.25, 1.5, 9.5] * 3, "val_loss", {3: 1.5, 11: 1.0}),
    "keras.csv": ("grad_norm", [3, NAN, 1.5], "val_loss", {0: 2.5, 1: 1.5}),
    "checkpoint-12": ("grad_norm", [2, 3, 4, NAN, 6, 7], "eval_loss", {6: 2.25}),
    "wandb_history.csv": ("grad_norm", [1, 2, NAN, 4, 5], "val/loss", {5: 1.25}),
    "wandb_chart.csv": ("grad_norm", [2, 3, 4, 5, 6], "train/loss", {0: 3.0, 40: 2.0}),
    "maxtext.jsonl": ("learning/raw_grad_norm", [4, 5, 6, 7, 8], "eval/avg_loss",
                      {4: 8.25}),
    "levanter.jsonl": ("grad/norm/total", [2, 3, 4, 5, 6], "eval/loss", {2: 8.5}),
}  # fmt: skip


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", FOUND)
def test_a_log_is_read(name):
    norm, norms, sparse, values = FOUND[name]
    history = clipx.History.load(LOGS / name)
    there = history.recorded(norm)
    np.testing.assert_array_equal(history[norm][there], norms)
    found = dict(zip(history.steps.tolist(), history[sparse].tolist(), strict=True))
    assert values.items() <= found.items()
    assert np.isnan(list(found.values())).sum() == (~history.recorded(sparse)).sum()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", FOUND)
def test_suggest_finds_the_norm(name):
    want = clipx.suggest_threshold(FOUND[name][1])
    assert clipx.suggest_threshold(LOGS / name) == want


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", FOUND)
def test_the_command_line_draws_it(name, tmp_path):
    run = tmp_path / name
    (shutil.copytree if (LOGS / name).is_dir() else shutil.copy)(LOGS / name, run)
    assert command_line.main(["plot", str(run)]) == 0
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_a_file_of_two_runs_asks_which(capsys):
    assert command_line.main(["suggest", str(LOGS / "wandb_two_runs.csv")]) == 2
    assert "a - grad_norm, b - grad_norm. Choose one" in capsys.readouterr().err


def test_the_chart_of_one_run_is_named_without_the_run():
    columns = clipx.History.load(LOGS / "wandb_chart.csv").columns
    assert list(columns)[:4] == [
        "step", "grad_norm", "grad_norm__MIN", "grad_norm__MAX"
    ]  # fmt: skip


def test_records_in_a_list_are_read(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('[\n{"step": 0, "norm": 1},\n{"step": 1, "norm": null}\n]\n')
    history = clipx.History.load(path)
    assert history.recorded("norm").tolist() == [True, False]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{\n "log_history": [\n  {"step": 1, "lo', "broken or cut off"),
        ('{\n "epoch": 1\n}\n', "list called 'log_history'"),
        ('{\n "log_history": []\n}\n', "no records"),
    ],
)
def test_a_document_that_is_no_log_says_so(text, words, tmp_path):
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        clipx.History.load(tmp_path)
