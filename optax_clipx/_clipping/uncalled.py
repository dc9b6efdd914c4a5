"""Functions that make a transformation, passed on in its place without a call."""

import inspect
from collections.abc import Iterable
from typing import Any

import optax


def check_transformation(value: object, name: str) -> None:
    """Refuses at construction what is no transformation."""
    if inspect.isroutine(value):
        raise TypeError(
            f"Expected {name} to be an optax transformation, got the function"
            f" {value.__name__}. Call it first: {value.__name__}(...)."
        )
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise TypeError(
            f"Expected {name} to be an optax transformation, got {value!r}."
        )


def explain_missing_calls(values: Iterable[Any]) -> None:
    """Lets optax's combinators say that one of these functions was not called.

    optax.chain asks its arguments for `init` and `update`, which a function lacks.
    """
    for value in values:
        annotations = getattr(value, "__annotations__", {})
        if annotations.get("return") is optax.GradientTransformationExtraArgs:
            value.init = value.update = _refusal(value.__name__)


def _refusal(name: str) -> Any:
    def refuse(*args: object, **kwargs: object) -> Any:
        raise TypeError(
            f"Expected an optax transformation, got the function {name}. Call it first:"
            f" {name}(...)."
        )

    return refuse
