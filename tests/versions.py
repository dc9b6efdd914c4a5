"""Marks for tests of what an older JAX cannot express."""

import jax
import pytest
from jax.sharding import AxisType


def since(version, reason):
    """Skips a test on an older JAX, and says what that cannot do."""
    shown = ".".join(map(str, version))
    return pytest.mark.skipif(
        jax.__version_info__ < version, reason=f"JAX before {shown} {reason}"
    )


MESH_OF_TRACED = since((0, 8), "cannot set the mesh of traced Explicit arrays")
EXPLICIT = pytest.param(AxisType.Explicit, marks=MESH_OF_TRACED)
JOINED = since((0, 8), "has an XLA for CPU that does not join all-reduces")
FUSED = since((0, 10), "has an XLA for CPU that writes out what is clipped")
