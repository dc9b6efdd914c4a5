"""`track_norms`: norms of leaves or groups, and how large updates are, as metrics."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from .._clipping.clip_by import params_like
from .._clipping.known_norm import known_norm, states_of_tree_clippers
from .._clipping.measures import Labels, LeafAxis, group_norms, leaf_norms
from .._clipping.metrics import TrackState, first_clipper, to_float32
from .._clipping.transformation import check_state
from .._clipping.uncalled import check_transformation
from .._devices import mesh
from .._reductions.groups import Packed
from .._reductions.norms import Norms, norms
from .._trees.arguments import AxisNames, Specs
from .._trees.arithmetic import accumulator, safe_sqrt, saturated
from .._trees.leaves import flatten
from .._trees.types import Scalar
from .dominance import (
    handled_by_muon,
    largest_share,
    saw,
    share_of,
    starved_share,
)
from .named_parts import Parts, parts_at_init, parts_of
from .second_moments import bias, in_its_unit, second_moments
from .spike_score import after_norm, no_norms


def track_norms(
    inner: optax.GradientTransformation,
    *,
    labels: Labels = None,
    batch_axes: LeafAxis = None,
    ratios: bool = False,
    updates: bool = False,
    second_moment: float | None = None,
    vanishing: float | int = 1e-4,
    exploding: float | int = 1e4,
    axis_name: AxisNames = None,
    specs: Specs = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Measures the gradient norm of each leaf, layer or group. Updates do not change.

    .. math:: n_i = \|g_i\|, \quad r_i = \|\Delta w_i\| / \|w_i\|, \quad
        \text{share} = \max_i n_i^2 \Big/ \sum_j n_j^2

    Here :math:`g_i` is the gradient of leaf :math:`i`, :math:`w_i` its parameters and
    :math:`\Delta w_i` its update. If the first clipper inside clips the global norm,
    it computes the global norm from these norms. The gradients are then read only once.
    :func:`metrics` returns these values, if they were recorded:

    ==========================  ==================================================
    name                        meaning
    ==========================  ==================================================
    ``track_norms/<leaf>``      :math:`n_i`
    ``track/dominant_share``    the fraction of the squared norm that comes from the
                                leaf with the largest norm (share in the formula).
                                :func:`dominant_leaf` names the leaf
    ``track/starved``           the fraction of starved leaves among all leaves except
                                the leaf with the largest norm. Compare two norms of a
                                leaf: after clipping by the global norm, and after
                                clipping by its own norm at the same threshold. A leaf
                                is starved if the first is less than a tenth of the
                                second
    ``track/muon_share``        the fraction of the squared norm that comes from the
                                leaves that ``optax.contrib.muon`` orthogonalizes
    ``track/vanishing``         the number of leaves whose root mean square is zero, or
                                far below the root mean square of the median leaf
    ``track/exploding``         the number of leaves whose root mean square is not
                                finite, or far above that of the median leaf
    ``track_ratios/<leaf>``     :math:`r_i`, if ``ratios`` or ``updates`` is true
    ``track/update_norm``       the norm of the whole update, if ``updates`` is true
    ``track/spike_score``       the fraction of spikes among the last 1,000 steps, if
                                ``updates`` is true. Here a step is a spike if its
                                gradient norm is more than 7 standard deviations above
                                the mean norm of the 1,000 steps before it
    ``track_rms_t/<leaf>``      :math:`\mathrm{RMS}_t`, defined below, if you pass
                                ``second_moment``
    ==========================  ==================================================

    ``track/starved`` is only recorded if the first clipper inside clips the global
    norm. ``track/muon_share`` is only recorded if, in addition, the optimizer contains
    Muon and you pass no ``labels``. Both are NaN in a step in which the clipper did not
    get the gradient, for example in a skipped step.

    Some optimizers keep a second moment :math:`v`, for example ``optax.adam``. For
    these, :math:`\mathrm{RMS}_t` is

    .. math:: \mathrm{RMS}_t = \sqrt{\mathrm{mean}\big(g^2 /
        \max(v / (1 - b_2^t),\ \epsilon^2)\big)}, \quad \epsilon = 10^{-8}.

    Here :math:`g` is the clipped gradient if the clipper clips the global norm.
    Otherwise it is the gradient before clipping. If :math:`\mathrm{RMS}_t` is far above
    1, the gradients are much larger than :math:`v` says, and the update is too large.

    Args:
        inner: the optimizer, with its clipper in it.
        labels: measure groups of leaves instead of leaves. Leaves with the same label
            form a group. Pass a pytree prefix of labels, or a function that returns the
            label of a path and a leaf.
        batch_axes: as in :func:`measures.leaf_norms`. Each layer of a stack then counts
            as a leaf. The names of these leaves are ``"<leaf>/0"``, ``"<leaf>/1"`` and
            so on.
        ratios: also measure :math:`r_i`. This needs ``params``, and reads the
            parameters and the updates once more. The ratio of the root mean squares is
            the same number.
        updates: also measure the ratios, the norm of the whole update, and the spike
            score.
        second_moment: the decay :math:`b_2` of the optimizer. With it,
            :math:`\mathrm{RMS}_t` is measured for all leaves that have a second moment.
            This reads the gradients and the second moments once more.
        vanishing: a leaf counts as vanishing if its root mean square is less than
            ``vanishing`` times the root mean square of the median leaf.
        exploding: a leaf counts as exploding if its root mean square is more than
            ``exploding`` times the root mean square of the median leaf.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.

    Returns:
        A transformation with the updates of ``inner``.

    Raises:
        ValueError: unless ``0 <= vanishing < exploding``, unless ``second_moment`` is
            between 0 and 1, or if you pass both ``labels`` and ``batch_axes``. ``init``
            raises it if two leaves have the same name. ``update`` raises it if
            ``params`` is needed and missing, or if an axis of ``batch_axes`` is sharded
            inside of ``shard_map`` or ``pmap``.
        TypeError: if ``inner`` is not a transformation.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_clipx as clipx
        >>> clipper = clipx.clip_by_global_norm(1.0)
        >>> tx = clipx.track_norms(optax.chain(clipper, optax.sgd(0.1)))
        >>> params = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}
        >>> _, state = tx.update(params, tx.init(params), params)
        >>> print(clipx.metrics(state)["track_norms/w"])
        5.0

    References:
        Gradients of each layer: Glorot and Bengio, Understanding the difficulty of
        training deep feedforward neural networks, 2010. Spike score: OLMo et al., 2
        OLMo 2 Furious, 2025, arXiv 2501.00656. :math:`\mathrm{RMS}_t`: Wortsman et al.,
        Stable and low-precision training for large-scale vision-language models, 2023,
        arXiv 2304.13013.
    """
    check_transformation(inner, "inner")
    _check(labels, batch_axes, second_moment, vanishing, exploding)
    measure = leaf_norms(batch_axes=batch_axes)
    if labels is not None:
        measure = group_norms(labels)
    wrapped = optax.with_extra_args_support(inner)
    place = (axis_name, specs)

    def init_fn(params: PyTree) -> TrackState:
        leaves = flatten(params, updates=False)
        with mesh.mesh_of(leaves.arrays, auto=True):
            with states_of_tree_clippers() as known:
                state = inner.init(params)
            parts = parts_at_init(measure, leaves, *place)
            first = first_clipper(state)
            zeros = parts.zeros(parts.names)
            of_tree = any(first is x for x in known)
            muon = labels is None and any(handled_by_muon(state, leaves))
            rms_t = None
            if second_moment is not None:
                there = parts.with_moment(second_moments(state, leaves))
                rms_t = parts.zeros(there) if there or not leaves.arrays else None
            return TrackState(
                norms=zeros,
                ratios=parts.zeros(parts.names) if ratios or updates else None,
                vanishing=jnp.zeros((), jnp.int32),
                exploding=jnp.zeros((), jnp.int32),
                inner=state,
                dominant_share=_zero(),
                starved=_zero() if of_tree else None,
                muon_share=_zero() if of_tree and muon else None,
                update_norm=_zero() if updates else None,
                spike_score=_zero() if updates else None,
                window=no_norms() if updates else None,
                rms_t=rms_t,
            )

    def update_fn(
        grads: PyTree, state: TrackState, params: PyTree = None, **extra: PyTree
    ) -> tuple[Any, TrackState]:
        check_state(state, TrackState)
        leaves = flatten(grads)
        if not leaves.arrays:
            moved, after = wrapped.update(grads, state.inner, params, **extra)
            return moved, state._replace(inner=after)
        with mesh.mesh_of(leaves.arrays):
            parts = parts_of(measure, leaves, measure.plan(leaves, *place))
            (found,) = norms(parts.plan, [leaves.arrays])
            flat = parts.flat(found)
            few, many = _far(flat.value, parts.sizes(), vanishing, exploding)
            whole = _together(flat)
        with known_norm(leaves.arrays, whole):
            moved, after = wrapped.update(grads, state.inner, params, **extra)
        with mesh.mesh_of(leaves.arrays):
            state = state._replace(
                norms=parts.by_name(found.value),
                vanishing=few,
                exploding=many,
                inner=after,
                dominant_share=to_float32(largest_share(flat)),
            )
            state = _after_clipper(state, parts, flat, whole)
            if state.window is not None:
                score, window = after_norm(to_float32(whole.value), state.window)
                state = state._replace(spike_score=score, window=window)
            if state.ratios is not None or state.rms_t is not None:
                state = _after_update(state, parts, moved, params, whole, second_moment)
        return moved, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _zero() -> jax.Array:
    return jnp.zeros((), jnp.float32)


def _check(
    labels: Labels,
    batch_axes: LeafAxis,
    second_moment: Scalar | None,
    vanishing: float | int,
    exploding: float | int,
) -> None:
    if labels is not None and batch_axes is not None:
        raise ValueError(
            f"Expected labels= or batch_axes=, got both: labels={labels!r},"
            f" batch_axes={batch_axes!r}. Label the layers of a stack as leaves: pass"
            " batch_axes= alone."
        )
    if second_moment is not None and not 0 < second_moment < 1:
        raise ValueError(
            "Expected second_moment to be the decay b2 of the optimizer's second"
            f" moment, between 0 and 1, got second_moment={second_moment}. It is 0.999"
            " for optax.adam."
        )
    if not 0 <= vanishing < exploding:
        raise ValueError(
            f"Expected 0 <= vanishing < exploding, got vanishing={vanishing},"
            f" exploding={exploding}."
        )


def _after_clipper(
    state: TrackState, parts: Parts, flat: Norms, whole: Norms
) -> TrackState:
    """With what the clipper's threshold does to each part."""
    clipper = first_clipper(state.inner)
    if state.starved is None or clipper is None:
        return state
    starved = starved_share(flat.value, whole.value, clipper.metrics)
    state = state._replace(starved=to_float32(starved))
    if state.muon_share is None:
        return state
    muon = np.repeat(handled_by_muon(state.inner, parts.leaves), parts.counts())
    share = jnp.where(saw(whole.value, clipper.metrics), share_of(muon, flat), jnp.nan)
    return state._replace(muon_share=to_float32(share))


def _after_update(
    state: TrackState,
    parts: Parts,
    moved: PyTree,
    params: PyTree,
    whole: Norms,
    decay: float | None,
) -> TrackState:
    """With what is measured when the update is there, in one reduction."""
    trees: list[Any] = []
    grads = parts.leaves.arrays
    moments = second_moments(state.inner, parts.leaves)
    wide = accumulator(grads)
    biases: Any = ()
    if state.ratios is not None:
        after = flatten(moved)
        trees += [after.arrays, params_like(after, params)]
    if state.rms_t is not None and decay is not None:
        trees += [grads, [g if m is None else m.nu
                          for g, m in zip(grads, moments, strict=True)]]  # fmt: skip
        biases = [bias(moment, decay).astype(wide) for moment in moments]

    if biases:
        counted = (False,) * (len(trees) - 1)
        found = norms(parts.plan, trees, _also_in_its_unit, biases, counted)
    else:
        found = norms(parts.plan, trees)
    if state.ratios is not None:
        step, size = found[:2]
        ratio = jax.tree.map(_quotients, step.value, size.value)
        state = state._replace(ratios=parts.by_name(ratio))
        if state.update_norm is not None:
            norm = _together(parts.flat(step)).value
            state = state._replace(update_norm=to_float32(norm))
    if biases:
        scale = _scale(state, whole)
        sizes = parts.sizes_with_moment(moments)
        rms = jax.tree.map(lambda n, k: _mean(n, k) * scale, found[-1].value, sizes)
        state = state._replace(rms_t=parts.by_name(rms, parts.with_moment(moments)))
    return state


def _also_in_its_unit(trees: PyTree, biases: PyTree) -> Any:
    """The last two of like trees, gradients and second moments, become one."""
    *others, grads, moments = trees
    return [*others, in_its_unit(grads, moments, biases)]


def _scale(state: TrackState, whole: Norms) -> jax.Array:
    """By what the clipper multiplied the gradient on its way to the optimizer."""
    clipper = first_clipper(state.inner)
    one = jnp.ones((), whole.value.dtype)
    if state.starved is None or clipper is None:
        return one
    scale = jnp.asarray(clipper.metrics.scale, one.dtype)
    return jnp.where(saw(whole.value, clipper.metrics), scale, one)


def _mean(norms: jax.Array, sizes: Packed) -> jax.Array:
    """Root mean squares from norms of so many entries."""
    sizes = jnp.asarray(sizes, norms.dtype)
    return norms / jnp.sqrt(jnp.maximum(sizes, 1))


def _far(
    norms: jax.Array,
    sizes: Packed,
    vanishing: float | int,
    exploding: float | int,
) -> tuple[jax.Array, jax.Array]:
    """How many leaves are far below and above the middle one, entry by entry."""
    known = isinstance(sizes, np.ndarray)
    rms = norms / jnp.asarray((np if known else jnp).sqrt(sizes), norms.dtype)
    usable = jnp.isfinite(rms) & (rms > 0)
    # Half of the usable ones are below: where the rest comes last, a plain sort tells.
    order = jnp.sort(jnp.where(usable, rms, jnp.inf))
    middle = order[jnp.maximum(jnp.sum(usable) - 1, 0) // 2]
    low = jnp.isfinite(rms) & ((rms == 0) | (rms < middle * vanishing))
    high = ~jnp.isfinite(rms) | (rms / exploding > middle)
    return jnp.sum(low).astype(jnp.int32), jnp.sum(high).astype(jnp.int32)


def _together(found: Norms) -> Norms:
    """The norm of the whole tree from the groups' sums of squares."""
    # In the largest unit: what is lost beside it is below its rounding.
    unit = jnp.max(found.unit)
    change = found.unit / unit
    squares = jnp.sum(jnp.square(found.root * change))
    root = safe_sqrt(squares)
    return Norms(saturated(root, unit), root, unit)


def _quotients(step: jax.Array, size: jax.Array) -> jax.Array:
    safe = jnp.where(size == 0, 1, size)
    return jnp.where(size == 0, jnp.where(step > 0, jnp.inf, step), step / safe)
