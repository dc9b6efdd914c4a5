"""The file of a run's rewinds: torn, broken, hostile, or of another run."""

import json
import os

import pytest
from test_rewind_decisions import Checkpoints, drive, loss_in, make

import optax_clipx as clipx

GOOD = {
    **{"rewind": 1, "step": 113, "onset": 105, "to": 90},
    **{"first_batch": 90, "next_batch": 124},
    **{"reason": "loss", "loss": 9.0, "limit": 1.1},
}
FIRST = json.dumps(GOOD)


def line(**changed):
    return json.dumps({**GOOD, **changed})


def read(tmp_path, text, **options):
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "run.jsonl.rewinds").write_bytes(data)
    return make(tmp_path, Checkpoints(range(0, 120, 10)), **options)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "1",
        "not JSON",
        "",
        "\x1b[2J\x00",
        '{"step": 1, "loss": 2.0}',
        '{"done": 1}',
        line(rewind=2),
        line(rewind=True),
        line(step=-1),
        line(step=1e2),
        line(step="113"),
        line(step=2**60),
        line(to=105),
        line(onset=114),
        line(next_batch=90),
        line(first_batch=-1),
        line(reason="whim"),
        line(reason=["loss"]),
        line(loss="high"),
        line(loss=[1]),
        line(limit=10**400),
        line(extra=1),
        FIRST + "\n" + FIRST,
        FIRST + "\n" + line(rewind=2),
        FIRST + '\n{"done": 2}',
        FIRST + '\n{"done": 1}\n{"done": 1}',
        FIRST[:-1] + ', "loss": {"loss": 1}}',
        '{"rewind": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"rewind": ' + "9" * 10_000 + "}",
        b"\xff\xfe\x00",
    ],
    ids=lambda text: repr(text)[:40],
)
def test_a_broken_line_is_an_error_that_names_it(tmp_path, text):
    whole = text + (b"\n" if isinstance(text, bytes) else "\n")
    with pytest.raises(ValueError, match=r"rewinds:\d: expected rewind \d as") as error:
        read(tmp_path, whole)
    assert len(str(error.value)) < 400
    assert str(error.value).isprintable()


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with pytest.raises(ValueError, match="a file of 2,000,000 bytes"):
        read(tmp_path, b"\n" * 2_000_000)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        make(tmp_path, path=tmp_path)


@pytest.mark.parametrize("end", [1, 8, 11, 60, len(FIRST) - 1, len(FIRST)])
def test_a_torn_decision_was_never_made(tmp_path, end):
    rewind, _, _ = read(tmp_path, FIRST[:end])
    assert not rewind.decisions
    assert rewind.path.read_bytes() == b""


@pytest.mark.parametrize("end", [0, 1, 5, len('{"done": 1}')])
def test_a_decision_that_was_not_carried_out_is_carried_out(tmp_path, end):
    rewind, _, manager = read(tmp_path, FIRST + "\n" + '{"done": 1}'[:end])
    assert rewind.restore("fresh", args="given") == ("state 90", 90)
    assert manager.steps == list(range(0, 100, 10))
    assert rewind.batch(90) == 124
    assert rewind.path.read_text() == FIRST + '\n{"done": 1}\n'


def test_a_torn_line_of_another_file_is_left_as_it_is(tmp_path):
    with pytest.raises(ValueError, match="rewinds:1: expected rewind 1"):
        read(tmp_path, "precious")
    assert (tmp_path / "run.jsonl.rewinds").read_text() == "precious"


def test_a_process_that_is_not_primary_writes_nothing(tmp_path):
    rewind, _, manager = read(tmp_path, FIRST + '\n{"do', primary=False)
    assert rewind.restore("fresh", args="given") == ("state 90", 90)
    assert manager.steps[-1] == 90
    assert rewind.path.read_text() == FIRST + '\n{"do'


def test_the_account_of_another_run_is_refused(tmp_path):
    (tmp_path / "run.jsonl.rewinds").write_text(FIRST + '\n{"done": 1}\n')
    with pytest.raises(
        ValueError, match=r"got a manager without any\. Delete this file"
    ):
        make(tmp_path, Checkpoints())


def test_a_target_that_is_gone_is_an_error(tmp_path):
    (tmp_path / "run.jsonl.rewinds").write_text(FIRST + "\n")
    rewind, _, manager = make(tmp_path, Checkpoints([80, 100]))
    with pytest.raises(RuntimeError, match=r"the checkpoint of step 90.*\[80, 100\]"):
        rewind.restore("fresh", args="given")
    assert manager.steps == [80, 100]


class Killed(BaseException):
    pass


class Mortal(Checkpoints):
    """Dies at a given call."""

    left = 10**9

    def _live(self):
        self.left -= 1
        if self.left < 0:
            raise Killed

    def wait_until_finished(self):
        self._live()

    def delete(self, step):
        self._live()
        super().delete(step)
        self._live()

    def restore(self, step, args=None):
        self._live()
        return super().restore(step)


@pytest.mark.slow
def test_killed_around_a_rewind_at_any_call(tmp_path):
    """The same decisions, batches and checkpoints, wherever it was killed."""

    def run(folder, left):
        folder.mkdir(exist_ok=True)
        rewind, history, manager = make(folder, Mortal([0]), margin=10, patience=15)
        bad = loss_in([*range(55, 75), *range(110, 150)])
        manager.left = left
        seen, deaths = [], 0
        while True:
            try:
                seen += drive(rewind, history, manager, bad, steps=150)
                break
            except Killed:
                deaths += 1
                manager.left = 10**9
                history.close()
                rewind, history, manager = make(folder, manager, margin=10, patience=15)
        history.close()
        parts = [folder / name for name in ("run.jsonl", "run.jsonl.rewinds")]
        return [*(x.read_text() for x in parts), manager.steps], deaths

    want, deaths = run(tmp_path / "whole", 10**9)
    assert deaths == 0
    assert want[1].count("rewind") == 2
    for left in range(100):
        found, deaths = run(tmp_path / str(left), left)
        assert found == want
        if not deaths:
            break
    assert left > 8


def test_the_account_is_on_disk_before_a_checkpoint_is_deleted(tmp_path):
    class Watching(Checkpoints):
        def delete(self, step):
            assert '"to": 90' in (tmp_path / "run.jsonl.rewinds").read_text()
            super().delete(step)
            self.deleted = True

    manager = Watching([0])
    rewind, history, _ = make(tmp_path, manager, margin=10)
    drive(rewind, history, manager, loss_in(range(105, 120)))
    assert manager.deleted


def test_a_decision_outlives_a_power_cut(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    rewind, history, manager = make(tmp_path, margin=10)
    drive(rewind, history, manager, loss_in(range(105, 120)))
    assert len(synced) == 2


def test_a_disk_that_is_full_makes_no_decision(tmp_path, monkeypatch):
    def full(file, parts):
        raise OSError("No space left on device")

    monkeypatch.setattr(clipx.runs.jsonl, "write_whole", full)
    history = clipx.History(resume=True)
    rewind = clipx.Rewind(
        Checkpoints([0]), history, tmp_path / "rewinds", patience=1, margin=1
    )
    history.append(range(3), {"loss": [1.0, 1.0, float("nan")]})
    with pytest.raises(OSError, match="No space"):
        rewind.step(3)
    assert not rewind.decisions
