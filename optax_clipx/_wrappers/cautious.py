"""`cautious`: only the entries of an update that descend are applied."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from .._clipping.metrics import CautiousState
from .._clipping.transformation import check_state
from .._clipping.uncalled import check_transformation
from .._devices import mesh
from .._reductions.norms import norms
from .._reductions.plan import make_plan, of_leaves
from .._trees.arguments import AxisNames, Specs, check_between
from .._trees.arithmetic import widened
from .._trees.leaves import flatten
from .._trees.types import Scalar


def cautious(
    inner: optax.GradientTransformation,
    *,
    max_factor: Scalar = 2.0,
    axis_name: AxisNames = None,
    specs: Specs = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Applies only the entries of an update that descend along the gradient.

    .. math:: \varphi_j = 1[u_j g_j < 0], \qquad
              u \leftarrow \varphi\, u\,
              \min\left(\frac{n}{\sum_j \varphi_j + 1},\, c\right)

    Here :math:`u` is the update of a leaf, which optax adds to the parameters,
    :math:`g` its gradient, :math:`n` the number of its entries and :math:`c` is
    ``max_factor``. An entry descends if its update and its gradient have opposite
    signs; with momentum, some entries do not. These become zero, and the factor
    enlarges the others to compensate.

    Wrap the complete optimizer with its learning rate, such as ``optax.adam(1e-3)``.
    The updates of ``optax.scale_by_adam()`` alone point along the gradient, and all of
    them would become zero.

    An entry whose gradient is exactly 0 is not updated, so neither are the embeddings
    of tokens that the batch does not have. The weight decay of ``optax.adamw`` is a
    part of the update and is masked with it; to keep it out, put
    ``optax.add_decayed_weights(-learning_rate * decay)`` after ``cautious``.

    :func:`metrics` has ``"cautious/descending"``, the fraction of all entries that
    descend, and ``"cautious/factor"``, the largest factor of a leaf.

    Args:
        inner: the optimizer. It sees the whole gradient, and its state is that of a run
            without ``cautious``.
        max_factor: :math:`c`, at least 1. Without a cap the factor would be up to
            :math:`n` where few entries descend, and ``float("inf")`` is the formula of
            the paper. For a leaf of one entry the formula gives 1/2.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.

    Returns:
        A transformation. Entries of an update that are not finite stay as they are. Of
        complex leaves an entry descends if the real part of :math:`\bar g_j u_j` is
        negative, for gradients that are conjugated as optax expects them.

    Raises:
        ValueError: if ``max_factor`` is less than 1, from ``update`` if ``inner``
            changes the shape of a leaf, and as :func:`clip_by`.
        TypeError: if ``inner`` is no transformation, and from ``update`` as
            :func:`clip_by`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_clipx as clipx
        >>> tx = clipx.cautious(optax.sgd(1.0, momentum=0.5))
        >>> params = jnp.zeros(4)
        >>> state = tx.init(params)
        >>> for gradient in ([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, -0.25]):
        ...     updates, state = tx.update(jnp.array(gradient), state, params)
        ...     print(updates)
        [-0.8 -0.8 -0.8 -0.8]
        [-1.5 -1.5 -1.5  0. ]

    References:
        Liang et al., Cautious optimizers: Improving training with one line of code,
        2024, arXiv 2411.16085; the cap is ours.
    """
    check_transformation(inner, "inner")
    check_between(max_factor, "max_factor", 1, float("inf"))
    wrapped = optax.with_extra_args_support(inner)

    def init_fn(params: PyTree) -> CautiousState:
        leaves = flatten(params, updates=False)
        with mesh.mesh_of(leaves.arrays, auto=True):
            return CautiousState(
                descending=jnp.zeros((), jnp.float32),
                factor=jnp.ones((), jnp.float32),
                inner=inner.init(params),
            )

    def update_fn(
        updates: PyTree, state: CautiousState, params: PyTree = None, **extra: PyTree
    ) -> tuple[Any, CautiousState]:
        check_state(state, CautiousState)
        given = flatten(updates)
        updates, after = wrapped.update(updates, state.inner, params, **extra)
        leaves = flatten(updates)
        _check_shapes(leaves.arrays, given.arrays)
        if not leaves.arrays:
            return updates, state._replace(inner=after)
        with mesh.mesh_of(leaves.arrays):
            groups = of_leaves(len(leaves.arrays))
            plan = make_plan(leaves, groups, 2.0, axis_name, specs)
            trees = [leaves.arrays, given.arrays]
            (found,) = norms(plan, trees, _which_descend, counted=(True,))
            counts = jnp.round(jnp.square(found.value))
            sizes = jnp.asarray(plan.sizes(leaves.arrays), counts.dtype)
            most = jnp.asarray(max_factor, counts.dtype)
            factors = jnp.minimum(sizes / (counts + 1), most)
            each = zip(leaves.arrays, given.arrays, groups.spread(factors), strict=True)
            moved = [_masked(u, g, factor) for u, g, factor in each]
            new_state = CautiousState(
                (jnp.sum(counts) / jnp.sum(sizes)).astype(jnp.float32),
                jnp.max(factors).astype(jnp.float32),
                after,
            )
        return leaves.rebuild(moved), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_shapes(after: list[jax.Array], before: list[jax.Array]) -> None:
    want, got = ([jnp.shape(x) for x in some] for some in (before, after))
    if want != got:
        raise ValueError(
            "Expected inner to return updates in the shapes of the gradients,"
            f" {want}, got {got}."
        )


def _which_descend(trees: PyTree, extras: PyTree) -> list[list[jax.Array]]:
    """Ones for the entries that descend, and zeros for the others."""
    pairs = zip(*trees, strict=True)
    return [[_descends(u, g).astype(jnp.float32) for u, g in pairs]]


def _descends(u: jax.Array, g: jax.Array) -> jax.Array:
    """Whether each entry of an update lowers the loss to first order."""
    if jnp.iscomplexobj(u) or jnp.iscomplexobj(g):
        (a, b), (c, d) = _parts(u), _parts(g)
        return a * c + b * d < 0
    # By signs: the product of small numbers would be zero.
    return ((u < 0) & (g > 0)) | ((u > 0) & (g < 0))


def _parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Real and imaginary part, relative to the larger of the two."""
    size = jnp.maximum(jnp.abs(x.real), jnp.abs(x.imag))
    size = jnp.where(size > 0, size, 1)
    return x.real / size, x.imag / size


def _masked(u: jax.Array, g: jax.Array, factor: jax.Array) -> jax.Array:
    wide = widened(u, factor.dtype)
    scaled = (u.astype(wide) * factor.astype(wide)).astype(u.dtype)
    kept = _descends(u, g) | ~jnp.isfinite(u)
    return jnp.where(kept, scaled, 0)
