"""Thresholds some standard deviations above the mean of the norms so far."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from .._trees.arguments import (
    Limit,
    check_between,
    check_choice,
    check_count,
    check_decay,
    check_static_count,
    out_of_range,
)
from .._trees.arithmetic import (
    at_least,
    at_most,
    both,
    either,
    fraction,
    hypotenuse,
    larger,
    less,
    minus,
    more,
    negated,
    plus,
    product,
    smaller,
    where,
)
from .._trees.types import Scalar
from .base import (
    Context,
    Refusals,
    Threshold,
    chosen,
    float32,
    int32,
    memory,
    numbered,
    one_more,
    per_norm,
    put,
    refusals,
    unless,
)

TARGETS = ("threshold", "mean", "reciprocal")


class ZScoreState(NamedTuple):
    """Mean and standard deviation; for each norm one number each."""

    seen: jax.Array
    mean: jax.Array
    sd: jax.Array
    refused: jax.Array


class WindowState(NamedTuple):
    """The last norms, or their logarithms, along the last axis."""

    seen: jax.Array
    window: jax.Array
    refused: jax.Array


def zscore(
    z_threshold: Limit = 2.5,
    *,
    decay: Scalar = 0.97,
    window: Any = None,
    warmup_steps: Scalar = 25,
    space: str = "linear",
    target: str = "threshold",
    clip_factor: Scalar = 1.0,
    include_current: bool = False,
    stats: str = "clipped",
    patience: Scalar | None = None,
    min_relative_sd: Scalar = 0.01,
) -> Threshold:
    r"""A threshold some standard deviations above the mean of the norms so far.

    .. math:: z = (n - \mu) / \sigma, \qquad
              t = \begin{cases} \text{target} & z > z^* \\ \mu + z^* \sigma
              & \text{else} \end{cases}

    Here :math:`n` is the norm, and :math:`z` the number of standard deviations
    :math:`\sigma` by which it is above the mean :math:`\mu`. There is no threshold for
    the first ``warmup_steps`` norms, and :math:`\mu` and :math:`\sigma` are their mean
    and population standard deviation. After them, they are moving averages,

    .. math:: \mu \leftarrow \beta\mu + (1-\beta) x, \qquad
              \sigma^2 \leftarrow \beta\sigma^2 + (1-\beta)(x - \mu_{new})^2,

    or the mean and the population standard deviation of the last ``window`` norms. In
    ``"log"`` space, all of this holds for :math:`l = \log n`, the threshold is the
    exponential, and the moving variance is :math:`E[l^2] - E[l]^2`. With
    ``warmup_steps=0``, the first :math:`1/(1-\beta)` steps are plain averages.

    The value :math:`x` that enters is the norm. On a spike it depends on ``stats``:

    * ``"raw"``: the norm enters. The deviation grows, so that an equal spike soon after
      may not be clipped.
    * ``"clipped"``: the threshold enters. A lasting change of the level is followed
      slowly; with the target ``"mean"`` or ``"reciprocal"`` only by ``patience``.
    * ``"skip"``: nothing enters. A lasting change is followed only by ``patience``.

    The state has four numbers for each norm, or the window and two numbers. Norms of
    zero and non-finite steps never enter.

    Args:
        z_threshold: :math:`z^*`, the number of standard deviations above which a norm
            is clipped.
        decay: :math:`\beta`, between 0 and 1.
        window: the number of norms that are kept, instead of moving averages.
        warmup_steps: the number of norms that are seen before there is a threshold.
        space: ``"linear"`` or ``"log"``.
        target: the norm of a clipped spike: ``"threshold"`` :math:`\mu + z^*\sigma`,
            ``"mean"`` :math:`\mu`, ``"reciprocal"``
            :math:`(\mu + (z^*)^2/z \cdot \sigma)` times ``clip_factor``.
        clip_factor: the factor of ``"reciprocal"``.
        include_current: whether a norm enters before it is compared; then it enters
            without clipping.
        stats: what enters on a spike: ``"raw"``, ``"clipped"`` or ``"skip"``, as above.
        patience: with ``patience=n``, the ``n``-th spike in a row is accepted, and
            the mean and the deviation move there in proportion. ``None`` is 50, and
            never for ``"raw"``.
        min_relative_sd: the smallest value of :math:`\sigma/\mu`. Without it, the
            smallest change after constant norms would be a spike.

    Returns:
        A threshold rule; with ``target`` other than ``"threshold"`` its thresholds lie
        below norms that they do not touch only when these are spikes.

    Raises:
        ValueError: if a number is out of its range or a name unknown.
        TypeError: if ``window``, ``space``, ``target`` or ``stats`` is traced.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> rule = clipx.thresholds.zscore(warmup_steps=3)
        >>> state = rule.init(jnp.float32(0))
        >>> context = clipx.thresholds.Context(step=0)
        >>> for norm in (0.9, 1.0, 1.1, 9.0, 1.0):
        ...     threshold, state = rule.update(jnp.float32(norm), state, context)
        ...     print(f"{norm}: {threshold:.2f}")
        0.9: inf
        1.0: inf
        1.1: inf
        9.0: 1.20
        1.0: 1.22

    References:
        Kumar et al., ZClip: Adaptive spike mitigation for LLM pre-training, 2025,
        arXiv 2504.02507; Chorowski et al., End-to-end continuous speech recognition
        using attention-based recurrent NN, 2014, arXiv 1412.1602 (log space).
    """
    rule = _ZScore(
        z_threshold=z_threshold,
        decay=decay,
        window=window,
        warmup_steps=warmup_steps,
        log=space == "log",
        target=target,
        clip_factor=clip_factor,
        include_current=include_current,
        refusals=refusals(stats, patience, ("clipped", "skip")),
        min_relative_sd=min_relative_sd,
    ).checked(space)
    return per_norm(rule.init, rule.update)


class _ZScore(NamedTuple):
    z_threshold: Any
    decay: Any
    window: int | None
    warmup_steps: Any
    log: bool
    target: str
    clip_factor: Any
    include_current: bool
    refusals: Refusals
    min_relative_sd: Any

    def checked(self, space: str) -> "_ZScore":
        check_between(self.z_threshold, "z_threshold", 0, float("inf"))
        check_decay(self.decay, "decay", one=True)
        check_count(self.warmup_steps, "warmup_steps", 0)
        check_choice(space, "space", ("linear", "log"))
        check_choice(self.target, "target", TARGETS)
        check_between(self.clip_factor, "clip_factor", 0, float("inf"))
        check_between(self.min_relative_sd, "min_relative_sd", 0, float("inf"))
        if self.window is not None:
            check_static_count(self.window, "window", 2)
        return self

    def init(self, norms: jax.Array) -> Any:
        seen, refused = memory(norms, jnp.int32), memory(norms, jnp.int32)
        if self.window is None:
            return ZScoreState(seen, memory(norms), memory(norms), refused)
        return WindowState(seen, memory(norms, size=self.window), refused)

    def update(self, norm: jax.Array, state: PyTree, context: Context) -> Any:
        value = lax.log(where(more(norm, 0), norm, 1)) if self.log else norm
        seen = self.entered(state, value) if self.include_current else state
        count, mean, sd = self.moments(seen)
        trigger = plus(mean, product(float32(self.z_threshold), sd))
        wanted = larger(int32(self.warmup_steps), np.int32(1))
        # A window that is shorter than the warm-up limits as soon as it is full.
        wanted = (
            wanted if self.window is None else smaller(wanted, np.int32(self.window))
        )
        active = at_least(count, wanted)
        over = both(active, more(value, trigger))
        refused, give_in = self.refusals.in_a_row(over, state.refused)
        over = both(over, negated(give_in))
        limit = where(over, self.above(value, mean, sd, trigger), trigger)
        if not self.include_current:
            entering, anything = self.refusals.entering(value, limit, over)
            seen = chosen(give_in, self.moved(state, value, mean), state)
            entering = where(give_in, value, entering)
            seen = chosen(anything, self.entered(seen, entering), seen)
        limit = lax.exp(limit) if self.log else limit
        limit = where(both(active, negated(give_in)), limit, np.inf)
        limit = unless(out_of_range(self.decay, one=True), limit)
        return limit, seen._replace(refused=refused)

    def above(
        self, value: jax.Array, mean: jax.Array, sd: jax.Array, trigger: jax.Array
    ) -> jax.Array:
        """Where a spike goes."""
        if self.target == "mean":
            return mean
        if self.target == "threshold":
            return trigger
        z_threshold = float32(self.z_threshold)
        z = fraction(minus(value, mean), where(more(sd, 0), sd, 1))
        ratio = fraction(z_threshold, where(more(z, 0), z, 1))
        raised = plus(mean, product(product(z_threshold, ratio), sd))
        factor = float32(self.clip_factor)
        return plus(raised, jnp.log(factor)) if self.log else product(raised, factor)

    def moments(self, state: PyTree) -> tuple[jax.Array, jax.Array, jax.Array]:
        """How many, their mean, and their standard deviation with its floor."""
        if self.window is None:
            count, mean, sd = state.seen, state.mean, state.sd
        else:
            count = jnp.minimum(state.seen, self.window)
            kept = less(numbered(self.window, count), count[..., None])
            number = jnp.maximum(count, 1).astype(jnp.float32)
            values = where(kept, state.window, 0)
            # Relative to the largest, so that no sum overflows.
            peak = jnp.max(jnp.abs(values), axis=-1)
            peak = where(peak > 0, peak, 1)
            ratios = values / peak[..., None]
            mean = jnp.sum(ratios, axis=-1) / number
            off = where(kept, ratios - mean[..., None], 0)
            sd = jnp.sqrt(jnp.sum(off * off, axis=-1) / number) * peak
            mean = mean * peak
        floor = float32(self.min_relative_sd)
        if not self.log:
            floor = product(floor, lax.abs(mean))
        return count, mean, larger(sd, floor)

    def entered(self, state: PyTree, value: jax.Array) -> Any:
        """The state after one more value."""
        count = one_more(state.seen)
        if self.window is not None:
            window = put(state.window, state.seen % self.window, value)
            # The count runs on to know the place; it returns to a full window.
            full = 2 * self.window
            count = where(count >= full, self.window, count)
            return state._replace(seen=count, window=window)
        number = lax.convert_element_type(count, jnp.float32)
        plain = fraction(plus(number, -1), number)
        decay = float32(self.decay)
        warmup = int32(self.warmup_steps)
        takes_over = smaller(plain, decay)
        in_warmup, no_warmup = at_most(count, warmup), at_most(warmup, 0)
        decay = where(no_warmup, takes_over, where(in_warmup, plain, decay))
        rest = minus(1, decay)
        off = lax.abs(minus(value, state.mean))
        mean = plus(product(decay, state.mean), product(rest, value))
        # The deviation is kept, and not its square, which could overflow.
        exact = either(np.bool_(self.log), either(in_warmup, no_warmup))
        root = lax.sqrt(decay)
        share = product(lax.sqrt(product(rest, decay)), where(exact, 1, root))
        sd = hypotenuse(product(root, state.sd), product(share, off))
        return state._replace(seen=count, mean=mean, sd=sd)

    def moved(self, state: PyTree, value: jax.Array, mean: jax.Array) -> Any:
        """The state at a new level; in linear space the deviation is in proportion."""

        def at_level(off: jax.Array, mean: jax.Array, value: jax.Array) -> jax.Array:
            if self.log:
                return off
            # Relative first: value / mean may be beyond the largest number.
            most = float(jnp.finfo(jnp.float32).max) / 4
            relative = fraction(off, where(more(mean, 0), mean, 1))
            return larger(smaller(product(relative, value), most), -most)

        if self.window is None:
            return state._replace(mean=value, sd=at_level(state.sd, mean, value))
        off = state.window - mean[..., None]
        off = at_level(off, mean[..., None], value[..., None])
        return state._replace(window=value[..., None] + off)
