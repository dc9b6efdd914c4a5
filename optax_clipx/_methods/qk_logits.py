"""The largest logit of each attention head, from queries and keys block by block."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree, Shaped

from .._devices import mesh
from .._trees.arguments import AxisNames, check_static_count, check_static_number
from .._trees.arithmetic import accumulator
from .._trees.leaves import path_of
from .._trees.types import AnyArray, Scalar
from .qk_layouts import attention_name

_FIELD = "max_logits"


def max_logits(
    query: Float[Array | np.ndarray, "..."],
    key: Float[Array | np.ndarray, "..."],
    *,
    mask: Shaped[Array | np.ndarray, "..."] | None = None,
    causal: bool = False,
    scale: float | int | None = None,
    axis_name: AxisNames = None,
    block_size: int = 128,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, " heads"]:
    r"""The largest logit of each head over batch and positions, without the logits.

    .. math:: S_h = s \max_{b, i, j}\; q_{b i h} \cdot k_{b j g(h)}

    Here :math:`q` are the queries, :math:`k` the keys, :math:`s` is ``scale`` and
    :math:`g(h)` the key head of query head :math:`h`. Queries and keys are multiplied
    in blocks, one pair after the other, so that only a block of logits is in memory:
    for each example and head ``block_size ** 2`` numbers, and never all of them,
    however short the sequences are. This costs one more product of queries and keys, in
    float32 or wider. No gradient flows through the result.

    Args:
        query: queries after rotary embeddings, as Flax has them: (batch, queries,
            heads, dim), with any number of batch axes.
        key: keys. With fewer heads than the queries each serves a group of consecutive
            query heads.
        mask: what may be seen, as in Flax: broadcastable to (batch, heads, queries,
            keys), and not zero where a key is seen.
        causal: whether query ``i`` only sees the keys up to ``i``. Blocks that nobody
            sees are not computed.
        scale: what the products are multiplied by; by default ``1 / sqrt(dim)``.
        axis_name: in ``shard_map`` and ``pmap``, the mesh axes over which batch or
            positions of the queries are sharded; ``()`` if only heads are, or nothing.
            Elsewhere it is not needed.
        block_size: the largest number of queries, and of keys, in a block.
        precision: of the products, as in :func:`jax.numpy.einsum`; use the model's.

    Returns:
        One number a query head; minus infinity for a head that sees no key.

    Raises:
        ValueError: if shapes do not agree, or ``scale`` is not above 0; in manual code
            without ``axis_name``.
        TypeError: if ``block_size`` or ``scale`` is no static number.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> query = jnp.ones((2, 6, 4, 16))  # batch, positions, heads, dim
        >>> print(clipx.qk.max_logits(query, query, causal=True))
        [4. 4. 4. 4.]

    References:
        Kimi Team, 2025, arXiv 2507.20534, section 2.1, for what is measured; Rabe and
        Staats, 2021, arXiv 2112.05682, for attention in blocks.
    """
    check_static_count(block_size, "block_size")
    query, key = jnp.asarray(query), jnp.asarray(key)
    mask = None if mask is None else jnp.asarray(mask)
    scale = _scale_of(scale, query)
    mask = _checked_mask(query, key, mask)
    axes = _axes(axis_name, [query, key] + ([] if mask is None else [mask]))
    query, key = _stopped(query, key)
    heads, key_heads = query.shape[-2], key.shape[-2]
    groups = (key_heads, heads // key_heads)
    grouped = query.reshape(*query.shape[:-2], *groups, query.shape[-1])
    if mask is not None:
        mask = _grouped_mask(mask, groups)
    sizes = [_block(n, block_size) for n in (query.shape[-3], key.shape[-3])]
    pairs = _pairs(query.shape[-3], key.shape[-3], sizes, causal)

    if not len(pairs):
        return jnp.full(heads, -jnp.inf, accumulator([query]))

    def largest(pair: Any) -> Any:
        return _in_block(grouped, key, mask, pair, sizes, causal, precision)

    # The first block is outside of the scan, so that it starts with the right type:
    # sharded, or varying over mesh axes, as what comes out of each block.
    best, _ = lax.scan(
        lambda best, pair: (lax.max(best, largest(pair)), None),
        largest(pairs[0]),
        pairs[1:],
    )
    best = best.max(tuple(range(best.ndim - 2)), initial=-jnp.inf).reshape(heads)
    return mesh.max_over(best * np.asarray(scale, best.dtype), axes)


def _scale_of(scale: Scalar | None, query: AnyArray) -> float:
    if scale is None:
        return 1 / math.sqrt(query.shape[-1])
    check_static_number(scale, "scale")
    if not 0 < scale < math.inf:
        raise ValueError(f"Expected scale > 0, got scale={scale!r}.")
    return float(scale)


def _checked_mask(query: AnyArray, key: AnyArray, mask: AnyArray | None) -> Any:
    """The mask with the rank of the logits, if shapes agree."""
    *batch, queries, heads, dim = query.shape
    *key_batch, keys, key_heads, key_dim = key.shape
    if batch != key_batch or dim != key_dim or key_heads == 0 or heads % key_heads:
        raise ValueError(
            "Expected queries (batch, queries, heads, dim) and keys (batch, keys, key"
            " heads, dim), where heads is a multiple of key heads, got shapes"
            f" {query.shape} and {key.shape}."
        )
    if mask is None:
        return None
    logits = (*batch, heads, queries, keys)
    padded = (1,) * (len(logits) - mask.ndim) + tuple(mask.shape)
    pairs = zip(padded, logits, strict=False)
    if len(padded) != len(logits) or any(n not in (1, m) for n, m in pairs):
        raise ValueError(
            "Expected a mask broadcastable to (batch, heads, queries, keys) ="
            f" {logits}, got shape {mask.shape}."
        )
    return mask.reshape(padded)


def _axes(axis_name: AxisNames, arrays: Sequence[AnyArray]) -> tuple[str, ...]:
    """The mesh axes to take the largest over; in manual code they have to be said."""
    if axis_name is not None:
        places = mesh.placements(arrays[:1], [("query",)], axis_name, None)
        return places[0].axes
    seen = sorted(set().union(*map(mesh.varying, arrays)))
    blind = mesh.blind_axes() if mesh.is_unknown(None, None) else ()
    unknown = tuple(seen) or blind
    if unknown:
        raise ValueError(
            f"Cannot tell over which of the mesh axes {unknown} batch or positions are"
            f" sharded. Pass axis_name={unknown[0]!r} if they are sharded over it, so"
            " that the largest of all shards is found, or axis_name=() if only heads"
            " are, or nothing."
        )
    return ()


def _stopped(query: AnyArray, key: AnyArray) -> tuple[Any, Any]:
    """Without gradients, and in one dtype."""
    if query.dtype != key.dtype:
        query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    return lax.stop_gradient(query), lax.stop_gradient(key)


def _grouped_mask(mask: AnyArray, groups: tuple[int, int]) -> Any:
    """A mask with its axis of heads as groups and heads within one."""
    *batch, count, queries, keys = mask.shape
    split = groups if count > 1 else (1, 1)
    return mask.reshape(*batch, *split, queries, keys)


def _block(length: int, largest: int) -> int:
    """The length of a block: of at least two blocks, so that no block is all."""
    return max(1, min(largest, -(-length // 2)))


def _pairs(queries: int, keys: int, sizes: list[int], causal: bool) -> Any:
    """Where the blocks of each pair start. The last overlaps the one before it."""
    starts = [
        [min(i, n - size) for i in range(0, n, size)]
        for n, size in zip((queries, keys), sizes, strict=True)
    ]
    seen = [
        (i, j) for i in starts[0] for j in starts[1] if not causal or j < i + sizes[0]
    ]
    return np.asarray(seen, np.int32).reshape(-1, 2)


def _in_block(
    query: AnyArray,
    key: AnyArray,
    mask: AnyArray | None,
    pair: Any,
    sizes: list[int],
    causal: bool,
    precision: jax.lax.PrecisionLike,
) -> Any:
    """The largest products of one block: batch, key heads, heads of their groups.

    The batch is reduced at the end, so that a sharded one takes one all-reduce.
    """
    i, j = pair[0], pair[1]
    products = jnp.einsum(
        "...qhgd,...khd->...hgqk",
        lax.dynamic_slice_in_dim(query, i, sizes[0], query.ndim - 4),
        lax.dynamic_slice_in_dim(key, j, sizes[1], key.ndim - 3),
        precision=precision,
        preferred_element_type=accumulator([query]),
    )
    seen = None
    if causal:
        row = i + lax.broadcasted_iota(jnp.int32, tuple(sizes), 0)
        seen = row >= j + lax.broadcasted_iota(jnp.int32, tuple(sizes), 1)
        seen = lax.expand_dims(seen, range(products.ndim - 2))
    if mask is not None:
        part = mask
        for axis, start, size in ((-2, i, sizes[0]), (-1, j, sizes[1])):
            if mask.shape[axis] > 1:
                part = lax.dynamic_slice_in_dim(part, start, size, mask.ndim + axis)
        part = part != jnp.zeros((), part.dtype)
        seen = part if seen is None else part & seen
    if seen is not None:
        products = jnp.where(seen, products, -jnp.inf)
    return jnp.max(products, (-2, -1))


def recording(attention_fn: Any, *, axis_name: AxisNames = None) -> Callable[..., Any]:
    r"""Makes an ``attention_fn`` of Flax that records the largest logit of each head.

    .. math:: S_h = \max_{b, i, j} q_{b i h} \cdot k_{b j h} / \sqrt{d}

    Pass it to ``flax.nnx.MultiHeadAttention`` or
    ``flax.linen.MultiHeadDotProductAttention``, and call the layer with
    ``sow_weights=True``. What is sown is then not the weights but
    :func:`qk.max_logits` of the layer's queries and keys, with its mask, under the name
    ``max_logits``; :func:`qk.recorded` reads it. An additive ``bias`` is not part of
    it.

    Args:
        attention_fn: what computes the attention, such as
            ``flax.nnx.dot_product_attention``. It gets no module, and so sows nothing.
        axis_name: as in :func:`qk.max_logits`.

    Returns:
        A function to pass as ``attention_fn=``.

    Raises:
        TypeError: if ``attention_fn`` is no function.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> from flax import nnx
        >>> layer = nnx.MultiHeadAttention(
        ...     num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(0),
        ...     attention_fn=clipx.qk.recording(nnx.dot_product_attention))
        >>> forward = nnx.capture(layer, nnx.Intermediate)
        >>> _, sown = forward(jnp.ones((1, 3, 8)), sow_weights=True)
        >>> clipx.qk.recorded(sown)["attention"].shape
        (2,)

    References:
        :func:`flax.linen.Module.sow` and :meth:`flax.nnx.Module.sow`.
    """
    if not callable(attention_fn):
        raise TypeError(
            f"Expected attention_fn to be a function, got {attention_fn!r}."
        )

    @functools.wraps(attention_fn)  # Linen asks for the names of its arguments
    def recorded_attention(
        query: AnyArray,
        key: AnyArray,
        value: jax.Array,
        *,
        module: Any = None,
        **options: PyTree,
    ) -> Any:
        if module is not None:
            largest = max_logits(
                query,
                key,
                mask=options.get("mask"),
                causal=bool(options.get("is_causal", False)),
                axis_name=axis_name,
                precision=options.get("precision"),
            )
            module.sow(_collection(module), _FIELD, largest)
        return attention_fn(query, key, value, **options)

    return recorded_attention


def _collection(module: Any) -> Any:
    """Where a module sows: a name in Linen, a type in NNX."""
    from flax import linen, nnx

    return "intermediates" if isinstance(module, linen.Module) else nnx.Intermediate


def recorded(intermediates: PyTree) -> dict[str, jax.Array]:
    r"""The largest logits that were sown, as ``max_logits`` for QK-Clip.

    .. math:: \text{name of an attention} \to (S_1, \ldots, S_H)

    The names are the paths of the attentions, as in :func:`qk.flax`. If an attention
    was called several times, the largest of all calls counts.

    Args:
        intermediates: what was sown: the second result of Linen's
            ``apply(..., mutable=["intermediates"])``, or of
            ``nnx.capture(model, nnx.Intermediate)(...)``; with a Flax that has no
            ``capture``, what ``nnx.pop(model, nnx.Intermediate)`` returns after the
            call. Any tree with ``max_logits`` in the paths of its leaves will do.

    Returns:
        A dict from names to arrays.

    Raises:
        ValueError: if there is none.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> sown = {"block": {"attn": {"max_logits": (jnp.array([3.0, 120.0]),)}}}
        >>> print(clipx.qk.recorded(sown)["block/attn"])
        [  3. 120.]

    References:
        :func:`flax.linen.Module.sow` and :meth:`flax.nnx.Module.sow`.
    """
    found: dict[str, jax.Array] = {}
    with_keys = jax.tree_util.tree_leaves_with_path(intermediates)
    paths = [path_of(keys) for keys, _ in with_keys]
    for path, (_, leaf) in zip(paths, with_keys, strict=True):
        if _FIELD not in path:
            continue
        parent = list(path[: path.index(_FIELD)])
        inner = parent[1:] if parent[:1] == ["intermediates"] else parent
        name = attention_name(inner)
        found[name] = jnp.maximum(found[name], leaf) if name in found else leaf
    if not found:
        known = ", ".join("/".join(path) for path in paths[:10]) or "nothing"
        raise ValueError(
            f"Expected leaves named 'max_logits', found {known}. Give the attention"
            " attention_fn=optax_clipx.qk.recording(...), call it with"
            " sow_weights=True, and in Linen apply the model with"
            " mutable=['intermediates']."
        )
    return found
