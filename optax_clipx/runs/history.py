"""`History`: what happened in each step of a run, in memory and on disk."""

import os
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from . import jsonl, readers
from .table import STEP, Columns, Table


class History:
    """The metrics of a run, step by step; on disk as it goes.

    A file has one JSON object a line. ``append`` writes what it was given the time
    before: the numbers of the last step are still being computed, and are only asked
    for when the next step has been sent to the device. A killed run so leaves a file
    that loads, without its last record or two; ``flush`` before a checkpoint is saved,
    and none is missing that the checkpoint has.

    Attributes:
        path: the file that is written, or ``None``.

    Args:
        path: a file to write to as it goes; without it the history is in memory only.
        resume: go on with a file that is there. **Recording a step drops every record
            from that step on**, in memory and in the file: a run that went on from
            step 100 of a checkpoint leaves the file of one that was never interrupted.
            What is dropped is added to a file beside it, ``run.jsonl.dropped``. Without
            ``resume`` this comes with a warning.

    Raises:
        FileExistsError: if the file has something in it and ``resume`` is false.
        ValueError: if a file to go on with cannot be read, or is not one that
            ``History(path)`` wrote.

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
        One JSON object a line: https://jsonlines.org.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, resume: bool = False
    ) -> None:
        self.path: Path | None = None if path is None else Path(path)
        table, file = Table(), None
        if self.path is not None:
            if self.path.exists() and self.path.stat().st_size:
                if not resume:
                    raise FileExistsError(
                        f"{self.path} has something in it already. Pass another path,"
                        " resume=True to go on with it, or delete it."
                    )
                table = readers.read(self.path)
                jsonl.end_last_line(self.path)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("ab")
        self._writer = _Writer(table, file, resume)
        # Writes the last record at the end of the program, too.
        self._close = weakref.finalize(self, self._writer.close)

    def append(self, step: Any, metrics: Any) -> None:
        """Records a step, or a block of steps.

        Args:
            step: the number of the step; or a range or array of numbers, for a block.
            metrics: from names to numbers, as from :func:`metrics`, with whatever else
                there is to record, such as the loss. Or :class:`ClipMetrics`, whose
                fields are then called ``"clip/norm"`` and so on. For a block, arrays
                with one entry a step, as ``jax.lax.scan`` stacks them.

        Raises:
            ValueError: if a shape does not go with ``step``, for metrics called
                ``"step"``, and after ``close``.
            TypeError: inside of ``jax.jit``, and for what is no dict.
        """
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
        if isinstance(step, range | list | tuple):
            step = np.asarray(step)
        record = {STEP: step, **metrics}
        for name, value in record.items():
            if type(value).__name__.endswith("Tracer"):
                raise TypeError(
                    f"Expected numbers, got the traced {name!r}. Return the metrics"
                    " from the jitted function, and append them outside of it."
                )
            if np.shape(value) != np.shape(step) or np.ndim(step) > 1:
                raise ValueError(
                    f"Expected {name!r} of shape {np.shape(step)} as step has, got"
                    f" {np.shape(value)}. For a block of steps pass all their numbers:"
                    " append(range(0, 100), stacked)."
                )
            if hasattr(value, "copy_to_host_async"):
                value.copy_to_host_async()
        self._writer.put(record)

    def flush(self) -> None:
        """Writes the last record, too, and so waits for its numbers."""
        self._writer.write()

    def close(self) -> None:
        """Writes the last record and closes the file."""
        self._close()

    def __enter__(self) -> "History":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, name: str) -> np.ndarray:
        columns = self.columns
        if name not in columns:
            raise KeyError(f"{name!r} is none of the columns {list(columns)}.")
        return columns[name]

    @property
    def columns(self) -> Columns:
        """A copy of every column by name; what was not recorded is NaN."""
        return self._table.arrays()

    @property
    def steps(self) -> np.ndarray:
        """The numbers of the steps, rising."""
        return self.columns[STEP]

    @property
    def _table(self) -> Table:
        self._writer.write()
        return self._writer.table

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Writes everything to a file: CSV if it is called so, else JSONL.

        Args:
            path: of the file.
            force: overwrite a file that is there.

        Returns:
            The path.

        Raises:
            FileExistsError: if there is such a file and ``force`` is false.
        """
        path = Path(path)
        if path.exists() and not force:
            raise FileExistsError(f"{path} is there already. Pass force=True.")
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = self.columns
        # A reader never sees half a file, nor is the old one lost on the way.
        descriptor, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}"
        )
        try:
            with os.fdopen(descriptor, "wb") as file:
                for part in _parts(columns, as_csv=path.suffix.lower() == ".csv"):
                    file.write(part)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        return path

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, step: str | None = None
    ) -> "History":
        """Reads a run: JSONL, CSV, or TensorBoard event files.

        Args:
            path: a file, or a folder with TensorBoard's event files in it.
            step: the column with the step, if it is not called so.

        Returns:
            The history, in memory; appending to it leaves the file as it is.

        Raises:
            ValueError: if the file cannot be read; the message has the line.
        """
        history = cls()
        history._writer.table = readers.read(Path(path), step)
        return history

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame`` with the steps as its index.

        Raises:
            ImportError: if pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise ImportError("pandas is missing. Run: pip install pandas") from None
        return pd.DataFrame(self.columns).set_index(STEP)

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        theme: str = "light",
        force: bool = True,
    ) -> Any:
        """Draws the run as :func:`optax_clipx.plotting.overview` does.

        Args:
            path: where to save the picture; the name says the format.
            theme: ``"light"`` or ``"dark"``.
            force: overwrite a file that is there.

        Returns:
            The ``matplotlib.figure.Figure``.

        Raises:
            FileExistsError: if there is such a file and ``force`` is false.
            ImportError: if matplotlib is not installed.
        """
        from . import plotting

        if path is not None and not force and Path(path).exists():
            raise FileExistsError(f"{path} is there already. Pass force=True.")
        figure = plotting.overview(self, theme=theme)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        return figure


class _Writer:
    """The table and the file, one record behind."""

    def __init__(self, table: Table, file: IO[bytes] | None, resume: bool) -> None:
        self.table = table
        self.file = file
        self.resume = resume
        self.pending: dict[str, Any] | None = None
        self.closed = False

    def put(self, record: dict[str, Any]) -> None:
        """Writes the record before, and keeps this one."""
        if self.closed:
            raise ValueError(
                "The history is closed. To go on with its file, open it again with"
                " History(path, resume=True)."
            )
        before, self.pending = self.pending, record
        if before is not None:
            self._add(before)

    def write(self) -> None:
        """Writes what is left."""
        before, self.pending = self.pending, None
        if before is not None:
            self._add(before)

    def close(self) -> None:
        """Writes what is left and closes the file."""
        self.closed = True
        self.write()
        if self.file is not None:
            self.file.close()
            self.file = None

    def _add(self, record: dict[str, Any]) -> None:
        columns = {n: np.atleast_1d(np.asarray(x)) for n, x in record.items()}
        steps = columns[STEP]
        if not len(steps):
            return
        if steps.dtype.kind not in "iu" or np.any(np.diff(steps) <= 0):
            raise ValueError(f"Expected whole steps that rise, got {record[STEP]}.")
        again = self.table.forget_from(int(steps[0]))
        if again and not self.resume:
            warnings.warn(
                f"Step {steps[0]} was recorded before: {again} records from it on are"
                " dropped. Pass a step that rises over all epochs; or History(...,"
                " resume=True) if the run went back to a checkpoint.",
                stacklevel=4,
            )
        if self.file is not None:
            if again:
                jsonl.cut_from(self.file, int(steps[0]))
            # Flushed at once: what the system has taken outlives the process.
            for part in _parts(columns, as_csv=False):
                self.file.write(part)
            self.file.flush()
        self.table.extend(columns)


def _parts(columns: Columns, *, as_csv: bool) -> Iterable[bytes]:
    """The content of a file, some thousand rows at a time."""
    if as_csv:
        yield (",".join(map(_quoted, columns)) + "\n").encode()
    for start in range(0, len(columns[STEP]), 10_000):
        part = {n: values[start : start + 10_000] for n, values in columns.items()}
        if not as_csv:
            yield jsonl.encode(part)
            continue
        rows = zip(*[values.tolist() for values in part.values()], strict=True)
        yield "".join(",".join(map(repr, row)) + "\n" for row in rows).encode()


def _quoted(name: str) -> str:
    special = any(character in name for character in ',"\r\n')
    return '"' + name.replace('"', '""') + '"' if special else name
