"""Sums over leaves: which terms are added up, and how each platform does it best."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._devices.mesh import (
    Axes,
    can_be_joined,
    knows_shards,
    max_over,
    sum_over,
    vary,
    varying,
)
from .._trees.sizes import is_known

# A leaf, its first total on CPU if that is known, and what its terms depend on besides.
Operands = tuple[Any, ...]


class Terms(NamedTuple):
    """What is added up for each entry of a leaf, or what the largest is wanted of."""

    of: Callable[..., tuple[jax.Array, ...]]  # from a leaf's operands
    total: Callable[..., jax.Array] = jnp.sum
    one_on_cpu: bool = False  # there each is a pass: the first stands for all of them
    dtype: Any = np.float32  # of the totals
    in_turn: bool = False  # on TPU one leaf after the other

    def over(self, value: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """The total over mesh axes."""
        return (sum_over if self.total is jnp.sum else max_over)(value, axes)


def reduced(
    operands: Operands,
    terms: Terms,
    axes: tuple[int, ...] | None = None,
    keepdims: bool = False,
) -> list[jax.Array]:
    """The totals of each of a leaf's terms, traced once for all leaves of a shape."""
    # With Auto axes a call would hide from XLA how best to lay out what is reduced.
    reduce = _called if knows_shards(operands[0]) else _inlined
    return reduce(operands, terms, axes, keepdims)


def _reduced(
    operands: Operands, terms: Terms, axes: tuple[int, ...] | None, keepdims: bool
) -> list[jax.Array]:
    def totals(leaf: jax.Array, known: Any, *others: Any) -> list[jax.Array]:
        values = terms.of(leaf, *others)
        return [terms.total(x, axis=axes, keepdims=keepdims) for x in values]

    def first(leaf: jax.Array, known: Any, *others: Any) -> list[jax.Array]:
        narrow = jnp.finfo(leaf).bits < jnp.finfo(terms.dtype).bits
        found = totals(_for_a_sum_on_cpu(leaf, axes, narrow), known, *others)
        if known is not None:
            found[0] = known
        if axes and keepdims and not narrow and _has_few_long_rows(leaf, axes):
            found[0] = _added_by_rows((leaf, *others), terms, axes)
        return [vary(found[0], tuple(varying(x))) for x in found]

    if terms.one_on_cpu:
        return lax.platform_dependent(*operands, cpu=first, default=totals)
    return totals(*operands)


_called = jax.jit(_reduced, static_argnums=(1, 2, 3))
_inlined = jax.jit(_reduced, static_argnums=(1, 2, 3), inline=True)


def reduced_together(
    leaves: Sequence[Operands], terms: Terms, axes: Axes
) -> list[jax.Array]:
    """For each of the terms a vector of the leaves' totals.

    They are traced in batches, of which like ones are traced once.
    """
    if not can_be_joined([leaf[0] for leaf in leaves]):
        others = leaves[0][2:] if terms.in_turn else [leaf[2:] for leaf in leaves]
        return _batch_in_turn([leaf[:2] for leaf in leaves], others, terms, axes)[0]
    others = leaves[0][2:]
    found = []
    for end in range(len(leaves), 0, -_BATCH):
        batch = leaves[max(end - _BATCH, 0) : end]
        given = others if terms.in_turn else [leaf[2:] for leaf in batch]
        pairs = [leaf[:2] for leaf in batch]
        sums, others = _reduced_batch(pairs, given, terms, axes)
        found.append(sums)
    return [jnp.concatenate(vectors) for vectors in zip(*found[::-1], strict=True)]


_BATCH = 64


@functools.partial(jax.jit, static_argnums=(2, 3))
def _reduced_batch(
    pairs: list[Any], others: Any, terms: Terms, axes: Axes
) -> tuple[list[jax.Array], Any]:
    """The vectors of one batch, and what the next one depends on besides."""
    return lax.platform_dependent(
        pairs,
        others,
        cpu=functools.partial(_batch_in_rows, terms=terms, axes=axes),
        cuda=functools.partial(
            _batch_in_rows, terms=terms._replace(one_on_cpu=False), axes=axes
        ),
        default=functools.partial(_batch_in_turn, terms=terms, axes=axes),
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _reduced_in_turn(
    operands: Operands, terms: Terms, axes: Axes
) -> tuple[list[jax.Array], Any]:
    """The totals of a leaf, and what the next leaf's depend on besides.

    On TPU that waits for these totals; a leaf itself can still be fused with what makes
    it.
    """
    sums, others = lax.platform_dependent(
        [vary(x, axes) for x in _reduced(operands, terms, None, False)],
        [vary(x, axes) for x in operands[2:]],
        tpu=lambda *both: lax.optimization_barrier(both),
        default=lambda *both: both,
    )
    # A barrier gives all that passes it a derivative, constants too.
    return sums, tuple(map(lax.stop_gradient, others))


def _batch_in_turn(
    pairs: list[Any], others: Any, terms: Terms, axes: Axes
) -> tuple[list[jax.Array], Any]:
    """Leaf by leaf.

    On TPU the last leaf comes first, and each waits for the one before: XLA would keep
    other leaves on the chip from there to their scaling. Of 1,000 bfloat16 leaves on a
    v5p pod 5,394 MB pass through HBM instead of 5,436; of groups .5% more would.
    """
    found = []
    for i in reversed(range(len(pairs))):
        if terms.in_turn:
            sums, others = _reduced_in_turn((*pairs[i], *others), terms, axes)
        else:
            sums = _called((*pairs[i], *others[i]), terms, None, False)
        found.append([vary(x, axes) for x in sums])
    return [jnp.stack(row) for row in zip(*found[::-1], strict=True)], others


def _batch_in_rows(
    pairs: list[Any], others: Any, terms: Terms, axes: Axes
) -> tuple[list[jax.Array], Any]:
    """Small leaves of one size as rows of one array, which XLA sums in one loop.

    On CPU the rows are a copy. Up to 16 KB a leaf that takes no longer than a loop for
    each leaf; of 2,000 leaves of 32 KB it would take 1.2 to 1.6 times as long.
    """
    alike: dict[Any, list[int]] = {}
    for i, (leaf, _) in enumerate(pairs):
        small = is_known(leaf.size) and leaf.size <= 2**12
        kind = (leaf.size, leaf.dtype, varying(leaf)) if small else i
        alike.setdefault(kind, []).append(i)
    found = []
    for members in alike.values():
        own = [others if terms.in_turn else others[i] for i in members]
        if len(members) == 1:
            sums = _called((*pairs[members[0]], *own[0]), terms, None, False)
            found.append([x[None] for x in sums])
            continue
        rows = jnp.stack([pairs[i][0].reshape(-1) for i in members])
        columns = [jnp.stack(column)[:, None] for column in zip(*own, strict=True)]
        sums = [terms.total(x, axis=1) for x in terms.of(rows, *columns)]
        found.append(sums[:1] * len(sums) if terms.one_on_cpu else sums)
    vectors = [jnp.concatenate(row) for row in zip(*found, strict=True)]
    order = [i for members in alike.values() for i in members]
    if order != sorted(order):
        vectors = [x[np.argsort(order)] for x in vectors]
    if terms.in_turn:
        others = tuple(vary(x, axes) for x in others)
    return [vary(x, axes) for x in vectors], others


def can_go_by_parts(arrays: Sequence[jax.Array]) -> bool:
    """Whether like arrays are large, may be cut up, and int32 counts their entries."""
    size = arrays[0].size
    return is_known(size) and 2**18 <= size < 2**31 and can_be_joined(arrays)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def sums_by_parts(
    values: Callable[..., list[jax.Array]], arrays: Sequence[jax.Array], others: Any
) -> list[jax.Array]:
    """The sums of `values(*arrays, others)`, all of them in one read; on CPU alone.

    XLA for CPU writes out what is computed before it is summed: 75 ms for 200 MB and
    their clamp, of which a read takes 7. In a loop over parts that stay in the cache it
    takes 14. For smaller arrays compiling the loop costs more than it saves.
    """
    size, part = arrays[0].size, 2**16
    flat = [lax.reshape(x, (size,)) for x in arrays]

    def add(i: Any, sums: list[jax.Array]) -> list[jax.Array]:
        start = jnp.minimum(i * part, size - part)
        found = values(*[lax.dynamic_slice(x, (start,), (part,)) for x in flat], others)
        if size % part:  # the last part begins within the one before
            new = lax.iota(jnp.int32, part) >= i * part - start
            found = [jnp.where(new, x, 0) for x in found]
        return list(map(jnp.add, sums, found))

    def on_cpu() -> list[jax.Array]:
        first = values(*[x[:part] for x in flat], others)  # for its types alone
        zeros = [vary(jnp.zeros(x.shape, x.dtype), tuple(varying(x))) for x in first]
        sums = lax.fori_loop(0, -(-size // part), add, zeros)
        return list(map(jnp.sum, sums))

    def elsewhere() -> list[jax.Array]:
        return list(map(jnp.sum, values(*[x[:1] for x in flat], others)))  # not used

    return lax.platform_dependent(cpu=on_cpu, default=elsewhere)


@sums_by_parts.defjvp
def _sums_by_parts_jvp(values: Any, primals: Any, tangents: Any) -> Any:
    # Derived part by part, what each part needs again would be kept.
    @jax.checkpoint
    def at_once(arrays: Any, others: Any) -> list[jax.Array]:
        return list(map(jnp.sum, values(*arrays, others)))

    _, tangent = jax.jvp(at_once, primals, tangents)
    return sums_by_parts(values, *primals), tangent


def _for_a_sum_on_cpu(
    leaf: jax.Array, axes: tuple[int, ...] | None, narrow: bool
) -> jax.Array:
    """A small leaf as a vector, a narrow one by itself.

    A small array of several dimensions XLA sums entry by entry: of 2,304 equal ones the
    sum is off by 3e-5 of itself. A vector it sums in parts of 32. A large array may lie
    in another order than a vector.
    """
    some = axes is None and leaf.ndim > 1 and is_known(leaf.size)
    if some and leaf.size <= 2**13 and knows_shards(leaf):
        # Behind a barrier, or XLA takes the sum of what was reshaped.
        return lax.optimization_barrier(lax.reshape(leaf, (leaf.size,)))
    if narrow:
        # What scales a narrow leaf widens it too: shared, the wide one would be stored.
        return lax.optimization_barrier(leaf)
    return leaf


def _has_few_long_rows(leaf: jax.Array, axes: tuple[int, ...]) -> bool:
    """Whether the leading axes are summed over, and what is kept is long."""
    if not is_known(leaf.size):
        return False
    rows = math.prod(leaf.shape[a] for a in axes)
    leading = axes == tuple(range(len(axes)))
    long = leaf.size >= rows * 2**16
    return leading and long and 1 < rows <= 64 and knows_shards(leaf)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _added_by_rows(
    operands: tuple[Any, ...], terms: Terms, axes: tuple[int, ...]
) -> jax.Array:
    """The sums of the first term over leading axes, one row added to the others.

    XLA for CPU takes 30 times as long for such a sum, of experts for example: 48 ms for
    16 x 512 x 1024, and a read takes 1.5.
    """
    leaf, *others = operands
    kept = tuple(1 if i in axes else n for i, n in enumerate(leaf.shape))
    rows = lax.reshape(leaf, (leaf.size,)).reshape(-1, *kept)
    total = terms.of(rows[0], *others)[0]
    for i in range(1, rows.shape[0]):
        total = total + terms.of(rows[i], *others)[0]
        if i % 16 == 0:  # what one loop holds is bounded
            total = lax.optimization_barrier(total)
    return total


@_added_by_rows.defjvp
def _added_by_rows_jvp(
    terms: Terms, axes: tuple[int, ...], primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    # Derived row by row, each would become an array of the leaf's size.
    def at_once(*operands: Any) -> jax.Array:
        return terms.total(terms.of(*operands)[0], axis=axes, keepdims=True)

    _, tangent = jax.jvp(at_once, *primals, *tangents)
    return _added_by_rows(*primals, terms, axes), tangent
