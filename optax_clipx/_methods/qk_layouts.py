"""Layouts: which leaves make the queries and keys of an attention, and its heads."""

import operator
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import PyTree

from .._trees.arguments import check_static_count
from .._trees.types import Index, Name

WITHOUT_NAME = "attention"  # of a layer that is the whole model


@dataclass(frozen=True)
class Part:
    """A leaf, and what multiplies it: "query", "key", "rotary", "one" or "fused".

    "fused" is a leaf with queries, keys and values, each with a factor of its own.

    Of a fused leaf the first `split` entries of each head take `factor`, and the
    others `after`.
    """

    path: str
    factor: str
    bias: str | None = None
    split: int | None = None
    after: str = "one"


@dataclass(frozen=True)
class Layout:
    """Where one attention, or a stack of them, has its queries, keys and heads.

    The functions :func:`mha`, :func:`gqa`, :func:`mla`, :func:`fused` and :func:`flax`
    make it, and :func:`optax_clipx.qk_clip` takes it.
    """

    name: str
    parts: tuple[Part, ...]
    head_axis: int | None  # None: not given
    num_heads: int | None
    layer_axis: int | None
    grouped: bool
    # Of a fused kernel:
    key_heads: int | None = None
    part_axis: int | None = None


Layouts = PyTree  # a Layout, or a list of several


def mha(
    query: Name,
    key: Name,
    *,
    head_axis: Index | None = None,
    num_heads: Index | None = None,
    layer_axis: Index | None = None,
    query_bias: Name | None = None,
    key_bias: Name | None = None,
    name: Name | None = None,
) -> Layout:
    r"""The layout of multi-head attention: each head has its own query and key.

    .. math:: W_q^h \leftarrow \gamma_h^{\alpha} W_q^h, \quad
              W_k^h \leftarrow \gamma_h^{1-\alpha} W_k^h

    Here :math:`\gamma_h` is the scale of head :math:`h`, as in
    :func:`optax_clipx.qk_clip`. Biases are scaled with their kernels, so that query and
    key are scaled as a whole. Rotary embeddings rotate what they get, so that the
    logits are scaled by :math:`\gamma_h` with them too. A norm of queries or keys
    *after* the projection would undo the scale, and needs no QK-Clip: its logits are
    bounded by its gains.

    Args:
        query: the path of the kernel of the queries, such as ``"attn/query/kernel"``.
        key: the path of the kernel of the keys.
        head_axis: the axis of the kernels with one entry a head, by default 1. Needed
            with ``layer_axis``, and for kernels of PyTorch: (out, in) has them on 0.
        num_heads: pass it if that axis holds heads times head dimension, head after
            head, as in a kernel of shape (in, heads * head dimension).
        layer_axis: the axis of the layers, if the kernels are a stack of several; it
            comes before ``head_axis``, and the maxima have the shape (layers, heads).
        query_bias: the path of the bias of the queries. By default it is the leaf
            ``bias`` beside a ``kernel`` or ``weight``, or ``b`` beside ``w``, if there
            is one.
        key_bias: the same of the keys.
        name: the name of its maxima in ``max_logits``; by default the common part of
            the two paths, here ``"attn"``.

    Returns:
        A layout for :func:`optax_clipx.qk_clip`.

    Raises:
        TypeError: if a path is neither a string nor a tuple of strings, or an axis is
            no int.
        ValueError: if query and key are the same leaf, or ``num_heads`` is below 1.

    Example:
        >>> import optax_clipx as clipx
        >>> layout = clipx.qk.mha("attn/query/kernel", "attn/key/kernel")
        >>> layout.name
        'attn'

    References:
        Kimi Team, Kimi K2: Open Agentic Intelligence, 2025, arXiv 2507.20534, section
        2.1.
    """
    parts = (_part(query, "query", query_bias), _part(key, "key", key_bias))
    return _layout(name, parts, head_axis, num_heads, layer_axis, grouped=False)


def gqa(
    query: Name,
    key: Name,
    *,
    head_axis: Index | None = None,
    num_heads: Index | None = None,
    layer_axis: Index | None = None,
    query_bias: Name | None = None,
    key_bias: Name | None = None,
    name: Name | None = None,
) -> Layout:
    r"""The layout of grouped-query attention: each key serves a group of queries.

    .. math:: W_k^g \leftarrow k_g W_k^g, \quad
              k_g = \min_{h \in g} \gamma_h^{1-\alpha}, \quad
              W_q^h \leftarrow \min(1, \gamma_h / k_g)\, W_q^h \text{ for } h \in g

    Here :math:`\gamma_h` is the scale of head :math:`h`, as in
    :func:`optax_clipx.qk_clip`, and :math:`g` a group of consecutive query heads, as
    Flax and other libraries have them. The logits of each head shrink by
    :math:`\gamma_h` or more, since all heads of a group share their key. No weight
    grows. With one key head this is multi-query attention.

    Args:
        query: as in :func:`qk.mha`.
        key: as in :func:`qk.mha`.
        head_axis: as in :func:`qk.mha`.
        num_heads: the number of query heads; pass it if that axis holds heads times
            head dimension, head after head.
        layer_axis: as in :func:`qk.mha`.
        query_bias: as in :func:`qk.mha`.
        key_bias: as in :func:`qk.mha`.
        name: as in :func:`qk.mha`.

    Returns:
        A layout for :func:`optax_clipx.qk_clip`, whose maxima are one a query head.

    Raises:
        TypeError: as :func:`mha`.
        ValueError: as :func:`mha`.

    Example:
        >>> import optax_clipx as clipx
        >>> clipx.qk.gqa("block/q/kernel", "block/k/kernel").name
        'block'

    References:
        Ainslie et al., GQA, 2023, arXiv 2305.13245, for the groups; Kimi Team, 2025,
        arXiv 2507.20534, for the scales of single heads.
    """
    parts = (_part(query, "query", query_bias), _part(key, "key", key_bias))
    return _layout(name, parts, head_axis, num_heads, layer_axis, grouped=True)


def mla(
    query: Name,
    key: Name,
    *,
    rotary_query: Name | None = None,
    nope_dim: Index | None = None,
    head_axis: Index | None = None,
    num_heads: Index | None = None,
    layer_axis: Index | None = None,
    name: Name | None = None,
) -> Layout:
    r"""The layout of multi-head latent attention, whose rotary key all heads share.

    .. math:: W_q^{C,h} \leftarrow \gamma_h^{\alpha} W_q^{C,h}, \quad
              W_k^{C,h} \leftarrow \gamma_h^{1-\alpha} W_k^{C,h}, \quad
              W_q^{R,h} \leftarrow \gamma_h W_q^{R,h}

    Here :math:`C` marks the parts without rotary embedding, :math:`R` those with it,
    and :math:`\gamma_h` is the scale of head :math:`h`, as in
    :func:`optax_clipx.qk_clip`. The rotary key :math:`W_k^R` stays as it is, since
    every head reads it. Both products of head :math:`h` shrink by :math:`\gamma_h`, and
    so does their sum, the logit.

    Args:
        query: the path of the kernel that makes each head's queries, the up-projection.
            If ``rotary_query`` is None, a head has its ``nope_dim`` entries without
            rotary embedding first, and then the rotary ones.
        key: the path of the kernel that makes each head's keys, the up-projection. With
            ``nope_dim`` it may also make the values: what follows a head's first
            ``nope_dim`` entries stays as it is.
        rotary_query: the path of the rotary part of the queries, if it has a kernel of
            its own.
        nope_dim: how many entries of each head have no rotary embedding.
        head_axis: as in :func:`qk.mha`; the entries of a head are on the axis after it.
        num_heads: as in :func:`qk.mha`.
        layer_axis: as in :func:`qk.mha`.
        name: as in :func:`qk.mha`.

    Returns:
        A layout for :func:`optax_clipx.qk_clip`.

    Raises:
        TypeError: as :func:`mha`.
        ValueError: as :func:`mha`, and if neither ``rotary_query`` nor ``nope_dim`` is
            given, since then nothing says where the rotary part of the queries is.

    Example:
        >>> import optax_clipx as clipx
        >>> layout = clipx.qk.mla("mla/wq_b/kernel", "mla/wkv_b/kernel", nope_dim=128)
        >>> [part.after for part in layout.parts]
        ['rotary', 'one']

    References:
        Kimi Team, 2025, arXiv 2507.20534, section 2.1; DeepSeek-AI, DeepSeek-V2, 2024,
        arXiv 2405.04434, for the attention.
    """
    if rotary_query is None and nope_dim is None:
        raise ValueError(
            "Expected rotary_query= with the path of the rotary part of the queries, or"
            " nope_dim= with the number of entries before it in each head of"
            f" query={_joined(query, 'query')!r}; got neither."
        )
    if nope_dim is not None:
        check_static_count(nope_dim, "nope_dim")
    fused = nope_dim if rotary_query is None else None
    parts = [
        _part(query, "query", None, fused, "rotary"),
        _part(key, "key", None, nope_dim),
    ]
    if rotary_query is not None:
        parts.append(_part(rotary_query, "rotary", None))
    return _layout(name, tuple(parts), head_axis, num_heads, layer_axis, grouped=False)


def fused(
    kernel: Name,
    *,
    num_heads: Index | None = None,
    key_heads: Index | None = None,
    part_axis: Index | None = None,
    head_axis: Index | None = None,
    layer_axis: Index | None = None,
    bias: Name | None = None,
    name: Name | None = None,
) -> Layout:
    r"""The layout of an attention whose queries, keys and values are one kernel.

    .. math:: (W_q^h, W_k^h, W_v^h) \leftarrow
              (\gamma_h^{\alpha} W_q^h, \gamma_h^{1-\alpha} W_k^h, W_v^h)

    Here :math:`\gamma_h` is the scale of head :math:`h`, as in
    :func:`optax_clipx.qk_clip`. Queries come before keys, and keys before values; the
    values stay as they are. With ``key_heads`` the scales are those of :func:`qk.gqa`.

    ============================  ====================================================
    shape of the kernel           arguments
    ============================  ====================================================
    (in, 3 * heads * dimension)   ``num_heads=heads``, as in GPT-2
    (3 * heads * dimension, in)   ``num_heads=heads, head_axis=0``, as in PyTorch
    (layers, in, all of a layer)  ``num_heads=heads, layer_axis=0``
    (in, 3, heads, dimension)     ``part_axis=1``
    (in, heads, 3, dimension)     ``part_axis=2, head_axis=1``
    (in, all * dimension)         ``num_heads=heads, key_heads=groups``: grouped-query
                                  attention, with all = heads + 2 * groups
    ============================  ====================================================

    A kernel of shape (in, heads * 3 * dimension), in which query, key and value of a
    head come one after the other, as in GPT-NeoX, has the shape of the first row and
    not its order: reshape it to the fourth.

    Args:
        kernel: the path of the kernel, such as ``"attn/c_attn/kernel"``.
        num_heads: the number of query heads. Needed without ``part_axis``.
        key_heads: the number of key heads, if several query heads share one.
        part_axis: the axis of length 3 with queries, keys and values; ``None`` if they
            come one after the other on ``head_axis``.
        head_axis: the axis of the heads. By default the one after ``part_axis``; or
            without ``part_axis`` axis 1, where the axis of the layers does not count.
            Needed if the shape of the kernel allows another axis too, as that of a
            kernel of PyTorch does.
        layer_axis: as in :func:`qk.mha`; it comes before both others.
        bias: the path of the bias; by default as in :func:`qk.mha`.
        name: the name of its maxima in ``max_logits``; by default the path of the
            module that has the projection, here ``"attn"``.

    Returns:
        A layout for :func:`optax_clipx.qk_clip`.

    Raises:
        TypeError: as :func:`mha`.
        ValueError: if neither ``num_heads`` nor ``part_axis`` is given, or both
            ``part_axis`` and ``key_heads``, or ``num_heads`` is no multiple of
            ``key_heads``. From :func:`optax_clipx.qk_clip`, if several axes of the
            kernel may be that of the heads and ``head_axis`` is not given.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> layout = clipx.qk.fused("attn/c_attn/kernel", num_heads=2)
        >>> params = {"attn": {"c_attn": {"kernel": jnp.ones((3, 6))}}}  # dimension 1
        >>> maxima = {"attn": jnp.array([50.0, 400.0])}
        >>> params = clipx.qk_clip(params, maxima, layout, threshold=100.0)
        >>> print(params["attn"]["c_attn"]["kernel"][0])
        [1.  0.5 1.  0.5 1.  1. ]

    References:
        Kimi Team, Kimi K2: Open Agentic Intelligence, 2025, arXiv 2507.20534, section
        2.1.
    """
    path = _joined(kernel, "kernel")
    if num_heads is None and part_axis is None:
        raise ValueError(
            f"Expected num_heads= with the number of query heads in {path!r}, or"
            " part_axis= with the axis of length 3 that has queries, keys and values;"
            " got neither."
        )
    if key_heads is not None:
        check_static_count(key_heads, "key_heads")
        if part_axis is not None or (num_heads and int(num_heads) % key_heads):
            raise ValueError(
                "Expected key_heads without part_axis, and num_heads to be a multiple"
                f" of it, got key_heads={key_heads}, part_axis={part_axis} and"
                f" num_heads={num_heads}."
            )
    part = Part(path, "fused", None if bias is None else _joined(bias, "bias"))
    axis = None if part_axis is None else _axis(part_axis, "part_axis")
    names = path.split("/")
    module = names[: -2 if names[-1] in ("kernel", "weight", "w") else -1]
    name = attention_name(module) if name is None else name
    made = _layout(
        *(name, (part,), head_axis, num_heads, layer_axis),
        grouped=key_heads is not None,
    )
    return replace(made, key_heads=key_heads, part_axis=axis)


def _part(
    path: Name,
    factor: str,
    bias: Name | None,
    split: Index | None = None,
    after: str = "one",
) -> Part:
    given = None if bias is None else _joined(bias, f"{factor}_bias")
    return Part(_joined(path, factor), factor, given, split, after)


def _joined(path: Any, what: str) -> str:
    """A path as one string."""
    if isinstance(path, str) and path:
        return path
    listed = isinstance(path, tuple | list) and path
    if listed and all(isinstance(part, str) for part in path):
        return "/".join(path)
    raise TypeError(
        f"Expected {what} to be the path of a leaf, such as 'attn/query/kernel' or"
        f" ('attn', 'query', 'kernel'), got {path!r}."
    )


def _layout(
    name: Name | None,
    parts: tuple[Part, ...],
    head_axis: Index | None,
    num_heads: Index | None,
    layer_axis: Index | None,
    *,
    grouped: bool,
) -> Layout:
    """A layout, after its arguments are checked."""
    paths = [part.path for part in parts]
    if len(set(paths)) < len(paths):
        raise ValueError(f"Expected different leaves for query and key, got {paths}.")
    if num_heads is not None:
        check_static_count(num_heads, "num_heads")
    if name is not None and (not isinstance(name, str) or not name):
        raise TypeError(f"Expected name to be a string or None, got name={name!r}.")
    axis = None if head_axis is None else _axis(head_axis, "head_axis")
    layers = None if layer_axis is None else _axis(layer_axis, "layer_axis")
    return Layout(name or _common(paths), parts, axis, num_heads, layers, grouped)


def _axis(axis: Index, name: str) -> int:
    try:
        return operator.index(axis)
    except TypeError:
        raise TypeError(f"Expected {name} to be an int, got {axis!r}.") from None


def _common(paths: list[str]) -> str:
    """The common part of some paths, by which an attention is called."""
    shared = []
    for names in zip(*(path.split("/") for path in paths), strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return attention_name(shared)


def attention_name(path: list[str]) -> str:
    """The name of the attention at a path; that of Linen's collection is no part."""
    inner = path[1:] if path[:1] == ["params"] else path
    return "/".join(inner) or WITHOUT_NAME
