"""The clipper without a number to choose."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from .._thresholds.auto import auto
from .._trees.arguments import AxisNames, Specs
from .common import method

_UNITS = 8.0  # in a threshold; norms below one of them stay as they are


def auto_clip(
    *,
    scope: Any = "tree",
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Compresses norms to below a threshold that it finds by itself.

    .. math:: u \leftarrow \frac{c(n)}{n}\, u, \qquad
              c(n) = \begin{cases} n & n \le t / 8 \\
              \min\bigl(t, \tfrac{t}{8} (1 + \log \tfrac{8 n}{t})\bigr) & n > t / 8
              \end{cases}

    The threshold :math:`t` is 0.8 times the median of the first ten norms, and follows
    the norms down but not up; :func:`thresholds.auto` describes the rule. A norm
    :math:`n` below an eighth of the threshold stays as it is. Above, the clipped norm
    grows only as the logarithm of :math:`n`, up to the threshold. So most steps are
    made shorter at first, by a factor of 3 for a norm like the first ones, and outliers
    by far more.

    Choose the learning rate with the clipper in place. With SGD, a rate that was chosen
    without clipping makes short steps here; try three times this rate as well. Adam and
    Lion divide by the usual size of a gradient, so the shorter gradients leave the
    length of their steps as it is.

    Multiplying the loss by a constant changes nothing: the same steps are scaled by the
    same factors.

    Args:
        scope: as in :func:`zclip`.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation; its state is 13 numbers for each norm.

    Raises:
        ValueError: if ``scope`` or ``nonfinite`` is unknown.
        TypeError: from ``update`` as :func:`clip_by`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.auto_clip()
        >>> state = clipper.init(jnp.zeros(1))
        >>> for norm in (1.0, 1.1, 0.9, 1.0, 50.0, 1.0):
        ...     clipped, state = clipper.update(jnp.array([norm]), state)
        ...     print(f"{clipx.metrics(state)['clip/clipped_norm']:.2f}")
        0.14
        0.14
        0.14
        0.14
        0.27
        0.15

    References:
        See :func:`thresholds.auto`.
    """
    return method(scope, auto(), compress, nonfinite, axis_name, specs, metrics)


def compress(
    norms: Float[Array, "..."], limits: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Above an eighth of the limit a norm grows as its logarithm, up to the limit."""
    # In this order: an eighth of a tiny limit would be zero.
    units = jnp.maximum(norms / limits * _UNITS, 1)
    return jnp.minimum(1 + jnp.log(units), _UNITS) / units
