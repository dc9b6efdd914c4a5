"""Thresholds in proportion to earlier norms: AdaGC, OLMo, Fira."""

import optax

from .._clipping.responses import rescale
from .._thresholds.ema_ratio import ema_ratio, norm_growth
from .._trees.calls import explains_calls
from .._trees.types import Scalar
from .common import AxisNames, Limit, Scope, Specs, capped, method


@explains_calls
def adagc(
    ratio: Limit = 1.04,
    *,
    decay: Scalar = 0.99,
    warmup_max_norm: Limit = 1.0,
    warmup_steps: Scalar = 100,
    init: str = "min",
    floor: Limit = 0.0,
    stats: str = "clipped",
    patience: Scalar | None = None,
    max_norm: Limit | None = None,
    scope: Scope = "leaf",
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each leaf relative to a moving average of its norm (AdaGC).

    .. math:: c_i = \min(1, \lambda g_i / n_i), \qquad
              g_i \leftarrow \beta g_i + (1 - \beta)\, c_i n_i

    Here :math:`n_i` is the norm of leaf :math:`i`, :math:`g_i` its moving average, and
    :math:`c_i` the factor by which the leaf is scaled. In the first ``warmup_steps``
    steps the whole tree is clipped to ``warmup_max_norm``, and :math:`g_i` is the
    smallest of the clipped norms of the leaf. After these steps the average grows by at
    most a factor of 1.0004 in each step. So if ``warmup_max_norm`` is far below the
    usual norm, nearly every step is clipped for thousands of steps. ``init="mean"``, a
    ``floor`` or ``patience`` avoids this; see :func:`thresholds.ema_ratio`.

    If one of the first 100 norms is 200 times the usual norm, later norms of 20 times
    the usual norm are still clipped.

    Args:
        ratio: :math:`\lambda`; 1.04 in the paper, 1.05 in some implementations.
        decay: :math:`\beta`; 0.99 in the paper, 0.98 in some implementations.
        warmup_max_norm: the threshold of the tree's norm in the warm-up, in the unit of
            the updates. It limits nothing afterwards.
        warmup_steps: the number of steps of the warm-up.
        init: what the average starts with: ``"min"`` or ``"mean"`` of the norms in the
            warm-up, or the ``"first"`` norm after it.
        floor: the smallest value of the average, on the scale of the updates.
        stats: what enters the average on a spike: ``"clipped"`` the threshold,
            ``"raw"`` the norm, or ``"skip"`` nothing.
        patience: with ``patience=n``, the ``n``-th spike in a row is not clipped, and
            its norm is accepted as the new level.
        max_norm: an upper bound of the threshold, on the scale of the updates.
        scope: as in :func:`zclip`; the default is each leaf.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation; its state has three numbers for each norm.

    Raises:
        ValueError: if a number is out of its range or a name unknown.
        TypeError: if a name is traced, and from ``update`` as :func:`clip_by`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.adagc(warmup_steps=2)
        >>> state = clipper.init(jnp.zeros(1))
        >>> for norm in (0.5, 0.6, 0.5, 9.0):
        ...     clipped, state = clipper.update(jnp.array([norm]), state)
        >>> print(clipped)
        [0.52]

    References:
        Wang et al., AdaGC: Improving training stability for large language model
        pretraining, 2025, arXiv 2502.11034.
    """
    rule = ema_ratio(
        ratio,
        decay=decay,
        warmup_steps=warmup_steps,
        warmup_limit=warmup_max_norm,
        init=init,
        floor=floor,
        stats=stats,
        patience=patience,
    )
    rule = capped(rule, max_norm)
    return method(scope, rule, rescale, nonfinite, axis_name, specs, metrics)


@explains_calls
def olmo_ratio_clip(
    ratio: Limit,
    *,
    decay: Scalar = 0.99,
    floor: Limit = 0.0,
    stats: str = "clipped",
    patience: Scalar | None = None,
    max_norm: Limit | None = None,
    scope: Scope = "leaf",
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each leaf relative to a moving average of its norm, as OLMo did.

    .. math:: c_i = \min(1, \lambda g_i / n_i), \qquad
              g_i \leftarrow \beta g_i + (1 - \beta)\, c_i n_i

    This is :func:`adagc` without its warm-up: the first step is neither clipped nor
    recorded, and the average starts with the norm of the second step.

    If one of the first 100 norms is 200 times the usual norm, later norms of 20 times
    the usual norm are not clipped for up to 276 steps, with a ratio of 1.5.

    Args:
        ratio: :math:`\lambda` (``max_grad_norm_ratio``).
        decay: :math:`\beta`; OLMo used the larger of the two decays of its optimizer.
        floor: the smallest value of the average, on the scale of the updates.
        stats: what enters the average on a spike: ``"clipped"`` the threshold,
            ``"raw"`` the norm, or ``"skip"`` nothing; see :func:`thresholds.ema_ratio`.
        patience: with ``patience=n``, the ``n``-th spike in a row is not clipped, and
            its norm is accepted as the new level.
        max_norm: an upper bound of the threshold, on the scale of the updates.
        scope: as in :func:`zclip`; the default is each leaf.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation; its state has three numbers for each norm.

    Raises:
        ValueError: if a number is out of its range or a name unknown.
        TypeError: if a name is traced, and from ``update`` as :func:`clip_by`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.olmo_ratio_clip(1.5)
        >>> state = clipper.init(jnp.zeros(1))
        >>> for norm in (7.0, 1.0, 9.0):
        ...     clipped, state = clipper.update(jnp.array([norm]), state)
        ...     print(clipped)
        [7.]
        [1.]
        [1.5]

    References:
        Groeneveld et al., OLMo: Accelerating the science of language models, 2024,
        arXiv 2402.00838, and its training code.
    """
    rule = ema_ratio(
        ratio,
        decay=decay,
        warmup_steps=1,
        floor=floor,
        stats=stats,
        patience=patience,
    )
    rule = capped(rule, max_norm)
    return method(scope, rule, rescale, nonfinite, axis_name, specs, metrics)


@explains_calls
def norm_growth_clip(
    ratio: Limit = 1.01,
    *,
    floor: Limit = 0.0,
    stats: str = "clipped",
    patience: Scalar | None = None,
    max_norm: Limit | None = None,
    scope: Scope = "tree",
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the norm to a multiple of the norm of the step before (Fira).

    .. math:: t_k = \gamma\, x_{k-1}, \qquad x_k = \min(n_k, t_k)

    Here :math:`n_k` is the norm at step :math:`k`, :math:`t_k` its threshold, and
    :math:`x_k` the norm after clipping. It is meant for updates: put it after the
    optimizer. After a very small norm the threshold is very small, too, and rises by at
    most 1% in each step. A ``floor`` or ``patience`` avoids this; see
    :func:`thresholds.norm_growth`.

    If one of the first 100 norms is 200 times the usual norm, a norm of 20 times the
    usual norm is not clipped in the next step.

    Args:
        ratio: :math:`\gamma`, at least 1.
        floor: the smallest value that is used for the last norm.
        stats: what enters the average on a spike: ``"clipped"`` the threshold,
            ``"raw"`` the norm, or ``"skip"`` nothing.
        patience: with ``patience=n``, the ``n``-th norm in a row that is above the
            threshold is not clipped, but accepted.
        max_norm: an upper bound of the threshold, on the scale of the updates.
        scope: as in :func:`zclip`; the paper's code measures each leaf.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation; its state has two numbers for each norm.

    Raises:
        ValueError: if a number is out of its range or a name unknown.
        TypeError: if a name is traced, and from ``update`` as :func:`clip_by`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.norm_growth_clip(1.5)
        >>> state = clipper.init(jnp.zeros(1))
        >>> for norm in (1.0, 9.0, 9.0):
        ...     clipped, state = clipper.update(jnp.array([norm]), state)
        ...     print(clipped)
        [1.]
        [1.5]
        [2.25]

    References:
        Chen et al., Fira: Can we achieve full-rank training of LLMs under low-rank
        constraint?, 2024, arXiv 2410.01623.
    """
    rule = norm_growth(ratio, floor=floor, stats=stats, patience=patience)
    rule = capped(rule, max_norm)
    return method(scope, rule, rescale, nonfinite, axis_name, specs, metrics)
