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


@pytest.mark.slow
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
    ours = run(path, tmp_path, "-p", "optax_with_ours")
    if failed := failures(ours):
        # A bound of the last bit can fail with optax's functions, too: it depends on
        # how the processor rounds. What fails with ours alone is a fault of ours.
        theirs = failures(run(path, tmp_path))
        print(f"failed with optax's own functions: {sorted(theirs)}")
        assert failed <= theirs, ours[-6000:]
    passed = int(re.search(r"(\d+) passed", ours).group(1))
    assert passed + len(failed) >= least
    for name in used:
        assert int(re.search(rf"'{name}': (\d+)", ours).group(1)) > 0, name


def run(path, folder, *plugin):
    """What pytest prints for these tests of optax's, in a process of its own."""
    command = [
        *(sys.executable, "-m", "pytest", str(path), "-q", "-rfE", *plugin),
        *("-c", os.devnull, "--rootdir", str(folder), "-p", "no:cacheprovider"),
    ]
    found = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(PLUGIN), "PYTEST_ADDOPTS": ""},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    print(found.stdout[-3000:])
    assert found.returncode in (0, 1), found.stdout[-6000:] + found.stderr[-2000:]
    return found.stdout


def failures(printed):
    """The names of the tests that failed."""
    return set(re.findall(r"^(?:FAILED|ERROR) (\S+)", printed, re.MULTILINE))
