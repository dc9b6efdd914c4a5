"""Reads compiled XLA programs: what they exchange, move and branch on."""

import re
from typing import Any, NamedTuple

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "u32": 4, "s32": 4}
_BYTES |= {"s8": 1, "u8": 1, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "token": 0}


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


def cycles(text: str) -> int:
    """The cycles that XLA's cost model expects of the main computation, on TPU."""
    found = re.findall(r'"estimated_cycles":"?(\d+)', _entry(text))
    return sum(map(int, found))


def traffic(text: str) -> int:
    """The bytes that the main computation reads from and writes to a TPU's HBM.

    XLA's own count of bytes also holds those that move within the chip: what is copied
    ahead of time to the memory there, S(1), is counted again where it is used.
    """
    of: dict[str, list[str]] = {}
    total = 0
    for line in _entry(text).splitlines():
        match = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)", line)
        if not match:
            continue
        name, rest = match.groups()
        kinds = re.match(r"\(.*?\) (?=[a-z])|\S+ ", rest)
        call = re.match(r"([\w\-]+)\(([^)]*)", rest[kinds.end() :])
        opcode, arguments = call.groups()
        of[name] = re.findall(r"[a-z]+\d*\[[\d,]*\](?:\{[^}]*\})?", kinds[0])
        if opcode in _MOVE_NOTHING:
            continue
        moved = of[name][:2]  # of a copy: the target and the source
        if opcode != "copy-start":
            operands = re.findall(r"%([\w.\-]+)", arguments)
            moved = of[name] + [x for operand in operands for x in of.get(operand, [])]
        total += sum(_size(x.split("{")[0]) for x in moved if "S(1)" not in x)
    return total


_MOVE_NOTHING = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant"}
_MOVE_NOTHING |= {"copy-done", "all-reduce-done", "all-gather-done"}


def _entry(text: str) -> str:
    return text[text.index("\nENTRY") :]


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
