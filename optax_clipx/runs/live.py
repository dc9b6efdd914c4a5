"""A live view of runs in the terminal, drawn by rich."""

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import jsonl, readers
from .drawing import means, norms_of
from .escaping import printable
from .table import STEP, Columns, Table

_BARS = " ▁▂▃▄▅▆▇█"
_RECENT = 100  # steps


class Follower:
    """A file that grows: only what is new is read, where lines tell what is new."""

    def __init__(self, path: str | Path, step: str | None = None) -> None:
        self.path = Path(path)
        self.step = step
        self.seen: Any = None
        self._begin()

    def _begin(self) -> None:
        self.table, self.offset, self.lines, self.last = Table(), 0, 0, b""

    def look(self) -> Columns:
        """The columns as of now."""
        if not self.path.exists():
            raise jsonl.ReadError(f"{self.path}: there is no such file or folder.")
        if self._is_jsonl():
            self._read_new_lines()
        else:
            files = [self.path, *self.path.rglob("*")]
            state = {file: file.stat().st_mtime_ns for file in files}
            if state != self.seen:
                self.table, self.seen = readers.read(self.path, self.step), state
        return self.table.arrays()

    def _is_jsonl(self) -> bool:
        if self.path.is_dir() or "tfevents" in self.path.name:
            return False
        with self.path.open("rb") as file:
            return file.read(1024).lstrip()[:1] in (b"{", b"")

    def _was_cut(self) -> bool:
        """Whether the last line is no longer there, as in a run begun again."""
        with self.path.open("rb") as file:
            file.seek(self.offset - len(self.last))
            return file.read(len(self.last)) != self.last

    def _read_new_lines(self) -> None:
        if self._was_cut():
            self._begin()
        before = self.lines
        for number, lines, cut in jsonl.blocks(self.path, self.offset):
            if cut:  # still being written
                return
            columns = jsonl.decode(self.path, before + number, lines, cut)
            self.lines = before + number + len(lines)
            self.offset += sum(len(line) + 1 for line in lines)
            self.last = lines[-1] + b"\n"
            if columns is None:
                continue
            if self.step is None:
                self.step = readers.step_name(self.path, columns)
            if self.step not in columns:
                raise jsonl.ReadError(
                    readers.no_column(self.path, self.step, columns, "--step NAME")
                )
            steps = columns[self.step]
            others = {n: x for n, x in columns.items() if n not in (self.step, STEP)}
            columns = {STEP: steps, **others}
            self.table.forget_from(float(columns[STEP].min()))
            self.table.extend(columns)


def follow(
    runs: Mapping[str, str],
    norm: str | None,
    step: str | None,
    every: float | int,
    once: bool,
) -> None:
    """Shows some runs until interrupted, or once."""
    try:
        from rich.console import Console, Group
        from rich.live import Live
    except ImportError:
        raise ImportError(
            'rich is missing. Run: pip install "optax_clipx[watch]"'
        ) from None
    followers = {label: Follower(path, step) for label, path in runs.items()}

    def view() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a last line may well be half written
            shown = [
                _panel(label, follower.path, follower.look(), norm)
                for label, follower in followers.items()
            ]
        return Group(*shown)

    console = Console()
    if once:
        console.print(view())
        return
    with Live(view(), console=console, auto_refresh=False, screen=False) as live:
        while True:
            time.sleep(every)
            live.update(view(), refresh=True)


def _panel(label: str, path: Path, columns: Columns, norm: str | None) -> Any:
    from rich.panel import Panel
    from rich.table import Table as Grid
    from rich.text import Text  # a str would be read as markup

    title = Text(printable(label))
    if not len(columns[STEP]):
        return Panel("nothing is recorded yet", title=title, title_align="left")
    name = readers.pick(columns, "norm", norm, path)
    seen = norms_of(columns, name, None)
    recent = slice(-_RECENT, None)
    grid = Grid.grid(padding=(0, 2))
    grid.add_row("step", f"{seen.steps[-1]:,}")
    grid.add_row("norm", f"{seen.norms[-1]:.4g}  {sparkline(seen.norms)}")
    if seen.limits is not None and seen.clipped is not None:
        grid.add_row("limit", f"{seen.limits[-1]:.4g}")
        share = np.mean(seen.clipped[recent])
        grid.add_row("clipped", f"{share:.1%} of the last {_RECENT}, {seen.rate:.1%}"
                     " of all steps")  # fmt: skip
    lost = int(np.sum(~np.isfinite(seen.norms)))
    if lost:
        grid.add_row("[bold red]not finite", f"{lost} norms")
    losses = [n for n in columns if n.lower().rsplit("/", 1)[-1] == "loss"]
    for loss in losses[:3]:
        grid.add_row(
            Text(printable(loss)),
            f"{columns[loss][-1]:.4g}  {sparkline(columns[loss])}",
        )
    return Panel(grid, title=title, title_align="left")


def sparkline(values: np.ndarray, width: int = 60) -> str:
    """Values as bars of text, by their logarithm if they are positive."""
    values = np.where(np.isfinite(values), values, np.nan)
    if np.nanmin(values, initial=np.inf) > 0:
        values = np.log(values)
    shown, _ = means(values, width)
    finite = shown[np.isfinite(shown)]
    if not len(finite):
        return ""
    low, high = finite.min(), finite.max()
    levels = np.where(np.isfinite(shown), shown, low) - low
    heights = 1 + np.round(levels / max(high - low, 1e-12) * (len(_BARS) - 2))
    bars = np.where(np.isfinite(shown), heights, 0).astype(int)
    return "".join(_BARS[bar] for bar in bars)
