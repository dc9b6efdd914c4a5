"""Clipping against what each entry's own past says: SPAM, ACClip, momentum."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import _policies
from ._clipping import clip_norms
from ._entries import check_leaves, elementwise, mean_of, root_of_mean, zeros_like
from ._leaves import Leaves, flatten
from ._measures import tree_norm
from ._methods._smooth import normalize_by_norm
from ._responses import rescale
from ._scaling import Response
from ._thresholds._base import (
    check_between,
    check_count,
    check_decay,
    check_static_number,
)
from ._thresholds._constant import as_threshold
from ._transformation import Options, Step, arrays_in, transformation


def clip_spikes(
    theta: Any = 5000.0,
    *,
    decay: Any = 0.999,
    warmup_steps: Any = 20,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    specs: Any = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips entries far above their own second moment (SPAM).

    .. math:: g_j \leftarrow \mathrm{sign}(g_j) \sqrt{\theta v_j}
              \;\text{ where } g_j^2 > \theta v_j > 0, \qquad
              v \leftarrow \beta v + (1 - \beta)\, g^2

    with :math:`v` as it was before the step, and fed with the clipped :math:`g`. Put it
    before :func:`optax.scale_by_adam` with the same decay, and both inside of
    :func:`reset_moments`, for the whole of SPAM. An entry that was always zero is not
    clipped: the first gradient of a rare token passes.

    State: one number for each entry, the root of :math:`v`.

    Args:
        theta: :math:`\theta`, the square of the ratio that makes a spike, above 0.
        decay: :math:`\beta`, from 0 to 1; Adam's ``b2``.
        warmup_steps: how many first steps are not clipped.
        nonfinite: as in :func:`clip_by`; on such a step :math:`v` stays as it is.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`: the 2-norms before and
            after, and as ``clipped`` the fraction of entries.

    Returns:
        A transformation.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: from ``update`` as :func:`clip_by`, and for complex leaves.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.clip_spikes(4.0, decay=0.75, warmup_steps=0)
        >>> state = clipper.init(jnp.zeros(2))
        >>> for gradient in ([1.0, 0.0], [9.0, 9.0]):
        ...     clipped, state = clipper.update(jnp.array(gradient), state)
        ...     print(clipped)
        [1. 0.]
        [1. 9.]

    References:
        Huang et al., SPAM: Spike-aware Adam with momentum reset for stable LLM
        training, 2025, arXiv 2501.06842; there an entry whose :math:`v` is zero is
        clipped to zero, and so stays zero until the next reset.
    """
    check_between(theta, "theta", 0, float("inf"))
    if not isinstance(theta, jax.core.Tracer) and theta == 0:
        raise ValueError(f"Expected theta > 0, got theta={theta!r}.")
    check_decay(decay, "decay")
    check_count(warmup_steps, "warmup_steps", 0)

    def act(
        arrays: list[jax.Array], roots: list[jax.Array], count: Any
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        clipped, new = [], []
        for x, root in zip(arrays, roots, strict=True):
            bound = root * jnp.sqrt(jnp.asarray(theta, root.dtype))
            wide = x.astype(root.dtype)
            spike = (jnp.abs(wide) > bound) & (root > 0) & (count >= warmup_steps)
            out = jnp.where(spike, jnp.sign(wide) * bound, wide)
            clipped.append(jnp.where(spike, out.astype(x.dtype), x))
            new.append(root_of_mean(root, jnp.abs(out), decay, 2.0))
        return clipped, new

    return elementwise(act, 1, Options(nonfinite, axis_name, specs, metrics))


def scale_by_acclip(
    b1: Any = 0.9,
    b2: Any = 0.99,
    *,
    alpha: float | None = None,
    eps: Any = 1e-5,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    specs: Any = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum that each entry's own usual magnitude limits (ACClip).

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
              \tau^\alpha \leftarrow \beta_2 \tau^\alpha + (1 - \beta_2) |g|^\alpha,
              \quad u = \min\Bigl(\frac{\tau}{|m| + \epsilon}, 1\Bigr)\, m

    In the place of :func:`optax.scale_by_adam`. State: two numbers for each entry.

    Args:
        b1: :math:`\beta_1`, from 0 to below 1.
        b2: :math:`\beta_2`, from 0 to below 1.
        alpha: :math:`\alpha`, the moment that the noise has, from 1 on; 1 unless given.
        eps: :math:`\epsilon`, in the unit of the updates.
        nonfinite: as in :func:`clip_by`; on such a step the state stays as it is.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`: the 2-norms of the
            momentum before and after, and as ``clipped`` the fraction of entries.

    Returns:
        A transformation.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: from ``update`` as :func:`clip_by`, and for complex leaves.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> optimizer = clipx.scale_by_acclip(b1=0.5, b2=0.75, eps=0.0)
        >>> updates, _ = optimizer.update(jnp.array([8.0]), optimizer.init(jnp.ones(1)))
        >>> print(updates)
        [2.]

    References:
        Zhang et al., Why are adaptive methods good for attention models?, 2020,
        arXiv 1912.03194.
    """
    check_decay(b1, "b1")
    check_decay(b2, "b2")
    check_between(eps, "eps", 0, float("inf"))
    alpha = 1.0 if alpha is None else alpha
    check_static_number(alpha, "alpha")
    if alpha < 1:
        raise ValueError(f"Expected alpha >= 1, got alpha={alpha}.")

    def act(
        arrays: list[jax.Array], moments: list[jax.Array], count: Any
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        each = len(arrays)
        out, means, taus = [], [], []
        for x, mean, tau in zip(arrays, moments[:each], moments[each:], strict=True):
            mean = mean_of(mean, x.astype(mean.dtype), b1)
            tau = root_of_mean(tau, jnp.abs(x.astype(tau.dtype)), b2, float(alpha))
            size = jnp.abs(mean) + jnp.asarray(eps, mean.dtype)
            over = size > tau
            scaled = tau * (mean / jnp.where(size > 0, size, 1))
            out.append(jnp.where(over, scaled, mean))
            means.append(mean)
            taus.append(tau)
        return out, means + taus

    options = Options(nonfinite, axis_name, specs, metrics)
    return elementwise(act, 2, options, of_moment=True)


def mixed_clip(
    max_norm: Any,
    *,
    nu: Any = 0.7,
    decay: Any = 0.999,
    response: Response | None = None,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    specs: Any = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Mixes the clipped momentum with the clipped gradient.

    .. math:: m \leftarrow \beta m + (1 - \beta) g, \qquad
              u = \nu\, \mathrm{clip}_t(m) + (1 - \nu)\, \mathrm{clip}_t(g)

    With ``nu=1`` momentum alone, with ``nu=0`` plain clipping. Follow it with
    :func:`optax.sgd` or a learning rate :math:`\eta`: the paper's :math:`\gamma` is
    :math:`\eta t`, and its code's form ``response=optax_clipx.smooth``.

    State: one number for each entry.

    Args:
        max_norm: :math:`t`, in the unit of the updates: a number, a scalar array or a
            schedule.
        nu: :math:`\nu`, from 0 to 1.
        decay: :math:`\beta`, from 0 to below 1.
        response: what happens above the limit, as in :func:`clip_by`;
            :func:`rescale` unless given.
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
    if rule.uses_params or arrays_in(rule.init(jnp.zeros((), jnp.float32))):
        raise ValueError(
            "Expected max_norm to be a number or a schedule, got a rule that adapts:"
            " the two parts have norms of their own."
        )
    options = Options(nonfinite, axis_name, specs, metrics)

    def step(
        leaves: Leaves, params: Any, state: Any, count: Any, extra: Mapping[str, Any]
    ) -> Step:
        def clip(arrays: list[Any], given: Mapping[str, Any]) -> Step:
            these = leaves._replace(arrays=arrays)
            return clip_norms(
                these, params, (), count, given, tree_norm(), rule, respond, options
            )

        check_leaves(leaves, state, 1)
        arrays = leaves.arrays
        if options.nonfinite == "sanitize":
            arrays = _policies.sanitize(arrays)
        momenta = [
            mean_of(m, x.astype(m.dtype), decay)
            for m, x in zip(state, arrays, strict=True)
        ]
        of_gradient, of_momentum = clip(leaves.arrays, extra), clip(momenta, {})
        share = jnp.asarray(nu, jnp.float32)
        mixed = [
            (
                share.astype(m.dtype) * m
                + (1 - share).astype(m.dtype) * g.astype(m.dtype)
            ).astype(g.dtype)
            for m, g in zip(of_momentum.arrays, of_gradient.arrays, strict=True)
        ]
        if options.nonfinite == "zero":
            zero = of_gradient.summary.nonfinite & ~of_gradient.summary.unusable
            mixed = [jnp.where(zero, jnp.zeros_like(x), x) for x in mixed]
        return Step(mixed, of_gradient.summary, momenta)

    return transformation(lambda leaves: zeros_like(leaves, 1), step, rule, options)


def normalized_momentum(
    decay: Any = 0.9,
    target: Any = 1.0,
    *,
    eps: Any = 0.0,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    specs: Any = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum of a fixed norm: normalized gradient descent with momentum.

    .. math:: m \leftarrow \beta m + (1 - \beta) g, \qquad
              u = \frac{t}{\|m\| + \epsilon}\, m

    Args:
        decay: :math:`\beta`, from 0 to below 1.
        target: :math:`t`, as in :func:`normalize_by_norm`.
        eps: :math:`\epsilon`, in the unit of the updates.
        nonfinite: as in :func:`clip_by`. A momentum forgets no NaN: to go on after one
            put :func:`skip_spikes` around.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`, of the momentum.

    Returns:
        A transformation: :func:`optax.ema` and :func:`normalize_by_norm` in a chain.

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
    chain = optax.chain(
        optax.ema(decay, debias=False),
        normalize_by_norm(
            target,
            eps=eps,
            nonfinite=nonfinite,
            axis_name=axis_name,
            specs=specs,
            metrics=metrics,
        ),
    )

    def init(params: Any) -> Any:
        flatten(params, updates=False)  # refuses what is no array
        return chain.init(params)

    return optax.GradientTransformationExtraArgs(init, chain.update)
