r"""Which entries of a layer make up one unit, for the names of the common libraries.

A unit is what feeds one output: a column of a dense kernel, a filter of a convolution,
a row of an embedding. :func:`flax`, :func:`equinox` and :func:`haiku` know it from a
leaf's path and rank, :func:`of_model` from the layers themselves; pass any of them as
``axis=`` of :func:`optax_clipx.adaptive_grad_clip` or
:func:`optax_clipx.measures.unit_norms`. :func:`show` prints what will be measured
together.
"""

from collections.abc import Callable, Mapping
from typing import Any, SupportsIndex

import jax

from .._trees.arguments import whole_numbers
from .._trees.leaves import Path, chooser, flatten, show as show_path
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


def flax(path: Path, leaf: Any) -> Axes:
    r"""The axes of one unit, by the names of Flax Linen and NNX.

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

    A vector or a kernel of attention with one rank more than that is a stack of layers,
    as :func:`flax.linen.scan` and :func:`flax.nnx.vmap` make, and its first axis is no
    part of a unit. Convolutions in a stack, and dense layers in a stack that are called
    query, key or value, look like others: name stacks with :func:`stacked`, or use
    :func:`of_model`. Inside of an attention other names are known too (q_proj,
    attn_out_proj, qkv_proj, Gemma's einsums and their like), if heads times head is the
    width. Any other kernel of rank 3 that is not under "conv" is an error, which shows
    a function to paste.

    Args:
        path: the leaf's path, as strings.
        leaf: an array, or anything with a shape.

    Returns:
        The axes that one unit spans.

    Raises:
        ValueError: where names and rank do not tell, or a name is another library's.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipx.units.flax(("attention", "out", "kernel"), jnp.zeros((4, 4, 16)))
        (0, 1)

    References:
        The shapes are those of :mod:`flax.linen` and :mod:`flax.nnx`; units in the
        sense of Brock et al., 2021, arXiv 2102.06171.
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


def _of_high_rank(path: Path, leaf: Any, layer: str) -> Axes:
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


def equinox(path: Path, leaf: Any) -> Axes:
    r"""The axes of one unit, by the names of Equinox: ``weight`` is (out, in, ...).

    A linear, LSTM or GRU weight and an embedding have their rows as units, a
    convolution (below a name with "conv", or of rank 4 and 5) its filters, and a bias
    is one unit. A weight of rank 3 elsewhere is an error: :func:`stacked` says that it
    is a stack of linear layers, :func:`of_model` reads it off the model.

    Args:
        path: the leaf's path, as strings.
        leaf: an array, or anything with a shape.

    Returns:
        The axes that one unit spans.

    Raises:
        ValueError: where names and rank do not tell, or a name is another library's.

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


def haiku(path: Path, leaf: Any) -> Axes:
    r"""The axes of one unit, by the names of Haiku: ``w`` is (..., in, out).

    Units of dense layers, LSTMs and attention are columns, those of convolutions
    filters, those of ``embeddings`` rows; a bias is one unit. Layers of
    ``haiku.layer_stack`` are known by that name.

    Args:
        path: the leaf's path, as strings.
        leaf: an array, or anything with a shape.

    Returns:
        The axes that one unit spans.

    Raises:
        ValueError: where names and rank do not tell, or a name is another library's.

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


def stacked(rule: Rule, where: Any, *, axis: SupportsIndex = 0) -> Rule:
    r"""A rule for models in which some leaves stack layers along an axis.

    Args:
        rule: the rule for a single layer, such as :func:`flax`.
        where: which leaves: a name in their path, a tuple of names, or a function of
            path and leaf.
        axis: the axis along which they are stacked.

    Returns:
        A rule of path and leaf. As ``batch_axes=`` of :func:`track_norms` and
        :func:`measures.leaf_norms` it stands for the axes of the stacks.

    Raises:
        ValueError: from the rule, if the axis is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> rule = clipx.units.stacked(clipx.units.flax, "blocks")
        >>> rule(("blocks", "linear", "kernel"), jnp.zeros((12, 64, 256)))
        (1,)

    References:
        :func:`flax.linen.scan`, :func:`flax.nnx.vmap` and :func:`jax.vmap` of an
        initializer make such leaves.
    """
    (axis,) = whole_numbers(axis)
    chosen = chooser(where)

    def axis_of(path: Path, leaf: Any) -> int:
        if not -leaf.ndim <= axis < leaf.ndim:
            raise ValueError(
                f"Expected axis={axis} within the rank of shape {leaf.shape} at"
                f" {show_path(path)}."
            )
        return axis % leaf.ndim

    def one_layer(leaf: Any, at: int) -> Any:
        shape = leaf.shape[:at] + leaf.shape[at + 1 :]
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    def of_stack(path: Path, leaf: Any) -> Axes | None:
        if not chosen(path, leaf):
            return rule(path, leaf)
        at = axis_of(path, leaf)
        layer = one_layer(leaf, at)
        axes: Any = rule(path, layer)
        if axes is None:
            return None
        positive = [a % len(layer.shape) for a in whole_numbers(axes)]
        return tuple(a + (a >= at) for a in positive)

    def layers(path: Path, leaf: Any) -> Axes:
        inner = getattr(rule, "batch_axes", lambda path, leaf: ())
        if not chosen(path, leaf):
            return tuple(inner(path, leaf))
        at = axis_of(path, leaf)
        found = inner(path, one_layer(leaf, at))
        return tuple(sorted({at, *(a + (a >= at) for a in found)}))

    # What `batch_axes=` of other functions is to know, where it gets this rule.
    vars(of_stack)["batch_axes"] = layers
    return of_stack


def of_model(model: Any) -> Rule:
    r"""A rule read off the layers of an NNX or Equinox model, whatever their names.

    Layers that it does not know go by :func:`flax` or :func:`equinox`. A rank above
    the layer's own is a stack of layers, along the first axes.

    Args:
        model: a :class:`flax.nnx.Module` or an ``equinox.Module``.

    Returns:
        A rule of path and leaf.

    Raises:
        TypeError: for other models: Linen and Haiku keep no layers to be asked.
        ValueError: from the rule, where nothing tells.

    Example:
        >>> from flax import nnx
        >>> import optax_clipx as clipx
        >>> model = nnx.Sequential(nnx.Conv(3, 8, (3,), rngs=nnx.Rngs(0)))
        >>> rule = clipx.units.of_model(model)
        >>> rule(("layers", "0", "kernel"), model.layers[0].kernel[...])
        (0, 1)

    References:
        The layers of :mod:`flax.nnx` and ``equinox.nn``.
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


def show(params: Any, axis: LeafAxis | Mapping[str, Any] = None) -> None:
    r"""Prints the units of each leaf: what will be measured and clipped together.

    Args:
        params: a pytree of arrays or of shapes.
        axis: as in :func:`optax_clipx.measures.unit_norms`.

    Returns:
        Nothing; a table goes to the standard output.

    Raises:
        ValueError: where the rule of ``axis`` does not tell.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipx.units.show({"kernel": jnp.zeros((3, 32, 8))}, axis=(0, 1))
        leaf    shape       unit spans  units  entries each
        kernel  (3, 32, 8)  (0, 1)          8            96

    References:
        In the manner of :meth:`flax.linen.Module.tabulate`.
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

    def rule(path: Path, leaf: Any) -> Axes | None:
        if path not in known:
            return fallback(path, leaf)
        core, axes = known[path]
        return _of_core(path, leaf, core, axes)

    return rule


def _of_core(path: Path, leaf: Any, core: int, axes: Axes) -> Axes:
    """The axes in a leaf whose layer has `core` dimensions, stacked along the rest."""
    more = leaf.ndim - core
    if more < 0:
        raise ValueError(
            f"Expected rank {core} or more at {show_path(path)}, got shape"
            f" {leaf.shape}."
        )
    return tuple(a + more for a in axes)


def _is_vector(leaf: Any) -> bool:
    return sum(n != 1 for n in leaf.shape) <= 1


def _is_convolution(layer: str) -> bool:
    return "conv" in layer.lower()


def _filters(path: Path, leaf: Any, rule: str) -> Axes:
    if not 3 <= leaf.ndim <= 5:
        raise ValueError(_unclear(path, leaf, rule))
    return _inputs(leaf, rule)


def _inputs(leaf: Any, rule: str) -> Axes:
    """All axes but that of the outputs, as the library orders them."""
    axes = tuple(range(leaf.ndim))
    return axes[1:] if rule == "equinox" else axes[:-1]


def _refuse_names_of_others(
    path: Path, leaf: Any, rule: str, names: tuple[str, ...]
) -> None:
    """A matrix of another library may be the other way round."""
    if path and path[-1] in names:
        raise ValueError(
            f"Cannot tell the units of {show_path(path)} of shape {leaf.shape}:"
            f" {path[-1]!r} is no name that optax_clipx.units.{rule} knows. Kernels are"
            " Flax's (units.flax), weights Equinox's (units.equinox), w is Haiku's"
            " (units.haiku); for others give the axes: a function of path and leaf."
        )


def _unclear(path: Path, leaf: Any, rule: str) -> str:
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
