"""What transformations that remember something of each entry have in common."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from .._devices.numbers import as_one
from .._devices.programs import unknown
from .._reductions.groups import Packed
from .._reductions.norms import norms
from .._reductions.plan import make_plan, of_tree
from .._thresholds.base import stateless
from .._trees.arithmetic import (
    Number,
    accumulator,
    at_least_float32,
    full_like,
    safe_sqrt,
)
from .._trees.leaves import Leaves, flatten, show
from .._trees.types import Arrays, Dtype, Scalar, Trees
from . import policies
from .metrics import count as advanced
from .summary import Summary, of_entries
from .transformation import Given, Memory, Options, check_memory, transformation

NO_RULE = stateless(lambda norms, context: norms, uses_step=True)


@runtime_checkable
class EntryRule(Protocol):
    """What becomes of an entry by itself, and of what is remembered of it.

    The numbers are scalars that it depends on besides. A rule is hashable, by value: it
    is traced once for all leaves of a shape.
    """

    def advance(
        self, x: jax.Array, moments: Sequence[jax.Array], numbers: PyTree
    ) -> list[jax.Array]:
        """The new moments."""

    def respond(
        self,
        x: jax.Array,
        before: Sequence[jax.Array],
        after: Sequence[jax.Array],
        numbers: PyTree,
    ) -> jax.Array:
        """The update; of the new moments alone, which can then be written in place."""

    def change(
        self, x: jax.Array, moments: Sequence[jax.Array], numbers: PyTree
    ) -> tuple[jax.Array, jax.Array]:
        """What the metrics call before and after, from the old moments."""


def elementwise(
    rule: EntryRule,
    kind: type,
    fresh: Callable[[Leaves], NamedTuple],
    numbers_at: Callable[[Any, Any], Any],
    options: Options,
    unusable: Number | bool = False,
) -> optax.GradientTransformationExtraArgs:
    """A transformation whose entries know of themselves only.

    `fresh` makes its memory, of that kind: one tree like the parameters for each
    moment, and `seen` where finite steps are counted. `numbers_at(dtype, memory)`
    gives the rule's numbers for moments of a dtype; they may be traced. Updates are
    NaN if one is `unusable`.
    """
    derive = _Derived(rule, options.nonfinite == "sanitize")

    def step(given: Given) -> tuple[list[Any], Memory]:
        leaves, before = given.leaves, given.memory
        refuse_complex(leaves)
        state = before.rule
        check_memory(state, kind)
        arrays = [jnp.asarray(x) for x in leaves.arrays]
        trees = {name: x for name, x in state._asdict().items() if name != "seen"}
        moments = [moments_in(tree, leaves) for tree in trees.values()]
        made = {m.dtype: numbers_at(m.dtype, state) for m in moments[0]}
        numbers = [made[m.dtype] for m in moments[0]]
        summary = _changed(leaves, [arrays, *moments], numbers, derive, options)
        summary = summary._replace(unusable=jnp.asarray(unusable))
        if derive.sanitized:
            arrays = policies.sanitize(arrays)
        bad = summary.nonfinite
        new, out = [], []
        for x, old, n in zip(arrays, zip(*moments, strict=True), numbers, strict=True):
            moved = rule.advance(x, old, n)
            kept = [jnp.where(bad, a, b) for a, b in zip(old, moved, strict=True)]
            # Only sanitized updates go on where the moments stay: these are copied.
            after = moved if derive.sanitized else kept
            out.append(rule.respond(x, old, after, n))
            new.append(kept)
        each = zip(trees.items(), zip(*new, strict=True), strict=True)
        memory = state._replace(**{n: rebuild(tree, x) for (n, tree), x in each})
        if "seen" in memory._fields:
            seen = jnp.where(bad, state.seen, advanced(state.seen, True))
            memory = memory._replace(seen=seen)
        return finish(leaves, out, summary, before._replace(rule=memory), options)

    return transformation(fresh, step, NO_RULE, options)


@dataclass(frozen=True)
class _Derived:
    """What is measured: before, after, and which entries changed."""

    rule: EntryRule
    sanitized: bool

    def __call__(self, trees: Trees, numbers: PyTree) -> Any:
        raw, *moments = trees
        arrays = policies.sanitize(raw) if self.sanitized else raw
        before, after, different = [], [], []
        for x, old, n in zip(arrays, zip(*moments, strict=True), numbers, strict=True):
            one, other = self.rule.change(x, old, n)
            other = other.astype(x.dtype)
            before.append(one)
            after.append(other)
            different.append((one.astype(x.dtype) != other).astype(jnp.float32))
        found = [before, after, different]
        return [*found, policies.where_nonfinite(raw)] if self.sanitized else found


def finish(
    leaves: Leaves, out: Arrays, summary: Summary, memory: Memory, options: Options
) -> tuple[list[Any], Memory]:
    """The step by its policy, in the dtypes of the updates, and its metrics."""

    def ending(summary: Summary, memory: Memory) -> Any:
        summary, lost, zero = policies.by_policy(leaves, summary, options)
        return memory.metrics_after(summary), lost, zero

    metrics, lost, zero = as_one(ending, summary, memory._replace(rule=()))
    out = [u.astype(x.dtype) for u, x in zip(out, leaves.arrays, strict=True)]
    out = [jnp.where(lost, jnp.nan, x) for x in out]
    out = [jnp.where(zero, jnp.zeros_like(x), x) for x in out]
    return out, memory._replace(metrics=metrics)


def zeros_like(leaves: Leaves) -> Any:
    """A tree like the parameters, of zeros in float32 or wider.

    What has no gradient, an integer leaf, has zeros of its own dtype, as in Adam's
    moments: whatever is mapped over the parameters can be mapped over this, too.
    """
    return jax.tree.unflatten(leaves.treedef, map(_zeros, leaves.everything))


def _zeros(leaf: PyTree) -> jax.Array:
    dtype = jnp.result_type(leaf)
    inexact = jnp.issubdtype(dtype, jnp.inexact)
    leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
    return jnp.zeros_like(leaf, dtype=at_least_float32(leaf) if inexact else dtype)


def moments_in(tree: PyTree, leaves: Leaves) -> list[jax.Array]:
    """What is remembered of each of these leaves; they must be those that init saw."""
    moments = flatten(tree, updates=False).arrays
    want, got = ([x.shape for x in some] for some in (moments, leaves.arrays))
    if want != got:
        raise ValueError(
            f"Expected the {len(want)} leaves that init saw, of shapes {want}, got"
            f" {len(got)}, of shapes {got}. Leave frozen ones out with"
            " optax_clipx.excluding or optax.masked."
        )
    return moments


def rebuild(tree: PyTree, moments: Arrays) -> Any:
    """The tree with other moments in it."""
    return flatten(tree, updates=False).rebuild(list(moments))


Shares = tuple[jax.Array, jax.Array]  # of an average: a decay, and 1 - decay


def mean_of(mean: jax.Array, x: jax.Array, decay: Scalar) -> jax.Array:
    """The exponential moving average after one more value; of a decay, or of shares."""
    # Unknown: for b = 1/2 the compiler would halve the sum, which may overflow.
    b, rest = unknown(shares_of(decay, mean.dtype))
    return b * mean + rest * x


def root_of_mean(
    root: jax.Array, magnitude: jax.Array, decay: Scalar, power: float
) -> jax.Array:
    """The root of the average power of magnitudes, after one more.

    Relative to the larger of the two, so that no power leaves the range.
    """
    if power == 1:
        return mean_of(root, magnitude, decay)
    b, rest = shares_of(decay, root.dtype)
    largest = jnp.maximum(root, magnitude)
    safe = jnp.where(largest > 0, largest, 1)
    mean = b * (root / safe) ** power + rest * (magnitude / safe) ** power
    if power == 2:
        return largest * safe_sqrt(mean)
    positive = mean > 0  # a power below 1 has no derivative at 0
    return largest * jnp.where(positive, jnp.where(positive, mean, 1) ** (1 / power), 0)


def shares_of(decay: Scalar | Shares, dtype: Dtype) -> Shares:
    """Decay and 1 - decay, which in float32 would be off by 1e-5 for b = .999."""
    if isinstance(decay, tuple):
        return decay
    return jnp.asarray(decay, dtype), jnp.asarray(1 - decay, dtype)


def weight_of(decay: Scalar, counts: jax.Array) -> jax.Array:
    """By what an average of so many values is divided to debias it: 1 - b^t."""
    is_array = isinstance(decay, jax.Array)
    log = jnp.log(decay) if is_array else math.log(decay) if decay else -math.inf
    weight = -jnp.expm1(jnp.maximum(counts, 1).astype(jnp.float32) * log)
    return jnp.where((counts > 0) & (weight > 0), weight, 1)


def refuse_complex(leaves: Leaves) -> None:
    """An order of entries is needed, or a sign."""
    for path, leaf in zip(leaves.paths, leaves.arrays, strict=True):
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                f"Expected real updates, got {leaf.dtype} at {show(path)}. Leave it out"
                " with optax_clipx.excluding."
            )


def _changed(
    leaves: Leaves, trees: Trees, numbers: PyTree, derive: _Derived, options: Options
) -> Summary:
    """Both norms and the share of entries that changed, in one reduction."""
    every = of_tree(len(leaves.arrays))
    plan = make_plan(leaves, every, 2.0, options.axis_name, options.specs)
    counted = (False, False, True) + (True,) * derive.sanitized
    norm, clipped_norm, different, *bad = (
        found.value for found in norms(plan, trees, derive, numbers, counted)
    )
    size = full_like(norm, plan.sizes(leaves.arrays))
    threshold = jnp.zeros((), accumulator(leaves.arrays))
    return of_entries(*(norm, clipped_norm, different, size, *bad), threshold=threshold)


def with_flags(trees: Trees, extras: PyTree) -> Any:
    """The first tree, and which entries of the second are not finite."""
    first, raw = trees
    return [first, policies.where_nonfinite(raw)]


def any_of(flags: Packed) -> jax.Array:
    """Whether the norm of any group's indicators is above 0."""
    found = [jnp.any(n > 0) for n in jax.tree.leaves(flags)]
    return jnp.any(jnp.stack(found))
