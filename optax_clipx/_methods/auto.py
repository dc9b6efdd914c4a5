"""The clipper without a number to choose."""

import optax
from jax import lax
from jaxtyping import Array, Float

from .._thresholds.auto import auto
from .._trees.arithmetic import fraction, larger, plus, product, smaller
from .._trees.calls import explains_calls
from .common import AxisNames, Scope, Specs, method

_UNITS = 8.0  # in a threshold; norms below one of them stay as they are


@explains_calls
def auto_clip(
    *,
    scope: Scope = "tree",
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales down large gradients, to below a threshold that it finds by itself.

    .. math:: u \leftarrow \frac{c(n)}{n}\, u, \qquad
              c(n) = \begin{cases} n & n \le t / 8 \\
              \min\bigl(t, \tfrac{t}{8} (1 + \log \tfrac{8 n}{t})\bigr) & n > t / 8
              \end{cases}

    The threshold :math:`t` is 0.8 times the median of the first ten norms. It is lower
    in the first 100 steps, and after the norms have fallen far below the first ones. It
    does not rise with the norms. :func:`thresholds.auto` has the formula.

    A gradient whose norm :math:`n` is at most an eighth of the threshold is not
    changed. For larger norms, the clipped norm grows only with the logarithm of
    :math:`n`, up to the threshold. So most gradients are scaled down by design, and a
    high clip rate is normal. A norm that equals the median of the first ten norms is
    divided by 7 in the first step, and by 3 after 100 steps. Outliers are divided by
    more.

    Choose the learning rate while the clipper is in the chain. With SGD, steps become
    shorter; if the learning rate was chosen without clipping, also try three times this
    learning rate. Adam and Lion divide by the usual size of the gradients. If all
    gradients become smaller by the same factor, the length of their steps stays the
    same.

    If you multiply the loss of the whole run by a constant, each gradient is still
    scaled by the same factor.

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
    units = larger(product(fraction(norms, limits), _UNITS), 1)
    return fraction(smaller(plus(1, lax.log(units)), _UNITS), units)
