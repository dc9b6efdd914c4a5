"""Wrappers of an optimizer: skipped steps and reset moments."""

import enum
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.tree_util import Partial
from jaxtyping import PyTree

from .._clipping import metrics
from .._clipping.clip_by import limits_of, measured, norm_of
from .._clipping.known_norm import Known, find_norm, known_norm
from .._clipping.measures import tree_norm
from .._clipping.metrics import SkipState
from .._clipping.summary import Summary, nothing
from .._clipping.transformation import Given, Memory, Options, check_state, checked
from .._clipping.uncalled import check_transformation
from .._devices import mesh
from .._devices.numbers import as_one
from .._reductions.norms import Norms
from .._reductions.plan import Plan
from .._thresholds.base import Context, Threshold
from .._thresholds.constant import as_threshold
from .._thresholds.spikes import spikes_of_losses, spikes_of_norms
from .._trees.arguments import AxisNames, Limit, Specs, check_count
from .._trees.arithmetic import (
    Number,
    at_least,
    both,
    either,
    equal,
    finite,
    full_like,
    more,
    negated,
    of_dtype,
    where,
)
from .._trees.leaves import flatten, path_of, show
from .._trees.types import Arrays, Scalar


class SkipReason(enum.IntEnum):
    """The reasons for which a step is skipped: a number in the state, and a sentence.

    Attributes:
        sentence: the reason in words, for logs and pictures.

    Raises:
        ValueError: for a number that is no reason.

    Example:
        >>> import optax_clipx as clipx
        >>> reason = clipx.SkipReason(2)
        >>> print(reason.name, "-", reason.sentence)
        NORM_SPIKE - The gradient norm was above its threshold.

    References:
        :func:`skip_spikes`.
    """

    sentence: str

    NOT_SKIPPED = 0, "The step was not skipped."
    NORM_NONFINITE = 1, "The gradient norm was infinite or NaN."
    NORM_SPIKE = 2, "The gradient norm was above its threshold."
    LOSS_NONFINITE = 3, "The loss was infinite or NaN."
    LOSS_SPIKE = 4, "The loss was above its threshold."

    def __new__(cls, number: int, sentence: str) -> "SkipReason":
        """A member with its sentence."""
        member = int.__new__(cls, number)
        member._value_ = number
        member.sentence = sentence
        return member


def skip_spikes(
    inner: optax.GradientTransformation,
    *,
    threshold: Limit | Threshold | None = None,
    loss_threshold: Limit | Threshold | None = None,
    patience: Scalar | None = 10,
    axis_name: AxisNames = None,
    specs: Specs = None,
    norm_arg: str = "norm",
) -> optax.GradientTransformationExtraArgs:
    r"""Skips a step if its gradient norm or its loss is a spike or non-finite.

    .. math:: \text{skip} \iff n \text{ is not finite, or } n > t,
              \text{ or the same of the loss}

    Here :math:`n` is the norm of the whole gradient before any clipping inside. In a
    skipped step the updates are zero, and the state of ``inner`` does not change. By
    default the threshold is

    .. math:: t = \exp\bigl(m + \min(5 s, \max(\log 15, 3 s))\bigr)

    where :math:`m` is the mean of :math:`\log n` over about the last 16 norms, and
    :math:`s` its standard deviation over about the last 64. The first mean
    and standard deviation come from the median and the quartiles of the first 8 norms,
    so that one spike among these does not hide later ones; there is no threshold before
    the 8th norm. A norm above the threshold does not enter
    the statistics, and neither does a norm that is equally far below :math:`m`. The
    norm number ``patience`` in a row is accepted as the new level. A
    non-finite norm never enters, and is never accepted. If one of the first 100 norms
    is 200 times the usual norm, it can happen that spikes in the next steps, at most 7,
    are not skipped.

    The loss is also checked if you pass it to ``update`` as ``loss=`` or ``value=``. On
    a mesh, all devices take the same decision.

    Args:
        inner: the optimizer with its clippers. If you use ``optax.MultiSteps``, it must
            be inside: ``skip_spikes(optax.MultiSteps(...).gradient_transformation())``.
            ``optax.MultiSteps`` around ``skip_spikes`` never recovers from an infinite
            gradient.
        threshold: a threshold rule for the norm, or a number.
        loss_threshold: a threshold rule for the loss, or a number. The default is seven
            standard deviations above the mean, with statistics as for norms; other
            rules need losses above zero.
        patience: with ``patience=n``, the default rules skip at most ``n - 1`` spikes
            in a row. The ``n``-th spike in a row is not skipped, and its norm is
            accepted as the new level.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        norm_arg: as in :func:`clip_by`.

    Returns:
        A transformation. :func:`metrics` shows what it did under ``"skip/..."``: the
        fields of :class:`ClipMetrics` of the norm that came in, and ``skipped``,
        ``reason``, ``num_skipped`` and ``consecutive_skips``. ``"clip/..."`` is of the
        clipper inside, and after a skipped step of the last one that was not skipped.

    Raises:
        TypeError: if ``inner`` is no transformation, or keeps something else than
            arrays in its state.
        ValueError: if ``patience`` is less than 1, and from ``update`` if the loss is
            not a scalar, or if ``axis_name`` or ``specs`` is needed and missing.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_clipx as clipx
        >>> tx = clipx.skip_spikes(
        ...     optax.adam(0.1), threshold=clipx.thresholds.zscore(6.0, warmup_steps=3)
        ... )
        >>> params = jnp.zeros(1)
        >>> state = tx.init(params)
        >>> for norm in (0.9, 1.0, 1.1, 1000.0):
        ...     updates, state = tx.update(jnp.array([norm]), state, params)
        >>> print(updates, clipx.metrics(state)["skip/num_skipped"])
        [0.] 1

    References:
        Chowdhery et al., PaLM, 2022, arXiv 2204.02311, skipped batches around a spike;
        OLMo et al., 2 OLMo 2 Furious, 2025, arXiv 2501.00656, and the training codes
        OLMo-core, Levanter, MaxText and axlearn skip steps by such rules.
    """
    check_transformation(inner, "inner")
    check_count(patience, "patience")
    rule = spikes_of_norms(patience) if threshold is None else as_threshold(threshold)
    if loss_threshold is None:
        loss_rule = spikes_of_losses(patience)
    else:
        loss_rule = as_threshold(loss_threshold, "loss_threshold")
    if rule.uses_params or loss_rule.uses_params:
        raise ValueError("Expected a rule that does not depend on the parameters.")
    wrapped = optax.with_extra_args_support(inner)
    options = Options("zero", axis_name, specs, norm_arg=norm_arg)
    rule = checked(rule)
    measure = tree_norm()

    def init_fn(params: PyTree) -> SkipState:
        with mesh.mesh_of(jax.tree.leaves(params), auto=True):
            scalar = jnp.zeros((), jnp.float32)
            return SkipState(
                metrics.fresh(True),
                rule.init(scalar),
                loss_rule.init(scalar),
                _checked(init_inner(inner, params)),
                skipped=jnp.zeros((), jnp.bool_),
                reason=jnp.zeros((), jnp.int32),
                num_skipped=jnp.zeros((), jnp.int32),
                consecutive_skips=jnp.zeros((), jnp.int32),
            )

    def update_fn(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree
    ) -> tuple[Any, SkipState]:
        check_state(state, SkipState)
        leaves = flatten(updates)
        if not leaves.arrays:
            updates, after = wrapped.update(updates, state.inner, params, **extra)
            return updates, state._replace(
                metrics=metrics.advance(state.metrics, nothing()), inner=after
            )
        with mesh.mesh_of(leaves.arrays):
            loss = _loss(extra, leaves.arrays, options)
            memory = Memory(state.rule, state.metrics.steps)
            given = Given(leaves, None, memory, extra, find_norm(leaves.arrays))
            plan, known, found = measured(measure, rule, options, given)
            by_norm = functools.partial(_by_norm, rule, plan, given)
            summary, rule_state, norm = as_one(by_norm, known, found, memory)
            # By itself: more numbers at once would not be compiled as one kernel.
            judged = functools.partial(_judged, loss_rule, extra)
            before = state._replace(inner=None)
            fields, keep, factor = as_one(judged, before, loss, summary, rule_state)
            usual = equal(factor, 1)
            feed = [_one_or_nothing(usual, factor, x) for x in leaves.arrays]
        # A clipper that comes first inside need not measure the same again.
        with known_norm(feed, Partial(_of_feed, fields["skipped"], norm)):
            inner_updates, after = wrapped.update(
                leaves.rebuild(feed), state.inner, params, **extra
            )
        with mesh.mesh_of(leaves.arrays):
            zeros = jax.tree.map(_zeros_like, inner_updates)
            inner_updates = _select(keep, zeros, inner_updates)
            after = _select(keep, state.inner, after)
            return inner_updates, state._replace(inner=after, **fields)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _by_norm(
    rule: Threshold,
    plan: Plan,
    given: Given,
    known: Known,
    found: list[Norms],
    memory: Memory,
) -> tuple[Summary, PyTree, Norms]:
    """What the norm alone says of a step, what its rule remembers, and the norm."""
    norm, now = norm_of(known, found), given._replace(memory=memory)
    limit, after = limits_of(norm, tree_norm(), rule, plan.groups, now)
    return _dropped(norm.value, limit), after, norm


def _dropped(norm: jax.Array, limit: Number) -> Summary:
    """A step that is taken or not, by its norm alone."""
    bad, unusable = negated(finite(norm)), negated(at_least(limit, 0))
    spike = both(more(norm, limit), negated(either(bad, unusable)))
    dropped = either(bad, spike)

    def after(value: Number) -> Any:
        return where(unusable, np.nan, where(dropped, 0, value))

    return Summary(
        norm=norm,
        clipped_norm=after(norm),
        scale=after(full_like(norm, 1)),
        threshold=limit,
        clipped=lax.convert_element_type(spike, norm.dtype),
        any_clipped=spike,
        nonfinite=bad,
        unusable=unusable,
    )


def _judged(
    loss_rule: Threshold,
    extra: Mapping[str, PyTree],
    state: SkipState,
    loss: jax.Array | None,
    summary: Summary,
    rule: PyTree,
) -> tuple[dict[str, Any], jax.Array, jax.Array]:
    """The new fields of the state, whether to skip, and 1, 0 or NaN.

    The gradient times that number goes on.
    """
    context = Context(state.metrics.steps, extra=extra)
    loss_bad, loss_spike, new_loss_rule = _judge(loss, loss_rule, state, context)
    spike = summary.any_clipped
    frozen = either(summary.nonfinite, loss_bad)
    by_norm, by_loss = either(summary.nonfinite, spike), either(loss_bad, loss_spike)
    skipped = either(by_norm, by_loss)
    # A threshold that cannot be used made every leaf NaN, which must be seen.
    keep = both(skipped, negated(summary.unusable))
    reason: Any = np.int32(SkipReason.NOT_SKIPPED)
    for flag, number in (  # the first that is set is the reason
        (loss_spike, SkipReason.LOSS_SPIKE),
        (loss_bad, SkipReason.LOSS_NONFINITE),
        (spike, SkipReason.NORM_SPIKE),
        (summary.nonfinite, SkipReason.NORM_NONFINITE),
    ):
        reason = where(flag, np.int32(number), reason)
    by_loss = both(by_loss, negated(by_norm))
    summary = summary._replace(
        clipped_norm=where(by_loss, 0, summary.clipped_norm),
        scale=where(by_loss, 0, summary.scale),
        clipped=where(by_loss, 1, summary.clipped),
        any_clipped=either(spike, loss_spike),
        nonfinite=frozen,
    )
    fields = {
        "metrics": metrics.advance(state.metrics, summary),
        "rule": _select(frozen, state.rule, rule),
        "skipped": skipped,
        "reason": reason,
        "num_skipped": metrics.count(state.num_skipped, skipped),
        "consecutive_skips": where(
            skipped, metrics.count(state.consecutive_skips, True), 0
        ),
    }
    if loss is not None:
        fields["loss_rule"] = _select(frozen, state.loss_rule, new_loss_rule)
    factor = where(summary.unusable, np.nan, full_like(summary.norm, 1))
    return fields, keep, where(keep, 0, factor)


def _of_feed(skipped: jax.Array, norm: Norms) -> Norms:
    """The norm of what goes on."""
    return Norms(*(where(skipped, n, x) for n, x in zip((0, 0, 1), norm, strict=True)))


def _one_or_nothing(usual: jax.Array, factor: jax.Array, x: PyTree) -> jax.Array:
    """The array as usual, else the factor, whatever the array has."""
    return where(usual, x, of_dtype(factor, x.dtype))


def _loss(extra: Mapping[str, PyTree], arrays: Arrays, options: Options) -> Any:
    """The loss of all devices, or None."""
    loss = extra.get("loss")
    loss = extra.get("value") if loss is None else loss
    if loss is None:
        return None
    loss = jnp.asarray(loss)
    if loss.ndim or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(f"Expected the loss to be a real scalar, got {loss!r}.")
    return mesh.mean_over_devices(loss.astype(jnp.float32), options.axis_name)


def _judge(
    loss: jax.Array | None, rule: Threshold, state: SkipState, context: Context
) -> tuple[Number, Number, Any]:
    """Whether the loss is not finite, whether it is a spike, and the rule's state."""
    if loss is None:
        return np.False_, np.False_, state.loss_rule
    fine = finite(loss)
    usable = where(fine, loss, 0)
    limit, new = rule.update(usable, state.loss_rule, context)
    return negated(fine), both(fine, usable > limit), new


def _zeros_like(x: PyTree) -> Any:
    """Zeros in place of an array; what has no values stays."""
    return x if x.dtype == jax.dtypes.float0 else full_like(x, 0)


def _select(condition: jax.Array, this: PyTree, that: PyTree) -> Any:
    def one(a: PyTree, b: PyTree) -> Any:
        if getattr(b, "dtype", None) == jax.dtypes.float0:
            return b
        b = jnp.asarray(b)
        # Keys of random numbers cannot be cast, and need not.
        return where(condition, a, b if b.dtype == a.dtype else b.astype(a.dtype))

    return jax.tree.map(one, this, that)


def init_inner(inner: optax.GradientTransformation, params: PyTree) -> Any:
    """The state of the optimizer inside; leaves that are no arrays are explained."""
    try:
        return inner.init(params)
    except TypeError:
        flatten(params, updates=False)  # says what to do with leaves that are no arrays
        raise


def _checked(inner_state: PyTree) -> Any:
    """Refuses a state that cannot be chosen by a selection."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(inner_state):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise TypeError(
                "Expected arrays in the state of the inner optimizer, got"
                f" {leaf!r} of type {type(leaf).__name__} at {show(path_of(keys))}."
            )
    return inner_state
