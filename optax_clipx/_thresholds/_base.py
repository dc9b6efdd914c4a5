"""What a threshold rule is, and what it is told."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .._leaves import Path


class Context(NamedTuple):
    """What a rule may look at besides the norms.

    Attributes:
        step: the number of updates before this one, from 0.
        params_norms: the parameters' norms in the same groups, for rules that set
            ``uses_params``; otherwise ``None``.
        extra: the extra arguments of ``update``, such as ``loss`` or ``value``.
        paths: the path of each measured leaf.
        pack: makes the packed form from one value for each leaf.
        labels: the labels of the groups in their order, for labelled groups.

    Raises:
        Nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> context = clipx.Context(step=jnp.int32(3))
        >>> print(context.step)
        3

    References:
        In the image of the extra arguments of
        :class:`optax.GradientTransformationExtraArgs`.
    """

    step: Int[Array, "..."] | int
    params_norms: Any = None
    extra: Mapping[str, Any] = MappingProxyType({})
    paths: Sequence[Path] = ()
    pack: Callable[..., Any] | None = None
    labels: list[Any] | None = None


class Threshold(NamedTuple):
    """A threshold rule: a pair of pure functions, as in ``GradientTransformation``.

    Norms reach a rule packed: a scalar for the tree, one array for the groups (sorted
    by label) or the leaves (in flattening order), a tuple of arrays for units. A rule
    that works element by element with :func:`jax.tree.map` serves every scope. Norms
    are finite; on a non-finite step the rule's new state is thrown away.

    Attributes:
        init: ``init(norms) -> state``, with norms of zeros.
        update: ``update(norms, state, context) -> (limits, state)``; limits have the
            norms' form, or broadcast against it.
        uses_params: whether ``context.params_norms`` is wanted.
        uses_step: whether ``context.step`` is; without it and without state a clipper
            with ``metrics=False`` needs no state at all.

    Raises:
        Nothing.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> def twice_the_last():
        ...     def init(norms):
        ...         return jax.tree.map(lambda n: jnp.full_like(n, jnp.inf), norms)
        ...     def update(norms, state, context):
        ...         return state, jax.tree.map(lambda n: 2 * n, norms)
        ...     return clipx.Threshold(init, update)
        >>> clipper = clipx.clip_by(clipx.tree_norm(), twice_the_last())
        >>> state = clipper.init(jnp.zeros(1))
        >>> for norm in (1.0, 5.0):
        ...     clipped, state = clipper.update(jnp.array([norm]), state)
        ...     print(clipped)
        [1.]
        [2.]

    References:
        :class:`optax.GradientTransformation`.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Context], tuple[Any, Any]]
    uses_params: bool = False
    uses_step: bool = True


def stateless(limits: Callable[[Any, Context], Any], **options: Any) -> Threshold:
    """A rule that remembers nothing."""
    return Threshold(
        lambda norms: (),
        lambda norms, state, context: (limits(norms, context), state),
        **options,
    )


def is_pair(value: Any) -> bool:
    """Whether this is a rule, or a bare pair of its two functions."""
    return (
        isinstance(value, tuple) and len(value) >= 2 and all(map(callable, value[:2]))
    )


def like(limit: Any, norms: Any) -> Any:
    """One limit in the form of the norms, in their dtype."""
    return jax.tree.map(
        lambda n: jnp.broadcast_to(jnp.asarray(limit).astype(n.dtype), n.shape), norms
    )
