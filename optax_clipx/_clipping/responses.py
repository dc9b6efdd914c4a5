"""Responses: what happens to what is measured above its threshold.

A response maps norms and thresholds, arrays of one shape, to the scales by which the
updates are multiplied. It depends on the ratio of the two. It decides below a finite
threshold as well; an infinite threshold and a norm of 0 change nothing, whatever it
says. Integers are taken as floats.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real

from .._trees.arithmetic import full_like


def rescale(
    norms: Real[ArrayLike, "..."], limits: Real[ArrayLike, "..."], *, eps: object = 0.0
) -> Float[Array, "..."]:
    r"""Reduces what is above its threshold to the threshold: :math:`\min(1, t / n)`.

    With ``eps`` the scale is :math:`\min(1, t / (n + \epsilon))`, PyTorch's
    coefficient for ``eps=1e-6``.

    Args:
        norms: norms :math:`n`, any shape.
        limits: thresholds :math:`t`, the same shape.
        eps: a number added to the norms, in their unit.

    Returns:
        Scales between 0 and 1, the same shape.

    Raises:
        TypeError: if an argument is no array or number.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> norms, limits = jnp.array([1.0, 4.0]), jnp.array([2.0, 2.0])
        >>> clipx.responses.rescale(norms, limits).tolist()
        [1.0, 0.5]

    References:
        Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural
        networks, 2013, arXiv 1211.5063.
    """
    norms, limits = _as_floats(norms, limits)
    shifted = (
        norms
        if isinstance(eps, float) and eps == 0
        else norms + jnp.asarray(eps, norms.dtype)
    )
    over = lax.lt(limits, shifted)
    one = full_like(norms, 1)
    # The untaken side of a where must stay finite, or its gradient is NaN.
    return lax.select(over, _ratio(limits, lax.select(over, shifted, one)), one)


def normalize(
    norms: Real[ArrayLike, "..."], limits: Real[ArrayLike, "..."], *, eps: object = 0.0
) -> Float[Array, "..."]:
    r"""Scales everything to the norm of its threshold: :math:`t / (n + \epsilon)`.

    What is below a finite threshold is enlarged to it: (3, 4) with a threshold of 100
    becomes (60, 80). An infinite threshold changes nothing, as with every response.

    Args:
        norms: norms :math:`n`, any shape.
        limits: thresholds :math:`t`, the same shape; an infinite threshold changes
            nothing.
        eps: a number added to the norms, in their unit.

    Returns:
        Scales, above 1 where a norm is below its threshold.

    Raises:
        TypeError: if an argument is no array or number.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> norms, limits = jnp.array([1.0, 4.0]), jnp.array([2.0, 2.0])
        >>> clipx.responses.normalize(norms, limits).tolist()
        [2.0, 0.5]

    References:
        Cutkosky and Mehta, Momentum improves normalized SGD, 2020, arXiv 2002.03305.
    """
    norms, limits = _as_floats(norms, limits)
    shifted = norms + jnp.asarray(eps, norms.dtype)
    usable = jnp.isfinite(limits) & (shifted > 0)
    return _ratio(jnp.where(usable, limits, 1), jnp.where(usable, shifted, 1))


def smooth(
    norms: Real[ArrayLike, "..."], limits: Real[ArrayLike, "..."], *, p: object = 1.0
) -> Float[Array, "..."]:
    r"""Reduces the norm smoothly to below its threshold: :math:`(1 + (n/t)^p)^{-1/p}`.

    Norms far below the threshold pass almost unchanged, large ones approach it from
    below; there is no corner. At the threshold itself the scale is :math:`2^{-1/p}`.
    ``p=1`` is :math:`1/(1 + n/t)`, ``p=2`` is :math:`1/\sqrt{1 + (n/t)^2}`; a large
    ``p`` approaches :func:`rescale`.

    Args:
        norms: norms :math:`n`, any shape.
        limits: thresholds :math:`t`, the same shape.
        p: the sharpness of the bend, above 0.

    Returns:
        Scales between 0 and 1, the same shape.

    Raises:
        ValueError: if ``p`` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> norms, limits = jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0])
        >>> clipx.responses.smooth(norms, limits).tolist()
        [0.5, 0.25]

    References:
        Zhang et al., Why gradient clipping accelerates training, 2020,
        arXiv 1905.11881.
    """
    if not isinstance(p, jax.core.Tracer) and not p > 0:  # type: ignore[operator]
        raise ValueError(f"Expected p > 0, got p={p}.")
    norms, limits = _as_floats(norms, limits)
    sharpness = jnp.asarray(p, norms.dtype)
    norms = jnp.where(limits == jnp.inf, 0, norms)  # not inf / inf
    over = norms > limits
    small, large = jnp.where(over, limits, norms), jnp.where(over, norms, limits)
    ratio = _ratio(small, jnp.where(large > 0, large, 1))
    # The larger of the two divides, so that no power overflows.
    bend = (1 + ratio**sharpness) ** (-1 / sharpness)
    return jnp.where(over, ratio * bend, bend)


def drop(
    norms: Real[ArrayLike, "..."], limits: Real[ArrayLike, "..."]
) -> Float[Array, "..."]:
    r"""Removes what is above its threshold: :math:`1[n \le t]`.

    Args:
        norms: norms :math:`n`, any shape.
        limits: thresholds :math:`t`, the same shape.

    Returns:
        Scales, each 0 or 1, the same shape.

    Raises:
        TypeError: if an argument is no array or number.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> norms, limits = jnp.array([1.0, 4.0]), jnp.array([2.0, 2.0])
        >>> clipx.responses.drop(norms, limits).tolist()
        [1.0, 0.0]

    References:
        Chowdhery et al., PaLM: Scaling language modeling with Pathways, 2022,
        arXiv 2204.02311 (skipping the batches of a loss spike).
    """
    norms, limits = _as_floats(norms, limits)
    return lax.select(lax.le(norms, limits), full_like(norms, 1), full_like(norms, 0))


def biweight(
    norms: Real[ArrayLike, "..."], limits: Real[ArrayLike, "..."]
) -> Float[Array, "..."]:
    r"""Reduces large norms to zero smoothly: Tukey's biweight, :math:`(1 - (n/t)^2)^2`.

    The scale is 0 from the threshold on, and the scaled norm has no corner: it grows
    with a small norm, is largest at :math:`t/\sqrt{5}`, where it is :math:`0.286\,t`,
    and then falls back to 0. Such a response is called *redescending*: an outlier loses
    all its influence, where :func:`rescale` and :func:`smooth` let it keep the largest
    influence that there is. It is the smooth form of :func:`drop`.

    Welsch's and Cauchy's weights redescend too, but are never 0. The biweight is a
    polynomial and exactly 0 above its threshold, so that it is right at any magnitude.
    A threshold of 4.685 standard deviations loses 5% of the efficiency of the mean
    where the noise is normal.

    ======================  ==========================================
    norm and threshold      scale
    ======================  ==========================================
    a norm of 0             1, whatever the threshold is
    an infinite threshold   1, also for an infinite norm
    a threshold of 0        0 for any other norm
    an infinite norm        0 for any finite threshold
    ======================  ==========================================

    Args:
        norms: norms :math:`n`, any shape.
        limits: thresholds :math:`t`, the same shape: what is larger becomes 0. Below
            half the threshold, the scale is above 0.56.

    Returns:
        Scales between 0 and 1, the same shape.

    Raises:
        TypeError: if an argument is no array or number.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> norms, limits = jnp.array([1.0, 4.0]), jnp.array([2.0, 2.0])
        >>> clipx.responses.biweight(norms, limits).tolist()
        [0.5625, 0.0]

    References:
        Beaton and Tukey, The fitting of power series, meaning polynomials, illustrated
        on band-spectroscopic data, Technometrics, 1974. Holland and Welsch, Robust
        regression using iteratively reweighted least-squares, Communications in
        Statistics, 1977 (the constant 4.685).
    """
    norms, limits = _as_floats(norms, limits)
    within = (norms <= limits) | (norms == 0)
    usable = within & jnp.isfinite(limits) & (limits > 0)
    limit, norm = jnp.where(usable, limits, 1), jnp.where(usable, norms, 0)
    # Not 1 minus a rounded square, of which little is right close to the threshold.
    root = _ratio(limit - norm, limit) * (1 + _ratio(norm, limit))
    return jnp.where(within, root * root, 0)


def _as_floats(norms: ArrayLike, limits: ArrayLike) -> tuple[Array, Array]:
    """Both as floating-point arrays: a quotient of integers would be rounded."""
    has = [_is_floating(norms), _is_floating(limits)]
    if all(has):
        return norms, limits  # type: ignore[return-value]
    like = norms if has[0] else limits if has[1] else jnp.zeros(())
    return jnp.asarray(norms, like.dtype), jnp.asarray(limits, like.dtype)  # type: ignore[union-attr]


def _is_floating(x: ArrayLike) -> bool:
    """Whether it is a floating-point array, and no integers or Python number."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


@jax.custom_jvp
def _ratio(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x / y`, whose derivative does not form the square of `y`."""
    return lax.div(x, y)


@_ratio.defjvp
def _ratio_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (x, y), (dx, dy) = primals, tangents
    ratio = x / y
    return ratio, dx / y - ratio * (dy / y)
