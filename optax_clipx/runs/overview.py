"""A few lines about a run: its norms, how often they were clipped, and its loss."""

import numpy as np

from . import naming
from .compression import is_compressed
from .drawing import norms_of
from .jsonl import ReadError
from .table import Columns, present


def overview(columns: Columns) -> list[str]:
    """What `print(history)` shows of the columns that it recognizes."""
    return [*_norms(columns), *_loss(columns)]


def _norms(columns: Columns) -> list[str]:
    name = _name(columns, "norm")
    if name is None:
        return []
    seen = norms_of(columns, name, None)
    finite = seen.norms[np.isfinite(seen.norms)]
    lines = []
    if len(finite):
        lines.append(
            f"{name}: median {np.median(finite):.4g}, largest {finite.max():.4g}"
        )
    if seen.rate is not None:
        lines.append(f"clipped: {seen.rate:.1%} of the steps")
    scale = f"{name.removesuffix('norm')}scale"
    if is_compressed(columns, name) and scale in columns:
        scales = np.asarray(columns[scale], np.float64)
        scaled = float(np.mean(scales[present(scales)] < 1))
        lines.append(f"scaled down by auto_clip: {scaled:.1%} of the steps")
    if seen.skip_rate is not None:
        lines.append(f"skipped: {seen.skip_rate:.1%} of the steps")
    return lines


def _loss(columns: Columns) -> list[str]:
    name = _name(columns, "loss")
    if name is None:
        return []
    values = np.asarray(columns[name], np.float64)
    values = values[present(values)]
    if not len(values):
        return []
    return [f"{name}: first recorded {values[0]:.4g}, last recorded {values[-1]:.4g}"]


def _name(columns: Columns, what: str) -> str | None:
    try:
        return naming.pick(columns, what)
    except ReadError:
        return None
