"""`nonfinite="raise"`: an error that can be caught, wherever the updates lie.

One process meets bad updates in every context, one after the other, so that a context
that kills it fails all that come after.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from versions import MESH_OF_TRACED, since

WORKER = Path(__file__).parents[1] / "raising_worker.py"
EAGER = ["eager", "eager_sharded"]
TRACED = [
    "jit",
    "auto",
    pytest.param("explicit", marks=MESH_OF_TRACED),
    "replicated",
    "shard_map",
    "shard_map_blind",
    "pmap",
    "scan",
    "scan_in_shard_map",
    "scan_blind",
    pytest.param(
        "two_left",  # axes of the mesh over which shard_map does not map
        marks=since((0, 10), "has an XLA that cannot nest this shard_map"),
    ),
]
METHODS = [
    "norm",
    pytest.param("value", marks=pytest.mark.slow),
    pytest.param("functional", marks=pytest.mark.slow),
]
of_methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What one process met, by method and context: of bad updates, then of clean."""

    @functools.cache
    def of(method):
        output = tmp_path_factory.mktemp("raising") / f"{method}.json"
        command = [sys.executable, str(WORKER), str(output), method]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(output.read_text())

    return of


@of_methods
@pytest.mark.parametrize("context", EAGER)
def test_outside_of_a_trace_it_is_a_floating_point_error(outcomes, method, context):
    (kind, text), _ = outcomes(method)[context]
    assert kind == "FloatingPointError"
    assert text.startswith("Non-finite updates at: w. ")


@of_methods
@pytest.mark.parametrize("context", TRACED)
def test_in_a_trace_it_is_caught_where_a_result_is_read(outcomes, method, context):
    (kind, text), _ = outcomes(method)[context]
    assert kind == jax.errors.JaxRuntimeError.__name__
    assert "FloatingPointError: Non-finite updates at: w. " in text


@of_methods
@pytest.mark.parametrize("context", EAGER + TRACED)
def test_a_clean_step_runs_afterwards(outcomes, method, context):
    _, largest = outcomes(method)[context]
    assert largest > 0
