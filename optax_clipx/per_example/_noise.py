"""The gradient noise scale from the norms of single examples."""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._clipping.functional import global_norm
from .._devices import mesh
from .._thresholds.batch import NoiseScale, estimates
from .._trees.arguments import AxisNames
from .._trees.types import AnyArray, Scalar
from ._examples import all_finite, along, scales_of
from ._sums import ClippedGrad


def noise_scale(
    norms: PyTree, mean_norm: Scalar, mask: AnyArray | None = None
) -> NoiseScale:
    r"""Estimates the gradient noise scale from norms that :func:`clipped_grad` found.

    .. math:: |G|^2 \approx \frac{B\,|g|^2 - \overline{n^2}}{B - 1}, \qquad
              \mathrm{tr}\,\Sigma \approx \frac{\overline{n^2} - |g|^2}{1 - 1/B}

    Here :math:`B` is the number of examples, :math:`n` the norms of their gradients,
    the bar their mean, and :math:`g` the mean gradient. It is
    :func:`thresholds.noise_scale` for batches of one example and of :math:`B`, and no
    gradient is computed or read for it besides the norm of the mean.

    ``clipped_grad(..., noise_scale=True)`` calculates it for you, from the norms after
    clipping. Here the norms have to be those of the gradients whose mean :math:`g` is.
    With ``clipped_grad(..., max_norm=jnp.inf, reduction="mean")`` this is so. With a
    threshold :math:`C` the mean is that of clipped gradients; pass
    ``jnp.minimum(found.norms, C)`` and the result is the noise scale of clipped
    gradients.

    Args:
        norms: the norms of the examples, a vector such as ``found.norms``. One that is
            not finite counts as 0, which is what it added to the mean.
        mean_norm: the norm of the mean gradient, of all devices in ``shard_map``, where
            the norms have to be gathered.
        mask: a bool for each example, false for padding; the mean is over the others.

    Returns:
        A :class:`thresholds.NoiseScale`. Average its ``signal`` and ``noise`` over
        steps before you divide. All are NaN for fewer than two examples.

    Raises:
        ValueError: if the norms are no vector, or fewer than two.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> loss = lambda w, x: w * x
        >>> options = {"max_norm": jnp.inf, "reduction": "mean"}
        >>> grad_fn = clipx.per_example.clipped_grad(loss, **options)
        >>> mean, found = grad_fn(1.0, jnp.array([1.0, 2.0, 3.0]))
        >>> noise = clipx.per_example.noise_scale(found.norms, jnp.abs(mean))
        >>> print(f"{noise.noise:.3f} {noise.signal:.3f} {noise.scale:.3f}")
        1.000 3.667 0.273

    References:
        McCandlish et al., An empirical model of large-batch training, 2018,
        arXiv 1812.06162, appendix A.1.
    """
    norms = jnp.asarray(norms)
    if norms.ndim != 1 or norms.shape[0] < 2:
        raise ValueError(
            "Expected a vector with the norms of two examples or more, got an array of"
            f" shape {norms.shape}. Norms of leaves or groups have no noise scale"
            " together: call this for each of them."
        )
    there = jnp.ones(norms.shape, bool) if mask is None else jnp.asarray(mask, bool)
    counted = jnp.where(there & jnp.isfinite(norms), norms, 0)
    number = jnp.sum(there).astype(counted.dtype)
    # So that the mean of the squares over all is that over those that are there.
    each = counted * jnp.sqrt(norms.shape[0] / number)
    return estimates(each, jnp.asarray(mean_norm), 1, number)


def noise_of_sums(
    clipped: ClippedGrad,
    sums: PyTree,
    norms: jax.Array,
    number: jax.Array,
    mask: AnyArray | None,
    axis_name: AxisNames,
) -> NoiseScale:
    """The noise scale of the gradients that were added up, after clipping."""
    scale = scales_of(norms, clipped.limits, clipped.response)
    finite = all_finite(norms)
    keep = along(finite if mask is None else finite & mask, norms.ndim)
    added = jnp.where(keep, norms * scale.fine * scale.coarse, 0)
    # Relative to the largest norm, so that squares stay in range.
    peak = mesh.max_over(jnp.max(added, initial=0), clipped.axes)
    unit = jnp.where(peak > 0, peak, 1)
    total = mesh.sum_over(jnp.sum(jnp.square(added / unit)), clipped.axes)
    count = number.astype(added.dtype)
    # The sums are those of all devices already.
    mean = global_norm(sums, axis_name=None if axis_name is None else ()) / count
    return estimates(unit * jnp.sqrt(total / count), mean, 1, count)
