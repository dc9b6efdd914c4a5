"""What a threshold rule is, and what it is told."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, PyTree

from .._reductions.groups import Packed
from .._trees.arguments import check_choice, check_count
from .._trees.arithmetic import (
    Number,
    at_least,
    at_most,
    equal,
    full_like,
    larger,
    less,
    more,
    negated,
    plus,
    smaller,
    where,
)
from .._trees.leaves import Path
from .._trees.types import Dtype, Scalar


class Context(NamedTuple):
    """What a rule may look at besides the norms.

    Attributes:
        step: the number of updates before this one, from 0.
        params_norms: the parameters' norms in the same groups, for rules that set
            ``uses_params``; otherwise ``None``.
        extra: the extra arguments of ``update``, such as ``loss`` or ``value``.
        paths: the path of each measured leaf.
        pack: makes the packed form from one value for each leaf.
        labels: the labels of the groups in their order, for labelled groups.

    Raises:
        Nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> context = clipx.thresholds.Context(step=jnp.int32(3))
        >>> print(context.step)
        3

    References:
        In the image of the extra arguments of
        :class:`optax.GradientTransformationExtraArgs`.
    """

    step: Int[Array, "..."] | int
    params_norms: Any = None
    extra: Mapping[str, Any] = MappingProxyType({})
    paths: Sequence[Path] = ()
    pack: Callable[..., Any] | None = None
    labels: list[Any] | None = None


class Threshold(NamedTuple):
    """A threshold rule: a pair of pure functions, as in ``GradientTransformation``.

    Norms reach a rule packed: a scalar for the tree, one array for the groups (sorted
    by label) or the leaves (in flattening order), a tuple of arrays for units: one
    keepdims array a leaf, or for a rule without memory vectors of many units. A rule
    that works element by element with :func:`jax.tree.map` serves every scope. Norms
    are finite; on a non-finite step the rule's new state is thrown away.

    Attributes:
        init: ``init(norms) -> state``, with norms of zeros.
        update: ``update(norms, state, context) -> (limits, state)``; limits have the
            norms' form, or broadcast against it.
        uses_params: whether ``context.params_norms`` is wanted.
        uses_step: whether ``context.step`` is; without it and without state a clipper
            with ``metrics=False`` needs no state at all.
        uses_norms: whether the numbers in ``norms`` are, and not their form alone;
            without it they may be infinite or NaN.

    Raises:
        Nothing.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> def twice_the_last():
        ...     def init(norms):
        ...         return jax.tree.map(lambda n: jnp.full_like(n, jnp.inf), norms)
        ...     def update(norms, state, context):
        ...         return state, jax.tree.map(lambda n: 2 * n, norms)
        ...     return clipx.thresholds.Threshold(init, update)
        >>> clipper = clipx.clip_by(clipx.measures.tree_norm(), twice_the_last())
        >>> state = clipper.init(jnp.zeros(1))
        >>> for norm in (1.0, 5.0):
        ...     clipped, state = clipper.update(jnp.array([norm]), state)
        ...     print(clipped)
        [1.]
        [2.]

    References:
        :class:`optax.GradientTransformation`.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Context], tuple[Any, Any]]
    uses_params: bool = False
    uses_step: bool = True
    uses_norms: bool = True


def stateless(
    limits: Callable[[Packed, Context], Packed], **options: bool
) -> Threshold:
    """A rule that remembers nothing."""
    return Threshold(
        no_memory,
        lambda norms, state, context: (limits(norms, context), state),
        **options,
    )


def no_memory(norms: Packed) -> tuple[()]:
    """The `init` of every rule that `stateless` makes; no other rule has it."""
    return ()


def is_pair(value: object) -> bool:
    """Whether this is a rule, or a bare pair of its two functions."""
    return (
        isinstance(value, tuple) and len(value) >= 2 and all(map(callable, value[:2]))
    )


def per_norm(
    init: Callable[[jax.Array], PyTree],
    update: Callable[[jax.Array, PyTree, Context], tuple[jax.Array, PyTree]],
    *,
    takes_zero: bool = False,
) -> Threshold:
    """A rule with memory, from functions that treat each norm of one array alike.

    The arrays of the state begin with the axes of the norms. A norm of zero says
    nothing: it leaves the memory as it is, so that frozen parameters or an empty batch
    can not bring a threshold down to zero. With `takes_zero` the functions see to that.
    """

    def one(norms: jax.Array, state: PyTree, context: Context) -> tuple[jax.Array, Any]:
        limits, new = update(norms, jax.tree.map(to_float32, state), context)
        new = jax.tree.map(lambda x, old: x.astype(old.dtype), new, state)
        if not takes_zero:
            # A threshold of infinity times a norm of zero would be NaN.
            there = more(norms, 0)
            limits, new = where(there, limits, np.inf), chosen(there, new, state)
        return jnp.broadcast_to(limits, norms.shape), new

    def init_all(norms: Packed) -> Any:
        return tuple(map(init, norms)) if isinstance(norms, tuple) else init(norms)

    def update_all(norms: Packed, state: PyTree, context: Context) -> tuple[Any, Any]:
        norms = jax.tree.map(jnp.asarray, norms)
        if not isinstance(norms, tuple):
            return one(norms, state, context)
        found = [one(n, s, context) for n, s in zip(norms, state, strict=True)]
        limits, states = zip(*found, strict=True)
        return limits, states

    return Threshold(init_all, update_all, uses_step=False)


def to_float32(remembered: jax.Array) -> jax.Array:
    """What is computed with; a restored state may be in half precision."""
    is_float = jnp.issubdtype(remembered.dtype, jnp.floating)
    return remembered.astype(jnp.float32) if is_float else remembered


def chosen(mask: Number, new: PyTree, old: PyTree) -> Any:
    """For each norm what is remembered of it: the new where the mask is set."""

    def one(new: jax.Array, old: jax.Array) -> jax.Array:
        return old if new is old else where(for_each(mask, old), new, old)

    return jax.tree.map(one, new, old)


class Refusals(NamedTuple):
    """What is done with a norm above its threshold.

    `stats` says what enters the statistics: `"raw"` the norm itself, `"clipped"` the
    threshold, `"skip"` nothing. After `patience` such norms in a row the rule gives in.
    """

    stats: str
    patience: Any

    def in_a_row(self, over: jax.Array, refused: jax.Array) -> tuple[Any, Any]:
        """How many in a row now, and whether the rule gives in."""
        refused = where(over, plus(refused, 1), 0)
        if self.patience is None:
            return smaller(refused, 1), full_like(over, False)
        give_in = at_least(refused, int32(self.patience))
        return where(give_in, 0, refused), give_in

    def entering(
        self, norm: jax.Array, limit: jax.Array, over: jax.Array
    ) -> tuple[jax.Array, Any]:
        """What enters the statistics, and whether anything does."""
        anything = negated(over) if self.stats == "skip" else full_like(over, True)
        if self.stats == "raw":
            return norm, anything
        return where(over, lax.min(limit, norm), norm), anything


STATS = ("raw", "clipped", "skip")


def refusals(
    stats: str, patience: Scalar | None, locks_out: Sequence[str] = ("skip",)
) -> Refusals:
    """Checks the two arguments; where a rule could lock out, patience is 50."""
    check_choice(stats, "stats", STATS)
    if patience is not None:
        check_count(patience, "patience")
    elif stats in locks_out:
        patience = 50
    return Refusals(stats, patience)


def unless(unusable: Number | bool, limit: jax.Array) -> jax.Array:
    """The threshold, or NaN if a number that it was made of is out of its range."""
    if isinstance(unusable, bool):
        return limit
    return where(unusable, jnp.nan, limit)


def float32(value: Scalar) -> jax.Array | np.float32:
    """A number of a rule, which may be traced."""
    if isinstance(value, jax.Array):
        return jnp.asarray(value, jnp.float32)
    with np.errstate(over="ignore"):
        return np.float32(value)


def int32(value: Scalar) -> jax.Array | np.int32:
    """A count of a rule, which may be traced."""
    return (
        jnp.asarray(value, jnp.int32)
        if isinstance(value, jax.Array)
        else np.int32(value)
    )


def one_more(count: jax.Array) -> jax.Array:
    """A count of steps after one more; it stays at int32's largest number."""
    return larger(count, plus(count, 1))  # int32 wraps around


def numbered(size: int, like: jax.Array) -> jax.Array:
    """0, 1, ... along an axis after those of an array, with which it broadcasts."""
    return lax.broadcasted_iota(jnp.int32, (1,) * like.ndim + (size,), like.ndim)


def for_each(x: Number, values: jax.Array) -> Any:
    """A number of each norm, in the shape of several values that are kept of it."""
    if not x.ndim:
        return x
    return lax.broadcast_in_dim(x, values.shape, tuple(range(x.ndim)))


def put(values: jax.Array, place: jax.Array, value: jax.Array) -> jax.Array:
    """The values with one at a place along the last axis; beyond its end, none."""
    here = equal(numbered(values.shape[-1], value), for_each(place, values))
    return where(here, for_each(value, values), values)


def put_in_order(ordered: jax.Array, count: jax.Array, value: jax.Array) -> jax.Array:
    """The first values in ascending order, and one more unless all are there."""
    size = ordered.shape[-1]
    number, count = numbered(size, count), for_each(count, ordered)
    there = where(less(number, count), ordered, np.inf)
    along_last = [(0, 0, 0)] * (ordered.ndim - 1) + [(1, -1, 0)]
    before = lax.pad(there, np.float32(-np.inf), along_last)
    # Each place takes the value, held between what stands there and what stood before.
    held = larger(smaller(for_each(value, ordered), there), before)
    longer = where(at_most(number, count), held, 0)
    return where(less(count, size), longer, ordered)


def memory(norms: jax.Array, dtype: Dtype = jnp.float32, size: int = 0) -> jax.Array:
    """Zeros to remember something of each norm; they lie on the mesh as it does."""
    zeros = lax.full_like(norms, 0, dtype)
    if not size:
        return zeros
    return lax.broadcast_in_dim(zeros, (*zeros.shape, size), tuple(range(zeros.ndim)))
