"""Clipping each example's gradient by itself, before the sum over the batch."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from .._clipping.measures import Measure, tree_norm
from .._clipping.responses import rescale
from .._clipping.scaling import Response
from .._devices.examples import in_rows
from .._devices.mesh import mesh_of
from .._reductions.groups import ScalarGroups
from .._thresholds.batch import NoiseScale
from .._trees.arguments import (
    AxisNames,
    Limit,
    as_float,
    check_choice,
    check_limit,
    check_static_count,
)
from .._trees.arithmetic import accumulator
from .._trees.leaves import flatten
from .._trees.types import Dtype
from . import _sums
from ._batch_arguments import (
    ALONE,
    check_args,
    check_max_norm,
    limits_of_groups,
    number_of_steps,
    numbers,
    of_one_example,
    size_of_batch,
    unpacked,
)
from ._examples import ExampleGroups, like_norms, measured, weighted_sum
from ._noise import noise_of_sums


class ClippedExamples(NamedTuple):
    """What :func:`clipped_grad` found in a batch.

    Attributes:
        norms: the norm of each example before clipping, float32 or wider, in the order
            of the batch. A vector for the tree, a pytree of vectors for leaves, a dict
            of vectors for labelled groups. In ``shard_map`` those of this device.
        clipped: the fraction of examples above the threshold, non-finite ones included,
            from 0 to 1; in the structure of ``norms``.
        num_nonfinite: how many examples were not finite, and so added zero.
        num_examples: how many examples there were, without padding.
        aux: what ``fun`` returned besides the loss, for each example; else ``None``.
        noise_scale: with ``noise_scale=True``, the gradient noise scale of the
            gradients that were added up, as :class:`thresholds.NoiseScale`; else
            ``None``.

    Raises:
        Nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> loss = lambda w, x: w * x
        >>> grad_fn = clipx.per_example.clipped_grad(loss, 1.0)
        >>> _, found = grad_fn(2.0, jnp.array([0.5, 3.0, jnp.nan]))
        >>> print(found.clipped, found.num_nonfinite, found.num_examples)
        0.6666667 1 3

    References:
        :func:`clipped_grad`.
    """

    norms: Any
    clipped: Any
    num_nonfinite: Int[Array, "..."]
    num_examples: Int[Array, "..."]
    aux: Any = None
    noise_scale: NoiseScale | None = None


def clipped_grad(
    fun: Callable[..., PyTree],
    max_norm: Limit,
    *,
    argnums: SupportsIndex | Sequence[SupportsIndex] = 0,
    batch_argnums: SupportsIndex | Sequence[SupportsIndex] = 1,
    microbatch_size: SupportsIndex | None = None,
    has_aux: bool = False,
    measure: Measure | None = None,
    response: Response = rescale,
    shares: str = "equal",
    two_pass: bool = False,
    reduction: str = "sum",
    batch_size: object = None,
    keep_batch_dim: bool = False,
    dtype: Dtype | None = None,
    axis_name: AxisNames = None,
    noise_scale: bool = False,
) -> Callable[..., tuple[Any, ClippedExamples]]:
    r"""The sum of the clipped gradients of the examples of a batch.

    .. math:: \sum_b \mathrm{response}(\|g_b\|, C)\, g_b,
              \qquad g_b = \nabla \mathrm{fun}(\theta, x_b)

    The norm of what an example adds is at most :math:`C (1 + 10^{-6})`. This holds for
    every dtype, because the gradient of each example is measured, scaled and added up
    in float32. An example whose gradient is not finite adds zero and is counted. The
    result takes the arguments of ``fun``, with a batch instead of one example. It also
    takes ``mask=``: a bool for each example, which is false for padding.

    ``two_pass=True`` first computes the norms, and then the gradient of
    :math:`\sum_b w_b\, \mathrm{fun}(\theta, x_b)`. The weights go through the backward
    pass, so the bound holds up to the rounding of this pass. With dtypes narrower than
    float32, and for norms of leaves and groups, the gradients of a microbatch are
    weighted one by one instead. This takes as much memory as one pass.

    Under ``jit`` a batch that is sharded over a mesh needs no argument. In
    ``shard_map`` each device clips the examples it has, and one ``psum`` adds up.

    ==================  ==================  =========================================
    norm of an example  threshold           what it adds
    ==================  ==================  =========================================
    0                   any                 zero
    any finite          infinity            its gradient
    at most threshold   finite              its gradient, times the response's scale: 1
                                            with ``rescale``
    above               0                   zero
    infinite or NaN     any                 zero; counted in ``num_nonfinite``
    any                 negative or NaN     ValueError; if traced, the sum is NaN
    ==================  ==================  =========================================

    Args:
        fun: the loss of one example, a scalar; with ``has_aux`` also something else.
            What lies along axis 0 of the batch is clipped together, so an entry may as
            well be a user with all of their examples: see :func:`group_by_user`.
        max_norm: :math:`C`, in the unit of the gradients, for the example as a whole; a
            number or a scalar array, which may be traced. Or a threshold for each leaf,
            as a pytree prefix, or for each label, as a dict.
        argnums: by which arguments to differentiate, as for :func:`jax.grad`.
        batch_argnums: the arguments with the examples along axis 0 of each leaf.
        microbatch_size: how many examples are taken at a time; if ``None`` all, or with
            ``two_pass`` one. It has to divide the size of the batch. Where Explicit
            axes shard the batch, it has to be a multiple of the number of devices that
            share it, and ``two_pass`` takes one example for each of them.
        has_aux: whether ``fun`` returns a pair, of the loss and something else.
        measure: :func:`optax_clipx.measures.tree_norm` for the whole example, the
            default; :func:`optax_clipx.measures.leaf_norms` or
            :func:`optax_clipx.measures.group_norms` to clip leaves or groups by
            themselves.
        response: :func:`optax_clipx.responses.rescale`, or any function of norms and
            thresholds: ``functools.partial(clipx.responses.normalize, eps=0.01)`` is
            AUTO-S, :func:`psac` is DP-PSAC.
        shares: how :math:`K` leaves or groups share one threshold: ``"equal"`` gives
            :math:`C/\sqrt{K}` to each, ``"size"`` :math:`C \sqrt{d_k/d}`.
        two_pass: whether to take the norms first.
        reduction: ``"sum"`` or ``"mean"``.
        batch_size: what the mean divides by; if ``None``, the number of examples
            without padding. With random batches pass the expected size.
        keep_batch_dim: whether ``fun`` gets each example with an axis of length 1.
        dtype: the dtype of the result; ``None`` is float32, or float64 where a
            parameter has it. A cast to less may round the sum above the bound: add
            noise before it.
        axis_name: the mesh axes over which the examples are spread. It is only needed
            inside ``pmap``, and inside ``shard_map`` with ``check_vma=False``. There,
            every device must have all parameters.
        noise_scale: whether to estimate the gradient noise scale from the norms of the
            examples after clipping and the norm of their mean, as
            :func:`per_example.noise_scale` does. It reads the sum once more; in
            ``shard_map`` it needs two all-reduces of one number.

    Returns:
        A function that returns the sum or mean, in the structure of the parameters, and
        :class:`ClippedExamples`.

    Raises:
        ValueError: for a negative or NaN threshold, argument numbers that overlap, an
            unknown option; and from the function for a batch whose leaves differ in
            length, or a ``microbatch_size`` that does not divide it.
        TypeError: for a ``fun`` that is no function, or parameters that are no
            floating-point arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> loss = lambda w, x, y: (jnp.vdot(w, x) - y) ** 2 / 2
        >>> grad_fn = clipx.per_example.clipped_grad(loss, 1.0, batch_argnums=(1, 2))
        >>> x, y = jnp.array([[3.0, 4.0], [0.1, 0.0]]), jnp.array([-1.0, -1.0])
        >>> grads, found = grad_fn(jnp.zeros(2), x, y)
        >>> print(grads, found.norms, found.clipped)
        [0.70000005 0.8       ] [5.  0.1] 0.5

    References:
        Abadi et al., Deep learning with differential privacy, 2016, arXiv 1607.00133.
        Bu et al., Automatic clipping, 2022, arXiv 2206.07136 (AUTO-S).
        Xia et al., Differentially private learning with per-sample adaptive clipping,
        2023, arXiv 2212.00328 (DP-PSAC).
    """
    measure = tree_norm() if measure is None else measure
    _check(fun, measure, shares, noise_scale)
    check_max_norm(max_norm)
    _check_mean(reduction, batch_size)
    if microbatch_size is not None:
        check_static_count(microbatch_size, "microbatch_size")
        microbatch_size = int(microbatch_size)
    batched = numbers(batch_argnums, "batch_argnums")
    if not batched or set(batched) & set(numbers(argnums, "argnums")):
        raise ValueError(
            "Expected batch_argnums with the arguments that have examples, and argnums"
            f" with others, got batch_argnums={batch_argnums} and argnums={argnums}."
        )
    several = isinstance(argnums, tuple | list | np.ndarray)
    which = numbers(argnums, "argnums")
    argnums = which if several else which[0]

    @functools.wraps(fun)
    def grad_fn(
        *args: PyTree, mask: jax.Array | None = None, **kwargs: PyTree
    ) -> tuple[Any, ClippedExamples]:
        check_args(args, argnums, batched)
        params = (
            args[argnums] if isinstance(argnums, int) else [args[i] for i in argnums]
        )
        params = params if isinstance(argnums, int) else tuple(params)
        leaves = flatten(params)
        if not leaves.arrays:
            raise ValueError(
                f"Expected parameters with an array, got argnums={argnums}: {params!r}."
            )
        batch = jax.tree.leaves([args[i] for i in batched])
        size = size_of_batch(batch, mask)
        with mesh_of([*leaves.arrays, *batch]):
            of_one = measure.groups(leaves)
            assert isinstance(of_one, ScalarGroups)
            axes = _sums.example_axes(batch, axis_name)
            if axis_name is None:
                _sums.refuse_shards(leaves, axes)
            wide = accumulator(leaves.arrays)
            limits = limits_of_groups(max_norm, measure, leaves, of_one, shares, wide)
            clipped = _sums.ClippedGrad(
                fun=of_one_example(fun, kwargs, batched, has_aux, keep_batch_dim),
                argnums=argnums,
                args=args,
                batch_argnums=batched,
                steps=number_of_steps(batch, microbatch_size, two_pass),
                leaves=leaves,
                groups=ExampleGroups(
                    of_one.ids,
                    of_one.count,
                    tuple(x.ndim + 1 for x in leaves.arrays),
                ),
                limits=limits,
                ord=measure.ord,
                response=response,
                axes=axes,
                dtype=wide,
            )
            # An empty batch needs no second pass, and has no first example.
            sums, counts, norms, aux = clipped.sums(mask, two_pass and size > 0)
            count = jnp.maximum(counts.number, 1).astype(wide)
            divisor = count if batch_size is None else jnp.asarray(batch_size, wide)
            usable = jnp.all(limits >= 0)

            def finish(total: jax.Array) -> jax.Array:
                total = jnp.where(usable, total, jnp.nan)
                total = total / divisor if reduction == "mean" else total
                return total if dtype is None else total.astype(dtype)

            found = ClippedExamples(
                unpacked(jnp.moveaxis(norms, 0, -1), measure, leaves),
                unpacked(counts.over.astype(wide) / count, measure, leaves),
                counts.nonfinite,
                counts.number,
                aux,
                noise_of_sums(clipped, sums, norms, counts.number, mask, axis_name)
                if noise_scale
                else None,
            )
            return leaves.rebuild([finish(x) for x in sums]), found

    return grad_fn


def _check(fun: object, measure: object, shares: object, noise_scale: object) -> None:
    if not callable(fun):
        raise TypeError(f"Expected fun to be a function, got {fun!r}.")
    if not isinstance(measure, Measure):
        raise TypeError(f"Expected a measure such as tree_norm(), got {measure!r}.")
    if measure.scope not in ("tree", "leaf", "group") or measure.batch_axes is not None:
        raise ValueError(
            "Expected measure to be tree_norm(), leaf_norms() or group_norms(labels),"
            f" got {measure!r}."
        )
    check_choice(shares, "shares", ("equal", "size"))
    if noise_scale and measure.ord != 2:
        raise ValueError(
            "Expected a measure of 2-norms beside noise_scale=True, got"
            f" ord={measure.ord}. Leave out ord= in the measure, or noise_scale=."
        )


def _check_mean(reduction: object, batch_size: object) -> None:
    check_choice(reduction, "reduction", ("sum", "mean"))
    if batch_size is None:
        return
    if reduction != "mean":
        raise ValueError(
            f'Expected reduction="mean" beside batch_size={batch_size}, got'
            f" reduction={reduction!r}."
        )
    check_limit(batch_size, "batch_size")


def _clipped_sums(
    grads: PyTree, measure: Measure, max_norm: Limit, shares: str
) -> tuple[Any, Any]:
    """Sums of clipped gradients that are at hand, and the numbers of clipped ones."""
    leaves = flatten(grads)
    if not leaves.arrays:
        return _sums_of_none(grads, measure, max_norm)
    one = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in leaves.arrays]
    of_one = measure.groups(leaves)
    assert isinstance(of_one, ScalarGroups)
    with mesh_of(leaves.arrays):
        wide = accumulator(one)
        limits = limits_of_groups(
            max_norm, measure, leaves._replace(arrays=one), of_one, shares, wide
        )
        groups = ExampleGroups(
            of_one.ids, of_one.count, tuple(x.ndim for x in leaves.arrays)
        )
        arrays = in_rows(leaves.arrays)
        places = [ALONE] * len(arrays)
        found = measured(arrays, groups, limits, 2.0, rescale, places)
        sums = weighted_sum(arrays, groups, found, None)
        over = jnp.sum(~(found.norms <= like_norms(limits, found.norms)), axis=0)
    totals = [
        jnp.where(jnp.all(limits >= 0), x, jnp.nan).astype(g.dtype)
        for x, g in zip(sums, arrays, strict=True)
    ]
    # What passes through because it is empty is added up as well: it loses axis 0.
    rest = [
        jnp.sum(x, axis=0, dtype=x.dtype) if np.size(x) == 0 else x
        for x in leaves.everything
    ]
    summed = leaves._replace(everything=rest).rebuild(totals)
    return summed, unpacked(over, measure, leaves)


def _sums_of_none(grads: PyTree, measure: Measure, max_norm: Limit) -> tuple[Any, Any]:
    """The sums over an empty batch, and the numbers of its clipped examples."""
    usable = jnp.asarray(as_float(max_norm)) >= 0
    sums = jax.tree.map(lambda x: jnp.where(usable, jnp.sum(x, axis=0), jnp.nan), grads)
    sums = jax.tree.map(lambda total, x: total.astype(x.dtype), sums, grads)
    none = jnp.zeros((), jnp.int32)
    each = measure.scope == "leaf"
    return sums, jax.tree.map(lambda x: none, grads) if each else none


def _floating(leaf: PyTree) -> Any:
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.integer):
        return jnp.asarray(leaf).astype(jnp.float32)
    return leaf


def _check_batch(grads: PyTree) -> None:
    leaves = flatten(grads)
    # Of an empty batch all leaves are empty.
    shapes = [jnp.shape(leaf) for leaf in leaves.arrays or leaves.everything]
    if not shapes or any(not s or s[0] != shapes[0][0] for s in shapes):
        given = jax.tree.map(jnp.shape, grads)
        raise ValueError(
            "Expected arrays with the examples along axis 0, as many in each, got"
            f" shapes {given}."
        )
