"""A finding: a fault with its steps, its evidence, and what to do about it."""

import html
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .advice import ADVICE, PAGE
from .escaping import printable

SEVERITIES = ("error", "warning", "info")
_SHOWN = 5  # steps in a line


class Finding(NamedTuple):
    """Something that a run shows.

    Attributes:
        code: what it is, such as ``"spikes"``.
        severity: ``"error"``, ``"warning"`` or ``"info"``.
        steps: where it is: each of its steps, or the first and the last of a stretch.
        evidence: what it is concluded from, numbers and names by what they are.
        advice: a line of code to type, and the page that explains it.

    Example:
        >>> import optax_clipx as clipx
        >>> norms = [1.0 + 0.01 * (i % 7) for i in range(100)]
        >>> norms[60] = 40.0
        >>> clipx.diagnose({"norm": norms}).findings[0].steps
        (60,)
    """

    code: str
    severity: str
    steps: tuple[int, ...]
    evidence: Mapping[str, Any]
    advice: str

    @property
    def sentence(self) -> str:
        """What was found, in one sentence; it may have names from a file in it."""
        given = {name: _Shown(value) for name, value in self.evidence.items()}
        return ADVICE[self.code].sentence.format(**given)

    def __str__(self) -> str:
        return (
            f"{self.severity}: {self.code} at {places(self.steps)}\n"
            f"  {printable(self.sentence)}\n  {self.advice}"
        )


def finding(code: str, severity: str, steps: Iterable[Any], **evidence: Any) -> Finding:
    """A finding with its advice; steps and numbers become Python's own."""
    plain = {
        name: value.item() if hasattr(value, "item") else value
        for name, value in evidence.items()
    }
    _, line, anchor = ADVICE[code]
    places = tuple(int(step) for step in steps)
    return Finding(code, severity, places, plain, f"{line}  ({PAGE}{anchor})")


class _Shown:
    """A value that shows as a short text wherever a sentence has it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __format__(self, form: str) -> str:
        return format(self.value, form) if form else shown(self.value)


def shown(value: Any) -> str:
    """A number or a name as a short text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        more = ", ..." if len(value) > _SHOWN else ""
        return ", ".join(map(shown, value[:_SHOWN])) + more
    return str(value)


def places(steps: tuple[int, ...]) -> str:
    """The first of some steps, in words."""
    if not steps:
        return "no step of its own"
    more = f" and {len(steps) - _SHOWN} more" if len(steps) > _SHOWN else ""
    plural = "s" if len(steps) > 1 else ""
    return f"step{plural} {', '.join(f'{x:,}' for x in steps[:_SHOWN])}{more}"


def escaped(text: str) -> str:
    """For the text and the attributes of a page."""
    return html.escape(printable(text))
