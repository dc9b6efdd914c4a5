"""Several processes give the answer of one, and decide alike."""

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parents[1]
EXAMPLE = HERE.parent / "examples" / "fsdp_transformer.py"


def start(lines, **environment):
    """Runs processes side by side; what they print comes with a failure."""
    running = [
        subprocess.Popen(
            [sys.executable, *map(str, line)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", **environment, **own},
        )
        for line, own in lines
    ]
    printed = [process.communicate(timeout=300)[0] for process in running]
    assert not any(process.returncode for process in running), "\n".join(printed)
    return printed


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@functools.cache
def seen_by(processes):
    """What each process saw."""
    folder = Path(tempfile.mkdtemp())
    coordinator = f"localhost:{free_port()}"
    files = [folder / f"{processes}-{i}.npz" for i in range(processes)]
    start(
        [
            ([HERE / "process_worker.py", file, coordinator, processes, i], {})
            for i, file in enumerate(files)
        ]
    )
    return [dict(np.load(file)) for file in files]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.whole)])
def test_several_processes(processes):
    (alone,) = seen_by(1)
    several = seen_by(processes)
    assert len(alone) > 400
    for name, want in alone.items():
        for one in several[1:]:
            np.testing.assert_array_equal(one[name], several[0][name], err_msg=name)
        np.testing.assert_allclose(
            several[0][name], want, rtol=1e-6, atol=0, err_msg=name
        )
    # One process holds the spike or the NaN; every process acts on it.
    for process in several:
        assert np.all(np.isnan(process["nan explicit tree 0"]))
        assert not np.any(process["nan explicit zero 0"])
        assert not np.any(process["spike explicit drop 0"])
        assert np.any(process["usual explicit drop 0"])


@pytest.mark.slow
def test_the_example_trains_alike(tmp_path):
    """One device, eight, and two processes: the same loss to 1e-4 after 50 steps."""
    output = tmp_path / "loss.json"
    start([([EXAMPLE, "--compare", "--steps", 50, "--output", output], {})])
    losses = json.loads(output.read_text())
    assert set(losses) == {"1 device", "8 devices", "2 processes"}
    for loss in losses.values():
        assert len(loss) == 50
        assert loss[-1] < loss[0] - 2
        np.testing.assert_allclose(loss, losses["1 device"], atol=1e-4)


@pytest.mark.slow
def test_the_line_for_a_cluster():
    """`--distributed` alone finds its peers from what Slurm sets."""
    ports = iter([free_port()])
    slurm = {
        "SLURM_JOB_ID": str(next(ports)),  # from which the port is made
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
    }
    line = [EXAMPLE, "--distributed", "--devices", 8, "--steps", 3]
    printed = start(
        [(line, {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}) for i in range(2)],
        **slurm,
    )
    assert "16 cpu devices" in printed[0], printed[0]
