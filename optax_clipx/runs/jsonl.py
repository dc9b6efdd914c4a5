"""Records as lines of JSON: one step a line, written whole and read in blocks.

JSON has no NaN or infinity. They are written as the strings "NaN", "Infinity" and
"-Infinity", as Protocol Buffers write them, so that every reader of JSON takes the
file; Python's bare NaN is read, too. What is missing in a step is left out of its line;
null is read as missing.
"""

import itertools
import json
import math
import operator
import os
import re
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .escaping import printable_lines
from .table import MISSING, STEP, Columns, present

_BLOCK = 1 << 20  # bytes at a time: what is made of them stays in a processor's cache
_SPARSE = 256  # places in the table for each number in the file
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_EMPTY = frozenset(("", "NA", "N/A", "null", "None"))  # Keras writes NA


class ReadError(ValueError):
    """A file that cannot be read as a run: names the file, the line and the mend."""

    def __init__(self, message: str) -> None:
        super().__init__(printable_lines(message))


def encode(columns: Mapping[str, Any]) -> bytes:
    """The lines of some rows; each has what is present in its row."""
    names = list(columns)
    sparse = not all(present(columns[name]).all() for name in names)
    lines = []
    for row in zip(*[plain(columns[name]) for name in names], strict=True):
        record = dict(zip(names, row, strict=True))
        if sparse:
            record = {n: value for n, value in record.items() if value is not None}
        try:
            line = json.dumps(record, allow_nan=False)
        except ValueError:
            line = json.dumps({name: named(value) for name, value in record.items()})
        lines.append(line + "\n")
    return "".join(lines).encode()


def encode_in_parts(columns: Columns) -> Iterator[bytes]:
    """The lines of many rows, some thousand at a time."""
    for start in range(0, len(columns[STEP]), 10_000):
        yield encode({n: x[start : start + 10_000] for n, x in columns.items()})


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


def check_is_ours(path: Path) -> None:
    """Raises an error for a file in which lines of ours would be out of place."""
    with path.open("rb") as file:
        first = file.readline()
    if not first.endswith(b"\n"):
        first = b""
    if _broken(first) or STEP not in json.loads(first):
        raise ReadError(
            f"{path}: expected a file that History(path) wrote, with"
            f' {{"step": 0, ...}} on each line, got {shown(first)}. Record to another'
            " file, and read this one with History.load."
        )


def end_last_line(path: Path) -> None:
    """Takes off a last line that was cut off, so that a new one may follow."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("rb+") as file:
            file.truncate(whole)


def write_whole(file: Any, parts: Iterable[bytes]) -> None:
    """Writes all of it to the end of an unbuffered file, or nothing: a disk may fill.

    What the system has taken outlives the process.
    """
    end = os.fstat(file.fileno()).st_size
    try:
        for part in parts:
            left = memoryview(part)
            while left:
                left = left[file.write(left) :]
    except BaseException:
        file.truncate(end)
        raise


def cut_from(file: Any, step: int) -> None:
    """Moves the lines from a step on to a file beside this one."""
    data = Path(file.name).read_bytes()
    end = _end_before(data, step)
    with open(f"{file.name}.dropped", "ab", buffering=0) as dropped:
        write_whole(dropped, [data[end:]])
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
    if not number:
        lines = [lines[0].removeprefix(_BYTE_ORDER_MARK), *lines[1:]]
    filled = [line for line in lines if line.strip()]
    if not filled:
        return None
    try:
        records = loads(b"[" + b",".join(filled) + b"]")
    except ValueError:
        records = None
    # Broken lines can be whole when joined: {"a": 1 and "b": 2}.
    if records is None or len(records) != len(filled):
        if cut and _broken(lines[-1]):
            return None
        raise _first_broken(path, number, lines)
    where = [number + 1 + i for i, line in enumerate(lines) if line.strip()]
    return columns_of_records(path, where, records)


def loads(data: bytes) -> Any:
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


def columns_of_records(
    path: Path | str, where: list[int], records: list[Any]
) -> Columns:
    """The numbers of some records by name; ``where`` has their lines for messages."""
    if not all(isinstance(record, dict) for record in records):
        both = zip(where, records, strict=True)
        line, record = next(x for x in both if not isinstance(x[1], dict))
        raise ReadError(
            f"{path}:{line}: expected an object such as"
            f' {{"step": 1, "clip/norm": 0.5}}, got {shown(record)}.'
        )
    found: Columns = {}
    if "event" in records[0] and "tracker" in records[0]:
        where, records = _of_levanter(where, records)
        if not records:
            return found
    table = _of_numbers(records)
    if table is not None:
        return table
    for name, column in _by_name(path, where, records).items():
        numbers = to_numbers(path, name, list(column), where)
        if numbers is not None:
            found[name] = numbers
    return found


def _of_numbers(records: list[dict[str, Any]]) -> Columns | None:
    """The columns of records with the same names in the same order, and numbers alone.

    None if there is anything else in them.
    """
    names = list(records[0])
    if not names or any(list(record) != names for record in records):
        return None
    cells = list(itertools.chain.from_iterable(map(dict.values, records)))
    try:
        rows = np.frombuffer(array("d", cells)).reshape(-1, len(names))
    except (TypeError, OverflowError):
        return None
    return dict(zip(names, np.ascontiguousarray(rows.T), strict=True))


def _by_name(
    path: Path | str, where: list[int], records: list[dict[str, Any]]
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


def _of_levanter(where: list[int], records: list[Any]) -> tuple[list[int], list[Any]]:
    """What Levanter's json_logger wrote: events, those called log with metrics."""
    found = [
        (line, {**_flat(record.get("metrics") or {}), STEP: record["step"]})
        for line, record in zip(where, records, strict=True)
        if record.get("event") == "log" and record.get("step") is not None
    ]
    return [line for line, _ in found], [record for _, record in found]


def _flat(metrics: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    """Nested metrics by path; the counts of histograms are left out."""
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{start}{name}/")
        elif not isinstance(value, list):
            found[start + name] = value
    return found


def to_numbers(
    path: Path | str, name: str, column: list[Any], where: list[int] | range
) -> np.ndarray | None:
    """A column as numbers, None for a column of text; what is empty is missing."""
    try:  # all are numbers: the usual case, at the speed of C
        return np.frombuffer(array("d", column))
    except (TypeError, OverflowError):
        pass
    types = set(map(type, column))
    try:
        if types == {str} and _are_numbers(column):  # of a CSV file
            return _of_text(column)
        if types <= {float, int, bool, type(None)}:
            filled = [x is not None for x in column]
            cells = list(itertools.compress(column, filled))
            return _spread(np.array(cells, np.float64), filled) if cells else None
    except (ValueError, OverflowError):
        pass
    given = [not _empty(x) for x in column]
    bad = [(line, x) for line, x in zip(where, column, strict=True) if not _number(x)]
    if not bad:
        cells = [float(x) for x in column if not _empty(x)]
        return _spread(np.array(cells), given) if cells else None
    if len(bad) == sum(given) and all(isinstance(x, str) for _, x in bad):
        _tell_of_separators(path, name, bad)
        return None
    line, value = bad[0]
    raise ReadError(
        f"{path}:{line}: expected a number in {name!r}, got {shown(value)}. Correct"
        f" the line, or leave the column out."
    )


def _of_text(cells: list[str]) -> np.ndarray:
    try:
        return np.array(cells, np.float64)
    except ValueError:  # some may be empty
        filled = [x not in _EMPTY for x in cells]
        given = list(itertools.compress(cells, filled))
        if not given:
            raise
        return _spread(np.array(given, np.float64), filled)


def _spread(cells: np.ndarray, filled: list[bool]) -> np.ndarray:
    numbers = np.full(len(filled), MISSING)
    numbers[np.array(filled, bool)] = cells
    return numbers


def _tell_of_separators(path: Path | str, name: str, cells: list[Any]) -> None:
    """Warns of a column that is left out although it may well hold numbers."""
    for line, cell in cells:
        if re.fullmatch(r"\s*[-+]?\d[\d,._' \u00a0\u2009\u202f]*(e[-+]?\d+)?\s*", cell):
            warnings.warn(
                f"{path}:{line}: the column {name!r} is left out: {shown(cell)} may be"
                " a number, but is ambiguous. Write numbers without separators of"
                " thousands and with a decimal point, such as 1234.5.",
                stacklevel=9,
            )
            return


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip() in _EMPTY)


def _are_numbers(cells: list[str]) -> bool:
    """Whether float() reads these as they are meant: not 1_5 as 15."""
    text = "".join(cells)
    return text.isascii() and "_" not in text


def _number(value: Any) -> bool:
    try:
        if _empty(value):
            return True
        if isinstance(value, str) and not _are_numbers([value]):
            return False
        return np.ndim(float(value)) == 0
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
                f" got {shown(line)}. Delete or correct the line."
            )
    return ReadError(f"{path}:{number + 1}: expected one JSON object on each line.")


def plain(values: Any) -> list[Any]:
    """Python's numbers, and None for what is missing."""
    values = np.asarray(values)
    if values.dtype == bool:
        values = values.astype(np.int8)
    there = present(values)
    numbers = values.tolist()
    if there.all():
        return numbers
    return [x if known else None for x, known in zip(numbers, there, strict=True)]


def named(value: Any) -> Any:
    """The name of what JSON has no number for; anything else as it is."""
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return "NaN"
        return "Infinity" if value > 0 else "-Infinity"
    return value


def shown(value: Any) -> str:
    """The value for a message, not more than 60 characters of it."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
