"""The long run at a small size, and that it can fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"
sys.path.insert(0, str(SCRIPT.parent))
import soak  # noqa: E402


@pytest.mark.slow
def test_a_short_run_from_the_command_line_and_its_table(tmp_path):
    names = ["reset_moments", "normalized_momentum", soak.STEPWISE]
    output = ["--steps", "2000", "--output", str(tmp_path / "out")]
    subprocess.run(
        [sys.executable, str(SCRIPT), *output, "--only", *names],
        check=True,
        capture_output=True,
    )
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert sorted(runs) == sorted(names)
    for row in runs.values():
        assert row["steps"] == 2000
        assert row["traces"] == 1
        assert all(number > 0 for number in row["faults"].values())
        assert not soak.failed(row)
    table = (tmp_path / "out.md").read_text()
    assert table.startswith("6,000 steps")
    assert "3 of 3 runs without a failure." in table


@pytest.mark.slow
def test_a_method_that_keeps_a_nan_is_found(monkeypatch):
    method = soak.METHODS["EVERY"]["normalized_momentum"]
    unguarded = method._replace(forgets=True)
    monkeypatch.setitem(soak.METHODS["EVERY"], "normalized_momentum", unguarded)
    row = soak.soak("normalized_momentum", 2000)
    assert row["failures"] > 100
    assert row["wrong_counts"]
    assert soak.failed(row)
    assert "0 of 1 runs" in soak.markdown({"momentum": row}, {})
