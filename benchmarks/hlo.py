"""Reads compiled XLA programs: what they exchange, move and branch on."""

import re
from typing import Any, NamedTuple

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "u32": 4, "s32": 4}


class Collective(NamedTuple):
    """One collective operation of a program."""

    kind: str
    operands: list[str]  # such as "f32[3]"
    in_branch: bool  # of a conditional, and so off the usual path
    source: str  # the JAX operation that it comes from

    @property
    def bytes(self) -> int:
        """The bytes of its operands on one device."""
        return sum(_size(operand) for operand in self.operands)

    @property
    def dtypes(self) -> list[str]:
        """The operands' dtypes."""
        return sorted({operand.split("[")[0] for operand in self.operands})


def collectives(text: str) -> list[Collective]:
    """The collectives of a program, from its text."""
    found = []
    branches = _branch_computations(text)
    for computation, line in _lines(text):
        match = re.search(rf"= (.*?) ({KINDS})(?:-start)?\(", line)
        if match:
            operands = re.findall(r"\b([a-z]+\d*\[[\d,]*\])", match[1])
            source = re.search(r'op_name="([^"]*)"', line)
            found.append(
                Collective(
                    match[2],
                    operands,
                    computation in branches,
                    source[1] if source else "",
                )
            )
    return found


def conditionals(text: str) -> int:
    """How many conditionals there are."""
    return sum(" conditional(" in line for _, line in _lines(text))


def fusions(text: str) -> int:
    """How many fusions there are."""
    return sum(" fusion(" in line for _, line in _lines(text))


def memory(compiled: Any) -> dict[str, float]:
    """Bytes that one device moves and holds."""
    stats = compiled.memory_analysis()
    return {
        "bytes_accessed": compiled.cost_analysis()["bytes accessed"],
        "temp_bytes": stats.temp_size_in_bytes,
        "argument_bytes": stats.argument_size_in_bytes,
        "alias_bytes": stats.alias_size_in_bytes,
    }


def _lines(text: str) -> list[tuple[str, str]]:
    computation, found = "", []
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            computation = head[1]
        found.append((computation, line))
    return found


def _branch_computations(text: str) -> set[str]:
    """The computations that only conditionals lead to."""
    calls: dict[str, set[str]] = {}
    branches: set[str] = set()
    for computation, line in _lines(text):
        called = set(
            re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", line)
        )
        calls.setdefault(computation, set()).update(called)
        if " conditional(" in line:
            names = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
            listed = re.search(r"branch_computations=\{([^}]*)\}", line)
            if listed:
                names += re.findall(r"%?([\w.\-]+)", listed[1])
            branches.update(names)
    todo = list(branches)
    while todo:
        for name in calls.get(todo.pop(), ()):
            if name not in branches:
                branches.add(name)
                todo.append(name)
    return branches


def _size(operand: str) -> int:
    dtype, dims = operand.rstrip("]").split("[")
    size = _BYTES[dtype]
    for n in filter(None, dims.split(",")):
        size *= int(n)
    return size
