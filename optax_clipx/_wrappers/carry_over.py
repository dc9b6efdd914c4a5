"""`carry_over`: an old optimizer state in the place of a new one's."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey
from jaxtyping import PyTree

from .._clipping.metrics import ClipState, SkipState
from .._trees.leaves import path_of
from .error_feedback import ErrorState

Keys = tuple[Any, ...]


def carry_over(
    old_state: PyTree, new_state: PyTree, *, drop: Sequence[str] = ()
) -> tuple[Any, list[str]]:
    """Copies the state of an old optimizer into that of one with other clippers.

    Use it for a checkpoint that was written before you added a clipper. Restore the
    checkpoint as the state of the old optimizer, and copy it into a new state of the
    new optimizer. The parts that both have are found by structure: the steps of a chain
    by their order, the steps of a ``named_chain`` and fields by their names. If the old
    optimizer is now inside a wrapper, it is found there. A state from before 0.1.0, in
    which the moments of all leaves are one flat list, can also be copied.

    Args:
        old_state: the restored state, with the types that the old optimizer's ``init``
            gives it.
        new_state: what the new optimizer's ``init`` gives for the same parameters:
            arrays, and not the shapes that :func:`jax.eval_shape` gives.
        drop: the parts of the old state that may be left out, with the names in the
            error message: ``"0/rule"`` and all parts of it, or ``""`` for any part.

    Returns:
        The state for the new optimizer, with the structure of ``new_state``; and a list
        of its parts that are new, such as ``["0"]`` for a clipper that was put first.

    Raises:
        ValueError: if a part of the old state has no place with its shape and dtype in
            the new state, and ``drop`` does not name it; if it has several places, for
            example if the new optimizer has two Adams; if ``drop`` names a part that
            has a place; and if a part of the result would be a shape without values.
        TypeError: if one of the two is an optimizer and not its state.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_clipx as clipx
        >>> params = {"w": jnp.ones(2)}
        >>> old, new = optax.adam(0.1), optax.chain(clipx.zclip(), optax.adam(0.1))
        >>> _, old_state = old.update(params, old.init(params))
        >>> new_state, fresh = clipx.carry_over(old_state, new.init(params))
        >>> print(fresh, new_state[1][0].count)
        ['0'] 1

    References:
        PyTorch's ``load_state_dict(strict=True)`` names missing and unexpected keys.
    """
    _check_states(old_state, new_state)
    match = _fit(_Node((), old_state), _Node((), new_state))
    if not match.unique:
        raise ValueError(
            "Expected one place in the new state for each part of the old one, got"
            f" several: the old state is {jax.tree.structure(old_state)}, the new one"
            f" {jax.tree.structure(new_state)}. Carry over part by part, as with"
            " carry_over(old_state[0], new_state[1])."
        )
    old, _ = jax.tree_util.tree_flatten_with_path(old_state)
    new, treedef = jax.tree_util.tree_flatten_with_path(new_state)
    place = {there: here for here, there in match.pairs}
    _check_lost([x for x in old if x[0] not in set(place.values())], place, drop)
    values = dict(old)
    carried = [values[place[keys]] if keys in place else x for keys, x in new]
    _check_values([x for _, x in old], carried, [keys for keys, _ in new])
    fresh = _tops([keys for keys, _ in new if keys not in place], place)
    return jax.tree.unflatten(treedef, _once(carried)), fresh


class _Node(NamedTuple):
    """A part of a state, and the way to it."""

    keys: Keys
    value: Any


class _Match(NamedTuple):
    """Which old leaves go where, and whether nothing else fits as well."""

    pairs: frozenset[tuple[Keys, Keys]] = frozenset()
    unique: bool = True


def _fit(old: _Node, new: _Node, wrap: bool = True, unwrap: bool = True) -> _Match:
    """The match with the most leaves."""
    leaves = _is_leaf(old.value), _is_leaf(new.value)
    if any(leaves):
        same = all(leaves) and _kind(old.value) == _kind(new.value)
        return _Match(frozenset([(old.keys, new.keys)]) if same else frozenset())
    alike = type(old.value) is type(new.value)
    found = [_fit_parts(old, new)] if alike else []
    if alike and isinstance(old.value, ClipState | ErrorState):
        found.append(_fit_flat(old, new))
    if _is_state(old.value) and _is_state(new.value):
        # Not one after the other, which would lead from any part to any other.
        if wrap:
            found += [_fit(old, x, unwrap=False) for x in _inner_states(new)]
        if unwrap and not alike:
            found += [_fit(x, new, wrap=False) for x in _inner_states(old)]
    return _most(found)


def _fit_parts(old: _Node, new: _Node) -> _Match:
    """The match of two nodes of one type."""
    ours, theirs = _children(old), _children(new)
    if type(old.value) in (tuple, list):
        if _is_state(old.value) and _is_state(new.value):
            return _align(ours, theirs)
        if len(ours) != len(theirs):
            return _Match()
    by_key = {node.keys[-1]: node for node in theirs}
    return _together(
        _fit(node, by_key[node.keys[-1]]) for node in ours if node.keys[-1] in by_key
    )


def _fit_flat(old: _Node, new: _Node) -> _Match:
    """The match with a clipper's state from before 0.1.0.

    Its moments are a list of the arrays of all leaves, in the order of the trees that
    there are now; it counted the steps of a warm-up in its metrics.
    """
    ours, theirs = ({c.keys[-1].name: c for c in _children(x)} for x in (old, new))
    memory = "rule" if isinstance(old.value, ClipState) else "error"
    here = [_Node(keys, x) for keys, x in _leaves(ours[memory])]
    there = _moments(theirs[memory])
    if type(ours[memory].value) not in (list, tuple):
        return _Match()
    if len(there) == len(here) + 1 and memory == "rule":  # it had no count of its own
        here += [_Node(*x) for x in _leaves(ours["metrics"]) if "steps" in _names(x)]
    if [_kind(x.value) for x in here] != [_kind(x.value) for x in there]:
        return _Match()
    pairs = frozenset((a.keys, b.keys) for a, b in zip(here, there, strict=True))
    others = [_fit(ours[name], theirs[name]) for name in ours if name != memory]
    return _together([_Match(pairs), *others])


def _moments(memory: _Node) -> list[_Node]:
    """What is remembered, without the zeros of leaves that have no gradient."""
    counts = (*memory.keys, GetAttrKey("seen"))
    return [
        _Node(keys, x)
        for keys, x in _leaves(memory)
        if keys[: len(counts)] == counts
        or (np.size(x) and jnp.issubdtype(jnp.result_type(x), jnp.inexact))
    ]


def _leaves(node: _Node) -> list[tuple[Keys, Any]]:
    found = jax.tree_util.tree_leaves_with_path(node.value)
    return [((*node.keys, *keys), x) for keys, x in found]


def _names(leaf: tuple[Keys, PyTree]) -> list[str]:
    return list(path_of(leaf[0]))


def _align(old: list[_Node], new: list[_Node]) -> _Match:
    """The match of two chains, whose steps stay in their order."""

    @functools.cache
    def rest(i: int, j: int) -> _Match:
        if i == len(old) or j == len(new):
            return _Match()
        both = _together([_fit(old[i], new[j]), rest(i + 1, j + 1)])
        return _most([both, rest(i + 1, j), rest(i, j + 1)])

    return rest(0, 0)


def _most(found: Iterable[_Match]) -> _Match:
    """The match with the most leaves; unique if no other has as many."""
    found = list(found)
    most = max((len(match.pairs) for match in found), default=0)
    best = [match for match in found if len(match.pairs) == most]
    if not most:
        return _Match()
    unique = all(m.unique and m.pairs == best[0].pairs for m in best)
    return _Match(best[0].pairs, unique)


def _together(found: Iterable[_Match]) -> _Match:
    found = list(found)
    pairs = frozenset().union(*(match.pairs for match in found))
    return _Match(pairs, all(match.unique for match in found))


def _children(node: _Node) -> list[_Node]:
    def is_child(x: PyTree) -> bool:
        return x is not node.value

    found = jax.tree_util.tree_leaves_with_path(node.value, is_leaf=is_child)
    return [_Node((*node.keys, *keys), child) for keys, child in found]


def _inner_states(node: _Node) -> list[_Node]:
    """The states that may be those of a whole optimizer."""
    if isinstance(node.value, ClipState):
        return []
    children = _children(node)
    if isinstance(node.value, SkipState):
        children = [_Node((*node.keys, GetAttrKey("inner")), node.value.inner)]
    return [child for child in children if _is_state(child.value)]


def _is_state(value: PyTree) -> bool:
    """Whether there are states in it, and not only arrays by the parameters' names."""
    if _is_leaf(value):
        return False
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return True
    return any(_is_state(child.value) for child in _children(_Node((), value)))


def _is_leaf(value: PyTree) -> bool:
    return jax.tree_util.all_leaves([value])


def _kind(leaf: PyTree) -> tuple[Any, Any]:
    return np.shape(leaf), getattr(leaf, "dtype", type(leaf))


def _check_states(old_state: PyTree, new_state: PyTree) -> None:
    """Refuses optimizers in the place of their states."""
    for name, state in (("old_state", old_state), ("new_state", new_state)):
        if hasattr(state, "init") and hasattr(state, "update"):
            raise TypeError(
                f"Expected {name} to be the state of an optimizer, got the optimizer"
                f" itself, {type(state).__name__}. Pass what its init(params) gives."
            )


def _check_values(old: list[PyTree], carried: list[PyTree], keys: list[Keys]) -> None:
    """Refuses a result with shapes in it, unless the old state was one of shapes."""
    shapes = [isinstance(x, jax.ShapeDtypeStruct) for x in carried]
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in old):
        if not all(shapes):
            raise ValueError(
                "Expected old_state to hold arrays, as new_state does, got shapes"
                " without values (jax.ShapeDtypeStruct). Restore it first."
            )
        return
    if any(shapes):
        names = ["/".join(path_of(k)) for k, s in zip(keys, shapes, strict=True) if s]
        raise ValueError(
            "Expected new_state to hold arrays, got shapes without values"
            f" (jax.ShapeDtypeStruct) for {len(names)} that the old state does not"
            f" have: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}. Pass"
            " tx.init(params) or jax.jit(tx.init)(params) in the place of"
            " jax.eval_shape(tx.init, params)."
        )


def _once(values: list[PyTree]) -> list[Any]:
    """The values, with a copy where one comes twice: it could not be donated."""
    seen: set[int] = set()
    found = []
    for x in values:
        found.append(jnp.array(x) if id(x) in seen else x)
        seen.add(id(x))
    return found


def _check_lost(
    lost: list[PyTree], place: dict[Keys, Keys], drop: Sequence[str]
) -> None:
    """Raises unless all that is lost may be."""

    def under(name: str, top: str) -> bool:
        return top in ("", name) or name.startswith(f"{top}/")

    names = {keys: "/".join(path_of(keys)) for keys, _ in lost}
    wrong = [d for d in drop if d and not any(under(n, d) for n in names.values())]
    if wrong:
        raise ValueError(f"Expected drop to name what is lost, got {wrong}.")
    kept = [keys for keys in names if not any(under(names[keys], d) for d in drop)]
    if kept:
        values = dict(lost)
        tops = _tops(kept, list(place.values()))
        shown = [f"{names[k]} {np.shape(values[k])}" for k in kept[:10]]
        raise ValueError(
            "Expected a place in the new state, of the same shape and dtype, for all of"
            f" the old one, got none for {len(kept)} of its arrays:"
            f" {', '.join(shown)}{', ...' if len(kept) > 10 else ''}."
            + (f" If they may be lost, pass drop={tops}." if place else _NOTHING_FITS)
        )


_NOTHING_FITS = (
    " Nothing of it fits. Restore the checkpoint as the state of the old optimizer, for"
    " the same parameters, and pass what the new optimizer's init(params) gives."
)


def _tops(some: list[Keys], others: Iterable[Keys]) -> list[str]:
    """The names of the largest parts that have some in them, and none of the others."""
    shared = {keys[:i] for keys in others for i in range(len(keys) + 1)}
    tops: dict[str, None] = {}
    for keys in some:
        own = [i for i in range(len(keys)) if keys[:i] not in shared]
        tops["/".join(path_of(keys[: own[0]] if own else keys))] = None
    return list(tops)
