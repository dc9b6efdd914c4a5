"""`History`: what happened in each step of a run, in memory and on disk."""

import os
import secrets
import stat
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from . import csv_files, jsonl, readers
from .alarm import Listener
from .findings import Finding
from .missing import missing
from .naming import counted
from .overview import overview
from .overwriting import may_write
from .table import STEP, Columns, Table, present

_NO_METRICS: Mapping[str, Any] = MappingProxyType({})


class History:
    """Records the metrics of a run step by step, in memory and in a file.

    The file has one JSON object per line. ``append`` does not wait for the device. Each
    call writes the record of the call before it, because the numbers of that record are
    already computed. If a run is killed, you can load its file, but the last one or two
    records are missing. Call ``flush`` before you save a checkpoint. The file then has
    all records up to the checkpoint.

    Attributes:
        path: the file that is written, or ``None``.

    Args:
        path: the file to write. Without a path, the history is only in memory.
        resume: continue a file that exists. **If you record a step again, all old
            records from this step on are removed**, in memory and in the file. A run
            that was resumed at step 100 then has the same file as a run without
            interruption. The removed records are added to another file. Its name is
            the path with ``.dropped`` at the end, such as ``run.jsonl.dropped``. With
            ``resume=False``, the same records are removed, but you also get a warning.
        force: overwrite a file that exists. Nothing in this package overwrites a file
            without ``force=True``, or ``--force`` on the command line.
        on_finding: a function, such as ``print``. It is called with each new
            :class:`Finding` of severity ``"warning"`` or ``"error"``.
            :func:`diagnose` checks the last 2,000 records after every 100 records. It
            also checks them as soon as a number is not finite, and in ``close``. If
            your function raises an error, ``append`` or ``close`` raises this error
            after the step is recorded.

    Raises:
        FileExistsError: if the file is not empty, and both ``resume`` and ``force`` are
            false.
        ValueError: if the file to continue cannot be read, if it was not written by
            ``History(path)``, or if both ``resume`` and ``force`` are true.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.clip_by_global_norm(1.0)
        >>> state = clipper.init(jnp.zeros(2))
        >>> history = clipx.History()
        >>> for step in range(3):
        ...     _, state = clipper.update(jnp.array([3.0, step]), state)
        ...     history.append(step, clipx.metrics(state))
        >>> history["clip/norm"].round(2).tolist()
        [3.0, 3.16, 3.61]

    References:
        The file format is JSON Lines: https://jsonlines.org.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        resume: bool = False,
        force: bool = False,
        on_finding: Callable[[Finding], object] | None = None,
    ) -> None:
        if resume and force:
            raise ValueError(
                "Expected resume=True, which goes on with a file, or force=True, which"
                " overwrites it, got both."
            )
        self.path: Path | None = None if path is None else Path(path)
        table, file = Table(), None
        if self.path is not None:
            filled = self.path.exists() and self.path.stat().st_size > 0
            if filled and resume:
                jsonl.check_is_ours(self.path)
                table = readers.read(self.path, STEP)
                jsonl.end_last_line(self.path)
            elif filled:
                may_write(self.path, force, "resume=True to go on with it,")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("ab", buffering=0)
            if force:
                file.truncate(0)
        self._writer = _Writer(table, file, resume)
        self._listener = None if on_finding is None else Listener(on_finding)
        # Writes the last record at the end of the program, too.
        self._close = weakref.finalize(self, self._writer.close)

    def append(self, step: Any, metrics: Any = _NO_METRICS, **columns: Any) -> None:
        """Records a step, or a block of steps.

        You can pass numbers in a dict, as keyword arguments, or both:
        ``append(step, clipx.metrics(opt_state), loss=loss)``.

        You can record one step in several calls, until you record the next step. For
        example, record first its loss and then its validation loss. A value that you do
        not record in a step is missing in this step. A missing value is not the same as
        a recorded NaN.

        Args:
            step: the number of the step. For a block of steps, pass a range or an array
                of numbers.
            metrics: a dict from names to numbers. It can contain the result of
                :func:`metrics` and all other numbers that you want to record, such as
                the loss. ``None`` stands for a missing value. You can also pass
                :class:`ClipMetrics`. Its fields are recorded as ``"clip/norm"`` and so
                on. For a block, pass arrays with one entry per step, such as
                ``jax.lax.scan`` returns. Seeds under ``jax.vmap`` are separate runs:
                use a separate ``History`` for each seed.
            **columns: more numbers, each with the name of its column, such as
                ``loss=loss``.

        Raises:
            ValueError: if a value is not a number, if its shape does not fit ``step``,
                if steps are not whole numbers, if the steps of a block do not rise, if
                a metric is called ``"step"``, if a name is in ``metrics`` and is also
                a keyword argument, if the history is closed, or if this process was
                forked from the process that opened the file.
            TypeError: if ``append`` is called inside of ``jax.jit``, if ``metrics`` is
                not a dict, or if there are only steps.
        """
        metrics = _columns(metrics, columns)
        if isinstance(step, range | list | tuple):
            step = np.asarray(step)
        record = {STEP: _numbers(STEP, step)}
        _check_shape(STEP, np.shape(step), np.shape(step))
        for name, value in metrics.items():
            if value is not None:
                record[name] = _numbers(name, value)
                _check_shape(name, np.shape(value), np.shape(step))
        self._writer.put(record)
        if self._listener is not None:
            self._listener.hear(self._writer.table)

    def flush(self) -> None:
        """Writes all records to the file. It waits until their numbers are computed."""
        self._writer.write()

    def close(self) -> None:
        """Writes the last record, closes the file, and looks for findings."""
        self._close()
        if self._listener is not None:
            self._listener.hear(self._writer.table, at_end=True)

    def __enter__(self) -> "History":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._table)

    def __repr__(self) -> str:
        # Neither writes the last record nor waits for its numbers.
        return f"<History{self._where()}: {_few(self._writer.names())}>"

    def __str__(self) -> str:
        columns, steps = self.columns, counted(len(self), "step")
        head = f"<History of {steps}{self._where()}: {_few(columns)}>"
        return "\n".join([head, *overview(columns)])

    def _where(self) -> str:
        return "" if self.path is None else f" in {self.path}"

    def __getitem__(self, name: str) -> np.ndarray:
        columns = self.columns
        if name not in columns:
            raise KeyError(f"{name!r} is none of the columns {list(columns)}.")
        return columns[name]

    @property
    def columns(self) -> Columns:
        """A dict from names to copies of the columns. A missing value is NaN.

        :meth:`recorded` says which values were recorded and which are missing.
        """
        return self._table.arrays()

    def recorded(self, name: str) -> np.ndarray:
        """Says in which steps a column was recorded.

        Args:
            name: the name of the column.

        Returns:
            An array of booleans, one for each of ``steps``. It is ``True`` where a
            value was recorded, even if this value is NaN.

        Raises:
            KeyError: if there is no such column.

        Example:
            >>> import optax_clipx as clipx
            >>> history = clipx.History()
            >>> history.append(0, {"loss": 1.0})
            >>> history.append(1, {"loss": float("nan"), "val_loss": 2.0})
            >>> history.recorded("val_loss").tolist()
            [False, True]
            >>> history.recorded("loss").tolist()
            [True, True]

        References:
            Rubin, Inference and missing data, Biometrika, 1976.
        """
        return present(self[name])

    @property
    def steps(self) -> np.ndarray:
        """The numbers of the steps, in rising order."""
        return self.columns[STEP]

    @property
    def _table(self) -> Table:
        self._writer.write()
        return self._writer.table

    def _newest_before(self, step: int, names: Sequence[str], count: int) -> Columns:
        """The last records before a step; does not wait for those from it on."""
        pending = self._writer.pending
        if pending is not None and np.min(pending[STEP]) < step:
            self._writer.write()
        return self._writer.table.newest_before(step, names, count)

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Writes all records to a CSV or JSONL file.

        The format is CSV if the name of the file ends in ``.csv``, and otherwise JSONL.
        A missing value is an empty cell in CSV. In JSONL, the line of the step does not
        have the name of this value. A file that is overwritten keeps its permissions.
        If the path is a symbolic link, the target of the link is overwritten.

        Args:
            path: the path of the file.
            force: overwrite an existing file.

        Returns:
            The path.

        Raises:
            FileExistsError: if the file exists and ``force`` is false.
        """
        path = Path(path)
        may_write(path, force)
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = self.columns
        as_csv = path.suffix.lower() == ".csv"
        parts = csv_files.encode(columns) if as_csv else jsonl.encode_in_parts(columns)
        _replace(path, parts)
        return path

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, step: str | None = None
    ) -> "History":
        """Reads a run that this package or another logger has written.

        It reads these formats:

        - JSONL and CSV of ``History``
        - ``metrics.csv`` of Lightning, and the file of ``CSVLogger`` of Keras
        - ``trainer_state.json`` of Hugging Face
        - runs of W&B that were exported as CSV
        - JSONL of MaxText and Levanter
        - event files of TensorBoard

        Rows with the same step become one row. If their values in a column differ, the
        last value is used. If a run was restarted and repeats some steps, the later
        records replace the earlier records.

        Args:
            path: a file of one of these formats, or a folder with one such file. A
                folder can also have several event files.
            step: the column with the step, if it has an unusual name.

        Returns:
            The history, in memory. If you append to it, the file does not change.

        Raises:
            ValueError: if the file cannot be read, or if several runs are mixed in it.
                If a line cannot be read, the message names this line.
        """
        history = cls()
        history._writer.table = readers.read(Path(path), step)
        return history

    def to_pandas(self) -> Any:
        """Returns a ``pandas.DataFrame`` with the steps as its index.

        A column with missing values has the dtype ``Float64`` of pandas. In such a
        column, a missing value is ``<NA>``, and a recorded NaN stays NaN. ``dropna``
        drops missing values.

        Raises:
            ImportError: if pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise ImportError(missing("pandas")) from None
        columns = self.columns
        steps = pd.Index(columns.pop(STEP), name=STEP)
        found = {}
        for name, values in columns.items():
            lacking = ~present(values)
            found[name] = (
                pd.arrays.FloatingArray(values, lacking) if lacking.any() else values
            )
        return pd.DataFrame(found, index=steps)

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        theme: str = "light",
        force: bool = False,
    ) -> Any:
        """Draws the run as :func:`optax_clipx.plotting.overview` does.

        Args:
            path: where to save the picture. The file ending, such as ``.png``, sets the
                format.
            theme: ``"light"`` or ``"dark"``.
            force: overwrite an existing file.

        Returns:
            The ``matplotlib.figure.Figure``.

        Raises:
            FileExistsError: if the file exists and ``force`` is false.
            ImportError: if matplotlib is not installed.
        """
        from . import plotting

        if path is not None:
            may_write(Path(path), force)
        figure = plotting.overview(self, theme=theme)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        return figure


def _columns(metrics: Any, columns: Mapping[str, Any]) -> Mapping[str, Any]:
    """Metrics and keyword arguments together, under the names of their columns."""
    if metrics is _NO_METRICS and not columns:
        raise TypeError(
            "Expected numbers beside the step, got none. Write history.append(step,"
            " optax_clipx.metrics(opt_state), loss=loss)."
        )
    if hasattr(metrics, "_asdict"):
        fields = metrics._asdict().items()
        metrics = {f"clip/{k}": v for k, v in fields if v is not None}
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"Expected metrics to be a dict or ClipMetrics, got"
            f" {type(metrics).__name__}. From an optimizer state take"
            " optax_clipx.metrics(opt_state)."
        )
    if STEP in metrics:
        raise ValueError("Expected metrics without 'step', which is given apart.")
    twice = [name for name in columns if name in metrics]
    if twice:
        raise ValueError(
            f"Expected each column once, got {twice[0]!r} in metrics and as a keyword"
            " argument. Leave one out, or give it another name."
        )
    return {**metrics, **columns}


def _numbers(name: str, value: Any) -> Any:
    """Numbers as they are now, or still being computed; no text."""
    if type(value).__name__.endswith("Tracer"):
        raise TypeError(
            f"Expected numbers, got the traced {name!r}. Return the metrics"
            " from the jitted function, and append them outside of it."
        )
    try:
        if hasattr(value, "copy_to_host_async"):
            if np.dtype(value.dtype).kind == "c":
                raise TypeError
            np.zeros(0, value.dtype).astype(np.float64)
            value.copy_to_host_async()
            return value
        numbers = np.array(value)  # a copy, whatever becomes of a buffer
        return numbers if numbers.dtype.kind in "fiub" else _converted(numbers)
    except (TypeError, ValueError, OverflowError):
        shown = " ".join(repr(value).split())
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise ValueError(
            f"Expected numbers, got {shown} for {name!r}. Leave it out, or pass a"
            " number."
        ) from None


def _converted(values: np.ndarray) -> np.ndarray:
    """Narrow numbers and objects such as decimals; not text, even if it has digits."""
    if values.dtype.kind not in "OV" or any(isinstance(x, str) for x in values.flat):
        raise TypeError
    return values.astype(np.float64)


def _check_shape(name: str, got: tuple[int, ...], of_step: tuple[int, ...]) -> None:
    if got == of_step and len(of_step) <= 1:
        return
    block = (
        "For a block of steps pass all their numbers: append(range(0, 100), stacked)."
    )
    seeds = (
        f"If these are {got[-1] if got else 0} seeds (jax.vmap), record each as a run"
        " of its own: for i, history in enumerate(histories): history.append"
    )
    mend = block
    if len(of_step) == 1 and got[:-1] == of_step:
        mend = f"{seeds}(steps, {{n: x[:, i] for n, x in metrics.items()}})."
    elif not of_step and len(got) == 1:
        mend = f"{block} {seeds}(step, {{n: x[i] for n, x in metrics.items()}})."
    raise ValueError(
        f"Expected {name!r} of shape {of_step} as step has, got {got}. {mend}"
    )


def _replace(path: Path, parts: Any) -> None:
    """Writes a file in place of another: no reader sees half, and a failure neither."""
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if target.exists():
                os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
            for part in parts:
                file.write(part)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _few(names: Iterable[str]) -> str:
    shown = [name for name in names if name != STEP]
    return ", ".join(shown[:5] + ["..."] * (len(shown) > 5)) or "empty"


class _Writer:
    """The table and the file, one record behind."""

    def __init__(self, table: Table, file: Any, resume: bool) -> None:
        self.table = table
        self.file = file
        self.resume = resume
        self.process = os.getpid()
        self.pending: dict[str, Any] | None = None
        self.closed = False

    def names(self) -> list[str]:
        """The columns, with those of the record that is not written yet."""
        return list(dict.fromkeys([*self.table.names(), *(self.pending or {})]))

    def put(self, record: dict[str, Any]) -> None:
        """Writes the record before, and keeps this one."""
        if self.closed:
            raise ValueError(
                "The history is closed. To go on with its file, open it again with"
                " History(path, resume=True)."
            )
        if self.file is not None and os.getpid() != self.process:
            raise ValueError(
                f"Expected a record from the process {self.process}, which opened"
                f" {self.file.name}, got one from {os.getpid()}, which was forked from"
                " it. Record to a History of its own."
            )
        _check_steps(record[STEP])
        self.write()
        self.pending = record

    def write(self) -> None:
        """Writes what is left. If the file takes nothing, it is still left."""
        before, self.pending = self.pending, None
        if before is None:
            return
        try:
            self._add(before)
        except OSError:
            self.pending = before
            raise

    def close(self) -> None:
        """Writes what is left and closes the file."""
        self.closed = True
        if os.getpid() != self.process:  # its parent writes what is pending
            return
        self.write()
        if self.file is not None:
            self.file.close()
            self.file = None

    def _add(self, record: dict[str, Any]) -> None:
        # First all is converted, then the file is written, then the table: whatever
        # fails, both have the same records.
        columns = {n: np.atleast_1d(np.asarray(x)) for n, x in record.items()}
        converted = {n: x.astype(np.float64) for n, x in columns.items()}
        steps = columns[STEP]
        if not len(steps):
            return
        _check_steps(steps)
        adds = self.table.adds_to_last(converted)
        again = not adds and steps[0] <= self.table.last_step
        # A process that was forked has the file in common with the one that writes it.
        file = self.file if os.getpid() == self.process else None
        if file is not None and again:
            jsonl.cut_from(file, int(steps[0]))
        dropped = self.table.forget_from(int(steps[0])) if again else 0
        if file is not None:
            jsonl.write_whole(file, jsonl.encode_in_parts(columns))
        if adds:
            self.table.add_to_last(converted)
        else:
            self.table.extend(converted)
        if dropped and not self.resume:
            warnings.warn(
                f"Step {steps[0]} was recorded before: {dropped} records from it on are"
                " dropped. Pass a step that rises over all epochs; or History(...,"
                " resume=True) if the run went back to a checkpoint.",
                stacklevel=5,
            )


def _check_steps(steps: Any) -> None:
    """Steps on the host are checked at once, those on a device when they are there."""
    if (
        isinstance(steps, np.ndarray)
        and steps.size
        and (steps.dtype.kind not in "iu" or np.any(np.diff(np.atleast_1d(steps)) <= 0))
    ):
        raise ValueError(f"Expected whole steps that rise, got {steps}.")
