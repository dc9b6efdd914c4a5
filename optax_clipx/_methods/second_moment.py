"""Clipping against what each entry's own past says: SPAM and ACClip."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._clipping.entries import elementwise, root_of_mean, shares_of, zeros_like
from .._clipping.transformation import Options
from .._trees.arguments import (
    AxisNames,
    Specs,
    check_between,
    check_count,
    check_decay,
    out_of_range,
)
from .._trees.leaves import Leaves


class SecondMomentMemory(NamedTuple):
    """The root of the average square of each entry, and how many steps were finite."""

    root: Any
    seen: jax.Array


def clip_by_second_moment(
    theta: Any = 5000.0,
    *,
    decay: Any = 0.999,
    warmup_steps: Any = 20,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips entries far above their own second moment (SPAM).

    .. math:: g_j \leftarrow \mathrm{sign}(g_j) \sqrt{\theta v_j}
              \;\text{ where } g_j^2 > \theta v_j > 0, \qquad
              v \leftarrow \beta v + (1 - \beta)\, g^2

    The second moment :math:`v` of an entry is that before the step, and the clipped
    :math:`g` enters it. For the complete SPAM method, put this before
    :func:`optax.scale_by_adam` with the same decay, and both inside
    :func:`reset_moments`. An entry that was always zero is not clipped, so the first
    gradient of a rare token passes unchanged.

    The state has one number for each entry, in a tree like the parameters: the root of
    :math:`v`, with a minus sign where the last step was clipped. It also counts finite
    steps.

    Args:
        theta: :math:`\theta`, above 0: an entry is clipped if its square is more than
            ``theta`` times its second moment.
        decay: :math:`\beta`, from 0 to 1; Adam's ``b2``.
        warmup_steps: the number of steps at the start that are not clipped; a
            non-finite step does not count.
        nonfinite: as in :func:`clip_by`; on such a step :math:`v` stays as it is.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`: the 2-norms before and
            after, and as ``clipped`` the fraction of entries.

    Returns:
        A transformation.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: from ``update`` as :func:`clip_by`, and for complex leaves.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.clip_by_second_moment(4.0, decay=0.75, warmup_steps=0)
        >>> state = clipper.init(jnp.zeros(2))
        >>> for gradient in ([1.0, 0.0], [9.0, 9.0]):
        ...     clipped, state = clipper.update(jnp.array(gradient), state)
        ...     print(clipped)
        [1. 0.]
        [1. 9.]

    References:
        Huang et al., SPAM: Spike-aware Adam with momentum reset for stable LLM
        training, 2025, arXiv 2501.06842; there an entry whose :math:`v` is zero is
        clipped to zero, and so stays zero until the next reset.
    """
    check_between(theta, "theta", 0, float("inf"))
    if not isinstance(theta, jax.core.Tracer) and theta == 0:
        raise ValueError(f"Expected theta > 0, got theta={theta!r}.")
    check_decay(decay, "decay")
    check_count(warmup_steps, "warmup_steps", 0)

    def fresh(leaves: Leaves) -> SecondMomentMemory:
        return SecondMomentMemory(zeros_like(leaves), jnp.zeros((), jnp.int32))

    def numbers_at(dtype: Any, memory: SecondMomentMemory) -> Any:
        b, rest = shares = shares_of(decay, dtype)
        wide = jnp.asarray(theta, dtype)
        moved = 1 / jnp.sqrt(b / wide + rest)
        return shares, jnp.sqrt(wide), moved, memory.seen >= warmup_steps

    options = Options(nonfinite, axis_name, specs, metrics)
    unusable = out_of_range(decay)
    return elementwise(
        _Spikes(), SecondMomentMemory, fresh, numbers_at, options, unusable
    )


@dataclass(frozen=True)
class _Spikes:
    """The moment is the root of the average square, negative where it clipped.

    So the update follows from the new root: what it was, times a constant, is the
    bound.
    """

    def advance(
        self, x: jax.Array, moments: Sequence[jax.Array], numbers: Any
    ) -> list[jax.Array]:
        root = jnp.abs(moments[0])
        shares, _, _, _ = numbers
        spike, bound = self._spike(x, root, numbers)
        size = jnp.where(spike, bound, jnp.abs(x.astype(root.dtype)))
        new = root_of_mean(root, size, shares, 2.0)
        return [jnp.where(spike, -new, new)]

    def respond(
        self, x: jax.Array, moments: Sequence[jax.Array], numbers: Any
    ) -> jax.Array:
        _, _, moved, _ = numbers
        (root,) = moments
        wide = x.astype(root.dtype)
        return jnp.where(jnp.signbit(root), jnp.sign(wide) * -root * moved, wide)

    def change(
        self, x: jax.Array, moments: Sequence[jax.Array], numbers: Any
    ) -> tuple[jax.Array, jax.Array]:
        spike, bound = self._spike(x, jnp.abs(moments[0]), numbers)
        wide = x.astype(bound.dtype)
        return x, jnp.where(spike, jnp.sign(wide) * bound, wide)

    def _spike(
        self, x: jax.Array, root: jax.Array, numbers: Any
    ) -> tuple[jax.Array, jax.Array]:
        _, ratio, _, active = numbers
        bound = root * ratio
        size = jnp.abs(x.astype(root.dtype))
        return (size > bound) & (root > 0) & active, bound
