"""Thresholds that follow a schedule, such as that of the learning rate."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from .._trees.arguments import Limit, Schedule, check_between, check_static_number
from .._trees.types import Scalar
from .base import Threshold, float32
from .combine import scaled
from .constant import at

_STEPS = 2**20  # of a schedule, among which its peak is looked for


def follow_schedule(
    rule: Limit | Threshold,
    schedule: Schedule,
    power: Any = -0.5,
    *,
    peak: Scalar | None = None,
    floor: Scalar = 0.01,
) -> Threshold:
    r"""A threshold that follows a schedule, such as that of the learning rate.

    .. math:: t_k = t'_k \left(\max\left(
              \frac{\eta_k}{\eta_{\max}},\, f\right)\right)^{p}

    Here :math:`t'_k` is the threshold of another rule at step :math:`k`,
    :math:`\eta_k` is the schedule, :math:`\eta_{\max}` its peak, :math:`f` is ``floor``
    and :math:`p` is ``power``. The threshold is that of the rule where the schedule is
    at its peak, and higher elsewhere if the power is negative.

    With weight decay :math:`\lambda`, layers that a normalization follows reach
    :math:`\|g\| / \|w\| = \sqrt{2\lambda/\eta}`: their gradients grow while the
    learning rate decays, and a fixed threshold clips more and more steps. The default
    power of -1/2 makes the threshold grow by the same factor. A power of -1 keeps
    :math:`\eta_k t_k`, the largest step of plain SGD, the same from step to step; this
    is the warm-up of spectral clipping in SPECTRA.

    Args:
        rule: a threshold rule, number, schedule or prefix; what it remembers does not
            depend on the schedule.
        schedule: an optax schedule; it is called with the number of updates so far,
            from 0, and must not depend on traced values unless ``peak`` is given.
        power: :math:`p`, a Python number.
        peak: :math:`\eta_{\max}`, above 0. ``None`` evaluates the schedule once at each
            of the steps 0 to 1,048,575 and takes the largest value.
        floor: :math:`f`, the smallest ratio that is used, above 0. A schedule that
            starts or ends at 0 would otherwise give an infinite threshold there, so
            that an outlier of the first step would enter Adam's moments unclipped. With
            the defaults the threshold is at most 10 times that of the rule.

    Returns:
        A threshold rule with the state of the other.

    Raises:
        ValueError: if the power is NaN or infinite, ``peak`` or ``floor`` is not above
            0, and from ``update`` if the schedule has no positive value.
        TypeError: if the schedule is no function, or ``power`` is no Python number.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_clipx as clipx
        >>> schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-4, 10, 100)
        >>> rule = clipx.thresholds.follow_schedule(1.0, schedule)
        >>> for step in (0, 10, 55, 100):
        ...     context = clipx.thresholds.Context(step=jnp.int32(step))
        ...     threshold, _ = rule.update(jnp.float32(9.0), (), context)
        ...     print(f"{step}: {threshold:.3f}")
        0: 10.000
        10: 1.000
        55: 1.414
        100: 10.000

    References:
        Defazio, Why gradients rapidly increase near the end of training, 2025,
        arXiv 2506.02285 (the ratio of norms). SPECTRA, 2026, arXiv 2603.14315 (the
        warm-up with power -1).
    """
    if not callable(schedule):
        raise TypeError(
            f"Expected schedule to be an optax schedule, got {schedule!r}. For a"
            " constant factor use optax_clipx.thresholds.scaled."
        )
    check_static_number(power, "power")
    if not abs(power) < float("inf"):
        raise ValueError(f"Expected a finite power, got power={power!r}.")
    for value, name in ((floor, "floor"), (peak, "peak")):
        if value is not None:
            _check_positive(value, name)
    peaks: list[Any] = [] if peak is None else [peak]

    def factor(step: Scalar) -> jax.Array:
        if not peaks:
            peaks.append(_peak_of(schedule))
        ratio = float32(at(schedule, step)) / float32(peaks[0])
        return jnp.maximum(ratio, float32(floor)) ** power

    return scaled(rule, factor)


def _check_positive(value: object, name: str) -> None:
    check_between(value, name, 0, float("inf"))
    if not isinstance(value, jax.core.Tracer) and value == 0:
        raise ValueError(f"Expected {name} > 0, got {name}={value!r}.")


def _peak_of(schedule: Schedule) -> float:
    """The largest value of a schedule, evaluated outside of any trace or mesh."""

    def largest() -> float:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return float(jnp.max(jax.jit(jax.vmap(schedule))(jnp.arange(_STEPS))))

    # In another thread nothing is being traced, and no mesh is set.
    with ThreadPoolExecutor(1) as thread:
        try:
            peak = thread.submit(largest).result()
        except jax.errors.UnexpectedTracerError as error:
            raise ValueError(
                "Cannot find the peak of a schedule that depends on traced values:"
                " pass peak= to optax_clipx.thresholds.follow_schedule."
            ) from error
    if not peak > 0:
        raise ValueError(
            f"Expected a schedule that is above 0 somewhere, got {peak} as the largest"
            f" value of its first {_STEPS:,} steps. Pass peak= if it rises later."
        )
    return peak
