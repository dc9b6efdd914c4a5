"""Optax's functions that clip the gradients of examples, under the same names."""

from typing import Any

import jax
from jaxtyping import Array, Int, PyTree

from .._clipping.measures import leaf_norms, tree_norm
from .._trees.arguments import Limit, check_limit
from ._gradients import _check_batch, _clipped_sums, _floating


def per_example_global_norm_clip(
    grads: PyTree, l2_norm_clip: Limit
) -> tuple[Any, Int[Array, "..."]]:
    r"""Clips each example's gradient to a global norm, and sums over the examples.

    .. math:: \sum_b \min(1, C / \|g_b\|)\, g_b

    Norms and sums are float32 or wider, whatever the leaves are. An example that is
    not finite adds zero and is counted, so that the bound on what one example
    contributes always holds.

    Args:
        grads: a pytree of arrays with the examples along axis 0. Integer leaves are
            taken as float32.
        l2_norm_clip: :math:`C`, in the unit of the gradients.

    Returns:
        The sum, without the axis of examples, and the number of clipped examples.

    Raises:
        ValueError: if a leaf has no axis of examples, or they differ in length.
        TypeError: for leaves that are no arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> grads = [jnp.array([[0.0, 0.5], [3.0, 4.0]])]
        >>> total, num_clipped = clipx.per_example_global_norm_clip(grads, 1.0)
        >>> print(total[0], num_clipped)
        [0.6 1.3] 1

    References:
        Abadi et al., Deep learning with differential privacy, 2016, arXiv 1607.00133.
    """
    grads = jax.tree.map(_floating, grads)
    _check_batch(grads)
    check_limit(l2_norm_clip, "l2_norm_clip")
    return _clipped_sums(grads, tree_norm(), l2_norm_clip, "equal")


def per_example_layer_norm_clip(
    grads: PyTree, global_l2_norm_clip: Limit, uniform: bool = True
) -> tuple[Any, Any]:
    r"""Clips each example's gradient leaf by leaf, and sums over the examples.

    The leaves share the bound :math:`C` so that an example as a whole stays within it:
    each of :math:`K` leaves gets :math:`C / \sqrt{K}`, or, if not uniform,
    :math:`C \sqrt{d_k / d}` for a leaf of :math:`d_k` of all :math:`d` parameters.

    Args:
        grads: a pytree of arrays with the examples along axis 0. Integer leaves are
            taken as float32.
        global_l2_norm_clip: :math:`C`, in the unit of the gradients.
        uniform: whether the leaves share the bound evenly.

    Returns:
        The sums, and for each leaf the number of clipped examples.

    Raises:
        ValueError: if a leaf has no axis of examples, or they differ in length.
        TypeError: for leaves that are no arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> grads = [jnp.array([[3.0, 4.0]]), jnp.array([[0.5]])]
        >>> total, num_clipped = clipx.per_example_layer_norm_clip(grads, 2.0**0.5)
        >>> print(total[0], total[1], num_clipped[0], num_clipped[1])
        [0.6 0.8] [0.5] 1 0

    References:
        McMahan et al., Learning differentially private recurrent language models, 2018,
        arXiv 1710.06963.
    """
    grads = jax.tree.map(_floating, grads)
    _check_batch(grads)
    check_limit(global_l2_norm_clip, "global_l2_norm_clip")
    shares = "equal" if uniform else "size"
    return _clipped_sums(grads, leaf_norms(), global_l2_norm_clip, shares)
