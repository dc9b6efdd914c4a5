"""What a clipper did: the numbers that it keeps in its state, and their reader."""

from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._trees.arithmetic import larger, plus
from .._trees.leaves import Path, path_of
from .._trees.types import Dtype
from .summary import Summary


class ClipMetrics(NamedTuple):
    """What a clipper measured and did in the last step, as scalar arrays.

    A group is a set of entries whose norm is compared with one threshold. For the
    global norm, there is one group with all leaves. Other clippers have a group for
    each leaf, each label or each unit.

    Attributes:
        norm: the norm of all entries together before clipping, of the order that the
            clipper uses. A finite norm above float32's largest number is replaced by
            this number.
        clipped_norm: the norm of all entries together after clipping.
        scale: the factor by which a group was multiplied. If there are several groups,
            the field describes the group with the largest ratio of norm to threshold.
            For element-wise clipping it is ``clipped_norm / norm``.
        threshold: the threshold of the group that ``scale`` describes. For element-wise
            clipping it is the larger bound.
        clipped: the fraction of groups whose norm was above their threshold, between 0
            and 1. For element-wise clipping it is the fraction of clipped entries.
        nonfinite: whether an entry was infinite or NaN.
        steps: the number of updates so far.
        num_clipped: the number of updates in which at least one group was clipped.
        num_nonfinite: the number of updates with an infinite or NaN entry.

    With ``metrics=False`` all fields except ``steps`` are ``None``.

    Raises:
        Nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.clip_by_global_norm(1.0)
        >>> grads = {"w": jnp.array([3.0, 4.0])}
        >>> grads, state = clipper.update(grads, clipper.init(grads))
        >>> print(state.metrics.norm, state.metrics.clipped_norm)
        5.0 1.0

    References:
        Pascanu et al., 2013, arXiv 1211.5063, choose a threshold from the average norm.
    """

    norm: Float[Array, "..."] | None
    clipped_norm: Float[Array, "..."] | None
    scale: Float[Array, "..."] | None
    threshold: Float[Array, "..."] | None
    clipped: Float[Array, "..."] | None
    nonfinite: Bool[Array, "..."] | None
    steps: Int[Array, "..."]
    num_clipped: Int[Array, "..."] | None
    num_nonfinite: Int[Array, "..."] | None


class ClipState(NamedTuple):
    """The state of a clipper: what it did, and what its threshold rule remembers."""

    metrics: ClipMetrics
    rule: Any


class SkipState(NamedTuple):
    """The state of :func:`skip_spikes`: what it did, and the optimizer inside of it.

    ``reason`` says why the last step was skipped: a :class:`SkipReason`, by its number.
    """

    metrics: ClipMetrics
    rule: Any
    loss_rule: Any
    inner: Any
    skipped: Bool[Array, "..."]
    reason: Int[Array, "..."]
    num_skipped: Int[Array, "..."]
    consecutive_skips: Int[Array, "..."]


class TrackState(NamedTuple):
    """The state of :func:`track_norms`: norms, ratios, and the optimizer inside.

    ``vanishing`` and ``exploding`` count the leaves, or groups, whose root mean square
    is far from that of the middle one. Of leaves that stack layers, ``norms`` and the
    like hold an array of all layers. What was not asked for is ``None``.
    """

    norms: dict[str, Float[Array, "..."]]
    ratios: dict[str, Float[Array, "..."]] | None
    vanishing: Int[Array, "..."]
    exploding: Int[Array, "..."]
    inner: Any
    dominant_share: Float[Array, "..."] | None = None
    starved: Float[Array, "..."] | None = None
    update_norm: Float[Array, "..."] | None = None
    spike_score: Float[Array, "..."] | None = None
    window: Any = None
    rms_t: dict[str, Float[Array, "..."]] | None = None
    muon_share: Float[Array, "..."] | None = None


class CautiousState(NamedTuple):
    """The state of :func:`cautious`: what it did, and the optimizer inside of it.

    ``descending`` is the fraction of entries whose update descends, ``factor`` the
    largest factor by which those of a leaf were multiplied.
    """

    descending: Float[Array, "..."]
    factor: Float[Array, "..."]
    inner: Any


class QKClipState(NamedTuple):
    """The state of :func:`qk_clip_updates`: the logits of the last step, and counts.

    ``max_logit`` is the largest logit of all heads whose maximum is finite, and NaN if
    none is; ``scale`` the smallest scale of a head; ``clipped`` the share of heads that
    were scaled; ``nonfinite`` and ``nonpositive`` the numbers of heads that were not
    scaled since their maximum was infinite or NaN, or not above 0. The others count
    steps: all, those that scaled a head, and those with a maximum that was not finite.
    """

    max_logit: Float[Array, "..."]
    scale: Float[Array, "..."]
    clipped: Float[Array, "..."]
    nonfinite: Int[Array, "..."]
    nonpositive: Int[Array, "..."]
    steps: Int[Array, "..."]
    num_clipped: Int[Array, "..."]
    num_nonfinite: Int[Array, "..."]


def fresh(enabled: bool) -> ClipMetrics:
    """Metrics before the first step; each field an array of its own."""

    def zero(dtype: Dtype = jnp.float32) -> Any:
        return jnp.zeros((), dtype) if enabled else None

    return ClipMetrics(
        norm=zero(),
        clipped_norm=zero(),
        scale=jnp.ones((), jnp.float32) if enabled else None,
        threshold=zero(),
        clipped=zero(),
        nonfinite=zero(jnp.bool_),
        steps=jnp.zeros((), jnp.int32),
        num_clipped=zero(jnp.int32),
        num_nonfinite=zero(jnp.int32),
    )


def advance(last: ClipMetrics, summary: Summary) -> ClipMetrics:
    """The metrics after one more step."""
    steps = count(last.steps, True)
    if last.norm is None:
        return last._replace(steps=steps)
    return ClipMetrics(
        norm=to_float32(summary.norm),
        clipped_norm=to_float32(summary.clipped_norm),
        scale=to_float32(summary.scale),
        # A copy: a state that held the caller's own array could not be donated.
        threshold=to_float32(jnp.array(summary.threshold, copy=True)),
        clipped=to_float32(summary.clipped),
        nonfinite=summary.nonfinite,
        steps=steps,
        num_clipped=count(last.num_clipped, summary.any_clipped),
        num_nonfinite=count(last.num_nonfinite, summary.nonfinite),
    )


def count(number: Any, happened: jax.Array | bool) -> jax.Array:
    """One more if it happened; stays at int32's largest number."""
    one = 1 if happened is True else lax.convert_element_type(happened, number.dtype)
    return larger(number, plus(number, one))  # int32 wraps around


def to_float32(x: jax.Array) -> jax.Array:
    """A value as float32, saturated at the largest number."""
    if x.dtype == jnp.float32:
        return x
    largest = float(jnp.finfo(jnp.float32).max)
    clamped = jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x)
    return clamped.astype(jnp.float32)


def metrics(opt_state: PyTree, prefix: str = "clip") -> dict[str, jax.Array]:
    """Reads what the clippers in an optimizer state did in the last step.

    You can call it inside and outside of ``jax.jit``. It finds the clippers inside any
    wrapper, such as ``optax.chain``, ``named_chain``, ``masked``, ``partition``,
    ``MultiSteps``, ``apply_if_finite``, ``inject_hyperparams`` and
    ``flax.nnx.Optimizer``. It also reads a state that ``pmap`` has replicated.

    ==========================  ==================================================
    name                        written by
    ==========================  ==================================================
    ``"clip/norm"``, ...        a clipper: the fields of :class:`ClipMetrics`
    ``"skip/norm"``, ...        :func:`skip_spikes`: the same fields, for the updates
                                that it receives, and ``skipped``, ``reason``,
                                ``num_skipped``, ``consecutive_skips``
    ``"track/..."``             :func:`track_norms`: values of the whole gradient
    ``"track_norms/<leaf>"``    :func:`track_norms`: the norm of each leaf
    ``"track_ratios/<leaf>"``   :func:`track_norms`: the update-to-parameter ratio of
                                each leaf
    ``"track_rms_t/<leaf>"``    :func:`track_norms`: the RMS of each leaf, as the page
                                of :func:`track_norms` defines it
    ``"cautious/..."``          :func:`cautious`
    ``"qk/max_logit"``, ...     :func:`qk_clip_updates`: the fields of its state
    ==========================  ==================================================

    A state can also be a dict: a nested dict such as
    ``flax.serialization.to_state_dict`` returns, or a flat dict such as ninjax uses:
    ``{"opt/state/0/metrics/norm": array, ...}``. The fields are then found by their
    names.

    If :func:`skip_spikes` skips a step, the clipper inside does not run. The metrics
    ``"clip/..."`` then still describe the last step that was not skipped. The metrics
    ``"skip/..."`` describe the skipped step.

    Args:
        opt_state: the state of any optimizer with a clipper in it.
        prefix: a word to use in the names instead of ``"clip"``. The other names then
            begin with ``"<prefix>_skip"``, ``"<prefix>_track"``,
            ``"<prefix>_cautious"`` and ``"<prefix>_qk"``.

    Returns:
        A dict from names such as ``"clip/norm"`` to arrays. If there are several
        clippers, each name contains the place of the clipper. The place is its index
        in a chain, as in ``"clip/0/norm"``, or its key in a ``named_chain`` or
        ``partition``. Names of several ``skip_spikes`` are built in the same way.

    Raises:
        ValueError: if the state contains neither a clipper with metrics, nor
            :func:`skip_spikes`, :func:`track_norms`, :func:`cautious` or
            :func:`qk_clip_updates`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_clipx as clipx
        >>> tx = optax.chain(clipx.clip_by_global_norm(1.0), optax.adam(1e-3))
        >>> params = {"w": jnp.array([3.0, 4.0])}
        >>> _, opt_state = tx.update(params, tx.init(params), params)
        >>> print(clipx.metrics(opt_state)["clip/norm"])
        5.0

    References:
        The names have the form of TensorBoard's tags, in which a slash makes a group.
    """
    typed = opt_state if _find(opt_state, _KINDS) else _by_names(opt_state)
    clippers, *others = (_find(typed, kind) for kind in _KINDS)
    kept = [(keys, state) for keys, state in clippers if state.metrics.norm is not None]
    if not (kept or any(others)):
        raise ValueError(_nothing_to_read(opt_state, bool(clippers)))
    skippers, trackers, masks, heads = others
    before = "" if prefix == "clip" else f"{prefix}_"
    return (
        _shown(kept, prefix, lambda state: state.metrics._asdict())
        | _shown(skippers, f"{before}skip", _of_skipper)
        | _shown_tracked(trackers, f"{before}track")
        | _shown(masks, f"{before}cautious", _of_cautious)
        | _shown(heads, f"{before}qk", QKClipState._asdict)
    )


def check(opt_state: PyTree) -> None:
    """Raises on the host if the last step met non-finite gradients.

    Args:
        opt_state: the state of any optimizer with a clipper or :func:`skip_spikes`.

    Returns:
        Nothing, after waiting for the step that made the state.

    Raises:
        FloatingPointError: if the last step met an infinity or NaN; the message has
            the norm and the number of such steps.
        ValueError: if there is no clipper in the state.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.clip_by_global_norm(1.0, nonfinite="zero")
        >>> grads = {"w": jnp.array([jnp.nan])}
        >>> grads, state = clipper.update(grads, clipper.init(grads))
        >>> clipx.check(state)
        Traceback (most recent call last):
        ...
        FloatingPointError: clip: non-finite updates in step 1 (norm nan); 1 such...

    References:
        :func:`jax.experimental.checkify.checkify` is the general tool of this kind.
    """
    read = metrics(opt_state)
    ends = [name.removesuffix("/nonfinite") for name in read]
    clippers = [x for x in ends if {f"{x}/nonfinite", f"{x}/norm"} <= set(read)]
    if not clippers:
        raise ValueError(
            "Expected a clipper in the state, got cautious, track_norms or"
            " qk_clip_updates alone."
        )
    for clipper in clippers:
        if not np.any(read[f"{clipper}/nonfinite"]):
            continue
        steps, norm, number = (
            np.max(read[f"{clipper}/{field}"])
            for field in ("steps", "norm", "num_nonfinite")
        )
        raise FloatingPointError(
            f"{clipper}: non-finite updates in step {steps} (norm {norm}); {number}"
            f" such step{'s' if number != 1 else ''} so far."
        )


def zeroed(opt_state: PyTree) -> jax.Array:
    """Whether any clipper in a state made zeros of updates that were not finite."""
    seen = [s.metrics for _, s in _find(opt_state, ClipState | SkipState)]
    kept = [m for m in seen if m.norm is not None]
    found = [jnp.any(m.nonfinite & (m.scale == 0)) for m in kept]
    return jnp.any(jnp.stack(found)) if found else jnp.zeros((), jnp.bool_)


_KINDS = (ClipState, SkipState, TrackState, CautiousState, QKClipState)


Kinds = type | UnionType | tuple[type, ...]  # what isinstance takes


def _find(opt_state: PyTree, kind: Kinds) -> list[tuple[Any, Any]]:
    """The states of a kind, outer ones first, and the way to each."""
    leaves = jax.tree_util.tree_leaves_with_path(
        opt_state, is_leaf=lambda node: isinstance(node, _KINDS)
    )
    found = []
    for keys, leaf in leaves:
        if isinstance(leaf, kind):
            found.append((keys, leaf))
        if isinstance(leaf, SkipState | TrackState | CautiousState):
            here = (*keys, GetAttrKey("inner"))
            inside = _find(leaf.inner, kind)
            found += [((*here, *more), state) for more, state in inside]
    return found


def _by_names(tree: PyTree) -> Any:
    """A tree of dicts, nested or flat, with the states that their names tell."""
    if isinstance(tree, Mapping):
        parts = {key: _by_names(part) for key, part in _nested(tree).items()}
        return _state_of(parts)
    if type(tree) in (tuple, list):
        return type(tree)(map(_by_names, tree))
    return tree


def _nested(tree: PyTree) -> dict[Any, Any]:
    """One level of a dict; `a/b` and the tuple `(a, b)` name a `b` within an `a`."""
    parts: dict[Any, Any] = {}
    deeper: dict[Any, Any] = {}
    for key, part in tree.items():
        first, *rest = key if isinstance(key, tuple) else str(key).split("/")
        if rest:
            deeper.setdefault(first, {})["/".join(map(str, rest))] = part
        else:
            parts[first] = part
    return parts | deeper


def _state_of(parts: dict[Any, Any]) -> Any:
    """The state whose fields these are, if they are one's."""
    known = parts.get("metrics")
    if isinstance(known, dict) and set(known) == set(ClipMetrics._fields):
        parts = {**parts, "metrics": ClipMetrics(**known)}
        kind: Any = SkipState if "skipped" in parts else ClipState
    elif {"norms", "vanishing", "exploding"} <= set(parts):
        kind = TrackState
        for field in ("norms", "ratios", "rms_t"):
            leaves = jax.tree_util.tree_leaves_with_path(parts.get(field))
            named = {"/".join(path_of(keys)): leaf for keys, leaf in leaves}
            parts = {**parts, field: named}
    elif set(CautiousState._fields) <= set(parts):
        kind = CautiousState
    elif set(QKClipState._fields) <= set(parts):
        kind = QKClipState
    else:
        return parts
    return kind(**{field: parts.get(field) for field in kind._fields})


def _nothing_to_read(opt_state: PyTree, silent: bool) -> str:
    if isinstance(opt_state, Mapping):
        names = [str(key) for key in opt_state]
        more = ", ..." if len(names) > 5 else ""
        kinds = f"a dict with {', '.join(map(repr, names[:5])) or 'nothing'}{more}"
        advice = (
            " A dict is read only if it is an optimizer state that was converted to a"
            " dict. Then it has keys such as 'opt/0/metrics/norm', or nested keys such"
            " as {'0': {'metrics': {'norm': ...}}}. A dict of parameters or gradients"
            " has no metrics."
        )
    else:
        states = opt_state if type(opt_state) is tuple else [opt_state]
        kinds, advice = ", ".join(type(state).__name__ for state in states), ""
    return (
        "Expected an optimizer state with an optax_clipx clipper that keeps metrics,"
        f" got {kinds} without such a clipper."
        + (" The clippers in it have metrics=False." if silent else "")
        + " Put a clipper in front of the optimizer, such as"
        " optax.chain(optax_clipx.clip_by_global_norm(1.0), optimizer), and pass what"
        " tx.init and tx.update return, or the nnx.Optimizer." + advice
    )


def _shown(
    found: list[tuple[Any, Any]], prefix: str, fields: Callable[[Any], dict[str, Any]]
) -> dict[str, jax.Array]:
    """The fields of each state by their whole names."""
    return {
        "/".join((prefix, *names, field)): value
        for names, (_, state) in zip(_short_names(found), found, strict=True)
        for field, value in _plain(fields(state)).items()
    }


def _of_skipper(state: SkipState) -> dict[str, Any]:
    names = ("skipped", "reason", "num_skipped", "consecutive_skips")
    return state.metrics._asdict() | {name: getattr(state, name) for name in names}


def _of_cautious(state: CautiousState) -> dict[str, Any]:
    return {"descending": state.descending, "factor": state.factor}


def _shown_tracked(found: list[tuple[Any, Any]], prefix: str) -> dict[str, jax.Array]:
    """The same of trackers, whose leaves' names come last."""
    read: dict[str, jax.Array] = {}
    for names, (_, state) in zip(_short_names(found), found, strict=True):
        fields: dict[tuple[str, ...], Any] = {
            (prefix, *names, field): getattr(state, field)
            for field in _OF_TRACKER
            if getattr(state, field) is not None
        }
        for kind in ("norms", "ratios", "rms_t"):
            for leaf, x in _by_layer(state, kind).items():
                fields[(f"{prefix}_{kind}", *names, leaf)] = x
        read |= _plain({"/".join(name): x for name, x in fields.items()})
    return read


_OF_TRACKER = (
    "vanishing",
    "exploding",
    "dominant_share",
    "starved",
    "muon_share",
    "update_norm",
    "spike_score",
)


def _by_layer(state: TrackState, kind: str) -> dict[str, Any]:
    """What was measured of each leaf, and of each layer in it, by its name."""
    values = getattr(state, kind)
    if not isinstance(values, Mapping):
        return {}
    # One number for each model of an ensemble, or each device of a pmap.
    (counts,) = jax.tree.leaves(state.vanishing)
    found: dict[str, Any] = {}
    for leaf, value in values.items():
        (x,) = jax.tree.leaves(value)
        for index in np.ndindex(x.shape[counts.ndim :]):
            found["/".join((leaf, *map(str, index)))] = x[..., *index] if index else x
    return found


def tracked_norms(opt_state: PyTree) -> dict[str, jax.Array]:
    """The norms by name that the outermost :func:`track_norms` in a state measured."""
    typed = opt_state if _find(opt_state, TrackState) else _by_names(opt_state)
    for _, state in _find(typed, TrackState):
        return _plain(_by_layer(state, "norms"))
    raise ValueError(
        "Expected a state with optax_clipx.track_norms in it, got"
        f" {type(opt_state).__name__}. Put it around the optimizer:"
        " track_norms(optax.chain(clipper, optimizer))."
    )


def first_clipper(opt_state: PyTree) -> ClipState | None:
    """The first clipper in a state that keeps metrics."""
    kept = (state for _, state in _find(opt_state, ClipState))
    return next((x for x in kept if x.metrics.norm is not None), None)


def _short_names(found: list[tuple[Any, Any]]) -> list[Path]:
    """Keys and indices on the way to each clipper; fields too, if these do not tell."""
    for kinds in ((SequenceKey, DictKey, FlattenedIndexKey), (object,)):
        names = [
            path_of(tuple(k for k in keys if isinstance(k, kinds))) for keys, _ in found
        ]
        if len(set(names)) == len(names):
            break
    if len(names) <= 1:
        return [()] * len(names)
    while all(names) and len({n[0] for n in names}) == 1:
        names = [n[1:] for n in names]
    return names


def _plain(fields: dict[str, Any]) -> dict[str, jax.Array]:
    """The arrays in NNX variables; one copy where pmap has left one on each device."""
    arrays = {name: jax.tree.leaves(value)[0] for name, value in fields.items()}
    if all(map(_is_replicated, arrays.values())):
        return {name: x.addressable_data(0)[0] for name, x in arrays.items()}
    return arrays


def _is_replicated(array: object) -> bool:
    """Whether each device has one entry and all are the same; an ensemble's differ."""
    if isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array):
        return False
    devices = len(array.sharding.device_set)
    if array.shape != (devices,) or devices == 1:
        return False
    if array.sharding.shard_shape(array.shape) != (1,):
        return False
    entries = [np.asarray(shard.data)[0] for shard in array.addressable_shards]
    return all(np.array_equal(x, entries[0], equal_nan=True) for x in entries)
