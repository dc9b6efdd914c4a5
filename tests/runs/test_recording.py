"""`History.append`: what it refuses and when, and that file and memory agree."""

import errno
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_clipx as clipx
from optax_clipx import plotting


def steps_and_norms(history):
    return history.steps.tolist(), history["n"].tolist()


@pytest.mark.parametrize("with_file", [False, True])
def test_a_refused_record_leaves_the_others_as_they_are(with_file, tmp_path):
    path = tmp_path / "run.jsonl" if with_file else None
    history = clipx.History(path)
    refused = 0
    for i in range(5):
        try:
            history.append(i, {"n": "diverged" if i == 1 else 10.0 * i})
        except ValueError:
            refused += 1
    assert refused == 1
    assert steps_and_norms(history) == ([0, 2, 3, 4], [0, 20, 30, 40])
    saved = history.save(tmp_path / "saved.jsonl")
    for file in [saved, *([path] if with_file else [])]:
        assert steps_and_norms(clipx.History.load(file)) == steps_and_norms(history)


def test_keyword_arguments_are_columns():
    history = clipx.History()
    history.append(0, {"n": 1.0}, loss=2.0, rate=jnp.float32(0.5))
    history.append(1, loss=3.0)
    history.append(2, {"n": 4.0})
    assert history["n"][[0, 2]].tolist() == [1.0, 4.0]
    assert history["loss"][:2].tolist() == [2.0, 3.0]
    assert history.recorded("rate").tolist() == [True, False, False]


def test_keyword_arguments_stand_beside_clip_metrics_and_in_blocks():
    history = clipx.History()
    state = clipx.clip(1.0).init(jnp.zeros(2))
    history.append(0, state.metrics, loss=2.0)
    history.append(range(1, 3), {"n": np.ones(2)}, loss=np.array([3.0, 4.0]))
    assert history["loss"].tolist() == [2.0, 3.0, 4.0]
    assert history["clip/steps"][0] == 0


@pytest.mark.parametrize("value", [2.0, None])
def test_a_column_that_is_given_twice_is_named(value):
    history = clipx.History()
    with pytest.raises(ValueError, match="column once, got 'loss' in metrics and as"):
        history.append(0, {"loss": value}, loss=3.0)
    assert len(history) == 0


def test_the_step_is_no_column():
    with pytest.raises(TypeError, match="multiple values for argument 'step'"):
        clipx.History().append(0, {"n": 1.0}, step=1)


def test_a_step_alone_is_an_error():
    with pytest.raises(TypeError, match=r"beside the step, got none\. Write history"):
        clipx.History().append(0)


BAD = {
    "text": "x",
    "digits": "10",
    "list": ["a", "b"],
    "dict": {"b": 1},
    "complex": 1j,
    "date": np.datetime64("2026-01-01"),
    "jax complex": jnp.complex64(1j),
    "key": jax.random.key(0),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_number_fails_at_once(name):
    history = clipx.History()
    with pytest.raises(ValueError, match=r"Expected numbers, got .* for 'a'"):
        history.append(0, {"a": BAD[name]})
    assert len(history) == 0


def test_the_value_is_named():
    with pytest.raises(ValueError, match="got 'x' for 'a'"):
        clipx.History().append(0, {"a": "x"})


@pytest.mark.one_in(2)
@pytest.mark.parametrize("step", [1.5, [2, 1], "3", None])
def test_bad_steps_fail_at_once(step):
    history = clipx.History()
    with pytest.raises(ValueError, match=r"whole steps that rise|Expected numbers"):
        history.append(step, {"a": np.ones(np.shape(step))})
    assert len(history) == 0


def test_a_buffer_may_be_used_again():
    history, buffer = clipx.History(), np.zeros(())
    for step in range(3):
        buffer[...] = step
        history.append(step, {"n": buffer})
    assert history["n"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("shape", "step", "code"),
    [
        ((8,), 0, r"history\.append\(step, \{n: x\[i\] for n"),
        ((3, 8), range(3), r"history\.append\(steps, \{n: x\[:, i\] for n"),
    ],
)
def test_seeds_under_vmap_are_runs_of_their_own(shape, step, code):
    with pytest.raises(ValueError, match=rf"8 seeds \(jax\.vmap\).*{code}"):
        clipx.History().append(step, {"n": jnp.ones(shape)})


def test_what_the_error_says_of_seeds_works():
    histories, metrics = [clipx.History(), clipx.History()], {"loss": jnp.arange(2.0)}
    for step in range(3):
        for i, history in enumerate(histories):
            history.append(step, {n: x[i] for n, x in metrics.items()})
    assert histories[1]["loss"].tolist() == [1, 1, 1]
    assert plotting.compare({"mine": histories}).axes[0].get_lines()


def test_pictures_and_suggestions_say_what_to_do_with_seeds():
    run = {"norm": np.ones((100, 8))}
    with pytest.raises(ValueError, match=r"got shape \(100, 8\).*x\[:, 0\]"):
        plotting.norms(run)
    with pytest.raises(ValueError, match=r"shape \(100, 8\).*norms\[:, 0\]"):
        clipx.suggest_threshold(run["norm"])


@pytest.fixture
def small_disk(monkeypatch):
    """A disk that is full while the returned list has something in it."""
    full = []

    def write(self, data):
        if not full:
            return original(self, data)
        os.write(self.fileno(), bytes(data)[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    class File:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return write(self.file, data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    def original(file, data):
        return file.write(data)

    def fill(history):
        history._writer.file = File(history._writer.file)
        return full

    return fill


def test_a_full_disk_leaves_file_and_memory_the_same(small_disk, tmp_path):
    path = tmp_path / "run.jsonl"
    with clipx.History(path) as history:
        full = small_disk(history)
        history.append(0, {"n": 0.0})
        history.append(1, {"n": 10.0})
        full.append(True)
        with pytest.raises(OSError, match="No space left"):
            history.append(2, {"n": 20.0})
        assert path.read_text() == '{"step": 0, "n": 0.0}\n'
        assert len(history._writer.table) == 1
        full.clear()
        history.append(3, {"n": 30.0})
    assert steps_and_norms(history) == ([0, 1, 3], [0, 10, 30])
    assert steps_and_norms(clipx.History.load(path)) == steps_and_norms(history)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_child_writes_nothing(tmp_path):
    path = tmp_path / "run.jsonl"
    history = clipx.History(path)
    history.append(0, {"n": 0.0})
    child = os.fork()
    if not child:
        try:
            refused = 0
            try:
                history.append(1, {"n": 1.0})
            except ValueError:
                refused = 1
            history.close()
            os._exit(0 if refused and history["n"].tolist() == [0.0] else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert path.read_text() == ""
    history.close()
    assert path.read_text() == '{"step": 0, "n": 0.0}\n'
