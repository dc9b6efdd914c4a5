"""The attention layers of Flax, found in a model or its parameters."""

from typing import Any

import jax
from jaxtyping import PyTree

from .._trees.leaves import path_of
from .qk_layouts import Layout, attention_name, gqa, mha

_KERNELS = ("query", "key", "value", "out")
_NORMS = ("query_ln", "key_ln")


def flax(model_or_params: PyTree) -> list[Layout]:
    r"""The layouts of the attention layers of Flax, Linen or NNX, in a model.

    An attention is found by the kernels of ``query``, ``key``, ``value`` and ``out``
    side by side. With rank 3 they are those of one layer, as
    :class:`flax.linen.MultiHeadDotProductAttention` and
    :class:`flax.nnx.MultiHeadAttention` make them, (in, heads, head dimension); with
    rank 4 a stack of layers, as :func:`flax.linen.scan` and :func:`flax.nnx.vmap` make
    them. Each is named by its path, such as ``"blocks/0/attention"``, in which Linen's
    collection ``params`` is left out.

    .. math:: \text{name} \to \text{qk.mha(query, key)} \text{ or } \text{qk.gqa(query,
              key)}

    Args:
        model_or_params: an NNX model, or the parameters of a model: NNX state or
            Linen's variables, also as shapes.

    Returns:
        A list with a layout for each attention: :func:`mha`, or :func:`gqa` where there
        are fewer keys than queries.

    Raises:
        ValueError: if there is no such attention, or one normalizes its queries and
            keys (``normalize_qk=True``). Scaling the kernels has no effect there, and
            the gains of the norm bound the logits.
        TypeError: for a Linen module, which has no parameters: pass these.

    Example:
        >>> import optax_clipx as clipx
        >>> from flax import nnx
        >>> layer = nnx.MultiHeadAttention(4, 16, decode=False, rngs=nnx.Rngs(0))
        >>> [layout.name for layout in clipx.qk.flax({"attn": nnx.state(layer)})]
        ['attn']

    References:
        :class:`flax.nnx.MultiHeadAttention`, for names and shapes.
    """
    shapes = _shapes(_params_of(model_or_params))
    parents = sorted(path[:-2] for path in shapes if path[-2:] == ("query", "kernel"))
    found = [parent for parent in parents if _is_attention(parent, shapes)]
    if not found:
        known = ", ".join("/".join(path) for path in list(shapes)[:10]) or "nothing"
        raise ValueError(
            "Expected an attention layer of Flax, with kernels of rank 3 named query,"
            f" key, value and out, found none in: {known}. For other layers pass"
            " optax_clipx.qk.mha(query='path/of/the/kernel', key=...)."
        )
    for parent in found:
        _refuse_norm(parent, shapes)
    return [_layout(parent, shapes) for parent in found]


def _params_of(model: PyTree) -> Any:
    """The parameters of an NNX model; anything else as it is."""
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(model).__mro__}
    if "flax.nnx.module.Module" in kinds:
        from flax import nnx

        return nnx.state(model, nnx.Param)
    if "flax.linen.module.Module" in kinds:
        raise TypeError(
            f"Expected the parameters of a Linen module, got {type(model).__name__}"
            " itself, which has none. Pass what its init returns."
        )
    return model


def _shapes(tree: PyTree) -> dict[tuple[str, ...], tuple[int, ...]]:
    with_keys = jax.tree_util.tree_leaves_with_path(tree)
    return {path_of(keys): tuple(getattr(x, "shape", ())) for keys, x in with_keys}


def _is_attention(parent: tuple[str, ...], shapes: PyTree) -> bool:
    ranks = {len(shapes.get((*parent, name, "kernel"), ())) for name in _KERNELS}
    return ranks in ({3}, {4})


def _refuse_norm(parent: tuple[str, ...], shapes: PyTree) -> None:
    norms = [
        n for n in _NORMS if any(p[: len(parent) + 1] == (*parent, n) for p in shapes)
    ]
    if norms:
        raise ValueError(
            "Expected queries and keys that are not normalized in"
            f" {'/'.join(parent)!r}, found {norms[0]!r} after their projection. It"
            " undoes any scale of the kernels, and its gains bound the logits: leave"
            " this attention out of QK-Clip, by listing the others with"
            " optax_clipx.qk.mha."
        )


def _layout(parent: tuple[str, ...], shapes: PyTree) -> Layout:
    query, key = ((*parent, name, "kernel") for name in ("query", "key"))
    stacked = len(shapes[query]) == 4
    make = mha if shapes[query][-2] == shapes[key][-2] else gqa
    return make(
        query,
        key,
        head_axis=2 if stacked else 1,
        layer_axis=0 if stacked else None,
        name=attention_name(list(parent)),
    )
