"""Layouts fitted to a tree of parameters, and what is said where they do not fit."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._trees.leaves import path_of
from .._trees.types import Shaped
from .qk_layouts import Layout, Layouts, Part

_BIASES = {"kernel": "bias", "weight": "bias", "w": "b"}


@dataclass(frozen=True)
class Slot:
    """A leaf that is multiplied: its place, and where its heads and layers are.

    With `width`, each head has so many entries in a row along the axis of the heads.
    With `part_axis`, queries, keys and values are on that axis.
    """

    index: int
    path: str
    part: Part
    shape: tuple[int, ...]
    head_axis: int
    layer_axis: int | None
    width: int | None
    part_axis: int | None = None


@dataclass(frozen=True)
class Fitted:
    """A layout that fits a tree, and the shape of its maxima."""

    name: str
    slots: tuple[Slot, ...]
    shape: tuple[int, ...]  # heads, or layers and heads
    key_heads: int


def fit(layout: Layouts, tree: PyTree) -> list[Fitted]:
    """Each layout with the leaves that it names.

    Raises an error that names the value where a path is missing, shapes do not agree,
    or two layouts have the same name or leaf.
    """
    with_keys = jax.tree_util.tree_leaves_with_path(tree)
    paths = ["/".join(path_of(keys)) for keys, _ in with_keys]
    leaves = {path: leaf for path, (_, leaf) in zip(paths, with_keys, strict=True)}
    places = {path: index for index, path in enumerate(paths)}
    fitted = [_fit_one(one, leaves, places) for one in list_of(layout)]
    _refuse_twice([one.name for one in fitted], "name", "Pass name= to one of them.")
    used = [slot.path for one in fitted for slot in one.slots]
    _refuse_twice(used, "leaf", "Leave one of them out.")
    return fitted


def list_of(layout: Layouts) -> list[Layout]:
    """One layout, or several, as a list."""
    layouts = [layout] if isinstance(layout, Layout) else layout
    listed = isinstance(layouts, list | tuple)
    if not listed or not all(isinstance(one, Layout) for one in layouts):
        raise TypeError(
            "Expected layout to be what optax_clipx.qk.mha, .gqa, .mla, .fused or .flax"
            f" returns, or a list of these, got {layout!r}."
        )
    if not layouts:
        raise ValueError("Expected at least one layout, got an empty list.")
    return list(layouts)


def near(name: str, known: Iterable[str]) -> str:
    """The end of an error message: known names that are like this one."""
    listed = list(known)
    ends = [x for x in listed if x.endswith("/" + name) or name.endswith("/" + x)]
    like = ends or difflib.get_close_matches(name, listed, n=3, cutoff=0.5)
    if like:
        return f" Did you mean {' or '.join(map(repr, like[:3]))}?"
    shown = ", ".join(map(repr, listed[:10])) or "nothing"
    return f" There is {shown}{', ...' if len(listed) > 10 else ''}."


def _refuse_twice(values: list[str], what: str, advice: str) -> None:
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(
            f"Expected each {what} in one layout only, got {twice[0]!r} in several."
            f" {advice}"
        )


def _fit_one(
    layout: Layout, leaves: dict[str, Shaped], places: dict[str, int]
) -> Fitted:
    query = layout.parts[0]
    if query.factor == "fused":
        return _fit_fused(layout, leaves, places)
    shape = _shape(query.path, leaves, layout)
    layout = _with_head_axis(layout, shape, layout.num_heads or 1)
    heads = layout.num_heads or _size(query, leaves, layout)
    key_heads = _key_heads(layout, leaves, heads) if layout.grouped else heads
    slots: list[Slot] = []
    for part in layout.parts:
        count = key_heads if part.factor == "key" else heads
        kernel = _slot(part, leaves, places, layout, count)
        slots += [kernel, *_bias(kernel, leaves, places)]
    _check_widths(slots)
    layers = {n for n in map(_layers, slots) if n is not None}
    if len(layers) > 1:
        raise ValueError(
            f"Expected the same number of layers on axis {layout.layer_axis} of each"
            f" kernel, got {_shapes(slots)}."
        )
    return Fitted(layout.name, tuple(slots), (*layers, heads), key_heads)


def _fit_fused(
    layout: Layout, leaves: dict[str, Shaped], places: dict[str, int]
) -> Fitted:
    """A layout of one kernel for queries, keys and values."""
    (part,) = layout.parts
    shape = _shape(part.path, leaves, layout)
    heads = layout.num_heads or 1
    rows = heads + 2 * (layout.key_heads or heads)
    layout = _with_head_axis(layout, shape, rows)
    axis = _head_axis(layout, shape, part.path)
    width = parts = None
    if layout.part_axis is None:
        if shape[axis] % rows:
            raise ValueError(
                f"Expected queries, keys and values of {heads} heads one after the"
                f" other on axis {axis} of {part.path!r}, which are a multiple of"
                f" {rows} entries, got shape {shape}. Pass num_heads=, key_heads= if"
                " several query heads share a key, or head_axis=."
            )
        width = shape[axis] // rows
    else:
        parts = _axis(layout.part_axis, shape, part.path, "part_axis")
        heads = shape[axis]
        if shape[parts] != 3 or parts == axis or layout.num_heads not in (None, heads):
            raise ValueError(
                "Expected queries, keys and values on an axis of length 3 of"
                f" {part.path!r}, and {layout.num_heads or 'the'} heads on another, got"
                f" part_axis={layout.part_axis}, head_axis={layout.head_axis} and shape"
                f" {shape}. Without such an axis, pass num_heads= and no part_axis=."
            )
    first = axis if parts is None else min(axis, parts)
    layer = _layer_axis(layout, shape, part.path, first)
    index = places[part.path]
    slot = Slot(index, part.path, part, shape, axis, layer, width, parts)
    layers = () if layer is None else (shape[layer],)
    slots = (slot, *_bias(slot, leaves, places))
    return Fitted(layout.name, slots, (*layers, heads), layout.key_heads or heads)


def _with_head_axis(layout: Layout, shape: tuple[int, ...], rows: int) -> Layout:
    """The layout with an axis of heads, refused where another axis fits as well.

    Queries and keys of their own without layers are on axis 1: there both axes are
    multiples of the heads in most models.
    """
    whole = layout.parts[0].factor == "fused"
    if layout.head_axis is not None or (layout.layer_axis is None and not whole):
        return layout
    path, layer = layout.parts[0].path, -1
    if layout.layer_axis is not None:
        layer = _axis(layout.layer_axis, shape, path, "layer_axis")
    free = range(layer + 1, len(shape))
    if layout.part_axis is None:
        usual = free[1] if len(free) > 1 else 1
        fits = [axis for axis in free if shape[axis] % rows == 0]
    else:
        parts = _axis(layout.part_axis, shape, path, "part_axis")
        usual = parts + 1
        beside = [axis for axis in (parts - 1, usual) if axis in free]
        fits = [axis for axis in beside if shape[axis] == shape[beside[-1]]]
    if fits and fits != [usual]:
        raise ValueError(
            f"Expected head_axis= with the axis of {path!r} that holds the heads, since"
            f" by its shape {shape} it may be {' or '.join(map(str, fits))}. Pass"
            f" {' or '.join(f'head_axis={axis}' for axis in fits)}. In JAX the axis of"
            " the inputs usually comes first, and in PyTorch that of the outputs."
        )
    return replace(layout, head_axis=usual)


def _check_widths(slots: list[Slot]) -> None:
    """Refuses queries and keys of different widths, whose heads are others' then."""
    whole = [s for s in slots if s.part.factor != "rotary" and s.part.split is None]
    widths = {slot.width for slot in whole}
    if len(widths) > 1:
        raise ValueError(
            "Expected heads of the same width in queries and keys, got"
            f" {_shapes(whole)}, with widths {sorted(filter(None, widths))}. If several"
            " query heads share a key, use optax_clipx.qk.gqa."
        )


def _layers(slot: Slot) -> int | None:
    return None if slot.layer_axis is None else slot.shape[slot.layer_axis]


def _shapes(slots: Iterable[Slot]) -> str:
    return ", ".join(f"{slot.path!r} of shape {slot.shape}" for slot in slots)


def _shape(path: str, leaves: dict[str, Shaped], layout: Layout) -> tuple[int, ...]:
    """The shape of the kernel at a path."""
    if path not in leaves:
        raise ValueError(
            f"Expected a leaf at {path!r}, as the layout {layout.name!r} says, found"
            f" none.{near(path, leaves)} Pass its path to optax_clipx.qk.mha, .gqa or"
            " .mla."
        )
    dtype = getattr(leaves[path], "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        kind = dtype or type(leaves[path]).__name__
        raise TypeError(f"Expected a floating-point array at {path!r}, got {kind}.")
    return tuple(leaves[path].shape)


def _size(part: Part, leaves: dict[str, Shaped], layout: Layout) -> int:
    """How many entries a kernel has on the axis of its heads."""
    shape = _shape(part.path, leaves, layout)
    return shape[_head_axis(layout, shape, part.path)]


def _head_axis(layout: Layout, shape: tuple[int, ...], path: str) -> int:
    axis = 1 if layout.head_axis is None else layout.head_axis
    return _axis(axis, shape, path, "head_axis")


def _axis(axis: int, shape: tuple[int, ...], path: str, name: str) -> int:
    if not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"Expected {name} to be an axis of {path!r} of shape {shape}, got"
            f" {name}={axis}."
        )
    return axis % len(shape)


def _key_heads(layout: Layout, leaves: dict[str, Shaped], heads: int) -> int:
    """The number of key heads, which divides that of query heads."""
    query, key = layout.parts
    sizes = [_size(part, leaves, layout) for part in (query, key)]
    width = max(sizes[0] // heads, 1) if layout.num_heads else 1
    count = sizes[1] // width
    if count == 0 or heads % count:
        raise ValueError(
            f"Expected the number of query heads to be a multiple of that of key heads,"
            f" got {heads} in {query.path!r} and {count} in {key.path!r}. Pass"
            " head_axis= with the axis of the heads, or num_heads= if it also holds the"
            " entries of each head."
        )
    return count


def _slot(
    part: Part,
    leaves: dict[str, Shaped],
    places: dict[str, int],
    layout: Layout,
    heads: int,
) -> Slot:
    """The kernel of a part, whose heads are as many as they have to be."""
    shape = _shape(part.path, leaves, layout)
    axis = _head_axis(layout, shape, part.path)
    layer = _layer_axis(layout, shape, part.path, axis)
    fits = shape[axis] % heads == 0 if layout.num_heads else shape[axis] == heads
    if not fits:
        raise ValueError(
            f"Expected {heads} heads on axis {axis} of {part.path!r}, got shape"
            f" {shape}. If several query heads share a key, use optax_clipx.qk.gqa. If"
            " that axis also holds the entries of each head, pass num_heads=."
        )
    slot = Slot(
        index=places[part.path],
        path=part.path,
        part=part,
        shape=shape,
        head_axis=axis,
        layer_axis=layer,
        width=shape[axis] // heads if layout.num_heads else None,
    )
    _check_split(slot)
    return slot


def _layer_axis(
    layout: Layout, shape: tuple[int, ...], path: str, before: int
) -> int | None:
    """The axis of the layers, which comes before that of the heads."""
    if layout.layer_axis is None:
        return None
    layer = _axis(layout.layer_axis, shape, path, "layer_axis")
    if layer < before:
        return layer
    parts = "" if layout.part_axis is None else f", part_axis={layout.part_axis}"
    raise ValueError(
        f"Expected layer_axis before head_axis{' and part_axis' * bool(parts)} in"
        f" {path!r} of shape {shape}, got layer_axis={layout.layer_axis}{parts} and"
        f" head_axis={layout.head_axis}."
    )


def _check_split(slot: Slot) -> None:
    """Refuses a split of heads that are not as wide."""
    split = slot.part.split
    if split is None:
        return
    beside = slot.shape[slot.head_axis + 1 : slot.head_axis + 2]
    width = slot.width or (beside[0] if beside else 0)
    if width < split:
        raise ValueError(
            f"Expected at least nope_dim={split} entries in each head of {slot.path!r},"
            f" got {width} in the shape {slot.shape}. They are on the axis after"
            " head_axis, or with num_heads= on the same."
        )


def _bias(
    kernel: Slot, leaves: dict[str, Shaped], places: dict[str, int]
) -> list[Slot]:
    """The bias of a kernel, if it has one: its axes are those of what comes out."""
    parent, _, last = kernel.path.rpartition("/")
    beside = "/".join(filter(None, (parent, _BIASES.get(last, ""))))
    path = kernel.part.bias or (beside if last in _BIASES else None)
    if kernel.part.bias and path not in leaves:
        raise ValueError(
            f"Expected a bias at {path!r}, found none.{near(str(path), leaves)}"
        )
    if path is None or path not in leaves:
        return []
    shape = tuple(leaves[path].shape)
    # With inputs before heads, as in Flax, a bias lacks axes before; else those after.
    fewer = len(kernel.shape) - len(shape)
    size = kernel.shape[kernel.head_axis]
    for axis in (kernel.head_axis - fewer, kernel.head_axis):
        inside = 0 <= axis < len(shape) and axis != kernel.layer_axis
        parts = kernel.part_axis
        if parts is not None:
            parts += axis - kernel.head_axis
            inside &= 0 <= parts < len(shape) and shape[parts] == 3
        if inside and shape[axis] == size:
            same = replace(kernel, index=places[path], path=path, shape=shape)
            return [replace(same, head_axis=axis, part_axis=parts)]
    raise ValueError(
        f"Expected an axis with {size} entries in the bias {path!r}, as in"
        f" {kernel.path!r} of shape {kernel.shape}, got shape {shape}."
    )
