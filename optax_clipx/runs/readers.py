"""Runs from files and folders: what kind a file is shows in its content.

Read are the files of `History`, the metrics of Lightning, Keras, MaxText and Levanter,
the trainer_state.json of Hugging Face, W&B's exports, and TensorBoard's event files.
"""

import gc
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from . import csv_files, event_files, jsonl
from .jsonl import ReadError
from .merging import one_row_a_step
from .naming import no_column, step_name
from .table import STEP, Columns, Table, present

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read(path: str | Path, step: str | None = None) -> Table:
    """The columns of a run, one row a step, with the step as ``"step"``."""
    path = file_of_run(Path(path))
    with _uncollected():
        return one_row_a_step(path, rows(path, step))


def rows(path: str | Path, step: str | None = None) -> Table:
    """The rows of a run as they are in its file, with the step as ``"step"``."""
    path = file_of_run(Path(path))
    with _uncollected():
        table, name = Table(), step
        for block in _content(path):
            name = add_rows(path, table, block, name, step is None)
        if not len(table):
            raise ReadError(
                f"{path}: there are no records in it. Was anything recorded?"
            )
        return table


def _content(path: Path) -> Iterable[Columns]:
    if path.is_dir() or "tfevents" in path.name:
        return [event_files.read(path)]
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(_BYTE_ORDER_MARK)
    if not head.strip():
        raise ReadError(f"{path}: the file is empty. Was anything recorded?")
    if b"\0" in head:
        raise ReadError(
            f"{path}:1: expected lines of JSON, CSV, or TensorBoard events (a file"
            " whose name contains 'tfevents', or its folder), got binary data."
        )
    if head.lstrip()[:1] not in (b"{", b"["):
        return csv_files.read(path)
    return _of_document(path) if is_document(path) else _of_jsonl(path)


def file_of_run(path: Path) -> Path:
    """The file that a folder has of one run; the folder itself for event files."""
    if not path.exists():
        raise ReadError(f"{path}: there is no such file or folder.")
    if not path.is_dir() or list(path.glob("*tfevents*")):
        return path
    names = ("*.jsonl", "*.csv", "trainer_state.json")
    files = sorted(file for name in names for file in path.glob(name))
    if len(files) == 1:
        return files[0]
    if not files:
        below = {file for name in names for file in path.rglob(name)}
        below |= {file.parent for file in path.rglob("*tfevents*")}
        files = sorted(below)
    if not files:
        raise ReadError(
            f"{path}: expected the folder of a run, but there are no TensorBoard event"
            " files, .jsonl or .csv files, and no trainer_state.json in it."
        )
    shown = ", ".join(map(str, files[:5])) + (", ..." if len(files) > 5 else "")
    raise ReadError(
        f"{path}: expected the folder of one run, got a folder with {len(files)} of"
        f" them. Name those that you want: {shown}."
    )


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection: it takes a third of the time, and there are no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def add_rows(
    path: Path, table: Table, block: Columns, name: str | None, may_guess: bool
) -> str:
    """Adds rows as they are in the file, with their step as ``"step"``.

    Returns:
        The name of the step.
    """
    if name is None or (may_guess and name not in block):
        name = step_name(path, block)
    if name not in block:
        raise ReadError(no_column(path, name, block, "--step NAME"))
    steps = block[name]
    block = {STEP: steps, **{n: x for n, x in block.items() if n not in (name, STEP)}}
    there = present(steps)
    if not there.all():
        warnings.warn(
            f"{path}: {int((~there).sum())} records without a step are left out.",
            stacklevel=6,
        )
        block = {n: values[there] for n, values in block.items()}
        steps = block[STEP]
    # NaN is not below either; beyond, float64 skips whole numbers.
    bad = ~((np.abs(steps) <= 2**53) & (steps == np.round(steps)))
    if bad.any():
        at = len(table) + int(bad.argmax())
        raise ReadError(
            f"{path}: expected whole numbers in {name!r}, got"
            f" {steps[bad.argmax()]:g} in record {at + 1}. Correct the record, or"
            " name another column with --step."
        )
    table.extend(block)
    return name


def is_document(path: Path) -> bool:
    """Whether a file is one JSON value over many lines, or one that holds a log."""
    with path.open("rb") as file:
        first = file.readline().removeprefix(_BYTE_ORDER_MARK).strip()
    return first in (b"{", b"[") or first[:2] == b"[{" or b'"log_history"' in first


def _of_document(path: Path) -> Iterable[Columns]:
    """A list of records, or an object with one, as Hugging Face writes it."""
    try:
        records = jsonl.loads(path.read_bytes().removeprefix(_BYTE_ORDER_MARK))
    except ValueError as error:
        raise ReadError(
            f"{path}: expected JSON, got a document that is broken or cut off: {error}."
        ) from None
    if isinstance(records, dict):
        records = records.get("log_history")
    if not isinstance(records, list):
        raise ReadError(
            f"{path}: expected one JSON object a line, a list of them, or an object"
            " with a list called 'log_history', as Hugging Face's trainer_state.json."
        )
    if records:
        where = list(range(1, len(records) + 1))
        yield jsonl.columns_of_records(f"{path}, record", where, records)


def _of_jsonl(path: Path) -> Iterable[Columns]:
    for number, lines, cut in jsonl.blocks(path):
        columns = jsonl.decode(path, number, lines, cut)
        if columns:
            yield columns
        elif cut and columns is None:
            warnings.warn(
                f"{path}:{number + 1}: the last line is cut off, as in a run that was"
                " killed; it is left out.",
                stacklevel=7,
            )


def columns_of_run(run: Any) -> Columns:
    """The columns of a history, or of a recorded run by its path."""
    if isinstance(run, str) or hasattr(run, "__fspath__"):
        return read(run).arrays()
    if hasattr(run, "columns") and hasattr(run, "steps"):
        return dict(run.columns)
    raise TypeError(
        "Expected a History, the path of a recorded run, or a dict of columns, got"
        f" {type(run).__name__}."
    )
