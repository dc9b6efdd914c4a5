"""`Diagnosis`: all that was found in a run, as text, as data and as HTML."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .diagnosis_page import fragment
from .drawing import Envelope
from .findings import SEVERITIES, Finding
from .jsonl import named


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
        return fragment(self.summary, self.findings, self.pictures, self.unjudged())


def _for_json(finding: Finding) -> dict[str, Any]:
    """JSON has no NaN or infinity; they become strings as in a History's file."""
    evidence = {name: named(value) for name, value in finding.evidence.items()}
    return {**finding._asdict(), "sentence": finding.sentence, "evidence": evidence}
