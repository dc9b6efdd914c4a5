"""Runs from files: our own JSONL, CSV, and TensorBoard's event files."""

import csv
import gc
import itertools
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from . import jsonl
from .jsonl import ReadError
from .table import STEP, Columns, Table

# What others call the step, in lower case; the first that is there is taken.
_STEP_NAMES = (
    "step",
    "_step",
    "global_step",
    "trainer/global_step",
    "steps",
    "iteration",
    "iterations",
    "iter",
    "update",
    "updates",
)
# What the norm and the loss are called; the more telling names come first.
_USUAL: dict[str, tuple[str, ...]] = {
    "norm": (
        "norm",
        "grad_norm",
        "gradient_norm",
        "grad_global_norm",
        "global_norm",
        "gnorm",
        "value",
    ),
    "loss": ("loss", "train_loss", "training_loss", "value"),
}
_ROWS = 50_000  # of a CSV file at a time


def read(path: str | Path, step: str | None = None) -> Table:
    """The columns of a run, with the step as ``"step"``.

    What kind of file it is shows in its content, not in its name.
    """
    with _uncollected():
        return _read(Path(path), step)


def _read(path: Path, step: str | None) -> Table:
    if not path.exists():
        raise ReadError(f"{path}: there is no such file or folder.")
    if path.is_dir() or "tfevents" in path.name:
        return _checked(path, [_of_events(path)], step)
    with path.open("rb") as file:
        head = file.read(4096)
    if not head.strip():
        raise ReadError(f"{path}: the file is empty. Was anything recorded?")
    if b"\0" in head:
        raise ReadError(
            f"{path}:1: expected lines of JSON, CSV, or TensorBoard events (a file"
            " whose name contains 'tfevents', or its folder), got binary data."
        )
    if head.lstrip()[:1] in (b"{", b"["):
        return _checked(path, _of_jsonl(path), step)
    return _checked(path, _of_csv(path), step)


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


def _checked(path: Path, blocks: Iterable[Columns], step: str | None) -> Table:
    """One table whose steps rise; a step that was run again counts once."""
    table, back, dropped, first_back = Table(), 0, 0, None
    name = step
    for block in blocks:
        if name is None or (name not in block and step is None):
            name = step_name(path, block)
        if name not in block:
            raise ReadError(no_column(path, name, block, "--step NAME"))
        steps = block[name]
        others = {n: x for n, x in block.items() if n not in (name, STEP)}
        block = {STEP: steps, **others}
        # NaN is not below either; beyond, float64 skips whole numbers.
        bad = ~((np.abs(steps) <= 2**53) & (steps == np.round(steps)))
        if bad.any():
            at = len(table) + dropped + int(bad.argmax())
            raise ReadError(
                f"{path}: expected whole numbers in {name!r}, got"
                f" {steps[bad.argmax()]:g} in record {at + 1}. Correct the record, or"
                " name another column with --step."
            )
        edges = np.flatnonzero(np.diff(steps) <= 0) + 1
        if len(table) and steps[0] <= table.last_step:
            edges = np.concatenate([[0], edges])
        if len(edges) and first_back is None:
            first_back = len(table) + int(edges[0]) + 1
        back += len(edges)
        # What comes again later takes the place of what was there.
        later = np.minimum.accumulate(steps[::-1])[::-1]
        keep = np.append(steps[:-1] < later[1:], True)
        dropped += int((~keep).sum()) + table.forget_from(later[0])
        table.extend({n: values[keep] for n, values in block.items()})
        if back > max(10, (len(table) + dropped) // 100):
            raise ReadError(
                f"{path}: expected steps that rise, but they go back {back} times,"
                f" first in record {first_back}. Are several runs mixed in one file?"
                " Write each to a file of its own."
            )
    if not len(table):
        raise ReadError(f"{path}: there are no records in it. Was anything recorded?")
    if dropped:
        warnings.warn(
            f"{path}: steps go back at record {first_back}, as after a restart;"
            f" {dropped} records of steps that were run again are left out.",
            stacklevel=5,
        )
    return table


def _of_jsonl(path: Path) -> Iterable[Columns]:
    for number, lines, cut in jsonl.blocks(path):
        columns = jsonl.decode(path, number, lines, cut)
        if columns is not None:
            yield columns
        elif cut:
            warnings.warn(
                f"{path}:{number + 1}: the last line is cut off, as in a run that was"
                " killed; it is left out.",
                stacklevel=6,
            )


def _of_csv(path: Path) -> Iterable[Columns]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            delimiter = max(",;\t", key=first.count)
            if delimiter not in first:
                raise ReadError(
                    f"{path}:1: expected lines of JSON such as"
                    ' {"step": 1, "clip/norm": 0.5}, or a CSV header such as'
                    f" step,norm; got {first.strip()[:60]!r}."
                )
            header = next(csv.reader([first], delimiter=delimiter))
            header = [name.strip() for name in header]
            twice = {name for name in header if header.count(name) > 1}
            if twice or not any(header):
                raise ReadError(
                    f"{path}:1: expected a name for each column, got"
                    f" {sorted(twice) or header} {'twice' if twice else ''}."
                )
            yield from _csv_rows(path, csv.reader(file, delimiter=delimiter), header)
    except UnicodeDecodeError:
        raise ReadError(f"{path}: expected text in UTF-8, got other bytes.") from None
    except csv.Error as error:
        raise ReadError(f"{path}: this is no CSV file: {error}.") from None


def _csv_rows(path: Path, rows: Any, header: list[str]) -> Iterable[Columns]:
    number = 2
    while block := list(itertools.islice(rows, _ROWS)):
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
        columns = zip(*[row for _, row in numbered], strict=True)
        found = {}
        for name, cells in zip(header, columns, strict=True):
            numbers = jsonl.to_numbers(path, name, list(cells), where)
            if numbers is not None:
                found[name] = numbers
        yield found


def _of_events(path: Path) -> Columns:
    try:
        from tensorboard.backend.event_processing import event_accumulator
        from tensorboard.util import tensor_util
    except ImportError:
        raise ReadError(
            f"{path}: TensorBoard's reader is missing. Run: pip install"
            ' "optax_clipx[tensorboard]"'
        ) from None
    if path.is_dir():
        _only_run(path)
    everything = {event_accumulator.SCALARS: 0, event_accumulator.TENSORS: 0}
    events = event_accumulator.EventAccumulator(str(path), size_guidance=everything)
    series = {}
    try:
        events.Reload()
        for tag in events.Tags()["scalars"]:
            series[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["tensors"]:
            given = [(event.step, event.tensor_proto) for event in events.Tensors(tag)]
            # By their shape: a tensor of a few bytes may fill all of the memory.
            if not all(_is_single(tensor) for _, tensor in given):
                continue
            points = [(step, tensor_util.make_ndarray(x)) for step, x in given]
            if all(value.dtype.kind in "fiu" for _, value in points):
                series[tag] = [(step, float(value.flat[0])) for step, value in points]
    except Exception as error:  # of TensorBoard or protobuf, which name no base class
        raise ReadError(
            f"{path}: the event files are broken: {type(error).__name__}: {error}"
        ) from None
    if not series:
        raise ReadError(f"{path}: there are no scalars in these event files.")
    steps = np.unique(np.concatenate([[s for s, _ in x] for x in series.values()]))
    columns = {STEP: steps.astype(np.float64)}
    for tag, points in series.items():
        if tag == STEP:
            continue
        columns[tag] = np.full(len(steps), np.nan)
        at = np.searchsorted(steps, [s for s, _ in points])
        columns[tag][at] = [value for _, value in points]
    return columns


def _is_single(tensor: Any) -> bool:
    return all(axis.size == 1 for axis in tensor.tensor_shape.dim)


def _only_run(path: Path) -> None:
    if list(path.glob("*tfevents*")):
        return
    runs = sorted({str(file.parent) for file in path.rglob("*tfevents*")})
    if not runs:
        raise ReadError(f"{path}: there are no TensorBoard event files in this folder.")
    shown = ", ".join(runs[:5]) + (", ..." if len(runs) > 5 else "")
    raise ReadError(
        f"{path}: expected the folder of one run, got a folder with {len(runs)} of"
        f" them. Name those that you want: {shown}."
    )


def step_name(path: Path, columns: Columns) -> str:
    """The column with the steps, as others call it."""
    by_lower = {name.lower(): name for name in reversed(columns)}
    for name in _STEP_NAMES:
        if name in by_lower:
            return by_lower[name]
    raise ReadError(no_column(path, STEP, columns, "--step NAME"))


def no_column(path: Any, what: str, columns: Iterable[str], mend: str) -> str:
    """The message for a column that is not there."""
    names = ", ".join(repr(name) for name in columns) or "none"
    return f"{path}: there is no column {what!r}. The columns are: {names}. Use {mend}."


def pick(columns: Columns, what: str, name: str | None = None, source: Any = "") -> str:
    """The name of the column that holds ``"norm"`` or the like.

    Taken is what is named; else ``clip/norm``, a column whose last part is what is
    wanted, or what others call it, if only one fits.
    """
    source = source or "this run"
    mend = "--norm NAME" if what == "norm" else "--column NAME"
    if name is not None:
        if name not in columns:
            raise ReadError(no_column(source, name, columns, mend))
        return name
    if f"clip/{what}" in columns:
        return f"clip/{what}"
    for kind in _USUAL.get(what, (what,)):
        fitting = [n for n in columns if n.lower().rsplit("/", 1)[-1] == kind]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise ReadError(
                f"{source}: several columns may be the {what}: {', '.join(fitting)}."
                f" Choose one with {mend}."
            )
    raise ReadError(no_column(source, what, columns, mend))


def limits_beside(columns: Columns, norm: str) -> np.ndarray | None:
    """The limits that a column of norms was clipped with, if they were recorded."""
    name = f"{norm.removesuffix('norm')}threshold"
    if not norm.endswith("norm") or name not in columns:
        return None
    limits = np.asarray(columns[name], np.float64)
    return limits if np.isfinite(limits).any() else None


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
