"""Thresholds in proportion to a moving average of the norms, or to the last one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._reductions.groups import Packed
from .._reductions.whole_norm import whole_norm
from .._trees.arguments import (
    Limit,
    check_between,
    check_choice,
    check_count,
    check_decay,
    out_of_range,
)
from .._trees.arithmetic import where
from .._trees.types import Scalar
from .base import (
    Context,
    Threshold,
    float32,
    memory,
    one_more,
    per_norm,
    refusals,
    unless,
)

INITS = ("min", "mean", "first")


class EmaRatioState(NamedTuple):
    """The average, and how many norms it has seen."""

    seen: jax.Array
    average: jax.Array
    refused: jax.Array


class LastState(NamedTuple):
    """The last norm; 0 before the first."""

    last: jax.Array
    refused: jax.Array


class BandState(NamedTuple):
    """The average; 0 before the first norm."""

    average: jax.Array
    refused: jax.Array


def ema_ratio(
    ratio: Limit,
    *,
    decay: Scalar = 0.99,
    warmup_steps: Scalar = 0,
    warmup_limit: Limit = None,
    init: str = "first",
    floor: Limit = 0.0,
    stats: str = "clipped",
    patience: Scalar | None = None,
) -> Threshold:
    r"""A threshold in proportion to a moving average of the norms.

    .. math:: t = \lambda \max(g, \text{floor}), \qquad
              g \leftarrow \beta g + (1 - \beta) x

    For the first ``warmup_steps`` norms, the threshold of the whole tree is
    ``warmup_limit``. The average :math:`g` starts with the smallest of the clipped
    norms (``init="min"``), with their mean (``"mean"``), or with the first norm after
    them (``"first"``).

    The value :math:`x` that enters is the norm. On a spike it depends on ``stats``:

    * ``"clipped"``: the threshold enters, so the average grows by at most the factor
      :math:`1 + (1-\beta)(\lambda - 1)` a step, which is 1.0004 with AdaGC's defaults.
      If the average starts far below the usual norm (a small ``warmup_limit``, or
      ``init="min"``), nearly every step is clipped for thousands of steps;
      ``patience``, ``init="mean"`` or a ``floor`` avoid that.
    * ``"raw"``: the norm enters. A new level is followed in about
      :math:`1/(1-\beta)` steps, and one spike raises the threshold.
    * ``"skip"``: nothing enters. A new level is followed only by ``patience``.

    The state has three numbers for each norm. Norms of zero and non-finite steps never
    enter.

    Args:
        ratio: :math:`\lambda`, at least 1.
        decay: :math:`\beta`, between 0 and 1.
        warmup_steps: the number of norms that are seen before the average is used.
        warmup_limit: the threshold of the norm of the whole tree meanwhile; ``None`` is
            none. Not for units.
        init: what the average starts with: ``"first"``, ``"min"`` or ``"mean"``.
        floor: the smallest value of the average, in the unit of the norms.
        stats: what enters on a spike: ``"raw"``, ``"clipped"`` or ``"skip"``, as above.
        patience: with ``patience=n``, the ``n``-th spike in a row is not clipped, and
            the average becomes its norm.
            ``None`` is never, and 50 for ``"skip"``.

    Returns:
        A threshold rule.

    Raises:
        ValueError: if a number is out of its range or a name unknown.
        TypeError: if ``init`` or ``stats`` is traced.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> rule = clipx.thresholds.ema_ratio(1.5, decay=0.5)
        >>> state = rule.init(jnp.float32(0))
        >>> context = clipx.thresholds.Context(step=0)
        >>> for norm in (1.0, 1.0, 9.0, 1.0):
        ...     threshold, state = rule.update(jnp.float32(norm), state, context)
        ...     print(threshold)
        1.5
        1.5
        1.5
        1.875

    References:
        Wang et al., AdaGC: Improving training stability for large language model
        pretraining, 2025, arXiv 2502.11034; ``max_grad_norm_ratio`` of OLMo (Groeneveld
        et al., 2024, arXiv 2402.00838).
    """
    check_between(ratio, "ratio", 1, float("inf"))
    check_decay(decay, "decay", one=True)
    check_count(warmup_steps, "warmup_steps", 0)
    if warmup_limit is not None:
        check_between(warmup_limit, "warmup_limit", 0, float("inf"))
    check_choice(init, "init", INITS)
    check_between(floor, "floor", 0, float("inf"))
    counted = refusals(stats, patience)

    def start(norms: jax.Array) -> EmaRatioState:
        seen, refused = memory(norms, jnp.int32), memory(norms, jnp.int32)
        return EmaRatioState(seen, memory(norms), refused)

    def update(norm: jax.Array, state: EmaRatioState, context: Context) -> Any:
        count = one_more(state.seen)
        warm = jnp.asarray(warmup_steps, jnp.int32)
        warming = count <= warm
        number = count.astype(jnp.float32)
        in_warmup = jnp.full_like(norm, jnp.inf)
        if warmup_limit is not None:
            share = jnp.minimum(1, float32(warmup_limit) / _positive(whole_norm(norm)))
            in_warmup = where(share < 1, share * norm, jnp.inf)
        clipped = jnp.minimum(norm, in_warmup)
        started = {
            "min": jnp.minimum(where(count == 1, jnp.inf, state.average), clipped),
            "mean": state.average + (clipped - state.average) / number,
            "first": state.average,
        }[init]

        first = count == warm + 1
        begins = first if init == "first" else first & (warm == 0)
        average = where(begins, norm, state.average)
        limit = float32(ratio) * jnp.maximum(average, float32(floor))
        over = ~warming & (norm > limit)
        refused, give_in = counted.in_a_row(over, state.refused)
        over = over & ~give_in
        entering, anything = counted.entering(norm, limit, over)
        beta = float32(decay)
        # The first norm is the average already.
        beta = where(begins, 0, beta)
        after = where(anything, beta * average + (1 - beta) * entering, average)
        after = where(give_in, norm, after)
        limit = where(give_in, jnp.inf, limit)
        limit = where(warming, in_warmup, limit)
        return unless(out_of_range(decay, one=True), limit), EmaRatioState(
            count, where(warming, started, after), refused
        )

    rule = per_norm(start, update)

    def init_all(norms: Packed) -> Any:
        if warmup_limit is not None and isinstance(norms, tuple):
            raise ValueError(
                "Expected tree, leaf or group norms for warmup_limit, which limits the"
                " norm of the whole tree; got units. Use warmup(a, then=b, steps=)."
            )
        return rule.init(norms)

    return rule._replace(init=init_all)


def norm_growth(
    ratio: Limit = 1.01,
    *,
    floor: Limit = 0.0,
    stats: str = "clipped",
    patience: Scalar | None = None,
) -> Threshold:
    r"""A threshold on the growth of the norm from one step to the next.

    .. math:: t_k = \gamma \max(x_{k-1}, \text{floor})

    The value :math:`x_{k-1}` is the norm of the step before. If that was a spike, it
    depends on ``stats``:

    * ``"clipped"``: it is the threshold. After one very small norm, the threshold grows
      by the factor :math:`\gamma` a step only, 1% by default: set a ``floor`` or
      ``patience``.
    * ``"raw"``: it is the norm, so that only the first norm of a new level is clipped.
    * ``"skip"``: it is the last norm that was not above its threshold.

    The state has two numbers for each norm. Norms of zero and non-finite steps never
    enter.

    Args:
        ratio: :math:`\gamma`, at least 1.
        floor: the smallest value of the last norm, in the unit of the norms.
        stats: what enters on a spike: ``"raw"``, ``"clipped"`` or ``"skip"``, as above.
        patience: with ``patience=n``, the ``n``-th spike in a row is accepted.
            ``None`` is never, and 50 for ``"skip"``.

    Returns:
        A threshold rule.

    Raises:
        ValueError: if a number is out of its range or a name unknown.
        TypeError: if ``stats`` is traced.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> rule = clipx.thresholds.norm_growth(1.5)
        >>> state = rule.init(jnp.float32(0))
        >>> context = clipx.thresholds.Context(step=0)
        >>> for norm in (1.0, 9.0, 9.0):
        ...     threshold, state = rule.update(jnp.float32(norm), state, context)
        ...     print(threshold)
        inf
        1.5
        2.25

    References:
        Chen et al., Fira: Can we achieve full-rank training of LLMs under low-rank
        constraint?, 2024, arXiv 2410.01623.
    """
    check_between(ratio, "ratio", 1, float("inf"))
    check_between(floor, "floor", 0, float("inf"))
    counted = refusals(stats, patience)

    def update(norm: jax.Array, state: LastState, context: Context) -> Any:
        limit = float32(ratio) * jnp.maximum(state.last, float32(floor))
        limit = where(state.last > 0, limit, jnp.inf)
        over = norm > limit
        refused, give_in = counted.in_a_row(over, state.refused)
        limit = where(give_in, jnp.inf, limit)
        over = over & ~give_in
        entering, anything = counted.entering(norm, limit, over)
        last = where(anything, entering, state.last)
        return limit, LastState(last, refused)

    return per_norm(lambda norms: LastState(*_two(norms)), update)


def group_band(
    low: Limit,
    high: Limit,
    *,
    decay: Scalar = 0.99,
    floor: Limit = 0.0,
    patience: Scalar | None = None,
) -> Threshold:
    r"""A target within a band around a moving average of the norm.

    .. math:: S \leftarrow \beta S + (1 - \beta) n, \qquad
              t = \min(\max(n, \max(\alpha_{low} S, \text{floor})), \alpha_{high} S)

    Here :math:`S` is the moving average of the norm :math:`n`, and the target :math:`t`
    is the nearest norm within the band. Norms below the band are raised to it: use the
    rule with the response :func:`optax_clipx.responses.normalize`, which scales
    everything to the norm of its threshold, and usually with
    :func:`optax_clipx.measures.group_norms`. A norm enters the average before it is
    compared, and without clipping: one spike of :math:`k` times the average raises the
    band by the factor :math:`1 + (1-\beta)(k-1)`. The state has two numbers for each
    norm. Norms of zero and non-finite steps never enter.

    Args:
        low: :math:`\alpha_{low}`, between 0 and 1; a number or a schedule.
        high: :math:`\alpha_{high}`, at least 1 (below 1 the average would shrink with
            what it clips); a number or a schedule.
        decay: :math:`\beta`, between 0 and 1.
        floor: the smallest target of a norm that is raised, in the unit of the norms.
        patience: with ``patience=n``, the ``n``-th spike in a row is not clipped, and
            the average becomes its norm.

    Returns:
        A threshold rule.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> from optax_clipx import measures, responses, thresholds
        >>> band = thresholds.group_band(0.5, 2.0)
        >>> clipper = clipx.clip_by(measures.tree_norm(), band, responses.normalize)
        >>> state = clipper.init(jnp.zeros(1))
        >>> for norm in (1.0, 9.0, 0.1):
        ...     clipped, state = clipper.update(jnp.array([norm]), state)
        ...     print(f"{clipped[0]:.3f}")
        1.000
        2.160
        0.535

    References:
        Li et al., AGGC: Adaptive group gradient clipping for stabilizing large language
        model training, 2026, arXiv 2601.11864.
    """
    if not callable(low):
        check_between(low, "low", 0, 1)
    if not callable(high):
        check_between(high, "high", 1, float("inf"))
    check_decay(decay, "decay", one=True)
    check_between(floor, "floor", 0, float("inf"))
    counted = refusals("raw", patience)

    def update(norm: jax.Array, state: BandState, context: Context) -> Any:
        beta = where(state.average > 0, float32(decay), 0)
        average = beta * state.average + (1 - beta) * norm
        lower = float32(low(context.step) if callable(low) else low) * average
        upper = float32(high(context.step) if callable(high) else high) * average
        refused, give_in = counted.in_a_row(norm > upper, state.refused)
        target = jnp.clip(norm, jnp.maximum(lower, float32(floor)), upper)
        target = where(give_in, norm, target)
        average = where(give_in, norm, average)
        target = unless(out_of_range(decay, one=True), target)
        return target, BandState(average, refused)

    rule = per_norm(lambda norms: BandState(*_two(norms)), update)
    return rule._replace(uses_step=callable(low) or callable(high))


def _two(norms: jax.Array) -> tuple[jax.Array, jax.Array]:
    return memory(norms), memory(norms, jnp.int32)


def _positive(x: jax.Array) -> jax.Array:
    return where(x > 0, x, 1)
