"""optax's own tests of the functions that we share pass against ours."""

import os
import pathlib
import re
import subprocess
import sys

import optax
import pytest

PLUGIN = pathlib.Path(__file__).parents[1] / "optax_suite"
SUITES = {
    "transforms/_clipping_test.py": (7, ["clip", "adaptive_grad_clip"]),
    "_src/float64_test.py": (20, ["clip", "clip_by_global_norm"]),
    "schedules/_inject_test.py": (1, ["clip_by_global_norm"]),
    "transforms/_monitoring_test.py": (1, ["clip_by_global_norm"]),
    "contrib/_privacy_test.py": (4, ["per_example_global_norm_clip"]),
}


# Each takes a process of its own; the first is the one of clipping.
@pytest.mark.parametrize(
    "suite",
    [
        pytest.param(suite, marks=[pytest.mark.slow] if i else [])
        for i, suite in enumerate(SUITES)
    ],
)
def test_optax_suite(suite, tmp_path):
    least, used = SUITES[suite]
    path = pathlib.Path(optax.__file__).parent / suite
    if not path.exists():
        pytest.fail(f"optax {optax.__version__} ships no {suite}")
    command = [
        *(sys.executable, "-m", "pytest", str(path), "-q", "-p", "optax_with_ours"),
        *("-c", os.devnull, "--rootdir", str(tmp_path), "-p", "no:cacheprovider"),
    ]
    found = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(PLUGIN), "PYTEST_ADDOPTS": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    print(found.stdout[-3000:])
    assert found.returncode == 0, found.stdout[-6000:]
    passed = int(re.search(r"(\d+) passed", found.stdout).group(1))
    assert passed >= least
    for name in used:
        assert int(re.search(rf"'{name}': (\d+)", found.stdout).group(1)) > 0, name
