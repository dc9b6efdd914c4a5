"""Norms in the place of norms: Stable-SPAM's stabilizer."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from .._clipping import policies, scaling
from .._clipping.entries import (
    NO_RULE,
    any_of,
    finish,
    mean_of,
    refuse_complex,
    root_of_mean,
    weight_of,
)
from .._clipping.metrics import to_float32
from .._clipping.responses import normalize
from .._clipping.summary import Summary
from .._clipping.transformation import (
    Given,
    Memory,
    Options,
    check_memory,
    transformation,
)
from .._reductions.norms import norms
from .._reductions.plan import make_plan, of_leaves
from .._reductions.whole_norm import whole_norm
from .._trees.arguments import (
    AxisNames,
    Specs,
    check_between,
    check_decay,
    out_of_range,
)
from .._trees.arithmetic import at_least_float32
from .._trees.calls import explains_calls
from .._trees.leaves import Leaves
from .._trees.types import Arrays, Scalar


class StabilizerMemory(NamedTuple):
    """Three averages of each leaf, and how many of its norms were above 0."""

    peak: jax.Array
    mean: jax.Array
    root: jax.Array
    seen: jax.Array


@explains_calls
def stabilize_norm(
    b1: Scalar = 0.7,
    b2: Scalar = 0.9,
    b3: Scalar = 0.999,
    *,
    eps: Scalar = 1e-8,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each leaf's norm by a smoothed one (AdaClip and AdaGN).

    First the largest entries are reduced to a moving average :math:`T` of the largest,

    .. math:: T = \mathrm{EMA}_{\beta_3}(\max_j |g_j|), \qquad
              g_j \leftarrow g_j\, T / \max_j |g_j| \;\text{ where } |g_j| > T,

    and then the norm :math:`n = \|g\|` is replaced,

    .. math:: u = \frac{g}{n} \cdot
              \frac{\mathrm{EMA}_{\beta_1}(n)}
                   {\sqrt{\mathrm{EMA}_{\beta_2}(n^2)} + \epsilon},

    so that it is near 1 for gradients of any scale. All averages are debiased and
    include the current step. A spike enters them without clipping, so the updates of
    the next few steps are small. Put it before an optimizer such as
    :func:`optax.scale_by_adam`. The state has three numbers for each leaf, and a count
    of steps, which is not reset with the moments.

    Args:
        b1: :math:`\beta_1`, from 0 to below 1.
        b2: :math:`\beta_2`, from 0 to below 1.
        b3: :math:`\beta_3`, from 0 to below 1.
        eps: :math:`\epsilon`, on the scale of the updates.
        nonfinite: as in :func:`clip_by`; on such a step the averages stay as they are.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`; ``threshold`` and
            ``scale`` are :math:`T` and :math:`T / \max_j |g_j|` of the leaf that was
            cut most.

    Returns:
        A transformation.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: from ``update`` as :func:`clip_by`, and for complex leaves.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> stabilizer = clipx.stabilize_norm(eps=0.0)
        >>> state = stabilizer.init(jnp.zeros(2))
        >>> updates, state = stabilizer.update(jnp.array([0.0, 3e-6]), state)
        >>> print(jnp.round(updates, 4))
        [0. 1.]

    References:
        Huang et al., Stable-SPAM: How to train in 4-bit more stably than 16-bit Adam,
        2025, arXiv 2502.17055.
    """
    for name, decay in (("b1", b1), ("b2", b2), ("b3", b3)):
        check_decay(decay, name)
    check_between(eps, "eps", 0, float("inf"))
    options = Options(nonfinite, axis_name, specs, metrics)

    def init(leaves: Leaves) -> StabilizerMemory:
        count = len(leaves.arrays)
        return StabilizerMemory(*(jnp.zeros((count,), jnp.float32) for _ in range(4)))

    def step(given: Given) -> tuple[list[Any], Memory]:
        leaves, memory, state = given.leaves, given.memory, given.memory.rule
        refuse_complex(leaves)
        arrays = policies.as_given(leaves.arrays, options)
        _check_state(state, len(arrays))
        every = of_leaves(len(arrays))
        plan = make_plan(leaves, every, 2.0, options.axis_name, options.specs)
        (largest,) = norms(replace(plan, ord=float("inf")), [arrays])
        peak = largest.value
        peaks, means, roots, counts = state
        seen = peak > 0  # a leaf of zeros says nothing
        narrow = to_float32(peak)
        counts = jnp.where(seen, counts + 1, counts)
        peaks = jnp.where(seen, mean_of(peaks, narrow, b3), peaks)
        largest_number = jnp.finfo(jnp.float32).max
        limit = jnp.minimum(peaks / weight_of(b3, counts), largest_number)
        limit = limit.astype(peak.dtype)
        ratio = jnp.where(peak > limit, limit / jnp.where(seen, peak, 1), 1)
        pairs = list(zip(limit, ratio, strict=True))
        raw, cut, bad = norms(
            *(plan, [arrays, leaves.arrays], _raw_and_cut, pairs),
            counted=(False, False, True),
        )
        norm = to_float32(cut.value)
        means = jnp.where(seen, mean_of(means, norm, b1), means)
        roots = jnp.where(seen, root_of_mean(roots, norm, b2, 2.0), roots)
        # Not debiased one by one: each could pass the largest number.
        debias = jnp.sqrt(weight_of(b2, counts))
        usual = roots + jnp.asarray(eps, jnp.float32) * debias
        target = (means / jnp.where(usual > 0, usual, 1)) * (
            debias / weight_of(b1, counts)
        )
        scales = scaling.scales(cut, target.astype(peak.dtype), normalize)
        clamped = _cut(arrays, pairs)
        out = scaling.scaled(clamped, every, scales)
        worst = jnp.argmin(ratio)
        over = ratio < 1
        summary = Summary(
            norm=whole_norm(raw.value),
            clipped_norm=whole_norm(jnp.where(seen, target, 0)),
            scale=ratio[worst],
            threshold=limit[worst],
            clipped=jnp.mean(over.astype(peak.dtype)),
            any_clipped=jnp.any(over),
            nonfinite=any_of(bad.value),
            unusable=jnp.asarray(out_of_range(b1, b2, b3)),
        )
        new = StabilizerMemory(peaks, means, roots, counts)
        memory = memory.with_rule(summary.nonfinite, new)
        return finish(leaves, out, summary, memory, options)

    return transformation(init, step, NO_RULE, options)


def _check_state(state: PyTree, leaves: int) -> None:
    check_memory(state, StabilizerMemory)
    if state.peak.shape != (leaves,):
        raise ValueError(
            f"Expected the {len(state.peak)} leaves that init saw, got {leaves}."
            " Leave frozen ones out with optax_clipx.excluding or optax.masked."
        )


def _raw_and_cut(trees: PyTree, extras: PyTree) -> Any:
    """The leaves, the leaves cut, and where they are not finite."""
    arrays, raw = trees
    return [arrays, _cut(arrays, extras), policies.where_nonfinite(raw)]


def _cut(arrays: Arrays, extras: PyTree) -> list[jax.Array]:
    """The leaves, with entries above their threshold reduced to it."""
    cut = []
    for x, (limit, ratio) in zip(arrays, extras, strict=True):
        wide = x.astype(at_least_float32(x))
        over = jnp.abs(wide) > limit.astype(wide.dtype)
        cut.append(jnp.where(over, wide * ratio.astype(wide.dtype), wide))
    return cut
