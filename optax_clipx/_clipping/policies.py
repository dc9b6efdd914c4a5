"""What happens to updates that are not finite."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._devices.host import call_from_each_device
from .._devices.mesh import axes_to_sum, max_over, placements
from .._trees.arguments import AxisNames, Specs
from .._trees.arithmetic import both, either, full_like, negated, where
from .._trees.leaves import Leaves, Path, show
from .._trees.types import AnyArray
from .summary import Summary

POLICIES = ("propagate", "zero", "raise", "sanitize")


class Options(NamedTuple):
    """What every clipper takes."""

    nonfinite: str = "propagate"
    axis_name: Any = None
    specs: Any = None
    metrics: bool = True
    norm_arg: str = "norm"


def check_policy(nonfinite: object) -> None:
    """Refuses unknown policies at construction."""
    if nonfinite not in POLICIES:
        raise ValueError(
            f"Expected nonfinite to be one of {POLICIES}, got nonfinite={nonfinite!r}."
        )


def sanitize(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """NaN becomes 0, an infinity the largest finite number of its dtype."""
    return [jnp.nan_to_num(x) for x in arrays]


def as_given(arrays: Sequence[jax.Array], options: Options) -> list[jax.Array]:
    """The updates, sanitized if the policy says so."""
    if options.nonfinite == "sanitize":
        return sanitize(arrays)
    return list(map(jnp.asarray, arrays))


def where_nonfinite(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """1 where an entry is not finite; the norm of these is 0 if none is."""
    return [(~jnp.isfinite(x)).astype(jnp.float32) for x in arrays]


def by_policy(
    leaves: Leaves, summary: Summary, options: Options
) -> tuple[Summary, Any, Any]:
    """The summary, whether every leaf becomes NaN, and whether zero.

    First match wins: an unusable threshold, then entries that are not finite.
    """
    nonfinite, policy = summary.nonfinite, options.nonfinite
    zero, lost = full_like(nonfinite, False), summary.unusable
    if policy == "raise":
        raise_if_nonfinite(leaves, nonfinite, options.axis_name, options.specs)
    if policy in ("propagate", "raise"):
        lost = either(lost, nonfinite)
    if policy == "zero":
        zero = both(nonfinite, negated(lost))

    def after(value: jax.Array) -> Any:
        return where(zero, 0, where(lost, np.nan, value))

    changed = either(lost, zero)
    summary = summary._replace(
        clipped_norm=after(summary.clipped_norm),
        scale=after(summary.scale),
        clipped=where(changed, 0, summary.clipped),
        any_clipped=both(summary.any_clipped, negated(changed)),
    )
    return summary, lost, zero


def raise_if_nonfinite(
    leaves: Leaves, nonfinite: jax.Array, axis_name: AxisNames, specs: Specs
) -> None:
    """An error on the host if the flag is set.

    Outside of a trace the error comes here. Inside, a callback on the host raises it,
    and it is seen when a result of the step is read.
    """
    paths = leaves.paths
    flags = [jnp.any(~jnp.isfinite(x)) for x in leaves.arrays]
    if not isinstance(nonfinite, jax.core.Tracer):
        if bool(nonfinite):
            _raise(paths, list(map(bool, flags)))
        return

    def on_host(nonfinite: AnyArray, flags: AnyArray) -> None:
        if np.any(nonfinite):
            _raise(paths, np.asarray(flags, bool).tolist())

    # Every device has to fail: were it one alone, the others would wait for it at the
    # next collective and the process would be aborted. So each device calls its host
    # (partitioned=True), and each has the flags of all.
    places = placements(leaves.arrays, paths, axis_name, specs)
    axes = axes_to_sum(leaves.arrays, places)
    everywhere = max_over(jnp.stack(flags).astype(jnp.int32), axes)
    call_from_each_device(on_host, nonfinite, everywhere)


def _raise(paths: list[Path], flags: list[bool]) -> None:
    named = [show(path) for path, flag in zip(paths, flags, strict=True) if flag]
    where = ", ".join(named) if named else "another shard, or the norm that was passed"
    raise FloatingPointError(
        f"Non-finite updates at: {where}. To go on without such a step use"
        ' nonfinite="zero" and optax_clipx.check(opt_state).'
    )
