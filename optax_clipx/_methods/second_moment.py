"""Clipping against what each entry's own past says: SPAM and ACClip."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._entries import elementwise, mean_of, root_of_mean, shares_of
from ._thresholds._base import (
    check_between,
    check_count,
    check_decay,
    check_static_number,
)
from ._transformation import Options


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
