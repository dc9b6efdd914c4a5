"""What `print(history)` shows."""

import optax_clipx as clipx


def test_the_norms_the_clip_rate_and_the_loss(tmp_path):
    history = clipx.History(tmp_path / "run.jsonl")
    norms = {"clip/norm": [1.0, 2.0, 5.0, 1.5], "clip/threshold": [2.5] * 4}
    history.append(range(4), norms | {"loss": [4.0, 3.0, 2.0, 0.5]})
    assert str(history).splitlines() == [
        f"<History of 4 steps in {tmp_path / 'run.jsonl'}: clip/norm, clip/threshold,"
        " loss>",
        "clip/norm: median 1.75, largest 5",
        "clipped: 25.0% of the steps",
        "loss: first recorded 4, last recorded 0.5",
    ]


def test_an_empty_one():
    assert str(clipx.History()) == "<History of 0 steps: empty>"


def test_columns_that_it_does_not_know():
    history = clipx.History()
    history.append(0, dict.fromkeys("abcdefg", 1.0))
    assert str(history) == "<History of 1 step: a, b, c, d, e, ...>"


def test_norms_that_are_all_infinite():
    history = clipx.History()
    history.append(0, {"clip/norm": float("inf")})
    assert str(history) == "<History of 1 step: clip/norm>"


def test_a_debugger_that_shows_it_writes_nothing(tmp_path):
    path = tmp_path / "run.jsonl"
    history = clipx.History(path)
    history.append(0, {"loss": 1.0})
    assert repr(history) == f"<History in {path}: loss>"
    assert not path.read_bytes()


def test_steps_without_a_norm_count_in_no_rate():
    run = {"clip/norm": 1.0, "clip/threshold": 1.0, "clip/clipped_norm": 0.385}
    history = clipx.History()
    for step in range(40):
        history.append(step, {"loss": 1.0})
        if step % 2:
            history.append(step, run | {"clip/scale": 0.385})
    assert "scaled down by auto_clip: 100.0% of the steps" in str(history)
