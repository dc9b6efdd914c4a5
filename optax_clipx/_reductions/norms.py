"""Norms of groups of leaves that are right at any magnitude.

A float32 sum of squares is right while the norm is within about 1e-11..1e15. Beyond,
the squares under- or overflow, and the same sum is taken of values multiplied by a
power of two. On accelerators all three sums stand side by side,
to be fused; on CPU, where each sum is a pass of its own, the second pass runs only when
the first one needs it.
"""

import functools
from collections.abc import Callable, Sequence
from math import log2
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._devices import mesh
from .._trees.arithmetic import (
    abs_squared,
    accumulator,
    clamp_to_one,
    power,
    quotient,
    safe_sqrt,
    saturated_quotient,
    times,
    widened,
)
from .._trees.leaves import Path
from .groups import Groups, Packed, ScalarGroups, UnitGroups
from .leaf_sums import Terms, can_go_by_parts, sums_by_parts
from .parts import cut, unknown

Ord = float | str  # 1, 2, any p >= 1, inf, or "rms"


class Norms(NamedTuple):
    """Packed norms. `value` is `root / factor`, saturated at the largest number."""

    value: Packed
    root: Packed
    factor: Packed
    squares: Packed  # root squared, without the rounding of the root


class _Range(NamedTuple):
    """Sums of squares within low..high lost nothing to under- or overflow.

    Nor do derivatives: root times factor must stay a finite number as well.
    """

    low: float
    high: float
    up: float  # multiplies what is below, a power of two
    down: float  # multiplies what is above


_RANGES = {
    jnp.dtype("float32"): _Range(2.0**-76, 2.0**100, 2.0**80, 2.0**-80),
    jnp.dtype("float64"): _Range(2.0**-500, 2.0**1000, 2.0**600, 2.0**-600),
}


class Indicators(NamedTuple):
    """A tree of zeros and ones: its norm squared is a count, and always in range."""

    leaves: list[Any]


def as_they_are(trees: Any, extras: Any) -> Any:
    """The trees themselves are measured."""
    return trees


def norms(
    trees: Sequence[Sequence[Any]],
    groups: Groups,
    ord: Ord,
    paths: list[Path],
    axis_name: Any = None,
    specs: Any = None,
    derive: Callable[[Any, Any], Any] = as_they_are,
    extras: Any = (),
) -> list[Norms]:
    """The norms of like trees, group by group, from one reduction and one collective.

    What is measured is `derive(trees, extras)`, again a sequence of like trees, entry
    by entry; the extras are scalars for each leaf. It is computed inside of the
    reduction: made outside, its leaves would be written to memory. Each device that
    holds a group gets its norm.
    """
    flat = [x for tree in trees for x in tree]
    mesh.refuse_unreduced(flat, paths * len(trees))

    def local(shards: Sequence[Any], places: Any, extras: Any) -> list[Norms]:
        each = len(paths)
        split = tuple(tuple(shards[i : i + each]) for i in range(0, len(shards), each))
        return _norms(split, extras, groups, ord, tuple(places[:each]), derive)

    def out_specs(dims: Any) -> Any:
        if isinstance(groups, ScalarGroups):
            return jax.sharding.PartitionSpec()
        specs = tuple(jax.sharding.PartitionSpec(b.explicit) for b in groups.buckets)
        leaf_specs = specs or tuple(
            jax.sharding.PartitionSpec(
                *(() if i in axes else d for i, d in enumerate(leaf))
            )
            for leaf, axes in zip(dims, groups.axes, strict=False)
        )
        count = len(derive(trees, extras))
        return [Norms(*[leaf_specs] * 4)] * count

    places = mesh.placements(flat, paths * len(trees), axis_name, specs)
    return mesh.map_local(local, flat, places, extras, out_specs)


# Traced once for each structure, also where `update` is called outside of jit.
@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5), inline=True)
def _norms(
    trees: Any,
    extras: Any,
    groups: Groups,
    ord: Ord,
    places: tuple[mesh.Placement, ...],
    derive: Callable[[Any, Any], Any],
) -> list[Norms]:
    dtype = accumulator([x for tree in trees for x in tree])
    kinds = jax.eval_shape(derive, trees, extras)
    times = len(kinds)
    found = _Measured(
        kinds=jax.tree.leaves(kinds),
        at_risk=[
            not isinstance(tree, Indicators) and _can_leave_range(x.dtype, dtype)
            for tree in kinds
            for x in jax.tree.leaves(tree)
        ],
        derive=derive,
        groups=groups.repeated(times),
        places=places * times,
        dtype=dtype,
    )
    if ord in (2, "rms"):
        squares, factor = _sums_of_squares(found, trees, extras)
        if ord == "rms":
            sizes = found.groups.sizes(found.kinds, found.places)
            squares = jax.tree.map(
                lambda s, n: s / jnp.asarray(n, dtype), squares, sizes
            )
        root = jax.tree.map(safe_sqrt, squares)
    else:
        root, factor = _power_norms(found, trees, extras, ord)
        squares = jax.tree.map(jnp.square, root)
    factor = jax.tree.map(lax.stop_gradient, factor)
    value = jax.tree.map(saturated_quotient, root, factor)
    fields = [groups.split(field, times) for field in (value, root, factor, squares)]
    return [Norms(*each) for each in zip(*fields, strict=True)]


class _Measured(NamedTuple):
    """What is static about a reduction."""

    kinds: list[Any]  # shapes and dtypes of the derived leaves
    at_risk: list[bool]  # whether the squares of each may leave the range
    derive: Callable[[Any, Any], Any]
    groups: Groups
    places: tuple[mesh.Placement, ...]
    dtype: Any

    def leaves(self, trees: Any, extras: Any) -> list[jax.Array]:
        """The derived leaves, tree after tree; for derivatives they are made again."""
        derive = self.derive
        if derive is not as_they_are:
            derive = jax.checkpoint(derive)
        return jax.tree.leaves(derive(trees, extras))

    def wide(self, trees: Any, extras: Any) -> list[jax.Array]:
        """The same in the accumulator's dtype."""
        return [x.astype(widened(x, self.dtype)) for x in self.leaves(trees, extras)]

    def totals(
        self, terms: Terms, leaves: list[Any], *others: Any, known: Any = None
    ) -> list[Packed]:
        """For each term of the leaves its total over each group."""
        known = known or [None] * len(leaves)
        operands = list(zip(leaves, known, *others, strict=True))
        return self.groups.totals(operands, self.places, terms)

    def known_on_cpu(self, trees: Any, extras: Any, factors: Any = ()) -> Any:
        """For each derived leaf its sum of squares, times a factor, or None."""
        if self.derive is as_they_are or type(self.groups) is not ScalarGroups:
            return None
        each = len(trees[0])
        found = [
            _squares_by_parts(
                [tree[i] for tree in trees],
                extras[i] if extras else (),
                factors[i::each],
                self.derive,
                self.dtype,
            )
            for i in range(each)
        ]
        times = len(self.kinds) // each
        rows = zip(*(row or [None] * times for row in found), strict=True)
        return [x for row in rows for x in row]


@functools.partial(jax.jit, static_argnums=(3, 4))
def _squares_by_parts(
    arrays: list[jax.Array], extras: Any, factors: Any, derive: Any, dtype: Any
) -> list[jax.Array] | None:
    """The sums of squares of what is derived of the leaves at one place."""

    def squares(*given: Any) -> list[jax.Array]:
        *parts, (extras, factors) = given
        derived = jax.tree.leaves(derive([[x] for x in parts], [extras]))
        wide = [x.astype(widened(x, dtype)) for x in derived]
        if factors:
            wide = list(map(times, wide, factors))
        return list(map(abs_squared, wide))

    if not can_go_by_parts(arrays):
        return None
    return sums_by_parts(squares, arrays, (extras, factors))


def _sums_of_squares(
    measured: _Measured, trees: Any, extras: Any
) -> tuple[Packed, Packed]:
    """Sums of squares of values times a factor, and the factors."""
    groups, dtype = measured.groups, measured.dtype
    limits = _RANGES[dtype]

    if not any(measured.at_risk):
        (squares,) = measured.totals(_PLAIN, measured.wide(trees, extras))
        return squares, jax.tree.map(jnp.ones_like, squares)
    group_at_risk = groups.any_member(measured.at_risk)

    def choose(squares: jax.Array, at_risk: Any) -> jax.Array:
        fits = squares <= limits.high  # false for NaN
        factor = jnp.where(
            squares < limits.low, limits.up, jnp.where(fits, 1, limits.down)
        )
        return lax.stop_gradient(jnp.where(at_risk, factor, 1).astype(dtype))

    def pick(f: Any, plain: Any, raised: Any, lowered: Any) -> jax.Array:
        return jnp.where(f == 1, plain, jnp.where(f > 1, raised, lowered))

    # Units that stay sharded differ by device: no device may go alone into a branch
    # that holds a collective.
    together = isinstance(groups, UnitGroups) and any(p.axes for p in measured.places)
    leaves = measured.leaves(trees, extras)
    # Behind a barrier: of an array with one entry XLA would square the factor.
    up, down = lax.optimization_barrier(
        (jnp.asarray(limits.up, dtype), jnp.asarray(limits.down, dtype))
    )
    terms = _at_three_scales(dtype, not together)
    ups, downs = [up] * len(leaves), [down] * len(leaves)
    known = measured.known_on_cpu(trees, extras)
    sums = measured.totals(terms, leaves, ups, downs, known=known)
    factor = jax.tree.map(choose, sums[0], group_at_risk)
    squares = jax.tree.map(pick, factor, *sums)
    if together:
        return squares, factor

    def second_pass(
        trees: Any, extras: Any, factor: Any, squares: Any, again: Any
    ) -> Packed:
        starts = unknown(groups.starts(), again)
        # Behind a barrier: XLA would write out one factor for leaves of one shape.
        factors = lax.optimization_barrier(
            list(map(cut, groups.spread(factor, starts)))
        )
        leaves = measured.leaves(trees, extras)
        known = measured.known_on_cpu(trees, extras, factors)
        return measured.totals(_scaled(dtype), leaves, factors, known=known)[0]

    def first_pass(
        trees: Any, extras: Any, factor: Any, squares: Any, again: Any
    ) -> Packed:
        return squares

    def again_if_needed(trees: Any, extras: Any, factor: Any, squares: Any) -> Packed:
        outside = [jnp.any(f != 1) for f in jax.tree.leaves(factor)]
        again = jnp.any(jnp.stack(outside))
        return lax.cond(
            again, second_pass, first_pass, trees, extras, factor, squares, again
        )

    def done(trees: Any, extras: Any, factor: Any, squares: Any) -> Packed:
        return squares

    squares = lax.platform_dependent(
        trees, extras, factor, squares, cpu=again_if_needed, default=done
    )
    return squares, factor


def _power_norms(
    measured: _Measured, trees: Any, extras: Any, ord: Any
) -> tuple[Packed, Packed]:
    """Norms of other orders, relative to the largest magnitude of each group."""
    groups, dtype = measured.groups, measured.dtype
    leaves = measured.wide(trees, extras)
    peak = measured.totals(_PEAK, leaves)[0]
    if ord == float("inf"):
        return peak, jax.tree.map(jnp.ones_like, peak)
    peak = jax.tree.map(lax.stop_gradient, peak)
    safe = jax.tree.map(lambda m: jnp.where((m > 0) & jnp.isfinite(m), m, 1), peak)
    sums = measured.totals(_of_power(ord), leaves, groups.spread(safe))[0]
    large, down = _RANGES[dtype].high ** 0.5, _RANGES[dtype].down
    factor = jax.tree.map(lambda m: jnp.where(m > large, down, 1).astype(dtype), safe)
    root = jax.tree.map(lambda s, m, f: (m * f) * power(s, 1 / ord), sums, safe, factor)
    return root, factor


def _plain(x: jax.Array) -> tuple[jax.Array]:
    return (abs_squared(x),)


@functools.cache
def _scaled(dtype: Any) -> Terms:
    def of(x: jax.Array, factor: jax.Array) -> tuple[jax.Array]:
        return (abs_squared(times(x.astype(widened(x, dtype)), factor)),)

    return Terms(of, one_on_cpu=True, dtype=dtype)


@functools.cache
def _at_three_scales(dtype: Any, one_on_cpu: bool) -> Terms:
    def of(
        x: jax.Array, up: jax.Array, down: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        x = x.astype(widened(x, dtype))
        # What is above 1 is not chosen raised, but must stay finite for gradients.
        raised = abs_squared(times(clamp_to_one(x), up))
        return abs_squared(x), raised, abs_squared(times(x, down))

    return Terms(of, one_on_cpu=one_on_cpu, dtype=dtype, in_turn=True)


def _magnitude(x: jax.Array) -> tuple[jax.Array]:
    # Not every all-reduce passes a NaN through a max; every one passes infinity.
    return (jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x)),)


_PLAIN = Terms(_plain)
_PEAK = Terms(_magnitude, jnp.max)


@functools.cache
def _of_power(ord: float) -> Terms:
    return Terms(lambda x, peak: (power(quotient(jnp.abs(x), peak), ord),))


def _can_leave_range(leaf: Any, dtype: Any) -> bool:
    """Whether squares of this leaf's numbers may under- or overflow the sums'."""
    info, limits = jnp.finfo(leaf), _RANGES[jnp.dtype(dtype)]
    return 2.0 * info.maxexp > log2(limits.high) or 2.0 * info.minexp < log2(limits.low)
