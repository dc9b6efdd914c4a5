"""What of the bound an example does not use, for a private picture of the norms."""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._trees.arguments import Limit, as_float, check_limit, check_static_count
from .._trees.types import AnyArray


def slack_indicator(
    norms: PyTree, max_norm: Limit, size: int = 16, *, mask: AnyArray | None = None
) -> jax.Array:
    r"""Sums, over the examples, how much of the bound each of them leaves unused.

    .. math:: s_{bk} = \frac{C}{\sqrt K} \;\text{ for }\;
              k \le \left\lfloor K \left(1 - \min(n_b / C, 1)^2\right) \right\rfloor,
              \;\text{ else } 0, \qquad k = 1, \ldots, K

    Here :math:`n_b` is the norm of an example and :math:`C` the threshold. The clipped
    gradient of an example and its :math:`K` numbers :math:`s_b` have together a norm of
    at most :math:`C`:

    .. math:: \min(n_b, C)^2 + \|s_b\|^2 \le C^2

    So the sum of clipped gradients together with the sum of the slack has the same
    sensitivity as the first alone. Add Gaussian noise of the same standard deviation to
    both, and nothing more is spent: with a sum :math:`S` over :math:`B` examples,
    :math:`S_k \sqrt K / (C B)` is a noisy fraction of the examples whose norm is at
    most :math:`C \sqrt{1 - k/K}`. It says where the norms lie below the threshold, so
    that a threshold may follow them.

    Args:
        norms: the norms of the examples before clipping, a vector such as the
            ``found.norms`` of :func:`clipped_grad` with its default response and a
            threshold for the whole example. One that is infinite or NaN counts as above
            the threshold.
        max_norm: :math:`C`, the threshold with which the examples were clipped.
        size: :math:`K`, how many numbers.
        mask: a bool for each example, false for padding, which adds nothing.

    Returns:
        A vector of :math:`K` numbers without noise, float32 or wider; add noise to it
        before anybody sees it. In ``shard_map`` it is the sum of this device.

    Raises:
        ValueError: if the norms are no vector, for a negative or NaN threshold, or a
            ``size`` below 1.
        TypeError: if ``size`` is traced.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> norms = jnp.array([0.1, 1.0, 3.0, 7.0])
        >>> slack = clipx.per_example.slack_indicator(norms, 2.0, size=4)
        >>> print(slack * jnp.sqrt(4.0) / 2.0)  # norms up to 1.73, 1.41, 1, 0
        [2. 2. 2. 0.]

    References:
        The idea is SlaClip's, 2026, as google-deepmind/jax_privacy describes it in pull
        request 343; the formula above is ours, and its bound is tested. The threshold
        that follows a private quantile: Andrew et al., 2021, arXiv 1905.03871.
    """
    check_limit(max_norm, "max_norm")
    check_static_count(size, "size")
    norms = jnp.asarray(norms)
    if norms.ndim != 1:
        raise ValueError(
            "Expected a vector with the norm of each example, got an array of shape"
            f" {norms.shape}. Norms of leaves or groups share one bound, which this"
            " does not know of."
        )
    dtype = jnp.result_type(norms, jnp.float32)
    limit = jnp.asarray(as_float(max_norm)).astype(dtype)
    norms = norms.astype(dtype)
    usable = jnp.isfinite(norms) & (norms < limit)
    ratio = jnp.where(usable, norms, 0) / jnp.where(limit > 0, limit, 1)
    # (1 - r)(1 + r) is exact where 1 - r^2 would lose what is left of the bound.
    left = jnp.floor(size * ((1 - ratio) * (1 + ratio)))
    left = jnp.where(usable, left, 0)
    if mask is not None:
        left = jnp.where(jnp.asarray(mask, bool), left, 0)
    number = jnp.arange(1, size + 1, dtype=dtype)
    count = jnp.sum((number[None, :] <= left[:, None]).astype(dtype), axis=0)
    total = count * (limit / jnp.sqrt(jnp.asarray(size, dtype)))
    return jnp.where(limit >= 0, total, jnp.nan)
