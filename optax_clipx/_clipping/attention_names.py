"""Kernels of attention, by the names and shapes that code written in Linen gives them.

Flax's own layer is known by its names alone. Elsewhere a kernel of rank 3 may as well
be layers in a stack, so that its shape has to agree: heads times head is the width.
"""

from .._trees.leaves import Path
from .._trees.types import Shaped

_INPUTS = ("q", "k", "v", "q_proj", "k_proj", "v_proj", "wq", "wk", "wv")
_FUSED = ("qkv", "qkv_proj", "kv", "kv_proj", "query_key_value", "wqkv")
_OUTPUTS = {"o", "out", "output", "wo", "proj"}  # words of a name, as in attn_out_proj
_NO_OUTPUTS = {"in", "q", "k", "v", "qkv", "kv", "query", "key", "value"}
# Of Gemma, whose einsums have their heads first: rank, and what a unit spans.
_EINSUMS = {
    "q_einsum": (3, (1,)),
    "kv_einsum": (4, (2,)),
    "qkv_einsum": (4, (2,)),
    "attn_vec_einsum": (3, (0, 1)),
}


def axes_in_attention(path: Path, leaf: Shaped) -> tuple[int, ...] | None:
    """The axes of one unit of a kernel below an attention; None if nothing tells."""
    if len(path) < 2 or not any(map(_is_attention, path[:-1])):
        return None
    layer, shape = path[-2].lower(), tuple(leaf.shape)
    if path[-1] == "w" and layer in _EINSUMS:
        rank, axes = _EINSUMS[layer]
        return axes if rank == len(shape) else None
    if layer in _FUSED:
        return (0,) if _is_fused(shape) else None
    if len(shape) != 3:
        return None
    if layer in _INPUTS:  # (in, heads, head)
        return (0,) if shape[1] * shape[2] == shape[0] else None
    words = set(layer.split("_"))
    if words & _OUTPUTS and not words & _NO_OUTPUTS:  # (heads, head, out)
        return (0, 1) if shape[0] * shape[1] == shape[2] else None
    return None


def has_heads(path: Path) -> bool:
    """Whether a kernel of rank 4 or more by this name is no convolution."""
    return len(path) > 1 and path[-2].lower() in (*_FUSED, *_EINSUMS)


def _is_fused(shape: tuple[int, ...]) -> bool:
    """(in, 3, heads, head), (in, heads, 3, head), (in, 3, out) or (in, heads, 3 head).

    With 2 for 3 where queries are apart.
    """
    width, *rest = shape
    if rest[0] in (2, 3):
        return len(shape) in (3, 4)
    if len(shape) == 3:
        return rest[0] * rest[1] in (2 * width, 3 * width)
    return len(shape) == 4 and rest[1] in (2, 3) and rest[0] * rest[2] == width


def _is_attention(part: str) -> bool:
    lower = part.lower()
    return "att" in lower or "mha" in lower or "mhsa" in lower
