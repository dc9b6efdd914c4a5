"""Norms in the place of norms: Stable-SPAM's stabilizer, and Adam with limited RMS."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import _policies, _scaling
from ._entries import (
    NO_RULE,
    any_of,
    at_least_float32,
    check_leaves,
    finish,
    mean_of,
    refuse_complex,
    root_of_mean,
    shares_of,
    weight_of,
    zeros_like,
)
from ._grouping import ScalarGroups
from ._leaves import Leaves
from ._metrics import count as advanced, to_float32
from ._reductions import norms
from ._responses import normalize
from ._summary import Summary
from ._thresholds._base import check_between, check_decay
from ._transformation import Options, Step, transformation
from ._whole_norm import whole_norm


def stabilize_norm(
    b1: Any = 0.7,
    b2: Any = 0.9,
    b3: Any = 0.999,
    *,
    eps: Any = 1e-8,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    specs: Any = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each leaf's norm by a smoothed one (AdaClip and AdaGN).

    First the largest entries come down to a limit that follows them,

    .. math:: T = \mathrm{EMA}_{\beta_3}(\max_j |g_j|), \qquad
              g_j \leftarrow g_j\, T / \max_j |g_j| \;\text{ where } |g_j| > T,

    and then the norm :math:`n = \|g\|` is replaced,

    .. math:: u = \frac{g}{n} \cdot
              \frac{\mathrm{EMA}_{\beta_1}(n)}
                   {\sqrt{\mathrm{EMA}_{\beta_2}(n^2)} + \epsilon},

    so that it is near 1 whatever the gradient's scale. All averages are debiased and
    hold the current step. A spike passes into them as it is: :math:`n` of the next few
    steps is small beside it. Put it before an optimizer such as
    :func:`optax.scale_by_adam`. State: three numbers for each leaf and a count of its
    own, which no reset of moments touches.

    Args:
        b1: :math:`\beta_1`, from 0 to below 1.
        b2: :math:`\beta_2`, from 0 to below 1.
        b3: :math:`\beta_3`, from 0 to below 1.
        eps: :math:`\epsilon`, in the unit of the updates.
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

    def init(leaves: Leaves) -> Any:
        count = len(leaves.arrays)
        return [jnp.zeros((count,), jnp.float32) for _ in range(4)]

    def step(
        leaves: Leaves, params: Any, state: Any, count: Any, extra: Mapping[str, Any]
    ) -> Step:
        refuse_complex(leaves)
        arrays = [jnp.asarray(x) for x in leaves.arrays]
        if options.nonfinite == "sanitize":
            arrays = _policies.sanitize(arrays)
        if state[0].shape != (len(arrays),):
            raise ValueError(
                f"Expected the {len(state[0])} leaves that init saw, got {len(arrays)}."
                " Leave frozen ones out with optax_clipx.excluding or optax.masked."
            )
        every = ScalarGroups(tuple(range(len(arrays))), len(arrays))
        where = (leaves.paths, options.axis_name, options.specs)
        (largest,) = norms([arrays], every, float("inf"), *where)
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
        raw, cut, bad = norms(
            [arrays, leaves.arrays],
            every,
            2.0,
            *where,
            derive=_raw_and_cut,
            extras=list(zip(limit, ratio, strict=True)),
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
        scales = _scaling.scales(cut, target.astype(peak.dtype), normalize)
        clamped = _cut(arrays, zip(limit, ratio, strict=True))
        out = _scaling.apply(clamped, every, scales, None)
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
            unusable=jnp.zeros((), jnp.bool_),
        )
        return finish(leaves, out, summary, [peaks, means, roots, counts], options)

    return transformation(init, step, NO_RULE, options)


def scale_by_stable_adam(
    b1: Any = 0.9,
    b2: Any = 0.99,
    *,
    eps: Any = 1e-6,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    specs: Any = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam whose step each leaf's RMS limits: update clipping as in Adafactor.

    .. math:: u = \frac{1}{\max(1, \rho)} \cdot \frac{m}{\sqrt{v} + \epsilon}, \qquad
              \rho = \sqrt{\operatorname{mean}
                     \bigl(g^2 / \max(v, \epsilon^2)\bigr)}

    with the debiased averages :math:`m, v` of :math:`g` and :math:`g^2`, the current
    step included. :math:`\rho` is near 1 while the second moment fits the gradients; it
    rises before a loss spike, and is what the metrics show.

    In the place of :func:`optax.scale_by_adam`. State: two numbers for each entry.

    Args:
        b1: the decay of :math:`m`, from 0 to below 1.
        b2: the decay of :math:`v`, from 0 to below 1.
        eps: :math:`\epsilon`, in the unit of the updates.
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

    def step(
        leaves: Leaves, params: Any, state: Any, count: Any, extra: Mapping[str, Any]
    ) -> Step:
        refuse_complex(leaves)
        arrays = [jnp.asarray(x) for x in leaves.arrays]
        if options.nonfinite == "sanitize":
            arrays = _policies.sanitize(arrays)
        each = len(arrays)
        moments, steps = state
        check_leaves(leaves, moments, 2)
        now_b1, now_b2 = _decay_at(b1, steps + 1), _decay_at(b2, steps + 1)
        means, roots = moments[:each], moments[each:]
        floors = [jnp.asarray(eps, jnp.float32).astype(r.dtype) for r in roots]
        pairs = list(zip(roots, floors, strict=True))
        every = ScalarGroups(tuple(range(each)), each)
        found, *flags = norms(
            [leaves.arrays, roots],
            every,
            "rms",
            leaves.paths,
            options.axis_name,
            options.specs,
            derive=_Ratios(options.nonfinite == "sanitize"),
            extras=[(shares_of(now_b2, r.dtype), f) for r, f in pairs],
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
        # First chosen and then used: XLA can write the new moments in place.
        kept = [jnp.where(bad, m, n) for m, n in zip(moments, moved, strict=True)]
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
            unusable=jnp.zeros((), jnp.bool_),
        )
        new = (kept, jnp.where(bad, steps, advanced(steps, True)))
        return finish(leaves, out, summary, new, options)._replace(settled=True)

    def init(leaves: Leaves) -> Any:
        return zeros_like(leaves, 2), jnp.zeros((), jnp.int32)

    return transformation(init, step, NO_RULE, options)


def stable_adamw(
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.99,
    *,
    eps: Any = 1e-6,
    weight_decay: Any = 1e-2,
    mask: Any = None,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    specs: Any = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW whose step each leaf's RMS limits.

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

    def __call__(self, trees: Any, extras: Any) -> Any:
        raw, roots = trees
        arrays = _policies.sanitize(raw) if self.sanitized else raw
        ratios = []
        for x, root, (shares, floor) in zip(arrays, roots, extras, strict=True):
            wide = x.astype(root.dtype)
            root = root_of_mean(root, jnp.abs(wide), shares, 2.0)
            size = jnp.maximum(root, floor)
            zero = size == 0  # not for NaN, which the norms must show
            ratios.append(jnp.where(zero, 0, wide / jnp.where(zero, 1, size)))
        return [ratios, _policies.where_nonfinite(raw)] if self.sanitized else [ratios]


def _raw_and_cut(trees: Any, extras: Any) -> Any:
    """The leaves, the leaves cut, and where they are not finite."""
    arrays, raw = trees
    return [arrays, _cut(arrays, extras), _policies.where_nonfinite(raw)]


def _cut(arrays: Any, extras: Any) -> list[jax.Array]:
    """The leaves with what is above its limit brought down."""
    cut = []
    for x, (limit, ratio) in zip(arrays, extras, strict=True):
        wide = x.astype(at_least_float32(x))
        over = jnp.abs(wide) > limit.astype(wide.dtype)
        cut.append(jnp.where(over, wide * ratio.astype(wide.dtype), wide))
    return cut


def _decay_at(decay: Any, step: Any) -> Any:
    """The decay that keeps an average debiased: b (1 - b^(t-1)) / (1 - b^t)."""
    share = jnp.asarray(1 - decay, jnp.float32) / weight_of(decay, step)
    return 1 - jnp.minimum(share, 1)
