"""`History` and the readers: what is recorded comes back; what is broken is named."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_clipx as clipx


def recorded(path=None, steps=20):
    history = clipx.History(path)
    clipper = clipx.clip_by_global_norm(1.0)
    state = clipper.init(jnp.zeros(2))
    for step in range(steps):
        _, state = jax.jit(clipper.update)(jnp.array([3.0, step]), state)
        history.append(step, {"loss": 1.0 / (step + 1), **clipx.metrics(state)})
    return history


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize("name", ["run.jsonl", "run.csv"])
def test_save_and_load_give_the_same_numbers(tmp_path, name):
    history = recorded()
    history.append(20, {"loss": np.nan, "clip/norm": np.inf, "other": -np.inf})
    loaded = clipx.History.load(history.save(tmp_path / name))
    assert_same(loaded.columns, history.columns)
    assert loaded.steps.dtype == np.int64
    assert np.isnan(loaded["clip/scale"][-1])
    assert np.isneginf(loaded["other"][-1])
    with pytest.raises(FileExistsError, match="force"):
        history.save(tmp_path / name)
    recorded(steps=3).save(tmp_path / name, force=True)
    assert len(clipx.History.load(tmp_path / name)) == 3
    assert os.listdir(tmp_path) == [name]  # no temporary file is left


def test_the_file_has_what_the_history_has(tmp_path):
    with recorded(tmp_path / "deep" / "run.jsonl") as history:
        columns = history.columns
    assert_same(clipx.History.load(tmp_path / "deep" / "run.jsonl").columns, columns)
    lines = (tmp_path / "deep" / "run.jsonl").read_text().splitlines()
    with pytest.raises(ValueError, match="resume=True"):
        history.append(20, {"loss": 1.0})
    assert json.loads(lines[3])["step"] == 3
    assert json.loads(lines[3])["clip/norm"] == float(columns["clip/norm"][3])


def test_append_is_one_step_behind(tmp_path):
    path = tmp_path / "run.jsonl"
    history = clipx.History(path)
    for step in range(3):
        history.append(step, {"norm": 1.0 * step})
        assert len(path.read_bytes().splitlines()) == step
    assert history["norm"].tolist() == [0, 1, 2]  # asking writes what is left
    assert len(path.read_bytes().splitlines()) == 3


def test_append_does_not_wait_for_the_device(tmp_path):
    """The last step is still running when append returns."""

    @jax.jit
    def slow(x):
        return jax.lax.fori_loop(0, 300, lambda i, x: jnp.tanh(x @ x), x)

    x = slow(jnp.ones((300, 300)))
    x[0, 0].block_until_ready()  # compiled before, or it would outlast the step
    history = clipx.History(tmp_path / "run.jsonl")
    y = slow(x)
    value = y[0, 0]
    history.append(0, {"norm": value})
    assert not value.is_ready()
    assert np.isfinite(history["norm"][0])


@pytest.mark.slow
def test_a_program_that_just_ends_writes_the_last_record(tmp_path):
    program = """
        import optax_clipx as clipx
        history = clipx.History("run.jsonl")
        for step in range(5):
            history.append(step, {"norm": 1.0})
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert len(clipx.History.load(tmp_path / "run.jsonl")) == 5


def test_a_block_is_its_steps():
    clipper = clipx.clip_by_global_norm(1.0)

    def step(state, x):
        _, state = clipper.update(jnp.array([3.0, x]), state)
        return state, clipx.metrics(state)

    state = clipper.init(jnp.zeros(2))
    _, stacked = jax.lax.scan(step, state, jnp.arange(20.0))
    block, single = clipx.History(), recorded()
    block.append(range(20), stacked)
    for name in stacked:
        np.testing.assert_allclose(block[name], single[name], rtol=1e-6)
    block.append(jnp.arange(20, 25), {"other": jnp.ones(5)})
    assert np.isnan(block["other"][:20]).all()
    assert len(block) == 25
    block.append([], {"other": jnp.zeros(0)})
    assert len(block) == 25


def test_clip_metrics_as_they_are():
    clipper = clipx.clip_by_global_norm(1.0)
    _, state = clipper.update(jnp.array([3.0, 4.0]), clipper.init(jnp.zeros(2)))
    history = clipx.History()
    history.append(0, state.metrics)
    assert history["clip/norm"].tolist() == [5.0]
    assert history["clip/nonfinite"].tolist() == [0.0]


def test_a_restart_takes_the_place_of_what_it_runs_again(tmp_path):
    path = tmp_path / "run.jsonl"
    with clipx.History(path) as history:
        history.append(range(10), {"loss": np.arange(10.0)})
    with path.open("ab") as file:
        file.write(b'{"step": 10, "lo')  # killed here
    with pytest.raises(FileExistsError, match="resume=True"):
        clipx.History(path)
    with pytest.warns(UserWarning, match=r"run\.jsonl:11: the last line is cut off"):
        history = clipx.History(path, resume=True)
    with history:
        history.append(range(6, 12), {"loss": -np.arange(6.0)})
        want = [0, 1, 2, 3, 4, 5, 0, -1, -2, -3, -4, -5]
        assert history["loss"].tolist() == want
    loaded = clipx.History.load(path)
    assert loaded["loss"].tolist() == want
    assert loaded.steps.tolist() == list(range(12))
    dropped = Path(f"{path}.dropped").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in dropped] == [6, 7, 8, 9]
    # As in the file of a run that was never interrupted.
    with clipx.History(tmp_path / "whole.jsonl") as history:
        history.append(range(6), {"loss": np.arange(6.0)})
        history.append(range(6, 12), {"loss": -np.arange(6.0)})
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    with clipx.History(path, resume=True) as history:
        history.append(0, {"loss": 5.0})
    assert path.read_bytes() == b'{"step": 0, "loss": 5.0}\n'


def test_an_old_file_that_has_steps_twice_is_cut_where_its_reader_would(tmp_path):
    path = tmp_path / "run.jsonl"
    steps = [*range(10), *range(6, 12)]
    path.write_text(
        "".join(f'{{"step": {s}, "n": {i}}}\n' for i, s in enumerate(steps))
    )
    with pytest.warns(UserWarning, match="4 records of steps that were run again"):
        history = clipx.History(path, resume=True)
    with history:
        history.append(8, {"n": -1})
        want = [0, 1, 2, 3, 4, 5, 10, 11, -1]
        assert history["n"].tolist() == want
    with pytest.warns(UserWarning, match="4 records of steps that were run again"):
        assert clipx.History.load(path)["n"].tolist() == want


def test_flush_leaves_nothing_behind(tmp_path):
    path = tmp_path / "run.jsonl"
    history = clipx.History(path)
    history.append(0, {"norm": 1.0})
    history.flush()
    history.flush()
    assert path.read_bytes() == b'{"step": 0, "norm": 1.0}\n'


@pytest.mark.parametrize("content", ["step,norm\n0,1\n", '{"_step": 0, "norm": 1}\n'])
def test_a_file_of_others_is_not_gone_on_with(tmp_path, content):
    path = tmp_path / "run"
    path.write_text(content)
    with pytest.raises(ValueError, match="expected a file that History"):
        clipx.History(path, resume=True)
    assert path.read_text() == content


def test_pandas():
    pandas = pytest.importorskip("pandas")
    frame = recorded().to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.index.name == "step"
    assert frame["clip/norm"].iloc[0] == 3.0


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("step", "metrics", "words"),
    [
        (0, {"norm": np.ones(2)}, "range"),
        (range(3), {"norm": np.ones(2)}, "shape"),
        (0, {"step": 1}, "step"),
        (1.5, {"norm": 1.0}, "whole steps"),
        ([2, 1], {"norm": np.ones(2)}, "rise"),
    ],
)
def test_bad_records(step, metrics, words):
    def record():
        history = clipx.History()
        history.append(step, metrics)
        return len(history)

    with pytest.raises(ValueError, match=words):
        record()


def test_inside_of_jit_is_an_error():
    history = clipx.History()
    with pytest.raises(TypeError, match="outside of it"):
        jax.jit(lambda x: history.append(0, {"norm": x}))(1.0)
    with pytest.raises(KeyError, match="none of the columns"):
        history["norm"]


# Files that are broken in some way, and what the message has to say.
BAD_FILES = {
    "empty.jsonl": (b"", "the file is empty"),
    "blank.jsonl": (b"\n\n", "the file is empty"),
    "binary.jsonl": (b"\x89PNG\r\n\0\0\x1a\n" * 9, "binary data"),
    "prose.jsonl": (b"Dear diary\n", ":1: expected lines of JSON"),
    "broken.jsonl": (
        b'{"step": 1, "norm": 1}\n{"step": 2, "no\n{"step": 3, "norm": 1}\n',
        ":2: expected one JSON object.*Delete or correct",
    ),
    "two_halves.jsonl": (
        b'{"step": 1\n"norm": 1}\n{"step": 2, "norm": 1}\n',
        ":1: expected one JSON object",
    ),
    "list.jsonl": (b"[1, 2]\n", r":1: expected an object such as"),
    "no_step.jsonl": (b'{"norm": 1}\n', "no column 'step'.*'norm'.*--step NAME"),
    "words.jsonl": (
        b'{"step": 1, "norm": 1}\n{"step": 2, "norm": "large"}\n',
        ":2: expected a number in 'norm', got 'large'",
    ),
    "nested.jsonl": (
        b'{"step": 1, "norm": {"a": 1}}\n',
        ":1: expected a number in 'norm'",
    ),
    "half_steps.jsonl": (b'{"step": 1.5, "norm": 1}\n', "whole numbers.*1.5"),
    "nan_steps.jsonl": (b'{"step": NaN, "norm": 1}\n', "whole numbers"),
    "mixed.jsonl": (
        b"".join(b'{"step": %d, "norm": 1}\n' % (i % 7) for i in range(200)),
        "several runs mixed in one file",
    ),
    "ragged.csv": (b"step,norm\n1,2\n2\n", ":3: expected 2 values"),
    "words.csv": (b"step,norm\n1,2\n2,big\n", ":3: expected a number in 'norm'"),
    "twice.csv": (b"step,norm,norm\n1,2,3\n", ":1: expected a name for each.*norm"),
    "header.csv": (b"step,norm\n", "no records"),
    "no_step.csv": (b"time,norm\n1,2\n", "no column 'step'.*'time'"),
    "latin.csv": (b"step,norm\n1,2 \xb5\n", "UTF-8"),
    "cut.jsonl": (b'{"step": 1, "no', "no records"),
}


@pytest.mark.one_in(10)
@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.filterwarnings("ignore:.*the last line is cut off")
def test_bad_files_are_named_with_line_and_mend(tmp_path, name):
    content, words = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        clipx.History.load(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_what_others_write_is_read(tmp_path):
    (tmp_path / "a.csv").write_text(
        "\ufeffIteration;grad_norm;note;lr\n0;1.5;warm;\n1;nan;;0.1\n\n2;inf;;0.1\n"
    )
    found = clipx.History.load(tmp_path / "a.csv").columns
    assert list(found) == ["step", "grad_norm", "lr"]
    np.testing.assert_array_equal(found["grad_norm"], [1.5, np.nan, np.inf])
    np.testing.assert_array_equal(found["lr"], [np.nan, 0.1, 0.1])
    (tmp_path / "b.jsonl").write_text(
        '{"_step": 0, "gnorm": NaN, "run": "x"}\n\n{"_step": 4, "gnorm": null}\n'
        '{"_step": 5, "gnorm": "Infinity", "late": true}'
    )
    found = clipx.History.load(tmp_path / "b.jsonl").columns
    assert found["step"].tolist() == [0, 4, 5]
    np.testing.assert_array_equal(found["gnorm"], [np.nan, np.nan, np.inf])
    np.testing.assert_array_equal(found["late"], [np.nan, np.nan, 1])
    renamed = tmp_path / "c.csv"
    renamed.write_text("t,step,norm\n5,0,1\n6,0,2\n")
    assert clipx.History.load(renamed, step="t").steps.tolist() == [5, 6]


def test_tensorboard_logs_are_read(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(tmp_path / "run")) as writer:
        for step in range(30):
            writer.add_scalar("clip/norm", step + 0.5, step)
            if step % 10 == 0:
                writer.add_scalar("loss", 1.0 / (1 + step), step)
        writer.add_text("note", "hello", 0)
    with SummaryWriter(str(tmp_path / "other")) as writer:
        writer.add_scalar("loss", 1.0, 0)
    loaded = clipx.History.load(tmp_path / "run")
    np.testing.assert_array_equal(loaded["clip/norm"], np.arange(30) + 0.5)
    assert np.isfinite(loaded["loss"]).sum() == 3
    (file,) = (tmp_path / "run").glob("*tfevents*")
    assert_same(clipx.History.load(file).columns, loaded.columns)
    with pytest.raises(ValueError, match=r"folder with 2 of them.*other.*run"):
        clipx.History.load(tmp_path)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="no TensorBoard event files"):
        clipx.History.load(tmp_path / "nothing")
    broken = tmp_path / "events.out.tfevents.1"
    broken.write_bytes(b"no events")
    with pytest.raises(ValueError, match="no scalars"):
        clipx.History.load(broken)


TRAINING = """
import sys, time
import jax, jax.numpy as jnp
import optax_clipx as clipx

clipper = clipx.clip_by_global_norm(1.0)
state = clipper.init(jnp.zeros(3))
update = jax.jit(clipper.update)
history = clipx.History("run.jsonl")
for step in range(10**9):
    _, state = update(jnp.full(3, 1.0 + step % 5), state)
    history.append(step, clipx.metrics(state))
    sys.stdout.write(f"{step}\\n")
    sys.stdout.flush()
"""


def killed(folder, seconds):
    """The run in a folder so many seconds after its first step, and the last step."""
    folder.mkdir()
    with (
        (folder / "steps").open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-c", TRAINING], cwd=folder, stdout=output
        ) as process,
    ):
        while not (folder / "steps").stat().st_size:
            time.sleep(0.01)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
    told = (folder / "steps").read_text().split("\n")[-2]
    return clipx.History.load(folder / "run.jsonl"), int(told) + 1


@pytest.mark.slow
def test_a_killed_run_loses_two_records_at_most(tmp_path):
    """kill -9 at twenty random moments; each step was announced after append."""
    rng = random.Random(0)
    moments = [rng.uniform(0.02, 1.5) for _ in range(20)]
    folders = [tmp_path / str(attempt) for attempt in range(20)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(killed, folders, moments))
    for loaded, appended in found:
        assert appended - 2 <= len(loaded) <= appended + 1
        np.testing.assert_array_equal(loaded.steps, np.arange(len(loaded)))
        want = np.sqrt(3) * (1.0 + loaded.steps % 5)
        np.testing.assert_allclose(loaded["clip/norm"], want, rtol=1e-6)


LARGE = r"""
import re, sys, time
import numpy as np
import optax_clipx as clipx
start = time.process_time()
history = clipx.History.load("run.jsonl")
history.plot("run.png", force=True)
drawn = time.process_time()
clipx.suggest_threshold(history)
ended = time.process_time()
# Not ru_maxrss, which a process takes over from the one that started it.
status = open("/proc/self/status").read()
peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**20
print(len(history), drawn - start, ended - drawn, peak)
"""


@pytest.mark.slow
def test_a_million_steps(tmp_path):
    rng = np.random.default_rng(0)
    count = 10**6
    columns = {
        f"clip/{name}": rng.lognormal(size=count).astype(np.float32)
        for name in ("norm", "clipped_norm", "scale", "clipped")
    }
    columns["clip/threshold"] = np.ones(count, np.float32)
    columns["clip/nonfinite"] = np.zeros(count, bool)
    for name in ("steps", "num_clipped", "num_nonfinite"):
        columns[f"clip/{name}"] = np.arange(count)
    with clipx.History(tmp_path / "run.jsonl") as history:
        history.append(range(count), columns)
    for _ in range(3):  # another process may have the machine for a while
        ran = subprocess.run(
            [sys.executable, "-c", LARGE],
            cwd=tmp_path,
            env={**os.environ, "MPLBACKEND": "Agg"},
            capture_output=True,
            text=True,
            check=True,
        )
        print(ran.stdout)
        steps, draw_seconds, suggest_seconds, gigabytes = map(float, ran.stdout.split())
        assert steps == count
        assert gigabytes < 1
        if draw_seconds < 10 and suggest_seconds < 5:
            return
    pytest.fail(f"drawn in {draw_seconds} s (10), suggested in {suggest_seconds} s (5)")


def test_a_step_that_comes_again_drops_records_with_a_warning(tmp_path):
    history = clipx.History(tmp_path / "run.jsonl")
    for step in (0, 1, 2, 0):
        history.append(step, {"loss": 1.0})
    with pytest.warns(UserWarning, match=r"Step 0 .* 3 records .* over all epochs"):
        history.append(1, {"loss": 1.0})
    history.close()
    assert history["step"].tolist() == [0, 1]
    assert len((tmp_path / "run.jsonl.dropped").read_text().splitlines()) == 3
