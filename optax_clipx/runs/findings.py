"""What a diagnosis finds: its types, and how they are printed and shown."""

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .advice import ADVICE, PAGE
from .drawing import Envelope
from .escaping import printable
from .jsonl import named

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


@dataclass(frozen=True)
class Diagnosis:
    """All that was found in a run, and what could not be judged.

    It is false if there are neither errors nor warnings.

    Attributes:
        findings: of :class:`Finding`, the worst first.
        not_judged: from the codes that could not be judged to what there was not.
        steps: how many steps the run has.
        pictures: from columns to what the page draws of them.

    Example:
        >>> import optax_clipx as clipx
        >>> found = clipx.diagnose({"norm": [1.0 + 0.01 * (i % 7) for i in range(100)]})
        >>> bool(found), found.findings
        (False, ())
        >>> found.not_judged["dominant-leaf"]
        'norms of leaves'
    """

    findings: tuple[Finding, ...]
    not_judged: Mapping[str, str]
    steps: int
    pictures: Mapping[str, Envelope] = field(
        repr=False, compare=False, default_factory=dict
    )

    def __bool__(self) -> bool:
        return any(finding.severity != "info" for finding in self.findings)

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of the findings, each once, the worst first."""
        return tuple(dict.fromkeys(finding.code for finding in self.findings))

    @property
    def summary(self) -> str:
        """One line that says how the run is."""
        if not self:
            return f"healthy: no errors or warnings in {self.steps:,} steps"
        kinds = [finding.severity for finding in self.findings]
        counts = [f"{kinds.count(x)} of severity {x}" for x in SEVERITIES if x in kinds]
        return f"{', '.join(counts)}, in {self.steps:,} steps"

    def __str__(self) -> str:
        lines = [self.summary]
        lines += map(str, self.findings)
        return "\n".join([*lines, *self.unjudged()])

    def unjudged(self) -> list[str]:
        """A line for each kind of column that was missing, with what it would tell."""
        lacking: dict[str, list[str]] = {}
        for code, column in self.not_judged.items():
            lacking.setdefault(column, []).append(code)
        return [
            f"not judged, without {column}: {', '.join(codes)}"
            for column, codes in lacking.items()
        ]

    def _asdict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "healthy": not self,
            "steps": self.steps,
            "findings": [_for_json(finding) for finding in self.findings],
            "not_judged": dict(self.not_judged),
        }

    def _repr_html_(self) -> str:
        from .diagnosis_page import fragment

        return fragment(self)


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


def _for_json(finding: Finding) -> dict[str, Any]:
    """JSON has no NaN or infinity; they become strings as in a History's file."""
    evidence = {name: named(value) for name, value in finding.evidence.items()}
    return {**finding._asdict(), "sentence": finding.sentence, "evidence": evidence}


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
