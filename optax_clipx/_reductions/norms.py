"""Norms of groups of leaves that are right at any magnitude.

A float32 sum of squares is right while the norm is within about 1e-11..1e15. Beyond,
squares under- or overflow. There the same sum is taken of `x / unit`, where the unit is
a power of two, and the norm is `root * unit`.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import PyTree

from .._devices import mesh
from .._devices.mesh import can_be_joined, knows_shards, lies_whole
from .._devices.numbers import as_one
from .._devices.programs import Joined, Passes, TracedOnce, if_needed, unknown
from .._devices.sums import sum_of, sums_by_parts, sums_in_one, together
from .._trees.arithmetic import (
    Number,
    Operand,
    abs_squared,
    accumulator,
    either,
    fraction,
    full_like,
    is_concrete,
    less,
    more,
    power,
    quotient,
    saturated,
    times,
    total,
    where,
    widened,
)
from .._trees.sizes import is_known
from .._trees.types import AnyArray, Arrays, Dtype, Trees
from .groups import Groups, Packed, ScalarGroups, UnitGroups
from .leaf_sums import can_go_by_parts
from .plan import Plan, of_tree
from .whole_norm import safe


class Norms(NamedTuple):
    """Packed norms. `value` is `root * unit`, saturated at the largest number."""

    value: Packed
    root: Packed
    unit: Packed


class _Range(NamedTuple):
    """Sums of squares within low..high lost nothing to under- or overflow.

    What is below is measured in the unit `small`, what is above in the unit `large`.
    """

    low: float
    high: float
    small: float
    large: float


_RANGES = {
    jnp.dtype("float32"): _Range(2.0**-76, 2.0**100, 2.0**-80, 2.0**80),
    jnp.dtype("float64"): _Range(2.0**-500, 2.0**1000, 2.0**-600, 2.0**600),
}


_SMALL, _TOGETHER = 2**12, 2**18  # entries of a leaf, and of leaves put together

Factors = Sequence[Sequence[jax.Array | None]]  # of each tree and leaf
Derive = Callable[[Any, Any], Any]  # from trees and extras to the trees measured


def as_they_are(trees: Trees, extras: PyTree) -> Any:
    """The trees themselves are measured."""
    return trees


def norms(
    plan: Plan,
    trees: Trees,
    derive: Derive = as_they_are,
    extras: PyTree = (),
    counted: tuple[bool, ...] | None = None,
) -> list[Norms]:
    """The norms of like trees, group by group, from one reduction and one collective.

    What is measured is `derive(trees, extras)`, again a sequence of like trees, entry
    by entry; the extras are scalars for each leaf. It is computed inside of the
    reduction: made outside, its leaves would be written to memory. Each device that
    holds a group gets its norm.

    `counted` says which of the derived trees are zeros and ones: the norm squared of
    such a tree is a count, and always in range. Without it there are as many derived
    trees as there are trees, none of them for a count.
    """
    counted = (False,) * len(trees) if counted is None else counted
    flat = [x for tree in trees for x in tree]
    mesh.refuse_unreduced(flat, plan.paths * len(trees))
    groups, each = plan.groups, len(plan.paths)

    def local(
        shards: Arrays, places: Sequence[mesh.Placement], extras: PyTree
    ) -> list[Norms]:
        split = tuple(tuple(shards[i : i + each]) for i in range(0, len(shards), each))
        here = replace(plan, places=tuple(places[:each]))
        return local_norms(here, split, derive, extras, counted)

    def out_specs(dims: Sequence[tuple[mesh.Axes, ...]]) -> Any:
        spec: Any = jax.sharding.PartitionSpec()
        if isinstance(groups, UnitGroups):
            spec = tuple(
                jax.sharding.PartitionSpec(
                    *(() if i in axes else d for i, d in enumerate(leaf))
                )
                for leaf, axes in zip(dims, groups.axes, strict=False)
            )
        return [Norms(spec, spec, spec)] * len(counted)

    return mesh.map_local(local, flat, plan.places * len(trees), extras, out_specs)


def local_norms(
    plan: Plan,
    trees: Trees,
    derive: Derive = as_they_are,
    extras: PyTree = (),
    counted: tuple[bool, ...] = (False,),
) -> list[Norms]:
    """The same on one device of a mesh, which knows where each of its shards lies."""
    dtype = accumulator([x for tree in trees for x in tree])
    lots = _lots(trees, extras, plan.groups, plan.places)
    measured = _Measured(derive, counted, plan, dtype, lots)
    measure = _two_norms if plan.ord in (2, "rms") else _power_norms
    given = (trees, extras)
    # Outside of a trace compiled once for all that is measured alike.
    if is_concrete(given) and all(map(knows_shards, jax.tree.leaves(trees))):
        return _compiled(measure, measured, given)
    return measure(measured, given)


def _lots(
    trees: Trees,
    extras: PyTree,
    groups: Groups,
    places: Sequence[mesh.Placement],
) -> tuple[tuple[int, ...], ...]:
    """Which leaves are put together: small ones of one kind.

    Only for the norm of the whole tree, of leaves that each device holds as a whole.
    Leaves of one kind have the same dtype and share their extras, as the same objects.
    Without any to put together there are no lots.
    """
    every = [x for tree in trees for x in tree]
    if not groups.is_one or any(place.axes for place in places):
        return ()
    if not can_be_joined(every) or not all(map(lies_whole, every)):
        return ()
    lots: list[list[int]] = []
    begun: dict[Any, tuple[list[int], int]] = {}
    for i, leaf in enumerate(trees[0]):
        alike = {tree[i].shape for tree in trees} == {leaf.shape}
        small = alike and is_known(leaf.size) and leaf.size <= _SMALL
        scalars = tuple(map(id, jax.tree.leaves(extras[i]))) if extras else ()
        kind = (scalars, *(tree[i].dtype for tree in trees))
        lot, size = begun.get(kind, ([], _TOGETHER))
        if not small or size + leaf.size > _TOGETHER:
            lot, size = [], 0
            lots.append(lot)
        lot.append(i)
        if small:
            begun[kind] = (lot, size + leaf.size)
    return tuple(map(tuple, lots)) if len(lots) < len(trees[0]) else ()


@dataclass(frozen=True)
class _Measured:
    """What is static about a reduction."""

    derive: Derive
    counted: tuple[bool, ...]  # for each derived tree
    plan: Plan
    dtype: Any
    lots: tuple[tuple[int, ...], ...] = ()  # which leaves are put together
    in_one: bool = False  # whether sums at three units are taken together

    @property
    def bucketed(self) -> UnitGroups | None:
        """The groups, if they are units in buckets."""
        groups = self.plan.groups
        return groups if isinstance(groups, UnitGroups) and groups.buckets else None

    def rows(self, given: PyTree) -> list[list[Any]]:
        """The leaves of each derived tree."""
        return [list(tree) for tree in self.derive(*given)]

    def at_risk(self, given: PyTree) -> list[bool]:
        """For each derived tree whether squares of its numbers may leave the range."""
        trees, _ = given
        dtypes = {x.dtype for tree in trees for x in tree}
        wide = any(_can_leave_range(dtype, self.dtype) for dtype in dtypes)
        return [wide and not count for count in self.counted]

    def sums(
        self,
        given: PyTree,
        how: str,
        factors: Factors | None = None,
    ) -> list[Any]:
        """Of each derived tree and leaf the sums of squares on this device.

        `how` is "plain", "each", or "at_three": plain, and in two other units.
        """
        if how == "at_three" and self.in_one:
            return self._sums_in_one(given)
        parts = self._sums_by_parts(given, factors) if how == "each" else None
        keep = not self.bucketed  # what becomes a vector keeps no axes
        return parts or [
            _sums_of_squares.each(
                (
                    *(x, factors[k][i] if factors else None),
                    *(self.plan.groups.spans(i), self.dtype, how, keep),
                )
                for i, x in enumerate(row)
            )
            for k, row in enumerate(self.rows(given))
        ]

    def _sums_in_one(self, given: PyTree) -> list[Any]:
        """Those at three units, of each small leaf from one reduction."""
        risks = tuple(self.at_risk(given))
        columns = [
            _sums_of_rows(first, others, risks, self.plan.groups.spans(i), self.dtype)
            for i, (first, *others) in enumerate(zip(*self.rows(given), strict=True))
        ]
        return list(zip(*columns, strict=True))

    def totals(self, rows: Sequence[Trees], given: PyTree) -> list[list[Packed]]:
        """The squares of each derived tree's groups, for each choice of a unit.

        One collective for all.
        """
        # Each choice of a unit has a row of its own.
        turned = [list(row) for each in rows for row in zip(*each, strict=True)]
        if self.in_one and self.bucketed:  # there each device has all
            totals = self.bucketed.packed_at_once(turned)
        else:
            totals = self.plan.totals(turned, jax.tree.leaves(given[0]))
        if self.plan.ord == "rms":
            sizes = self.plan.sizes(given[0][0])
            totals = [jax.tree.map(_mean, total, sizes) for total in totals]
        choices = len(totals) // len(rows)
        return [totals[k::choices] for k in range(choices)]

    def _sums_by_parts(
        self, given: PyTree, factors: Factors | None
    ) -> list[Any] | None:
        """The sums of squares of each derived leaf in one read of what it is made of.

        None where leaves are small or nothing is derived.
        """
        trees, extras = given
        if self.derive is as_they_are or not isinstance(self.plan.groups, ScalarGroups):
            return None
        columns = []
        for i, arrays in enumerate(zip(*trees, strict=True)):
            if not can_go_by_parts(arrays):
                return None
            others = (extras[i] if extras else (), [f[i] for f in factors or ()])
            columns.append(sums_by_parts(self._squares_of_parts, arrays, others))
        return [[[x] for x in row] for row in zip(*columns, strict=True)]

    def _squares_of_parts(self, *given: PyTree) -> list[jax.Array]:
        *parts, (extras, factors) = given
        derived = jax.tree.leaves(self.derive([[x] for x in parts], [extras]))
        each = zip(derived, factors or [None] * len(derived), strict=True)
        return [_squares(x, factor, self.dtype) for x, factor in each]


def _squares(x: jax.Array, factor: AnyArray | None, dtype: Dtype) -> jax.Array:
    x = lax.convert_element_type(x, widened(x, dtype))
    return abs_squared(x if factor is None else times(x, factor))


def _sums_once(
    x: jax.Array,
    factor: AnyArray | None,
    axes: tuple[int, ...] | None,
    dtype: Dtype,
    how: str,
    keep: bool,
) -> list[jax.Array]:
    if how == "each":
        return [sum_of(lambda x: _squares(x, factor, dtype), x, axes, dtype, keep)]
    each = _at_three(x, dtype) if how == "at_three" else [_squares(x, factor, dtype)]
    return [total(squares, axes, keep) for squares in each]


def _rows_once(
    first: jax.Array,
    others: list[jax.Array],
    risks: tuple[bool, ...],
    axes: tuple[int, ...] | None,
    dtype: Dtype,
) -> list[list[jax.Array]]:
    """Three sums of each of these: the same one three times where there is no risk."""
    each = zip((first, *others), risks, strict=True)
    values = [
        _at_three(x, dtype) if risk else [_squares(x, None, dtype)] for x, risk in each
    ]
    found = sums_in_one(values, axes, _TOGETHER)
    return [sums if len(sums) == 3 else sums * 3 for sums in found]


_sums_of_rows = TracedOnce(_rows_once, (2, 3, 4))


def _at_three(x: jax.Array, dtype: Dtype) -> list[jax.Array]:
    """The squares of entries as they are, and in both other units."""
    limits = _RANGES[dtype]
    units = [np.asarray(1 / u, dtype) for u in (limits.small, limits.large)]
    # Unknown: of an array with one entry the factor would be squared.
    return [_squares(x, f, dtype) for f in (None, *unknown(units))]


_sums_of_squares = TracedOnce(_sums_once, (2, 3, 4, 5))


def _mean(total: jax.Array, size: ArrayLike) -> jax.Array:
    return total / jnp.asarray(size, total.dtype)


def _factor_of(squares: jax.Array) -> jax.Array:
    """One over the unit in which squares are in range: 1 where plain ones are."""
    limits = _RANGES[squares.dtype]
    return _by_range(squares, 1 / limits.small, 1 / limits.large, 1)


def _factors(plain: Sequence[Packed], risks: list[bool]) -> list[Packed]:
    """Those of squares that do not leave the range are 1."""
    each = zip(plain, risks, strict=True)
    return [jax.tree.map(_factor_of if risk else _one, x) for x, risk in each]


def _by_range(
    squares: jax.Array, small: Operand, large: Operand, usual: Operand
) -> jax.Array:
    """What belongs to the range in which the squares are."""
    usual = usual if isinstance(usual, jax.Array) else squares.dtype.type(usual)
    return where(_below(squares), small, where(_above(squares), large, usual))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _two_norms(measured: _Measured, given: PyTree) -> list[Norms]:
    """The norm of each derived tree's groups, whatever their magnitude."""
    risks = measured.at_risk(given)
    if not any(risks):
        (plain,) = measured.totals(measured.sums(given, "plain"), given)
        return _norms_of_each(plain, _factors(plain, risks), risks)
    found = _in_range(measured, risks, given)
    # Of several trees it would be a kernel more on accelerators (`clip`: 9 for 8).
    if measured.plan.groups.is_one and len(risks) == 1:
        return as_one(functools.partial(_norms_of_each, risks=risks), *found)
    return _norms_of_each(*found, risks)


Squares = tuple[list[Packed], list[Packed]]  # of each tree's numbers times factors


def _in_range(measured: _Measured, risks: list[bool], given: PyTree) -> Squares:
    """The squares of each tree's groups, with factors with which they are in range."""
    passes = _passes(measured, risks)
    # Units that stay sharded differ by device: no device may go alone into a branch
    # that holds a collective.
    groups, places = measured.plan.groups, measured.plan.places
    if isinstance(groups, UnitGroups) and any(place.axes for place in places):
        return passes.side_by_side(given)
    if measured.lots:
        joined = _joined(measured, risks)
    else:
        joined = Joined(_as_given, _passes(measured, risks, in_one=True))
    if any(place.axes for place in places):
        return if_needed(passes, joined, given)
    one = [groups.like(given[0][0], measured.dtype)] * len(risks)
    return if_needed(passes, joined, given, (one, one))


def _passes(measured: _Measured, risks: list[bool], in_one: bool = False) -> Passes:
    """A pass over plain squares, one with the right factors, and both in one."""
    at_three = replace(measured, in_one=in_one)

    def first(given: PyTree) -> tuple[Squares, jax.Array]:
        (squares,) = measured.totals(measured.sums(given, "each"), given)
        at_risk = [x for x, risk in zip(squares, risks, strict=True) if risk]
        found = squares, [jax.tree.map(_varying_one, x) for x in squares]
        return found, _any_out_of_range(at_risk)

    def again(found: Squares, given: PyTree) -> Squares:
        squares, _ = found
        factors, leaves = _factors(squares, risks), len(given[0][0])
        # Unknown: a factor that leaves of one shape share would be written out.
        each = [
            unknown(measured.plan.groups.spread(factor)) if risk else [None] * leaves
            for factor, risk in zip(factors, risks, strict=True)
        ]
        (scaled,) = measured.totals(measured.sums(given, "each", each), given)
        rows = zip(risks, scaled, squares, strict=True)
        return [new if risk else old for risk, new, old in rows], factors

    def picked(plain: list[Packed], *scaled: list[Packed]) -> Squares:
        squares = [
            jax.tree.map(_pick, *each) if risk else each[0]
            for risk, *each in zip(risks, plain, *scaled, strict=True)
        ]
        return squares, _factors(plain, risks)

    def side_by_side(given: PyTree) -> Squares:
        return picked(*at_three.totals(at_three.sums(given, "at_three"), given))

    return Passes(first, again, side_by_side)


def _pick(plain: jax.Array, small: jax.Array, large: jax.Array) -> jax.Array:
    """The squares that are in range."""
    return _by_range(plain, small, large, plain)


def _as_given(given: PyTree) -> Any:
    return given


def _joined(measured: _Measured, risks: list[bool]) -> Joined:
    """The same passes with small leaves put together."""
    lots = measured.lots
    count = len(lots)
    places = (mesh.Placement((), ()),) * count
    plan = replace(measured.plan, places=places, groups=of_tree(count))

    def put_together(given: PyTree) -> Any:
        trees, extras = given
        return tuple(
            tuple(together([tree[i] for i in lot]) for lot in lots) for tree in trees
        ), [extras[lot[0]] for lot in lots] if extras else extras

    passes = _passes(replace(measured, plan=plan), risks, in_one=True)
    return Joined(put_together, passes)


@_two_norms.defjvp
def _two_norms_jvp(
    measured: _Measured, primals: PyTree, tangents: PyTree
) -> tuple[list[Norms], list[Norms]]:
    """The slope of a norm: the sum of `x / norm` times the change of x; 0 at 0."""
    (given,), (changes,) = primals, tangents
    plan, dtype = measured.plan, measured.dtype
    found = _two_norms(measured, given)
    rows, moved = jax.jvp(lambda *given: measured.rows(given), given, changes)
    count = plan.sizes(given[0][0]) if plan.ord == "rms" else None

    def inverse(root: jax.Array, size: ArrayLike = 1) -> jax.Array:
        there = root > 0
        return jnp.where(there, 1 / (jnp.where(there, root, 1) * size), 0).astype(dtype)

    def slope(
        leaf: int, x: jax.Array, change: jax.Array, unit: Number, weight: jax.Array
    ) -> jax.Array:
        wide = widened(x, dtype)
        way = times(times(x.astype(wide), 1 / unit), weight)
        along = (way.conj() * change.astype(wide)).real
        return total(along, plan.groups.spans(leaf))

    slopes = []
    for norm, leaves, change in zip(found, rows, moved, strict=True):
        sizes = () if count is None else (count,)
        weights = plan.groups.spread(jax.tree.map(inverse, norm.root, *sizes))
        units = plan.groups.spread(norm.unit)
        each = zip(leaves, change, units, weights, strict=True)
        slopes.append([slope(i, *x) for i, x in enumerate(each)])
    totals = plan.totals(slopes, [x for tree in given[0] for x in tree])
    return found, [
        Norms(
            total,
            jax.tree.map(jnp.divide, total, norm.unit),
            jax.tree.map(jnp.zeros_like, norm.unit),
        )
        for total, norm in zip(totals, found, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(
    measure: Callable[..., list[Norms]], measured: _Measured, given: PyTree
) -> Any:
    return measure(measured, given)


def _one(x: jax.Array) -> Number:
    return full_like(x, 1)


def _varying_one(x: jax.Array) -> Number:
    one, axes = _one(x), tuple(mesh.varying(x))
    return mesh.vary(jnp.asarray(one), axes) if axes else one


def _any_out_of_range(squares: list[Packed]) -> jax.Array:
    """Whether any sum of squares may have lost something."""
    # One by one: arrays of one shape may be cut in different ways.
    flags = [either(_above(x), _below(x)) for x in jax.tree.leaves(squares)]
    return functools.reduce(either, map(_any, flags))


def _above(squares: jax.Array) -> jax.Array:
    return more(squares, _RANGES[squares.dtype].high)


def _below(squares: jax.Array) -> jax.Array:
    return less(squares, _RANGES[squares.dtype].low)


def _any(flags: jax.Array) -> jax.Array:
    if not flags.ndim:
        return flags
    return lax.reduce_or(flags, tuple(range(flags.ndim)))


def _norms_of_each(
    squares: list[Packed], factors: list[Packed], risks: list[bool]
) -> list[Norms]:
    def one(square: Packed, factor: Packed, risk: bool) -> Norms:
        root = jax.tree.map(lax.sqrt, square)
        if not risk:
            return Norms(root, root, jax.tree.map(_one, root))
        unit = jax.tree.map(lambda x: fraction(1, x), factor)  # of powers of two
        return _of_roots(root, unit)

    return list(map(one, squares, factors, risks))


def _of_roots(root: Packed, unit: Packed) -> Norms:
    return Norms(jax.tree.map(saturated, root, unit), root, unit)


def _power_norms(measured: _Measured, given: PyTree) -> list[Norms]:
    """Norms of other orders, relative to the largest magnitude of each group."""
    plan, dtype = measured.plan, measured.dtype
    ord = float(plan.ord)
    flat = [x for tree in given[0] for x in tree]
    rows = [[x.astype(widened(x, dtype)) for x in row] for row in measured.rows(given)]

    def _peak(leaf: int, x: jax.Array) -> jax.Array:
        axes = plan.groups.spans(leaf)
        return jnp.max(_magnitude(x), axis=axes, keepdims=axes is not None)

    peaks = plan.totals(
        [[_peak(i, x) for i, x in enumerate(row)] for row in rows],
        flat,
        largest=True,
    )
    if ord == float("inf"):
        return [_of_roots(peak, jax.tree.map(jnp.ones_like, peak)) for peak in peaks]

    def term(leaf: int, x: jax.Array, peak: jax.Array) -> jax.Array:
        powers = power(quotient(jnp.abs(x), peak), ord)
        return total(powers, plan.groups.spans(leaf))

    peaks = [jax.tree.map(safe, lax.stop_gradient(peak)) for peak in peaks]
    terms = [
        [
            term(i, x, peak)
            for i, (x, peak) in enumerate(
                zip(row, plan.groups.spread(peak), strict=True)
            )
        ]
        for row, peak in zip(rows, peaks, strict=True)
    ]
    limits = _RANGES[dtype]
    high = limits.high**0.5

    def norm(total: Packed, peak: Packed) -> Norms:
        unit = jax.tree.map(
            lambda m: jnp.where(m > high, limits.large, 1).astype(dtype), peak
        )
        root = jax.tree.map(
            lambda s, m, u: (m / u) * power(s, 1 / ord), total, peak, unit
        )
        return _of_roots(root, unit)

    return list(map(norm, plan.totals(terms, flat), peaks))


def _magnitude(x: jax.Array) -> jax.Array:
    # Not every all-reduce passes a NaN through a max; every one passes infinity.
    return jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x))


def _can_leave_range(dtype: Dtype, sums: Dtype) -> bool:
    """Whether squares of numbers of a dtype may under- or overflow the sums'."""
    info, limits = jnp.finfo(dtype), _RANGES[jnp.dtype(sums)]
    return float(info.max) > sqrt(limits.high) or float(info.tiny) < sqrt(limits.low)
