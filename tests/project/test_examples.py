"""The examples run at a small size, and show what they say they show."""

import gzip
import os
import pathlib
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


def run(script, *arguments, cwd, check=True):
    found = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        check=False,
    )
    if check:
        assert found.returncode == 0, found.stderr[-3000:]
    return found


def rows_of(output):
    """The lines of the tables, by their first cell and the first word of the second."""
    cells = [
        re.split(r"\s*\|\s*", x)[1:-1] for x in output.splitlines() if x[:1] == "|"
    ]
    return {(c[0], c[1].split()[0]): c for c in cells}


def is_picture(path):
    return (
        path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000
    )


def bars_of(found):
    """What the progress bars are called, which outside of a terminal are one line."""
    lines = found.stderr.replace("\r", "").splitlines()
    return [line.split(":")[0].strip() for line in lines if "100%" in line]


def sentences_at_the_end(printed):
    """How many lines the last paragraph has: what was learned, a sentence on each."""
    last = printed.strip().split("\n\n")[-1].splitlines()
    return len([line for line in last if line[0].isupper() and line[-1] == "."])


def write_idx(path, array):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim)
    data = header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    with gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb") as file:
        file.write(data)


@pytest.mark.slow
def test_the_regression_explodes_without_clipping_and_trains_with_it(tmp_path):
    arguments = ["--task", "regression", "--seeds", 2, "--methods", "none", "global"]
    found = run("exploding_gradients.py", *arguments, "--output", "out", cwd=tmp_path)
    rows = rows_of(found.stdout)
    without, clipped = (
        rows["regression, mlp", "none"],
        rows["regression, mlp", "global"],
    )
    assert without[2] == "nan"
    assert int(without[4].split()[0]) <= 6
    assert clipped[1] == "global at 10"
    assert clipped[4] == "never"
    assert float(clipped[2].split()[0]) < 100
    assert is_picture(tmp_path / "out" / "exploding_gradients.png")
    assert is_picture(tmp_path / "out" / "exploding_gradients_dark.png")
    table = [line for line in found.stdout.splitlines() if line[:1] == "|"]
    assert max(map(len, table)) <= 100
    assert bars_of(found) == ["regression, mlp, none", "regression, mlp, global"]
    assert sentences_at_the_end(found.stdout) == 2
    assert "NaN in 1 of 1 task," in found.stdout
    logs = list((tmp_path / "out").rglob("*tfevents*"))
    assert len(logs) == 4
    text = b"".join(log.read_bytes() for log in logs)
    tags = (b"loss", b"norm", b"clipped_norm", b"scale", b"clip_rate", b"threshold")
    for tag in tags:
        assert tag in text


@pytest.mark.slow
def test_everything_quickly(tmp_path):
    found = run("exploding_gradients.py", "--quick", "--output", "out", cwd=tmp_path)
    methods = {method for _, method in rows_of(found.stdout)}
    assert {"none", "value", "leaf", "global", "adaptive"} <= methods


@pytest.mark.slow
def test_mnist_files(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("train", 96), ("t10k", 32)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", images)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte", labels)
    arguments = [
        "--dataset",
        "mnist",
        "--data-dir",
        tmp_path,
        "--task",
        "rows",
        "--quick",
    ]
    methods = ["--methods", "none", "global"]
    found = run("exploding_gradients.py", *arguments, *methods, cwd=tmp_path)
    assert any(task.startswith("rows, ") for task, _ in rows_of(found.stdout))


@pytest.mark.slow
def test_missing_mnist_files_are_named(tmp_path):
    arguments = ["--dataset", "mnist", "--data-dir", tmp_path, "--task", "rows"]
    found = run("exploding_gradients.py", *arguments, cwd=tmp_path, check=False)
    assert found.returncode != 0
    assert "train-images-idx3-ubyte" in found.stderr
    assert str(tmp_path) in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.slow
def test_the_cliff(tmp_path):
    found = run("cliff.py", "--output", "out", cwd=tmp_path)
    largest, smaller = map(
        float, re.findall(r"that step was ([\d.]+) long", found.stdout)
    )
    assert largest > 10 > 0.2 > smaller
    assert is_picture(tmp_path / "out" / "cliff.png")
    assert is_picture(tmp_path / "out" / "cliff_dark.png")
    assert sentences_at_the_end(found.stdout) == 2


@pytest.mark.slow
def test_a_rule_of_ones_own_is_short_and_gets_everything(tmp_path):
    source = (EXAMPLES / "own_rule.py").read_text()
    rule = source.split("# begin\n")[1].split("# end")[0]
    assert len([line for line in rule.splitlines() if line.strip()]) < 25
    printed = run("own_rule.py", cwd=tmp_path).stdout
    lines = [line for line in printed.splitlines() if "(threshold" in line]
    assert len(lines) == 16
    assert sentences_at_the_end(printed) == 2
    spikes = [line for line in lines if "step 40" in line]
    assert all(float(re.search(r"-> +([\d.]+)", s)[1]) < 10 for s in spikes)


@pytest.mark.slow
@pytest.mark.whole
def test_published_experiments_come_out(tmp_path):
    output = tmp_path / "published.png"
    script = "published_experiments.py"
    printed = run(script, "--output", output, cwd=tmp_path).stdout
    rows = {}
    for row in printed.splitlines():
        row = row.replace(">2e7", "2e7")  # given up at so many steps
        spread = r"(?: \(([\d.]+) to ([\d.]+)\))?"
        found = re.match(rf"(\S.*?)  +([\d.e]+){spread}  +([\d.e]+)$", row)
        if found:
            name, here, low, high, reference = found.groups()
            rows[name] = float(here), float(reference)
            if low and "normal" not in name:  # 9 of 10 single runs lie within
                assert float(low) <= float(reference) <= float(high)
    assert len(rows) == 28
    for name, (here, reference) in rows.items():
        if name.startswith("steps"):
            assert here == reference
        if name.startswith("mean of"):
            assert here == pytest.approx(reference, abs=0.01)
        if name.startswith("tail") and (name.endswith("clipped") or "normal" in name):
            assert here == pytest.approx(reference, rel=0.2)
        if name.startswith("loss after a spike"):
            assert here == pytest.approx(reference, rel=0.2)
    for noise in ("Weibull(0.2)", "Burr(1, 2.3)"):
        plain, _ = rows[f"tail of the loss, {noise}, SGD"]
        assert plain > 3 * rows[f"tail of the loss, {noise}, clipped"][0]
    after = [rows[n][0] for n in rows if n.startswith("loss after a spike")]
    assert after[0] > 10 * max(after[1:])  # no clipping, and then the others
    assert output.stat().st_size > 20_000


@pytest.mark.slow
def test_an_lstm_clipped_within_the_backward_pass(tmp_path):
    output = tmp_path / "out" / "lstm.png"
    arguments = ["--steps", 200, "--seeds", 1, "--order", "rows", "--output", output]
    found = run("lstm_backward.py", *arguments, cwd=tmp_path)
    rows = {cells[0]: cells for cells in rows_of(found.stdout).values()}
    assert float(rows["backward"][3]) > 0.8
    assert float(rows["global"][3]) > 0.8
    assert is_picture(output)
    assert is_picture(output.with_stem("lstm_dark"))
    assert bars_of(found) == ["none", "global", "backward"]
    assert sentences_at_the_end(found.stdout) == 2


@pytest.mark.slow
def test_monitoring_writes_everything(tmp_path):
    found = run("monitor.py", "--steps", 60, "--output", "out", cwd=tmp_path)
    out = tmp_path / "out"
    assert len((out / "run.jsonl").read_text().splitlines()) == 60
    assert is_picture(out / "run.png")
    assert "plotly" in (out / "run.html").read_text()
    (log,) = (out / "logs").glob("*tfevents*")
    assert b"track_norms/head/kernel" in log.read_bytes()
    suggested = r"^(?:use optax_clipx|record another run first)"
    assert len(re.findall(suggested, found.stdout, re.M)) == 2
    assert sentences_at_the_end(found.stdout) == 2


@pytest.mark.slow
def test_the_language_model_explodes_without_clipping(tmp_path):
    arguments = ["--steps", 120, "--output", "out"]
    found = run("nnx_lm_dashboard.py", *arguments, cwd=tmp_path)
    losses = dict(re.findall(r"^(\w+): loss ([\d.]+) nats", found.stdout, re.M))
    assert bars_of(found) == ["quantile_clip", "without"]
    assert sentences_at_the_end(found.stdout) == 2
    assert float(losses["without"]) > 2 * float(losses["quantile_clip"])
    assert is_picture(tmp_path / "out" / "compare.png")
    assert "plotly" in (tmp_path / "out" / "runs.html").read_text()
    assert len(list((tmp_path / "out" / "logs").rglob("*tfevents*"))) == 2
