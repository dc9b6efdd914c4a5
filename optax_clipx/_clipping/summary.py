"""One step seen as a whole: a few numbers from the norms of all groups."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from .._devices import mesh
from .._devices.mesh import Placement
from .._reductions.groups import Groups, Packed, UnitGroups
from .._reductions.norms import Norms, Ord
from .._reductions.whole_norm import combine, whole
from .._trees.leaves import Path
from .._trees.sizes import as_number, is_known
from .scaling import Scales


class Summary(NamedTuple):
    """One step seen as a whole, the same on every device."""

    norm: jax.Array
    clipped_norm: jax.Array
    scale: jax.Array
    threshold: jax.Array
    clipped: jax.Array
    any_clipped: jax.Array
    nonfinite: jax.Array
    unusable: jax.Array  # a limit is negative or NaN


def summarize(
    norms: Norms,
    limits: Packed,
    scales: Scales,
    groups: Groups,
    ord: Ord,
    arrays: list[Any],
    paths: list[Path],
    axis_name: Any,
    specs: Any,
) -> Summary:
    """One step seen as a whole, from the groups' norms and no other pass.

    Scalar groups are the same on every device. Units that stay sharded are summed up
    on each device, and the devices' rows gathered in one all-reduce.
    """
    if not isinstance(groups, UnitGroups) and groups.count is None:
        return _of_tree(norms, limits, scales)
    places = mesh.placements(arrays, paths, axis_name, specs)
    sizes = groups.sizes(arrays, places)
    fields = (norms.value, limits, scales.product(), scales.clipped_norm)
    if not isinstance(groups, UnitGroups):
        weights = [1.0]
        row = _row(*fields, sizes, ord, weights)
        return _from_rows(row[None], ord, *_extent(norms.value, sizes, weights))

    def local(shards: Any, places: list[Placement], extras: Any) -> Summary:
        parts = [tuple(shards[i : i + each]) for i in range(0, len(shards), each)]
        kept = tuple(sorted({name for place in places for name in place.axes}))
        # A unit that several rows have counts once.
        weights = [
            1 / mesh.size_of(tuple(set(kept) - set(place.axes)))
            for place in places[:each]
        ]
        before, limits, scales, after = parts
        row = _row(before, limits, scales, after, sizes, ord, weights)
        table = _gathered(row, kept)
        count, size = _extent(parts[0], sizes, weights)
        return _from_rows(table, ord, count * len(table), size * len(table))

    flat = [x for field in fields for x in field]
    kept, each = groups.kept(places), len(norms.value)
    return mesh.map_local(
        local, flat, kept * len(fields), (), lambda dims: PartitionSpec()
    )


def _gathered(row: jax.Array, kept: tuple[str, ...]) -> jax.Array:
    """The rows of all devices that hold different units, on every device."""
    # Over other axes a row varies by its type only: one of the copies is taken.
    copied = tuple(sorted(mesh.varying(row) - set(kept)))
    if not kept and not copied:
        return row[None]
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
    for n, entries, weight in zip(leaves, jax.tree.leaves(sizes), weights, strict=True):
        count += as_number(n.size) * weight
        if is_known(n.size) and not isinstance(entries, jax.Array):
            size += float(np.sum(np.broadcast_to(entries, n.shape))) * weight
        else:
            size += jnp.sum(jnp.broadcast_to(entries, n.shape)) * weight
    return count, size


def _of_tree(norms: Norms, limits: Packed, scales: Scales) -> Summary:
    over = norms.value > limits
    return Summary(
        norm=norms.value,
        clipped_norm=scales.clipped_norm,
        scale=scales.product(),
        threshold=limits,
        clipped=over.astype(norms.value.dtype),
        any_clipped=over,
        nonfinite=~jnp.isfinite(norms.value),
        unusable=~(limits >= 0),
    )


def _row(
    norms: Packed,
    limits: Packed,
    scales: Packed,
    clipped_norms: Packed,
    sizes: Packed,
    ord: Ord,
    weights: list[float],
) -> jax.Array:
    """What `_from_rows` needs to know of these groups, as one short vector."""
    dtype = jax.tree.leaves(norms)[0].dtype
    over, bad, unusable, each = [], [], [], []
    columns = map(jax.tree.leaves, (norms, limits, scales))
    for n, t, s, weight in zip(*columns, weights, strict=True):
        over.append(jnp.sum((n > t).astype(dtype)) * jnp.asarray(weight, dtype))
        bad.append(jnp.any(~jnp.isfinite(n)))
        unusable.append(jnp.any(~(t >= 0)))
        finite = jnp.isfinite(n) & (t > 0)
        ratio = jnp.where(finite, n, 0) / jnp.where(finite, t, 1)
        ratio = jnp.where(finite | (n == 0), ratio, jnp.inf)
        each.append(_worst(ratio, t, s))
    ratios, thresholds, scale_of = zip(*each, strict=True)
    worst = _worst(jnp.stack(ratios), jnp.stack(thresholds), jnp.stack(scale_of))
    before = whole(norms, sizes, ord, weights)
    after = whole(clipped_norms, sizes, ord, weights)
    numbers = [
        *before,
        *after,
        jnp.sum(jnp.stack(over)),
        jnp.any(jnp.stack(bad)).astype(dtype),
        jnp.any(jnp.stack(unusable)).astype(dtype),
        *worst,
    ]
    return jnp.stack(numbers)


def _worst(
    ratio: jax.Array, limit: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest ratio of norm to limit, with its limit and scale.

    Of ratios that differ by rounding only the largest limit is taken, since rounding
    depends on the mesh.
    """
    largest = jnp.max(ratio)
    here = ratio >= largest * (1 - 2.0**-18)
    return (
        largest,
        jnp.max(jnp.where(here, limit, -jnp.inf)),
        jnp.min(jnp.where(here, scale, jnp.inf)),
    )


def _from_rows(table: jax.Array, ord: Ord, count: Any, size: Any) -> Summary:
    columns = list(table.T)
    peak, total, peak_after, total_after, over, bad, unusable = columns[:7]
    _, threshold, scale = _worst(*columns[7:])
    num_over = jnp.sum(over)
    return Summary(
        norm=combine(peak, total, size, ord),
        clipped_norm=combine(peak_after, total_after, size, ord),
        scale=scale,
        threshold=threshold,
        clipped=num_over / count,
        any_clipped=num_over > 0,
        nonfinite=jnp.any(bad > 0),
        unusable=jnp.any(unusable > 0),
    )


def nothing() -> Summary:
    """A step without any leaf."""
    zero, no = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.bool_)
    return Summary(zero, zero, jnp.ones((), jnp.float32), zero, zero, no, no, no)
