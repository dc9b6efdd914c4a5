"""From norms and limits to scales, and from scales to clipped leaves."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from .._devices.mesh import Placement, lies_whole, map_local
from .._reductions.groups import Groups, Packed, ScalarGroups, UnitGroups
from .._reductions.norms import Norms
from .._reductions.parts import Part, cut, unknown
from .._trees.arithmetic import times, widened

Response = Callable[[jax.Array, jax.Array], jax.Array]


class Scales(NamedTuple):
    """Packed scales in two factors, since one may be too small for a float."""

    coarse: Packed  # 1, but where a scale is extreme
    fine: Packed
    clipped_norm: Packed
    starts: tuple[Any, ...] | None = None  # where what a leaf needs begins
    tame: jax.Array | None = None  # of units: whether every first factor is 1

    def product(self) -> Packed:
        """The scales as single numbers."""
        return jax.tree.map(jnp.multiply, self.coarse, self.fine)


def scales(norms: Norms, limits: Packed, response: Response) -> Scales:
    """What each group is multiplied by, whatever the magnitudes."""
    found = jax.tree.map(
        functools.partial(_scale, response),
        norms.value,
        norms.root,
        norms.factor,
        norms.squares,
        limits,
    )
    return Scales(*(_field(found, norms.value, i) for i in range(3)))


def _field(found: Any, like: Packed, index: int) -> Packed:
    if isinstance(like, tuple):
        return tuple(x[index] for x in found)
    return found[index]


def _scale(
    response: Response,
    value: jax.Array,
    root: jax.Array,
    factor: jax.Array,
    squares: jax.Array,
    limit: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    info = jnp.finfo(value.dtype)
    # The norm itself, or where it is beyond the largest number its root.
    beyond = (value >= info.max) & (factor < 1) & jnp.isfinite(root)
    beyond = beyond & ~jnp.isposinf(limit)
    nonzero = jnp.where(value > 0, value, 1)
    norm = jnp.where(beyond, root, nonzero)
    unit = jnp.where(beyond, jnp.sqrt(factor), 1)
    # Far above its limit, the scale is split evenly over two factors.
    extreme = beyond | (limit < norm * 2.0 ** (info.minexp * 3 // 4))
    extreme = extreme & (limit > 0) & jnp.isfinite(limit) & jnp.isfinite(norm)
    extreme = extreme & (value > 0)
    half = jnp.sqrt(jnp.where(extreme, limit, 1)) / jnp.sqrt(
        jnp.where(extreme, norm, 1)
    )
    half = lax.stop_gradient(half)
    coarse = lax.stop_gradient(half * unit)
    fine = response(norm, (limit / half) * unit)
    plain = ~extreme & (factor == 1) & (fine != 1)
    fine = jnp.where(plain, _sharpened(fine, norm, squares, limit), fine)
    fine = jnp.minimum(fine, info.max)
    # An infinite limit, like a zero norm, changes nothing.
    fine = jnp.where((value == 0) | jnp.isposinf(limit), 1, fine)
    clipped = jnp.where(value == 0, 0, (norm * fine) * (half / unit))
    clipped = jnp.where(jnp.isposinf(limit), value, clipped)
    return coarse, fine, clipped


def _sharpened(
    scale: jax.Array, norm: jax.Array, squares: jax.Array, limit: jax.Array
) -> jax.Array:
    """A scale that aims at the limit, from the squares: one rounding less.

    It makes the clipped norm the limit to the last bit more often. Dividing each entry
    would too, but on CPU it makes a whole step of Adam 2.4 times as long.
    """
    info = jnp.finfo(norm.dtype)
    aims = jnp.abs(scale * norm - limit) <= 4 * float(info.eps) * limit
    low, high = float(info.tiny) * 1e8, float(info.max)
    wanted = jnp.square(limit)
    in_range = (wanted > low) & (wanted < high) & (squares > low) & (squares < high)
    usable = aims & in_range & (wanted / jnp.where(in_range, squares, 1) > low)
    ratio = jnp.where(usable, wanted, 1) / jnp.where(usable, squares, 1)
    sharp = lax.stop_gradient(jnp.sqrt(ratio) - scale)
    return scale + jnp.where(usable, sharp, 0)


@functools.partial(jax.jit, static_argnums=3, inline=True)
def settle(
    scales: Scales, lost: jax.Array, zero: jax.Array, starts: tuple[int, ...]
) -> tuple[Scales, jax.Array]:
    """The scales, NaN where everything is lost, and the flag for zeros.

    On CPU they come out of a cond, which computes them once: XLA may fuse what led to
    them into the loop of every leaf. docs/design.md has what was measured.
    """
    units = isinstance(scales.fine, tuple) and all(map(lies_whole, scales.fine))

    def usual(scales: Scales, lost: Any, zero: Any) -> Any:
        if not units:
            return scales, zero
        tame = jnp.stack([jnp.all(c == 1) for c in scales.coarse])
        return scales._replace(tame=jnp.all(tame)), zero

    def rare(scales: Scales, lost: Any, zero: Any) -> Any:
        # Both factors change here: one that does not is left outside of the cond.
        # A response may be NaN for a norm of infinity, and NaN times 0 is not 0.
        def either(c: jax.Array) -> jax.Array:
            return jnp.where(lost, jnp.nan, jnp.where(zero, 1, c))

        coarse = jax.tree.map(either, scales.coarse)
        fine = jax.tree.map(either, scales.fine)
        tame = jnp.zeros((), jnp.bool_) if units else None
        return scales._replace(coarse=coarse, fine=fine, tame=tame), zero

    def on_cpu(scales: Scales, lost: Any, zero: Any) -> Any:
        # With starts of 0: then all scales are NaN, or all entries become 0.
        scales, flag = lax.cond(lost | zero, rare, usual, scales, lost, zero)
        return scales._replace(starts=unknown(starts, ~(lost | zero))), flag

    def elsewhere(scales: Scales, lost: Any, zero: Any) -> Any:
        scales, zero = rare(scales, lost, zero)
        return scales._replace(starts=tuple(map(np.uint32, starts))), zero

    return lax.platform_dependent(scales, lost, zero, cpu=on_cpu, default=elsewhere)


def apply(
    arrays: list[Any], groups: Groups, scales: Scales, zero: jax.Array | None
) -> list[jax.Array]:
    """Multiplies each leaf in the accumulator's dtype and casts it once."""

    def local(shards: Sequence[Any], places: Any, extras: Any) -> list[jax.Array]:
        zero, starts, tame = extras
        parts = iter(shards)
        leaves = [next(parts) for _ in arrays]
        coarse, fine = (
            groups.spread(tuple(next(parts) for _ in packed), starts)
            for packed in (scales.coarse, scales.fine)
        )
        pairs = zip(leaves, coarse, fine, strict=True)
        return [_apply(x, c, f, tame, zero) for x, c, f in pairs]

    if isinstance(groups, UnitGroups) and groups.buckets:
        flat = [*arrays, *scales.coarse, *scales.fine]
        nowhere = [Placement((), None)] * len(flat)
        return map_local(
            local,
            flat,
            nowhere,
            (zero, scales.starts, scales.tame),
            lambda dims: [PartitionSpec(*d) for d in dims[: len(arrays)]],
        )
    coarse = groups.spread(scales.coarse, scales.starts)
    fine = groups.spread(scales.fine, scales.starts)
    both = None
    if isinstance(groups, ScalarGroups) and groups.count is None:
        # A vector, or XLA for GPUs would not fuse the kernels of different leaves.
        both = lax.optimization_barrier(jnp.stack([scales.coarse, scales.fine]))
    pairs = zip(arrays, coarse, fine, strict=True)
    return [_apply(x, c, f, scales.tame, zero, both) for x, c, f in pairs]


@jax.jit
def _apply(
    array: Any,
    coarse_part: jax.Array | Part,
    fine_part: jax.Array | Part,
    tame: jax.Array | None,
    zero: jax.Array | None,
    both: jax.Array | None = None,
) -> jax.Array:
    coarse, fine = cut(coarse_part), cut(fine_part)
    if both is not None:
        coarse, fine = lax.platform_dependent(
            coarse,
            fine,
            both,
            cuda=lambda coarse, fine, both: (both[0], both[1]),
            default=lambda coarse, fine, both: (coarse, fine),
        )
    if zero is not None:
        array = jnp.where(zero, jnp.zeros_like(array), array)
    wide = array.astype(widened(array, fine.dtype))
    scaled = times(times(wide, coarse), fine).astype(array.dtype)
    # Multiplying by 1 would flush subnormals: what is not clipped is not touched.
    same = coarse * fine == 1
    if tame is not None:  # XLA for CPU has a loop for it that reads one factor only
        scaled = jnp.where(tame, times(wide, fine).astype(array.dtype), scaled)
        same = jnp.where(tame, fine == 1, same)
    if same.ndim:
        # On Explicit axes a select wants its predicate sharded as its operands are.
        same = same & ((scaled == scaled) | True)
    return jnp.where(same, array, scaled)
