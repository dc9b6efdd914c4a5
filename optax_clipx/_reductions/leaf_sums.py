"""Totals over leaves: what is added up on each device, and then over the mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._devices.mesh import Axes, can_be_joined, varying
from .._trees.sizes import is_known
from .._trees.types import Arrays


def over_devices(
    values: list[jax.Array], axes: list[Axes], summed: Callable[..., jax.Array]
) -> list[jax.Array]:
    """Each value summed over its mesh axes, and in one collective what varies alike."""
    # What varies alike is concatenated: a concatenation varies as its parts do
    # together, and what is typed as varying cannot be replicated again.
    alike: dict[Any, list[int]] = {}
    for i, (value, names) in enumerate(zip(values, axes, strict=True)):
        if names:
            alike.setdefault((names, varying(value)), []).append(i)
    found = list(values)
    for (names, _), members in alike.items():
        if len(members) == 1:
            found[members[0]] = summed(values[members[0]], names)
            continue
        flat = [values[i].ravel() for i in members]
        together = summed(jnp.concatenate(flat), names)
        pieces = jnp.split(together, np.cumsum([x.size for x in flat])[:-1])
        for i, piece in zip(members, pieces, strict=True):
            found[i] = piece.reshape(values[i].shape)
    return found


def can_go_by_parts(arrays: Arrays) -> bool:
    """Whether like arrays are large, may be cut up, and int32 counts their entries."""
    size = arrays[0].size
    return is_known(size) and 2**18 <= size < 2**31 and can_be_joined(arrays)
