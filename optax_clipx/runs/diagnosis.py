"""`Diagnosis`: all that was found in a run, as text, as data and as HTML."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .advice import DIVERGED, REPLACING
from .causes import CHAIN, CHECKS
from .diagnosis_page import fragment
from .drawing import Envelope
from .escaping import printable
from .findings import SEVERITIES, Finding, headline, told_once
from .jsonl import named
from .naming import counted

_NAMES = {
    "the loss": "loss",
    "the gradient norm": "grad_norm",
    "the threshold": "clip/threshold",
    "the norm of the updates": "update_norm",
    "the learning rate": "learning_rate",
    "the steps that were skipped": "skip/skipped",
    "norms of leaves": "track_norms/<leaf>",
}


@dataclass(frozen=True)
class Diagnosis:
    """The result of :func:`diagnose`: what was found, and what was not checked.

    ``bool(diagnosis)`` is ``False`` if there are neither errors nor warnings.

    Attributes:
        findings: a tuple of :class:`Finding`, the worst first.
        not_judged: the codes that could not be checked. It is a dict from each such
            code to the data that the run does not have.
        steps: the number of steps of the run.
        pictures: the lines that a notebook or a page draws: a dict from the name of a
            column to its line.
        notice: which column may hold the gradient norm, if none was recognized. It is
            empty if one was.

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
    notice: str = ""

    def __bool__(self) -> bool:
        return any(finding.severity != "info" for finding in self.findings)

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of the findings, each once, the worst first."""
        return tuple(dict.fromkeys(finding.code for finding in self.findings))

    @property
    def summary(self) -> str:
        """One line that says how the run is."""
        if not self and self.notice:
            return (
                f"no errors or warnings in {self.steps:,} steps, but no gradient norm"
                " was judged"
            )
        if not self:
            return f"healthy: no errors or warnings in {self.steps:,} steps"
        kinds = [finding.severity for finding in self.findings]
        counts = [(kinds.count(x), x) for x in SEVERITIES if x in kinds]
        said = [f"{n} info" if x == "info" else counted(n, x) for n, x in counts]
        return f"{', '.join(said)} in {counted(self.steps, 'step')}"

    def __str__(self) -> str:
        lines = [self.summary, *self._told()]
        for finding, texts in told_once(self.findings):
            lines.append(printable(headline(finding)))
            lines += [f"  {printable(line)}" for line in texts.lines()]
        return "\n".join([*lines, *self._clippers(), *self.unjudged()])

    def _told(self) -> list[str]:
        """What is said of the run as a whole."""
        return [*self._notices(), *self._order()]

    def _notices(self) -> list[str]:
        return [printable(self.notice)] if self.notice else []

    def _clippers(self) -> list[str]:
        """A line that says why another clipper may be suggested than is advised."""
        advised = [x for x in self.findings if x.code in REPLACING]
        if any(x.code in DIVERGED and x.severity == "error" for x in advised):
            return []  # both name the same
        if all(x.severity == "info" for x in advised):
            return []
        return [
            "The clippers in this output are for the faults of this run."
            " suggest_threshold may name another clipper: it is for a run without"
            " faults."
        ]

    def _order(self) -> list[str]:
        """A line with where a divergence began, if it shows in several findings."""
        chain = [x for x in self.findings if x.code in CHAIN and x.severity == "error"]
        if len(chain) < 2:
            return []
        began, *later = [f"{x.code} at step {x.steps[0]:,}" for x in chain]
        return [f"It started with {began}; then came {', then '.join(later)}."]

    def unjudged(self) -> list[str]:
        """A line for each kind of column that was missing, with what it would tell."""
        lacking: dict[str, list[str]] = {}
        for code, column in self.not_judged.items():
            lacking.setdefault(column, []).append(code)
        return [
            f"Not checked: {_faults(codes)}. This {_needed(column)}."
            for column, codes in lacking.items()
        ]

    def _asdict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "healthy": not self,
            "steps": self.steps,
            **({"notice": self.notice} if self.notice else {}),
            "findings": [_for_json(finding) for finding in self.findings],
            "not_judged": dict(self.not_judged),
        }

    def _repr_html_(self) -> str:
        summary = ". ".join([self.summary, *self._told()])
        notes = [*self._clippers(), *self.unjudged()]
        return fragment(summary, self.findings, self.pictures, notes)


def _faults(codes: list[str]) -> str:
    """What was not checked, in words, with the code of each fault."""
    if len(codes) == len(CHECKS) - 1:
        return "all other faults"
    return ", ".join(f"{CHECKS[code]} ({code})" for code in codes)


def _needed(column: str) -> str:
    """What a run lacks, with a name that such a column may have."""
    name = _NAMES.get(column)
    if name is None:
        return f"needs {column}"
    return f"needs a column with {column}, for example {name}"


def _for_json(finding: Finding) -> dict[str, Any]:
    """JSON has no NaN or infinity; they become strings as in a History's file."""
    evidence = {name: named(value) for name, value in finding.evidence.items()}
    return {
        **finding._asdict(),
        "sentence": finding.sentence,
        "evidence": evidence,
        "likely_cause": finding.likely_cause,
        "remedy": finding.remedy,
    }
