"""Clipping the singular values of matrices."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from .._clipping import scaling
from .._clipping.clip_by import _no_norms, limits_of
from .._clipping.entries import any_of, finish, with_flags
from .._clipping.measures import LeafAxis, leaf_norms, unit_norms
from .._clipping.responses import normalize
from .._clipping.summary import Summary
from .._clipping.transformation import Given, Memory, Options, checked, transformation
from .._devices import mesh
from .._devices.mesh import Axes, Placement
from .._reductions.groups import UnitGroups
from .._reductions.norms import Norms, norms
from .._reductions.plan import make_plan
from .._thresholds.base import Threshold, is_pair, no_memory
from .._thresholds.constant import as_threshold
from .._trees.arguments import AxisNames, Limit, Specs, check_static_count
from .._trees.arithmetic import accumulator, widened
from .._trees.calls import explains_calls
from .._trees.leaves import Leaves, show
from .._trees.types import Arrays, Dtype
from .singular_values import Ways, bent, clip_matrices


@explains_calls
def clip_by_spectral_norm(
    max_norm: Limit | Threshold,
    *,
    form: str = "hard",
    method: str = "svd",
    steps: int | None = None,
    axis: LeafAxis = None,
    batch_axes: LeafAxis = None,
    shape_factor: bool = False,
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

    With a threshold rule, each leaf has a threshold of its own, from the largest
    singular values of that leaf so far: ``thresholds.quantile(0.9, window=100)`` is a
    quantile of the last 100 of them, ``thresholds.ema_ratio(1.5)`` is 1.5 times their
    moving average.

    Args:
        max_norm: :math:`t`, on the scale of the updates: a number, a scalar array, a
            schedule, a pytree prefix of these, or a threshold rule, which sees the
            largest singular value of each leaf.
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
        shape_factor: whether each matrix is multiplied by
            :math:`\sqrt{\max(1, n/m)}` after clipping, for :math:`m` rows, the inputs
            of a layer, and :math:`n` columns, as SPECTRA and Muon do.
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
        ValueError: for a negative or NaN threshold, an unknown form or method, a rule
            that needs the parameters, and from ``update`` for axes out of range.
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
        Jiang, Semenov and Stich, Enhancing LLM training via spectral clipping
        (SPECTRA), 2026, arXiv 2603.14315; arXiv 2605.11838 (thresholds from past
        singular values). The Newton-Schulz iteration of degree five: Higham, Functions
        of Matrices, 2008, chapter 8.
    """
    for name, value, known in (
        ("form", form, ("hard", "soft")),
        ("method", method, ("svd", "newton_schulz")),
    ):
        if value not in known:
            raise ValueError(f"Expected {name} to be one of {known}, got {value!r}.")
    steps = 24 if steps is None else steps
    check_static_count(steps, "steps")
    rule = checked(as_threshold(max_norm, "max_norm"))
    if rule.uses_params:
        raise ValueError(
            "Expected max_norm to be a number, a schedule, a prefix of these or a rule"
            " that looks at norms, got a rule that needs the norms of the parameters."
        )
    adapts = isinstance(max_norm, Threshold) or is_pair(max_norm)
    options = Options(nonfinite, axis_name, specs, metrics)
    ways = Ways(form, method, steps)
    measure = leaf_norms()

    def step(given: Given) -> tuple[list[Any], Memory]:
        leaves = given.leaves
        dtype = accumulator(leaves.arrays)
        groups = measure.groups(leaves)
        layouts = _layouts(leaves, axis, batch_axes)
        matrices, bad = _matrices(leaves, layouts, dtype, ways, options)
        tops = jnp.zeros((len(leaves.arrays),), dtype)
        if adapts:  # the compiler sees that the SVD is that of the clipping below
            tops = jnp.stack([m.clipped(jnp.inf, dtype)[1] for m in matrices])
        seen = Norms(tops, tops, jnp.ones_like(tops))
        limits, new_rule = limits_of(seen, measure, rule, groups, given)
        found = [
            m.clipped(limits[i], dtype, shape_factor) for i, m in enumerate(matrices)
        ]
        clipped, before, after = map(list, zip(*found, strict=True))
        if adapts:
            before = list(tops)
        if adapts and method == "svd":  # known without another collective
            factors = [m.factor if shape_factor else 1.0 for m in matrices]
            after = list(bent(tops, limits, form) * jnp.asarray(factors, dtype))
        summary = _summary(before, after, limits)
        summary = summary._replace(nonfinite=bad | summary.nonfinite)
        memory = given.memory.with_rule(summary.nonfinite, new_rule)
        return finish(leaves, clipped, summary, memory, options)

    def init_rule(leaves: Leaves) -> Any:
        return rule.init(_no_norms(measure.groups(leaves), leaves, measure))

    remembers = rule.init is not no_memory
    return transformation(init_rule if remembers else None, step, rule, options)


class _Layout(NamedTuple):
    """Which axes of a leaf stack matrices, and which are rows and columns."""

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]


def _layouts(leaves: Leaves, axis: LeafAxis, batch_axes: LeafAxis) -> list[_Layout]:
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


def _matrices(
    leaves: Leaves, layouts: list[_Layout], dtype: Dtype, ways: Ways, options: Options
) -> tuple[list["_Matrices"], jax.Array]:
    """The matrices of each leaf, and whether any entry is not finite.

    All at a Frobenius norm of 1, so that no magnitude is out of range.
    """
    arrays, paths = leaves.arrays, leaves.paths
    if options.nonfinite == "sanitize":
        arrays = [jnp.nan_to_num(x) for x in arrays]
    spans = UnitGroups(
        tuple(tuple(sorted(x.rows + x.columns)) for x in layouts), tuple(paths)
    )
    plan = make_plan(leaves, spans, 2.0, options.axis_name, options.specs)
    norm, bad = norms(plan, [arrays, leaves.arrays], with_flags, counted=(False, True))
    # Constants: the derivative of `clip_matrices` is that of all that is done here.
    norm = lax.stop_gradient(norm)
    ones = jax.tree.map(jnp.ones_like, norm.value)
    to_one = scaling.scales(norm, ones, normalize)
    wide = [x.astype(widened(x, dtype)) for x in arrays]
    unit = [
        jnp.where(n > 0, (x * scale) * scaling.second_factor(scale), 0)
        for x, scale, n in zip(wide, to_one, norm.value, strict=True)
    ]
    each = zip(arrays, unit, norm.value, layouts, plan.places, strict=True)
    return [_Matrices(*x, ways) for x in each], any_of(bad.value)


class _Matrices(NamedTuple):
    """A leaf as matrices: itself, at a norm of 1, their norms, and how they lie."""

    array: jax.Array
    unit: jax.Array
    norm: jax.Array
    layout: _Layout
    place: mesh.Placement
    ways: Ways

    @property
    def factor(self) -> float:
        """The root of columns over rows, at least 1."""
        shape = mesh.whole_shape(self.array.shape, self.place)
        rows, columns = (
            math.prod(shape[a] for a in axes)
            for axes in (self.layout.rows, self.layout.columns)
        )
        return max(1.0, columns / rows) ** 0.5

    def clipped(
        self, limit: ArrayLike, dtype: Dtype, shape_factor: bool = False
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The clipped leaf, and the largest singular value before and after."""

        def out_specs(dims: Sequence[tuple[Axes, ...]]) -> Any:
            return PartitionSpec(*dims[0]), PartitionSpec(), PartitionSpec()

        kept = self.place.without(self.layout.rows + self.layout.columns)
        return mesh.map_local(
            lambda shards, places, limit: self._local(
                shards, places, limit, shape_factor
            ),
            [self.array, self.unit, self.norm],
            [self.place, self.place, kept],
            jnp.asarray(limit, dtype),
            out_specs,
        )

    def _local(
        self,
        shards: Arrays,
        places: Sequence[Placement],
        limit: ArrayLike,
        shape_factor: bool,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        array, unit, norm = shards
        layout, ways = self.layout, self.ways
        whole = _gathered(unit, places[1], layout)
        matrices, restore = _as_matrices(whole, layout)
        scale = norm.reshape((*matrices.shape[:-2], 1))  # one a matrix
        new, top, top_after = clip_matrices(matrices, scale, limit, ways)
        mine = _own_part(restore(new), unit.shape, places[1], layout)
        known = top.reshape(norm.shape) if ways.method == "svd" else norm
        unchanged = (known <= limit) if ways.form == "hard" else (norm == 0)
        scaled = jnp.where(norm == 0, 0, mine).astype(array.dtype)
        clipped = jnp.where(unchanged, array, scaled)
        if shape_factor:
            clipped, top_after = clipped * self.factor, top_after * self.factor
        tops = [_largest(x, places[1]) for x in (top, top_after)]
        return clipped, tops[0], tops[1]


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
