"""Runs with a block of poisoned batches: rewound, killed, and resumed."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import rewind_worker as worker

import optax_clipx as clipx

WORKER = Path(worker.__file__)


@pytest.fixture(scope="module")
def rewound(tmp_path_factory):
    """A run that was not interrupted, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return *worker.train(folder), folder


@pytest.fixture(scope="module")
def clean_loss():
    return worker.final_loss(worker.train_without(worker.clean))


def bits(state):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


def test_without_rewinds_the_run_does_not_recover(clean_loss):
    assert worker.final_loss(worker.train_without()) > 5 * clean_loss


def test_with_rewinds_the_run_ends_as_a_clean_one(rewound, clean_loss):
    state, rewind, _ = rewound
    assert worker.final_loss(state) < 1.02 * clean_loss
    (decision,) = rewind.decisions
    assert decision[:6] == (1, 155, 150, 120, 120, 176)


@pytest.mark.slow  # test_rewind_decisions has one that is quick
def test_a_clean_run_is_left_alone(tmp_path, clean_loss):
    state, rewind = worker.train(tmp_path, worker.clean)
    assert not rewind.decisions
    assert worker.final_loss(state) == clean_loss


def test_the_checkpoints_of_the_abandoned_run_are_replaced(rewound):
    """That of step 140 is of the run with the later batches."""
    _, _, folder = rewound
    with worker.manager_of(folder) as manager:
        steps = list(manager.all_steps())
        args = ocp.args.StandardRestore(worker.fresh())
        kept = manager.restore(steps[0], args=args)
    assert steps == [240, 260, 280, 300]
    assert int(clipx.metrics(kept["opt_state"])["clip/steps"]) == 240


class Killed(BaseException):
    pass


def killer(calls):
    left = [calls]

    def tell(what):
        left[0] -= what == "rewind" or isinstance(what, int)
        if left[0] < 0:
            raise Killed

    return tell


@pytest.mark.slow
@pytest.mark.parametrize("calls", [153, 155, 156, 157, 190])
def test_interrupted_and_resumed(rewound, calls, tmp_path):
    """While it goes wrong, between the decision and the restore, and after."""
    with pytest.raises(Killed):
        worker.train(tmp_path, tell=killer(calls))
    state, rewind = worker.train(tmp_path)
    whole, once, folder = rewound
    assert rewind.decisions == once.decisions
    assert bits(state) == bits(whole)
    for name in ("run.0.jsonl", "rewinds.jsonl"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.slow
def test_a_checkpoint_that_was_half_deleted_is_no_obstacle(tmp_path, rewound):
    with pytest.raises(Killed):
        worker.train(tmp_path, tell=killer(156))  # decided, not yet restored
    shutil.rmtree(tmp_path / "states" / "140" / "default")
    state, _ = worker.train(tmp_path)
    assert bits(state) == bits(rewound[0])


@pytest.mark.slow
def test_two_blocks_take_two_rewinds(tmp_path, clean_loss):
    poisoned = {*range(110, 125), *range(250, 262)}
    state, rewind = worker.train(
        tmp_path, lambda number: worker.batch(number, poisoned)
    )
    assert [x.onset for x in rewind.decisions] == [110, 194]
    assert worker.final_loss(state) < 1.02 * clean_loss


def start(folder, *arguments):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache"),  # for time
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, WORKER, folder, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )


def run(folder, kill_after=None, last=None):
    """Runs the worker; killed a moment after it told of some steps, or of a rewind."""
    told = []
    with start(folder) as process:
        for line in process.stdout:
            told.append(line.strip())
            if len(told) == kill_after or told[-1] == last:
                time.sleep(random.Random(len(told)).uniform(0, 0.02))
                process.send_signal(signal.SIGKILL)
    killed = kill_after is not None or last is not None
    assert process.returncode == (-signal.SIGKILL if killed else 0)
    return told


@pytest.mark.slow
def test_killed_at_ten_moments(tmp_path):
    """The same decisions and bits as a run that was not killed."""
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    folder.mkdir()
    whole.mkdir()
    rng = random.Random(0)
    told = [run(folder, kill_after=rng.randint(20, 60)) for _ in range(5)]
    told += [run(folder, last="rewind")]
    told += [run(folder, kill_after=rng.randint(1, 30)) for _ in range(4)]
    told += [run(folder)]
    run(whole)
    assert sum(map(len, told)) > 335 + 10
    for name in ("end.0.json", "run.0.jsonl", "rewinds.jsonl"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert len(json.loads((whole / "end.0.json").read_text())["decisions"]) == 1


def run_two(folder, last=None):
    """Two processes of one run, both killed a moment after one told of a rewind."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    processes = [start(folder, coordinator, 2, process) for process in range(2)]
    for line in processes[0].stdout:
        if line.strip() == last:
            for process in processes:
                process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == (0 if last is None else -signal.SIGKILL)


@pytest.mark.slow
def test_two_processes_go_back_together(tmp_path):
    """Each has half of every batch; they are killed when they have decided."""
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    folder.mkdir()
    whole.mkdir()
    run_two(folder, last="rewind")
    run_two(folder)
    run_two(whole)
    one, other = (json.loads((folder / f"end.{i}.json").read_text()) for i in range(2))
    assert one == other
    assert one == json.loads((whole / "end.0.json").read_text())
    assert [x["to"] for x in one["decisions"]] == [120]
    assert len((folder / "rewinds.jsonl").read_text().splitlines()) == 2
    records = [(folder / f"run.{i}.jsonl").read_bytes() for i in range(2)]
    assert records[0] == records[1] == (whole / "run.0.jsonl").read_bytes()
