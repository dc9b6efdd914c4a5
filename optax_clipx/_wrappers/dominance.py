"""Which leaf makes up most of the gradient, and what that costs the others."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._clipping.metrics import ClipMetrics, tracked_norms
from .._reductions.norms import Norms
from .._trees.leaves import Leaves, flatten

STARVED = 10.0  # how many times smaller a step is than clipping by leaves would give


def dominant_leaf(opt_state: PyTree) -> tuple[str, float]:
    r"""Names the leaf with the largest gradient norm, and its share of the norm.

    .. math:: \text{share} = \max_i n_i^2 \Big/ \sum_j n_j^2

    Args:
        opt_state: the state of an optimizer with :func:`track_norms` around it.

    Returns:
        The name of the leaf, label or layer with the largest norm in the last step, and
        its share of the squared norm of the whole gradient. The name is ``<name>`` in
        ``"track_norms/<name>"``. If a norm is infinite or NaN, the function returns the
        name of this leaf and the share NaN.

    Raises:
        ValueError: if the state contains no :func:`track_norms`, or if it is the state
            of several models.
        jax.errors.TracerArrayConversionError: if you call it inside of ``jit``, because
            a jitted function cannot return a name.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_clipx as clipx
        >>> tx = clipx.track_norms(optax.sgd(0.1))
        >>> grads = {"w": jnp.array([3.0]), "b": jnp.array([1.0])}
        >>> _, state = tx.update(grads, tx.init(grads))
        >>> name, share = clipx.dominant_leaf(state)
        >>> print(name, f"{share:.2f}")
        w 0.90

    References:
        Megatron-LM reports the largest share beside the gradient norm.
    """
    norms = tracked_norms(opt_state)
    if not norms:
        raise ValueError("Expected norms of leaves in the state, got none.")
    values = {name: np.asarray(x, np.float64) for name, x in norms.items()}
    shapes = {x.shape for x in values.values()}
    if shapes != {()}:
        raise ValueError(
            f"Expected the state of one model, got norms of shapes {sorted(shapes)}."
            " Pass that of one: jax.tree.map(lambda x: x[0], opt_state)."
        )
    # NaN is no number to compare, and an infinity leaves nothing of the others.
    name = max(values, key=lambda n: np.where(np.isnan(values[n]), np.inf, values[n]))
    largest = float(values[name])
    if largest == 0 or not np.isfinite(largest):
        return name, 0.0 if largest == 0 else float("nan")
    return name, 1.0 / sum(float(x / largest) ** 2 for x in values.values())


def largest_share(norms: Norms) -> jax.Array:
    """The share of the largest of all groups in the sum of squares."""
    return _share(norms, jnp.max)


def share_of(some: PyTree, norms: Norms) -> jax.Array:
    """The share of some groups in the sum of squares."""
    return _share(norms, lambda x: jnp.sum(jnp.where(jnp.asarray(some), x, 0)))


def _share(norms: Norms, part: Callable[[jax.Array], jax.Array]) -> jax.Array:
    # In the largest unit: what is lost beside it is below its rounding.
    squares = jnp.square(norms.root * (norms.unit / jnp.max(norms.unit)))
    total = jnp.sum(squares)
    return jnp.where(total == 0, 0, part(squares) / jnp.where(total == 0, 1, total))


def handled_by_muon(state: PyTree, leaves: Leaves) -> list[bool]:
    """Which leaves an optax.contrib.muon in an optimizer's state orthogonalizes."""
    nodes = jax.tree.leaves(state, is_leaf=_is_muon)
    moments = [flatten(node.mu, updates=False) for node in nodes if _is_muon(node)]
    paths = {path for each in moments for path in each.paths}
    return [path in paths for path in leaves.paths]


def _is_muon(node: PyTree) -> bool:
    fields = getattr(node, "_fields", ())
    return isinstance(node, tuple) and {"mu", "ns_coeffs"} <= set(fields)


def starved_share(
    norms: jax.Array, whole: jax.Array, clipper: ClipMetrics
) -> jax.Array:
    """The share of the other groups to which one norm for all gives small steps.

    A group of norm n goes through a clipper of its own times min(1, t/n), and through
    that of the whole tree, of norm N, times min(1, t/N). The first is the larger by
    max(N, t) / max(n, t). NaN where the clipper did not see these gradients, and so has
    a threshold for something else.
    """
    limit = jnp.asarray(clipper.threshold, norms.dtype)
    small = jnp.maximum(whole, limit) / STARVED > jnp.maximum(norms, limit)
    # A gradient of zero needs no clipper to stay where it is.
    small &= (norms > 0) & (limit > 0)
    others = jnp.arange(norms.size) != jnp.argmax(norms)
    share = jnp.sum((small & others).astype(norms.dtype)) / max(norms.size - 1, 1)
    return jnp.where(saw(whole, clipper), share, jnp.nan)


def saw(whole: jax.Array, clipper: ClipMetrics) -> jax.Array:
    """Whether the clipper measured a gradient of this norm, in this step."""
    found = jnp.asarray(clipper.norm, whole.dtype)
    close = jnp.abs(found - whole) <= 1e-4 * whole
    return close & jnp.isfinite(whole)
