"""Momentum that is clipped, alone or together with the gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from .._clipping import policies
from .._clipping.clip_by import Parts, clip_norms
from .._clipping.entries import (
    mean_of,
    moments_in,
    rebuild,
    zeros_like,
)
from .._clipping.measures import tree_norm
from .._clipping.responses import rescale
from .._clipping.scaling import Response
from .._clipping.summary import Summary
from .._clipping.transformation import (
    Given,
    Memory,
    Options,
    check_memory,
    check_state,
    transformation,
)
from .._reductions.norms import Norms
from .._thresholds.base import unless
from .._thresholds.constant import as_threshold
from .._trees.arguments import AxisNames, Limit, Specs, check_decay, out_of_range
from .._trees.arithmetic import at_least_float32
from .._trees.calls import explains_calls
from .._trees.leaves import Leaves, flatten
from .._trees.types import Arrays, Scalar
from .smooth import normalize_by_norm


class MixedMemory(NamedTuple):
    """The average of each entry."""

    mu: Any


@explains_calls
def mixed_clip(
    max_norm: Limit,
    *,
    nu: Scalar = 0.7,
    decay: Scalar = 0.999,
    response: Response | None = None,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Mixes the clipped momentum with the clipped gradient.

    .. math:: m \leftarrow \beta m + (1 - \beta) g, \qquad
              u = \nu\, \mathrm{clip}_t(m) + (1 - \nu)\, \mathrm{clip}_t(g)

    With ``nu=1`` it is clipped momentum, with ``nu=0`` plain clipping. Put
    :func:`optax.sgd` with a learning rate :math:`\eta` after it; the paper's
    :math:`\gamma` is :math:`\eta t`. The paper's code uses
    ``response=optax_clipx.responses.smooth``. The state has one number for each entry,
    in a tree like the parameters.

    Args:
        max_norm: :math:`t`, on the scale of the updates: a number, a scalar array or a
            schedule.
        nu: :math:`\nu`, from 0 to 1.
        decay: :math:`\beta`, from 0 to below 1.
        response: what happens above the threshold, as in :func:`clip_by`;
            :func:`responses.rescale` unless given.
        nonfinite: as in :func:`clip_by`; on such a step the momentum stays as it is.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`, of the gradient's part.

    Returns:
        A transformation.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: from ``update`` as :func:`clip_by`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> optimizer = clipx.mixed_clip(1.0, nu=0.5, decay=0.75)
        >>> updates, _ = optimizer.update(jnp.array([2.0]), optimizer.init(jnp.ones(1)))
        >>> print(updates)
        [0.75]

    References:
        Zhang et al., Improved analysis of clipping algorithms for non-convex
        optimization, 2020, arXiv 2010.02519.
    """
    check_decay(decay, "decay")
    if not isinstance(nu, jax.core.Tracer) and not 0 <= nu <= 1:
        raise ValueError(f"Expected nu from 0 to 1, got nu={nu}.")
    respond = rescale if response is None else response
    rule = as_threshold(max_norm, "max_norm")
    if rule.uses_params or jax.tree.leaves(rule.init(jnp.zeros((), jnp.float32))):
        raise ValueError(
            "Expected max_norm to be a number or a schedule, got a rule that adapts:"
            " the two parts have norms of their own."
        )
    options = Options(nonfinite, axis_name, specs, metrics)
    parts = Parts(tree_norm(), rule, respond, options)

    def step(given: Given) -> tuple[list[Any], Memory]:
        leaves, memory = given.leaves, given.memory
        plain = given._replace(memory=memory._replace(rule=()))
        state = memory.rule
        check_memory(state, MixedMemory)
        moments = moments_in(state.mu, leaves)
        gradient, (metrics, bad, zero) = clip_norms(parts, plain, _of_gradient)
        arrays = leaves.arrays
        if options.nonfinite == "sanitize":
            arrays = policies.sanitize(arrays)
        moved = [
            mean_of(m, x.astype(m.dtype), decay)
            for m, x in zip(moments, arrays, strict=True)
        ]
        # First chosen and then measured: the new ones can be written in place.
        kept = [jnp.where(bad, m, n) for m, n in zip(moments, moved, strict=True)]
        goes_on = options.nonfinite == "sanitize"
        averages = leaves._replace(arrays=moved if goes_on else kept)
        of_averages = plain._replace(leaves=averages, extra={}, known=None)
        momentum, _ = clip_norms(parts, of_averages, lambda *_: None)
        share = unless(out_of_range(decay), jnp.asarray(nu, jnp.float32))
        mixed = [
            (
                share.astype(m.dtype) * m
                + (1 - share).astype(m.dtype) * g.astype(m.dtype)
            ).astype(g.dtype)
            for m, g in zip(momentum, gradient, strict=True)
        ]
        if options.nonfinite == "zero":
            mixed = [jnp.where(zero, jnp.zeros_like(x), x) for x in mixed]
        after = MixedMemory(rebuild(state.mu, kept))
        return mixed, memory._replace(rule=after, metrics=metrics)

    def init(leaves: Leaves) -> MixedMemory:
        return MixedMemory(zeros_like(leaves))

    return transformation(init, step, rule, options)


def _of_gradient(memory: Memory, summary: Summary, rule: PyTree, norm: Norms) -> Any:
    """The gradient's metrics, whether it is not finite, and whether it is zeroed."""
    zero = summary.nonfinite & ~summary.unusable
    return memory.metrics_after(summary), summary.nonfinite, zero


@explains_calls
def normalized_momentum(
    decay: Scalar = 0.9,
    target: Limit = 1.0,
    *,
    eps: Scalar = 0.0,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the momentum to a fixed norm: normalized gradient descent with momentum.

    .. math:: m \leftarrow \beta m + (1 - \beta) g, \qquad
              u = \frac{t}{\|m\| + \epsilon}\, m

    Args:
        decay: :math:`\beta`, from 0 to below 1.
        target: :math:`t`, as in :func:`normalize_by_norm`.
        eps: :math:`\epsilon`, on the scale of the updates.
        nonfinite: as in :func:`clip_by`. A NaN stays in the momentum for ever: put
            :func:`skip_spikes` around the optimizer to continue after one.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`, of the momentum.

    Returns:
        A transformation: :func:`optax.ema` and :func:`normalize_by_norm`, with the
        state of these in a chain. The average is a tree like the parameters.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> optimizer = clipx.normalized_momentum()
        >>> updates, _ = optimizer.update(jnp.array([0.0, 4.0]),
        ...                               optimizer.init(jnp.zeros(2)))
        >>> print(updates)
        [0. 1.]

    References:
        Cutkosky and Mehta, Momentum improves normalized SGD, 2020, arXiv 2002.03305.
    """
    check_decay(decay, "decay")
    average = optax.ema(decay, debias=False)
    clipper = normalize_by_norm(
        target,
        eps=eps,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
        metrics=metrics,
    )

    def init(params: PyTree) -> Any:
        zeros = zeros_like(flatten(params, updates=False))
        return average.init(zeros), clipper.init(zeros)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree
    ) -> Any:
        check_state(state[0] if type(state) is tuple else state, optax.EmaState)
        leaves = flatten(updates)
        before, clip_state = state
        # Without the leaves that have no gradient, of which Optax would take a mean.
        moments = before._replace(ema=moments_in(before.ema, leaves))
        mean, after = average.update(_wide(leaves.arrays), moments)
        after = after._replace(ema=rebuild(before.ema, after.ema))
        out, clip_state = clipper.update(
            leaves.rebuild(mean), clip_state, params, **extra
        )
        back = zip(flatten(out).arrays, leaves.arrays, strict=True)
        unusable = out_of_range(decay)
        out = leaves.rebuild([unless(unusable, u).astype(x.dtype) for u, x in back])
        return out, (after, clip_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _wide(arrays: Arrays) -> list[Any]:
    """In float32 at least: a narrow average would stop where its steps round to 0."""
    return [jnp.asarray(x).astype(at_least_float32(x)) for x in arrays]
