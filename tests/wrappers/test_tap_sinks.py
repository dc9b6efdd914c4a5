"""Sinks of a tap: ready ones, and those that raise, sleep or are too slow."""

import os
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_clipx as clipx
from optax_clipx._wrappers import reports
from optax_clipx._wrappers.reports import Reports

GRADS = jnp.array([3.0, 4.0])  # of norm 5


def train_and_flush(sink, steps):
    train(sink, steps)
    return clipx.flush_taps()


def train(sink, steps, every=1, grads=GRADS):
    tx = clipx.tap(clipx.clip_by_global_norm(1.0), sink, every=every)
    update, state = jax.jit(tx.update), tx.init(grads)
    for _ in range(steps):
        _, state = update(grads, state)


@pytest.mark.parametrize("sink_of", [lambda h: h, lambda h: h.append])
def test_a_history(sink_of):
    history = clipx.History()
    train(sink_of(history), 3)
    clipx.flush_taps()
    assert history.steps.tolist() == [0, 1, 2]
    assert history["clip/norm"].tolist() == [5.0, 5.0, 5.0]


def test_a_printed_line(capsys):
    train(print, 2)
    clipx.flush_taps()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:21] for line in lines] == [
        "step 0: clip/norm=5 c",
        "step 1: clip/norm=5 c",
    ]


def test_the_writer_of_tensorboard(tmp_path):
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        train(writer, 3)
        clipx.flush_taps()
    history = clipx.History.load(tmp_path)
    assert history.steps.tolist() == [0, 1, 2]
    assert history["clip/norm"].tolist() == [5.0, 5.0, 5.0]


def test_seeds_are_curves_of_their_own_in_tensorboard():
    class Writer:
        def __init__(self):
            self.written = []

        def add_scalar(self, name, value, step):
            self.written.append((name, float(value), step))

    writer = Writer()
    tx = clipx.tap(clipx.clip_by_global_norm(1.0), writer)
    grads = jnp.stack([GRADS, 2 * GRADS])
    jax.vmap(tx.update)(grads, jax.vmap(tx.init)(grads))
    clipx.flush_taps()
    assert ("clip/norm/0", 5.0, 0) in writer.written
    assert ("clip/norm/1", 10.0, 0) in writer.written


def test_a_sink_that_raises_says_so_once_and_is_counted():
    seen = []

    def sink(step, metrics):
        if step < 2:
            raise OSError("the disk is full")
        seen.append(step)

    before = clipx.flush_taps()
    with pytest.warns(RuntimeWarning, match="disk is full") as warned:
        after = train_and_flush(sink, 4)
    assert seen == [2, 3]
    assert len(warned) == 1
    assert after.failed - before.failed == 2
    assert after.delivered - before.delivered == 2


def test_a_warning_that_is_an_error_stops_nothing(capfd):
    def sink(step, metrics):
        raise OSError("the disk is full")

    train(sink, 2)  # warnings are errors in these tests
    clipx.flush_taps()
    assert "OSError('the disk is full') at step 0" in capfd.readouterr().err


def test_training_does_not_wait_for_a_sink_that_waits():
    seen, after = [], threading.Event()

    def sink(step, metrics):
        after.wait(60)
        seen.append(step)

    train(sink, 3)
    assert seen == []
    after.set()
    clipx.flush_taps()
    assert seen == [0, 1, 2]


def released_and_flushed(event):
    event.set()
    return clipx.flush_taps()


def test_what_a_slow_sink_misses_is_said_and_counted(monkeypatch):
    monkeypatch.setattr(reports, "ROOM", 4)
    seen, go_on = [], threading.Event()

    def sink(step, metrics):
        go_on.wait()
        seen.append(step)

    before = clipx.flush_taps()
    line = Reports(sink, "'slow'", 1)
    for step in range(10):
        line.put(step, dict)
    with pytest.warns(RuntimeWarning, match="'slow' of optax_clipx.tap is slower"):
        after = released_and_flushed(go_on)
    assert seen[:4] == [0, 1, 2, 3]
    assert after.dropped - before.dropped == 10 - len(seen)
    assert after.dropped > before.dropped


@pytest.mark.parametrize(
    ("every", "come", "handed"),
    [
        (1, [1, 0, 3, 2], [0, 1, 2, 3]),
        (10, [20, 10, 0, 30], [0, 10, 20, 30]),
        (1, [7, 8, 9], [7, 8, 9]),  # resumed
        (1, [0, 1, 2, 0, 1], [0, 1, 2, 0, 1]),  # begun again
        (1, [0, 1, 5, 6, 2], [0, 1, 2, 5, 6]),
        (1, [0, 5, 5, 6], [0, 5, 5, 6]),  # gone ahead, and restored
        (1, [0, *range(2, 50)], [0, *range(2, 50)]),  # one never comes
    ],
)
def test_the_order_of_the_steps(every, come, handed):
    seen = []
    line = Reports(lambda step, metrics: seen.append(step), "sink", every)
    for step in come:
        line.put(step, dict)
    clipx.flush_taps()
    assert seen == handed


def test_a_report_waits_for_an_earlier_one_only_so_long():
    seen = []
    line = Reports(lambda step, metrics: seen.append(step), "sink", 1)
    line.put(5, dict)
    time.sleep(0.1)
    assert seen == []
    deadline = time.monotonic() + 20
    while not seen and time.monotonic() < deadline:
        time.sleep(0.05)
    assert seen == [5]


def test_a_sink_must_not_flush():
    with pytest.warns(RuntimeWarning, match="which would wait for itself"):
        train_and_flush(lambda *_: clipx.flush_taps(), 1)


AT_EXIT = """
import os, time
import jax, jax.numpy as jnp
import optax_clipx as clipx

def sink(step, metrics):
    time.sleep(0.02)
    print(step, flush=True)

tx = clipx.tap(clipx.clip_by_global_norm(1.0), sink)
grads = jnp.ones(2)
update, state = jax.jit(tx.update), tx.init(grads)
for _ in range(20):
    _, state = update(grads, state)
"""
FORK = """
from optax_clipx._wrappers import reports
child = os.fork()
if not child:  # JAX cannot end in a process that was forked, so this ends at once
    delivered = clipx.flush_taps().delivered
    reports._deliver_at_exit()
    os._exit(delivered)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        "",
        pytest.param(
            FORK,
            marks=pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork"),
        ),
    ],
    ids=["alone", "forked"],
)
def test_what_is_queued_at_the_end_is_delivered_once(more):
    command = [sys.executable, "-W", "ignore", "-c", AT_EXIT + more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(step) for step in range(20)]


def test_what_is_queued_is_no_memory_of_jax(monkeypatch):
    # Where a thread frees that after Python has ended, the process aborts.
    queued = []
    monkeypatch.setattr(Reports, "put", lambda self, step, read: queued.append(read))
    train_and_flush(print, 2)
    arrays = [x for read in queued for x in read.args if isinstance(x, np.ndarray)]
    assert [array.flags.owndata for array in arrays] == [True, True]


@pytest.mark.slow  # test_history has a program that ends without a tap
def test_a_history_in_a_file_has_all_at_the_end(tmp_path):
    path = tmp_path / "run.jsonl"
    code = AT_EXIT.replace(
        "clip_by_global_norm(1.0), sink",
        f"clip_by_global_norm(1.0), clipx.History({str(path)!r})",
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},  # a TPU's library may warn
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert clipx.History.load(path).steps.tolist() == list(range(20))


def test_names_of_sinks_in_warnings():
    class Logger:
        def __call__(self, step, metrics):
            raise ValueError("full")

    with pytest.warns(RuntimeWarning, match="The sink 'Logger' of optax_clipx.tap"):
        train_and_flush(Logger(), 1)
