"""Clipping the singular values of matrices."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec

from .._clipping import scaling
from .._clipping.entries import any_of, finish, with_flags
from .._clipping.measures import LeafAxis, leaf_norms, unit_norms
from .._clipping.responses import normalize
from .._clipping.summary import Summary
from .._clipping.transformation import Memory, Options, arrays_in, transformation
from .._devices import mesh
from .._reductions.groups import UnitGroups
from .._reductions.norms import norms
from .._thresholds.base import Context
from .._thresholds.constant import as_threshold
from .._trees.arguments import AxisNames, Limit, Specs, check_static_count
from .._trees.arithmetic import accumulator, widened
from .._trees.leaves import Leaves, show
from .singular_values import Ways, clip_matrices


def clip_by_spectral_norm(
    max_norm: Limit,
    *,
    form: str = "hard",
    method: str = "svd",
    steps: int | None = None,
    axis: LeafAxis = None,
    batch_axes: LeafAxis = None,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Limits the singular values of each matrix.

    .. math:: U \,\mathrm{diag}(\sigma)\, V^\top \leftarrow
              U \,\mathrm{diag}(\sigma')\, V^\top, \qquad
              \sigma' = \min(\sigma, t) \;\text{(hard)}, \qquad
              \sigma' = \frac{\sigma}{\sqrt{1 + \sigma^2 / t^2}} \;\text{(soft)}

    A vector counts as a matrix with one column, so its singular value is its norm. The
    work grows with the cube of the shorter side of a matrix. The derivative is finite
    everywhere, also where singular values are equal or zero; it computes an SVD with
    both methods.

    Args:
        max_norm: :math:`t`, in the unit of the updates: a number, a scalar array, a
            schedule, or a pytree prefix of these.
        form: ``"hard"`` or ``"soft"``.
        method: ``"svd"`` is exact up to rounding. ``"newton_schulz"`` uses products of
            matrices alone, as accelerators like: its error is at most
            :math:`\|G\|_F\,(2^{-0.9(k - 4)} + 10^{-5})` for ``steps`` :math:`k`, and no
            singular value ends above the threshold by more than that.
        steps: iterations of Newton-Schulz, 24 unless given; for ``"hard"`` there are
            two rounds.
        axis: the axes that make up the rows of a matrix, the inputs of a layer, as in
            :func:`measures.unit_norms`; the others make up its columns.
        batch_axes: axes along which a leaf stacks matrices.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`; needed in ``shard_map`` where a matrix is cut.
        metrics: whether the state keeps :class:`ClipMetrics`. Their norm is the largest
            singular value of any matrix, estimated from below by power iteration
            with ``"newton_schulz"``.

    Returns:
        A transformation. A matrix that is cut over the mesh is gathered on every
        device that holds a part of it.

    Raises:
        ValueError: for a negative or NaN threshold, an unknown form or method, and from
            ``update`` for axes out of range.
        TypeError: from ``update`` as :func:`clip_by`, and for complex leaves.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.clip_by_spectral_norm(2.0)
        >>> clipped, _ = clipper.update(jnp.array([[3.0, 0.0], [0.0, 1.0]]))
        >>> print(jnp.round(clipped, 4))
        [[2. 0.]
         [0. 1.]]

    References:
        Spectral clipping: arXiv 2603.14315 and 2605.11838. The Newton-Schulz iteration
        of degree five: Higham, Functions of Matrices, 2008, chapter 8.
    """
    for name, value, known in (
        ("form", form, ("hard", "soft")),
        ("method", method, ("svd", "newton_schulz")),
    ):
        if value not in known:
            raise ValueError(f"Expected {name} to be one of {known}, got {value!r}.")
    steps = 24 if steps is None else steps
    check_static_count(steps, "steps")
    rule = as_threshold(max_norm, "max_norm")
    if rule.uses_params or arrays_in(rule.init(jnp.zeros((1,), jnp.float32))):
        raise ValueError(
            "Expected max_norm to be a number, a schedule or a prefix of these, got a"
            " rule that adapts to norms or parameters."
        )
    options = Options(nonfinite, axis_name, specs, metrics)
    ways = Ways(form, method, steps)

    def step(
        leaves: Leaves, params: Any, memory: Memory, extra: Mapping[str, Any]
    ) -> tuple[list[Any], Memory]:
        context = Context(
            memory.steps, None, extra, leaves.paths, lambda v: jnp.stack(v)
        )
        dtype = accumulator(leaves.arrays)
        limits, _ = rule.update(
            jnp.zeros((len(leaves.arrays),), dtype), memory.rule, context
        )
        limits = jnp.broadcast_to(limits, (len(leaves.arrays),)).astype(dtype)
        layouts = _layouts(leaves, axis, batch_axes)
        clipped, before, after, bad = _clip(leaves, limits, layouts, ways, options)
        summary = _summary(before, after, limits)
        summary = summary._replace(nonfinite=bad | summary.nonfinite)
        return finish(leaves, clipped, summary, memory, options)

    return transformation(None, step, rule, options)


class _Layout(NamedTuple):
    """Which axes of a leaf stack matrices, and which are rows and columns."""

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]


def _layouts(leaves: Leaves, axis: Any, batch_axes: Any) -> list[_Layout]:
    spans: Any = leaf_norms(batch_axes=batch_axes if batch_axes is not None else ())
    whole = spans.groups(leaves).axes
    units: Any = unit_norms(axis=axis)
    rows = units.groups(leaves).axes if axis is not None else None
    found = []
    for i, (leaf, every) in enumerate(zip(leaves.arrays, whole, strict=True)):
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                f"Expected real updates, got {leaf.dtype} at {show(leaves.paths[i])}."
            )
        batch = tuple(a for a in range(leaf.ndim) if a not in every)
        if rows is not None:
            of_rows = tuple(rows[i])
            if not set(of_rows) <= set(every):
                raise ValueError(
                    f"Expected axis={of_rows} and batch_axes={batch} to have no axis in"
                    f" common at {show(leaves.paths[i])} of shape {leaf.shape}."
                )
        else:  # the last axis are the outputs, as in the kernels of most layers
            of_rows = every[:-1] if len(every) > 1 else every
        columns = tuple(a for a in every if a not in of_rows)
        found.append(_Layout(batch, of_rows, columns))
    return found


def _clip(
    leaves: Leaves,
    limits: jax.Array,
    layouts: list[_Layout],
    ways: Ways,
    options: Options,
) -> tuple[list[Any], list[Any], list[Any], jax.Array]:
    """The clipped leaves, and the largest singular value of each matrix before, after.

    All at a Frobenius norm of 1, so that no magnitude is out of range.
    """
    arrays, paths = leaves.arrays, leaves.paths
    if options.nonfinite == "sanitize":
        arrays = [jnp.nan_to_num(x) for x in arrays]
    spans = UnitGroups(
        tuple(tuple(sorted(x.rows + x.columns)) for x in layouts), tuple(paths)
    )
    norm, bad = norms(
        [arrays, leaves.arrays],
        spans,
        2.0,
        paths,
        options.axis_name,
        options.specs,
        derive=with_flags,
    )
    # Constants: the derivative of `clip_matrices` is that of all that is done here.
    norm = lax.stop_gradient(norm)
    ones = jax.tree.map(jnp.ones_like, norm.value)
    to_one = scaling.scales(norm, ones, normalize)
    wide = [x.astype(widened(x, limits.dtype)) for x in arrays]
    unit = [
        jnp.where(n > 0, (x * scale) * scaling.second_factor(scale), 0)
        for x, scale, n in zip(wide, to_one, norm.value, strict=True)
    ]
    places = mesh.placements(arrays, paths, options.axis_name, options.specs)
    found = [
        _clip_leaf(x, u, norm.value[i], limits[i], layout, ways, place)
        for i, (x, u, layout, place) in enumerate(
            zip(arrays, unit, layouts, places, strict=True)
        )
    ]
    clipped, before, after = zip(*found, strict=True)
    return list(clipped), list(before), list(after), any_of(bad.value)


def _clip_leaf(
    array: jax.Array,
    unit: jax.Array,
    norm: jax.Array,
    limit: jax.Array,
    layout: _Layout,
    ways: Ways,
    place: mesh.Placement,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def local(
        shards: Sequence[Any], places: Any, limit: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        array, unit, norm = shards
        whole = _gathered(unit, places[1], layout)
        matrices, restore = _as_matrices(whole, layout)
        scale = norm.reshape((*matrices.shape[:-2], 1))  # one a matrix
        new, top, top_after = clip_matrices(matrices, scale, limit, ways)
        mine = _own_part(restore(new), unit.shape, places[1], layout)
        known = top.reshape(norm.shape) if ways.method == "svd" else norm
        unchanged = (known <= limit) if ways.form == "hard" else (norm == 0)
        scaled = jnp.where(norm == 0, 0, mine).astype(array.dtype)
        tops = [_largest(x, places[1]) for x in (top, top_after)]
        return jnp.where(unchanged, array, scaled), tops[0], tops[1]

    def out_specs(dims: Any) -> Any:
        return PartitionSpec(*dims[0]), PartitionSpec(), PartitionSpec()

    kept = place.without(layout.rows + layout.columns)
    return mesh.map_local(
        local, [array, unit, norm], [place, place, kept], limit, out_specs
    )


def _as_matrices(x: jax.Array, layout: _Layout) -> tuple[jax.Array, Any]:
    """A stack of matrices from a leaf, and the way back."""
    order = layout.batch + layout.rows + layout.columns
    moved = jnp.transpose(x, order)
    sizes = [
        math.prod(x.shape[a] for a in axes) for axes in (layout.rows, layout.columns)
    ]
    batch = tuple(x.shape[a] for a in layout.batch)
    inverse = sorted(range(x.ndim), key=order.__getitem__)

    def restore(matrices: jax.Array) -> jax.Array:
        return jnp.transpose(matrices.reshape(moved.shape), inverse)

    return moved.reshape((*batch, *sizes)), restore


def _gathered(x: jax.Array, place: mesh.Placement, layout: _Layout) -> jax.Array:
    """The whole matrices, of which this device has a part."""
    if not place.axes:
        return x
    assert place.dims is not None  # or the matrices could not have been measured
    for dim in layout.rows + layout.columns:
        for name in reversed(place.dims[dim]):
            x = lax.all_gather(x, name, axis=dim, tiled=True)
    return x


def _own_part(
    x: jax.Array, shape: tuple[int, ...], place: mesh.Placement, layout: _Layout
) -> jax.Array:
    """This device's part of whole matrices."""
    for dim in layout.rows + layout.columns:
        axes = place.dims[dim] if place.dims else ()
        if axes:
            start = mesh.index_in(axes) * shape[dim]
            x = lax.dynamic_slice_in_dim(x, start, shape[dim], axis=dim)
    return x


def _largest(x: jax.Array, place: mesh.Placement) -> jax.Array:
    """The largest of all matrices of a leaf, on every device."""
    axes = tuple(sorted(set(place.axes) | mesh.varying(x)))
    top = jnp.max(jnp.where(jnp.isnan(x), jnp.inf, x))
    return mesh.max_over(top, axes)


def _summary(
    before: list[jax.Array], after: list[jax.Array], limits: jax.Array
) -> Summary:
    tops, ends = jnp.stack(before), jnp.stack(after)
    over = tops > limits
    ratios = jnp.where(limits > 0, tops / jnp.where(limits > 0, limits, 1), jnp.inf)
    worst = jnp.argmax(jnp.where(tops > 0, ratios, 0))
    norm = jnp.max(tops)
    here = jnp.where(tops[worst] > 0, tops[worst], 1)
    return Summary(
        norm=norm,
        clipped_norm=jnp.max(ends),
        scale=jnp.where(tops[worst] > 0, ends[worst] / here, 1),
        threshold=limits[worst],
        clipped=jnp.mean(over.astype(limits.dtype)),
        any_clipped=jnp.any(over),
        nonfinite=~jnp.isfinite(norm),
        unusable=jnp.any(~(limits >= 0)),
    )
