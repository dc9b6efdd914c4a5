"""Nothing that is there is overwritten without force, and force keeps what it is."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest

import optax_clipx as clipx
from optax_clipx import __main__ as command_line


def run():
    history = clipx.History()
    history.append(range(30), {"norm": np.arange(30.0) + 1})
    return history


def sweep():
    return clipx.find_threshold(lambda limit: limit, 1, 2, num=2, progress=False)


WRITERS = {
    "History": lambda path, **force: clipx.History(path, **force).close(),
    "History.save": lambda path, **force: run().save(path, **force),
    "History.plot": lambda path, **force: run().plot(path, **force),
    "Sweep.plot": lambda path, **force: sweep().plot(path, **force),
    "find_threshold": lambda path, **force: clipx.find_threshold(
        lambda limit: limit, 1, 2, num=2, progress=False, picture=path, **force
    ),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_is_there_is_refused(name, tmp_path):
    path = tmp_path / "file.png"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"is there already\. Pass .*force=True"):
        WRITERS[name](path)
    assert path.read_bytes() == b"precious"


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", WRITERS)
def test_force_overwrites(name, tmp_path):
    path = tmp_path / "file.png"
    path.write_bytes(b"precious")
    WRITERS[name](path, force=True)
    assert path.read_bytes() != b"precious"


def test_a_picture_that_is_there_is_refused_before_anything_is_trained(tmp_path):
    (tmp_path / "sweep.png").write_bytes(b"precious")
    calls = []
    with pytest.raises(FileExistsError):
        clipx.find_threshold(calls.append, 1, 2, picture=tmp_path / "sweep.png")
    assert not calls


def test_the_command_line_says_force(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run().save("run.jsonl")
    Path("run.png").write_bytes(b"a picture")
    assert command_line.main(["plot", "run.jsonl"]) == 2
    said = capsys.readouterr().err
    assert "Pass --force to overwrite it" in said
    assert "force=True" not in said
    assert Path("run.png").read_bytes() == b"a picture"
    assert command_line.main(["plot", "run.jsonl", "--force"]) == 0
    assert Path("run.png").read_bytes() != b"a picture"


def test_resume_and_force_are_two_things(tmp_path):
    with pytest.raises(ValueError, match="got both"):
        clipx.History(tmp_path / "run.jsonl", resume=True, force=True)


def test_save_keeps_the_permissions(tmp_path):
    path = run().save(tmp_path / "run.jsonl")
    path.chmod(0o600)
    run().save(path, force=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_new_file_has_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        path = run().save(tmp_path / "run.jsonl")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_save_follows_a_link(tmp_path):
    target, link = tmp_path / "target.jsonl", tmp_path / "run.jsonl"
    target.write_text("old\n")
    link.symlink_to(target)
    run().save(link, force=True)
    assert link.is_symlink()
    assert len(clipx.History.load(target)) == 30
    assert sorted(os.listdir(tmp_path)) == ["run.jsonl", "target.jsonl"]
