"""Fixed thresholds: for entries, leaves, blocks, trees, groups, and units."""

import functools
from collections.abc import Hashable

import optax

from .._clipping.bounds import has_entries
from .._clipping.clip_by import clip_by
from .._clipping.elements import (
    clip_by_entry,
    clip_by_interval,
    clip_by_magnitude,
)
from .._clipping.measures import (
    Labels,
    LeafAxis,
    group_norms,
    leaf_norms,
    tree_norm,
    unit_norms,
)
from .._clipping.responses import rescale
from .._clipping.transformation import Options
from .._reductions.plan import Ord
from .._thresholds.constant import constant
from .._thresholds.relative import relative_to_params
from .._trees.arguments import (
    AxisNames,
    Limit,
    Specs,
    check_eps,
    check_limit,
    is_limit,
)
from .._trees.calls import explains_calls
from .._trees.types import Scalar


@explains_calls
def clip(
    max_delta: Limit,
    *,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each entry to :math:`[-\Delta, \Delta]`.

    .. math:: u_j \leftarrow \min(\max(u_j, -\Delta), \Delta)

    It changes the direction of the updates. The magnitude of complex entries is
    clipped, their phase kept.

    Args:
        max_delta: :math:`\Delta`, on the scale of the updates: a number, a schedule, an
            array that broadcasts against each leaf, entry by entry, or a pytree prefix
            of these.
        nonfinite: as in :func:`clip_by`; under ``"propagate"`` an infinity goes to its
            bound and a NaN stays in its entry.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation; updates keep dtype, shape and sharding.

    Raises:
        ValueError: if ``max_delta`` is negative or NaN, or ``nonfinite`` is unknown;
            from ``update`` if an array does not broadcast against a leaf.
        TypeError: from ``update`` for integer leaves and leaves that are no arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipped, _ = clipx.clip(1.0).update(jnp.array([0.5, -3.0]))
        >>> print(clipped)
        [ 0.5 -1. ]

    References:
        Mikolov, Statistical language models based on neural networks, 2012.
    """
    options = Options(nonfinite, axis_name, specs, metrics)
    if has_entries(max_delta):
        return clip_by_entry(max_delta, options)
    rule = constant(max_delta, "max_delta")
    return clip_by_magnitude(rule, rescale, options, is_limit(max_delta))


@explains_calls
def clip_by_value(
    min_value: Limit,
    max_value: Limit,
    *,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each entry to an interval, which need not be symmetric.

    .. math:: u_j \leftarrow \min(\max(u_j, a), b)

    Args:
        min_value: :math:`a`, on the scale of the updates: a number, a schedule, an
            array that broadcasts against each leaf, entry by entry, or a pytree prefix
            of these. In ``shard_map`` an array is the part of this device.
        max_value: :math:`b`, the same.
        nonfinite: as in :func:`clip`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation; updates keep dtype, shape and sharding.

    Raises:
        ValueError: if a bound is NaN, ``min_value > max_value``, or ``nonfinite`` is
            unknown; from ``update`` if an array does not broadcast against a leaf.
        TypeError: from ``update`` for integer and complex leaves and leaves that are
            no arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipped, _ = clipx.clip_by_value(-1.0, 0.5).update(jnp.array([2.0, -3.0]))
        >>> print(clipped)
        [ 0.5 -1. ]

    References:
        Mikolov, Statistical language models based on neural networks, 2012.
    """
    options = Options(nonfinite, axis_name, specs, metrics)
    return clip_by_interval(min_value, max_value, options)


@explains_calls
def clip_by_leaf_norm(
    max_norm: Limit,
    *,
    ord: Ord | None = None,
    batch_axes: LeafAxis = None,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the norm of each leaf by itself.

    .. math:: u_i \leftarrow \min(1, t / \|u_i\|)\, u_i

    Args:
        max_norm: :math:`t`, on the scale of the updates: a number, a scalar array, a
            schedule, or a pytree prefix of these.
        ord: the order of the norm, as for :func:`measures.tree_norm`; ``None`` is 2.
        batch_axes: axes along which a leaf stacks independent layers, each clipped by
            itself: an int, a tuple, or a function of path and leaf.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation; updates keep dtype, shape and sharding.

    Raises:
        ValueError: if ``max_norm`` is negative or NaN, or ``ord`` or
            ``nonfinite`` is unknown.
        TypeError: from ``update`` for integer leaves and leaves that are no arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> grads = {"w": jnp.array([0.0, 4.0]), "b": jnp.array([0.5])}
        >>> grads, _ = clipx.clip_by_leaf_norm(1.0).update(grads)
        >>> print(grads["w"], grads["b"])
        [0. 1.] [0.5]

    References:
        Per-parameter norms, as in Keras's ``clipnorm``.
    """
    return clip_by(
        leaf_norms(ord, batch_axes=batch_axes),
        constant(max_norm, "max_norm"),
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
        metrics=metrics,
    )


@explains_calls
def clip_by_block_rms(
    threshold: Limit,
    *,
    batch_axes: LeafAxis = None,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the root mean square of each leaf by itself.

    .. math:: u_i \leftarrow u_i / \max(1, \mathrm{RMS}(u_i) / d), \quad
              \mathrm{RMS}(u) = \|u\| / \sqrt{\mathrm{size}(u)}

    Adafactor uses it right after the preconditioner, before the learning rate.

    Args:
        threshold: :math:`d`, on the scale of the updates: a number, a scalar array, a
            schedule, or a pytree prefix of these.
        batch_axes: as in :func:`clip_by_leaf_norm`.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation; updates keep dtype, shape and sharding.

    Raises:
        ValueError: if ``threshold`` is negative or NaN, or ``nonfinite`` is unknown.
        TypeError: from ``update`` for integer leaves and leaves that are no arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipped, _ = clipx.clip_by_block_rms(1.0).update(jnp.array([4.0, -4.0]))
        >>> print(clipped)
        [ 1. -1.]

    References:
        Shazeer and Stern, Adafactor: Adaptive learning rates with sublinear memory
        cost, 2018, arXiv 1804.04235.
    """
    return clip_by(
        leaf_norms("rms", batch_axes=batch_axes),
        constant(threshold, "threshold"),
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
        metrics=metrics,
    )


@explains_calls
def clip_by_global_norm(
    max_norm: Limit,
    *,
    ord: Ord | None = None,
    eps: Scalar = 0.0,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
    norm_arg: str = "norm",
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the norm of the whole gradient, and keeps its direction.

    .. math:: u \leftarrow \min(1, t / (\|u\| + \epsilon))\, u

    Here :math:`\|u\|` is the norm of all leaves together. All leaves are multiplied by
    the same factor.

    Args:
        max_norm: the threshold :math:`t`: a number, a scalar array or a schedule.
        ord: the order of the norm, as for :func:`measures.tree_norm`; ``None`` is 2.
        eps: :math:`\epsilon`, a number that is added to the norm; ``1e-6`` gives the
            same factor as PyTorch.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.
        norm_arg: the name of an extra argument of ``update``, with which you can pass a
            norm that you have computed yourself.

    Returns:
        A transformation; updates keep dtype, shape and sharding.

    Raises:
        ValueError: if ``max_norm`` or ``eps`` is negative or NaN, or ``ord`` or
            ``nonfinite`` is unknown.
        TypeError: from ``update`` for integer leaves and leaves that are no arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> grads = {"w": jnp.array([6.0]), "b": jnp.array([8.0])}
        >>> grads, _ = clipx.clip_by_global_norm(5.0).update(grads)
        >>> print(grads["w"], grads["b"])
        [3.] [4.]

    References:
        Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural
        networks, 2013, arXiv 1211.5063.
    """
    check_eps(eps)
    return clip_by(
        tree_norm(ord),
        constant(max_norm, "max_norm"),
        functools.partial(rescale, eps=eps),
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
        metrics=metrics,
        norm_arg=norm_arg,
    )


@explains_calls
def clip_by_group_norm(
    max_norms: dict[Hashable, Limit],
    labels: Labels,
    *,
    ord: Ord | None = None,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the norm of each labelled group of leaves.

    .. math:: u_i \leftarrow \min(1, t_k / \|u_{(k)}\|)\, u_i
              \quad \text{for leaf } i \text{ of group } k

    Args:
        max_norms: for each label its :math:`t_k`, on the scale of the updates: a
            number, a scalar array or a schedule.
        labels: a pytree prefix of labels, or a function of path and leaf; a path is a
            tuple of strings such as ``("layers", "0", "kernel")``.
        ord: the order of the norm, as for :func:`measures.tree_norm`; ``None`` is 2.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation; updates keep dtype, shape and sharding.

    Raises:
        ValueError: if a threshold is negative or NaN, or ``ord`` or ``nonfinite`` is
            unknown; from ``update`` if a leaf has no label or a label no threshold.
        TypeError: if ``max_norms`` is no dict; from ``update`` for integer leaves and
            leaves that are no arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> grads = {"w": jnp.array([3.0]), "v": jnp.array([4.0]), "b": 9 * jnp.ones(1)}
        >>> labels = lambda path, leaf: "bias" if path == ("b",) else "weights"
        >>> clipper = clipx.clip_by_group_norm({"weights": 1.0, "bias": 2.0}, labels)
        >>> grads, _ = clipper.update(grads)
        >>> print(grads["w"], grads["v"], grads["b"])
        [0.6] [0.8] [2.]

    References:
        Parameter groups as in :func:`optax.partition`, with one norm for each.
    """
    if not isinstance(max_norms, dict):
        raise TypeError(
            "Expected max_norms to be a dict from label to threshold, got"
            f" {max_norms!r}."
        )
    return clip_by(
        group_norms(labels, ord),
        constant(max_norms, "max_norms"),
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
        metrics=metrics,
    )


@explains_calls
def adaptive_grad_clip(
    clipping: Limit,
    eps: Scalar = 1e-3,
    axis: LeafAxis = None,
    *,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the norm of each unit to a fraction of the norm of its parameters.

    .. math:: g_i \leftarrow \min\Big(1, \lambda \frac{\max(\|w_i\|, \epsilon)}
              {\|g_i\|}\Big)\, g_i \quad \text{for each unit } i

    Here :math:`g_i` and :math:`w_i` are the gradient and the parameters of a unit, such
    as the weights of one neuron. The paper does not clip the final linear layer:
    exclude it with :func:`excluding`.

    Args:
        clipping: :math:`\lambda`, the largest norm of an update relative to its
            parameters; a number, a scalar array or a schedule.
        eps: :math:`\epsilon`, a floor for the parameters' norm, in their unit.
        axis: the axes that one unit spans, as for :func:`measures.unit_norms`.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation, whose ``update`` needs ``params``; updates keep dtype, shape
        and sharding.

    Raises:
        ValueError: if ``clipping`` or ``eps`` is negative or NaN or ``nonfinite`` is
            unknown; from ``update`` without ``params``.
        TypeError: from ``update`` for integer leaves and leaves that are no arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> params = jnp.array([[6.0, 1.0], [8.0, 0.0]])  # its columns have norms 10, 1
        >>> grads = jnp.array([[12.0, 0.0], [16.0, 0.5]])
        >>> clipper = clipx.adaptive_grad_clip(0.5)
        >>> clipped, _ = clipper.update(grads, clipper.init(params), params)
        >>> print(clipped)
        [[3.  0. ]
         [4.  0.5]]

    References:
        Brock et al., High-performance large-scale image recognition without
        normalization, 2021, arXiv 2102.06171.
    """
    check_limit(clipping, "clipping")
    return clip_by(
        unit_norms(axis=axis),
        relative_to_params(clipping, eps),
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
        metrics=metrics,
    )
