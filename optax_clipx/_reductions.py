"""Norms of groups of leaves that are right at any magnitude.

A float32 sum of squares is right while the norm is within about 1e-9..1e15. Beyond,
the squares under- or overflow, and the same sum is taken of values multiplied by a
power of two. On accelerators all three sums ride one read of the leaves; on CPU, where
each sum is a pass of its own, the second pass runs only when the first one needs it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import _mesh
from ._grouping import Groups, Packed, ScalarGroups, UnitGroups
from ._leaves import Path

Ord = float | str  # 1, 2, any p >= 1, inf, or "rms"


class Norms(NamedTuple):
    """Packed norms. `value` is `root / factor`, saturated at the largest number."""

    value: Packed
    root: Packed
    factor: Packed


class _Range(NamedTuple):
    """Sums of squares within low..high lost nothing to under- or overflow."""

    low: float
    high: float
    up: float  # multiplies what is below, a power of two
    down: float  # multiplies what is above


_RANGES = {
    jnp.dtype("float32"): _Range(2.0**-60, 2.0**100, 2.0**80, 2.0**-80),
    jnp.dtype("float64"): _Range(2.0**-500, 2.0**1000, 2.0**600, 2.0**-600),
}


def accumulator(arrays: Sequence[Any]) -> Any:
    """The dtype of sums, limits and scales: float64 if any leaf has it."""
    wide = any(jnp.finfo(x.dtype).bits == 64 for x in arrays)
    return jnp.dtype("float64" if wide else "float32")


def norms(
    arrays: Sequence[Any],
    groups: Groups,
    ord: Ord,
    paths: list[Path],
    axis_name: Any = None,
    specs: Any = None,
) -> Norms:
    """The norm of each group, the same on every device that holds the group."""
    _mesh.refuse_unreduced(arrays, paths)
    places = tuple(_mesh.placements(arrays, paths, axis_name, specs))

    def out_specs(dims: Any) -> Any:
        spec = jax.sharding.PartitionSpec()
        if isinstance(groups, UnitGroups):
            spec = tuple(
                jax.sharding.PartitionSpec(*(() if i in axes else d for i, d in enumerate(leaf)))
                for leaf, axes in zip(dims, groups.axes, strict=True)
            )
        return Norms(spec, spec, spec)

    def local(shards: Any, shard_places: Any) -> Norms:
        return _norms(tuple(shards), groups, ord, tuple(shard_places))

    found = _mesh.map_local(local, arrays, out_specs)
    return local(arrays, places) if found is None else found


# Traced once for each structure, also where `update` is called outside of jit.
@functools.partial(jax.jit, static_argnums=(1, 2, 3), inline=True)
def _norms(
    arrays: tuple[Any, ...],
    groups: Groups,
    ord: Ord,
    places: tuple[_mesh.Placement, ...],
) -> Norms:
    dtype = accumulator(arrays)
    if ord in (2, "rms"):
        squares, factor = _sums_of_squares(arrays, groups, places, dtype)
        if ord == "rms":
            sizes = groups.sizes(arrays, places)
            squares = jax.tree.map(lambda s, n: s / jnp.asarray(n, dtype), squares, sizes)
        root = jax.tree.map(_sqrt, squares)
    else:
        root, factor = _power_norms(arrays, groups, places, dtype, ord)
    factor = jax.tree.map(lax.stop_gradient, factor)
    return Norms(jax.tree.map(_saturated_quotient, root, factor), root, factor)


def _sums_of_squares(
    arrays: tuple[Any, ...], groups: Groups, places: Any, dtype: Any
) -> tuple[Packed, Packed]:
    """Sums of squares of values times a factor, and the factors."""
    limits = _RANGES[dtype]
    at_risk = [_can_leave_range(x.dtype, dtype) for x in arrays]
    if not any(at_risk):
        squares = groups.totals([_squares(arrays, dtype)], places, "sum")[0]
        return squares, jax.tree.map(jnp.ones_like, squares)

    def choose(squares: jax.Array, at_risk: Any) -> jax.Array:
        fits = squares <= limits.high  # false for NaN
        factor = jnp.where(squares < limits.low, limits.up, jnp.where(fits, 1, limits.down))
        return lax.stop_gradient(jnp.where(at_risk, factor, 1).astype(dtype))

    group_at_risk = groups.any_member(at_risk)

    def all_at_once(*arrays: Any) -> tuple[Packed, Packed]:
        plain, raised, lowered = groups.totals(
            [
                _squares(arrays, dtype),
                # What is above 1 is not chosen, but must stay finite for gradients.
                [_square(_clamp_to_one(x.astype(widened(x, dtype))) * limits.up) for x in arrays],
                [_square(x.astype(widened(x, dtype)) * limits.down) for x in arrays],
            ],
            places,
            "sum",
        )
        factor = jax.tree.map(choose, plain, group_at_risk)

        def pick(f: Any, p: Any, r: Any, l: Any) -> jax.Array:
            return jnp.where(f == 1, p, jnp.where(f > 1, r, l))

        return jax.tree.map(pick, factor, plain, raised, lowered), factor

    def again_if_needed(*arrays: Any) -> tuple[Packed, Packed]:
        plain = groups.totals([_squares(arrays, dtype)], places, "sum")[0]
        factor = jax.tree.map(choose, plain, group_at_risk)
        rescue = functools.reduce(
            jnp.logical_or, [jnp.any(f != 1) for f in jax.tree.leaves(factor)]
        )

        def second_pass(factor: Any, arrays: Any, plain: Any) -> Packed:
            terms = [
                _square(times(x.astype(widened(x, dtype)), f))
                for x, f in zip(arrays, groups.spread(factor), strict=True)
            ]
            return groups.totals([terms], places, "sum")[0]

        def first_pass(factor: Any, arrays: Any, plain: Any) -> Packed:
            return plain

        return lax.cond(rescue, second_pass, first_pass, factor, arrays, plain), factor

    # Units that stay sharded differ by device: no device may go alone into a branch
    # that holds a collective.
    uniform = isinstance(groups, ScalarGroups) or not any(p.axes for p in places)
    if not uniform:
        return all_at_once(*arrays)
    return lax.platform_dependent(*arrays, cpu=again_if_needed, default=all_at_once)


def _power_norms(
    arrays: tuple[Any, ...], groups: Groups, places: Any, dtype: Any, ord: Any
) -> tuple[Packed, Packed]:
    """Norms of other orders, relative to the largest magnitude of each group."""
    magnitudes = [jnp.abs(x.astype(widened(x, dtype))) for x in arrays]
    # Not every all-reduce passes a NaN through a max; every one passes infinity.
    peaks = [jnp.where(jnp.isnan(x), jnp.inf, x) for x in magnitudes]
    peak = groups.totals([peaks], places, "max")[0]
    if ord == float("inf"):
        return peak, jax.tree.map(jnp.ones_like, peak)
    peak = jax.tree.map(lax.stop_gradient, peak)
    safe = jax.tree.map(lambda m: jnp.where((m > 0) & jnp.isfinite(m), m, 1), peak)
    ratios = [x / m for x, m in zip(magnitudes, groups.spread(safe), strict=True)]
    sums = groups.totals([[_power(r, ord) for r in ratios]], places, "sum")[0]
    large = _RANGES[dtype].high ** 0.5
    down = _RANGES[dtype].down
    factor = jax.tree.map(lambda m: jnp.where(m > large, down, 1).astype(dtype), safe)
    root = jax.tree.map(lambda s, m, f: (m * f) * _power(s, 1 / ord), sums, safe, factor)
    return root, factor


def whole(norms: Packed, sizes: Packed, ord: Ord) -> tuple[jax.Array, jax.Array]:
    """`(peak, total)` of packed norms, from which `combine` makes the whole norm."""
    leaves, weights = jax.tree.leaves(norms), jax.tree.leaves(sizes)
    peak = jnp.max(jnp.stack([jnp.max(n) for n in leaves]))
    safe = jnp.where((peak > 0) & jnp.isfinite(peak), peak, 1)
    power = 2 if ord == "rms" else ord
    if ord == float("inf"):
        return peak, jnp.ones_like(peak)
    terms = []
    for n, size in zip(leaves, weights, strict=True):
        weight = jnp.asarray(size if ord == "rms" else 1, n.dtype)
        terms.append(jnp.sum(_power(n / safe, power) * weight))
    return peak, jnp.sum(jnp.stack(terms))


def combine(peaks: jax.Array, totals: jax.Array, size: float, ord: Ord) -> jax.Array:
    """The whole norm from vectors of peaks and totals."""
    peak = jnp.max(peaks)
    if ord == float("inf"):
        return peak
    power = 2 if ord == "rms" else ord
    safe = jnp.where((peak > 0) & jnp.isfinite(peak), peak, 1)
    total = jnp.sum(totals * _power(peaks / safe, power))
    if ord == "rms":
        total = total / jnp.asarray(size, total.dtype)
    return _saturated_quotient(safe * _power(total, 1 / power), jnp.ones_like(peak))


def _squares(arrays: Sequence[Any], dtype: Any) -> list[jax.Array]:
    return [_square(x.astype(widened(x, dtype))) for x in arrays]


def _square(x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)


def times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """A real or complex array times a real one, part by part."""
    if jnp.iscomplexobj(x):
        return lax.complex(x.real * factor, x.imag * factor)
    return x * factor


def widened(x: Any, dtype: Any) -> Any:
    """The accumulator's dtype, or its complex kin for a complex leaf."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.complex128 if dtype == jnp.float64 else jnp.complex64
    return dtype


def _power(x: jax.Array, p: float) -> jax.Array:
    if p == 1:
        return x
    if p == 2:
        return jnp.square(x)
    positive = x > 0
    # x**p has no derivative at 0 for p < 1.
    return jnp.where(positive, jnp.where(positive, x, 1) ** p, x)


def _sqrt(x: jax.Array) -> jax.Array:
    zero = x == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def _saturated_quotient(root: jax.Array, factor: jax.Array) -> jax.Array:
    largest = jnp.finfo(root.dtype).max
    finite = jnp.isfinite(root)
    return jnp.where(finite, jnp.minimum(root / factor, largest), root)


def _clamp_to_one(x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):
        return lax.complex(jnp.clip(x.real, -1, 1), jnp.clip(x.imag, -1, 1))
    return jnp.clip(x, -1, 1)


def _can_leave_range(leaf: Any, dtype: Any) -> bool:
    """Whether squares of this leaf's numbers may under- or overflow the sums'."""
    largest = float(jnp.finfo(leaf).max)
    smallest = float(jnp.finfo(leaf).smallest_normal)
    limits = _RANGES[jnp.dtype(dtype)]
    return not (largest**2 < limits.high and smallest**2 > limits.low)
