"""Leaving leaves out of a clipper by their path."""

from typing import Any

import jax
import optax

from .._clipping.transformation import check_state
from .._clipping.uncalled import check_transformation
from .._trees.leaves import Path, chooser, path_of, show


def excluding(
    clipper: optax.GradientTransformation, where: Any
) -> optax.GradientTransformationExtraArgs:
    r"""Excludes some leaves from a clipper: they are neither measured nor clipped.

    Use it for the final linear layer in adaptive gradient clipping, for biases, and for
    leaves that are not gradients, such as the statistics of fp8 layers
    (``"_overwrite_with_gradient"`` in Flax).

    Args:
        clipper: any clipper, of this package or another.
        where: which leaves: a name in their path, a tuple of names, or a function of
            path and leaf that is true for them.

    Returns:
        A transformation.

    Raises:
        ValueError: from ``init`` and ``update``, if no leaf is left out: a name that
            fits nothing is a mistake.
        TypeError: if ``where`` is none of these.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.excluding(clipx.clip_by_global_norm(1.0), "head")
        >>> grads = {"body": jnp.array([3.0, 4.0]), "head": jnp.array([10.0])}
        >>> grads, _ = clipper.update(grads, clipper.init(grads))
        >>> print(grads["body"], grads["head"])
        [0.6 0.8] [10.]

    References:
        Brock et al., 2021, arXiv 2102.06171, leave the final layer out.
        :func:`optax.masked` does the work.
    """
    check_transformation(clipper, "clipper")
    chosen = chooser(where)

    def mask(tree: Any) -> Any:
        with_keys, treedef = jax.tree_util.tree_flatten_with_path(tree)
        # A function may ask for what only arrays have: of other leaves it is not asked.
        kept = [
            (callable(where) and not hasattr(leaf, "shape"))
            or not chosen(path_of(keys), leaf)
            for keys, leaf in with_keys
        ]
        frozen = [callable(where) or chosen(path, None) for path in _nothing(tree)]
        if kept and all(kept) and not any(frozen):
            known = ", ".join(show(path_of(keys)) for keys, _ in with_keys[:20])
            raise ValueError(
                f"Expected where={where!r} to fit a leaf, it fits none of: {known}."
            )
        return jax.tree.unflatten(treedef, kept)

    masked = optax.masked(optax.with_extra_args_support(clipper), mask)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        check_state(state, optax.MaskedState)
        return masked.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(masked.init, update_fn)


def _nothing(tree: Any) -> list[Path]:
    """The places where there is None, or a leaf that another mask has taken."""

    def is_nothing(x: Any) -> bool:
        return x is None or isinstance(x, optax.MaskedNode)

    entries = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_nothing)
    return [path_of(keys) for keys, leaf in entries if is_nothing(leaf)]
