"""One step seen as a whole: a few numbers from the norms of all groups."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import PyTree

from .._devices import mesh
from .._devices.mesh import Placement
from .._devices.programs import cut, entries
from .._devices.sums import stacked
from .._reductions.groups import Packed, UnitGroups
from .._reductions.plan import Ord, Plan
from .._reductions.whole_norm import as_norm, powers
from .._trees.arithmetic import (
    Number,
    at_least,
    both,
    either,
    finite,
    fraction,
    full_like,
    larger,
    less,
    more,
    negated,
    where,
)
from .._trees.sizes import as_number, is_known
from .._trees.types import Arrays


class Summary(NamedTuple):
    """One step seen as a whole, the same on every device."""

    norm: jax.Array
    clipped_norm: jax.Array
    scale: jax.Array
    threshold: Number
    clipped: jax.Array
    any_clipped: jax.Array
    nonfinite: jax.Array
    unusable: jax.Array | np.bool_  # a threshold is negative or NaN


class _Row(NamedTuple):
    """What is to be known of one group, or of several.

    The norm of several is `peak * total^(1/p)`.
    """

    # Of several the largest:
    peaks: Any  # before and after clipping
    ratio: Any  # of a norm to its threshold
    unusable: Any  # 1 if a threshold is
    # Of several the sum:
    totals: Any  # before and after clipping
    over: Any  # how many are above their thresholds
    # Of several those of the largest ratio:
    threshold: Any
    minus_scale: Any


class Folded(NamedTuple):
    """A step of several groups as one row; how many groups and entries there are."""

    row: jax.Array
    count: Any
    size: Any


# Of the groups, packed: norms, thresholds, scales, and norms after clipping.
Fields = tuple[Packed, Packed, Packed, Packed]


def fold(plan: Plan, arrays: Sequence[jax.Array], fields: Fields) -> Folded | Fields:
    """What the summary of a step is made of, from the groups' norms and no other pass.

    Of one group it is what is given. Scalar groups are the same on every device. Units
    that stay sharded are summed up on each device, and the devices' rows gathered in
    one all-reduce.
    """
    groups, ord = plan.groups, plan.ord
    if groups.is_one:
        return fields
    sizes = plan.sizes(arrays)
    if not isinstance(groups, UnitGroups):
        row = _row_of(fields, sizes, 1.0, ord)
        return Folded(row, *_extent(fields[0], sizes, [1.0]))

    def local(shards: Arrays, places: list[Placement], extras: PyTree) -> Folded:
        parts = [shards[i : i + each] for i in range(0, len(shards), each)]
        kept = tuple(sorted({name for place in places for name in place.axes}))
        # A unit that several rows have counts once.
        weights = [
            1 / mesh.size_of(tuple(set(kept) - set(place.axes)))
            for place in places[:each]
        ]
        rows = [
            _row_of([part[i] for part in parts], sizes[i], weights[i], ord)
            for i in range(each)
        ]
        row = rows[0] if each == 1 else _folded(_fields(stacked(rows)), ord)
        count, size = _extent(parts[0], sizes, weights)
        table = _gathered(row, kept)
        if table is not None:
            row = _folded(_fields(table), ord)
            count, size = count * len(table), size * len(table)
        return Folded(row, *(jnp.asarray(x, row.dtype) for x in (count, size)))

    flat = [x for field in fields for x in field]
    kept, each = groups.kept(plan.places), len(fields[0])
    return mesh.map_local(
        local, flat, kept * len(fields), (), lambda dims: PartitionSpec()
    )


def summary_of(folded: Folded | Fields, ord: Ord) -> Summary:
    """One step seen as a whole, of what `fold` gives."""
    if not isinstance(folded, Folded):
        return _of_tree(*folded)
    row = _fields(folded.row)
    norm, clipped_norm = entries(as_norm(row.peaks, row.totals, folded.size, ord))
    return Summary(
        norm=norm,
        clipped_norm=clipped_norm,
        scale=lax.neg(row.minus_scale),
        threshold=row.threshold,
        clipped=fraction(row.over, folded.count),
        any_clipped=more(row.over, 0),
        nonfinite=negated(finite(norm)),
        unusable=more(row.unusable, 0),
    )


def _gathered(row: jax.Array, kept: tuple[str, ...]) -> jax.Array | None:
    """The rows of all devices, on every device; None where all have the same."""
    # Over other axes a row varies by its type only: one of the copies is taken.
    copied = tuple(sorted(mesh.varying(row) - set(kept)))
    if not kept and not copied:
        return None
    if copied:
        row = jnp.where(mesh.index_in(copied) == 0, row, 0)
    table = jnp.zeros((mesh.size_of(kept), *row.shape), row.dtype)
    table = lax.dynamic_update_slice(table, row[None], (mesh.index_in(kept), 0))
    return mesh.sum_over(table, kept + copied)


def _extent(norms: Packed, sizes: Packed, weights: list[float]) -> tuple[Any, Any]:
    """How many groups and entries there are, with these weights."""
    count: Any = 0.0
    size: Any = 0.0
    leaves = jax.tree.leaves(norms)
    for n, inside, weight in zip(leaves, jax.tree.leaves(sizes), weights, strict=True):
        count += as_number(n.size) * weight
        if is_known(n.size) and not isinstance(inside, jax.Array):
            size += float(np.sum(np.broadcast_to(inside, n.shape))) * weight
        else:
            size += jnp.sum(jnp.broadcast_to(inside, n.shape)) * weight
    return count, size


def _of_tree(
    norm: jax.Array, limit: Number, scale: jax.Array, clipped_norm: jax.Array
) -> Summary:
    over = more(norm, limit)
    return Summary(
        norm=norm,
        clipped_norm=clipped_norm,
        scale=scale,
        threshold=limit,
        clipped=lax.convert_element_type(over, norm.dtype),
        any_clipped=over,
        nonfinite=negated(finite(norm)),
        unusable=negated(at_least(limit, 0)),
    )


def of_entries(
    norm: jax.Array,
    clipped_norm: jax.Array,
    outside: jax.Array,
    size: Number,
    bad: jax.Array | None = None,
    *,
    threshold: Number,
) -> Summary:
    """A step of single entries, `outside**2` of which were clipped.

    `bad**2` were not finite, if that is counted.
    """
    zero, one = full_like(norm, 0), full_like(norm, 1)
    some, any_clipped = more(norm, zero), more(outside, zero)
    share = lax.div(lax.round(lax.mul(outside, outside)), size)
    return Summary(
        norm=norm,
        clipped_norm=clipped_norm,
        scale=where(some, lax.div(clipped_norm, where(some, norm, one)), one),
        threshold=threshold,
        clipped=where(finite(share), share, zero),
        any_clipped=any_clipped,
        nonfinite=negated(finite(norm)) if bad is None else more(bad, zero),
        unusable=np.bool_(False),
    )


def _row_of(fields: Arrays, size: ArrayLike, weight: float, ord: Ord) -> jax.Array:
    """Of one array of groups."""
    norms, limits, scales, clipped_norms = fields
    dtype = norms.dtype
    # Of a norm of 0 it is 0, and of what is NaN infinite.
    ratio = lax.div(norms, larger(limits, float(jnp.finfo(dtype).tiny)))
    ratio = where(at_least(ratio, 0), ratio, np.inf)
    over = lax.convert_element_type(more(norms, limits), dtype)
    weights: Any = dtype.type(weight)
    if ord == "rms":
        each_size = jnp.broadcast_to(jnp.asarray(size, dtype), norms.shape)
        weights = lax.expand_dims(each_size * weights, (0,))
    each = _Row(
        peaks=_rows(norms, clipped_norms),
        ratio=ratio,
        # Not every maximum passes a NaN through. Of broken units thresholds may be NaN.
        unusable=lax.convert_element_type(
            either(less(limits, 0), both(finite(norms), lax.ne(limits, limits))), dtype
        ),
        totals=weights,
        over=over if weight == 1 else lax.mul(over, dtype.type(weight)),
        threshold=limits,
        minus_scale=lax.neg(scales),
    )
    return _folded(each, ord)


def _folded(rows: _Row, ord: Ord) -> jax.Array:
    """Of several rows, field by field, one: a vector. It takes three reductions.

    Of ratios that differ by rounding only the largest threshold is taken, since
    rounding depends on the mesh.
    """
    along = tuple(range(1, rows.peaks.ndim))
    others = _rows(rows.ratio, rows.unusable)
    top = lax.reduce_max(lax.concatenate((rows.peaks, others), 0), along)
    peaks, ratio = lax.slice(top, (0,), (2,)), lax.index_in_dim(top, 2, keepdims=False)
    shares = powers(rows.peaks, peaks, ord)
    if not (isinstance(rows.totals, np.generic) and rows.totals == 1):
        shares = shares * rows.totals
    summed = lax.concatenate((shares, _rows(rows.over)), 0)
    totals = lax.reduce_sum(summed, along)
    here = at_least(rows.ratio, lax.mul(ratio, ratio.dtype.type(1 - 2.0**-18)))
    none = full_like(rows.ratio, -np.inf)
    worst = [where(here, x, none) for x in (rows.threshold, rows.minus_scale)]
    return lax.concatenate((top, totals, lax.reduce_max(_rows(*worst), along)), 0)


def _fields(table: jax.Array) -> _Row:
    """The fields of a row, or of each row of a table: what `_folded` put together."""
    sizes = (2, 1, 1, 2, 1, 1, 1)
    parts = cut(table, sizes) if table.ndim == 1 else lax.split(table.T, sizes)
    each = zip(parts, sizes, strict=True)
    return _Row(*(x if n == 2 else lax.squeeze(x, (0,)) for x, n in each))


def _rows(*arrays: jax.Array) -> jax.Array:
    """Arrays of one shape as the rows of one."""
    return lax.concatenate([lax.expand_dims(x, (0,)) for x in arrays], 0)


def nothing() -> Summary:
    """A step without any leaf."""
    # Each an array of its own: a state that holds one twice cannot be donated.
    numbers = [jnp.full((), x, jnp.float32) for x in (0, 0, 1, 0, 0)]
    return Summary(*numbers, *[jnp.zeros((), jnp.bool_) for _ in range(3)])
