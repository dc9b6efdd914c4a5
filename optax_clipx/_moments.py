"""Clipping against what each entry's own past says: SPAM, ACClip, momentum."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import _policies
from ._clipping import clip_norms
from ._entries import (
    check_leaves,
    elementwise,
    mean_of,
    root_of_mean,
    shares_of,
    zeros_like,
)
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

    State: one number for each entry, the root of :math:`v`, with a minus where the last
    step clipped.

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

    def numbers_at(dtype: Any, count: jax.Array) -> Any:
        b, rest = shares = shares_of(decay, dtype)
        wide = jnp.asarray(theta, dtype)
        moved = 1 / jnp.sqrt(b / wide + rest)
        return shares, jnp.sqrt(wide), moved, count >= warmup_steps

    options = Options(nonfinite, axis_name, specs, metrics)
    return elementwise(_Spikes(), numbers_at, 1, options)


@dataclass(frozen=True)
class _Spikes:
    """The moment is the root of the average square, negative where it clipped.

    So the update follows from the new root: what it was, times a constant, is the
    bound.
    """

    def advance(
        self, x: jax.Array, moments: Sequence[jax.Array], numbers: Any
    ) -> list[jax.Array]:
        root = jnp.abs(moments[0])
        shares, _, _, _ = numbers
        spike, bound = self._spike(x, root, numbers)
        size = jnp.where(spike, bound, jnp.abs(x.astype(root.dtype)))
        new = root_of_mean(root, size, shares, 2.0)
        return [jnp.where(spike, -new, new)]

    def respond(
        self, x: jax.Array, moments: Sequence[jax.Array], numbers: Any
    ) -> jax.Array:
        _, _, moved, _ = numbers
        (root,) = moments
        wide = x.astype(root.dtype)
        return jnp.where(jnp.signbit(root), jnp.sign(wide) * -root * moved, wide)

    def change(
        self, x: jax.Array, moments: Sequence[jax.Array], numbers: Any
    ) -> tuple[jax.Array, jax.Array]:
        spike, bound = self._spike(x, jnp.abs(moments[0]), numbers)
        wide = x.astype(bound.dtype)
        return x, jnp.where(spike, jnp.sign(wide) * bound, wide)

    def _spike(
        self, x: jax.Array, root: jax.Array, numbers: Any
    ) -> tuple[jax.Array, jax.Array]:
        _, ratio, _, active = numbers
        bound = root * ratio
        size = jnp.abs(x.astype(root.dtype))
        return (size > bound) & (root > 0) & active, bound


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

    def numbers_at(dtype: Any, count: jax.Array) -> Any:
        return shares_of(b1, dtype), shares_of(b2, dtype), jnp.asarray(eps, dtype)

    options = Options(nonfinite, axis_name, specs, metrics)
    return elementwise(_ACClip(float(alpha)), numbers_at, 2, options)


@dataclass(frozen=True)
class _ACClip:
    """The moments are those of the updates and of their magnitudes."""

    alpha: float

    def advance(
        self, x: jax.Array, moments: Sequence[jax.Array], numbers: Any
    ) -> list[jax.Array]:
        of_mean, of_tau, _ = numbers
        mean, tau = moments
        wide = x.astype(mean.dtype)
        tau = root_of_mean(tau, jnp.abs(wide), of_tau, self.alpha)
        return [mean_of(mean, wide, of_mean), tau]

    def respond(
        self, x: jax.Array, moments: Sequence[jax.Array], numbers: Any
    ) -> jax.Array:
        _, _, eps = numbers
        mean, tau = moments
        size = jnp.abs(mean) + eps
        scaled = tau * (mean / jnp.where(size > 0, size, 1))
        return jnp.where(size > tau, scaled, mean)

    def change(
        self, x: jax.Array, moments: Sequence[jax.Array], numbers: Any
    ) -> tuple[jax.Array, jax.Array]:
        new = self.advance(x, moments, numbers)
        return new[0], self.respond(x, new, numbers)


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
        of_gradient = clip(leaves.arrays, extra)
        arrays = leaves.arrays
        if options.nonfinite == "sanitize":
            arrays = _policies.sanitize(arrays)
        bad = of_gradient.summary.nonfinite
        moved = [
            mean_of(m, x.astype(m.dtype), decay)
            for m, x in zip(state, arrays, strict=True)
        ]
        # First chosen and then measured: XLA can write the new ones in place.
        kept = [jnp.where(bad, m, n) for m, n in zip(state, moved, strict=True)]
        goes_on = options.nonfinite == "sanitize"
        of_momentum = clip(moved if goes_on else kept, {})
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
        return Step(mixed, of_gradient.summary, kept, settled=True)

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
