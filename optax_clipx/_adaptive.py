"""The published adaptive methods, each a composition with its paper's defaults."""

import functools
from typing import Any

import optax

from ._clipping import clip_by
from ._measures import Measure, leaf_norms, tree_norm
from ._responses import normalize, rescale, smooth
from ._scaling import Response
from ._thresholds._base import Threshold, check_between
from ._thresholds._combine import minimum
from ._thresholds._constant import constant
from ._thresholds._ema_ratio import ema_ratio, norm_growth
from ._thresholds._quantile import quantile, quantile_tracker
from ._thresholds._zscore import zscore


def zclip(
    z_threshold: Any = 2.5,
    *,
    decay: Any = 0.97,
    warmup_steps: Any = 25,
    mode: str = "reciprocal",
    clip_factor: Any = 1.0,
    max_norm: Any = None,
    stats: str = "clipped",
    patience: Any = None,
    cap: Any = None,
    scope: Any = "tree",
    nonfinite: str = "propagate",
    axis_name: Any = None,
    specs: Any = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips norms whose z-score among the norms so far is large (ZClip).

    .. math:: z = (n - \mu) / \sigma > z^* \;\Rightarrow\;
              t = \Bigl(\mu + \frac{(z^*)^2}{z} \sigma\Bigr) \cdot \text{factor}

    :math:`\mu, \sigma` are moving averages of :math:`x = t` on a spike and of
    :math:`x = n` else, begun with the first ``warmup_steps`` norms; see :func:`zscore`
    for what that risks. A standard deviation below 1% of the mean counts as 1%: in the
    official code constant norms make the smallest change a spike, and one NaN ends
    clipping for good.

    Args:
        z_threshold: :math:`z^*`.
        decay: the decay of the moving averages.
        warmup_steps: how many norms to see before clipping.
        mode: where a spike goes: ``"reciprocal"``, ``"mean"`` (:math:`\mu`) or
            ``"threshold"`` (:math:`\mu + z^*\sigma`, "percentile" in the official
            code).
        clip_factor: a factor of the reciprocal target.
        max_norm: caps every step, in the unit of the updates. ``None`` on purpose: the
            official 1.0 makes a fixed clipper of it.
        stats: what enters on a spike: ``"clipped"``, ``"raw"`` or ``"skip"`` (the
            official skip option, which only leaves the averages alone).
        patience: how many spikes in a row it takes until the last of them is accepted,
            and its level. ``None`` is 50; the official code never accepts one.
        cap: an absolute limit on top, like ``max_norm``.
        scope: what is measured together: ``"tree"``, ``"leaf"`` or a measure such as
            ``group_norms(labels)``.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation; its state has four numbers for each norm.

    Raises:
        ValueError: if a number is out of its range or a name unknown.
        TypeError: if a name is traced, and from ``update`` as :func:`clip_by`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.zclip(warmup_steps=3)
        >>> state = clipper.init(jnp.zeros(1))
        >>> for norm in (0.9, 1.0, 1.1, 9.0):
        ...     clipped, state = clipper.update(jnp.array([norm]), state)
        >>> print(clipped)  # 9.0 came down to 1.005
        [1.0052...]

    References:
        Kumar et al., ZClip: Adaptive spike mitigation for LLM pre-training, 2025,
        arXiv 2504.02507.
    """
    rule = zscore(
        z_threshold,
        decay=decay,
        warmup_steps=warmup_steps,
        target=mode,
        clip_factor=clip_factor,
        stats=stats,
        patience=patience,
    )
    rule = _capped(_capped(rule, max_norm, "max_norm"), cap)
    return _method(scope, rule, rescale, nonfinite, axis_name, specs, metrics)


def autoclip(
    percentile: Any = 10.0,
    *,
    window: Any = None,
    max_steps: Any = None,
    cap: Any = None,
    scope: Any = "tree",
    nonfinite: str = "propagate",
    axis_name: Any = None,
    specs: Any = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips norms to a percentile of the norms so far (AutoClip).

    .. math:: t_k = \mathrm{percentile}_p(n_1, \ldots, n_k)

    Norms enter as they are; see :func:`quantile` for the three ways to keep them and
    what a spike does. At the default 10 nine steps of ten are clipped.

    Args:
        percentile: :math:`p`, between 0 and 100.
        window: keep the last so many norms.
        max_steps: keep so many norms, the whole history up to there. With neither, a
            sketch of 4,000 bytes is kept, within 2.9% of the percentile.
        cap: an absolute limit on top, in the unit of the updates.
        scope: as in :func:`zclip`.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation.

    Raises:
        ValueError: if ``percentile`` is out of range, or ``window`` and ``max_steps``
            are both given.
        TypeError: if ``window`` or ``max_steps`` is traced, and from ``update`` as
            :func:`clip_by`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.autoclip(50.0, window=100)
        >>> state = clipper.init(jnp.zeros(1))
        >>> for norm in (1.0, 2.0, 9.0):
        ...     clipped, state = clipper.update(jnp.array([norm]), state)
        >>> print(clipped)
        [2.]

    References:
        Seetharaman et al., AutoClip: Adaptive gradient clipping for source separation
        networks, 2020, arXiv 2007.14469.
    """
    check_between(percentile, "percentile", 0, 100)
    rule = quantile(percentile / 100, window=window, max_steps=max_steps)
    rule = _capped(rule, cap)
    return _method(scope, rule, rescale, nonfinite, axis_name, specs, metrics)


def adagc(
    ratio: Any = 1.04,
    *,
    decay: Any = 0.99,
    max_norm: Any = 1.0,
    warmup_steps: Any = 100,
    init: str = "min",
    floor: Any = 0.0,
    stats: str = "clipped",
    patience: Any = None,
    cap: Any = None,
    scope: Any = "leaf",
    nonfinite: str = "propagate",
    axis_name: Any = None,
    specs: Any = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each leaf relative to a moving average of its norm (AdaGC).

    .. math:: c_i = \min(1, \lambda g_i / n_i), \qquad
              g_i \leftarrow \beta g_i + (1 - \beta)\, c_i n_i

    In the first ``warmup_steps`` steps, exactly so many, the whole tree is clipped to
    ``max_norm`` and :math:`g_i` is the least norm of the leaf so clipped. After them it
    grows by at most the factor 1.0004 a step: with ``max_norm`` below the natural norm,
    clipping stays engaged for thousands of steps. ``init="mean"``, a ``floor`` or
    ``patience`` avoid that; see :func:`ema_ratio`.

    Args:
        ratio: :math:`\lambda`; 1.04 in the paper, 1.05 in some ports.
        decay: :math:`\beta`; 0.99 in the paper, 0.98 in some ports.
        max_norm: the limit of the tree's norm in the warm-up, and no cap afterwards;
            in the unit of the updates.
        warmup_steps: how many steps the warm-up takes.
        init: what the average starts with: ``"min"``, ``"mean"`` or ``"first"``.
        floor: the average counts as at least this, in the unit of the updates.
        stats: what enters on a spike: ``"clipped"``, ``"raw"`` or ``"skip"``.
        patience: after so many spikes in a row their level is accepted.
        cap: an absolute limit on top.
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
        warmup_limit=max_norm,
        init=init,
        floor=floor,
        stats=stats,
        patience=patience,
    )
    rule = _capped(rule, cap)
    return _method(scope, rule, rescale, nonfinite, axis_name, specs, metrics)


def olmo_ratio_clip(
    ratio: Any,
    *,
    decay: Any = 0.99,
    floor: Any = 0.0,
    stats: str = "clipped",
    patience: Any = None,
    cap: Any = None,
    scope: Any = "leaf",
    nonfinite: str = "propagate",
    axis_name: Any = None,
    specs: Any = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each leaf relative to a moving average of its norm, as OLMo did.

    .. math:: c_i = \min(1, \lambda g_i / n_i), \qquad
              g_i \leftarrow \beta g_i + (1 - \beta)\, c_i n_i

    :func:`adagc` without warm-up: the first step passes unrecorded, and the average
    starts with the norm of the second.

    Args:
        ratio: :math:`\lambda` (``max_grad_norm_ratio``).
        decay: :math:`\beta`; OLMo took the larger of its optimizer's two decays.
        floor: the average counts as at least this, in the unit of the updates.
        stats: what enters on a spike: ``"clipped"``, ``"raw"`` or ``"skip"``; see
            :func:`ema_ratio`.
        patience: after so many spikes in a row their level is accepted.
        cap: an absolute limit on top.
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
    rule = _capped(rule, cap)
    return _method(scope, rule, rescale, nonfinite, axis_name, specs, metrics)


def log_zscore_clip(
    z_threshold: Any = 2.0,
    *,
    decay: Any = 0.95,
    cap: Any = None,
    scope: Any = "tree",
    nonfinite: str = "propagate",
    axis_name: Any = None,
    specs: Any = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Brings norms far above the usual in log space to the mean (Chorowski et al.).

    .. math:: \log n > m + z^* d \;\Rightarrow\; t = e^m

    :math:`m` and :math:`d` are moving mean and standard deviation of :math:`\log n`,
    this norm included before it is judged; :math:`d` counts as at least 0.01. Norms
    enter as they are: a spike widens :math:`d` and can hide an equal one soon after. As
    the norm enters first, no z-score exceeds :math:`\sqrt{\beta/(1-\beta)}`, 4.4 at the
    default decay.

    Args:
        z_threshold: :math:`z^*`.
        decay: the decay of the moving averages, which are plain averages first.
        cap: an absolute limit on top, in the unit of the updates.
        scope: as in :func:`zclip`.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation; its state has four numbers for each norm.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: from ``update`` as :func:`clip_by`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.log_zscore_clip()
        >>> state = clipper.init(jnp.zeros(1))
        >>> for norm in (1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 9.0):
        ...     clipped, state = clipper.update(jnp.array([norm]), state)
        >>> print(clipped)
        [1.36...]

    References:
        Chorowski et al., End-to-end continuous speech recognition using attention-based
        recurrent NN, 2014, arXiv 1412.1602; TensorFlow 1's ``adaptive_clipping_fn``.
    """
    rule = zscore(
        z_threshold,
        decay=decay,
        warmup_steps=0,
        space="log",
        target="mean",
        include_current=True,
        stats="raw",
    )
    rule = _capped(rule, cap)
    return _method(scope, rule, rescale, nonfinite, axis_name, specs, metrics)


def quantile_clip(
    q: Any = 0.9,
    *,
    learning_rate: Any = 0.02,
    window: Any = None,
    cap: Any = None,
    scope: Any = "tree",
    nonfinite: str = "propagate",
    axis_name: Any = None,
    specs: Any = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips norms to a quantile that is tracked in one number, or in a window.

    .. math:: t_{k+1} = t_k \exp\bigl(-\eta (\mathbb{1}[n_k \le t_k] - q)\bigr)

    With ``window`` the limit is the quantile of the last norms instead. Either way a
    spike has bounded influence; see :func:`quantile_tracker` and :func:`quantile`.

    Args:
        q: the share of steps that should not be clipped, between 0 and 1.
        learning_rate: :math:`\eta` of the tracker.
        window: keep the last so many norms instead of tracking.
        cap: an absolute limit on top, in the unit of the updates.
        scope: as in :func:`zclip`.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: if ``window`` is traced, and from ``update`` as :func:`clip_by`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.quantile_clip(0.9)
        >>> state = clipper.init(jnp.zeros(1))
        >>> for norm in (1.0, 9.0):
        ...     clipped, state = clipper.update(jnp.array([norm]), state)
        >>> print(clipped)
        [0.998...]

    References:
        Andrew et al., Differentially private learning with adaptive clipping, 2021,
        arXiv 1905.03871 (tracker); Merad and Gaïffas, Robust stochastic optimization
        via gradient quantile clipping, 2023, arXiv 2309.17316 (window).
    """
    if window is None:
        rule = quantile_tracker(q, learning_rate=learning_rate)
    else:
        rule = quantile(q, window=window)
    rule = _capped(rule, cap)
    return _method(scope, rule, rescale, nonfinite, axis_name, specs, metrics)


def norm_growth_limit(
    ratio: Any = 1.01,
    *,
    floor: Any = 0.0,
    stats: str = "clipped",
    patience: Any = None,
    cap: Any = None,
    scope: Any = "tree",
    nonfinite: str = "propagate",
    axis_name: Any = None,
    specs: Any = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Lets the norm grow by a ratio from step to step, and no more (Fira).

    .. math:: t_k = \gamma\, x_{k-1}, \qquad x_k = \min(n_k, t_k)

    Meant for updates, after the optimizer. One very small norm is recovered from by 1%
    a step only: set a ``floor`` or ``patience``; see :func:`norm_growth`.

    Args:
        ratio: :math:`\gamma`, at least 1.
        floor: the last norm counts as at least this, in the unit of the updates.
        stats: what enters on a spike: ``"clipped"``, ``"raw"`` or ``"skip"``.
        patience: after so many norms above in a row a norm is accepted as it is.
        cap: an absolute limit on top.
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
        >>> clipper = clipx.norm_growth_limit(1.5)
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
    rule = _capped(rule, cap)
    return _method(scope, rule, rescale, nonfinite, axis_name, specs, metrics)


def historical_update_clip(
    z_threshold: Any = 3.0,
    *,
    window: Any = 128,
    warmup_steps: Any = 64,
    stats: str = "raw",
    patience: Any = None,
    cap: Any = None,
    scope: Any = "tree",
    nonfinite: str = "propagate",
    axis_name: Any = None,
    specs: Any = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips updates to some deviations above the mean of their last norms (Levanter).

    .. math:: t = \mu + z^* \sigma

    of the last ``window`` norms. Meant for updates, after the optimizer. Norms enter as
    they are, so a spike in the window hides an equal one; see :func:`zscore`. A
    standard deviation below 1% of the mean counts as 1%.

    Args:
        z_threshold: :math:`z^*`.
        window: how many norms to keep.
        warmup_steps: how many norms to see before clipping.
        stats: what enters on a spike: ``"raw"``, ``"clipped"`` or ``"skip"``.
        patience: after so many spikes in a row their level is accepted.
        cap: an absolute limit on top, in the unit of the updates.
        scope: as in :func:`zclip`.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation; its state has the window and two numbers for each norm.

    Raises:
        ValueError: if a number is out of its range or a name unknown.
        TypeError: if ``window`` or a name is traced, and from ``update`` as
            :func:`clip_by`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.historical_update_clip(window=4, warmup_steps=2)
        >>> state = clipper.init(jnp.zeros(1))
        >>> for norm in (0.9, 1.1, 9.0):
        ...     clipped, state = clipper.update(jnp.array([norm]), state)
        >>> print(clipped.round(4))
        [1.3]

    References:
        Levanter's ``clip_update_norm`` (Stanford CRFM, Apache-2.0).
    """
    rule = zscore(
        z_threshold,
        window=window,
        warmup_steps=warmup_steps,
        stats=stats,
        patience=patience,
    )
    rule = _capped(rule, cap)
    return _method(scope, rule, rescale, nonfinite, axis_name, specs, metrics)


def smooth_clip(
    max_norm: Any,
    *,
    p: Any = 1.0,
    scope: Any = "tree",
    nonfinite: str = "propagate",
    axis_name: Any = None,
    specs: Any = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Bends the norm under a limit without a corner.

    .. math:: u \leftarrow \bigl(1 + (\|u\| / t)^p\bigr)^{-1/p}\, u

    Args:
        max_norm: :math:`t`, in the unit of the updates: a number, a scalar array, a
            schedule, a prefix, or a threshold rule.
        p: the sharpness, above 0; 1 is :math:`1/(1 + n/t)`, a large one approaches
            :func:`clip_by_global_norm`.
        scope: as in :func:`zclip`.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: from ``update`` as :func:`clip_by`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipped, _ = clipx.smooth_clip(1.0).update(jnp.array([3.0]))
        >>> print(clipped)
        [0.75]

    References:
        Zhang et al., Why gradient clipping accelerates training, 2020,
        arXiv 1905.11881.
    """
    check_between(p, "p", 0, float("inf"))
    response = functools.partial(smooth, p=p)
    return _method(scope, max_norm, response, nonfinite, axis_name, specs, metrics)


def normalize_by_norm(
    target: Any = 1.0,
    *,
    eps: Any = 0.0,
    scope: Any = "tree",
    nonfinite: str = "propagate",
    axis_name: Any = None,
    specs: Any = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Gives the updates a norm, large or small: normalized gradient descent.

    .. math:: u \leftarrow \frac{t}{\|u\| + \epsilon}\, u

    Args:
        target: :math:`t`, in the unit of the updates: a number, a scalar array, a
            schedule, a prefix, or a threshold rule.
        eps: :math:`\epsilon`, in the unit of the updates. With 0, an update of zero
            stays zero.
        scope: as in :func:`zclip`.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation.

    Raises:
        ValueError: if a number is negative or NaN.
        TypeError: from ``update`` as :func:`clip_by`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipped, _ = clipx.normalize_by_norm().update(jnp.array([0.0, 0.25]))
        >>> print(clipped)
        [0. 1.]

    References:
        Cutkosky and Mehta, Momentum improves normalized SGD, 2020, arXiv 2002.03305.
    """
    check_between(eps, "eps", 0, float("inf"))
    response = functools.partial(normalize, eps=eps)
    return _method(scope, target, response, nonfinite, axis_name, specs, metrics)


def _method(
    scope: Any,
    rule: Any,
    response: Response,
    nonfinite: str,
    axis_name: Any,
    specs: Any,
    metrics: bool,
) -> optax.GradientTransformationExtraArgs:
    return clip_by(
        measure_of(scope),
        rule,
        response,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
        metrics=metrics,
    )


def measure_of(scope: Any) -> Measure:
    """The measure that a scope names."""
    if isinstance(scope, Measure):
        return scope
    if isinstance(scope, str) and scope in ("tree", "leaf"):
        return tree_norm() if scope == "tree" else leaf_norms()
    raise ValueError(
        "Expected scope to be 'tree', 'leaf' or a measure such as"
        f" optax_clipx.group_norms(labels), got scope={scope!r}."
    )


def _capped(rule: Threshold, cap: Any, name: str = "cap") -> Threshold:
    return rule if cap is None else minimum(rule, constant(cap, name))
