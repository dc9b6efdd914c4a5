"""Clipping and norms as pure functions of pytrees.

The clipping functions return the norms beside the clipped tree, so that nobody has to
measure twice. They work under jit, vmap and on any mesh as the transformations do.
"""

import functools
from typing import Any

from jaxtyping import Array, Float

from .._thresholds.constant import constant
from .._thresholds.relative import relative_to_params
from .._trees.arguments import AxisNames, Limit, Specs, check_eps, check_limit
from .clip_by import clip_once
from .elements import clamp_once
from .measures import (
    LeafAxis,
    group_norms as _group_norms,
    leaf_norms as _leaf_norms,
    tree_norm as _tree_norm,
    unit_norms as _unit_norms,
)
from .responses import rescale
from .transformation import Options


def global_norm(
    tree: Any, ord: Any = 2, *, axis_name: AxisNames = None, specs: Specs = None
) -> Float[Array, "..."]:
    r"""The norm of all leaves together, right at any magnitude.

    .. math:: n = \Big(\sum_i |g_i|^p\Big)^{1/p}

    Args:
        tree: a pytree of floating-point or complex arrays.
        ord: the order :math:`p`: 2, 1, any number from 1 on, ``inf``, or ``"rms"``.
        axis_name: the mesh axes over which leaves are sharded. It is only needed inside
            ``pmap``, and inside ``shard_map`` with ``check_vma=False``.
        specs: the same for each leaf, as a pytree prefix of ``PartitionSpec``.

    Returns:
        A scalar, float32 or wider; 0 without leaves; float32's largest number where
        the norm is beyond it.

    Raises:
        ValueError: if ``ord`` is unknown.
        TypeError: for integer leaves and leaves that are no arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> from optax_clipx import functional
        >>> print(functional.global_norm([jnp.array([3e30]), jnp.array([4e30])]))
        5e+30

    References:
        Blue, A portable Fortran program to find the Euclidean norm of a vector, 1978,
        for the idea of sums at several scales.
    """
    return _tree_norm(ord)(tree, axis_name=axis_name, specs=specs)


def leaf_norms(
    tree: Any, ord: Any = 2, *, axis_name: AxisNames = None, specs: Specs = None
) -> Any:
    r"""The norm of each leaf.

    Args:
        tree: a pytree of floating-point or complex arrays.
        ord: the order of the norm, as for :func:`global_norm`.
        axis_name: as for :func:`global_norm`.
        specs: as for :func:`global_norm`.

    Returns:
        A pytree of scalars with the structure of ``tree``.

    Raises:
        ValueError: if ``ord`` is unknown.
        TypeError: for integer leaves and leaves that are no arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> from optax_clipx import functional
        >>> print(functional.leaf_norms([jnp.array([3.0, 4.0])])[0])
        5.0

    References:
        :func:`optax_clipx.measures.leaf_norms` is the measure of the same name.
    """
    return _leaf_norms(ord)(tree, axis_name=axis_name, specs=specs)


def unit_norms(
    tree: Any,
    axis: LeafAxis = None,
    *,
    axis_name: AxisNames = None,
    specs: Specs = None,
) -> Any:
    r"""The 2-norm of each unit of each leaf.

    Args:
        tree: a pytree of floating-point or complex arrays.
        axis: the axes that one unit spans; ``None`` goes by rank, as for
            :func:`optax_clipx.measures.unit_norms`.
        axis_name: as for :func:`global_norm`.
        specs: as for :func:`global_norm`.

    Returns:
        A pytree with the structure of ``tree``; each leaf keeps its rank, with size 1
        along ``axis``.

    Raises:
        ValueError: if an axis is out of range, or ``axis=None`` meets rank 6.
        TypeError: for integer leaves and leaves that are no arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> from optax_clipx import functional
        >>> functional.unit_norms(jnp.array([[3.0, 1.0], [4.0, 0.0]])).tolist()
        [[5.0, 1.0]]

    References:
        Brock et al., 2021, arXiv 2102.06171.
    """
    return _unit_norms(axis=axis)(tree, axis_name=axis_name, specs=specs)


def group_norms(
    tree: Any, labels: Any, *, axis_name: AxisNames = None, specs: Specs = None
) -> dict[Any, Float[Array, "..."]]:
    r"""The 2-norm of each labelled group of leaves.

    Args:
        tree: a pytree of floating-point or complex arrays.
        labels: a pytree prefix of labels, or a function of path and leaf.
        axis_name: as for :func:`global_norm`.
        specs: as for :func:`global_norm`.

    Returns:
        A dict from label to scalar.

    Raises:
        ValueError: if a leaf has no label.
        TypeError: for integer leaves and leaves that are no arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> from optax_clipx import functional
        >>> tree = {"w": jnp.array([3.0]), "v": jnp.array([4.0]), "b": jnp.ones(1)}
        >>> labels = {"w": "weights", "v": "weights", "b": "bias"}
        >>> norms = functional.group_norms(tree, labels)
        >>> print(norms["weights"], norms["bias"])
        5.0 1.0

    References:
        :func:`optax_clipx.measures.group_norms` is the measure of the same name.
    """
    return _group_norms(labels)(tree, axis_name=axis_name, specs=specs)


def clip_by_value(
    tree: Any,
    min_value: Limit,
    max_value: Limit,
    *,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
) -> Any:
    r"""Clips each entry to an interval: :math:`\min(\max(u, a), b)`.

    Args:
        tree: a pytree of floating-point arrays.
        min_value: :math:`a`: a number, an array that broadcasts against each leaf,
            entry by entry, or a pytree prefix of these.
        max_value: :math:`b`, the same.
        nonfinite: as in :func:`optax_clipx.clip_by_value`.
        axis_name: as for :func:`global_norm`.
        specs: as for :func:`global_norm`.

    Returns:
        The clipped pytree, of the same dtypes.

    Raises:
        ValueError: if a bound is NaN or ``min_value > max_value``, or if an array does
            not broadcast against a leaf.
        TypeError: for integer leaves and leaves that are no arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> from optax_clipx import functional
        >>> functional.clip_by_value(jnp.array([2.0, -3.0]), -1.0, 0.5).tolist()
        [0.5, -1.0]

    References:
        Mikolov, Statistical language models based on neural networks, 2012.
    """
    options = Options(nonfinite, axis_name, specs, metrics=False)
    return clamp_once(tree, min_value, max_value, options)


def clip_by_leaf_norm(
    tree: Any,
    max_norm: Limit,
    *,
    ord: Any = None,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
) -> tuple[Any, Any]:
    r"""Clips the norm of each leaf by itself: :math:`\min(1, t / \|u_i\|)\, u_i`.

    Args:
        tree: a pytree of floating-point or complex arrays.
        max_norm: :math:`t`: a number, a scalar array, or a pytree prefix of these.
        ord: the order of the norm, as for :func:`global_norm`.
        nonfinite: as in :func:`optax_clipx.clip_by`.
        axis_name: as for :func:`global_norm`.
        specs: as for :func:`global_norm`.

    Returns:
        The clipped pytree, and the norms before clipping as a pytree of scalars.

    Raises:
        ValueError: if ``max_norm`` is negative or NaN.
        TypeError: for integer leaves and leaves that are no arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> from optax_clipx import functional
        >>> clipped, norms = functional.clip_by_leaf_norm([jnp.array([0.0, 4.0])], 1.0)
        >>> print(clipped[0], norms[0])
        [0. 1.] 4.0

    References:
        Per-parameter norms, as in Keras's ``clipnorm``.
    """
    options = Options(nonfinite, axis_name, specs)
    rule = constant(max_norm, "max_norm")
    return clip_once(tree, _leaf_norms(ord), rule, rescale, options)


def clip_by_global_norm(
    tree: Any,
    max_norm: Limit,
    *,
    norm: Any = None,
    ord: Any = None,
    eps: Any = 0.0,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
) -> tuple[Any, Float[Array, "..."]]:
    r"""Clips the norm of all leaves together, and keeps the direction.

    .. math:: u \leftarrow \min(1, t / (\|u\| + \epsilon))\, u

    Args:
        tree: a pytree of floating-point or complex arrays.
        max_norm: the threshold :math:`t`: a number or a scalar array.
        norm: the norm of the whole tree, if you have already computed it. The function
            then does not compute it again.
        ord: the order of the norm, as for :func:`global_norm`.
        eps: :math:`\epsilon`, a number that is added to the norm; ``1e-6`` gives the
            same factor as PyTorch.
        nonfinite: as in :func:`optax_clipx.clip_by`.
        axis_name: as for :func:`global_norm`.
        specs: as for :func:`global_norm`.

    Returns:
        The clipped pytree, and the norm before clipping.

    Raises:
        ValueError: if ``max_norm`` is negative or NaN.
        TypeError: for integer leaves and leaves that are no arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> from optax_clipx import functional
        >>> clipped, norm = functional.clip_by_global_norm([jnp.array([6.0, 8.0])], 5.0)
        >>> print(clipped[0], norm)
        [3. 4.] 10.0

    References:
        Pascanu, Mikolov and Bengio, 2013, arXiv 1211.5063.
    """
    check_eps(eps)
    options = Options(nonfinite, axis_name, specs)
    rule = constant(max_norm, "max_norm")
    response = functools.partial(rescale, eps=eps)
    return clip_once(tree, _tree_norm(ord), rule, response, options, norm=norm)


def adaptive_grad_clip(
    tree: Any,
    params: Any,
    clipping: Limit,
    eps: Any = 1e-3,
    axis: LeafAxis = None,
    *,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
) -> tuple[Any, Any]:
    r"""Clips each unit to :math:`\lambda \max(\|w_i\|, \epsilon)`.

    Args:
        tree: a pytree of floating-point or complex arrays.
        params: the parameters, at the same paths and of the same shapes.
        clipping: :math:`\lambda`: a number or scalar array.
        eps: :math:`\epsilon`, a floor for the parameters' norm.
        axis: the axes that one unit spans, as for
            :func:`optax_clipx.measures.unit_norms`.
        nonfinite: as in :func:`optax_clipx.clip_by`.
        axis_name: as for :func:`global_norm`.
        specs: as for :func:`global_norm`.

    Returns:
        The clipped pytree, and the units' norms before clipping.

    Raises:
        ValueError: if ``clipping`` or ``eps`` is negative or NaN, or a parameter is
            missing.
        TypeError: for integer leaves and leaves that are no arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> from optax_clipx import functional
        >>> grads, params = jnp.array([3.0, 4.0]), jnp.array([6.0, 8.0])
        >>> clipped, norms = functional.adaptive_grad_clip(grads, params, 0.25)
        >>> print(clipped, norms)
        [1.5 2. ] [5.]

    References:
        Brock et al., 2021, arXiv 2102.06171.
    """
    options = Options(nonfinite, axis_name, specs)
    check_limit(clipping, "clipping")
    rule = relative_to_params(clipping, eps)
    return clip_once(
        tree, _unit_norms(axis=axis), rule, rescale, options, params=params
    )
