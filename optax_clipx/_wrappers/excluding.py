"""Leaving leaves out of a clipper: by path, mask, or labels of an optimizer."""

import difflib
import inspect
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from .._clipping.transformation import check_state
from .._clipping.uncalled import check_transformation
from .._trees.leaves import Path, chooser, from_prefix, path_of, show
from .._trees.types import Shaped


def excluding(
    clipper: optax.GradientTransformation,
    where: PyTree,
    *,
    label: Hashable = "muon",
) -> optax.GradientTransformationExtraArgs:
    r"""Excludes leaves from a clipper: it neither measures nor clips them.

    Use it for these leaves:

    - leaves whose gradient norm the optimizer ignores, such as the matrices of Muon
    - the final linear layer, and biases, in adaptive gradient clipping
    - leaves that are not gradients, such as the statistics of fp8 layers
      (``"_overwrite_with_gradient"`` in Flax)

    ===============================  ==============================================
    ``where``                        excluded leaves
    ===============================  ==============================================
    ``"head"``                       leaves with this name in their path
    ``("head", "bias")``             leaves with one of these names in their path
    ``muon_leaves``                  leaves that Muon updates by default
    a function of path and leaf      leaves for which the function returns true
    a pytree of bools                leaves whose entry is true, as in
                                     ``optax.masked``
    a pytree of labels               leaves whose entry is ``label``, as in
                                     ``optax.partition``
    a pytree of dimension numbers    leaves whose entry is not ``None``, as in
                                     ``optax.contrib.muon``
    a function of the whole tree     leaves that the returned pytree excludes, which
                                     is one of the three pytrees above
    ===============================  ==============================================

    Args:
        clipper: a clipper of this package or of another package.
        where: the leaves to exclude, as in the table. A pytree can be a prefix.
        label: the label of excluded leaves, or a tuple of labels.

    Returns:
        A transformation.

    Raises:
        ValueError: from ``init`` and ``update``, if no leaf is excluded, if one of
            several names is in the path of no leaf, or if a pytree has no entry for a
            leaf.
        TypeError: if ``where`` has none of the forms in the table.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.excluding(clipx.clip_by_global_norm(1.0), "head")
        >>> grads = {"body": jnp.array([3.0, 4.0]), "head": jnp.array([10.0])}
        >>> grads, _ = clipper.update(grads, clipper.init(grads))
        >>> print(grads["body"], grads["head"])
        [0.6 0.8] [10.]

    References:
        Brock et al., 2021, arXiv 2102.06171, do not clip the final layer.
        :func:`optax.masked` excludes leaves from any transformation.
    """
    check_transformation(clipper, "clipper")
    choose = _choice(where, label if isinstance(label, tuple) else (label,))

    def mask(tree: PyTree) -> Any:
        with_keys, treedef = jax.tree_util.tree_flatten_with_path(tree)
        entries = [(path_of(keys), leaf) for keys, leaf in with_keys]
        excluded = choose(tree, entries)
        if entries and not any(excluded) and not _may_fit_nothing(where, tree):
            known = ", ".join(show(path) for path, _ in entries[:20])
            raise ValueError(
                f"Expected where={where!r} to fit a leaf, it fits none of: {known}."
            )
        if any(excluded) and not callable(where) and _has_names(where):
            _check_names(where, tree)
        return jax.tree.unflatten(treedef, [not x for x in excluded])

    masked = optax.masked(optax.with_extra_args_support(clipper), mask)

    def update_fn(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree
    ) -> tuple[Any, Any]:
        check_state(state, optax.MaskedState)
        return masked.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(masked.init, update_fn)


def muon_leaves(path: Path, leaf: Shaped) -> bool:
    r"""Says whether ``optax.contrib.muon`` updates a leaf with Muon by default.

    .. math:: \text{excluded} \iff \text{the leaf has two axes}

    The size of Muon's update does not depend on the norm of its gradient. If a global
    norm contains Muon's leaves, a large gradient of one of them makes the updates of
    all other leaves smaller. So exclude Muon's leaves from a global norm.

    Args:
        path: the path of the leaf, as strings. The function does not use it.
        leaf: an array, or another object with a number of axes.

    Returns:
        Whether the leaf has two axes. If you pass ``muon_weight_dimension_numbers`` to
        Muon, do not use this function. Pass the same value to :func:`excluding`.

    Raises:
        AttributeError: if the leaf is not an array.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.excluding(
        ...     clipx.clip_by_global_norm(1.0), clipx.muon_leaves
        ... )
        >>> grads = {"kernel": jnp.full((2, 2), 1e8), "bias": jnp.array([3.0, 4.0])}
        >>> grads, _ = clipper.update(grads, clipper.init(grads))
        >>> print(grads["bias"])
        [0.6 0.8]

    References:
        Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024.
    """
    return bool(leaf.ndim == 2)


Entries = list[tuple[Path, Any]]
Choice = Callable[[Any, Entries], list[bool]]


def _choice(where: PyTree, labels: tuple[Hashable, ...]) -> Choice:
    """Which leaves of a tree are excluded, for the tree and its leaves by path."""
    if callable(where) and not _takes(where, 2):
        return lambda tree, entries: _by_tree(where(tree), labels)(tree, entries)
    if not callable(where) and not _has_names(where):
        return _by_tree(where, labels)
    chosen = chooser(where)
    # A function may ask for what only arrays have: of other leaves it is not asked.
    return lambda tree, entries: [
        (not callable(where) or hasattr(leaf, "shape")) and chosen(path, leaf)
        for path, leaf in entries
    ]


def _has_names(where: PyTree) -> bool:
    """Whether this is a name or several, and no pytree of labels."""
    return all(isinstance(name, str) for name in _names(where))


def _names(where: PyTree) -> tuple[Any, ...]:
    """One name, or several, as a tuple."""
    listed = type(where) in (tuple, list, set, frozenset)
    return tuple(where) if listed else (where,)


def _takes(fun: Callable[..., object], number: int) -> bool:
    """Whether a function can be called with so many arguments."""
    try:
        signature = inspect.signature(fun)
    except ValueError:  # some builtins do not tell
        return True
    try:
        signature.bind(*[None] * number)
    except TypeError:
        return False
    return True


def _by_tree(where: PyTree, labels: tuple[Hashable, ...]) -> Choice:
    """The choice that a pytree of bools, labels or dimension numbers makes."""
    values = jax.tree.leaves(where, is_leaf=_is_value)
    if not values or not all(_is_known(value, labels) for value in values):
        raise TypeError(
            "Expected where to be a name in the path, a tuple of names, a function of"
            " path and leaf such as optax_clipx.muon_leaves, or a pytree (or a function"
            " of the tree that returns one) of bools, of labels as for optax.partition"
            " with label= the one to exclude, or of MuonDimensionNumbers and None; got"
            f" {where!r}."
        )
    marks = jax.tree.map(lambda x: _is_excluded(x, labels), where, is_leaf=_is_value)
    return lambda tree, entries: from_prefix(
        marks, [path for path, _ in entries], "a choice in where="
    )


def _check_names(where: PyTree, tree: PyTree) -> None:
    """Refuses a name that is in no path, beside others that are.

    What is None has a path too. Another mask may hide whole branches with their names.
    """
    entries = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_nothing)
    paths = [path_of(keys) for keys, _ in entries]
    known = sorted({name for path in paths for name in path})
    missing = [name for name in _names(where) if name not in known]
    masked = any(isinstance(leaf, optax.MaskedNode) for _, leaf in entries)
    if missing and not masked:
        near = difflib.get_close_matches(missing[0], known, n=3, cutoff=0.5)
        like = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        leaves = ", ".join(map(show, paths[:20]))
        raise ValueError(
            f"Expected each name in where={where!r} to fit a leaf, {missing[0]!r} fits"
            f" none of: {leaves}.{like} Correct the name, or leave it out."
        )


def _is_nothing(x: PyTree) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)


def _hidden(tree: PyTree) -> list[Path]:
    """The paths of what is None, or taken by another mask."""
    entries = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_nothing)
    return [path_of(keys) for keys, leaf in entries if _is_nothing(leaf)]


def _may_fit_nothing(where: PyTree, tree: PyTree) -> bool:
    """Whether what is to be excluded may be None, or taken by another mask."""
    hidden = _hidden(tree)
    if callable(where) or not _has_names(where):
        return bool(hidden)
    chosen = chooser(where)
    return any(chosen(path, None) for path in hidden)


def _is_value(x: PyTree) -> bool:
    return x is None or isinstance(x, optax.MaskedNode) or _is_numbers(x)


def _is_numbers(x: PyTree) -> bool:
    """Whether this is a MuonDimensionNumbers, which not every optax has."""
    return hasattr(x, "reduction_axis") and hasattr(x, "output_axis")


def _is_bool(x: PyTree) -> bool:
    return isinstance(x, bool | np.bool_)


def _is_known(x: PyTree, labels: tuple[Hashable, ...]) -> bool:
    return (
        _is_value(x)
        or _is_bool(x)
        or isinstance(x, str)
        or any(type(x) is type(label) for label in labels)
    )


def _is_excluded(x: PyTree, labels: tuple[Hashable, ...]) -> bool:
    if _is_value(x):
        return _is_numbers(x)
    return bool(x) if _is_bool(x) else x in labels
