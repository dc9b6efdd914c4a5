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
from .._reductions.groups import Groups, Packed, UnitGroups
from .._reductions.norms import Norms, Ord
from .._reductions.whole_norm import as_norm, combine, whole
from .._trees.arithmetic import at_least, finite, full_like, more, negated
from .._trees.leaves import Leaves
from .._trees.sizes import as_number, is_known
from . import scaling
from .policies import Options


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


def summarize(
    norms: Norms,
    limits: Packed,
    scales: Packed,
    groups: Groups,
    ord: Ord,
    leaves: Leaves,
    options: Options,
) -> Summary:
    """One step seen as a whole, from the groups' norms and no other pass.

    Scalar groups are the same on every device. Units that stay sharded are summed up
    on each device, and the devices' rows gathered in one all-reduce.
    """
    if not isinstance(groups, UnitGroups) and groups.count is None:
        return _of_tree(norms, limits, scales)
    clipped = scaling.clipped_norms(norms, limits, scales)
    arrays = leaves.arrays
    places = mesh.placements(arrays, leaves.paths, options.axis_name, options.specs)
    sizes = groups.sizes(arrays, places)
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
        table = _gathered(_folded(stacked(rows), ord), kept)
        count, size = _extent(parts[0], sizes, weights)
        return _from_row(
            _folded(table, ord), ord, count * len(table), size * len(table)
        )

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
        unusable=negated(at_least(limits, full_like(limits, 0))),
    )


def _row_of(fields: Sequence[Any], size: Any, weight: float, ord: Ord) -> jax.Array:
    """What is to be known of the groups in one array, as a short vector."""
    norms, limits, scales, clipped_norms = fields
    dtype = norms.dtype
    finite = jnp.isfinite(norms) & (limits > 0)
    ratio = jnp.where(finite, norms, 0) / jnp.where(finite, limits, 1)
    ratio = jnp.where(finite | (norms == 0), ratio, jnp.inf)
    over = jnp.sum((norms > limits).astype(dtype)) * weight
    weights = jnp.asarray(size if ord == "rms" else 1, dtype) * weight
    wholes = [whole(n, weights, ord) for n in (norms, clipped_norms)]
    numbers = (*wholes[0], *wholes[1], over, jnp.min(limits))
    return vector_of([*numbers, *_worst(ratio, limits, scales)])


def _folded(table: jax.Array, ord: Ord) -> jax.Array:
    """Several rows as one."""
    if table.shape[0] == 1:
        return table[0]
    columns = list(table.T)
    peak, total, peak_after, total_after, over, low = columns[:6]
    wholes = [
        *combine(peak, total, ord),
        *combine(peak_after, total_after, ord),
    ]
    return vector_of([*wholes, jnp.sum(over), jnp.min(low), *_worst(*columns[6:])])


def _worst(
    ratio: jax.Array, limit: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest ratio of norm to threshold, with its threshold and scale.

    Of ratios that differ by rounding only the largest threshold is taken, since
    rounding depends on the mesh.
    """
    largest = jnp.max(ratio)
    here = ratio >= largest * (1 - 2.0**-18)
    return (
        largest,
        jnp.max(jnp.where(here, limit, -jnp.inf)),
        jnp.min(jnp.where(here, scale, jnp.inf)),
    )


def _from_row(row: jax.Array, ord: Ord, count: Any, size: Any) -> Summary:
    peak, total, peak_after, total_after, over, low, _, threshold, scale = list(row)
    norm = as_norm(peak, total, size, ord)
    return Summary(
        norm=norm,
        clipped_norm=as_norm(peak_after, total_after, size, ord),
        scale=scale,
        threshold=threshold,
        clipped=over / count,
        any_clipped=over > 0,
        nonfinite=~jnp.isfinite(norm),
        unusable=~(low >= 0),
    )


def nothing() -> Summary:
    """A step without any leaf."""
    # Each an array of its own: a state that holds one twice cannot be donated.
    numbers = [jnp.full((), x, jnp.float32) for x in (0, 0, 1, 0, 0)]
    return Summary(*numbers, *[jnp.zeros((), jnp.bool_) for _ in range(3)])
