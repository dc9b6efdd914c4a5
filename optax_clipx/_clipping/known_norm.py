"""Norms that an outer transformation has measured, for a clipper first inside."""

# They travel beside the call, not as an extra argument of it, which optimizers such as
# optax.lbfgs refuse.

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import optax
from jax.tree_util import Partial
from jaxtyping import PyTree

from .._reductions.norms import Norms

Known = Norms | Partial | None  # a Partial makes it when it is called


class _Known(NamedTuple):
    arrays: list[Any]
    norms: Norms | Partial


_KNOWN: ContextVar[_Known | None] = ContextVar("optax_clipx_known_norm", default=None)


@contextlib.contextmanager
def known_norm(arrays: list[jax.Array], norms: Known) -> Iterator[None]:
    """While it lasts, the 2-norm of these very arrays need not be measured again.

    A `Partial` gives it when called: what nobody asks for is not computed.
    """
    token = _KNOWN.set(None if norms is None else _Known(arrays, norms))
    try:
        yield
    finally:
        _KNOWN.reset(token)


def find_norm(arrays: list[jax.Array]) -> Known:
    """Their 2-norm, if it is known: the same objects, so nothing stands in between."""
    known = _KNOWN.get()
    if known is None or len(known.arrays) != len(arrays):
        return None
    same = zip(known.arrays, arrays, strict=True)
    return known.norms if all(a is b for a, b in same) else None


_STATES: ContextVar[list[Any] | None] = ContextVar(
    "optax_clipx_states_of_tree_clippers", default=None
)


@contextlib.contextmanager
def states_of_tree_clippers() -> Iterator[list[Any]]:
    """A list of the states made while it lasts by clippers of the whole tree's 2-norm.

    A state does not say of what its clipper takes the norm.
    """
    states: list[Any] = []
    token = _STATES.set(states)
    try:
        yield states
    finally:
        _STATES.reset(token)


def announced(
    clipper: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """A clipper of the whole tree whose states are known as such."""

    def init_fn(params: PyTree) -> Any:
        state = clipper.init(params)
        states = _STATES.get()
        if states is not None:
            states.append(state)
        return state

    return optax.GradientTransformationExtraArgs(init_fn, clipper.update)
