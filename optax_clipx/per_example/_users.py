"""Batches in which the examples of each user stand together."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, PyTree


def group_by_user(
    users: PyTree, batch: PyTree
) -> tuple[Any, Bool[np.ndarray, "users most"]]:
    r"""Puts the examples of each user together, so that they are clipped together.

    Runs on the host, with NumPy. Users come in the order of their sorted names. Who has
    fewer examples than others is filled up with copies of the first, for which the mask
    is false.

    Args:
        users: for each example whose it is; integers or strings.
        batch: a pytree of arrays with the examples along axis 0.

    Returns:
        The batch with a first axis of users and a second of their examples, and the
        mask of this shape, for a ``fun`` that adds up what the mask lets through.

    Raises:
        ValueError: if ``users`` and the batch differ in length.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> x = jnp.array([0.25, 5.0, 0.5])
        >>> grouped, mask = clipx.per_example.group_by_user(["ann", "bob", "ann"], x)
        >>> loss = lambda w, x, mask: jnp.sum(jnp.where(mask, w * x, 0))
        >>> grad_fn = clipx.per_example.clipped_grad(loss, 1.0, batch_argnums=(1, 2))
        >>> _, found = grad_fn(1.0, grouped, mask)
        >>> print(found.norms)
        [0.75 5.  ]

    References:
        McMahan et al., Learning differentially private recurrent language models, 2018,
        arXiv 1710.06963.
    """
    users = np.asarray(users)
    arrays = jax.tree.map(np.asarray, batch)
    lengths = {len(x) for x in jax.tree.leaves(arrays)}
    if users.ndim != 1 or lengths - {len(users)}:
        raise ValueError(
            f"Expected a user for each example, got users of shape {users.shape} and"
            f" examples of length {sorted(lengths)}."
        )
    _, owner, counts = np.unique(users, return_inverse=True, return_counts=True)
    order = np.argsort(owner, kind="stable")
    first = np.cumsum(counts) - counts
    column = np.arange(counts.max(initial=0))[None, :]
    mask = column < counts[:, None]
    index = order[first[:, None] + np.where(mask, column, 0)]
    return jax.tree.map(lambda x: x[index], arrays), mask
