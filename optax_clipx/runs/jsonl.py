"""Records as lines of JSON: one step a line, written whole and read in blocks.

JSON has no NaN or infinity. They are written as the strings "NaN", "Infinity" and
"-Infinity", as Protocol Buffers write them, so that every reader of JSON takes the
file; Python's bare NaN and null are read, too.
"""

import json
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .escaping import printable_lines
from .table import STEP, Columns

_BLOCK = 1 << 23  # bytes at a time: a few tens of MB as Python objects
_SPARSE = 256  # places in the table for each number in the file


class ReadError(ValueError):
    """A file that cannot be read as a run: names the file, the line and the mend."""

    def __init__(self, message: str) -> None:
        super().__init__(printable_lines(message))


def encode(columns: Mapping[str, Any]) -> bytes:
    """The lines of some rows."""
    names = list(columns)
    rows = zip(*[_plain(columns[name]) for name in names], strict=True)
    lines = []
    for row in rows:
        record = dict(zip(names, row, strict=True))
        try:
            line = json.dumps(record, allow_nan=False)
        except ValueError:
            line = json.dumps({name: _named(value) for name, value in record.items()})
        lines.append(line + "\n")
    return "".join(lines).encode()


def blocks(path: Path, start: int = 0) -> Iterator[tuple[int, list[bytes], bool]]:
    """Blocks of lines: the number before the first, lines, and if the last has no end.

    Args:
        path: of the file.
        start: the byte to begin at.
    """
    number, rest = 0, b""
    with path.open("rb") as file:
        file.seek(start)
        while data := file.read(_BLOCK):
            lines = (rest + data).split(b"\n")
            rest = lines.pop()
            if lines:
                yield number, lines, False
                number += len(lines)
    if rest:
        yield number, [rest], True


def end_last_line(path: Path) -> None:
    """Takes off a last line that was cut off, so that a new one may follow.

    Raises:
        ReadError: for a file in which lines of ours would be out of place.
    """
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    first = data[: data.find(b"\n") + 1]
    if _broken(first) or STEP not in json.loads(first):
        raise ReadError(
            f"{path}: expected a file that History(path) wrote, with"
            f' {{"step": 0, ...}} on each line, got {_shown(first)}. Record to another'
            " file, and read this one with History.load."
        )
    if whole < len(data):
        with path.open("rb+") as file:
            file.truncate(whole)


def cut_from(file: Any, step: int) -> None:
    """Moves the lines from a step on to a file beside this one."""
    data = Path(file.name).read_bytes()
    end = _end_before(data, step)
    with open(f"{file.name}.dropped", "ab") as dropped:
        dropped.write(data[end:])
    file.truncate(end)


def _end_before(data: bytes, step: int) -> int:
    """Where the last line of a step before this one ends."""
    end = len(data)
    while end:
        start = data.rfind(b"\n", 0, end - 1) + 1
        line = data[start:end]
        if line.strip() and json.loads(line)[STEP] < step:
            break
        end = start
    return end


def decode(path: Path, number: int, lines: list[bytes], cut: bool) -> Columns | None:
    """The columns of some lines; None if there is but a line that was cut off."""
    filled = [line for line in lines if line.strip()]
    if not filled:
        return None
    try:
        records = _loads(b"[" + b",".join(filled) + b"]")
    except ValueError:
        records = None
    # Broken lines can be whole when joined: {"a": 1 and "b": 2}.
    if records is None or len(records) != len(filled):
        if cut and _broken(lines[-1]):
            return None
        raise _first_broken(path, number, lines)
    return _columns(path, number, lines, records)


def _loads(data: bytes) -> Any:
    """The parsed JSON; by orjson if it is there, which is about three times as fast."""
    try:
        import orjson

        return orjson.loads(data)
    except (ImportError, ValueError):
        pass
    try:
        return json.loads(data)  # knows NaN
    except RecursionError:
        raise ValueError("the JSON is too deep") from None


def _columns(
    path: Path, number: int, lines: list[bytes], records: list[Any]
) -> Columns:
    where = [number + 1 + i for i, line in enumerate(lines) if line.strip()]
    if not all(isinstance(record, dict) for record in records):
        both = zip(where, records, strict=True)
        line, record = next(x for x in both if not isinstance(x[1], dict))
        raise ReadError(
            f"{path}:{line}: expected an object such as"
            f' {{"step": 1, "clip/norm": 0.5}}, got {_shown(record)}.'
        )
    found = {}
    for name, column in _by_name(path, where, records).items():
        numbers = to_numbers(path, name, list(column), where)
        if numbers is not None:
            found[name] = numbers
    return found


def _by_name(
    path: Path, where: list[int], records: list[dict[str, Any]]
) -> dict[str, Sequence[Any]]:
    names = dict.fromkeys(records[0])
    if len(names) > 1 and sum(map(len, records)) == len(names) * len(records):
        try:  # the usual case, at the speed of C
            rows = zip(*map(operator.itemgetter(*names), records), strict=True)
            return dict(zip(names, rows, strict=True))
        except KeyError:
            pass
    names = dict.fromkeys(name for record in records for name in record)
    places, filled = len(names) * len(records), sum(map(len, records))
    if places > max(10**7, _SPARSE * filled):  # a small file, and all of the memory
        raise ReadError(
            f"{path}:{where[0]}: expected records with mostly the same names, got"
            f" {len(names):,} names in {len(records):,} records. Write what belongs to"
            " one step as one record."
        )
    return {name: [record.get(name) for record in records] for name in names}


def to_numbers(
    path: Path, name: str, column: list[Any], where: list[int] | range
) -> np.ndarray | None:
    """A column as numbers, None for a column of text; what is missing is NaN."""
    try:
        numbers = np.array(column, np.float64)
        if numbers.ndim == 1:
            return numbers
    except (ValueError, TypeError, OverflowError):
        pass
    bad = [(line, x) for line, x in zip(where, column, strict=True) if not _number(x)]
    if len(bad) == sum(x not in (None, "") for x in column) and all(
        isinstance(x, str) for _, x in bad
    ):
        return None
    if not bad:  # empty cells among numbers
        return np.array([np.nan if x in (None, "") else x for x in column], np.float64)
    line, value = bad[0]
    raise ReadError(
        f"{path}:{line}: expected a number in {name!r}, got {_shown(value)}. Correct"
        f" the line, or leave the column out."
    )


def _number(value: Any) -> bool:
    try:
        return value in (None, "") or np.ndim(float(value)) == 0
    except (ValueError, TypeError, OverflowError):
        return False


def _broken(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def _first_broken(path: Path, number: int, lines: list[bytes]) -> ReadError:
    for index, line in enumerate(lines):
        if line.strip() and _broken(line):
            return ReadError(
                f"{path}:{number + index + 1}: expected one JSON object on the line,"
                f" got {_shown(line)}. Delete or correct the line."
            )
    return ReadError(f"{path}:{number + 1}: expected one JSON object on each line.")


def _plain(values: Any) -> list[Any]:
    values = np.asarray(values)
    return values.astype(np.int8).tolist() if values.dtype == bool else values.tolist()


def _named(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return "NaN"
        return "Infinity" if value > 0 else "-Infinity"
    return value


def _shown(value: Any) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
