"""Every public transformation, for the suites that run over all of them."""

import functools

import jax.numpy as jnp

import optax_clipx as clipx


def by_path(path, leaf):
    """A label for each leaf, for trees of any structure."""
    return "even" if len("".join(path)) % 2 == 0 else "odd"


NORM_METHODS = {
    "clip_by_leaf_norm": clipx.clip_by_leaf_norm,
    "clip_by_leaf_norm_batched": functools.partial(
        clipx.clip_by_leaf_norm, batch_axes=lambda path, leaf: 0 if leaf.ndim else None
    ),
    "clip_by_leaf_norm_inf": functools.partial(clipx.clip_by_leaf_norm, ord=jnp.inf),
    "clip_by_block_rms": clipx.clip_by_block_rms,
    "clip_by_global_norm": clipx.clip_by_global_norm,
    "clip_by_global_norm_1": functools.partial(clipx.clip_by_global_norm, ord=1),
    "clip_by_global_norm_3": functools.partial(clipx.clip_by_global_norm, ord=3),
    "clip_by_group_norm": lambda limit, **options: clipx.clip_by_group_norm(
        {"even": limit, "odd": limit}, by_path, **options
    ),
    "unit_norms": lambda limit, **options: clipx.clip_by(
        clipx.unit_norms(), limit, **options
    ),
}
ELEMENT_METHODS = {
    "clip": clipx.clip,
    "clip_by_value": lambda limit, **options: clipx.clip_by_value(
        -limit, limit, **options
    ),
}
RESPONSES = {
    f"tree_{response.__name__}": functools.partial(
        lambda limit, response, **options: clipx.clip_by(
            clipx.tree_norm(), limit, response, **options
        ),
        response=response,
    )
    for response in (clipx.normalize, clipx.smooth, clipx.drop)
}
RELATIVE_METHODS = {"adaptive_grad_clip": clipx.adaptive_grad_clip}
ALL_METHODS = {**NORM_METHODS, **ELEMENT_METHODS, **RESPONSES, **RELATIVE_METHODS}
