"""The response of DP-PSAC."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._trees.types import Scalar


def psac(
    norms: Float[Array, "..."], limits: Float[Array, "..."], *, r: Scalar = 0.1
) -> Float[Array, "..."]:
    r"""Normalizes, but does not enlarge small gradients: :math:`t / (n + r/(n + r))`.

    Large norms come close to their threshold, as with
    :func:`optax_clipx.responses.normalize`; a norm near 0 is multiplied by about
    :math:`t`, and not by :math:`t/n`.

    Args:
        norms: norms :math:`n`, any shape.
        limits: thresholds :math:`t`, the same shape.
        r: the scale of norms that count as small, above 0.

    Returns:
        Scales, the same shape.

    Raises:
        ValueError: if ``r`` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> scales = clipx.per_example.psac(jnp.array([0.0, 4.0]), jnp.ones(2))
        >>> print(scales)
        [1.         0.24848485]

    References:
        Xia et al., Differentially private learning with per-sample adaptive clipping,
        2023, arXiv 2212.00328.
    """
    if not isinstance(r, jax.core.Tracer) and not r > 0:
        raise ValueError(f"Expected r > 0, got r={r}.")
    share = jnp.asarray(r, norms.dtype)
    return limits / (norms + share / (norms + share))
