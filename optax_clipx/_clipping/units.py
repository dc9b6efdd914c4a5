r"""Which entries of a layer belong to one unit, for the names of common libraries.

A unit is a group of entries with one norm: a column of a dense kernel, a filter of a
convolution, or a row of an embedding. :func:`flax`, :func:`equinox` and :func:`haiku`
find the units from the path and the number of axes of a leaf. :func:`of_model` finds
them from the layers of a model. Pass any of these as ``axis=`` of
:func:`optax_clipx.adaptive_grad_clip` or :func:`optax_clipx.measures.unit_norms`.
:func:`show` prints the units of each leaf.
"""

from collections.abc import Callable, Mapping
from typing import Any, SupportsIndex

import jax
from jaxtyping import PyTree

from .._trees.arguments import whole_numbers
from .._trees.leaves import Path, Selector, chooser, flatten, show as show_path
from .._trees.types import Shaped
from .attention_names import axes_in_attention, has_heads
from .measures import LeafAxis, unit_norms

Axes = tuple[int, ...]
Rule = Callable[[Path, Any], Axes | None]

_EMBEDDINGS = (
    "embedding",
    "embeddings",
    "pos_embedding",
    "embed",
    "input_embedding",
)


def flax(path: Path, leaf: Shaped) -> Axes:
    r"""Finds the axes of one unit by the parameter names of Flax Linen and NNX.

    ==========================================  ====================  ================
    leaf                                        shape                 a unit spans
    ==========================================  ====================  ================
    kernel of a dense, LSTM or GRU layer        (in, out)             (0,)
    kernel of a convolution                     (..., in, out)        all but the last
    kernel of query, key, value                 (in, heads, head)     (0,)
    kernel of out, inside of an attention       (heads, head, out)    (0, 1)
    kernel of qkv or kv, in an attention        (in, 3, heads, head)  (0,)
    embedding                                   (rows, features)      the last
    bias, scale and all other vectors           (n,)                  everything
    bias of query, key, value                   (heads, head)         everything
    ==========================================  ====================  ================

    **Stacks of layers.** :func:`flax.linen.scan` and :func:`flax.nnx.vmap` make leaves
    that stack several layers. If a vector or a kernel of attention has one axis more
    than in the table, it is such a stack. Its first axis is then not part of a unit.
    Two kinds of stacks cannot be found by their shape: convolutions, and dense layers
    that are called query, key or value. For these use :func:`stacked` or
    :func:`of_model`.

    **Attention.** Other names of kernels in an attention are known too, such as q_proj,
    attn_out_proj, qkv_proj and the einsums of Gemma. For these the number of heads
    times the size of a head must be the width of the layer. Any other kernel with three
    axes is an error, unless the name of its layer contains "conv". The message shows a
    function that you can paste.

    Args:
        path: the path of the leaf, as strings.
        leaf: an array, or another object with a shape.

    Returns:
        The axes that one unit spans.

    Raises:
        ValueError: if the names and the number of axes do not say what the units are,
            or if a name belongs to another library.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipx.units.flax(("attention", "out", "kernel"), jnp.zeros((4, 4, 16)))
        (0, 1)

    References:
        The shapes are those of :mod:`flax.linen` and :mod:`flax.nnx`. Brock et al.,
        2021, arXiv 2102.06171, define units.
    """
    rank, name = leaf.ndim, path[-1] if path else ""
    layer = path[-2] if len(path) > 1 else ""
    if rank <= 1:
        return tuple(range(rank))
    _refuse_names_of_others(path, leaf, "flax", ("weight",))
    if name in _EMBEDDINGS:
        return (rank - 1,)
    in_heads = layer in ("query", "key", "value")
    if name in ("bias", "scale"):
        return _of_core(path, leaf, 2, (0, 1)) if in_heads else (rank - 1,)
    if rank == 2:
        return (0,)
    if in_heads and not _is_vector(leaf):
        return _of_core(path, leaf, 3, (0,))
    return _of_high_rank(path, leaf, layer)


def _of_high_rank(path: Path, leaf: Shaped, layer: str) -> Axes:
    """The same of what has three axes or more, and is no query, key or value."""
    if _is_vector(leaf):
        return tuple(range(leaf.ndim))
    if _is_convolution(layer):
        return _filters(path, leaf, "flax")
    if layer == "out" and any("att" in part.lower() for part in path[:-2]):
        return _of_core(path, leaf, 3, (0, 1))
    of_attention = axes_in_attention(path, leaf)
    if of_attention is not None:
        return of_attention
    if leaf.ndim in (4, 5) and not has_heads(path):
        return tuple(range(leaf.ndim - 1))
    raise ValueError(_unclear(path, leaf, "flax"))


def equinox(path: Path, leaf: Shaped) -> Axes:
    r"""Finds the axes of one unit by the parameter names of Equinox.

    In Equinox, the shape of ``weight`` is (out, in, ...). The units are:

    - the rows of a linear, LSTM or GRU weight, and the rows of an embedding
    - the filters of a convolution. A weight is a convolution if a name with "conv" is
      in its path, or if it has four or five axes
    - the whole bias

    Any other weight with three axes is an error. If it is a stack of linear layers, say
    so with :func:`stacked`, or use :func:`of_model`.

    Args:
        path: the path of the leaf, as strings.
        leaf: an array, or another object with a shape.

    Returns:
        The axes that one unit spans.

    Raises:
        ValueError: if the names and the number of axes do not say what the units are,
            or if a name belongs to another library.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipx.units.equinox(("layers", "0", "weight"), jnp.zeros((8, 32)))
        (1,)

    References:
        The shapes are those of ``equinox.nn``.
    """
    rank, name = leaf.ndim, path[-1] if path else ""
    convolution = any("conv" in part.lower() for part in path[:-1])
    if rank <= 1 or (_is_vector(leaf) and (rank > 2 or convolution)):
        return tuple(range(rank))
    _refuse_names_of_others(path, leaf, "equinox", ("kernel",))
    if name.startswith("bias"):
        return _of_core(path, leaf, 1, (0,))
    if rank == 2:
        return (1,)
    if convolution:
        return _filters(path, leaf, "equinox")
    if rank == 4 or rank == 5:
        return tuple(range(1, rank))
    raise ValueError(_unclear(path, leaf, "equinox"))


def haiku(path: Path, leaf: Shaped) -> Axes:
    r"""Finds the axes of one unit by the parameter names of Haiku.

    In Haiku, the shape of ``w`` is (..., in, out). The units are:

    - the columns of a dense layer, an LSTM or an attention
    - the filters of a convolution
    - the rows of ``embeddings``
    - the whole bias

    Stacks of layers that ``haiku.layer_stack`` makes are found by the name
    ``layer_stack`` in the path.

    Args:
        path: the path of the leaf, as strings.
        leaf: an array, or another object with a shape.

    Returns:
        The axes that one unit spans.

    Raises:
        ValueError: if the names and the number of axes do not say what the units are,
            or if a name belongs to another library.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipx.units.haiku(("mlp/~/linear_0", "w"), jnp.zeros((8, 32)))
        (0,)

    References:
        The shapes are those of ``haiku``.
    """
    if any("layer_stack" in part for part in path) and leaf.ndim > 1:
        inner = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        below = tuple(part.replace("layer_stack", "") for part in path)
        return tuple(a + 1 for a in haiku(below, inner))
    rank, name = leaf.ndim, path[-1] if path else ""
    layer = path[-2].rsplit("/", 1)[-1] if len(path) > 1 else ""
    if rank <= 1:
        return tuple(range(rank))
    _refuse_names_of_others(path, leaf, "haiku", ("kernel", "weight"))
    if name == "embeddings":
        return (rank - 1,)
    if rank == 2:
        return (0,)
    if _is_vector(leaf):
        return tuple(range(rank))
    if "transpose" in layer:  # (..., out, in)
        return tuple(a for a in range(rank) if a != rank - 2)
    if _is_convolution(layer):
        return _filters(path, leaf, "haiku")
    if rank == 4 or rank == 5:
        return tuple(range(rank - 1))
    raise ValueError(_unclear(path, leaf, "haiku"))


def stacked(rule: Rule, where: Selector, *, axis: SupportsIndex = 0) -> Rule:
    r"""Makes a rule for models in which some leaves stack several layers.

    Args:
        rule: the rule for a single layer, such as :func:`flax`.
        where: the leaves that stack layers: a name in their path, a tuple of names, or
            a function of path and leaf.
        axis: the axis along which the layers are stacked.

    Returns:
        A function of path and leaf that returns the axes of one unit. You can also pass
        it as ``batch_axes=`` of :func:`track_norms` and :func:`measures.leaf_norms`. It
        then says along which axes the layers are stacked.

    Raises:
        ValueError: from the rule, if the axis is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> rule = clipx.units.stacked(clipx.units.flax, "blocks")
        >>> rule(("blocks", "linear", "kernel"), jnp.zeros((12, 64, 256)))
        (1,)

    References:
        Such leaves are made by :func:`flax.linen.scan`, by :func:`flax.nnx.vmap`, and
        by :func:`jax.vmap` of an initializer.
    """
    (axis,) = whole_numbers(axis)
    chosen = chooser(where)

    def axis_of(path: Path, leaf: Shaped) -> int:
        if not -leaf.ndim <= axis < leaf.ndim:
            raise ValueError(
                f"Expected axis={axis} within the rank of shape {leaf.shape} at"
                f" {show_path(path)}."
            )
        return axis % leaf.ndim

    def one_layer(leaf: Shaped, at: int) -> Any:
        shape = leaf.shape[:at] + leaf.shape[at + 1 :]
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    def of_stack(path: Path, leaf: Shaped) -> Axes | None:
        if not chosen(path, leaf):
            return rule(path, leaf)
        at = axis_of(path, leaf)
        layer = one_layer(leaf, at)
        axes: Any = rule(path, layer)
        if axes is None:
            return None
        positive = [a % len(layer.shape) for a in whole_numbers(axes)]
        return tuple(a + (a >= at) for a in positive)

    def layers(path: Path, leaf: Shaped) -> Axes:
        inner = getattr(rule, "batch_axes", lambda path, leaf: ())
        if not chosen(path, leaf):
            return tuple(inner(path, leaf))
        at = axis_of(path, leaf)
        found = inner(path, one_layer(leaf, at))
        return tuple(sorted({at, *(a + (a >= at) for a in found)}))

    # What `batch_axes=` of other functions is to know, where it gets this rule.
    vars(of_stack)["batch_axes"] = layers
    return of_stack


def of_model(model: object) -> Rule:
    r"""Makes a rule from the layers of an NNX or Equinox model, whatever their names.

    For a layer whose class is unknown, the rule is :func:`flax` or :func:`equinox`. If
    a leaf has more axes than a single layer of its class, it is a stack of layers along
    its first axes.

    Args:
        model: a :class:`flax.nnx.Module` or an ``equinox.Module``.

    Returns:
        A function of path and leaf that returns the axes of one unit.

    Raises:
        TypeError: if ``model`` is another kind of model. Models of Linen and Haiku do
            not keep their layers.
        ValueError: from the rule, if the units of a leaf are unclear.

    Example:
        >>> from flax import nnx
        >>> import optax_clipx as clipx
        >>> model = nnx.Sequential(nnx.Conv(3, 8, (3,), rngs=nnx.Rngs(0)))
        >>> rule = clipx.units.of_model(model)
        >>> rule(("layers", "0", "kernel"), model.layers[0].kernel[...])
        (0, 1)

    References:
        The layers are those of :mod:`flax.nnx` and ``equinox.nn``.
    """
    # By name, as neither library need be installed.
    bases = {f"{base.__module__}.{base.__name__}" for base in type(model).__mro__}
    if "flax.nnx.module.Module" in bases:
        from .layers import of_nnx

        return _by_path(of_nnx(model), flax)
    if any(base.startswith("equinox._module") for base in bases):
        from .layers import of_equinox

        return _by_path(of_equinox(model), equinox)
    raise TypeError(
        f"Expected an NNX or Equinox model, got {type(model).__name__}. For the"
        " parameters of Linen or Haiku use optax_clipx.units.flax or .haiku; where they"
        " cannot tell, their errors show a function to paste."
    )


def show(params: PyTree, axis: LeafAxis | Mapping[str, Any] = None) -> None:
    r"""Prints the units of each leaf, which a clipper measures and clips together.

    Args:
        params: a pytree of arrays or of shapes.
        axis: as in :func:`optax_clipx.measures.unit_norms`.

    Returns:
        Nothing. The table is printed to the standard output.

    Raises:
        ValueError: if the rule in ``axis`` cannot find the units of a leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipx.units.show({"kernel": jnp.zeros((3, 32, 8))}, axis=(0, 1))
        leaf    shape       unit spans  units  entries each
        kernel  (3, 32, 8)  (0, 1)          8            96

    References:
        :meth:`flax.linen.Module.tabulate` prints a similar table.
    """
    leaves = flatten(params, updates=False)
    groups: Any = unit_norms(axis=axis).groups(leaves)
    rows = [("leaf", "shape", "unit spans", "units", "entries each")]
    for path, leaf, axes in zip(leaves.paths, leaves.arrays, groups.axes, strict=True):
        entries = 1
        for a in axes:
            entries *= leaf.shape[a]
        spans = "everything" if len(axes) == leaf.ndim else str(axes)
        numbers = (str(leaf.size // entries), str(entries))
        rows.append((show_path(path), str(leaf.shape), spans, *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _by_path(known: Mapping[Path, tuple[int, Axes]], fallback: Rule) -> Rule:
    """A rule from the rank of each known leaf in its layer, and its units there."""

    def rule(path: Path, leaf: Shaped) -> Axes | None:
        if path not in known:
            return fallback(path, leaf)
        core, axes = known[path]
        return _of_core(path, leaf, core, axes)

    return rule


def _of_core(path: Path, leaf: Shaped, core: int, axes: Axes) -> Axes:
    """The axes in a leaf whose layer has `core` dimensions, stacked along the rest."""
    more = leaf.ndim - core
    if more < 0:
        raise ValueError(
            f"Expected rank {core} or more at {show_path(path)}, got shape"
            f" {leaf.shape}."
        )
    return tuple(a + more for a in axes)


def _is_vector(leaf: Shaped) -> bool:
    return sum(n != 1 for n in leaf.shape) <= 1


def _is_convolution(layer: str) -> bool:
    return "conv" in layer.lower()


def _filters(path: Path, leaf: Shaped, rule: str) -> Axes:
    if not 3 <= leaf.ndim <= 5:
        raise ValueError(_unclear(path, leaf, rule))
    return _inputs(leaf, rule)


def _inputs(leaf: Shaped, rule: str) -> Axes:
    """All axes but that of the outputs, as the library orders them."""
    axes = tuple(range(leaf.ndim))
    return axes[1:] if rule == "equinox" else axes[:-1]


def _refuse_names_of_others(
    path: Path, leaf: Shaped, rule: str, names: tuple[str, ...]
) -> None:
    """A matrix of another library may be the other way round."""
    if path and path[-1] in names:
        raise ValueError(
            f"Cannot tell the units of {show_path(path)} of shape {leaf.shape}:"
            f" {path[-1]!r} is no name that optax_clipx.units.{rule} knows. Kernels are"
            " Flax's (units.flax), weights Equinox's (units.equinox), w is Haiku's"
            " (units.haiku); for others give the axes: a function of path and leaf."
        )


def _unclear(path: Path, leaf: Shaped, rule: str) -> str:
    axes, end = _inputs(leaf, rule), path[-2:]
    outputs = "first" if rule == "equinox" else "last"
    return (
        f"Cannot tell the units of {show_path(path)} of shape {leaf.shape} from its"
        " name: it may be a convolution, attention, or layers in a stack. For a stack"
        f" pass axis=optax_clipx.units.stacked(optax_clipx.units.{rule},"
        f" where={path[0] if path else ''!r}), and for a model of NNX or Equinox"
        " axis=optax_clipx.units.of_model(model). Or name the axes that feed one"
        f" output, {axes} if its {outputs} axis are the outputs:"
        f" axis=lambda path, leaf: {axes} if path[-2:] == {end} else"
        f" optax_clipx.units.{rule}(path, leaf)"
    )
