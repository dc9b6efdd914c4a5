"""TensorBoard's event files: each tag has steps of its own."""

from pathlib import Path
from typing import Any

import numpy as np

from .jsonl import ReadError
from .missing import missing
from .table import MISSING, STEP, Columns


def read(path: Path) -> Columns:
    """The scalars of one run; a tag is missing where it has no event."""
    try:
        from tensorboard.backend.event_processing import event_accumulator
        from tensorboard.util import tensor_util
    except ImportError:
        raise ReadError(f"{path}: {missing('tensorboard')}") from None
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
    return _columns(series)


def _columns(series: dict[str, list[tuple[int, float]]]) -> Columns:
    steps = np.unique(np.concatenate([[s for s, _ in x] for x in series.values()]))
    columns = {STEP: steps.astype(np.float64)}
    for tag, points in series.items():
        if tag == STEP:
            continue
        columns[tag] = np.full(len(steps), MISSING)
        at = np.searchsorted(steps, [s for s, _ in points])
        columns[tag][at] = [value for _, value in points]
    return columns


def _is_single(tensor: Any) -> bool:
    return all(axis.size == 1 for axis in tensor.tensor_shape.dim)
