"""Names of the gradient norm, and what is said if none is recognized."""

import numpy as np
import pytest

import optax_clipx as clipx
from optax_clipx import __main__ as command_line

NORMS = np.exp(0.3 * np.random.default_rng(0).normal(size=500))
LOSS = np.exp(-np.arange(500) / 100)


@pytest.mark.parametrize(
    "name",
    [
        *("total_grad_norm", "train/total_grad_norm", "total_norm", "train/total_norm"),
        *("grad_norm/total", "grad_norms/total", "grad_norm_total"),
    ],
)
def test_names_of_the_whole_norm_are_recognized(name):
    spiked = NORMS.copy()
    spiked[250] = 500.0
    assert clipx.diagnose({"loss": LOSS, name: spiked}).codes == ("spikes",)
    assert clipx.suggest_threshold(history({name: spiked})).value > 1


def history(columns):
    made = clipx.History()
    made.append(range(500), columns)
    return made


def test_the_norms_of_leaves_beside_a_total_are_no_total():
    run = {"grad_norm/a": NORMS, "grad_norm/b": NORMS, "grad_norm/total": 1.4 * NORMS}
    run["grad_norm/total"][250] = 500.0
    assert clipx.diagnose(run).codes == ("spikes",)


def test_without_a_norm_columns_that_may_hold_it_are_named():
    diagnosis = clipx.diagnose({"loss": LOSS, "my_gradnorm": NORMS})
    assert str(diagnosis).splitlines()[:2] == [
        "no errors or warnings in 500 steps, but no gradient norm was judged",
        "No column with the gradient norm was found. It may be one of these columns:"
        " my_gradnorm. If so, pass norm='my_gradnorm' (--norm my_gradnorm).",
    ]
    assert diagnosis.notice in diagnosis._repr_html_().replace("&#x27;", "'")
    assert diagnosis._asdict()["notice"] == diagnosis.notice


def test_without_any_such_column_it_says_to_record_the_norm():
    notice = clipx.diagnose({"loss": LOSS, "weight_norm": NORMS}).notice
    assert notice == (
        "No column with the gradient norm was found. Name it with norm=NAME (--norm"
        " NAME), or record it."
    )


def test_a_run_with_a_norm_has_no_notice():
    assert clipx.diagnose({"loss": LOSS, "grad_norm": NORMS}).notice == ""


def test_two_runs_in_one_chart_are_told_apart(tmp_path, capsys):
    """A chart that Weights & Biases exported."""
    path = tmp_path / "chart.csv"
    rows = [f"{i},{x:.3f},{2 * x:.3f}\n" for i, x in enumerate(NORMS)]
    path.write_text("Step,run a - grad_norm,run b - grad_norm\n" + "".join(rows))
    assert command_line.main(["diagnose", str(path)]) == 2
    assert (
        "several columns may be the norm: run a - grad_norm, run b - grad_norm. Choose"
        " one with --norm NAME."
    ) in " ".join(capsys.readouterr().err.split())
    assert (
        command_line.main(["diagnose", str(path), "--norm", "run a - grad_norm"]) == 0
    )


def test_two_norms_beside_one_loss_are_a_notice():
    run = {"loss": LOSS, "a/grad_norm": NORMS, "b/grad_norm": NORMS}
    assert "several columns may be the norm: a/grad_norm, b/grad_norm. " in (
        clipx.diagnose(run).notice
    )


@pytest.mark.parametrize("name", ["lr-AdamW", "learning/current_learning_rate", "lr"])
def test_names_of_the_learning_rate_are_recognized(name):
    needs = clipx.diagnose({"norm": NORMS, name: np.ones(500)}).not_judged
    assert "rises-with-schedule" not in needs


@pytest.mark.parametrize("name", ["train/loss_step", "train_loss_step", "train/loss"])
def test_names_of_the_loss_are_recognized(name):
    run = {"norm": NORMS, name: LOSS}
    assert "loss-diverged" not in clipx.diagnose(run).not_judged
