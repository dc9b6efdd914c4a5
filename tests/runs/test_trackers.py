"""The recipes of docs/monitoring.md write what each tracker's own reader gives back."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import optax_clipx as clipx

PAGE = Path(__file__).parents[2] / "docs" / "monitoring.md"
BEFORE = """
import json
import jax, jax.numpy as jnp
import optax_clipx as clipx

clipper = clipx.clip_by_global_norm(1.0)
state = clipper.init(jnp.zeros(2))
_, state = clipper.update(jnp.array([3.0, 4.0]), state)
metrics, step = {"loss": jnp.float32(0.25), **clipx.metrics(state)}, 7
history = clipx.History()
history.append(step, metrics)
import os; os.makedirs("runs/monitoring", exist_ok=True)
"""
READERS = {
    "tensorboard": """
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator("runs/tensorboard")
events.Reload()
found = {}
for tag in events.Tags()["scalars"]:
    (event,) = events.Scalars(tag)
    found[tag] = [event.step, event.value]
""",
    # The file is a LevelDB log of W&B's own messages: blocks of 32 KiB, each record
    # with checksum, length and kind (1 whole, 2 first, 3 middle, 4 last) before it.
    "wandb": """
import glob
from wandb.proto.wandb_internal_pb2 import Record
(path,) = glob.glob("wandb/offline-run-*/run-*.wandb")
data, at, whole, found = open(path, "rb").read(), 7, b"", {}
assert data[:4] == b":W&B"
while at + 7 <= len(data):
    if at % 32768 > 32768 - 7:
        at += -at % 32768
    length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
    whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
    if kind in (1, 4):
        record, whole = Record.FromString(whole), b""
        items = {x.key or "/".join(x.nested_key): json.loads(x.value_json)
                 for x in record.history.item}
        for name in items:
            if not name.startswith("_"):
                found[name] = [items["_step"], items[name]]
""",
    "mlflow": """
client = mlflow.MlflowClient()
(run,) = client.search_runs(["0"])
found = {}
for name in run.data.metrics:
    (point,) = client.get_metric_history(run.info.run_id, name)
    found[name] = [point.step, point.value]
""",
    "trackio": """
from trackio.sqlite_storage import SQLiteStorage
(name,) = SQLiteStorage.get_runs("clipping")
(row,) = SQLiteStorage.get_logs("clipping", name)
found = {n: [row["step"], x] for n, x in row.items() if n not in ("step", "timestamp")}
""",
    "csv": """
import csv
(row,) = csv.DictReader(open("runs/monitoring/run.csv"))
found = {n: [int(row["step"]), float(x)] for n, x in row.items() if n != "step"}
""",
}


HISTORY = """
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator("runs/tensorboard_history")
events.Reload()
print({tag: [(x.step, x.value) for x in events.Scalars(tag)]
       for tag in sorted(events.Tags()["scalars"])})
"""


def recipe(name):
    (code,) = re.findall(rf"```python {name}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    lines = [line for line in code.splitlines() if line and "import" not in line]
    assert len(lines) <= 5
    return code


@pytest.mark.one_in(10)
@pytest.mark.parametrize("store", ["", "file"])
@pytest.mark.parametrize("name", READERS)
def test_a_recipe_writes_what_is_read_back(name, store, tmp_path):
    if store and name != "mlflow":
        pytest.skip("MLflow alone has two local stores")
    if name != "csv" and importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    code = recipe(name)
    if store:
        code = code.replace("sqlite:///runs/mlflow.db", "file:runs/mlflow")
    program = BEFORE + code + READERS[name] + "\nprint('FOUND' + json.dumps(found))"
    offline = {
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "WANDB_SILENT": "true",
        "NO_PROXY": "*",
        "HOME": str(tmp_path),
    }
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=tmp_path,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.split("FOUND")[1].splitlines()[0])
    assert found["loss"] == [7, 0.25]
    assert found["clip/norm"] == [7, 5.0]
    assert found["clip/num_clipped"] == [7, 1]
    assert len(found) == 10


def test_a_whole_history_is_read_back_without_what_is_missing(
    tmp_path, monkeypatch, capsys
):
    pytest.importorskip("tensorboard")
    pytest.importorskip("tensorboardX")
    monkeypatch.chdir(tmp_path)
    history = clipx.History()
    for step, loss in ((3, 0.5), (5, 0.25)):
        history.append(step, loss=loss)
    history.append(5, val_loss=2.0)
    exec(recipe("history") + HISTORY, {"history": history})
    found = eval(capsys.readouterr().out)
    assert found == {"loss": [(3, 0.5), (5, 0.25)], "val_loss": [(5, 2.0)]}
