"""Clipping each example's gradient by itself, before the sum over the batch."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ._leaves import flatten
from ._reductions import widened
from .functional import clip_by_global_norm


def per_example_global_norm_clip(
    grads: Any, l2_norm_clip: Any
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

    def clip_one(example: Any) -> tuple[Any, jax.Array]:
        # The clipped example stays wide until the sum: rounding it might break C.
        wide = jax.tree.map(_wide, example)
        clipped, norm = clip_by_global_norm(wide, l2_norm_clip, nonfinite="zero")
        return clipped, ~(norm <= l2_norm_clip)

    clipped, was_clipped = jax.vmap(clip_one)(grads)
    total = jax.tree.map(
        lambda g, c: jnp.sum(c, axis=0).astype(g.dtype), grads, clipped
    )
    return total, jnp.sum(was_clipped)


def per_example_layer_norm_clip(
    grads: Any, global_l2_norm_clip: Any, uniform: bool = True
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
    leaves, treedef = jax.tree.flatten(grads)
    sizes = [math.prod(leaf.shape[1:]) for leaf in leaves]
    total = sum(sizes)
    shares = [1 / len(leaves) if uniform else size / total for size in sizes]
    found = [
        per_example_global_norm_clip(leaf, global_l2_norm_clip * math.sqrt(share))
        for leaf, share in zip(leaves, shares, strict=True)
    ]
    sums, counts = zip(*found, strict=True)
    return jax.tree.unflatten(treedef, sums), jax.tree.unflatten(treedef, counts)


def _floating(leaf: Any) -> Any:
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.integer):
        return jnp.asarray(leaf).astype(jnp.float32)
    return leaf


def _wide(leaf: Any) -> Any:
    wide = jnp.dtype("float64" if jnp.finfo(leaf.dtype).bits == 64 else "float32")
    return leaf.astype(widened(leaf, wide))


def _check_batch(grads: Any) -> None:
    leaves = flatten(grads)
    shapes = [leaf.shape for leaf in leaves.arrays]
    if not shapes or any(not s or s[0] != shapes[0][0] for s in shapes):
        raise ValueError(
            "Expected arrays with the examples along axis 0, as many in each, got"
            f" shapes {dict(zip(map('/'.join, leaves.paths), shapes, strict=True))}."
        )
