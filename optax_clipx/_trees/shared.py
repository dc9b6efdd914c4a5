"""One value for each leaf, of which those that many leaves have are held once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Shared:
    """`self[i]` is the value of leaf `i`; what is computed of it is computed once."""

    values: tuple[Any, ...]
    index: tuple[int, ...]  # for each leaf which of the values it has

    def __getitem__(self, leaf: int) -> Any:
        return self.values[self.index[leaf]]

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[Any]:
        return (self.values[i] for i in self.index)

    def map(self, fun: Callable[[Any], Any]) -> "Shared":
        """The same leaves with the function's results."""
        return Shared(tuple(map(fun, self.values)), self.index)


jax.tree_util.register_dataclass(Shared, ["values"], ["index"])


def for_each(values: Any) -> Shared:
    """A value of its own for each leaf."""
    values = tuple(values)
    return Shared(values, tuple(range(len(values))))


def pairs(one: Shared, other: Shared) -> Shared:
    """For each leaf both values."""
    both = list(zip(one.index, other.index, strict=True))
    kinds = list(dict.fromkeys(both))
    values = tuple((one.values[i], other.values[j]) for i, j in kinds)
    return Shared(values, tuple(map(kinds.index, both)))
