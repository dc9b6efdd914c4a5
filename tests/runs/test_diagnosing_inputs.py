"""Any run goes into a diagnosis: its columns are found, or missing ones are named."""

import json

import numpy as np
import pytest
from planted import FAULTS, healthy

import optax_clipx as clipx


def recorded(code="spikes", seed=3):
    run, _ = FAULTS[code](np.random.default_rng(seed))
    history = clipx.History()
    history.append(run.pop("step"), run)
    return history


@pytest.mark.parametrize("name", ["run.jsonl", "run.csv"])
def test_files_and_histories_have_the_same_findings(name, tmp_path):
    history = recorded()
    path = history.save(tmp_path / name)
    want = clipx.diagnose(history)
    assert want.codes == ("spikes",)
    assert clipx.diagnose(path) == want
    assert clipx.diagnose(str(tmp_path)) == want


def test_a_trainer_state_is_read(tmp_path):
    norms = np.ones(200)
    norms[120] = 30.0
    log = [
        {"step": 5 * i, "grad_norm": norm, "loss": 2.0, "learning_rate": 1e-3}
        for i, norm in enumerate(norms)
    ]
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": log}))
    diagnosis = clipx.diagnose(path)
    assert diagnosis.findings[0].steps == (600,)
    assert set(diagnosis.not_judged.values()) == {
        "the norm of the updates",
        "the steps that were skipped",
        "the threshold",
        "norms of leaves",
    }


def test_event_files_are_read(tmp_path):
    tensorboard = pytest.importorskip("tensorboardX")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        for step in range(100):
            writer.add_scalar("train/grad_norm", 30.0 if step == 60 else 1.0, step)
    assert clipx.diagnose(tmp_path).findings[0].steps == (60,)


def test_foreign_names_are_given():
    norms = np.ones(200)
    norms[120] = 30.0
    run = {"it": np.arange(200) * 10, "g": norms, "cap": np.full(200, 0.1)}
    diagnosis = clipx.diagnose(run, step="it", norm="g", threshold="cap")
    assert diagnosis.codes == ("spikes", "always-clipped")
    assert diagnosis.findings[0].steps == (1200,)


def test_the_training_loss_is_taken_where_there_are_several():
    run = {"train/loss": np.ones(100), "eval/loss": np.full(100, np.nan)}
    assert clipx.diagnose(run).codes == ()
    assert clipx.diagnose(run, loss="eval/loss").codes == ("nonfinite",)


def test_leaves_of_other_loggers_are_found():
    run = healthy(np.random.default_rng(0))
    for i in range(5):
        run[f"grad/norm/layer{i}"] = np.full(1000, 100.0 if i == 3 else 1.0)
    found = clipx.diagnose(run).findings[0]
    assert (found.code, found.evidence["leaf"]) == ("dominant-leaf", "layer3")


def test_sparse_columns_are_judged_by_the_steps_they_have():
    history = clipx.History()
    for step in range(2000):
        row = {"loss": 1.0}
        if step % 10 == 0:
            row["clip/norm"] = 30.0 if step == 1500 else 1.0
        history.append(step, row)
    diagnosis = clipx.diagnose(history)
    assert diagnosis.codes == ("spikes",)
    assert diagnosis.findings[0].steps == (1500,)


def test_none_is_missing_and_nan_is_not_finite():
    loss = [1.0, None] * 50
    assert clipx.diagnose({"loss": loss}).codes == ()
    loss[10] = float("nan")
    assert clipx.diagnose({"loss": loss}).codes == ("nonfinite",)


def test_a_run_of_zeros_or_of_few_steps_is_judged():
    for run in ({"norm": np.zeros(300)}, {"norm": [1.0]}, {"loss": [1.0, 2.0]}):
        assert clipx.diagnose(run).codes == ()


@pytest.mark.one_in(10)
@pytest.mark.parametrize(
    ("run", "options", "words"),
    [
        ({"a": [1.0]}, {}, "gradient norm or with the loss; the columns are: 'step',"),
        ({"norm": [1.0]}, {"loss": "cost"}, "no column 'cost'"),
        ({"norm": [1.0], "loss": [1.0, 2.0]}, {}, "columns of one length"),
        ({"norm": []}, {}, "above 0"),
        ({}, {}, "above 0"),
        ({"norm": ["high"]}, {}, "Expected numbers in 'norm'"),
        (
            {"norm": [[1.0, 2.0]]},
            {},
            r"one number a step in 'norm', got shape \(1, 2\)",
        ),
        ({"norm": [1.0]}, {"target": 90}, "0 <= target <= 1, got target=90"),
        ({"norm": [1.0], "step": [0.5]}, {}, "whole numbers in 'step'"),
        ("nothing.jsonl", {}, "no such file"),
    ],
)
def test_errors_say_what_to_do(run, options, words):
    with pytest.raises(ValueError, match=words):
        clipx.diagnose(run, **options)


def test_something_else_is_a_type_error():
    with pytest.raises(TypeError, match=r"int|Actual value: 3"):
        clipx.diagnose(3)


def test_a_restart_with_resume_is_read_from_the_file_as_it_is(tmp_path):
    path = tmp_path / "run.jsonl"
    steps = [*range(60), *range(40, 100)]
    path.write_text("".join(f'{{"step": {i}, "norm": 1.0}}\n' for i in steps))
    (found,) = clipx.diagnose(path).findings
    assert (found.code, found.steps) == ("restarts", (40,))
    assert found.evidence["before"] == [59]


def resumed(path):
    """A run that reached step 59, and went on from 40; then 79, and from 70."""
    for start, end in ((0, 60), (40, 80), (70, 100)):
        with clipx.History(path, resume=True) as history:
            for step in range(start, end):
                history.append(step, {"norm": 1.0})


def test_restarts_of_a_history_are_known_from_what_it_dropped(tmp_path):
    path = tmp_path / "run.jsonl"
    resumed(path)
    for run in (path, tmp_path, clipx.History(path, resume=True)):
        (found,) = clipx.diagnose(run).findings
        assert (found.code, found.severity) == ("restarts", "info")
        assert (found.steps, found.evidence["before"]) == ((40, 70), [59, 79])


def test_a_broken_file_of_dropped_records_is_not_read(tmp_path):
    path = tmp_path / "run.jsonl"
    resumed(path)
    path.with_name("run.jsonl.dropped").write_bytes(b"\0" * 100)
    assert clipx.diagnose(path).codes == ()
