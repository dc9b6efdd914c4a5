"""Tables of comma-separated values, of our own and of other loggers.

An empty cell is missing; a NaN that was recorded is written as "nan".
"""

import codecs
import csv
import io
import itertools
import re
import warnings
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from . import jsonl
from .jsonl import ReadError
from .naming import STEP_NAMES
from .table import MISSING, STEP, Columns, present

_CELLS = 500_000  # at a time: as Python's strings they take some tens of MB
_BLOCK = 1 << 20  # bytes at a time: what is made of them stays in a processor's cache
_OF_NUMBERS = b"0123456789+-.eEnaifNAIFty"  # also of nan, inf and infinity
_LONGEST_HEADER = 10**7  # characters


def encode(columns: Columns) -> Iterator[bytes]:
    """The content of a file, some thousand rows at a time."""
    yield (",".join(map(_quoted, columns)) + "\n").encode()
    for start in range(0, len(columns[STEP]), 10_000):
        part = [jsonl.plain(x[start : start + 10_000]) for x in columns.values()]
        rows = zip(*part, strict=True)
        yield "".join(
            ",".join("" if x is None else repr(x) for x in row) + "\n" for row in rows
        ).encode()


def _quoted(name: str) -> str:
    # Whoever guesses what separates the cells may take any of these for it.
    special = any(c in name for c in ',;\t"\r\n') or name != name.strip() or not name
    return '"' + name.replace('"', '""') + '"' if special else name


def read(path: Path) -> Iterable[Columns]:
    """The columns of some thousand rows at a time.

    Blocks that hold nothing but numbers are read at once. From the first other block
    on, cells are read one by one.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, delimiter, lines, size = _header(path, file)
        header = _of_one_run(header)
        with path.open("rb") as file:
            start = file.seek(size)
            for block in _of_whole_lines(file):
                table = _numbers(block, delimiter.encode(), len(header))
                if table is None:
                    break
                yield _columns(header, table)
                start, lines = start + len(block), lines + len(table)
            file.seek(start)
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            rows: Iterator[list[str]] = csv.reader(text, delimiter=delimiter)
            if not _ends_in_newline(path):
                rows = _without_last(path, rows)
            yield from _blocks(path, rows, header, lines + 1)
    except UnicodeDecodeError:
        raise ReadError(f"{path}: expected text in UTF-8, got other bytes.") from None
    except csv.Error as error:
        raise ReadError(f"{path}: this is no CSV file: {error}.") from None


def _of_whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """The blocks of a file up to its last newline, or to a line that is too long."""
    rest = b""
    while data := file.read(_BLOCK):
        data = rest + data
        end = data.rfind(b"\n") + 1
        if not end:
            return
        yield data[:end]
        rest = data[end:]


def _numbers(block: bytes, delimiter: bytes, columns: int) -> np.ndarray | None:
    """The numbers of whole lines, a row each; None unless all cells are numbers."""
    block = block.replace(b"\r\n", b"\n")
    if block.translate(None, _OF_NUMBERS + delimiter + b"\n"):
        return None
    characters = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero((characters == ord(delimiter)) | (characters == ord("\n")))
    last = characters[ends] == ord("\n")
    if len(ends) % columns or not (last.reshape(-1, columns).sum(axis=1) == 1).all():
        return None
    if not last[columns - 1 :: columns].all():
        return None
    empty = np.diff(ends, prepend=-1) == 1
    if empty.any():
        block = _filled(block, delimiter)
    found = _parsed(block, delimiter)
    if found is None or found.size != len(ends):
        return None
    found[empty] = MISSING
    return found.reshape(-1, columns)


def _filled(block: bytes, delimiter: bytes) -> bytes:
    """The same with a zero in each empty cell."""
    block = b"\n" + block
    for end in (delimiter, b"\n", delimiter):  # neighbours share what is between them
        for start in (delimiter, b"\n"):
            block = block.replace(start + end, start + b"0" + end)
    return block[1:]


def _parsed(block: bytes, delimiter: bytes) -> np.ndarray | None:
    """The numbers in a row; by orjson if it is there, which is twice as fast."""
    cells = block[:-1].replace(b"\n", b",").replace(delimiter, b",")
    try:
        import orjson

        return np.array(array("d", orjson.loads(b"[" + cells + b"]")))
    except (ImportError, ValueError):  # JSON has no NaN and no .5
        pass
    try:
        return np.loadtxt(io.BytesIO(cells), delimiter=",", ndmin=1, comments=None)
    except ValueError:
        return None


def _columns(header: list[str], table: np.ndarray) -> Columns:
    """The columns of a table by name, but those of empty cells alone."""
    columns = dict(zip(header, np.ascontiguousarray(table.T), strict=True))
    return {name: x for name, x in columns.items() if present(x).any()}


def _header(path: Path, file: TextIO) -> tuple[list[str], str, int, int]:
    """The names, what separates them, and how many lines and bytes they take."""
    text = file.readline()
    while text.count('"') % 2 and len(text) < _LONGEST_HEADER:  # a name has a newline
        line = file.readline()
        if not line:
            break
        text += line
    unquoted = re.sub(r'"[^"]*"', "", text)
    delimiter = max(",;\t", key=unquoted.count)
    names = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    if '"' not in text:
        names = [name.strip() for name in names]
    if len(names) == 1 and names[0].lower() not in STEP_NAMES:
        raise ReadError(
            f"{path}:1: expected lines of JSON such as"
            ' {"step": 1, "clip/norm": 0.5}, or a CSV header such as'
            f" step,norm; got {text.strip()[:60]!r}."
        )
    twice = {name for name in names if names.count(name) > 1}
    if twice or not any(names):
        raise ReadError(
            f"{path}:1: expected a name for each column, got"
            f" {sorted(twice) or names} {'twice' if twice else ''}."
        )
    size = len(text.encode()) + len(_byte_order_mark(path))
    return names, delimiter, text.count("\n"), size


def _byte_order_mark(path: Path) -> bytes:
    with path.open("rb") as file:
        return codecs.BOM_UTF8 if file.read(3) == codecs.BOM_UTF8 else b""


def _of_one_run(names: list[str]) -> list[str]:
    """Names without the name of the run, in W&B's export of one run's chart."""
    others = [name for name in names if name.lower() not in STEP_NAMES]
    runs = {name.rpartition(" - ")[0] for name in others}
    if len(runs) != 1 or runs == {""}:
        return names
    found = [name.rpartition(" - ")[2] if name in others else name for name in names]
    return found if len(set(found)) == len(found) else names


def _ends_in_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, io.SEEK_END)
        return file.read(1) in b"\r\n"


def _without_last(path: Path, rows: Iterator[list[str]]) -> Iterator[list[str]]:
    """All rows but the last, which may end inside a number."""
    number, last = 0, None
    for row in rows:
        if last is not None:
            yield last
        number, last = number + 1, row
    if last is not None:
        warnings.warn(
            f"{path}: the last line has no end, so that its last number may be cut off,"
            " as in a run that was killed; it is left out. If it is whole, end it with"
            " a newline.",
            stacklevel=8,
        )


def _blocks(
    path: Path, rows: Iterator[list[str]], header: list[str], number: int
) -> Iterable[Columns]:
    count = 1 + _CELLS // len(header)
    while block := list(itertools.islice(rows, count)):
        numbered = [(number + i, row) for i, row in enumerate(block) if row]
        number += len(block)
        for line, row in numbered:
            if len(row) != len(header):
                raise ReadError(
                    f"{path}:{line}: expected {len(header)} values as in the header,"
                    f" got {len(row)}. Correct or delete the line."
                )
        if not numbered:
            continue
        where = [line for line, _ in numbered]
        columns: Any = zip(*[row for _, row in numbered], strict=True)
        found = {}
        for name, cells in zip(header, columns, strict=True):
            numbers = jsonl.to_numbers(path, name, list(cells), where)
            if numbers is not None:
                found[name] = numbers
        yield found
