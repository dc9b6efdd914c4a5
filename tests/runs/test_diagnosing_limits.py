"""Speed, memory, and runs that hold anything."""

import json
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import optax_clipx as clipx
from optax_clipx.runs.advice import ADVICE


def long_run(count):
    rng = np.random.default_rng(0)
    run = {
        "loss": 2 * np.exp(-np.arange(count) / count) + 0.03 * rng.normal(size=count),
        "norm": np.exp(0.3 * rng.normal(size=count)),
        "threshold": np.full(count, 1.4),
    }
    run["norm"][rng.integers(0, count, 50)] *= 40
    return run


def leaves(count, names):
    rng = np.random.default_rng(0)
    noise = np.exp(0.3 * rng.normal(size=count))
    run = {f"track_norms/layers/{i}/w": np.roll(noise, i) for i in range(names)}
    return run | {"clip/norm": np.full(count, names**0.5)}


def test_many_steps_take_little_time():
    run = long_run(300_000)
    start = time.thread_time()
    assert clipx.diagnose(run).codes == ("spikes",)
    assert time.thread_time() - start < 3.0  # about 0.2 s


def test_many_leaves_take_little_time_and_memory():
    run = leaves(30_000, 100)
    start = time.thread_time()
    assert clipx.diagnose(run).codes == ()
    assert time.thread_time() - start < 3.0  # about 0.3 s
    tracemalloc.start()
    clipx.diagnose(run)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 12e6  # the columns themselves are 24 MB


def walk(rng, count):
    return np.exp(np.clip(np.cumsum(0.1 * rng.normal(size=count)), -300, 300))


def two_levels(rng, count):
    return np.where(rng.random(count) < 0.3, 1e3, 1.0)


def stairs(rng, count):
    return np.exp(rng.normal(size=count // 200).repeat(200))


@pytest.mark.parametrize("make", [walk, two_levels, stairs])
def test_runs_full_of_faults_have_short_answers(make):
    values = make(np.random.default_rng(0), 100_000)
    run = {"norm": values, "loss": values, "update_norm": values}
    start = time.thread_time()
    diagnosis = clipx.diagnose(run, threshold=1.0)
    page, text = diagnosis._repr_html_(), str(diagnosis)
    assert time.thread_time() - start < 5.0  # about 0.3 s
    assert len(page) < 1_000_000
    assert len(text) < 10_000


def anything(rng, count):
    """Numbers of every kind, ordinary and not."""
    choices = (
        np.zeros(count),
        np.full(count, 1e308),
        np.full(count, np.nan),
        np.arange(count) * 1e300,
        -np.ones(count),
        np.full(count, 5e-324),
        np.exp(100 * rng.normal(size=count)),
        np.where(rng.random(count) < 0.5, 1.0, 1e6),
        rng.choice([0, 1, np.nan, np.inf, -np.inf, 1e308, -1e308], count),
        np.where(rng.random(count) < 0.9, None, 1.0),
    )
    return choices[rng.integers(len(choices))]


NAMES = (
    *("loss", "clip/norm", "clip/threshold", "clip/clipped", "track/update_norm"),
    *("learning_rate", "skip/skipped", "skip/norm", "clip/target"),
    *(f"track_norms/{{layer}}{i}/{{0}}" for i in range(6)),
)


@pytest.mark.parametrize("seed", range(3))
def test_any_numbers_are_judged(seed):
    rng = np.random.default_rng(seed)
    for _ in range(60):
        count = int(rng.choice([1, 2, 5, 39, 40, 41, 50, 100, 101, 500]))
        run = {n: anything(rng, count) for n in NAMES if rng.random() < 0.7}
        run["norm"] = anything(rng, count)
        diagnosis = clipx.diagnose(run | {"loss": np.zeros(count)}, norm="norm")
        assert set(diagnosis.codes) <= set(ADVICE)
        assert json.dumps(diagnosis._asdict(), allow_nan=False)
        assert str(diagnosis)
        assert diagnosis._repr_html_()


def test_a_name_full_of_numbers_takes_no_time():
    run = leaves(100, 5) | {
        f"track_norms/{'1a' * 50_000}{i}": [1.0] * 100 for i in "ab"
    }
    start = time.thread_time()
    clipx.diagnose(run)
    assert time.thread_time() - start < 3.0


def test_each_advice_leads_to_an_entry_of_the_page():
    page = Path(clipx.__file__).parents[1] / "docs/troubleshooting.md"
    titles = [x[4:] for x in page.read_text().splitlines() if x.startswith("### ")]
    assert {advice.entry for advice in ADVICE.values()} <= set(titles)


def in_a_process_of_its_own(path):
    """The seconds and the gigabytes that a diagnosis of a file takes."""
    script = (
        "import re, sys, time, pathlib, optax_clipx as clipx;"
        " start = time.process_time(); clipx.diagnose(sys.argv[1]);"
        " took = time.process_time() - start;"
        " status = pathlib.Path('/proc/self/status').read_text();"
        " print(took, int(re.search(r'VmHWM:\\s+(\\d+) kB', status)[1]) / 1e6)"
    )
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return map(float, done.stdout.split())


def write(path, rows, names):
    """A file of noisy norms, whose rows repeat: to write it takes little time."""
    numbers = np.exp(0.3 * np.random.default_rng(0).normal(size=(1000, len(names))))
    if path.suffix == ".csv":
        lines = [",".join(map(repr, row)) for row in numbers.tolist()]
        head, start, end = f"step,{','.join(names)}\n", "", "\n"
    else:
        records = [dict(zip(names, row, strict=True)) for row in numbers.tolist()]
        lines = [json.dumps(record)[1:] for record in records]
        head, start, end = "", '{"step": ', "\n"
    with path.open("w") as file:
        file.write(head)
        file.writelines(f"{start}{i},{lines[i % 1000]}{end}" for i in range(rows))
    return path


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("name", ["run.csv", "run.jsonl"])
def test_a_million_steps_of_three_columns(name, tmp_path):
    path = write(tmp_path / name, 1_000_000, ["loss", "clip/norm"])
    took, most = in_a_process_of_its_own(path)
    assert took < 10
    assert most < 1


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("name", ["run.csv", "run.jsonl"])
def test_a_hundred_thousand_steps_of_two_hundred_leaves(name, tmp_path):
    names = ["loss", "clip/norm", *(f"track_norms/layers/{i}/w" for i in range(200))]
    took, most = in_a_process_of_its_own(write(tmp_path / name, 100_000, names))
    assert took < 10
    assert most < 1
