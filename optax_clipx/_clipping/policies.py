"""What happens to updates that are not finite."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._reductions.norms import Indicators
from .._trees.leaves import Leaves, Path, show

POLICIES = ("propagate", "zero", "raise", "sanitize")


def check_policy(nonfinite: Any) -> None:
    """Refuses unknown policies at construction."""
    if nonfinite not in POLICIES:
        raise ValueError(
            f"Expected nonfinite to be one of {POLICIES}, got nonfinite={nonfinite!r}."
        )


def sanitize(arrays: Sequence[Any]) -> list[jax.Array]:
    """NaN becomes 0, an infinity the largest finite number of its dtype."""
    return [jnp.nan_to_num(x) for x in arrays]


def where_nonfinite(arrays: Sequence[Any]) -> Indicators:
    """1 where an entry is not finite; the norm of these is 0 if none is."""
    return Indicators([(~jnp.isfinite(x)).astype(jnp.float32) for x in arrays])


def raise_if_nonfinite(leaves: Leaves, nonfinite: jax.Array) -> jax.Array:
    """The flag again, after an error on the host if it is set.

    Outside of a trace the error comes here. Inside, a callback on the host raises it,
    and it is seen when a result of the step is read.
    """
    paths = leaves.paths
    if not isinstance(nonfinite, jax.core.Tracer):
        if bool(nonfinite):
            _raise(paths, [bool(jnp.any(~jnp.isfinite(x))) for x in leaves.arrays])
        return nonfinite

    def on_host(nonfinite: Any, flags: Any) -> Any:
        if np.any(nonfinite):
            _raise(paths, np.asarray(flags).tolist())
        return np.asarray(nonfinite)

    flags = jnp.stack([jnp.any(~jnp.isfinite(x)) for x in leaves.arrays])
    return jax.pure_callback(
        on_host,
        jax.ShapeDtypeStruct((), jnp.bool_),
        jax.lax.stop_gradient(nonfinite),
        jax.lax.stop_gradient(flags),
        vmap_method="sequential",
    )


def _raise(paths: list[Path], flags: list[bool]) -> None:
    named = [show(path) for path, flag in zip(paths, flags, strict=True) if flag]
    where = ", ".join(named) if named else "another shard, or the norm that was passed"
    raise FloatingPointError(
        f"Non-finite updates at: {where}. To go on without such a step use"
        ' nonfinite="zero" and optax_clipx.check(opt_state).'
    )
