"""The comparison of methods: tasks can be learned, runs resume, tables are right."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks" / "clipbench"
sys.path.insert(0, str(FOLDER.parent))

from clipbench import report, rows, tasks  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize("name", tasks.MAKERS)
def test_a_task_can_be_learned(name):
    task = tasks.task(name)
    assert task.half in report.HALVES
    assert task.steps % 20 == 0
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        key = jax.random.key(0)
        params = task.init(key)

        @jax.jit
        def step(params, number):
            batch = task.batch(jax.random.fold_in(key, number), number)
            loss, grads = jax.value_and_grad(task.loss)(params, batch)
            norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
            rate = 0.02 / jnp.maximum(norm, 1e-3)
            return jax.tree.map(lambda p, g: p - rate * g, params, grads), loss

        first = task.final(params)
        losses = []
        for number in range(150):
            params, loss = step(params, jnp.int32(number))
            losses.append(float(loss))
        assert np.isfinite(losses).all()
        assert len(set(losses)) == 150  # each step has its own batch
        assert float(task.final(params)) < float(first)


@pytest.mark.slow
def test_each_half_has_six_tasks():
    halves = [tasks.task(name).half for name in tasks.MAKERS]
    assert sorted(halves) == ["design"] * 6 + ["held out"] * 6


@pytest.mark.parametrize("stride", [1, 2])
def test_convolve_is_jaxs_convolution(stride):
    images = jax.random.normal(jax.random.key(0), (3, 8, 8, 4))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 4, 5))
    expected = jax.lax.conv_general_dilated(
        images,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    found = tasks.convolve(images, kernel, stride)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def record(method, final, half="design"):
    shape = np.array(final, object).shape
    return {
        "kind": "method",
        "task": "adding",
        "half": half,
        "optimizer": "sgd",
        "method": method,
        "final": final,
        "spikes": np.zeros(shape[:2]).tolist(),
    }


@pytest.mark.slow
def test_ratios_to_the_best_fixed_limit(tmp_path):
    fixed = np.full((3, 8, 2), 4.0)
    fixed[0, 3] = 1.0, 4.0  # geometric mean 2
    fixed[1, 5] = 2.5
    records = [
        record(report.FIXED, fixed.tolist()),
        record("none", [[[None, 1.0]], [[5.0, 5.0]], [[8.0, 8.0]]]),
        record("zclip", [[[9.0, 9.0]] * 3, [[2.0, 2.0]] * 3, [[3.0, 3.0]] * 3]),
    ]
    (row,) = report.by_cell(records).values()
    assert report.best_fixed(row) == pytest.approx(2.0)
    assert report.best_fixed(row, tuned=True) == pytest.approx(2.5)
    assert report.ratio(row, "none") == pytest.approx(2.5)
    assert report.ratio(row, "zclip") == pytest.approx(1.0)
    assert report.ratio(row, "zclip", tuned=True) == pytest.approx(0.8)
    # The first seed chooses what is 4 for the second one, which chooses a 2.5.
    assert report.chosen_elsewhere(row) == pytest.approx(np.sqrt(4.0 * 2.5) / 2.0)
    lines = report.summary(report.by_cell(records))
    zclip = next(line for line in lines if line.startswith("| zclip"))
    assert [x.strip() for x in zclip.split("|")[2:6]] == ["100%", "100%", "1", "1"]
    report.draw(report.by_cell(records), tmp_path)
    for name in ("clipbench.png", "clipbench_sensitivity.png"):
        assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.whole
def test_a_run_goes_on_where_it_was(tmp_path):
    command = [sys.executable, str(FOLDER), "--tasks", "heavy tails", "--optimizers"]
    command += ["sgd", "--methods", "none", report.FIXED, "--workers", "1"]
    command += ["--output", str(tmp_path / "bench")]
    subprocess.run(command, check=True)
    path = tmp_path / "bench.jsonl"
    lines = path.read_text().splitlines()
    assert [json.loads(x)["kind"] for x in lines] == ["rate", "method", "method"]
    path.write_text("\n".join([*lines[:2], lines[2][:40]]))  # killed while writing
    subprocess.run([*command, "--pictures", str(tmp_path)], check=True)
    kept = [json.loads(x) for x in path.read_text().splitlines()]
    assert [x.get("method") for x in kept[:2]] == [None, json.loads(lines[1])["method"]]
    assert len(kept) == 3
    assert (tmp_path / "clipbench.png").stat().st_size > 10_000
    assert "heavy tails" in (tmp_path / "bench.md").read_text()


def test_reading_leaves_a_whole_file_to_the_run_that_adds_to_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n')
    with path.open("a") as running:
        assert rows.kept(path) == [{"a": 1}]
        running.write('{"a": 2}\n{"a"')
    assert rows.kept(path) == [{"a": 1}, {"a": 2}]  # the torn line is gone
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'
