"""The account of a run's rewinds: one JSON object a line, read again on a restart.

A rewind is two lines: the decision, before anything is done about it, and ``done`` when
the checkpoints after its target are gone. A process that was killed in between so knows
that it has to do this part again, which it can any number of times.
"""

import json
import os
from pathlib import Path
from typing import Any

from . import jsonl
from .divergence import REASONS
from .jsonl import ReadError
from .rewind_decisions import RewindDecision

_LARGEST_FILE = 1 << 20  # bytes; a rewind is about 200
_LARGEST = 2**53
_STARTS = (b'{"rewind": ', b'{"done": ')


class RewindLog:
    """The decisions in a file.

    Attributes:
        path: of the file.
        decisions: all that were made, in their order.
        done: how many of them were carried out: all, or all but the last.

    Args:
        path: of the file, which need not be there.
        writes: whether this process writes it; the others only read it at the start.
    """

    def __init__(self, path: Path, writes: bool) -> None:
        self.path = path
        self.writes = writes
        self.decisions: list[RewindDecision] = []
        self.done = 0
        if not path.exists():
            return
        if path.is_dir():
            raise ReadError(f"{path} is a folder. Name a file in it.")
        if path.stat().st_size > _LARGEST_FILE:
            raise ReadError(
                f"{path}: expected the account of some rewinds, got a file of"
                f" {path.stat().st_size:,} bytes. Name another file."
            )
        *lines, rest = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            self._read(number, line)
        if rest and not any(s.startswith(rest[: len(s)]) for s in _STARTS):
            raise self._broken(len(lines) + 1, rest)
        if rest and writes:  # cut off when the process was killed: it never counted
            jsonl.end_last_line(path)

    def decide(self, decision: RewindDecision) -> None:
        """Adds a decision, on disk before this returns."""
        record = decision._asdict()
        self._append({name: jsonl.named(value) for name, value in record.items()})
        self.decisions.append(decision)

    def finish(self) -> None:
        """Says that the last decision was carried out."""
        self._append({"done": len(self.decisions)})
        self.done = len(self.decisions)

    def _append(self, record: dict[str, Any]) -> None:
        if not self.writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            jsonl.write_whole(file, [json.dumps(record).encode() + b"\n"])
            os.fsync(file.fileno())

    def _read(self, number: int, line: bytes) -> None:
        try:
            record = jsonl.loads(line)
        except ValueError:
            record = None
        count = len(self.decisions)
        if self.done < count and record == {"done": count}:
            self.done = count
            return
        decision = _decision(record)
        if decision is None or decision.rewind != count + 1 or self.done < count:
            raise self._broken(number, line)
        self.decisions.append(decision)

    def _broken(self, number: int, line: bytes) -> ReadError:
        return ReadError(
            f"{self.path}:{number}: expected rewind {len(self.decisions) + 1} as Rewind"
            f" wrote it, got {jsonl.shown(line)}. Name the file of this run, or move"
            " this one away, with which the run forgets its rewinds."
        )


def _decision(record: Any) -> RewindDecision | None:
    """The decision that a record has, None if it has none that can be."""
    if not isinstance(record, dict) or set(record) != set(RewindDecision._fields):
        return None
    try:
        loss, limit = (_number(record[name]) for name in ("loss", "limit"))
    except (TypeError, OverflowError):
        return None
    found = RewindDecision(**{**record, "loss": loss, "limit": limit})
    counts = all(type(x) is int and 0 <= x <= _LARGEST for x in found[:6])
    if not counts or found.reason not in REASONS:
        return None
    in_order = found.to < found.onset <= found.step
    return found if in_order and found.first_batch < found.next_batch else None


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if type(value) in (float, int) or value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    raise TypeError
