"""What a tap hands its metrics to: a function, a History, or TensorBoard's writer."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .._trees.types import Scalar

Sink = Callable[[int, dict[str, Any]], object]


def as_function(sink: object) -> Sink:
    """The function of step and metrics that a sink stands for."""
    if sink is print:
        return _print_line
    if hasattr(sink, "add_scalar"):
        return lambda step, metrics: _write_scalars(sink, step, metrics)
    function = sink if callable(sink) else getattr(sink, "append", None)
    if not callable(function) or not _takes_step_and_metrics(function):
        raise TypeError(
            "Expected sink to be a function of step and metrics, a History, print, or"
            f" TensorBoard's SummaryWriter, got sink={sink!r}. Pass for example"
            " sink=lambda step, metrics: print(step, metrics['clip/norm'])."
        )
    return function


def name_of(sink: object) -> str:
    """What a sink is called in a warning."""
    named = getattr(sink, "__qualname__", None)
    return repr(named if named is not None else type(sink).__name__)


def _takes_step_and_metrics(function: Any) -> bool:
    try:
        signature = inspect.signature(function)
    except ValueError:  # built in, and says nothing
        return True
    try:
        signature.bind(0, {})
    except TypeError:
        return False
    return True


def _print_line(step: int, metrics: Mapping[str, Scalar]) -> None:
    shown = [f"{name}={_short(value)}" for name, value in metrics.items()]
    print(f"step {step}:", *shown, flush=True)


def _short(value: Scalar) -> str:
    if isinstance(value, np.ndarray):
        return np.array2string(value, precision=4, separator=",")
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write_scalars(writer: Any, step: int, metrics: Mapping[str, Scalar]) -> None:
    """Writes one curve a number, and one a seed where there are several."""
    for name, value in metrics.items():
        for place, number in np.ndenumerate(value):
            writer.add_scalar("/".join((name, *map(str, place))), number, step)
