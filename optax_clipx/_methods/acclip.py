"""Momentum that is clipped by the usual magnitude of each entry (ACClip)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from .._clipping.entries import (
    elementwise,
    mean_of,
    root_of_mean,
    shares_of,
    zeros_like,
)
from .._clipping.transformation import Options
from .._trees.arguments import (
    AxisNames,
    Specs,
    check_between,
    check_decay,
    check_static_number,
    out_of_range,
)
from .._trees.calls import explains_calls
from .._trees.leaves import Leaves
from .._trees.types import Dtype, Scalar


class ACClipMemory(NamedTuple):
    """The average of each entry, and its usual magnitude."""

    mu: Any
    tau: Any


@explains_calls
def scale_by_acclip(
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    *,
    alpha: float | None = None,
    eps: Scalar = 1e-5,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each entry of the momentum to that entry's usual magnitude (ACClip).

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
              \tau^\alpha \leftarrow \beta_2 \tau^\alpha + (1 - \beta_2) |g|^\alpha,
              \quad u = \min\Bigl(\frac{\tau}{|m| + \epsilon}, 1\Bigr)\, m

    Here :math:`g` is the gradient, :math:`m` the momentum, and :math:`\tau` the usual
    magnitude of an entry. Use it instead of :func:`optax.scale_by_adam`. Its state has
    two numbers for each entry, in trees like the parameters.

    Args:
        b1: :math:`\beta_1`, from 0 to below 1.
        b2: :math:`\beta_2`, from 0 to below 1.
        alpha: :math:`\alpha`, the order of the moment of the noise, 1 or larger.
        eps: :math:`\epsilon`, on the scale of the updates.
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

    def fresh(leaves: Leaves) -> ACClipMemory:
        return ACClipMemory(zeros_like(leaves), zeros_like(leaves))

    def numbers_at(dtype: Dtype, memory: ACClipMemory) -> Any:
        return shares_of(b1, dtype), shares_of(b2, dtype), jnp.asarray(eps, dtype)

    options = Options(nonfinite, axis_name, specs, metrics)
    rule = _ACClip(float(alpha))
    unusable = out_of_range(b1, b2)
    return elementwise(rule, ACClipMemory, fresh, numbers_at, options, unusable)


@dataclass(frozen=True)
class _ACClip:
    """The moments are those of the updates and of their magnitudes."""

    alpha: float

    def advance(
        self, x: jax.Array, moments: Sequence[jax.Array], numbers: PyTree
    ) -> list[jax.Array]:
        of_mean, of_tau, _ = numbers
        mean, tau = moments
        wide = x.astype(mean.dtype)
        tau = root_of_mean(tau, jnp.abs(wide), of_tau, self.alpha)
        return [mean_of(mean, wide, of_mean), tau]

    def respond(
        self,
        x: jax.Array,
        before: Sequence[jax.Array],
        after: Sequence[jax.Array],
        numbers: PyTree,
    ) -> jax.Array:
        _, _, eps = numbers
        mean, tau = after
        size = jnp.abs(mean) + eps
        scaled = tau * (mean / jnp.where(size > 0, size, 1))
        return jnp.where(size > tau, scaled, mean)

    def change(
        self, x: jax.Array, moments: Sequence[jax.Array], numbers: PyTree
    ) -> tuple[jax.Array, jax.Array]:
        new = self.advance(x, moments, numbers)
        return new[0], self.respond(x, moments, new, numbers)
