"""What the layers of NNX and Equinox say of their own leaves: rank, and units."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax

from .._trees.leaves import path_of

Axes = tuple[int, ...]
Known = dict[Any, tuple[int, Axes]]  # the rank in the layer, and what a unit spans


def of_nnx(model: object) -> Known:
    """The leaves of the layers of an NNX model."""
    from flax import nnx

    found: Known = {}
    for path, node in nnx.iter_graph(model):
        for kind, describe in _nnx_layers(nnx):
            if isinstance(node, kind):
                for name, known in describe(node).items():
                    found[(*map(str, path), name)] = known
                break
    return found


def of_equinox(model: object) -> Known:
    """The leaves of the layers of an Equinox model."""
    import equinox as eqx

    layers = _equinox_layers(eqx.nn)
    kinds = tuple(kind for kind, _ in layers)
    nodes = jax.tree_util.tree_leaves_with_path(
        model, is_leaf=lambda x: isinstance(x, kinds)
    )
    found: Known = {}
    for keys, node in nodes:
        for kind, describe in layers:
            if isinstance(node, kind):
                for name, known in describe(node).items():
                    found[(*path_of(keys), name)] = known
                break
    return found


def _nnx_layers(nnx: ModuleType) -> list[tuple[Any, Callable[[Any], Known]]]:
    return [
        (nnx.LinearGeneral, _linear_general),
        (nnx.Linear, lambda _: {"kernel": (2, (0,)), "bias": (1, (0,))}),
        (nnx.Einsum, _einsum),
        (nnx.Conv, lambda layer: _convolution(layer, -1)),
        (
            nnx.ConvTranspose,
            lambda layer: _convolution(layer, -2 if layer.transpose_kernel else -1),
        ),
        (nnx.Embed, lambda _: {"embedding": (2, (1,))}),
        (nnx.LoRA, lambda _: {"lora_a": (2, (0,)), "lora_b": (2, (0,))}),
    ]


def _linear_general(layer: Any) -> Any:
    count_in, count_out = (
        len(_tuple(layer.in_features)),
        len(_tuple(layer.out_features)),
    )
    batch = len(layer.batch_axis or ())
    return {
        "kernel": (batch + count_in + count_out, _range(batch, batch + count_in)),
        "bias": (batch + count_out, _range(batch, batch + count_out)),
    }


def _einsum(layer: Any) -> Any:
    """A unit spans what the product sums over: in the kernel, and not in the result."""
    operands, result = layer.einsum_str.replace(" ", "").split("->")
    letters = operands.split(",")[1]
    summed = tuple(i for i, letter in enumerate(letters) if letter not in result)
    known = {"kernel": (len(letters), summed)}
    if layer.bias_shape is not None:
        rank = len(layer.bias_shape)
        known["bias"] = (rank, _range(0, rank))
    return known


def _convolution(layer: Any, out: int) -> Any:
    rank = len(_tuple(layer.kernel_size)) + 2
    axes = tuple(i for i in range(rank) if i != rank + out)
    return {"kernel": (rank, axes), "bias": (1, (0,))}


def _equinox_layers(nn: ModuleType) -> list[tuple[Any, Callable[[Any], Any]]]:
    def convolution(layer: Any) -> Any:
        spatial = layer.num_spatial_dims
        return {
            "weight": (spatial + 2, _range(1, spatial + 2)),
            "bias": (spatial + 1, _range(0, spatial + 1)),
        }

    def recurrent(layer: object) -> Any:
        matrices = dict.fromkeys(("weight_ih", "weight_hh"), (2, (1,)))
        return {**matrices, **dict.fromkeys(("bias", "bias_n"), (1, (0,)))}

    return [
        (nn.Linear, lambda _: {"weight": (2, (1,)), "bias": (1, (0,))}),
        (nn.Conv, convolution),
        (nn.ConvTranspose, convolution),
        (nn.Embedding, lambda _: {"weight": (2, (1,))}),
        (nn.LSTMCell, recurrent),
        (nn.GRUCell, recurrent),
    ]


def _tuple(value: int | Sequence[int]) -> tuple[Any, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _range(start: int, stop: int) -> Axes:
    return tuple(range(start, stop))
