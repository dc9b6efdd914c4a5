"""The benchmark for GPUs runs from start to end, tiny and on the CPU."""

import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_a_dry_run_writes_every_table(tmp_path):
    line = [sys.executable, SCRIPT, "--dry-run", "--only", "skip_spikes"]
    subprocess.run([*line, "--output", tmp_path / "gpu"], check=True)
    tables = json.loads((tmp_path / "gpu.json").read_text())["tables"]
    assert [table["title"] for table in tables] == [
        "4 leaves, Adam",
        "4 leaves, Adam, no command buffers",
        "16 leaves, Adam",
        "16 leaves, Adam, no command buffers",
        "0.1 MB in 12 leaves, Adam",
        "0.1 MB in 12 leaves, clipping alone",
        "Training step in Flax NNX, Adam",
        "GPT-2 small, Adam",
        "20 leaves of 8 x 8, Adam",
        "20 leaves of 8 x 8, Adam, no command buffers",
    ]
    for table in tables:
        assert table.get("note") is None
        assert {"none", "skip_spikes"} <= table["rows"].keys()
