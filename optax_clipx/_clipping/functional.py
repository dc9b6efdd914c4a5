"""Clipping and norms as pure functions of pytrees.

The clipping functions return the clipped tree and the norms, so you do not have to
measure the norms again. They work under jit, under vmap and on any mesh.
"""

import functools
from typing import Any

from jaxtyping import Array, Float, PyTree

from .._reductions.plan import Ord
from .._thresholds.constant import constant
from .._thresholds.relative import relative_to_params
from .._trees.arguments import AxisNames, Limit, Specs, check_eps, check_limit
from .._trees.types import Scalar
from .clip_by import clip_once
from .elements import clamp_once
from .measures import (
    Labels,
    LeafAxis,
    group_norms as _group_norms,
    leaf_norms as _leaf_norms,
    tree_norm as _tree_norm,
    unit_norms as _unit_norms,
)
from .responses import rescale
from .transformation import Options


def global_norm(
    tree: PyTree,
    ord: Ord | None = 2,
    *,
    axis_name: AxisNames = None,
    specs: Specs = None,
) -> Float[Array, "..."]:
    r"""Computes the norm of all leaves together, without overflow of the squares.

    .. math:: n = \Big(\sum_i |g_i|^p\Big)^{1/p}

    Args:
        tree: a pytree of floating-point or complex arrays.
        ord: the order :math:`p`. It is a number of at least 1, or ``inf``, or ``"rms"``
            for the root mean square.
        axis_name: the mesh axes over which all leaves are sharded. You need it only
            inside ``pmap``, and inside ``shard_map`` with ``check_vma=False``.
        specs: how each leaf is sharded: a pytree prefix of ``PartitionSpec``. You can
            pass it instead of ``axis_name``.

    Returns:
        A scalar of dtype float32 or wider. It is 0 if the tree has no leaves. If the
        norm is too large for its dtype, it is the largest number of this dtype.

    Raises:
        ValueError: if ``ord`` is unknown.
        TypeError: if a leaf has an integer dtype or is not an array.

    Example:
        >>> import jax.numpy as jnp
        >>> from optax_clipx import functional
        >>> print(functional.global_norm([jnp.array([3e30]), jnp.array([4e30])]))
        5e+30

    References:
        Blue, A portable Fortran program to find the Euclidean norm of a vector, 1978,
        computes sums at several scales.
    """
    return _tree_norm(ord)(tree, axis_name=axis_name, specs=specs)


def leaf_norms(
    tree: PyTree,
    ord: Ord | None = 2,
    *,
    axis_name: AxisNames = None,
    specs: Specs = None,
) -> Any:
    r"""Computes the norm of each leaf.

    Args:
        tree: a pytree of floating-point or complex arrays.
        ord: the order of the norm, as for :func:`global_norm`.
        axis_name: as for :func:`global_norm`.
        specs: as for :func:`global_norm`.

    Returns:
        A pytree of scalars with the structure of ``tree``.

    Raises:
        ValueError: if ``ord`` is unknown.
        TypeError: if a leaf has an integer dtype or is not an array.

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
    tree: PyTree,
    axis: LeafAxis = None,
    *,
    axis_name: AxisNames = None,
    specs: Specs = None,
) -> Any:
    r"""Computes the 2-norm of each unit of each leaf.

    A unit is a group of entries of a leaf, such as the weights of one neuron.

    Args:
        tree: a pytree of floating-point or complex arrays.
        axis: the axes that one unit spans. ``None`` chooses them by the number of axes
            of a leaf, as :func:`optax_clipx.measures.unit_norms` describes.
        axis_name: as for :func:`global_norm`.
        specs: as for :func:`global_norm`.

    Returns:
        A pytree with the structure of ``tree``. Each leaf keeps its number of axes. The
        axes that a unit spans have size 1.

    Raises:
        ValueError: if an axis is out of range, or if ``axis=None`` and a leaf has six
            axes or more.
        TypeError: if a leaf has an integer dtype or is not an array.

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
    tree: PyTree, labels: Labels, *, axis_name: AxisNames = None, specs: Specs = None
) -> dict[Any, Float[Array, "..."]]:
    r"""Computes the 2-norm of each group of leaves with the same label.

    Args:
        tree: a pytree of floating-point or complex arrays.
        labels: a pytree prefix of labels, or a function that returns the label of a
            path and a leaf.
        axis_name: as for :func:`global_norm`.
        specs: as for :func:`global_norm`.

    Returns:
        A dict from each label to the norm of its group.

    Raises:
        ValueError: if a leaf has no label.
        TypeError: if a leaf has an integer dtype or is not an array.

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
    tree: PyTree,
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
        min_value: :math:`a`. It is a number, or an array that broadcasts to the shape
            of each leaf, or a pytree prefix of these.
        max_value: :math:`b`, in the same form as ``min_value``.
        nonfinite: as in :func:`optax_clipx.clip_by_value`.
        axis_name: as for :func:`global_norm`.
        specs: as for :func:`global_norm`.

    Returns:
        The clipped pytree, with the dtypes of ``tree``.

    Raises:
        ValueError: if a bound is NaN, if ``min_value > max_value``, or if an array does
            not broadcast to the shape of a leaf.
        TypeError: if a leaf has an integer dtype or is not an array.

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
    tree: PyTree,
    max_norm: Limit,
    *,
    ord: Ord | None = None,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
) -> tuple[Any, Any]:
    r"""Clips each leaf by its own norm: :math:`\min(1, t / \|u_i\|)\, u_i`.

    Args:
        tree: a pytree of floating-point or complex arrays.
        max_norm: the threshold :math:`t`. It is a number, a scalar array, or a pytree
            prefix of these.
        ord: the order of the norm, as for :func:`global_norm`.
        nonfinite: as in :func:`optax_clipx.clip_by`.
        axis_name: as for :func:`global_norm`.
        specs: as for :func:`global_norm`.

    Returns:
        The clipped pytree, and the norms before clipping as a pytree of scalars.

    Raises:
        ValueError: if ``max_norm`` is negative or NaN.
        TypeError: if a leaf has an integer dtype or is not an array.

    Example:
        >>> import jax.numpy as jnp
        >>> from optax_clipx import functional
        >>> clipped, norms = functional.clip_by_leaf_norm([jnp.array([0.0, 4.0])], 1.0)
        >>> print(clipped[0], norms[0])
        [0. 1.] 4.0

    References:
        ``clipnorm`` of Keras also clips each parameter by its own norm.
    """
    options = Options(nonfinite, axis_name, specs)
    rule = constant(max_norm, "max_norm")
    return clip_once(tree, _leaf_norms(ord), rule, rescale, options)


def clip_by_global_norm(
    tree: PyTree,
    max_norm: Limit,
    *,
    norm: Scalar | None = None,
    ord: Ord | None = None,
    eps: Scalar = 0.0,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
) -> tuple[Any, Float[Array, "..."]]:
    r"""Clips the norm of all leaves together, and keeps the direction.

    .. math:: u \leftarrow \min(1, t / (\|u\| + \epsilon))\, u

    Args:
        tree: a pytree of floating-point or complex arrays.
        max_norm: the threshold :math:`t`. It is a number or a scalar array.
        norm: the norm of the whole tree, if you have already computed it. The function
            then does not compute it again.
        ord: the order of the norm, as for :func:`global_norm`.
        eps: :math:`\epsilon`, a number that is added to the norm. With ``1e-6`` the
            factor is the same as in PyTorch.
        nonfinite: as in :func:`optax_clipx.clip_by`.
        axis_name: as for :func:`global_norm`.
        specs: as for :func:`global_norm`.

    Returns:
        The clipped pytree, and the norm before clipping.

    Raises:
        ValueError: if ``max_norm`` is negative or NaN.
        TypeError: if a leaf has an integer dtype or is not an array.

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
    tree: PyTree,
    params: PyTree,
    clipping: Limit,
    eps: Scalar = 1e-3,
    axis: LeafAxis = None,
    *,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
) -> tuple[Any, Any]:
    r"""Clips each unit to the norm :math:`\lambda \max(\|w_i\|, \epsilon)`.

    A unit is a group of entries of a leaf, such as the weights of one neuron. Here
    :math:`w_i` are the parameters of unit :math:`i`.

    Args:
        tree: a pytree of floating-point or complex arrays.
        params: the parameters, with the same paths and shapes as ``tree``.
        clipping: :math:`\lambda`. It is a number or a scalar array.
        eps: :math:`\epsilon`, the smallest norm of parameters that is used.
        axis: the axes that one unit spans, as for
            :func:`optax_clipx.measures.unit_norms`.
        nonfinite: as in :func:`optax_clipx.clip_by`.
        axis_name: as for :func:`global_norm`.
        specs: as for :func:`global_norm`.

    Returns:
        The clipped pytree, and the norms of the units before clipping.

    Raises:
        ValueError: if ``clipping`` or ``eps`` is negative or NaN, or if a parameter is
            missing.
        TypeError: if a leaf has an integer dtype or is not an array.

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
