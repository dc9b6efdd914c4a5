"""Arguments of functions of batches: checks, thresholds of groups, shapes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._clipping.measures import Measure
from .._devices import mesh
from .._devices.mesh import Placement
from .._reductions.groups import ScalarGroups
from .._trees.arguments import Limit, as_float, check_limit, is_limit, whole_numbers
from .._trees.leaves import Leaves, from_prefix
from .._trees.types import AnyArray, Dtype

ALONE = Placement((), ())


def numbers(value: object, name: str) -> tuple[int, ...]:
    """Argument numbers as a tuple."""
    try:
        numbers = whole_numbers(value)
    except TypeError:
        numbers = (-1,)
    if min(numbers, default=0) < 0:
        raise ValueError(f"Expected {name} to be 0 or above, got {name}={value!r}.")
    return numbers


def check_max_norm(max_norm: Limit) -> None:
    """Raises an error for thresholds that cannot be used."""
    if callable(max_norm):
        raise TypeError(
            f"Expected max_norm to be a number or array, got {max_norm!r}. Call a"
            " schedule with its step first."
        )
    if is_limit(max_norm):
        return check_limit(max_norm, "max_norm")
    for keys, value in jax.tree_util.tree_leaves_with_path(max_norm):
        check_limit(value, "max_norm" + jax.tree_util.keystr(keys))


def check_args(args: PyTree, argnums: object, batched: tuple[int, ...]) -> None:
    """Refuses calls with too few arguments."""
    last = max(*numbers(argnums, "argnums"), *batched)
    if len(args) <= last:
        raise ValueError(
            f"Expected at least {last + 1} positional arguments, for"
            f" argnums={argnums} and batch_argnums={batched}, got {len(args)}."
        )


def size_of_batch(batch: list[PyTree], mask: AnyArray | None) -> int:
    """The number of examples."""
    shapes = [jnp.shape(x) for x in batch]
    if not shapes or any(not s or s[0] != shapes[0][0] for s in shapes):
        raise ValueError(
            "Expected arrays with the examples along axis 0 in batch_argnums, as many"
            f" in each, got shapes {shapes}."
        )
    dtype = getattr(mask, "dtype", None)
    if mask is not None and (jnp.shape(mask) != shapes[0][:1] or dtype != jnp.bool_):
        raise ValueError(
            f"Expected mask to have a bool for each of {shapes[0][0]} examples, got"
            f" {mask!r}."
        )
    return shapes[0][0]


def number_of_steps(
    batch: list[PyTree], microbatch_size: int | None, two_pass: bool
) -> int:
    """The number of microbatches.

    Each has as many examples from every device over which Explicit axes cut the batch.
    """
    size = jnp.shape(batch[0])[0]
    devices = max(mesh.cut_sizes(x)[0] for x in batch)
    if microbatch_size is None:
        microbatch_size = devices if two_pass else size
    microbatch_size = min(microbatch_size, size)
    if size and (size % microbatch_size or microbatch_size % devices):
        right = [k for k in range(devices, size + 1, devices) if not size % k]
        nearest = [k for k in right if k < microbatch_size][-1:]
        nearest += [k for k in right if k > microbatch_size][:1]
        multiple = (
            f" and to be a multiple of the {devices} devices that share it"
            if devices > 1
            else ""
        )
        raise ValueError(
            f"Expected microbatch_size to divide the batch of {size} examples"
            f"{multiple}, got microbatch_size={microbatch_size}. The nearest sizes that"
            f" work: {' and '.join(map(str, nearest))}. Or pad the batch and pass"
            " mask=."
        )
    return size // microbatch_size if size else 1


def of_one_example(
    fun: Callable[..., PyTree],
    kwargs: PyTree,
    batched: tuple[int, ...],
    has_aux: bool,
    keep_batch_dim: bool,
) -> Callable[..., Any]:
    """The function of one example, which returns a pair."""

    def of_one(*args: PyTree) -> Any:
        if keep_batch_dim:
            expand = functools.partial(jnp.expand_dims, axis=0)
            args = tuple(
                jax.tree.map(expand, a) if i in batched else a
                for i, a in enumerate(args)
            )
        found = fun(*args, **kwargs)
        return found if has_aux else (found, None)

    return of_one


def limits_of_groups(
    max_norm: Limit,
    measure: Measure,
    leaves: Leaves,
    of_one: ScalarGroups,
    shares: str,
    dtype: Dtype,
) -> Float[Array, "..."]:
    """The threshold of each group; a scalar for the whole tree."""
    max_norm = jax.tree.map(as_float, max_norm)
    if is_limit(max_norm):
        if of_one.count is None:
            return jnp.asarray(max_norm).astype(dtype)
        sizes = of_one.sizes(leaves.arrays, [ALONE] * len(leaves.arrays))
        parts = np.ones_like(sizes) if shares == "equal" else np.asarray(sizes)
        factors = np.sqrt(parts / parts.sum())
        if not isinstance(max_norm, jax.Array):  # rounded once
            return jnp.asarray(max_norm * factors, dtype)
        return max_norm.astype(dtype) * jnp.asarray(factors, dtype)
    if measure.scope == "tree":
        raise ValueError(
            f"Expected a single max_norm for the whole example, got {max_norm!r}. Pass"
            " measure=optax_clipx.measures.leaf_norms() for one of each leaf."
        )
    if measure.scope == "leaf":
        given = from_prefix(max_norm, leaves.paths, "max_norm")
    else:
        names = measure.names(leaves)
        missing = [n for n in names if n not in max_norm]
        if missing:
            raise ValueError(f"Expected a max_norm for {missing}, got {max_norm!r}.")
        given = [max_norm[name] for name in names]
    return jnp.stack([jnp.asarray(v).astype(dtype) for v in given])


def unpacked(packed: jax.Array, measure: Measure, leaves: Leaves) -> Any:
    """Values with the groups first, in the structure of the groups."""
    if measure.scope == "tree":
        return packed
    columns = list(packed)
    if measure.scope == "group":
        return dict(zip(measure.names(leaves), columns, strict=True))
    return leaves.rebuild(columns)
