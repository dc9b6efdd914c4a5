"""Adam whose steps have a limited RMS."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from .._clipping import policies
from .._clipping.entries import (
    NO_RULE,
    any_of,
    finish,
    mean_of,
    moments_in,
    rebuild,
    refuse_complex,
    root_of_mean,
    shares_of,
    weight_of,
    zeros_like,
)
from .._clipping.metrics import count as advanced
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
from .._trees.arguments import (
    AxisNames,
    Limit,
    Schedule,
    Specs,
    check_between,
    check_decay,
    out_of_range,
)
from .._trees.calls import explains_calls
from .._trees.leaves import Leaves
from .._trees.types import Scalar


class StableAdamMemory(NamedTuple):
    """Debiased: each entry's average, the root of that of its square, and how many."""

    mu: Any
    root: Any
    seen: jax.Array


@explains_calls
def scale_by_stable_adam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    *,
    eps: Scalar = 1e-6,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with update clipping, which limits the RMS of each leaf's step (Adafactor).

    .. math:: u = \frac{1}{\max(1, \rho)} \cdot \frac{m}{\sqrt{v} + \epsilon}, \qquad
              \rho = \sqrt{\operatorname{mean}
                     \bigl(g^2 / \max(v, \epsilon^2)\bigr)}

    with the debiased averages :math:`m` and :math:`v` of :math:`g` and :math:`g^2`,
    which include the current step. :math:`\rho` is near 1 while the second moment
    :math:`v` fits the gradients, and rises before a spike of the loss. The metrics show
    it.

    Use it instead of :func:`optax.scale_by_adam`. The state has two numbers for each
    entry, in trees like the parameters, and a count of finite steps.

    Args:
        b1: the decay of :math:`m`, from 0 to below 1.
        b2: the decay of :math:`v`, from 0 to below 1.
        eps: :math:`\epsilon`, on the scale of the updates.
        nonfinite: as in :func:`clip_by`; on such a step the moments stay as they are.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`: ``norm`` is the largest
            :math:`\rho` of any leaf, ``threshold`` 1, ``scale`` what its step was
            multiplied by, ``clipped`` the fraction of leaves above 1.

    Returns:
        A transformation.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: from ``update`` as :func:`clip_by`, and for complex leaves.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> optimizer = clipx.scale_by_stable_adam(eps=0.0)
        >>> updates, _ = optimizer.update(jnp.array([0.1]), optimizer.init(jnp.ones(1)))
        >>> print(updates)
        [1.]

    References:
        Wortsman et al., Stable and low-precision training for large-scale
        vision-language models, 2023, arXiv 2304.13013 (StableAdamW).
    """
    check_decay(b1, "b1")
    check_decay(b2, "b2")
    check_between(eps, "eps", 0, float("inf"))
    options = Options(nonfinite, axis_name, specs, metrics)

    def step(given: Given) -> tuple[list[Any], Memory]:
        leaves, memory = given.leaves, given.memory
        refuse_complex(leaves)
        state = memory.rule
        arrays = [jnp.asarray(x) for x in leaves.arrays]
        sanitized = options.nonfinite == "sanitize"
        if sanitized:
            arrays = policies.sanitize(arrays)
        check_memory(state, StableAdamMemory)
        each = len(arrays)
        means, roots = moments_in(state.mu, leaves), moments_in(state.root, leaves)
        steps = state.seen
        now_b1, now_b2 = _decay_at(b1, steps + 1), _decay_at(b2, steps + 1)
        floors = [jnp.asarray(eps, jnp.float32).astype(r.dtype) for r in roots]
        pairs = list(zip(roots, floors, strict=True))
        every = of_leaves(each)
        plan = make_plan(leaves, every, "rms", options.axis_name, options.specs)
        found, *flags = norms(
            plan,
            [leaves.arrays, roots],
            _Ratios(sanitized),
            [(shares_of(now_b2, r.dtype), f) for r, f in pairs],
            (False,) + (True,) * sanitized,
        )
        rms = found.value
        bad = any_of(flags[0].value) if flags else jnp.any(~jnp.isfinite(rms))
        scale = 1 / jnp.maximum(rms, 1)
        moved = [
            mean_of(m, x.astype(m.dtype), now_b1)
            for m, x in zip(means, arrays, strict=True)
        ] + [
            root_of_mean(r, jnp.abs(x.astype(r.dtype)), now_b2, 2.0)
            for r, x in zip(roots, arrays, strict=True)
        ]
        # First chosen and then used: the new moments can be written in place.
        kept = [jnp.where(bad, m, n) for m, n in zip(means + roots, moved, strict=True)]
        used = moved if options.nonfinite == "sanitize" else kept
        out = []
        for i, s in enumerate(every.spread(scale)):
            m, size = used[i], used[each + i] + floors[i]
            out.append(s.astype(m.dtype) * (m / jnp.where(size > 0, size, 1)))
        over = rms > 1
        top = jnp.max(rms)
        summary = Summary(
            norm=top,
            clipped_norm=jnp.minimum(top, 1),
            scale=1 / jnp.maximum(top, 1),
            threshold=jnp.ones_like(top),
            clipped=jnp.mean(over.astype(rms.dtype)),
            any_clipped=jnp.any(over),
            nonfinite=bad,
            unusable=jnp.asarray(out_of_range(b1, b2)),
        )
        new = StableAdamMemory(
            rebuild(state.mu, kept[:each]),
            rebuild(state.root, kept[each:]),
            jnp.where(bad, steps, advanced(steps, True)),
        )
        return finish(leaves, out, summary, memory._replace(rule=new), options)

    def init(leaves: Leaves) -> StableAdamMemory:
        seen = jnp.zeros((), jnp.int32)
        return StableAdamMemory(zeros_like(leaves), zeros_like(leaves), seen)

    return transformation(init, step, NO_RULE, options)


@explains_calls
def stable_adamw(
    learning_rate: Limit,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    *,
    eps: Scalar = 1e-6,
    weight_decay: Scalar | Schedule = 1e-2,
    mask: PyTree = None,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW with update clipping, which limits the RMS of each leaf's step.

    .. math:: \theta \leftarrow \theta - \eta \Bigl(u + \lambda \theta\Bigr)

    with :math:`u` of :func:`scale_by_stable_adam`.

    Args:
        learning_rate: :math:`\eta`, a number or a schedule.
        b1: as in :func:`scale_by_stable_adam`.
        b2: as in :func:`scale_by_stable_adam`.
        eps: as in :func:`scale_by_stable_adam`.
        weight_decay: :math:`\lambda`.
        mask: which leaves decay, as in :func:`optax.adamw`.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: as in :func:`scale_by_stable_adam`.

    Returns:
        An optimizer.

    Raises:
        ValueError: if a number is out of its range, and from ``update`` without
            ``params``.
        TypeError: from ``update`` as :func:`clip_by`, and for complex leaves.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> optimizer = clipx.stable_adamw(0.1, eps=0.0, weight_decay=0.0)
        >>> params = jnp.ones(1)
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> print(updates)
        [-0.1]

    References:
        Wortsman et al., 2023, arXiv 2304.13013.
    """
    return optax.chain(
        scale_by_stable_adam(
            b1,
            b2,
            eps=eps,
            nonfinite=nonfinite,
            axis_name=axis_name,
            specs=specs,
            metrics=metrics,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


@dataclass(frozen=True)
class _Ratios:
    """The leaves over the roots of their second moments, this step included."""

    sanitized: bool

    def __call__(self, trees: PyTree, extras: PyTree) -> Any:
        raw, roots = trees
        arrays = policies.sanitize(raw) if self.sanitized else raw
        ratios = []
        for x, root, (shares, floor) in zip(arrays, roots, extras, strict=True):
            wide = x.astype(root.dtype)
            root = root_of_mean(root, jnp.abs(wide), shares, 2.0)
            size = jnp.maximum(root, floor)
            zero = size == 0  # not for NaN, which the norms must show
            ratios.append(jnp.where(zero, 0, wide / jnp.where(zero, 1, size)))
        return [ratios, policies.where_nonfinite(raw)] if self.sanitized else [ratios]


def _decay_at(decay: Scalar, step: jax.Array) -> Any:
    """The decay that keeps an average debiased: b (1 - b^(t-1)) / (1 - b^t)."""
    share = jnp.asarray(1 - decay, jnp.float32) / weight_of(decay, step)
    return 1 - jnp.minimum(share, 1)
