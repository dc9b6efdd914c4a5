"""The types of arguments that many files share, and what each stands for."""

from collections.abc import Sequence
from typing import Annotated, Protocol, runtime_checkable

import jax
import numpy as np
from jax.typing import DTypeLike


@runtime_checkable
class Shaped(Protocol):
    """An array, perhaps traced, or the shape of one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of each dimension."""

    @property
    def ndim(self) -> int:
        """The number of dimensions."""

    @property
    def size(self) -> int:
        """The number of entries."""

    @property
    def dtype(self) -> np.dtype:
        """The kind of numbers."""


Arrays = Sequence[jax.Array]  # the leaves of one tree, perhaps traced
Trees = Sequence[Arrays]  # the leaves of several trees that are alike
AnyArray = jax.Array | np.ndarray  # of JAX, perhaps traced, or of NumPy
Dtype = DTypeLike  # what JAX takes for a dtype

# What users pass.
Scalar = int | float | np.integer | np.floating | AnyArray  # one real number
Index = Annotated[int, "a number of an axis, or of things"]
Name = str | Sequence[str]  # a path, with slashes or in parts
