"""A live view of runs in the terminal, drawn by rich."""

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import jsonl, naming, readers
from .alarm import Alarm
from .drawing import means, norms_of
from .escaping import printable
from .findings import Finding, places
from .merging import NO_RESTARTS, one_row_a_step, restarts
from .missing import missing
from .signals import Names
from .table import STEP, Columns, Table, present

_BARS = " ▁▂▃▄▅▆▇█"
_RECENT = 100  # steps
_FINDINGS = 5  # that are shown


class Follower:
    """A file that grows: only what is new is read, where lines tell what is new."""

    def __init__(self, path: str | Path, step: str | None = None) -> None:
        self.path = Path(path)
        self.step = step
        self.seen: Any = None
        self._begin()

    def _begin(self) -> None:
        self.table, self.offset, self.lines, self.last = Table(), 0, 0, b""
        self.restarts = NO_RESTARTS

    def look(self) -> Columns:
        """The columns as of now; `restarts` then has where their steps went back."""
        path = readers.file_of_run(self.path)
        if _is_jsonl(path):
            self._read_new_lines(path)
            self.restarts = restarts(self.table)
            return one_row_a_step(path, self.table).arrays()
        files = [path, *path.rglob("*")]
        state = {file: file.stat().st_mtime_ns for file in files}
        if state != self.seen:
            rows, self.seen = readers.rows(path, self.step), state
            self.restarts = restarts(rows)
            self.table = one_row_a_step(path, rows)
        return self.table.arrays()

    def _was_cut(self, path: Path) -> bool:
        """Whether the last line is no longer there, as in a run begun again."""
        with path.open("rb") as file:
            file.seek(self.offset - len(self.last))
            return file.read(len(self.last)) != self.last

    def _read_new_lines(self, path: Path) -> None:
        if self._was_cut(path):
            self._begin()
        before, name = self.lines, self.step
        for number, lines, cut in jsonl.blocks(path, self.offset):
            if cut:  # still being written
                return
            columns = jsonl.decode(path, before + number, lines, cut)
            self.lines = before + number + len(lines)
            self.offset += sum(len(line) + 1 for line in lines)
            self.last = lines[-1] + b"\n"
            if columns:
                name = readers.add_rows(path, self.table, columns, name, not self.step)


def _is_jsonl(path: Path) -> bool:
    if path.is_dir() or "tfevents" in path.name:
        return False
    with path.open("rb") as file:
        head = file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")
    return head[:1] in (b"{", b"") and not readers.is_document(path)


def follow(
    runs: Mapping[str, str],
    norm: str | None,
    step: str | None,
    every: float | int,
    once: bool,
) -> None:
    """Shows some runs until interrupted; once if the output is no terminal."""
    try:
        from rich.console import Console, Group
        from rich.live import Live
    except ImportError:
        raise ImportError(missing("rich")) from None
    followers = {label: Follower(path, step) for label, path in runs.items()}
    alarms = {label: Alarm(Names(norm=norm)) for label in runs}

    def view() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a last line may well be half written
            shown = [
                _panel(label, follower, norm, alarms[label])
                for label, follower in followers.items()
            ]
        return Group(*shown)

    console = Console()
    if once or not console.is_terminal:
        console.print(view())
        return
    with Live(view(), console=console, auto_refresh=False, screen=False) as live:
        while True:
            time.sleep(every)
            live.update(view(), refresh=True)


def _panel(label: str, follower: Follower, norm: str | None, alarm: Alarm) -> Any:
    from rich.panel import Panel
    from rich.table import Table as Grid
    from rich.text import Text  # a str would be read as markup

    columns, title = follower.look(), Text(printable(label))
    if not len(columns[STEP]):
        return Panel("nothing is recorded yet", title=title, title_align="left")
    columns = naming.with_whole_norm(columns)
    name = naming.pick(columns, "norm", norm, follower.path)
    seen = norms_of(columns, name, None)
    grid = Grid.grid(padding=(0, 2))
    grid.add_row("step", f"{columns[STEP][-1]:,}")
    grid.add_row("norm", f"{seen.norms[-1]:.4g}  {sparkline(seen.norms)}")
    if seen.limits is not None and seen.clipped is not None:
        grid.add_row("threshold", f"{seen.limits[-1]:.4g}")
        grid.add_row("clipped", _shares(seen.clipped))
    if seen.skipped is not None:
        grid.add_row("skipped", _shares(seen.skipped))
    lost = int(np.sum(~np.isfinite(seen.norms)))
    if lost:
        grid.add_row("[bold red]non-finite", naming.counted(lost, "norm"))
    losses = [n for n in columns if n.lower().rsplit("/", 1)[-1] == "loss"]
    for loss in losses[:3]:
        values = columns[loss][present(columns[loss])]
        if len(values):
            shown = f"{values[-1]:.4g}  {sparkline(values)}"
            grid.add_row(Text(printable(loss)), shown)
    alarm.follow(columns, follower.restarts)
    for finding in alarm.found[: -_FINDINGS - 1 : -1]:  # the newest first
        style = {"error": "bold red", "warning": "yellow"}[finding.severity]
        grid.add_row(Text(finding.severity, style), Text(_line(finding)))
    return Panel(grid, title=title, title_align="left")


def _line(finding: Finding) -> str:
    """A finding in one line."""
    said = f"{finding.code} at {places(finding)}: {finding.sentence}"
    return printable(said)


def _shares(flags: np.ndarray) -> str:
    """Of the last steps, and of all."""
    recent = flags[-_RECENT:]
    shares = f"{recent.mean():.1%} of the last {len(recent)}, {flags.mean():.1%}"
    return f"{shares} of all steps"


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
