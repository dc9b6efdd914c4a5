"""Thresholds and the size of the batch: the gradient noise scale."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._trees.arguments import Limit, as_float, check_between, check_limit, is_limit
from .._trees.types import Scalar
from .base import Threshold
from .combine import scaled


def rescaled_for_batch(
    limit: Limit | Threshold,
    old: Scalar,
    new: Scalar,
    noise_scale: Scalar | None = None,
) -> Any:
    r"""A threshold for another batch size, which clips about as many steps as before.

    .. math:: t_{\text{new}} = t_{\text{old}}
              \sqrt{\frac{1 + \mathcal{B}/B_{\text{new}}}
              {1 + \mathcal{B}/B_{\text{old}}}}, \qquad
              \mathcal{B} = \frac{\mathrm{tr}\,\Sigma}{|G|^2}

    Here :math:`B` is the number of examples in a batch, :math:`G` the mean gradient,
    :math:`\Sigma` the covariance of the gradients of single examples, and
    :math:`\mathcal{B}` the gradient noise scale, in examples. The formula follows from
    :math:`E|g_B|^2 = |G|^2 + \mathrm{tr}\,\Sigma/B`, where :math:`g_B` is the mean of
    the gradients of a batch. It holds for the loss that is the mean over the batch.

    Without ``noise_scale`` the noise is assumed to dominate
    (:math:`\mathcal{B} \gg B`), and the factor is
    :math:`\sqrt{B_{\text{old}}/B_{\text{new}}}`. This is the largest change of a
    threshold that the size of the batch can explain; for batches far above the noise
    scale the threshold would stay as it is.

    Args:
        limit: the threshold for the old size: a number, a scalar array, a schedule, a
            pytree prefix, or a threshold rule. A rule that learns from norms follows
            the new ones by itself; do not rescale it.
        old: the old number of examples in a batch.
        new: the new one.
        noise_scale: :math:`\mathcal{B}`, as :func:`thresholds.noise_scale` estimates
            it; ``None`` if it is not known.

    Returns:
        The threshold for the new size: a number for a number, an array for an array, a
        schedule for a schedule, else a threshold rule.

    Raises:
        ValueError: if a size is not above 0, or the noise scale or a threshold is
            negative or NaN.

    Example:
        >>> import optax_clipx as clipx
        >>> clipx.thresholds.rescaled_for_batch(1.0, 256, 1024)
        0.5
        >>> round(clipx.thresholds.rescaled_for_batch(1.0, 256, 1024, 256.0), 3)
        0.791

    References:
        McCandlish et al., An empirical model of large-batch training, 2018,
        arXiv 1812.06162, appendix A.
    """
    for size, name in ((old, "old"), (new, "new")):
        _check_size(size, name)
    if noise_scale is not None:
        check_between(noise_scale, "noise_scale", 0, float("inf"))
    factor = _growth(old, new, noise_scale)
    if callable(limit):
        schedule: Callable[[Any], Any] = limit
        return lambda step: as_float(schedule(step)) * factor
    if is_limit(limit):
        check_limit(limit, "limit")
        return as_float(limit) * factor
    return scaled(limit, factor)


def _growth(old: Scalar, new: Scalar, noise_scale: Scalar | None) -> Any:
    """The factor between the norms of two sizes, in Python's numbers where given."""
    if noise_scale is None or _is_infinite(noise_scale):
        return (old / new) ** 0.5
    return ((1 + noise_scale / new) / (1 + noise_scale / old)) ** 0.5


def _is_infinite(value: Scalar) -> bool:
    return not isinstance(value, jax.core.Tracer) and bool(value == float("inf"))


class NoiseScale(NamedTuple):
    r"""The gradient noise scale of a batch, and the two estimates of which it is made.

    Attributes:
        scale: :math:`\mathrm{tr}\,\Sigma/|G|^2`, in examples; infinity where the
            estimate of :math:`|G|^2` is not above 0.
        signal: the estimate of :math:`|G|^2`; by chance it may be negative.
        noise: the estimate of :math:`\mathrm{tr}\,\Sigma`.

    Raises:
        Nothing.

    Example:
        >>> import optax_clipx as clipx
        >>> print(clipx.thresholds.NoiseScale(2.0, 1.0, 2.0).scale)
        2.0

    References:
        :func:`thresholds.noise_scale`.
    """

    scale: Any
    signal: Any
    noise: Any


def noise_scale(
    small_norms: ArrayLike | Sequence[float],
    large_norms: ArrayLike | Sequence[float],
    small: Scalar,
    large: Scalar,
) -> NoiseScale:
    r"""Estimates the gradient noise scale from norms at two batch sizes.

    .. math:: |G|^2 \approx \frac{B\, \overline{n_B^2} - b\, \overline{n_b^2}}{B - b},
              \qquad \mathrm{tr}\,\Sigma \approx
              \frac{\overline{n_b^2} - \overline{n_B^2}}{1/b - 1/B}, \qquad
              \mathcal{B} = \frac{\mathrm{tr}\,\Sigma}{|G|^2}

    Here :math:`n_b` and :math:`n_B` are norms of gradients that are the mean over
    :math:`b` and over :math:`B` examples, and the bar is the mean over the norms that
    are given. Both estimates are unbiased, their ratio is not: average ``signal`` and
    ``noise`` over many steps, and divide the averages.

    The norms may come from runs with two batch sizes, from the devices of a
    data-parallel step and their mean, or from single examples and the mean of a batch:
    :func:`per_example.noise_scale`.

    Args:
        small_norms: norms before clipping of gradients of ``small`` examples, any
            shape.
        large_norms: the same of ``large`` examples.
        small: :math:`b`, the smaller number of examples.
        large: :math:`B`, the larger one.

    Returns:
        A :class:`thresholds.NoiseScale` of scalars, float32 or wider.

    Raises:
        ValueError: unless ``0 < small < large``.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> found = clipx.thresholds.noise_scale(jnp.array([3.0, 3.0]), 2.0, 8, 32)
        >>> print(f"{found.signal:.3f} {found.noise:.2f} {found.scale:.1f}")
        2.333 53.33 22.9

    References:
        McCandlish et al., An empirical model of large-batch training, 2018,
        arXiv 1812.06162, appendix A.1.
    """
    _check_size(small, "small")
    _check_size(large, "large")
    traced = isinstance(small, jax.core.Tracer) or isinstance(large, jax.core.Tracer)
    if not traced and not small < large:
        raise ValueError(f"Expected small < large, got {small} and {large}.")
    return estimates(jnp.asarray(small_norms), jnp.asarray(large_norms), small, large)


def estimates(
    small_norms: jax.Array, large_norms: jax.Array, small: Scalar, large: Scalar
) -> NoiseScale:
    """The estimates for sizes that may be traced; NaN where they are the same."""
    norms = small_norms, large_norms
    dtype = jnp.result_type(*norms, jnp.float32)
    # Relative to the largest norm, so that squares stay in range.
    peak = jnp.maximum(*[jnp.max(jnp.abs(n)).astype(dtype) for n in norms])
    unit = jnp.where((peak > 0) & jnp.isfinite(peak), peak, 1)
    of_small, of_large = (jnp.mean(jnp.square(n.astype(dtype) / unit)) for n in norms)
    b, rest = (jnp.asarray(x, dtype) for x in (small, large - small))
    signal = of_large + (of_large - of_small) * (b / rest)
    noise = (of_small - of_large) * (b + b * (b / rest))
    usable = signal > 0
    scale = jnp.where(usable, noise / jnp.where(usable, signal, 1), jnp.inf)
    scale = jnp.where(jnp.isnan(signal), jnp.nan, scale)
    return NoiseScale(scale, signal * unit * unit, noise * unit * unit)


def _check_size(value: Any, name: str) -> None:
    check_between(value, name, 0, float("inf"))
    if not isinstance(value, jax.core.Tracer) and not 0 < value < float("inf"):
        raise ValueError(f"Expected a number of examples above 0, got {name}={value}.")
