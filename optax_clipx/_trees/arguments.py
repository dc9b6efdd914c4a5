"""Checks of arguments: errors that name the value and what was expected."""

import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from .types import Scalar

Schedule = Callable[[Any], Any]  # from the number of updates to a threshold
Limit = float | np.ndarray | jax.Array | Schedule | PyTree  # or a prefix of these
AxisNames = str | Iterable[str] | None
Specs = PartitionSpec | PyTree | None  # or a prefix of these

LARGEST_COUNT = 2**31 - 1


def check_choice(value: object, name: str, choices: Sequence[str]) -> None:
    """Refuses what is none of some strings."""
    if isinstance(value, jax.Array):
        raise TypeError(static(name, value))
    if value not in choices:
        raise ValueError(
            f"Expected {name} to be one of {tuple(choices)}, got {value!r}."
        )


def check_count(value: Any, name: str, least: int = 1) -> None:
    """Refuses what is no count of steps; a traced one passes."""
    if isinstance(value, jax.core.Tracer):
        return
    if not _is_number(value):
        raise TypeError(f"Expected {name} to be a whole number, got {name}={value!r}.")
    if jnp.ndim(value) != 0 or value % 1 != 0:
        raise ValueError(f"Expected {name} to be a whole number, got {name}={value!r}.")
    if value < least:
        raise ValueError(f"Expected {name} >= {least}, got {name}={value!r}.")
    if value > LARGEST_COUNT:
        raise ValueError(
            f"Expected {name} <= {LARGEST_COUNT}, since steps are counted in int32, got"
            f" {name}={value!r}. To wait for ever pass that number."
        )


def whole_numbers(value: object) -> tuple[int, ...]:
    """A number or several, of Python, NumPy or a list, as a tuple; else a TypeError."""
    listed: Any = value.tolist() if isinstance(value, np.ndarray) else value
    several = isinstance(listed, tuple | list)
    return tuple(map(operator.index, listed if several else (listed,)))


def check_static_count(value: object, name: str, least: int = 1) -> None:
    """Refuses what cannot be the size of an array."""
    if isinstance(value, jax.Array):
        raise TypeError(static(name, value))
    check_count(value, name, least)
    if not isinstance(value, int | np.integer):
        raise TypeError(f"Expected {name} to be an int, got {name}={value!r}.")


def check_static_number(value: object, name: str) -> None:
    """Refuses what is no Python number."""
    if isinstance(value, jax.Array):
        raise TypeError(static(name, value))
    if not _is_number(value) or isinstance(value, np.ndarray):
        raise TypeError(f"Expected {name} to be a number, got {name}={value!r}.")


def check_decay(value: object, name: str, *, one: bool = False) -> None:
    """Refuses a decay outside of 0 to below 1; at 1 nothing would ever enter.

    With `one`, 1 is allowed, but not where it may have been rounded to: in bfloat16
    0.999 is 1.
    """
    check_between(value, name, 0, 1)
    if isinstance(value, jax.core.Tracer) or not _too_high(value, one):
        return
    hint = ""
    if _is_narrow(value):
        hint = (
            f" In {value.dtype} numbers near 1 are rounded to 1: under"
            " optax.inject_hyperparams pass hyperparam_dtype=jnp.float32."
        )
    raise ValueError(f"Expected 0 <= {name} < 1, got {name}={value!r}.{hint}")


def out_of_range(*decays: object, one: bool = False) -> Any:
    """Whether a traced decay is one that `check_decay` refuses; False if none is."""
    found: Any = False
    for value in decays:
        if isinstance(value, jax.core.Tracer):
            found = found | ~(value >= 0) | _too_high(value, one)
    return found


def _too_high(value: Any, one: bool) -> Any:
    return value > 1 if one and not _is_narrow(value) else value >= 1


def _is_narrow(value: object) -> TypeGuard[jax.Array]:
    return isinstance(value, jax.Array | np.generic | np.ndarray) and (
        jnp.issubdtype(value.dtype, jnp.floating) and jnp.finfo(value.dtype).bits < 32
    )


def check_between(value: object, name: str, low: int, high: int | float) -> None:
    """Refuses a number outside of an interval; a traced one passes."""
    if isinstance(value, jax.core.Tracer):
        return
    if not _is_number(value) or jnp.ndim(value) != 0:
        raise TypeError(f"Expected {name} to be a number, got {value!r}.")
    _check_size(value, name)
    if not low <= value <= high:
        raise ValueError(f"Expected {low} <= {name} <= {high}, got {name}={value!r}.")


def _is_number(value: object) -> TypeGuard[Scalar]:
    number = isinstance(value, int | float | np.number | np.ndarray | jax.Array)
    return number and not isinstance(value, bool)


def static(name: str, value: object) -> str:
    """The message for an argument that may not be an array."""
    return (
        f"Expected a static {name}, got the array {value}. Under"
        f" optax.inject_hyperparams pass static_args={name!r}."
    )


def as_float(value: object) -> Any:
    """A Python int as a float: as an array it would have to fit int32."""
    return float(value) if type(value) is int else value


def _check_size(value: object, name: str) -> None:
    """Refuses an int that is larger than any float."""
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(
            f"Expected {name} below {sys.float_info.max:.2g}, got an int of"
            f" {value.bit_length()} bits. Pass float('inf') if that is meant."
        )


def is_limit(value: object) -> bool:
    """Whether this is one threshold: a number, an array or a schedule."""
    return callable(value) or isinstance(
        value, int | float | np.ndarray | np.generic | jax.Array
    )


def check_limit(value: Any, name: str, *, signed: bool = False) -> None:
    """Refuses at construction what cannot be a threshold."""
    if callable(value):
        return
    check_number(value, name)
    if isinstance(value, jax.core.Tracer):
        return
    _check_size(value, name)
    if value != value:
        raise ValueError(f"Expected {name} to be a number, got {name}={value}.")
    if not signed and value < 0:
        raise ValueError(f"Expected {name} >= 0, got {name}={value}.")


def check_eps(value: object) -> None:
    """Refuses what cannot be added to a norm."""
    if callable(value):
        raise TypeError(
            f"Expected eps to be a number or a scalar array, got {value!r}."
        )
    check_limit(value, "eps")


def check_number(value: Any, name: str) -> None:
    """Refuses what is no real scalar."""
    if isinstance(value, bool) or not is_limit(value):
        raise TypeError(
            f"Expected {name} to be a number, a scalar array or an optax schedule, got"
            f" {value!r}."
        )
    # NumPy's, since JAX 0.7's makes an int32 of an integer, which may be too large.
    if np.iscomplexobj(value):
        raise TypeError(f"Expected a real {name}, got {value!r}.")
    if np.ndim(value) != 0:
        raise ValueError(
            f"Expected {name} to be one number, got an array of shape"
            f" {np.shape(value)}. A clipper takes the threshold when it is made, and"
            " the gradients in update: optax.chain(clipper(1.0), optimizer). To clip"
            " one tree of gradients, use optax_clipx.functional. If each leaf has its"
            " own threshold, pass a tree with one number for each leaf."
        )
