"""Measures: what is measured together, and by which norm."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._devices import mesh
from .._reductions.groups import Groups, Packed, ScalarGroups, UnitGroups
from .._reductions.norms import norms
from .._reductions.plan import Ord, Plan, of_leaves, of_tree
from .._trees.arguments import AxisNames, Specs, static, whole_numbers
from .._trees.leaves import Leaves, Path, flatten, from_prefix, show
from .._trees.types import Shaped

Axis = int | np.integer | np.ndarray | tuple[int | np.integer, ...] | None
LeafAxis = Axis | Callable[[Path, Any], Axis] | Mapping[Any, Any] | list[Any]
Labels: TypeAlias = PyTree  # for each leaf a name, or a function of path and leaf


@dataclass(frozen=True)
class Measure:
    """Which entries share a norm, and its order. Called on a pytree, it measures it.

    Made by :func:`tree_norm`, :func:`group_norms`, :func:`leaf_norms`,
    :func:`unit_norms` and :func:`magnitudes`.
    """

    scope: str  # "tree", "group", "leaf", "unit" or "element"
    ord: Ord = 2.0
    labels: Any = None
    axis: Any = None
    batch_axes: Any = None

    def __call__(
        self, updates: PyTree, *, axis_name: AxisNames = None, specs: Specs = None
    ) -> Any:
        """The norms, as a pytree prefix of the updates; for groups a dict."""
        leaves = flatten(updates)
        if self.scope == "element":
            return leaves.rebuild([jnp.abs(x) for x in leaves.arrays])
        if not leaves.arrays:
            return self.unpack(None, leaves)
        with mesh.mesh_of(leaves.arrays):
            plan = self.plan(leaves, axis_name, specs)
            (found,) = norms(plan, [leaves.arrays])
            return self.unpack(found.value, leaves, plan.groups)

    def unpack(
        self, packed: Packed, leaves: Leaves, groups: Groups | None = None
    ) -> Any:
        """Packed norms as a prefix of the updates; 0 for leaves that pass through."""
        if self.scope == "tree":
            return jnp.zeros((), jnp.float32) if packed is None else packed
        if self.scope == "group":
            found = () if packed is None else packed
            return dict(zip(self.names(leaves), found, strict=True))
        spread = groups.spread(packed) if groups is not None else []
        zeros = [jnp.zeros((), jnp.float32) for _ in leaves.everything]
        return leaves._replace(everything=zeros).rebuild(spread)

    def plan(
        self, leaves: Leaves, axis_name: AxisNames = None, specs: Specs = None
    ) -> Plan:
        """What is settled before a step: the groups, and how leaves lie on the mesh."""
        places = mesh.placements(leaves.arrays, leaves.paths, axis_name, specs)
        groups = self.groups(leaves, places)
        return Plan(tuple(leaves.paths), tuple(places), groups, self.ord)

    def groups_at_init(
        self, leaves: Leaves, axis_name: AxisNames, specs: Specs
    ) -> Groups:
        """The groups of parameters, which need not say how they lie on the mesh."""
        if specs is None or not any(isinstance(x, jax.Array) for x in leaves.arrays):
            return self.groups(leaves)
        return self.plan(leaves, axis_name, specs).groups

    def groups(
        self, leaves: Leaves, places: Sequence[mesh.Placement] | None = None
    ) -> Groups:
        """How the leaves fall into groups."""
        if self.scope == "tree":
            return of_tree(len(leaves.arrays))
        if self.scope == "group":
            names = self.names(leaves)
            labels = self.label_leaves(leaves)
            return ScalarGroups(tuple(names.index(n) for n in labels), len(names))
        if self.scope == "leaf" and self.batch_axes is None:
            return of_leaves(len(leaves.arrays))
        shapes = [leaf.shape for leaf in leaves.arrays]
        if places is not None:
            each = zip(shapes, places, strict=True)
            shapes = [mesh.whole_shape(shape, place) for shape, place in each]
        name = "batch_axes" if self.scope == "leaf" else "axis"
        given = _by_leaf(getattr(self, name), leaves, name)
        axes = tuple(
            self._unit_axes(path, leaf, shape, axes)
            for path, leaf, shape, axes in zip(
                leaves.paths, leaves.arrays, shapes, given, strict=True
            )
        )
        return UnitGroups(axes, tuple(leaves.paths))

    def label_leaves(self, leaves: Leaves) -> list[Any]:
        """The label of each leaf."""
        if callable(self.labels):
            found = zip(leaves.paths, leaves.arrays, strict=True)
            return [self.labels(path, leaf) for path, leaf in found]
        return from_prefix(self.labels, leaves.paths, "a label")

    def names(self, leaves: Leaves) -> list[Any]:
        """The labels in use, sorted."""
        return sorted(set(self.label_leaves(leaves)), key=str)

    def _unit_axes(
        self, path: Path, leaf: Shaped, shape: tuple[int, ...], given: LeafAxis
    ) -> tuple[int, ...]:
        every = tuple(range(leaf.ndim))
        if self.scope == "leaf":
            batch = _axes_of(given, path, leaf, "batch_axes")
            return tuple(i for i in every if i not in (batch or ()))
        axes = _axes_of(given, path, leaf, "axis")
        if axes is not None:
            return axes
        # optax's rule by rank: input axes of a dense layer, heads or convolution.
        if sum(n != 1 for n in shape) <= 1:
            return every
        if leaf.ndim > 5:
            raise ValueError(
                f"Expected rank 5 or less for axis=None, got shape {leaf.shape} at"
                f" {show(path)}. Pass axis= with the axes that make up one unit."
            )
        return (0,) if leaf.ndim <= 3 else every[:-1]


def tree_norm(ord: Ord | None = None) -> Measure:
    r"""Measures the whole pytree as one vector: the global norm.

    .. math:: n = \Big(\sum_{i} |g_i|^p\Big)^{1/p}

    Args:
        ord: the order ``p``: 2 (also ``None``), 1, any number from 1 on, ``inf`` for
            the largest magnitude, or ``"rms"`` for the root of the mean square.

    Returns:
        A measure for :func:`optax_clipx.clip_by`. Called on a pytree it returns a
        scalar, float32 or wider.

    Raises:
        ValueError: if ``ord`` is unknown.
        TypeError: if ``ord`` is traced.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> tree = {"w": jnp.array([3.0]), "b": jnp.array([4.0])}
        >>> print(clipx.measures.tree_norm()(tree))
        5.0

    References:
        Pascanu et al., 2013, arXiv 1211.5063.
    """
    return Measure("tree", checked_ord(ord))


def leaf_norms(ord: Ord | None = None, *, batch_axes: LeafAxis = None) -> Measure:
    r"""Measures each leaf by itself.

    Args:
        ord: the order of the norm, as for :func:`tree_norm`.
        batch_axes: axes along which a leaf stacks independent layers, each measured
            by itself: an int, a tuple, a function of path and leaf, a pytree prefix of
            ints and tuples, or a rule of :func:`optax_clipx.units.stacked`.

    Returns:
        A measure for :func:`optax_clipx.clip_by`. Called on a pytree it returns a
        scalar for each leaf, or an array that keeps the batch axes.

    Raises:
        ValueError: if ``ord`` is unknown or an axis is out of range.
        TypeError: if ``ord`` or an axis is traced.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> tree = {"w": jnp.array([3.0, 4.0]), "b": jnp.ones(1)}
        >>> norms = clipx.measures.leaf_norms()(tree)
        >>> print(norms["w"], norms["b"])
        5.0 1.0

    References:
        Per-parameter norms, as in Keras's ``clipnorm``.
    """
    _refuse_traced(batch_axes, "batch_axes")
    # A rule of units.stacked says where units are, and has with it where stacks are.
    batch_axes = getattr(batch_axes, "batch_axes", batch_axes)
    return Measure("leaf", checked_ord(ord), batch_axes=batch_axes)


def unit_norms(ord: Ord | None = None, *, axis: LeafAxis = None) -> Measure:
    r"""Measures the units of each leaf: the rows, columns or filters of a layer.

    Args:
        ord: the order of the norm, as for :func:`tree_norm`.
        axis: the axes that one unit spans: an int, a tuple, a function of path and
            leaf such as :func:`optax_clipx.units.flax`, or a pytree prefix of ints and
            tuples. ``None`` goes by rank as optax does: everything for vectors, axis 0
            for rank 2 and 3, all but the last for rank 4 and 5.

    Returns:
        A measure for :func:`optax_clipx.clip_by`. Called on a pytree it returns for
        each leaf an array of its rank, with size 1 along ``axis``.

    Raises:
        ValueError: if ``ord`` is unknown, an axis out of range, or ``axis=None`` meets
            rank 6.
        TypeError: if ``ord`` or ``axis`` is traced.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipx.measures.unit_norms()(jnp.array([[3.0, 1.0], [4.0, 0.0]])).tolist()
        [[5.0, 1.0]]

    References:
        Brock et al., High-performance large-scale image recognition without
        normalization, 2021, arXiv 2102.06171.
    """
    _refuse_traced(axis, "axis")
    return Measure("unit", checked_ord(ord), axis=axis)


def group_norms(labels: Labels, ord: Ord | None = None) -> Measure:
    r"""Measures together the leaves that have the same label.

    Args:
        labels: a pytree prefix of labels, or a function of path and leaf; a path is a
            tuple of strings such as ``("layers", "0", "kernel")``.
        ord: the order of the norm, as for :func:`tree_norm`.

    Returns:
        A measure for :func:`optax_clipx.clip_by`. Called on a pytree it returns a dict
        from label to norm.

    Raises:
        ValueError: if ``ord`` is unknown or a leaf has no label.
        TypeError: if ``ord`` is traced.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> grads = {"w": jnp.array([3.0]), "v": jnp.array([4.0]), "b": jnp.ones(1)}
        >>> labels = {"w": "weights", "v": "weights", "b": "bias"}
        >>> norms = clipx.measures.group_norms(labels)(grads)
        >>> print(norms["weights"], norms["bias"])
        5.0 1.0

    References:
        Parameter groups as in :func:`optax.partition`, with one norm for each.
    """
    return Measure("group", checked_ord(ord), labels=labels)


def magnitudes() -> Measure:
    r"""Measures each entry by itself: :math:`|g_i|`.

    Returns:
        A measure for :func:`optax_clipx.clip_by`. Called on a pytree it returns the
        magnitudes.

    Raises:
        TypeError: when called on leaves that are no floating-point arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipx.measures.magnitudes()(jnp.array([-2.0, 1.0])).tolist()
        [2.0, 1.0]

    References:
        Mikolov, Statistical language models based on neural networks, 2012.
    """
    return Measure("element")


def checked_ord(ord: Any) -> Ord:
    """The order as a Python number, or "rms"; None is 2."""
    if ord is None:
        return 2.0
    _refuse_traced(ord, "ord")
    if isinstance(ord, str) and ord == "rms":
        return "rms"
    number = isinstance(ord, int | float | np.number) and not isinstance(ord, bool)
    if number and ord >= 1:
        return float(ord)
    raise ValueError(
        f"Expected ord to be None, 'rms', inf or a number >= 1, got ord={ord!r}."
    )


def _refuse_traced(value: object, name: str) -> None:
    if isinstance(value, jax.Array):
        raise TypeError(static(name, value))


def _by_leaf(given: LeafAxis, leaves: Leaves, what: str) -> list[Any]:
    """What is given for each leaf: the same for all, or by a pytree prefix."""
    if given is None or callable(given) or _is_axes(given):
        return [given] * len(leaves.arrays)
    try:
        return from_prefix(given, leaves.paths, what, is_leaf=_is_axes)
    except ValueError:  # a list of numbers, then, is no part of the pytree
        return from_prefix(given, leaves.paths, what, is_leaf=_is_listed)


def _is_axes(given: object) -> bool:
    if isinstance(given, int | np.integer | np.ndarray):
        return True
    return isinstance(given, tuple) and all(
        isinstance(a, int | np.integer) for a in given
    )


def _is_listed(given: object) -> bool:
    listed = isinstance(given, list) and all(map(_is_axes, given))
    return listed or _is_axes(given)


def _axes_of(
    given: LeafAxis, path: Path, leaf: Shaped, what: str
) -> tuple[int, ...] | None:
    if callable(given):
        given = given(path, leaf)
    if given is None:
        return None
    try:
        axes = whole_numbers(given)
    except TypeError:
        axes = (leaf.ndim,)
    if not all(-leaf.ndim <= a < leaf.ndim for a in axes):
        raise ValueError(
            f"Expected {what} within the rank of shape {leaf.shape} at {show(path)},"
            f" got {what}={given!r}. Pass numbers of axes, or a function of path and"
            " leaf such as optax_clipx.units.flax."
        )
    return tuple(sorted({a % leaf.ndim for a in axes}))
