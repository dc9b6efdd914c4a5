"""Clipping against what each entry's own past says: SPAM and ACClip."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._clipping.entries import (
    elementwise,
    root_of_mean,
    shares_of,
    weight_of,
    zeros_like,
)
from .._clipping.scaling import Response
from .._clipping.transformation import Options
from .._thresholds.constant import at
from .._trees.arguments import (
    AxisNames,
    Specs,
    check_between,
    check_choice,
    check_count,
    check_decay,
    out_of_range,
)
from .._trees.calls import explains_calls
from .._trees.leaves import Leaves
from .._trees.types import Dtype, Scalar


class SecondMomentMemory(NamedTuple):
    """The root of the average square of each entry, and how many steps were finite."""

    root: Any
    seen: jax.Array


@explains_calls
def clip_by_second_moment(
    theta: Scalar = 5000.0,
    *,
    decay: Scalar = 0.999,
    warmup_steps: Scalar = 20,
    debias: bool = False,
    init: str = "zeros",
    stats: str = "clipped",
    floor: Scalar = 0.0,
    response: Response | None = None,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips entries far above their own second moment (SPAM, AdamWClip, ADOPT).

    .. math:: g_j \leftarrow \mathrm{sign}(g_j)\, t_j
              \;\text{ where } |g_j| > t_j > 0, \qquad
              t_j = \sqrt{\theta}\, \max(\sqrt{\hat v_j}, f), \qquad
              v \leftarrow \beta v + (1 - \beta)\, g^2

    The second moment :math:`v` of an entry is that before the step, and the clipped
    :math:`g` enters it. With ``debias`` :math:`\hat v = v / (1 - \beta^k)` after
    :math:`k` finite steps, as Adam has it; otherwise it is :math:`v`. The floor
    :math:`f` is 0 unless given. Then an entry that was always zero is not clipped, so
    the first gradient of a rare token passes unchanged.

    ===========  ==================================================================
    method       settings
    ===========  ==================================================================
    SPAM         the defaults, before :func:`optax.scale_by_adam` with the same
                 decay, and both inside :func:`reset_moments`
    AdamWClip    ``theta=9.0, debias=True, warmup_steps=1``, before
                 :func:`optax.adamw` with the same decay
    ADOPT        ``theta=jnp.sqrt, decay=0.9999, init="first", stats="raw",
                 floor=1e-6, warmup_steps=1``; ADOPT then divides by the root of
                 the same second moment
    ===========  ==================================================================

    The state has one number for each entry, in a tree like the parameters: the root of
    :math:`v`, with a minus sign where the last step was clipped with the default
    ``stats`` and ``response``. It also counts finite steps.

    Args:
        theta: :math:`\theta`, above 0: an entry is clipped if its square is more than
            ``theta`` times its second moment. A number, a scalar array, or a schedule
            of the number of finite steps so far.
        decay: :math:`\beta`, from 0 to 1; Adam's ``b2``.
        warmup_steps: the number of steps at the start that are not clipped; a
            non-finite step does not count. With 0 nothing but a floor clips the first
            step, since there is no second moment yet.
        debias: whether the second moment is corrected for its start at zero. Without,
            it is too small at first, and after a ``warmup_steps`` of 1 a threshold of
            ``theta=9`` would be a tenth of an entry's usual size.
        init: ``"zeros"``, or ``"first"``: the first squares are the second moment,
            which then needs no correction.
        stats: what enters the second moment: ``"clipped"``, or ``"raw"`` for the
            gradient itself. With ``"raw"`` a spike raises its own threshold for
            :math:`1/(1-\beta)` steps, but no level is followed late.
        floor: :math:`f`, on the scale of the updates: the least root of a second moment
            that counts. Entries without a second moment are clipped with it, too.
        response: what becomes of entries, from their size and threshold: ``None`` is
            the formula above. ``functools.partial(responses.smooth, p=2.0)`` or another
            of :mod:`responses` shrinks smoothly, also what is below the threshold.
        nonfinite: as in :func:`clip_by`; on such a step :math:`v` stays as it is.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`: the 2-norms before and
            after, and as ``clipped`` the fraction of entries.

    Returns:
        A transformation.

    Raises:
        ValueError: if a number is out of its range, or with ``debias`` and
            ``init="first"`` together.
        TypeError: from ``update`` as :func:`clip_by`, and for complex leaves.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.clip_by_second_moment(
        ...     theta=9.0, debias=True, warmup_steps=1
        ... )
        >>> state = clipper.init(jnp.zeros(2))
        >>> for gradient in ([1.0, 0.0], [9.0, 9.0]):
        ...     clipped, state = clipper.update(jnp.array(gradient), state)
        ...     print(clipped.round().tolist())
        [1.0, 0.0]
        [3.0, 9.0]

    References:
        Huang et al., SPAM: Spike-aware Adam with momentum reset for stable LLM
        training, 2025, arXiv 2501.06842; there an entry whose :math:`v` is zero is
        clipped to zero, and so stays zero until the next reset. AdamWClip 0.1.4, a
        package on PyPI; its first step clips to almost nothing. Taniguchi et al.,
        ADOPT: Modified Adam can converge with any beta2 with the optimal rate, 2024,
        arXiv 2411.02853.
    """
    if not callable(theta):
        _check_positive(theta)
    check_decay(decay, "decay")
    check_count(warmup_steps, "warmup_steps", 0)
    check_choice(init, "init", ("zeros", "first"))
    check_choice(stats, "stats", ("clipped", "raw"))
    check_between(floor, "floor", 0, float("inf"))
    if debias and init == "first":
        raise ValueError(
            'Expected debias=False with init="first", which needs no correction, got'
            " debias=True."
        )

    def fresh(leaves: Leaves) -> SecondMomentMemory:
        return SecondMomentMemory(zeros_like(leaves), jnp.zeros((), jnp.int32))

    def numbers_at(dtype: Dtype, memory: SecondMomentMemory) -> _Numbers:
        b, rest = shares_of(decay, dtype)
        if init == "first":
            start = memory.seen == 0
            b, rest = jnp.where(start, 0, b), jnp.where(start, 1, rest)
        tiny = float(jnp.finfo(dtype).tiny)
        wide = jnp.maximum(jnp.asarray(at(theta, memory.seen)).astype(dtype), tiny)
        weight = jnp.ones((), dtype)
        if debias:
            weight = weight_of(decay, memory.seen).astype(dtype)
        ratio = jnp.sqrt(wide / weight)
        return _Numbers(
            shares=(b, rest),
            ratio=ratio,
            moved=1 / jnp.sqrt(b / jnp.square(ratio) + rest),
            least=jnp.sqrt(wide) * jnp.asarray(floor).astype(dtype),
            active=memory.seen >= warmup_steps,
        )

    rule: Any = _Spikes()
    if stats == "raw" or response is not None:
        rule = _Responded(response, stats == "raw")
    options = Options(nonfinite, axis_name, specs, metrics)
    unusable = out_of_range(decay)
    return elementwise(rule, SecondMomentMemory, fresh, numbers_at, options, unusable)


def _check_positive(theta: Scalar) -> None:
    check_between(theta, "theta", 0, float("inf"))
    if not isinstance(theta, jax.core.Tracer) and theta == 0:
        raise ValueError(f"Expected theta > 0, got theta={theta!r}.")


class _Numbers(NamedTuple):
    """The scalars on which the entries of a step depend."""

    shares: Any  # decay and 1 - decay
    ratio: jax.Array  # of the threshold to the root of the second moment
    moved: jax.Array  # of the threshold to the new root, where it was clipped
    least: jax.Array  # the threshold at the floor
    active: jax.Array

    def bound(self, root: jax.Array) -> jax.Array:
        """The thresholds of entries; infinity where there are none."""
        bound = jnp.maximum(root * self.ratio, self.least)
        known = (root > 0) | (self.least > 0)
        return jnp.where(known & self.active, bound, jnp.inf)


@dataclass(frozen=True)
class _Spikes:
    """The moment is the root of the average square, negative where it clipped.

    So the update follows from the new root: what it was, times a constant, is the
    bound.
    """

    def advance(
        self, x: jax.Array, moments: Sequence[jax.Array], numbers: _Numbers
    ) -> list[jax.Array]:
        root = jnp.abs(moments[0])
        size, bound = jnp.abs(x.astype(root.dtype)), numbers.bound(root)
        new = root_of_mean(root, jnp.minimum(size, bound), numbers.shares, 2.0)
        return [jnp.where(size > bound, -new, new)]

    def respond(
        self,
        x: jax.Array,
        before: Sequence[jax.Array],
        after: Sequence[jax.Array],
        numbers: _Numbers,
    ) -> jax.Array:
        (root,) = after
        wide = x.astype(root.dtype)
        bound = jnp.maximum(-root * numbers.moved, numbers.least)
        return jnp.where(jnp.signbit(root), jnp.sign(wide) * bound, wide)

    def change(
        self, x: jax.Array, moments: Sequence[jax.Array], numbers: _Numbers
    ) -> tuple[jax.Array, jax.Array]:
        root = jnp.abs(moments[0])
        wide, bound = x.astype(root.dtype), numbers.bound(root)
        return x, jnp.where(jnp.abs(wide) > bound, jnp.sign(wide) * bound, wide)


@dataclass(frozen=True)
class _Responded:
    """Any response, and what it leaves of an entry or the entry itself is averaged."""

    response: Response | None
    raw: bool

    def advance(
        self, x: jax.Array, moments: Sequence[jax.Array], numbers: _Numbers
    ) -> list[jax.Array]:
        (root,) = moments
        entering = x.astype(root.dtype) if self.raw else self._clipped(x, root, numbers)
        return [root_of_mean(root, jnp.abs(entering), numbers.shares, 2.0)]

    def respond(
        self,
        x: jax.Array,
        before: Sequence[jax.Array],
        after: Sequence[jax.Array],
        numbers: _Numbers,
    ) -> jax.Array:
        return self._clipped(x, before[0], numbers)

    def change(
        self, x: jax.Array, moments: Sequence[jax.Array], numbers: _Numbers
    ) -> tuple[jax.Array, jax.Array]:
        return x, self._clipped(x, moments[0], numbers)

    def _clipped(self, x: jax.Array, root: jax.Array, numbers: _Numbers) -> jax.Array:
        wide, bound = x.astype(root.dtype), numbers.bound(root)
        size = jnp.abs(wide)
        if self.response is None:
            return jnp.where(size > bound, jnp.sign(wide) * bound, wide)
        there = jnp.isfinite(bound) & jnp.isfinite(size) & (size > 0)
        scale = self.response(jnp.where(there, size, 1), jnp.where(there, bound, 1))
        return jnp.where(there, wide * scale, wide)
