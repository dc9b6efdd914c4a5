"""One step seen as a whole: a few numbers from the norms of all groups."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from .._devices import mesh
from .._devices.mesh import Placement
from .._devices.sums import stacked, vector_of
from .._reductions.groups import Packed, UnitGroups
from .._reductions.norms import Norms
from .._reductions.plan import Ord, Plan
from .._reductions.whole_norm import as_norm, combine, whole
from .._trees.arithmetic import (
    at_least,
    both,
    either,
    equal,
    finite,
    full_like,
    more,
    negated,
    total,
    where,
)
from .._trees.sizes import as_number, is_known
from . import scaling


class Summary(NamedTuple):
    """One step seen as a whole, the same on every device."""

    norm: jax.Array
    clipped_norm: jax.Array
    scale: jax.Array
    threshold: jax.Array | np.ndarray
    clipped: jax.Array
    any_clipped: jax.Array
    nonfinite: jax.Array
    unusable: jax.Array | np.bool_  # a threshold is negative or NaN


class _Row(NamedTuple):
    """What is to be known of some groups, as scalars."""

    peak: jax.Array  # the norm of all is `peak * total^(1/p)`
    total: jax.Array
    peak_after: jax.Array  # the same after clipping
    total_after: jax.Array
    over: jax.Array  # how many are above their thresholds
    lowest: jax.Array  # the smallest threshold
    ratio: jax.Array  # the largest of norm to threshold, and what belongs to it
    threshold: jax.Array
    scale: jax.Array


def summarize(
    plan: Plan, arrays: Sequence[Any], norms: Norms, limits: Packed, scales: Packed
) -> Summary:
    """One step seen as a whole, from the groups' norms and no other pass.

    Scalar groups are the same on every device. Units that stay sharded are summed up
    on each device, and the devices' rows gathered in one all-reduce.
    """
    groups, ord = plan.groups, plan.ord
    if not isinstance(groups, UnitGroups) and groups.count is None:
        return _of_tree(norms, limits, scales)
    clipped = scaling.clipped_norms(norms, limits, scales)
    sizes = plan.sizes(arrays)
    fields = (norms.value, limits, scaling.as_numbers(scales), clipped)
    if not isinstance(groups, UnitGroups):
        row = _row_of(fields, sizes, 1.0, ord)
        return _from_row(row, ord, *_extent(norms.value, sizes, [1.0]))

    def local(shards: Any, places: list[Placement], extras: Any) -> Summary:
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
        row = (
            rows[0] if each == 1 else _folded(stacked(list(map(vector_of, rows))), ord)
        )
        count, size = _extent(parts[0], sizes, weights)
        table = _gathered(row, kept)
        if table is None:
            return _from_row(row, ord, count, size)
        devices = len(table)
        return _from_row(_folded(table, ord), ord, count * devices, size * devices)

    flat = [x for field in fields for x in field]
    kept, each = groups.kept(plan.places), len(norms.value)
    return mesh.map_local(
        local, flat, kept * len(fields), (), lambda dims: PartitionSpec()
    )


def _gathered(row: _Row, kept: tuple[str, ...]) -> jax.Array | None:
    """The rows of all devices, on every device; None where all have the same."""
    # Over other axes a row varies by its type only: one of the copies is taken.
    varies = {name for number in row for name in mesh.varying(number)}
    copied = tuple(sorted(varies - set(kept)))
    if not kept and not copied:
        return None
    vector = vector_of(row)
    if copied:
        vector = jnp.where(mesh.index_in(copied) == 0, vector, 0)
    table = jnp.zeros((mesh.size_of(kept), *vector.shape), vector.dtype)
    table = lax.dynamic_update_slice(table, vector[None], (mesh.index_in(kept), 0))
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


def _of_tree(norms: Norms, limits: Packed, scales: Packed) -> Summary:
    over = more(norms.value, limits)
    return Summary(
        norm=norms.value,
        clipped_norm=scaling.clipped_norms(norms, limits, scales),
        scale=scaling.as_numbers(scales),
        threshold=limits,
        clipped=lax.convert_element_type(over, norms.value.dtype),
        any_clipped=over,
        nonfinite=negated(finite(norms.value)),
        unusable=negated(at_least(limits, 0)),
    )


def of_entries(
    norm: jax.Array,
    clipped_norm: jax.Array,
    outside: jax.Array,
    size: jax.Array,
    bad: jax.Array | None = None,
    *,
    threshold: Any,
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


def _row_of(fields: Sequence[Any], size: Any, weight: float, ord: Ord) -> _Row:
    """Of one array of groups."""
    norms, limits, scales, clipped_norms = fields
    dtype, zero = norms.dtype, full_like(norms, 0)
    usable = both(finite(norms), more(limits, 0))
    ratio = lax.div(where(usable, norms, zero), where(usable, limits, 1))
    ratio = where(either(usable, equal(norms, zero)), ratio, np.inf)
    over = lax.convert_element_type(more(norms, limits), dtype)
    weights = dtype.type(weight)
    if ord == "rms":
        weights = jnp.asarray(size, dtype) * weights
    return _Row(
        *whole(norms, weights, ord),
        *whole(clipped_norms, weights, ord),
        lax.mul(total(over), dtype.type(weight)),
        jnp.min(limits),
        *_worst(ratio, limits, scales),
    )


def _folded(table: jax.Array, ord: Ord) -> _Row:
    """Several rows as one."""
    rows = _Row(*table.T)
    return _Row(
        *combine(rows.peak, rows.total, ord),
        *combine(rows.peak_after, rows.total_after, ord),
        jnp.sum(rows.over),
        jnp.min(rows.lowest),
        *_worst(rows.ratio, rows.threshold, rows.scale),
    )


def _worst(
    ratio: jax.Array, limit: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest ratio of norm to threshold, with its threshold and scale.

    Of ratios that differ by rounding only the largest threshold is taken, since
    rounding depends on the mesh.
    """
    largest = jnp.max(ratio)
    here = at_least(ratio, lax.mul(largest, ratio.dtype.type(1 - 2.0**-18)))
    return (
        largest,
        jnp.max(where(here, limit, -np.inf)),
        jnp.min(where(here, scale, np.inf)),
    )


def _from_row(row: _Row, ord: Ord, count: Any, size: Any) -> Summary:
    norm = as_norm(row.peak, row.total, size, ord)
    return Summary(
        norm=norm,
        clipped_norm=as_norm(row.peak_after, row.total_after, size, ord),
        scale=row.scale,
        threshold=row.threshold,
        clipped=row.over / count,
        any_clipped=more(row.over, 0),
        nonfinite=negated(finite(norm)),
        unusable=negated(at_least(row.lowest, 0)),
    )


def nothing() -> Summary:
    """A step without any leaf."""
    # Each an array of its own: a state that holds one twice cannot be donated.
    numbers = [jnp.full((), x, jnp.float32) for x in (0, 0, 1, 0, 0)]
    return Summary(*numbers, *[jnp.zeros((), jnp.bool_) for _ in range(3)])
