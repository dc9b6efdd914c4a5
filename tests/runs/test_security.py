"""Run files and names from strangers: nothing in them runs, drives or fills a thing."""

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import optax_clipx as clipx
from optax_clipx import __main__ as command_line, plotting
from optax_clipx.runs.escaping import printable

SOURCES = sorted(Path(clipx.__file__).parent.rglob("*.py"))


def test_no_source_unpickles_evaluates_or_connects():
    words = (
        r"\b(pickle|marshal|shelve|dill|joblib|yaml|socket|urllib|requests|ssl)\b"
        r"|(?<!re\.)\b(eval|exec|compile|__import__)\(|np\.load\b|allow_pickle|subprocess|os\.system"
    )
    assert len(SOURCES) > 40
    found = [
        f"{path.name}: {line.strip()}"
        for path in SOURCES
        for line in path.read_text().splitlines()
        if re.search(words, line)
    ]
    assert not found


class Hostile:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


def npz():
    file = io.BytesIO()
    np.savez(file, norm=np.array([Hostile()], object))
    return file.getvalue()


def deep(start, end, times=100_000):
    return b'{"step": 1, "norm": ' + start * times + b"1" + end * times + b"}\n"


def sparse(count=5_000):
    return b"".join(b'{"step":%d,"k%d":1}\n' % (i, i) for i in range(count))


# Contents, and what the message has to say.
HOSTILE = {
    "pickled.npz": (npz(), "binary data"),
    "pickled.jsonl": (pickle.dumps(Hostile()), "binary data"),
    "pickled.csv": (pickle.dumps(Hostile(), 0), "expected lines of JSON"),
    "yaml.csv": (b"!!python/object/apply:os.mkdir [unpickled]\n", "expected lines"),
    "deep_list.jsonl": (deep(b"[", b"]"), ":1: expected one JSON object"),
    "deep_dict.jsonl": (deep(b'{"a": ', b"}"), ":1: expected one JSON object"),
    "deep_number.jsonl": (deep(b"[", b"]", 50), ":1: expected a number in 'norm'"),
    "long.jsonl": (deep(b"9", b"", 400), ":1: expected a number in 'norm'"),
    "longer.jsonl": (deep(b"9", b""), ":1: expected one JSON object"),
    "step.jsonl": (b'{"step": 1e300, "norm": 1}\n', "whole numbers.*1e.300"),
    "steps.jsonl": (b'{"step": %d, "norm": 1}\n' % 2**64, "whole numbers"),
    "sparse.jsonl": (sparse(), "5,001 names in 5,000 records"),
    "formula.csv": (
        b"step,norm\n1,2\n2,=cmd|' /C calc'!A0\n",
        ":3: expected a number in 'norm', got \"=cmd",
    ),
    "long.csv": (b"step,norm\n1," + b"9" * 200_000 + b"\n", "field larger than"),
    "open.csv": (b'step,norm\n1,"' + b"9" * 200_000, "field larger than"),
    "nul.csv": (b"step,norm\n" + b"1,2\n" * 2000 + b"3,\0\n", r":2002: .*\\x00"),
}


@pytest.mark.one_in(10)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_errors(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content, words = HOSTILE[name]
    Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        clipx.History.load(name)
    for command in ("suggest", "diagnose"):
        assert command_line.main([command, name]) == 2
        assert capsys.readouterr().err.startswith(f"error: {name}")
    assert os.listdir() == [name]


def test_a_formula_in_a_column_of_text_is_left_out(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text("step,norm,note\n1,2,=1+1\n2,3,@SUM(A1)\n")
    loaded = clipx.History.load(path)
    assert list(loaded.columns) == ["step", "norm"]
    assert "=" not in loaded.save(tmp_path / "again.csv").read_text()


def record(data, length=None):
    """One record of an event file, with right checksums."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    header = struct.pack("<Q", len(data) if length is None else length)
    parts = (header, struct.pack("<I", masked_crc32c(header)), data)
    return b"".join(parts) + struct.pack("<I", masked_crc32c(data))


def tensor_event(*shape):
    """An event with a tensor of one value, repeated to any shape."""
    from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2

    tensor = tensor_pb2.TensorProto(dtype=1, float_val=[1.0])
    for size in shape:
        tensor.tensor_shape.dim.add(size=size)
    value = summary_pb2.Summary.Value(tag="norm", tensor=tensor)
    summary = summary_pb2.Summary(value=[value])
    return record(event_pb2.Event(step=1, summary=summary).SerializeToString())


EVENTS = {
    "length": (lambda: record(b"x" * 100, 2**62), "event files are broken"),
    "length, unchecked": (lambda: struct.pack("<QI", 2**62, 0) + b"x", "no scalars"),
    "protobuf": (lambda: record(b"\xff" * 50), "event files are broken"),
    "tensor of an exabyte": (lambda: tensor_event(2**30, 2**28), "no scalars"),
    "negative shape": (lambda: tensor_event(-1, -1), "no scalars"),
    "pickle": (lambda: record(pickle.dumps(Hostile())), "event files are broken"),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", EVENTS)
def test_hostile_event_files_are_errors(name, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    make, words = EVENTS[name]
    path = tmp_path / "events.out.tfevents.1"
    path.write_bytes(make())
    with pytest.raises(ValueError, match=words):
        clipx.History.load(path)
    assert os.listdir() == [path.name]


def test_a_tensor_of_one_entry_is_read(tmp_path):
    pytest.importorskip("tensorboard")
    path = tmp_path / "events.out.tfevents.1"
    path.write_bytes(tensor_event(1, 1))
    assert clipx.History.load(path)["norm"].tolist() == [1.0]


@pytest.mark.parametrize(
    "line",
    [
        deep(b"[", b"]"),
        b'{"limit": 1, "learning_rate": null, "seed": null, "score": %d}\n' % 10**400,
    ],
)
def test_a_hostile_sweep_is_an_error(line, tmp_path):
    path = tmp_path / "sweep.jsonl"
    path.write_bytes(line)
    with pytest.raises(ValueError, match=r"sweep\.jsonl:1: expected a line"):
        clipx.find_threshold(lambda limit: 0.0, 1, 2, path=path, progress=False)


# Tags, quotes, a link of Plotly's and of rich's, mathematics, a title for the terminal,
# text that runs backwards, half of a character.
ODD = "<script>alert(1)</script>\"'<a href='x'>[/][link=x]$\\frac$"
ODD += "\x1b]0;x\x07\u202e\ud800"


def odd_run():
    return {
        "clip/norm": np.array([1.0, 3.0, 2.0]),
        f"{ODD}/loss": np.array([3.0, 2.0, 1.0]),
        f"track_norms/{ODD}": np.array([1.0, 3.0, 2.0]),
        "track_norms/b": np.array([1.0, 3.0, 2.0]),
    }


def test_names_are_escaped_on_the_page():
    pytest.importorskip("plotly")
    from optax_clipx.runs.page import page

    columns = {"step": np.arange(3), **odd_run()}
    text = page({ODD: (columns, "clip/norm"), "b": (columns, "clip/norm")}, 2.5)
    text.encode()
    body = text[text.index("</style>") :]
    assert "alert(1)" in body
    assert "<script>alert" not in body
    assert "</script>alert" not in body
    assert "\x1b" not in body
    # In the charts' data, where "<" is written so, Plotly would make tags of its own.
    assert "\\u003cscript" not in body
    assert "\\u003ca href" not in body
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in body


def test_names_are_escaped_in_pictures(tmp_path):
    for figure in (
        plotting.compare({ODD: odd_run()}, column=f"{ODD}/loss"),
        plotting.heatmap(odd_run()),
    ):
        figure.savefig(tmp_path / "picture.svg")
        svg = (tmp_path / "picture.svg").read_text()
        assert "<script" not in svg
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels[0].replace(r"\$", "$") == printable(ODD)


def test_names_are_escaped_in_the_terminal(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.chdir(tmp_path)
    odd = ODD.replace("/", "|").replace("\ud800", "")
    lines = [{"step": i, **{n: x[i] for n, x in odd_run().items()}} for i in range(3)]
    Path(f"{odd}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    monkeypatch.setenv("COLUMNS", "400")
    assert command_line.main(["watch", f"{odd}.jsonl", "--once"]) == 0
    shown = capsys.readouterr().out
    assert printable(odd) in shown
    assert f"{printable(ODD)}/loss" in shown
    commands = [
        ["suggest"],
        ["diagnose"],
        ["compare"],
        ["suggest", "--norm", "x\x1b[2J"],
        ["plot"],
    ]
    for command, *more in commands:
        command_line.main([command, f"{odd}.jsonl", *more])
    said = "".join(capsys.readouterr()) + shown
    assert not [c for c in said if not (c.isprintable() or c == "\n")]


def test_errors_do_not_drive_the_terminal(tmp_path, capsys):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"{\x1b]0;title\x07}\n")
    with pytest.raises(ValueError, match=r"got \{\\x1b\]0;title\\x07\}"):
        clipx.History.load(path)


OFFLINE = """
    import socket, sys

    def refuse(*_, **__):
        raise AssertionError("the network was used")

    for name in ("connect", "connect_ex", "sendto", "bind"):
        setattr(socket.socket, name, refuse)
    socket.create_connection = socket.getaddrinfo = refuse
    try:
        socket.socket().connect(("127.0.0.1", 9))
    except AssertionError:
        pass  # refused, as it should be
    else:
        sys.exit("the network is not refused")

    import jax
    import jax.numpy as jnp
    import optax
    import optax_clipx as clipx
    from optax_clipx.__main__ import main

    inner = optax.chain(clipx.clip_by_global_norm(1.0), optax.adam(0.1))
    clipper = clipx.track_norms(inner)
    params = {"w": jnp.ones(3)}
    state = clipper.init(params)
    with clipx.History("run.jsonl") as history:
        for step in range(9):
            grads = {"w": jnp.full(3, 1.0 + step)}
            _, state = jax.jit(clipper.update)(grads, state, params)
            history.append(step, {"loss": 1.0, **clipx.metrics(state)})
    for line in (
        "plot run.jsonl --html page.html -o run.png", "suggest run.jsonl",
        "compare run.jsonl", "watch run.jsonl --once",
        "diagnose run.jsonl --html found.html",
    ):
        assert main(line.split()) == 0, line
    print("done")
"""


@pytest.mark.slow
def test_no_network_is_used(tmp_path):
    for needed in ("matplotlib", "plotly", "rich"):
        pytest.importorskip(needed)
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(OFFLINE)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("done\n")
    assert (tmp_path / "page.html").exists()
