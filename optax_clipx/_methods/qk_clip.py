"""QK-Clip: weights of queries and keys shrink where attention logits are too large."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .._clipping.metrics import QKClipState, count
from .._clipping.transformation import check_state
from .._devices import mesh
from .._trees.arguments import AxisNames, check_between, check_limit
from .._trees.arithmetic import accumulator
from .._trees.calls import explains_calls
from .._trees.leaves import Path
from .._trees.types import Scalar
from .qk_fitting import Fitted, Slot, fit, list_of, near
from .qk_layouts import Layouts


def qk_clip(
    params: PyTree,
    max_logits: PyTree,
    layout: Layouts,
    *,
    threshold: Scalar = 100.0,
    alpha: Scalar = 0.5,
) -> Any:
    r"""Shrinks the weights of queries and keys of heads whose logits are too large.

    .. math:: \gamma_h = \min(1, \tau / S_h), \quad
              W_q^h \leftarrow \gamma_h^{\alpha} W_q^h, \quad
              W_k^h \leftarrow \gamma_h^{1-\alpha} W_k^h

    Here :math:`S_h` is the largest attention logit of head :math:`h` and :math:`\tau`
    the threshold. The logits of head :math:`h` are then :math:`\gamma_h` times what
    they were, so that the largest is :math:`\tau`. A head whose maximum is at most the
    threshold, not above 0, infinite or NaN keeps its weights bit for bit. Call it after
    the optimizer's step, or use :func:`qk_clip_updates`, which also counts.

    Args:
        params: the parameters, in any pytree: dicts, NNX state, Linen variables.
        max_logits: for each layout's name an array with one maximum a head, over the
            batch and all positions, of all devices; (layers, heads) for a stack.
            :func:`qk.max_logits` computes it.
        layout: where queries, keys and heads are: from :func:`qk.mha`, :func:`qk.gqa`,
            :func:`qk.mla`, :func:`qk.fused` or :func:`qk.flax`, or a list of these.
        threshold: :math:`\tau`, a number above 0 or a scalar array.
        alpha: the share of the queries, 0 to 1: at 1 the keys keep their weights, at 0
            the queries.

    Returns:
        The parameters in the same structure and dtypes. The scale is applied in float32
        or wider, and rounded once to the dtype of the leaf.

    Raises:
        ValueError: if a path is not in ``params``, a name not in ``max_logits``, shapes
            do not agree, or ``threshold`` or ``alpha`` is out of range. Where they are
            traced, the leaves become NaN instead.
        TypeError: if ``layout`` is no layout or ``max_logits`` no dict.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> kernel = jnp.ones((3, 2, 4))  # in, heads, head dimension
        >>> params = {"attn": {"query": {"kernel": kernel}, "key": {"kernel": kernel}}}
        >>> layout = clipx.qk.mha("attn/query/kernel", "attn/key/kernel")
        >>> maxima = {"attn": jnp.array([50.0, 400.0])}
        >>> params = clipx.qk_clip(params, maxima, layout, threshold=100.0)
        >>> print(params["attn"]["query"]["kernel"][0, :, 0])
        [1.  0.5]

    References:
        Kimi Team, Kimi K2: Open Agentic Intelligence, 2025, arXiv 2507.20534, section
        2.1.
    """
    _check_numbers(threshold, alpha)
    leaves, treedef = jax.tree.flatten(params)
    for one in fit(layout, params):
        maxima = _maxima(one, max_logits)
        factors = _factors(one, _scales(maxima, threshold, alpha), alpha)
        for slot in one.slots:
            leaf = jnp.asarray(leaves[slot.index])
            leaves[slot.index] = _scaled(leaf, _for_leaf(slot, factors, leaf))
    return jax.tree.unflatten(treedef, leaves)


@explains_calls
def qk_clip_updates(
    layout: Layouts,
    *,
    threshold: Scalar = 100.0,
    alpha: Scalar = 0.5,
    axis_name: AxisNames = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Changes updates such that the parameters after the step are those of QK-Clip.

    .. math:: u \leftarrow \operatorname{qk\_clip}(w + u, S) - w

    Here :math:`w` are the parameters, :math:`u` the updates and :math:`S` the largest
    logits. It comes last in a chain, after the learning rate, and leaves the state of
    the optimizer as it is. ``update`` takes the maxima of the forward pass as
    ``max_logits=``. The name says that it is :func:`qk_clip` for updates: it does not
    clip updates by a norm, as the functions ``clip_by_...`` do.

    ======================  ======================================================
    metric                  of the last step
    ======================  ======================================================
    ``"qk/max_logit"``      the largest logit of all heads with a finite maximum
    ``"qk/scale"``          the smallest scale of a head
    ``"qk/clipped"``        the share of heads that were scaled
    ``"qk/nonfinite"``      how many heads had a maximum that is infinite or NaN
    ``"qk/nonpositive"``    how many had one that is not above 0
    ``"qk/steps"``          how many updates there were; ``num_clipped`` of them scaled
                            a head, ``num_nonfinite`` had a maximum that is not finite
    ======================  ======================================================

    In a narrow dtype the sum :math:`w + u` is rounded as any update's. In bfloat16 the
    weights are then within one unit in the last place of the weights *before* the step
    of what :func:`qk_clip` gives: exact to the dtype while the scale of a leaf is above
    one half. After a larger change a few more percent may remain, which the next step
    takes away.

    Args:
        layout: as in :func:`qk_clip`.
        threshold: as in :func:`qk_clip`; also an optax schedule of the update count.
        alpha: as in :func:`qk_clip`.
        axis_name: in ``shard_map`` and ``pmap``, the mesh axes over which the heads are
            sharded, for the metrics; ``()`` if every device has all heads. Not needed
            elsewhere, nor where types tell it.

    Returns:
        A transformation whose ``update`` needs ``params`` and ``max_logits=``.

    Raises:
        ValueError: as :func:`qk_clip`, from ``init`` where the parameters tell; from
            ``update`` without ``params`` or ``max_logits``.
        TypeError: as :func:`qk_clip`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_clipx as clipx
        >>> kernel = jnp.ones((3, 2, 4))  # in, heads, head dimension
        >>> params = {"attn": {"query": {"kernel": kernel}, "key": {"kernel": kernel}}}
        >>> layout = clipx.qk.mha("attn/query/kernel", "attn/key/kernel")
        >>> tx = optax.chain(optax.adam(1e-3), clipx.qk_clip_updates(layout))
        >>> maxima = {"attn": jnp.array([50.0, 400.0])}
        >>> _, state = tx.update(params, tx.init(params), params, max_logits=maxima)
        >>> seen = clipx.metrics(state)
        >>> print(seen["qk/max_logit"], seen["qk/clipped"])
        400.0 0.5

    References:
        Kimi Team, Kimi K2: Open Agentic Intelligence, 2025, arXiv 2507.20534, section
        2.1.
    """
    _check_numbers(1.0 if callable(threshold) else threshold, alpha)
    layouts = list_of(layout)

    def init_fn(params: PyTree) -> QKClipState:
        fit(layouts, params)
        with mesh.mesh_of(jax.tree.leaves(params), auto=True):
            return _fresh()

    def update_fn(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        max_logits: PyTree = None,
        **extra: PyTree,
    ) -> tuple[Any, QKClipState]:
        check_state(state, QKClipState)
        if params is None:
            raise ValueError(
                "Expected params, got None. Call update(updates, state, params,"
                " max_logits=...)."
            )
        limit = threshold(state.steps) if callable(threshold) else threshold
        leaves, treedef = jax.tree.flatten(updates)
        weights = jax.tree.leaves(params)
        heads = []
        with mesh.mesh_of(leaves):
            pairs = zip(fit(layouts, updates), fit(layouts, params), strict=True)
            for ours, theirs in pairs:
                maxima = _maxima(theirs, max_logits)
                scales = _scales(maxima, limit, alpha)
                heads.append((maxima, scales))
                factors = _factors(theirs, scales, alpha)
                for slot, of_weight in zip(ours.slots, theirs.slots, strict=True):
                    weight = jnp.asarray(weights[of_weight.index])
                    scale = _for_leaf(of_weight, factors, weight)
                    leaves[slot.index] = _led(leaves[slot.index], weight, scale)
            after = _advance(state, heads, axis_name)
        return jax.tree.unflatten(treedef, leaves), after

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_numbers(threshold: Scalar, alpha: Scalar) -> None:
    check_limit(threshold, "threshold")
    if callable(threshold):
        raise TypeError(
            f"Expected threshold to be a number, got {threshold!r}. Schedules go into"
            " optax_clipx.qk_clip_updates."
        )
    if not isinstance(threshold, jax.core.Tracer) and not threshold > 0:
        raise ValueError(f"Expected threshold > 0, got threshold={threshold}.")
    check_between(alpha, "alpha", 0, 1)


def _maxima(one: Fitted, max_logits: PyTree) -> jax.Array:
    """The maxima of a layout's heads, in float32 or wider."""
    if not isinstance(max_logits, Mapping):
        raise (ValueError if max_logits is None else TypeError)(
            f"Expected max_logits={{{one.name!r}: array of one maximum a head}}, got"
            f" {max_logits!r}. optax_clipx.qk.max_logits computes the maxima of a head."
        )
    if one.name not in max_logits:
        raise ValueError(
            f"Expected the maxima of the layout {one.name!r} in max_logits, found none."
            f"{near(one.name, max_logits)} Pass max_logits={{{one.name!r}: ...}}, or"
            " name= to the layout."
        )
    maxima = jnp.asarray(max_logits[one.name])
    if maxima.shape != one.shape:
        kind = "(heads,)" if len(one.shape) == 1 else "(layers, heads)"
        raise ValueError(
            f"Expected maxima of shape {kind} = {one.shape} in"
            f" max_logits[{one.name!r}], got shape {maxima.shape}. If the axis of the"
            " heads also holds the entries of each head, pass num_heads= to the layout."
            " If the heads are on another axis, pass head_axis=."
        )
    maxima = maxima.astype(accumulator([maxima]))
    if mesh.is_cut(maxima):  # one number a head: on Explicit axes each device has all
        whole = NamedSharding(jax.typeof(maxima).sharding.mesh, PartitionSpec())
        every = tuple(range(maxima.ndim))
        maxima = lax.broadcast_in_dim(maxima, maxima.shape, every, out_sharding=whole)
    return maxima


def _scales(maxima: jax.Array, threshold: Scalar, alpha: Scalar) -> jax.Array:
    """The scale of each head: 1 where its maximum is no reason for another.

    NaN if a traced threshold or share is out of range.
    """
    limit = jnp.asarray(threshold).astype(maxima.dtype)
    share = jnp.asarray(alpha).astype(maxima.dtype)
    above = jnp.isfinite(maxima) & (maxima > limit)
    scale = jnp.where(above, limit / jnp.where(above, maxima, 1), 1)
    usable = (limit > 0) & (share >= 0) & (share <= 1)
    return jnp.where(usable, scale, jnp.nan)


def _factors(one: Fitted, scales: jax.Array, alpha: Scalar) -> dict[str, jax.Array]:
    """What multiplies the weights of each head: queries, keys and rotary queries.

    A key k serves the heads h of a group, and each wants q_h k <= gamma_h, where the
    key takes the share 1 - alpha. The head with the smallest gamma wants the most of
    it, so that k = min(gamma)^(1 - alpha). Then q_h = gamma_h / k makes each product
    its gamma, but lets the queries of heads with a large gamma grow by up to 1 / k, in
    every step in which another head of their group is clipped: weights that grow are
    what the method is against. So q_h = min(1, gamma_h / k), and the products are

        q_h k = gamma_h  where gamma_h <= k,  and  k < gamma_h  elsewhere.

    With one head a group q_h = gamma_h / gamma_h^(1 - alpha) = gamma_h^alpha. As a
    quotient it takes in the rounding of k, so that the product is gamma_h to two
    roundings.
    """
    groups, lowest = scales, scales
    if one.key_heads != one.shape[-1]:
        groups = scales.reshape(*scales.shape[:-1], one.key_heads, -1)
        lowest = groups.min(axis=-1)
    share = 1 - jnp.asarray(alpha).astype(scales.dtype)
    key = jnp.where(lowest == 1, 1, lowest**share)
    of_each = key if groups is scales else jnp.expand_dims(key, -1)
    of_each = jnp.broadcast_to(of_each, groups.shape)
    # Also where both are 0; and NaN stays NaN.
    query = jnp.where(groups >= of_each, 1, groups / of_each).reshape(scales.shape)
    return {"query": query, "key": key, "rotary": scales, "one": jnp.ones_like(scales)}


def _for_leaf(slot: Slot, factors: dict[str, jax.Array], leaf: PyTree) -> jax.Array:
    """The factors in the shape of a leaf, in which each head has its own."""
    part, axis = slot.part, slot.head_axis
    if part.factor == "fused":
        factor, axes = _of_fused(slot, factors)
    else:
        factor, axes = factors[part.factor], [axis]
    dims = [d for d in (slot.layer_axis, *axes) if d is not None]
    if part.split is not None:
        width = slot.width or slot.shape[axis + 1]
        first = jnp.broadcast_to(jnp.arange(width) < part.split, (*factor.shape, width))
        factor = jnp.where(
            first,
            jnp.expand_dims(factor, -1).repeat(width, -1),
            jnp.expand_dims(factors[part.after], -1).repeat(width, -1),
        )
        if slot.width:
            factor = factor.reshape(*factor.shape[:-2], -1)
        else:
            dims.append(axis + 1)
    elif slot.width:
        factor = factor.repeat(slot.width, -1)
    factor = factor.astype(accumulator([leaf]))
    # A product with a leaf on Explicit axes needs the factors sharded as the leaf is.
    sharding = jax.typeof(leaf).sharding if mesh.is_cut(leaf) else None
    return lax.broadcast_in_dim(factor, slot.shape, dims, out_sharding=sharding)


def _of_fused(slot: Slot, factors: dict[str, jax.Array]) -> tuple[jax.Array, list[int]]:
    """The factors of queries, keys and values in one leaf, and on which axes."""
    query, key = factors["query"], factors["key"]
    each = [query, key, jnp.ones_like(key)]
    if slot.part_axis is None:
        return jnp.concatenate(each, axis=-1), [slot.head_axis]
    last = slot.part_axis > slot.head_axis
    axes = sorted((slot.part_axis, slot.head_axis))
    return jnp.stack(each, axis=-1 if last else -2), axes


def _scaled(leaf: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiplied in float32 or wider and rounded once; bit for bit at scale 1."""
    product = (leaf.astype(scale.dtype) * scale).astype(leaf.dtype)
    return jnp.where(scale == 1, leaf, product)


def _led(update: jax.Array, weight: jax.Array, scale: jax.Array) -> jax.Array:
    """The update after which the weight is the scaled one; its own at scale 1."""
    update = jnp.asarray(update)
    with jax.numpy_dtype_promotion("standard"):  # as optax adds them
        target = _scaled(optax.apply_updates(weight, update), scale)
    step = target.astype(scale.dtype) - weight.astype(scale.dtype)
    return jnp.where(scale == 1, update, step.astype(update.dtype))


def _fresh() -> QKClipState:
    """The state before the first step; each field an array of its own."""
    return QKClipState(
        max_logit=jnp.zeros((), jnp.float32),
        scale=jnp.ones((), jnp.float32),
        clipped=jnp.zeros((), jnp.float32),
        nonfinite=jnp.zeros((), jnp.int32),
        nonpositive=jnp.zeros((), jnp.int32),
        steps=jnp.zeros((), jnp.int32),
        num_clipped=jnp.zeros((), jnp.int32),
        num_nonfinite=jnp.zeros((), jnp.int32),
    )


def _advance(
    last: QKClipState, heads: list[tuple[jax.Array, jax.Array]], axis_name: AxisNames
) -> QKClipState:
    """The state after one more step, from the maxima and scales of all layouts."""
    axes = _head_axes([maxima for maxima, _ in heads], axis_name)
    tops, lows, counts = [], [], []
    for maxima, scales in heads:
        finite = jnp.isfinite(maxima)
        tops.append(jnp.where(finite, maxima, -jnp.inf).max().astype(jnp.float32))
        lows.append(scales.min().astype(jnp.float32))
        flags = (scales < 1, ~finite, finite & (maxima <= 0), jnp.ones_like(finite))
        counts.append(jnp.stack([flag.sum(dtype=jnp.int32) for flag in flags]))
    top = mesh.max_over(jnp.stack(tops).max(), axes)
    low = -mesh.max_over(-jnp.stack(lows).min(), axes)
    sums = mesh.sum_over(jnp.stack(counts).sum(axis=0), axes)
    clipped, nonfinite, nonpositive, total = sums
    share = clipped.astype(jnp.float32) / total.astype(jnp.float32)
    return QKClipState(
        max_logit=jnp.where(jnp.isfinite(top), top, jnp.nan),
        scale=low,
        clipped=share,
        nonfinite=nonfinite,
        nonpositive=nonpositive,
        steps=count(last.steps, True),
        num_clipped=count(last.num_clipped, clipped > 0),
        num_nonfinite=count(last.num_nonfinite, nonfinite > 0),
    )


def _head_axes(maxima: list[jax.Array], axis_name: AxisNames) -> tuple[str, ...]:
    """The mesh axes of manual code over which the heads are sharded."""
    if axis_name is not None:
        paths: list[Path] = [("max_logits",)] * len(maxima)
        return mesh.placements(maxima, paths, axis_name, None)[0].axes
    if mesh.is_unknown(None, None):
        blind = mesh.blind_axes()
        raise ValueError(
            f"Cannot tell whether the heads are sharded over the mesh axes {blind}:"
            " JAX does not say it inside pmap, or inside shard_map with"
            " check_vma=False. Pass axis_name=() to qk_clip_updates if every device has"
            " the maxima of all heads, or"
            f" axis_name={blind[0]!r} if they are sharded over it."
        )
    return tuple(sorted(set().union(*map(mesh.varying, maxima))))
