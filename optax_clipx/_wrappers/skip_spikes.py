"""Wrappers of an optimizer: skipped steps and reset moments."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _mesh, _metrics
from ._clipping import MEASURED, Measured, clip_norms
from ._leaves import flatten, path_of, show
from ._measures import tree_norm
from ._metrics import SkipState
from ._responses import drop
from ._summary import nothing
from ._thresholds._base import Context, Threshold, check_count
from ._thresholds._constant import as_threshold
from ._thresholds._zscore import zscore, zscore_of_any_sign
from ._transformation import Options

NOT_SKIPPED, NORM_NONFINITE, NORM_SPIKE, LOSS_NONFINITE, LOSS_SPIKE = range(5)


def skip_spikes(
    inner: optax.GradientTransformation,
    threshold: Any = None,
    *,
    loss_threshold: Any = None,
    patience: Any = 10,
    axis_name: Any = None,
    specs: Any = None,
    norm_arg: str = "norm",
) -> optax.GradientTransformationExtraArgs:
    r"""Skips a step whose gradients or loss spike: the optimizer inside stays as it is.

    .. math:: \text{skip} \iff n \text{ is not finite, or } n > t,
              \text{ or the same of the loss}

    :math:`n` is the norm of the whole updates that come in, before any clipping inside.
    On a skip the updates are zero and the state of ``inner`` stays bit for bit, by a
    selection and no branch. By default :math:`t` is the mean of the last 128 norms and
    six of their standard deviations, from the 64th on. A spike does not enter, so that
    it hides no other; the ``patience``-th in a row is accepted, and its level with
    it. What is not finite never enters, and is never accepted.

    The loss is judged if it is passed as ``loss=`` or ``value=`` to ``update``. On a
    mesh the decision is that of all devices.

    Args:
        inner: the optimizer, with its clipping: put this wrapper outermost.
        threshold: a threshold rule for the norm, or a number.
        loss_threshold: a threshold rule for the loss, or a number. A rule of another
            make than the default takes losses above zero only.
        patience: of the default rules, how many skips in a row until a level is
            accepted.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        norm_arg: as in :func:`clip_by`.

    Returns:
        A transformation. Its :class:`SkipState` has :class:`ClipMetrics` of the norm
        that came in; :func:`metrics` shows these, and adds ``skipped``, ``reason``,
        ``num_skipped`` and ``consecutive_skips``.

    Raises:
        TypeError: if ``inner`` is no transformation, or keeps something else than
            arrays in its state.
        ValueError: if ``patience`` is less than 1, and from ``update`` if the loss is
            no scalar or the place on the mesh is needed and missing.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_clipx as clipx
        >>> tx = clipx.skip_spikes(optax.adam(0.1), clipx.zscore(6.0, warmup_steps=3))
        >>> params = jnp.zeros(1)
        >>> state = tx.init(params)
        >>> for norm in (0.9, 1.0, 1.1, 1000.0):
        ...     updates, state = tx.update(jnp.array([norm]), state, params)
        >>> print(updates, clipx.metrics(state)["clip/num_skipped"])
        [0.] 1

    References:
        Chowdhery et al., PaLM, 2022, arXiv 2204.02311, skipped batches around a spike;
        OLMo et al., 2 OLMo 2 Furious, 2025, arXiv 2501.00656, and the training codes
        OLMo-core, Levanter, MaxText and axlearn skip steps by such rules.
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"Expected inner to be an optax transformation, got {inner!r}.")
    check_count(patience, "patience")
    usual: dict[str, Any] = {
        "window": 128,
        "warmup_steps": 64,
        "stats": "skip",
        "patience": patience,
    }
    rule = zscore(6.0, **usual) if threshold is None else as_threshold(threshold)
    if loss_threshold is None:
        loss_rule = zscore_of_any_sign(6.0, **usual)
    else:
        loss_rule = as_threshold(loss_threshold, "loss_threshold")
    if rule.uses_params or loss_rule.uses_params:
        raise ValueError("Expected a rule that does not depend on the parameters.")
    wrapped = optax.with_extra_args_support(inner)
    options = Options("zero", axis_name, specs, norm_arg=norm_arg)

    def init_fn(params: Any) -> SkipState:
        with _mesh.mesh_of(flatten(params, updates=False).arrays, auto=True):
            scalar = jnp.zeros((), jnp.float32)
            return SkipState(
                _metrics.fresh(True),
                rule.init(scalar),
                loss_rule.init(scalar),
                _checked(inner.init(params)),
                skipped=jnp.zeros((), jnp.bool_),
                reason=jnp.zeros((), jnp.int32),
                num_skipped=jnp.zeros((), jnp.int32),
                consecutive_skips=jnp.zeros((), jnp.int32),
            )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, SkipState]:
        if not isinstance(state, SkipState):
            raise TypeError(f"Expected the state that init returned, got {state!r}.")
        leaves = flatten(updates)
        if not leaves.arrays:
            updates, after = wrapped.update(updates, state.inner, params, **extra)
            return updates, state._replace(
                metrics=_metrics.advance(state.metrics, nothing()), inner=after
            )
        with _mesh.mesh_of(leaves.arrays):
            found = clip_norms(
                leaves,
                params,
                state.rule,
                state.metrics.steps,
                extra,
                tree_norm(),
                rule,
                drop,
                options,
            )
            summary = found.summary
            loss = _loss(extra, leaves.arrays, options)
            loss_bad, loss_spike, new_loss_rule = _judge(
                loss, loss_rule, state, Context(state.metrics.steps, extra=extra)
            )
            spike = summary.any_clipped
            skipped = summary.nonfinite | spike | loss_bad | loss_spike
            # A limit that cannot be used made every leaf NaN, which must be seen.
            keep = skipped & ~summary.unusable
            feed = [jnp.where(keep, jnp.zeros_like(x), x) for x in found.arrays]
            # A clipper that comes first inside need not measure the same again.
            known = jax.tree.map(lambda n: jnp.where(skipped, 0, n), found.norms)
            known = known._replace(factor=jnp.where(skipped, 1, found.norms.factor))
        inner_updates, after = wrapped.update(
            leaves.rebuild(feed),
            state.inner,
            params,
            **{**extra, MEASURED: Measured(feed, known)},
        )
        with _mesh.mesh_of(leaves.arrays):
            inner_updates = _select(
                keep, optax.tree.zeros_like(inner_updates), inner_updates
            )
            after = _select(keep, state.inner, after)
            frozen = summary.nonfinite | loss_bad
            reason = jnp.select(
                [summary.nonfinite, spike, loss_bad, loss_spike],
                [jnp.int32(r) for r in (1, 2, 3, 4)],
                jnp.int32(NOT_SKIPPED),
            )
            by_loss = skipped & ~(summary.nonfinite | spike)
            summary = summary._replace(
                clipped_norm=jnp.where(by_loss, 0, summary.clipped_norm),
                scale=jnp.where(by_loss, 0, summary.scale),
                clipped=jnp.where(by_loss, 1, summary.clipped),
                any_clipped=spike | loss_spike,
                nonfinite=frozen,
            )
            return inner_updates, SkipState(
                _metrics.advance(state.metrics, summary),
                _select(frozen, state.rule, found.rule),
                _select(frozen, state.loss_rule, new_loss_rule),
                after,
                skipped=skipped,
                reason=reason,
                num_skipped=_metrics.count(state.num_skipped, skipped),
                consecutive_skips=jnp.where(
                    skipped, _metrics.count(state.consecutive_skips, True), 0
                ),
            )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class ResetState(NamedTuple):
    """How many steps there have been, and the optimizer inside."""

    steps: jax.Array
    inner: Any


def reset_moments(
    inner: optax.GradientTransformation, every: Any = 500, *, warmup: Any = 150
) -> optax.GradientTransformationExtraArgs:
    r"""Starts an optimizer's state afresh every so many steps, and warms up after.

    .. math:: u \leftarrow u \cdot \tfrac12 \bigl(1 - \cos(\pi \min(k, w) / w)\bigr)

    where :math:`k = 1, 2, \ldots` counts the steps since a reset and :math:`w` is
    ``warmup``; before the first reset updates are not scaled. The whole state of
    ``inner`` becomes what ``init`` gives for the parameters of the moment, its step
    count included: put schedules of the learning rate outside, as in
    ``optax.chain(reset_moments(optax.scale_by_adam()), optax.scale_by_schedule(...))``.

    Args:
        inner: the optimizer whose moments a spike may have spoiled.
        every: how many steps there are from reset to reset.
        warmup: over how many steps the updates come back; 0 for none.

    Returns:
        A transformation, which needs ``params`` in ``update``.

    Raises:
        ValueError: if a count is out of range, and from ``update`` without ``params``.
        TypeError: if ``inner`` is no transformation, or keeps something else than
            arrays in its state.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_clipx as clipx
        >>> tx = clipx.reset_moments(optax.trace(0.5), every=2, warmup=0)
        >>> params = jnp.zeros(1)
        >>> state = tx.init(params)
        >>> for _ in range(4):
        ...     updates, state = tx.update(jnp.ones(1), state, params)
        ...     print(updates)
        [1.]
        [1.5]
        [1.]
        [1.5]

    References:
        Huang et al., SPAM: Spike-aware Adam with momentum reset for stable LLM
        training, 2025, arXiv 2501.06842.
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"Expected inner to be an optax transformation, got {inner!r}.")
    check_count(every, "every")
    check_count(warmup, "warmup", 0)
    wrapped = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> ResetState:
        with _mesh.mesh_of(flatten(params, updates=False).arrays, auto=True):
            return ResetState(jnp.zeros((), jnp.int32), _checked(inner.init(params)))

    def update_fn(
        updates: Any, state: ResetState, params: Any = None, **extra: Any
    ) -> tuple[Any, ResetState]:
        if params is None:
            raise ValueError(
                "Expected params, got None: a reset makes the state anew from them."
                " Call update(updates, state, params)."
            )
        interval = jnp.asarray(every, jnp.int32)
        reset = (state.steps > 0) & (state.steps % interval == 0)
        before = _select(reset, inner.init(params), state.inner)
        updates, after = wrapped.update(updates, before, params, **extra)
        length = jnp.asarray(warmup, jnp.int32).astype(jnp.float32)
        since = (state.steps % interval + 1).astype(jnp.float32)
        done = jnp.where(length > 0, since / jnp.maximum(length, 1), 1)
        scale = 0.5 * (1 - jnp.cos(jnp.pi * jnp.minimum(done, 1)))
        scale = jnp.where(state.steps < interval, 1, scale)
        leaves = flatten(updates)
        scaled = [u * scale.astype(u.dtype) for u in leaves.arrays]
        updates = leaves.rebuild(scaled)
        # The count runs on to know the place, and never overflows.
        steps = state.steps + 1
        steps = jnp.where(steps >= 2 * interval, interval, steps)
        return updates, ResetState(steps, after)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _loss(extra: Mapping[str, Any], arrays: list[Any], options: Options) -> Any:
    """The loss of all devices, or None."""
    loss = extra.get("loss")
    loss = extra.get("value") if loss is None else loss
    if loss is None:
        return None
    loss = jnp.asarray(loss)
    if loss.ndim or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(f"Expected the loss to be a real scalar, got {loss!r}.")
    return _mesh.mean_over_devices(loss.astype(jnp.float32), options.axis_name)


def _judge(
    loss: Any, rule: Threshold, state: SkipState, context: Context
) -> tuple[jax.Array, jax.Array, Any]:
    """Whether the loss is not finite, whether it is a spike, and the rule's state."""
    if loss is None:
        no = jnp.zeros((), jnp.bool_)
        return no, no, state.loss_rule
    bad = ~jnp.isfinite(loss)
    usable = jnp.where(bad, 0, loss)
    limit, new = rule.update(usable, state.loss_rule, context)
    return bad, ~bad & (usable > limit), new


def _select(condition: jax.Array, this: Any, that: Any) -> Any:
    def one(a: Any, b: Any) -> Any:
        if getattr(b, "dtype", None) == jax.dtypes.float0:
            return b
        b = jnp.asarray(b)
        # Keys of random numbers cannot be cast, and need not.
        return jnp.where(condition, a, b if b.dtype == a.dtype else b.astype(a.dtype))

    return jax.tree.map(one, this, that)


def _checked(inner_state: Any) -> Any:
    """Refuses a state that cannot be chosen by a selection."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(inner_state):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise TypeError(
                "Expected arrays in the state of the inner optimizer, got"
                f" {leaf!r} of type {type(leaf).__name__} at {show(path_of(keys))}."
            )
    return inner_state
