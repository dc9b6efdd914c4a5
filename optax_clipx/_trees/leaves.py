"""Which leaves of a pytree are clipped, and what they are called."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey
from jaxtyping import PyTree

Path = tuple[str, ...]
KeyPath = tuple[Hashable, ...]  # a path as JAX has it
# A name in a path, several, or a function of path and leaf.
Selector = str | Sequence[str] | set[str] | frozenset[str] | Callable[[Path, Any], Any]


@dataclass
class Leaves:
    """A flattened pytree: `arrays` are measured, the rest passes through.

    Itself a pytree of its arrays, without what passes through.
    """

    arrays: list[Any]
    keys: list[Any]
    indices: list[int]
    everything: list[Any]
    treedef: Any

    @property
    def paths(self) -> list[Path]:
        """The path of each array, as strings."""
        return [path_of(keys) for keys in self.keys]

    def _replace(self, **changes: PyTree) -> "Leaves":
        return replace(self, **changes)

    def rebuild(self, arrays: Sequence[PyTree]) -> Any:
        """The pytree with its arrays replaced."""
        everything = list(self.everything)
        for index, array in zip(self.indices, arrays, strict=True):
            everything[index] = array
        return jax.tree.unflatten(self.treedef, everything)


jax.tree_util.register_pytree_node(
    Leaves,
    lambda x: ((x.arrays,), (tuple(x.keys), tuple(x.indices), x.treedef)),
    lambda static, children: Leaves(
        children[0], list(static[0]), list(static[1]), [], static[2]
    ),
)


def path_of(keys: KeyPath) -> Path:
    """`("layers", "0", "kernel")`: the same for a dict, a module and an NNX state.

    NNX shows `Param` objects to `init` and bare arrays to `update`; the attribute
    `.value` in between is no part of the name.
    """
    names = []
    for key in keys:
        for attribute in ("key", "idx", "name"):
            if hasattr(key, attribute):
                names.append(str(getattr(key, attribute)))
                break
        else:
            names.append(str(key))
    if names and keys[-1] == GetAttrKey("value"):
        names.pop()
    return tuple(names)


def show(path: Path) -> str:
    """How an error message writes a path."""
    return "/".join(path) if path else "(the only leaf)"


def flatten(tree: PyTree, *, updates: bool = True) -> Leaves:
    """Flattens a pytree and refuses the leaves that cannot be clipped.

    `None` and `optax.MaskedNode` have no leaves; float0 and empty leaves pass
    through. Integer leaves are an error among updates; among parameters they are
    left out, since their gradients are float0.
    """
    with_keys, treedef = jax.tree_util.tree_flatten_with_path(tree)
    everything = [leaf for _, leaf in with_keys]
    arrays, kept_keys, indices = [], [], []
    for index, (keys, leaf) in enumerate(with_keys):
        if isinstance(leaf, float | complex) and not hasattr(leaf, "dtype"):
            leaf = jnp.asarray(leaf)
        if isinstance(leaf, np.ndarray | np.generic):
            leaf = everything[index] = _as_jax_has_it(leaf)
        if not _is_array(leaf):
            if isinstance(leaf, bool | int) and not updates:
                continue
            raise TypeError(_not_an_array(keys, leaf))
        if leaf.dtype == jax.dtypes.float0:
            continue
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            if not updates:
                continue
            raise TypeError(
                f"Expected floating-point or complex updates, got {leaf.dtype} at"
                f" {show(path_of(keys))}. Leave it out with optax.masked, or cast it."
            )
        if leaf.size:
            arrays.append(leaf)
            kept_keys.append(keys)
            indices.append(index)
    return Leaves(arrays, kept_keys, indices, everything, treedef)


def _as_jax_has_it(leaf: np.ndarray | np.generic) -> Any:
    """A NumPy array of numbers as a JAX array; without x64 float64 becomes float32."""
    if leaf.dtype == jax.dtypes.float0 or leaf.dtype.kind not in "iufcV":
        return leaf
    return jnp.asarray(leaf)


def _is_array(leaf: object) -> bool:
    return all(hasattr(leaf, name) for name in ("dtype", "shape", "size"))


def _not_an_array(keys: KeyPath, leaf: object) -> str:
    path = show(path_of(keys))
    if isinstance(leaf, bool | int):
        return (
            f"Expected floating-point or complex updates, got the Python"
            f" {type(leaf).__name__} {leaf!r} at {path}. Leave it out with"
            " optax.masked, or make it a float array."
        )
    return (
        f"Expected a pytree of arrays, got a leaf of type {type(leaf).__name__} at"
        f" {path}. Pass the arrays alone: those of a module, as with"
        " equinox.filter(model, equinox.is_inexact_array), or those inside of boxed"
        " parameters, as with jax.tree.map(lambda p: p.value, params)."
    )


def chooser(where: Selector) -> Callable[[Path, Any], bool]:
    """A predicate of path and leaf from a name, names or a function."""
    if callable(where):
        return lambda path, leaf: bool(where(path, leaf))
    listed = isinstance(where, tuple | list | set | frozenset)
    names = tuple(where) if listed else (where,)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(
            "Expected where to be a name in the path, a tuple of names or a function of"
            f" path and leaf, got {where!r}."
        )
    return lambda path, leaf: any(name in path for name in names)


def from_prefix(
    prefix: PyTree,
    paths: Sequence[Path],
    what: str,
    is_leaf: Callable[[PyTree], bool] | None = None,
) -> list[Any]:
    """For each path the value that a pytree prefix gives it.

    Matching is by path and not by node type, so that a dict is a prefix of an NNX
    state as well. Values that stand opposite no array are ignored.
    """
    entries = jax.tree_util.tree_leaves_with_path(
        prefix, is_leaf=lambda x: x is None or (is_leaf is not None and is_leaf(x))
    )
    values = {path_of(keys): value for keys, value in entries}
    return [_longest_match(values, path, what) for path in paths]


def _longest_match(values: dict[Path, PyTree], path: Path, what: str) -> Any:
    for length in range(len(path), -1, -1):
        if path[:length] in values:
            value = values[path[:length]]
            if value is None:
                break
            return value
    known = ", ".join(sorted(show(p) for p in values)) or "nothing"
    raise ValueError(
        f"Expected {what} for every leaf, got none for {show(path)}."
        f" The prefix has values for: {known}."
    )
